#include "driver.h"

#include "error.h"
#include "library.h"

namespace rx {
namespace {

// From cuda.h: CUdevice_attribute.
constexpr int COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76;

Driver load() {
    Driver d;
    const Library cuda("libcuda.so.1");
    if (!cuda.is_open()) {
        d.problem = "no NVIDIA driver (libcuda.so.1 is not installed)";
        return d;
    }
    bool complete = true;
    const auto find = [&](auto &function, const char *name) {
        function = cuda.find<std::remove_pointer_t<std::remove_reference_t<decltype(function)>>>(name);
        complete = complete && function;
    };
    find(d.init, "cuInit");
    find(d.device_count, "cuDeviceGetCount");
    find(d.device_get, "cuDeviceGet");
    find(d.device_name, "cuDeviceGetName");
    find(d.device_attribute, "cuDeviceGetAttribute");
    find(d.error_string, "cuGetErrorString");
    find(d.context_retain, "cuDevicePrimaryCtxRetain");
    find(d.context_release, "cuDevicePrimaryCtxRelease_v2");
    find(d.context_push, "cuCtxPushCurrent_v2");
    find(d.context_pop, "cuCtxPopCurrent_v2");
    find(d.memory_allocate, "cuMemAlloc_v2");
    find(d.memory_free, "cuMemFree_v2");
    find(d.pinned_allocate, "cuMemHostAlloc");
    find(d.pinned_free, "cuMemFreeHost");
    find(d.copy_to_device, "cuMemcpyHtoDAsync_v2");
    find(d.copy_to_host, "cuMemcpyDtoHAsync_v2");
    find(d.copy_on_device, "cuMemcpyDtoDAsync_v2");
    find(d.stream_create, "cuStreamCreate");
    find(d.stream_destroy, "cuStreamDestroy_v2");
    find(d.stream_synchronize, "cuStreamSynchronize");
    find(d.stream_wait, "cuStreamWaitEvent");
    find(d.event_create, "cuEventCreate");
    find(d.event_destroy, "cuEventDestroy_v2");
    find(d.event_record, "cuEventRecord");
    find(d.event_synchronize, "cuEventSynchronize");
    if (!complete) {
        d.problem = "the NVIDIA driver is too old (libcuda.so.1 lacks functions of CUDA 12)";
        return d;
    }
    if (const CudaStatus status = d.init(0)) {
        d.problem = "the NVIDIA driver does not start (cuInit gives error " + std::to_string(status) + ")";
        return d;
    }
    if (const CudaStatus status = d.device_count(&d.gpus))
        d.problem = "the NVIDIA driver does not tell of its GPUs (error " + std::to_string(status) + ")";
    else if (d.gpus < 1)
        d.problem = "the NVIDIA driver finds no GPU";
    return d;
}

}  // namespace

void Driver::check(CudaStatus status, const char *doing) const {
    if (!status) return;
    const char *text = nullptr;
    error_string(status, &text);
    lacks(std::string("the GPU fails ") + doing + ": " + (text ? text : "unknown error") + " (CUDA error " +
          std::to_string(status) + ")");
}

std::string Driver::name(int ordinal) const {
    char name[256] = "";
    int device = 0;
    check(device_get(&device, ordinal), "when asked for its name");
    check(device_name(name, sizeof name, device), "when asked for its name");
    return name;
}

std::pair<int, int> Driver::compute_capability(int ordinal) const {
    int device = 0, major = 0, minor = 0;
    check(device_get(&device, ordinal), "when asked for its compute capability");
    check(device_attribute(&major, COMPUTE_CAPABILITY_MAJOR, device), "when asked for its compute capability");
    check(device_attribute(&minor, COMPUTE_CAPABILITY_MINOR, device), "when asked for its compute capability");
    return {major, minor};
}

const Driver &find_driver() {
    static const Driver &driver = *new Driver(load());  // never freed: streams may end after static objects do
    return driver;
}

}  // namespace rx
