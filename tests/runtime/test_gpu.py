"""The runtime on a real GPU: what tests/simulated checks on a simulated one, with the real TensorRT and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rxdeploy
from rxdeploy.calibration.options import CalibrationOptions
from rxdeploy.cards import find_card
from rxdeploy.engines.gpu import find_driver
from rxdeploy.engines.options import EngineOptions, Profile

pytestmark = pytest.mark.gpu
SIZE, CLASSES = 64, 10
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "int8": 2.5e-1}  # of rxdeploy.export.validate, relative L2


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model with a plan that was built here."""
    if problem := find_driver().problem:
        pytest.skip(problem)
    for module in ("torch", "onnx_ir", "safetensors", "filelock", "onnxruntime", "cuda.bindings", "cuda.core"):
        pytest.importorskip(module, reason=f"building and running a plan needs {module}")
    from rxdeploy.cache import Cache
    from rxdeploy.engines.flavours import choose
    from rxdeploy.pipeline import Pipeline, Request

    options = EngineOptions(profiles=(Profile(1, 8, 32), Profile(4, 4, 4)))
    choice = choose("auto", options)
    if choice.flavour is None:
        pytest.skip(choice.reason)
    root = tmp_path_factory.mktemp("gpu")
    cache = Cache(root / "cache", limit=10**9)
    calibration = None
    if request.param == "int8":
        np.savez(root / "images.npz", images=images(32, 1))  # noise, as the tests run
        calibration = CalibrationOptions(data=root / "images.npz")
    card = find_card("digits_resnext14_8x8d")
    made = Request(card, request.param, "uint8", engine=options, calibration=calibration)
    Pipeline(made, cache).build(root / "bundle")
    cache.close()
    return root / "bundle"


@pytest.fixture
def session(bundle: Path) -> Iterator[rxdeploy.Session]:
    with rxdeploy.load(bundle, "tensorrt") as opened:
        yield opened


@pytest.fixture
def check(bundle: Path) -> Callable[[Any, np.ndarray], None]:
    """check(logits, images): the logits are those of ONNX Runtime on the CPU."""
    cpu = rxdeploy.load(bundle, "cpu")

    def compare(logits: Any, batch: np.ndarray) -> None:
        expected = cpu.run(batch)
        error = np.linalg.norm(np.asarray(logits) - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE[cpu.bundle.manifest.precision]

    return compare


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 31, 32, 33, 100])
def test_every_batch_size(session: rxdeploy.Session, check: Callable, count: int) -> None:
    """As it is, captured, replayed."""
    for seed in range(4):
        check(session.run(images(count, seed)), images(count, seed))


def test_tensors_of_pytorch_on_its_streams(session: rxdeploy.Session, check: Callable) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    out = torch.empty((5, CLASSES), device="cuda")
    stream = torch.cuda.Stream()
    for seed in range(4):
        with torch.cuda.stream(stream):
            batch = torch.from_numpy(images(5, seed)).cuda(non_blocking=True)
            assert session.run(batch, out=out, stream=stream) is out
            doubled = out * 2  # in the stream's order
        stream.synchronize()
        check(doubled.cpu().numpy() / 2, images(5, seed))
    result = session.run(torch.from_numpy(images(3)).cuda())
    check(torch.as_tensor(result, device="cuda").cpu().numpy(), images(3))


def test_arrays_of_cupy_on_its_streams(session: rxdeploy.Session, check: Callable) -> None:
    cupy = pytest.importorskip("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        batch = cupy.asarray(images(6))
        result = cupy.asarray(session.run(batch, stream=stream))
        check(cupy.asnumpy(result), images(6))


def test_streams_of_cuda_core(session: rxdeploy.Session, check: Callable) -> None:
    from cuda.core import Device

    device = Device(session.gpu.ordinal)
    device.set_current()
    stream = device.create_stream()
    source = session.gpu.empty((4, SIZE, SIZE, 3), np.uint8)
    source.fill(images(4))
    result = session.run(source, stream=stream)
    stream.sync()
    check(result.numpy(), images(4))


def test_batches_in_a_row_and_many_threads(session: rxdeploy.Session, check: Callable) -> None:
    counts = [1, 8, 40, 3, 32, 32, 7]
    for index, logits in enumerate(session.map(images(count, index) for index, count in enumerate(counts))):
        check(logits, images(counts[index], index))
    with ThreadPoolExecutor(8) as pool:
        batches = [images(1 + index % 9, index) for index in range(64)]
        for batch, logits in zip(batches, pool.map(session.run, batches), strict=True):
            check(logits, batch)
        futures = [session.submit(image) for image in images(64)]
        check(np.stack([future.result() for future in futures]), images(64))


def test_a_closed_session_gives_its_memory_back(bundle: Path) -> None:
    first = rxdeploy.load(bundle, "tensorrt")
    gpu = first.gpu
    first.run(images(8))
    first.close()
    before = gpu.free_memory()
    for _ in range(3):
        with rxdeploy.load(bundle, "tensorrt") as session:
            session.prepare([1, 8, 32])
    assert gpu.free_memory() >= before - (64 << 20)  # modules that CUDA loads late stay; a lane is larger


def test_the_layers_are_timed(session: rxdeploy.Session) -> None:
    runs = session.engine.layer_times(8, 3)
    assert len(runs) == 3
    for run in runs:
        assert run
        assert all(seconds >= 0 for seconds in run.values())


def test_onnxruntime_on_the_gpu(bundle: Path, check: Callable) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    with rxdeploy.load(bundle, "cuda") as session:
        check(session.run(images(5)), images(5))
        source = session.gpu.empty((5, SIZE, SIZE, 3), np.uint8)
        source.fill(images(5))
        check(session.run(source).numpy(), images(5))
