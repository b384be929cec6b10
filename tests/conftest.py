"""Small cards, weights for them and ONNX Runtime, for every test that needs a model in milliseconds.

What is heavy is imported inside, so that tests of light modules stay light.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rxdeploy.cards import ModelCard, load_card

# Before torch is imported, here and in the processes that tests start: with models this small, several threads
# that wait for each other take longer than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL: dict[str, dict[str, Any]] = {
    "architecture": {
        "layers": [1, 2, 1],
        "channels": [16, 32, 48],
        "cardinality": 4,
        "base_width": 8,
        "stem_width": 16,
        "num_classes": 7,
    },
    "input": {
        "image_size": 48,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}


@pytest.fixture
def make_card(tmp_path: Path) -> Callable[..., ModelCard]:
    """Writes a small card to tmp_path/NAME.toml and loads it.

    A keyword is a key of [architecture] or [input], or else of the top level, where a dict is a table.
    """

    def make(name: str = "small", **changes: Any) -> ModelCard:
        tables = {table: dict(keys) for table, keys in SMALL.items()}
        lines = ["schema = 1", f'name = "{name}"']
        for key, value in changes.items():
            owner = next((table for table in SMALL if key in SMALL[table]), None)
            if owner:
                tables[owner][key] = value
            elif isinstance(value, dict):
                tables[key] = value
            else:
                lines.append(f"{key} = {json.dumps(value)}")
        for table, keys in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        path = tmp_path / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return load_card(path)

    return make


@pytest.fixture
def random_weights() -> Callable[..., dict[str, NDArray[np.float32]]]:
    """Draws weights for a card: PyTorch's initial ones, and batch-norms of which every part matters.

    Variances go down to 0.01, where an epsilon of 1e-4 instead of 1e-5 changes a channel by 0.4 %.
    """

    def draw(card: ModelCard, seed: int = 0) -> dict[str, NDArray[np.float32]]:
        import torch

        from rxdeploy.export.module import ResNeXt

        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            module = ResNeXt(card)
            for part in module.modules():
                if isinstance(part, torch.nn.BatchNorm2d):
                    part.running_mean.normal_(0, 0.2)
                    part.running_var.uniform_(math.log(0.01), 0).exp_()
                    part.weight.uniform_(-0.5, 1.5)
                    part.bias.normal_(0, 0.2)
        return {k: v.numpy().copy() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}

    return draw


@pytest.fixture
def run_onnx() -> Callable[..., NDArray[np.float32]]:
    """Runs a serialised ONNX model with one input on ONNX Runtime; returns its first output."""

    def run(model: bytes, array: NDArray) -> NDArray[np.float32]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: array})[0]

    return run


@pytest.fixture
def card(make_card: Callable[..., ModelCard]) -> ModelCard:
    """The small card as it is."""
    return make_card()


@pytest.fixture
def weights(
    card: ModelCard, random_weights: Callable[..., dict[str, NDArray[np.float32]]]
) -> dict[str, NDArray[np.float32]]:
    """Weights for it."""
    return random_weights(card)
