// classify BUNDLE IMAGE.ppm: the five most probable classes of a binary PPM image, which most tools can write:
//     magick cat.jpg cat.ppm && classify gluon_resnext50_32x4d-fp16 cat.ppm
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

#include "rxdeploy.hpp"

int main(int count, char **arguments) try {
    if (count != 3) return std::fprintf(stderr, "usage: %s BUNDLE IMAGE.ppm\n", arguments[0]), 2;
    std::ifstream file(arguments[2], std::ios::binary);
    std::string magic;
    std::size_t width = 0, height = 0, most = 0;
    file >> magic >> width >> height >> most;
    if (magic != "P6" || most != 255 || width > 20000 || height > 20000)
        return std::fprintf(stderr, "%s is no 8-bit binary PPM image\n", arguments[2]), 2;
    std::vector<char> pixels(width * height * 3);
    if (!file.ignore(1).read(pixels.data(), static_cast<std::streamsize>(pixels.size())))
        return std::fprintf(stderr, "%s ends too early\n", arguments[2]), 2;

    rxdeploy::Session session(arguments[1]);
    const rxdeploy::Frame frame{reinterpret_cast<const std::uint8_t *>(pixels.data()), width, height, 0, RXDEPLOY_RGB};
    const std::vector<float> logits = session.run(session.preprocess(frame));
    for (const rxdeploy::Prediction &p : session.top(logits, 5))
        std::printf("%6.2f %%  %s\n", 100 * p.probability, session.label(p.index).c_str());
} catch (const std::exception &error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
}
