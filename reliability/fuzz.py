"""Coverage-guided fuzzing of every parser of ours, by atheris (libFuzzer for Python).

Each target of fuzz_targets.py gets its inputs in a process of its own, from seeds that are good files. A crash is
whatever is not one of our errors: another exception, more than 10 seconds, more than 3 GB, or anything run. Writes
reliability/results/fuzz.json; exit code 1 when there was a crash, whose input stays in --crashes.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import machine

from rxdeploy import cli

CARD = """schema = 1
name = "small"
[architecture]
layers = [1, 1]
channels = [8, 16]
cardinality = 2
base_width = 8
stem_width = 8
num_classes = 3
[input]
image_size = 32
crop_pct = 1.0
interpolation = "bicubic"
mean = [0.5, 0.5, 0.5]
std = [0.2, 0.2, 0.2]
"""
SLOWEST_S, MOST_MB, LONGEST = 10, 3000, 65_536
# Seeds of each target, as files of `good`; and words of its language, which libFuzzer puts in.
SEEDS: dict[str, tuple[str, ...]] = {
    "manifest": ("bundle/manifest.json",),
    "sealed manifest": ("noise",),
    "model of a bundle": ("bundle/model.onnx",),
    "signature": ("signed/model.sig",),
    "public key": ("key.pub",),
    "card": ("card.toml", "digits.toml"),
    "class names": ("names.txt",),
    "calibration file": ("calibration.json",),
    "weights": ("weights.safetensors", "weights.pth", "old.pth"),
    "image": ("image.png", "image.jpg", "image.gif", "image.bmp", "image.tif", "image.webp", "image.ppm"),
    "tar": ("data.tar", "classes.tar", "pax.tar"),
    "npz": ("data.npz",),
    "labels of images": ("labels.csv", "truth.txt", "list.txt"),
    "labels, CSV": ("labels.csv",),
    "list of images": ("list.txt",),
    "development kit": ("kit.tar.gz", "kit.tar"),
    "meta.mat": ("meta.mat",),
    "baseline": ("baseline.json",),
    "predictions": ("predictions.jsonl",),
    "options": ("options.txt",),
}


@click.command()
@click.option("--inputs", default=20_000, show_default=True, help="For each target, at most.")
@click.option("--minutes", default=10.0, show_default=True, help="For all targets together, at most.")
@click.option("--seed", default=7, show_default=True)
@click.option("--only", multiple=True, help="A target; may be repeated. [default: all]")
@click.option("--crashes", type=click.Path(path_type=Path), default=Path("fuzz-crashes"), show_default=True)
def main(inputs: int, minutes: float, seed: int, only: tuple[str, ...], crashes: Path) -> None:
    """Fuzz, print what was tried, and store it."""
    if importlib.util.find_spec("atheris") is None:
        raise click.ClickException("atheris is not installed: pip install atheris (wheels for CPython 3.11 to 3.13)")
    chosen = only or tuple(SEEDS)
    each_s = 60 * minutes / len(chosen)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        make_seeds(corpus)
        found = {name: fuzz(name, corpus, inputs, each_s, seed, crashes) for name in chosen}
    total = sum(each["inputs"] for each in found.values())
    crashed = [name for name, each in found.items() if each["crashes"]]
    click.echo(f"{total:,} inputs for {len(found)} parsers; crashed: {', '.join(crashed) or 'none'}")
    if only:
        return click.echo("not stored: these are not all targets")
    result = {"date": datetime.date.today().isoformat(), "seed": seed, "inputs": total, "targets": found}
    machine.RESULTS = Path(__file__).parent / "results"
    machine.RESULTS.mkdir(exist_ok=True)
    click.echo(machine.save("fuzz", result))
    sys.exit(bool(crashed))


def fuzz(name: str, corpus: Path, inputs: int, seconds: float, seed: int, crashes: Path) -> dict[str, Any]:
    """Run one target; how many inputs it was given, how much code they reached, and what crashed."""
    crashes.mkdir(exist_ok=True)
    before = {path.name for path in crashes.iterdir()}
    options = {
        "runs": inputs,
        "max_total_time": max(1, round(seconds)),
        "seed": seed,
        "timeout": SLOWEST_S,
        "rss_limit_mb": MOST_MB,
        "max_len": LONGEST,
        "print_final_stats": 1,
        "artifact_prefix": f"{crashes}/{name.replace(' ', '-').replace(',', '')}-",
    }
    seeds = corpus / "seeds" / name
    command = [sys.executable, str(Path(__file__).with_name("fuzz_targets.py")), name, str(corpus)]
    command += [f"-{key}={value}" for key, value in options.items()] + [str(seeds)]
    begin = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    units = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    reached = re.findall(r"cov: (\d+)", done.stderr)
    left = sorted({path.name for path in crashes.iterdir()} - before)
    crashed = bool(done.returncode or left or not units)
    result = {
        "inputs": int(units[1]) if units else 0,
        "seconds": round(time.monotonic() - begin, 1),
        "branches_reached": int(reached[-1]) if reached else 0,
        "branches_of_the_seeds": int(reached[0]) if reached else 0,
        "crashes": left or (["without an input"] if crashed else []),
    }
    branches = f"{result['branches_of_the_seeds']} branches by the seeds, {result['branches_reached']} in the end"
    click.echo(f"{name:<20} {result['inputs']:>9,} inputs {result['seconds']:>6} s  {branches}")
    if crashed:
        said = [line for line in (done.stderr + done.stdout).splitlines() if not line.startswith("INFO: Instrumenting")]
        click.echo("\n".join(said)[-3000:], err=True)
    return result


def make_seeds(corpus: Path) -> None:
    """Good files of every kind in corpus/good, and the seeds of each target in corpus/seeds."""
    good = corpus / "good"
    good.mkdir()
    here = Path.cwd()
    os.environ["RXDEPLOY_CACHE"] = str(corpus / "cache")
    os.chdir(good)
    try:
        _write_inputs()
        for command in (
            "build card.toml --weights synthetic --labels names.txt --fp32 --target onnxruntime -o bundle",
            "calibrate card.toml --weights synthetic --calibration-data data -o calibration.json",
            "evaluate bundle --data data --save-baseline baseline.json --predictions predictions.jsonl",
        ):
            _run(*command.split())
        _sign()
    finally:
        os.chdir(here)
    for name, files in SEEDS.items():
        folder = corpus / "seeds" / name
        folder.mkdir(parents=True)
        for file in files:
            shutil.copy(good / file, folder / file.replace("/", "-"))


def _run(*arguments: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.run(list(arguments))
    if code:
        raise click.ClickException(f"rxdeploy {' '.join(arguments)}: {said.getvalue()}")


def _write_inputs() -> None:
    import safetensors.torch
    import torch

    from rxdeploy.cards import load_card
    from rxdeploy.cards.registry import BUILTIN
    from rxdeploy.export.synthetic import synthetic_weights

    draw = np.random.default_rng(7)
    Path("card.toml").write_text(CARD)
    shutil.copy(BUILTIN / "digits_resnext14_8x8d.toml", "digits.toml")
    weights = synthetic_weights(load_card(Path("card.toml")), 0)
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    safetensors.torch.save_file(state, "weights.safetensors")
    torch.save(state, "weights.pth")
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    Path("names.txt").write_text("ant\nbee\ncat\n")
    Path("noise").write_bytes(draw.bytes(64))
    Path("options.txt").write_text("1,8,32")
    images, labels = [], []
    for label, name in enumerate(("ant", "bee", "cat")):
        (Path("data") / name).mkdir(parents=True)
        for number in range(4):
            images.append(draw.integers(0, 256, (32, 32, 3), np.uint8))
            labels.append(label)
            Image.fromarray(images[-1]).save(f"data/{name}/{name}{number}.png")
    for ending in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        Image.fromarray(images[0]).save(f"image.{ending}")
    np.savez_compressed("data.npz", images=np.stack(images)[:, :4, :4], labels=np.array(labels))
    paths = sorted(Path("data").rglob("*.png"))
    Path("labels.csv").write_text("filename,label\n" + "".join(f"{path.name},{path.parent.name}\n" for path in paths))
    Path("list.txt").write_text("".join(f"{path.name}\n" for path in paths))
    Path("truth.txt").write_text("1\n2\n3\n")
    _write_tars(paths)


def _write_tars(paths: list[Path]) -> None:
    for file, form in (("data.tar", tarfile.GNU_FORMAT), ("pax.tar", tarfile.PAX_FORMAT)):
        with tarfile.open(file, "w", format=form) as tar:
            for path in paths[:2]:
                info = tar.gettarinfo(path, f"{path.parent.name}/{'x' * 120}{path.name}")
                info.pax_headers = {"comment": "a photograph"}
                with path.open("rb") as content:
                    tar.addfile(info, content)
    with tarfile.open("class.tar", "w") as tar:
        tar.add(paths[0], "a.png")
    with tarfile.open("classes.tar", "w") as tar:
        tar.add("class.tar", "ant.tar")
    _write_meta()
    for file, mode in (("kit.tar", "w"), ("kit.tar.gz", "w:gz")):
        with tarfile.open(file, mode) as tar:
            tar.add("truth.txt", "devkit/data/ILSVRC2012_validation_ground_truth.txt")
            tar.add("meta.mat", "devkit/data/meta.mat")


def _write_meta() -> None:
    """A meta.mat like the development kit's, of three classes, by the rules in rxdeploy/datasets/matfile.py."""
    import struct
    import zlib

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    def array(of: int, shape: tuple[int, int], kind: int, data: bytes) -> bytes:
        head = element(6, struct.pack("<II", of, 0)) + element(5, struct.pack("<ii", *shape)) + element(1, b"")
        return element(14, head + element(kind, data))

    fields = b"".join(name.ljust(16, b"\0") for name in (b"ILSVRC2012_ID", b"WNID"))
    body = element(6, struct.pack("<II", 2, 0)) + element(5, struct.pack("<ii", 3, 1)) + element(1, b"synsets")
    body += element(5, struct.pack("<i", 16)) + element(1, fields)
    for number in range(1, 4):
        body += array(6, (1, 1), 9, struct.pack("<d", number))
        body += array(4, (1, 9), 4, f"n0000000{number}".encode("utf-16-le"))
    packed = zlib.compress(element(14, body))
    Path("meta.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed)


def _sign() -> None:
    """A signed bundle, and the key that it is trusted by."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Path("key").write_bytes(key.private_bytes(*private))
    public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    Path("key.pub").write_bytes(key.public_key().public_bytes(*public))
    shutil.copytree("bundle", "signed")
    _run("sign", "signed", "--key", "key")


if __name__ == "__main__":
    main()
