"""What a bundle was tuned with, in one line."""

from __future__ import annotations

from rxdeploy.engines.bundle import Tuning
from rxdeploy.runtime.cpu import ENGINES, in_words


def describe(tuning: Tuning) -> str:
    """One line for people."""
    widths = sorted(set(tuning.groups.values()))
    groups = f"{len(tuning.groups)} grouped layers packed to {', '.join(map(str, widths))} channels a group"
    parts = [groups if tuning.groups else "groups as the model has them"]
    parts += [f"passes {', '.join(tuning.passes)}"] if tuning.passes else []
    if not tuning.tuned:
        return f"untuned, by rule: {'; '.join(parts)}"
    if tuning.cpu:
        parts.append(f"on {ENGINES[tuning.cpu.engine]}{in_words(tuning.cpu)}")
    whole = tuning.report["whole"]
    gain = f"{1 / whole['median']:.2f} times as fast as untuned" if whole.get("kept", True) else "nothing was faster"
    return f"{'; '.join(parts)}; {gain}, on {tuning.device}"
