"""Preprocessing in C++ against Pillow, bit for bit."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rxdeploy_c import INPUT_ERROR, Failed, Frame, Library, pointer

from rxdeploy.errors import InputError
from rxdeploy.runtime.preprocess import open_rgb, to_rgb, transform

NAMES = ("nearest", "bilinear", "bicubic", "lanczos")
BICUBIC = NAMES.index("bicubic")
RGB, BGR, RGBA, BGRA, GREY = range(5)
SIZES = 400
PHOTOS = sorted((Path(__file__).parents[2] / "rxdeploy/export/photos").glob("*.jpg"))


def expected(image: Image.Image, size: int, crop: float, how: int = BICUBIC) -> NDArray[np.uint8]:
    return transform(to_rgb(image), size, crop, NAMES[how])


def side(rng: np.random.Generator) -> int:
    """A side of an image; small ones, which are enlarged, as often as large ones."""
    return int(np.exp(rng.uniform(0, np.log(900))))


@pytest.mark.parametrize("how", range(4), ids=NAMES)
def test_random_sizes(library: Library, how: int) -> None:
    rng = np.random.default_rng(how)
    for _ in range(SIZES):
        width, height, size, crop = side(rng), side(rng), int(rng.integers(32, 260)), float(rng.uniform(0.1, 1))
        if size / crop * max(width, height) / min(width, height) > 4000:
            crop = 1.0
        if size * max(width, height) / min(width, height) > 4000:
            continue
        frame = rng.integers(0, 256, (height, width, 3), np.uint8)
        ours = library.transform(frame, RGB, size, crop, how)
        theirs = expected(Image.fromarray(frame), size, crop, how)
        assert np.array_equal(ours, theirs), (width, height, size, crop)


@pytest.mark.parametrize("how", range(4), ids=NAMES)
@pytest.mark.parametrize("size, crop", [(224, 0.875), (64, 1.0), (299, 0.9), (288, 0.95)])
def test_photographs(library: Library, how: int, size: int, crop: float) -> None:
    assert len(PHOTOS) >= 4
    for path in PHOTOS:
        image = open_rgb(path)
        ours = library.transform(np.array(image), RGB, size, crop, how)
        assert np.array_equal(ours, expected(image, size, crop, how)), path.name


@pytest.mark.parametrize("shape", [(224, 300), (300, 224), (224, 224), (256, 256), (1, 1), (1, 7), (2000, 31)])
def test_sides_that_stay(library: Library, shape: tuple[int, int]) -> None:
    """Pillow leaves out a pass where a side keeps its length."""
    frame = np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8)
    for crop in (1.0, 0.875):
        ours = library.transform(frame, RGB, 224, crop, BICUBIC)
        assert np.array_equal(ours, expected(Image.fromarray(frame), 224, crop))


@pytest.mark.parametrize("pillow", [12, 13])
def test_both_orders_of_the_passes(library: Library, pillow: int) -> None:
    """Pillow 12 resizes across first always; 13 down first where the height shrinks by more than twice as much.

    Whichever is installed: of two resizes of one side each, the caller says the order.
    """
    rng, differs = np.random.default_rng(2), 0
    for _ in range(60):
        width, height = int(rng.integers(40, 200)), int(rng.integers(100, 700))
        frame = rng.integers(0, 256, (height, width, 3), np.uint8)
        size = (64, max(64, int(64 * height / width))) if width <= height else (int(64 * width / height), 64)
        image = Image.fromarray(frame)
        across = image.resize((size[0], height), 3).resize(size, 3)
        down = image.resize((width, size[1]), 3).resize(size, 3)
        down_first = pillow == 13 and height - size[1] > max(0, 2 * (width - size[0]))
        ours = library.transform(frame, RGB, 64, 1.0, BICUBIC, pillow=pillow)
        assert np.array_equal(ours, transform(down if down_first else across, 64, 1.0, "bicubic"))
        differs += down_first
    assert differs > 10 or pillow == 12


def test_extremes(library: Library) -> None:
    """Black and white next to each other: where a filter with negative weights leaves 0..255."""
    frame = np.where(np.indices((99, 77)).sum(0) % 2, 255, 0).astype(np.uint8)
    frame[20:60, 30:50] = 255
    for how in range(4):
        ours = library.transform(frame, GREY, 224, 0.875, how)
        assert np.array_equal(ours, expected(Image.fromarray(frame), 224, 0.875, how))


def test_every_alpha(library: Library) -> None:
    """All 65536 pairs of a sample and an alpha, as Pillow lays them on white."""
    value, alpha = np.indices((256, 256), np.uint8)
    frame = np.stack([value, 255 - value, value.T.copy(), alpha], -1)
    ours = library.transform(frame, RGBA, 256, 1.0, BICUBIC)
    assert np.array_equal(ours, expected(Image.fromarray(frame, "RGBA"), 256, 1.0))


@pytest.mark.parametrize("pixels", [RGB, BGR, RGBA, BGRA, GREY])
@pytest.mark.parametrize("padding", [0, 5, 64])
def test_layouts(library: Library, pixels: int, padding: int) -> None:
    rng = np.random.default_rng(9)
    rgba = rng.integers(0, 256, (90, 120, 4), np.uint8)
    order = {RGB: [0, 1, 2], BGR: [2, 1, 0], RGBA: [0, 1, 2, 3], BGRA: [2, 1, 0, 3], GREY: [0]}[pixels]
    samples = rgba[:, :, order]
    rows = np.full((90, 120 * len(order) + padding), 77, np.uint8)
    rows[:, : 120 * len(order)] = samples.reshape(90, -1)
    image = Image.fromarray(rgba[:, :, 0] if pixels == GREY else rgba if pixels in (RGBA, BGRA) else rgba[:, :, :3])
    frame = rows.reshape(90, -1, 1)[:, :120]  # its shape says the width in pixels, its memory is `rows`
    ours = library.transform(frame, pixels, 64, 0.875, BICUBIC, stride=rows.strides[0])
    assert np.array_equal(ours, expected(image, 64, 0.875))


def test_rows_that_go_upwards(library: Library) -> None:
    frame = np.random.default_rng(3).integers(0, 256, (80, 100, 3), np.uint8)
    ours = library.transform(frame[::-1], RGB, 64, 0.875, BICUBIC)
    assert np.array_equal(ours, expected(Image.fromarray(frame[::-1]), 64, 0.875))


def test_frames_that_are_none(library: Library) -> None:
    frame = np.zeros((10, 10, 3), np.uint8)
    out = np.empty((64, 64, 3), np.uint8)
    cases = {
        "it has no pixels": Frame(None, 10, 10, 0, RGB),
        "it has no pixels ": Frame(frame.ctypes.data, 0, 10, 0, RGB),
        "more than the 178,956,970 allowed": Frame(frame.ctypes.data, 2**40, 10, 0, RGB),
        "more than the 178,956,970": Frame(frame.ctypes.data, 14000, 14000, 0, RGB),
        "a row has 30 bytes, the stride is 29": Frame(frame.ctypes.data, 10, 10, 29, RGB),
        "no rxdeploy_pixels": Frame(frame.ctypes.data, 10, 10, 0, 5),
    }
    for message, given in cases.items():
        with pytest.raises(Failed, match=message.strip()) as caught:
            library.call(
                "transform", ctypes.byref(given), ctypes.c_size_t(64), ctypes.c_double(0.875), BICUBIC, 0, pointer(out)
            )
        assert caught.value.status == INPUT_ERROR


def test_too_long_and_narrow(library: Library) -> None:
    """The same limit as the Python runtime's, in the same words."""
    frame = np.zeros((1, 5000, 3), np.uint8)
    with pytest.raises(InputError) as theirs:
        expected(Image.fromarray(frame), 224, 0.875)
    with pytest.raises(Failed) as ours:
        library.transform(frame, RGB, 224, 0.875, BICUBIC)
    assert str(ours.value) == f"frame: {theirs.value}"
