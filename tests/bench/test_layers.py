"""Layers' times: real profiles of ONNX Runtime and OpenVINO on real models, and what TensorRT and a GPU would tell."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rxdeploy.bench import layers as profiling
from rxdeploy.bench.counts import GraphCounts, count
from rxdeploy.bench.layers import LayerTimes, layer_times, openvino_nodes, plan_nodes
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import CpuSettings
from rxdeploy.errors import EnvironmentLacks
from rxdeploy.runtime.cpu import open_cpu_engine
from rxdeploy.runtime.openvino import NodeTime
from rxdeploy.runtime.session import load

pytest.importorskip("onnx", reason="counting reads the model with onnx")
pytest.importorskip("onnxruntime", reason="its profile is read")
Bundles = Callable[..., Path]
BATCH = 3
NO_OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
ENGINES = ["onnxruntime", pytest.param("openvino", marks=NO_OPENVINO)]


def profile(path: Path, engine: str = "onnxruntime") -> tuple[GraphCounts, LayerTimes]:
    with load(path, engine) as session:
        counts = count(session.bundle.file(bundles.MODEL))
        return counts, layer_times(session, 0, counts, BATCH, seconds=0.02)


# Channel counts of which ONNX Runtime brings most convolutions into its blocked layout, and others.
@pytest.mark.parametrize("channels", [{}, {"channels": [8, 24, 40], "stem_width": 8, "cardinality": 2}])
@pytest.mark.parametrize("guise", [("fp32", "uint8"), ("fp16", "uint8"), ("fp32", "float32"), ("fp16", "float32")])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_product_is_found_once(
    bundle: Bundles, guise: tuple[str, str], channels: dict[str, Any], engine: str
) -> None:
    counts, times = profile(bundle(*guise, **channels), engine)
    products = {node.name: node for node in counts.nodes if node.multiply_adds}
    found = [(name, layer) for layer in times.layers for name in layer.nodes if name in products]
    assert sorted(name for name, _ in found) == sorted(products)
    for name, layer in found:
        assert layer.row == products[name].kind
        assert layer.multiply_adds == BATCH * products[name].multiply_adds
    assert sum(layer.multiply_adds for layer in times.layers) == BATCH * counts.multiply_adds


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_add_up_and_nothing_is_left_over(bundle: Bundles, precision: str, engine: str) -> None:
    _, times = profile(bundle(precision), engine)
    rows = times.rows()
    assert sum(layer.seconds for layers in rows.values() for layer in layers) == pytest.approx(times.total)
    assert len(times.layers) == sum(map(len, rows.values()))
    assert set(rows) >= {"stem", "1x1", "grouped 3x3", "downsample", "head", "between layers"}
    if engine == "onnxruntime":  # of what takes less than a microsecond OpenVINO tells nothing
        assert set(rows) >= {"preprocessing", "pooling"}
    assert "not attributed" not in rows and "several kinds" not in rows
    assert len(rows["1x1"]) == 8 and len(rows["grouped 3x3"]) == 4 and len(rows["downsample"]) == 3
    assert all(layer.seconds >= 0 for layer in times.layers)
    assert times.runs >= 3 and times.batch == BATCH


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_settings_are_profiled(bundle: Bundles, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CpuSettings] = []
    for module, name in ((profiling, "open_session"), (profiling.openvino, "compile_model")):
        real = getattr(module, name)

        def opened(*arguments: Any, real: Any = real, **more: Any) -> Any:
            seen.append(more["settings"] if "settings" in more else arguments[1])
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, opened)
    settings = CpuSettings(engine=engine, threads=1, sessions=2, denormals_as_zero=True)  # type: ignore[arg-type]
    with load(bundle(), "cpu") as session:
        monkeypatch.setattr(session, "engine", open_cpu_engine(session.bundle, settings))
        seen.clear()
        times = layer_times(session, 0, count(session.bundle.file(bundles.MODEL)), 4, seconds=0.01)
    assert seen == [settings]
    assert times.batch == 4 and times.method.endswith(f"{times.runs} runs")


def test_casts_that_onnx_runtime_inserts_are_layout(bundle: Bundles) -> None:
    """float16 is computed in float32 on a CPU without its own kernels; the model's own casts stay what they are."""
    _, times = profile(bundle("fp16"))
    for layer in times.layers:
        if layer.row == "layout":
            assert not layer.nodes
    named = {name: layer.row for layer in times.layers for name in layer.nodes}
    assert named["image.float"] == "preprocessing" and named["logits.float"] == "other"


# A profile written by hand: two runs of 100 and 60 microseconds; conv1 and its activation are one node, a layout
# change has no name, and "mystery" is none of the model's nodes.
def event(name: str, start: int, microseconds: int, operator: str = "", category: str = "Node", **more: Any) -> dict:
    return {"cat": category, "name": name, "ts": start, "dur": microseconds, "args": {"op_name": operator, **more}}


