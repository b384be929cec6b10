#include "signature.h"

#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <cerrno>
#include <cstdint>
#include <memory>

#include "digest.h"
#include "document.h"
#include "error.h"
#include "files.h"

namespace rx {
namespace {

constexpr const char *BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json";
constexpr const char *PAYLOAD = "application/vnd.in-toto+json";
constexpr const char *STATEMENT = "https://in-toto.io/Statement/v1";
constexpr const char *PREDICATE = "https://model_signing/signature/v1.0";
constexpr off_t LARGEST_KEY = off_t(1) << 16;  // bytes; no key is as long

struct FreeBio {
    void operator()(BIO *bio) const { BIO_free(bio); }
};
struct FreeKey {
    void operator()(EVP_PKEY *key) const { EVP_PKEY_free(key); }
};
struct FreeContext {
    void operator()(EVP_MD_CTX *context) const { EVP_MD_CTX_free(context); }
};
using Bio = std::unique_ptr<BIO, FreeBio>;

int no_password(char *, int, int, void *) { return 0; }  // OpenSSL's own would ask on the terminal

// OpenSSL keeps what went wrong for the thread, where the host's next look would find it.
struct ErrorsCleared {
    ~ErrorsCleared() { ERR_clear_error(); }
};

}  // namespace

class PublicKey {
  public:
    explicit PublicKey(const std::string &path) {
        const ErrorsCleared cleared;
        const std::string where = "key " + path;
        std::string pem;
        const int error = read_text(path, LARGEST_KEY, pem);
        if (error == ENOENT) input_error(where + ": no such file");
        if (error == EISDIR || error == EINVAL) input_error(where + ": not a plain file");
        if (error) input_error(where + ": cannot be read: " + reason(error));
        if (pem.find("PRIVATE KEY-----") != std::string::npos)
            input_error(where + ": is a private key; `openssl ec -in KEY -pubout` gives the public one");
        const Bio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
        key_.reset(bio ? PEM_read_bio_PUBKEY(bio.get(), nullptr, no_password, nullptr) : nullptr);
        if (!key_) input_error(where + ": is no public key in PEM");
        char curve[64] = "";
        std::size_t length = 0;
        if (EVP_PKEY_is_a(key_.get(), "EC") == 1)
            EVP_PKEY_get_group_name(key_.get(), curve, sizeof curve, &length);
        for (const auto &[name, algorithm] : {std::pair("prime256v1", EVP_sha256()), {"secp384r1", EVP_sha384()},
                                              {"secp521r1", EVP_sha512()}})
            if (std::string_view(curve) == name) algorithm_ = algorithm;
        if (!algorithm_)
            input_error(where + ": is of another kind; model signing takes the curves P-256, P-384 and P-521");
        fingerprint_ = sha256(written(where));
    }

    // What signatures call it: the sha256 of its PEM.
    const std::string &fingerprint() const { return fingerprint_; }

    // Whether `signature` (ECDSA, DER) is this key's of `message`.
    bool made(std::string_view signature, std::string_view message) const {
        const ErrorsCleared cleared;
        const auto bytes = [](std::string_view text) { return reinterpret_cast<const unsigned char *>(text.data()); };
        const std::unique_ptr<EVP_MD_CTX, FreeContext> context(EVP_MD_CTX_new());
        if (!context || EVP_DigestVerifyInit(context.get(), nullptr, algorithm_, nullptr, key_.get()) != 1)
            lacks("OpenSSL's libcrypto does not check signatures here");
        return EVP_DigestVerify(context.get(), bytes(signature), signature.size(), bytes(message), message.size()) == 1;
    }

  private:
    // The key in PEM, as every program writes it: its file may have it with other lines, or its point compressed.
    std::string written(const std::string &where) const {
        const Bio bio(BIO_new(BIO_s_mem()));
        char *data = nullptr;
        if (!bio ||
            EVP_PKEY_set_utf8_string_param(key_.get(), OSSL_PKEY_PARAM_EC_POINT_CONVERSION_FORMAT, "uncompressed") != 1 ||
            PEM_write_bio_PUBKEY(bio.get(), key_.get()) != 1)
            lacks(where + ": OpenSSL's libcrypto cannot write it");
        const long size = BIO_get_mem_data(bio.get(), &data);
        return {data, static_cast<std::size_t>(size)};
    }

