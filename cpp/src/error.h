// The one exception inside the library; c_api.cpp turns it into a status and a message.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "rxdeploy.h"

namespace rx {

class Error : public std::runtime_error {
  public:
    Error(rxdeploy_status status, const std::string &message) : std::runtime_error(message), status(status) {}
    const rxdeploy_status status;
};

[[noreturn]] inline void check_failed(const std::string &message) { throw Error(RXDEPLOY_CHECK_FAILED, message); }
[[noreturn]] inline void input_error(const std::string &message) { throw Error(RXDEPLOY_INPUT_ERROR, message); }
[[noreturn]] inline void lacks(const std::string &message) { throw Error(RXDEPLOY_ENVIRONMENT_LACKS, message); }
[[noreturn]] inline void closed(const std::string &message) { throw Error(RXDEPLOY_CLOSED, message); }

inline constexpr const char *CLOSED = "the session is closed; load the bundle again";

// Text of another library or file, fit for one line: control characters become question marks.
inline std::string printable(std::string_view text) {
    std::string result(text);
    for (char &c : result)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    return result;
}

// The first line of another library's message.
inline std::string first_line(std::string_view text) { return printable(text.substr(0, text.find('\n'))); }

}  // namespace rx
