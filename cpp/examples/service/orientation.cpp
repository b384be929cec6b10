#include "orientation.h"

#include <cstring>
#include <optional>

namespace service {
namespace {

constexpr std::string_view EXIF{"Exif\0\0", 6}, XMP{"http://ns.adobe.com/xap/1.0/\0", 29};
constexpr unsigned ORIENTATION = 0x0112, SHORT = 3, LONG = 4;  // TIFF 6.0: the tag, types of its value

// TIFF's numbers, in its byte order. Beyond the end: nothing.
class Tiff {
  public:
    explicit Tiff(std::string_view data) : data_(data), big_(data.substr(0, 2) == "MM") {}

    // A file of TIFF: byte order and the number 42.
    bool holds() const {
        const std::string_view order = data_.substr(0, 2), magic = data_.substr(2, 2);
        return (order == "II" || big_) && (magic == std::string_view{"*\0", 2} || magic == std::string_view{"\0*", 2});
    }

    std::optional<std::size_t> number(std::size_t at, std::size_t bytes) const {
        if (at > data_.size() || data_.size() - at < bytes) return std::nullopt;
        std::size_t value = 0;
        for (std::size_t i = 0; i < bytes; ++i)
            value = value << 8 | static_cast<unsigned char>(data_[at + (big_ ? i : bytes - 1 - i)]);
        return value;
    }

    // Of the first directory; of two entries the last counts.
    std::optional<int> orientation() const {
        const auto directory = number(4, 4);
        const auto entries = directory ? number(*directory, 2) : std::nullopt;
        std::optional<int> found;
        for (std::size_t i = 0; entries && i < *entries; ++i) {
            const std::size_t at = *directory + 2 + 12 * i;
            const auto type = number(at + 2, 2);
            if (!number(at, 12)) break;
            if (number(at, 2) != ORIENTATION || (type != SHORT && type != LONG) || number(at + 4, 4) != 1) continue;
            found = static_cast<int>(*number(at + 8, type == SHORT ? 2 : 4));
        }
        return found;
    }

  private:
    std::string_view data_;
    bool big_;
};

// `tiff:Orientation="6"` or `<tiff:Orientation>6<`.
std::optional<int> in_xmp(std::string_view text) {
    constexpr std::string_view name = "tiff:Orientation";
    for (std::size_t at = text.find(name); at != text.npos; at = text.find(name, at + 1)) {
        std::string_view rest = text.substr(at + name.size());
        const std::size_t opening = rest.substr(0, 2) == "=\"" ? 2 : rest.substr(0, 1) == ">" ? 1 : 0;
        if (!opening || rest.size() <= opening) continue;
        if (rest[opening] >= '0' && rest[opening] <= '9') return rest[opening] - '0';
    }
    return std::nullopt;
}

}  // namespace

void Orientation::add(std::string_view segment) {
    if (segment.substr(0, EXIF.size()) == EXIF) {
        has_exif_ = true;
        exif_ += segment.substr(EXIF.size());
    } else if (segment.substr(0, XMP.size()) == XMP) {
        xmp_ = segment.substr(XMP.size());
    }
}

int Orientation::value() const {
    if (has_exif_) {
        const Tiff tiff(exif_);
        if (!exif_.empty() && !tiff.holds()) return 1;  // unreadable EXIF says nothing, and XMP is not asked then
        if (const auto found = tiff.orientation()) return *found;
    }
    return in_xmp(xmp_).value_or(1);
}

Picture upright(Picture picture, int orientation) {
    if (orientation < 2 || orientation > 8) return picture;
    const bool swapped = orientation >= 5;  // rows become columns
    const bool right_to_left = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    const bool bottom_up = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    const std::size_t bytes = picture.layout == RXDEPLOY_GREY ? 1 : 3;
    Picture turned{swapped ? picture.height : picture.width, swapped ? picture.width : picture.height, picture.layout,
                   std::vector<std::uint8_t>(picture.pixels.size())};
    std::uint8_t *to = turned.pixels.data();
    for (std::size_t row = 0; row < turned.height; ++row)
        for (std::size_t column = 0; column < turned.width; ++column, to += bytes) {
            std::size_t x = swapped ? row : column, y = swapped ? column : row;
            if (right_to_left) x = picture.width - 1 - x;
            if (bottom_up) y = picture.height - 1 - y;
            std::memcpy(to, picture.pixels.data() + (y * picture.width + x) * bytes, bytes);
        }
    return turned;
}

}  // namespace service
