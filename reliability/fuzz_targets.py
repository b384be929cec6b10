"""What `fuzz.py` runs in a process of its own: one parser, fed by libFuzzer through atheris.

    fuzz_targets.py TARGET CORPUS libFuzzer's options...

Whatever a parser raises but our own errors is a crash, and so is running anything: an audit hook ends the process when
code that came in with the data asks for a process or a connection. CORPUS has a folder `good`, with a bundle and
what it was built from, and one of seeds for each target.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import atheris

_INSTRUMENTED = ["rxdeploy", "tarfile", "csv", "tomllib", "tomli", "zipfile"]
with atheris.instrument_imports(include=_INSTRUMENTED):
    from rxdeploy.bench.benchmark import parse_batches
    from rxdeploy.cards import load_card, read_labels
    from rxdeploy.datasets import open_dataset
    from rxdeploy.datasets.arrays import open_npz
    from rxdeploy.datasets.choosing import listed
    from rxdeploy.datasets.devkit import read_kit
    from rxdeploy.datasets.labels import label_images
    from rxdeploy.datasets.matfile import read_structs
    from rxdeploy.datasets.tars import index_tar
    from rxdeploy.engines.bundle import open_bundle, read_manifest
    from rxdeploy.engines.external import keeps_weights_elsewhere
    from rxdeploy.engines.options import Profile
    from rxdeploy.errors import RxDeployError
    from rxdeploy.evaluation.baseline import read_baseline
    from rxdeploy.evaluation.predictions import Header, PredictionsFile
    from rxdeploy.export.weights import resolve_weights
    from rxdeploy.packaging.triton import package
    from rxdeploy.runtime.plan import find_runner
    from rxdeploy.runtime.preprocess import open_rgb, transform
    from rxdeploy.runtime.session import parse_device
    from rxdeploy.terminal import describe_bundle
    from rxdeploy.tuning.options import parse_groups

Target = Callable[[bytes], object]

NAMES = ("ant", "bee", "cat")
IMAGES = [f"{name}/{name}{number}.png" for name in NAMES for number in range(4)]
ESCAPE = "\x1b]0;owned\x07"
VALUES: list[Any] = [None, True, 0, -1, 10**18, 10**400, 0.5, float("nan"), 1e308]
VALUES += ["", "x", ESCAPE, "../x", "\0", "a" * 999]
VALUES += [[], {}, [[]], {"x": {}}, [None] * 9]
_FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect")


def on_file(name: str, parse: Callable[[Path], object]) -> Target:
    """A parser of files, fed with bytes; the file lies in memory."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="rxdeploy-fuzz-", dir=shared if shared.is_dir() else None)) / name

    def run(data: bytes) -> None:
        path.write_bytes(data)
        parse(path)

    return run


def on_text(*parsers: Callable[[str], object]) -> Target:
    """Parsers of options: each has the text, and may refuse it."""

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        for parse in parsers:
            with contextlib.suppress(RxDeployError):
                parse(text)

    return run


def sealed_manifest(good: Path) -> Target:
    """Manifests that have the right digest, and say something wrong in up to four places: all that reads them."""
    whole = json.loads((good / "bundle" / "manifest.json").read_text())
    folder = Path(tempfile.mkdtemp(prefix="rxdeploy-fuzz-"))
    for file in (good / "bundle").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    gpu: Any = SimpleNamespace(name="NVIDIA L4", compute_capability=(8, 9))

    def run(data: bytes) -> None:
        draw = atheris.FuzzedDataProvider(data)
        manifest = json.loads(json.dumps(whole))
        for _ in range(draw.ConsumeIntInRange(1, 4)):
            _spoil(manifest, draw)
        unsealed = json.dumps(manifest | {"digest": "0" * 64}).encode()
        digest = hashlib.sha256(unsealed).hexdigest().encode()
        (folder / "manifest.json").write_bytes(unsealed.replace(b"0" * 64, digest, 1))
        bundle = open_bundle(folder)
        for read in (
            lambda: describe_bundle(bundle, whole=True),
            lambda: find_runner(bundle.manifest, gpu),
            lambda: package(bundle, folder.with_name(f"{folder.name}-repository"), overwrite=True, name="model"),
        ):
            with contextlib.suppress(RxDeployError):
                assert ESCAPE not in str(read())

    return run


