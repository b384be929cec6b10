"""Building plans: with the TensorRT-RTX that is here, and against a stand-in for the full TensorRT that is not.

The stand-in records what it is told; what the real libraries make of it is not its business.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxdeploy.engines.builder import Plan, build_plan
from rxdeploy.engines.flavours import TENSORRT, TENSORRT_RTX
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import EngineOptions, Profile
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError

DEFAULT = EngineOptions()


@pytest.fixture
def models(make_card: Callable[..., Any], random_weights: Callable[..., Any]) -> dict[str, bytes]:
    """A small model in both precisions, exported as a build does it."""
    pytest.importorskip("onnx_ir", reason="the models are made with onnx-ir")
    pytest.importorskip("torch", reason="the random weights are PyTorch's")
    from rxdeploy.export.float16 import to_float16
    from rxdeploy.export.graph import build_graph, serialise

    card = make_card(layers=[1, 1], channels=[16, 32], image_size=32)
    graph = build_graph(card, random_weights(card))
    return {"fp16": serialise(to_float16(graph)[0]), "fp32": serialise(graph)}


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'rxdeploy[rtx]'")


def build(model: bytes, progress: Any = None, **options: Any) -> Plan:
    return build_plan(model, TENSORRT_RTX, EngineOptions(**options), progress)


# TensorRT-RTX


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_is_built(rtx: Any, models: dict[str, bytes], precision: str) -> None:
    plan = build(models[precision])
    assert type(plan.data) is bytes
    assert len(plan.data) > len(models[precision]) / 2, "a plan holds the weights, some of them padded"
    assert plan.facts == {
        "flavour": "tensorrt-rtx",
        "version": rtx.__version__,
        "warnings": plan.facts["warnings"],
        **DEFAULT.as_facts(),
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_builds_are_alike(rtx: Any, models: dict[str, bytes], precision: str) -> None:
    """TensorRT-RTX 1.7.1 numbers some of its own symbols differently each time, so not every byte is the same."""
    first, second = build(models[precision]), build(models[precision])
    assert first.facts == second.facts
    assert abs(len(first.data) - len(second.data)) < len(first.data) / 100


def test_float16_makes_a_smaller_plan(rtx: Any, models: dict[str, bytes]) -> None:
    assert len(build(models["fp16"]).data) < len(build(models["fp32"]).data)


def test_several_profiles(rtx: Any, models: dict[str, bytes]) -> None:
    """Each has its own kernels, so the plan grows with them."""
    profiles = (Profile(1, 8, 32), Profile(1, 1, 1), Profile(64, 64, 64))
    plan = build(models["fp16"], profiles=profiles)
    assert plan.facts["profiles"] == tuple({"min": p.min, "opt": p.opt, "max": p.max} for p in profiles)
    assert len(plan.data) > 1.5 * len(build(models["fp16"]).data)


@pytest.mark.parametrize(
    "options",
    [
        {"workspace_mib": 1024},
        {"optimization_level": 0},
        {"optimization_level": 5},
        {"compute_capabilities": ("8.6",)},
        {"compute_capabilities": ("8.0", "8.9", "12.0")},
    ],
)
def test_options_that_it_takes(rtx: Any, models: dict[str, bytes], options: dict[str, Any]) -> None:
    assert build(models["fp16"], **options).data


def steps_of(model: bytes) -> list[tuple[str, float]]:
    steps: list[tuple[str, float]] = []
    build(model, lambda phase, fraction: steps.append((phase, fraction)))
    assert len(steps) > 20
    return steps


def test_progress_names_phases_and_stays_in_0_to_1(rtx: Any, models: dict[str, bytes]) -> None:
    steps = steps_of(models["fp16"])
    assert all(phase and 0 <= fraction <= 1 for phase, fraction in steps)
    assert steps[0][1] < 0.2
    assert len({phase for phase, _ in steps}) > 3


def test_progress_never_goes_back(rtx: Any, models: dict[str, bytes]) -> None:
    fractions = [fraction for _, fraction in steps_of(models["fp16"])]
    assert fractions == sorted(fractions)


def test_progress_ends_at_1(rtx: Any, models: dict[str, bytes]) -> None:
    assert steps_of(models["fp16"])[-1][1] == 1


def foreign_op() -> bytes:
    onnx = pytest.importorskip("onnx", reason="the model is made with onnx")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Nonsense", ["image"], ["logits"])
    shape = ["batch", 4]
    graph = onnx.helper.make_graph(
        [node],
        "bad",
        [value("image", onnx.TensorProto.FLOAT, shape)],
        [value("logits", onnx.TensorProto.FLOAT, shape)],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]).SerializeToString()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda model: b"garbage", "Failed to parse the ONNX model", id="garbage"),
        pytest.param(lambda model: model[: len(model) // 2], "Failed to parse the ONNX model", id="truncated"),
        pytest.param(lambda model: foreign_op(), "Plugin not found", id="unknown operator"),
        pytest.param(
            lambda model: b"",
            "",
            id="empty",
        ),
    ],
)
def test_a_bad_model_fails_with_tensorrts_words(
    rtx: Any, models: dict[str, bytes], damage: Callable[[bytes], bytes], words: str
) -> None:
    with pytest.raises(CheckFailed, match=r"tensorrt-rtx (cannot read the model|did not build)") as caught:
        build(damage(models["fp32"]))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "mebibytes",
    [
        pytest.param(
            1,
        ),
        8,
    ],
)
def test_too_little_workspace_names_the_option(rtx: Any, make_digits: Callable[[], bytes], mebibytes: int) -> None:
    with pytest.raises(InputError) as caught:
        build(make_digits(), workspace_mib=mebibytes)
    assert str(caught.value).startswith(f"--workspace {mebibytes}: too little for this model: ")
    assert str(caught.value).endswith("; give more, or leave it out")


@pytest.fixture
def make_digits() -> Callable[[], bytes]:
    """The digits model in float32: TensorRT-RTX 1.7.1 says it needs 10330432 bytes of workspace."""

    def make() -> bytes:
        pytest.importorskip("onnx_ir", reason="the model is made with onnx-ir")
        from rxdeploy.cards import find_card
        from rxdeploy.export.graph import build_graph, serialise
        from rxdeploy.export.weights import load_weights, resolve_weights

        card = find_card("digits_resnext14_8x8d")
        return serialise(build_graph(card, load_weights(card, resolve_weights(card, None, Path("unused")))))

    return make


@pytest.mark.parametrize("capability", ["1.0", "86", "", "sm_86", "8.66"])
def test_an_unknown_compute_capability_lists_the_known(rtx: Any, models: dict[str, bytes], capability: str) -> None:
    with pytest.raises(InputError) as caught:
        build(models["fp16"], compute_capabilities=("8.6", capability))
    assert str(caught.value).startswith(f"--compute-capability {capability}: this TensorRT-RTX knows ")
    known = str(caught.value).partition("knows ")[2].split(", ")
    members = {name[2:] for name in rtx.ComputeCapability.__members__ if name.startswith("SM")}
    assert {name.replace(".", "") for name in known} == members
    assert {"7.5", "8.6", "12.0"} <= set(known)


def test_ctrl_c_stops_tensorrt_first(rtx: Any, models: dict[str, bytes]) -> None:
    """The real signal, at the fifth step of a real build."""
    whole = len(steps_of(models["fp16"]))
    steps = 0

    def fifth_step(phase: str, fraction: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGINT)

    def mine(signum: int, frame: Any) -> None:
        raise AssertionError("the user's handler ran inside TensorRT")

    before = signal.signal(signal.SIGINT, mine)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(models["fp16"], fifth_step)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert 5 <= steps < whole / 2, "TensorRT went on building"
    assert build(models["fp16"]).data, "a further build works"


@pytest.mark.parametrize("model", [b"garbage", None], ids=["failure", "success"])
def test_the_signal_handler_is_put_back(rtx: Any, models: dict[str, bytes], model: bytes | None) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        build(model or models["fp16"])
    except CheckFailed:
        assert model
    assert signal.getsignal(signal.SIGINT) is before


def test_a_build_in_another_thread_leaves_signals_alone(rtx: Any, models: dict[str, bytes]) -> None:
    plans: list[Plan] = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: plans.append(build(models["fp16"])))
    thread.start()
    thread.join()
    assert plans and plans[0].data
    assert signal.getsignal(signal.SIGINT) is before


def test_a_progress_function_that_fails_stops_the_build_and_not_the_process(
    rtx: Any, models: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(phase: str, fraction: float) -> None:
        raise BrokenPipeError("nobody reads any more")

    with pytest.raises((CheckFailed, BrokenPipeError)):
        build(models["fp16"], fail)
    assert build(models["fp16"]).data


def test_messages_reach_the_log(rtx: Any, models: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "rxdeploy.tensorrt"):
        build(models["fp16"])
        with pytest.raises(CheckFailed):
            build(b"garbage")
    assert len(caplog.records) > 10
    assert {record.name for record in caplog.records} == {"rxdeploy.tensorrt"}
    assert any("Failed to parse the ONNX model" in record.getMessage() for record in caplog.records)
    # Errors are in our own exception: a second time on the terminal they would confuse.
    assert max(record.levelno for record in caplog.records) <= logging.INFO


def test_nothing_is_printed(rtx: Any, models: dict[str, bytes], capfd: pytest.CaptureFixture[str]) -> None:
    build(models["fp16"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_plan_is_one_for_the_gpu_here(rtx: Any, models: dict[str, bytes], precision: str) -> None:
    if problem := find_driver().problem:
        pytest.skip(problem)
    plan = build(models[precision], profiles=(Profile(1, 8, 32), Profile(2, 2, 2)))
    runtime = rtx.Runtime(rtx.Logger(rtx.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan.data)
    assert engine is not None
    assert [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)] == ["image", "logits"]
    assert engine.get_tensor_dtype("image") == rtx.uint8 and engine.get_tensor_dtype("logits") == rtx.float32
    assert tuple(engine.get_tensor_shape("image")) == (-1, 32, 32, 3)
    assert engine.num_optimization_profiles == 2
    assert [shape[0] for shape in engine.get_tensor_profile_shape("image", 0)] == [1, 8, 32]
    assert [shape[0] for shape in engine.get_tensor_profile_shape("image", 1)] == [2, 2, 2]


# A TensorRT that does not load


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for flavour, extra in ((TENSORRT, "tensorrt"), (TENSORRT_RTX, "rtx")):
        monkeypatch.setitem(sys.modules, flavour.module, None)
        with pytest.raises(EnvironmentLacks, match=rf"module {flavour.module} is not .* 'rxdeploy\[{extra}\]' adds it"):
            build_plan(b"", flavour, DEFAULT)


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_module_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    words = "libnvinfer.so.10: cannot open shared object file"
    (tmp_path / "tensorrt.py").write_text(f"raise {error}({words!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EnvironmentLacks) as caught:
        build_plan(b"", TENSORRT, DEFAULT)
    assert str(caught.value) == (f"tensorrt is installed but does not load: {words}; pip install 'rxdeploy[tensorrt]'")


# The full TensorRT


class NetworkFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class FakeTensorRT:
    """The part of TensorRT 10's Python interface that a build uses; `told` is what it was told."""

    ERROR, WARNING, VERBOSE = 1, 2, 4  # ILogger.Severity

    def __init__(self) -> None:
        self.told: dict[str, Any] = {"flags": [], "cleared": [], "profiles": [], "timing caches": []}
        self.messages: list[tuple[int, str]] = []  # said at the start
        self.starts = True
        self.parse_errors: list[str] | None = None
        self.plan: bytes | None = b"the plan"
        self.build_messages: list[tuple[int, str]] = []
        self.good_timing = {b"", b"old timings"}  # what set_timing_cache accepts

    def module(self) -> Any:
        fake = self

        class Parser:
            def __init__(self, network: Any, logger: Any) -> None:
                errors = fake.parse_errors or []
                self.num_errors = len(errors)
                self.get_error = lambda index: SimpleNamespace(
                    desc=lambda: errors[index], node_operator=lambda: "Conv", node_name=lambda: "conv1"
                )

            def parse(self, model: bytes) -> bool:
                fake.told["model"] = model
                return fake.parse_errors is None

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger
                for severity, text in fake.messages:
                    logger.log(severity, text)
                if not fake.starts:
                    raise TypeError("pybind11::init(): factory function returned nullptr")

            def create_network(self, flags: int) -> Any:
                fake.told["network flags"] = flags
                image = SimpleNamespace(name="image", shape=(-1, 32, 32, 3))
                return SimpleNamespace(get_input=lambda index: [image][index])

            def create_builder_config(self) -> Any:
                return Config()

            def create_optimization_profile(self) -> Any:
                shapes: list[Any] = []
                return SimpleNamespace(set_shape=lambda *shape: shapes.append(shape), shapes=shapes)

            def build_serialized_network(self, network: Any, config: Any) -> Any:
                fake.told["config"] = config
                for severity, text in fake.build_messages:
                    self.logger.log(severity, text)
                monitor = config.progress_monitor
                monitor.phase_start("outer", None, 2)
                monitor.phase_start("inner", "outer", 2)
                go_on = monitor.step_complete("inner", 0) and monitor.step_complete("inner", 1)
                monitor.phase_finish("inner")
                go_on = go_on and monitor.step_complete("outer", 0) and monitor.step_complete("outer", 1)
                monitor.phase_finish("outer")
                return None if fake.plan is None or not go_on else memoryview(fake.plan)

        class Config:
            def set_memory_pool_limit(self, pool: str, size: int) -> None:
                fake.told["memory"] = (pool, size)

            def set_flag(self, flag: str) -> None:
                fake.told["flags"].append(flag)

            def clear_flag(self, flag: str) -> None:
                fake.told["cleared"].append(flag)

            def add_optimization_profile(self, profile: Any) -> None:
                fake.told["profiles"].append(profile.shapes)

            def create_timing_cache(self, data: bytes) -> Any:
                return SimpleNamespace(data=data, serialize=lambda: memoryview(b"new timings"))

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
                assert ignore_mismatch is False
                fake.told["timing caches"].append(cache.data)
                accepted = cache.data in fake.good_timing
                if accepted:
                    self.timing_cache = cache
                return accepted

            def get_timing_cache(self) -> Any:
                return self.timing_cache

        return SimpleNamespace(
            __version__="10.13.3.9",
            ILogger=type("ILogger", (), {}),
            IProgressMonitor=type("IProgressMonitor", (), {}),
            NetworkDefinitionCreationFlag=NetworkFlag,
            Builder=Builder,
            OnnxParser=Parser,
            ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
            BuilderFlag=SimpleNamespace(VERSION_COMPATIBLE="version", REFIT="refit", STRIP_PLAN="strip", TF32="tf32"),
            HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module())
    return fake


