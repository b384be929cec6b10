// rxdeploy: run a bundle that `rxdeploy build` made, from C++17. A thin cover of rxdeploy.h, all of it in this header.
//
//     rxdeploy::Session session("gluon_resnext50_32x4d-fp16");
//     std::vector<std::uint8_t> image = session.preprocess({pixels, width, height});
//     for (const rxdeploy::Prediction &p : session.top(session.run(image), 5))
//         std::cout << session.label(p.index) << " " << p.probability << "\n";
//
// Errors are exceptions of type rxdeploy::Error, of a subclass for each status. A session may be used by any number of
// threads at once; what rxdeploy.h says of a function holds here too.
#ifndef RXDEPLOY_HPP
#define RXDEPLOY_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "rxdeploy.h"

namespace rxdeploy {

// Errors

class Error : public std::runtime_error {
  public:
    Error(rxdeploy_status status, const std::string &message) : std::runtime_error(message), status_(status) {}
    rxdeploy_status status() const noexcept { return status_; }

  private:
    rxdeploy_status status_;
};

template <rxdeploy_status STATUS>
class ErrorOf : public Error {
  public:
    explicit ErrorOf(const std::string &message) : Error(STATUS, message) {}
};

using CheckFailed = ErrorOf<RXDEPLOY_CHECK_FAILED>;
using InputError = ErrorOf<RXDEPLOY_INPUT_ERROR>;
using EnvironmentLacks = ErrorOf<RXDEPLOY_ENVIRONMENT_LACKS>;
using Closed = ErrorOf<RXDEPLOY_CLOSED>;
using Rejected = ErrorOf<RXDEPLOY_REJECTED>;
using DeadlineExceeded = ErrorOf<RXDEPLOY_DEADLINE_EXCEEDED>;
using Cancelled = ErrorOf<RXDEPLOY_CANCELLED>;

// Throw the exception for a status; nothing for RXDEPLOY_OK.
inline void check(rxdeploy_status status, const char *message = nullptr) {
    if (status == RXDEPLOY_OK) return;
    const std::string text = message ? message : rxdeploy_last_error();
    switch (status) {
        case RXDEPLOY_CHECK_FAILED: throw CheckFailed(text);
        case RXDEPLOY_INPUT_ERROR: throw InputError(text);
        case RXDEPLOY_ENVIRONMENT_LACKS: throw EnvironmentLacks(text);
        case RXDEPLOY_CLOSED: throw Closed(text);
        case RXDEPLOY_REJECTED: throw Rejected(text);
        case RXDEPLOY_DEADLINE_EXCEEDED: throw DeadlineExceeded(text);
        case RXDEPLOY_CANCELLED: throw Cancelled(text);
        default: throw Error(status, text);
    }
}

// Values of someone else's, as std::span: a pointer and how many. Made of anything with data() and size().
template <typename T>
class View {
  public:
    View() = default;
    View(T *data, std::size_t size) : data_(data), size_(size) {}
    template <typename Container,
              typename = std::enable_if_t<
                  std::is_convertible_v<decltype(std::declval<Container &>().data()), T *> &&
                  std::is_convertible_v<decltype(std::declval<Container &>().size()), std::size_t>>>
    View(Container &&container) : data_(container.data()), size_(container.size()) {}

    T *data() const { return data_; }
    std::size_t size() const { return size_; }
    T *begin() const { return data_; }
    T *end() const { return data_ + size_; }
    T &operator[](std::size_t i) const { return data_[i]; }

  private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};

using Prediction = rxdeploy_prediction;
using Metrics = rxdeploy_metrics;
using Frame = rxdeploy_frame;  // {data, width, height}: packed RGB

struct Options {
    std::string device = "auto", onnxruntime, tensorrt, labels;  // "": as NULL in rxdeploy_options
    int threads = 0;
    std::size_t max_batch = 0, queue_size = 1024, workers = 0;
    double max_delay_ms = 2;
    bool reject_when_full = false;
    // Files of public keys; without, any bundle is opened. An empty list is an error: it would trust nobody.
    std::optional<std::vector<std::string>> trusted_keys;
};

struct SubmitOptions {
    double deadline_s = std::numeric_limits<double>::infinity();
    double timeout_s = std::numeric_limits<double>::infinity();
};

// A request that was submitted, as a future. The request goes on without it.
class Request {
  public:
    // Whether it is done, waited for this long.
    bool wait(double timeout_s = std::numeric_limits<double>::infinity()) const {
        if (timeout_s != timeout_s) throw InputError("timeout_s must be a number");
        if (!handle_) throw InputError("the request was moved elsewhere");
        return rxdeploy_request_wait(handle_.get(), timeout_s, nullptr) != RXDEPLOY_PENDING;
    }
    bool wait_for(std::chrono::duration<double> timeout) const { return wait(timeout.count()); }

