#include "batching.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <system_error>

#include "error.h"

namespace rx {
namespace {

constexpr double LOOK = 60;  // seconds at most between two looks at the queue: a wait for ever overflows some clocks
constexpr const char *EXPIRED = "the request was not started by its deadline; more is submitted than computed";
constexpr const char *CANCELLED = "the request was cancelled before it was started";

std::chrono::duration<double> at_most(double seconds) {
    return std::chrono::duration<double>(std::min(std::max(seconds, 0.0), LOOK));
}

}  // namespace

using Requests = std::list<std::shared_ptr<Request>>;

// The requests that wait, and outside them those for which there is no room yet. Who takes a request out of here
// settles it, without the lock: callbacks are other people's code.
class Queue {
  public:
    Queue(const Batching &batching, std::shared_ptr<Metrics> metrics)
        : most(std::min(batching.max_batch, batching.queue_size)), size_(batching.queue_size),
          rejects_(batching.rejects), metrics_(std::move(metrics)) {}

    const std::size_t most;  // in a batch

    // Queue `request`, or wait for room. Closed; Rejected.
    void put(const std::shared_ptr<Request> &request, double timeout) {
        std::unique_lock lock(mutex_);
        if (closed_) closed(CLOSED);
        if (waiting_.size() < size_ || !rejects_) {
            Requests alone{request};  // all the memory that it takes to be queued, at this end or that
            request->place = alone.begin();
            if (waiting_.size() < size_) {
                append(alone);
            } else {
                request->where = Request::Where::outside;
                outside_.splice(outside_.end(), alone);
            }
        }
        if (request->expires < expiry_) {
            expiry_ = request->expires;
            due_.notify_one();
        }
        if (request->where == Request::Where::nowhere) reject(lock);
        const double until = now() + timeout;
        while (request->where == Request::Where::outside) {
            const double rest = until - now();
            if (rest <= 0) {
                take_out(request);
                reject(lock);
            }
            room_.wait_for(lock, at_most(rest));
        }
        if (request->refused) closed(CLOSED);
    }

    // The next batch, waited for; empty when there will be none.
    Requests next_batch() {
        std::unique_lock lock(mutex_);
        while (true) {
            if (closed_ && !(drain_ && !waiting_.empty())) return {};
            const double seconds = seconds_to_start(now());
            if (seconds <= 0) return take();
            ready_.wait_for(lock, at_most(seconds));
        }
    }

    // `request` was cancelled: its place is free.
    void drop(const std::shared_ptr<Request> &request) {
        metrics_->count_cancelled();
        const std::lock_guard lock(mutex_);
        if (request->where != Request::Where::nowhere) take_out(request);
    }

    // Wait for the next deadline, a while, and take out what was not started by it. False: there will be none.
    bool expired(Requests &late) {
        std::unique_lock lock(mutex_);
        if (closed_ && waiting_.empty()) return false;
        double moment = now();
        if (expiry_ > moment) {
            due_.wait_for(lock, at_most(std::max(expiry_ - moment, 0.001)));
            return true;
        }
        expiry_ = FOREVER;
        for (Requests *place : {&waiting_, &outside_})
            for (auto it = place->begin(); it != place->end();) {
                const auto here = it++;
                if ((*here)->expires > moment) {
                    expiry_ = std::min(expiry_, (*here)->expires);
                } else {
                    (*here)->where = Request::Where::nowhere;
                    late.splice(late.end(), *place, here);
                }
            }
        if (!late.empty()) {
            metrics_->queue_depth(waiting_.size());
            room_.notify_all();
        }
        admit();
        return true;
    }

    // Accept nothing more; what will not be computed is taken out and returned.
    Requests close(bool drain) {
        const std::lock_guard lock(mutex_);
        drain_ = drain_ && drain;
        closed_ = true;
        for (const auto &request : outside_) {
            request->where = Request::Where::nowhere;
            request->refused = true;  // its submit says so
        }
        outside_.clear();
        Requests refused;
        if (!drain_) {
            for (const auto &request : waiting_) request->where = Request::Where::nowhere;
            refused.swap(waiting_);
            metrics_->queue_depth(0);
        }
        ready_.notify_all();
        due_.notify_all();
        room_.notify_all();
        return refused;
    }

  private:
    [[noreturn]] void reject(std::unique_lock<std::mutex> &lock) {
        lock.unlock();
        metrics_->count_rejected();
        throw Error(RXDEPLOY_REJECTED, std::to_string(size_) + " requests wait already; submit it later, or open the "
                                                               "session with a larger queue_size");
    }

    // The first of `from` waits now. Nodes are moved, here and below: a worker must not fail for want of memory.
    void append(Requests &from) {
        const std::shared_ptr<Request> &request = from.front();
        request->where = Request::Where::waiting;
        waiting_.splice(waiting_.end(), from, from.begin());
        metrics_->queue_depth(waiting_.size());
        // A worker is woken for the first request and for a complete batch, not for each between.
        if (request->start_by < look_) {
            look_ = request->start_by;
            ready_.notify_one();
        } else if (waiting_.size() % most == 0) {
            ready_.notify_one();
        }
    }

