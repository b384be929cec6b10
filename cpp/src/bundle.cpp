#include "bundle.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <map>
#include <optional>
#include <string_view>
#include <system_error>

#include "digest.h"
#include "error.h"
#include "external.h"
#include "files.h"
#include "signature.h"

namespace rx {
namespace {

constexpr const char *MANIFEST = "manifest.json";
constexpr const char *LABELS = "labels.txt";
constexpr std::size_t LONGEST_NAME = 255;
// Bytes; more is no such file. Read, a manifest takes some twenty times its size.
constexpr off_t LARGEST_MANIFEST = off_t(1) << 24, LARGEST_LABELS = off_t(1) << 28,
                LARGEST_SIGNATURE = off_t(1) << 20;

// Its signature, checked; what it vouches for has to be the manifest in `data`, and the files that this lists.
Manifest signed_manifest(const std::string &path, const std::string &data, const TrustedKeys &keys) {
    const std::string where = "bundle " + path, file = path + "/" + SIGNATURE;
    struct stat status;
    if (::lstat(file.c_str(), &status) != 0)
        check_failed(where + ": is not signed (there is no " + SIGNATURE + "), and only signed ones are trusted here; "
                     "`rxdeploy sign` signs it");
    std::string signature;
    const int error = read_text(file, LARGEST_SIGNATURE, signature, O_NOFOLLOW);
    if (error == ELOOP)
        check_failed(where + ": " + SIGNATURE + " is a link, which no bundle has; sign the bundle again");
    if (error) check_failed(where + ": " + SIGNATURE + ": cannot be read: " + reason(error) + "; sign the bundle again");
    std::map<std::string, std::string> files = keys.signed_files(signature, where);
    const auto own = files.find(MANIFEST);
    if (own == files.end() || own->second != sha256(data))
        check_failed(where + ": " + MANIFEST + " is not the one that was signed; sign the bundle again");
    Manifest manifest = parse_manifest(data, where);
    std::map<std::string, std::string> listed{{MANIFEST, own->second}};
    for (const auto &[name, expected] : manifest.files) listed[name] = expected.sha256;
    if (listed != files || manifest.files.count(MANIFEST))
        check_failed(where + ": " + SIGNATURE + " and " + MANIFEST + " list different files; sign the bundle again");
    return manifest;
}

Manifest read_manifest(const std::string &path, const std::vector<std::string> &keys) {
    const std::string where = "bundle " + path;
    std::optional<TrustedKeys> trusted;
    if (!keys.empty()) trusted.emplace(keys);
    std::string data;
    const int error = read_text(path + "/" + MANIFEST, LARGEST_MANIFEST, data, O_NOFOLLOW);
    if (error == ELOOP) input_error(where + ": " + MANIFEST + " is a link, which no bundle has; copy the files themselves");
    if (error == ENOENT || error == ENOTDIR)
        input_error(where + ": not a bundle (there is no " + MANIFEST + "); `rxdeploy build` makes one");
    if (error) input_error(where + ": " + MANIFEST + " cannot be read: " + reason(error));
    return trusted ? signed_manifest(path, data, *trusted) : parse_manifest(data, where);
}

// Anything in a signed bundle's folder that is none of the bundle's is an error.
void check_strangers(const std::string &path, const Manifest &manifest) {
    std::error_code error;
    std::string first;
    for (std::filesystem::directory_iterator entry(path, error), end; !error && entry != end; entry.increment(error)) {
        const std::string name = entry->path().filename().string();
        const bool known = name == MANIFEST || name == SIGNATURE || manifest.files.count(name);
        if (!known && (first.empty() || name < first)) first = name;
    }
    if (error) input_error("bundle " + path + ": cannot be read: " + error.message());
    if (!first.empty())
        check_failed("bundle " + path + ": holds " + printable(first) + ", which is not signed; take it out, or sign it "
                     "again");
}

bool is_file_name(const std::string &name) {
    for (const char c : name)
        if (c < ' ' || c > '~') return false;  // of ASCII, which no name of ours leaves, so that nobody reads another one
    return !name.empty() && name != "." && name != ".." && name != MANIFEST && name != SIGNATURE &&
           name.find_first_of("/\\") == std::string::npos;
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

// The same for a bundle that may be signed: then what is wrong is not what was signed.
void check_file(const std::string &folder, const std::string &name, const FileDigest &expected, bool is_signed,
                std::string *contents) {
    try {
        check_file(folder, name, expected, contents);
    } catch (const Error &error) {
        if (!is_signed || error.status != RXDEPLOY_INPUT_ERROR) throw;
        constexpr std::string_view WAY_OUT = "build the bundle again";
        std::string message = error.what();
        if (const std::size_t at = message.find(WAY_OUT); at != std::string::npos)
            message.replace(at, WAY_OUT.size(), "it is not what was signed");
        check_failed(message);
    }
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

Bundle::Bundle(std::string folder, const std::vector<std::string> &trusted_keys)
    : path(folder.empty() ? "." : std::move(folder)), manifest(read_manifest(path, trusted_keys)), is_signed_(!trusted_keys.empty()) {
    if (is_signed_) check_strangers(path, manifest);
    std::string model;
    for (const auto &[name, expected] : manifest.files)
        check_file(path, name, expected, is_signed_, name == MODEL ? &model : nullptr);
    if (!manifest.files.count(MODEL))
        input_error("bundle " + path + ": " + MANIFEST + " lists no " + MODEL + "; build the bundle again");
    if (keeps_weights_elsewhere(model))
        input_error("bundle " + path + ": " + MODEL + " has weights in other files, which no digest covers; build it "
                    "again");
}

std::string Bundle::read(const std::string &name) const {
    std::string contents;
    check_file(path, name, manifest.files.at(name), is_signed_, &contents);
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
