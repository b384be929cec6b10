"""The command line as people and scripts meet it: exit codes, what goes to stdout and what to stderr.

Commands run in this process through `rxdeploy.cli.run`; a process of its own is started only where that is the point.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import rxdeploy
from rxdeploy import cli
from rxdeploy.cards.card import tomllib
from rxdeploy.cards.registry import BUILTIN

DIGITS = "digits_resnext14_8x8d"
BUILD = ("build", DIGITS, "--target", "onnxruntime")
STAGE_LINE = re.compile(r"^(\S.*?\S) +(\d+\.\d s|reused)  (\S.*)$")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.lower().startswith("error: ")]

    @property
    def stages(self) -> dict[str, str]:
        """What stderr says of each stage: its seconds, or "reused"."""
        matches = [STAGE_LINE.match(line) for line in self.err.splitlines()]
        return {match[1]: match[2] for match in matches if match}


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line in a working directory and a cache of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RXDEPLOY_CACHE", str(tmp_path / "cache"))
    for variable in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "RXDEPLOY_CACHE_LIMIT_GB"):
        monkeypatch.delenv(variable, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def builds() -> None:
    """Skips where the packages that a build needs are missing."""
    for module in ("torch", "onnx", "onnx_ir", "safetensors", "filelock", "platformdirs", "onnxruntime"):
        pytest.importorskip(module, reason=f"building needs {module}")


@pytest.fixture
def digits(tmp_path: Path) -> list[Path]:
    """Ten held-out digits, one of each class, as PNG files."""
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    from rxdeploy.cards.digits_images import write_held_out

    return write_held_out(tmp_path / "images", 10)


# Help, usage, and what is imported for them


def in_a_process(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, "-m", "rxdeploy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


COMMANDS = {"build", "cache", "classify", "doctor", "export", "inspect", "models", "validate"}


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_commands(run: Run, option: str) -> None:
    result = run(option)
    assert (result.code, result.err) == (0, "")
    listed = re.findall(r"^  (\w+)  +\S", result.out.partition("Commands:")[2], re.MULTILINE)
    assert set(listed) >= COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: rxdeploy {command} ")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"rxdeploy, version {rxdeploy.__version__}\n", "")


HEAVY = {"torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "safetensors", "sklearn", "httpx"}
UNNEEDED = {"numpy", "PIL", "rich", "msgspec", "filelock", "platformdirs"}


@pytest.mark.parametrize("arguments", [("--help",), ("build", "--help"), ("--version",)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = in_a_process(*arguments, python=("-X", "importtime"))
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported  # the report was read
    assert not imported & (HEAVY | UNNEEDED)


def test_models_and_inspect_do_not_import_torch(run: Run, builds: None, tmp_path: Path) -> None:
    run(*BUILD, "-o", tmp_path / "bundle")
    for arguments in (["models"], ["inspect", str(tmp_path / "bundle")]):
        code = f"import sys; from rxdeploy.cli import run; run({arguments!r}); print(*sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert "rxdeploy.cli" in done.stderr.split()
        assert not {name.partition(".")[0] for name in done.stderr.split()} & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "no-such-command",
        "--no-such-option",
        "build",
        "build MODEL another",
        f"build {DIGITS} --fp7",
        f"build {DIGITS} --target cuda",
        f"build {DIGITS} --input int8",
        f"build {DIGITS} --batch 0",
        f"build {DIGITS} --batch 1,8",
        f"build {DIGITS} --batch 8,1,32",
        f"build {DIGITS} --batch 1,8,100000",
        f"build {DIGITS} --batch -1",
        f"build {DIGITS} --batch eight",
        f"build {DIGITS} --workspace 0",
        f"build {DIGITS} --opt-level 6",
        f"build {DIGITS} --weights synthetic:x",
        f"build {DIGITS} --weights synthetic:-1",
        f"build {DIGITS} --target onnxruntime --workspace 100",
        f"build {DIGITS} --target onnxruntime --refit",
        "classify",
        "classify bundle",
        "classify bundle image --top 0",
        "classify bundle image --device tpu",
        "inspect",
        "inspect no-such-bundle",
        "export",
        "validate",
        f"validate {DIGITS} --onnx no-such-file.onnx",
    ],
)
def test_wrong_usage_is_exit_2(run: Run, arguments: str) -> None:
    result = run(*arguments.split())
    assert (result.code, result.out) == (2, "")
    if arguments:  # nothing at all shows the help
        assert len(result.errors) == 1
    assert "Traceback" not in result.err
    assert list(Path().iterdir()) == []


# models

COUNTED = {  # parameters and multiply-adds, counted with an independent tool (shared/DESIGN.md)
    "gluon_resnext50_32x4d": (25_028_904, 4_230_479_872),
    "gluon_resnext101_32x4d": (44_177_704, 7_969_996_800),
    "gluon_resnext101_64x4d": (83_455_272, 15_460_270_080),
}


def test_models_as_json(run: Run) -> None:
    result = run("models", "--json")
    assert (result.code, result.err) == (0, "")
    models = {model["name"]: model for model in json.loads(result.out)}
    cards = {path.stem: tomllib.loads(path.read_text()) for path in BUILTIN.glob("*.toml")}
    assert models.keys() == cards.keys()
    for name, card in cards.items():
        for table, facts in card.items():
            if isinstance(facts, dict):
                assert facts.items() <= models[name][table].items()
            else:
                assert models[name][table] == facts
    for name, (parameters, multiply_adds) in COUNTED.items():
        assert models[name]["counted_parameters"] == parameters
        assert models[name]["counted_multiply_adds"] == multiply_adds


def test_models_as_a_table(run: Run) -> None:
    result = run("models")
    assert (result.code, result.err) == (0, "")
    rows = {
        cells[0]: cells for line in result.out.splitlines() if len(cells := re.split(r"\s*[│|]\s*", line)[1:-1]) > 1
    }
    expected = "resnext101_64x4d.gluon_in1k 224x224 1000 83.46 M 19.95 G 80.63 95.00 334.7 MB"
    assert " ".join(rows["gluon_resnext101_64x4d"][1:]) == expected
    assert rows[DIGITS][2:4] == ["64x64", "10"]
    assert len(rows) == len(list(BUILTIN.glob("*.toml")))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gluon_resnext50_32x4", "gluon_resnext50_32x4d"),
        ("gluon-resnext101-64x4d", "gluon_resnext101_64x4d"),
        ("resnext50_32x4d.gluon_in1", "resnext50_32x4d.gluon_in1k"),
        ("digits", "digits_resnext14_8x8d"),
    ],
)
@pytest.mark.parametrize("command", ["build", "export", "validate"])
def test_an_unknown_model_suggests_the_nearest(run: Run, command: str, name: str, meant: str) -> None:
    result = run(command, name)
    assert (result.code, result.out) == (2, "")
    (error,) = result.errors
    assert repr(name) in error
    assert f"did you mean {meant}?" in error


def test_an_alias_is_a_name(run: Run) -> None:
    result = run("export", "resnext50_32x4d.gluon_in1k", "--weights", "none.pth")
    (error,) = result.errors
    assert "weights file none.pth" in error  # so the model itself was found


# build


def test_build_as_json(run: Run, builds: None) -> None:
    result = run(*BUILD, "--fp16", "--json")
    assert result.code == 0
    facts = json.loads(result.out)  # one document and nothing else
    assert facts["bundle"] == f"{DIGITS}-fp16"
    assert facts["manifest"] == json.loads(Path(facts["bundle"], "manifest.json").read_text())
    stages = ["export", "validate fp32", "precision", "validate fp16", "bundle"]
    assert [stage["stage"] for stage in facts["stages"]] == stages
    assert not any(stage["reused"] for stage in facts["stages"])
    assert list(result.stages) == stages
    assert result.errors == []
    manifest = facts["manifest"]
    assert (manifest["model"], manifest["precision"], manifest["target"]["name"]) == (DIGITS, "fp16", "onnxruntime")
    assert manifest["weights"]["kind"] == "file"
    weights = (BUILTIN / f"{DIGITS}.safetensors").read_bytes()
    assert manifest["weights"]["sha256"] == hashlib.sha256(weights).hexdigest()
    for name, file in manifest["files"].items():
        data = Path(facts["bundle"], name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_second_build_reuses_and_says_so(run: Run, builds: None) -> None:
    first, second = run(*BUILD), run(*BUILD, "-o", "other")
    assert (first.code, second.code) == (0, 0)
    assert "reused" not in first.stages.values()
    assert {name for name, took in second.stages.items() if took != "reused"} == {"bundle"}
    forced = run(*BUILD, "-o", "forced", "--force")
    assert "reused" not in forced.stages.values()
    changed = run(*BUILD, "-o", "changed", "--input", "float32")
    assert changed.stages["export"] != "reused"
    models = {name: Path(name, "model.onnx").read_bytes() for name in (f"{DIGITS}-fp16", "other", "forced", "changed")}
    assert models["other"] == models["forced"] == models[f"{DIGITS}-fp16"] != models["changed"]


@pytest.mark.parametrize(("options", "name"), [((), "fp16"), (("--fp16",), "fp16"), (("--fp32",), "fp32")])
def test_default_output_and_precision(run: Run, builds: None, options: tuple[str, ...], name: str) -> None:
    result = run(*BUILD, *options)
    assert result.code == 0
    assert {path.name for path in Path().iterdir()} == {f"{DIGITS}-{name}"}
    inside = {path.name for path in Path(f"{DIGITS}-{name}").iterdir()}
    assert inside == {"labels.txt", "manifest.json", "model.onnx", "sbom.cdx.json"}
    assert f"{DIGITS}, {name}" in result.out
    assert result.stages.keys() == {"export", f"validate {name}", "bundle"} | (
        {"precision", "validate fp32"} if name == "fp16" else set()
    )


def test_output_into_a_new_folder(run: Run, builds: None) -> None:
    assert run(*BUILD, "-o", "new/folder/bundle").code == 0
    assert run("inspect", "new/folder/bundle").code == 0


def test_build_with_labels(run: Run, builds: None) -> None:
    Path("labels.txt").write_text("\n".join(f"n{index}\tname {index}" for index in range(10)))
    assert run(*BUILD, "--labels", "labels.txt", "-o", "bundle").code == 0
    assert Path("bundle/labels.txt").read_text().splitlines() == [f"name {index}" for index in range(10)]


def test_build_for_several_batch_sizes_validates_the_largest_optimum(run: Run, builds: None) -> None:
    result = run(*BUILD, "--batch", "2", "--batch", "1,5,9", "--batch", "3", "--json")
    validation = json.loads(result.out)["manifest"]["validation"]
    assert set(validation["providers"]["CPUExecutionProvider"]["by_batch"]) == {"1", "5", "6"}


def test_the_manifest_records_the_command(run: Run, builds: None) -> None:
    command = json.loads(run(*BUILD, "--json").out)["manifest"]["command"]
    assert command == ["rxdeploy", *BUILD, "--json"]


def test_the_manifest_records_the_command_of_the_process(run: Run, builds: None) -> None:
    done = in_a_process(*BUILD, "-o", "bundle")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("bundle/manifest.json").read_text())["command"] == ["rxdeploy", *BUILD, "-o", "bundle"]


def test_build_with_tensorrt_rtx(run: Run, builds: None) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    result = run("build", DIGITS, "--target", "tensorrt-rtx", "--batch", "1,2,4", "--json", "-o", "bundle")
    assert result.code == 0
    manifest = json.loads(result.out)["manifest"]
    assert "engine" in result.stages
    assert manifest["target"]["version"] == trt.__version__
    assert manifest["files"]["engine.plan"]["bytes"] == Path("bundle/engine.plan").stat().st_size > 100_000
    assert manifest["inputs"][0]["batch"] == [1, 4]
    assert f"tensorrt-rtx {trt.__version__}" in run("inspect", "bundle").out


def test_a_target_that_is_not_here_is_exit_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from rxdeploy.engines.flavours import Flavour

    monkeypatch.setattr(Flavour, "version", lambda self: None)
    for target, extra in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")):
        result = run("build", DIGITS, "--target", target)
        assert (result.code, result.out) == (3, "")
        (error,) = result.errors
        assert f"pip install 'rxdeploy[{extra}]'" in error


def test_no_network_is_exit_3(run: Run, builds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httpx")
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    result = run("build", "gluon_resnext50_32x4d")
    assert (result.code, result.out) == (3, "")
    (error,) = result.errors
    assert "--weights PATH" in error
    assert "--weights synthetic" in error
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(("module", "extra"), [("torch", "build"), ("onnx_ir", "build"), ("onnxruntime", "cpu")])
def test_a_missing_package_is_exit_3(
    run: Run, builds: None, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    for name in list(sys.modules):  # so that they are imported anew, and look for the package
        if name.startswith("rxdeploy.export."):
            monkeypatch.delitem(sys.modules, name)
    import rxdeploy.export as package

    for name in list(vars(package)):
        if not name.startswith("__"):
            monkeypatch.delattr(package, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = run(*BUILD)
    assert (result.code, result.out) == (3, "")
    (error,) = result.errors
    assert f"module {module} is not installed" in error
    assert f"pip install 'rxdeploy[{extra}]'" in error
    assert list(Path().iterdir()) == []


# classify


def test_classify_digits(run: Run, builds: None, digits: list[Path]) -> None:
    run(*BUILD, "-o", "bundle")
    result = run("classify", "bundle", *digits)
    assert (result.code, result.err) == (0, "")
    names = (BUILTIN / "digits.txt").read_text().split()
    rows = [re.split(r"\s*[│|]\s*", line)[1:-1] for line in result.out.splitlines()]
    rows = [row for row in rows if len(row) == 5]
    assert len(rows) == 10 * 5
    for path, (image, rank, index, name, probability) in zip(digits, rows[::5], strict=True):
        digit = int(path.name.split("-")[1])
        assert (image, rank, index, name) == (str(path), "1", str(digit), names[digit])
        assert float(probability.rstrip("%")) > 50
    for image in range(10):
        probabilities = [float(row[4].rstrip("%")) for row in rows[5 * image : 5 * image + 5]]
        assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.parametrize(("k", "shown"), [(1, 1), (3, 3), (10, 10), (500, 10)])
def test_classify_as_json(run: Run, builds: None, digits: list[Path], k: int, shown: int) -> None:
    run(*BUILD, "-o", "bundle", "--fp32")
    result = run("classify", "bundle", digits[0], digits[1], "-k", str(k), "--json", "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    facts = json.loads(result.out)
    assert (facts["model"], facts["device"], facts["errors"]) == (DIGITS, "cpu", [])
    assert [image["image"] for image in facts["images"]] == [str(digits[0]), str(digits[1])]
    for path, image in zip(digits, facts["images"], strict=False):
        assert len(image["predictions"]) == shown
        best = image["predictions"][0]
        assert f"digit-{best['index']}-" in path.name
        assert 0.5 < best["probability"] <= 1
    if shown == 10:
        logits = np.array([prediction["logit"] for prediction in facts["images"][0]["predictions"]])
        probabilities = [prediction["probability"] for prediction in facts["images"][0]["predictions"]]
        np.testing.assert_allclose(probabilities, np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
        assert [prediction["label"] for prediction in facts["images"][0]["predictions"]].count("seven") == 1


def test_classify_with_labels(run: Run, builds: None, digits: list[Path]) -> None:
    run(*BUILD, "-o", "bundle")
    Path("labels.txt").write_text("\n".join(f"[bold]digit {index}[/bold]" for index in range(10)))
    result = run("classify", "bundle", digits[0], "--labels", "labels.txt", "-k", "1")
    assert "[bold]digit " in result.out  # printed as it is, whatever rich would make of it


@pytest.mark.parametrize("as_json", [False, True])
def test_one_bad_image_among_good_ones(run: Run, builds: None, digits: list[Path], as_json: bool) -> None:
    run(*BUILD, "-o", "bundle")
    bad = Path("bad.png")
    bad.write_bytes(b"no image")
    result = run("classify", "bundle", digits[0], bad, digits[1], *(["--json"] if as_json else []))
    assert result.code == 2
    (error,) = result.errors
    assert "bad.png" in error
    if as_json:
        facts = json.loads(result.out)
        assert [image["image"] for image in facts["images"]] == [str(digits[0]), str(digits[1])]
        assert len(facts["errors"]) == 1
        assert "bad.png" in facts["errors"][0]
    else:
        assert str(digits[0]) in result.out
        assert str(digits[1]) in result.out
        assert "bad.png" not in result.out


def test_every_bad_image_has_its_error(run: Run, builds: None) -> None:
    run(*BUILD, "-o", "bundle")
    Path("bad.png").write_bytes(b"no image")
    result = run("classify", "bundle", "bad.png", "missing.png", "bundle")
    assert result.code == 2
    assert len(result.errors) == 3
    for error, name in zip(result.errors, ("bad.png", "missing.png", "bundle"), strict=True):
        assert f"image {name}: " in error


def test_classify_on_a_gpu_that_is_not_here(run: Run, builds: None) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    run(*BUILD, "-o", "bundle")
    Image.new("L", (8, 8)).save("image.png")
    result = run("classify", "bundle", "image.png", "--device", "cuda")
    assert (result.code, result.out) == (3, "")
    assert "rxdeploy[gpu]" in result.errors[0]


def test_a_bundle_of_float32_input(run: Run, builds: None, digits: list[Path]) -> None:
    run(*BUILD, "-o", "bundle", "--input", "float32")
    facts = json.loads(run("classify", "bundle", *digits, "-k", "1", "--json").out)
    assert all(f"digit-{image['predictions'][0]['index']}-" in image["image"] for image in facts["images"])
    manifest = json.loads(Path("bundle/manifest.json").read_text())
    assert manifest["normalisation_in_graph"] is False
    (tensor,) = manifest["inputs"]
    assert (tensor["name"], tensor["dtype"], tensor["layout"]) == ("input", "float32", "NCHW")
    assert tensor["shape"] == [None, 3, 64, 64]


# inspect


def test_inspect(run: Run, builds: None) -> None:
    run(*BUILD, "-o", "bundle")
    result = run("inspect", "bundle")
    assert (result.code, result.err) == (0, "")
    facts = dict(line.split(None, 1) for line in result.out.splitlines())
    for name in ("model.onnx", "labels.txt"):
        assert hashlib.sha256(Path("bundle", name).read_bytes()).hexdigest() in facts[name]
    assert facts["model"] == f"{DIGITS}, fp16"
    assert "uint8 NHWC (batch, 64, 64, 3)" in facts["input"]
    assert "float32 NC (batch, 10)" in facts["output"]
    assert "488,362 parameters" in facts["counted"]
    assert rxdeploy.__version__ in facts["tools"]


def test_inspect_as_json(run: Run, builds: None) -> None:
    run(*BUILD, "-o", "bundle")
    result = run("inspect", "bundle", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == json.loads(Path("bundle/manifest.json").read_text())


# export and validate


def test_export(run: Run, builds: None) -> None:
    onnx = pytest.importorskip("onnx")
    result = run("export", DIGITS)
    assert (result.code, result.out) == (0, f"{DIGITS}-fp16.onnx\n")
    assert result.stages.keys() == {"export", "precision", "write"}
    model = onnx.load(f"{DIGITS}-fp16.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].name == "image"
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert {prop.key: prop.value for prop in model.metadata_props}["rxdeploy.model"] == DIGITS


def test_export_twice(run: Run, builds: None) -> None:
    assert run("export", DIGITS, "--fp32").code == 0
    Path(f"{DIGITS}-fp32.onnx").write_bytes(b"mine")
    result = run("export", DIGITS, "--fp32")
    assert (result.code, result.out) == (2, "")
    assert "--overwrite" in result.errors[0]
    assert Path(f"{DIGITS}-fp32.onnx").read_bytes() == b"mine"
    assert run("export", DIGITS, "--fp32", "--overwrite").code == 0
    assert Path(f"{DIGITS}-fp32.onnx").stat().st_size > 1_900_000


def test_export_float32_input_as_json(run: Run, builds: None) -> None:
    onnx = pytest.importorskip("onnx")
    result = run("export", DIGITS, "--fp32", "--input", "float32", "-o", "sub/model.onnx", "--json")
    assert result.code == 0
    facts = json.loads(result.out)
    assert facts["model"] == "sub/model.onnx"
    model = onnx.load(facts["model"])
    (tensor,) = model.graph.input
    assert (tensor.name, tensor.type.tensor_type.elem_type) == ("input", onnx.TensorProto.FLOAT)
    assert [size.dim_value or size.dim_param for size in tensor.type.tensor_type.shape.dim] == ["batch", 3, 64, 64]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_validate(run: Run, builds: None, precision: str) -> None:
    result = run("validate", DIGITS, f"--{precision}", "--json")
    assert result.code == 0
    facts = json.loads(result.out)
    assert (facts["passed"], facts["model"]) == (True, DIGITS)
    overall = facts["providers"]["CPUExecutionProvider"]["all"]
    assert 0 < overall["relative_l2"] < facts["limits"]["relative_l2"]
    assert overall["flipped"] == 0
    assert "layers" not in facts
    table = run("validate", DIGITS, f"--{precision}")
    assert table.code == 0
    assert "photographs" in table.out
    assert "noise" in table.out
    assert "batch 9" in table.out


def test_validate_layers(run: Run, builds: None) -> None:
    layers = json.loads(run("validate", DIGITS, "--layers", "--json").out)["layers"]
    names = [layer["name"] for layer in layers]
    assert (names[0], names[-1]) == ("bn1", "logits")
    for stage in (1, 2, 3, 4):
        block = [f"layer{stage}.0{part}" for part in (".bn1", ".bn2", ".bn3", "")]
        assert [name for name in names if name in block] == block
    assert not any(layer["departs"] for layer in layers)
    assert all(0 <= layer["relative_l2"] < 2e-2 for layer in layers)
    table = run("validate", DIGITS, "--layers")
    assert table.code == 0
    for name in names:
        assert re.search(rf"[│|] {re.escape(name)} +[│|]", table.out)
    assert "departs" not in table.out


def sabotaged(path: Path, name: str, factor: float) -> None:
    """Multiplies one initializer of an ONNX file."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), name))
    onnx.save(model, path)


