// A loaded bundle: what the C ABI's handle stands for.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "batching.h"
#include "bundle.h"
#include "engine.h"
#include "metrics.h"

namespace rx {

struct Options {
    std::string device = "auto", onnxruntime, tensorrt, labels;
    int threads = 0;
    std::size_t max_batch = 0, queue_size = 1024, workers = 0;
    double max_delay_ms = 2;
    bool rejects = false;
    std::vector<std::string> trusted_keys;  // none: any bundle is opened
};

// Thread-safe; every error is an Error.
class Session {
  public:
    Session(const std::string &path, Options options);

    void run(const std::uint8_t *images, std::size_t n, float *logits);
    void run_float32(const float *images, std::size_t n, float *logits);
    void run_device(const void *images, std::size_t n, void *logits, void *stream);
    void prepare(const std::vector<std::size_t> &sizes);
    std::shared_ptr<Request> submit(const std::uint8_t *image, double deadline, double timeout,
                                    rxdeploy_callback callback, void *user);
    // As rxdeploy_close.
    void close(bool drain);
    // Whether the calling thread is one of the session's: it cannot wait for itself.
    bool is_own_thread() const;
    // Whether this process was forked from the one that opened it: there are no threads here.
    bool is_forked() const;
    // Error (RXDEPLOY_CLOSED) in such a process: locks may be held there for ever.
    void check_process() const;

    const Bundle bundle;
    const std::size_t image_bytes;  // of one uint8 image
    std::string device, description, passed_over;
    std::vector<std::string> labels;
    std::size_t largest;
    const std::shared_ptr<Metrics> metrics;

  private:
    // A call that `close` waits for.
    class Call {
      public:
        explicit Call(Session &session);
        ~Call();
        Call(const Call &) = delete;
        Call &operator=(const Call &) = delete;
        Engine &engine() const { return *engine_; }
        const std::shared_ptr<Engine> &shared() const { return engine_; }

      private:
        Session &session_;
        std::shared_ptr<Engine> engine_;
    };

    std::shared_ptr<Engine> open_engine();
    void check_count(std::size_t n) const;
    void compute(Engine &engine, const void *images, std::size_t n, float *logits);
    Batcher &batcher();
    std::unique_ptr<Batcher> make_batcher();

    const Options options_;
    const pid_t process_;
    std::mutex opening_;        // held while the batcher is made, which may load the model again
    mutable std::mutex mutex_;  // of all that follows
    std::condition_variable idle_;
    std::shared_ptr<Engine> engine_;
    std::size_t calls_ = 0;
    bool closed_ = false;
    std::unique_ptr<Batcher> batcher_;  // none until something is submitted, then always that one
};

// The `k` most probable classes of one row, best first; at most `classes` are written. RXDEPLOY_CHECK_FAILED when a
// logit is not finite: such have no order.
void top(const float *logits, std::size_t classes, std::size_t k, rxdeploy_prediction *predictions);

}  // namespace rx
