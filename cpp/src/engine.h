// What computes: one class a library, behind one small interface.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "error.h"

namespace rx {

// Takes batches in the declared input's layout that were checked already. Thread-safe.
class Engine {
  public:
    virtual ~Engine() = default;

    virtual const char *device() const = 0;  // "cpu" or "tensorrt"
    virtual std::string description() const = 0;
    virtual std::size_t largest() const = 0;  // images that are computed at once

    // Logits of `n` images in host memory; complete on return.
    virtual void run(const void *images, std::size_t n, float *logits) = 0;

    // The same in the GPU's memory: on `stream` when given, and then not complete on return.
    virtual void run_device(const void *images, std::size_t n, void *logits, void *stream) {
        (void)images, (void)n, (void)logits, (void)stream;
        input_error("images: the session does not run on a GPU (" + description() +
                    "); open the bundle for tensorrt, or pass host memory");
    }

    virtual void prepare(const std::vector<std::size_t> &) {}

    struct ForRequests {
        std::shared_ptr<Engine> engine;  // none: this one
        std::size_t workers;
    };
    // The engine for batches of single requests, and how many threads are to give it batches at once.
    virtual ForRequests for_requests() { return {nullptr, 1}; }
};

}  // namespace rx
