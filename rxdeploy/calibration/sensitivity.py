"""Which layers pay for their eight bits: the logits' error when only one is quantised, and when only one is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rxdeploy.calibration.network import FC, Network, Steps
from rxdeploy.calibration.options import quantisable
from rxdeploy.calibration.recipe import Quantised, Recipe, WeightCache, logits
from rxdeploy.export.architecture import multiply_adds
from rxdeploy.export.validate import relative_l2

_BATCH = 8


@dataclass(frozen=True)
class Sensitivity:
    """Relative L2 errors of the logits against the float network's.

    A layer is a convolution with its input and weight, a block's shortcut (by the block's name), or the classifier.
    """

    layer: str
    kind: str
    multiply_adds: int
    only: float  # when nothing else is quantised
    without: float  # when everything else is
    all: float  # when everything is

    def as_facts(self) -> dict[str, Any]:
        return asdict(self)


def layers(network: Network, recipe: Recipe) -> list[str]:
    """What `recipe` quantises, in order of computation."""
    return [layer for layer in quantisable(network.shape, recipe.scheme) if layer not in recipe.keep]


def sensitivities(
    network: Network, recipe: Recipe, images: NDArray[np.uint8], progress: Callable[[str, float | None], None]
) -> list[Sensitivity]:
    """Both errors of every layer that `recipe` quantises, from a few images (n, size, size, 3)."""
    cache = WeightCache()
    names, blocks = layers(network, recipe), network.block_of()
    exact = logits(network, Steps(), images, _BATCH)
    whole = relative_l2(logits(network, Quantised(network, recipe, cache), images, _BATCH), exact)
    quantised = Quantised(network, recipe, cache)
    alone = {layer: Quantised(network, recipe, cache, only=(layer,)) for layer in names}
    others = {layer: Quantised(network, recipe.keeping((layer,)), cache) for layer in names}
    found: dict[str, list[list[NDArray[np.float32]]]] = {layer: [[], []] for layer in names}
    chunks = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
    done = 0
    for chunk in chunks:
        # Each layer's run begins at its own block: what comes before is the same for all of a block.
        floating, rounded = (network.upto(chunk, steps, -1) for steps in (Steps(), quantised))
        for number in range(-1, len(network.shape.blocks) + 1):
            for layer in [layer for layer in names if blocks[layer] == number]:
                progress(f"sensitivity of {layer}", done / (len(chunks) * len(names)))
                found[layer][0].append(network.after(floating, alone[layer], number))
                found[layer][1].append(network.after(rounded, others[layer], number))
                done += 1
            floating, rounded = _next(network, floating, Steps(), number), _next(network, rounded, quantised, number)
    counts = {**multiply_adds(network.shape), FC: network.shape.features * network.shape.num_classes}
    return [
        Sensitivity(
            layer=layer,
            kind=kind(layer),
            multiply_adds=counts.get(layer, 0),
            only=relative_l2(np.concatenate(found[layer][0]), exact),
            without=relative_l2(np.concatenate(found[layer][1]), exact),
            all=whole,
        )
        for layer in names
    ]


@torch.inference_mode()
def _next(network: Network, x: torch.Tensor, steps: Steps, number: int) -> torch.Tensor:
    """What goes into the block after that number."""
    if number < 0:
        return network.stem(x, steps)
    if number < len(network.shape.blocks):
        return network.block(network.shape.blocks[number], x, steps)
    return x


def kind(layer: str) -> str:
    """What a layer is, for people."""
    last = layer.rpartition(".")[2]
    if layer == "conv1":
        return "stem"
    if layer == FC:
        return "head"
    if "downsample" in layer:
        return "downsample"
    return {"conv1": "1x1", "conv2": "grouped 3x3", "conv3": "1x1"}.get(last, "shortcut")
