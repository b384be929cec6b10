"""Where and with what a figure was measured: goes into every result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from rxdeploy import __version__
from rxdeploy.atomic import write_bytes
from rxdeploy.engines.gpu import find_driver
from rxdeploy.pipeline import TOOLS, versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, GPU, versions and date."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [gpu.name for gpu in find_driver().gpus],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {"rxdeploy": __version__, **versions(*TOOLS, "tensorrt-rtx-cu13", "tensorrt")},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.processor() or 'unknown')} ({' '.join(wide)})"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json, the machine's facts first."""
    path = RESULTS / f"{name}.json"
    write_bytes(path, (json.dumps({"machine": machine(), **result}, indent=2) + "\n").encode())
    return path
