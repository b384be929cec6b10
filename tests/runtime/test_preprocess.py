"""Preprocessing against references written here: torchvision's documented rules, the EXIF specification, formulas."""

from __future__ import annotations

import io
import math
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from rxdeploy.errors import InputError
from rxdeploy.runtime.preprocess import MAX_PIXELS, normalise, open_rgb, to_rgb, transform

RNG = np.random.default_rng(20)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return RNG.integers(0, 256, shape, np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    """A picture that JPEG keeps almost as it is, and that no rotation or mirroring maps to itself."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) * 255 // (width + 2 * height)], -1).astype(
        np.uint8
    )


def decoded(path: Path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# The transform


def torchvision_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """torchvision.transforms.Resize(int): "if height > width, then image will be rescaled to
    (size * height / width, size)", with the longer side truncated to a whole number."""
    if height > width:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def torchvision_crop(array: np.ndarray, size: int) -> np.ndarray:
    """torchvision.transforms.functional.center_crop."""
    top = round((array.shape[0] - size) / 2.0)
    left = round((array.shape[1] - size) / 2.0)
    return array[top : top + size, left : left + size]


def timm_transform(array: np.ndarray, size: int, crop_pct: float) -> np.ndarray:
    """timm's transforms_imagenet_eval with crop_mode "center" and bicubic interpolation, on a PIL image."""
    height, width = array.shape[:2]
    resized = torchvision_size(width, height, math.floor(size / crop_pct))
    return torchvision_crop(np.asarray(Image.fromarray(array).resize(resized, Image.Resampling.BICUBIC)), size)


def sizes() -> list[tuple[int, int]]:
    draw = random.Random(7)
    fixed = [(1, 1), (2, 1), (1, 3), (3, 1000), (1000, 3), (31, 31), (256, 256), (255, 257), (257, 255), (500, 375)]
    some = [(draw.randint(1, 700), draw.randint(1, 700)) for _ in range(40)]
    smaller_than_the_crop = [(draw.randint(1, 60), draw.randint(1, 60)) for _ in range(15)]
    return fixed + some + smaller_than_the_crop


@pytest.mark.parametrize(
    ("image_size", "crop_pct"),
    [(224, 0.875), (64, 1.0), (288, 0.95), (33, 0.9), (32, 0.3)],
    ids=lambda value: str(value),
)
def test_transform_is_timms(image_size: int, crop_pct: float) -> None:
    for width, height in sizes():
        image = noise(width, height)
        result = transform(Image.fromarray(image), image_size, crop_pct, "bicubic")
        assert result.dtype == np.uint8
        assert result.shape == (image_size, image_size, 3)
        np.testing.assert_array_equal(
            result, timm_transform(image, image_size, crop_pct), err_msg=f"{width} x {height} pixels"
        )


@pytest.mark.parametrize("image_size", [32, 63, 64, 224, 1000])
def test_every_surplus_is_cropped_as_torchvision_does(image_size: int) -> None:
    # The coordinates themselves as the picture: what is cut off can be read from the result. No resize happens.
    for surplus in range(9):
        width, height = image_size + surplus, image_size
        columns = np.broadcast_to(np.arange(width) % 256, (height, width)).astype(np.uint8)
        image = np.stack([columns] * 3, -1)
        for turned in (image, image.transpose(1, 0, 2)):
            result = transform(Image.fromarray(np.ascontiguousarray(turned)), image_size, 1.0, "bicubic")
            np.testing.assert_array_equal(result, torchvision_crop(turned, image_size))


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """(new, old): Keys' cubic with a = -0.5, stretched by the scale when that is above 1 (antialiasing)."""
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    x = np.abs((np.arange(old) + 0.5 - centres[:, None]) / stretch)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 1200), (40, 30), (97, 89), (512, 512)])
def test_resize_is_an_antialiased_bicubic(width: int, height: int) -> None:
    image = smooth(width, height)
    image[height // 4 : height // 2, width // 4 : width // 2] ^= 255  # edges, where kernels differ
    new_width, new_height = torchvision_size(width, height, 73)
    rows = np.tensordot(bicubic_weights(height, new_height), image, (1, 0))
    values = np.tensordot(bicubic_weights(width, new_width), rows, (1, 1)).transpose(1, 0, 2)
    expected = torchvision_crop(np.clip(values, 0, 255), 64)
    actual = transform(Image.fromarray(image), 64, 64 / 73, "bicubic")
    # Pillow rounds to whole levels between its two passes and once more at the end; clipping in between
    # can add a little at sharp edges.
    assert np.abs(actual - expected).max() <= 3
    assert np.abs(actual - expected).mean() < 0.4


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolations_are_those_of_their_names(interpolation: str) -> None:
    image = Image.fromarray(noise(50, 90))
    expected = np.asarray(image.resize((64, 115), Image.Resampling[interpolation.upper()]))[26:90]
    np.testing.assert_array_equal(transform(image, 64, 1.0, interpolation), expected)


def test_one_pixel_fills_the_picture() -> None:
    image = Image.new("RGB", (1, 1), (7, 130, 255))
    assert (transform(image, 224, 0.875, "bicubic") == (7, 130, 255)).all()


@pytest.mark.parametrize("side", [3_000, 200_000])
def test_a_long_thin_image_does_not_grow_beyond_the_limit(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def resize(image: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        assert size[0] * size[1] <= MAX_PIXELS, f"{size[0]} x {size[1]} pixels from {image.size}"
        return Image.new("RGB", size)

    monkeypatch.setattr(Image.Image, "resize", resize)
    for size in ((1, side), (side, 1)):
        try:
            assert transform(Image.new("RGB", size), 224, 0.875, "bicubic").shape == (224, 224, 3)
        except InputError:  # refusing such an image is fine too
            continue


def test_normalise() -> None:
    images = noise(5, 4)[None].repeat(2, 0)
    images[1] = 255 - images[1]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result = normalise(images, mean, std)
    assert result.dtype == np.float32
    assert result.shape == (2, 3, 4, 5)
    assert result.flags.c_contiguous
    for n, y, x, c in np.ndindex(2, 4, 5, 3):
        expected = (int(images[n, y, x, c]) / 255 - mean[c]) / std[c]
        assert result[n, c, y, x] == pytest.approx(expected, abs=1e-6)


# EXIF orientation

# Exif 2.3, tag 274: where in the upright picture the stored 0th row and 0th column are.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels a camera stores so that `orientation` makes them upright."""
    row, column = ORIENTATIONS[orientation]
    height, width = upright.shape[:2]
    if row in ("top", "bottom"):
        result = np.empty_like(upright)
        for r, c in np.ndindex(height, width):
            y = r if row == "top" else height - 1 - r
            x = c if column == "left" else width - 1 - c
            result[r, c] = upright[y, x]
        return result
    result = np.empty((width, height, 3), np.uint8)
    for r, c in np.ndindex(width, height):
        x = r if row == "left" else width - 1 - r
        y = c if column == "top" else height - 1 - c
        result[r, c] = upright[y, x]
    return result


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("ending", "tolerance"), [("png", 0), ("tiff", 0), ("jpg", 6)])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str, tolerance: int) -> None:
    upright = smooth(24, 16)
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"image.{ending}"
    options = {"quality": 98, "subsampling": 0} if ending == "jpg" else {}
    Image.fromarray(stored(upright, orientation)).save(path, exif=exif, **options)
    result = decoded(path)
    assert result.shape == upright.shape
    assert np.abs(result - upright).max() <= tolerance


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_change_nothing(tmp_path: Path, orientation: int) -> None:
    upright = smooth(12, 8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(upright).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(decoded(tmp_path / "image.png"), upright)


# Modes


def grey(levels: np.ndarray) -> np.ndarray:
    return np.stack([levels] * 3, -1)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(float)[..., None] / 255
    return colour * share + 255 * (1 - share)


def check(path: Path, expected: np.ndarray, tolerance: float = 0) -> None:
    actual = decoded(path)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance


def test_rgb(tmp_path: Path) -> None:
    array = noise(9, 7)
    for ending in ("png", "bmp", "tiff", "ppm"):
        Image.fromarray(array).save(tmp_path / f"image.{ending}")
        check(tmp_path / f"image.{ending}", array)


def test_greyscale(tmp_path: Path) -> None:
    array = noise(9, 7, 1)
    Image.fromarray(array).save(tmp_path / "image.png")
    check(tmp_path / "image.png", grey(array))


def test_one_bit(tmp_path: Path) -> None:
    array = noise(9, 7, 1) > 127
    Image.fromarray(array).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        assert image.mode == "1"
    check(tmp_path / "image.png", grey(array * 255))


def test_greyscale_with_alpha(tmp_path: Path) -> None:
    array = noise(9, 7, 2)
    Image.fromarray(array, "LA").save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        assert image.mode == "LA"
    check(tmp_path / "image.png", over_white(grey(array[..., 0]), array[..., 1]), 1)


@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
def test_rgba_is_laid_on_white(tmp_path: Path, ending: str) -> None:
    if ending == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    array = noise(16, 16, 4)
    array[0, :, 3], array[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    Image.fromarray(array, "RGBA").save(tmp_path / f"image.{ending}", **options)
    check(tmp_path / f"image.{ending}", over_white(array[..., :3], array[..., 3]), 1)


def palette_image(transparency: int | bytes | None, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Saves a palette PNG; returns the indices and the palette."""
    colours, indices = RNG.integers(0, 256, (16, 3), np.uint8), RNG.integers(0, 16, (7, 9), np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    with Image.open(path) as saved:
        assert saved.mode == "P"
    return indices, colours


def test_palette(tmp_path: Path) -> None:
    indices, colours = palette_image(None, tmp_path / "image.png")
    check(tmp_path / "image.png", colours[indices])


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    indices, colours = palette_image(5, tmp_path / "image.png")
    colours[5] = 255
    check(tmp_path / "image.png", colours[indices])


def test_palette_with_alpha_for_each_colour(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, 16, np.uint8)
    indices, colours = palette_image(alpha.tobytes(), tmp_path / "image.png")
    check(tmp_path / "image.png", over_white(colours[indices], alpha[indices]), 1)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_the_colour_that_stands_for_transparent(tmp_path: Path, mode: str) -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    array[:, 3:] = 255
    image = Image.fromarray(array).convert(mode)
    image.save(tmp_path / "image.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    check(tmp_path / "image.png", np.full((4, 6, 3), 255))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [90, 40, 200, 60]])
    array = np.repeat(np.repeat(inks.reshape(2, 3, 4), 16, 0), 16, 1).astype(np.uint8)
    Image.fromarray(array, "CMYK").save(tmp_path / "image.jpg", quality=100, subsampling=0)
    with Image.open(tmp_path / "image.jpg") as image:
        assert image.mode == "CMYK"
    ink = array.astype(float) / 255
    check(tmp_path / "image.jpg", 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:]), 4)


def test_greyscale_jpeg(tmp_path: Path) -> None:
    array = smooth(32, 24)[..., 0]
    Image.fromarray(array).save(tmp_path / "image.jpg", quality=98)
    check(tmp_path / "image.jpg", grey(array), 4)


def test_16_bit_greyscale_png(tmp_path: Path) -> None:
    array = RNG.integers(0, 65536, (7, 9), np.uint16)
    array[0, :3] = 0, 65535, 32768
    Image.fromarray(array).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        assert image.mode.startswith("I")
    check(tmp_path / "image.png", grey(array / 257), 0.51)


def test_a_dark_16_bit_image_stays_dark(tmp_path: Path) -> None:
    array = np.full((4, 4), 200, np.uint16)
    Image.fromarray(array).save(tmp_path / "image.png")
    check(tmp_path / "image.png", np.full((4, 4, 3), 200 / 257), 0.51)


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    array = RNG.integers(0, 65536, (7, 9), np.uint16)
    entries = [(256, 9), (257, 7), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 7)]
    entries.append((279, array.nbytes))
    table = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in entries)
    header = b"MM\0*" + struct.pack(">IH", 8, len(entries)) + table + struct.pack(">I", 0)
    (tmp_path / "image.tiff").write_bytes(header + array.astype(">u2").tobytes())
    with Image.open(tmp_path / "image.tiff") as image:
        assert image.mode == "I;16B"
    check(tmp_path / "image.tiff", grey(array / 257), 0.51)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("top", [255, 65535])
def test_32_bit_tiff(tmp_path: Path, dtype: type, top: int) -> None:
    array = np.linspace(0, top, 63).reshape(7, 9).astype(dtype)
    Image.fromarray(array).save(tmp_path / "image.tiff")
    with Image.open(tmp_path / "image.tiff") as image:
        assert image.mode == {np.int32: "I", np.float32: "F"}[dtype]
    check(tmp_path / "image.tiff", grey(array * (255 / top)), 0.51)


def test_float_tiff_from_0_to_1(tmp_path: Path) -> None:
    array = np.linspace(0, 1, 63, dtype=np.float32).reshape(7, 9)
    Image.fromarray(array).save(tmp_path / "image.tiff")
    check(tmp_path / "image.tiff", grey(array * 255), 0.51)


def test_float_tiff_with_nan(tmp_path: Path) -> None:
    array = np.full((4, 4), 100, np.float32)
    array[0, 0] = np.nan
    Image.fromarray(array).save(tmp_path / "image.tiff")
    try:
        assert decoded(tmp_path / "image.tiff")[3, 3].tolist() == [100, 100, 100]
    except InputError:  # refusing such an image is fine too
        return


@pytest.mark.parametrize("levels", [(-70000, 300), (-5, 250)])
def test_samples_out_of_range_are_clipped(tmp_path: Path, levels: tuple[int, int]) -> None:
    Image.fromarray(np.array([levels], np.int32)).save(tmp_path / "image.tiff")
    low, high = decoded(tmp_path / "image.tiff")[0, :, 0]
    assert low == 0
    assert high == round(levels[1] * (255 / 65535 if levels[1] > 255 else 1))


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "PA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F", "1"]
)
def test_every_mode_becomes_rgb_of_the_same_size(mode: str) -> None:
    result = to_rgb(Image.new(mode, (5, 3)))
    assert (result.mode, result.size) == ("RGB", (5, 3))


def test_first_frame_of_an_animated_gif(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((250, 10, 20), (10, 250, 20), (10, 20, 250))]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "image.gif") as image:
        assert image.n_frames == 3
    check(tmp_path / "image.gif", np.broadcast_to((250, 10, 20), (4, 6, 3)))


@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "mpo"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_first_of_several_pictures(tmp_path: Path, ending: str, mode: str) -> None:
    if ending == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    pictures = [Image.fromarray(smooth(24, 16) // n).convert(mode) for n in (1, 2, 3)]
    path = tmp_path / f"image.{ending}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True, quality=98)
    with Image.open(path) as image:
        assert image.n_frames == 3
    tolerance = 16 if ending == "mpo" else 0  # its chroma is subsampled
    check(path, np.asarray(pictures[0].convert("RGB")).astype(int), tolerance)
    # The transform reads the pixels after the file was closed.
    assert transform(open_rgb(path), 32, 1.0, "bicubic").shape == (32, 32, 3)


def test_gif_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "image.gif", transparency=0)
    check(tmp_path / "image.gif", np.array([[[255, 255, 255], [40, 50, 60]]]))


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_webp(tmp_path: Path) -> None:
    array = smooth(32, 24)
    Image.fromarray(array).save(tmp_path / "lossless.webp", lossless=True)
    check(tmp_path / "lossless.webp", array)
    Image.fromarray(array).save(tmp_path / "lossy.webp", quality=95)
    check(tmp_path / "lossy.webp", array, 12)


def test_bytes_at_hand(tmp_path: Path) -> None:
    """As from a file; the path is a name only, even one that something else has."""
    array = smooth(32, 24)
    for path in (tmp_path / "none.png", tmp_path):
        np.testing.assert_array_equal(np.asarray(open_rgb(path, encoded("PNG", Image.fromarray(array)))), array)
        for data in (b"", b"text", encoded("PNG", Image.fromarray(array))[:-40]):
            with pytest.raises(InputError, match=f"^image {path}: "):
                open_rgb(path, data)


# What is no image


def refused(path: Path) -> str:
    """The text of the one error for the image at `path`."""
    with pytest.raises(InputError) as caught:
        open_rgb(path)
    text = str(caught.value)
    assert text.startswith(f"image {path}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"no image at all", b"<svg></svg>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]
)
def test_what_is_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    refused(path)


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "image.jpg")
    assert "no such file" in refused(tmp_path / "no" / "such" / "folder.jpg")


def test_directory(tmp_path: Path) -> None:
    assert "directory" in refused(tmp_path)


def test_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file" / "image.jpg")


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", denied)
    assert "Permission denied" in refused(tmp_path / "image.jpg")


def encoded(ending: str, image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, ending, **options)
    return buffer.getvalue()


CUT = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


@pytest.mark.parametrize("share", CUT)
@pytest.mark.parametrize("ending", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated(tmp_path: Path, ending: str, share: float) -> None:
    if ending == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    whole = encoded(ending, Image.fromarray(noise(64, 48)))
    path = tmp_path / f"image.{ending.lower()}"
    path.write_bytes(whole)
    open_rgb(path)
    path.write_bytes(whole[: int(len(whole) * share)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TIFF's reader, as the command line does
        refused(path)


def test_truncated_progressive_jpeg(tmp_path: Path) -> None:
    whole = encoded("JPEG", Image.fromarray(noise(64, 48)), progressive=True)
    for share in CUT:
        (tmp_path / "image.jpg").write_bytes(whole[: int(len(whole) * share)])
        refused(tmp_path / "image.jpg")


def png(width: int, height: int) -> bytes:
    """A PNG file that claims a size and carries one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(b"\0" * (3 * min(width, 1000) + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    """A JPEG file with another size in its frame header."""
    data = encoded("JPEG", Image.new("RGB", (8, 8)))
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif(width: int, height: int) -> bytes:
    data = encoded("GIF", Image.new("L", (8, 8)))
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


@pytest.mark.parametrize("make", [png, jpeg, gif])
@pytest.mark.parametrize("size", [(60000, 60000), (65535, 2731), (2731, 65535)])
@pytest.mark.parametrize("pillows_limit", [True, False])
def test_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable, size: tuple[int, int], pillows_limit: bool
) -> None:
    def load(_: object) -> None:
        pytest.fail("memory for the pixels would be taken")

    for loader in (ImageFile.ImageFile, *(type(Image.open(io.BytesIO(m(8, 8)))) for m in (png, jpeg, gif))):
        monkeypatch.setattr(loader, "load", load)
    if not pillows_limit:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs do
    (tmp_path / "image").write_bytes(make(*size))
    assert f"{MAX_PIXELS:,}" in refused(tmp_path / "image")


def test_large_but_allowed(tmp_path: Path) -> None:
    Image.new("1", (13_000, 7_000)).save(tmp_path / "image.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # above Pillow's warning limit, below ours
        assert open_rgb(tmp_path / "image.png").size == (13_000, 7_000)


@pytest.mark.parametrize("ending", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "AVIF"])
def test_damaged_files_give_an_image_or_an_input_error(tmp_path: Path, ending: str) -> None:
    if ending in ("WEBP", "AVIF") and not features.check(ending.lower()):
        pytest.skip(f"this Pillow has no {ending}")
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a description"
    options = {"exif": exif} if ending in ("JPEG", "PNG", "TIFF", "WEBP") else {}
    whole = encoded(ending, Image.fromarray(noise(31, 23)), **options)
    path, draw = tmp_path / "image", random.Random(ending)
    escaped: dict[str, str] = {}
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 4))):
            data[draw.randrange(min(len(data), draw.choice((50, 300, len(data)))))] = draw.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, as the command line does
            try:
                assert open_rgb(path).mode == "RGB"
            except InputError as error:
                assert str(path) in str(error)
            except Exception as error:
                escaped[type(error).__name__] = str(error)
    assert not escaped


def jpeg_with_exif(*entries: bytes) -> bytes:
    """A good JPEG with these entries, 12 bytes each, in its EXIF directory."""
    tiff = b"MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    app1 = b"Exif\0\0" + tiff
    data = encoded("JPEG", Image.fromarray(smooth(16, 8)))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + data[2:]


ROTATED = struct.pack(">HHIHH", 274, 3, 1, 6, 0)


def test_exif_entries_written_here_are_read(tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(jpeg_with_exif(ROTATED))
    assert open_rgb(tmp_path / "image.jpg").size == (8, 16)


def test_an_odd_exif_entry_beside_the_orientation(tmp_path: Path) -> None:
    tile_width_as_text = struct.pack(">HHI4s", 322, 2, 4, b"abc\0")
    (tmp_path / "image.jpg").write_bytes(jpeg_with_exif(tile_width_as_text, ROTATED))
    assert open_rgb(tmp_path / "image.jpg").size == (8, 16)


def test_metadata_that_cannot_be_read(tmp_path: Path) -> None:
    beyond_the_end = struct.pack(">HHII", 270, 2, 5000, 60000)
    (tmp_path / "image.jpg").write_bytes(jpeg_with_exif(beyond_the_end))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_rgb(tmp_path / "image.jpg").size == (16, 8)
