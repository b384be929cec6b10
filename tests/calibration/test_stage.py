"""Whole calibrations through the pipeline and the command line: what comes out, what is reused, what fails how."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import rxdeploy
from rxdeploy.cache import Cache
from rxdeploy.calibration import gather as gathering
from rxdeploy.calibration.network import Network
from rxdeploy.calibration.options import CalibrationOptions
from rxdeploy.calibration.record import read_record
from rxdeploy.cards import find_card
from rxdeploy.cli import run as run_command
from rxdeploy.engines.bundle import Bundle, open_bundle
from rxdeploy.errors import CheckFailed, InputError
from rxdeploy.export.weights import load_weights, resolve_weights
from rxdeploy.pipeline import Pipeline, Request, Stage

DIGITS = "digits_resnext14_8x8d"
BATCH = 8


@pytest.fixture
def data(digit_folders: Path, tmp_path: Path) -> Path:
    """A copy of the digits' folders that a test may change."""
    return Path(shutil.copytree(digit_folders, tmp_path / "data"))


@pytest.fixture
def request_for(data: Path) -> Callable[..., Request]:
    def make(card: Any = None, placement: Any = None, **changes: Any) -> Request:
        options = CalibrationOptions(**{"data": data, "images": 40, "method": "mse", **changes})
        return Request(
            card or find_card(DIGITS), "int8", target="onnxruntime", calibration=options, placement=placement
        )

    return make


@contextlib.contextmanager
def pipeline(request: Request, cache: Path) -> Iterator[Pipeline]:
    with contextlib.closing(Cache(cache, 10**12)) as opened:
        yield Pipeline(request, opened)


def build(request: Request, tmp_path: Path) -> tuple[Bundle, list[Stage]]:
    with pipeline(request, tmp_path / "cache") as made:
        return made.build(tmp_path / "bundle"), made.stages


def calibration(request: Request, tmp_path: Path) -> dict[str, Any]:
    with pipeline(request, tmp_path / "cache") as made:
        return json.loads((made.calibrate().folder / "calibration.json").read_text())


def command(*arguments: object) -> Any:
    """Exit code, stdout and stderr of a command in this process."""
    from rxdeploy.cli import cli

    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], obj=tuple(map(str, arguments)))
    return result


@pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime"])
def test_a_build_that_runs(request_for: Callable[..., Request], data: Path, tmp_path: Path, placement: str) -> None:
    bundle, stages = build(request_for(placement=placement), tmp_path)
    names = ["export", "validate fp32", "calibrate", "precision", "pack", "validate int8", "bundle"]
    assert [stage.name for stage in stages] == names
    opened = open_bundle(bundle.path)
    facts = opened.manifest.quantisation
    assert facts is not None and opened.manifest.precision == "int8"
    assert (facts["scheme"], facts["images"], facts["method"]) == (placement, 40, "mse")
    assert facts["sqnr_db"] > 30
    assert opened.manifest.for_integers == (placement == "onnxruntime")
    assert (bundle.path / "model.onnx").stat().st_size < 800_000
    record = json.loads((bundle.path / "calibration.json").read_text())
    assert record["data"]["layout"] == "folders" and record["model"] == DIGITS
    paths = sorted(data.glob("*/*.png"))
    with rxdeploy.load(bundle.path, "cpu") as session:
        right = [found.predictions[0].index == int(found.path.parent.name) for found in session.classify(paths)]
    assert sum(right) >= 119


def test_what_has_not_changed_is_reused(request_for: Callable[..., Request], data: Path, tmp_path: Path) -> None:
    _, first = build(request_for(), tmp_path)
    assert not any(stage.reused for stage in first[:-1])
    _, second = build(request_for(), tmp_path)
    assert all(stage.reused for stage in second if stage.name != "bundle")
    _, third = build(request_for(images=120, keep=("conv1",)), tmp_path)
    reused = {stage.name: stage.reused for stage in third}
    assert reused["export"] and not reused["calibrate"] and not reused["precision"]
    path = sorted(data.glob("*/*.png"))[0]
    Image.new("L", (8, 8), 200).save(path)
    _, fourth = build(request_for(images=120, keep=("conv1",)), tmp_path)
    assert not {stage.name: stage.reused for stage in fourth}["calibrate"]


