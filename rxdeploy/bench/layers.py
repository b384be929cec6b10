"""Where the time goes: what the engine's own profiler says of its layers, and which of the model's nodes they are.

Engines fuse nodes, rename them and put layout changes between them. A layer is attributed to the convolution or
matrix product in it; what cannot be attributed has rows of its own, so that the rows always add up to the whole.

ONNX Runtime: its profile, from a second session. Its names are a node's, or the tensor's that it ends in, with marks of
what made it: ``_nchwc`` (another layout), ``InsertedPrecisionFreeCast_`` (float16 computed as float32). On a GPU it
times the enqueuing, so there the kernels that it lists beneath each node are counted, where it was built to list them.
OpenVINO: the counters of the graph that it made of the model, which say what each of its nodes was made from.
TensorRT: IProfiler's times, and the inspector's list of the nodes in each layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rxdeploy import atomic
from rxdeploy.bench.counts import KINDS, GraphCounts, NodeCount
from rxdeploy.bench.measure import timer
from rxdeploy.bench.samples import sample_images
from rxdeploy.engines import bundle as bundles
from rxdeploy.errors import EnvironmentLacks
from rxdeploy.runtime import openvino
from rxdeploy.runtime.lanes import PlanEngine
from rxdeploy.runtime.onnxrt import CPU, CUDA, OnnxEngine, open_session, run_session
from rxdeploy.runtime.openvino import NodeTime, OpenVinoEngine
from rxdeploy.runtime.session import Session

LAYOUT, SEVERAL, UNKNOWN, BETWEEN = "layout", "several kinds", "not attributed", "between layers"
ROWS: tuple[str, ...] = (*KINDS, SEVERAL, LAYOUT, UNKNOWN, BETWEEN)

_WARM_UP_RUNS = 2
_FEWEST_RUNS, _MOST_RUNS = 3, 100
_KERNEL_TIME = "_kernel_time"
# What ONNX Runtime puts between nodes, by operator, and TensorRT, by the beginning of the layer's type.
_ONNX_LAYOUT = ("ReorderInput", "ReorderOutput", "Cast", "Transpose", "MemcpyFromHost", "MemcpyToHost")
_PLAN_LAYOUT = ("Reformat", "NoOp", "Shuffle")
_OPENVINO_LAYOUT, _OPENVINO_PRODUCTS = "Reorder", ("Convolution", "FullyConnected", "MatMul")
_TOKEN = re.compile(r"_token_\d+$")
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Layer:
    """One of the engine's layers: what it is called there, seconds a run, and the model's nodes in it.

    `row` is one of ROWS; `multiply_adds` are of the whole batch.
    """

    name: str
    row: str
    seconds: float
    multiply_adds: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class LayerTimes:
    """A profile of one batch size; `total` is what a run took while profiled, in seconds, and what `layers` add up to.

    The last layer is what lies between the others: the engine's own work from one to the next.
    """

    batch: int
    runs: int
    total: float
    method: str
    layers: tuple[Layer, ...]

    def rows(self) -> dict[str, tuple[Layer, ...]]:
        """The layers of each row that has any."""
        found = {row: tuple(layer for layer in self.layers if layer.row == row) for row in ROWS}
        return {row: layers for row, layers in found.items() if layers}


def layer_times(session: Session, ordinal: int, counts: GraphCounts, batch: int, seconds: float) -> LayerTimes:
    """Profile runs of `batch` images for about `seconds`, and attribute them to the model's nodes.

    `ordinal` is the GPU's number. An engine that splits a batch over several sessions is profiled as one of them, with
    its threads and the whole batch. EnvironmentLacks where the engine tells nothing of its layers.
    """
    if isinstance(session.engine, PlanEngine):
        return _plan_times(session.engine, counts, batch, seconds)
    if isinstance(session.engine, OpenVinoEngine):
        return _openvino_times(session, session.engine, counts, batch, seconds)
    return _onnx_times(session, session.engine, ordinal, counts, batch, seconds)


def _runs(seconds: float, a_run: float) -> int:
    return max(_FEWEST_RUNS, min(_MOST_RUNS, int(seconds / max(a_run, 1e-9))))


def _summary(runs: Sequence[dict[str, float]], totals: Sequence[float]) -> tuple[dict[str, float], float]:
    """Mean seconds of each layer, and of a whole run, over the faster half of the runs."""
    faster = np.argsort(totals, kind="stable")[: max(1, len(totals) // 2)]
    names = dict.fromkeys(name for index in faster for name in runs[index])
    means = {name: float(np.mean([runs[index].get(name, 0.0) for index in faster])) for name in names}
    return means, float(np.mean([totals[index] for index in faster]))


def _faster_half(runs: Sequence[object]) -> str:
    return f"mean of the faster half of {len(runs)} runs"


@dataclass(frozen=True)
class _Part:
    """A layer before it is known whose multiply-adds are whose."""

    name: str
    row: str
    seconds: float
    nodes: tuple[NodeCount, ...]


def _closed(batch: int, runs: int, total: float, method: str, parts: Sequence[_Part]) -> LayerTimes:
    """The profile, with what the layers leave of the total as the last of them.

    A node that several layers share counts once, in the slowest.
    """
    counted: set[str] = set()
    multiply_adds: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: -part.seconds):
        multiply_adds[part.name] = sum(node.multiply_adds for node in part.nodes if node.name not in counted) * batch
        counted |= {node.name for node in part.nodes}
    layers = [
        Layer(part.name, part.row, part.seconds, multiply_adds[part.name], tuple(node.name for node in part.nodes))
        for part in parts
    ]
    layers.append(Layer(BETWEEN, BETWEEN, total - sum(layer.seconds for layer in layers), 0, ()))
    return LayerTimes(batch, runs, total, method, tuple(layers))


# ONNX Runtime


def _onnx_times(
    session: Session, engine: OnnxEngine, ordinal: int, counts: GraphCounts, batch: int, seconds: float
) -> LayerTimes:
    bundle = session.bundle
    images = sample_images(bundle.manifest, batch)
    provider = CPU if session.device == "cpu" else CUDA
    with atomic.scratch_folder("bench") as folder:
        opened = open_session(
            bundle.read(bundles.MODEL),
            provider,
            ordinal,
            profile=folder / "profile",
            settings=engine.settings,
            integers=bundle.manifest.for_integers,
        )
        feed = {bundle.manifest.inputs[0].name: images}
        timed = timer(lambda: run_session(opened, ["logits"], feed))
        count = _runs(seconds, min(timed() for _ in range(_WARM_UP_RUNS)))
        for _ in range(count):
            timed()
        events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
    runs = _onnx_runs(events, on_gpu=session.device != "cpu")[-count:]
    means, total = _summary([run.layers for run in runs], [run.seconds for run in runs])
    operators = {name: operator for run in runs for name, operator in run.operators.items()}
    kernels = ", kernels on the GPU" if session.device != "cpu" else ""
    method = f"ONNX Runtime's profile{kernels}; {_faster_half(runs)}"
    names = _OnnxNames(counts, operators)
    return _closed(batch, len(runs), total, method, [names.part(name, seconds) for name, seconds in means.items()])


@dataclass(frozen=True)
class _OnnxRun:
    """One run in ONNX Runtime's profile: seconds in all and of each node, and the nodes' operators."""

    seconds: float
    layers: dict[str, float]
    operators: dict[str, str]


def _onnx_runs(events: Sequence[dict[str, Any]], on_gpu: bool) -> list[_OnnxRun]:
    """The runs in a profile. Its times are whole microseconds.

    EnvironmentLacks when this ONNX Runtime does not list the GPU's kernels.
    """
    whole = [event for event in events if event["cat"] == "Session" and event["name"] == "model_run"]
    whole.sort(key=lambda event: event["ts"])
    timed = [event for event in events if event["cat"] == ("Kernel" if on_gpu else "Node")]
    if not timed:
        raise EnvironmentLacks("this ONNX Runtime was built without listing the GPU's kernels in its profile")
    runs = [_OnnxRun(event["dur"] / 1e6, {}, {}) for event in whole]
    starts = [event["ts"] for event in whole]
    for event in timed:
        name = event["args"].get("parent_name", event["name"]) if on_gpu else event["name"]
        if not on_gpu and not name.endswith(_KERNEL_TIME):
            continue
        index = int(np.searchsorted(starts, event["ts"], "right")) - 1
        if index < 0:
            continue
        name = name.removesuffix(_KERNEL_TIME)
        runs[index].layers[name] = runs[index].layers.get(name, 0.0) + event["dur"] / 1e6
        runs[index].operators[name] = event["args"].get("op_name", "")
    return runs


def _named_nodes(counts: GraphCounts) -> tuple[dict[str, NodeCount], dict[str, NodeCount]]:
    """The model's nodes by their own names, and by those of the tensors that they make."""
    by_name = {node.name: node for node in counts.nodes}
    return by_name, {output: node for node in counts.nodes for output in node.outputs}


