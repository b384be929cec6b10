"""What the runtime costs on a CPU: `session.run` over bare ONNX Runtime, and `classify` over pure inference.

Everything is compared within one run, alternating. Writes results/runtime.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import save
from PIL import Image

import rxdeploy
from rxdeploy.cache import open_cache
from rxdeploy.cards import find_card
from rxdeploy.pipeline import Pipeline, Request

MODEL = "gluon_resnext50_32x4d"
FILES, WIDTH, HEIGHT = 200, 500, 375
PHOTOS = Path(rxdeploy.__file__).parent / "export" / "photos"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(Path(folder) / "bundle")
        with rxdeploy.load(bundle, "cpu") as session:
            result = {
                "model": f"{MODEL}, fp32, synthetic weights, ONNX Runtime on CPU",
                "run over bare ONNX Runtime": [overhead(session, 1, 400), overhead(session, 8, 60)],
                "classify": classify(session, Path(folder)),
            }
    print(save("runtime", result))


def build(output: Path) -> Path:
    request = Request(find_card(MODEL), "fp32", "uint8", weights="synthetic", target="onnxruntime")
    with open_cache() as cache:
        Pipeline(request, cache).build(output)
    return output


def overhead(session: rxdeploy.Session, batch: int, calls: int) -> dict[str, Any]:
    """The time of `session.run` over that of the very ONNX Runtime session it holds.

    The two are called in turn, and the ratio is the median of the pairs' ratios: what else runs here changes from
    second to second, and meets both of a pair.
    """
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
    bare = session.engine._session
    ways: list[Callable[[], Any]] = [lambda: bare.run(["logits"], {"image": images}), lambda: session.run(images)]
    times: list[list[float]] = [[], []]
    for call in range(calls + 3):
        for way in (0, 1) if call % 2 else (1, 0):
            begin = time.perf_counter()
            ways[way]()
            times[way].append(time.perf_counter() - begin)
    bare, run = (np.array(taken[3:]) for taken in times)
    ratios = np.sort(run / bare)
    # Of the median, by the binomial distribution of how many pairs lie below it (normal approximation).
    half = 1.96 * np.sqrt(calls) / 2
    low, high = (ratios[int(np.clip(round(calls / 2 + side * half), 0, calls - 1))] for side in (-1, 1))
    return {
        "batch": batch,
        "pairs": calls,
        "bare_ms": float(np.median(bare)) * 1000,
        "run_ms": float(np.median(run)) * 1000,
        "ratio": float(np.median(ratios)),
        "ratio_95_percent": [float(low), float(high)],
    }


def classify(session: rxdeploy.Session, folder: Path, rounds: int = 5) -> dict[str, Any]:
    """Images a second of `classify` on JPEG files, of inference alone in the same batches, and of a plain loop."""
    paths = write_photos(folder / "photos")
    decoded = [session.preprocess(path) for path in paths]
    batches = [np.stack(decoded[begin : begin + 8]) for begin in range(0, FILES, 8)]

    def pure() -> None:
        for batch in batches:
            session.run(batch)

    def loop() -> None:
        for path in paths:
            session.top(session.run(session.preprocess(path)[None]))

    ways: dict[str, Callable[[], Any]] = {
        "pure inference": pure,
        "classify": lambda: list(session.classify(paths)),
        "plain loop": loop,
    }
    pure()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            rates[name].append(FILES / (time.perf_counter() - begin))

    def over(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))

    begin = time.perf_counter()
    for path in paths:
        session.preprocess(path)
    return {
        "files": f"{FILES} JPEGs of {WIDTH}x{HEIGHT}",
        "images_per_second": rates,
        "decode_and_resize_ms_an_image": (time.perf_counter() - begin) / FILES * 1000,
        "classify_over_pure_inference": over("classify", "pure inference"),
        "classify_over_plain_loop": over("classify", "plain loop"),
    }


def write_photos(folder: Path) -> list[Path]:
    """Different cuts of the photographs that come with rxdeploy, as JPEG files of quality 90."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    paths = []
    for index in range(FILES):
        photo = photos[index % len(photos)]
        scale = max(WIDTH / photo.width, HEIGHT / photo.height) * rng.uniform(1.05, 1.5)
        larger = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        left, top = (int(rng.integers(0, rest + 1)) for rest in (larger.width - WIDTH, larger.height - HEIGHT))
        paths.append(folder / f"{index}.jpg")
        larger.crop((left, top, left + WIDTH, top + HEIGHT)).save(paths[-1], quality=90)
    return paths


if __name__ == "__main__":
    main()