PROFILE = [
    event("session_initialization", 0, 500, category="Session"),
    event("model_run", 1000, 100, category="Session"),
    event("conv1_kernel_time", 1005, 50, "FusedConv"),
    event("ReorderOutput_token_7_kernel_time", 1060, 10, "ReorderOutput"),
    event("mystery_kernel_time", 1070, 20, "FancyOp"),
    event("conv1_fence_before", 1004, 1, "FusedConv"),
    event("model_run", 2000, 60, category="Session"),
    event("conv1_fence_before", 2004, 1, "FusedConv"),
    event("conv1_kernel_time", 2005, 30, "FusedConv"),
    event("ReorderOutput_token_7_kernel_time", 2040, 6, "ReorderOutput"),
    event("mystery_kernel_time", 2050, 4, "FancyOp"),
]


def attributed(counts: GraphCounts, events: list[dict], on_gpu: bool = False) -> LayerTimes:
    runs = profiling._onnx_runs(events, on_gpu)
    means, total = profiling._summary([run.layers for run in runs], [run.seconds for run in runs])
    names = profiling._OnnxNames(counts, {name: op for run in runs for name, op in run.operators.items()})
    return profiling._closed(1, len(runs), total, "", [names.part(name, s) for name, s in means.items()])


@pytest.fixture
def counts(model: Callable[..., Any], tmp_path: Path) -> GraphCounts:
    path = tmp_path / "model.onnx"
    path.write_bytes(model()[1])
    return count(path)


def test_a_profile_on_paper(counts: GraphCounts) -> None:
    """Of two runs the faster half is one."""
    times = attributed(counts, PROFILE)
    assert times.total == pytest.approx(60e-6)
    assert {layer.row: (layer.name, round(layer.seconds * 1e6)) for layer in times.layers} == {
        "stem": ("conv1", 30),
        "layout": ("ReorderOutput_token_7", 6),
        "not attributed": ("mystery", 4),
        "between layers": ("between layers", 20),
    }


def test_the_faster_half_of_the_runs_counts() -> None:
    runs = [{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"a": 5.0, "b": 4.0}, {"a": 90.0, "b": 90.0}]
    means, total = profiling._summary(runs, [10.0, 20.0, 30.0, 400.0])
    assert means == {"a": 2.0, "b": 1.0} and total == 15.0


def test_on_a_gpu_the_kernels_count_and_not_their_enqueuing(counts: GraphCounts) -> None:
    kernels = [
        event("sgemm_1", 1010, 7, "Conv", "Kernel", parent_name="conv1_kernel_time", stream="7"),
        event("sgemm_2", 1020, 8, "Conv", "Kernel", parent_name="conv1_kernel_time", stream="7"),
        event("memset", 1030, 2, "", "Kernel"),
    ]
    times = attributed(counts, PROFILE[:6] + kernels, on_gpu=True)
    assert [(layer.row, round(layer.seconds * 1e6)) for layer in times.layers] == [
        ("stem", 15),
        ("not attributed", 2),
        ("between layers", 83),
    ]
    with pytest.raises(EnvironmentLacks, match="without listing the GPU's kernels"):
        attributed(counts, PROFILE, on_gpu=True)


@pytest.mark.parametrize(
    ("other", "own", "fused"),
    [
        ("layer1.0.downsample.1_nchwc", "layer1.0.downsample.0", "layer1.0.conv3"),
        ("layer1.0.bn3_nchwc", "layer1.0.conv3", "layer1.0.downsample.0"),
    ],
)
def test_a_sum_fused_into_its_convolution_is_not_taken_for_the_other_one(
    counts: GraphCounts, other: str, own: str, fused: str
) -> None:
    """Both convolutions before an Add end in it; the one that has a layer of its own is not meant."""
    found = profiling._OnnxNames(counts, {"layer1.0_nchwc": "Conv", other: "Conv"})
    assert found.part("layer1.0_nchwc", 1.0).nodes[0].name == fused
    assert found.part(other, 1.0).nodes[0].name == own


def test_names_that_say_too_much(counts: GraphCounts) -> None:
    """A cast that ONNX Runtime puts before a node is not that node; a product that none can be found for is none."""
    operators = {"InsertedPrecisionFreeCast_maxpool": "Cast", "image.float": "Cast", "image.nchw_nchwc": "Conv"}
    found = profiling._OnnxNames(counts, operators)
    assert found.part("InsertedPrecisionFreeCast_maxpool", 1.0).row == "layout"
    assert found.part("image.float", 1.0).row == "preprocessing"
    assert found.part("image.nchw_nchwc", 1.0).row == "not attributed"


# OpenVINO


