"""A loaded bundle on ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rxdeploy.cards import read_labels
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.runtime.onnxrt import CPU, CUDA, available_providers, open_session, run_session
from rxdeploy.runtime.preprocess import normalise, open_rgb, transform

Device = Literal["auto", "cpu", "cuda"]

_PROVIDER = {"cpu": CPU, "cuda": CUDA}
log = logging.getLogger("rxdeploy.runtime")


@dataclass(frozen=True)
class Prediction:
    """One class that an image may belong to."""

    index: int
    label: str | None
    probability: float
    logit: float


def load(path: str | Path, device: Device = "auto", labels: Path | None = None) -> Session:
    """Open the bundle at `path`, check every digest, and get it ready to run.

    `device` "auto" takes ONNX Runtime's CUDA provider where it is installed, else the CPU. `labels` is a
    text file with one class name a line, used instead of the bundle's own names. InputError for a bundle
    that is none or was altered; EnvironmentLacks for a device that is not here.
    """
    bundle = bundles.open_bundle(Path(path))
    names = read_labels(labels, bundle.manifest.num_classes) if labels else bundle.labels()
    return Session(bundle, device, names)


class Session:
    """Runs one bundle. `device` says where: "cpu" or "cuda"."""

    def __init__(self, bundle: Bundle, device: Device, labels: Sequence[str] | None) -> None:
        self.bundle = bundle
        self.device, self._session = _open(bundle, device)
        self._labels = labels

    def preprocess(self, path: Path) -> NDArray[np.uint8]:
        """An image file as the model's evaluation transform leaves it: uint8 (image_size, image_size, 3), RGB."""
        inputs = self.bundle.manifest.preprocessing
        image = open_rgb(path)
        try:
            return transform(image, inputs.image_size, inputs.crop_pct, inputs.interpolation)
        except InputError as error:
            raise InputError(f"image {path}: {error}") from None

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits, float32 (n, num_classes), of uint8 RGB images (n, image_size, image_size, 3).

        InputError for another dtype or shape; CheckFailed when ONNX Runtime fails or a logit is not finite.
        """
        manifest = self.bundle.manifest
        size = manifest.preprocessing.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise InputError(
                f"images: got {images.dtype} {images.shape}, expected uint8 (n, {size}, {size}, 3), RGB; "
                "Session.preprocess makes one from a file"
            )
        feed: NDArray[Any] = images
        if not manifest.normalisation_in_graph:
            feed = normalise(images, manifest.preprocessing.mean, manifest.preprocessing.std)
        logits = run_session(self._session, ["logits"], {manifest.inputs[0].name: feed})[0]
        if not np.isfinite(logits).all():
            raise CheckFailed(
                f"bundle {self.bundle.path}: the logits hold NaN or infinity; validate the model, or build with --fp32"
            )
        return logits

    def classify(self, images: NDArray[np.uint8], k: int = 5) -> list[list[Prediction]]:
        """The `k` most probable classes of each image, best first; all of them when `k` is more.

        `images` and errors as for `run`; InputError too when `k` is less than 1.
        """
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        return [self._top(row, k) for row in self.run(images)]

    def classify_files(
        self, paths: Iterable[Path], k: int = 5
    ) -> tuple[list[tuple[Path, list[Prediction]]], list[InputError]]:
        """The `k` most probable classes of each image file, and the errors of those that could not be read.

        Any other error (see `run`) ends it, with the results so far lost.
        """
        results: list[tuple[Path, list[Prediction]]] = []
        failures: list[InputError] = []
        for path in paths:
            try:
                image = self.preprocess(path)
            except InputError as error:
                failures.append(error)
            else:
                results.append((path, self.classify(image[None], k)[0]))
        return results, failures

    def _top(self, logits: NDArray[np.float32], k: int) -> list[Prediction]:
        exp = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = exp / exp.sum()
        best: list[int] = np.argsort(-logits, kind="stable")[:k].tolist()
        return [
            Prediction(i, self._labels[i] if self._labels else None, float(probabilities[i]), float(logits[i]))
            for i in best
        ]


def _open(bundle: Bundle, device: Device) -> tuple[str, Any]:
    model = bundle.file(bundles.MODEL)
    if device not in ("auto", *_PROVIDER):
        raise InputError(f"device {device!r}: must be auto, cpu or cuda")
    if device != "auto":
        return device, open_session(model, _PROVIDER[device])
    if CUDA in available_providers():
        try:
            return "cuda", open_session(model, CUDA)
        except EnvironmentLacks as error:
            log.info("running on the CPU: %s", error)
    return "cpu", open_session(model, CPU)
