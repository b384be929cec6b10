"""The assertion and the pytest plugin, in pytest processes of their own as in a user's repository."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rxdeploy.cards.card import tomllib
from rxdeploy.cards.digits_images import Digits
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.evaluation import AccuracyDrop, DoubtfulFigures, TooFewImages, assert_no_drop, assess, write_baseline
from rxdeploy.evaluation.baseline import from_evaluation, read_baseline
from rxdeploy.runtime import Session

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "accuracy-regression"
Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def baseline(bundle: Bundles, npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baseline") / "baseline.json"
    write_baseline(from_evaluation(assess(bundle("fp32"), npz, device="cpu").evaluation), path)
    return path


def test_the_same_accuracy_passes(bundle: Bundles, baseline: Path, npz: Path) -> None:
    found = assert_no_drop(bundle("fp16"), baseline, npz, max_drop=1.5, device="cpu")
    assert (found.images, found.unseen) == (540, 0)


def test_a_damaged_model_fails(bundle: Bundles, baseline: Path, held_out: Digits) -> None:
    damaged = bundle("fp32", noise=0.4)
    with pytest.raises(AccuracyDrop) as caught:
        assert_no_drop(damaged, baseline, (held_out.images, held_out.labels), max_drop=1.5, device="cpu")
    assert isinstance(caught.value, AssertionError)
    first, *rest = str(caught.value).splitlines()
    assert "which is more than the 1.5 allowed" in first
    lost = caught.value.comparison.lost
    assert rest[0].startswith("candidate: digits_resnext14_8x8d fp32, weights 0.4.safetensors, bundle ")
    assert rest[1].startswith("baseline: ") and "top-1 99.63% (538 of 540)" in rest[1]
    assert sum(line.startswith("lost: ") for line in rest) == 10 and rest[-1] == f"... and {lost - 10} more"


def test_a_bundle_as_the_baseline_gives_the_same(bundle: Bundles, baseline: Path, npz: Path) -> None:
    damaged = bundle("fp32", noise=0.4)
    by_file = assess(damaged, npz, device="cpu", baseline=baseline).comparison
    by_bundle = assess(damaged, npz, device="cpu", baseline=bundle("fp32")).comparison
    assert by_file == by_bundle and by_file and by_file.lost > 20


def test_too_few_images_warn_or_fail(bundle: Bundles, baseline: Path, npz: Path) -> None:
    with pytest.warns(TooFewImages, match=r"too few images to tell: .*about 770 images would") as caught:
        assert_no_drop(bundle("fp16"), baseline, npz, device="cpu")
    assert caught[0].filename == __file__
    with pytest.raises(AccuracyDrop, match="too few images to tell"):
        assert_no_drop(bundle("fp16"), baseline, npz, device="cpu", too_few="fail")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as for a test run with filterwarnings=error
        with pytest.raises(TooFewImages):
            assert_no_drop(bundle("fp16"), baseline, npz, device="cpu")


def test_bad_input_is_an_error_before_any_image_is_run(bundle: Bundles, baseline: Path, npz: Path) -> None:
    with pytest.raises(InputError, match="max drop nan"):
        assert_no_drop(bundle(), baseline, npz, float("nan"))
    with pytest.raises(InputError, match="expected a path, a Dataset or a pair of arrays"):
        assert_no_drop(bundle(), baseline, 7, device="cpu")
    with pytest.raises(InputError, match="too_few is 'skip'"):
        assert_no_drop(bundle(), baseline, npz, too_few="skip")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="neither a bundle nor a baseline"):
        assert_no_drop(bundle(), npz, npz, device="cpu")
    with pytest.raises(InputError, match="not a bundle"):
        assert_no_drop(npz.parent, baseline, npz, device="cpu")


def run_pytest(folder: Path, *options: str, path: Path | None = None, **environment: str) -> tuple[int, str]:
    """pytest in `folder`, with rxdeploy's source and `path` to import from."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    paths = os.pathsep.join(str(part) for part in (path, ROOT) if part)
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def run_alone(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """With the plugin and no other; warnings are errors."""
    alone = ("-p", "rxdeploy.evaluation.plugin", "-W", "error")
    return run_pytest(folder, *alone, *options, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **environment)


def copy_example(folder: Path) -> Path:
    for part in ("tests/test_accuracy.py", "data/held_out.npz", "baseline.json"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_bytes((EXAMPLE / part).read_bytes())
    return folder


def test_the_example_passes(bundle: Bundles, tmp_path: Path) -> None:
    code, output = run_alone(copy_example(tmp_path), "--junitxml=r.xml", CANDIDATE=str(bundle("fp16")))
    assert code == 0, output
    case = xml.etree.ElementTree.parse(tmp_path / "r.xml").getroot()[0][0]
    properties = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    assert properties["rxdeploy_verdict"] == "pass"
    assert (properties["rxdeploy_images"], properties["rxdeploy_top1_percent"]) == ("540", "99.6296")


def test_the_example_goes_red_for_a_damaged_model(bundle: Bundles, tmp_path: Path) -> None:
    damaged = str(bundle("fp32", noise=0.4))
    code, output = run_alone(copy_example(tmp_path), "--junitxml=r.xml", CANDIDATE=damaged)
    assert code == 1, output
    assert "which is more than the 1.5 allowed" in output
    assert "rxdeploy/evaluation/" not in output.replace(os.sep, "/")  # no traceback through our code
    case = xml.etree.ElementTree.parse(tmp_path / "r.xml").getroot()[0][0]
    (failure,) = case.iter("failure")
    message = failure.get("message") or ""
    assert "drop in top-1 " in message.splitlines()[0] and "(95% interval " in message.splitlines()[0]
    assert "lost: " in (failure.text or "") and " taken for " in (failure.text or "")
    assert {p.get("value") for p in case.iter("property") if p.get("name") == "rxdeploy_verdict"} == {"fail"}


def test_warnings_are_of_the_users_test_and_come_after_the_figures(bundle: Bundles, tmp_path: Path) -> None:
    copy_example(tmp_path)
    test = tmp_path / "tests" / "test_accuracy.py"
    test.write_text(test.read_text().replace("max_drop=1.5", "max_drop=0.5"))
    code, output = run_alone(tmp_path, "-W", "default", CANDIDATE=str(bundle("fp16")))
    assert code == 0, output
    line = 1 + test.read_text().splitlines().index("    rxdeploy_accuracy.assert_no_drop(")
    assert f"test_accuracy.py:{line}: TooFewImages: too few images to tell" in output
    assert "regression.py" not in output and "plugin.py" not in output
    code, output = run_alone(tmp_path, "--junitxml=r.xml", CANDIDATE=str(bundle("fp16")))
    assert code == 1 and "TooFewImages: too few images to tell" in output, output
    case = xml.etree.ElementTree.parse(tmp_path / "r.xml").getroot()[0][0]
    properties = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    assert properties["rxdeploy_verdict"] == "too few images to tell"
    assert properties["rxdeploy_images_not_in_baseline"] == properties["rxdeploy_baseline_images_not_in_data"] == "0"


def test_doubts_are_warnings_or_in_the_message(bundle: Bundles, baseline: Path, held_out: Digits) -> None:
    half = (held_out.images[:400], held_out.labels[:400])
    with pytest.warns(DoubtfulFigures, match="140 of its own are not among them") as caught:
        found = assert_no_drop(bundle("fp16"), baseline, half, max_drop=2, device="cpu")
    assert caught[0].filename == __file__ and (found.unseen, found.missing) == (0, 140)
    with pytest.raises(AccuracyDrop) as failed:
        assert_no_drop(bundle("fp32", noise=0.4), baseline, half, max_drop=1.5, device="cpu")
    lines = str(failed.value).splitlines()
    assert "140 images of the baseline are not in the data" in lines
    assert any(line.startswith("doubtful: the baseline is of other images") for line in lines)


def test_a_baseline_bundles_failure_does_not_lose_the_run(
    bundle: Bundles, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Session.run

    def run(self: Session, *arguments: Any) -> Any:
        if self.bundle.manifest.precision == "fp32":
            raise CheckFailed("logits are NaN")
        return original(self, *arguments)

    monkeypatch.setattr(Session, "run", run)
    with pytest.raises(CheckFailed, match=r"logits are NaN \(the bundle's own result is stored in .*b\.json\)"):
        assess(bundle("fp16"), npz, device="cpu", baseline=bundle("fp32"), save_baseline=tmp_path / "b.json")
    assert read_baseline(tmp_path / "b.json").images == 540


def test_the_examples_data_are_the_held_out_digits(held_out: Digits) -> None:
    import numpy as np

    with np.load(EXAMPLE / "data" / "held_out.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], held_out.images)
        np.testing.assert_array_equal(arrays["labels"], held_out.labels)


def test_the_entry_point_gives_the_fixture_and_imports_nothing_heavy(tmp_path: Path) -> None:
    """With the metadata that an installed rxdeploy has."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    installed = tmp_path / "site" / "rxdeploy-9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: rxdeploy\nVersion: 9\n")
    (installed / "RECORD").write_text("rxdeploy/__init__.py,,\nrxdeploy/evaluation/plugin.py,,\n")
    lines = [f"{name} = {module}" for name, module in table.items()]
    (installed / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines, ""]))
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\n"
        "def test_light(rxdeploy_accuracy):\n"
        "    heavy = {'numpy', 'onnxruntime', 'PIL', 'torch', 'onnx', 'msgspec', 'rich', 'click'}\n"
        "    assert not heavy & {name.partition('.')[0] for name in sys.modules}\n"
        "    ours = {name for name in sys.modules if name.startswith('rxdeploy')}\n"
        "    assert ours == {'rxdeploy', 'rxdeploy.evaluation', 'rxdeploy.evaluation.plugin'}\n"
        "\n\ndef test_fixture(rxdeploy_accuracy):\n"
        "    assert callable(rxdeploy_accuracy.assert_no_drop)\n"
    )
    site = tmp_path / "site"
    # By the entry point's name, without the plugins that may be installed here and import what they like.
    by_name = ("-p", "rxdeploy", "-W", "error")
    code, output = run_pytest(tmp_path, *by_name, path=site, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert code == 0, output
    # And as it comes, found by itself; a warning would say that it was imported before pytest could rewrite asserts.
    strict = ("-W", "error::pytest.PytestAssertRewriteWarning")
    code, output = run_pytest(tmp_path, *strict, "-k", "fixture", path=site)
    assert code == 0, output
    # And where something has imported rxdeploy already.
    (tmp_path / "site" / "sitecustomize.py").write_text("import rxdeploy.evaluation\n")
    code, output = run_pytest(tmp_path, *strict, "-k", "fixture", path=site)
    assert code == 0, output
