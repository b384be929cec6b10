// JPEG to an upright frame, pixel for pixel as Pillow decodes it: libjpeg-turbo's accurate integer DCT and its fancy
// upsampling, CMYK taken to be Adobe's, the orientation that EXIF or XMP says undone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "rxdeploy.h"

namespace service {

// What was sent is no image that can be used; one sentence.
class BadImage : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Picture {
    std::size_t width, height;
    rxdeploy_pixels layout;  // RXDEPLOY_RGB or RXDEPLOY_GREY
    std::vector<std::uint8_t> pixels;
};

// Its size is checked before anything is decoded: a small file can hold a large image. BadImage.
Picture decode_jpeg(const std::uint8_t *data, std::size_t size, std::size_t max_pixels);

}  // namespace service
