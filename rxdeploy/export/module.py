"""The PyTorch module that defines what a card's model computes: the reference of every validation.

Parameter names are torchvision's, which the Gluon checkpoints use. The stride sits on the grouped 3x3
convolution, as in timm's gluon_resnet.py, the code the card points to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rxdeploy.cards.card import EXPANSION, ModelCard


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 with a residual connection; float32 (batch, channels, height, width) in and out."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, cardinality: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(out + shortcut)


class ResNeXt(nn.Module):
    """The classifier of a card: float32 (batch, 3, size, size), normalised, to logits (batch, num_classes)."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        arch = card.architecture
        self.conv1 = nn.Conv2d(3, arch.stem_width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(arch.stem_width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.stages: list[str] = []
        channels = arch.stem_width
        for stage, (depth, planes) in enumerate(zip(arch.layers, arch.channels, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                width = planes * arch.base_width // 64 * arch.cardinality
                blocks.append(Bottleneck(channels, width, planes * EXPANSION, stride, arch.cardinality))
                channels = planes * EXPANSION
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, arch.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(x.mean((2, 3)))
