// Bundles on disk: what is refused before a byte of a file is used.
#include "bundle.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "sealed.h"

namespace rx {
namespace {

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

}  // namespace
}  // namespace rx
