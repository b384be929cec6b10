"""The device's limits: what is computed and copied, what is kept of it, and the datasheets against arithmetic."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rxdeploy.bench import peaks
from rxdeploy.bench.datasheet import DATASHEETS
from rxdeploy.bench.peaks import Prober
from rxdeploy.errors import EnvironmentLacks
from rxdeploy.runtime.session import Session, load

pytest.importorskip("onnx", reason="the product is made with onnx")
Bundles = Callable[..., Path]


@pytest.fixture
def session(bundle: Bundles) -> Session:
    pytest.importorskip("onnxruntime", reason="the product runs on it")
    return load(bundle(), "cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_the_product_is_a_product(run_onnx: Callable, precision: Any, dtype: type) -> None:
    a = np.random.default_rng(1).uniform(-1, 1, (24, 24)).astype(dtype)
    found = run_onnx(peaks.product_model(precision, 24), a)
    assert found.dtype == dtype
    expected = a.astype(np.float64) @ peaks._matrix(24, np.dtype(dtype)).astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "fp32" else 2e-2)


def test_the_product_runs_on_the_engine_that_runs_the_model(
    session: Session, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each timed call is one run of the product's session."""
    ran = []

    def opened(model: bytes, provider: str, ordinal: int) -> Any:
        return SimpleNamespace(run=lambda names, feed: ran.append((provider, names, feed["a"].shape, feed["a"].dtype)))

    monkeypatch.setattr(peaks, "open_session", opened)
    with Prober(session, 0) as prober:
        prober.measure()
    assert {(provider, shape, dtype) for provider, _, shape, dtype in ran} == {
        ("CPUExecutionProvider", (32, 32), np.dtype(np.float32))
    }


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_floats_for_openvino_are_multiplied_by_openvino(
    bundle: Bundles, quick: None, monkeypatch: pytest.MonkeyPatch, precision: Any, dtype: type
) -> None:
    from rxdeploy.runtime import openvino

    ran, real = [], openvino.Requests.run

    def run(self: openvino.Requests, matrix: Any) -> Any:
        found = real(self, matrix)
        ran.append((matrix.shape, matrix.dtype, found.dtype))
        expected = matrix.astype(np.float64) @ peaks._matrix(32, np.dtype(dtype)).astype(np.float64)
        np.testing.assert_allclose(found, expected, atol=1e-4 if precision == "fp32" else 2e-2)
        return found

    monkeypatch.setattr(openvino.Requests, "run", run)
    monkeypatch.setattr(peaks, "open_session", lambda *_: pytest.fail("ONNX Runtime multiplied"))
    with load(bundle(precision), "openvino") as opened, Prober(opened, 0) as prober:
        found = prober.measure()
    assert set(ran) == {((32, 32), np.dtype(dtype), np.dtype(dtype))}
    assert found.compute.value and found.compute.how.startswith(
        f"best of several 32 x 32 x 32 products in {precision} on OpenVINO"
    )


def test_rates_are_operations_and_bytes_over_the_fastest_time(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second for 2 x 32^3 operations, and for 2 x 64 KiB that are read and written."""
    monkeypatch.setattr(peaks, "_SIDE_CPU", 32)
    monkeypatch.setattr(peaks, "_COPY_CPU", 1 << 16)
    monkeypatch.setattr(peaks, "_cache_bytes", lambda: 0)
    monkeypatch.setattr(peaks.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(peaks, "fastest", lambda timed: timed() * 0 + 0.5)
    with Prober(session, 0) as prober:
        found = prober.measure()
    assert found.compute.value == 2 * 32**3 / 0.5
    assert found.bandwidth.value == 2 * (1 << 16) / 0.5
    assert found.compute.how == "best of several 32 x 32 x 32 products in fp32 on ONNX Runtime"
    assert found.bandwidth.how == "best of several copies of 0 MiB by 2 thread(s), read and written"
    assert (found.arithmetic, found.datasheet, found.datasheet_compute) == ("fp32", None, None)


def test_the_best_is_kept(session: Session, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([4.0, 1.0, 2.0, 4.0, 8.0, 0.5])  # product and copy, three times
    monkeypatch.setattr(peaks, "fastest", lambda timed: next(times))
    with Prober(session, 0) as prober:
        found = [prober.measure() for _ in range(3)]
    assert [peak.compute.value for peak in found] == [2 * 32**3 / 4, 2 * 32**3 / 2, 2 * 32**3 / 2]
    copied = [peak.bandwidth.value for peak in found]
    assert copied[0] == copied[1] and copied[2] == pytest.approx(2 * (copied[0] or 0))


def test_the_copies_are_far_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_cache_bytes", lambda: 1 << 30)
    monkeypatch.setattr(peaks, "_memory_bytes", lambda: 1 << 40)
    monkeypatch.setattr(peaks.os, "sched_getaffinity", lambda pid: set(range(4)))
    assert peaks._copying_on_host().how == "best of several copies of 4096 MiB by 4 thread(s), read and written"
    monkeypatch.setattr(peaks, "_memory_bytes", lambda: 1 << 33)
    assert "copies of 1024 MiB" in peaks._copying_on_host().how  # an eighth of the memory at most


@pytest.mark.parametrize("error", [EnvironmentLacks("no room"), MemoryError()])
def test_what_fails_is_not_measured_and_says_why(
    session: Session, quick: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(peaks, "product_model", fail)
    with Prober(session, 0) as prober:
        found = prober.measure()
    assert found.compute.value is None
    assert found.compute.how == f"not measured: {str(error) or 'there is not enough memory'}"
    assert found.bandwidth.value


def test_a_later_failure_leaves_the_figure_there_is(
    session: Session, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Prober(session, 0) as prober:
        first = prober.measure()

        def fail(timed: Any) -> float:
            raise MemoryError

        monkeypatch.setattr(peaks, "fastest", fail)
        assert prober.measure() == first


def test_copies_on_a_gpu_are_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is free at most, and a GiB."""
    monkeypatch.setattr(peaks, "_fastest_device_copy", lambda gpu, size: 0.5)
    for free, size in ((1 << 40, 1 << 30), (1 << 22, 1 << 20)):
        session: Any = SimpleNamespace(device="cuda", gpu=SimpleNamespace(free_memory=lambda free=free: free))
        probe = peaks._copying(session)
        assert probe.rate is not None and probe.rate() == 2 * size / 0.5
        assert f"{size >> 20} MiB on the device" in probe.how
    session = SimpleNamespace(device="cuda", gpu=None)
    assert peaks._copying(session).rate is None and "cuda-python" in peaks._copying(session).how


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_int8_product_is_one_of_integers(run_onnx: Callable, on_cpu: bool) -> None:
    """On a CPU of ONNX Runtime's integers, and for a plan between Q/DQ nodes."""
    model, b = peaks.product_model("int8", 24, on_cpu), peaks._matrix(24, np.dtype(np.int8)).astype(np.int64)
    if on_cpu:
        a = np.random.default_rng(1).integers(0, 256, (24, 24), np.uint8)
        np.testing.assert_array_equal(run_onnx(model, a), a.astype(np.int64) @ b)
    else:
        integers = np.random.default_rng(1).integers(-127, 128, (24, 24))
        scale = float(np.float16(1 / 127))
        found = run_onnx(model, (integers * scale).astype(np.float16))
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, integers @ b * scale**2, rtol=2e-3, atol=0.1)


