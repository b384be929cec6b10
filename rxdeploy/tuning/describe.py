"""What a bundle was tuned with, in one line."""

from __future__ import annotations

import msgspec

from rxdeploy.engines.bundle import Tuning


def describe(tuning: Tuning) -> str:
    """One line for people."""
    widths = sorted(set(tuning.groups.values()))
    groups = f"{len(tuning.groups)} grouped layers packed to {', '.join(map(str, widths))} channels a group"
    parts = [groups if tuning.groups else "groups as the model has them"]
    parts += [f"passes {', '.join(tuning.passes)}"] if tuning.passes else []
    if not tuning.tuned:
        return f"untuned, by rule: {'; '.join(parts)}"
    if tuning.cpu:
        parts.append(", ".join(_settings(tuning)))
    ratio = tuning.report["whole"]["median"]
    return f"{'; '.join(parts)}; {1 / ratio:.2f} times as fast as it was, on {tuning.device}"


def _settings(tuning: Tuning) -> list[str]:
    assert tuning.cpu is not None
    own = msgspec.structs.asdict(tuning.cpu)
    plain = msgspec.structs.asdict(type(tuning.cpu)())
    changed = [f"{name} {value}" for name, value in own.items() if value != plain[name] and name != "engine"]
    return [f"on {tuning.cpu.engine}", *changed]
