// A bundle on disk: every file is checked against the manifest before a byte of it is used.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "manifest.h"

namespace rx {

inline constexpr const char *MODEL = "model.onnx";
inline constexpr const char *PLAN = "engine.plan";

class Bundle {
  public:
    // Error (RXDEPLOY_INPUT_ERROR) names the file that is missing, of another size, altered, or no plain file.
    // With `trusted_keys`, files of public keys, that is RXDEPLOY_CHECK_FAILED, and so is a bundle that none of them
    // signed, or that holds anything besides: the signature is checked before anything else of it is read.
    explicit Bundle(std::string path, const std::vector<std::string> &trusted_keys = {});

    // The contents of one of its files, which had their digest when they were read.
    std::string read(const std::string &name) const;

    // Class names in the order of the logits, none where the bundle has none.
    std::vector<std::string> labels() const;

    const std::string path;
    const Manifest manifest;

  private:
    const bool is_signed_;
};

// Class names from a text file, one a line, `name` or `identifier<TAB>name`; as many as there are classes.
std::vector<std::string> read_labels(const std::string &path, std::size_t classes);

}  // namespace rx