def test_what_openvino_made_of_a_model(counts: GraphCounts) -> None:
    """A product by its own name, by its tensor's, with OpenVINO's marks, or under the name of what follows it."""
    made = {
        "conv1/WithoutBiases": ("Convolution", "conv1/WithoutBiases", "Multiply_12", "conv1", "stem.relu"),
        "maxpool": ("Pooling", "maxpool"),
        "downsample": ("Convolution", "layer1.0.downsample.1_original"),
        "logits": ("FullyConnected", "fc/WithoutBiases/DequantizationMultiply"),
        "layer1.0": ("Convolution", "layer1.0"),
        "image.nchw_original": ("Transpose", "image.nchw_original"),
        "a_b_c": ("Reorder",),
        "Broadcast_7": ("Broadcast", "Broadcast_7"),
    }
    found = {name: NodeTime(kind, sources, 1e-3) for name, (kind, *sources) in made.items()}
    nodes = openvino_nodes(found, counts)
    assert {name: [node.name for node in known] for name, known in nodes.items()} == {
        "conv1/WithoutBiases": ["conv1"],
        "maxpool": ["maxpool"],
        "downsample": ["layer1.0.downsample.0"],
        "logits": ["fc"],
        "layer1.0": ["layer1.0.conv3"],
        "image.nchw_original": ["image.nchw"],
        "a_b_c": [],
        "Broadcast_7": [],
    }
    rows = {name: profiling._openvino_row(found[name].kind, nodes[name]) for name in found}
    assert rows == {
        "conv1/WithoutBiases": "stem",
        "maxpool": "pooling",
        "downsample": "downsample",
        "logits": "head",
        "layer1.0": "1x1",
        "image.nchw_original": "preprocessing",
        "a_b_c": "layout",
        "Broadcast_7": "not attributed",
    }


@NO_OPENVINO
def test_openvinos_warm_up_is_taken_out_again(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counters are means of all runs: 90 after 2 that were slow, 20 after 12; so 6 without those."""
    calls = iter([90e-6, 20e-6])
    monkeypatch.setattr(
        profiling.openvino, "node_times", lambda compiled: {"conv1": NodeTime("Convolution", ("conv1",), next(calls))}
    )
    monkeypatch.setattr(profiling, "_runs", lambda seconds, a_run: 10)
    _, times = profile(bundle(), "openvino")
    assert times.runs == 10 and times.layers[0].seconds == pytest.approx((20e-6 * 12 - 90e-6 * 2) / 10)


# TensorRT


INSPECTED = json.dumps(
    {
        "Layers": [
            {"Name": "a", "LayerType": "Reformat", "Metadata": ""},
            {
                "Name": "b",
                "LayerType": "CaskConvolution",
                "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: stem.relu]\x1e[ONNX Layer: conv1]",
            },
            {"Name": "c", "LayerType": "kgen", "Metadata": "[ONNX Layer: layer1.0.conv1]\x1e[ONNX Layer: fc]"},
            {"Name": "d", "LayerType": "kgen"},
        ],
        "Bindings": ["image", "logits"],
    }
)


def test_what_the_inspector_tells() -> None:
    assert plan_nodes(INSPECTED) == {
        "a": ("Reformat", ()),
        "b": ("CaskConvolution", ("conv1", "stem.relu")),
        "c": ("kgen", ("layer1.0.conv1", "fc")),
        "d": ("kgen", ()),
    }
    assert plan_nodes(json.dumps({"Layers": ["only", "names"]})) == {}


class Engine:
    """As PlanEngine tells of itself; a third layer name is one that TensorRT makes by joining."""

    class plan:
        @staticmethod
        def layers() -> str:
            return INSPECTED

    def layer_times(self, images: int, runs: int) -> list[dict[str, float]]:
        one = {"a": 1e-3, "b": 4e-3, "c": 2e-3, "d": 0.5e-3, "layer1.0.conv2 + layer1.0.conv2.relu": 3e-3, "fc": 5e-3}
        return [one] * runs


def test_a_plans_layers_on_paper(counts: GraphCounts) -> None:
    times = profiling._plan_times(Engine(), counts, 2, seconds=1.0)  # type: ignore[arg-type]
    rows = {row: [layer.name for layer in layers] for row, layers in times.rows().items()}
    assert rows == {
        "stem": ["b"],
        "grouped 3x3": ["layer1.0.conv2 + layer1.0.conv2.relu"],
        "head": ["fc"],
        "several kinds": ["c"],
        "layout": ["a"],
        "not attributed": ["d"],
        "between layers": ["between layers"],
    }
    assert times.total == pytest.approx(15.5e-3) and times.layers[-1].seconds == pytest.approx(0)
    by_name = {node.name: node.multiply_adds for node in counts.nodes}
    adds = {layer.name: layer.multiply_adds for layer in times.layers}
    assert adds["b"] == 2 * by_name["conv1"]
    # fc stands in two layers and counts in the slower one.
    assert adds["fc"] == 2 * by_name["fc"] and adds["c"] == 2 * by_name["layer1.0.conv1"]
    assert times.runs == 64  # a second's worth of 15.5 ms
