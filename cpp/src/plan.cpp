// The part of the TensorRT backend that needs TensorRT's headers. Nothing is linked: the runtime library, whichever of
// the three it is, is loaded by name. Lanes as in rxdeploy/runtime/lanes.py: two, each a stream with all the memory
// that one execution at a time needs, so that the copies of one batch overlap the computation of another.
#include <NvInferRuntime.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "driver.h"
#include "library.h"
#include "tensorrt.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace rx {
namespace {

namespace trt = nvinfer1;

constexpr std::size_t ALIGNMENT = 256;  // bytes, of every tensor's address and of the scratch memory: NvInferRuntime.h
constexpr int LANES = 2;
// cuda.h: CU_STREAM_NON_BLOCKING, CU_EVENT_DISABLE_TIMING; CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
constexpr unsigned NON_BLOCKING = 1, NO_TIMING = 2;
const CudaStream LEGACY_STREAM = reinterpret_cast<CudaStream>(1), PER_THREAD_STREAM = reinterpret_cast<CudaStream>(2);

std::size_t aligned(std::size_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Keeps TensorRT's last error.
class Logger final : public trt::ILogger {
  public:
    void log(Severity severity, const char *message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard lock(mutex_);
            last_ = first_line(message);
        } catch (...) {
        }
    }
    std::string last() {
        const std::lock_guard lock(mutex_);
        return last_.empty() ? "it says nothing" : last_;
    }

  private:
    std::mutex mutex_;
    std::string last_;
};

// The GPU's primary context, current for as long as this lives.
class Current {
  public:
    Current(const Driver &driver, CudaContext context) : driver_(driver) {
        driver_.check(driver_.context_push(context), "when its context is made current");
    }
    ~Current() {
        CudaContext popped = nullptr;
        driver_.context_pop(&popped);
    }
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;

  private:
    const Driver &driver_;
};

class Gpu {
  public:
    explicit Gpu(int ordinal) : driver(find_driver()) {
        driver.check(driver.device_get(&device_, ordinal), "when it is opened");
        driver.check(driver.context_retain(&context, device_), "when its context is made");
    }
    ~Gpu() { driver.context_release(device_); }
    Gpu(const Gpu &) = delete;
    Gpu &operator=(const Gpu &) = delete;

    const Driver &driver;
    CudaContext context = nullptr;

  private:
    int device_ = 0;
};

// Something of the driver's, freed with its context current.
template <typename T, typename Free>
class Held {
  public:
    Held(const Gpu &gpu, T object, Free free) : gpu_(gpu), object_(object), free_(free) {}
    ~Held() {
        CudaContext popped = nullptr;
        if (gpu_.driver.context_push(gpu_.context) == 0) {
            free_(object_);
            gpu_.driver.context_pop(&popped);
        }
    }
    Held(const Held &) = delete;
    Held &operator=(const Held &) = delete;
    T get() const { return object_; }

