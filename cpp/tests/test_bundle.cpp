// Bundles on disk: what is refused before a byte of a file is used.
#include "bundle.h"

#include <gtest/gtest.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "external.h"
#include "sealed.h"

namespace rx {
namespace {

using namespace std::string_literals;

const std::string CONTENTS = "not really a model";

class BundleTest : public testing::Test {
  protected:
    void SetUp() override {
        folder.write("model.onnx", CONTENTS);
        folder.write("labels.txt", "zero\none\r\ntwo\n");
        write({{"model.onnx", entry(CONTENTS)}, {"labels.txt", entry("zero\none\r\ntwo\n")}});
    }

    void write(const nlohmann::ordered_json &files) { folder.write("manifest.json", sealed(manifest_of(files))); }

    std::string refusal() const {
        try {
            Bundle(folder.path);
        } catch (const Error &error) {
            EXPECT_EQ(error.status, RXDEPLOY_INPUT_ERROR);
            return error.what();
        }
        return "";
    }

    bool refuses(const std::string &words) const {
        const std::string message = refusal();
        return message.find(words) != std::string::npos ? true : (ADD_FAILURE() << "'" << message << "'", false);
    }

    Folder folder;
};

TEST_F(BundleTest, IsOpened) {
    const Bundle bundle(folder.path);
    EXPECT_EQ(bundle.read("model.onnx"), CONTENTS);
    EXPECT_EQ(bundle.labels(), (std::vector<std::string>{"zero", "one", "two"}));
}

TEST_F(BundleTest, WhatIsNone) {
    std::filesystem::remove(folder.path / "manifest.json");
    refuses("not a bundle (there is no manifest.json)");
    std::filesystem::create_directory(folder.path / "manifest.json");
    refuses("manifest.json cannot be read");
}

TEST_F(BundleTest, AManifestThatIsTooLarge) {
    std::filesystem::resize_file(folder.path / "manifest.json", (std::uintmax_t(1) << 24) + 1);
    refuses("manifest.json cannot be read: File too large");
}

TEST_F(BundleTest, MissingFile) {
    std::filesystem::remove(folder.path / "model.onnx");
    refuses("model.onnx is missing; build the bundle again");
}

TEST_F(BundleTest, AlteredFile) {
    std::string altered = CONTENTS;
    altered[3] = 'X';
    folder.write("model.onnx", altered);
    refuses("model.onnx was altered: its sha256 begins " + sha256(altered).substr(0, 8) + ", the manifest says " +
            sha256(CONTENTS).substr(0, 8));
}

TEST_F(BundleTest, FileOfAnotherSize) {
    folder.write("model.onnx", CONTENTS + "x");
    refuses("model.onnx has 19 bytes, the manifest says 18");
}

TEST_F(BundleTest, LinkedFile) {
    std::filesystem::rename(folder.path / "model.onnx", folder.path / "elsewhere");
    std::filesystem::create_symlink("elsewhere", folder.path / "model.onnx");
    refuses("model.onnx is not a plain file");
    std::filesystem::remove(folder.path / "model.onnx");
    std::filesystem::create_symlink("nowhere", folder.path / "model.onnx");
    refuses("model.onnx is not a plain file");
}

TEST_F(BundleTest, PipesAndFolders) {
    std::filesystem::remove(folder.path / "model.onnx");
    ASSERT_EQ(::mkfifo((folder.path / "model.onnx").c_str(), 0600), 0);
    refuses("model.onnx is not a plain file");  // and does not wait for a writer
    std::filesystem::remove(folder.path / "model.onnx");
    std::filesystem::create_directory(folder.path / "model.onnx");
    refuses("model.onnx is not a plain file");
    std::filesystem::remove(folder.path / "manifest.json");
    ASSERT_EQ(::mkfifo((folder.path / "manifest.json").c_str(), 0600), 0);
    refuses("manifest.json cannot be read");
}

TEST_F(BundleTest, NamesThatNoBundleHas) {
    for (const std::string name : {"../model.onnx", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "manifest.json"}) {
        write({{"model.onnx", entry(CONTENTS)}, {name, entry(CONTENTS)}});
        refuses("which no bundle has");
    }
    write({{"model.onnx", entry(CONTENTS)}, {std::string("a\0b", 3), entry(CONTENTS)}});
    refuses("which no bundle has");
    write({{"model.onnx", entry(CONTENTS)}, {std::string(300, 'a'), entry(CONTENTS)}});
    refuses(" is missing");
}

TEST_F(BundleTest, NoModel) {
    write({{"labels.txt", entry("zero\none\r\ntwo\n")}});
    refuses("lists no model.onnx");
}

TEST_F(BundleTest, AFileThatChangesLater) {
    const Bundle bundle(folder.path);
    std::string altered = CONTENTS;
    altered[0] = 'N';
    folder.write("model.onnx", altered);
    EXPECT_THROW(bundle.read("model.onnx"), Error);
}

TEST_F(BundleTest, LabelFiles) {
    folder.write("names.tsv", "\xef\xbb\xbfn01\tgreat grey owl \nn02\tcat\n dog\n\n\n");
    const std::string path = folder.path / "names.tsv";
    EXPECT_EQ(read_labels(path, 3), (std::vector<std::string>{"great grey owl", "cat", "dog"}));
    EXPECT_THROW(read_labels(path, 4), Error);
    EXPECT_THROW(read_labels(path + "x", 3), Error);
}

// Weights in other files: a tensor with external_data (field 13), wherever it is.

std::string field(unsigned number, const std::string &value) {
    std::string text;
    for (std::size_t left : {std::size_t(number << 3 | 2), value.size()}) {
        for (; left > 127; left >>= 7) text += static_cast<char>(left % 128 + 128);
        text += static_cast<char>(left);
    }
    return text + value;
}

TEST(External, IsSeenWhereverItIs) {
    const std::string tensor = field(8, "weight") + field(13, "location"), own = field(8, "weight") + field(9, "0000");
    const auto node = [](unsigned attribute, const std::string &value) {
        return field(1, field(5, field(attribute, value)));
    };
    for (const auto &graph : std::vector<std::pair<std::string, std::string>>{
             {field(5, tensor), field(5, own)},
             {field(15, field(2, tensor)), field(15, field(2, own))},
             {node(5, tensor), node(5, own)},
             {node(6, field(5, tensor)), node(6, field(5, own))},
             {node(10, tensor), node(10, own)},
             {node(22, field(1, tensor)), node(22, field(1, own))}}) {
        const std::string before = std::string("\x08\x09", 2) + field(2, "rxdeploy");
        EXPECT_TRUE(keeps_weights_elsewhere(before + field(7, graph.first)));
        EXPECT_TRUE(keeps_weights_elsewhere(before + field(20, field(1, graph.first))));
        EXPECT_FALSE(keeps_weights_elsewhere(before + field(7, graph.second)));
    }
    EXPECT_TRUE(keeps_weights_elsewhere(field(25, field(7, field(5, field(5, tensor))))));
    // Another way to write the tag, of which parsers take 32 bits.
    const std::string hidden = field(8, "weight") + "\xea\x80\x80\x80\x10" + field(13, "location").substr(1);
    EXPECT_TRUE(keeps_weights_elsewhere(field(7, field(5, hidden))));
    EXPECT_TRUE(keeps_weights_elsewhere("\x08\0\0\0ORTM"s));
    EXPECT_FALSE(keeps_weights_elsewhere(""));
}

TEST(External, WhatIsNoModelEndsTheLook) {
    const std::string model = field(7, field(5, field(8, "weight") + field(9, std::string(200, '0'))) + field(2, "g"));
    for (std::size_t i = 0; i < model.size(); ++i) {
        keeps_weights_elsewhere(model.substr(0, i));
        for (int bit = 0; bit < 8; ++bit) {
            std::string damaged = model;
            damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
            keeps_weights_elsewhere(damaged);
        }
    }
    EXPECT_FALSE(keeps_weights_elsewhere(std::string(64, '\xff')));
}

// Signatures: tests/signing/test_trust_in_c.py holds what they say against the Python runtime. Here it is about memory.

class SignedTest : public BundleTest {
  protected:
    void SetUp() override {
        BundleTest::SetUp();
        EVP_PKEY *key = EVP_EC_gen("P-256");
        ASSERT_NE(key, nullptr);
        BIO *bio = BIO_new_file((folder.path.string() + ".pub").c_str(), "w");
        ASSERT_EQ(PEM_write_bio_PUBKEY(bio, key), 1);
        BIO_free(bio);
        const std::string payload = statement(), type = "application/vnd.in-toto+json";
        const std::string message = "DSSEv1 28 " + type + " " + std::to_string(payload.size()) + " " + payload;
        std::string signature(256, '\0');
        std::size_t size = signature.size();
        EVP_MD_CTX *context = EVP_MD_CTX_new();
        EXPECT_EQ(EVP_DigestSignInit(context, nullptr, EVP_sha256(), nullptr, key), 1);
        EXPECT_EQ(EVP_DigestSign(context, reinterpret_cast<unsigned char *>(signature.data()), &size,
                                 reinterpret_cast<const unsigned char *>(message.data()), message.size()),
                  1);
        EVP_MD_CTX_free(context);
        EVP_PKEY_free(key);
        model_sig = nlohmann::json{{"mediaType", "application/vnd.dev.sigstore.bundle.v0.3+json"},
                                   {"verificationMaterial", {{"publicKey", nlohmann::json::object()}}},
                                   {"dsseEnvelope",
                                    {{"payload", base64(payload)},
                                     {"payloadType", type},
                                     {"signatures", {{{"sig", base64(signature.substr(0, size))}}}}}}}
                        .dump();
        folder.write("model.sig", model_sig);
    }
    void TearDown() override { std::filesystem::remove(folder.path.string() + ".pub"); }

