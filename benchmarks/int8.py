"""What int8 costs in accuracy and gains in speed. Writes results/int8.json, a part at a time.

``accuracy``: the digits model on the held-out digits and on hard variants of them, against float32, paired.
``errors``: the logits of the Gluon models (synthetic weights) by each way to find ranges, and by ONNX Runtime's
quantize_static on the same calibration images. ``speed``: images/s on the CPU, by turns in one run. ``cost``: time and
memory of calibrating with 512 images, against as many plain inferences.

Calibration images are crops of the photographs that rxdeploy ships and noise; those measured on are others. Real
photographs, then, but few: what they tell of ImageNet is limited.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import quantize_static
from machine import RESULTS, save
from numpy.typing import NDArray
from PIL import Image, ImageOps

import rxdeploy
from rxdeploy.cache import open_cache
from rxdeploy.calibration.apply import apply
from rxdeploy.calibration.calibrate import Calibration
from rxdeploy.calibration.mixed import sqnr
from rxdeploy.calibration.network import Network
from rxdeploy.calibration.options import METHODS, CalibrationOptions
from rxdeploy.calibration.selection import choose_images
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.cards.digits_images import hard, split
from rxdeploy.datasets import from_arrays
from rxdeploy.evaluation import Comparison, assess
from rxdeploy.export.graph import build_graph, serialise
from rxdeploy.export.samples import PHOTOS, noise
from rxdeploy.export.validate import relative_l2
from rxdeploy.export.weights import load_weights, resolve_weights
from rxdeploy.pipeline import Pipeline, Request
from rxdeploy.runtime.onnxrt import open_session
from rxdeploy.runtime.preprocess import open_rgb, transform

DIGITS = "digits_resnext14_8x8d"
MODELS = ("gluon_resnext50_32x4d", "gluon_resnext101_32x4d", "gluon_resnext101_64x4d")
CALIBRATED_ON, MEASURED_ON = 48, 16  # images, a third of them noise
COST_IMAGES = 512
BATCHES = (1, 8)
PARTS = ("accuracy", "errors", "speed", "cost")


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Of the speeds.")
def main(parts: tuple[str, ...], models: str, rounds: int) -> None:
    """Measure PARTS, all of them by default; of the others the file keeps what it has."""
    path = RESULTS / "int8.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result.pop("machine", None)
    for part in parts or PARTS:
        names = models.split(",")
        if part == "accuracy":
            result[part] = accuracy()
        elif part == "errors":
            result[part] = result.get(part, {}) | {name: errors(find_card(name)) for name in names}
        elif part == "speed":
            result[part] = result.get(part, {}) | {name: speed(name, rounds) for name in (DIGITS, *names)}
        else:
            result[part] = cost(names[-1])
        click.echo(f"{part}: {json.dumps(result[part], indent=1)}")
        click.echo(save("int8", result))


# Accuracy


def accuracy() -> dict[str, Any]:
    """Top-1 of each precision, and the drop against float32 with its 95 % interval, in points."""
    train, held_out = split()
    harder = hard()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "train.npz"
        np.savez(images, images=train.images, labels=train.labels)
        baseline = build(DIGITS, "fp32", folder)
        bundles = {
            "fp32": baseline,
            "fp16": build(DIGITS, "fp16", folder),
            "int8 for TensorRT": build(DIGITS, "int8", folder, "tensorrt", images),
            "int8 for ONNX Runtime on CPU": build(DIGITS, "int8", folder, "onnxruntime", images),
        }
        for what, digits in (("held out", held_out), ("hard", harder)):
            data = from_arrays(digits.images, digits.labels, 10)
            for precision, bundle in bundles.items():
                found = assess(bundle, data, device="cpu", baseline=baseline, max_drop=0.3)
                assert found.comparison and found.verdict
                drop = found.comparison.drop
                rows[f"{precision}, {what}"] = {
                    "images": found.comparison.images,
                    "top1": 100 * found.evaluation.right / len(found.evaluation.predictions),
                    "drop_points": 100 * drop.value,
                    "interval_95": [100 * drop.low, 100 * drop.high],
                    "interval_95_by_digit": clustered(found.comparison, digits.indices),
                    "lost": found.comparison.lost,
                    "gained": found.comparison.gained,
                    "at_most_0.3": found.verdict.outcome,
                }
    return rows


def clustered(comparison: Comparison, digits: NDArray[np.int64]) -> list[float]:
    """The drop's interval when variants of one digit are not taken for independent: a bootstrap over the digits."""
    changed = np.zeros(len(digits))
    for change in comparison.changes:
        changed[int(change.image)] = {"lost": 1.0, "gained": -1.0}.get(change.kind, 0.0)
    _, group = np.unique(digits, return_inverse=True)
    sums = np.bincount(group, changed)
    random = np.random.default_rng(0)
    drops = [sums[random.integers(0, len(sums), len(sums))].sum() / len(digits) for _ in range(10_000)]
    return [100 * float(np.quantile(drops, share)) for share in (0.025, 0.975)]