  private:
    const Gpu &gpu_;
    const T object_;
    const Free free_;
};

using Memory = Held<DevicePointer, decltype(Driver::memory_free)>;
using Pinned = Held<void *, decltype(Driver::pinned_free)>;
using Stream = Held<CudaStream, decltype(Driver::stream_destroy)>;
using Event = Held<CudaEvent, decltype(Driver::event_destroy)>;

template <typename Owner, typename Make, typename Free>
std::unique_ptr<Owner> make(const Gpu &gpu, Make allocate, Free free, const char *doing) {
    std::remove_const_t<decltype(std::declval<Owner>().get())> object{};
    gpu.driver.check(allocate(&object), doing);
    return std::make_unique<Owner>(gpu, object, free);
}

// A TensorRT runtime library that can run the plan.
struct Runner {
    std::string name, version;
    void *(*create_runtime)(void *, std::int32_t) noexcept;
};

std::array<int, 4> numbers(const std::string &version) {
    std::array<int, 4> parts{};
    std::sscanf(version.c_str(), "%d.%d.%d.%d", &parts[0], &parts[1], &parts[2], &parts[3]);
    return parts;
}

std::string rebuild(const Manifest &m) { return "build it again here: " + m.command; }

// Why a library of this version cannot run the plan; empty when it can.
std::string version_problem(const Manifest &m, const Runner &runner, bool lean) {
    const std::string is = runner.name + " is version " + runner.version;
    if (numbers(runner.version)[0] != NV_TENSORRT_MAJOR)
        return is + ", and this library was compiled for version " TEXT(NV_TENSORRT_MAJOR);
    // Its objects' functions are called by their place in the headers' tables: an older one may lack some.
    if (numbers(runner.version) < numbers(tensorrt_version()))
        return is + ", older than the headers that this library was compiled with (" + tensorrt_version() + ")";
    if (lean && !m.plan->version_compatible) return runner.name + " runs only plans built with --version-compatible";
    const bool older = numbers(runner.version) < numbers(m.plan->version);
    const bool other = numbers(runner.version) != numbers(m.plan->version);
    if (m.plan->version_compatible ? older : other) return is + ", the plan needs " + m.plan->version;
    return "";
}

Runner find_runner(const Manifest &m, const std::string &given) {
    struct Candidate {
        std::string name;
        bool lean;
    };
    const std::string major = std::to_string(NV_TENSORRT_MAJOR);
    std::vector<Candidate> candidates;
    const char *variable = std::getenv("RXDEPLOY_TENSORRT");
    if (const std::string path = !given.empty() ? given : variable ? variable : ""; !path.empty())
        candidates = {{path, path.find("lean") != std::string::npos}};
    else if (m.target == "tensorrt-rtx")
        candidates = {{"libtensorrt_rtx.so.1", false}};
    else
        candidates = {{"libnvinfer.so." + major, false}, {"libnvinfer_lean.so." + major, true}};
    std::string problems;
    for (const Candidate &candidate : candidates) {
        const Library library(candidate.name);
        std::string problem;
        if (!library.is_open()) {
            problem = library.why();
        } else {
            const auto number = [&](const char *function) {
                auto *ask = library.find<std::int32_t()>(function);
                return std::to_string(ask ? ask() : 0);
            };
            const Runner runner{candidate.name,
                                number("getInferLibMajorVersion") + "." + number("getInferLibMinorVersion") + "." +
                                    number("getInferLibPatchVersion") + "." + number("getInferLibBuildVersion"),
                                library.find<void *(void *, std::int32_t) noexcept>("createInferRuntime_INTERNAL")};
            if (!runner.create_runtime)
                problem = candidate.name + " is no TensorRT: it has no createInferRuntime_INTERNAL";
            else
                problem = version_problem(m, runner, candidate.lean);
            if (problem.empty()) return runner;
        }
        problems += (problems.empty() ? "" : "; ") + problem;
    }
    lacks("the plan needs " + m.target + " " + m.plan->version + ": " + problems + "; install that version, or " +
          rebuild(m));
}

// Batch sizes of an optimization profile.
struct Profile {
    std::int64_t min, opt, max;
};

// A deserialised plan.
class Plan {
  public:
    // By way of the other one, so that what fails in here is released by the destructor.
    Plan(const Bundle &bundle, const Gpu &gpu, const Runner &runner) : Plan(gpu, runner) {
        const Manifest &m = bundle.manifest;
        const Current current(gpu.driver, gpu.context);
        runtime_.reset(static_cast<trt::IRuntime *>(runner.create_runtime(&logger_, NV_TENSORRT_VERSION)));
        if (!runtime_) lacks(runner.name + " does not start: " + logger_.last());
        // Such a plan carries code; the bundle's digests vouch for it as for this program's own files.
        if (m.plan->version_compatible) runtime_->setEngineHostCodeAllowed(true);
        const std::string data = bundle.read(PLAN);
        engine_.reset(runtime_->deserializeCudaEngine(data.data(), data.size()));
        if (!engine_)
            lacks(runner.name + " " + runner.version + " does not take the plan on this GPU: " + logger_.last() + "; " +
                  rebuild(m));
        check_tensors(m);
        for (std::int32_t i = 0; i < engine_->getNbOptimizationProfiles(); ++i) {
            const auto images = [&](trt::OptProfileSelector which) {
                return engine_->getProfileShape(input.c_str(), i, which).d[0];
            };
            profiles.push_back({images(trt::OptProfileSelector::kMIN), images(trt::OptProfileSelector::kOPT),
                                images(trt::OptProfileSelector::kMAX)});
        }
        if (profiles.empty()) lacks("the plan has no optimization profile; " + rebuild(m));
        for (const Profile &profile : profiles) largest = std::max(largest, static_cast<std::size_t>(profile.max));
    }

