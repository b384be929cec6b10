"""Which engine and settings a bundle gets on a CPU, by its tuning, by what is installed and by what is asked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import rxdeploy.runtime as runtime
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.bundle import Bundle, CpuSettings, Tuning
from rxdeploy.errors import EnvironmentLacks, InputError
from rxdeploy.runtime.cpu import Chosen, choose, in_words, open_cpu_engine
from rxdeploy.runtime.onnxrt import OnnxEngine
from rxdeploy.runtime.openvino import OpenVinoEngine

SIZE = 64
CORES = 6  # that this machine is said to have
SPLIT = CpuSettings(engine="openvino", threads=1, sessions=2, denormals_as_zero=True)
SPLIT_FROM = CpuSettings(engine="openvino", threads=1, sessions=2, split_from=8)
SLEEPY = CpuSettings(threads=3, spinning=False, arena=False)
OPENVINO = importlib.util.find_spec("openvino") is not None
Bundles = Callable[..., Path]


@pytest.fixture(autouse=True)
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """installed("onnxruntime"): of the engines, only these are, or seem to be."""
    find_spec = importlib.util.find_spec

    def only(*names: str) -> None:
        engines = {"onnxruntime", "openvino"}
        for name in engines - set(names):
            monkeypatch.setitem(sys.modules, name, None)

        def find(name: str, package: str | None = None) -> Any:
            return (object() if name in names else None) if name in engines else find_spec(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return only


def tuning(cpu: CpuSettings | None, cores: int | None = CORES, batch: tuple[int, ...] = (1, 4)) -> Tuning:
    return Tuning(
        tuned=True, device="a CPU", cores=cores, versions={}, batch=batch, groups={}, passes=(), cpu=cpu, report={}
    )


def tuned(path: Path, cpu: CpuSettings | None, **more: Any) -> Bundle:
    """The bundle as if it had been tuned."""
    opened = bundles.open_bundle(path)
    return Bundle(opened.path, msgspec.structs.replace(opened.manifest, tuning=tuning(cpu, **more)))


# What is chosen


@pytest.mark.parametrize("found", [None, tuning(None)], ids=["not tuned", "tuned for a GPU"])
@pytest.mark.parametrize(
    ("here", "engine"),
    [(("onnxruntime", "openvino"), "onnxruntime"), (("openvino",), "openvino"), ((), "onnxruntime")],
)
def test_without_a_tuning_the_first_engine_that_is_installed(
    installed: Callable[..., None], found: Tuning | None, here: tuple[str, ...], engine: Any
) -> None:
    installed(*here)
    assert choose(found) == Chosen(CpuSettings(engine=engine))
    assert choose(found, "openvino") == Chosen(CpuSettings(engine="openvino"))


@pytest.mark.parametrize("settings", [SPLIT, SLEEPY])
def test_a_tuning_is_followed(installed: Callable[..., None], settings: CpuSettings) -> None:
    installed("onnxruntime", "openvino")
    for asked in (None, settings.engine):
        assert choose(tuning(settings), asked) == Chosen(settings, (1, 4))


def test_another_engine_than_it_was_tuned_to_has_plain_settings(installed: Callable[..., None]) -> None:
    installed("onnxruntime", "openvino")
    assert choose(tuning(SPLIT), "onnxruntime") == Chosen(CpuSettings())
    assert choose(tuning(SLEEPY), "openvino") == Chosen(CpuSettings(engine="openvino"))


def test_a_tuning_to_an_engine_that_is_not_installed(installed: Callable[..., None]) -> None:
    installed("onnxruntime")
    settings, sizes, remark = choose(tuning(SPLIT))
    assert (settings, sizes) == (CpuSettings(), ())
    assert "tuned to OpenVINO, which is not installed: pip install 'rxdeploy[openvino]' adds it" in remark
    installed("openvino")
    settings, sizes, remark = choose(tuning(SLEEPY))
    assert (settings, sizes) == (CpuSettings(engine="openvino"), ())
    assert "tuned to ONNX Runtime, which is not installed: pip install 'rxdeploy[cpu]' adds it" in remark


@pytest.mark.parametrize("cores", [1, CORES + 1, None])
def test_on_another_number_of_cores_the_threads_are_not_followed(
    installed: Callable[..., None], cores: int | None
) -> None:
    installed("onnxruntime", "openvino")
    settings, sizes, remark = choose(tuning(SPLIT, cores))
    assert settings == CpuSettings(engine="openvino", denormals_as_zero=True) and sizes == (1, 4)
    assert f"tuned on {cores} core(s), here are {CORES}" in remark
    assert choose(tuning(SPLIT_FROM, cores)).settings == CpuSettings(engine="openvino")
    assert choose(tuning(SLEEPY, cores)).settings == CpuSettings(spinning=False, arena=False)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (CpuSettings(), ""),
        (CpuSettings(engine="openvino"), ""),
        (SPLIT, " (2 session(s) of 1 thread(s), denormals as zero)"),
        (SLEEPY, " (1 session(s) of 3 thread(s), no spinning, no arena)"),
        (SPLIT_FROM, " (2 session(s) of 1 thread(s) for 8 images or more)"),
        (CpuSettings(sessions=4), " (4 session(s) of a thread a core)"),
    ],
)
def test_settings_in_words(settings: CpuSettings, text: str) -> None:
    assert in_words(settings) == text


# What is opened


def test_a_session_follows_the_tuning(digits_bundle: Bundles, images: NDArray) -> None:
    pytest.importorskip("onnxruntime")
    with open_session(tuned(digits_bundle("fp32"), SLEEPY), "cpu") as session:
        assert session.device == "cpu"
        assert session.description.startswith("ONNX Runtime ")
        assert session.description.endswith(" on CPU (1 session(s) of 3 thread(s), no spinning, no arena)")
        expected = session.run(images)
    with open_session(tuned(digits_bundle("fp32"), None), "auto") as session:
        assert session.device in ("cpu", "cuda") and session.description.endswith(("on CPU", "GPU"))
        np.testing.assert_allclose(session.run(images), expected, rtol=1e-4, atol=1e-4)


def test_a_session_follows_a_tuning_to_openvino(digits_bundle: Bundles, images: NDArray) -> None:
    if not OPENVINO:
        pytest.skip("OpenVINO is not installed")
    with open_session(tuned(digits_bundle("fp32"), SPLIT, batch=(4,)), "cpu") as session:
        assert isinstance(session.engine, OpenVinoEngine) and session.engine.settings == SPLIT
        assert session.device == "cpu" and session.gpu is None
        assert session.description.startswith("OpenVINO 2")
        assert session.description.endswith(" on CPU (2 session(s) of 1 thread(s), denormals as zero)")
        assert set(session.engine._held[1].split._compiled) == {2}  # ready for the size that it was tuned to
        found = session.run(images)
    with open_session(tuned(digits_bundle("fp32"), SPLIT), "onnxruntime") as session:
        assert isinstance(session.engine, OnnxEngine) and session.engine.settings == CpuSettings()
        np.testing.assert_allclose(session.run(images), found, rtol=1e-4, atol=1e-4)
    with open_session(tuned(digits_bundle("fp32"), SPLIT, cores=1), "openvino") as session:
        assert session.description.endswith(
            f" (denormals as zero); its threads were tuned on 1 core(s), here are {CORES}"
        )


def open_session(bundle: Bundle, device: str) -> runtime.Session:
    return runtime.Session(bundle, device, None, runtime.Batching())


def test_only_openvino_is_installed(digits_bundle: Bundles, images: NDArray, installed: Callable[..., None]) -> None:
    if not OPENVINO:
        pytest.skip("OpenVINO is not installed")
    bundle = digits_bundle("fp32")
    installed("openvino")
    for device in ("cpu", "auto"):
        with runtime.load(bundle, device) as session:
            assert session.description.startswith("OpenVINO ") and session.device == "cpu"
            assert session.run(images).shape == (5, 10)
    with pytest.raises(EnvironmentLacks, match=r"device onnxruntime is not possible.*pip install 'rxdeploy\[cpu\]'"):
        runtime.load(bundle, "onnxruntime")


def test_no_engine_is_installed(digits_bundle: Bundles, installed: Callable[..., None]) -> None:
    bundle = digits_bundle("fp32")
    installed()
    for device in ("cpu", "auto", "onnxruntime"):
        with pytest.raises(EnvironmentLacks, match=r"pip install 'rxdeploy\[cpu\]'"):
            runtime.load(bundle, device)
    with pytest.raises(EnvironmentLacks, match=r"pip install 'rxdeploy\[openvino\]'"):
        runtime.load(bundle, "openvino")


@pytest.mark.parametrize("wrong", [{"threads": -1}, {"sessions": 0}, {"sessions": -2}])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_settings_that_cannot_be(digits_bundle: Bundles, wrong: dict[str, int], engine: Any) -> None:
    bundle = bundles.open_bundle(digits_bundle("fp32"))
    with pytest.raises(InputError, match=r"CPU settings: .*session\(s\) of .*thread\(s\)"):
        open_cpu_engine(bundle, CpuSettings(engine=engine, **wrong))


# ONNX Runtime's settings


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every session that ONNX Runtime opens."""
    import onnxruntime

    seen, real = [], onnxruntime.InferenceSession

    def session(model: Any, options: Any, **more: Any) -> Any:
        seen.append(options)
        return real(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return seen


def entry(options: Any, key: str) -> str | None:
    try:
        return options.get_session_config_entry(key)
    except RuntimeError:  # it has none of that name
        return None


def test_onnx_runtime_is_opened_with_the_settings(digits_bundle: Bundles, options: list[Any]) -> None:
    bundle = bundles.open_bundle(digits_bundle("fp32"))
    spinning, denormals = "session.intra_op.allow_spinning", "session.set_denormal_as_zero"
    open_cpu_engine(bundle, CpuSettings())
    open_cpu_engine(bundle, CpuSettings(threads=3, spinning=False, arena=False, denormals_as_zero=True))
    plain, other = options
    assert (plain.intra_op_num_threads, plain.enable_cpu_mem_arena) == (0, True)
    assert (entry(plain, spinning), entry(plain, denormals)) == (None, None)
    assert (other.intra_op_num_threads, other.enable_cpu_mem_arena) == (3, False)
    assert (entry(other, spinning), entry(other, denormals)) == ("0", "1")


@pytest.mark.parametrize(("threads", "sessions", "opened"), [(1, 3, 1), (2, 3, 3), (0, 2, 2), (1, 1, 1)])
def test_a_batch_is_split_over_onnx_runtimes_sessions(
    digits_bundle: Bundles, images: NDArray, options: list[Any], threads: int, sessions: int, opened: int
) -> None:
    """One that has no threads of its own serves all that compute on it."""
    bundle = bundles.open_bundle(digits_bundle("fp32"))
    expected = open_cpu_engine(bundle, CpuSettings(threads=1)).run(images, None, None)
    options.clear()
    before = threading.active_count()
    engine = open_cpu_engine(bundle, CpuSettings(threads=threads, sessions=sessions))
    assert len(options) == opened
    for count in (1, 2, 5):
        found = engine.run(images[:count], None, None)
        np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-4)  # type: ignore[arg-type, index]
    out = np.zeros((5, 10), np.float32)
    assert engine.run(images, out, None) is None
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    engine.close()
    assert threading.active_count() == before
    with pytest.raises(runtime.Closed):
        engine.run(images, None, None)


