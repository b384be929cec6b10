"""Images to model input: the card's evaluation transform with Pillow.

Resize the shorter side to ``floor(image_size / crop_pct)`` with antialiasing, then cut the central square: what
timm and torchvision do on a PIL image, so accuracy here is accuracy there.
"""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.runtime.quiet import no_warnings

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Photographs and what tools make of them. Not every format Pillow knows: for EPS, say, it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "MPO", "JPEG2000", "AVIF")
_EXIF_ORIENTATION = 0x0112
_TURNS = {  # EXIF 2.3, tag Orientation: what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb (twice its warning limit)


def open_rgb(path: Path, data: bytes | None = None) -> Image.Image:
    """Decode an image file to upright 8-bit RGB; where its bytes are at hand as `data`, `path` is only its name.

    EXIF orientation is applied; greyscale, palette, CMYK and 16-bit images are converted; transparent
    pixels are laid on white. InputError for what is no image, is truncated, or has too many pixels.
    """
    if data is None and path.exists() and not path.is_file():
        raise InputError(f"image {path}: not a plain file")  # reading a pipe might never end
    try:
        with no_warnings(), Image.open(path if data is None else io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(_too_large(path, f"{image.width} x {image.height} pixels"))
            image.load()
            return to_rgb(_upright(image))
    except FileNotFoundError:
        raise InputError(f"image {path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"image {path}: not an image in a format rxdeploy reads ({', '.join(_formats())})") from None
    except Image.DecompressionBombError as error:
        counted = re.search(r"\d+ pixels", str(error))
        raise InputError(_too_large(path, counted[0] if counted else "too many pixels")) from None
    except InputError:
        raise
    except MemoryError:
        raise EnvironmentLacks(f"image {path}: there is not enough memory to decode it") from None
    except Exception as error:  # what Pillow's decoders raise depends on where in the file they stumble
        raise InputError(f"image {path}: cannot be decoded: {error}") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _too_large(path: Path, what: str) -> str:
    return f"image {path}: {what}, more than the {MAX_PIXELS:,} allowed; scale it down first"


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation says; unreadable EXIF says nothing."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # as above
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB: alpha laid on white, 16-bit greyscale scaled to 8 bits."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey(np.asarray(image, np.float64), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(samples: NDArray[np.float64], mode: str) -> NDArray[np.uint8]:
    """Samples of more than 8 bits to 0..255, which Pillow's own conversion would clip.

    16-bit modes say their range. 32-bit and float files do not: theirs is taken to be the smallest of 0..1
    (float), 0..255 and 0..65535 that holds the samples.
    """
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are NaN or infinite")
    largest = samples.max(initial=0)
    if mode.startswith("I;16"):
        top = 65535
    elif mode == "F" and largest <= 1:
        top = 1
    else:
        top = 65535 if largest > 255 else 255
    return np.clip(samples * (255 / top), 0, 255).round().astype(np.uint8)


def transform(image: Image.Image, image_size: int, crop_pct: float, interpolation: str) -> NDArray[np.uint8]:
    """An RGB image to uint8 (image_size, image_size, 3): resize the shorter side, then centre crop.

    InputError when an image is so long and narrow that it would have too many pixels after the resize.
    """
    shorter = int(image_size / crop_pct)  # floor, as timm and torchvision have it
    width, height = image.size
    if width <= height:
        size = shorter, max(shorter, int(shorter * height / width))
    else:
        size = max(shorter, int(shorter * width / height)), shorter
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"{width} x {height} pixels would be resized to {size[0]} x {size[1]}, more than the {MAX_PIXELS:,} "
            "allowed: too long and narrow, or crop_pct too small"
        )
    if size != image.size:
        image = image.resize(size, RESAMPLING[interpolation])
    left, top = (round((side - image_size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def normalise(images: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """uint8 (n, size, size, 3) to the conventional float32 (n, 3, size, size), (x / 255 - mean) / std."""
    scaled = (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