def full(timing_cache: Path | None = None, progress: Any = None, **options: Any) -> Plan:
    return build_plan(b"model", TENSORRT, EngineOptions(**options), progress, timing_cache)


def test_full_a_plan_with_its_facts(fake: FakeTensorRT) -> None:
    fake.messages = [(FakeTensorRT.WARNING, "no NUMA"), (FakeTensorRT.VERBOSE, "hello")]
    fake.build_messages = [(FakeTensorRT.WARNING, "slow kernel")]
    plan = full()
    assert plan.data == b"the plan" and type(plan.data) is bytes
    assert plan.facts == {"flavour": "tensorrt", "version": "10.13.3.9", "warnings": 2, **DEFAULT.as_facts()}
    assert fake.told["model"] == b"model"


def test_full_the_network_is_strongly_typed(fake: FakeTensorRT) -> None:
    full()
    assert fake.told["network flags"] == 0b10
    assert fake.told["flags"] == []


def test_full_float32_stays_float32(fake: FakeTensorRT) -> None:
    full()
    assert fake.told["cleared"] == ["tf32"]


def test_full_profiles(fake: FakeTensorRT) -> None:
    full(profiles=(Profile(1, 8, 32), Profile(4, 4, 4)))
    assert fake.told["profiles"] == [
        [("image", (1, 32, 32, 3), (8, 32, 32, 3), (32, 32, 32, 3))],
        [("image", (4, 32, 32, 3), (4, 32, 32, 3), (4, 32, 32, 3))],
    ]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, []),
        ({"version_compatible": True}, ["version"]),
        ({"refit": True}, ["refit"]),
        ({"strip_plan": True}, ["strip"]),
        ({"strip_plan": True, "refit": True, "version_compatible": True}, ["version", "refit", "strip"]),
    ],
)
def test_full_flags(fake: FakeTensorRT, options: dict[str, bool], flags: list[str]) -> None:
    full(**options)
    assert fake.told["flags"] == flags
    assert not hasattr(fake.told["config"], "hardware_compatibility_level")


