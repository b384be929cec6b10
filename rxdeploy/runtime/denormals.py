"""Denormals as zero: a state of each thread's arithmetic, which is not to become the caller's.

Where they are told to flush denormals, ONNX Runtime (once a process) and OpenVINO change the thread that opens a model,
and with it every thread that is started from it. Opened in a thread of its own, a model's own threads compute so, and
the caller's arithmetic stays as it was; of ONNX Runtime's sessions, that leaves out the share of the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Opened = TypeVar("Opened")


def opened(opener: Callable[[], Opened], denormals_as_zero: bool) -> Opened:
    """What `opener` gives or raises; where it changes its thread's arithmetic, in a thread that ends with it."""
    if not denormals_as_zero:
        return opener()
    with ThreadPoolExecutor(1, "rxdeploy-open") as thread:
        return thread.submit(opener).result()
