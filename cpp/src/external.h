// Whether an ONNX model keeps weights in other files, which no digest covers: as rxdeploy/engines/external.py, told from
// the bytes, of which an engine would read such a file without a word.
#pragma once

#include <string_view>

namespace rx {

// True too for ONNX Runtime's own format. What breaks protobuf's rules, no engine loads.
bool keeps_weights_elsewhere(std::string_view model);

}  // namespace rx