    ~Plan() { release(); }
    Plan(const Plan &) = delete;
    Plan &operator=(const Plan &) = delete;

    // An execution context for one profile with its scratch memory there. The GPU's context must be current.
    std::unique_ptr<trt::IExecutionContext> create_context(int profile, DevicePointer memory, CudaStream stream) {
        std::unique_ptr<trt::IExecutionContext> context(
            engine_->createExecutionContext(trt::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!context) fail("makes no execution context");
#if NV_TENSORRT_MAJOR != 10 || NV_TENSORRT_MINOR > 0  // RTX's major version is 1
        context->setDeviceMemoryV2(reinterpret_cast<void *>(memory), static_cast<std::int64_t>(scratch()));
#else
        context->setDeviceMemory(reinterpret_cast<void *>(memory));
#endif
        if (!context->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(stream)))
            fail("does not take its profile " + std::to_string(profile));
        return context;
    }

    // The most that any profile needs, in bytes.
    std::size_t scratch() const {
#if NV_TENSORRT_MAJOR != 10 || NV_TENSORRT_MINOR > 0
        return static_cast<std::size_t>(engine_->getDeviceMemorySizeV2());
#else
        return engine_->getDeviceMemorySize();
#endif
    }

    void execute(trt::IExecutionContext &context, std::size_t images, DevicePointer source, DevicePointer target,
                 CudaStream stream) {
        trt::Dims shape = shape_;
        shape.d[0] = static_cast<std::int64_t>(images);
        if (!context.setInputShape(input.c_str(), shape) ||
            !context.setTensorAddress(input.c_str(), reinterpret_cast<void *>(source)) ||
            !context.setTensorAddress(output.c_str(), reinterpret_cast<void *>(target)) ||
            !context.enqueueV3(static_cast<cudaStream_t>(stream)))
            fail("does not run a batch of " + std::to_string(images));
    }

    // The profile and the batch size to compute `images` images with: the tightest profile that holds them; where none
    // does, the smallest batch that one takes.
    std::pair<int, std::size_t> choose(std::size_t images) const {
        const auto n = static_cast<std::int64_t>(images);
        int best = -1;
        for (std::size_t i = 0; i < profiles.size(); ++i) {
            const Profile &p = profiles[i];
            if (p.max < n) continue;
            if (best < 0) {
                best = static_cast<int>(i);
                continue;
            }
            const Profile &b = profiles[static_cast<std::size_t>(best)];
            const std::array<std::int64_t, 3> mine{std::max(p.min, n), p.max, -p.min};
            if (mine < std::array<std::int64_t, 3>{std::max(b.min, n), b.max, -b.min}) best = static_cast<int>(i);
        }
        return {best, static_cast<std::size_t>(std::max(profiles[static_cast<std::size_t>(best)].min, n))};
    }

    const Runner runner;
    std::string input, output;
    std::size_t input_bytes = 0, output_bytes = 0;  // of one image
    std::vector<Profile> profiles;
    std::size_t largest = 0;

  private:
    Plan(const Gpu &gpu, const Runner &runner) : runner(runner), gpu_(gpu) {}

    // TensorRT frees memory of the GPU that is current, which the thread that closes a session need not have.
    void release() noexcept {
        CudaContext popped = nullptr;
        const bool current = gpu_.driver.context_push(gpu_.context) == 0;
        engine_.reset();
        runtime_.reset();
        if (current) gpu_.driver.context_pop(&popped);
    }

    [[noreturn]] void fail(const std::string &what) { lacks("the plan " + what + ": " + logger_.last()); }

