"""One good example of every input, made once, and a command line that is run in a copy of them.

A test spoils what it wants in its copy. The model is as small as a ResNeXt gets, so that a command takes milliseconds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from rxdeploy import cli
from rxdeploy.cards import load_card

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
LONGEST_ERROR = 2000  # characters of stderr, the lines on what went well before among them
LONGEST_S = 300  # a command that takes longer waits for something: every one of these has milliseconds of work
LONGEST_CPU_S = 20


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The errors on stderr, each without its "error: ", and with the lines that belong to it."""
        return [text.strip() for text in ("\n" + self.err).split("\nerror: ")[1:]]


class Place:
    """A working folder with a copy of everything good in it, and the command line run there, in this process."""

    def __init__(self, folder: Path, captured: pytest.CaptureFixture[str]) -> None:
        self.folder, self._captured = folder, captured

    def run(self, *arguments: str | Path) -> Result:
        def ring(signum: int, frame: FrameType | None) -> None:
            raise AssertionError(f"it hangs: rxdeploy {' '.join(map(str, arguments))}")

        self._captured.readouterr()
        former = [signal.signal(each, ring) for each in (signal.SIGALRM, signal.SIGPROF)]
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        signal.setitimer(signal.ITIMER_PROF, LONGEST_CPU_S)
        try:
            code = cli.run([str(argument) for argument in arguments])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            for each, handler in zip((signal.SIGALRM, signal.SIGPROF), former, strict=True):
                signal.signal(each, handler)
        return Result(code, *self._captured.readouterr())

    def assert_refused(self, result: Result, code: int, error: str) -> None:
        """The exit code, nothing on stdout, and one error that says what it has to, without a word of Python's."""
        assert len(result.errors) == 1, result.err
        assert result.code == code, result.err
        assert result.out == "" or code == 1, result.err  # a check that fails shows what it measured
        assert error in result.errors[0]
        assert not any(word in result.err for word in ("Traceback", "Exception", "bug in rxdeploy"))
        assert all(char.isprintable() or char == "\n" for char in result.err)
        assert len(result.err) < LONGEST_ERROR

    def contents(self) -> dict[str, str]:
        """Every path in the folder and what is there."""
        return {str(path.relative_to(self.folder)): _content(path) for path in sorted(self.folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if not path.is_file():
        return "folder" if path.is_dir() else "special"
    if path.stat().st_size > 1 << 26:
        return f"{path.stat().st_size} bytes"  # a hole
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good example of every input, and beside it (`cache`) the cache that they were made with."""
    for module in ("torch", "onnx_ir", "safetensors", "filelock", "onnxruntime"):
        pytest.importorskip(module, reason=f"building needs {module}")
    root = tmp_path_factory.mktemp("inputs")
    folder = root / "good"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RXDEPLOY_CACHE", str(root / "cache"))
        _make_weights()
        _make_images()
        for arguments in (
            "build card.toml --weights weights.safetensors --labels names.txt --fp32 --target onnxruntime -o bundle",
            "calibrate card.toml --weights weights.safetensors --calibration-data data -o calibration.json",
            "export card.toml --weights weights.safetensors --fp32 -o model.onnx",
            "evaluate bundle --data data --save-baseline baseline.json --predictions predictions.jsonl",
        ):
            assert cli.run(arguments.split()) == 0, arguments
        _make_plan()
    return folder


def _make_weights() -> None:
    import safetensors.numpy
    import torch

    from rxdeploy.export.synthetic import synthetic_weights

    Path("card.toml").write_text(CARD)
    weights = synthetic_weights(load_card(Path("card.toml")), 0)
    safetensors.numpy.save_file(weights, "weights.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, "weights.pth")
    Path("names.txt").write_text("ant\nbee\ncat\n")


def _make_images() -> None:
    draw = np.random.default_rng(7)
    arrays, labels, lines = [], [], []
    for label, name in enumerate(("ant", "bee", "cat")):
        (Path("data") / name).mkdir(parents=True)
        for number in range(4):
            arrays.append(draw.integers(0, 256, (32, 32, 3), np.uint8))
            labels.append(label)
            lines.append(f"{name}{number}.png,{name}")
            Image.fromarray(arrays[-1]).save(f"data/{name}/{name}{number}.png")
    np.savez("data.npz", images=np.stack(arrays), labels=np.array(labels))
    Path("labels.csv").write_text("\n".join(("filename,label", *lines)) + "\n")
    Path("list.txt").write_text("".join(f"{line.partition(',')[0]}\n" for line in lines))
    with tarfile.open("data.tar", "w") as tar:
        for path in sorted(Path("data").rglob("*.png")):
            tar.add(path, arcname=path.relative_to("data"))
    shutil.copy("data/ant/ant0.png", "image.png")
    Image.fromarray(arrays[1]).resize((96, 64)).save("image.jpg")
    flat = Path("flat")
    flat.mkdir()
    for path in sorted(Path("data").rglob("*.png")):
        shutil.copy(path, flat / path.name)


def _make_plan() -> None:
    """A bundle with a plan in it, as if a TensorRT had built it: no TensorRT is to see these bytes here."""
    import msgspec

    from rxdeploy.engines import bundle as bundles

    bare = bundles.open_bundle(Path("bundle"))
    facts: dict[str, Any] = {
        "version": "10.9.0",
        "version_compatible": False,
        "hardware_compatible": False,
        "strip_plan": False,
        "profiles": [{"min": 1, "opt": 8, "max": 32}],
    }
    target = msgspec.structs.replace(bare.manifest.target, name="tensorrt", version="10.9.0", gpu="NVIDIA L4")
    manifest = msgspec.structs.replace(bare.manifest, engine=facts, target=target)
    files: dict[str, Path | bytes] = {name: bare.file(name) for name in bare.manifest.files}
    bundles.write_bundle(Path("planned"), manifest, files | {bundles.PLAN: bytes(range(256)) * 8}, overwrite=False)


@pytest.fixture
def place(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Place]:
    """A copy of `good`, as the working folder; its cache is shared, and only ever holds what is whole."""
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RXDEPLOY_CACHE", str(good.parent / "cache"))
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "RXDEPLOY_CACHE_LIMIT_GB"):
        monkeypatch.delenv(variable, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Place(folder, capfd)
    root.handlers[:] = handlers
    root.setLevel(level)
