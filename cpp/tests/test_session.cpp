// Sessions on ONNX Runtime, through the C++ header and, under it, the C ABI.
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <future>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <tuple>

#include "rxdeploy.hpp"
#include "sealed.h"

extern "C" size_t abi_sizes(size_t which);

namespace {

using rxdeploy::Options;
using rxdeploy::Session;

TEST(Abi, StructsAreTheSameInC) {
    const std::size_t sizes[] = {sizeof(rxdeploy_options), sizeof(rxdeploy_submit_options),
                                 sizeof(rxdeploy_info),    sizeof(rxdeploy_prediction),
                                 sizeof(rxdeploy_frame),   sizeof(rxdeploy_metrics)};
    for (std::size_t i = 0; i < std::size(sizes); ++i) EXPECT_EQ(abi_sizes(i), sizes[i]);
    EXPECT_EQ(rxdeploy_abi(), RXDEPLOY_ABI);
    EXPECT_STREQ(rxdeploy_status_name(RXDEPLOY_REJECTED), "rejected");
}

TEST(Abi, NullIsAnError) {
    rxdeploy_session *session = nullptr;
    EXPECT_EQ(rxdeploy_open(nullptr, nullptr, &session), RXDEPLOY_INPUT_ERROR);
    EXPECT_STREQ(rxdeploy_last_error(), "path is NULL");
    EXPECT_EQ(rxdeploy_open("x", nullptr, nullptr), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(rxdeploy_run(nullptr, nullptr, 0, nullptr), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(rxdeploy_request_wait(nullptr, 0, nullptr), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(rxdeploy_request_cancel(nullptr), 0);
    rxdeploy_free(nullptr);
    rxdeploy_request_free(nullptr);
    rxdeploy_text_free(nullptr);
}

TEST(Abi, WithoutASessionThereAreNoTexts) {
    for (auto *text : {rxdeploy_model, rxdeploy_precision, rxdeploy_device, rxdeploy_description, rxdeploy_passed_over})
        EXPECT_EQ(text(nullptr), nullptr);
    EXPECT_EQ(rxdeploy_label(nullptr, 0), nullptr);
    EXPECT_STREQ(rxdeploy_last_error(), "session is NULL");
}

// A program that was compiled with an older or a newer header than the library has shorter or longer structs.
TEST(Abi, StructsOfOtherSizes) {
    struct Longer {
        rxdeploy_options known;
        std::size_t later, beyond;
    } longer;
    std::memset(static_cast<void *>(&longer), 0xaa, sizeof longer);
    const std::size_t size = offsetof(Longer, beyond);
    (rxdeploy_options_init)(&longer.known, size);
    EXPECT_EQ(longer.known.size, size);
    EXPECT_EQ(longer.known.queue_size, 1024u);
    EXPECT_EQ(longer.later, 0u);  // what it does not know is not set
    EXPECT_EQ(longer.beyond, std::size_t(0xaaaaaaaaaaaaaaaa));
    rxdeploy_session *session = nullptr;
    EXPECT_EQ(rxdeploy_open("nowhere", &longer.known, &session), RXDEPLOY_INPUT_ERROR);
    EXPECT_NE(std::string(rxdeploy_last_error()).find("not a bundle"), std::string::npos) << rxdeploy_last_error();
    longer.later = 1;
    EXPECT_EQ(rxdeploy_open("nowhere", &longer.known, &session), RXDEPLOY_INPUT_ERROR);
    EXPECT_NE(std::string(rxdeploy_last_error()).find("does not know"), std::string::npos) << rxdeploy_last_error();
    // None was ever as short as this, which ends in the middle of a pointer.
    longer.known.size = offsetof(rxdeploy_options, device) + 4;
    EXPECT_EQ(rxdeploy_open("nowhere", &longer.known, &session), RXDEPLOY_INPUT_ERROR);
    EXPECT_NE(std::string(rxdeploy_last_error()).find("size is 12"), std::string::npos) << rxdeploy_last_error();
    rxdeploy_submit_options submit;
    std::memset(static_cast<void *>(&submit), 0xaa, sizeof submit);
    (rxdeploy_submit_options_init)(&submit, 8);  // too short for anything: left alone
    EXPECT_EQ(submit.size, std::size_t(0xaaaaaaaaaaaaaaaa));
    rxdeploy_submit_options_init(&submit);
    EXPECT_EQ(submit.size, sizeof submit);
    EXPECT_TRUE(std::isinf(submit.deadline_s));
}

TEST(Open, OptionsOutOfRange) {
    const auto refused = [](auto change) {
        Options options;
        change(options);
        EXPECT_THROW(Session("nowhere", options), rxdeploy::InputError);
    };
    refused([](Options &o) { o.device = "gpu"; });
    refused([](Options &o) { o.device = "cpu:1"; });
    refused([](Options &o) { o.device = "tensorrt:x"; });
    refused([](Options &o) { o.threads = -1; });
    refused([](Options &o) { o.queue_size = 0; });
    refused([](Options &o) { o.max_delay_ms = std::nan(""); });
    refused([](Options &) {});  // no such bundle
    rxdeploy_options options;
    rxdeploy_options_init(&options);
    options.size = 1;
    rxdeploy_session *session = nullptr;
    EXPECT_EQ(rxdeploy_open("nowhere", &options, &session), RXDEPLOY_INPUT_ERROR);
    EXPECT_NE(std::string(rxdeploy_last_error()).find("size is 1"), std::string::npos);
}

TEST(Open, LibrariesThatAreNone) {
    const rx::Folder folder;
    folder.write("model.onnx", "no model");
    folder.write("manifest.json", rx::sealed(rx::manifest_of({{"model.onnx", rx::entry("no model")}})));
    Options options;
    options.device = "cpu";
    options.onnxruntime = "/nowhere/libonnxruntime.so";
    try {
        Session session(folder.path.string(), options);
        FAIL();
    } catch (const rxdeploy::EnvironmentLacks &error) {
        EXPECT_NE(std::string(error.what()).find("device cpu is not possible here: ONNX Runtime does not load"),
                  std::string::npos);
    }
    options.onnxruntime = "libcrypto.so.3";
    EXPECT_THROW(Session(folder.path.string(), options), rxdeploy::EnvironmentLacks);
    options.device = "tensorrt";
    EXPECT_THROW(Session(folder.path.string(), options), rxdeploy::EnvironmentLacks);
}

// A library whose version is older than the headers is refused by its version, not asked for an API; so is one that has
// the headers' API no more.
TEST(Open, AnotherOnnxRuntimeIsRefused) {
    const rx::Folder folder;
    folder.write("model.onnx", "no model");
    folder.write("manifest.json", rx::sealed(rx::manifest_of({{"model.onnx", rx::entry("no model")}})));
    for (const auto &[library, version, why] :
         {std::tuple(OLD_ONNXRUNTIME, "ONNX Runtime 1.2.0", "is older than the headers"),
          std::tuple(NEW_ONNXRUNTIME, "ONNX Runtime 2.0.0", "of the C API no more")}) {
        Options options;
        options.device = "cpu";
        options.onnxruntime = library;
        try {
            Session session(folder.path.string(), options);
            FAIL();
        } catch (const rxdeploy::EnvironmentLacks &error) {
            EXPECT_NE(std::string(error.what()).find(version), std::string::npos) << error.what();
            EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
        }
    }
}

// With ONNX Runtime and the digits model.
class SessionTest : public testing::Test {
  protected:
    void SetUp() override {
        const char *bundle = std::getenv("RXDEPLOY_TEST_BUNDLE");
        if (!bundle || !std::getenv("RXDEPLOY_ONNXRUNTIME"))
            GTEST_SKIP() << "RXDEPLOY_TEST_BUNDLE and RXDEPLOY_ONNXRUNTIME say with what";
        path = bundle;
        options.device = "cpu";
        options.threads = 1;
    }

    std::vector<std::uint8_t> noise(const Session &session, std::size_t n, unsigned seed = 0) const {
        std::mt19937 random(seed);
        std::vector<std::uint8_t> images(n * session.image_bytes());
        for (auto &sample : images) sample = static_cast<std::uint8_t>(random());
        return images;
    }

    std::string path;
    Options options;
};

TEST_F(SessionTest, RunsBatches) {
    Session session(path, options);
    EXPECT_EQ(session.model(), "digits_resnext14_8x8d");
    EXPECT_EQ(session.device(), "cpu");
    EXPECT_EQ(session.image_size(), 64u);
    EXPECT_EQ(session.label(10), "10");
    const auto images = noise(session, 70);  // more than are computed at once
    const auto logits = session.run(images);
    ASSERT_EQ(logits.size(), 700u);
    std::vector<float> parts(700);
    rxdeploy::View<const std::uint8_t> view(images);
    session.run({view.data(), 64 * session.image_bytes()}, parts);
    std::vector<float> rest = session.run({view.data() + 64 * session.image_bytes(), 6 * session.image_bytes()});
    std::copy(rest.begin(), rest.end(), parts.begin() + 640);
    EXPECT_EQ(logits, parts);
    EXPECT_EQ(session.metrics().images, 140u);
    EXPECT_TRUE(session.run({}).empty());
    EXPECT_THROW(session.run({view.data(), 5}), rxdeploy::InputError);
    EXPECT_THROW(session.run(images, rest), rxdeploy::InputError);
    EXPECT_THROW(session.run_float32({}), rxdeploy::InputError);
    rxdeploy::Options nobody = options;
    nobody.trusted_keys.emplace();
    EXPECT_THROW(Session(path, nobody), rxdeploy::InputError);
    nobody.trusted_keys->push_back("absent.pub");
    EXPECT_THROW(Session(path, nobody), rxdeploy::InputError);
    EXPECT_THROW(session.run_device(images.data(), 1, parts.data()), rxdeploy::InputError);
    EXPECT_NO_THROW(session.prepare(std::vector<std::size_t>{1, 8}));
}

TEST_F(SessionTest, TopIsSoftmaxInOrder) {
    Session session(path, options);
    const std::vector<float> logits{0, 3, 3, -1, 2, 0, 0, 0, 0, 0};
    const auto found = session.top(logits, 4);
    ASSERT_EQ(found.size(), 4u);
    const double sum = 2 * std::exp(3.0) + std::exp(-1.0) + std::exp(2.0) + 6;
    EXPECT_EQ(found[0].index, 1u);  // equal logits in the order of the classes
    EXPECT_EQ(found[1].index, 2u);
    EXPECT_EQ(found[2].index, 4u);
    EXPECT_EQ(found[3].index, 0u);
    EXPECT_NEAR(found[2].probability, std::exp(2.0) / sum, 1e-15);
    EXPECT_EQ(session.top(logits, 99).size(), 10u);
    EXPECT_THROW(session.top({logits.data(), 9}), rxdeploy::InputError);
    rxdeploy_prediction all[12];
    EXPECT_EQ(rxdeploy_top(session.handle(), logits.data(), 1, 12, all), RXDEPLOY_OK);
    EXPECT_EQ(all[10].index, SIZE_MAX);
    EXPECT_EQ(rxdeploy_top(session.handle(), logits.data(), 1, 0, all), RXDEPLOY_INPUT_ERROR);
    for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
        std::vector<float> wrong = logits;
        wrong[5] = bad;
        EXPECT_THROW(session.top(wrong), rxdeploy::CheckFailed);
    }
}

// -1 of a signed type that became a size.
TEST_F(SessionTest, MoreImagesThanMemoryHolds) {
    Session session(path, options);
    const auto images = noise(session, 1);
    std::vector<float> logits(10);
    rxdeploy_prediction best;
    for (const std::size_t n : {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / session.image_bytes() + 2}) {
        EXPECT_EQ(rxdeploy_run(session.handle(), images.data(), n, logits.data()), RXDEPLOY_INPUT_ERROR);
        EXPECT_EQ(rxdeploy_run_device(session.handle(), images.data(), n, logits.data(), nullptr),
                  RXDEPLOY_INPUT_ERROR);
        EXPECT_NE(std::string(rxdeploy_last_error()).find("more images than memory holds"), std::string::npos);
    }
    EXPECT_EQ(rxdeploy_top(session.handle(), logits.data(), SIZE_MAX, 1, &best), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(rxdeploy_top(session.handle(), logits.data(), 1, SIZE_MAX, &best), RXDEPLOY_INPUT_ERROR);
}

TEST_F(SessionTest, SingleRequestsGiveWhatRunGives) {
    options.max_batch = 1;
    Session session(path, options);
    const auto images = noise(session, 8);
    std::vector<rxdeploy::Request> requests;
    for (std::size_t i = 0; i < 8; ++i)
        requests.push_back(session.submit({images.data() + i * session.image_bytes(), session.image_bytes()}));
    for (std::size_t i = 0; i < 8; ++i)
        EXPECT_EQ(requests[i].get(),
                  session.run({images.data() + i * session.image_bytes(), session.image_bytes()}));
    EXPECT_TRUE(requests[0].wait(0));
    EXPECT_FALSE(requests[0].cancel());
    EXPECT_EQ(session.metrics().requests.count, 8u);
    EXPECT_EQ(nlohmann::json::parse(session.metrics_json())["batches"]["1"], 8);
    EXPECT_NE(session.metrics_prometheus().find("rxdeploy_request_seconds_count 8\n"), std::string::npos);
}

TEST_F(SessionTest, Callbacks) {
    Session session(path, options);
    const auto image = noise(session, 1);
    std::promise<std::vector<float>> promise;
    session.submit(image, [&](const rxdeploy::Result &result) {
        promise.set_value(std::vector<float>(result.logits().begin(), result.logits().end()));
    });
    EXPECT_EQ(promise.get_future().get().size(), 10u);
    session.close();
    bool called = false;
    EXPECT_THROW(session.submit(image, [&](const rxdeploy::Result &) { called = true; }), rxdeploy::Closed);
    EXPECT_FALSE(called);
}

TEST_F(SessionTest, DeadlinesAndCancelling) {
    options.max_delay_ms = 3600e3;
    options.max_batch = 64;
    Session session(path, options);
    const auto image = noise(session, 1);
    const auto waiting = session.submit(image);
    EXPECT_FALSE(waiting.wait(0));
    EXPECT_TRUE(waiting.cancel());
    EXPECT_THROW(waiting.get(), rxdeploy::Cancelled);
    rxdeploy::SubmitOptions at_once;
    at_once.deadline_s = 0;
    EXPECT_THROW(session.submit(image, at_once).get(), rxdeploy::DeadlineExceeded);
    rxdeploy::SubmitOptions wrong;
    wrong.deadline_s = std::nan("");
    EXPECT_THROW(session.submit(image, wrong), rxdeploy::InputError);
    auto last = std::make_unique<rxdeploy::Request>(session.submit(image));
    session.close(false);
    EXPECT_THROW(last->get(), rxdeploy::Closed);
}

TEST_F(SessionTest, AClosedSession) {
    Session session(path, options);
    const auto image = noise(session, 1);
    const auto request = session.submit(image);
    session.close();
    session.close();
    EXPECT_EQ(request.get().size(), 10u);
    EXPECT_THROW(session.run(image), rxdeploy::Closed);
    EXPECT_THROW(session.submit(image), rxdeploy::Closed);
    EXPECT_EQ(session.metrics().images, 1u);
}

TEST_F(SessionTest, FreedInACallback) {
    rxdeploy_options given;
    rxdeploy_options_init(&given);
    given.device = "cpu";
    struct Shared {
        rxdeploy_session *session;
        std::promise<void> done;
    } shared{nullptr, {}};
    ASSERT_EQ(rxdeploy_open(path.c_str(), &given, &shared.session), RXDEPLOY_OK);
    rxdeploy_submit_options how;
    rxdeploy_submit_options_init(&how);
    how.user = &shared;
    how.callback = [](void *user, rxdeploy_status, const float *, size_t, const char *) {
        auto &to = *static_cast<Shared *>(user);
        rxdeploy_free(to.session);
        to.done.set_value();
    };
    const std::vector<std::uint8_t> image(64 * 64 * 3);
    ASSERT_EQ(rxdeploy_submit(shared.session, image.data(), &how, nullptr), RXDEPLOY_OK);
    shared.done.get_future().get();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));  // for LeakSanitizer: it is freed by another thread
}

TEST_F(SessionTest, ARequestOutlivesItsSession) {
    std::optional<Session> session(std::in_place, path, options);
    const auto request = session->submit(noise(*session, 1));
    session.reset();
    EXPECT_EQ(request.get().size(), 10u);
    EXPECT_FALSE(request.cancel());
}

TEST_F(SessionTest, ManyThreads) {
    options.max_batch = 1;
    Session session(path, options);
    const auto images = noise(session, 16);
    std::vector<std::vector<float>> expected;
    const auto image = [&](std::size_t i) {
        return rxdeploy::View<const std::uint8_t>(images.data() + i % 16 * session.image_bytes(),
                                                  session.image_bytes());
    };
    for (std::size_t i = 0; i < 16; ++i) expected.push_back(session.run(image(i)));
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::size_t thread = 0; thread < 4; ++thread)
        threads.emplace_back([&, thread] {
            for (std::size_t i = thread; i < thread + 40; ++i) {
                const auto request = session.submit(image(i));
                wrong += session.run(image(i)) != expected[i % 16];
                wrong += request.get() != expected[i % 16];
                if (i % 10 == 0) session.metrics_json();
            }
        });
    for (std::thread &thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(session.metrics().errors, 0u);
}

TEST_F(SessionTest, AForkedChildIsToldSo) {
#if defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "ThreadSanitizer does not go through a fork of a process with threads";
#endif
    Session session(path, options);
    const auto image = noise(session, 1);
    session.submit(image).get();
    Options patient = options;
    patient.max_delay_ms = 3600e3;
    Session waits(path, patient);
    const auto unanswered = waits.submit(image);
    const pid_t child = ::fork();
    if (child == 0) {
        ::alarm(20);  // rather than wait for a thread that is not here
        try {
            unanswered.get();
            ::_exit(2);
        } catch (const rxdeploy::Closed &) {
        }
        if (unanswered.cancel()) ::_exit(3);
        try {
            waits.metrics();
            ::_exit(4);
        } catch (const rxdeploy::Closed &) {
        }
        const bool closed = rxdeploy_run(session.handle(), image.data(), 1, nullptr) == RXDEPLOY_INPUT_ERROR;
        std::vector<float> logits(10);
        const auto status = rxdeploy_run(session.handle(), image.data(), 1, logits.data());
        rxdeploy_free(session.handle());
        ::_exit(closed && status == RXDEPLOY_CLOSED ? 0 : 1);
    }
    int status = 1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    EXPECT_TRUE(unanswered.cancel());
}

// A signal's handler that keeps its thread where it is.
std::atomic<bool> kept{false}, let_go{false};

void keep(int) {
    kept = true;
    while (!let_go) ::usleep(1000);
}

// A submit that waits for room is a call that `close` waits for: whoever closed the session may free it.
TEST_F(SessionTest, CloseWaitsForWhoWaitsForRoom) {
    options.max_batch = options.queue_size = options.workers = 1;
    Session session(path, options);
    const auto image = noise(session, 1);
    std::promise<void> entered, leave;
    session.submit(image, [&](const rxdeploy::Result &) {
        entered.set_value();
        leave.get_future().wait();
    });
    entered.get_future().wait();
    const auto queued = session.submit(image);
    std::thread caller([&] { EXPECT_THROW(session.submit(image), rxdeploy::Closed); });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // it is inside by now
    struct sigaction action = {}, before = {};
    action.sa_handler = keep;
    ::sigaction(SIGUSR1, &action, &before);
    ::pthread_kill(caller.native_handle(), SIGUSR1);
    while (!kept) std::this_thread::yield();
    auto closing = std::async(std::launch::async, [&] { session.close(); });
    while (true) try {  // until it is closed
            session.run({});
            std::this_thread::yield();
        } catch (const rxdeploy::Closed &) {
            break;
        }
    leave.set_value();
    EXPECT_EQ(closing.wait_for(std::chrono::milliseconds(300)), std::future_status::timeout);
    let_go = true;
    closing.get();
    caller.join();
    ::sigaction(SIGUSR1, &before, nullptr);
    EXPECT_EQ(queued.get().size(), 10u);
}

TEST_F(SessionTest, AModelThatIsNoModel) {
    const rx::Folder folder;
    folder.write("model.onnx", "no model");
    folder.write("manifest.json", rx::sealed(rx::manifest_of({{"model.onnx", rx::entry("no model")}})));
    EXPECT_THROW(Session(folder.path.string(), options), rxdeploy::CheckFailed);
}

TEST_F(SessionTest, AModelThatIsAnother) {
    // The digits model, and a manifest of something smaller: the logits would be written beside the caller's memory.
    const rx::Folder folder;
    std::ifstream file(path + "/model.onnx", std::ios::binary);
    const std::string model(std::istreambuf_iterator<char>(file), {});
    folder.write("model.onnx", model);
    folder.write("manifest.json", rx::sealed(rx::manifest_of({{"model.onnx", rx::entry(model)}})));
    try {
        Session session(folder.path.string(), options);
        FAIL();
    } catch (const rxdeploy::InputError &error) {
        EXPECT_NE(std::string(error.what()).find("is not what the manifest says"), std::string::npos);
    }
}

}  // namespace