def _spoil(value: Any, draw: Any) -> None:
    """One place somewhere in a JSON value gets something else, or goes."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = keys[draw.ConsumeIntInRange(0, len(keys) - 1)]
        inner = value[key]
        if isinstance(inner, dict | list) and inner and draw.ConsumeIntInRange(0, 3):
            value = inner
            continue
        choice = draw.ConsumeIntInRange(0, len(VALUES))
        if choice < len(VALUES):
            value[key] = copy.deepcopy(VALUES[choice])
        else:
            del value[key]
        return


def targets(good: Path) -> dict[str, Callable[[], Target]]:
    """Each target's name, and what makes it."""
    card = load_card(good / "card.toml")
    data = open_dataset(good / "data", 3, NAMES)

    def calibration() -> Target:
        from rxdeploy.calibration.network import Network
        from rxdeploy.calibration.record import read_record
        from rxdeploy.export.weights import load_weights

        network = Network(card, load_weights(card, resolve_weights(card, "synthetic", good)))
        return on_file("calibration.json", lambda path: read_record(path, network))

    def weights() -> Target:
        from rxdeploy.export.weights import load_weights

        return on_file("weights.pth", lambda path: load_weights(card, resolve_weights(card, str(path), path.parent)))

    def signature() -> Target:
        from rxdeploy.signing.keys import read_public_keys
        from rxdeploy.signing.signature import check_signature

        keys = read_public_keys((good / "key.pub").read_bytes())
        return lambda data: check_signature(data, keys)

    def public_key() -> Target:
        from rxdeploy.signing.keys import read_public_keys

        return lambda data: read_public_keys(data)

    def predictions() -> Target:
        header = json.loads((good / "predictions.jsonl").read_text().partition("\n")[0])
        ours = Header(**{key: value for key, value in header.items() if key not in ("kind", "schema")})

        def parse(path: Path) -> None:
            with PredictionsFile(path, ours):
                pass

        return on_file("predictions.jsonl", parse)

    def image(path: Path) -> None:
        transform(open_rgb(path), 32, 1.0, "bicubic")

    def mat(data: bytes) -> None:
        with contextlib.suppress(ValueError):  # which its caller makes an error of
            read_structs(data, "synsets")

    options = (Profile.parse, parse_batches, parse_groups, parse_device)
    seeds = (lambda text: resolve_weights(card, f"synthetic:{text}", good),)
    return {
        "manifest": lambda: on_file("manifest.json", lambda path: read_manifest(path.parent)),
        "sealed manifest": lambda: sealed_manifest(good),
        "model of a bundle": lambda: on_file("model.onnx", keeps_weights_elsewhere),
        "signature": signature,
        "public key": public_key,
        "card": lambda: on_file("card.toml", load_card),
        "class names": lambda: on_file("names.txt", lambda path: read_labels(path, 3)),
        "calibration file": calibration,
        "weights": weights,
        "image": lambda: on_file("image", image),
        "tar": lambda: on_file("data.tar", index_tar),
        "npz": lambda: on_file("data.npz", lambda path: open_npz(path, 3, True)),
        "labels of images": lambda: on_file("labels", lambda path: label_images(IMAGES, path, 3, NAMES, "data")),
        "labels, CSV": lambda: on_file("labels.csv", lambda path: label_images(IMAGES, path, 3, NAMES, "data")),
        "list of images": lambda: on_file("list.txt", lambda path: listed(data, path)),
        "development kit": lambda: on_file("kit.tar.gz", read_kit),
        "meta.mat": lambda: mat,
        "baseline": lambda: on_file("baseline.json", read_baseline),
        "predictions": predictions,
        "options": lambda: on_text(*options, *seeds),
    }


def _audit(event: str, arguments: Any) -> None:
    if event in _FORBIDDEN:
        os.write(2, f"SOMETHING WAS RUN: {event} {arguments}\n".encode())
        os.abort()


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    parse = targets(corpus / "good")[name]()

    def one(data: bytes) -> None:
        with contextlib.suppress(RxDeployError):
            parse(data)

    one(b"")  # imports what it needs, for which libraries start processes
    sys.addaudithook(_audit)
    atheris.Setup([sys.argv[0], *sys.argv[3:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