    void check_tensors(const Manifest &m) {
        if (engine_->getNbIOTensors() != 2)
            lacks("the plan has " + std::to_string(engine_->getNbIOTensors()) + " tensors, not an input and an output");
        for (std::int32_t i = 0; i < 2; ++i) {
            const char *name = engine_->getIOTensorName(i);
            (engine_->getTensorIOMode(name) == trt::TensorIOMode::kINPUT ? input : output) = name;
        }
        if (input != m.input.name || output != m.output.name)
            lacks("the plan's tensors are '" + input + "' and '" + output + "', the manifest says '" + m.input.name +
                  "' and '" + m.output.name + "'");
        input_bytes = checked_bytes(m, m.input);
        output_bytes = checked_bytes(m, m.output);
        shape_ = engine_->getTensorShape(input.c_str());
    }

    std::size_t checked_bytes(const Manifest &m, const Tensor &tensor) const {
        const trt::DataType type = engine_->getTensorDataType(tensor.name.c_str());
        const trt::Dims shape = engine_->getTensorShape(tensor.name.c_str());
        const bool uint8 = tensor.dtype == "uint8";
        bool same = type == (uint8 ? trt::DataType::kUINT8 : trt::DataType::kFLOAT) &&
                    shape.nbDims == static_cast<std::int32_t>(tensor.shape.size());
        std::size_t bytes = uint8 ? 1 : sizeof(float);
        for (std::size_t i = 1; same && i < tensor.shape.size(); ++i) {
            same = shape.d[i] == *tensor.shape[i];
            bytes *= static_cast<std::size_t>(*tensor.shape[i]);
        }
        if (!same)
            lacks("the plan's " + tensor.name + " is not of the type and shape that the manifest says; " + rebuild(m));
        return bytes;
    }

    const Gpu &gpu_;
    Logger logger_;  // TensorRT's objects hold bare pointers to it, and the engine to the runtime
    std::unique_ptr<trt::IRuntime> runtime_;
    std::unique_ptr<trt::ICudaEngine> engine_;
    trt::Dims shape_{};
};

// A stream with all that one execution at a time needs.
class Lane {
  public:
    Lane(const Gpu &gpu, Plan &plan) : gpu_(gpu), plan_(plan) {
        const Driver &d = gpu.driver;
        const Current current(d, gpu.context);
        const std::size_t in = aligned(plan.largest * plan.input_bytes);
        const std::size_t out = aligned(plan.largest * plan.output_bytes);
        stream = make<Stream>(gpu, [&](CudaStream *to) { return d.stream_create(to, NON_BLOCKING); }, d.stream_destroy,
                              "when a stream is made");
        idle_ = make<Event>(gpu, [&](CudaEvent *to) { return d.event_create(to, NO_TIMING); }, d.event_destroy,
                            "when an event is made");
        device_ = make<Memory>(
            gpu, [&](DevicePointer *to) { return d.memory_allocate(to, in + out + plan.scratch()); }, d.memory_free,
            "when memory is allocated on it");
        pinned_ = make<Pinned>(gpu, [&](void **to) { return d.pinned_allocate(to, in + out, 0); }, d.pinned_free,
                               "when pinned memory is allocated");
        input_ = device_->get();
        output_ = input_ + in;
        scratch_ = output_ + out;
        host_in_ = static_cast<char *>(pinned_->get());
        host_out_ = host_in_ + in;
    }

    ~Lane() {
        CudaContext popped = nullptr;
        if (gpu_.driver.context_push(gpu_.context)) return;
        if (lent_) gpu_.driver.event_synchronize(idle_->get());
        gpu_.driver.stream_synchronize(stream->get());
        contexts_.clear();
        gpu_.driver.context_pop(&popped);
    }
    Lane(const Lane &) = delete;
    Lane &operator=(const Lane &) = delete;

