// Signatures of bundles, in the format of OpenSSF's model signing, by OpenSSL's libcrypto. What is taken and what is
// refused is as in rxdeploy/signing/signature.py, which says where the format is written down.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace rx {

inline constexpr const char *SIGNATURE = "model.sig";

class PublicKey;

// Public keys on the curves P-256, P-384 or P-521, of whose owners bundles are trusted.
class TrustedKeys {
  public:
    // `paths` are files in PEM. Error (RXDEPLOY_INPUT_ERROR) for what is no such key.
    explicit TrustedKeys(const std::vector<std::string> &paths);
    ~TrustedKeys();
    TrustedKeys(const TrustedKeys &) = delete;
    TrustedKeys &operator=(const TrustedKeys &) = delete;

    // The files, with their sha256, that a signature vouches for; `data` is the contents of a model.sig. `where` begins
    // an error's sentence: "bundle PATH". Error (RXDEPLOY_CHECK_FAILED) unless one of the keys signed it, before
    // anything of what is signed is read.
    std::map<std::string, std::string> signed_files(std::string_view data, const std::string &where) const;

  private:
    std::vector<PublicKey> keys_;
};

}  // namespace rx
