// What happens when memory ends: every allocation fails once, and each time there is an error and nothing else.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <optional>
#include <thread>

#include "batching.h"
#include "error.h"
#include "rxdeploy.hpp"
#include "sealed.h"

namespace {

// How many allocations, of all threads, still succeed; then `failing` fail. Off when negative.
constexpr long OFF = -1'000'000;
std::atomic<long> remaining{OFF}, failing{1};

// Whether it came to a failure.
bool disarm() { return remaining.exchange(OFF) < 0; }

}  // namespace

// Not inlined: GCC would see free() of what `operator new` gave.
[[gnu::noinline]] void *operator new(std::size_t size) {
    if (remaining.load() > OFF) {
        const long left = remaining.fetch_sub(1);
        if (left <= 0 && left > -failing) throw std::bad_alloc();
    }
    if (void *memory = std::malloc(size ? size : 1)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void *memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }

namespace rx {
namespace {

// Do it with the first allocation failing, or `in_a_row` from there, then with the second, until none is left to fail.
template <typename Body>
void with_each_failure(Body body, long in_a_row = 1) {
    failing = in_a_row;
    for (long i = 0;; ++i) {
        ASSERT_LT(i, 100'000);
        remaining = i;
        body();
        if (!disarm()) return;
    }
}

TEST(Memory, AManifestIsRefusedForWantOfIt) {
    const std::string text = sealed(manifest_of({{"model.onnx", entry("no model")}}));
    rxdeploy_status last = RXDEPLOY_INTERNAL;
    with_each_failure([&] {
        last = rxdeploy_check_manifest(text.data(), text.size());
        ASSERT_TRUE(last == RXDEPLOY_OK || last == RXDEPLOY_ENVIRONMENT_LACKS) << rxdeploy_last_error();
    });
    EXPECT_EQ(last, RXDEPLOY_OK);
}

TEST(Memory, MetricsAreNotToldForWantOfIt) {
    Metrics metrics(Cost{7, 5});
    metrics.record_run(3, 0.25);
    metrics.record_batch(3);
    std::string last;
    for (std::string (Metrics::*form)() const : {&Metrics::json, &Metrics::prometheus}) {
        with_each_failure([&] {
            try {
                last = (metrics.*form)();
            } catch (const std::bad_alloc &) {
            }
        });
        EXPECT_NE(last.find("cancelled"), std::string::npos);
    }
}

TEST(Memory, ASessionIsNotOpenedForWantOfIt) {
    const Folder folder;
    folder.write("model.onnx", "no model");
    folder.write("manifest.json", sealed(manifest_of({{"model.onnx", entry("no model")}})));
    const std::string path = folder.path.string();
    rxdeploy_options options;
    rxdeploy_options_init(&options);
    options.onnxruntime = "/nowhere/libonnxruntime.so";
    with_each_failure([&] {
        rxdeploy_session *session = nullptr;
        ASSERT_EQ(rxdeploy_open(path.c_str(), &options, &session), RXDEPLOY_ENVIRONMENT_LACKS);
        ASSERT_EQ(session, nullptr);
    });
}

TEST(Memory, AnImageIsRefusedForWantOfIt) {
    std::vector<std::uint8_t> pixels(50 * 40 * 3, 7), image(32 * 32 * 3);
    const rxdeploy_frame frame{pixels.data(), 50, 40, 0, RXDEPLOY_BGR};
    rxdeploy_status last = RXDEPLOY_INTERNAL;
    with_each_failure([&] {
        last = rxdeploy_transform(&frame, 32, 0.875, RXDEPLOY_BICUBIC, 0, image.data());
        ASSERT_TRUE(last == RXDEPLOY_OK || last == RXDEPLOY_ENVIRONMENT_LACKS) << rxdeploy_last_error();
    });
    EXPECT_EQ(last, RXDEPLOY_OK);
}

// Also in the threads that compute and that keep deadlines: they go on, and every request that was taken is answered.
TEST(Memory, RequestsAreAnsweredWithoutIt) {
    std::atomic<int> called{0};
    const rxdeploy_callback callback = [](void *user, rxdeploy_status, const float *, size_t, const char *) {
        ++*static_cast<std::atomic<int> *>(user);
    };
    const auto metrics = std::make_shared<Metrics>(Cost{});
    int taken = 0;
    with_each_failure([&] {
        std::vector<std::shared_ptr<Request>> requests;
        std::optional<Batcher> batcher;
        const auto engine = [](const std::uint8_t *images, std::size_t n, float *logits) {
            for (std::size_t i = 0; i < n; ++i) {
                if (images[i] == 13) throw Error(RXDEPLOY_CHECK_FAILED, "a message that is too long for no memory");
                logits[i] = images[i];
            }
        };
        try {
            requests.reserve(6);
            batcher.emplace(engine, 1, 1, Batching{2, 0.0001, 3, false}, metrics, 1);
            for (const std::uint8_t first : std::initializer_list<std::uint8_t>{1, 2, 13, 4, 5, 6})
                requests.push_back(batcher->submit({first}, first == 5 ? 60 : FOREVER, FOREVER, callback, &called));
        } catch (const std::bad_alloc &) {
        }
        taken += static_cast<int>(requests.size());
        // Armed while the threads compute: what fails there is not to end the program.
        for (const auto &request : requests) {
            std::string message;
            rxdeploy_status status = RXDEPLOY_PENDING;
            for (int i = 0; i < 10'000 && status == RXDEPLOY_PENDING; ++i) try {
                    status = request->wait(0.01, nullptr, message);
                } catch (const std::bad_alloc &) {  // of this thread's copy of the message
                }
            ASSERT_TRUE(status == RXDEPLOY_OK || status == RXDEPLOY_ENVIRONMENT_LACKS ||
                        status == RXDEPLOY_CHECK_FAILED)
                << status;
        }
        if (batcher) batcher->close(true);
        ASSERT_EQ(called, taken);
    }, 4);
}

}  // namespace
}  // namespace rx
