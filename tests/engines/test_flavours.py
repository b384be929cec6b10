"""Which TensorRT a build takes, over what is installed, whether a GPU is here, and what was asked for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from rxdeploy.engines import flavours
from rxdeploy.engines.flavours import FLAVOURS, TENSORRT, TENSORRT_RTX, Flavour, choose
from rxdeploy.engines.gpu import Driver, Gpu
from rxdeploy.engines.options import EngineOptions, Profile
from rxdeploy.errors import EnvironmentLacks, InputError

GPU, NONE = True, False  # is a GPU here?
BOTH = {"tensorrt": "10.13.3.9", "tensorrt-rtx": "1.7.1.116"}
FULL = {"tensorrt": "11.4.0"}
RTX = {"tensorrt-rtx": "1.7.1.116"}
NOTHING: dict[str, str] = {}
PLAIN = EngineOptions()
REFIT, STRIP = EngineOptions(refit=True), EngineOptions(strip_plan=True)
VERSION, HARDWARE = EngineOptions(version_compatible=True), EngineOptions(hardware_compatible=True)
CAPABILITY = EngineOptions(compute_capabilities=("8.6",))

Choose = Callable[..., Any]


@pytest.fixture
def choose_with(monkeypatch: pytest.MonkeyPatch, driver_with_gpu: Driver, driver_without: Driver) -> Choose:
    """choose() on a machine with these versions installed, with or without a GPU."""

    def run(installed: dict[str, str], gpu: bool, target: Any, options: EngineOptions) -> flavours.Choice:
        monkeypatch.setattr(Flavour, "version", lambda self: installed.get(self.name))
        return choose(target, options, driver_with_gpu if gpu else driver_without)

    return run


@pytest.mark.parametrize(
    ("installed", "gpu", "target", "options", "expected", "reason"),
    [
        # auto: the full library where its GPU is, else RTX, else no engine.
        (BOTH, GPU, "auto", PLAIN, TENSORRT, "the best TensorRT that can build here"),
        (FULL, GPU, "auto", PLAIN, TENSORRT, "the best TensorRT"),
        (BOTH, NONE, "auto", PLAIN, TENSORRT_RTX, "tensorrt: it builds only where a GPU is: no NVIDIA driver"),
        (RTX, NONE, "auto", PLAIN, TENSORRT_RTX, "tensorrt: the Python module tensorrt is not installed"),
        (RTX, GPU, "auto", PLAIN, TENSORRT_RTX, "pip install 'rxdeploy[tensorrt]' adds it"),
        (FULL, NONE, "auto", PLAIN, None, "no TensorRT can build here: tensorrt: it builds only where a GPU is"),
        (NOTHING, GPU, "auto", PLAIN, None, "tensorrt-rtx: the Python module tensorrt_rtx is not installed"),
        (NOTHING, NONE, "auto", PLAIN, None, "pip install 'rxdeploy[rtx]' adds it"),
        # A version rxdeploy was not written for is passed over, one of unknown number is tried.
        ({"tensorrt": "8.6.1", **RTX}, GPU, "auto", PLAIN, TENSORRT_RTX, "tensorrt: version 8.6.1 is installed"),
        ({"tensorrt": "12.0.0", **RTX}, GPU, "auto", PLAIN, TENSORRT_RTX, "rxdeploy drives version 10 and 11"),
        ({"tensorrt-rtx": "2.0"}, NONE, "auto", PLAIN, None, "rxdeploy drives version 1;"),
        ({"tensorrt": "unknown"}, GPU, "auto", PLAIN, TENSORRT, ""),
        # auto goes by what the options ask for.
        (BOTH, GPU, "auto", CAPABILITY, TENSORRT_RTX, "--compute-capability is not possible"),
        (BOTH, NONE, "auto", CAPABILITY, TENSORRT_RTX, ""),
        (BOTH, GPU, "auto", VERSION, TENSORRT, ""),
        (BOTH, GPU, "auto", HARDWARE, TENSORRT, ""),
        (RTX, GPU, "auto", REFIT, TENSORRT_RTX, ""),
        (RTX, GPU, "auto", STRIP, TENSORRT_RTX, ""),
        # Named targets.
        (BOTH, GPU, "tensorrt", PLAIN, TENSORRT, "asked for"),
        (BOTH, GPU, "tensorrt-rtx", PLAIN, TENSORRT_RTX, "asked for"),
        (BOTH, NONE, "tensorrt-rtx", PLAIN, TENSORRT_RTX, "asked for"),
        (BOTH, GPU, "tensorrt", REFIT, TENSORRT, ""),
        (BOTH, GPU, "tensorrt", STRIP, TENSORRT, ""),
        (BOTH, GPU, "tensorrt", VERSION, TENSORRT, ""),
        (BOTH, GPU, "tensorrt", HARDWARE, TENSORRT, ""),
        (BOTH, GPU, "tensorrt-rtx", REFIT, TENSORRT_RTX, ""),
        (RTX, NONE, "tensorrt-rtx", CAPABILITY, TENSORRT_RTX, ""),
        (RTX, NONE, "tensorrt-rtx", EngineOptions(workspace_mib=64, optimization_level=5), TENSORRT_RTX, ""),
        (BOTH, GPU, "onnxruntime", PLAIN, None, "asked for: model.onnx runs on ONNX Runtime"),
        (NOTHING, NONE, "onnxruntime", PLAIN, None, "asked for"),
        (NOTHING, NONE, "onnxruntime", EngineOptions(profiles=(Profile(1, 2, 4),)), None, ""),
        (NOTHING, NONE, "auto", EngineOptions(profiles=(Profile(1, 2, 4),)), None, ""),
    ],
)
def test_choice(
    choose_with: Choose,
    installed: dict[str, str],
    gpu: bool,
    target: str,
    options: EngineOptions,
    expected: Flavour | None,
    reason: str,
) -> None:
    choice = choose_with(installed, gpu, target, options)
    assert choice.flavour is expected
    assert choice.version == (installed[expected.name] if expected else None)
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("installed", "gpu", "target", "options", "error", "words"),
    [
        # Not here.
        (RTX, GPU, "tensorrt", PLAIN, EnvironmentLacks, "module tensorrt is not installed; pip install 'rxdeploy[te"),
        (FULL, GPU, "tensorrt-rtx", PLAIN, EnvironmentLacks, "module tensorrt_rtx is not installed; pip install 'rxd"),
        (BOTH, NONE, "tensorrt", PLAIN, EnvironmentLacks, "it builds only where a GPU is: no NVIDIA driver (libcuda"),
        ({"tensorrt": "8.6.1"}, GPU, "tensorrt", PLAIN, EnvironmentLacks, "version 8.6.1 is installed, and rxdeploy"),
        ({"tensorrt": "12.0"}, GPU, "tensorrt", PLAIN, EnvironmentLacks, "drives version 10 and 11; pip install"),
        ({"tensorrt-rtx": "2.1"}, NONE, "tensorrt-rtx", PLAIN, EnvironmentLacks, "version 2.1 is installed"),
        # What is lacking comes before what cannot be: the options may be possible once it is there.
        (NOTHING, NONE, "tensorrt-rtx", VERSION, EnvironmentLacks, "not installed"),
        # Options that the flavour cannot do.
        (RTX, NONE, "tensorrt-rtx", REFIT, InputError, "--refit is not possible: TensorRT-RTX compiles for a GPU"),
        (RTX, NONE, "tensorrt-rtx", STRIP, InputError, "--strip-plan is not possible: TensorRT-RTX compiles for a"),
        (RTX, NONE, "tensorrt-rtx", VERSION, InputError, "--version-compatible is not possible: TensorRT-RTX has no"),
        (RTX, GPU, "tensorrt-rtx", VERSION, InputError, "--version-compatible is not possible"),
        (RTX, GPU, "tensorrt-rtx", HARDWARE, InputError, "--hardware-compatible is not possible: TensorRT-RTX ignor"),
        (BOTH, GPU, "tensorrt", CAPABILITY, InputError, "--compute-capability is not possible: it builds for the GPU"),
        # auto finds nothing that can do it: no silent fall back to ONNX Runtime.
        (RTX, NONE, "auto", REFIT, InputError, "--refit is not possible: no TensorRT can build here: tensorrt: the P"),
        (BOTH, NONE, "auto", STRIP, InputError, "--strip-plan is not possible"),
        (BOTH, NONE, "auto", VERSION, InputError, "--version-compatible is not possible"),
        (RTX, GPU, "auto", HARDWARE, InputError, "--hardware-compatible is not possible"),
        (FULL, GPU, "auto", CAPABILITY, InputError, "--compute-capability is not possible"),
        (NOTHING, NONE, "auto", EngineOptions(workspace_mib=1), InputError, "--workspace is not possible"),
        # ONNX Runtime has no engine.
        *(
            (BOTH, GPU, "onnxruntime", options, InputError, f"{flag} is not possible: the target is onnxruntime")
            for options, flag in [
                (EngineOptions(workspace_mib=64), "--workspace"),
                (EngineOptions(optimization_level=0), "--opt-level"),
                (VERSION, "--version-compatible"),
                (HARDWARE, "--hardware-compatible"),
                (REFIT, "--refit"),
                (STRIP, "--strip-plan"),
                (CAPABILITY, "--compute-capability"),
            ]
        ),
    ],
)
def test_refusal(
    choose_with: Choose,
    installed: dict[str, str],
    gpu: bool,
    target: str,
    options: EngineOptions,
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error) as caught:
        choose_with(installed, gpu, target, options)
    assert type(caught.value) is error
    assert words in str(caught.value)


def test_every_option_is_refused_for_onnxruntime_or_about_the_batch() -> None:
    """So that an option added later is not silently ignored there."""
    for option, default in vars(EngineOptions()).items():
        if option != "profiles":
            asked = EngineOptions(**{option: ("8.6",) if default == () else True if default is False else 1})
            with pytest.raises(InputError):
                flavours.refuse_engine_options(asked, "of this test")


def test_the_driver_is_found_when_none_is_given(monkeypatch: pytest.MonkeyPatch, driver_with_gpu: Driver) -> None:
    monkeypatch.setattr(Flavour, "version", lambda self: BOTH[self.name])
    monkeypatch.setattr(flavours, "find_driver", lambda: driver_with_gpu)
    assert choose("auto", PLAIN).flavour is TENSORRT


# Looking a flavour up


def install(monkeypatch: pytest.MonkeyPatch, modules: set[str], distributions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name in distributions:
            return distributions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else None)
    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("flavour", "modules", "distributions", "version"),
    [
        (TENSORRT, {"tensorrt"}, {"tensorrt": "10.13.3.9"}, "10.13.3.9"),
        (TENSORRT, {"tensorrt"}, {"tensorrt-cu13": "11.4.0"}, "11.4.0"),
        (TENSORRT, {"tensorrt"}, {"tensorrt-cu12-bindings": "10.9"}, "10.9"),
        (TENSORRT, {"tensorrt"}, {}, "unknown"),
        (TENSORRT, {"tensorrt_rtx"}, {"tensorrt": "10.13"}, None),
        (TENSORRT, set(), {}, None),
        (TENSORRT_RTX, {"tensorrt_rtx"}, {"tensorrt-rtx-cu13": "1.7.1.116"}, "1.7.1.116"),
        (TENSORRT_RTX, {"tensorrt_rtx"}, {"tensorrt-rtx": "1.2"}, "1.2"),
        (TENSORRT_RTX, {"tensorrt"}, {"tensorrt": "10.13"}, None),
    ],
)
def test_version(
    monkeypatch: pytest.MonkeyPatch,
    flavour: Flavour,
    modules: set[str],
    distributions: dict[str, str],
    version: str | None,
) -> None:
    install(monkeypatch, modules, distributions)
    assert flavour.version() == version


def test_looking_a_flavour_up_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_import(name: str, *_: object) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(importlib, "import_module", no_import)
    for flavour in FLAVOURS:
        flavour.version()
    assert [flavour.name for flavour in FLAVOURS] == ["tensorrt", "tensorrt-rtx"]


def test_a_gpu_that_rtx_does_not_list_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flavour, "version", lambda self: "1.7.1" if self is TENSORRT_RTX else None)
    for capability, listed in (((8, 9), True), ((9, 0), False)):
        driver = Driver((13, 0), (Gpu("NVIDIA Test", capability, 80 << 30),), None)
        reason = choose("auto", EngineOptions(), driver).reason
        assert ("NVIDIA Test here has compute capability 9.0, which tensorrt-rtx does not list" in reason) != listed


@pytest.mark.parametrize(
    ("wanted", "words"), [(("9.0",), "tensorrt-rtx knows 7.5, 8.0"), (("8.6", "8.6"), "given twice")]
)
def test_compute_capabilities_are_checked_before_the_build(
    monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(Flavour, "version", lambda self: "1.7.1" if self is TENSORRT_RTX else None)
    with pytest.raises(InputError, match=words):
        choose("tensorrt-rtx", EngineOptions(compute_capabilities=wanted), Driver(None, (), "no driver"))