def test_full_other_options(fake: FakeTensorRT) -> None:
    full(hardware_compatible=True, workspace_mib=64, optimization_level=0)
    config = fake.told["config"]
    assert config.hardware_compatibility_level == "ampere+"
    assert fake.told["memory"] == ("workspace", 64 * 2**20)
    assert config.builder_optimization_level == 0
    assert config.profiling_verbosity == "detailed"


def test_full_defaults_are_tensorrts(fake: FakeTensorRT) -> None:
    full()
    assert "memory" not in fake.told
    assert not hasattr(fake.told["config"], "builder_optimization_level")


def test_full_progress(fake: FakeTensorRT) -> None:
    steps: list[tuple[str, float]] = []
    full(progress=lambda phase, fraction: steps.append((phase, fraction)))
    assert steps == [("inner", 0.25), ("inner", 0.5), ("outer", 0.5), ("outer", 1.0), ("done", 1.0)]


# Its timing cache


def test_full_without_a_file_for_timings_none_is_written(fake: FakeTensorRT) -> None:
    full()
    assert fake.told["timing caches"] == [b""]


def test_full_timings_are_read_and_written_back(fake: FakeTensorRT, tmp_path: Path) -> None:
    path = tmp_path / "timing" / "tensorrt.cache"
    full(path)
    assert fake.told["timing caches"] == [b""]
    assert path.read_bytes() == b"new timings"
    path.write_bytes(b"old timings")
    fake.told["timing caches"].clear()
    full(path)
    assert fake.told["timing caches"] == [b"old timings"]
    assert path.read_bytes() == b"new timings"
    assert [file.name for file in path.parent.iterdir()] == ["tensorrt.cache"]


