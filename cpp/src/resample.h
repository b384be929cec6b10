// Pillow's Image.resize for 8-bit images, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rxdeploy.h"

namespace rx {

// A rectangle of an image.
struct Box {
    std::size_t left, top, width, height;
};

// RGB pixels, row after row without padding.
struct Rgb {
    std::size_t width, height;
    std::vector<std::uint8_t> pixels;
};

// The part `box` of `image` resized to `width` x `height`; little more than that part is computed. `down_first` says
// which of the two passes comes first, which shows in the roundings.
Rgb resize(const Rgb &image, std::size_t width, std::size_t height, rxdeploy_interpolation interpolation,
           bool down_first, Box box);

}  // namespace rx
