"""The simulated driver's own functions, beside the ones it has of CUDA."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


@functools.cache
def simulated() -> ctypes.CDLL:
    """The library, which must be the one that `libcuda.so.1` means in this process. OSError when it is not."""
    library = ctypes.CDLL("libcuda.so.1")
    try:
        library.sim_count.restype = library.sim_setting.restype = ctypes.c_uint64
        library.sim_set.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
        library.sim_last_misuse.restype = ctypes.c_char_p
        library.sim_shadow.argtypes, library.sim_shadow.restype = [ctypes.c_uint64], ctypes.c_void_p
        library.sim_access.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        library.sim_access.restype = ctypes.c_void_p
        library.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    except AttributeError:
        raise OSError("libcuda.so.1 is not the simulated driver") from None
    return library


def count(what: str) -> int:
    """One of the driver's counters; KeyError for a name it has not."""
    value = simulated().sim_count(what.encode())
    if value == 2**64 - 1:
        raise KeyError(what)
    return value


def set_option(what: str, value: int) -> None:
    """Change "delay_us", "memory" (bytes), "gpus" or "compute_capability" (89 is 8.9) from now on."""
    if simulated().sim_set(what.encode(), value):
        raise KeyError(what)


def option(what: str) -> int:
    """What one of these is now."""
    return simulated().sim_setting(what.encode())


def misuse(where: str, what: str) -> None:
    """Count something that a caller must not do."""
    simulated().sim_misuse(where.encode(), what.encode())


def last_misuse() -> str:
    """The latest of them, in words."""
    return simulated().sim_last_misuse().decode()


def launch_host_function(stream: int, function: Any, data: int) -> int:
    """Enqueue a ctypes function; gives the status.

    Not by cuda.bindings: from 12.9.1 to 13.4.4 (13.5.0 is cured) the second launch of a graph that contains the
    function crashes in the wrapper that they put around it.
    """
    return simulated().cuLaunchHostFunc(stream, ctypes.cast(function, ctypes.c_void_p), data)


def check(result: tuple[Any, ...]) -> Any:
    """The value that a call of cuda.bindings.driver gave; RuntimeError for an error."""
    if int(result[0]):
        raise RuntimeError(result[0].name)
    return result[1] if len(result) == 2 else result[1:] or None
