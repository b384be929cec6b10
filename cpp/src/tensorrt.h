// A bundle's engine.plan on TensorRT: the full one, the lean one or TensorRT-RTX.
#pragma once

#include <memory>
#include <string>

#include "bundle.h"
#include "engine.h"

namespace rx {

// Version of the headers that the backend was compiled with, null when it was not.
const char *tensorrt_version();

// `library`: path of TensorRT's runtime library, empty for RXDEPLOY_TENSORRT in the environment, else by its soname.
// Error (RXDEPLOY_ENVIRONMENT_LACKS) says why the plan cannot run on GPU number `ordinal`, and what to do.
std::shared_ptr<Engine> open_tensorrt(const Bundle &bundle, const std::string &library, int ordinal);

// The part of it that needs TensorRT's headers: what open_tensorrt calls when the plan could run.
std::shared_ptr<Engine> open_plan(const Bundle &bundle, const std::string &library, int ordinal);

}  // namespace rx
