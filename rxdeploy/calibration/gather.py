"""One pass over the calibration images: histograms of every tensor, and each channel's largest value where it matters.

Memory is that of one batch and the counts, whatever the number of images. What was gathered is saved now and then,
and an interrupted pass goes on after the last batch that was saved.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rxdeploy import atomic
from rxdeploy.calibration.equalise import pairs
from rxdeploy.calibration.histogram import Histogram, in_memory_order
from rxdeploy.calibration.network import Network, Parameters, Steps
from rxdeploy.datasets import Batch
from rxdeploy.errors import CheckFailed

_SAVE_SECONDS = 20.0


@dataclass
class Gathered:
    """What a pass found so far."""

    tag: str = ""  # what the network was when it ran: which equalisation
    images: int = 0
    content: str = ""  # sha256 over the digests of the images, in order
    histograms: dict[str, Histogram] = field(default_factory=dict)
    maxima: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # by channel, of what equalisation looks at

    def save(self, path: Path) -> None:
        """Write it to a file, by rename."""
        arrays: dict[str, Any] = {
            f"{name}|{key}": a for name, h in self.histograms.items() for key, a in h.sparse().items()
        }
        arrays |= {f"{name}|maxima": array for name, array in self.maxima.items()}
        arrays |= {"tag": np.array(self.tag), "images": np.array(self.images), "content": np.array(self.content)}
        with atomic.new_file(path, durable=False) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Gathered:
        """What `save` wrote; a new one when there is nothing, or nothing whole."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                parts: dict[str, dict[str, NDArray]] = {}
                for name in arrays.files:
                    tensor, _, key = name.partition("|")
                    if key:
                        parts.setdefault(tensor, {})[key] = arrays[name]
                maxima = {name: part.pop("maxima") for name, part in parts.items() if "maxima" in part}
                histograms = {name: Histogram.from_sparse(part) for name, part in parts.items()}
                return cls(str(arrays["tag"]), int(arrays["images"]), str(arrays["content"]), histograms, maxima)
        except Exception:  # absent, cut off or from elsewhere: np.load raises whatever its parts do
            return cls()


def gather(
    network: Network,
    batches: Iterable[Batch],
    saved: Path | None = None,
    parameters: dict[str, Parameters] | None = None,
    progress: Callable[[int], None] = lambda images: None,
    tag: str = "",
) -> Gathered:
    """Run the float network over all `batches`; `parameters` replace its own. CheckFailed for NaN activations.

    With `saved`, what an earlier pass with the same `tag` left there is not computed again, unless its images were
    others (then `batches` are begun anew). The caller removes the file.
    """
    found = Gathered.load(saved) if saved else Gathered(tag)
    if found.tag != tag:
        found = Gathered(tag)
    steps, since = _Gather(network, found, parameters), time.monotonic()
    seen, content = 0, ""
    for batch in batches:
        seen += len(batch.items)
        content = hashlib.sha256(" ".join((content, *batch.digests)).encode()).hexdigest()
        if seen <= found.images:  # decoded again, which is the smaller part
            if saved and seen == found.images and content != found.content:
                saved.unlink()
                return gather(network, batches, saved, parameters, progress, tag)
            continue
        network.run(batch.images, steps)
        found.images, found.content = seen, content
        progress(seen)
        if saved and time.monotonic() - since > _SAVE_SECONDS:
            found.save(saved)
            since = time.monotonic()
    if saved:
        found.save(saved)
    return found


class _Gather(Steps):
    def __init__(self, network: Network, found: Gathered, parameters: dict[str, Parameters] | None) -> None:
        self._found, self._parameters = found, parameters or {}
        self._between = {f"{first.name}.relu" for first, _ in pairs(network)}

    def tensor(self, name: str, value: Tensor) -> Tensor:
        try:
            self._found.histograms.setdefault(name, Histogram()).add(value)
        except ValueError as error:
            raise CheckFailed(
                f"calibration: tensor {name}: {error}; the weights are damaged, or not meant for this card"
            ) from None
        if name in self._between:
            largest = in_memory_order(value).reshape(-1, value.shape[1]).amax(0).numpy()
            before = self._found.maxima.get(name)
            self._found.maxima[name] = largest if before is None else np.maximum(before, largest)
        return value

    def parameters(self, layer: str, own: Parameters) -> Parameters:
        return self._parameters.get(layer, own)