    std::unique_ptr<EVP_PKEY, FreeKey> key_;
    const EVP_MD *algorithm_ = nullptr;
    std::string fingerprint_;
};

namespace {

// Base64 with its padding and nothing else; Damaged otherwise.
std::string base64(std::string_view text) {
    constexpr std::string_view ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const std::size_t size = text.size();
    std::size_t padding = 0;
    while (padding < 2 && padding < size && text[size - 1 - padding] == '=') ++padding;
    if (size % 4) throw Damaged{"base64 of a length that is none"};
    std::string result;
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < size; ++i) {
        const std::size_t value = i < size - padding ? ALPHABET.find(text[i]) : 0;
        if (value == std::string_view::npos) throw Damaged{"characters that base64 has not"};
        bits = bits << 6 | static_cast<std::uint32_t>(value);
        if (i % 4 == 3)
            for (const int shift : {16, 8, 0}) result += static_cast<char>(bits >> shift & 255);
    }
    result.resize(result.size() - padding);
    return result;
}

// The bytes of a digest in hexadecimal; Damaged otherwise.
std::string bytes_of(const std::string &digest) {
    constexpr std::string_view DIGITS = "0123456789abcdef";
    std::string result;
    for (std::size_t i = 0; i < digest.size(); i += 2) {
        const std::size_t high = DIGITS.find(digest[i]);
        const std::size_t low = i + 1 < digest.size() ? DIGITS.find(digest[i + 1]) : std::string_view::npos;
        if (high == std::string_view::npos || low == std::string_view::npos)
            throw Damaged{"a digest that is no hexadecimal number"};
        result += static_cast<char>(high << 4 | low);
    }
    return result;
}

struct Envelope {
    std::string payload, signature;
    std::optional<std::string> hint;  // which key it says to be made with; not signed
};

Envelope read_envelope(std::string_view data, const std::string &sentence) {
    Envelope result;
    std::string media, type;
    try {
        Document document;
        decode(data, document.top, true);
        const Part top(document.top, "$");
        media = top["mediaType"].text();
        const Part key = top["verificationMaterial"]["publicKey"];
        key.object();
        if (key.has("hint")) result.hint = key["hint"].text_or_null();
        const Part envelope = top["dsseEnvelope"];
        type = envelope["payloadType"].text();
        result.payload = base64(envelope["payload"].text());
        result.signature = base64(envelope["signatures"].array_of(1)[0]["sig"].text());
    } catch (const Damaged &damage) {
        check_failed(sentence + " is no signature with a key: " + damage.reason + "; sign the bundle again");
    }
    if (media != BUNDLE || type != PAYLOAD)
        check_failed(sentence + " is of another format than model signing's 1.0; sign the bundle again");
    return result;
}

// The files of a payload that is signed.
std::map<std::string, std::string> read_statement(const std::string &payload, const std::string &sentence) {
    std::map<std::string, std::string> files;
    std::string digests, root;
    std::size_t count = 0;
    bool taken = false;
    try {
        Document document;
        decode(payload, document.top, true);
        const Part top(document.top, "$");
        taken = top["_type"].text() == STATEMENT;
        taken = top["predicateType"].text() == PREDICATE && taken;
        root = top["subject"].array_of(1)[0]["digest"]["sha256"].text();
        const Part how = top["predicate"]["serialization"];
        taken = how["method"].text() == "files" && taken;
        taken = how["hash_type"].text() == "sha256" && taken;
        taken = !how["allow_symlinks"].boolean() && taken;
        for (const Part &resource : top["predicate"]["resources"].array()) {
            const std::string digest = resource["digest"].text();
            digests += bytes_of(digest);
            taken = resource["algorithm"].text() == "sha256" && taken;
            files[resource["name"].text()] = digest;
            ++count;
        }
    } catch (const Damaged &damage) {
        check_failed(sentence + " is signed, but lists no files: " + damage.reason + "; sign the bundle again");
    }
    if (!taken) check_failed(sentence + " is signed in a way that is not taken here; `rxdeploy sign` signs it again");
    if (files.size() != count || sha256(digests) != root)
        check_failed(sentence + " is signed, but contradicts itself; sign the bundle again");
    return files;
}

}  // namespace

TrustedKeys::TrustedKeys(const std::vector<std::string> &paths) {
    for (const std::string &path : paths) keys_.emplace_back(path);
}

TrustedKeys::~TrustedKeys() = default;

std::map<std::string, std::string> TrustedKeys::signed_files(std::string_view data, const std::string &where) const {
    const std::string sentence = where + ": " + SIGNATURE;
    const Envelope envelope = read_envelope(data, sentence);
    // DSSE's pre-authentication encoding.
    const std::string message = "DSSEv1 " + std::to_string(std::string_view(PAYLOAD).size()) + " " + PAYLOAD + " " +
                                std::to_string(envelope.payload.size()) + " " + envelope.payload;
    std::string names;
    for (const PublicKey &key : keys_) {
        // model_signing refuses another key's name, and so that all say the same, so is it here.
        if (envelope.hint.value_or(key.fingerprint()) == key.fingerprint() && key.made(envelope.signature, message))
            return read_statement(envelope.payload, sentence);
        names += (names.empty() ? "" : ", ") + key.fingerprint().substr(0, 8);
    }
    const std::string name = envelope.hint.value_or("");
    const std::string by = name.empty() ? "an unnamed key" : "the key " + printable(name.substr(0, 8));
    check_failed(sentence + " is no signature of a trusted key: it was made with " + by + ", trusted is " + names);
}

}  // namespace rx