    // The logits, waited for; throws what became of the request otherwise.
    std::vector<float> get() const {
        std::vector<float> logits(classes_);
        check(rxdeploy_request_wait(handle_.get(), std::numeric_limits<double>::infinity(), logits.data()));
        return logits;
    }

    bool cancel() const { return rxdeploy_request_cancel(handle_.get()) != 0; }

  private:
    friend class Session;
    struct Free {
        void operator()(rxdeploy_request *request) const { rxdeploy_request_free(request); }
    };
    Request(rxdeploy_request *handle, std::size_t classes) : handle_(handle), classes_(classes) {}

    std::unique_ptr<rxdeploy_request, Free> handle_;
    std::size_t classes_;
};

// What a callback gets: the logits, valid until it returns, or why there are none.
class Result {
  public:
    Result(rxdeploy_status status, View<const float> logits, const char *message)
        : status_(status), logits_(logits), message_(message ? message : "") {}
    bool ok() const { return status_ == RXDEPLOY_OK; }
    rxdeploy_status status() const { return status_; }
    const std::string &message() const { return message_; }
    // Throws why there are none.
    View<const float> logits() const {
        check(status_, message_.c_str());
        return logits_;
    }

  private:
    rxdeploy_status status_;
    View<const float> logits_;
    std::string message_;
};

// On a thread of the library's; an exception that leaves it ends the program.
using Callback = std::function<void(const Result &)>;

class Session {
  public:
    explicit Session(const std::string &bundle, const Options &options = {}) {
        rxdeploy_options given;
        rxdeploy_options_init(&given);
        const auto text = [](const std::string &value) { return value.empty() ? nullptr : value.c_str(); };
        given.device = text(options.device);
        given.onnxruntime = text(options.onnxruntime);
        given.tensorrt = text(options.tensorrt);
        given.labels = text(options.labels);
        given.threads = options.threads;
        given.max_batch = options.max_batch;
        given.max_delay_ms = options.max_delay_ms;
        given.queue_size = options.queue_size;
        given.when_full = options.reject_when_full ? RXDEPLOY_REJECT : RXDEPLOY_WAIT;
        given.workers = options.workers;
        std::vector<const char *> keys;
        if (options.trusted_keys) {
            for (const std::string &key : *options.trusted_keys) keys.push_back(key.c_str());
            given.trusted_key_count = keys.size();
            keys.push_back(nullptr);  // so that an empty list has an address, too
            given.trusted_keys = keys.data();
        }
        rxdeploy_session *session = nullptr;
        check(rxdeploy_open(bundle.c_str(), &given, &session));
        handle_.reset(session);
        info_.size = sizeof info_;
        check(rxdeploy_get_info(session, &info_));
    }

    std::size_t image_size() const { return info_.image_size; }
    std::size_t classes() const { return info_.classes; }
    std::size_t image_bytes() const { return info_.image_bytes; }
    const rxdeploy_info &info() const { return info_; }
    std::string model() const { return rxdeploy_model(handle_.get()); }
    std::string precision() const { return rxdeploy_precision(handle_.get()); }
    std::string device() const { return rxdeploy_device(handle_.get()); }
    std::string description() const { return rxdeploy_description(handle_.get()); }
    std::string passed_over() const { return rxdeploy_passed_over(handle_.get()); }

    // Name of a class, its number where it has none.
    std::string label(std::size_t index) const {
        const char *name = rxdeploy_label(handle_.get(), index);
        return name ? name : std::to_string(index);
    }

    // Logits of whole images, one after the other in `images`: uint8 (n, image_size, image_size, 3).
    std::vector<float> run(View<const std::uint8_t> images) {
        std::vector<float> logits(images_in(images, info_.image_bytes) * info_.classes);
        run(images, logits);
        return logits;
    }
    void run(View<const std::uint8_t> images, View<float> logits) {
        const std::size_t n = images_in(images, info_.image_bytes);
        check_room(logits, n);
        check(rxdeploy_run(handle_.get(), images.data(), n, logits.data()));
    }

    // The declared input of a bundle built with `--input float32`: normalised, NCHW.
    std::vector<float> run_float32(View<const float> images) {
        const std::size_t n = images_in(images, info_.image_bytes);
        std::vector<float> logits(n * info_.classes);
        check(rxdeploy_run_float32(handle_.get(), images.data(), n, logits.data()));
        return logits;
    }

