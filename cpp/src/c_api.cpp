// The C ABI: handles and statuses outside, objects and exceptions inside.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <thread>

#include <sys/types.h>
#include <unistd.h>

#include "preprocess.h"
#include "rxdeploy.h"
#include "session.h"
#include "tensorrt.h"

using namespace rx;

struct rxdeploy_session {
    Session session;
};

struct rxdeploy_request {
    std::shared_ptr<Request> request;
    const pid_t process = ::getpid();
    // In a forked child nobody will compute it, and its locks may be held for ever.
    bool is_forked() const { return ::getpid() != process; }
};

namespace {

// A C caller may keep the message across calls that succeed; it is of this thread.
thread_local std::string last_error;

rxdeploy_status fail(rxdeploy_status status, const char *message) noexcept {
    try {
        last_error = printable(message);
    } catch (...) {
        last_error.clear();
    }
    return status;
}

// Run `body`; what it throws becomes a status and this thread's message.
template <typename Body>
rxdeploy_status guarded(Body body) noexcept {
    try {
        body();
        return RXDEPLOY_OK;
    } catch (const Error &error) {
        return fail(error.status, error.what());
    } catch (const std::bad_alloc &) {
        return fail(RXDEPLOY_ENVIRONMENT_LACKS, "there is not enough memory");
    } catch (const std::exception &error) {
        return fail(RXDEPLOY_INTERNAL, error.what());
    } catch (...) {
        return fail(RXDEPLOY_INTERNAL, "an exception of unknown type");
    }
}

void need(const void *pointer, const char *name) {
    if (!pointer) input_error(std::string(name) + " is NULL");
}

// Structs grow at the end: one of an older program is shorter, and what it lacks keeps its default; one of a newer
// program is longer. The shortest are those of RXDEPLOY_ABI 1: what they end with then.
template <typename Struct>
constexpr std::size_t SHORTEST = sizeof(Struct);
constexpr std::size_t LONGEST = 4096;

template <typename Struct>
void check_size(std::size_t size, const char *name) {
    if (size < SHORTEST<Struct> || size > LONGEST)
        input_error(std::string(name) + ".size is " + std::to_string(size) + "; set it to sizeof(" + name + ")");
}

// Fill a struct of `size` bytes, which is how long the caller's is.
template <typename Struct>
void fill(Struct *to, const Struct &from, std::size_t size) {
    std::memset(static_cast<void *>(to), 0, size);
    std::memcpy(static_cast<void *>(to), &from, std::min(size, sizeof(Struct)));
    to->size = size;
}

template <typename Struct>
Struct read_struct(const Struct *given, const Struct &defaults, const char *name) {
    Struct result = defaults;
    if (!given) return result;
    check_size<Struct>(given->size, name);
    const auto *bytes = reinterpret_cast<const unsigned char *>(given);
    for (std::size_t i = sizeof(Struct); i < given->size; ++i)
        if (bytes[i])
            input_error(std::string(name) + " asks for what this version of the library (" RXDEPLOY_VERSION
                        ") does not know; install the one that the program was compiled with");
    std::memcpy(static_cast<void *>(&result), given, std::min(given->size, sizeof(Struct)));
    return result;
}

template <typename Struct>
void write_struct(Struct *to, const Struct &from, const char *name) {
    need(to, name);
    check_size<Struct>(to->size, name);
    fill(to, from, to->size);
}

rxdeploy_options default_options() {
    const Options defaults;
    rxdeploy_options options{};
    options.size = sizeof options;
    options.max_delay_ms = defaults.max_delay_ms;
    options.queue_size = defaults.queue_size;
    return options;
}

rxdeploy_submit_options default_submit_options() {
    rxdeploy_submit_options options{};
    options.size = sizeof options;
    options.deadline_s = options.timeout_s = std::numeric_limits<double>::infinity();
    return options;
}

// Text of a session's; NULL, with a message, where there is none.
template <typename Text>
const char *text_of(const rxdeploy_session *session, Text text) noexcept {
    if (session) return text(session->session);
    fail(RXDEPLOY_INPUT_ERROR, "session is NULL");
    return nullptr;
}

char *copied(const std::string &text) {
    char *copy = new char[text.size() + 1];
    std::memcpy(copy, text.c_str(), text.size() + 1);
    return copy;
}

// No keys where there is no list; an empty one would trust nobody, and is a mistake.
std::vector<std::string> keys_of(const char *const *keys, std::size_t count) {
    constexpr std::size_t MOST = 1024;
    if (keys && !count) input_error("trusted keys: none given, so that no bundle could be trusted; give a public key");
    if (!keys && count) input_error("trusted_keys is NULL");
    if (count > MOST) input_error("trusted_key_count is " + std::to_string(count) + "; it must be at most 1024");
    std::vector<std::string> result;
    for (std::size_t i = 0; i < count; ++i) {
        need(keys[i], "a trusted key");
        result.emplace_back(keys[i]);
    }
    return result;
}

Options options_of(const rxdeploy_options &given) {
    const auto text = [](const char *value) { return std::string(value ? value : ""); };
    if (given.when_full != RXDEPLOY_WAIT && given.when_full != RXDEPLOY_REJECT)
        input_error("when_full is " + std::to_string(static_cast<int>(given.when_full)) +
                    "; it must be RXDEPLOY_WAIT or RXDEPLOY_REJECT");
    Options options;
    if (given.device) options.device = given.device;
    options.onnxruntime = text(given.onnxruntime);
    options.tensorrt = text(given.tensorrt);
    options.labels = text(given.labels);
    options.threads = given.threads;
    options.max_batch = given.max_batch;
    options.max_delay_ms = given.max_delay_ms;
    options.queue_size = given.queue_size;
    options.rejects = given.when_full == RXDEPLOY_REJECT;
    options.workers = given.workers;
    options.trusted_keys = keys_of(given.trusted_keys, given.trusted_key_count);
    return options;
}

}  // namespace

