"""Evaluation: a bundle run on labelled images, and how often it was right."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rxdeploy.datasets import Batch, Dataset, Item, Stream
from rxdeploy.engines.bundle import Bundle
from rxdeploy.errors import InputError, printable
from rxdeploy.evaluation.predictions import Header, Predicted, PredictionsFile, Skipped
from rxdeploy.evaluation.statistics import Estimate, share
from rxdeploy.runtime import Session

TOP = 5
MAX_BAD = 0.01  # share of the images that may be impossible to decode
BATCH = {"cpu": 8, "cuda": 32, "tensorrt": 32}  # where none is asked for; on a CPU more gains nothing

Progress = Callable[[str, int, int], None]  # what is evaluated, how many images are done, of how many


@dataclass(frozen=True)
class Speed:
    """How long the images took that were run now: reading, decoding and running, and running alone."""

    images: int
    seconds: float
    inference_seconds: float


@dataclass(frozen=True)
class Evaluation:
    """What a bundle made of labelled images.

    `predictions` has an entry for each image that could be decoded, in the order of the items, `skipped` one for each
    other. `whole`: these were all images of the data set. `speed` is None when every prediction was in the file.
    """

    bundle: Bundle
    device: str
    description: str
    passed_over: tuple[str, ...]
    dataset: Dataset
    whole: bool
    predictions: tuple[Predicted, ...]
    skipped: tuple[Skipped, ...]
    speed: Speed | None

    @property
    def images(self) -> int:
        """How many images were evaluated; at least one."""
        return len(self.predictions)

    @property
    def right(self) -> int:
        """How many images' most probable class is their own."""
        return sum(prediction.right for prediction in self.predictions)

    @property
    def right_in_top5(self) -> int:
        """How many images' own class is among the five most probable."""
        return sum(prediction.label in prediction.top for prediction in self.predictions)

    @property
    def top1(self) -> Estimate:
        """`right` as a share, with Wilson's 95% interval."""
        return share(self.right, self.images)

    @property
    def top5(self) -> Estimate:
        """`right_in_top5` as a share, with Wilson's 95% interval."""
        return share(self.right_in_top5, self.images)