def test_requests_follow_the_other_settings(digits_bundle: Bundles, options: list[Any]) -> None:
    bundle = bundles.open_bundle(digits_bundle("fp32"))
    engine = open_cpu_engine(bundle, CpuSettings(threads=2, sessions=2, arena=False))
    options.clear()
    for_requests, callers = engine.for_requests()
    (made,) = options
    assert (callers, made.intra_op_num_threads, made.enable_cpu_mem_arena) == (CORES, 1, False)
    assert for_requests.settings == CpuSettings(threads=1, arena=False)


def test_denormals_as_zero_is_not_the_callers_arithmetic(digits_bundle: Bundles, images: NDArray) -> None:
    """ONNX Runtime changes the thread that opens the first session of a process, so this needs a process of its own."""
    code = f"""
import numpy
from pathlib import Path
from rxdeploy.engines.bundle import CpuSettings, open_bundle
from rxdeploy.runtime.cpu import open_cpu_engine
engine = open_cpu_engine(open_bundle(Path({str(digits_bundle("fp32"))!r})), CpuSettings(denormals_as_zero=True))
engine.run(numpy.zeros((2, {SIZE}, {SIZE}, 3), numpy.uint8), None, None)
assert numpy.float32(1e-39) * numpy.float32(0.5) > 0
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