class _OnnxNames:
    """Which of the model's nodes ONNX Runtime's are."""

    def __init__(self, counts: GraphCounts, operators: dict[str, str]) -> None:
        self._operators = operators
        self._by_name, self._makers = _named_nodes(counts)
        named = {name: self._named(name) for name in operators}
        self._nodes = {name: node for name, node in named.items() if node is not None}
        # First those whose name says it, then those named after what the product was fused with.
        taken = {node.name for name, node in self._nodes.items() if self._is_product(name) and node.multiply_adds}
        for name, node in self._nodes.items():
            if self._is_product(name) and not node.multiply_adds:
                product = _product_before(node, taken, self._makers)
                if product is not None:
                    self._nodes[name] = product
                    taken.add(product.name)

    def part(self, name: str, seconds: float) -> _Part:
        """What ONNX Runtime calls `name`."""
        node, operator = self._nodes.get(name), self._operators[name]
        own_cast = operator != "Cast" or (node is not None and node.op == "Cast")
        if node is not None and own_cast and self._is_product(name) == bool(node.multiply_adds):
            return _Part(name, node.kind, seconds, (node,))
        return _Part(name, LAYOUT if operator in _ONNX_LAYOUT else UNKNOWN, seconds, ())

    def _is_product(self, name: str) -> bool:
        operator = self._operators[name]
        return "Conv" in operator or "Gemm" in operator or "MatMul" in operator

    def _named(self, name: str) -> NodeCount | None:
        """The node of that name, or that makes the tensor of that name."""
        for plain in (name, _TOKEN.sub("", name)):
            plain = plain.removeprefix("InsertedPrecisionFreeCast_").removesuffix("_nchwc")
            if found := self._by_name.get(plain) or self._makers.get(plain):
                return found
        return None


