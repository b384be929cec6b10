// Dynamic batching, as rxdeploy/runtime/batching.py has it: many callers with one image each, and an engine that is
// faster with several at once. A batch starts when `max_batch` requests wait or the oldest has waited `max_delay_s`,
// whichever comes first, and a worker thread is free.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "metrics.h"
#include "rxdeploy.h"

namespace rx {

inline constexpr double FOREVER = std::numeric_limits<double>::infinity();

class Queue;

// One image on its way, and what became of it.
class Request : public std::enable_shared_from_this<Request> {
  public:
    // Room for the `classes` logits is made here: once it is submitted nothing may fail for want of memory.
    Request(std::vector<std::uint8_t> image, std::size_t classes, double submitted, double start_by, double expires,
            rxdeploy_callback callback, void *user)
        : image(std::move(image)), submitted(submitted), start_by(start_by), expires(expires), logits_(classes),
          callback_(callback), user_(user) {}

    // Wait, `timeout` seconds at most; RXDEPLOY_PENDING when it is not done. `logits` may be null.
    rxdeploy_status wait(double timeout, float *logits, std::string &message);
    // Whether it is cancelled: it was not started yet. Its place in the queue is free at once.
    bool cancel();

    // Of who took it out of the queue, once: whether it is still wanted.
    bool start();
    void settle(const float *logits);
    void settle(rxdeploy_status status, const char *message);

    std::vector<std::uint8_t> image;
    const double submitted, start_by, expires;
    std::weak_ptr<Queue> queue;
    std::list<std::shared_ptr<Request>>::iterator place;  // in the queue's `waiting`, or `outside`
    enum class Where { nowhere, waiting, outside } where = Where::nowhere;  // under the queue's lock
    bool refused = false;  // the session was closed while it waited for room; under the queue's lock

  private:
    void hand_over(std::unique_lock<std::mutex> lock, rxdeploy_status status, const char *message);

    enum class State { waiting, started, done };
    std::mutex mutex_;
    std::condition_variable done_;
    State state_ = State::waiting;
    rxdeploy_status status_ = RXDEPLOY_PENDING;
    std::string message_;
    std::vector<float> logits_;
    const rxdeploy_callback callback_;
    void *const user_;
};

struct Batching {
    std::size_t max_batch;
    double max_delay_s;
    std::size_t queue_size;
    bool rejects;  // when full, where others wait
};

// Computes batches of single requests in threads of its own.
class Batcher {
  public:
    // Logits of `n` images of `image_bytes` each.
    using Run = std::function<void(const std::uint8_t *images, std::size_t n, float *logits)>;

    Batcher(Run run, std::size_t image_bytes, std::size_t classes, const Batching &batching,
            std::shared_ptr<Metrics> metrics, std::size_t workers);
    ~Batcher();  // closes it, computing what waits

    // Queue an image; see rxdeploy_submit. Error: Closed, Rejected.
    std::shared_ptr<Request> submit(std::vector<std::uint8_t> image, double deadline, double timeout,
                                    rxdeploy_callback callback, void *user);
    // Accept nothing more; compute what waits, or fail it; end the threads. Returns at once in one of them.
    void close(bool drain);
    // Whether the calling thread is one of those that compute or watch deadlines.
    bool is_own_thread() const;

  private:
    void work();
    void serve(const std::list<std::shared_ptr<Request>> &batch, std::vector<std::uint8_t> &images,
               std::vector<float> &logits);
    void compute_alone(Request &request, float *logits);
    void watch_deadlines();

    const Run run_;
    const std::size_t image_bytes_, classes_;
    const double delay_;
    const std::shared_ptr<Metrics> metrics_;
    const std::shared_ptr<Queue> queue_;
    std::mutex closing_;
    mutable std::mutex threads_mutex_;  // of all that follows
    std::vector<std::thread> threads_;
    std::vector<std::thread::id> own_;
    bool keeps_deadlines_ = false;
};

}  // namespace rx
