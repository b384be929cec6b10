"""A loaded bundle on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rxdeploy.cards import read_labels
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, missing_module
from rxdeploy.runtime.preprocess import normalise, open_rgb, transform

Device = Literal["auto", "cpu", "cuda"]

_PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


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
        """Logits, float32 (n, num_classes), of uint8 RGB images (n, image_size, image_size, 3)."""
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
        logits = self._session.run(["logits"], {manifest.inputs[0].name: feed})[0]
        if not np.isfinite(logits).all():
            raise CheckFailed(
                f"bundle {self.bundle.path}: the logits hold NaN or infinity; validate the model, or build with --fp32"
            )
        return logits

    def classify(self, images: NDArray[np.uint8], k: int = 5) -> list[list[Prediction]]:
        """The `k` most probable classes of each image, best first; all of them when `k` is more."""
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        return [self._top(row, k) for row in self.run(images)]

    def classify_files(
        self, paths: Iterable[Path], k: int = 5
    ) -> tuple[list[tuple[Path, list[Prediction]]], list[InputError]]:
        """The `k` most probable classes of each image file, and the errors of those that could not be read."""
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
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise missing_module(error) from None
    here = ort.get_available_providers()
    if device == "auto":
        device = "cuda" if _PROVIDER["cuda"] in here else "cpu"
    if _PROVIDER[device] not in here:
        raise EnvironmentLacks(
            f"device {device}: this ONNX Runtime has no {_PROVIDER[device]}; pip install 'rxdeploy[gpu]' adds it"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = bundle.file(bundles.MODEL)
    try:
        return device, ort.InferenceSession(str(model), options, providers=[_PROVIDER[device]])
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        first = str(error).strip().splitlines()[0]
        raise EnvironmentLacks(f"bundle {bundle.path}: ONNX Runtime cannot load {model.name}: {first}") from None
