// Preprocessing without Pillow: what can be said on paper, and the edges of memory for the sanitizers.
// (Bit for bit against Pillow: tests/cpp/test_preprocess.py.)
#include "preprocess.h"

#include <gtest/gtest.h>

#include <random>

#include "error.h"

namespace rx {
namespace {

TEST(Transform, OneColourStaysThatColour) {
    for (const auto how : {RXDEPLOY_NEAREST, RXDEPLOY_BILINEAR, RXDEPLOY_BICUBIC, RXDEPLOY_LANCZOS}) {
        std::vector<std::uint8_t> frame(37 * 53 * 3), image(64 * 64 * 3);
        for (std::size_t i = 0; i < frame.size(); ++i) frame[i] = static_cast<std::uint8_t>(10 + 100 * (i % 3));
        transform({frame.data(), 37, 53, 0, RXDEPLOY_BGR}, 64, 0.875, how, 0, image.data());
        for (std::size_t i = 0; i < image.size(); ++i) ASSERT_EQ(image[i], 10 + 100 * (2 - i % 3)) << how;
    }
}

TEST(Transform, TheCentreIsCut) {
    // 8 x 4 pixels, each of its own value, cut to 4 x 4 without a resize: columns 2 to 5.
    std::vector<std::uint8_t> frame(8 * 4), image(4 * 4 * 3);
    for (std::size_t i = 0; i < frame.size(); ++i) frame[i] = static_cast<std::uint8_t>(i);
    transform({frame.data(), 8, 4, 0, RXDEPLOY_GREY}, 4, 1, RXDEPLOY_BICUBIC, 0, image.data());
    for (std::size_t y = 0; y < 4; ++y)
        for (std::size_t x = 0; x < 4; ++x) ASSERT_EQ(image[(y * 4 + x) * 3], y * 8 + x + 2);
}

TEST(Transform, ReadsNothingBesideTheFrame) {
    // Each frame lies at the very end of its memory, where AddressSanitizer sees a step too far.
    std::mt19937 random(3);
    for (int i = 0; i < 300; ++i) {
        const std::size_t width = 1 + random() % 90, height = 1 + random() % 90, size = 32 + random() % 40;
        if (std::max(width, height) > 20 * std::min(width, height)) continue;
        const auto pixels = static_cast<rxdeploy_pixels>(random() % 5);
        const std::size_t channels = pixels == RXDEPLOY_GREY ? 1 : pixels < RXDEPLOY_RGBA ? 3 : 4;
        const std::size_t stride = width * channels + random() % 7;
        std::vector<std::uint8_t> frame((height - 1) * stride + width * channels), image(size * size * 3);
        for (auto &sample : frame) sample = static_cast<std::uint8_t>(random());
        const auto how = static_cast<rxdeploy_interpolation>(random() % 4);
        const int pillow = random() % 2 ? 12 : 13;
        const bool upwards = random() % 2;
        const auto step = static_cast<std::ptrdiff_t>(stride);
        transform({upwards ? frame.data() + (height - 1) * stride : frame.data(), width, height,
                   upwards ? -step : step, pixels},
                  size, i % 2 ? 0.875 : 1.0, how, pillow, image.data());
    }
}

TEST(Transform, RefusesWhatIsNone) {
    std::vector<std::uint8_t> frame(300), image(64 * 64 * 3);
    const auto status = [&](rxdeploy_frame given, std::size_t size, double crop, int how) {
        return rxdeploy_transform(&given, size, crop, static_cast<rxdeploy_interpolation>(how), 0, image.data());
    };
    const rxdeploy_frame good{frame.data(), 10, 10, 0, RXDEPLOY_RGB};
    EXPECT_EQ(status(good, 64, 1, 2), RXDEPLOY_OK);
    EXPECT_EQ(status(good, 0, 1, 2), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(status(good, 64, 0.01, 2), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(status(good, 64, std::numeric_limits<double>::quiet_NaN(), 2), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(status(good, 64, 1, 4), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(status({frame.data(), SIZE_MAX, SIZE_MAX, 0, RXDEPLOY_RGB}, 64, 1, 2), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(status({frame.data(), 10, 10, -29, RXDEPLOY_RGB}, 64, 1, 2), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(status({frame.data(), 10, 10, PTRDIFF_MAX / 8, RXDEPLOY_RGB}, 64, 1, 2), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(status({frame.data(), 10, 10, PTRDIFF_MIN, RXDEPLOY_RGB}, 64, 1, 2), RXDEPLOY_INPUT_ERROR);
    EXPECT_EQ(rxdeploy_transform(nullptr, 64, 1, RXDEPLOY_BICUBIC, 0, image.data()), RXDEPLOY_INPUT_ERROR);
}

TEST(Normalise, IsTheFormula) {
    Preprocessing how{};
    how.image_size = 2;
    how.mean = {0.485, 0.456, 0.406};
    how.std = {0.229, 0.224, 0.225};
    const std::vector<std::uint8_t> image{0, 1, 2, 30, 40, 50, 100, 110, 120, 253, 254, 255};
    std::vector<float> out(12);
    normalise(image.data(), 1, how, out.data());
    for (std::size_t channel = 0; channel < 3; ++channel)
        for (std::size_t pixel = 0; pixel < 4; ++pixel)
            EXPECT_NEAR(out[channel * 4 + pixel],
                        (image[pixel * 3 + channel] / 255.0 - how.mean[channel]) / how.std[channel], 2e-6);
}

}  // namespace
}  // namespace rx
