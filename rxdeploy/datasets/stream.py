"""Stream: images decoded by a few threads, ahead of the one who computes, in batches and in order."""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rxdeploy.cards.card import Input
from rxdeploy.datasets.dataset import Dataset, Item, digest_of
from rxdeploy.errors import InputError, first_line, printable
from rxdeploy.runtime.preprocess import MAX_PIXELS, open_rgb, transform

_MOST_WORKERS = 8  # by default; each holds one whole image
_MOST_BYTES = 4 * MAX_PIXELS  # of a file: no image within the limit of pixels needs as much
_SHOWN = 3


@dataclass(frozen=True)
class Batch:
    """Images as the model takes them; the first axes correspond.

    `images`: uint8 (n, size, size, 3), RGB. `digests`: sha256 of each file's bytes; of an array: of its dtype, shape
    and data.
    """

    images: NDArray[np.uint8]
    items: tuple[Item, ...]
    digests: tuple[str, ...]


class Stream:
    """The batches of `items`, in their order; iterate as often as needed, one pass at a time.

    Each image goes through the evaluation transform `preprocessing`; an array that has the model's size already is
    taken as it is. `workers` threads (None: one for each core, at most 8) decode ahead: at most `batch` images, or
    two for each worker if that is more, wait beside the batch that is being filled.

    What cannot be decoded is left out, and listed in `skipped` with the reason; `skipped` belongs to the pass that
    runs or ran last. Batches are filled up with the images that follow, so only the last one may be smaller.
    InputError that names the first bad images, as soon as more than `max_bad` of all are bad (of however few, one may
    be, unless `max_bad` is 0), and when no image is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Sequence[Item],
        batch: int,
        preprocessing: Input,
        workers: int | None = None,
        max_bad: float = 0.01,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch size {batch}: it must be at least 1")
        if workers is not None and workers < 1:
            raise InputError(f"workers {workers}: there must be at least 1")
        if not 0 <= max_bad <= 1:
            raise InputError(f"share of bad images {max_bad}: it must lie in 0 to 1")
        self.dataset, self.items, self.batch, self.preprocessing = dataset, tuple(items), batch, preprocessing
        self.workers = workers or min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
        self.skipped: list[tuple[Item, str]] = []
        self._allowed = max(math.floor(max_bad * len(self.items) + 1e-9), 1 if max_bad else 0)

    def __len__(self) -> int:
        """Number of items, the bad ones among them."""
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        images: list[NDArray[np.uint8]] = []
        items: list[Item] = []
        digests: list[str] = []
        with contextlib.closing(self._decoded()) as all_decoded:  # a pass that is left early ends its threads
            for item, decoded in all_decoded:
                if isinstance(decoded, str):
                    self._skip(item, decoded)
                    continue
                images.append(decoded[0])
                items.append(item)
                digests.append(decoded[1])
                if len(images) == self.batch:
                    yield Batch(np.stack(images), tuple(items), tuple(digests))
                    images, items, digests = [], [], []
        if self.items and len(self.skipped) == len(self.items):
            raise self._too_many("none of the images can be decoded")
        if images:
            yield Batch(np.stack(images), tuple(items), tuple(digests))

    def _decoded(self) -> Generator[tuple[Item, tuple[NDArray[np.uint8], str] | str], None, None]:
        """Each item with its image and digest, or with the reason why there is none."""
        waiting: deque[tuple[Item, Future]] = deque()
        most = max(self.batch, 2 * self.workers)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="rxdeploy-decode")
        try:
            for item in self.items:
                if len(waiting) == most:
                    first, future = waiting.popleft()
                    yield first, future.result()
                waiting.append((item, pool.submit(self._decode, item)))
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, item: Item) -> tuple[NDArray[np.uint8], str] | str:
        try:
            return self._image(item)
        except (InputError, OSError) as error:
            return printable(first_line(error)).removeprefix(f"image {printable(item.name)}: ")

    def _image(self, item: Item) -> tuple[NDArray[np.uint8], str]:
        if item.size > _MOST_BYTES:
            raise InputError(f"{item.size:,} bytes, more than the {_MOST_BYTES:,} allowed")
        data = self.dataset.read(item)
        inputs = self.preprocessing
        digest = digest_of(data)
        if isinstance(data, bytes):
            image = open_rgb(Path(item.name), data)
        elif data.shape[:2] == (inputs.image_size, inputs.image_size):
            return data, digest
        else:
            image = Image.fromarray(data)
        return transform(image, inputs.image_size, inputs.crop_pct, inputs.interpolation), digest

    def _skip(self, item: Item, reason: str) -> None:
        self.skipped.append((item, reason))
        if len(self.skipped) > self._allowed:
            raise self._too_many(f"more than {self._allowed} of {len(self.items)} images cannot be decoded")

    def _too_many(self, what: str) -> InputError:
        first = "; ".join(f"{printable(item.name)}: {reason}" for item, reason in self.skipped[:_SHOWN])
        more = " ..." if len(self.skipped) > _SHOWN else ""
        return InputError(f"data {self.dataset.root}: {what}: {first}{more}")
