"""Equalisation: channels of one tensor brought to similar ranges, without changing what the network computes.

Between two convolutions there is only a ReLU, and relu(x / s) = relu(x) / s: so the first one's output channels may be
divided by any positive factors that the second one's input channels are multiplied by (M. Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019). Weights have a scale for each output channel
here, so the factors weigh a channel's largest activation against the largest weight that reads it, as in SmoothQuant
(G. Xiao et al., 2023, equation 4, alpha 0.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rxdeploy.calibration.network import Network, Parameters
from rxdeploy.export.architecture import Conv

_MOST = 100.0  # a channel that is nearly dead gets no larger factor: its weights would leave float16's normal range


def pairs(network: Network) -> Iterator[tuple[Conv, Conv]]:
    """The convolutions with nothing but a ReLU between them, which nobody else reads."""
    for block in network.shape.blocks:
        yield from zip(block.convs, block.convs[1:], strict=False)


def factors(network: Network, maxima: Mapping[str, NDArray[np.float32]]) -> dict[str, list[float]]:
    """What to divide the output channels of each first convolution of a pair by.

    `maxima`: the largest value of each channel, by tensor (``layer1.0.conv1.relu``).
    """
    found = {}
    for first, second in pairs(network):
        activations = maxima[f"{first.name}.relu"].astype(np.float64)
        weight = _by_input_channel(network.parameters[second.name].weight, second).abs().amax((1, 2))
        weights = weight.numpy().astype(np.float64)
        alive = (activations > 0) & (weights > 0)
        if not alive.any():
            continue
        each = np.sqrt(activations[alive] / weights[alive])
        each /= np.exp(np.log(each).mean())
        factor = np.ones(len(activations))
        factor[alive] = np.clip(each, 1 / _MOST, _MOST)
        found[first.name] = [float(f"{value:.6g}") for value in factor]
    return found


def equalised(network: Network, by: Mapping[str, list[float]]) -> dict[str, Parameters]:
    """The network's parameters with these factors worked in; those given stay as they are."""
    parameters = dict(network.parameters)
    for first, second in pairs(network):
        if first.name not in by:
            continue
        factor = torch.tensor(by[first.name], dtype=torch.float32)
        own = parameters[first.name]
        parameters[first.name] = Parameters(own.weight / factor[:, None, None, None], own.bias / factor)
        own = parameters[second.name]
        scaled = _by_input_channel(own.weight, second) * factor[:, None, None]
        weight = scaled.reshape(second.groups, -1, *scaled.shape[1:]).permute(0, 2, 1, 3).reshape(own.weight.shape)
        parameters[second.name] = Parameters(weight.contiguous(memory_format=torch.channels_last), own.bias)
    return parameters


def _by_input_channel(weight: Tensor, conv: Conv) -> Tensor:
    """(out, in / groups, k, k) as (in, out / groups, k * k): all that reads an input channel."""
    groups, inner = conv.groups, weight.shape[1]
    split = weight.reshape(groups, weight.shape[0] // groups, inner, -1)
    return split.permute(0, 2, 1, 3).reshape(groups * inner, weight.shape[0] // groups, -1)
