"""Bundles that released versions wrote still open and still compute what they did.

`schema1/` was written by rxdeploy 0.1.0 (schema 1, before bundles had a bill of materials), on a CPU with ONNX
Runtime 1.32, from a card of four residual blocks, 48 x 48 pixels and 7 classes with the weights synthetic:7: a float32
model, an int8 model that was tuned there, and of a float16 one with a TensorRT-RTX plan the manifest. `expected.npz`
has six images and their logits: of each bundle then, and of the model in PyTorch. Never write these files again: what a
later version writes belongs beside them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxdeploy import __version__
from rxdeploy.cli import run
from rxdeploy.engines.bundle import SCHEMA, open_bundle, parse_manifest, read_manifest
from rxdeploy.errors import InputError

HERE = Path(__file__).parent
FOLDERS = [f"schema{schema}" for schema in range(1, SCHEMA + 1)]
BUNDLES = sorted(path.parent for folder in FOLDERS for path in (HERE / folder).glob("*/manifest.json"))
MANIFESTS = sorted(path for folder in FOLDERS for path in (HERE / folder).glob("*manifest.json"))
NAMES = [f"{path.parent.name}/{path.name}" for path in BUNDLES]
# Relative L2 of the logits. Of int8, what it may cost at most: kernels of other CPUs round otherwise, and without VNNI
# ONNX Runtime adds up in 16 bits, which saturate.
SAME = {"fp32": 1e-4, "int8": 0.25}


def relative_l2(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_there_is_one_of_every_schema() -> None:
    assert {path.parent.name for path in BUNDLES} == set(FOLDERS)
    assert all((HERE / folder / "expected.npz").is_file() for folder in FOLDERS)


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.parametrize("path", BUNDLES, ids=NAMES)
def test_an_old_bundle_opens(path: Path) -> None:
    bundle = open_bundle(path)
    stored = json.loads((path / "manifest.json").read_text())
    assert bundle.manifest.schema == stored["schema"] == int(path.parent.name.removeprefix("schema"))
    assert bundle.manifest.model == stored["model"]
    assert {name: bundle.read(name) for name in stored["files"]} == {
        file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"
    }
    assert bundle.labels() == ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.mark.parametrize("path", BUNDLES, ids=NAMES)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_old_bundle_computes_what_it_did(path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    from rxdeploy import runtime

    expected = np.load(path.parent / "expected.npz")
    with runtime.load(path, engine) as session:
        logits = session.run(expected["images"])
    limit = SAME[session.bundle.manifest.precision]
    assert relative_l2(logits, expected[path.name]) < limit
    assert relative_l2(logits, expected["pytorch"]) < limit
    best, second = np.sort(expected["pytorch"], axis=1)[:, -2:].T[::-1]
    decided = best - second > 1
    assert decided.sum() == 4
    assert (logits.argmax(1) == expected["pytorch"].argmax(1))[decided].all()


def test_the_expected_logits_tell_images_apart() -> None:
    """Logits of other images would not pass as these."""
    expected = np.load(HERE / "schema1" / "expected.npz")
    for name in ("float32", "int8-tuned"):
        assert relative_l2(expected[name][::-1], expected["pytorch"]) > 0.5


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_an_old_manifest_of_a_plan_is_read(path: Path) -> None:
    manifest = parse_manifest(path, path.read_bytes())
    assert manifest.engine is not None
    assert manifest.engine["profiles"] == [{"min": 1, "opt": 4, "max": 8}]
    assert (manifest.target.name, manifest.target.version) == ("tensorrt-rtx", "1.7.1.116")
    assert manifest.inputs[0].batch == (1, 8)
    assert manifest.files["engine.plan"].bytes == 578268


def test_the_settings_that_an_old_bundle_was_tuned_to() -> None:
    tuning = read_manifest(HERE / "schema1" / "int8-tuned").tuning
    assert tuning is not None and tuning.cpu is not None
    cpu = tuning.cpu
    assert (cpu.engine, cpu.threads, cpu.sessions, cpu.arena) == ("onnxruntime", 1, 1, False)
    assert (len(tuning.groups), set(tuning.groups.values())) == (4, {8, 16, 24})
    assert tuning.passes == ("space_to_depth",)


@pytest.mark.parametrize("path", BUNDLES, ids=NAMES)
def test_an_old_bundle_is_inspected_and_replaced(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rxdeploy.engines.bundle import check_destination

    assert run(["inspect", str(path)]) == 0
    assert "golden" in capsys.readouterr().out
    copy = Path(shutil.copytree(path, tmp_path / "it"))
    manifest = read_manifest(copy)
    check_destination(copy, manifest.model, manifest.precision, overwrite=False)


# Newer ones


def newer(folder: Path, **changes: Any) -> Path:
    """A bundle of the next schema, of which only `schema` and `tools` are where they were."""
    manifest = {
        "schema": SCHEMA + 1,
        "tools": {"rxdeploy": "3.1.4"},
        "everything": "else",
        "digest": "0" * 64,
    } | changes
    text = json.dumps(manifest)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(text.replace("0" * 64, digest))
    return folder


def test_a_newer_bundle_says_which_version_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(newer(tmp_path))]) == 2
    said = capsys.readouterr().err
    assert f"has schema {SCHEMA + 1}, this rxdeploy reads up to {SCHEMA}" in said
    assert "rxdeploy 3.1.4 wrote it: pip install 'rxdeploy>=3.1.4'" in said


@pytest.mark.parametrize(
    "tools",
    [None, [], {}, {"rxdeploy": None}, {"rxdeploy": 2}, {"rxdeploy": "1'; rm -rf ~; '"}, {"rxdeploy": "1" * 99}],
)
def test_a_newer_bundle_that_does_not_say_it(tmp_path: Path, tools: Any) -> None:
    with pytest.raises(InputError, match=r"schema 2, this rxdeploy reads up to 1; install a newer one$"):
        open_bundle(newer(tmp_path, tools=tools))


def test_bundles_say_which_version_wrote_them() -> None:
    """Later readers of this schema's successors rely on its place; see `_newer_version`."""
    for path in BUNDLES:
        assert json.loads((path / "manifest.json").read_text())["tools"]["rxdeploy"] == "0.1.0"
    assert __version__
