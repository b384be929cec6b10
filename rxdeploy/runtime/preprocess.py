"""Images to model input: the card's evaluation transform with Pillow.

Resize the shorter side to ``floor(image_size / crop_pct)`` with antialiasing, then cut the central square: what
timm and torchvision do on a PIL image, so accuracy here is accuracy there.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from rxdeploy.errors import InputError

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb (twice its warning limit)


def open_rgb(path: Path) -> Image.Image:
    """Decode an image file to upright 8-bit RGB.

    EXIF orientation is applied; greyscale, palette, CMYK and 16-bit images are converted; transparent
    pixels are laid on white. InputError for what is no image, is truncated, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(_too_large(path, f"{image.width} x {image.height} pixels"))
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"image {path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"image {path}: not an image in a format Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(path, str(error))) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"image {path}: cannot be decoded: {error}") from None


def _too_large(path: Path, what: str) -> str:
    return f"image {path}: {what}, more than the {MAX_PIXELS:,} allowed; scale it down first"


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB: alpha laid on white, 16-bit greyscale scaled to 8 bits."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        # convert("RGB") would clip these at 255: scale 16-bit samples, leave smaller ones as they are.
        samples = np.asarray(image, np.float64)
        top = 65535 if samples.max(initial=0) > 255 else 255
        grey = np.clip(samples * (255 / top), 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def transform(image: Image.Image, image_size: int, crop_pct: float, interpolation: str) -> NDArray[np.uint8]:
    """An RGB image to uint8 (image_size, image_size, 3): resize the shorter side, then centre crop."""
    shorter = int(image_size / crop_pct)  # floor, as timm and torchvision have it
    width, height = image.size
    if width <= height:
        size = shorter, max(shorter, int(shorter * height / width))
    else:
        size = max(shorter, int(shorter * width / height)), shorter
    if size != image.size:
        image = image.resize(size, RESAMPLING[interpolation])
    left, top = (round((side - image_size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def normalise(images: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """uint8 (n, size, size, 3) to the conventional float32 (n, 3, size, size), (x / 255 - mean) / std."""
    scaled = (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated image is an error, whatever another library set
