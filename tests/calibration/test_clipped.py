"""How many values a range cuts off, against a count of the values themselves."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from rich.console import Console

from rxdeploy.cache import Cache
from rxdeploy.calibration.histogram import Histogram
from rxdeploy.calibration.options import CalibrationOptions, SchemeName
from rxdeploy.calibration.report import clipped_table
from rxdeploy.cards import find_card
from rxdeploy.pipeline import Pipeline, Request

DIGITS = "digits_resnext14_8x8d"


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 2.5), (0.0, 0.5), (-9.0, 9.0)])
@pytest.mark.parametrize("relu", [False, True])
def test_the_share_beyond_a_range(low: float, high: float, relu: bool) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 5, 24, 24)).astype(np.float32))
    values = values.relu() if relu else values
    histogram = Histogram()
    histogram.add(values)
    expected = float(((values < low) | (values > high)).float().mean())
    # A bin is at most 0.4 % of its value wide, and values at an edge of the range lie on either side.
    assert histogram.beyond(low, high) == pytest.approx(expected, abs=0.002)
    assert (histogram.beyond(low, high) == 0) == (expected == 0)


def test_nothing_lies_beyond_the_extremes_or_in_nothing() -> None:
    histogram = Histogram()
    assert histogram.beyond(0, 0) == 0
    histogram.add(torch.tensor([[-3.0, 0.1, 7.0]]))
    assert histogram.beyond(histogram.low, histogram.high) == 0
    assert histogram.beyond(-2, 6) == pytest.approx(2 / 3)


def calibrated(folder: Path, cache: Path, scheme: SchemeName, **options: Any) -> tuple[dict[str, Any], Any, str]:
    """calibration.json, the manifest's facts, and what is said of them."""
    chosen = CalibrationOptions(**{"data": folder, "images": 40, **options})
    request = Request(find_card(DIGITS), "int8", target="onnxruntime", placement=scheme, calibration=chosen)
    with closing(Cache(cache, 10**12)) as opened:
        pipeline = Pipeline(request, opened)
        entry = pipeline.calibrate()
        return json.loads((entry.folder / "calibration.json").read_text()), entry.facts, pipeline.stages[-1].detail


@pytest.mark.parametrize("scheme", get_args(SchemeName))
def test_the_record_says_how_much_each_range_cuts_off(digit_folders: Path, tmp_path: Path, scheme: SchemeName) -> None:
    record, facts, text = calibrated(digit_folders, tmp_path, scheme, method="percentile")
    shares, ranges = record["clipped"][scheme], record["recipes"][scheme]["ranges"]
    assert shares.keys() == ranges.keys()
    # 99.99 % of the magnitudes lie within; tensors have few values here, so up to one more of them may not.
    assert 0 < max(shares.values()) < 3e-4
    for name, share in shares.items():
        extremes = record["tensors"][name]
        inside = ranges[name][0] <= extremes["low"] and extremes["high"] <= ranges[name][1]
        assert not (inside and share), name
    name, share = facts["most_clipped"]
    assert share == shares[name] == max(shares.values())
    assert f"of a tensor's values clipped ({name})" in text
    console = Console(width=200)
    with console.capture() as capture:
        console.print(clipped_table(record, scheme))
    assert name in capture.get() and f"{share:.3%}" in capture.get()


def test_the_whole_range_cuts_off_nothing(digit_folders: Path, tmp_path: Path) -> None:
    record, facts, text = calibrated(digit_folders, tmp_path, "onnxruntime", method="minmax")
    assert set(record["clipped"]["onnxruntime"].values()) == {0.0}
    assert facts["most_clipped"][1] == 0
    assert "clipped" not in text


def test_a_record_of_earlier_says_nothing_of_it(digit_folders: Path, tmp_path: Path) -> None:
    record, _, _ = calibrated(digit_folders, tmp_path, "onnxruntime", method="percentile")
    del record["clipped"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    again, facts, _ = calibrated(None, tmp_path, "onnxruntime", file=tmp_path / "old.json")  # type: ignore[arg-type]
    assert facts["most_clipped"] is None
    assert again["clipped"]["onnxruntime"] == {}
    assert clipped_table(again, "onnxruntime").row_count == clipped_table(record, "onnxruntime").row_count == 0
