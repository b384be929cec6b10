"""What a user can ask of tuning."""

from __future__ import annotations

from rxdeploy.engines.options import EngineOptions
from rxdeploy.errors import InputError

AUTO, NATIVE = "auto", "native"


def parse_groups(text: str) -> int | None:
    """``--groups``: None for auto, 0 for native (as the model has them), or the channels a group."""
    if text in (AUTO, NATIVE):
        return None if text == AUTO else 0
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 0 < int(text) <= 1 << 16):
        raise InputError(f"--groups {text}: auto, native, or how many channels a group is to have (8, 16, 32, 64 ...)")
    return int(text)


def batches(options: EngineOptions) -> tuple[int, ...]:
    """The batch sizes to tune for, all alike: the smallest, and the largest that a profile is to be best at."""
    smallest, best = min(each.min for each in options.profiles), max(each.opt for each in options.profiles)
    return tuple(sorted({smallest, best}))
