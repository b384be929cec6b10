"""Where and with what a figure was measured: goes into every result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rxdeploy.atomic import write_bytes
from rxdeploy.bench import machine
from rxdeploy.pipeline import TOOLS, versions

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json, the machine's facts first."""
    facts = machine.facts()
    facts["versions"] |= versions(*TOOLS)
    path = RESULTS / f"{name}.json"
    write_bytes(path, (json.dumps({"machine": facts, **result}, indent=2) + "\n").encode())
    return path
