"""Synthetic weights: every card can be built, run and timed without a download.

They classify nothing, but they behave like trained ones where it matters for a compiler: activations stay
well scaled through all 101 layers, batch-norm statistics are those of the activations they normalise,
channels differ from each other, and different images give different logits.

The statistics are measured, layer by layer, on photographs and noise. That runs in float64 and the results
are rounded to 12 bits of mantissa, far above the rounding errors in which machines differ, so that a seed
gives the same bytes everywhere, unless some value happens to sit on a rounding edge.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rxdeploy.cards import ModelCard
from rxdeploy.export.architecture import BN_EPS, Conv, resnext
from rxdeploy.export.samples import noise, photographs
from rxdeploy.runtime.preprocess import normalise

# A block's branch adds less than its shortcut carries, as in trained networks. At 0.4 rounding errors grow three
# times as large through 33 blocks.
BRANCH_GAIN = 0.25
LOGIT_STD = 2.5  # spread of the logits, about that of a trained ImageNet classifier


class _Random:
    """Uniform numbers from a bit generator whose stream NumPy guarantees (unlike its distributions)."""

    def __init__(self, seed: int, name: str) -> None:
        entropy = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
        self._bits = np.random.PCG64(entropy)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> NDArray[np.float32]:
        count = math.prod(shape)
        words = self._bits.random_raw((count + 1) // 2).view(np.uint32)[:count]
        unit = (words >> 8).astype(np.float32) * np.float32(2**-24)  # exact: 24 bits fit a float32
        return (np.float32(low) + unit * np.float32(high - low)).reshape(shape)


@torch.inference_mode()
def synthetic_weights(card: ModelCard, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights for every tensor of `ResNeXt.state_shapes`, float32, the same for the same card and seed."""
    network = resnext(card)
    weights: dict[str, NDArray[np.float32]] = {}

    def batch_normed(x: Tensor, conv: Conv, gain: float = 1.0) -> Tensor:
        """Draw `conv` and its batch-norm, whose statistics are those of the convolution's output."""
        random = _Random(seed, conv.name)
        limit = math.sqrt(3 / math.prod(conv.weight_shape[1:]))  # variance 1 / fan_in
        weight = random.uniform(conv.weight_shape, -limit, limit)
        out = F.conv2d(
            x, torch.from_numpy(weight).double(), stride=conv.stride, padding=conv.padding, groups=conv.groups
        )
        var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
        tensors = {
            "weight": random.uniform((conv.out_channels,), 0.75 * gain, 1.25 * gain),
            "bias": random.uniform((conv.out_channels,), -0.25 * gain, 0.25 * gain),
            "running_mean": _rounded(mean),
            # A channel that is constant on these images must not be blown up to variance 1.
            "running_var": _rounded(var.clamp(min=1e-3 * float(var.mean()) + 1e-12)),
        }
        weights[f"{conv.name}.weight"] = weight
        weights.update({f"{conv.bn}.{part}": array for part, array in tensors.items()})
        gamma, beta, mean, var = (torch.from_numpy(array).double()[:, None, None] for array in tensors.values())
        return (out - mean) * (gamma / torch.sqrt(var + BN_EPS)) + beta

    images = np.concatenate([photographs(card), noise(card, 2)])
    x = torch.from_numpy(normalise(images, card.input.mean, card.input.std)).double()
    x = F.max_pool2d(torch.relu(batch_normed(x, network.stem)), 3, 2, padding=1)
    for block in network.blocks:
        out = x
        for conv in block.convs[:-1]:
            out = torch.relu(batch_normed(out, conv))
        out = batch_normed(out, block.convs[-1], BRANCH_GAIN)
        x = torch.relu(out + (batch_normed(x, block.downsample) if block.downsample else x))

    features = x.mean((2, 3))
    spread = float(_rounded(features.std(0).square().mean().sqrt()))  # what tells images apart
    limit = LOGIT_STD / spread * math.sqrt(3 / network.features)
    fc = _Random(seed, "fc").uniform((network.num_classes, network.features), -limit, limit)
    weights["fc.weight"] = fc
    weights["fc.bias"] = _rounded(-(torch.from_numpy(fc).double() @ features.mean(0)))
    return weights


def _rounded(x: Tensor) -> NDArray[np.float32]:
    """To 12 bits of mantissa, exact in float32."""
    mantissa, exponent = np.frexp(x.numpy())
    return np.ldexp(np.round(mantissa * 4096) / 4096, exponent).astype(np.float32)
