// Which way up a picture is: EXIF's tag Orientation, or else XMP's, and what undoes it. As Pillow reads them.
#pragma once

#include <string>
#include <string_view>

#include "jpeg.h"

namespace service {

// The APP1 segments of a file, given in their order.
class Orientation {
  public:
    void add(std::string_view segment);
    // 1 to 8 as EXIF 2.3 has it; another number, or 1 where none is said: leave it.
    int value() const;

  private:
    std::string exif_, xmp_;
    bool has_exif_ = false;
};

Picture upright(Picture picture, int orientation);

}  // namespace service