def _product_before(node: NodeCount, taken: set[str], makers: dict[str, NodeCount]) -> NodeCount | None:
    """The nearest product, not taken yet, whose result `node` is made from without another product between."""
    waiting = list(node.inputs)
    while waiting:
        maker = makers.get(waiting.pop(0))
        if maker is None:
            continue
        if not maker.multiply_adds:
            waiting += maker.inputs
        elif maker.name not in taken:
            return maker
    return None


# OpenVINO


def _openvino_times(
    session: Session, engine: OpenVinoEngine, counts: GraphCounts, batch: int, seconds: float
) -> LayerTimes:
    """Its counters give the mean of all runs, in whole microseconds; those of the warm-up are taken out again."""
    bundle = session.bundle
    images = sample_images(bundle.manifest, batch)
    model = openvino.of_size(openvino.read_model(bundle.read(bundles.MODEL)), batch)
    compiled = openvino.compile_model(model, engine.settings_for(batch), profile=True)
    requests = openvino.Requests(compiled, 1)
    timed = timer(lambda: requests.run(images))
    warm = [timed() for _ in range(_WARM_UP_RUNS)]
    before = openvino.node_times(compiled)
    totals = [timed() for _ in range(_runs(seconds, min(warm)))]
    found, runs, all_runs = openvino.node_times(compiled), len(totals), len(warm) + len(totals)
    means = {name: (found[name].seconds * all_runs - before[name].seconds * len(warm)) / runs for name in found}
    nodes = openvino_nodes(found, counts)
    parts = [
        _Part(name, _openvino_row(found[name].kind, nodes[name]), round(max(seconds, 0.0), 7), nodes[name])
        for name, seconds in means.items()
        if seconds > 0 or any(node.multiply_adds for node in nodes[name])
    ]
    return _closed(batch, runs, float(np.mean(totals)), f"OpenVINO's counters; mean of {runs} runs", parts)