def evaluate(
    session: Session,
    dataset: Dataset,
    items: Sequence[Item] | None = None,
    batch: int | None = None,
    predictions: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run `items` of a labelled data set (all when None) through a loaded bundle, `batch` at a time.

    With `predictions` every batch is written to that file as soon as it is done, and what is there already from an
    interrupted evaluation of the same bundle, device and data is not run again (`PredictionsFile`).

    InputError when an image has no label or one that the model has no logit for, or when too many images cannot be
    decoded (`Stream`); errors of `Session.run`. What was written to `predictions` by then stays and is gone on from.
    """
    items = dataset.items if items is None else tuple(items)
    _check_labels(dataset, items, session.bundle.manifest.num_classes)
    run = _Run(session, dataset, items, batch or BATCH[session.device], progress)
    with _open(run, predictions) as file:
        found = dict(file.done) if file else {}
        skipped = list(file.skipped) if file else []
        if file is None or not file.whole:
            for done in run.batches(found):
                found.update((prediction.image, prediction) for prediction in done)
                if file:
                    file.add(done)
            skipped = run.skipped
            if not found:
                raise InputError(f"data {dataset.root}: none of the images can be decoded")
            if file:
                file.finish(skipped)
        if file:
            _check_whole(file, items, found, skipped)
    return Evaluation(
        session.bundle,
        session.device,
        session.description,
        tuple(session.passed_over),
        dataset,
        len(items) == len(dataset.items),
        tuple(found[item.name] for item in items if item.name in found),
        tuple(skipped),
        run.speed,
    )


def _check_whole(
    file: PredictionsFile, items: Sequence[Item], found: dict[str, Predicted], skipped: Sequence[Skipped]
) -> None:
    """InputError when an image is neither predicted nor skipped, as in a file that somebody has edited."""
    left_out = {one.image for one in skipped}
    missing = [item.name for item in items if item.name not in found and item.name not in left_out]
    if missing or not found:
        which = f"it lacks {printable(missing[0])}" if missing else "every image in it is skipped"
        raise InputError(f"predictions {file.path}: {which}, so it is damaged; delete it to start again")


def _check_labels(dataset: Dataset, items: Sequence[Item], classes: int) -> None:
    if not items:
        raise InputError(f"data {dataset.root}: no images to evaluate")
    for item in items:
        if item.label is None:
            raise InputError(
                f"data {dataset.root}: {printable(item.name)} has no label, which accuracy needs; give a labels file"
            )
        if not 0 <= item.label < classes:
            raise InputError(
                f"data {dataset.root}: {printable(item.name)} has class {item.label}, and the model has classes 0 to "
                f"{classes - 1}"
            )


def _open(run: _Run, path: Path | None) -> contextlib.AbstractContextManager[PredictionsFile | None]:
    if path is None:
        return contextlib.nullcontext()
    manifest = run.session.bundle.manifest
    header = Header(
        model=manifest.model,
        precision=manifest.precision,
        bundle=manifest.digest,
        device=run.session.description,
        data=run.dataset.fingerprint(run.items),
        images=len(run.items),
    )
    return PredictionsFile(path, header)


class _Run:
    """One pass over those images that have no prediction yet."""

    def __init__(
        self, session: Session, dataset: Dataset, items: Sequence[Item], batch: int, progress: Progress | None
    ) -> None:
        self.session, self.dataset, self.items, self.batch = session, dataset, items, batch
        self.skipped: list[Skipped] = []
        self.speed: Speed | None = None
        manifest = session.bundle.manifest
        self._name = f"{manifest.model} {manifest.precision}"
        self._progress = progress or (lambda what, done, total: None)

    def batches(self, done: dict[str, Predicted]) -> Iterator[list[Predicted]]:
        """The predictions of the images that `done` lacks, a batch at a time."""
        left = [item for item in self.items if item.name not in done]
        before, images, inference = len(self.items) - len(left), 0, 0.0
        self._progress(self._name, before, len(self.items))
        if not left:
            return
        stream = self._stream(left)
        self.session.prepare([min(self.batch, len(left))])
        begin = time.perf_counter()
        try:
            for batch in stream:
                begin_run = time.perf_counter()
                logits = self.session.run(batch.images)
                inference += time.perf_counter() - begin_run
                images += len(batch.items)
                yield list(_predicted(batch, logits))
                self._progress(self._name, before + images + len(stream.skipped), len(self.items))
        except InputError:
            # All that an interruption left undone may be bad images, which only few of the whole are.
            if not before or not len(left) == len(stream.skipped) <= self._allowed:
                raise
        self.skipped = [Skipped(item.name, reason) for item, reason in stream.skipped]
        if images:
            self.speed = Speed(images, time.perf_counter() - begin, inference)

    @property
    def _allowed(self) -> int:
        return max(1, int(MAX_BAD * len(self.items)))

    def _stream(self, left: Sequence[Item]) -> Stream:
        # What an earlier run could not decode is among those left, so their share is that of the whole.
        share_of_left = min(1.0, (self._allowed + 0.5) / len(left))
        inputs = self.session.bundle.manifest.preprocessing
        return Stream(self.dataset, left, self.batch, inputs, max_bad=share_of_left)


def _predicted(batch: Batch, logits: NDArray[np.float32]) -> Iterator[Predicted]:
    # Stable: of equal logits, which float16 and int8 have, the first counts as the larger, as for argmax.
    order = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    best = 1 / exponentials.sum(axis=1)
    for item, digest, top, probability in zip(batch.items, batch.digests, order.tolist(), best.tolist(), strict=True):
        assert item.label is not None, "labels were checked"
        yield Predicted(item.name, digest, item.label, tuple(top), round(probability, 6))
