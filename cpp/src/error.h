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

// How many bytes a character of UTF-8 has at the beginning of `text`; 0 where there is none.
inline std::size_t utf8_length(std::string_view text) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char lead = byte(0);
    const std::size_t length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    if (length > text.size()) return 0;
    for (std::size_t i = 1; i < length; ++i)
        if ((byte(i) & 0xc0) != 0x80) return 0;
    const bool wrong = length > 2 && ((lead == 0xe0 && byte(1) < 0xa0) || (lead == 0xed && byte(1) > 0x9f) ||
                                      (lead == 0xf0 && byte(1) < 0x90) || (lead == 0xf4 && byte(1) > 0x8f));
    return wrong ? 0 : length;
}

// Text of another library or file, fit for one line of UTF-8: control characters and what is no UTF-8 become question
// marks.
inline std::string printable(std::string_view text) {
    std::string result;
    while (!text.empty()) {
        const std::size_t length = utf8_length(text);
        const auto first = static_cast<unsigned char>(text[0]);
        const bool c1 = length == 2 && first == 0xc2 && static_cast<unsigned char>(text[1]) < 0xa0;
        if (length == 0 || c1 || first < 0x20 || first == 0x7f)
            result += '?';
        else
            result += text.substr(0, length);
        text.remove_prefix(length ? length : 1);
    }
    return result;
}

// The first line of another library's message.
inline std::string first_line(std::string_view text) { return printable(text.substr(0, text.find('\n'))); }

}  // namespace rx
