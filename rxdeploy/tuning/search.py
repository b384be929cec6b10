"""The search: a width for every grouped convolution, passes, an engine and its settings, each kept only where it gains.

For every width that packing can give, the whole graph is packed to it and profiled, so each layer is timed where it
will run, with its neighbours' layouts and caches; the fastest width of every layer makes one graph. That, and
everything after it, is then judged by whole runs, by turns with what it would replace (contest.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import onnx_ir as ir

from rxdeploy.bench.machine import cores
from rxdeploy.engines.bundle import CpuSettings
from rxdeploy.export.graph import serialise
from rxdeploy.export.passes import PASSES
from rxdeploy.export.passes.groups import Grouped, grouped
from rxdeploy.runtime.cpu import ENGINES
from rxdeploy.tuning.contest import Ratio, Run, contest
from rxdeploy.tuning.device import Device
from rxdeploy.tuning.variant import Variant, apply, uniform

WORTH = 0.01  # a smaller gain is a tie, which the smaller model or the plainer setting wins
TIE = 0.03  # of a single layer's time, which is told less exactly
MOST_WORK = 16  # times a layer's own multiply-adds: wider groups are not tried

Say = Callable[[str], None]
Times = Mapping[int, Mapping[str, Sequence[float]]]  # by width, then layer: seconds for each batch size


@dataclass(frozen=True)
class Found:
    """The fastest graph, the engine it is for, and how the search went."""

    variant: Variant
    engine: str
    settings: CpuSettings | None
    report: dict[str, Any]


def search(model: ir.Model, device: Device, batches: Sequence[int], say: Say, untuned: Variant | None = None) -> Found:
    """The fastest of the graphs that compute what `model` computes, for batches of these sizes together.

    `untuned` is what would be deployed without a search, on the first engine, and stays where nothing found is faster.
    """
    tried = {engine: _Search(model, device, engine, batches, say).run() for engine in device.engines}
    first = device.engines[0]
    ways = {engine: (found.variant, None) for engine, found in tried.items()}
    steps: list[dict[str, Any]] = []
    best = first
    if len(ways) > 1:
        say("comparing engines")
        ratios = _compare(model, device, batches, {name: (*way, name) for name, way in ways.items()})
        best = min(ratios, key=lambda name: ratios[name].median)
        best = best if ratios[best].faster(WORTH) else first
        steps = [_step(name, ratio, name == best) for name, ratio in ratios.items()]
    settings, setting_steps = _settings(model, device, best, tried[best].variant, batches, say)
    say("measuring the whole gain")
    untuned = untuned or Variant()
    whole = _compare(
        model,
        device,
        batches,
        {"untuned": (untuned, None, first), "tuned": (tried[best].variant, settings, best)},
    )["tuned"]
    kept = whole.median < 1
    report = {
        "engines": {engine: found.report for engine, found in tried.items()},
        "engine": steps,
        "settings": setting_steps,
        "whole": {**whole.as_facts(), "kept": kept},
    }
    if not kept:
        plain = CpuSettings(engine=first) if first in ENGINES else None
        return Found(untuned, first, plain, report)
    return Found(tried[best].variant, best, settings, report)


def _compare(
    model: ir.Model,
    device: Device,
    batches: Sequence[int],
    ways: Mapping[str, tuple[Variant, CpuSettings | None, str]],
) -> dict[str, Ratio]:
    """Graphs, settings and engines against each other."""
    runs: dict[str, Run] = {}
    with ExitStack() as held:
        for name, (variant, settings, engine) in ways.items():
            graph = serialise(apply(model, variant))
            runs[name] = held.enter_context(device.open(graph, engine, settings)).run
            del graph  # of the largest model a third of a gigabyte
        return contest(runs, batches)


class _Search:
    """The search on one engine."""

    def __init__(self, model: ir.Model, device: Device, engine: str, batches: Sequence[int], say: Say) -> None:
        self._model, self._device, self._engine, self._batches, self._say = model, device, engine, batches, say
        self._layers = grouped(model)
        self._steps: list[dict[str, Any]] = []

    def run(self) -> Found:
        times = {width: self._profile(width) for width in self._widths()}
        chosen = choose_widths(self._layers, times)
        variant = self._better(Variant(), self._candidates(chosen, times))
        for name in PASSES:
            self._say(f"{self._engine}: trying the pass {name}")
            with_it = replace(variant, passes=(*variant.passes, name))
            if self._changes(variant, with_it):
                variant = self._better(variant, {name: with_it})
        report = {"layers": self._table(times, variant), "steps": self._steps}
        return Found(variant, self._engine, None, report)

    def _widths(self) -> list[int]:
        """0 stands for the model's own groups."""
        wider = {width for own in self._layers.values() for width in own.widths if _is_tried(own, width)}
        return [0, *sorted(wider)]

    def _profile(self, width: int) -> dict[str, list[float]]:
        """Seconds of the layers that have `width` channels a group in a graph packed to it, for each batch size."""
        self._say(f"{self._engine}: timing groups of {width} channels" if width else f"{self._engine}: timing")
        groups = self._uniform(width)
        model = serialise(apply(self._model, Variant(groups)))
        with self._device.open(model, self._engine) as opened:
            found = [opened.layers(batch) for batch in self._batches]
        names = [name for name in self._layers if groups.get(name, 0) == width and all(name in each for each in found)]
        return {name: [each[name] for each in found] for name in names}

    def _uniform(self, width: int) -> dict[str, int]:
        """The groups of a graph packed to `width`, as far as that is tried."""
        found = uniform(self._layers, width)
        return {name: each for name, each in found.items() if _is_tried(self._layers[name], each)}

    def _candidates(self, chosen: dict[str, int], times: Times) -> dict[str, Variant]:
        """The graph of the fastest layers, and the uniform one that their times promise most of."""
        found = {"each layer's fastest width": Variant(chosen)}
        widths = [width for width in times if width and times[width]]
        if widths:
            best = min(widths, key=lambda width: _promised(self._layers, times, width))
            found[f"{best} channels in every group"] = Variant(self._uniform(best))
        return {name: variant for name, variant in found.items() if variant.groups}

    def _better(self, now: Variant, others: dict[str, Variant]) -> Variant:
        """The fastest of them, the smallest of those as fast; `now` unless another is faster beyond doubt."""
        others = {name: other for name, other in others.items() if other != now}
        if not others:
            return now
        self._say(f"{self._engine}: comparing {', '.join(others)}")
        ways = {"now": now, **others}
        whole = {name: (variant, None, self._engine) for name, variant in ways.items()}
        ratios = _compare(self._model, self._device, self._batches, whole)
        faster = [name for name in others if ratios[name].faster(WORTH)]
        least = min((ratios[name].median for name in faster), default=1.0)
        as_fast = [name for name in faster if ratios[name].median * (1 - WORTH) <= least]
        best = min(as_fast, key=lambda name: _numbers(self._layers, others[name]), default="now")
        self._steps += [_step(name, ratios[name], name == best) for name in others]
        return ways[best]

    def _changes(self, before: Variant, after: Variant) -> bool:
        return serialise(apply(self._model, before)) != serialise(apply(self._model, after))

    def _table(self, times: Times, variant: Variant) -> dict[str, Any]:
        return {
            name: {
                "own": own.width,
                "chosen": variant.groups.get(name, own.width),
                "seconds": {str(width or own.width): times[width][name] for width in times if name in times[width]},
            }
            for name, own in self._layers.items()
        }


