"""Tuning a plan: a plan of every graph, its layers' times from TensorRT's profiler, whole runs by turns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standin.plan import VERSIONS, make_plan

from rxdeploy.cache import Cache
from rxdeploy.engines.builder import Plan
from rxdeploy.engines.bundle import open_bundle
from rxdeploy.engines.options import EngineOptions
from rxdeploy.pipeline import Reporter
from rxdeploy.tuning import contest, device, retune, search


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The models that plans were built of; the simulated TensorRT has no builder."""
    models: list[bytes] = []

    def build(model: bytes, flavour: Any, options: EngineOptions, *_: Any) -> Plan:
        models.append(model)
        profiles = tuple((sizes.min, sizes.opt, sizes.max) for sizes in options.profiles)
        claims = {"flavour": flavour.name, "version": VERSIONS[flavour.module], "warnings": [], **options.as_facts()}
        return Plan(make_plan(model, flavour=flavour.module, profiles=profiles), claims)

    monkeypatch.setattr(device, "build_plan", build)
    monkeypatch.setattr(search, "contest", functools.partial(contest.contest, rounds=2))
    monkeypatch.setattr(contest, "TURN_SECONDS", 0.001)
    monkeypatch.setattr(device, "PROFILE_SECONDS", 0.001)
    return models


def test_a_plan_is_tuned_where_its_gpu_is(
    built: list[bytes], bundle_with_plan: Callable[..., Path], tmp_path: Path
) -> None:
    path = bundle_with_plan(profiles=((1, 4, 8),))
    before = open_bundle(path).manifest
    with contextlib.closing(Cache(tmp_path / "cache", 10**12)) as cache:
        bundle = retune.tune(path, None, None, cache, Reporter())
    tuning = bundle.manifest.tuning
    assert tuning is not None and tuning.tuned and tuning.batch == (1, 4) and tuning.cpu is None
    assert tuning.device == bundle.manifest.target.gpu
    assert len(built) > 3 and built[-1] == bundle.file("model.onnx").read_bytes()
    layers = tuning.report["engines"]["tensorrt"]["layers"]
    assert layers and all(str(layer["own"]) in layer["seconds"] for layer in layers.values())
    assert bundle.manifest.validation == before.validation
    assert bundle.manifest.engine is not None and bundle.manifest.engine["profiles"]
