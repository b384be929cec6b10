"""The ResNeXt of a card as a plain list of its layers: the one description that the weight check, the ONNX
graph and the synthetic weights share. The PyTorch module (module.py) is written without it, on purpose, so
that validation compares two independent readings of the architecture.

Names are the checkpoints' (torchvision's): ``conv1``, ``bn1``, ``layer1.0.conv2``, ``layer1.0.downsample.0``,
``fc``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rxdeploy.cards.card import EXPANSION, ModelCard

BN_EPS = 1e-5  # of every batch-norm in the Gluon checkpoints, as in PyTorch's default
BN_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Conv:
    """A bias-free convolution and the batch-norm behind it."""

    name: str  # of the convolution's parameters
    bn: str  # of the batch-norm's parameters; also the name of the pair's output tensor
    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel

    @property
    def padding(self) -> int:
        return self.kernel // 2

    def output_size(self, size: int) -> int:
        """Height (= width) of the output for an input of `size` pixels."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Block:
    """A bottleneck: 1x1, grouped 3x3 (which carries the stride), 1x1, and the shortcut."""

    name: str
    convs: tuple[Conv, Conv, Conv]
    downsample: Conv | None


@dataclass(frozen=True)
class ResNeXt:
    """The whole network: stem convolution (then ReLU and a 3x3 max-pool of stride 2), blocks, classifier."""

    stem: Conv
    blocks: tuple[Block, ...]
    features: int  # channels after the last block
    num_classes: int
    image_size: int

    def convs(self) -> Iterator[Conv]:
        """Every convolution, in the order of computation (a block's shortcut last)."""
        yield self.stem
        for block in self.blocks:
            yield from block.convs
            if block.downsample:
                yield block.downsample

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a checkpoint must have (without ``num_batches_tracked``)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for conv in self.convs():
            shapes[f"{conv.name}.weight"] = conv.weight_shape
            shapes.update({f"{conv.bn}.{part}": (conv.out_channels,) for part in BN_PARTS})
        shapes["fc.weight"] = (self.num_classes, self.features)
        shapes["fc.bias"] = (self.num_classes,)
        return shapes


def resnext(card: ModelCard) -> ResNeXt:
    """The layers that `card` describes."""
    arch = card.architecture
    stem = Conv("conv1", "bn1", 3, arch.stem_width, kernel=7, stride=2)
    blocks: list[Block] = []
    channels = arch.stem_width
    for stage, depth in enumerate(arch.layers):
        width, out = arch.width(stage), arch.channels[stage] * EXPANSION
        for index in range(depth):
            name = f"layer{stage + 1}.{index}"
            stride = 2 if stage > 0 and index == 0 else 1
            shortcut = None
            if stride != 1 or channels != out:
                shortcut = Conv(f"{name}.downsample.0", f"{name}.downsample.1", channels, out, kernel=1, stride=stride)
            convs = (
                Conv(f"{name}.conv1", f"{name}.bn1", channels, width, kernel=1),
                Conv(f"{name}.conv2", f"{name}.bn2", width, width, kernel=3, stride=stride, groups=arch.cardinality),
                Conv(f"{name}.conv3", f"{name}.bn3", width, out, kernel=1),
            )
            blocks.append(Block(name, convs, shortcut))
            channels = out
    return ResNeXt(stem, tuple(blocks), channels, arch.num_classes, card.input.image_size)


def count_parameters(network: ResNeXt) -> int:
    """Trainable parameters: convolutions, batch-norm weights and biases, classifier (no running statistics)."""
    conv = sum(c.out_channels * (c.in_channels // c.groups * c.kernel**2 + 2) for c in network.convs())
    return conv + network.num_classes * (network.features + 1)


def count_multiply_adds(network: ResNeXt) -> int:
    """Multiply-adds of convolutions and classifier for one image: the usual count, without pooling and ReLU."""
    return sum(multiply_adds(network).values()) + network.features * network.num_classes


def multiply_adds(network: ResNeXt) -> dict[str, int]:
    """Multiply-adds of each convolution, by name, for one image."""
    counts: dict[str, int] = {}

    def count(conv: Conv, size: int) -> int:
        size = conv.output_size(size)
        counts[conv.name] = size**2 * conv.out_channels * (conv.in_channels // conv.groups) * conv.kernel**2
        return size

    size = count(network.stem, network.image_size)
    size = (size + 2 - 3) // 2 + 1  # max-pool 3x3, stride 2, padding 1
    for block in network.blocks:
        if block.downsample:
            count(block.downsample, size)
        for conv in block.convs:
            size = count(conv, size)
    return counts
