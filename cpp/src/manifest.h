// manifest.json, as rxdeploy/engines/bundle.py writes it: what the runtime needs of it, the rest only checked.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rxdeploy.h"

namespace rx {

inline constexpr int SCHEMA = 1;

struct FileDigest {
    std::string sha256;
    std::int64_t bytes;
};

// An input or output. In `shape` the batch is empty.
struct Tensor {
    std::string name, dtype, layout;
    std::vector<std::optional<std::int64_t>> shape;
};

struct Preprocessing {
    std::size_t image_size;
    double crop_pct;
    rxdeploy_interpolation interpolation;
    std::array<double, 3> mean, std;
};

// How ONNX Runtime is best run on a CPU.
struct CpuSettings {
    int threads = 0;           // that compute a node together; 0: one a core
    std::size_t sessions = 1;  // that a batch is split over, each with `threads`
    bool spinning = true;      // threads wait for each other busily
    bool arena = true;         // memory is kept from one run to the next
    bool denormals_as_zero = false;
    std::optional<std::int64_t> cores;  // that `threads` and `sessions` were found on
};

// Of the bundle's TensorRT plan.
struct PlanFacts {
    std::string version;
    bool version_compatible, hardware_compatible, strip_plan;
};

struct Manifest {
    std::string model, precision;
    std::string target;              // "tensorrt", "tensorrt-rtx" or "onnxruntime"
    std::optional<std::string> gpu;  // of the build machine
    std::optional<std::uint64_t> card_flops;
    std::uint64_t multiply_adds;
    Preprocessing preprocessing;
    bool normalisation_in_graph;
    std::size_t num_classes;
    Tensor input, output;
    bool for_integers;  // whether ONNX Runtime is to compute between Q/DQ in integers
    std::optional<PlanFacts> plan;
    std::string command;  // that built it, for a shell
    int pillow;           // major version of the Pillow it was made with, 0 when it does not say
    CpuSettings cpu;      // found by tuning, or plain ones
    std::map<std::string, FileDigest> files;
};

// Read and check a manifest, its own digest included. `where` begins an error's sentence: "bundle PATH".
// Error (RXDEPLOY_INPUT_ERROR) says what is wrong, and where.
Manifest parse_manifest(std::string_view data, const std::string &where);

}  // namespace rx