// The library

const char *rxdeploy_version(void) { return RXDEPLOY_VERSION; }
int rxdeploy_abi(void) { return RXDEPLOY_ABI; }
const char *rxdeploy_tensorrt(void) { return tensorrt_version(); }
const char *rxdeploy_last_error(void) { return last_error.c_str(); }

const char *rxdeploy_status_name(rxdeploy_status status) {
    switch (status) {
        case RXDEPLOY_OK: return "ok";
        case RXDEPLOY_CHECK_FAILED: return "check failed";
        case RXDEPLOY_INPUT_ERROR: return "input error";
        case RXDEPLOY_ENVIRONMENT_LACKS: return "environment lacks something";
        case RXDEPLOY_CLOSED: return "closed";
        case RXDEPLOY_REJECTED: return "rejected";
        case RXDEPLOY_DEADLINE_EXCEEDED: return "deadline exceeded";
        case RXDEPLOY_CANCELLED: return "cancelled";
        case RXDEPLOY_PENDING: return "pending";
        case RXDEPLOY_INTERNAL: return "internal error";
    }
    return "unknown status";
}

// A session

// In parentheses: the macro of this name is for callers.
void (rxdeploy_options_init)(rxdeploy_options *options, size_t size) {
    if (options && size >= SHORTEST<rxdeploy_options> && size <= LONGEST) fill(options, default_options(), size);
}

rxdeploy_status rxdeploy_open(const char *path, const rxdeploy_options *options, rxdeploy_session **session) {
    if (session) *session = nullptr;
    return guarded([&] {
        need(path, "path");
        need(session, "session");
        *session = new rxdeploy_session{
            Session(path, options_of(read_struct(options, default_options(), "rxdeploy_options")))};
    });
}

void rxdeploy_close(rxdeploy_session *session, int drain) {
    if (session) guarded([&] { session->session.close(drain != 0); });
}

void rxdeploy_free(rxdeploy_session *session) {
    // In a forked child the threads and the GPU are the parent's, and locks may be held for ever: leave it.
    if (!session || session->session.is_forked()) return;
    const auto end = [session] {
        session->session.close(true);
        delete session;
    };
    // In a callback, this thread is to compute the rest first; the session is freed after it.
    if (session->session.is_own_thread())
        guarded([&] {
            session->session.close(true);
            std::thread(end).detach();
        });
    else
        guarded(end);
}

