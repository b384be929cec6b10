"""`rxdeploy bench` as people and scripts meet it: what goes where, and exit codes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rxdeploy import cli
from rxdeploy.errors import EnvironmentLacks
from rxdeploy.runtime.session import Session

pytest.importorskip("onnx", reason="counting reads the model with onnx")
pytest.importorskip("onnxruntime", reason="the bundle runs on it")

QUICK = ("--device", "cpu", "--seconds", "0.01")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = cli.run(["bench", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def path(bundle: Callable[..., Path]) -> Path:
    return bundle()


def test_tables_on_stdout_and_progress_on_stderr(run: Run, path: Path) -> None:
    result = run(path, *QUICK, "--batch", "4", "--batch", "1", "--layers")
    assert result.code == 0
    for text in (
        "model          small, fp32",
        "Latency of a call",
        "Against the FLOPs",
        "Layers, batch 4",
        "grouped 3x3",
    ):
        assert text in result.out
    assert [line.split("  ")[0] for line in result.err.splitlines()] == [
        *("peak", "batch 1", "peak", "batch 4", "peak", "layers")
    ]
    assert not list(path.parent.glob("*.json"))


def test_json_to_a_file_beside_the_tables(run: Run, path: Path, tmp_path: Path) -> None:
    result = run(path, *QUICK, "--json", "out/result.json")
    assert result.code == 0 and "Latency of a call" in result.out
    data = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [batch["batch"] for batch in data["batches"]] == [1, 8, 32]
    assert data["device"] == {"kind": "cpu", "description": data["device"]["description"], "passed_over": []}
    assert data["counts"]["multiply_adds_per_image"] == 2_706_384
    assert data["layers"] is None


def test_json_to_stdout_is_nothing_but_json(run: Run, path: Path) -> None:
    result = run(path, *QUICK, "--batch", "2", "--json", "-", "--layers")
    assert result.code == 0
    data = json.loads(result.out)
    assert data["batches"][0]["batch"] == data["layers"]["batch"] == 2
    assert not Path("-").exists()


def test_a_plot(run: Run, path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws")
    assert run(path, *QUICK, "--batch", "1,2", "--plot", "plot.svg").code == 0
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0"), "--batch 0: every batch size must be from 1 to 4096"),
        (("--batch", "many"), "--batch many: expected batch sizes"),
        (("--batch", "100000"), "--batch 100000: every batch size"),
        (("--batch", "1,2,"), "--batch 1,2,: expected"),
        (("--batch", ""), "--batch : expected"),
        (("--batch", "1", "--batch", "x"), "--batch 1,x: expected"),
        (("--seconds", "0"), "--seconds 0: must be more than 0"),
        (("--seconds", "nan"), "--seconds nan: must be"),
        (("--json", "."), "--json .: is a folder"),
        (("--json", "file/x.json"), "--json file/x.json: "),
        (("--plot", "plot.pdf"), "--plot plot.pdf: the file name must end in .png or .svg"),
        (("--plot", "file/plot.png"), "--plot file/plot.png: "),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_bad_input_is_one_error_before_any_work(
    run: Run, path: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "file").write_text("")
    result = run(path, *options)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and message in result.err and result.err.count("\n") == 1


def test_no_bundle(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "nothing")
    assert result.code == 2 and "not a bundle" in result.err


def test_a_gpu_where_there_is_none(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(path, "--device", "tensorrt")
    assert (result.code, result.out) == (3, "")


def test_what_could_be_measured_is_shown_and_the_rest_is_an_error(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Session.run

    def failing(self: Session, images: Any, *more: Any) -> Any:
        if len(images) == 2:
            raise EnvironmentLacks("the GPU has not enough free memory")
        return original(self, images, *more)

    monkeypatch.setattr(Session, "run", failing)
    result = run(path, *QUICK, "--batch", "1,2", "--json", "r.json")
    assert result.code == 3
    assert result.err.endswith("error: batch 2 could not be measured: the GPU has not enough free memory\n")
    assert "Latency of a call" in result.out
    data = json.loads((tmp_path / "r.json").read_text())
    assert [batch["batch"] for batch in data["batches"]] == [1]
    assert data["failures"] == [
        {"what": "batch 2", "error": "batch 2 could not be measured: the GPU has not enough free memory"}
    ]
