// A bundle's model.onnx on ONNX Runtime's CPU provider, through its C API.
#pragma once

#include <memory>
#include <string>

#include "bundle.h"
#include "engine.h"

namespace rx {

// `library`: path of libonnxruntime.so, empty for RXDEPLOY_ONNXRUNTIME in the environment, the path compiled in, or the
// system's. `threads` compute one batch together; 0 for what the bundle was tuned for, or one a core.
// Error: RXDEPLOY_ENVIRONMENT_LACKS when there is no library or an older one, RXDEPLOY_CHECK_FAILED when it cannot load
// the model.
std::shared_ptr<Engine> open_onnxruntime(const Bundle &bundle, const std::string &library, int threads);

}  // namespace rx