def _is_tried(own: Grouped, width: int) -> bool:
    return own.width < width <= MOST_WORK * own.width


def choose_widths(layers: Mapping[str, Grouped], times: Times) -> dict[str, int]:
    """The channels a group of each layer that is faster packed; of those as good as the fastest, the narrowest."""
    chosen: dict[str, int] = {}
    for name in layers:
        logs = {width: _mean_log(times[width][name]) for width in times if name in times[width]}
        if not logs or 0 not in logs:
            continue
        good = min(logs.values()) + math.log1p(TIE)
        if best := min(width for width, log in logs.items() if log <= good):
            chosen[name] = best
    return chosen


def _mean_log(seconds: Sequence[float]) -> float:
    return sum(math.log(max(each, 1e-9)) for each in seconds) / len(seconds)


def _promised(layers: Mapping[str, Grouped], times: Times, width: int) -> float:
    """Seconds of all grouped layers when each has up to `width` channels a group, over all batch sizes."""
    total = 0.0
    for name in layers:
        of = max((each for each in times if each <= width and name in times[each]), default=None)
        total += sum(times[of][name]) if of is not None else 0.0
    return total


def _numbers(layers: Mapping[str, Grouped], variant: Variant) -> int:
    """How large the weights of the grouped layers are, up to a factor."""
    return sum(own.channels * variant.groups.get(name, own.width) for name, own in layers.items())


def _step(what: str, ratio: Ratio, kept: bool) -> dict[str, Any]:
    return {"what": what, "kept": kept, "seconds_over_before": ratio.as_facts()}


def _settings(
    model: ir.Model, device: Device, engine: str, variant: Variant, batches: Sequence[int], say: Say
) -> tuple[CpuSettings | None, list[dict[str, Any]]]:
    """An engine's settings, changed one after the other where that is faster; None for an engine that has none."""
    if engine not in ENGINES:
        return None, []
    now, steps = CpuSettings(engine=engine), []
    for what, changes in _alternatives(engine, batches):
        other = msgspec.structs.replace(now, **changes)
        split_from = changes.get("split_from", 0)
        if split_from and now.sessions > 1:
            continue  # so are smaller ones already
        say(f"{engine}: trying {what}")
        ways = {"now": (variant, now, engine), what: (variant, other, engine)}
        ratio = _compare(model, device, [batch for batch in batches if batch >= split_from], ways)[what]
        kept = ratio.faster(WORTH)
        now = other if kept else now
        steps.append(_step(what, ratio, kept))
    return now, steps


def _alternatives(engine: str, batches: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
    many = cores()
    found: list[tuple[str, dict[str, Any]]] = []
    if many > 1:
        found.append(("a batch split over one-threaded sessions", {"sessions": many, "threads": 1}))
        if engine == "openvino":
            found += [
                (
                    f"batches of {batch} or more split over one-threaded sessions",
                    {"sessions": many, "threads": 1, "split_from": batch},
                )
                for batch in sorted(batches)[1:]
            ]
        found.append(("one thread less than cores", {"threads": many - 1, "sessions": 1, "split_from": 0}))
    if engine == "onnxruntime":
        found += [("threads that sleep instead of spinning", {"spinning": False}), ("no arena", {"arena": False})]
    return [*found, ("denormals as zero", {"denormals_as_zero": True})]
