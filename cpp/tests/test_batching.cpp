// Dynamic batching with an engine that does as it is told.
#include "batching.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <future>

#include "error.h"

namespace rx {
namespace {

constexpr std::size_t BYTES = 4, CLASSES = 2;

// Gives each image its first byte and the batch's size, and can be held up.
class Engine {
  public:
    void operator()(const std::uint8_t *images, std::size_t n, float *logits) {
        std::unique_lock lock(mutex_);
        sizes_.push_back(n);
        ++entered_;
        changed_.notify_all();
        changed_.wait(lock, [&] { return !held_; });
        if (lacking_) throw Error(RXDEPLOY_ENVIRONMENT_LACKS, "no more memory");
        for (std::size_t i = 0; i < n; ++i) {
            if (images[i * BYTES] == 13) throw Error(RXDEPLOY_CHECK_FAILED, "thirteen");
            logits[i * CLASSES] = images[i * BYTES];
            logits[i * CLASSES + 1] = static_cast<float>(n);
        }
    }

    void hold(bool held) {
        const std::lock_guard lock(mutex_);
        held_ = held;
        changed_.notify_all();
    }
    void lack() {
        const std::lock_guard lock(mutex_);
        lacking_ = true;
    }
    // Wait until `times` batches were begun.
    void await(int times) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return entered_ >= times; });
    }
    std::vector<std::size_t> sizes() {
        const std::lock_guard lock(mutex_);
        return sizes_;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::size_t> sizes_;
    int entered_ = 0;
    bool held_ = false, lacking_ = false;
};

class BatcherTest : public testing::Test {
  public:
    void start(Batching batching, std::size_t workers = 1) {
        batcher.emplace([this](const std::uint8_t *images, std::size_t n, float *logits) { engine(images, n, logits); },
                        BYTES, CLASSES, batching, metrics, workers);
    }

    std::shared_ptr<Request> submit(std::uint8_t first, double deadline = FOREVER, double timeout = FOREVER,
                                    rxdeploy_callback callback = nullptr, void *user = nullptr) {
        return batcher->submit({first, 0, 0, 0}, deadline, timeout, callback, user);
    }

    // Logits of a request, or a failure.
    std::vector<float> logits(Request &request) {
        std::vector<float> found(CLASSES, -1);
        std::string message;
        EXPECT_EQ(request.wait(FOREVER, found.data(), message), RXDEPLOY_OK) << message;
        return found;
    }

    rxdeploy_status outcome(Request &request) {
        std::string message;
        const rxdeploy_status status = request.wait(FOREVER, nullptr, message);
        EXPECT_EQ(status == RXDEPLOY_OK, message.empty());
        return status;
    }

    rxdeploy_metrics counted() {
        rxdeploy_metrics m{};
        metrics->snapshot(m);
        return m;
    }

    Engine engine;
    std::shared_ptr<Metrics> metrics = std::make_shared<Metrics>(Cost{});
    std::optional<Batcher> batcher;
};

TEST_F(BatcherTest, GathersWhatWaits) {
    start({4, 3600, 100, false});
    std::vector<std::shared_ptr<Request>> requests;
    for (std::uint8_t i = 0; i < 8; ++i) requests.push_back(submit(i));
    for (std::uint8_t i = 0; i < 8; ++i) EXPECT_EQ(logits(*requests[i]), (std::vector<float>{float(i), 4}));
    EXPECT_EQ(engine.sizes(), (std::vector<std::size_t>{4, 4}));
    EXPECT_EQ(counted().batches, 2u);
    EXPECT_EQ(counted().requests.count, 8u);
}

TEST_F(BatcherTest, TheOldestWaitsNoLongerThanTheDelay) {
    start({4, 0.02, 100, false});
    const double begin = now();
    EXPECT_EQ(logits(*submit(7)), (std::vector<float>{7, 1}));
    EXPECT_GE(now() - begin, 0.019);
}

TEST_F(BatcherTest, ABadImageFailsAlone) {
    start({3, 3600, 100, false});
    const auto a = submit(1), b = submit(13), c = submit(3);
    EXPECT_EQ(logits(*a), (std::vector<float>{1, 1}));
    EXPECT_EQ(outcome(*b), RXDEPLOY_CHECK_FAILED);
    EXPECT_EQ(logits(*c), (std::vector<float>{3, 1}));
    EXPECT_EQ(engine.sizes(), (std::vector<std::size_t>{3, 1, 1, 1}));
    EXPECT_EQ(counted().failed, 1u);
}

