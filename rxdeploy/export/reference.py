"""What the published model computes: the PyTorch module's logits and layer outputs, in float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rxdeploy.cards import ModelCard
from rxdeploy.export.graph import Weights
from rxdeploy.export.module import ResNeXt
from rxdeploy.runtime.preprocess import normalise

CHUNK = 4  # images a forward pass: bounds memory, and is fast enough


def reference_module(card: ModelCard, weights: Weights) -> ResNeXt:
    """The card's module with `weights` in it, in evaluation mode."""
    module = ResNeXt(card)
    missing, unexpected = module.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), (missing, unexpected)
    return module.eval()


def is_layer(name: str) -> bool:
    """Whether the module of this name has a counterpart in the ONNX graph: its batch-norms, blocks and pool."""
    last = name.rpartition(".")[2]
    block = name.count(".") == 1 and last.isdigit()
    return block or last.startswith("bn") or name.endswith("downsample.1") or name == "maxpool"


@torch.inference_mode()
def run_reference(
    card: ModelCard,
    weights: Weights,
    images: NDArray[np.uint8],
    on_layer: Callable[[str, NDArray[np.float32]], None] | None = None,
) -> NDArray[np.float32]:
    """Logits (n, num_classes) of uint8 images (n, size, size, 3).

    `on_layer` receives the name and output of every layer, in order, for each chunk of images.
    """
    module = reference_module(card, weights)
    if on_layer is not None:
        _watch(module, on_layer)
    logits = []
    for start in range(0, len(images), CHUNK):
        x = normalise(images[start : start + CHUNK], card.input.mean, card.input.std)
        logits.append(module(torch.from_numpy(x)).numpy())
    return np.concatenate(logits)


def _watch(module: nn.Module, on_layer: Callable[[str, NDArray[np.float32]], None]) -> None:
    def hook(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def call(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            on_layer(name, output.numpy())  # and nothing returned: that would replace the layer's output

        return call

    for name, child in module.named_modules():
        if is_layer(name):
            child.register_forward_hook(hook(name))
