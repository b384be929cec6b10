"""`rxdeploy evaluate` as people and scripts meet it: what goes where, and exit codes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from rxdeploy import cli
from rxdeploy.cards.digits_images import Digits
from rxdeploy.evaluation.baseline import classes_digest, read_baseline
from rxdeploy.runtime import Session

Bundles = Callable[..., Path]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    for variable in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = cli.run(["evaluate", *map(str, arguments), "--device", "cpu"])
        return Result(code, *capsys.readouterr())

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


def test_figures_and_confusions(run: Run, bundle: Bundles, npz: Path) -> None:
    result = run(bundle("fp32"), "--data", npz)
    assert (result.code, result.err) == (0, "")
    # The card's own figure: 538 of 540. Wilson's interval by SciPy: 0.98660 to 0.99898.
    assert "top-1          99.63% (538 of 540), 95% interval 98.66 to 99.90%" in result.out
    assert "top-5          100.00% (540 of 540), 95% interval 99.29 to 100.00%" in result.out
    assert "images/s, with reading and decoding" in result.out
    assert "not compared:" in result.out and "this is not the ImageNet validation set" in result.out
    assert "Worst classes" in result.out and "3 (three)" in result.out and "9 (nine) 2x" in result.out
    assert max(map(len, result.out.splitlines())) <= 110


def test_a_stored_baseline_and_a_damaged_model(run: Run, bundle: Bundles, npz: Path, tmp_path: Path) -> None:
    assert run(bundle("fp32"), "--data", npz, "--save-baseline", "new/b.json").code == 0
    good = run(bundle("fp16"), "--data", npz, "--baseline", "new/b.json", "--max-drop", "1.5")
    assert good.code == 0 and "verdict        pass, for a drop of at most 1.5 points" in good.out and not good.err
    bad = run(bundle("fp32", noise=0.4), "--data", npz, "--baseline", "new/b.json", "--max-drop", "1.5")
    assert bad.code == 1 and "Images that changed" in bad.out and "verdict        fail" in bad.out
    assert bad.err.startswith("error: drop in top-1 ") and bad.err.endswith("more than the 1.5 allowed\n")
    assert bad.err.count("\n") == 1
    unsure = run(bundle("fp16"), "--data", npz, "--baseline", "new/b.json", "--max-drop", "0.5")
    assert unsure.code == 0 and unsure.err.startswith("WARNING: too few images to tell: ")
    assert "verdict        too few images to tell" in unsure.out
    without = run(bundle("fp32", noise=0.4), "--data", npz, "--baseline", "new/b.json")
    assert without.code == 0 and "McNemar's exact p" in without.out and "verdict" not in without.out


def test_json_is_nothing_but_json_and_has_every_change(run: Run, bundle: Bundles, npz: Path) -> None:
    result = run(bundle("fp32", noise=0.4), "--data", npz, "--baseline", bundle("fp32"), "--max-drop", "0.5", "--json")
    assert result.code == 1
    data = json.loads(result.out)
    comparison = data["comparison"]
    assert data["top1"]["right"] == comparison["candidate_right"] and comparison["baseline_right"] == 538
    kinds = [change["kind"] for change in comparison["changes"]]
    assert (kinds.count("lost"), kinds.count("gained")) == (comparison["lost"], comparison["gained"])
    assert comparison["drop_points"] == pytest.approx(100 * (538 - data["top1"]["right"]) / 540)
    assert data["verdict"]["outcome"] == "fail" and data["images_run_now"] == 540 and data["images_per_s"] > 0
    assert data["card_accuracy"]["not_compared_because"].startswith("this is not the ImageNet")


def test_predictions_of_both_and_again(
    run: Run, bundle: Bundles, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", npz, "--baseline", bundle("fp32"), "--predictions", "p.jsonl", "--limit", "60", "--json")
    first = json.loads(run(bundle("fp16"), *options).out)
    assert sorted(path.name for path in tmp_path.glob("p*")) == ["p.baseline.jsonl", "p.jsonl"]
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 61

    def never(self: Session, images: Any, *more: Any) -> Any:
        raise AssertionError("everything is there already")

    monkeypatch.setattr(Session, "run", never)
    again = run(bundle("fp16"), *options)
    second = json.loads(again.out)
    assert (second["top1"], second["comparison"]) == (first["top1"], first["comparison"])
    assert (second["images_run_now"], second["images_per_s"]) == (0, None)
    assert not again.err
    assert "not measured: every prediction was in the file already" in run(bundle("fp16"), *options[:-1]).out
    refused = run(bundle("fp32"), *options)
    assert refused.code == 2 and "of another bundle, device or data" in refused.err


def test_ctrl_c_keeps_what_is_done(
    run: Run, bundle: Bundles, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Session.run, []

    def interrupted(self: Session, images: Any, *more: Any) -> Any:
        calls.append(len(images))
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(self, images, *more)

    options = ("--data", npz, "--batch", "100", "--predictions", "p.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", interrupted)
        assert run(bundle("fp32"), *options).code == 130
    assert len((tmp_path / "p.jsonl.partial").read_text().splitlines()) == 201
    result = run(bundle("fp32"), *options)
    assert result.code == 0 and "(538 of 540)" in result.out and "of the 340 images run now" in result.out
    assert "200 of 540 images were done before" in result.err


def test_nan_logits_are_an_error_that_loses_nothing(
    run: Run, bundle: Bundles, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        from rxdeploy.runtime.onnxrt import OnnxEngine

        original, calls = OnnxEngine.run, []

        def poisoned(self: OnnxEngine, batch: Any, *more: Any) -> Any:
            calls.append(1)
            logits = original(self, batch, *more)
            if len(calls) == 3:
                logits[0, 0] = np.nan
            return logits

        patch.setattr(OnnxEngine, "run", poisoned)
        result = run(bundle("fp32"), "--data", npz, "--batch", "100", "--predictions", "p.jsonl")
    assert result.code == 1 and result.err.startswith("error: ") and result.err.count("\n") == 1
    assert len((tmp_path / "p.jsonl.partial").read_text().splitlines()) == 201


def test_fewer_images_than_a_batch(run: Run, bundle: Bundles, npz: Path) -> None:
    result = run(bundle("fp32"), "--data", npz, "--limit", "3", "--batch", "64")
    assert result.code == 0 and "3 of 540 images" in result.out


def test_images_that_the_baseline_has_not_seen(run: Run, bundle: Bundles, held_out: Digits, tmp_path: Path) -> None:
    np.savez(tmp_path / "part.npz", images=held_out.images[:100], labels=held_out.labels[:100])
    np.savez(tmp_path / "more.npz", images=held_out.images[90:150], labels=held_out.labels[90:150])
    np.savez(tmp_path / "other.npz", images=held_out.images[300:], labels=held_out.labels[300:])
    assert run(bundle("fp32"), "--data", "part.npz", "--save-baseline", "b.json").code == 0
    some = run(bundle("fp32"), "--data", "more.npz", "--baseline", "b.json")
    assert some.code == 0 and "left out       50 images that are not in the baseline" in some.out
    assert "missing        90 images of the baseline that are not in the data" in some.out
    assert some.err.startswith("WARNING: the baseline is of other images: it has not seen 50 of today's 60, and 90 of")
    facts = json.loads(run(bundle("fp32"), "--data", "more.npz", "--baseline", "b.json", "--json").out)
    comparison = facts["comparison"]
    assert (comparison["images_not_in_baseline"], comparison["baseline_images_not_in_data"]) == (50, 90)
    assert len(facts["warnings"]) == 1
    # Of a sample it cannot be told.
    sample = run(bundle("fp32"), "--data", "part.npz", "--baseline", "b.json", "--limit", "50", "--json")
    assert json.loads(sample.out)["comparison"]["baseline_images_not_in_data"] is None and not sample.err
    none = run(bundle("fp32"), "--data", "other.npz", "--baseline", "b.json", "--save-baseline", "c.json")
    assert none.code == 2 and "seen none of the 240 images" in none.err and "stored in c.json" in none.err
    assert read_baseline(tmp_path / "c.json").images == 240


def test_one_image_in_a_hundred_may_be_another(run: Run, bundle: Bundles, held_out: Digits, tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=held_out.images[:200], labels=held_out.labels[:200])
    np.savez(tmp_path / "moved.npz", images=held_out.images[2:202], labels=held_out.labels[2:202])
    assert run(bundle("fp32"), "--data", "some.npz", "--save-baseline", "b.json").code == 0
    found = run(bundle("fp32"), "--data", "moved.npz", "--baseline", "b.json")
    assert found.code == 0 and not found.err
    assert "left out       2 images" in found.out and "missing        2 images" in found.out


def test_a_failed_check_stores_no_baseline(run: Run, bundle: Bundles, npz: Path, tmp_path: Path) -> None:
    assert run(bundle("fp32"), "--data", npz, "--save-baseline", "b.json").code == 0
    options = ("--data", npz, "--baseline", "b.json", "--save-baseline", "new.json")
    bad = run(bundle("fp32", noise=0.4), *options, "--max-drop", "1.5")
    assert bad.code == 1 and "not stored as a baseline: new.json" in bad.err
    unsure = run(bundle("fp16"), *options, "--max-drop", "0.5", "--too-few", "fail")
    assert unsure.code == 1 and "error: too few images to tell: " in unsure.err
    assert not (tmp_path / "new.json").exists()
    assert run(bundle("fp16"), *options, "--max-drop", "0.5").code == 0
    assert (tmp_path / "new.json").exists()


def test_labels_in_a_wrong_order(run: Run, bundle: Bundles, held_out: Digits, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", images=held_out.images, labels=(held_out.labels + 1) % 10)
    found = run(bundle("fp32"), "--data", "wrong.npz")
    assert found.code == 0 and found.err.startswith("WARNING: top-1 is at most ")
    assert "where guessing gives 10.00%: the classes of the data are probably in another order" in found.err


def test_a_baseline_that_is_much_worse(run: Run, bundle: Bundles, npz: Path) -> None:
    found = run(bundle("fp32"), "--data", npz, "--baseline", bundle("fp32", noise=0.4), "--max-drop", "0.5")
    assert found.code == 0 and found.err.startswith("WARNING: the baseline is 9.81 points worse than the bundle (95% ")
    assert found.err.count("\n") == 1


def test_class_names_in_another_order(run: Run, bundle: Bundles, npz: Path, tmp_path: Path) -> None:
    assert run(bundle("fp32"), "--data", npz, "--save-baseline", "b.json").code == 0
    stored = json.loads((tmp_path / "b.json").read_text())
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert stored["classes"] == classes_digest(names)
    (tmp_path / "other.json").write_text(json.dumps(stored | {"classes": classes_digest(names[::-1])}))
    other = run(bundle("fp32"), "--data", npz, "--baseline", "other.json")
    assert other.code == 2 and "its class names are not those of" in other.err and "another order" in other.err
    del stored["classes"]
    (tmp_path / "old.json").write_text(json.dumps(stored))
    assert run(bundle("fp32"), "--data", npz, "--baseline", "old.json").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", "1"), "--max-drop: a drop from what? Give --baseline too"),
        (("--max-drop", "-1", "--baseline", "b"), "max drop -1: it must be 0 to 100"),
        (("--baseline", "nothing.json"), "baseline nothing.json: no such file or bundle"),
        (("--baseline", "empty"), "not a bundle"),
        (("--baseline", "text"), "baseline text: neither a bundle nor a baseline"),
        (("--save-baseline", "empty"), "error: baseline empty: is a folder; give a file name\n"),
        (("--save-baseline", "x/../b", "--baseline", "b"), "--save-baseline b: the same as --baseline"),
        (("--save-baseline", "b", "--predictions", "b"), "--save-baseline b: the same as --predictions"),
        (("--predictions", "b", "--baseline", "b"), "--predictions b: the same as --baseline"),
        (("--predictions", "."), "predictions .: is a folder"),
        (("--predictions", "x" * 300), "File name too long"),
        (("--baseline", "x" * 300), "File name too long"),
        (("--baseline", "pipe"), "baseline pipe: neither a bundle nor a plain file"),
        (("--data", "pipe"), "neither a folder nor a plain file"),
        (("--data", "pipe.npz"), "neither a folder nor a plain file"),
        (("--data", "x" * 300), "File name too long"),
        (("--labels", "x" * 300), "File name too long"),
        (("--save-baseline", "text/b.json"), "baseline text/b.json"),
        (("--predictions", "empty"), "predictions empty: is a folder"),
        (("--predictions", "text"), "exists and is no predictions file"),
        (("--labels", "labels.txt"), "has its labels in it"),
        (("--data", "nothing"), "data nothing: no such file or folder"),
        (("--data", "empty"), "data empty: no images in it"),
    ],
)
def test_bad_input_is_one_error_before_any_work(
    run: Run,
    bundle: Bundles,
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("nothing is to be run"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello\n")
    for pipe in ("pipe", "pipe.npz"):
        os.mkfifo(tmp_path / pipe)
    result = run(bundle("fp32"), "--data", npz, *options)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and message in result.err and result.err.count("\n") == 1