@pytest.mark.parametrize(
    ("precision", "device", "scheme", "expected"),
    [
        ("fp16", "cpu", None, "fp16"),
        ("int8", "tensorrt", "tensorrt", "int8"),
        ("int8", "cpu", "onnxruntime", "int8"),
        ("int8", "cpu", "tensorrt", "fp32"),  # rounded at Q/DQ, computed in float
        ("int8", "cuda", "tensorrt", "fp16"),
    ],
)
def test_what_a_model_is_computed_in(precision: str, device: str, scheme: str | None, expected: str) -> None:
    manifest = SimpleNamespace(precision=precision, for_integers=scheme != "tensorrt")
    session = SimpleNamespace(device=device, bundle=SimpleNamespace(manifest=manifest))
    assert peaks.arithmetic(session) == expected  # type: ignore[arg-type]


def test_caches_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not less than a core's level 2, not more than all memory; nothing where Linux does not tell."""
    assert peaks._cache_bytes() < peaks._memory_bytes()
    monkeypatch.setattr(peaks.os, "sched_getaffinity", lambda pid: {10**6})
    assert peaks._cache_bytes() == 0


# Streaming multiprocessors, float16 multiply-adds of one each clock with float32 sums, and boost clock in GHz: NVIDIA's
# architecture whitepapers. Their product is the peak.
CHIPS = {
    "NVIDIA H100 80GB HBM3": (132, 2048, 1.83),
    "NVIDIA H100 PCIe": (114, 2048, 1.62),
    "NVIDIA H200": (132, 2048, 1.83),
    "NVIDIA A100-SXM4-40GB": (108, 1024, 1.41),
    "NVIDIA A100-PCIE-40GB": (108, 1024, 1.41),
    "NVIDIA A100-SXM4-80GB": (108, 1024, 1.41),
    "NVIDIA A100 80GB PCIe": (108, 1024, 1.41),
    "NVIDIA L4": (58, 512, 2.04),
    "NVIDIA L40": (142, 256, 2.49),
    "NVIDIA L40S": (142, 512, 2.49),
    "NVIDIA A10": (72, 512, 1.695),
    "Tesla T4": (40, 512, 1.59),
    "NVIDIA GeForce RTX 3090": (82, 256, 1.695),
    "NVIDIA GeForce RTX 4090": (128, 256, 2.52),
    "NVIDIA GeForce RTX 5090": (170, 256, 2.407),
}


@pytest.mark.parametrize("name", DATASHEETS)
def test_datasheets_follow_from_the_chips(name: str) -> None:
    multiprocessors, rate, gigahertz = CHIPS[name]
    sheet = DATASHEETS[name]
    assert sheet.peak("fp16") == pytest.approx(2 * multiprocessors * rate * gigahertz * 1e9, rel=0.01)
    # Dense: int8 is twice float16, or four times where float32 sums halve it. Twice that again would be sparse.
    assert sheet.int8 / sheet.fp16 == pytest.approx(4 if "GeForce" in name else 2, rel=0.02)
    assert sheet.fp32 <= sheet.fp16 / 2 * 1.02
    assert 300e9 <= sheet.bandwidth <= 4800e9
