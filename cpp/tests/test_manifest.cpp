// manifest.json: what is read from it, what is refused, and 100 000 mutations of which each is one or the other.
#include "manifest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <random>

#include "error.h"
#include "sealed.h"

namespace rx {
namespace {

using nlohmann::ordered_json;
using namespace std::string_literals;

const ordered_json MODEL_FILE = {{"model.onnx", {{"sha256", "00"}, {"bytes", 3}}}};

std::string refusal(const std::string &text) {
    try {
        parse_manifest(text, "bundle x");
    } catch (const Error &error) {
        EXPECT_EQ(error.status, RXDEPLOY_INPUT_ERROR);
        return error.what();
    }
    return "";
}

TEST(Printable, IsOneLineOfUtf8) {
    const std::string good = "a caf\xc3\xa9, \xe2\x82\xac 5, \xf0\x9f\x90\x9d";
    EXPECT_EQ(printable(good), good);
    EXPECT_EQ(printable("a\n\x1b[2J\x7f\0" "b"s), "a??[2J??b");
    EXPECT_EQ(printable("\xc2\x9b" "2J"), "?2J");        // a control character of two bytes
    EXPECT_EQ(printable("\x9b" "2J"), "?2J");            // no UTF-8: as Latin-1, the same
    EXPECT_EQ(printable("\xc0\xaf"), "??");             // a slash in more bytes than it takes
    EXPECT_EQ(printable("\xed\xa0\x80"), "???");        // half of a pair
    EXPECT_EQ(printable("\xf4\x90\x80\x80"), "????");   // beyond the last character
    EXPECT_EQ(printable("cut \xe2\x82"), "cut ??");
}

TEST(Manifest, IsRead) {
    const Manifest m = parse_manifest(sealed(manifest_of(MODEL_FILE)), "bundle x");
    EXPECT_EQ(m.model, "small");
    EXPECT_EQ(m.card_flops, 7u);
    EXPECT_EQ(m.multiply_adds, 7u);
    EXPECT_EQ(m.preprocessing.image_size, 32u);
    EXPECT_EQ(m.preprocessing.interpolation, RXDEPLOY_BICUBIC);
    EXPECT_EQ(m.num_classes, 3u);
    EXPECT_EQ(m.input.name, "image");
    EXPECT_TRUE(m.for_integers);
    EXPECT_EQ(m.pillow, 13);
    EXPECT_EQ(m.command, "rxdeploy build small -o 'it'\"'\"'s here'");
    EXPECT_EQ(m.cpu.threads, 2);
    EXPECT_EQ(m.cpu.sessions, 3u);
    EXPECT_EQ(m.cpu.cores, 4);
    EXPECT_FALSE(m.cpu.spinning);
    EXPECT_TRUE(m.cpu.arena);
    EXPECT_TRUE(m.cpu.denormals_as_zero);
    EXPECT_EQ(m.files.at("model.onnx").bytes, 3);
}

TEST(Manifest, TuningForAnotherEngineIsIgnored) {
    ordered_json manifest = manifest_of(MODEL_FILE);
    manifest["tuning"]["cpu"]["engine"] = "openvino";
    const CpuSettings plain = parse_manifest(sealed(manifest), "bundle x").cpu;
    EXPECT_EQ(plain.threads, 0);
    EXPECT_TRUE(plain.spinning);
}

TEST(Manifest, QuantisedForTensorRTIsComputedInFloat) {
    ordered_json manifest = manifest_of(MODEL_FILE);
    manifest["quantisation"] = {{"scheme", "tensorrt"}};
    EXPECT_FALSE(parse_manifest(sealed(manifest), "bundle x").for_integers);
    manifest["quantisation"] = {{"scheme", "onnxruntime"}};
    EXPECT_TRUE(parse_manifest(sealed(manifest), "bundle x").for_integers);
}

TEST(Manifest, RefusalsNameThePlace) {
    const std::vector<std::pair<std::string, std::function<void(ordered_json &)>>> cases = {
        {"it has schema 2, this rxdeploy reads up to 1", [](auto &m) { m["schema"] = 2; }},
        {"Invalid enum value 0 - at `$.schema`", [](auto &m) { m["schema"] = 0; }},
        {"Expected `int`, got `str` - at `$.schema`", [](auto &m) { m["schema"] = "1"; }},
        {"Object missing required field `precision`", [](auto &m) { m.erase("precision"); }},
        {"Invalid enum value 'fp8' - at `$.precision`", [](auto &m) { m["precision"] = "fp8"; }},
        {"Expected `int` >= 32 - at `$.preprocessing.image_size`",
         [](auto &m) { m["preprocessing"]["image_size"] = 31; }},
        {"Object contains unknown field `x` - at `$.preprocessing`", [](auto &m) { m["preprocessing"]["x"] = 1; }},
        {"Expected `array` of length 3, got 2 - at `$.preprocessing.mean`",
         [](auto &m) { m["preprocessing"]["mean"].erase(0); }},
        {"`std` must be above 0", [](auto &m) { m["preprocessing"]["std"][1] = 0; }},
        {"Expected `int | null`, got `str` - at `$.inputs[0].shape[0]`",
         [](auto &m) { m["inputs"][0]["shape"][0] = "n"; }},
        {"Expected `array` of length 1, got 0 - at `$.outputs`", [](auto &m) { m["outputs"].clear(); }},
        {"The input is not the images that `preprocessing` makes", [](auto &m) { m["inputs"][0]["shape"][1] = 33; }},
        {"The output is not float32 of `num_classes`", [](auto &m) { m["num_classes"] = 4; }},
        {"Object missing required field `bytes` - at `$.files[...]`",
         [](auto &m) { m["files"]["model.onnx"].erase("bytes"); }},
        {"Expected `int`, got `bool` - at `$.tuning.cpu.threads`",
         [](auto &m) { m["tuning"]["cpu"]["threads"] = true; }},
    };
    for (const auto &[message, change] : cases) {
        ordered_json manifest = manifest_of(MODEL_FILE);
        change(manifest);
        EXPECT_NE(refusal(sealed(manifest)).find(message), std::string::npos) << refusal(sealed(manifest));
    }
}

TEST(Manifest, AlteredIsNoticed) {
    std::string text = sealed(manifest_of(MODEL_FILE));
    text.replace(text.find("\"small\""), 7, "\"large\"");
    EXPECT_NE(refusal(text).find("was altered: it no longer has its own digest"), std::string::npos);
    text = sealed(manifest_of(MODEL_FILE)) + "\n";
    EXPECT_NE(refusal(text).find("was altered"), std::string::npos);
}

TEST(Manifest, WhatIsNoJson) {
    for (const std::string text : {"", "{", "[]", "3", "null", "{\"a\": nan}", "{} x", "\xef\xbb\xbf{}", "\"\xff\""})
        EXPECT_NE(refusal(text).find("is damaged: "), std::string::npos) << text;
    EXPECT_NE(refusal(std::string(100000, '[')).find("nested too deep"), std::string::npos);
    EXPECT_NE(refusal(std::string(100000, '{')).find("is damaged"), std::string::npos);
}

// Seeded: the same inputs every time.
class Mutator {
  public:
    explicit Mutator(std::uint64_t seed) : random_(seed) {}

