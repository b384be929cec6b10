// The method is that of Pillow's Resample.c (convolution in two passes, across and then down, with 8 bits kept between
// them; weights in fixed point) and, for "nearest", of its Geometry.c. Pillow's results are what models were evaluated
// with, so its roundings are part of it.
#include "resample.h"

#include <algorithm>
#include <cmath>

namespace rx {
namespace {

constexpr int PRECISION = 32 - 8 - 2;  // bits after the point of a weight

double bilinear(double x) {
    x = std::fabs(x);
    return x < 1 ? 1 - x : 0;
}

// Keys' cubic convolution with a = -0.5.
double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

double sinc(double x) {
    if (x == 0) return 1;
    x *= M_PI;
    return std::sin(x) / x;
}

double lanczos(double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

struct Filter {
    double (*weight)(double);
    double support;
};

Filter filter_of(rxdeploy_interpolation interpolation) {
    switch (interpolation) {
        case RXDEPLOY_BILINEAR: return {bilinear, 1};
        case RXDEPLOY_LANCZOS: return {lanczos, 3};
        default: return {bicubic, 2};
    }
}

// Which pixels make one of the result, and with what weights.
struct Tap {
    std::size_t first, count;
    const std::int32_t *weights;
};

// The taps of the pixels `begin` to `end` of a side that goes from `in` to `out` pixels.
class Taps {
  public:
    Taps(std::size_t in, std::size_t out, std::size_t begin, std::size_t end, Filter filter) {
        // Pillow takes the box as float32, exact up to 2^24 pixels; no image here has a side that long.
        const double scale = static_cast<double>(in) / static_cast<double>(out), widened = std::max(scale, 1.0);
        const double support = filter.support * widened, inverse = 1.0 / widened;
        const auto size = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
        weights_.resize((end - begin) * size);
        std::vector<double> exact(size);
        for (std::size_t i = begin; i < end; ++i) {
            const double centre = 0.0 + (static_cast<double>(i) + 0.5) * scale;
            const auto first = std::max(static_cast<std::int64_t>(centre - support + 0.5), std::int64_t(0));
            const auto end_of_side = static_cast<std::int64_t>(in);
            const auto last = std::min(static_cast<std::int64_t>(centre + support + 0.5), end_of_side);
            const auto count = static_cast<std::size_t>(last - first);
            double sum = 0;
            for (std::size_t k = 0; k < count; ++k) {
                exact[k] = filter.weight((static_cast<double>(static_cast<std::int64_t>(k) + first) - centre + 0.5) *
                                         inverse);
                sum += exact[k];
            }
            std::int32_t *weights = &weights_[(i - begin) * size];
            for (std::size_t k = 0; k < count; ++k) {
                const double weight = (sum != 0 ? exact[k] / sum : exact[k]) * (1 << PRECISION);
                weights[k] = static_cast<std::int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
            }
            taps_.push_back({static_cast<std::size_t>(first), count, weights});
        }
    }

    const Tap &operator[](std::size_t i) const { return taps_[i]; }
    std::size_t first() const { return taps_.front().first; }
    std::size_t last() const { return taps_.back().first + taps_.back().count; }

  private:
    std::vector<std::int32_t> weights_;
    std::vector<Tap> taps_;
};

std::uint8_t clipped(std::int32_t value) {
    return static_cast<std::uint8_t>(std::clamp(value >> PRECISION, 0, 255));
}

constexpr std::int32_t HALF = 1 << (PRECISION - 1);

// One row, `taps` of its pixels.
void across(const std::uint8_t *row, const Taps &taps, std::size_t width, std::uint8_t *out) {
    for (std::size_t x = 0; x < width; ++x) {
        const Tap &tap = taps[x];
        const std::uint8_t *in = row + 3 * tap.first;
        std::int32_t red = HALF, green = HALF, blue = HALF;
        for (std::size_t k = 0; k < tap.count; ++k, in += 3) {
            const std::int32_t weight = tap.weights[k];
            red += in[0] * weight;
            green += in[1] * weight;
            blue += in[2] * weight;
        }
        out[3 * x] = clipped(red);
        out[3 * x + 1] = clipped(green);
        out[3 * x + 2] = clipped(blue);
    }
}

// One row of the result out of `tap.count` rows of `samples` bytes.
void down(const std::uint8_t *rows, const Tap &tap, std::size_t samples, std::int32_t *sums, std::uint8_t *out) {
    std::fill_n(sums, samples, HALF);
    for (std::size_t k = 0; k < tap.count; ++k) {
        const std::uint8_t *row = rows + k * samples;
        const std::int32_t weight = tap.weights[k];
        for (std::size_t i = 0; i < samples; ++i) sums[i] += row[i] * weight;
    }
    for (std::size_t i = 0; i < samples; ++i) out[i] = clipped(sums[i]);
}

Rgb crop(const Rgb &image, Box box) {
    Rgb result{box.width, box.height, std::vector<std::uint8_t>(box.width * box.height * 3)};
    for (std::size_t y = 0; y < box.height; ++y)
        std::copy_n(&image.pixels[((box.top + y) * image.width + box.left) * 3], box.width * 3,
                    &result.pixels[y * box.width * 3]);
    return result;
}

// For each pixel from `begin` to `end` of the result, the one it is taken from. Pillow adds up the positions, and so
// does this: a product would round otherwise.
std::vector<std::size_t> nearest(std::size_t in, std::size_t out, std::size_t begin, std::size_t end) {
    const double scale = static_cast<double>(in) / static_cast<double>(out);
    std::vector<std::size_t> from;
    double position = scale * 0.5;
    for (std::size_t i = 0; i < end; ++i, position += scale)
        if (i >= begin) from.push_back(std::min(static_cast<std::size_t>(position), in - 1));
    return from;
}

Rgb resize_nearest(const Rgb &image, std::size_t width, std::size_t height, Box box) {
    const auto xs = nearest(image.width, width, box.left, box.left + box.width);
    const auto ys = nearest(image.height, height, box.top, box.top + box.height);
    Rgb result{box.width, box.height, {}};
    result.pixels.reserve(box.width * box.height * 3);
    for (const std::size_t y : ys)
        for (const std::size_t x : xs) {
            const std::uint8_t *pixel = &image.pixels[(y * image.width + x) * 3];
            result.pixels.insert(result.pixels.end(), pixel, pixel + 3);
        }
    return result;
}

// The rows `top` to `bottom`, across.
Rgb pass_across(const Rgb &image, const Taps &taps, std::size_t width, std::size_t top, std::size_t bottom) {
    Rgb result{width, bottom - top, std::vector<std::uint8_t>(width * 3 * (bottom - top))};
    for (std::size_t y = top; y < bottom; ++y)
        across(&image.pixels[y * image.width * 3], taps, width, &result.pixels[(y - top) * width * 3]);
    return result;
}

// `first` is the row of the whole image that `image` begins with.
Rgb pass_down(const Rgb &image, const Taps &taps, std::size_t height, std::size_t first) {
    const std::size_t samples = image.width * 3;
    Rgb result{image.width, height, std::vector<std::uint8_t>(samples * height)};
    std::vector<std::int32_t> sums(samples);
    for (std::size_t y = 0; y < height; ++y)
        down(&image.pixels[(taps[y].first - first) * samples], taps[y], samples, sums.data(),
             &result.pixels[y * samples]);
    return result;
}

}  // namespace

Rgb resize(const Rgb &image, std::size_t width, std::size_t height, rxdeploy_interpolation interpolation,
           bool down_first, Box box) {
    const bool same_width = width == image.width, same_height = height == image.height;
    if (same_width && same_height) return crop(image, box);
    if (interpolation == RXDEPLOY_NEAREST) return resize_nearest(image, width, height, box);
    const Filter filter = filter_of(interpolation);
    const std::size_t right = box.left + box.width, bottom = box.top + box.height;
    // A side that keeps its length is not touched.
    if (same_width) {
        const Taps taps(image.height, height, box.top, bottom, filter);
        return pass_down(crop(image, {box.left, taps.first(), box.width, taps.last() - taps.first()}), taps, box.height,
                         taps.first());
    }
    const Taps horizontal(image.width, width, box.left, right, filter);
    if (same_height) return pass_across(image, horizontal, box.width, box.top, bottom);
    const Taps vertical(image.height, height, box.top, bottom, filter);
    if (down_first)
        return pass_across(pass_down(image, vertical, box.height, 0), horizontal, box.width, 0, box.height);
    return pass_down(pass_across(image, horizontal, box.width, vertical.first(), vertical.last()), vertical, box.height,
                     vertical.first());
}

}  // namespace rx
