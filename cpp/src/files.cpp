#include "files.h"

#include <system_error>

namespace rx {

std::string reason(int error) { return std::generic_category().message(error); }

int read_text(const std::string &path, off_t most, std::string &text, int flags) {
    const File file(path, flags | O_NONBLOCK);  // opening a pipe would wait for its writer
    struct stat status;
    if (!file.is_open() || !file.status(status)) return errno;
    if (S_ISDIR(status.st_mode)) return EISDIR;
    if (!S_ISREG(status.st_mode)) return EINVAL;
    if (status.st_size > most) return EFBIG;
    return file.read(most, [&](const char *data, std::size_t size) { text.append(data, size); });
}

}  // namespace rx
