"""The network as calibration runs it: in PyTorch, batch-norms folded, with a say at every tensor and every layer.

Not ONNX Runtime, since here tensors are looked at and changed between the layers: as outputs of an ONNX graph they
would all be held at once (107 MB an image for 101 layers), and each change of a scale would be another session.
What it computes is the exported graph's (tests/calibration/test_network.py compares them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, linear, max_pool2d

from rxdeploy.cards import ModelCard
from rxdeploy.export.architecture import Block, Conv, resnext
from rxdeploy.export.graph import Weights, fold_batch_norm
from rxdeploy.runtime.preprocess import normalise

INPUT, STEM, POOLED, FEATURES, LOGITS = "input", "stem.relu", "maxpool", "pool", "logits"
FC = "fc"


@dataclass(frozen=True)
class Parameters:
    """A layer's weight and bias."""

    weight: Tensor  # (out, in / groups, kernel, kernel), or (classes, features)
    bias: Tensor


class Steps:
    """What happens at the tensors and layers of one run; this one does nothing."""

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """The tensor `name` of the exported graph was computed; what goes on in its place."""
        return value

    def taken(self, name: str, value: Tensor, layer: str) -> Tensor:
        """`layer`, a convolution, FC or a block's shortcut, takes it in; what it gets in its place."""
        return value

    def parameters(self, layer: str, own: Parameters) -> Parameters:
        """The weight and bias that `layer` computes with."""
        return own

    def output(self, layer: str, value: Tensor) -> Tensor:
        """What a convolution gives, before ReLU and shortcut; what goes on in its place."""
        return value


class Network:
    """The folded network of `card`. Thread-safe."""

    def __init__(self, card: ModelCard, weights: Weights) -> None:
        self.card, self.shape = card, resnext(card)
        self.parameters: dict[str, Parameters] = {}
        for conv in self.shape.convs():
            weight, bias = map(torch.from_numpy, fold_batch_norm(weights, conv))
            self.parameters[conv.name] = Parameters(weight.contiguous(memory_format=torch.channels_last), bias)
        fc = (torch.from_numpy(np.ascontiguousarray(weights[f"fc.{part}"])) for part in ("weight", "bias"))
        self.parameters[FC] = Parameters(*fc)

    def normalised(self, images: NDArray[np.uint8]) -> Tensor:
        """Images (n, size, size, 3) as the first convolution takes them."""
        inputs = self.card.input
        x = torch.from_numpy(normalise(images, inputs.mean, inputs.std))
        return x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8], steps: Steps) -> NDArray[np.float32]:
        """Logits (n, classes) of images (n, size, size, 3)."""
        return self.forward(self.normalised(images), steps).numpy()

    def forward(self, x: Tensor, steps: Steps) -> Tensor:
        """Logits of normalised images; outside of `torch.inference_mode`, so it can be differentiated."""
        x = self.stem(steps.tensor(INPUT, x), steps)
        for block in self.shape.blocks:
            x = self.block(block, x, steps)
        return self.head(x, steps)

    @torch.inference_mode()
    def upto(self, images: NDArray[np.uint8], steps: Steps, block: int | None = None) -> Tensor:
        """What goes into the block of that number; after all of them when None."""
        x = steps.tensor(INPUT, self.normalised(images))
        if block is not None and block < 0:
            return x
        x = self.stem(x, steps)
        for each in self.shape.blocks[:block]:
            x = self.block(each, x, steps)
        return x

    @torch.inference_mode()
    def after(self, x: Tensor, steps: Steps, block: int) -> NDArray[np.float32]:
        """Logits of what goes into the block of that number (-1: into the stem)."""
        if block < 0:
            x = self.stem(x, steps)
        for each in self.shape.blocks[max(block, 0) :]:
            x = self.block(each, x, steps)
        return self.head(x, steps).numpy()

    def stem(self, x: Tensor, steps: Steps) -> Tensor:
        """Normalised images to what the first block takes."""
        x = steps.tensor(STEM, self._conv(self.shape.stem, INPUT, x, steps).relu_())
        return steps.tensor(POOLED, max_pool2d(x, 3, 2, padding=1))

    def block(self, block: Block, x: Tensor, steps: Steps) -> Tensor:
        """One bottleneck."""
        source = self._source(block)
        out, name = x, source
        for conv in block.convs[:-1]:
            out = self._conv(conv, name, out, steps).relu_()
            name = f"{conv.name}.relu"
            out = steps.tensor(name, out)
        last = block.convs[-1]
        out = steps.tensor(last.bn, self._conv(last, name, out, steps))
        if block.downsample:
            shortcut, shortcut_name = self._conv(block.downsample, source, x, steps), block.downsample.bn
            shortcut = steps.tensor(shortcut_name, shortcut)
        else:
            shortcut, shortcut_name = x, source
        return steps.tensor(block.name, (out + steps.taken(shortcut_name, shortcut, block.name)).relu_())

    def head(self, x: Tensor, steps: Steps) -> Tensor:
        """The last block's output to logits."""
        x = steps.tensor(FEATURES, x.mean((2, 3)))
        own = steps.parameters(FC, self.parameters[FC])
        return steps.tensor(LOGITS, linear(steps.taken(FEATURES, x, FC), own.weight, own.bias))

    def _source(self, block: Block) -> str:
        """The tensor that goes into `block`."""
        index = self.shape.blocks.index(block)
        return self.shape.blocks[index - 1].name if index else POOLED

    def _conv(self, conv: Conv, name: str, x: Tensor, steps: Steps) -> Tensor:
        own = steps.parameters(conv.name, self.parameters[conv.name])
        taken = steps.taken(name, x, conv.name)
        result = conv2d(taken, own.weight, own.bias, conv.stride, conv.padding, groups=conv.groups)
        return steps.output(conv.name, result)

    def inputs(self) -> dict[str, str]:
        """The tensor that each convolution, FC and shortcut (by its block's name) takes, in order of computation."""
        return dict(self._inputs())

    def _inputs(self) -> Iterator[tuple[str, str]]:
        yield self.shape.stem.name, INPUT
        for block in self.shape.blocks:
            source = self._source(block)
            names = [source, *(f"{conv.name}.relu" for conv in block.convs[:-1])]
            yield from zip((conv.name for conv in block.convs), names, strict=True)
            if block.downsample:
                yield block.downsample.name, source
            yield block.name, block.downsample.bn if block.downsample else source
        yield FC, FEATURES

    def block_of(self) -> Mapping[str, int]:
        """The number of the block of each layer: -1 for the stem, the number of blocks for FC."""
        found = {self.shape.stem.name: -1, FC: len(self.shape.blocks)}
        for number, block in enumerate(self.shape.blocks):
            found[block.name] = number
            for conv in (*block.convs, block.downsample):
                if conv:
                    found[conv.name] = number
        return found
