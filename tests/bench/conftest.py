"""Small real bundles, and limits that are measured in no time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rxdeploy.cards import ModelCard
from rxdeploy.engines import bundle as bundles

Bundles = Callable[..., Path]


@pytest.fixture
def model(make_card: Callable[..., ModelCard], random_weights: Callable[..., Any]) -> Callable[..., tuple[Any, bytes]]:
    """model(precision, input_kind, **card): a small card and its ONNX model with random weights."""
    for module in ("torch", "onnx", "onnx_ir"):
        pytest.importorskip(module, reason=f"building a model needs {module}")

    def build(precision: str = "fp32", input_kind: str = "uint8", **changes: Any) -> tuple[ModelCard, bytes]:
        from rxdeploy.export.float16 import to_float16
        from rxdeploy.export.graph import build_graph, serialise

        card = make_card(**changes)
        graph = build_graph(card, random_weights(card), input_kind)  # type: ignore[arg-type]
        return card, serialise(to_float16(graph)[0] if precision == "fp16" else graph)

    return build


@pytest.fixture
def bundle(model: Callable[..., tuple[ModelCard, bytes]], tmp_path: Path) -> Bundles:
    """bundle(precision, input_kind, **card): a bundle of it, without a plan, as the pipeline writes one."""

    def build(precision: Any = "fp32", input_kind: str = "uint8", **changes: Any) -> Path:
        from rxdeploy.export.architecture import count_multiply_adds, count_parameters, resnext

        card, onnx = model(precision, input_kind, **changes)
        size, classes = card.input.image_size, card.architecture.num_classes
        tensors = {
            "uint8": bundles.Tensor(name="image", dtype="uint8", layout="NHWC", shape=(None, size, size, 3)),
            "float32": bundles.Tensor(name="input", dtype="float32", layout="NCHW", shape=(None, 3, size, size)),
        }
        network = resnext(card)
        manifest = bundles.Manifest(
            schema=bundles.SCHEMA,
            model=card.name,
            precision=precision,
            target=bundles.TargetFacts(name="onnxruntime", version=None, reason="a test", gpu=None),
            weights=bundles.WeightsOrigin(kind="synthetic", source="synthetic:0", sha256=None),
            card=bundles.card_facts(card),
            counts=bundles.Counts(parameters=count_parameters(network), multiply_adds=count_multiply_adds(network)),
            preprocessing=card.input,
            normalisation_in_graph=input_kind == "uint8",
            num_classes=classes,
            inputs=(tensors[input_kind],),
            outputs=(bundles.Tensor(name="logits", dtype="float32", layout="NC", shape=(None, classes)),),
            validation={"providers": {}},
            engine=None,
            tools={},
            command=("rxdeploy", "build", card.name),
            files={},
        )
        destination = tmp_path / f"bundle-{precision}-{input_kind}"
        return bundles.write_bundle(destination, manifest, {bundles.MODEL: onnx}, overwrite=True).path

    return build


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes milliseconds: small products and copies, short windows."""
    from rxdeploy.bench import measure, peaks

    monkeypatch.setattr(peaks, "_SIDE_CPU", 32)
    monkeypatch.setattr(peaks, "_COPY_CPU", 1 << 16)
    monkeypatch.setattr(peaks, "_cache_bytes", lambda: 0)
    for name, seconds in (("SHORTEST_SEARCH", 0.001), ("LONGEST_SEARCH", 0.01), ("WINDOW_SECONDS", 0.001)):
        monkeypatch.setattr(measure, name, seconds)
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.05)
