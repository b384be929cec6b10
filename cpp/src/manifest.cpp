#include "manifest.h"

#include <cstdio>
#include <initializer_list>
#include <limits>
#include <optional>

#include "digest.h"
#include "document.h"
#include "error.h"

namespace rx {
namespace {

using nlohmann::json;

const std::string UNSEALED(64, '0');

Tensor read_tensor(const Part &part) {
    Tensor tensor{part["name"].text(), part["dtype"].text(), part["layout"].text(), {}};
    for (const Part &side : part["shape"].array())
        tensor.shape.push_back(side.is_null() ? std::nullopt
                                              : std::optional(side.integer(std::numeric_limits<std::int64_t>::min(),
                                                                           std::numeric_limits<std::int64_t>::max(),
                                                                           "int | null")));
    if (part.has("batch") && !part["batch"].is_null())
        for (const Part &end : part["batch"].array_of(2, "array | null")) end.integer();
    return tensor;
}

std::array<double, 3> read_rgb(const Part &part) {
    const std::vector<Part> parts = part.array_of(3);
    return {parts[0].number(), parts[1].number(), parts[2].number()};
}

Preprocessing read_preprocessing(const Part &part) {
    part.only({"image_size", "crop_pct", "interpolation", "mean", "std"});
    Preprocessing result{};
    result.image_size = static_cast<std::size_t>(part["image_size"].integer(32, 4096));
    result.crop_pct = part["crop_pct"].number(0.1, 1, "0.1", "1.0");
    const std::string how = part["interpolation"].one_of({"bicubic", "bilinear", "nearest", "lanczos"});
    result.interpolation = how == "bicubic"    ? RXDEPLOY_BICUBIC
                           : how == "bilinear" ? RXDEPLOY_BILINEAR
                           : how == "nearest"  ? RXDEPLOY_NEAREST
                                               : RXDEPLOY_LANCZOS;
    result.mean = read_rgb(part["mean"]);
    result.std = read_rgb(part["std"]);
    for (const double value : result.mean)
        if (!(value >= 0 && value <= 1)) part.damaged("`mean` must lie in 0..1 (of RGB values scaled to 0..1)");
    for (const double value : result.std)
        if (!(value > 0 && value <= 10)) part.damaged("`std` must be above 0 (of RGB values scaled to 0..1)");
    return result;
}

void check_texts(const Part &array) {
    for (const Part &text : array.array()) text.text();
}

// What `card` repeats of the model card; only its FLOPs are used here.
std::optional<std::uint64_t> read_card(const Part &card) {
    constexpr auto MOST = std::numeric_limits<std::int64_t>::max();
    for (const char *key : {"sha256", "description"}) card[key].text();
    const Part figures = card["figures"];
    figures.only({"parameters", "flops"});
    std::optional<std::uint64_t> flops;
    for (const char *key : {"parameters", "flops"})
        if (figures.has(key) && !figures[key].is_null()) {
            const std::int64_t value = figures[key].integer(1, MOST, "int | null");
            if (key == std::string_view("flops")) flops = static_cast<std::uint64_t>(value);
        }
    if (const Part accuracy = card["accuracy"]; !accuracy.is_null()) {
        accuracy.object("object | null").only({"dataset", "top1", "top5"});
        accuracy["dataset"].text();
        const double top1 = accuracy["top1"].number(0, 100, "0.0", "100.0");
        if (accuracy.has("top5") && !accuracy["top5"].is_null() &&
            accuracy["top5"].number(0, 100, "0.0", "100.0") < top1)
            accuracy.damaged("top5 is below top1");
    }
    const Part source = card["source"];
    source.only({"collection", "paper", "paper_url", "code", "training_data"});
    for (const char *key : {"collection", "paper", "paper_url", "code"})
        if (source.has(key)) source[key].text_or_null();
    if (source.has("training_data")) check_texts(source["training_data"]);
    return flops;
}

void check_weights(const Part &weights) {
    weights["kind"].one_of({"published", "file", "synthetic"});
    weights["source"].text();
    weights["sha256"].text_or_null();
    if (weights.has("licence")) weights["licence"].text_or_null();
}

// True where the key is there and true, as Python's truth of a dictionary's entry.
bool flag(const Part &part, const char *key) { return part.has(key) && !part[key].is_null() && part[key].boolean(); }

std::optional<PlanFacts> read_plan(const Part &engine) {
    if (engine.is_null()) return std::nullopt;
    engine.object("object | null");
    return PlanFacts{engine.has("version") ? engine["version"].text() : "", flag(engine, "version_compatible"),
                     flag(engine, "hardware_compatible"), flag(engine, "strip_plan")};
}

// What tuning found for ONNX Runtime; plain settings where it found something for another engine, or nothing.
CpuSettings read_cpu(const Part &top) {
    CpuSettings settings;
    if (!top.has("tuning") || top["tuning"].is_null()) return settings;
    const Part all = top["tuning"];
    all.object("object | null");
    if (!all.has("cpu") || all["cpu"].is_null()) return settings;
    const Part cpu = all["cpu"];
    cpu.object("object | null");
    if (cpu.has("engine") && cpu["engine"].one_of({"onnxruntime", "openvino"}) != "onnxruntime") return settings;
    const auto read = [&](const char *key, bool &to) {
        if (cpu.has(key)) to = cpu[key].boolean();
    };
    if (cpu.has("threads")) settings.threads = static_cast<int>(cpu["threads"].integer(0, 4096));
    if (cpu.has("sessions")) settings.sessions = static_cast<std::size_t>(cpu["sessions"].integer(1, 4096));
    read("spinning", settings.spinning);
    read("arena", settings.arena);
    read("denormals_as_zero", settings.denormals_as_zero);
    if (all.has("cores") && !all["cores"].is_null())
        settings.cores = all["cores"].integer(0, std::numeric_limits<std::int64_t>::max(), "int | null");
    return settings;
}

// One argument as a shell takes it.
std::string quoted(const std::string &argument) {
    const auto plain = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               std::string_view("@%+=:,./_-").find(c) != std::string_view::npos;
    };
    bool all = !argument.empty();
    for (const char c : argument) all = all && plain(c);
    if (all) return argument;
    std::string result = "'";
    for (const char c : argument) result += c == '\'' ? std::string("'\"'\"'") : std::string(1, c);
    return result + "'";
}

std::string read_command(const Part &command) {
    std::string line;
    for (const Part &part : command.array()) line += (line.empty() ? "" : " ") + quoted(part.text());
    return printable(line);
}

std::map<std::string, FileDigest> read_files(const Part &files) {
    std::map<std::string, FileDigest> result;
    for (const auto &[name, file] : files.items()) {
        file.only({"sha256", "bytes"});
        result[name] = FileDigest{file["sha256"].text(), file["bytes"].integer()};
    }
    return result;
}

// What the runtime rests on: one input of the image's size, one output of the classes.
void check_tensors(const Manifest &m, const Part &top) {
    const auto size = static_cast<std::int64_t>(m.preprocessing.image_size);
    const auto is = [](const Tensor &tensor, const char *dtype, std::vector<std::int64_t> sides) {
        bool same = tensor.dtype == dtype && tensor.shape.size() == sides.size() + 1 && !tensor.shape[0];
        for (std::size_t i = 0; same && i < sides.size(); ++i) same = tensor.shape[i + 1] == sides[i];
        return same;
    };
    const bool input = m.normalisation_in_graph ? is(m.input, "uint8", {size, size, 3})
                                                : is(m.input, "float32", {3, size, size});
    if (!input) top["inputs"].damaged("The input is not the images that `preprocessing` makes");
    if (!is(m.output, "float32", {static_cast<std::int64_t>(m.num_classes)}))
        top["outputs"].damaged("The output is not float32 of `num_classes`");
}

Manifest read(const Part &top, std::string &digest) {
    Manifest m{};
    digest = top.object().has("digest") ? top["digest"].text() : UNSEALED;
    m.model = printable(top["model"].text());
    m.precision = top["precision"].one_of({"fp32", "fp16", "int8"});
    const Part target = top["target"];
    m.target = target["name"].one_of({"tensorrt", "tensorrt-rtx", "onnxruntime"});
    target["version"].text_or_null();
    target["reason"].text();
    m.gpu = target["gpu"].text_or_null();
    check_weights(top["weights"]);
    m.card_flops = read_card(top["card"]);
    top["counts"]["parameters"].integer();
    m.multiply_adds = static_cast<std::uint64_t>(top["counts"]["multiply_adds"].integer(0));
    m.preprocessing = read_preprocessing(top["preprocessing"]);
    m.normalisation_in_graph = top["normalisation_in_graph"].boolean();
    m.num_classes = static_cast<std::size_t>(top["num_classes"].integer(1, 1'000'000));
    for (const char *key : {"inputs", "outputs"}) {
        const std::vector<Part> parts = top[key].array();
        if (parts.size() != 1) top[key].damaged("Expected `array` of length 1, got " + std::to_string(parts.size()));
        (key == std::string_view("inputs") ? m.input : m.output) = read_tensor(parts[0]);
    }
    top["validation"].object();
    const bool quantised = top.has("quantisation") && !top["quantisation"].is_null();
    m.for_integers = true;
    if (quantised) {
        const Part how = top["quantisation"].object("object | null");
        m.for_integers = how.has("scheme") && !how["scheme"].is_null() && how["scheme"].text() == "onnxruntime";
    }
    m.plan = read_plan(top["engine"]);
    m.cpu = read_cpu(top);
    for (const auto &[tool, version] : top["tools"].items())
        if (const std::string text = version.text(); tool == "Pillow") std::sscanf(text.c_str(), "%4d", &m.pillow);
    m.command = read_command(top["command"]);
    m.files = read_files(top["files"]);
    check_tensors(m, top);
    return m;
}

// The sha256 of `data` with the first place of `digest` set to 64 zeros.
std::string seal(std::string_view data, const std::string &digest) {
    std::string unsealed(data);
    if (const std::size_t at = unsealed.find(digest); at != std::string::npos)
        unsealed.replace(at, digest.size(), UNSEALED);
    return sha256(unsealed);
}

// What to install to read a manifest of a later schema, of which nothing is known but where versions stand.
std::string newer_version(const json &manifest) {
    constexpr const char *DIGITS = "0123456789";
    constexpr const char *TAKEN = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.+!";
    std::string text;
    if (const auto tools = manifest.find("tools"); tools != manifest.end() && tools->is_object())
        if (const auto version = tools->find("rxdeploy"); version != tools->end() && version->is_string())
            text = version->get<std::string>();
    if (text.size() > 41 || text.find_first_of(DIGITS) != 0 || text.find_first_not_of(TAKEN) != std::string::npos)
        return "install a newer one";
    return "rxdeploy " + text + " wrote it: pip install 'rxdeploy>=" + text + "'";
}

}  // namespace

Manifest parse_manifest(std::string_view data, const std::string &where) {
    std::string digest;
    Manifest manifest;
    try {
        Document document;
        const json &head = document.top;
        decode(data, document.top);
        const Part top(head, "$");
        if (top.is_object() && top.has("schema") && head["schema"].is_number_integer()) {
            // A number beyond int64 is of a later schema, too.
            const bool large = head["schema"].is_number_unsigned() && head["schema"].get<std::uint64_t>() > SCHEMA;
            if (large)
                input_error(where + ": it has schema " + head["schema"].dump() + ", this rxdeploy reads up to " +
                            std::to_string(SCHEMA) + "; " + newer_version(head));
        }
        if (top["schema"].integer() != SCHEMA)
            top["schema"].damaged("Invalid enum value " + head["schema"].dump());
        manifest = read(top, digest);
    } catch (const Damaged &damage) {
        input_error(where + ": manifest.json is damaged: " + damage.reason + "; build the bundle again");
    }
    if (seal(data, digest) != digest)
        input_error(where + ": manifest.json was altered: it no longer has its own digest; build the bundle again");
    return manifest;
}

}  // namespace rx