def build(
    model: str, precision: Any, folder: Path, placement: Any = None, images: Path | None = None, weights: Any = None
) -> Path:
    options = CalibrationOptions(data=images) if images else None
    request = Request(
        find_card(model),
        precision,
        weights=weights,
        target="onnxruntime",
        calibration=options,
        placement=placement,
    )
    output = folder / f"{model}-{precision}-{placement}"
    with open_cache() as cache:
        return Pipeline(request, cache).build(output).path


# Errors of the logits


def errors(card: ModelCard) -> dict[str, Any]:
    """Relative L2 error and SQNR on photographs and noise, by method, and by quantize_static's on the same images."""
    weights = load_weights(card, resolve_weights(card, "synthetic", Path()))
    network = Network(card, weights)
    graph = build_graph(card, weights)
    calibration = np.concatenate([crops(card, CALIBRATED_ON * 2 // 3, 1), noise(card, CALIBRATED_ON // 3, 1)])
    order = np.random.default_rng(0).permutation(len(calibration))
    calibration = np.ascontiguousarray(calibration[order])
    measured = {"photographs": crops(card, MEASURED_ON, 2), "noise": noise(card, MEASURED_ON // 2, 2)}
    found: dict[str, Any] = {"calibrated_on": len(calibration)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = folder / "fp32.onnx"
        plain.write_bytes(serialise(graph))
        exact = {kind: run(plain, images) for kind, images in measured.items()}
        data = from_arrays(calibration, None)
        for method in (*METHODS, "auto"):
            begin = time.perf_counter()
            options = CalibrationOptions(data=Path("arrays"), images=len(calibration), method=method)
            made = Calibration(network, data, choose_images(data, options), 0, folder / method, lambda *_: None)
            record = made.run("tensorrt", 8, options)
            recipe = record.recipes["tensorrt"]
            path = folder / f"{method}.onnx"
            path.write_bytes(serialise(apply(graph, network, recipe)[0]))
            extra = [name for name in ("equalisation", "bias") if getattr(recipe, name)]
            found[f"rxdeploy {method}"] = {
                **compared(path, measured, exact),
                "seconds": time.perf_counter() - begin,
                "corrections": extra,
                "methods": sorted({recipe.method, *recipe.methods.values()}),
            }
        for each in quantize_static.quantise(plain, calibration, folder, styles=("int8",), batch=1, stride=1):
            key = f"quantize_static {each.method}"
            if each.model is None:
                found[key] = {"problem": each.problem}
            else:
                found[key] = {
                    **compared(each.model, measured, exact),
                    "seconds": each.seconds,
                    "peak_gib": each.peak_bytes / 2**30,
                }
    return found


def crops(card: ModelCard, count: int, seed: int) -> NDArray[np.uint8]:
    """Random crops of the photographs, mirrored half of the time, through the card's transform."""
    random = np.random.default_rng(seed)
    return np.stack([as_input(card, image) for image in cropped(random, count)])


def cropped(random: np.random.Generator, count: int) -> list[Image.Image]:
    sources = [open_rgb(path) for path in sorted(PHOTOS.glob("*.jpg"))]
    found = []
    for index in range(count):
        image = sources[index % len(sources)]
        share = random.uniform(0.35, 1)
        width, height = (int(side * share) for side in image.size)
        left, top = random.integers(0, image.width - width + 1), random.integers(0, image.height - height + 1)
        piece = image.crop((left, top, left + width, top + height)).resize((500, 375))
        found.append(ImageOps.mirror(piece) if random.random() < 0.5 else piece)
    return found


def as_input(card: ModelCard, image: Image.Image) -> NDArray[np.uint8]:
    inputs = card.input
    return transform(image, inputs.image_size, inputs.crop_pct, inputs.interpolation)


def run(model: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits, Q/DQ in float arithmetic."""
    session = open_session(model, integers=False)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(["logits"], {name: images[i : i + 4]})[0] for i in range(0, len(images), 4)])


def compared(
    model: Path, measured: dict[str, NDArray[np.uint8]], exact: dict[str, NDArray[np.float32]]
) -> dict[str, Any]:
    rows = {}
    for kind, images in measured.items():
        error = relative_l2(run(model, images), exact[kind])
        rows[kind] = {"relative_l2": error, "sqnr_db": sqnr(error)}
    return rows


# Speed


def speed(model: str, rounds: int) -> dict[str, Any]:
    """Images/s of int8 and fp32 on the CPU, by turns: medians, and the ratio of each round."""
    rows: dict[str, Any] = {}
    weights = None if model == DIGITS else "synthetic"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        card = find_card(model)
        images = folder / "images.npz"
        np.savez(images, images=crops(card, 24, 1))
        options = CalibrationOptions(data=images, images=24, method="mse")
        paths = {"fp32": build(model, "fp32", folder, weights=weights)}
        with open_cache() as cache:
            request = Request(card, "int8", weights=weights, target="onnxruntime", calibration=options)
            paths["int8"] = Pipeline(request, cache).build(folder / "int8").path
        sessions = {precision: rxdeploy.load(path, "cpu") for precision, path in paths.items()}
        for batch in BATCHES:
            array = crops(card, batch, 3)
            seconds: dict[str, list[float]] = {precision: [] for precision in sessions}
            for round_ in range(rounds + 1):
                for precision, session in sessions.items():
                    times = 1 if model != DIGITS else 50
                    begin = time.perf_counter()
                    for _ in range(times):
                        session.run(array)
                    if round_:
                        seconds[precision].append((time.perf_counter() - begin) / times)
            ratios = [a / b for a, b in zip(seconds["fp32"], seconds["int8"], strict=True)]
            rows[f"batch {batch}"] = {
                "images_per_s": {name: batch / statistics.median(found) for name, found in seconds.items()},
                "int8_over_fp32": statistics.median(ratios),
                "lowest_and_highest": [min(ratios), max(ratios)],
            }
        for session in sessions.values():
            session.close()
    return rows


# Cost


def cost(model: str) -> dict[str, Any]:
    """Seconds of calibrating with 512 JPEGs, against as many plain inferences; peak memory of the whole command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(4)
        (folder / "images").mkdir()
        for index, image in enumerate(cropped(random, COST_IMAGES)):
            image.save(folder / "images" / f"{index:04}.jpg", quality=90)
        plain = inferences(model, folder)
        # `export`, as its calibration finds the weights in memory already: making them up is no part of it.
        arguments = ["export", model, "--int8", "--weights", "synthetic", "--force", "--json"]
        arguments += ["--calibration-data", str(folder / "images"), "-o", str(folder / "int8.onnx")]
        program = (
            "import resource, sys; from rxdeploy.cli import run; code = run(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        stages = json.loads(done.stdout)["stages"]
        calibrating = next(stage["seconds"] for stage in stages if stage["stage"] == "calibrate")
    peak = int(done.stderr.splitlines()[-1])
    return {
        "model": model,
        "images": COST_IMAGES,
        "plain_inference_seconds": plain,
        "calibrate_stage_seconds": calibrating,
        "ratio": calibrating / plain,
        "peak_gib": peak / 2**30,
    }


def inferences(model: str, folder: Path) -> float:
    """Seconds for the images through ``Session.classify`` of the float32 bundle."""
    bundle = build(model, "fp32", folder, weights="synthetic")
    with rxdeploy.load(bundle, "cpu") as session:
        paths = sorted((folder / "images").glob("*.jpg"))
        list(session.classify(paths[:16]))
        begin = time.perf_counter()
        for _ in session.classify(paths):
            pass
        return time.perf_counter() - begin


if __name__ == "__main__":
    main()