def openvino_nodes(found: Mapping[str, NodeTime], counts: GraphCounts) -> dict[str, tuple[NodeCount, ...]]:
    """The model's nodes in each of OpenVINO's: of a product it alone, as what was fused with it has no time of its own.

    A product may have been given the name of a node that it was fused with alone, as in ONNX Runtime.
    """
    by_name, makers = _named_nodes(counts)
    nodes: dict[str, tuple[NodeCount, ...]] = {}
    for name, node in found.items():
        sources = dict.fromkeys(_made_from(source, by_name, makers) for source in node.sources)
        known = tuple(source for source in sources if source is not None)
        nodes[name] = tuple(source for source in known if source.multiply_adds) or known
    taken = {node.name for known in nodes.values() for node in known if node.multiply_adds}
    for name, known in nodes.items():
        if found[name].kind in _OPENVINO_PRODUCTS and known and not known[0].multiply_adds:
            product = _product_before(known[0], taken, makers)
            if product is not None:
                nodes[name] = (product,)
                taken.add(product.name)
    return nodes


def _made_from(source: str, by_name: dict[str, NodeCount], makers: dict[str, NodeCount]) -> NodeCount | None:
    """The model's node that OpenVINO calls `source`: its name, or its tensor's, with marks of what became of it."""
    plain = source.removesuffix("_original")
    while plain:
        if found := by_name.get(plain) or makers.get(plain):
            return found
        plain = plain.rpartition("/")[0]  # fc/WithoutBiases/DequantizationMultiply
    return None


def _openvino_row(kind: str, nodes: Sequence[NodeCount]) -> str:
    if not nodes and kind == _OPENVINO_LAYOUT:
        return LAYOUT
    telling = [node for node in nodes if node.kind != "other"]  # not the Q/DQ nodes beside one
    return _row(telling or nodes)


# TensorRT


def _plan_times(engine: PlanEngine, counts: GraphCounts, batch: int, seconds: float) -> LayerTimes:
    first = sum(engine.layer_times(batch, 1)[0].values())
    runs = engine.layer_times(batch, _runs(seconds, first))
    means, total = _summary(runs, [sum(run.values()) for run in runs])
    nodes = plan_nodes(engine.plan.layers())
    by_name = {node.name: node for node in counts.nodes}
    parts = [_plan_part(name, seconds, nodes.get(name), by_name) for name, seconds in means.items()]
    method = f"TensorRT's profiler and inspector; {_faster_half(runs)}"
    return _closed(batch, len(runs), total, method, parts)


def plan_nodes(inspected: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each layer that TensorRT's inspector (JSON) describes: its type, and the ONNX nodes in it."""
    found = {}
    for layer in json.loads(inspected).get("Layers", []):
        if isinstance(layer, dict):  # names only, when the plan was built without details
            nodes = tuple(dict.fromkeys(_METADATA.findall(layer.get("Metadata", ""))))
            found[layer["Name"]] = layer.get("LayerType", ""), nodes
    return found


def _plan_part(
    name: str, seconds: float, described: tuple[str, tuple[str, ...]] | None, by_name: dict[str, NodeCount]
) -> _Part:
    type_, listed = described or ("", ())
    names = listed or tuple(name.split(" + "))  # as TensorRT names a fused layer
    nodes = tuple(by_name[part] for part in names if part in by_name)
    if not nodes and (type_ or name).startswith(_PLAN_LAYOUT):
        return _Part(name, LAYOUT, seconds, ())
    return _Part(name, _row(nodes), seconds, nodes)


def _row(nodes: Sequence[NodeCount]) -> str:
    """The row of a layer with these nodes in it: its products' kind, or else its nodes'."""
    kinds: set[str] = {node.kind for node in nodes if node.multiply_adds} or {node.kind for node in nodes}
    if not kinds:
        return UNKNOWN
    return kinds.pop() if len(kinds) == 1 else SEVERAL
