"""Bundles that are tuned, by rule and by measuring on this CPU: what they hold, and that they compute the same."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import rxdeploy
from rxdeploy import cli
from rxdeploy.cache import Cache
from rxdeploy.cards import find_card
from rxdeploy.engines.bundle import CpuSettings, Tuning, open_bundle
from rxdeploy.engines.options import EngineOptions, Profile
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.export.passes.groups import GROUPS
from rxdeploy.pipeline import Pipeline, Request
from rxdeploy.tuning import contest, device, retune, search
from rxdeploy.tuning.describe import describe
from rxdeploy.tuning.options import batches, parse_groups
from rxdeploy.tuning.rules import rule

DIGITS = "digits_resnext14_8x8d"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measurements too short to mean anything: what is tested is not who wins."""
    monkeypatch.setattr(search, "contest", functools.partial(contest.contest, rounds=2))
    monkeypatch.setattr(contest, "TURN_SECONDS", 0.001)
    monkeypatch.setattr(device, "PROFILE_SECONDS", 0.001)
    monkeypatch.setenv("RXDEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a device had been found on which every layer is fastest with 16 channels a group."""

    def found(layers: Any, times: Any) -> dict[str, int]:
        assert all(len(times[0][name]) == 2 for name in layers)  # batches 1 and 8 were timed
        return {name: 16 for name, own in layers.items() if 16 in own.widths and own.width < 16}

    def judged(ways: Any, sizes: Any) -> dict[str, contest.Ratio]:
        """Everything is run, but who wins does not depend on how busy this machine is."""
        contest.contest(ways, sizes, rounds=1)
        faster = {name: 0.9 if name in ("each layer's fastest width", "tuned") else 1.0 for name in ways}
        return {name: contest.Ratio(ratio, ratio, ratio, (ratio, ratio)) for name, ratio in faster.items()}

    monkeypatch.setattr(search, "choose_widths", found)
    monkeypatch.setattr(search, "contest", judged)


Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build(name: str = "bundle", **changes: Any) -> Path:
        request = Request(find_card(DIGITS), **{"precision": "fp32", "target": "onnxruntime", **changes})
        with contextlib.closing(Cache(tmp_path / "cache", 10**12)) as opened:
            return Pipeline(request, opened).build(tmp_path / name).path

    return build


def widths(bundle: Path) -> dict[str, int]:
    """Channels a group of each grouped convolution, as the file has it."""
    found = {}
    graph = onnx.load(bundle / "model.onnx").graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if any(prop.key == GROUPS for prop in node.metadata_props):
            found[node.name] = shapes[node.input[1]][1]
    return found


def logits(bundle: Path, device: str = "cpu") -> NDArray[np.float32]:
    with rxdeploy.load(bundle, device) as session:
        images = np.random.default_rng(0).integers(0, 256, (5, *session.bundle.manifest.inputs[0].shape[1:]), np.uint8)
        return session.run(images)


def test_groups_as_asked_for(build: Build) -> None:
    native, wide = build("native", groups="native"), build("wide", groups="32")
    assert widths(native) == {} and open_bundle(native).manifest.tuning.groups == {}
    found = widths(wide)
    assert found and set(found.values()) <= {16, 24, 32} and open_bundle(wide).manifest.tuning.groups == found
    np.testing.assert_allclose(logits(wide), logits(native), rtol=1e-4, atol=1e-4)
    tuning = open_bundle(wide).manifest.tuning
    assert not tuning.tuned and tuning.cpu is None and "untuned" in describe(tuning)
    assert (wide / "model.onnx").stat().st_size > (native / "model.onnx").stat().st_size


def test_rules_are_applied(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rule("onnxruntime", "fp32").channels == 0
    assert widths(build("auto")) == {}
    monkeypatch.setitem(rxdeploy.tuning.rules._RULES, ("onnxruntime", "fp32"), rxdeploy.tuning.rules.Rule(16, "a test"))
    by_rule = build("ruled")
    assert set(widths(by_rule).values()) == {16}
    assert open_bundle(by_rule).manifest.tuning.report == {"rule": "a test"}


def test_a_tuned_build(build: Build, packed: None, tmp_path: Path) -> None:
    plain, tuned = build("plain"), build("tuned", tune=True)
    manifest = open_bundle(tuned).manifest
    assert manifest.tuning.tuned and manifest.tuning.batch == (1, 8) and manifest.tuning.cores
    assert set(widths(tuned).values()) == {16} and manifest.tuning.groups == widths(tuned)
    assert isinstance(manifest.tuning.cpu, CpuSettings)
    assert "onnxruntime" in manifest.tuning.versions
    np.testing.assert_allclose(logits(tuned), logits(plain), rtol=1e-4, atol=1e-4)
    layers = manifest.tuning.report["engines"]["onnxruntime"]["layers"]
    assert set(layers) >= set(widths(tuned))
    assert all(len(each) == 2 and min(each) > 0 for layer in layers.values() for each in layer["seconds"].values())


def test_what_was_measured_is_not_measured_again(
    build: Build, packed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build("first", tune=True)
    monkeypatch.setattr(search, "_Search", None)  # nobody searches
    again = build("again", tune=True)
    assert open_bundle(again).manifest.tuning == open_bundle(first).manifest.tuning
    other = EngineOptions(profiles=(Profile(1, 4, 8),))
    with pytest.raises(TypeError, match="NoneType"):  # another batch is another question
        request = Request(find_card(DIGITS), precision="fp32", target="onnxruntime", tune=True, engine=other)
        with contextlib.closing(Cache(tmp_path / "cache", 10**12)) as opened:
            Pipeline(request, opened).build(tmp_path / "third")


@pytest.fixture
def openvino_wins(packed: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that runs OpenVINO, to which everything is tuned."""
    pytest.importorskip("openvino", reason="it is tuned to")
    judged = search.contest

    def judge(ways: Any, sizes: Any) -> dict[str, contest.Ratio]:
        ratios = judged(ways, sizes)
        return ratios | {name: contest.Ratio(0.5, 0.5, 0.5, (0.5,)) for name in ways if name == "openvino"}

    monkeypatch.setattr(search, "contest", judge)
    return importlib.import_module("rxdeploy.runtime.openvino")


def test_the_engine_that_is_tuned_to_is_validated(
    build: Build, openvino_wins: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_bundle(build("tuned", tune=True)).manifest
    assert manifest.tuning.cpu.engine == "openvino"
    figures = manifest.validation["providers"]["OpenVINO"]
    assert 0 < figures["all"]["relative_l2"] < 1e-5 and set(figures) >= {"all"}
    plain = build("plain")
    assert "OpenVINO" not in open_bundle(plain).manifest.validation["providers"]
    real = openvino_wins.Requests.run
    monkeypatch.setattr(openvino_wins.Requests, "run", lambda *arguments: np.roll(real(*arguments), 1, axis=1))
    with pytest.raises(CheckFailed, match="OpenVINO"):
        build("broken", tune=True, weights="synthetic:1")
    before = open_bundle(plain).manifest
    assert cli.run(["tune", str(plain)]) == 1
    assert "does not compute on OpenVINO what" in capsys.readouterr().err
    assert open_bundle(plain).manifest == before


def test_a_bundle_is_tuned_in_place_and_keeps_the_rest(build: Build, packed: None, tmp_path: Path) -> None:
    path = build("bundle", groups="32")
    before, expected = open_bundle(path).manifest, logits(path)
    assert cli.run(["tune", str(path)]) == 0
    after = open_bundle(path).manifest
    assert set(widths(path).values()) == {16} and after.tuning.tuned and after.tuning.batch == (1, 8)
    assert after.validation == before.validation and after.command == before.command
    checked = after.tuning.report["against_the_bundle_before"]
    assert set(checked) == {"onnxruntime", after.tuning.cpu.engine} and checked["onnxruntime"]["relative_l2"] < 1e-5
    np.testing.assert_allclose(logits(path), expected, rtol=1e-4, atol=1e-4)


def test_tune_elsewhere_as_json(build: Build, packed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = build("bundle"), tmp_path / "other"
    before = (path / "manifest.json").read_bytes()
    assert cli.run(["tune", str(path), "-o", str(other), "--batch", "2,3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bundle"] == str(other) and printed["manifest"]["tuning"]["batch"] == [2, 3]
    assert (path / "manifest.json").read_bytes() == before and open_bundle(other).manifest.tuning.batch == (2, 3)


def test_a_tuned_model_that_computes_something_else_is_refused(
    build: Build, packed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build("bundle")
    before = (path / "manifest.json").read_bytes()
    real = retune.apply

    def wrong(model: Any, variant: Any) -> Any:
        made = real(model, variant)
        weight = made.graph.initializers["layer2.0.conv1.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.1, name=weight.name)
        return made

    monkeypatch.setattr(retune, "apply", wrong)
    assert cli.run(["tune", str(path)]) == 1
    assert "does not compute on ONNX Runtime what" in capsys.readouterr().err
    assert (path / "manifest.json").read_bytes() == before


def test_a_model_with_a_pass_is_another_question(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found for a graph that has the pass says nothing of one that has not, nor the other way round."""

    def judged(ways: Any, sizes: Any) -> dict[str, contest.Ratio]:
        faster = {name: 0.9 if name in ("space_to_depth", "tuned") else 1.0 for name in ways}
        return {name: contest.Ratio(ratio, ratio, ratio, (ratio, ratio)) for name, ratio in faster.items()}

    monkeypatch.setattr(search, "contest", judged)
    path, other = build(), tmp_path / "other"
    tried = []
    for _ in range(2):
        assert cli.run(["tune", str(path), "-o", str(other)]) == 0
        path, tuning = other, open_bundle(other).manifest.tuning
        assert tuning.passes == ("space_to_depth",)
        tried.append("space_to_depth" in {step["what"] for step in tuning.report["engines"]["onnxruntime"]["steps"]})
    assert tried == [True, False]


@pytest.mark.parametrize("after", ["measuring", "checking"])
def test_a_bundle_that_is_built_again_meanwhile_stays(
    after: str, build: Build, packed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build()
    where, name = {"measuring": (retune.stage, "by_measuring"), "checking": (retune, "_check")}[after]
    real = getattr(where, name)

    def during(*arguments: Any) -> Any:
        found = real(*arguments)
        build(weights="synthetic:7")
        return found

    monkeypatch.setattr(where, name, during)
    assert cli.run(["tune", str(path)]) == 2
    assert "it was built again while it was being tuned" in capsys.readouterr().err
    assert open_bundle(path).manifest.weights.source == "synthetic:7"


def test_a_bundle_may_be_tuned_twice_at_once(build: Build, packed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, outcomes = build(), retune._check, []

    def during(*arguments: Any) -> Any:
        monkeypatch.setattr(retune, "_check", real)
        outcomes.append(cli.run(["tune", str(path)]))
        return real(*arguments)

    monkeypatch.setattr(retune, "_check", during)
    outcomes.append(cli.run(["tune", str(path)]))
    assert outcomes == [0, 0] and set(widths(path).values()) == {16}


@pytest.mark.parametrize(("module", "extra"), [("onnx_ir", "build"), ("filelock", "build"), ("onnxruntime", "cpu")])
def test_a_missing_package_is_told_before_anything_is_measured(
    module: str, extra: str, build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a machine that only serves."""
    path = build()
    monkeypatch.setattr(device.CpuDevice, "open", None)  # nobody measures
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("retune", "stage", "search"):  # to be imported again
        monkeypatch.delitem(sys.modules, f"rxdeploy.tuning.{name}", raising=False)
        monkeypatch.delattr(rxdeploy.tuning, name, raising=False)
    assert cli.run(["tune", str(path)]) == 3
    assert f"{module} is not installed here; pip install 'rxdeploy[{extra}]'" in capsys.readouterr().err


@pytest.mark.skipif(rxdeploy.engines.gpu.find_driver().problem is None, reason="there is a GPU here")
def test_a_plan_cannot_be_tuned_without_its_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="plans need TensorRT-RTX")
    path = tmp_path / "bundle"
    arguments = ["build", DIGITS, "--fp32", "--target", "tensorrt-rtx", "-o", str(path)]
    assert cli.run(arguments) == 0
    before = (path / "manifest.json").read_bytes()
    for command in (["tune", str(path)], [*arguments[:-1], str(tmp_path / "other"), "--tune"]):
        assert cli.run(command) == 3
        assert "tuning a plan needs the GPU that it is for" in capsys.readouterr().err
    assert (path / "manifest.json").read_bytes() == before and not (tmp_path / "other").exists()


def test_bad_input(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "0", "-1", "eight", "8,16", "65537", "1" * 40, "000000001" + "0" * 5000, "٣"):
        with pytest.raises(InputError, match=r"^--groups .*: auto, native, or how many channels"):
            parse_groups(text)
    assert [parse_groups(text) for text in ("auto", "native", "32")] == [None, 0, 32]
    with pytest.raises(InputError, match="--tune chooses the groups"):
        build(tune=True, groups="32")
    assert cli.run(["tune", str(tmp_path / "nothing")]) == 2
    for sizes in ("0", ""):
        assert cli.run(["tune", str(build()), "--batch", sizes]) == 2
        assert "batch" in capsys.readouterr().err


def test_batches_to_tune_for() -> None:
    assert batches(EngineOptions()) == (1, 8)
    assert batches(EngineOptions(profiles=(Profile(4, 4, 4),))) == (4,)
    assert batches(EngineOptions(profiles=(Profile(2, 4, 8), Profile(8, 32, 64)))) == (2, 32)


@pytest.mark.parametrize(
    ("whole", "told"),
    [
        ({"median": 0.8}, "1.25 times as fast as untuned, on a CPU"),  # as manifests had it first
        ({"median": 0.8, "kept": True}, "1.25 times as fast as untuned, on a CPU"),
        ({"median": 1.1, "kept": False}, "nothing was faster, on a CPU"),
    ],
)
def test_what_is_told_of_the_gain(whole: dict[str, Any], told: str) -> None:
    tuning = Tuning(
        tuned=True,
        device="a CPU",
        cores=1,
        versions={},
        batch=(1,),
        groups={},
        passes=(),
        cpu=None,
        report={"whole": whole},
    )
    assert describe(tuning) == f"groups as the model has them; {told}"