rxdeploy_status rxdeploy_get_info(const rxdeploy_session *session, rxdeploy_info *info) {
    return guarded([&] {
        need(session, "session");
        const Session &s = session->session;
        const Manifest &m = s.bundle.manifest;
        write_struct(info,
                     rxdeploy_info{sizeof(rxdeploy_info), m.preprocessing.image_size, m.num_classes, s.image_bytes,
                                   s.largest, !m.normalisation_in_graph, m.multiply_adds, m.card_flops.value_or(0)},
                     "rxdeploy_info");
    });
}

const char *rxdeploy_model(const rxdeploy_session *session) {
    return text_of(session, [](const Session &s) { return s.bundle.manifest.model.c_str(); });
}

const char *rxdeploy_precision(const rxdeploy_session *session) {
    return text_of(session, [](const Session &s) { return s.bundle.manifest.precision.c_str(); });
}

const char *rxdeploy_device(const rxdeploy_session *session) {
    return text_of(session, [](const Session &s) { return s.device.c_str(); });
}

const char *rxdeploy_description(const rxdeploy_session *session) {
    return text_of(session, [](const Session &s) { return s.description.c_str(); });
}

const char *rxdeploy_passed_over(const rxdeploy_session *session) {
    return text_of(session, [](const Session &s) { return s.passed_over.c_str(); });
}

const char *rxdeploy_label(const rxdeploy_session *session, size_t index) {
    return text_of(session, [index](const Session &s) {
        return index < s.labels.size() ? s.labels[index].c_str() : nullptr;
    });
}

// Running batches

rxdeploy_status rxdeploy_run(rxdeploy_session *session, const uint8_t *images, size_t n, float *logits) {
    return guarded([&] {
        need(session, "session");
        if (n) need(images, "images"), need(logits, "logits");
        session->session.run(images, n, logits);
    });
}

rxdeploy_status rxdeploy_run_float32(rxdeploy_session *session, const float *images, size_t n, float *logits) {
    return guarded([&] {
        need(session, "session");
        if (n) need(images, "images"), need(logits, "logits");
        session->session.run_float32(images, n, logits);
    });
}

rxdeploy_status rxdeploy_run_device(rxdeploy_session *session, const void *images, size_t n, void *logits,
                                    void *stream) {
    return guarded([&] {
        need(session, "session");
        if (n) need(images, "images"), need(logits, "logits");
        session->session.run_device(images, n, logits, stream);
    });
}

rxdeploy_status rxdeploy_prepare(rxdeploy_session *session, const size_t *sizes, size_t count) {
    return guarded([&] {
        need(session, "session");
        if (count) need(sizes, "sizes");
        session->session.prepare(std::vector<std::size_t>(sizes, sizes + count));
    });
}

rxdeploy_status rxdeploy_top(const rxdeploy_session *session, const float *logits, size_t n, size_t k,
                             rxdeploy_prediction *predictions) {
    return guarded([&] {
        need(session, "session");
        if (k < 1) input_error("k is 0; it must be at least 1");
        if (n) need(logits, "logits"), need(predictions, "predictions");
        const std::size_t classes = session->session.bundle.manifest.num_classes;
        constexpr std::size_t most = PTRDIFF_MAX / sizeof(rxdeploy_prediction);
        if (n > most / classes || (n && k > most / n))
            input_error("n is " + std::to_string(n) + " and k " + std::to_string(k) + ", more than memory holds");
        for (std::size_t row = 0; row < n; ++row) top(logits + row * classes, classes, k, predictions + row * k);
    });
}

// Images

rxdeploy_status rxdeploy_preprocess(const rxdeploy_session *session, const rxdeploy_frame *frame, uint8_t *image) {
    return guarded([&] {
        need(session, "session");
        need(frame, "frame");
        need(image, "image");
        const Manifest &m = session->session.bundle.manifest;
        const Preprocessing &how = m.preprocessing;
        transform(*frame, how.image_size, how.crop_pct, how.interpolation, m.pillow, image);
    });
}

