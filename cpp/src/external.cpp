#include "external.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace rx {
namespace {

constexpr std::string_view ORT_FORMAT = "ORTM";  // in the place of a flatbuffer's identifier

enum Message { NONE, MODEL, TRAINING, GRAPH, FUNCTION, NODE, ATTRIBUTE, SPARSE, TENSOR, ELSEWHERE };

// What a field of a message holds, on the way to a tensor (onnx/onnx.proto3).
Message inside(Message message, std::uint64_t field) {
    switch (message) {
        case MODEL: return field == 7 ? GRAPH : field == 20 ? TRAINING : field == 25 ? FUNCTION : NONE;
        case TRAINING: return field == 1 || field == 2 ? GRAPH : NONE;
        case GRAPH: return field == 1 ? NODE : field == 5 ? TENSOR : field == 15 ? SPARSE : NONE;
        case FUNCTION: return field == 7 ? NODE : field == 11 ? ATTRIBUTE : NONE;
        case NODE: return field == 5 ? ATTRIBUTE : NONE;
        case ATTRIBUTE:
            return field == 5 || field == 10    ? TENSOR
                   : field == 6 || field == 11  ? GRAPH
                   : field == 22 || field == 23 ? SPARSE
                                                : NONE;
        case SPARSE: return field == 1 || field == 2 ? TENSOR : NONE;
        case TENSOR: return field == 13 ? ELSEWHERE : NONE;  // external_data, which only such a tensor has
        default: return NONE;
    }
}

// protobuf's wire types (protobuf.dev, "Encoding").
enum Kind { VARINT, EIGHT_BYTES, BYTES, BEGIN_GROUP, END_GROUP, FOUR_BYTES };

struct Part {
    Message message;
    std::size_t at, end;
};

// The number at `at`, which is moved behind it; nothing where it does not end in time.
std::optional<std::uint64_t> varint(std::string_view data, std::size_t &at, std::size_t end) {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 70 && at < end; shift += 7) {
        const auto byte = static_cast<unsigned char>(data[at++]);
        if (shift < 64) value |= static_cast<std::uint64_t>(byte & 127) << shift;
        if (byte < 128) return value;
    }
    return std::nullopt;
}

}  // namespace

bool keeps_weights_elsewhere(std::string_view model) {
    if (model.size() >= 8 && model.substr(4, 4) == ORT_FORMAT) return true;
    std::vector<Part> left{{Message::MODEL, 0, model.size()}};
    while (!left.empty()) {
        auto [message, at, end] = left.back();
        left.pop_back();
        if (message == ELSEWHERE) return true;
        for (int groups = 0; at < end;) {
            const std::size_t begin = at;
            std::optional<std::uint64_t> tag = varint(model, at, end);
            if (!tag || at - begin > 5) return false;  // parsers take no longer one
            *tag &= 0xffffffff;                        // as they do: field 13 + 2**29 is field 13
            std::optional<std::uint64_t> size;
            switch (*tag & 7) {
                case VARINT:
                    if (!varint(model, at, end)) return false;
                    break;
                case BYTES:
                    size = varint(model, at, end);
                    if (!size || *size > end - at) return false;
                    // Groups are of old; ONNX has none, and parsers pass over them.
                    if (const Message held = groups ? NONE : inside(message, *tag >> 3); held != NONE)
                        left.push_back({held, at, at + static_cast<std::size_t>(*size)});
                    at += static_cast<std::size_t>(*size);
                    break;
                case BEGIN_GROUP: ++groups; break;
                case END_GROUP: --groups; break;
                case EIGHT_BYTES:
                case FOUR_BYTES: at += (*tag & 7) == EIGHT_BYTES ? 8 : 4; break;
                default: return false;
            }
        }
    }
    return false;
}

}  // namespace rx
