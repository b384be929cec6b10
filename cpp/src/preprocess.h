// Frames to model input: the card's evaluation transform, as rxdeploy/runtime/preprocess.py has it.
#pragma once

#include <cstdint>
#include <vector>

#include "manifest.h"
#include "rxdeploy.h"

namespace rx {

// Resize the shorter side to floor(image_size / crop_pct), then cut the central square: uint8 (size, size, 3).
// `pillow` is the major version of Pillow that is meant, 0 for the newest known: from 13 on it resizes down before
// across where the height shrinks by more than twice as many pixels as the width.
// Error (RXDEPLOY_INPUT_ERROR) for a frame that is none, or so long and narrow that it would have too many pixels.
void transform(const rxdeploy_frame &frame, std::size_t image_size, double crop_pct,
               rxdeploy_interpolation interpolation, int pillow, std::uint8_t *image);

// uint8 (n, size, size, 3) to float32 (n, 3, size, size), (x / 255 - mean) / std, with NumPy's roundings.
void normalise(const std::uint8_t *images, std::size_t n, const Preprocessing &preprocessing, float *normalised);

}  // namespace rx
