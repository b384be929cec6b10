#include "session.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "onnxruntime.h"
#include "preprocess.h"
#include "tensorrt.h"

namespace rx {
namespace {

constexpr std::size_t LARGEST_DEFAULT = 32;  // images that `submit` puts together where the options do not say
constexpr float LARGEST_PIXEL = 65504;       // of a normalised image; where float16 ends
constexpr std::size_t MOST = 1 << 20;        // of anything that is counted in the options

// "tensorrt:1" -> ("tensorrt", 1).
std::pair<std::string, int> parse_device(const std::string &device) {
    const std::size_t colon = device.find(':');
    const std::string kind = device.substr(0, colon);
    const std::string number = colon == std::string::npos ? "" : device.substr(colon + 1);
    const bool digits = !number.empty() && number.size() < 5 &&
                        std::all_of(number.begin(), number.end(), [](char c) { return c >= '0' && c <= '9'; });
    if ((kind != "auto" && kind != "tensorrt" && kind != "cpu") ||
        (colon != std::string::npos && (kind == "cpu" || !digits)))
        input_error("device '" + printable(device) + "': must be auto, tensorrt or cpu; a GPU's number may follow: "
                    "tensorrt:1");
    return {kind, digits ? std::stoi(number) : 0};
}

void check(const Options &options) {
    if (options.threads < 0 || options.threads > 4096)
        input_error("threads is " + std::to_string(options.threads) + "; it must be from 0 to 4096");
    for (const auto &[name, value] : {std::pair("max_batch", options.max_batch), {"workers", options.workers},
                                      {"queue_size", options.queue_size}})
        if (value > MOST)
            input_error(std::string(name) + " is " + std::to_string(value) + "; it must be at most " +
                        std::to_string(MOST));
    if (options.queue_size < 1) input_error("queue_size is 0; it must be at least 1");
    if (!(options.max_delay_ms >= 0) || std::isinf(options.max_delay_ms))
        input_error("max_delay_ms must be a number, at least 0");
    parse_device(options.device);
}

// As the Python runtime: integers make finite logits of NaN.
void check_normalised(const float *images, std::size_t count) {
    const auto fits = [](float sample) { return std::fabs(sample) <= LARGEST_PIXEL; };
    if (std::all_of(images, images + count, fits)) return;
    const auto finite = [](float sample) { return std::isfinite(sample); };
    input_error(std::string("images: holds ") +
                (std::all_of(images, images + count, finite) ? "values beyond 65504" : "NaN or infinity") +
                "; normalised pixels are a few units");
}

}  // namespace

Session::Session(const std::string &path, Options options)
    : bundle((check(options), path), options.trusted_keys),
      image_bytes(bundle.manifest.preprocessing.image_size * bundle.manifest.preprocessing.image_size * 3),
      metrics(std::make_shared<Metrics>(
          Cost{bundle.manifest.card_flops.value_or(0), bundle.manifest.multiply_adds})),
      options_(std::move(options)), process_(::getpid()) {
    labels = options_.labels.empty() ? bundle.labels() : read_labels(options_.labels, bundle.manifest.num_classes);
    engine_ = open_engine();
    device = engine_->device();
    description = engine_->description();
    largest = engine_->largest();
}

std::shared_ptr<Engine> Session::open_engine() {
    const auto [kind, ordinal] = parse_device(options_.device);
    const auto tensorrt = [&, number = ordinal] { return open_tensorrt(bundle, options_.tensorrt, number); };
    const auto cpu = [&] { return open_onnxruntime(bundle, options_.onnxruntime, options_.threads); };
    try {
        if (kind == "tensorrt") return tensorrt();
        if (kind == "cpu") return cpu();
    } catch (const Error &error) {
        if (error.status != RXDEPLOY_ENVIRONMENT_LACKS) throw;
        lacks("device " + options_.device + " is not possible here: " + error.what());
    }
    try {
        return tensorrt();
    } catch (const Error &error) {
        if (error.status != RXDEPLOY_ENVIRONMENT_LACKS) throw;
        passed_over = std::string("tensorrt: ") + error.what();
    }
    try {
        return cpu();
    } catch (const Error &error) {
        if (error.status != RXDEPLOY_ENVIRONMENT_LACKS) throw;
        lacks("bundle " + bundle.path + " cannot run here: " + passed_over + "; cpu: " + error.what());
    }
}

bool Session::is_forked() const { return ::getpid() != process_; }

void Session::check_process() const {
    if (is_forked())
        closed("this process was forked from the one that opened the session, whose threads it has not; open the "
               "bundle after the fork");
}

Session::Call::Call(Session &session) : session_(session) {
    session.check_process();
    const std::lock_guard lock(session.mutex_);
    if (session.closed_) closed(CLOSED);
    engine_ = session.engine_;
    ++session.calls_;
}

Session::Call::~Call() {
    engine_.reset();
    const std::lock_guard lock(session_.mutex_);
    if (--session_.calls_ == 0) session_.idle_.notify_all();
}

// A number of images that no memory holds is a negative one, most often.
void Session::check_count(std::size_t n) const {
    const std::size_t largest_row = sizeof(float) * std::max(image_bytes, bundle.manifest.num_classes);
    if (n > static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max()) / largest_row)
        input_error("n is " + std::to_string(n) + ", more images than memory holds");
}

void Session::compute(Engine &engine, const void *images, std::size_t n, float *logits) {
    const double begin = now();
    try {
        engine.run(images, n, logits);
    } catch (...) {
        metrics->count_error();
        throw;
    }
    metrics->record_run(n, now() - begin);
    const std::size_t count = n * bundle.manifest.num_classes;
    if (!std::all_of(logits, logits + count, [](float logit) { return std::isfinite(logit); })) {
        metrics->count_error();
        check_failed("bundle " + bundle.path + ": the logits hold NaN or infinity; validate the model, or build with "
                     "--fp32");
    }
}