def test_an_earlier_calibration_serves_another_build(request_for: Callable[..., Request], tmp_path: Path) -> None:
    made = calibration(request_for(placement="tensorrt"), tmp_path)
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(made))
    again = calibration(request_for(data=None, file=file, placement="tensorrt", method="auto"), tmp_path)
    assert again["recipes"] == made["recipes"] and again["data"] == made["data"]
    other = calibration(request_for(data=None, file=file, placement="onnxruntime", method="auto"), tmp_path)
    (recipe,) = other["recipes"].values()
    assert recipe["scheme"] == "onnxruntime"
    assert recipe["ranges"]["layer1.0"] == made["tensors"]["layer1.0"]["ranges"]["onnxruntime"]["mse"]
    file.write_text(json.dumps(other))
    bundle, _ = build(request_for(data=None, file=file, placement="onnxruntime", method="percentile"), tmp_path)
    assert bundle.manifest.quantisation is not None
    assert bundle.manifest.quantisation["method"] == "percentile"
    assert bundle.manifest.quantisation["sqnr_db"] is None  # nothing was measured


def test_of_another_model_it_is_refused(
    request_for: Callable[..., Request],
    make_card: Callable[..., Any],
    random_weights: Callable[..., Any],
    tmp_path: Path,
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(calibration(request_for(), tmp_path)))
    card = make_card()
    with pytest.raises(InputError, match=f"it is of {DIGITS}, and ranges of one model mean nothing to another"):
        read_record(file, Network(card, random_weights(card)))
    card = find_card(DIGITS)
    with pytest.raises(InputError, match=f"it is of other weights or another card of {DIGITS}"):
        read_record(file, Network(card, random_weights(card)))
    weights = load_weights(card, resolve_weights(card, None, tmp_path))
    read_record(file, Network(card, weights))
    other = msgspec.structs.replace(card, input=msgspec.structs.replace(card.input, mean=(0.1, 0.1, 0.1)))
    with pytest.raises(InputError, match="another card"):
        read_record(file, Network(other, weights))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "damaged, or not made by rxdeploy"),
        ("[1, 2]", "damaged, or not made by rxdeploy"),
        ('{"schema": 1}', "damaged, or not made by rxdeploy"),
        ('{"schema": 99}', "it has schema 99, this rxdeploy reads up to 1; install a newer one"),
        ("{" * 100_000, "damaged, or not made by rxdeploy"),
    ],
)
def test_a_file_that_is_no_calibration(
    request_for: Callable[..., Request], tmp_path: Path, text: str, match: str
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(InputError, match=match):
        calibration(request_for(data=None, file=file), tmp_path)
    with pytest.raises(InputError, match="no such file"):
        calibration(request_for(data=None, file=tmp_path / "none.json"), tmp_path)


@pytest.mark.parametrize("bad", [[float("nan"), 1.0], [2.0, 1.0], [-1.0, float("inf")]])
def test_ranges_that_are_none(request_for: Callable[..., Request], tmp_path: Path, bad: list[float]) -> None:
    made = calibration(request_for(placement="tensorrt"), tmp_path)
    made["recipes"]["tensorrt"]["ranges"]["layer1.0"] = bad
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(made))  # NaN and Infinity as Python writes them
    with pytest.raises(InputError, match=r"calibration\.json"):
        calibration(request_for(data=None, file=file, placement="tensorrt"), tmp_path)


def _set(record: dict[str, Any], *way: Any, value: Any) -> None:
    for key in way[:-1]:
        record = record[key]
    record[way[-1]] = value


RECIPE = ("recipes", "tensorrt")


@pytest.mark.parametrize(
    ("way", "value", "match"),
    [
        (("tensors", "layer1.0", "ranges", "tensorrt"), {}, "has not every method's range"),
        (("tensors", "layer1.0", "ranges", "onnxruntime", "mse"), [3.0, 1.0], "the range of layer1.0"),
        ((*RECIPE, "bias"), {"conv1": [0.1]}, "the bias correction of conv1"),
        ((*RECIPE, "bias"), {"conv9": [0.1]}, "the bias correction of conv9"),
        ((*RECIPE, "equalisation"), {"layer1.0.conv1": [-1.0] * 64}, "the equalisation of layer1.0.conv1"),
        ((*RECIPE, "equalisation"), {"conv1": [1.0] * 64}, "the equalisation of conv1"),
        ((*RECIPE, "keep"), ["fc"], "it keeps fc in float"),
        ((*RECIPE, "scheme"), "onnxruntime", "the recipe for tensorrt is for onnxruntime"),
        ((*RECIPE, "weight_bits"), 1, "with 1 bits"),
        ((*RECIPE, "ranges", "input"), [-1e30, 1e30], "the range of input"),
        (("errors", "tensorrt"), -1.0, "the error for tensorrt"),
    ],
)
def test_an_altered_file(
    request_for: Callable[..., Request], tmp_path: Path, way: tuple[str, ...], value: Any, match: str
) -> None:
    made = calibration(request_for(placement="tensorrt"), tmp_path)
    _set(made, *way, value=value)
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(made))
    with pytest.raises(InputError, match=f"{match}.*; calibrate again"):
        calibration(request_for(data=None, file=file, placement="tensorrt"), tmp_path)


