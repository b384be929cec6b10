"""What `rxdeploy doctor` says of this machine, and of machines that lack something."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxdeploy import doctor
from rxdeploy.doctor import Finding, as_facts, automatic_target, examine, self_test
from rxdeploy.engines.flavours import FLAVOURS, TENSORRT, TENSORRT_RTX, Choice, Flavour
from rxdeploy.engines.gpu import Driver, Gpu

NO_DRIVER = Driver(None, (), "no NVIDIA driver (libcuda.so.1 is not installed)")
TWO_GPUS = Driver((13, 0), (Gpu("NVIDIA Test", (9, 0), 80 << 30), Gpu("Other", (12, 0), 24 << 30)), None)
PIECES = [
    "NVIDIA driver",
    "tensorrt",
    "tensorrt-rtx",
    "ONNX Runtime",
    "OpenVINO",
    "PyTorch",
    "ONNX",
    "onnx-ir",
    "httpx",
    "filelock",
    "platformdirs",
    "safetensors",
    "cuda-bindings",
    "cuda-core",
    "tensorrt-lean",
    "matplotlib",
]


def find(piece: str) -> Finding:
    (finding,) = [finding for finding in examine() if finding.piece == piece]
    return finding


def installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def test_every_piece_is_looked_at() -> None:
    findings = examine()
    assert [finding.piece for finding in findings if finding.piece != "GPU"] == PIECES
    for finding in findings:
        assert finding.state in ("ok", "missing", "unusable")
        assert finding.detail
        if finding.state != "ok":
            assert finding.adds and finding.install, f"{finding.piece}: says not what to do"


@pytest.mark.parametrize(
    ("piece", "module", "distribution"),
    [
        ("PyTorch", "torch", "torch"),
        ("ONNX", "onnx", "onnx"),
        ("onnx-ir", "onnx_ir", "onnx-ir"),
        ("safetensors", "safetensors", "safetensors"),
        ("OpenVINO", "openvino", "openvino"),
    ],
)
def test_what_is_here_is_found_with_its_version(piece: str, module: str, distribution: str) -> None:
    finding = find(piece)
    if installed(module):
        assert (finding.state, finding.detail) == ("ok", f"version {importlib.metadata.version(distribution)}")
    else:
        assert finding.state == "missing"


def test_onnxruntime_is_found_with_its_providers() -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="its provider list is the reference")
    finding = find("ONNX Runtime")
    if finding.state == "unusable":
        pytest.skip(f"this machine's ONNX Runtime: {finding.detail}")
    assert onnxruntime.__version__ in finding.detail
    assert all(provider in finding.detail for provider in onnxruntime.get_available_providers())


def test_tensorrt_rtx_is_tried_out() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    finding = find("tensorrt-rtx")
    assert finding.state == "ok"
    assert re.fullmatch(rf"version {re.escape(trt.__version__)}[.\d]*; built a one-layer engine", finding.detail), (
        finding.detail
    )


# Missing pieces


@pytest.mark.parametrize(
    ("piece", "module", "command"),
    [
        ("PyTorch", "torch", "pip install 'rxdeploy[build]'"),
        ("ONNX", "onnx", "pip install 'rxdeploy[build]'"),
        ("onnx-ir", "onnx_ir", "pip install 'rxdeploy[build]'"),
        ("safetensors", "safetensors", "pip install 'rxdeploy[build]'"),
        ("OpenVINO", "openvino", "pip install 'rxdeploy[openvino]'"),
        ("tensorrt", "tensorrt", "pip install 'rxdeploy[tensorrt]'"),
        ("tensorrt-rtx", "tensorrt_rtx", "pip install 'rxdeploy[rtx]'"),
    ],
)
def test_a_missing_module_names_the_command_that_adds_it(
    monkeypatch: pytest.MonkeyPatch, piece: str, module: str, command: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    finding = find(piece)
    assert (finding.state, finding.install) == ("missing", command)
    assert finding.adds


def versions(**found: str) -> Any:
    """In place of doctor._version: only these distributions (_ for -) are installed."""
    return lambda packages: next(
        (found[name.replace("-", "_")] for name in packages if name.replace("-", "_") in found), None
    )


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", versions())
    finding = find("ONNX Runtime")
    assert (finding.state, finding.install) == ("missing", "pip install 'rxdeploy[cpu]'")


def test_both_onnxruntimes_are_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", versions(onnxruntime="1.20", onnxruntime_gpu="1.20"))
    finding = find("ONNX Runtime")
    assert finding.state == "unusable"
    assert "onnxruntime and onnxruntime-gpu are both installed" in finding.detail
    assert finding.install.startswith("pip uninstall onnxruntime onnxruntime-gpu")


def test_the_gpu_package_alone_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(doctor, "installed_version", versions(onnxruntime_gpu="1.20"))
    finding = find("ONNX Runtime")
    assert finding.state == "ok"
    assert finding.detail.startswith("onnxruntime-gpu 1.20: CUDAExecutionProvider, CPUExecutionProvider")


@pytest.mark.parametrize("broken", [None, SimpleNamespace()], ids=["does not import", "half of it is gone"])
def test_an_onnxruntime_that_does_not_load_is_unusable(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    """The second is what is left when one of two onnxruntime packages was uninstalled."""
    monkeypatch.setitem(sys.modules, "onnxruntime", broken)
    monkeypatch.setattr(doctor, "installed_version", versions(onnxruntime="1.20"))
    finding = find("ONNX Runtime")
    assert finding.state == "unusable"
    assert finding.detail.startswith("does not load: ")
    assert finding.install == "pip install -U onnxruntime"


def test_an_openvino_that_does_not_load_is_unusable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('libopenvino.so is not there')\n")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    finding = find("OpenVINO")
    assert (finding.state, finding.install) == ("unusable", "pip install 'rxdeploy[openvino]'")
    assert "libopenvino.so is not there" in finding.detail


# Driver, GPU, TensorRT


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_driver", lambda: NO_DRIVER)
    finding = find("NVIDIA driver")
    assert (finding.state, finding.detail) == ("missing", NO_DRIVER.problem)
    assert "install NVIDIA's driver" in finding.install
    assert not [finding for finding in examine() if finding.piece == "GPU"]


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_driver", lambda: TWO_GPUS)
    findings = examine()
    assert [(finding.piece, finding.state, finding.detail) for finding in findings[:3]] == [
        ("NVIDIA driver", "ok", "CUDA 13.0, 2 GPU(s)"),
        ("GPU", "ok", "NVIDIA Test, compute capability 9.0, 80 GiB"),
        ("GPU", "ok", "Other, compute capability 12.0, 24 GiB"),
    ]


@pytest.mark.parametrize(
    ("driver", "version", "state", "detail"),
    [
        (NO_DRIVER, "10.13", "unusable", "it builds only where a GPU is"),
        (TWO_GPUS, "8.6.1", "unusable", "version 8.6.1 is installed"),
        (TWO_GPUS, None, "missing", "not installed"),
    ],
)
def test_a_tensorrt_that_cannot_build_here_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, version: str | None, state: str, detail: str
) -> None:
    def not_to_be_called(flavour: Flavour) -> str | None:
        assert flavour is not TENSORRT
        return None

    monkeypatch.setattr(doctor, "find_driver", lambda: driver)
    monkeypatch.setattr(doctor, "self_test", not_to_be_called)
    monkeypatch.setattr(Flavour, "version", lambda self: version if self is TENSORRT else None)
    finding = find("tensorrt")
    assert finding.state == state
    assert detail in finding.detail
    assert "rxdeploy[tensorrt]" in finding.install


def test_a_tensorrt_that_fails_its_trial_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flavour, "version", lambda self: "1.7.1" if self is TENSORRT_RTX else None)
    monkeypatch.setattr(doctor, "self_test", lambda flavour: "tensorrt-rtx does not start: it gave no reason")
    finding = find("tensorrt-rtx")
    assert (finding.state, finding.detail) == ("unusable", "tensorrt-rtx does not start: it gave no reason")
    assert finding.install == "pip install 'rxdeploy[rtx]'"


def test_the_trial_reports_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx_ir", reason="the trial's one-layer model is made with onnx-ir")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "the Python module tensorrt is not installed here" in (self_test(TENSORRT) or "")
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert self_test(TENSORRT) == "not tested: onnx-ir is missing; pip install 'rxdeploy[build]' adds it"


# Facts


def test_facts_are_json() -> None:
    findings, choice = examine(), automatic_target()
    facts = json.loads(json.dumps(as_facts(findings, choice)))
    assert [piece["piece"] for piece in facts["pieces"]] == [finding.piece for finding in findings]
    assert all(set(piece) == {"piece", "state", "detail", "adds", "install"} for piece in facts["pieces"])
    assert facts["auto"]["target"] in ("onnxruntime", *(flavour.name for flavour in FLAVOURS))
    assert facts["auto"]["reason"] == choice.reason


@pytest.mark.parametrize(
    ("choice", "target"),
    [(Choice(TENSORRT, "11.4", "r"), "tensorrt"), (Choice(None, None, "r"), "onnxruntime")],
)
def test_facts_name_the_target_of_auto(choice: Choice, target: str) -> None:
    assert as_facts([], choice) == {"pieces": [], "auto": {"target": target, "reason": "r"}}
