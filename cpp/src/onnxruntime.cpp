#include "onnxruntime.h"

#include <onnxruntime_c_api.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <map>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include "library.h"

namespace rx {
namespace {

constexpr std::uint64_t SMALL = 200'000'000;  // multiply-adds an image, as rxdeploy/runtime/onnxrt.py
constexpr std::size_t LARGEST = 64;           // images at once; of more, the activations leave a CPU's caches
constexpr std::size_t MOST_WORKERS = 8;

// A loaded ONNX Runtime and its environment, which every session of the process shares. Never freed: ONNX Runtime's
// own threads may outlive whoever would.
struct Runtime {
    const OrtApi *api;
    OrtEnv *environment;
    std::string version;
    bool rounds_float16;  // since 1.30; before, its QuantizeLinear truncates float16 (pull request 32452 there)
};

// The library to load, and who said so.
std::pair<std::string, std::string> chosen(const std::string &given) {
    if (!given.empty()) return {given, "the option `onnxruntime`"};
    if (const char *path = std::getenv("RXDEPLOY_ONNXRUNTIME"); path && *path)
        return {path, "RXDEPLOY_ONNXRUNTIME in the environment"};
#ifdef RXDEPLOY_ONNXRUNTIME_DEFAULT
    return {RXDEPLOY_ONNXRUNTIME_DEFAULT, "the default that was compiled in"};
#else
    return {"libonnxruntime.so", "no option `onnxruntime` and no RXDEPLOY_ONNXRUNTIME in the environment"};
#endif
}

std::string message_of(const OrtApi &api, OrtStatus *status) {
    const std::string message = first_line(api.GetErrorMessage(status));
    api.ReleaseStatus(status);
    return message;
}

Runtime load_runtime(const std::string &path, const std::string &who) {
    // Newer builds send telemetry, and keep an identifier in the home directory, unless told not to before they start
    // (docs/Privacy.md of ONNX Runtime). Who has set the variable is left alone.
    ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    Library library(path);
    // The system's library has no link without a version unless its headers are installed.
    for (const char *soname : {"libonnxruntime.so.1", "libonnxruntime.so.1.21"})
        if (!library.is_open() && path == "libonnxruntime.so") {
            Library versioned(soname);
            if (versioned.is_open()) return load_runtime(soname, who);
        }
    if (!library.is_open())
        lacks("ONNX Runtime does not load: " + library.why() + " (" + who + "); set the option or the variable to its "
              "libonnxruntime.so");
    auto *base = library.find<const OrtApiBase *()>("OrtGetApiBase");
    if (!base) lacks(path + " is no ONNX Runtime: it has no OrtGetApiBase (" + who + ")");
    const std::string version = printable(base()->GetVersionString());
    int major = 0, minor = 0;
    std::sscanf(version.c_str(), "%d.%d", &major, &minor);
    // It would give no API either, but print to stderr.
    const bool older = major < 1 || (major == 1 && minor < ORT_API_VERSION);
    const OrtApi *api = older ? nullptr : base()->GetApi(ORT_API_VERSION);
    if (!api && !older)
        lacks("ONNX Runtime " + version + " (" + path + ") has version " + std::to_string(ORT_API_VERSION) +
              " of the C API no more, which this library was compiled with; install an older one, or compile this "
              "library with the headers of that one");
    if (!api)
        lacks("ONNX Runtime " + version + " (" + path + ") is older than the headers that this library was compiled "
              "with: it needs version 1." + std::to_string(ORT_API_VERSION) + " or later");
    OrtEnv *environment = nullptr;
    if (OrtStatus *status = api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "rxdeploy", &environment))
        lacks("ONNX Runtime " + version + " does not start: " + message_of(*api, status));
    return {api, environment, version, major > 1 || minor >= 30};
}

const Runtime &runtime(const std::string &given) {
    static auto &mutex = *new std::mutex;
    static auto &loaded = *new std::map<std::string, Runtime>;
    const auto [path, who] = chosen(given);
    const std::lock_guard lock(mutex);
    const auto found = loaded.find(path);
    return found != loaded.end() ? found->second : loaded.emplace(path, load_runtime(path, who)).first->second;
}

// Frees one of ONNX Runtime's objects with the function of its type.
template <typename T>
class Owned {
  public:
    explicit Owned(void(ORT_API_CALL *release)(T *)) : release_(release) {}
    ~Owned() {
        if (object_) release_(object_);
    }
    Owned(const Owned &) = delete;
    Owned &operator=(const Owned &) = delete;
    T **to() { return &object_; }
    T *get() const { return object_; }

