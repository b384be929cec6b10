// The NVIDIA driver, asked itself: libcuda is loaded at run time, no CUDA toolkit is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace rx {

// What of cuda.h is used here.
using CudaStatus = int;
using CudaContext = void *;
using CudaStream = void *;
using CudaEvent = void *;
using DevicePointer = std::uint64_t;  // CUdeviceptr

// The driver's functions, under the names in libcuda.so.1.
struct Driver {
    std::string problem;  // why it cannot be used; else empty
    int gpus = 0;

    CudaStatus (*init)(unsigned) = nullptr;
    CudaStatus (*device_count)(int *) = nullptr;
    CudaStatus (*device_get)(int *, int) = nullptr;
    CudaStatus (*device_name)(char *, int, int) = nullptr;
    CudaStatus (*device_attribute)(int *, int, int) = nullptr;
    CudaStatus (*error_string)(CudaStatus, const char **) = nullptr;
    CudaStatus (*context_retain)(CudaContext *, int) = nullptr;
    CudaStatus (*context_release)(int) = nullptr;
    CudaStatus (*context_push)(CudaContext) = nullptr;
    CudaStatus (*context_pop)(CudaContext *) = nullptr;
    CudaStatus (*memory_allocate)(DevicePointer *, std::size_t) = nullptr;
    CudaStatus (*memory_free)(DevicePointer) = nullptr;
    CudaStatus (*pinned_allocate)(void **, std::size_t, unsigned) = nullptr;
    CudaStatus (*pinned_free)(void *) = nullptr;
    CudaStatus (*copy_to_device)(DevicePointer, const void *, std::size_t, CudaStream) = nullptr;
    CudaStatus (*copy_to_host)(void *, DevicePointer, std::size_t, CudaStream) = nullptr;
    CudaStatus (*copy_on_device)(DevicePointer, DevicePointer, std::size_t, CudaStream) = nullptr;
    CudaStatus (*stream_create)(CudaStream *, unsigned) = nullptr;
    CudaStatus (*stream_destroy)(CudaStream) = nullptr;
    CudaStatus (*stream_synchronize)(CudaStream) = nullptr;
    CudaStatus (*stream_wait)(CudaStream, CudaEvent, unsigned) = nullptr;
    CudaStatus (*event_create)(CudaEvent *, unsigned) = nullptr;
    CudaStatus (*event_destroy)(CudaEvent) = nullptr;
    CudaStatus (*event_record)(CudaEvent, CudaStream) = nullptr;
    CudaStatus (*event_synchronize)(CudaEvent) = nullptr;

    // Error (RXDEPLOY_ENVIRONMENT_LACKS) with the driver's words unless `status` is 0.
    void check(CudaStatus status, const char *doing) const;
    std::string name(int ordinal) const;
    std::pair<int, int> compute_capability(int ordinal) const;
};

// Found once; a machine without a driver is a normal case, and `problem` says so.
const Driver &find_driver();

}  // namespace rx
