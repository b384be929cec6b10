#include "preprocess.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "error.h"
#include "resample.h"

namespace rx {
namespace {

constexpr std::size_t MAX_PIXELS = 178'956'970;  // as the Python runtime, which has it from Pillow

std::string grouped(std::size_t number) {
    std::string text = std::to_string(number);
    for (std::size_t i = text.size(); i > 3; i -= 3) text.insert(i - 3, ",");
    return text;
}

std::string by(std::size_t width, std::size_t height) {
    return std::to_string(width) + " x " + std::to_string(height);
}

std::size_t channels_of(rxdeploy_pixels pixels) {
    switch (pixels) {
        case RXDEPLOY_RGB:
        case RXDEPLOY_BGR: return 3;
        case RXDEPLOY_RGBA:
        case RXDEPLOY_BGRA: return 4;
        case RXDEPLOY_GREY: return 1;
    }
    input_error("frame: pixels is " + std::to_string(static_cast<int>(pixels)) + ", which is no rxdeploy_pixels");
}

// x / 255, rounded, for x up to 255 * 255 * 128: exact there, as Pillow's shifts are.
std::uint32_t over_255(std::uint32_t x) { return ((x >> 8) + x) >> 8; }

// One sample of a pixel with this alpha, on white, as Pillow's alpha_composite has it: weights of 7 more bits.
std::uint8_t on_white(std::uint32_t sample, std::uint32_t alpha) {
    if (alpha == 0) return 255;
    constexpr std::uint32_t BITS = 7;
    // White is opaque, so what comes out is: its alpha times 255.
    const std::uint32_t opaque = alpha * 255 + 255 * (255 - alpha);
    const std::uint32_t weight = alpha * 255 * 255 * (1u << BITS) / opaque;
    const std::uint32_t rest = 255 * (1u << BITS) - weight;
    return static_cast<std::uint8_t>(over_255(sample * weight + 255 * rest + (0x80u << BITS)) >> BITS);
}

Rgb to_rgb(const rxdeploy_frame &frame, std::size_t channels) {
    Rgb image{frame.width, frame.height, std::vector<std::uint8_t>(frame.width * frame.height * 3)};
    const auto packed = static_cast<std::ptrdiff_t>(frame.width * channels);
    const std::ptrdiff_t stride = frame.stride ? frame.stride : packed;
    const bool turned = frame.pixels == RXDEPLOY_BGR || frame.pixels == RXDEPLOY_BGRA;
    const std::size_t red = channels == 1 ? 0 : turned ? 2 : 0, green = channels == 1 ? 0 : 1;
    const std::size_t blue = channels == 1 ? 0 : 2 - red;
    std::uint8_t *out = image.pixels.data();
    for (std::size_t y = 0; y < frame.height; ++y) {
        const std::uint8_t *in = frame.data + static_cast<std::ptrdiff_t>(y) * stride;
        if (frame.pixels == RXDEPLOY_RGB) {
            out = std::copy_n(in, packed, out);
            continue;
        }
        for (std::size_t x = 0; x < frame.width; ++x, in += channels, out += 3) {
            out[0] = in[red];
            out[1] = in[green];
            out[2] = in[blue];
            if (channels == 4 && in[3] != 255)
                for (int i = 0; i < 3; ++i) out[i] = on_white(out[i], in[3]);
        }
    }
    return image;
}

void check(const rxdeploy_frame &frame, std::size_t channels) {
    if (!frame.data || !frame.width || !frame.height) input_error("frame: it has no pixels");
    if (frame.width > MAX_PIXELS || frame.height > MAX_PIXELS || frame.width * frame.height > MAX_PIXELS)
        input_error("frame: " + by(frame.width, frame.height) + " pixels, more than the " + grouped(MAX_PIXELS) +
                    " allowed; scale it down first");
    const auto row = static_cast<std::ptrdiff_t>(frame.width * channels);
    if (frame.stride && frame.stride < row && frame.stride > -row)
        input_error("frame: a row has " + std::to_string(row) + " bytes, the stride is " +
                    std::to_string(frame.stride));
    // The last row lies somewhere, too.
    const auto farthest = std::numeric_limits<std::ptrdiff_t>::max() / static_cast<std::ptrdiff_t>(frame.height);
    if (frame.stride > farthest || frame.stride < -farthest)
        input_error("frame: " + std::to_string(frame.height) + " rows with a stride of " +
                    std::to_string(frame.stride) + " are more than memory holds");
}

// The longer side, of which the shorter becomes `shorter`: a whole number as timm and torchvision truncate it.
std::size_t scaled(std::size_t shorter, std::size_t longer_side, std::size_t shorter_side) {
    const double side = static_cast<double>(shorter * longer_side) / static_cast<double>(shorter_side);
    return std::max(shorter, static_cast<std::size_t>(side));
}

// Whether Pillow of that major version resizes down before across.
bool down_first(int pillow, const rxdeploy_frame &frame, std::size_t width, std::size_t height) {
    const auto shrinks = [](std::size_t from, std::size_t to) {
        return static_cast<std::int64_t>(from) - static_cast<std::int64_t>(to);
    };
    const std::int64_t lower = shrinks(frame.height, height);
    return (pillow == 0 || pillow >= 13) && lower > 0 && lower > 2 * shrinks(frame.width, width);
}

// Python's round((side - size) / 2): halves to even.
std::size_t margin(std::size_t side, std::size_t size) {
    return static_cast<std::size_t>(std::nearbyint(static_cast<double>(side - size) / 2));
}

}  // namespace

void transform(const rxdeploy_frame &frame, std::size_t image_size, double crop_pct,
               rxdeploy_interpolation interpolation, int pillow, std::uint8_t *image) {
    if (image_size < 1 || image_size > 4096)
        input_error("image_size is " + std::to_string(image_size) + "; it must be from 1 to 4096");
    if (!(crop_pct >= 0.1 && crop_pct <= 1)) input_error("crop_pct must be from 0.1 to 1");
    if (interpolation < RXDEPLOY_NEAREST || interpolation > RXDEPLOY_LANCZOS)
        input_error("interpolation is " + std::to_string(static_cast<int>(interpolation)) +
                    ", which is no rxdeploy_interpolation");
    const std::size_t channels = channels_of(frame.pixels);
    check(frame, channels);
    const auto shorter = static_cast<std::size_t>(static_cast<double>(image_size) / crop_pct);
    const bool upright = frame.width <= frame.height;
    const std::size_t width = upright ? shorter : scaled(shorter, frame.width, frame.height);
    const std::size_t height = upright ? scaled(shorter, frame.height, frame.width) : shorter;
    if (width * height > MAX_PIXELS)
        input_error("frame: " + by(frame.width, frame.height) + " pixels would be resized to " + by(width, height) +
                    ", more than the " + grouped(MAX_PIXELS) + " allowed: too long and narrow, or crop_pct too small");
    const Box centre{margin(width, image_size), margin(height, image_size), image_size, image_size};
    const Rgb result = resize(to_rgb(frame, channels), width, height, interpolation,
                              down_first(pillow, frame, width, height), centre);
    std::copy(result.pixels.begin(), result.pixels.end(), image);
}

void normalise(const std::uint8_t *images, std::size_t n, const Preprocessing &preprocessing, float *normalised) {
    const std::size_t pixels = preprocessing.image_size * preprocessing.image_size;
    float table[3][256];
    for (int channel = 0; channel < 3; ++channel) {
        const auto mean = static_cast<float>(preprocessing.mean[static_cast<std::size_t>(channel)]);
        const auto deviation = static_cast<float>(preprocessing.std[static_cast<std::size_t>(channel)]);
        for (int value = 0; value < 256; ++value)
            table[channel][value] = (static_cast<float>(value) / 255.0f - mean) / deviation;
    }
    for (std::size_t i = 0; i < n; ++i, images += pixels * 3)
        for (int channel = 0; channel < 3; ++channel)
            for (std::size_t pixel = 0; pixel < pixels; ++pixel)
                *normalised++ = table[channel][images[pixel * 3 + static_cast<std::size_t>(channel)]];
}

}  // namespace rx
