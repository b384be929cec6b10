"""Runs tests/simulated in a process where libcuda.so.1 is the simulated driver; see its conftest."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "simulated" / "run.py"
NEEDED = ("cuda.bindings", "cuda.core", "onnxruntime", "onnx", "torch")


def lacking() -> str | None:
    """What the simulation cannot do without."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        return "the simulated driver is compiled with cc, on Linux"
    for module in NEEDED:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
            return f"the simulation needs {module}"
    # Measured: 12.8.0 and 12.9.0 keep the GIL while they wait, and the simulated engine needs it to get anywhere.
    if tuple(map(int, version("cuda-bindings").split(".")[:3])) < (12, 9, 1):
        return "cuda-bindings before 12.9.1 does not release the GIL"
    return None


@pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
def test_on_a_simulated_gpu() -> None:
    # Whoever hangs shows where after a minute.
    options = ["-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    process = subprocess.Popen(
        [sys.executable, str(RUN), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    if process.returncode:
        text = output.decode(errors="replace")
        pytest.fail(f"tests/simulated failed (status {process.returncode}):\n{text}", pytrace=False)
