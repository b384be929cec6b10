#include "jpeg.h"

#include <csetjmp>
#include <cstdio>  // jpeglib.h wants FILE
#include <string>

#include <jerror.h>
#include <jpeglib.h>

#include "orientation.h"

#ifndef LIBJPEG_TURBO_VERSION
#error "this is another libjpeg than libjpeg-turbo: it decodes to other pixels than Pillow's"
#endif

namespace service {
namespace {

constexpr int MOST_SCANS = 500;  // of a progressive file: each costs the time of a whole image, and few bytes

// libjpeg's state. Its errors come as longjmp, so the functions that call it hold nothing that is to be destroyed.
struct Decoder {
    jpeg_decompress_struct info;
    jpeg_error_mgr errors;
    jpeg_source_mgr source;
    jpeg_progress_mgr progress;
    std::jmp_buf fail;
    char message[JMSG_LENGTH_MAX];
};

void failed(j_common_ptr info) {
    auto *decoder = static_cast<Decoder *>(info->client_data);
    info->err->format_message(info, decoder->message);
    std::longjmp(decoder->fail, 1);
}

void count_scans(j_common_ptr info) {
    if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > MOST_SCANS) ERREXIT(info, JERR_BAD_PROGRESSION);
}

// All of the file is there from the start: who asks for more finds it truncated. (libjpeg's own source would make up
// the end and go on with grey; Pillow does not.)
boolean no_more(j_decompress_ptr) { return FALSE; }

void skip(j_decompress_ptr info, long bytes) {
    const auto all = info->src->bytes_in_buffer;
    const auto skipped = bytes < 0 ? 0 : static_cast<std::size_t>(bytes) < all ? static_cast<std::size_t>(bytes) : all;
    info->src->next_input_byte += skipped;
    info->src->bytes_in_buffer -= skipped;
}

class Jpeg {
  public:
    Jpeg(const std::uint8_t *data, std::size_t size) {
        decoder_.info.err = jpeg_std_error(&decoder_.errors);
        decoder_.info.client_data = &decoder_;
        decoder_.errors.error_exit = failed;
        decoder_.errors.output_message = [](j_common_ptr) {};  // warnings of bytes that are wrong: as Pillow, go on
        decoder_.source = {data, size, [](j_decompress_ptr) {}, no_more, skip, jpeg_resync_to_restart,
                           [](j_decompress_ptr) {}};
        decoder_.progress.progress_monitor = count_scans;
        created_ = create();
    }
    ~Jpeg() {
        if (created_) jpeg_destroy_decompress(&decoder_.info);
    }
    Jpeg(const Jpeg &) = delete;

    // Up to the first scan; the APP1 segments are kept. BadImage.
    void read_header() {
        if (!created_ || !try_header()) throw bad();
    }
    void read_pixels(std::uint8_t *pixels, std::size_t row, std::uint8_t *cmyk) {
        if (!try_pixels(pixels, row, cmyk)) throw bad();
    }
    const jpeg_decompress_struct &info() const { return decoder_.info; }
    void set_output(J_COLOR_SPACE space) { decoder_.info.out_color_space = space; }

  private:
    BadImage bad() const { return BadImage(std::string("the JPEG cannot be decoded: ") + decoder_.message); }

    bool create() {
        if (setjmp(decoder_.fail)) return false;
        jpeg_create_decompress(&decoder_.info);
        decoder_.info.src = &decoder_.source;
        decoder_.info.progress = &decoder_.progress;
        return true;
    }

    bool try_header() {
        if (setjmp(decoder_.fail)) return false;
        jpeg_save_markers(&decoder_.info, JPEG_APP0 + 1, 0xFFFF);
        return jpeg_read_header(&decoder_.info, TRUE) == JPEG_HEADER_OK || truncated();
    }

    bool try_pixels(std::uint8_t *pixels, std::size_t row, std::uint8_t *cmyk) {
        if (setjmp(decoder_.fail)) return false;
        if (!jpeg_start_decompress(&decoder_.info)) return truncated();
        while (decoder_.info.output_scanline < decoder_.info.output_height) {
            std::uint8_t *to = pixels + decoder_.info.output_scanline * row;
            JSAMPROW line = cmyk ? cmyk : to;
            if (jpeg_read_scanlines(&decoder_.info, &line, 1) != 1) return truncated();
            if (cmyk) to_rgb(cmyk, to);
        }
        jpeg_finish_decompress(&decoder_.info);  // all lines are there: what may be missing is the end marker
        return true;
    }

    // Inverted CMYK, as Adobe's programs write it and Pillow takes all of it to be, with Pillow's rounding.
    void to_rgb(const std::uint8_t *cmyk, std::uint8_t *rgb) const {
        for (std::size_t x = 0; x < decoder_.info.output_width; ++x, cmyk += 4)
            for (int c = 0; c < 3; ++c) {
                const int product = (255 - cmyk[c]) * cmyk[3] + 128;
                *rgb++ = static_cast<std::uint8_t>(cmyk[3] - (((product >> 8) + product) >> 8));
            }
    }

    bool truncated() {
        std::snprintf(decoder_.message, sizeof decoder_.message, "the file ends too early");
        return false;
    }

    Decoder decoder_{};
    bool created_ = false;
};

int orientation_of(const jpeg_decompress_struct &info) {
    Orientation found;
    for (jpeg_saved_marker_ptr marker = info.marker_list; marker; marker = marker->next)
        found.add({reinterpret_cast<const char *>(marker->data), marker->data_length});
    return found.value();
}

}  // namespace

Picture decode_jpeg(const std::uint8_t *data, std::size_t size, std::size_t max_pixels) {
    Jpeg jpeg(data, size);
    jpeg.read_header();
    const std::size_t width = jpeg.info().image_width, height = jpeg.info().image_height;
    if (width * height > max_pixels)
        throw BadImage("the JPEG has " + std::to_string(width) + " x " + std::to_string(height) +
                       " pixels, more than the " + std::to_string(max_pixels) + " allowed; scale it down first");
    const int components = jpeg.info().num_components;
    if (components != 1 && components != 3 && components != 4)
        throw BadImage("the JPEG has " + std::to_string(components) + " channels; expected 1, 3 or 4");
    const int orientation = orientation_of(jpeg.info());  // the segments go when the file is done
    jpeg.set_output(components == 1 ? JCS_GRAYSCALE : components == 3 ? JCS_RGB : JCS_CMYK);
    const std::size_t bytes = components == 1 ? 1 : 3;
    std::vector<std::uint8_t> pixels(width * height * bytes), cmyk(components == 4 ? width * 4 : 0);
    jpeg.read_pixels(pixels.data(), width * bytes, cmyk.empty() ? nullptr : cmyk.data());
    const rxdeploy_pixels layout = bytes == 1 ? RXDEPLOY_GREY : RXDEPLOY_RGB;
    return upright({width, height, layout, std::move(pixels)}, orientation);
}

}  // namespace service
