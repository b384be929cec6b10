#include "digest.h"

#include <openssl/evp.h>

#include "error.h"

namespace rx {

struct Sha256::Context {
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    ~Context() { EVP_MD_CTX_free(context); }
};

namespace {
// OpenSSL fails where a policy forbids SHA-256 or where memory is short; neither may pass for a digest.
void check(int result) {
    if (result != 1) lacks("OpenSSL's libcrypto does not compute SHA-256 here");
}
}  // namespace

Sha256::Sha256() : context_(std::make_unique<Context>()) {
    check(context_->context ? EVP_DigestInit_ex(context_->context, EVP_sha256(), nullptr) : 0);
}

Sha256::~Sha256() = default;

void Sha256::update(const void *data, std::size_t size) { check(EVP_DigestUpdate(context_->context, data, size)); }

std::string Sha256::hex() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    check(EVP_DigestFinal_ex(context_->context, digest, &size));
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
        text += "0123456789abcdef"[digest[i] >> 4];
        text += "0123456789abcdef"[digest[i] & 15];
    }
    return text;
}

std::string sha256(std::string_view data) {
    Sha256 digest;
    digest.update(data.data(), data.size());
    return digest.hex();
}

}  // namespace rx