def test_other_images_than_before_are_begun_anew(
    request_for: Callable[..., Request], digits: Any, tmp_path: Path
) -> None:
    from rxdeploy.calibration.gather import gather
    from rxdeploy.datasets import Stream, from_arrays

    network, saved = Network(digits.card, digits.weights), tmp_path / "saved.npz"

    def run(images: Any, to: Path | None) -> Any:
        data = from_arrays(images, None)
        return gather(network, Stream(data, data.items, BATCH, digits.card.input), to)

    run(digits.train[:16], saved)
    found, expected = run(digits.train[8:40], saved), run(digits.train[8:40], None)
    assert (found.images, found.content) == (32, expected.content)
    for name, histogram in found.histograms.items():
        np.testing.assert_array_equal(histogram.positive, expected.histograms[name].positive)


def test_an_interrupted_calibration_goes_on(
    request_for: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "_SAVE_SECONDS", 0)
    whole = calibration(request_for(), tmp_path / "whole")
    real, runs = Network.run, []

    def interrupted(self: Network, images: Any, steps: Any) -> Any:
        runs.append(type(steps).__name__)
        if runs.count("_Gather") == 2 * 4 + 4:  # equalisation is tried on all four batches, twice
            raise KeyboardInterrupt
        return real(self, images, steps)

    monkeypatch.setattr(Network, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibration(request_for(), tmp_path)
    assert list((tmp_path / "cache" / "calibrating").glob("*/*.npz"))
    runs[:] = []
    monkeypatch.setattr(Network, "run", lambda self, *a: (runs.append(type(a[1]).__name__), real(self, *a))[1])
    found = calibration(request_for(), tmp_path)
    assert runs.count("_Gather") == 2 * 4 + 1  # of four batches three were done
    assert found == whole
    assert not list((tmp_path / "cache" / "calibrating").iterdir())


def test_bad_images_are_skipped_and_named(request_for: Callable[..., Request], data: Path, tmp_path: Path) -> None:
    victim = sorted((data / "3").glob("*.png"))[0]
    victim.write_bytes(victim.read_bytes()[:40])
    found = calibration(request_for(images=120), tmp_path)
    ((name, reason),) = found["data"]["skipped"]
    assert name == f"3/{victim.name}" and reason
    assert found["data"]["images"] + found["data"]["held_out"] == 119
    sorted((data / "4").glob("*.png"))[0].write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"more than 1 of 120 images cannot be decoded, [34]/.*\.png first: "):
        calibration(request_for(images=120), tmp_path)


def test_too_few_images(request_for: Callable[..., Request], data: Path, tmp_path: Path) -> None:
    for path in sorted(data.glob("*/*.png"))[7:]:
        path.unlink()
    with pytest.raises(InputError, match="7 images to calibrate with; at least 8 are needed"):
        calibration(request_for(), tmp_path)
    shutil.rmtree(data)
    data.mkdir()
    with pytest.raises(InputError, match="no images in it"):
        calibration(request_for(), tmp_path)


def test_a_list_of_images(request_for: Callable[..., Request], data: Path, tmp_path: Path) -> None:
    names = [f"{path.parent.name}/{path.name}" for path in sorted(data.glob("[0-4]/*.png"))][:24]
    file = tmp_path / "list.txt"
    file.write_text("\n".join(names) + "\n")
    found = calibration(request_for(listed=file), tmp_path)
    assert (found["data"]["images"], found["data"]["held_out"], found["data"]["seed"]) == (18, 6, None)
    file.write_text("nowhere.png\n")
    with pytest.raises(InputError, match=r"nowhere\.png"):
        calibration(request_for(listed=file), tmp_path)


