// Bundles for the tests: small, complete, with digests that hold.
#pragma once

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "digest.h"

namespace rx {

// A manifest of a small model, without its own digest.
inline nlohmann::ordered_json manifest_of(const nlohmann::ordered_json &files) {
    return nlohmann::ordered_json::parse(R"({
        "schema": 1, "digest": "", "model": "small", "precision": "fp32",
        "target": {"name": "onnxruntime", "version": null, "reason": "asked for", "gpu": null},
        "weights": {"kind": "synthetic", "source": "synthetic:0", "sha256": null, "licence": null},
        "card": {"sha256": "00", "description": "", "figures": {"parameters": 5, "flops": 7}, "accuracy": null,
                 "source": {"paper": null, "training_data": ["noise"]}},
        "counts": {"parameters": 5, "multiply_adds": 7},
        "preprocessing": {"image_size": 32, "crop_pct": 0.875, "interpolation": "bicubic",
                          "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "normalisation_in_graph": true, "num_classes": 3,
        "inputs": [{"name": "image", "dtype": "uint8", "layout": "NHWC", "shape": [null, 32, 32, 3], "batch": [1, 8]}],
        "outputs": [{"name": "logits", "dtype": "float32", "layout": "NC", "shape": [null, 3], "batch": null}],
        "validation": {"passed": true}, "quantisation": null,
        "tuning": {"tuned": true, "cores": 4, "cpu": {
            "engine": "onnxruntime", "threads": 2, "spinning": false, "arena": true,
            "denormals_as_zero": true, "sessions": 3}},
        "engine": null, "tools": {"Pillow": "13.0.0"}, "command": ["rxdeploy", "build", "small", "-o", "it's here"]
    })")
        .patch({{{"op", "add"}, {"path", "/files"}, {"value", files}}});
}

// The text of a manifest with its digest in it.
inline std::string sealed(nlohmann::ordered_json manifest) {
    manifest["digest"] = std::string(64, '0');
    manifest["digest"] = sha256(manifest.dump());
    return manifest.dump();
}

// A folder of its own that goes with this object.
class Folder {
  public:
    Folder() : path(std::filesystem::temp_directory_path() / ("rxdeploy-" + std::to_string(std::random_device()()))) {
        std::filesystem::create_directory(path);
    }
    ~Folder() { std::filesystem::remove_all(path); }
    Folder(const Folder &) = delete;
    Folder &operator=(const Folder &) = delete;

    void write(const std::string &name, const std::string &text) const {
        std::ofstream(path / name, std::ios::binary) << text;
    }

    const std::filesystem::path path;
};

inline nlohmann::ordered_json entry(const std::string &contents) {
    return {{"sha256", sha256(contents)}, {"bytes", contents.size()}};
}

}  // namespace rx
