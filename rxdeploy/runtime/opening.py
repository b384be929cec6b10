"""Opening a model leaves the calling thread as it was.

Engines change the thread that opens a model. Where they are told to flush denormals to zero, ONNX Runtime (once a
process) and OpenVINO make it compute so, and with it every thread that is started from it: from a thread of its own, a
model's own threads compute so, and the caller's arithmetic stays as it was (of ONNX Runtime's sessions, that leaves out
the share of the calling thread).

OpenVINO's CPU plugin also gives the thread a stack for signals, of its own for each model. Models closed in the order
in which they were opened leave it with one that was freed, and the next signal that Python handles, such as Ctrl-C,
crashes the process (2026.4.1: `SigAltStackSetup` in its source).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Opened = TypeVar("Opened")


def in_its_own_thread(opener: Callable[[], Opened]) -> Opened:
    """What `opener` gives or raises, called in a thread that ends with it."""
    with ThreadPoolExecutor(1, "rxdeploy-open") as thread:
        return thread.submit(opener).result()