    void admit() {
        bool admitted = false;
        while (!outside_.empty() && waiting_.size() < size_ && !closed_) {
            append(outside_);
            admitted = true;
        }
        if (admitted) room_.notify_all();
    }

    void take_out(const std::shared_ptr<Request> &request) {
        if (request->where == Request::Where::outside) {
            outside_.erase(request->place);
            room_.notify_all();
        } else {
            waiting_.erase(request->place);
            metrics_->queue_depth(waiting_.size());
        }
        request->where = Request::Where::nowhere;
        admit();
    }

    // How long until a batch starts, as things are; sets when to look again.
    double seconds_to_start(double moment) {
        if (waiting_.size() >= most || (closed_ && !waiting_.empty())) return 0;
        look_ = FOREVER;
        for (const auto &request : waiting_) look_ = std::min(look_, request->start_by);
        return look_ - moment;
    }

    // Take a batch out, in the order of submission, and let in as many from outside.
    Requests take() {
        Requests batch;
        auto end = waiting_.begin();
        std::advance(end, std::min(waiting_.size(), most));
        batch.splice(batch.end(), waiting_, waiting_.begin(), end);
        for (const auto &request : batch) request->where = Request::Where::nowhere;
        metrics_->queue_depth(waiting_.size());
        look_ = FOREVER;
        admit();
        if (!waiting_.empty()) ready_.notify_one();  // another worker looks after the rest, or this one will, later
        return batch;
    }