rxdeploy_status rxdeploy_transform(const rxdeploy_frame *frame, size_t image_size, double crop_pct,
                                   rxdeploy_interpolation interpolation, int pillow, uint8_t *image) {
    return guarded([&] {
        need(frame, "frame");
        need(image, "image");
        transform(*frame, image_size, crop_pct, interpolation, pillow, image);
    });
}

// Single requests

void (rxdeploy_submit_options_init)(rxdeploy_submit_options *options, size_t size) {
    if (options && size >= SHORTEST<rxdeploy_submit_options> && size <= LONGEST)
        fill(options, default_submit_options(), size);
}

rxdeploy_status rxdeploy_submit(rxdeploy_session *session, const uint8_t *image,
                                const rxdeploy_submit_options *options, rxdeploy_request **request) {
    if (request) *request = nullptr;
    return guarded([&] {
        need(session, "session");
        need(image, "image");
        const auto given = read_struct(options, default_submit_options(), "rxdeploy_submit_options");
        if (!request && !given.callback) input_error("request is NULL, and there is no callback either");
        // Made first: once it is submitted nothing may fail any more.
        auto handle = std::make_unique<rxdeploy_request>();
        handle->request =
            session->session.submit(image, given.deadline_s, given.timeout_s, given.callback, given.user);
        if (request) *request = handle.release();
    });
}

rxdeploy_status rxdeploy_request_wait(rxdeploy_request *request, double timeout_s, float *logits) {
    rxdeploy_status status = RXDEPLOY_OK;
    const rxdeploy_status failed = guarded([&] {
        need(request, "request");
        if (std::isnan(timeout_s)) input_error("timeout_s must be a number");
        if (request->is_forked()) closed("this process was forked from the one that submitted the request");
        std::string message;
        status = request->request->wait(timeout_s, logits, message);
        if (status == RXDEPLOY_PENDING) message = "the request is not done yet";
        if (status != RXDEPLOY_OK) fail(status, message.c_str());
    });
    return failed != RXDEPLOY_OK ? failed : status;
}

int rxdeploy_request_cancel(rxdeploy_request *request) {
    int cancelled = 0;
    guarded([&] {
        need(request, "request");
        if (!request->is_forked()) cancelled = request->request->cancel();
    });
    return cancelled;
}

void rxdeploy_request_free(rxdeploy_request *request) {
    if (request && !request->is_forked()) delete request;
}

// Metrics

rxdeploy_status rxdeploy_get_metrics(const rxdeploy_session *session, rxdeploy_metrics *metrics) {
    return guarded([&] {
        need(session, "session");
        session->session.check_process();
        rxdeploy_metrics snapshot{};
        session->session.metrics->snapshot(snapshot);
        write_struct(metrics, snapshot, "rxdeploy_metrics");
    });
}

rxdeploy_status rxdeploy_metrics_json(const rxdeploy_session *session, char **text) {
    return guarded([&] {
        need(session, "session");
        need(text, "text");
        *text = nullptr;
        session->session.check_process();
        *text = copied(session->session.metrics->json());
    });
}

rxdeploy_status rxdeploy_metrics_prometheus(const rxdeploy_session *session, char **text) {
    return guarded([&] {
        need(session, "session");
        need(text, "text");
        *text = nullptr;
        session->session.check_process();
        *text = copied(session->session.metrics->prometheus());
    });
}

void rxdeploy_text_free(char *text) { delete[] text; }

// Bundles

rxdeploy_status rxdeploy_check_manifest(const char *data, size_t bytes) {
    return guarded([&] {
        need(data, "data");
        parse_manifest({data, bytes}, "manifest");
    });
}

rxdeploy_status rxdeploy_check_bundle(const char *path) {
    return guarded([&] {
        need(path, "path");
        const Bundle bundle(path);
    });
}

rxdeploy_status rxdeploy_verify_bundle(const char *path, const char *const *trusted_keys, size_t trusted_key_count) {
    return guarded([&] {
        need(path, "path");
        need(trusted_keys, "trusted_keys");
        const Bundle bundle(path, keys_of(trusted_keys, trusted_key_count));
    });
}