    std::string statement() const {
        nlohmann::json resources = nlohmann::json::array();
        Sha256 root;
        for (const char *name : {"labels.txt", "manifest.json", "model.onnx"}) {
            std::ifstream file(folder.path / name, std::ios::binary);
            Sha256 digest;
            const std::string text(std::istreambuf_iterator<char>(file), {});
            digest.update(text.data(), text.size());
            const std::string hex = digest.hex();
            for (std::size_t i = 0; i < hex.size(); i += 2) {
                const auto byte = static_cast<unsigned char>(std::stoi(hex.substr(i, 2), nullptr, 16));
                root.update(&byte, 1);
            }
            resources.push_back({{"name", name}, {"algorithm", "sha256"}, {"digest", hex}});
        }
        return nlohmann::json{{"_type", "https://in-toto.io/Statement/v1"},
                              {"predicateType", "https://model_signing/signature/v1.0"},
                              {"subject", {{{"digest", {{"sha256", root.hex()}}}}}},
                              {"predicate",
                               {{"serialization",
                                 {{"method", "files"}, {"hash_type", "sha256"}, {"allow_symlinks", false}}},
                                {"resources", resources}}}}
            .dump();
    }

    static std::string base64(const std::string &data) {
        std::string text(data.size() * 2 + 8, '\0');
        const int size = EVP_EncodeBlock(reinterpret_cast<unsigned char *>(text.data()),
                                         reinterpret_cast<const unsigned char *>(data.data()),
                                         static_cast<int>(data.size()));
        text.resize(static_cast<std::size_t>(size));
        return text;
    }

