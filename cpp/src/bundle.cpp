#include "bundle.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "digest.h"
#include "error.h"

namespace rx {
namespace {

constexpr const char *MANIFEST = "manifest.json";
constexpr const char *LABELS = "labels.txt";
constexpr std::size_t LONGEST_NAME = 255;
// Bytes; more is no such file. Read, a manifest takes some twenty times its size.
constexpr off_t LARGEST_MANIFEST = off_t(1) << 24, LARGEST_LABELS = off_t(1) << 28;

std::string reason(int error) { return std::generic_category().message(error); }

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

// All of a text file, or the number of the error that kept it from being read.
int read_text(const std::string &path, off_t most, std::string &text) {
    const File file(path, O_NONBLOCK);  // opening a pipe would wait for its writer
    struct stat status;
    if (!file.is_open() || !file.status(status)) return errno;
    if (S_ISDIR(status.st_mode)) return EISDIR;
    if (!S_ISREG(status.st_mode)) return EINVAL;
    if (status.st_size > most) return EFBIG;
    return file.read(most, [&](const char *data, std::size_t size) { text.append(data, size); });
}

Manifest read_manifest(const std::string &path) {
    const std::string where = "bundle " + path;
    std::string data;
    const int error = read_text(path + "/" + MANIFEST, LARGEST_MANIFEST, data);
    if (error == ENOENT || error == ENOTDIR)
        input_error(where + ": not a bundle (there is no " + MANIFEST + "); `rxdeploy build` makes one");
    if (error) input_error(where + ": " + MANIFEST + " cannot be read: " + reason(error));
    return parse_manifest(data, where);
}

bool is_file_name(const std::string &name) {
    return !name.empty() && name != "." && name != ".." && name != MANIFEST &&
           name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

// Check a file; with `contents`, keep what was checked there.
void check_file(const std::string &folder, const std::string &name, const FileDigest &expected, std::string *contents) {
    if (!is_file_name(name))
        input_error("bundle " + folder + ": " + MANIFEST + " lists a file named '" + printable(name.substr(0, 300)) +
                    "', which no bundle has");
    const std::string path = folder + "/" + name, where = "bundle " + folder + ": " + printable(name);
    struct stat link, status;
    if (name.size() > LONGEST_NAME || ::lstat(path.c_str(), &link) != 0)
        input_error(where.substr(0, 300) + " is missing; build the bundle again");
    // What lies there may be exchanged at any moment: what was opened is what is looked at, and read.
    const File file(path, O_NOFOLLOW | O_NONBLOCK);
    if (!S_ISREG(link.st_mode) || (!file.is_open() && errno == ELOOP) ||
        (file.is_open() && (!file.status(status) || !S_ISREG(status.st_mode))))
        input_error(where.substr(0, 300) + " is not a plain file; build the bundle again");
    if (!file.is_open()) input_error(where + " cannot be read: " + reason(errno));
    if (status.st_size != expected.bytes)
        input_error(where + " has " + std::to_string(status.st_size) + " bytes, the manifest says " +
                    std::to_string(expected.bytes) + "; build the bundle again");
    Sha256 digest;
    if (contents) contents->reserve(static_cast<std::size_t>(expected.bytes));
    const int error = file.read(expected.bytes, [&](const char *data, std::size_t size) {
        digest.update(data, size);
        if (contents) contents->append(data, size);
    });
    if (error) input_error(where + " cannot be read: " + reason(error));
    if (const std::string actual = digest.hex(); actual != expected.sha256)
        input_error(where + " was altered: its sha256 begins " + actual.substr(0, 8) + ", the manifest says " +
                    printable(expected.sha256.substr(0, 8)) + "; build the bundle again");
}

std::vector<std::string> lines_of(const std::string &text) {
    std::vector<std::string> lines;
    std::string line;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c != '\n' && c != '\r') {
            line += c;
            continue;
        }
        if (c == '\r' && i + 1 < text.size() && text[i + 1] == '\n') ++i;
        lines.push_back(std::move(line));
        line.clear();
    }
    if (!line.empty()) lines.push_back(std::move(line));
    return lines;
}

std::string stripped(const std::string &text) {
    constexpr const char *BLANK = " \t\n\r\v\f";
    const std::size_t begin = text.find_first_not_of(BLANK);
    return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(BLANK) - begin + 1);
}

}  // namespace

Bundle::Bundle(std::string folder) : path(std::move(folder)), manifest(read_manifest(path)) {
    for (const auto &[name, expected] : manifest.files) check_file(path, name, expected, nullptr);
    if (!manifest.files.count(MODEL))
        input_error("bundle " + path + ": " + MANIFEST + " lists no " + MODEL + "; build the bundle again");
}

std::string Bundle::read(const std::string &name) const {
    std::string contents;
    check_file(path, name, manifest.files.at(name), &contents);
    return contents;
}

std::vector<std::string> Bundle::labels() const {
    return manifest.files.count(LABELS) ? lines_of(read(LABELS)) : std::vector<std::string>();
}

std::vector<std::string> read_labels(const std::string &path, std::size_t classes) {
    std::string text;
    const int error = read_text(path, LARGEST_LABELS, text);
    if (error == ENOENT) input_error("labels file " + path + ": no such file");
    if (error) input_error("labels file " + path + ": cannot be read: " + reason(error));
    if (text.compare(0, 3, "\xef\xbb\xbf") == 0) text.erase(0, 3);
    std::vector<std::string> lines = lines_of(text);
    while (!lines.empty() && stripped(lines.back()).empty()) lines.pop_back();
    if (lines.size() != classes)
        input_error("labels file " + path + ": " + std::to_string(lines.size()) + " lines, but the model has " +
                    std::to_string(classes) + " classes");
    for (std::string &line : lines) line = stripped(line.substr(line.rfind('\t') + 1));
    return lines;
}

}  // namespace rx
