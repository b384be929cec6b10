"""benchmarks/gpu_acceptance.py from end to end, as far as it goes without a GPU and without PyTorch's CUDA."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rxdeploy.cards import load_card

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu_acceptance")
    monkeypatch.setattr(module, "find_card", lambda name: load_card(tmp_path / f"{name}.toml"))
    yield module
    sys.modules.pop("gpu_acceptance")


def run(acceptance: Any, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    bundles, results = tmp_path / "bundles", tmp_path / "results"
    options = ["--bundles", str(bundles), "--batches", "1,4", "--seconds", "0.01", "--no-tests", *more]
    done = CliRunner().invoke(acceptance.main, [*options, "--output", str(results)], catch_exceptions=False)
    (report,) = results.glob("*.json")
    return done.exit_code, json.loads(report.read_text()), report.with_suffix(".md").read_text()


def test_parity_speed_and_what_was_not_possible(acceptance: Any, bundle_with_plan: Callable, tmp_path: Path) -> None:
    good = bundle_with_plan(profiles=((1, 1, 1), (1, 4, 8)))
    (tmp_path / "bundles").mkdir()
    good.rename(tmp_path / "bundles" / "good")
    code, report, text = run(acceptance, tmp_path)
    assert code == 0
    (row,) = report["bundles"]
    assert row["parity"]["passed"] and row["parity"]["relative_l2"] < 1e-5
    assert [speed["batch"] for speed in row["speed"]] == [1, 4]
    for speed in row["speed"]:
        ours = {"rxdeploy, on the device", "rxdeploy, copies included", "rxdeploy, copies overlapped"}
        assert set(speed["ms"]) == ours
        assert all(ms > 0 for ms in speed["ms"].values())
        assert set(speed["not run"]) == {
            "ONNX Runtime CUDA",
            "torch eager, channels_last",
            "torch.compile max-autotune, channels_last",
        }
    assert "| small | fp32, own groups | 4 | rxdeploy, on the device |" in text
    assert "| ONNX Runtime CUDA | not run |" in text


def test_a_plan_that_computes_something_else_fails(
    acceptance: Any, bundle_with_plan: Callable, model: Callable, make_card: Callable, tmp_path: Path
) -> None:
    from standin.plan import make_plan

    other = make_plan(model(make_card(mean=[0.1, 0.1, 0.1])), flavour="tensorrt_rtx", profiles=[(1, 4, 8)])
    (tmp_path / "bundles").mkdir()
    bundle_with_plan(plan=other, profiles=((1, 4, 8),)).rename(tmp_path / "bundles" / "bad")
    code, report, text = run(acceptance, tmp_path, "--no-layers")
    assert code == 1
    assert report["bundles"][0]["parity"]["passed"] is False
    assert "| NO |" in text


def test_a_plan_that_does_not_load_is_said_to_be_not_run(
    acceptance: Any, bundle_with_plan: Callable, tmp_path: Path
) -> None:
    (tmp_path / "bundles").mkdir()
    bundle_with_plan(compute_capability="12.0").rename(tmp_path / "bundles" / "elsewhere")
    code, report, text = run(acceptance, tmp_path)
    assert code == 1
    assert "speed" not in report["bundles"][0]
    assert "not run: device tensorrt is not possible here" in text
