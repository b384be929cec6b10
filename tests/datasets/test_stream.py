"""Stream: against Pillow image by image; order, bounds, bad images."""

from __future__ import annotations

import gc
import hashlib
import io
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rxdeploy.cards.card import Input
from rxdeploy.datasets import Dataset, Item, Stream, from_arrays, open_dataset
from rxdeploy.datasets import stream as stream_module
from rxdeploy.errors import EnvironmentLacks, InputError

SIZE = 32
INPUT = Input(image_size=SIZE, crop_pct=0.8, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """Of the 12 x 10 images here: the shorter side, 10, to 32 / 0.8 = 40, then the middle 32 x 32."""
    image = Image.open(io.BytesIO(data)).resize((48, 40), Image.Resampling.BILINEAR)
    return np.asarray(image)[4:36, 8:40]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_batches(tree: Callable[..., Path], image: Callable[[str], bytes], workers: int, batch: int) -> None:
    dataset = open_dataset(tree(*(f"{index % 3}/{index}.png" for index in range(10))), 3)
    items = dataset.items[::-1]
    batches = list(Stream(dataset, items, batch, INPUT, workers))
    assert [len(b.images) for b in batches] == [min(batch, 10 - first) for first in range(0, 10, batch)]
    assert tuple(item for b in batches for item in b.items) == items
    for b in batches:
        assert b.images.dtype == np.uint8
        for array, item, digest in zip(b.images, b.items, b.digests, strict=True):
            data = image(item.name[2:])
            assert digest == hashlib.sha256(data).hexdigest()
            np.testing.assert_array_equal(array, by_pillow(data))


def test_two_passes(tree: Callable[..., Path]) -> None:
    root = tree("a/1.png", "a/2.png", "a/3.png")
    (root / "a" / "2.png").write_bytes(b"broken")
    dataset = open_dataset(root, 1)
    stream = Stream(dataset, dataset.items, 2, INPUT, max_bad=0.5)
    passes = [[b.digests for b in stream] for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(stream.skipped) == 1
    assert len(stream) == 3


def test_arrays_of_the_models_size_are_unchanged() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    dataset = from_arrays(images)
    np.testing.assert_array_equal(next(iter(Stream(dataset, dataset.items, 8, INPUT))).images, images)


def test_arrays_of_another_size_are_transformed() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 10, 12, 3), np.uint8)
    dataset = from_arrays(images)
    batch = next(iter(Stream(dataset, dataset.items, 8, INPUT)))
    for array, result in zip(images, batch.images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        np.testing.assert_array_equal(result, by_pillow(buffer.getvalue()))


def test_order_with_slow_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each four takes longest; the order is the items' all the same."""
    dataset = from_arrays(np.zeros((16, SIZE, SIZE, 3), np.uint8))
    read = type(dataset.source).read

    def slow(source: object, index: int, item: Item) -> NDArray[np.uint8]:
        time.sleep(0.004 * (4 - index % 4))
        return read(source, index, item)  # type: ignore[arg-type]

    monkeypatch.setattr(type(dataset.source), "read", slow)
    batches = Stream(dataset, dataset.items, 3, INPUT, workers=4)
    assert tuple(item for b in batches for item in b.items) == dataset.items


class Counting:
    """A source that says how many images were asked for."""

    def __init__(self) -> None:
        self.read_count = 0
        self.seconds = 0.0
        self.lock = threading.Lock()

    def read(self, index: int, item: Item) -> NDArray[np.uint8]:
        with self.lock:
            self.read_count += 1
        time.sleep(self.seconds)
        return np.zeros((SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def counting() -> Iterator[tuple[Dataset, Counting]]:
    source = Counting()
    items = tuple(Item(f"{index:04}", 0, 1, 0) for index in range(500))
    yield Dataset(Path("counting"), "arrays", items, 1, source), source


@pytest.mark.parametrize(("batch", "workers"), [(4, 2), (1, 3), (16, 1)])
def test_bounded(counting: tuple[Dataset, Counting], batch: int, workers: int) -> None:
    """A consumer that stands still is not overtaken by more than the images that may wait."""
    dataset, source = counting
    batches = iter(Stream(dataset, dataset.items, batch, INPUT, workers))
    for taken in range(1, 4):
        next(batches)
        time.sleep(0.05)
        assert taken * batch < source.read_count <= taken * batch + max(batch, 2 * workers)


def test_a_pass_that_is_left_ends_its_threads(counting: tuple[Dataset, Counting]) -> None:
    dataset, source = counting
    source.seconds = 0.05
    for _ in Stream(dataset, dataset.items, 2, INPUT, 3):
        break
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rxdeploy-decode")]
    assert source.read_count < 20


def test_nothing_is_kept(counting: tuple[Dataset, Counting]) -> None:
    dataset, _ = counting
    batches = iter(Stream(dataset, dataset.items, 4, INPUT))
    first = weakref.ref(next(batches).images)
    next(batches)
    gc.collect()
    assert first() is None


# Bad images


@pytest.fixture
def with_bad(tree: Callable[..., Path]) -> Callable[..., Dataset]:
    def make(total: int, bad: list[int]) -> Dataset:
        root = tree(*(f"a/{index:03}.png" for index in range(total)))
        for index in bad:
            path = root / "a" / f"{index:03}.png"
            path.write_bytes(path.read_bytes()[: 30 + index])
        return open_dataset(root, 1)

    return make


def test_skipped(with_bad: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = with_bad(10, [0, 4, 9])
    (tmp_path / "data" / "a" / "007.png").unlink()
    stream = Stream(dataset, dataset.items, 3, INPUT, max_bad=0.4)
    batches = list(stream)
    assert [len(b.items) for b in batches] == [3, 3]
    assert [item.name for b in batches for item in b.items] == [f"a/00{index}.png" for index in (1, 2, 3, 5, 6, 8)]
    assert [item.name for item, _ in stream.skipped] == [f"a/00{index}.png" for index in (0, 4, 7, 9)]
    reasons = {item.name: reason for item, reason in stream.skipped}
    assert "cannot be decoded" in reasons["a/004.png"] or "not an image" in reasons["a/004.png"]
    assert "No such file" in reasons["a/007.png"]
    assert "a/004.png" not in reasons["a/004.png"]  # it stands beside it already


@pytest.mark.parametrize(
    ("total", "bad", "max_bad", "passes"),
    [
        (10, 1, 0.01, True),  # one is let pass in however few
        (10, 2, 0.01, False),
        (10, 1, 0.0, False),
        (10, 2, 0.2, True),
        (10, 3, 0.2, False),
        (100, 29, 0.29, True),  # although 0.29 * 100 is less than 29 in floating point
        (200, 2, 0.01, True),
        (200, 3, 0.01, False),
        (3, 3, 1.0, False),  # none is left
        (1, 1, 0.01, False),
    ],
)
def test_share(with_bad: Callable[..., Dataset], total: int, bad: int, max_bad: float, passes: bool) -> None:
    dataset = with_bad(total, list(range(bad)))
    stream = Stream(dataset, dataset.items, 50, INPUT, max_bad=max_bad)
    if passes:
        assert sum(len(b.items) for b in stream) == total - bad
        assert len(stream.skipped) == bad
        return
    with pytest.raises(InputError) as caught:
        list(stream)
    assert str(dataset.root) in str(caught.value)
    assert "a/000.png: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_names_the_first(with_bad: Callable[..., Dataset]) -> None:
    dataset = with_bad(20, list(range(20)))
    with pytest.raises(
        InputError, match=r"more than 4 of 20 images cannot be decoded.*000.*001.*002.*\.\.\."
    ) as caught:
        list(Stream(dataset, dataset.items, 50, INPUT, max_bad=0.2))
    assert "003" not in str(caught.value)


def test_too_large(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even read."""
    dataset = open_dataset(tree("a/1.png", "a/2.png"), 1)
    monkeypatch.setattr(stream_module, "_MOST_BYTES", dataset.items[1].size - 1)
    stream = Stream(dataset, dataset.items[1:], 1, INPUT)
    with pytest.raises(InputError, match="bytes, more than the"):
        list(stream)


def test_too_narrow() -> None:
    """transform refuses it: one image, not the whole run."""
    images = np.zeros((3, 1, 200_000, 3), np.uint8)
    dataset = from_arrays(images)
    with pytest.raises(InputError, match="too long and narrow"):
        list(Stream(dataset, dataset.items[:1], 1, INPUT))


def test_no_memory_is_no_bad_image(with_bad: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise MemoryError

    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    dataset = with_bad(3, [])
    with pytest.raises(EnvironmentLacks, match="memory"):
        list(Stream(dataset, dataset.items, 2, INPUT, max_bad=1.0))


def test_control_characters_in_names(tree: Callable[..., Path]) -> None:
    root = tree("a/1.png")
    (root / "a" / "\x1b[2J\n.png").write_bytes(b"broken")
    dataset = open_dataset(root, 1)
    stream = Stream(dataset, dataset.items, 2, INPUT)
    list(stream)
    assert len(stream.skipped) == 1
    assert stream.skipped[0][1].isprintable()


@pytest.mark.parametrize("options", [{"batch": 0}, {"workers": 0}, {"max_bad": -0.1}, {"max_bad": 1.5}])
def test_options(counting: tuple[Dataset, Counting], options: dict) -> None:
    dataset, _ = counting
    with pytest.raises(InputError):
        Stream(dataset, dataset.items, preprocessing=INPUT, **{"batch": 1, **options})


def test_no_items(counting: tuple[Dataset, Counting]) -> None:
    assert list(Stream(counting[0], (), 4, INPUT)) == []


def test_interpolation_is_the_cards(tree: Callable[..., Path]) -> None:
    dataset = open_dataset(tree("a/1.png"), 1)
    nearest = msgspec.structs.replace(INPUT, interpolation="nearest")
    images = [next(iter(Stream(dataset, dataset.items, 1, each))).images for each in (INPUT, nearest)]
    assert (images[0] != images[1]).any()


def test_warnings_that_are_errors_spoil_no_image(tree: Callable[..., Path]) -> None:
    """Pillow warns of palette images with transparency, of large ones and of damaged EXIF; pytest here raises that."""
    root = tree("a/1.png")
    palette = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12)).convert("P")
    palette.save(root / "a" / "2.png", transparency=bytes(range(120)))
    Image.new("1", (9600, 9600)).save(root / "a" / "3.png")  # above Pillow's limit for a warning
    assert Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS < 9600 * 9600
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(root / "a" / "4.jpg", exif=exif.tobytes()[:-3])
    dataset = open_dataset(root, 1)
    filters = warnings.filters[:]
    stream = Stream(dataset, dataset.items, 2, INPUT, workers=3, max_bad=0)
    assert sum(len(batch.items) for batch in stream) == 4 and not stream.skipped
    assert [entry for entry in warnings.filters if entry in filters] == filters  # nothing of the user's has changed
    with pytest.raises(Image.DecompressionBombWarning):  # nor for what he does himself
        Image.open(root / "a" / "3.png")
    with pytest.raises(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert len(list(Stream(dataset, dataset.items, 4, INPUT))) == 1
    assert len(warnings.filters) <= len(filters) + 1