def test_full_timings_of_another_gpu_are_replaced(
    fake: FakeTensorRT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tensorrt.cache"
    path.write_bytes(b"another GPU's")
    with caplog.at_level(logging.INFO, "rxdeploy.tensorrt"):
        assert full(path).data == b"the plan"
    assert fake.told["timing caches"] == [b"another GPU's", b""]
    assert path.read_bytes() == b"new timings"
    assert any(str(path) in record.getMessage() for record in caplog.records)


def test_rtx_has_no_timings(fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", sys.modules["tensorrt"])
    build_plan(b"model", TENSORRT_RTX, DEFAULT, timings=tmp_path / "cache")
    assert fake.told["timing caches"] == []
    assert not list(tmp_path.iterdir())


# Its failures


@pytest.mark.parametrize("said", [[], [(1, "CUDA initialization\n  failure with error: 35")]])
def test_full_that_does_not_start(fake: FakeTensorRT, said: list[tuple[int, str]]) -> None:
    fake.starts, fake.messages = False, said
    words = "CUDA initialization failure with error: 35" if said else "it gave no reason"
    with pytest.raises(EnvironmentLacks) as caught:
        full()
    assert str(caught.value) == f"tensorrt does not start: {words}"


@pytest.mark.parametrize(
    ("errors", "words"),
    [(["no Foo", "no Bar"], "Conv conv1: no Foo; Conv conv1: no Bar"), ([], "logged reason")],
    ids=["errors", "none"],
)
def test_full_that_cannot_read_the_model(fake: FakeTensorRT, errors: list[str], words: str) -> None:
    fake.parse_errors, fake.messages = errors, [(1, "logged reason")]
    with pytest.raises(CheckFailed) as caught:
        full()
    assert str(caught.value) == f"tensorrt cannot read the model: {words}"


def test_full_that_does_not_build(fake: FakeTensorRT, tmp_path: Path) -> None:
    fake.plan = None
    fake.build_messages = [(FakeTensorRT.WARNING, "hm"), (FakeTensorRT.ERROR, "Error Code 10: no implementation")]
    with pytest.raises(CheckFailed) as caught:
        full(tmp_path / "timings")
    assert str(caught.value) == "tensorrt did not build the engine: Error Code 10: no implementation"
    assert not list(tmp_path.iterdir()), "timings of a failed build are not kept"


@pytest.mark.parametrize(("mebibytes", "error"), [(64, InputError), (None, CheckFailed)])
def test_full_out_of_memory_blames_the_workspace_only_when_one_was_given(
    fake: FakeTensorRT, mebibytes: int | None, error: type[Exception]
) -> None:
    fake.plan, fake.build_messages = None, [(FakeTensorRT.ERROR, "Error Code 2: OutOfMemory (Requested size ...)")]
    with pytest.raises(error) as caught:
        full(workspace_mib=mebibytes)
    assert ("--workspace 64" in str(caught.value)) == (mebibytes is not None)


def test_full_interrupted(fake: FakeTensorRT, tmp_path: Path) -> None:
    """A step that saw Ctrl-C answers False, which is TensorRT's cue to stop."""
    steps = []

    def first_step(phase: str, fraction: float) -> None:
        steps.append(phase)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        full(tmp_path / "timings", first_step)
    assert steps == ["inner"]
    assert not list(tmp_path.iterdir())