    rxdeploy_status status() const {
        try {
            Bundle(folder.path, {folder.path.string() + ".pub"});
        } catch (const Error &error) {
            return error.status;
        }
        return RXDEPLOY_OK;
    }

    std::string model_sig;
};

TEST_F(SignedTest, EveryFlipAndEveryCut) {
    ASSERT_EQ(status(), RXDEPLOY_OK);
    std::size_t taken = 0;
    for (std::size_t i = 0; i < model_sig.size(); ++i) {
        std::string damaged = model_sig;
        damaged[i] = static_cast<char>(damaged[i] ^ (1 << i % 8));
        folder.write("model.sig", damaged);
        const rxdeploy_status found = status();
        ASSERT_TRUE(found == RXDEPLOY_CHECK_FAILED || found == RXDEPLOY_OK) << i;
        taken += found == RXDEPLOY_OK;  // a bit of a name that is not looked at, or of base64 that stands for none
        folder.write("model.sig", model_sig.substr(0, i));
        ASSERT_EQ(status(), RXDEPLOY_CHECK_FAILED) << i;
    }
    EXPECT_LT(taken, 8u);
}

TEST_F(SignedTest, WhatIsReadLaterIsWhatWasSigned) {
    const Bundle bundle(folder.path, {folder.path.string() + ".pub"});
    folder.write("model.onnx", std::string(CONTENTS.size(), 'x'));
    try {
        bundle.read("model.onnx");
        FAIL();
    } catch (const Error &error) {
        EXPECT_EQ(error.status, RXDEPLOY_CHECK_FAILED);
        EXPECT_NE(std::string(error.what()).find("it is not what was signed"), std::string::npos);
    }
}

}  // namespace
}  // namespace rx
