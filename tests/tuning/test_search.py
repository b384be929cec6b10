"""The search on a device whose times are known, so that the best graph is known too."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import pytest

from rxdeploy.cards import ModelCard
from rxdeploy.engines.bundle import CpuSettings
from rxdeploy.export.graph import build_graph
from rxdeploy.export.passes.groups import grouped
from rxdeploy.tuning import search as searching
from rxdeploy.tuning.contest import contest
from rxdeploy.tuning.search import Found, choose_widths, search
from rxdeploy.tuning.variant import Variant, apply, uniform


@pytest.fixture
def model(make_card: Callable[..., ModelCard], random_weights: Callable[..., Any]) -> ir.Model:
    """Four grouped convolutions of 8, 16, 32 and 64 channels a group."""
    card = make_card(layers=[1, 1, 1, 1], channels=[64, 128, 256, 512], cardinality=8, base_width=8)
    return build_graph(card, random_weights(card))


class Simulated:
    """A device on which layer `name` takes `cost(engine, name, channels a group)` seconds an image."""

    name = "simulated"

    def __init__(self, cost: Callable[[str, str, int], float], *engines: str) -> None:
        self._cost, self.engines = cost, engines
        self.now = 0.0
        self.slower = lambda settings: 1.0
        self.opened: list[tuple[str, dict[str, int], CpuSettings | None]] = []

    def clock(self) -> float:
        return self.now

    def facts(self) -> dict[str, Any]:
        return {"device": self.name, "versions": {}}

    @contextlib.contextmanager
    def open(self, model: bytes, engine: str, settings: CpuSettings | None = None) -> Iterator[Any]:
        found = grouped(_parsed(model))
        widths = {
            name: own.channels // groups for (name, own), groups in zip(found.items(), _groups(model), strict=True)
        }
        self.opened.append((engine, widths, settings))
        times = {name: self._cost(engine, name, width) for name, width in widths.items()}
        device = self

        class Opened:
            def run(self, batch: int) -> None:
                device.now += (1e-3 + sum(times.values())) * batch * device.slower(settings)

            def layers(self, batch: int) -> dict[str, float]:
                return {name: each * batch for name, each in times.items()}

        yield Opened()


def _parsed(model: bytes) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(model))


def _groups(model: bytes) -> list[int]:
    import onnx

    nodes = onnx.load_from_string(model).graph.node
    names = set(grouped(_parsed(model)))
    return [next((a.i for a in node.attribute if a.name == "group"), 1) for node in nodes if node.name in names]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, model: ir.Model) -> Callable[..., Found]:
    def run(device: Simulated, batches: tuple[int, ...] = (1, 8), untuned: Variant | None = None) -> Found:
        monkeypatch.setattr(searching, "contest", functools.partial(contest, clock=device.clock))
        monkeypatch.setattr(searching, "cores", lambda: 2)
        return search(model, device, batches, lambda text: None, untuned)

    return run


def test_every_layer_gets_its_own_fastest_width(run: Callable[..., Found], model: ir.Model) -> None:
    layers = list(grouped(model))
    assert [own.width for own in grouped(model).values()] == [8, 16, 32, 64]
    best = dict(zip(layers, (32, 16, 64, 512), strict=True))
    found = run(Simulated(lambda engine, name, width: 0.01 if width == best[name] else 0.02, "tensorrt"))
    assert dict(found.variant.groups) == {layers[0]: 32, layers[2]: 64, layers[3]: 512}
    assert found.settings is None and found.engine == "tensorrt"
    assert found.report["whole"]["median"] == pytest.approx((1e-3 + 4 * 0.01) / (1e-3 + 0.01 + 3 * 0.02))
    seconds = found.report["engines"]["tensorrt"]["layers"][layers[1]]["seconds"]
    assert seconds["16"] == pytest.approx([0.01, 0.08]) and seconds["32"] == pytest.approx([0.02, 0.16])


def test_ties_go_to_the_smaller_model(run: Callable[..., Found]) -> None:
    assert not run(Simulated(lambda engine, name, width: 0.01 - 2e-7 * width, "tensorrt")).variant


def test_of_graphs_as_fast_the_smaller(run: Callable[..., Found], model: ir.Model) -> None:
    """The first layer alone gains enough; that the second is wide too makes the whole faster by half a per cent."""
    first, second, *_ = grouped(model)
    times = {(first, 8): 0.02, (first, 16): 0.015, (second, 16): 0.0102, (second, 32): 0.01}
    found = run(Simulated(lambda engine, name, width: times.get((name, width), 0.01), "tensorrt"))
    assert dict(found.variant.groups) == {first: 32}
    steps = {step["what"]: step for step in found.report["engines"]["tensorrt"]["steps"]}
    whole = {what: step["seconds_over_before"]["median"] for what, step in steps.items()}
    assert whole["32 channels in every group"] < whole["each layer's fastest width"] < 0.9
    assert [what for what, step in steps.items() if step["kept"]] == ["each layer's fastest width"]


def test_the_gain_is_over_what_there_would_be_untuned(run: Callable[..., Found], model: ir.Model) -> None:
    first = next(iter(grouped(model)))
    best = {8: 0.05, 16: 0.03, 32: 0.02}
    device = Simulated(lambda engine, name, width: best.get(width, 0.02) if name == first else 0.01, "tensorrt")
    found = run(device, untuned=Variant({first: 16}))
    assert dict(found.variant.groups) == {first: 32} and found.report["whole"]["kept"]
    assert found.report["whole"]["median"] == pytest.approx((0.031 + 0.02) / (0.031 + 0.03))


def test_what_is_no_faster_in_the_end_is_not_taken(
    run: Callable[..., Found], model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that other work disturbed all the while until then."""
    first = next(iter(grouped(model)))
    untuned = Variant({first: 16})
    device = Simulated(lambda engine, name, width: 0.01, "onnxruntime", "openvino")
    device.slower = lambda settings: 0.9 if settings and settings.engine == "openvino" else 1.0
    real = searching._compare

    def disturbed(model: ir.Model, device: Any, batches: Any, ways: Any) -> Any:
        found = real(model, device, batches, ways)
        return {**found, "tuned": dataclasses.replace(found["tuned"], median=1.04)} if "tuned" in ways else found

    monkeypatch.setattr(searching, "_compare", disturbed)
    found = run(device, untuned=untuned)
    assert found.variant == untuned and found.settings == CpuSettings(engine="onnxruntime")
    assert found.engine == "onnxruntime" and not found.report["whole"]["kept"]