    // Host memory in and out; complete on return.
    void run(const void *images, std::size_t n, float *logits) {
        const Driver &d = gpu_.driver;
        const Current current(d, gpu_.context);
        const CudaStream on = stream->get();
        try {
            take_back(on);
            std::memcpy(host_in_, images, n * plan_.input_bytes);
            d.check(d.copy_to_device(input_, host_in_, n * plan_.input_bytes, on), "when images are copied to it");
            execute(n, input_, output_, on);
            d.check(d.copy_to_host(host_out_, output_, n * plan_.output_bytes, on), "when logits are copied from it");
            d.check(d.stream_synchronize(on), "when it computes");
        } catch (...) {
            d.stream_synchronize(on);  // who gets this lane next writes where a copy may still be reading
            throw;
        }
        std::memcpy(logits, host_out_, n * plan_.output_bytes);
    }

    // Device memory in and out, enqueued on any stream.
    void enqueue(DevicePointer images, std::size_t n, DevicePointer logits, CudaStream on) {
        const Driver &d = gpu_.driver;
        take_back(on);
        // TensorRT takes multiples of 256 only; a part of someone's tensor may begin anywhere. And what is padded is
        // computed in the lane's own memory.
        const bool padded = plan_.choose(n).second > n;
        const DevicePointer source = padded || images % ALIGNMENT ? input_ : images;
        const DevicePointer target = padded || logits % ALIGNMENT ? output_ : logits;
        if (source != images)
            d.check(d.copy_on_device(source, images, n * plan_.input_bytes, on), "when images are copied on it");
        execute(n, source, target, on);
        if (target != logits)
            d.check(d.copy_on_device(logits, target, n * plan_.output_bytes, on), "when logits are copied on it");
    }

    // What was enqueued on a caller's stream still uses this lane.
    void lend(CudaStream on) {
        gpu_.driver.check(gpu_.driver.event_record(idle_->get(), on), "when an event is recorded");
        lent_ = true;
    }

    // Let `after` wait for what `before` has got by now.
    void order(CudaStream before, CudaStream after) {
        const Driver &d = gpu_.driver;
        d.check(d.event_record(idle_->get(), before), "when an event is recorded");
        d.check(d.stream_wait(after, idle_->get(), 0), "when a stream is to wait");
    }

    std::unique_ptr<Stream> stream;

  private:
    void take_back(CudaStream on) {
        if (!lent_) return;
        gpu_.driver.check(gpu_.driver.stream_wait(on, idle_->get(), 0), "when a stream is to wait");
        lent_ = false;
    }

    void execute(std::size_t n, DevicePointer source, DevicePointer target, CudaStream on) {
        const auto [profile, size] = plan_.choose(n);
        auto &context = contexts_[profile];
        if (!context) {
            context = plan_.create_context(profile, scratch_, stream->get());
            gpu_.driver.check(gpu_.driver.stream_synchronize(stream->get()), "when a plan is set up");
        }
        plan_.execute(*context, size, source, target, on);
    }

    const Gpu &gpu_;
    Plan &plan_;
    std::unique_ptr<Event> idle_;
    std::unique_ptr<Memory> device_;
    std::unique_ptr<Pinned> pinned_;
    DevicePointer input_ = 0, output_ = 0, scratch_ = 0;
    char *host_in_ = nullptr, *host_out_ = nullptr;
    std::map<int, std::unique_ptr<trt::IExecutionContext>> contexts_;
    bool lent_ = false;
};

class PlanEngine final : public Engine {
  public:
    PlanEngine(const Bundle &bundle, int ordinal, const Runner &runner)
        : name_(find_driver().name(ordinal)), gpu_(ordinal), plan_(bundle, gpu_, runner) {
        for (int i = 0; i < LANES; ++i) {
            lanes_.push_back(std::make_unique<Lane>(gpu_, plan_));
            free_.push_back(lanes_.back().get());
        }
    }

    const char *device() const override { return "tensorrt"; }
    std::string description() const override {
        return "plan on " + name_ + " with " + plan_.runner.name + " " + plan_.runner.version;
    }
    std::size_t largest() const override { return plan_.largest; }
    ForRequests for_requests() override { return {nullptr, LANES}; }