    std::size_t below(std::size_t n) { return static_cast<std::size_t>(random_() % n); }

    // Bytes: exchanged, removed, doubled, cut off.
    std::string bytes(std::string text) {
        for (std::size_t times = 1 + below(4); times && !text.empty(); --times) {
            const std::size_t at = below(text.size()), length = 1 + below(std::min<std::size_t>(40, text.size() - at));
            switch (below(6)) {
                case 0: text[at] = static_cast<char>(random_()); break;
                case 1: text[at] = "{}[]\",:\\0-.eE"[below(13)]; break;
                case 2: text.erase(at, length); break;
                case 3: text.insert(below(text.size()), text.substr(at, length)); break;
                case 4: text.resize(at); break;
                case 5: text[at] = static_cast<char>(text[at] ^ (1 << below(8))); break;
            }
        }
        return text;
    }

    // A value somewhere in the tree: removed, or of another kind.
    void tree(ordered_json &value) {
        if (value.is_structured() && !value.empty() && below(8)) {
            const auto item = std::next(value.begin(), static_cast<std::ptrdiff_t>(below(value.size())));
            if (below(12) == 0) {
                value.erase(item);
            } else if (below(12) == 0 && value.is_object()) {
                value["x" + std::to_string(below(9))] = other();
            } else {
                tree(*item);
            }
            return;
        }
        value = other();
    }

  private:
    ordered_json other() {
        switch (below(12)) {
            case 0: return nullptr;
            case 1: return below(2) == 0;
            case 2: return -1;
            case 3: return 0;
            case 4: return 1u << below(31);
            case 5: return std::numeric_limits<std::uint64_t>::max();
            case 6: return 0.5;
            case 7: return 1e300;
            case 8: return "";
            case 9: return std::string(1 + below(600), 'y') + "\n";
            case 10: return ordered_json::array();
            default: return ordered_json::object();
        }
    }

    std::mt19937_64 random_;
};

TEST(Manifest, MutationsAreReadOrRefused) {
    const char *number = std::getenv("RXDEPLOY_MUTATIONS");
    const int count = number ? std::atoi(number) : 100000;
    const ordered_json whole = manifest_of(MODEL_FILE);
    const std::string text = sealed(whole);
    int taken = 0, refused = 0;
    for (int i = 0; i < count; ++i) {
        Mutator mutator(static_cast<std::uint64_t>(i));
        std::string input;
        if (i % 2) {
            // The digest is made to hold again: what is behind it is reached.
            ordered_json changed = whole;
            for (std::size_t times = 1 + mutator.below(3); times; --times) mutator.tree(changed);
            input = changed.is_object() ? sealed(changed) : changed.dump();
        } else {
            input = mutator.bytes(text);
        }
        const rxdeploy_status status = rxdeploy_check_manifest(input.data(), input.size());
        if (status == RXDEPLOY_OK) {
            ++taken;
            continue;
        }
        ++refused;
        const std::string message = rxdeploy_last_error();
        ASSERT_EQ(status, RXDEPLOY_INPUT_ERROR) << i << ": " << message;
        // One error: one sentence, of one line.
        ASSERT_EQ(message.rfind("manifest: ", 0), 0u) << i << ": " << message;
        ASSERT_EQ(message.find('\n'), std::string::npos) << i << ": " << message;
    }
    RecordProperty("taken", taken);
    RecordProperty("refused", refused);
    std::printf("%d mutations: %d taken, %d refused\n", count, taken, refused);
    EXPECT_EQ(taken + refused, count);
    EXPECT_GT(taken, count / 100);  // some change what need not be right
    EXPECT_GT(refused, count / 2);
}

}  // namespace
}  // namespace rx