def test_weights_that_give_nan(request_for: Callable[..., Request], tmp_path: Path) -> None:
    card = find_card(DIGITS)
    weights = dict(load_weights(card, resolve_weights(card, None, tmp_path)))
    weights["layer2.0.bn2.bias"] = np.full_like(weights["layer2.0.bn2.bias"], np.inf)
    with pipeline(request_for(), tmp_path / "cache") as made:
        made.weights = weights  # such a file is refused already; a product of two large ones is not
        with pytest.raises(CheckFailed, match=r"tensor layer2\.0\.conv2\.relu: it has values that are NaN or infinite"):
            made.calibrate()


def test_targets(request_for: Callable[..., Request], tmp_path: Path) -> None:
    found = calibration(request_for(min_sqnr=44.0, placement="tensorrt"), tmp_path)
    assert found["recipes"]["tensorrt"]["keep"]
    assert -20 * np.log10(found["errors"]["tensorrt"]) >= 44
    with pipeline(request_for(images=16, max_drop=1.0, placement="tensorrt"), tmp_path / "cache") as made:
        entry = made.calibrate()
    assert entry.facts["mixed_precision"]["target"] == "a drop of at most 1 points"
    assert entry.facts["mixed_precision"]["after"] >= -1
    with pytest.raises(InputError, match="20 labelled images beside"):
        calibration(request_for(images=100, max_drop=1.0), tmp_path)


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    for changes, match in (
        ({}, "int8 needs images to calibrate with"),
        ({"data": tmp_path, "file": tmp_path}, "exclude each other"),
        ({"data": tmp_path, "images": 3}, "at least 8"),
        ({"file": tmp_path, "min_sqnr": 30.0}, "need images"),
        ({"data": tmp_path, "min_sqnr": 30.0, "max_drop": 1.0}, "exclude each other"),
        ({"data": tmp_path, "max_drop": -1.0}, "more than 0"),
    ):
        with pytest.raises(InputError, match=match):
            CalibrationOptions(**changes)  # type: ignore[arg-type]


def test_commands(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RXDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    images = ["--calibration-data", str(data), "--calibration-images", "24", "--method", "minmax"]
    plot = ["--plot", "s.svg"] if pytest.importorskip("matplotlib") else []
    assert run_command(["calibrate", DIGITS, *images, "--sensitivity", *plot, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {layer["layer"] for layer in found["layers"]} >= {"conv1", "layer4.0", "layer2.0.conv2"}
    assert (tmp_path / "s.svg").read_text().count("layer2.0.conv2") >= 1
    file = f"{DIGITS}-calibration.json"
    assert run_command(["calibrate", DIGITS, *images]) == 2  # it exists
    assert "--overwrite" in capsys.readouterr().err
    assert run_command(["export", DIGITS, "--int8", "--calibration", file, "-o", "m.onnx"]) == 0
    assert run_command(["validate", DIGITS, "--onnx", "m.onnx", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["precision"] == "int8"
    assert run_command(["validate", DIGITS, "--onnx", "m.onnx", "--layers", "--json"]) == 0
    capsys.readouterr()
    build = ["build", DIGITS, "--target", "onnxruntime", "-o", "b"]
    assert run_command([*build, "--int8", *images]) == 0
    assert "quantised      for onnxruntime: " in capsys.readouterr().out
    assert run_command(["inspect", "b", "--layers", "--json"]) == 0
    layers = {each["name"]: each for each in json.loads(capsys.readouterr().out)["layers"]}
    assert layers["layer2.0.conv1"]["inputs"] == ["uint8"] and layers["layer2.0.conv1"]["weights"] == "int8"
    for wrong, message in (
        ([*build, "--int8"], "int8 needs images to calibrate with"),
        ([*build, "--fp16", *images], "the options on calibration are for --int8"),
        ([*build, "--int8", *images, "--keep", "layer7.0"], "--keep layer7.0: no layer that is quantised for onnx"),
        ([*build, "--int8", *images, "--keep", "layer3.0"], "--keep layer3.0: no layer that is quantised for onnx"),
        ([*build, "--int8", *images, "--min-sqnr", "nan"], "--min-sqnr nan"),
    ):
        assert run_command(wrong) == 2
        assert message in capsys.readouterr().err


def test_it_is_validated_on_the_images_held_out(
    request_for: Callable[..., Request], data: Path, tmp_path: Path
) -> None:
    """The usual photographs are nothing that a model for digits is calibrated for."""
    bundle, _ = build(request_for(images=64), tmp_path)
    (figures,) = bundle.manifest.validation["providers"].values()
    assert figures["held out"]["images"] == 3 * 16 and figures["all"]["relative_l2"] < 0.03