def test_validate_an_onnx_file(run: Run, builds: None) -> None:
    run("export", DIGITS, "--fp32", "-o", "model.onnx")
    for options in ((), ("--layers",), ("--batch", "3")):
        result = run("validate", DIGITS, "--fp32", "--onnx", "model.onnx", *options)
        assert (result.code, result.errors) == (0, [])


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("conv1.weight", "bn1"),
        ("layer2.0.conv2.weight", "layer2.0.bn2"),
        ("layer3.0.downsample.0.weight", "layer3.0.downsample.1"),
        ("layer4.0.conv3.bias", "layer4.0.bn3"),
        ("fc.weight", "logits"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_validate_names_the_sabotaged_layer(run: Run, builds: None, precision: str, name: str, first: str) -> None:
    run("export", DIGITS, f"--{precision}", "-o", "model.onnx")
    sabotaged(Path("model.onnx"), name, 1.6)
    result = run("validate", DIGITS, f"--{precision}", "--onnx", "model.onnx", "--json", "--layers")
    assert result.code == 1
    (error,) = result.errors
    assert f"the first tensor that departs is {first} " in error
    facts = json.loads(result.out)
    assert facts["passed"] is False
    assert next(layer["name"] for layer in facts["layers"] if layer["departs"]) == first
    table = run("validate", DIGITS, f"--{precision}", "--onnx", "model.onnx", "--layers")
    assert table.code == 1
    assert "departs" in table.out


def test_validate_a_file_of_something_else(run: Run, builds: None) -> None:
    Path("model.onnx").write_bytes(b"no model")
    result = run("validate", DIGITS, "--onnx", "model.onnx")
    assert (result.code, result.out) == (2, "")
    assert "model.onnx" in result.errors[0]


def test_validate_a_file_with_other_classes(run: Run, builds: None, make_card: Callable[..., Any]) -> None:
    architecture = tomllib.loads((BUILTIN / f"{DIGITS}.toml").read_text())["architecture"]
    card = make_card("seven", image_size=64, **(architecture | {"num_classes": 7}))
    assert run("export", str(card.path), "--weights", "synthetic", "-o", "model.onnx").code == 0
    result = run("validate", DIGITS, "--onnx", "model.onnx")
    assert result.code == 2
    assert len(result.errors) == 1


def test_validate_a_file_of_a_fixed_batch(run: Run, builds: None) -> None:
    onnx = pytest.importorskip("onnx")
    run("export", DIGITS, "--fp32", "-o", "model.onnx")
    model = onnx.load("model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    onnx.save(model, "model.onnx")
    result = run("validate", DIGITS, "--fp32", "--onnx", "model.onnx")
    assert result.code in (0, 2)  # validated at its own batch size, or refused
    assert len(result.errors) == (1 if result.code else 0)


# doctor


def test_doctor(run: Run) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    result = run("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    facts = json.loads(result.out)
    pieces = {piece["piece"]: piece for piece in facts["pieces"]}
    assert {"NVIDIA driver", "tensorrt", "tensorrt-rtx", "ONNX Runtime", "PyTorch"} <= pieces.keys()
    assert {piece["state"] for piece in facts["pieces"]} <= {"ok", "missing", "unusable"}
    assert onnxruntime.__version__ in pieces["ONNX Runtime"]["detail"]
    for piece in facts["pieces"]:
        if piece["state"] != "ok":
            assert piece["install"], piece
    table = run("doctor")
    assert (table.code, table.err) == (0, "")
    for name in pieces:
        assert name in table.out
    assert f"--target auto takes {facts['auto']['target']} here" in table.out
    assert "rxdeploy[" in table.out or "missing" not in table.out  # rich has not taken it for markup


# cache


def test_cache(run: Run, builds: None, tmp_path: Path) -> None:
    empty = run("cache")
    assert (empty.code, empty.err) == (0, "")
    assert empty.out.startswith(f"{tmp_path / 'cache'}: 0 stage results, 0.00 GB")
    run(*BUILD)
    entries = [path for path in (tmp_path / "cache" / "stages").iterdir() if not path.name.startswith(".")]
    assert run("cache").out.startswith(f"{tmp_path / 'cache'}: {len(entries)} stage results")
    assert len(entries) == 5  # export, reference, precision, and two validations
    cleared = run("cache", "--clear")
    assert cleared.code == 0
    assert ": 0 stage results" in cleared.out
    assert list((tmp_path / "cache" / "stages").iterdir()) == []
    assert "reused" not in run(*BUILD).stages.values()


def test_the_cache_keeps_to_its_limit(run: Run, builds: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RXDEPLOY_CACHE_LIMIT_GB", "0.0015")
    assert run(*BUILD).code == 0
    kept = sum(path.stat().st_size for path in (tmp_path / "cache" / "stages").rglob("*") if path.is_file())
    assert 0 < kept <= 1_500_000
    monkeypatch.setenv("RXDEPLOY_CACHE_LIMIT_GB", "much")
    result = run("cache")
    assert (result.code, result.out) == (2, "")
    assert "RXDEPLOY_CACHE_LIMIT_GB=much" in result.errors[0]


# Synthetic weights are labelled


def test_synthetic_weights_are_labelled_everywhere(run: Run, builds: None, make_card: Callable[..., Any]) -> None:
    card = str(make_card().path)
    options = (card, "--weights", "synthetic:7")
    Image.new("RGB", (9, 9)).save("image.png")
    commands: dict[str, tuple[str, ...]] = {
        "build": ("build", *options, "--target", "onnxruntime", "-o", "bundle"),
        "export": ("export", *options, "-o", "model.onnx"),
        "validate": ("validate", *options),
        "validate file": ("validate", *options, "--onnx", "model.onnx", "--layers"),
        "classify": ("classify", "bundle", "image.png"),
        "inspect": ("inspect", "bundle"),
    }
    for name, arguments in commands.items():
        result = run(*arguments)
        assert result.code == 0, result.err
        assert re.search(r"SYNTHETIC.*synthetic:7", result.out + result.err), name
    for name, arguments in commands.items():
        again = ("-o", "second.onnx") if name == "export" else ()
        result = run(*arguments, *again, "--json")
        assert result.code == 0, result.err
        assert "synthetic:7" in json.dumps(json.loads(result.out)), name
    weights = json.loads(Path("bundle/manifest.json").read_text())["weights"]
    assert weights == {"kind": "synthetic", "source": "synthetic:7", "sha256": None, "licence": None}


def test_trained_weights_are_not(run: Run, builds: None) -> None:
    for arguments in (BUILD, ("export", DIGITS), ("validate", DIGITS), ("inspect", f"{DIGITS}-fp16")):
        result = run(*arguments)
        assert result.code == 0
        assert "synthetic" not in (result.out + result.err).lower()


# Logs, bugs of ours, and pipes


def test_verbose(run: Run, builds: None) -> None:
    quiet, loud = run(*BUILD), run("-v", *BUILD, "--force")
    assert quiet.code == loud.code == 0
    assert quiet.out == loud.out
    assert len(quiet.stages) == len(quiet.err.splitlines()) == 5  # nothing but the stages
    assert len(loud.stages) == 5


def test_very_verbose_shows_what_tensorrt_says(run: Run, builds: None) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    arguments = ("build", DIGITS, "--target", "tensorrt-rtx", "--force")
    assert "rxdeploy.tensorrt: " not in run(*arguments).err
    assert "rxdeploy.tensorrt: " in run("-vv", *arguments).err


def test_a_bug_of_ours_is_one_line_and_a_traceback_with_v(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rxdeploy.pipeline.Pipeline.build", fail)
    result = run(*BUILD)
    assert (result.code, result.out) == (70, "")
    assert result.err.count("\n") == 1
    assert "ZeroDivisionError" in result.errors[0]
    loud = run("-v", *BUILD)
    assert loud.code == 70
    assert "Traceback" in loud.err
    assert len(loud.errors) == 1


def test_a_reader_that_goes_away_is_no_failure() -> None:
    command = [sys.executable, "-m", "rxdeploy", "models", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), error) == (0, b"")


def test_an_end_of_file_is_not_called_an_interruption(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise EOFError("a file ended")

    monkeypatch.setattr("rxdeploy.pipeline.Pipeline.build", fail)
    assert run(*BUILD).code == 70


def test_the_user_s_own_card_works_everywhere(run: Run, builds: None, make_card: Callable[..., Any]) -> None:
    import torch

    from rxdeploy.export.module import ResNeXt

    card = make_card("mine", weights={"file": "mine.pth"}, labels="names.txt", num_classes=3)
    torch.save(ResNeXt(card).state_dict(), card.path.parent / "mine.pth")
    (card.path.parent / "names.txt").write_text("ant\nbee\ncat\n")
    path = str(card.path)
    Image.new("RGB", (9, 9), (200, 10, 10)).save("image.png")
    assert run("build", path, "--target", "onnxruntime").code == 0
    assert run("export", path).code == 0
    assert run("validate", path, "--layers").code == 0
    assert {entry.name for entry in Path().iterdir()} == {"mine-fp16", "mine-fp16.onnx", "image.png"}
    result = run("classify", "mine-fp16", "image.png")
    assert result.code == 0
    assert all(name in result.out for name in ("ant", "bee", "cat"))


def test_a_closed_stdout_is_no_traceback() -> None:
    command = f"{sys.executable} -m rxdeploy models --json >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_validate_takes_the_precision_of_a_file(run: Run, builds: None) -> None:
    assert run("export", DIGITS, "--fp32", "-o", "model.onnx").code == 0
    facts = json.loads(run("validate", DIGITS, "--onnx", "model.onnx", "--json").out)
    assert (facts["precision"], facts["limits"]["relative_l2"]) == ("fp32", 1e-4)
    assert list(facts["providers"]) == ["CPUExecutionProvider"]


def test_names_cannot_command_the_terminal(run: Run, builds: None) -> None:
    assert run("build", DIGITS, "--target", "onnxruntime", "-o", "bundle").code == 0
    Path("names.txt").write_text("\n".join(["\x1b[31mred\x07"] * 10))
    Image.new("RGB", (8, 8)).save("a\x1b[31mb.png")
    result = run("classify", "bundle", "a\x1b[31mb.png", "--labels", "names.txt")
    assert result.code == 0 and "red" in result.out
    assert "\x1b[31m" not in result.out and "\x07" not in result.out