  private:
    void(ORT_API_CALL *const release_)(T *);
    T *object_ = nullptr;
};

std::size_t cores() {
    cpu_set_t set;
    if (::sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    return static_cast<std::size_t>(std::max(CPU_COUNT(&set), 1));
}

// What is kept open to make an engine with other threads out of it.
struct Source {
    std::shared_ptr<const std::string> model;
    std::string name, input, output;
    CpuSettings settings;
    bool for_integers, uint8;
    std::vector<std::int64_t> sides;  // of one image
    std::size_t classes;
    std::uint64_t multiply_adds;
};

// How settings differ from plain ones, in parentheses.
std::string in_words(const CpuSettings &settings) {
    std::string text;
    const auto tell = [&](bool differs, const std::string &words) {
        if (differs) text += (text.empty() ? " (" : ", ") + words;
    };
    const std::string threads = settings.threads ? std::to_string(settings.threads) + " thread(s)" : "a thread a core";
    tell(settings.sessions > 1 || settings.threads, std::to_string(settings.sessions) + " session(s) of " + threads);
    tell(!settings.spinning, "no spinning");
    tell(!settings.arena, "no arena");
    tell(settings.denormals_as_zero, "denormals as zero");
    return text.empty() ? text : text + ")";
}

class OnnxEngine final : public Engine {
  public:
    OnnxEngine(const Runtime &runtime, Source source)
        : runtime_(runtime), api_(*runtime.api), source_(std::move(source)), memory_(api_.ReleaseMemoryInfo) {
        for (const std::int64_t side : source_.sides) samples_ *= static_cast<std::size_t>(side);
        image_bytes_ = samples_ * (source_.uint8 ? 1 : sizeof(float));
        check(api_.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, memory_.to()));
        // ONNX Runtime changes the arithmetic of the thread that makes such a session: let it be one that ends.
        if (source_.settings.denormals_as_zero)
            std::async(std::launch::async, [this] { open(); }).get();
        else
            open();
        check_tensors();
        if (source_.multiply_adds >= SMALL) source_.model.reset();  // no other engine will be made of it
    }

    const char *device() const override { return "cpu"; }
    std::string description() const override {
        return "ONNX Runtime " + runtime_.version + " on CPU" + in_words(source_.settings);
    }
    std::size_t largest() const override { return LARGEST; }

    // A batch larger than LARGEST, or than one session's part of it, is computed in shares: each goes to whoever is
    // free, this thread or one for each of the other sessions.
    void run(const void *images, std::size_t n, float *logits) override {
        const std::size_t sessions = source_.settings.sessions, first = turn_++;
        const std::size_t size = std::min(LARGEST, std::max<std::size_t>(1, (n + sessions - 1) / sessions));
        std::atomic<std::size_t> next{0};
        const auto work = [&](std::size_t session) {
            try {
                for (std::size_t begin = next.fetch_add(size); begin < n; begin = next.fetch_add(size))
                    run_part(session, static_cast<const char *>(images) + begin * image_bytes_,
                             std::min(size, n - begin), logits + begin * source_.classes);
            } catch (...) {
                next = n;
                throw;
            }
        };
        const std::size_t shares = (n + size - 1) / size;
        std::vector<std::future<void>> helping;  // the destructor of each waits for it
        try {
            for (std::size_t i = 1; i < std::min(sessions, shares); ++i)
                helping.push_back(std::async(std::launch::async, work, first + i));
        } catch (const std::system_error &) {
            // No more threads: this one goes on by itself.
        }
        work(first);
        for (auto &helper : helping) helper.get();
    }

    // The threads of ONNX Runtime wait for each other after every node, which for a small model takes longer than the
    // node: there, every core computes a batch of its own.
    ForRequests for_requests() override {
        const std::size_t available = cores();
        if (source_.multiply_adds >= SMALL || available < 2) return {nullptr, 1};
        Source single = source_;
        single.settings.threads = 1;
        single.settings.sessions = 1;
        return {std::make_shared<OnnxEngine>(runtime_, std::move(single)), std::min(available, MOST_WORKERS)};
    }

  private:
    void open() {
        Owned<OrtSessionOptions> options(api_.ReleaseSessionOptions);
        const CpuSettings &settings = source_.settings;
        check(api_.CreateSessionOptions(options.to()));
        check(api_.SetIntraOpNumThreads(options.get(), settings.threads));
        check(api_.SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_FATAL));
        const auto set = [&](const char *key, const char *value) {
            check(api_.AddSessionConfigEntry(options.get(), key, value));
        };
        if (!source_.for_integers) set("session.disable_quant_qdq", "1");
        if (!settings.spinning) set("session.intra_op.allow_spinning", "0");
        if (settings.denormals_as_zero) set("session.set_denormal_as_zero", "1");
        if (!settings.arena) check(api_.DisableCpuMemArena(options.get()));
        // Without threads of its own a session computes on as many as call it.
        const std::size_t count = settings.threads == 1 ? 1 : settings.sessions;
        for (std::size_t i = 0; i < count; ++i) {
            sessions_.push_back(std::make_unique<Owned<OrtSession>>(api_.ReleaseSession));
            if (OrtStatus *status =
                    api_.CreateSessionFromArray(runtime_.environment, source_.model->data(), source_.model->size(),
                                                options.get(), sessions_.back()->to()))
                check_failed("ONNX Runtime cannot load " + source_.name + ": " + message_of(api_, status));
        }
    }

