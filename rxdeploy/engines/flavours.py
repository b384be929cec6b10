"""Which TensorRT is here, what each flavour can do, and which one a build should use.

Two Python modules with the same interface are known: `tensorrt` (the full library, versions 10 and 11) and
`tensorrt_rtx` (TensorRT for RTX). A flavour is looked up without importing it: importing loads hundreds of
megabytes, and some of TensorRT crashes without a driver.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

from rxdeploy.engines.gpu import Driver, find_driver
from rxdeploy.engines.options import EngineOptions
from rxdeploy.errors import EnvironmentLacks, InputError

Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]


@dataclass(frozen=True)
class Flavour:
    """One TensorRT that rxdeploy can drive."""

    name: Literal["tensorrt", "tensorrt-rtx"]
    module: str
    distributions: tuple[str, ...]  # pip packages that bring the module
    install: str
    builds_without_gpu: bool
    majors: tuple[int, ...]  # versions rxdeploy was written for
    refused: dict[str, str]  # option of EngineOptions -> why this flavour cannot do it
    refused_without_gpu: dict[str, str]
    compute_capabilities: tuple[str, ...] = ()  # that it can be told to build for; empty: it builds for the GPU here

    def version(self) -> str | None:
        """The installed version, or None when the module is not installed."""
        if importlib.util.find_spec(self.module) is None:
            return None
        return installed_version(self.distributions) or "unknown"


def installed_version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these pip packages that is installed, or None; nothing is imported."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


TENSORRT = Flavour(
    name="tensorrt",
    module="tensorrt",
    distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    install="pip install 'rxdeploy[tensorrt]'",
    builds_without_gpu=False,
    majors=(10, 11),
    refused={"compute_capabilities": "it builds for the GPU that is here; --hardware-compatible widens that"},
    refused_without_gpu={},
)

# What TensorRT-RTX 1.7.1 said to each of these, without a GPU, is in docs/engines.md.
_NEEDS_COMPILE = "TensorRT-RTX compiles for a GPU when it makes such a plan, and there is none here"
TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    install="pip install 'rxdeploy[rtx]'",
    builds_without_gpu=True,
    majors=(1,),
    refused={
        "version_compatible": "TensorRT-RTX has no lean runtime, which such plans need",
        "hardware_compatible": "TensorRT-RTX ignores it: its plans are for several GPU generations already; "
        "--compute-capability narrows or widens that",
    },
    refused_without_gpu={"refit": _NEEDS_COMPILE, "strip_plan": _NEEDS_COMPILE},
    compute_capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),  # ComputeCapability of version 1.7.1
)

# Best first: the full library times its kernels on the very GPU; RTX leaves that to the first run.
FLAVOURS = (TENSORRT, TENSORRT_RTX)


@dataclass(frozen=True)
class Choice:
    """What a build will do about an engine: `flavour` None means ONNX Runtime only. `reason` is for people."""

    flavour: Flavour | None
    version: str | None
    reason: str


def choose(target: Target, options: EngineOptions, driver: Driver | None = None) -> Choice:
    """Pick the TensorRT for `target`, or explain why there is none.

    "auto" takes the best flavour that can build here and do what `options` asks, and falls back to ONNX
    Runtime when there is none. A named target that cannot build here is EnvironmentLacks; an option it
    cannot honour is InputError, before anything is built.
    """
    driver = driver or find_driver()
    if target == "onnxruntime":
        refuse_engine_options(options, "the target is onnxruntime, which builds no engine")
        return Choice(None, None, "asked for: model.onnx runs on ONNX Runtime")
    if target != "auto":
        flavour = next(f for f in FLAVOURS if f.name == target)
        version = flavour.version()
        if problem := lacking(flavour, version, driver):
            raise EnvironmentLacks(f"target {target}: {problem}")
        if problem := unable(flavour, options, driver):
            raise InputError(f"target {target}: {problem}")
        return Choice(flavour, version, "; ".join(["asked for", *unlisted_gpus(flavour, driver)]))
    passed_over = []
    for flavour in FLAVOURS:
        version = flavour.version()
        if problem := lacking(flavour, version, driver) or unable(flavour, options, driver):
            passed_over.append(f"{flavour.name}: {problem}")
        else:
            best = "the best TensorRT that can build here"
            return Choice(flavour, version, "; ".join([best, *unlisted_gpus(flavour, driver), *passed_over]))
    reason = "no TensorRT can build here: " + "; ".join(passed_over)
    refuse_engine_options(options, reason)
    return Choice(None, None, reason)


def lacking(flavour: Flavour, version: str | None, driver: Driver) -> str | None:
    """What this machine lacks for building with `flavour`, or None."""
    if version is None:
        return f"the Python module {flavour.module} is not installed; {flavour.install} adds it"
    major = version.partition(".")[0]
    if major.isdigit() and int(major) not in flavour.majors:
        known = " and ".join(map(str, flavour.majors))
        return f"version {version} is installed, and rxdeploy drives version {known}; {flavour.install}"
    if not flavour.builds_without_gpu and driver.problem:
        return f"it builds only where a GPU is: {driver.problem}"
    return None


def unable(flavour: Flavour, options: EngineOptions, driver: Driver) -> str | None:
    """Which of `options` this flavour cannot honour, and why, or None."""
    refused = flavour.refused | (flavour.refused_without_gpu if driver.problem else {})
    for option, why in refused.items():
        if getattr(options, option):
            return f"{_flag(option)} is not possible: {why}"
    wanted = options.compute_capabilities
    for capability in wanted:
        if capability not in flavour.compute_capabilities:
            return f"--compute-capability {capability}: {flavour.name} knows {', '.join(flavour.compute_capabilities)}"
    return "--compute-capability is given twice with the same value" if len(set(wanted)) < len(wanted) else None


def unlisted_gpus(flavour: Flavour, driver: Driver) -> list[str]:
    """A warning for each GPU here that `flavour` does not list, so that its plans may not run on it."""
    listed = flavour.compute_capabilities
    found = {".".join(map(str, gpu.compute_capability)): gpu.name for gpu in driver.gpus}
    return [
        f"{name} here has compute capability {capability}, which {flavour.name} does not list: plans may not run on it"
        for capability, name in found.items()
        if listed and capability not in listed
    ]


def refuse_engine_options(options: EngineOptions, why: str) -> None:
    """InputError when something was asked of an engine that will not be built."""
    default = EngineOptions(profiles=options.profiles).as_facts()
    for option, value in options.as_facts().items():
        if value != default[option]:
            raise InputError(f"{_flag(option)} is not possible: {why}")


def _flag(option: str) -> str:
    return {
        "workspace_mib": "--workspace",
        "optimization_level": "--opt-level",
        "compute_capabilities": "--compute-capability",
    }.get(option, "--" + option.replace("_", "-"))