    const std::size_t size_;
    const bool rejects_;
    const std::shared_ptr<Metrics> metrics_;  // a request that is cancelled may be all that holds the queue
    std::mutex mutex_;
    std::condition_variable ready_, due_, room_;
    Requests waiting_;
    Requests outside_;  // empty unless `waiting_` is full
    double look_ = FOREVER, expiry_ = FOREVER;
    bool closed_ = false, drain_ = true;
};

// A request

rxdeploy_status Request::wait(double timeout, float *logits, std::string &message) {
    std::unique_lock lock(mutex_);
    const double until = now() + timeout;
    while (state_ != State::done) {
        const double rest = until - now();
        if (!(rest > 0)) return RXDEPLOY_PENDING;
        done_.wait_for(lock, at_most(rest));
    }
    message = message_;
    if (status_ == RXDEPLOY_OK && logits) std::copy(logits_.begin(), logits_.end(), logits);
    return status_;
}

bool Request::start() {
    const std::lock_guard lock(mutex_);
    if (state_ != State::waiting) return false;
    state_ = State::started;
    return true;
}

bool Request::cancel() {
    std::unique_lock lock(mutex_);
    if (state_ != State::waiting) return status_ == RXDEPLOY_CANCELLED;
    const std::shared_ptr<Request> self = shared_from_this();  // the callback may let go of the last handle
    hand_over(std::move(lock), RXDEPLOY_CANCELLED, CANCELLED);
    if (const auto at = queue.lock()) at->drop(self);
    return true;
}

void Request::settle(const float *logits) {
    std::unique_lock lock(mutex_);
    std::copy_n(logits, logits_.size(), logits_.begin());
    hand_over(std::move(lock), RXDEPLOY_OK, "");
}

void Request::settle(rxdeploy_status status, const char *message) {
    hand_over(std::unique_lock(mutex_), status, message);
}

void Request::hand_over(std::unique_lock<std::mutex> lock, rxdeploy_status status, const char *message) {
    status_ = status;
    try {
        message_ = message;
    } catch (const std::bad_alloc &) {
        message_ = "out of memory";  // short enough for std::string to hold without any
    }
    state_ = State::done;
    lock.unlock();
    done_.notify_all();
    // What is read here is not written any more.
    const bool ok = status == RXDEPLOY_OK;
    if (callback_)
        callback_(user_, status, ok ? logits_.data() : nullptr, ok ? logits_.size() : 0, ok ? nullptr : message_.c_str());
}

// The batcher

Batcher::Batcher(Run run, std::size_t image_bytes, std::size_t classes, const Batching &batching,
                 std::shared_ptr<Metrics> metrics, std::size_t workers)
    : run_(std::move(run)), image_bytes_(image_bytes), classes_(classes), delay_(batching.max_delay_s),
      metrics_(std::move(metrics)), queue_(std::make_shared<Queue>(batching, metrics_)) {
    std::unique_lock lock(threads_mutex_);
    const auto end = [&] {
        queue_->close(false);
        for (std::thread &thread : threads_) thread.join();
    };
    try {
        // And one that watches deadlines. Room first: a thread that is nowhere noted cannot be joined.
        threads_.reserve(workers + 1);
        own_.reserve(workers + 1);
        for (std::size_t i = 0; i < workers; ++i) {
            threads_.emplace_back(&Batcher::work, this);
            own_.push_back(threads_.back().get_id());
        }
    } catch (const std::system_error &error) {
        end();
        lacks(std::string("batching: a thread cannot be started: ") + error.what());
    } catch (...) {
        end();
        throw;
    }
}

Batcher::~Batcher() { close(true); }

bool Batcher::is_own_thread() const {
    const std::lock_guard lock(threads_mutex_);
    return std::find(own_.begin(), own_.end(), std::this_thread::get_id()) != own_.end();
}

std::shared_ptr<Request> Batcher::submit(std::vector<std::uint8_t> image, double deadline, double timeout,
                                         rxdeploy_callback callback, void *user) {
    const double moment = now();
    // One that may not wait as long as the others waits half its time: enough is left to start it.
    const double start_by = moment + std::min(delay_, deadline / 2);
    auto request =
        std::make_shared<Request>(std::move(image), classes_, moment, start_by, moment + deadline, callback, user);
    request->queue = queue_;
    if (deadline < FOREVER) {
        const std::lock_guard lock(threads_mutex_);
        if (!keeps_deadlines_ && !threads_.empty()) {
            try {
                threads_.emplace_back(&Batcher::watch_deadlines, this);
            } catch (const std::system_error &error) {
                lacks(std::string("batching: a thread cannot be started: ") + error.what());
            }
            own_.push_back(threads_.back().get_id());
            keeps_deadlines_ = true;
        }
    }
    // In a callback this very thread makes the room.
    queue_->put(request, is_own_thread() ? 0 : timeout);
    return request;
}

void Batcher::close(bool drain) {
    for (const auto &request : queue_->close(drain))
        if (request->start()) request->settle(RXDEPLOY_CLOSED, CLOSED);
    if (is_own_thread()) return;
    const std::lock_guard closing(closing_);
    std::vector<std::thread> threads;
    {
        const std::lock_guard lock(threads_mutex_);
        threads.swap(threads_);
    }
    for (std::thread &thread : threads) thread.join();
    const std::lock_guard lock(threads_mutex_);
    own_.clear();  // the numbers of threads come again
}

void Batcher::work() {
    std::vector<std::uint8_t> images;
    std::vector<float> logits;
    while (true) {
        Requests batch = queue_->next_batch();
        if (batch.empty()) return;
        const double moment = now();
        for (auto it = batch.begin(); it != batch.end();) {
            const auto here = it++;
            if (!(*here)->start()) {  // cancelled
                batch.erase(here);
            } else if (!((*here)->expires > moment)) {
                metrics_->count_expired();
                (*here)->settle(RXDEPLOY_DEADLINE_EXCEEDED, EXPIRED);
                batch.erase(here);
            }
        }
        if (!batch.empty()) serve(batch, images, logits);
    }
}

// Run `compute`; when it fails, give `failed` the status and the message. Neither takes memory of its own.
template <typename Compute, typename Failed>
static void attempt(Compute compute, Failed failed) {
    try {
        compute();
    } catch (const Error &error) {
        failed(error.status, error.what());
    } catch (const std::bad_alloc &) {
        failed(RXDEPLOY_ENVIRONMENT_LACKS, "there is not enough memory for the batch");
    } catch (const std::exception &error) {
        failed(RXDEPLOY_INTERNAL, error.what());
    }
}

void Batcher::serve(const Requests &batch, std::vector<std::uint8_t> &images, std::vector<float> &logits) {
    const std::size_t n = batch.size();
    bool computed = false;
    const auto compute = [&] {
        metrics_->record_batch(n);
        logits.resize(n * classes_);
        const std::uint8_t *gathered = batch.front()->image.data();
        if (n > 1) {
            images.resize(n * image_bytes_);
            std::uint8_t *to = images.data();
            for (const auto &request : batch) {
                std::memcpy(to, request->image.data(), image_bytes_);
                to += image_bytes_;
            }
            gathered = images.data();
        }
        run_(gathered, n, logits.data());
        computed = true;
    };
    attempt(compute, [&](rxdeploy_status status, const char *message) {
        if (n > 1 && (status == RXDEPLOY_INPUT_ERROR || status == RXDEPLOY_CHECK_FAILED)) {
            for (const auto &request : batch) compute_alone(*request, logits.data());
        } else {
            metrics_->count_failed(n);
            for (const auto &request : batch) request->settle(status, message);
        }
    });
    if (!computed) return;
    const double moment = now();
    const float *from = logits.data();
    for (const auto &request : batch) {
        metrics_->record_request(moment - request->submitted);
        request->settle(from);
        from += classes_;
    }
}

// So that one bad image fails alone.
void Batcher::compute_alone(Request &request, float *logits) {
    bool computed = false;
    const auto compute = [&] {
        run_(request.image.data(), 1, logits);
        computed = true;
    };
    attempt(compute, [&](rxdeploy_status status, const char *message) {
        metrics_->count_failed();
        request.settle(status, message);
    });
    if (!computed) return;
    metrics_->record_request(now() - request.submitted);
    request.settle(logits);
}

// Fails requests at their deadline, also while every worker is busy.
void Batcher::watch_deadlines() {
    while (true) {
        Requests late;
        if (!queue_->expired(late)) return;
        for (const auto &request : late)
            if (request->start()) {
                metrics_->count_expired();
                request->settle(RXDEPLOY_DEADLINE_EXCEEDED, EXPIRED);
            }
    }
}


}  // namespace rx
