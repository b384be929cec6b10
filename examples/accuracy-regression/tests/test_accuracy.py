"""The candidate has not lost accuracy against the stored baseline. `rxdeploy_accuracy` comes with rxdeploy."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CANDIDATE = Path(os.environ.get("CANDIDATE", ROOT / "candidate"))


def test_accuracy_has_not_dropped(rxdeploy_accuracy):
    rxdeploy_accuracy.assert_no_drop(
        CANDIDATE, ROOT / "baseline.json", ROOT / "data" / "held_out.npz", max_drop=1.5, device="cpu"
    )