TEST_F(BatcherTest, AnErrorOfTheMachineIsEverybodys) {
    start({2, 3600, 100, false});
    engine.lack();
    const auto a = submit(1), b = submit(2);
    EXPECT_EQ(outcome(*a), RXDEPLOY_ENVIRONMENT_LACKS);
    EXPECT_EQ(outcome(*b), RXDEPLOY_ENVIRONMENT_LACKS);
    EXPECT_EQ(engine.sizes().size(), 1u);
    EXPECT_EQ(counted().failed, 2u);
}

TEST_F(BatcherTest, AFullQueueRejects) {
    start({1, 0, 2, true});
    engine.hold(true);
    const auto running = submit(0);
    engine.await(1);
    const auto a = submit(1), b = submit(2);
    try {
        submit(3);
        FAIL();
    } catch (const Error &error) {
        EXPECT_EQ(error.status, RXDEPLOY_REJECTED);
    }
    EXPECT_EQ(counted().rejected, 1u);
    EXPECT_EQ(counted().queue_depth, 2u);
    engine.hold(false);
    for (const auto &request : {running, a, b}) EXPECT_EQ(outcome(*request), RXDEPLOY_OK);
    EXPECT_EQ(counted().queue_depth_max, 2u);
}

TEST_F(BatcherTest, AFullQueueWaitsForRoom) {
    start({1, 0, 1, false});
    engine.hold(true);
    const auto running = submit(0);
    engine.await(1);
    const auto queued = submit(1);
    try {
        submit(2, FOREVER, 0.01);
        FAIL();
    } catch (const Error &error) {
        EXPECT_EQ(error.status, RXDEPLOY_REJECTED);
    }
    auto outside = std::async(std::launch::async, [&] { return submit(3); });
    EXPECT_EQ(outside.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
    engine.hold(false);
    EXPECT_EQ(logits(*outside.get()), (std::vector<float>{3, 1}));
    EXPECT_EQ(outcome(*queued), RXDEPLOY_OK);
}

TEST_F(BatcherTest, ADeadlineHoldsWhileTheEngineIsBusy) {
    start({1, 0, 10, false});
    engine.hold(true);
    const auto running = submit(0);
    engine.await(1);
    const auto late = submit(1, 0.01), patient = submit(2, 3600), at_once = submit(3, 0);
    EXPECT_EQ(outcome(*late), RXDEPLOY_DEADLINE_EXCEEDED);
    EXPECT_EQ(outcome(*at_once), RXDEPLOY_DEADLINE_EXCEEDED);
    EXPECT_EQ(counted().queue_depth, 1u);
    engine.hold(false);
    EXPECT_EQ(outcome(*patient), RXDEPLOY_OK);
    EXPECT_EQ(counted().expired, 2u);
    EXPECT_EQ(engine.sizes().size(), 2u);
}

TEST_F(BatcherTest, ADeadlineShortensTheDelay) {
    start({4, 3600, 10, false});
    EXPECT_EQ(outcome(*submit(1, 0.5)), RXDEPLOY_OK);
}

TEST_F(BatcherTest, ACancelledRequestIsNotComputed) {
    start({1, 0, 2, false});
    engine.hold(true);
    const auto running = submit(0);
    engine.await(1);
    const auto a = submit(1), b = submit(2);
    EXPECT_FALSE(running->cancel());
    EXPECT_TRUE(a->cancel());
    EXPECT_TRUE(a->cancel());
    EXPECT_EQ(outcome(*a), RXDEPLOY_CANCELLED);
    EXPECT_EQ(counted().queue_depth, 1u);
    const auto c = submit(3);  // there is room again
    engine.hold(false);
    EXPECT_EQ(outcome(*b), RXDEPLOY_OK);
    EXPECT_EQ(outcome(*c), RXDEPLOY_OK);
    EXPECT_FALSE(b->cancel());
    EXPECT_EQ(engine.sizes().size(), 3u);
    EXPECT_EQ(counted().cancelled, 1u);
}

TEST_F(BatcherTest, WhoWaitsForRoomGetsThatOfACancelledOne) {
    start({1, 0, 1, false});
    engine.hold(true);
    const auto running = submit(0);
    engine.await(1);
    const auto queued = submit(1);
    auto outside = std::async(std::launch::async, [&] { return submit(2); });
    EXPECT_EQ(outside.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
    EXPECT_TRUE(queued->cancel());
    const auto admitted = outside.get();  // while the engine is held still
    engine.hold(false);
    EXPECT_EQ(outcome(*admitted), RXDEPLOY_OK);
}

TEST_F(BatcherTest, CloseComputesWhatWaits) {
    start({4, 3600, 10, false});
    const auto a = submit(1), b = submit(2);
    batcher->close(true);
    EXPECT_EQ(logits(*a), (std::vector<float>{1, 2}));
    EXPECT_EQ(outcome(*b), RXDEPLOY_OK);
    EXPECT_THROW(submit(3), Error);
    batcher->close(true);
}

TEST_F(BatcherTest, CloseRefusesWhatWaits) {
    start({1, 0, 1, false});
    engine.hold(true);
    const auto running = submit(0);
    engine.await(1);
    const auto queued = submit(1, 3600);
    auto outside = std::async(std::launch::async, [&] { return submit(2); });
    EXPECT_EQ(outside.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
    auto closing = std::async(std::launch::async, [&] { batcher->close(false); });
    EXPECT_EQ(outcome(*queued), RXDEPLOY_CLOSED);
    EXPECT_THROW(outside.get(), Error);
    engine.hold(false);
    closing.get();
    EXPECT_EQ(outcome(*running), RXDEPLOY_OK);
}

TEST_F(BatcherTest, CallbacksComeOnceEach) {
    start({3, 0, 100, false}, 2);
    struct Seen {
        std::atomic<int> done{0}, failed{0}, sum{0};
    } seen;
    const rxdeploy_callback callback = [](void *user, rxdeploy_status status, const float *found, size_t classes,
                                          const char *message) {
        auto &to = *static_cast<Seen *>(user);
        if (status == RXDEPLOY_OK && classes == CLASSES && !message)
            to.sum += static_cast<int>(found[0]), ++to.done;
        else if (!found && message)
            ++to.failed;
    };
    for (int i = 0; i < 300; ++i) submit(static_cast<std::uint8_t>(i % 20), FOREVER, FOREVER, callback, &seen);
    batcher->close(true);
    EXPECT_EQ(seen.done + seen.failed, 300);
    EXPECT_EQ(seen.failed, 15);  // the thirteens
    EXPECT_EQ(seen.sum, 15 * (190 - 13));
}

TEST_F(BatcherTest, ACallbackMaySubmitAndClose) {
    start({1, 0, 1, false});
    struct Shared {
        BatcherTest *test;
        std::promise<std::shared_ptr<Request>> next;
    } shared{this, {}};
    const rxdeploy_callback callback = [](void *user, rxdeploy_status, const float *, size_t, const char *) {
        auto &to = *static_cast<Shared *>(user);
        to.next.set_value(to.test->submit(2));
        to.test->batcher->close(true);  // would wait for this very thread
    };
    submit(1, FOREVER, FOREVER, callback, &shared);
    EXPECT_EQ(outcome(*shared.next.get_future().get()), RXDEPLOY_OK);
}

TEST_F(BatcherTest, ManyCallers) {
    start({8, 0.0005, 16, false}, 2);
    std::atomic<int> right{0}, cancelled{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller)
        callers.emplace_back([&, caller] {
            for (int i = 0; i < 300; ++i) {
                const auto value = static_cast<std::uint8_t>(20 + (caller * 31 + i) % 200);
                const auto request = submit(value, i % 7 ? FOREVER : 60);
                if (i % 11 == 0 && request->cancel()) {
                    ++cancelled;
                    continue;
                }
                right += logits(*request)[0] == value;
            }
        });
    for (std::thread &caller : callers) caller.join();
    EXPECT_EQ(right + cancelled, 1800);
    EXPECT_EQ(counted().cancelled, static_cast<std::uint64_t>(cancelled));
    EXPECT_EQ(counted().requests.count, static_cast<std::uint64_t>(right));
    EXPECT_EQ(counted().queue_depth, 0u);
}

}  // namespace
}  // namespace rx
