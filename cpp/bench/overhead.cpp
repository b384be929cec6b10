// overhead BUNDLE [ROUNDS [BATCH [THREADS]]]: what rxdeploy_run takes over ONNX Runtime's C API alone.
//
// Both run the same bytes on the same library (RXDEPLOY_ONNXRUNTIME) with the same threads, in turns, each time the one
// that went second before goes first: what the machine does meanwhile hits both alike. Printed: medians and tenth
// percentiles, and the ratios within a round, which tell how much the machine did meanwhile.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "rxdeploy.hpp"

namespace {

[[noreturn]] void end(const std::string &message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
}

// The model on the C API, as one would write it by hand: inputs and outputs in the caller's memory.
class Bare {
  public:
    Bare(const std::string &bundle, const rxdeploy_info &info, int threads) : info_(info) {
        const char *path = std::getenv("RXDEPLOY_ONNXRUNTIME");
        void *library = path ? dlopen(path, RTLD_NOW) : nullptr;
        if (!library) end("set RXDEPLOY_ONNXRUNTIME to libonnxruntime.so");
        using Base = const OrtApiBase *();
        api_ = reinterpret_cast<Base *>(dlsym(library, "OrtGetApiBase"))()->GetApi(ORT_API_VERSION);
        std::ifstream file(bundle + "/model.onnx", std::ios::binary);
        model_.assign(std::istreambuf_iterator<char>(file), {});
        OrtEnv *environment = nullptr;
        OrtSessionOptions *options = nullptr;
        check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "bare", &environment));
        check(api_->CreateSessionOptions(&options));
        check(api_->SetIntraOpNumThreads(options, threads));
        check(api_->CreateSessionFromArray(environment, model_.data(), model_.size(), options, &session_));
        check(api_->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory_));
    }

    void run(std::uint8_t *images, std::size_t n, float *logits) {
        const auto count = static_cast<std::int64_t>(n), side = static_cast<std::int64_t>(info_.image_size);
        const std::int64_t in_shape[] = {count, side, side, 3};
        const std::int64_t out_shape[] = {count, static_cast<std::int64_t>(info_.classes)};
        OrtValue *input = nullptr, *output = nullptr;
        check(api_->CreateTensorWithDataAsOrtValue(memory_, images, n * info_.image_bytes, in_shape, 4,
                                                   ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, &input));
        check(api_->CreateTensorWithDataAsOrtValue(memory_, logits, n * info_.classes * sizeof(float), out_shape, 2,
                                                   ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &output));
        const char *inputs[] = {"image"}, *outputs[] = {"logits"};
        const OrtValue *values[] = {input};
        check(api_->Run(session_, nullptr, inputs, values, 1, outputs, 1, &output));
        api_->ReleaseValue(input);
        api_->ReleaseValue(output);
    }

  private:
    void check(OrtStatus *status) {
        if (status) end(api_->GetErrorMessage(status));
    }

    const rxdeploy_info &info_;
    const OrtApi *api_ = nullptr;
    std::vector<char> model_;
    OrtSession *session_ = nullptr;
    OrtMemoryInfo *memory_ = nullptr;
};

double median(std::vector<double> values, double part = 0.5) {
    std::sort(values.begin(), values.end());
    return values[static_cast<std::size_t>(part * static_cast<double>(values.size() - 1))];
}

}  // namespace

int main(int count, char **arguments) try {
    if (count < 2) end("usage: overhead BUNDLE [ROUNDS [BATCH [THREADS]]]");
    const auto number = [&](int i, int otherwise) { return count > i ? std::atoi(arguments[i]) : otherwise; };
    const int rounds = number(2, 200), threads = number(4, 0);
    const auto n = static_cast<std::size_t>(number(3, 1));
    rxdeploy::Options options;
    options.device = "cpu";
    options.threads = threads;
    rxdeploy::Session session(arguments[1], options);
    if (session.info().takes_float32) end("overhead wants a bundle with uint8 input");
    Bare bare(arguments[1], session.info(), threads);

    std::vector<std::uint8_t> images(n * session.image_bytes());
    for (std::size_t i = 0; i < images.size(); ++i) images[i] = static_cast<std::uint8_t>(i * 2654435761u >> 24);
    std::vector<float> ours(n * session.classes()), theirs(ours.size());
    // The threads of either spin on for a while after a run, in the way of the other: first one that is not timed.
    const auto time = [](auto &&run) {
        run();
        const auto begin = std::chrono::steady_clock::now();
        run();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    const auto run_ours = [&] { session.run(images, ours); };
    const auto run_bare = [&] { bare.run(images.data(), n, theirs.data()); };
    for (int i = 0; i < 3; ++i) run_ours(), run_bare();  // the first runs allocate

    std::vector<double> with, without, ratios;
    for (int i = 0; i < rounds; ++i) {
        if (i % 2) with.push_back(time(run_ours));
        without.push_back(time(run_bare));
        if (i % 2 == 0) with.push_back(time(run_ours));
        ratios.push_back(with.back() / without.back());
    }
    if (std::memcmp(ours.data(), theirs.data(), ours.size() * sizeof(float))) end("the logits differ");
    std::printf("%s, %s, batch %zu, %d rounds\n", session.model().c_str(), session.description().c_str(), n, rounds);
    const auto line = [&](const char *what, double part) {
        const double mine = median(with, part), theirs_s = median(without, part);
        std::printf("%-11s rxdeploy_run %9.4f ms   bare C API %9.4f ms   ratio %.4f\n", what, mine * 1000,
                    theirs_s * 1000, mine / theirs_s);
    };
    line("median", 0.5);
    line("10th of 100", 0.1);
    std::printf("ratio in a round: median %.4f (quartiles %.4f to %.4f); logits equal\n", median(ratios),
                median(ratios, 0.25), median(ratios, 0.75));
} catch (const std::exception &error) {
    end(error.what());
}
