// Files on disk, of any kind: whoever made them may be nobody's friend.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <string>

namespace rx {

// What the number of a system's error means.
std::string reason(int error);

class File {
  public:
    File(const std::string &path, int flags) : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | flags)) {}
    ~File() {
        if (descriptor_ >= 0) ::close(descriptor_);
    }
    File(const File &) = delete;
    File &operator=(const File &) = delete;

    bool is_open() const { return descriptor_ >= 0; }
    bool status(struct stat &result) const { return ::fstat(descriptor_, &result) == 0; }

    // Give it to `take` piece by piece; the error's number, or 0. EFBIG when there is more than `most`: it may grow
    // while it is read.
    template <typename Take>
    int read(off_t most, Take take) const {
        std::string block(std::size_t(1) << 20, '\0');
        for (off_t total = 0;;) {
            const ssize_t got = ::read(descriptor_, block.data(), block.size());
            if (got == 0) return 0;
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return errno;
            if ((total += got) > most) return EFBIG;
            take(block.data(), static_cast<std::size_t>(got));
        }
    }

  private:
    const int descriptor_;
};

// All of a text file, or the number of the error that kept it from being read. `flags` are open's.
int read_text(const std::string &path, off_t most, std::string &text, int flags = 0);

}  // namespace rx