void Session::run(const std::uint8_t *images, std::size_t n, float *logits) {
    const Call call(*this);
    check_count(n);
    if (!n) return;
    if (bundle.manifest.normalisation_in_graph) return compute(call.engine(), images, n, logits);
    const std::size_t most = call.engine().largest();
    std::vector<float> normalised(std::min(n, most) * image_bytes);
    for (std::size_t begin = 0; begin < n; begin += most) {
        const std::size_t part = std::min(most, n - begin);
        normalise(images + begin * image_bytes, part, bundle.manifest.preprocessing, normalised.data());
        compute(call.engine(), normalised.data(), part, logits + begin * bundle.manifest.num_classes);
    }
}

void Session::run_float32(const float *images, std::size_t n, float *logits) {
    const Call call(*this);
    check_count(n);
    if (bundle.manifest.normalisation_in_graph)
        input_error("images: the bundle takes uint8 images and normalises them itself; use rxdeploy_run");
    if (!n) return;
    check_normalised(images, n * image_bytes);
    compute(call.engine(), images, n, logits);
}

void Session::run_device(const void *images, std::size_t n, void *logits, void *stream) {
    const Call call(*this);
    check_count(n);
    if (!n) return;
    const double begin = now();
    try {
        call.engine().run_device(images, n, logits, stream);
    } catch (const Error &error) {
        if (error.status != RXDEPLOY_INPUT_ERROR) metrics->count_error();
        throw;
    } catch (...) {
        metrics->count_error();
        throw;
    }
    if (stream)
        metrics->record_enqueued(n);
    else
        metrics->record_run(n, now() - begin);
}

void Session::prepare(const std::vector<std::size_t> &sizes) {
    const Call call(*this);
    for (const std::size_t size : sizes)
        if (!size) input_error("batch size 0: it must be at least 1");
    call.engine().prepare(sizes);
}

Batcher &Session::batcher() {
    check_process();
    const auto existing = [this] {
        const std::lock_guard lock(mutex_);
        if (closed_) closed(CLOSED);
        return batcher_.get();
    };
    if (Batcher *batcher = existing()) return *batcher;
    const std::lock_guard opening(opening_);
    if (Batcher *batcher = existing()) return *batcher;
    std::unique_ptr<Batcher> made = make_batcher();
    const std::lock_guard lock(mutex_);
    if (closed_) closed(CLOSED);
    batcher_ = std::move(made);
    return *batcher_;
}

std::unique_ptr<Batcher> Session::make_batcher() {
    const Call call(*this);
    const Engine::ForRequests found = call.engine().for_requests();
    const std::shared_ptr<Engine> engine = found.engine ? found.engine : call.shared();
    const Batching batching{options_.max_batch ? options_.max_batch : std::min(largest, LARGEST_DEFAULT),
                            options_.max_delay_ms / 1000, options_.queue_size, options_.rejects};
    const bool normalises = !bundle.manifest.normalisation_in_graph;
    const auto compute_batch = [this, engine, normalises](const std::uint8_t *images, std::size_t n, float *logits) {
        if (!normalises) return compute(*engine, images, n, logits);
        std::vector<float> normalised(n * image_bytes);
        normalise(images, n, bundle.manifest.preprocessing, normalised.data());
        compute(*engine, normalised.data(), n, logits);
    };
    return std::make_unique<Batcher>(compute_batch, image_bytes, bundle.manifest.num_classes, batching, metrics,
                                     options_.workers ? options_.workers : found.workers);
}

std::shared_ptr<Request> Session::submit(const std::uint8_t *image, double deadline, double timeout,
                                         rxdeploy_callback callback, void *user) {
    if (std::isnan(deadline) || std::isnan(timeout)) input_error("deadline_s and timeout_s must be numbers");
    const Call call(*this);  // `close` waits for who waits for room, too
    return batcher().submit(std::vector<std::uint8_t>(image, image + image_bytes), deadline, timeout, callback, user);
}

bool Session::is_own_thread() const {
    const std::lock_guard lock(mutex_);
    return batcher_ && batcher_->is_own_thread();
}

void Session::close(bool drain) {
    if (is_forked()) return;
    Batcher *batcher = nullptr;
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        batcher = batcher_.get();
    }
    if (batcher) batcher->close(drain);
    if (is_own_thread()) return;
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return calls_ == 0; });
    engine_.reset();
}

void top(const float *logits, std::size_t classes, std::size_t k, rxdeploy_prediction *predictions) {
    if (!std::all_of(logits, logits + classes, [](float logit) { return std::isfinite(logit); }))
        check_failed("logits: they hold NaN or infinity");
    std::vector<std::size_t> order(classes);
    std::iota(order.begin(), order.end(), std::size_t(0));
    const std::size_t count = std::min(k, classes);
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                      [&](std::size_t a, std::size_t b) {
                          return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
                      });
    const float largest = *std::max_element(logits, logits + classes);
    double sum = 0;
    for (std::size_t i = 0; i < classes; ++i) sum += std::exp(static_cast<double>(logits[i]) - largest);
    for (std::size_t i = 0; i < k; ++i) {
        if (i >= count) {
            predictions[i] = {SIZE_MAX, 0, 0};
            continue;
        }
        const float logit = logits[order[i]];
        predictions[i] = {order[i], std::exp(static_cast<double>(logit) - largest) / sum, logit};
    }
}

}  // namespace rx
