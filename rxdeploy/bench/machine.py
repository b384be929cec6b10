"""Where and with what a figure was measured: a figure without it means nothing."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from rxdeploy import __version__
from rxdeploy.engines.flavours import FLAVOURS, installed_version
from rxdeploy.engines.gpu import find_driver

_PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "cuda-bindings",
    "tensorrt_lean",
    "matplotlib",
)
_CPUINFO = Path("/proc/cpuinfo")
# Instruction sets that decide a CPU's speed.
_WIDE = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_fp16", "amx_int8")


def facts() -> dict[str, Any]:
    """Date, processor, cores this process may use, memory, GPUs, driver and versions."""
    driver = find_driver()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "instruction_sets": list(instruction_sets()),
        "cores": cores(),
        "load_average_1_min": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [
            {"name": gpu.name, "compute_capability": list(gpu.compute_capability), "memory_bytes": gpu.memory}
            for gpu in driver.gpus
        ],
        "driver_cuda_version": list(driver.cuda_version) if driver.cuda_version else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {"rxdeploy": __version__, "python": platform.python_version(), **_versions()},
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def instruction_sets() -> tuple[str, ...]:
    """Those of x86 that decide how fast, and in int8 how exactly, ONNX Runtime computes; by Linux's names."""
    flags = _cpuinfo().get("flags", "").split()
    return tuple(flag for flag in _WIDE if flag in flags)


def processor() -> str:
    """The processor's own name, as far as Linux tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine() or "unknown"


def _cpuinfo() -> dict[str, str]:
    """The facts of the last core that /proc/cpuinfo lists."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    facts = (line.partition(":") for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, _, value in facts}


def _versions() -> dict[str, str]:
    found = {name: installed_version((name,)) for name in _PACKAGES}
    found |= {flavour.name: flavour.version() for flavour in FLAVOURS}
    return {name: version for name, version in found.items() if version is not None}