    // Device memory on a caller's CUDA stream; see rxdeploy_run_device.
    void run_device(const void *images, std::size_t n, void *logits, void *stream = nullptr) {
        check(rxdeploy_run_device(handle_.get(), images, n, logits, stream));
    }

    void prepare(View<const std::size_t> sizes) {
        check(rxdeploy_prepare(handle_.get(), sizes.data(), sizes.size()));
    }

    // The `k` most probable classes of one image's logits, best first; all classes when `k` is more.
    std::vector<Prediction> top(View<const float> logits, std::size_t k = 5) const {
        if (logits.size() != info_.classes)
            throw InputError("logits: there are " + std::to_string(logits.size()) + ", one image has " +
                             std::to_string(info_.classes) + "; top_each is for more");
        std::vector<Prediction> found(k < info_.classes ? k : info_.classes);
        check(rxdeploy_top(handle_.get(), logits.data(), 1, found.size(), found.data()));
        return found;
    }
    // The same of each image of a batch.
    std::vector<std::vector<Prediction>> top_each(View<const float> logits, std::size_t k = 5) const {
        std::vector<std::vector<Prediction>> rows;
        for (std::size_t begin = 0; begin < images_in(logits, info_.classes) * info_.classes; begin += info_.classes)
            rows.push_back(top({logits.data() + begin, info_.classes}, k));
        return rows;
    }

    // A decoded frame to one image for `run` and `submit`, as Pillow would make it.
    std::vector<std::uint8_t> preprocess(const Frame &frame) const {
        std::vector<std::uint8_t> image(info_.image_bytes);
        check(rxdeploy_preprocess(handle_.get(), &frame, image.data()));
        return image;
    }

    // One image, computed together with those of other callers.
    Request submit(View<const std::uint8_t> image, const SubmitOptions &options = {}) {
        rxdeploy_request *request = nullptr;
        submit(image, options, nullptr, nullptr, &request);
        return Request(request, info_.classes);
    }

    // The same; `callback` is called once, unless this throws.
    void submit(View<const std::uint8_t> image, Callback callback, const SubmitOptions &options = {}) {
        auto held = std::make_unique<Callback>(std::move(callback));
        submit(image, options, &Session::called, held.get(), nullptr);
        held.release();  // `called` frees it
    }

    Metrics metrics() const {
        Metrics metrics{};
        metrics.size = sizeof metrics;
        check(rxdeploy_get_metrics(handle_.get(), &metrics));
        return metrics;
    }
    std::string metrics_json() const { return text(rxdeploy_metrics_json); }
    std::string metrics_prometheus() const { return text(rxdeploy_metrics_prometheus); }

    void close(bool drain = true) { rxdeploy_close(handle_.get(), drain); }
    rxdeploy_session *handle() const { return handle_.get(); }

  private:
    struct Free {
        void operator()(rxdeploy_session *session) const { rxdeploy_free(session); }
    };

    template <typename T>
    static std::size_t images_in(View<const T> images, std::size_t samples) {
        if (images.size() % samples)
            throw InputError(std::to_string(images.size()) + " values are no whole number of rows of " +
                             std::to_string(samples));
        return images.size() / samples;
    }

    void check_room(View<float> logits, std::size_t n) const {
        if (logits.size() < n * info_.classes)
            throw InputError("logits: there is room for " + std::to_string(logits.size()) + ", and " +
                             std::to_string(n * info_.classes) + " come out");
    }

    void submit(View<const std::uint8_t> image, const SubmitOptions &options, rxdeploy_callback callback, void *user,
                rxdeploy_request **request) {
        if (image.size() != info_.image_bytes)
            throw InputError("image: it has " + std::to_string(image.size()) + " bytes, expected " +
                             std::to_string(info_.image_bytes));
        rxdeploy_submit_options given;
        rxdeploy_submit_options_init(&given);
        given.deadline_s = options.deadline_s;
        given.timeout_s = options.timeout_s;
        given.callback = callback;
        given.user = user;
        check(rxdeploy_submit(handle_.get(), image.data(), &given, request));
    }

    static void called(void *user, rxdeploy_status status, const float *logits, std::size_t classes,
                       const char *message) noexcept {
        const std::unique_ptr<Callback> callback(static_cast<Callback *>(user));
        (*callback)(Result(status, View<const float>(logits, logits ? classes : 0), message));
    }

    std::string text(rxdeploy_status (*get)(const rxdeploy_session *, char **)) const {
        char *made = nullptr;
        check(get(handle_.get(), &made));
        const std::unique_ptr<char, void (*)(char *)> held(made, rxdeploy_text_free);
        return made;
    }

    std::unique_ptr<rxdeploy_session, Free> handle_;
    rxdeploy_info info_{};
};

}  // namespace rxdeploy

#endif