    OrtSession *session(std::size_t i) const { return sessions_[i % sessions_.size()]->get(); }

    // The model's own idea of its tensors must be the manifest's: the logits are written where the caller says.
    void check_tensors() const {
        std::size_t inputs = 0, outputs = 0;
        check(api_.SessionGetInputCount(session(0), &inputs));
        check(api_.SessionGetOutputCount(session(0), &outputs));
        const auto wrong = [&](const char *what) {
            input_error(source_.name + ": its " + what + " is not what the manifest says; build the bundle again");
        };
        Owned<OrtTypeInfo> input(api_.ReleaseTypeInfo), output(api_.ReleaseTypeInfo);
        if (inputs != 1 || name_of(api_.SessionGetInputName) != source_.input) wrong("input");
        if (outputs != 1 || name_of(api_.SessionGetOutputName) != source_.output) wrong("output");
        check(api_.SessionGetInputTypeInfo(session(0), 0, input.to()));
        check(api_.SessionGetOutputTypeInfo(session(0), 0, output.to()));
        std::vector<std::int64_t> in_shape = shape_of(*input.get(), input_type(), "input");
        if (in_shape.empty() || !std::equal(in_shape.begin() + 1, in_shape.end(), source_.sides.begin(),
                                            source_.sides.end()))
            wrong("input");
        const std::vector<std::int64_t> out_shape =
            shape_of(*output.get(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "output");
        if (out_shape.size() != 2 || out_shape[1] != static_cast<std::int64_t>(source_.classes)) wrong("output");
    }

    template <typename Get>
    std::string name_of(Get get) const {
        OrtAllocator *allocator = nullptr;
        char *name = nullptr;
        check(api_.GetAllocatorWithDefaultOptions(&allocator));
        check(get(session(0), 0, allocator, &name));
        const std::string result = name;
        check(api_.AllocatorFree(allocator, name));
        return result;
    }

    std::vector<std::int64_t> shape_of(const OrtTypeInfo &type, ONNXTensorElementDataType expected,
                                       const char *what) const {
        const OrtTensorTypeAndShapeInfo *info = nullptr;
        ONNXTensorElementDataType found = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        check(api_.CastTypeInfoToTensorInfo(&type, &info));
        if (info) check(api_.GetTensorElementType(info, &found));
        if (found != expected)
            input_error(source_.name + ": its " + what + " is not of the type that the manifest says; build the "
                                                         "bundle again");
        std::size_t rank = 0;
        check(api_.GetDimensionsCount(info, &rank));
        std::vector<std::int64_t> shape(rank);
        check(api_.GetDimensions(info, shape.data(), rank));
        return shape;
    }

    ONNXTensorElementDataType input_type() const {
        return source_.uint8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    void run_part(std::size_t which, const char *images, std::size_t n, float *logits) {
        const auto count = static_cast<std::int64_t>(n);
        const std::array<std::int64_t, 4> in_shape{count, source_.sides[0], source_.sides[1], source_.sides[2]};
        const std::array<std::int64_t, 2> out_shape{count, static_cast<std::int64_t>(source_.classes)};
        Owned<OrtValue> input(api_.ReleaseValue), output(api_.ReleaseValue);
        // ONNX Runtime only reads its inputs, but its C API has no way to say so.
        check(api_.CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<char *>(images),
                                                  n * image_bytes_, in_shape.data(), in_shape.size(),
                                                  input_type(), input.to()));
        check(api_.CreateTensorWithDataAsOrtValue(memory_.get(), logits, n * source_.classes * sizeof(float),
                                                  out_shape.data(), out_shape.size(),
                                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, output.to()));
        const char *const inputs[] = {source_.input.c_str()}, *const outputs[] = {source_.output.c_str()};
        const OrtValue *const values[] = {input.get()};
        check(api_.Run(session(which), nullptr, inputs, values, 1, outputs, 1, output.to()));
    }

    void check(OrtStatus *status) const {
        if (status) check_failed("ONNX Runtime cannot run the model: " + message_of(api_, status));
    }

    const Runtime &runtime_;
    const OrtApi &api_;
    Source source_;
    std::size_t samples_ = 1, image_bytes_ = 0;  // of one image
    Owned<OrtMemoryInfo> memory_;
    std::vector<std::unique_ptr<Owned<OrtSession>>> sessions_;
    std::atomic<std::size_t> turn_{0};  // so that small batches of several callers are not all the first session's
};

}  // namespace

std::shared_ptr<Engine> open_onnxruntime(const Bundle &bundle, const std::string &library, int threads) {
    const Manifest &m = bundle.manifest;
    const Runtime &loaded = runtime(library);
    if (!m.for_integers && !loaded.rounds_float16)
        lacks("ONNX Runtime " + loaded.version + " truncates what this model, which is quantised for TensorRT, rounds; "
              "install 1.30 or later, or build the bundle with --target onnxruntime");
    CpuSettings settings = m.cpu;
    // How many threads are best depends on how many cores there are: with others than it was tuned on, that is left.
    if (threads || settings.cores.value_or(0) != static_cast<std::int64_t>(cores())) {
        settings.threads = threads;
        settings.sessions = 1;
    }
    Source source{std::make_shared<const std::string>(bundle.read(MODEL)),
                  bundle.path + "/" + MODEL,
                  m.input.name,
                  m.output.name,
                  settings,
                  m.for_integers,
                  m.normalisation_in_graph,
                  {},
                  m.num_classes,
                  m.multiply_adds};
    for (std::size_t i = 1; i < m.input.shape.size(); ++i) source.sides.push_back(*m.input.shape[i]);
    return std::make_shared<OnnxEngine>(loaded, std::move(source));
}

}  // namespace rx