def test_a_graph_that_is_slower_as_a_whole_is_not_taken(
    run: Callable[..., Found], model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers measured one way, the whole another: only the whole counts."""
    own = {name: each.width for name, each in grouped(model).items()}
    device = Simulated(lambda engine, name, width: 0.02 if width == own[name] else 0.01, "tensorrt")
    real = device.open

    @contextlib.contextmanager
    def opening(model: bytes, engine: str, settings: Any = None) -> Iterator[Any]:
        with real(model, engine, settings) as opened:
            packed = device.opened[-1][1] != own

            def run(batch: int) -> None:
                device.now += batch * (0.2 if packed else 0.1)

            opened.run = run
            yield opened

    monkeypatch.setattr(device, "open", opening)
    found = run(device)
    assert not found.variant and not any(step["kept"] for step in found.report["engines"]["tensorrt"]["steps"])


def test_the_faster_engine_with_its_own_widths(run: Callable[..., Found], model: ir.Model) -> None:
    layers = list(grouped(model))
    enough, factor = {"onnxruntime": 64, "openvino": 32}, {"onnxruntime": 1.0, "openvino": 0.9}
    device = Simulated(
        lambda engine, name, width: factor[engine] * (0.01 if width >= enough[engine] else 0.02),
        "onnxruntime",
        "openvino",
    )
    found = run(device)
    assert found.engine == "openvino" and found.settings == CpuSettings(engine="openvino")
    assert dict(found.variant.groups) == dict.fromkeys(layers[:2], 32)
    chosen = {name: layer["chosen"] for name, layer in found.report["engines"]["onnxruntime"]["layers"].items()}
    assert list(chosen.values()) == [64, 64, 64, 64]
    assert {engine for engine, _, _ in device.opened} == {"onnxruntime", "openvino"}


def test_settings_are_taken_where_they_gain(run: Callable[..., Found]) -> None:
    device = Simulated(lambda engine, name, width: 0.01, "onnxruntime")
    device.slower = lambda settings: (
        (0.8 if settings and not settings.spinning else 1.0)
        * (
            0.995 if settings and settings.denormals_as_zero else 1.0  # not worth it
        )
    )
    assert run(device).settings == CpuSettings(spinning=False)


def test_large_batches_are_split_where_only_they_gain(
    run: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "cores", lambda: 2)
    device = Simulated(lambda engine, name, width: 0.01, "openvino")

    def slower(settings: CpuSettings | None) -> float:
        split = settings is not None and settings.sessions > 1
        # Split, small batches take twice as long, and there would be none.
        return 1.0 if not split else 0.95 if settings.split_from else 2.0  # type: ignore[union-attr]

    device.slower = slower
    found = run(device)
    assert found.settings == CpuSettings(engine="openvino", threads=1, sessions=2, split_from=8)
    steps = {step["what"]: step["seconds_over_before"]["median"] for step in found.report["settings"]}
    assert steps["batches of 8 or more split over one-threaded sessions"] == pytest.approx(0.95)


def test_widths_by_hand(model: ir.Model) -> None:
    layers = grouped(model)
    first, second, *_ = layers
    times = {
        0: {first: [1.0, 8.0], second: [1.0, 8.0]},
        16: {first: [0.5, 9.0], second: [0.99, 7.95]},  # geometric mean: 0.75; within the tie
        32: {first: [0.5, 8.9], second: [0.985, 7.9]},  # as good as 16, and wider; 0.97 of it
    }
    assert choose_widths(layers, times) == {first: 16}


def test_a_variant_packs_and_names_what_differs(model: ir.Model) -> None:
    layers = grouped(model)
    for channels in (1, 8):
        assert uniform(layers, channels) == {}
    wide = uniform(layers, 32)
    assert wide == dict.fromkeys(list(layers)[:2], 32)
    packed = apply(model, Variant(wide))
    assert {name: own.groups for name, own in grouped(packed).items()} == {n: o.groups for n, o in layers.items()}
    groups = {node.name: node.attributes["group"].as_int() for node in packed.graph if node.name in layers}
    assert groups == {name: own.channels // max(32, own.width) for name, own in layers.items()}
    assert not Variant() and Variant(wide)


def test_all_widths_that_pay_their_work_are_timed(run: Callable[..., Found], model: ir.Model) -> None:
    device = Simulated(lambda engine, name, width: 0.01, "tensorrt")
    run(device)
    seen = {width for _, widths, _ in device.opened for width in widths.values()}
    assert seen == set(itertools.chain.from_iterable(own.widths for own in grouped(model).values()))
