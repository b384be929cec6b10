"""What a bundle takes: every array is checked against the manifest before anything is enqueued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rxdeploy.engines.bundle import MODEL, Bundle, Manifest
from rxdeploy.errors import InputError
from rxdeploy.runtime import arrays
from rxdeploy.runtime.arrays import DeviceView
from rxdeploy.runtime.preprocess import normalise

# Of a normalised pixel, which is a few units. It is where float16 ends, whatever the precision: a service does not
# begin to refuse when its bundle is built with another.
LARGEST = 65504.0


class ModelTensor(NamedTuple):
    """An input or output of model.onnx as an engine finds it: `shape` of one image, None for what may be any size."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def check_model(bundle: Bundle, inputs: Sequence[ModelTensor], outputs: Sequence[ModelTensor]) -> None:
    """InputError unless the model takes and gives what the bundle's manifest says."""
    manifest = bundle.manifest
    needed = Inputs(manifest)
    wanted = (
        ("input", [ModelTensor(manifest.inputs[0].name, needed.dtype.name, needed.declared)], inputs),
        ("output", [ModelTensor(manifest.outputs[0].name, "float32", (manifest.num_classes,))], outputs),
    )
    for what, expected, found in wanted:
        if list(found) != expected:
            raise InputError(f"{bundle.file(MODEL)}: its {what} is not what the manifest says; build the bundle again")


class Inputs:
    """Checks images and brings them to the engine's own input; everything is InputError for what does not fit.

    uint8 (n, size, size, 3) is taken always; where normalisation is not in the graph it is done here, on the host.
    The declared input of such a bundle, float32 (n, 3, size, size), is taken as it is, if all of it is finite and
    within 65504: OpenVINO, integers and TensorRT make finite logits of NaN. On the GPU it is not looked at.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.size = manifest.preprocessing.image_size
        self.classes = manifest.num_classes
        self.normalised = not manifest.normalisation_in_graph
        self._mean, self._std = manifest.preprocessing.mean, manifest.preprocessing.std
        self._raw = (self.size, self.size, 3)
        self.declared = (3, self.size, self.size) if self.normalised else self._raw
        self.dtype = np.dtype(np.float32 if self.normalised else np.uint8)

    def host(self, images: Any) -> NDArray:
        """A batch on the host, as the engine takes it."""
        batch = arrays.host_array(images, "images")
        if batch.ndim == 4 and batch.shape[1:] == self.declared and batch.dtype == self.dtype:
            return self._checked(batch, "images")
        if self.normalised and batch.ndim == 4 and batch.shape[1:] == self._raw and batch.dtype == np.uint8:
            return normalise(batch, self._mean, self._std)
        raise InputError(
            f"images: got {batch.dtype} {batch.shape}, expected {self._expected('n, ')}{self._hint(batch)}"
        )

    def device(self, images: DeviceView) -> DeviceView:
        """A batch on the GPU, which must be the engine's own input."""
        if len(images.shape) == 4 and images.shape[1:] == self.declared and images.dtype == self.dtype:
            return images
        declared = f"{self.dtype} (n, {', '.join(map(str, self.declared))})"
        raise InputError(f"images: got {images.dtype} {images.shape} on the GPU, expected {declared}")

    def one(self, image: Any) -> NDArray:
        """One image on the host, without the batch, as the engine takes it."""
        if type(image) is np.ndarray and image.shape == self.declared and image.dtype == self.dtype:
            return self._checked(image, "image")  # as it comes, most often
        if arrays.is_on_device(image, "image"):
            raise InputError("image: it lies on a GPU, and single images are gathered on the host; run takes it there")
        array = arrays.host_array(image, "image")
        if array.ndim != 3:
            raise InputError(f"image: got {array.dtype} {array.shape}, expected {self._expected('')}")
        return self.host(array[None])[0]

    def _checked(self, images: NDArray, name: str) -> NDArray:
        if not self.normalised or not images.size or -LARGEST <= images.min() <= images.max() <= LARGEST:
            return images  # NaN is not within anything
        what = "values beyond 65504" if np.isfinite(images).all() else "NaN or infinity"
        raise InputError(f"{name}: holds {what}; normalised pixels are a few units")

    def _expected(self, batch: str) -> str:
        raw = f"uint8 ({batch}{self.size}, {self.size}, 3), RGB"
        made = "; Session.preprocess makes one from a file"
        return (f"{raw}, or normalised float32 ({batch}3, {self.size}, {self.size})" if self.normalised else raw) + made

    def _hint(self, batch: NDArray) -> str:
        if batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[1:] == (3, self.size, self.size):
            return ". This is NCHW: images.transpose(0, 2, 3, 1)"
        return ". One image needs a batch: image[None]" if batch.shape == self._raw else ""