    void run(const void *images, std::size_t n, float *logits) override {
        const Lent lane(*this);
        for (std::size_t begin = 0; begin < n; begin += plan_.largest)
            lane->run(static_cast<const char *>(images) + begin * plan_.input_bytes,
                      std::min(plan_.largest, n - begin), logits + begin * plan_.output_bytes / sizeof(float));
    }

    void run_device(const void *images, std::size_t n, void *logits, void *given) override {
        const Current current(gpu_.driver, gpu_.context);
        const Lent lane(*this);
        const CudaStream stream = given;
        // TensorRT waits for the whole device when it is enqueued on a default stream: then on the lane's, in between.
        const bool by_default = stream == LEGACY_STREAM || stream == PER_THREAD_STREAM;
        const CudaStream own = lane->stream->get(), on = !stream || by_default ? own : stream;
        const auto source = reinterpret_cast<DevicePointer>(images), target = reinterpret_cast<DevicePointer>(logits);
        try {
            // Without a stream the lane's own is used, which waits for nobody: let the legacy stream's order hold.
            if (!stream) gpu_.driver.check(gpu_.driver.stream_synchronize(LEGACY_STREAM), "when it computes");
            if (by_default) lane->order(stream, on);
            for (std::size_t begin = 0; begin < n; begin += plan_.largest)
                lane->enqueue(source + begin * plan_.input_bytes, std::min(plan_.largest, n - begin),
                              target + begin * plan_.output_bytes, on);
            if (by_default) lane->order(on, stream);
            if (!stream)
                gpu_.driver.check(gpu_.driver.stream_synchronize(on), "when it computes");
            else
                lane->lend(on);
        } catch (...) {
            gpu_.driver.stream_synchronize(on);
            throw;
        }
    }

    void prepare(const std::vector<std::size_t> &sizes) override {
        std::vector<float> logits(plan_.largest * plan_.output_bytes / sizeof(float));
        const std::vector<char> images(plan_.largest * plan_.input_bytes);
        const std::lock_guard one(preparing_);  // it alone holds several lanes at once
        const Lent first(*this), second(*this);
        for (const Lent *lane : {&first, &second})
            for (const std::size_t size : sizes)
                for (const std::size_t part : {std::min(size, plan_.largest), size % plan_.largest})
                    if (part) (*lane)->run(images.data(), part, logits.data());
    }

  private:
    // A lane for as long as this lives.
    class Lent {
      public:
        explicit Lent(PlanEngine &engine) : engine_(engine) {
            std::unique_lock lock(engine.mutex_);
            engine.changed_.wait(lock, [&] { return !engine.free_.empty(); });
            lane_ = engine.free_.front();
            engine.free_.erase(engine.free_.begin());
        }
        ~Lent() {
            const std::lock_guard lock(engine_.mutex_);
            engine_.free_.push_back(lane_);
            engine_.changed_.notify_one();
        }
        Lent(const Lent &) = delete;
        Lent &operator=(const Lent &) = delete;
        Lane *operator->() const { return lane_; }

      private:
        PlanEngine &engine_;
        Lane *lane_;
    };

    const std::string name_;
    const Gpu gpu_;
    Plan plan_;
    std::vector<std::unique_ptr<Lane>> lanes_;
    std::mutex preparing_, mutex_;
    std::condition_variable changed_;
    std::vector<Lane *> free_;
};

}  // namespace

const char *tensorrt_version() {
    return TEXT(NV_TENSORRT_MAJOR) "." TEXT(NV_TENSORRT_MINOR) "." TEXT(NV_TENSORRT_PATCH);
}

std::shared_ptr<Engine> open_plan(const Bundle &bundle, const std::string &library, int ordinal) {
    const Manifest &m = bundle.manifest;
    const Driver &driver = find_driver();
    const std::string name = driver.name(ordinal);
    if (m.gpu && m.target == "tensorrt" && *m.gpu != name &&
        !(m.plan->hardware_compatible && driver.compute_capability(ordinal).first >= 8))
        lacks("the plan was built for " + printable(*m.gpu) + ", and the GPU here is " + name + "; " + rebuild(m));
    return std::make_shared<PlanEngine>(bundle, ordinal, find_runner(m, library));
}

}  // namespace rx
