// SHA-256, by OpenSSL's libcrypto.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace rx {

class Sha256 {
  public:
    Sha256();
    ~Sha256();
    Sha256(const Sha256 &) = delete;
    Sha256 &operator=(const Sha256 &) = delete;
    void update(const void *data, std::size_t size);
    std::string hex();  // ends it

  private:
    struct Context;
    std::unique_ptr<Context> context_;
};

std::string sha256(std::string_view data);

}  // namespace rx
