"""Everything that was decided about a quantised model, and what that model computes: the same in PyTorch.

Which target gets what, and why:

    target        activations              weights       bias     quantised
    tensorrt      int8, zero_point 0       int8          float16  what convolutions and residual additions take in
    onnxruntime   uint8 with a zero_point  int8 or int7  int32    every tensor from the stem to the logits

TensorRT's integer products take symmetric int8 only. Its fusions need no range behind a convolution: of a residual
addition only the shortcut is quantised, since Q/DQ between convolution and addition would keep the two from becoming
one kernel (NVIDIA/Model-Optimizer, pull request 425). ONNX Runtime on a CPU joins Q/DQ to integer kernels only where
every input and output of a node has them, and x86 multiplies unsigned by signed (calibration/cpu.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rxdeploy.calibration import weights as to_int8
from rxdeploy.calibration.equalise import equalised
from rxdeploy.calibration.network import FC, INPUT, LOGITS, POOLED, STEM, Network, Parameters, Steps
from rxdeploy.calibration.options import Method, SchemeName
from rxdeploy.calibration.ranges import Range, Units, units
from rxdeploy.calibration.weights import WeightScales


class Recipe(msgspec.Struct, kw_only=True, frozen=True):
    """How to quantise one model for one target. Ranges are of the exported graph's tensors, by name."""

    scheme: SchemeName
    weight_bits: int = 8
    weight_scales: WeightScales = "minmax"
    method: Method  # of most tensors
    methods: dict[str, Method] = {}  # of those that do better with another
    ranges: dict[str, tuple[float, float]]
    equalisation: dict[str, list[float]] = {}  # by convolution: what its output channels are divided by
    bias: dict[str, list[float]] = {}  # by convolution: what is added to its bias, after the equalisation
    keep: tuple[str, ...] = ()  # layers that stay in floating point

    @property
    def largest(self) -> int:
        """The largest magnitude of a quantised weight."""
        return 2 ** (self.weight_bits - 1) - 1

    @property
    def symmetric(self) -> bool:
        return self.scheme == "tensorrt"

    def keeping(self, layers: Iterable[str]) -> Recipe:
        """The same with these layers in floating point too."""
        return msgspec.structs.replace(self, keep=tuple(dict.fromkeys((*self.keep, *layers))))

    def range(self, tensor: str) -> Range:
        """The range of a tensor; KeyError for one that has none."""
        return Range(*self.ranges[tensor])


class Quantised(Steps):
    """Runs a network as the quantised model computes it (its float parts in float32). For one thread.

    `only`: no layers but these are quantised. `cache` spares rounding the weights again.
    """

    def __init__(
        self, network: Network, recipe: Recipe, cache: WeightCache | None = None, only: Collection[str] | None = None
    ) -> None:
        self._symmetric = recipe.symmetric
        self._units = {name: units(recipe.range(name), recipe.symmetric) for name in recipe.ranges}
        self._last: tuple[str, Tensor, Tensor] | None = None  # what was rounded last: its name, before and after
        self._by_reader = recipe.symmetric or only is not None
        self._keep, self._only = frozenset(recipe.keep), only if only is None else frozenset(only)
        self._blocks = {block.name for block in network.shape.blocks}
        self.own, rounded = (cache or WeightCache()).parameters(network, recipe)
        self._parameters = {
            layer: Parameters(weight, self.own[layer].bias + torch.tensor(recipe.bias.get(layer, 0.0)))
            for layer, weight in rounded.items()
        }

    def is_quantised(self, layer: str) -> bool:
        """Whether `layer` computes in integers."""
        if layer == FC if self._symmetric else layer in self._blocks:
            return False
        return layer not in self._keep and (self._only is None or layer in self._only)

    def tensor(self, name: str, value: Tensor) -> Tensor:
        if name == POOLED or not self._arrives_rounded(name):
            return value  # max-pooling gives values of its input
        return _round(value, self._units[name])

    def _arrives_rounded(self, name: str) -> bool:
        """Whether whoever reads the tensor gets it rounded; otherwise every reader says for itself.

        For TensorRT that is so always. On a CPU what an integer kernel gives is rounded: additions, pooling and,
        unless they are kept, convolutions (see cpu.py).
        """
        if self._by_reader or name in (INPUT, LOGITS):
            return False
        return not name.endswith(".relu") or name == STEM or self.is_quantised(name.removesuffix(".relu"))

    def taken(self, name: str, value: Tensor, layer: str) -> Tensor:
        if not self.is_quantised(layer) or self._arrives_rounded(name):
            return value
        # Up to three layers read a tensor, one after the other.
        if self._last is None or self._last[0] != name or self._last[1] is not value:
            self._last = name, value, _round(value, self._units[name])
        return self._last[2]

    def parameters(self, layer: str, own: Parameters) -> Parameters:
        return (self._parameters if self.is_quantised(layer) else self.own).get(layer, own)


def _round(value: Tensor, to: Units) -> Tensor:
    """`value` after quantising and dequantising."""
    return torch.fake_quantize_per_tensor_affine(value, to.scale, to.zero_point, to.least, to.most)


class WeightCache:
    """The rounded weights of the last recipe, for those that differ in other things."""

    def __init__(self) -> None:
        self._of: Recipe | None = None
        self._held: tuple[dict[str, Parameters], dict[str, Tensor]]

    def parameters(self, network: Network, recipe: Recipe) -> tuple[dict[str, Parameters], dict[str, Tensor]]:
        """The parameters in float, equalised, and every layer's rounded weight."""
        if self._of is None or _weights_of(self._of) != _weights_of(recipe):
            own = equalised(network, recipe.equalisation)
            self._held = own, {layer: _rounded(each.weight, recipe) for layer, each in own.items()}
            self._of = recipe
        return self._held


def _weights_of(recipe: Recipe) -> tuple[object, ...]:
    return recipe.weight_bits, recipe.weight_scales, recipe.equalisation


def _rounded(weight: Tensor, recipe: Recipe) -> Tensor:
    array = weight.numpy()
    scale = to_int8.scales(array, recipe.largest, recipe.weight_scales)
    rounded = torch.from_numpy(to_int8.dequantise(to_int8.quantise(array, scale, recipe.largest), scale))
    return rounded.contiguous(memory_format=torch.channels_last) if rounded.ndim == 4 else rounded


def logits(network: Network, steps: Steps, images: NDArray[np.uint8], batch: int = 8) -> NDArray[np.float32]:
    """Logits (n, classes) of images (n, size, size, 3), a few at a time."""
    return np.concatenate([network.run(images[i : i + batch], steps) for i in range(0, len(images), batch)])


def tensors(network: Network, scheme: SchemeName) -> list[str]:
    """The tensors whose ranges a scheme uses."""
    reads = network.inputs()
    if scheme == "tensorrt":
        return list(dict.fromkeys(tensor for layer, tensor in reads.items() if layer != FC))
    sums = [block.convs[-1].bn for block in network.shape.blocks]
    blocks = [block.name for block in network.shape.blocks]
    return list(dict.fromkeys([*reads.values(), *sums, *blocks, STEM]))


def ranges_as_data(ranges: Mapping[str, Range]) -> dict[str, tuple[float, float]]:
    """Ranges as a Recipe holds them."""
    return {name: (found.low, found.high) for name, found in ranges.items()}
