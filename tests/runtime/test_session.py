"""A loaded bundle against the PyTorch module that the bundle was made from, and what it refuses to run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

import rxdeploy.runtime as runtime
from rxdeploy.cards import ModelCard, find_card
from rxdeploy.engines import bundle as bundles
from rxdeploy.engines.gpu import Driver, Gpu
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError, RxDeployError
from rxdeploy.runtime import onnxrt

SIZE = 64
CLASSES = 10
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# float32 differs from PyTorch by the order of sums only; float16 rounds each of 14 layers to 2^-11 = 4.9e-4.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3}

Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return find_card("digits_resnext14_8x8d")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth blobs, noise, black and white: uint8 (7, 64, 64, 3)."""
    rng = np.random.default_rng(5)
    blobs = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((SIZE, SIZE)) for _ in range(3)]
    noise = rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    flat = np.stack([np.full((SIZE, SIZE, 3), level, np.uint8) for level in (0, 255)])
    return np.concatenate([np.stack([np.asarray(blob) for blob in blobs]), noise, flat])


@pytest.fixture(scope="module")
def torch_logits(card: ModelCard) -> Callable[[np.ndarray], np.ndarray]:
    """What the PyTorch module says, with the normalisation written out here."""
    torch = pytest.importorskip("torch", reason="the reference is a PyTorch module")
    safetensors = pytest.importorskip("safetensors.torch", reason="the weights are a safetensors file")
    from rxdeploy.export.module import ResNeXt

    module = ResNeXt(card).eval()
    module.load_state_dict(safetensors.load_file(card.beside(card.weights.file)))

    def run(images: np.ndarray) -> np.ndarray:
        mean, std = np.array([0.31] * 3), np.array([0.35] * 3)
        x = (images / 255.0 - mean) / std
        with torch.inference_mode():
            return module(torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))).numpy()

    return run


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("input_kind", ["uint8", "float32"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_run_gives_the_logits_of_pytorch(
    digits_bundle: Bundles, torch_logits: Any, images: np.ndarray, precision: str, input_kind: str
) -> None:
    session = runtime.load(digits_bundle(precision, input_kind))
    assert session.device in ("cpu", "cuda")
    logits = session.run(images)
    assert logits.dtype == np.float32
    assert logits.shape == (len(images), CLASSES)
    assert relative_l2(logits, torch_logits(images)) < TOLERANCE[precision]


def test_every_batch_size_gives_the_same_logits(digits_bundle: Bundles, images: np.ndarray) -> None:
    session = runtime.load(str(digits_bundle("fp32")), "cpu")  # a string is a path too
    together = session.run(images)
    for count in (1, 3, 33, 70):
        batch = images[np.arange(count) % len(images)]
        np.testing.assert_allclose(session.run(batch), together[np.arange(count) % len(images)], rtol=1e-4, atol=1e-4)


def test_top_ranks_by_softmax(digits_bundle: Bundles, images: np.ndarray) -> None:
    session = runtime.load(digits_bundle("fp16"), "cpu")
    logits = session.run(images).astype(np.float64)
    for row, predictions in zip(logits, session.top(session.run(images), k=4), strict=True):
        softmax = np.exp(row) / np.exp(row).sum()
        order = sorted(range(CLASSES), key=lambda index: -row[index])[:4]
        assert [prediction.index for prediction in predictions] == order
        assert [prediction.label for prediction in predictions] == [NAMES[index] for index in order]
        np.testing.assert_allclose([prediction.probability for prediction in predictions], softmax[order], rtol=1e-9)
        np.testing.assert_allclose([prediction.logit for prediction in predictions], row[order], rtol=1e-6)


@pytest.mark.parametrize("k", [1, CLASSES, CLASSES + 1, 1000])
def test_k_larger_than_the_classes_gives_all_classes(digits_bundle: Bundles, images: np.ndarray, k: int) -> None:
    session = runtime.load(digits_bundle())
    predictions = session.top(session.run(images[:1]), k=k)[0]
    assert len(predictions) == min(k, CLASSES)
    assert len({prediction.index for prediction in predictions}) == len(predictions)
    if k >= CLASSES:
        assert sum(prediction.probability for prediction in predictions) == pytest.approx(1)


def test_equal_logits_keep_the_order_of_the_classes(digits_bundle: Bundles) -> None:
    logits = np.array([[1, 3, 3, 0, 3, 0, 0, 0, 0, 2]], np.float32)
    found = runtime.load(digits_bundle()).top(logits, k=5)[0]
    assert [prediction.index for prediction in found] == [1, 2, 4, 9, 0]


def test_large_logits_do_not_overflow_the_softmax(digits_bundle: Bundles) -> None:
    logits = np.full((1, CLASSES), -3e38, np.float32)
    logits[0, 7] = 3e38
    (best, second) = runtime.load(digits_bundle()).top(logits, k=2)[0]
    assert (best.index, best.probability, second.probability) == (7, 1.0, 0.0)


def test_real_digits_are_recognised(digits_bundle: Bundles, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    from rxdeploy.cards.digits_images import write_held_out

    paths = write_held_out(tmp_path, 100)
    for precision, input_kind in (("fp16", "uint8"), ("fp32", "float32")):
        results = list(runtime.load(digits_bundle(precision, input_kind)).classify(paths, k=1))
        assert [result.path for result in results] == paths
        right = [f"digit-{result.predictions[0].index}-" in result.path.name for result in results]
        assert sum(right) >= 98


@pytest.mark.parametrize("goods", [0, 1, 7, 8, 9, 20])
def test_classify_goes_on_after_bad_files(digits_bundle: Bundles, tmp_path: Path, goods: int) -> None:
    rng = np.random.default_rng(goods)
    bad, missing = tmp_path / "bad.png", tmp_path / "missing.png"
    bad.write_bytes(b"no image")
    paths = [bad, missing]
    for index in range(goods):
        good = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(good)
        paths.insert(int(rng.integers(0, len(paths) + 1)), good)
    session = runtime.load(digits_bundle())
    results = list(session.classify(map(str, paths), k=3))
    assert [result.path for result in results] == paths
    for result in results:
        if result.path in (bad, missing):
            assert result.predictions is None
            assert isinstance(result.error, InputError)
            assert str(result.path) in str(result.error)
        else:
            alone = session.top(session.run(np.asarray(Image.open(result.path))[None]), k=3)[0]
            assert result.error is None
            assert [p.index for p in result.predictions] == [p.index for p in alone]


def test_classify_that_is_left_early_leaves_no_threads(digits_bundle: Bundles, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("L", (8, 8), 90).save(path)
    session = runtime.load(digits_bundle())
    before = threading.active_count()
    results = session.classify([path] * 100)
    assert next(results).path == path
    results.close()
    assert threading.active_count() == before


def test_classify_wants_at_least_one_class(digits_bundle: Bundles) -> None:
    with pytest.raises(InputError, match="k is 0"):
        runtime.load(digits_bundle()).classify([], k=0)


# Arrays of all kinds


class Interface:
    """Any object with NumPy's array interface."""

    def __init__(self, array: np.ndarray) -> None:
        self.kept, self.__array_interface__ = array, array.__array_interface__


class OnlyDlpack:
    """An array of a library that has DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("wrap", [Interface, OnlyDlpack, np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2]])
def test_arrays_of_all_kinds_give_the_same(digits_bundle: Bundles, images: np.ndarray, wrap: Callable) -> None:
    session = runtime.load(digits_bundle("fp32"), "cpu")
    np.testing.assert_array_equal(session.run(wrap(images.copy())), session.run(images))


def test_tensors_of_pytorch_give_the_same(digits_bundle: Bundles, images: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    session = runtime.load(digits_bundle("fp32"), "cpu")
    np.testing.assert_array_equal(session.run(torch.from_numpy(images)), session.run(images))
    out = torch.zeros((len(images), CLASSES))
    assert session.run(images, out=out) is out
    np.testing.assert_array_equal(out.numpy(), session.run(images))
    with pytest.raises(InputError, match=r"images: the Tensor cannot be read as an array: .*grad"):
        session.run(torch.zeros((1, 3, SIZE, SIZE), requires_grad=True))


@pytest.mark.parametrize("wrong", [[1, 2], "image.png", None, 7, object()])
def test_what_is_no_array_is_refused(digits_bundle: Bundles, wrong: Any) -> None:
    with pytest.raises(InputError, match=f"images: got a {type(wrong).__name__}, expected an array"):
        runtime.load(digits_bundle()).run(wrong)


def test_the_declared_input_is_taken(digits_bundle: Bundles, images: np.ndarray) -> None:
    session = runtime.load(digits_bundle("fp32", "float32"))
    inputs = session.bundle.manifest.preprocessing
    declared = (images / 255 - inputs.mean) / np.array(inputs.std)
    logits = session.run(declared.transpose(0, 3, 1, 2).astype(np.float32))
    np.testing.assert_allclose(logits, session.run(images), rtol=1e-4, atol=1e-4)


def test_an_empty_batch_gives_no_logits(digits_bundle: Bundles) -> None:
    assert runtime.load(digits_bundle()).run(np.zeros((0, SIZE, SIZE, 3), np.uint8)).shape == (0, CLASSES)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (np.zeros((7, CLASSES), np.float64), "out: got float64"),
        (np.zeros((6, CLASSES), np.float32), r"expected float32 \(7, 10\)"),
        (np.zeros((7, CLASSES + 1), np.float32), r"expected float32 \(7, 10\)"),
        (np.broadcast_to(np.float32(0), (7, CLASSES)), "read-only"),
        ([0.0], "out: got a list"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(
    digits_bundle: Bundles, images: np.ndarray, out: Any, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        runtime.load(digits_bundle()).run(images, out=out)


def test_results_go_into_out(digits_bundle: Bundles, images: np.ndarray) -> None:
    session = runtime.load(digits_bundle())
    whole = np.full((20, CLASSES), np.nan, np.float32)
    assert session.run(images, out=whole[:14:2]) is not None  # not contiguous
    np.testing.assert_array_equal(whole[:14:2], session.run(images))
    assert np.isnan(whole[1::2]).all()
    assert np.isnan(whole[14:]).all()


@pytest.mark.parametrize("stream", [0, 5, object()])
def test_a_stream_without_a_gpu_is_refused(digits_bundle: Bundles, images: np.ndarray, stream: Any) -> None:
    with pytest.raises(InputError, match="cannot reach a GPU"):
        runtime.load(digits_bundle(), "cpu").run(images, stream=stream)


def test_an_array_on_a_gpu_is_refused_on_the_cpu(digits_bundle: Bundles) -> None:
    class OnGpu:
        __cuda_array_interface__: ClassVar = {"shape": (1, SIZE, SIZE, 3), "typestr": "|u1", "data": (256, False)}

    with pytest.raises(InputError, match=r"lies on a GPU.*bring it to the host"):
        runtime.load(digits_bundle(), "cpu").run(OnGpu())


# Many batches, many callers, and the end


def test_map_gives_what_run_gives(digits_bundle: Bundles, images: np.ndarray) -> None:
    session = runtime.load(digits_bundle("fp32"))
    batches = [images[:1], images, images[2:5]]
    for found, batch in zip(session.map(iter(batches)), batches, strict=True):
        np.testing.assert_array_equal(found, session.run(batch))
    assert list(session.map([])) == []
    with pytest.raises(InputError, match="expected uint8"):
        list(session.map([images, images[0]]))


def test_submit_gives_what_run_gives(digits_bundle: Bundles, images: np.ndarray) -> None:
    with runtime.load(digits_bundle("fp32"), batching=runtime.Batching(max_batch=4, max_delay_ms=1)) as session:
        futures = [session.submit(image) for image in images]
        expected = session.run(images)
        np.testing.assert_allclose([future.result() for future in futures], expected, rtol=1e-4, atol=1e-4)

        async def one(image: np.ndarray) -> np.ndarray:
            return await session.submit_async(image)

        async def all_of_them() -> list[np.ndarray]:
            return await asyncio.gather(*map(one, images))

        np.testing.assert_allclose(asyncio.run(all_of_them()), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(InputError, match=r"image: got uint8 \(7, 64, 64, 3\)"):
            session.submit(images)
        assert max(session.metrics.snapshot().batches) <= 4


def test_many_threads_share_a_session(digits_bundle: Bundles, images: np.ndarray) -> None:
    session = runtime.load(digits_bundle("fp32"))
    expected = session.run(images)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: session.run(images), range(64)):
            np.testing.assert_array_equal(found, expected)
    assert session.metrics.snapshot().images == 65 * len(images)


def test_a_closed_session_says_so(digits_bundle: Bundles, images: np.ndarray) -> None:
    session = runtime.load(digits_bundle())
    future = session.submit(images[0])
    session.close()
    session.close()
    assert future.result().shape == (CLASSES,)
    for call in (session.run, session.submit, lambda x: list(session.map([x])), lambda x: session.classify([])):
        with pytest.raises(runtime.Closed, match="closed"):
            call(images)


@pytest.mark.parametrize(("multiply_adds", "cores"), [(10**7, 4), (10**9, 4), (10**7, 1)])
def test_on_a_cpu_small_models_compute_requests_on_every_core_by_itself(
    digits_bundle: Bundles, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, multiply_adds: int, cores: int
) -> None:
    import msgspec
    import onnxruntime

    opened = bundles.open_bundle(digits_bundle("fp32"))
    counts = bundles.Counts(parameters=1, multiply_adds=multiply_adds)
    bundle = bundles.Bundle(opened.path, msgspec.structs.replace(opened.manifest, counts=counts))
    monkeypatch.setattr(onnxrt.os, "sched_getaffinity", lambda _: set(range(cores)))
    threads, real = [], onnxruntime.InferenceSession

    def session(model: Any, options: Any, **more: Any) -> Any:
        threads.append(options.intra_op_num_threads)
        return real(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    engine = onnxrt.OnnxEngine(bundle, "cpu")
    one_by_one, at_once = engine.for_requests()
    if multiply_adds < 10**8 and cores > 1:
        assert (threads, at_once) == ([0, 1], cores)
        np.testing.assert_allclose(
            one_by_one.run(images, None, None), engine.run(images, None, None), rtol=1e-4, atol=1e-4
        )
    else:
        assert (one_by_one, at_once, threads) == (engine, 1, [0])


def test_a_callback_may_close_the_session(digits_bundle: Bundles, images: np.ndarray) -> None:
    """On the thread that computes: what waits is computed first, and nobody waits for ever."""
    session = runtime.load(digits_bundle(), batching=runtime.Batching(max_batch=1))
    closed = threading.Event()

    def close(_: Any) -> None:
        session.close()
        closed.set()

    first = session.submit(images[0])
    first.add_done_callback(close)
    futures = [first]
    with contextlib.suppress(runtime.Closed):
        futures += [session.submit(image) for image in images]
    assert closed.wait(20)
    for future in futures:
        assert future.result(20).shape == (CLASSES,)
    session.close()
    with pytest.raises(runtime.Closed):
        session.run(images)


def test_a_forked_child_is_told_to_load_again(digits_bundle: Bundles, images: np.ndarray) -> None:
    code = f"""
import os, sys, numpy, rxdeploy
session = rxdeploy.load({str(digits_bundle())!r}, "cpu")
image = numpy.zeros(({SIZE}, {SIZE}, 3), numpy.uint8)
session.submit(image).result()
child = os.fork()
if child == 0:
    try:
        session.run(image[None])
    except rxdeploy.runtime.Closed as error:
        session.close()
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert session.run(image[None]).shape == (1, {CLASSES})
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_large_batches_are_computed_in_parts(
    digits_bundle: Bundles, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime.load(digits_bundle("fp32"), "cpu")
    batch = images[np.arange(150) % len(images)]
    sizes, real = [], onnxrt.run_session

    def run(opened: Any, names: Any, feed: dict[str, np.ndarray]) -> Any:
        sizes.append(len(feed["image"]))
        return real(opened, names, feed)

    monkeypatch.setattr(onnxrt, "run_session", run)
    expected = session.run(images)[np.arange(150) % len(images)]
    sizes.clear()
    np.testing.assert_allclose(session.run(batch), expected, rtol=1e-4, atol=1e-4)
    assert sizes == [64, 64, 22]
    out = np.empty((150, CLASSES), np.float32)
    assert session.run(batch, out=out) is out
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_map_counts_the_engines_time_and_not_the_producers(digits_bundle: Bundles, images: np.ndarray) -> None:
    def slowly() -> Any:
        for _ in range(3):
            threading.Event().wait(0.2)
            yield images[:1]

    with runtime.load(digits_bundle(), "cpu") as session:
        session.run(images[:1])
        assert len(list(session.map(slowly()))) == 3
        assert session.metrics.snapshot().runs.count == 4
        assert session.metrics.snapshot().runs.p50 < 0.1


def test_results_come_before_the_error_of_a_later_batch(digits_bundle: Bundles, images: np.ndarray) -> None:
    results = runtime.load(digits_bundle()).map([images, images[:2], images[0]])
    assert [len(next(results)) for _ in range(2)] == [len(images), 2]
    with pytest.raises(InputError):
        next(results)


def test_logits_of_another_shape_have_no_classes(digits_bundle: Bundles) -> None:
    session = runtime.load(str(digits_bundle()))
    for wrong in (np.zeros(CLASSES, np.float32), np.zeros((2, CLASSES + 1), np.float32)):
        with pytest.raises(InputError, match="logits: got"):
            session.top(wrong)


def test_one_path_is_one_file(digits_bundle: Bundles, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "image.png")
    (found,) = runtime.load(digits_bundle()).classify(str(tmp_path / "image.png"))
    assert found.path == tmp_path / "image.png"
    assert found.predictions is not None


def test_a_session_that_is_dropped_ends_its_threads(digits_bundle: Bundles, images: np.ndarray) -> None:
    before = threading.active_count()
    session = runtime.load(digits_bundle())
    session.submit(images[0]).result()
    assert threading.active_count() > before
    del session
    gc.collect()
    assert threading.active_count() == before


def test_preprocess_of_a_session_is_the_bundles(digits_bundle: Bundles, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(noise).save(path)
    # 64 pixels and crop_pct 1: an image of that size goes through as it is.
    np.testing.assert_array_equal(runtime.load(digits_bundle()).preprocess(path), noise)


# Labels


def test_labels_from_a_file_replace_those_of_the_bundle(digits_bundle: Bundles, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"n{index:04}\tclass {index}\n" for index in range(CLASSES)))
    session = runtime.load(digits_bundle(), labels=labels)
    for prediction in session.top(session.run(np.zeros((1, SIZE, SIZE, 3), np.uint8)), k=CLASSES)[0]:
        assert prediction.label == f"class {prediction.index}"


def test_a_bundle_without_labels_gives_none(digits_bundle: Bundles, tmp_path: Path) -> None:
    session = runtime.load(rewritten(digits_bundle(), tmp_path / "bare", drop=bundles.LABELS))
    predictions = session.top(session.run(np.zeros((1, SIZE, SIZE, 3), np.uint8)), k=CLASSES)[0]
    assert {prediction.label for prediction in predictions} == {None}


@pytest.mark.parametrize("lines", [9, 11, 0])
def test_labels_for_another_number_of_classes_are_refused(digits_bundle: Bundles, tmp_path: Path, lines: int) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("name\n" * lines)
    with pytest.raises(InputError, match=rf"labels\.txt.*{lines} lines.*10 classes"):
        runtime.load(digits_bundle(), labels=labels)


# What it refuses


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, SIZE, SIZE, 3), np.float32),
        np.zeros((1, SIZE, SIZE, 3), np.int8),
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((1, 3, SIZE, SIZE), np.uint8),
        np.zeros((1, SIZE, SIZE, 4), np.uint8),
        np.zeros((1, SIZE, SIZE), np.uint8),
        np.zeros((1, 224, 224, 3), np.uint8),
        np.zeros((1, SIZE, SIZE + 1, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{'x'.join(map(str, array.shape))}",
)
@pytest.mark.parametrize("input_kind", ["uint8", "float32"])
def test_images_of_another_kind_are_refused(digits_bundle: Bundles, wrong: np.ndarray, input_kind: str) -> None:
    session = runtime.load(digits_bundle("fp32", input_kind))
    with pytest.raises(InputError) as caught:
        session.run(wrong)
    assert str(wrong.dtype) in str(caught.value)
    assert str(wrong.shape) in str(caught.value)
    assert f"uint8 (n, {SIZE}, {SIZE}, 3)" in str(caught.value)
    assert ("transpose" in str(caught.value)) == (wrong.shape == (1, 3, SIZE, SIZE))


def test_cuda_where_there_is_none(digits_bundle: Bundles) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(EnvironmentLacks, match=r"CUDA.*rxdeploy\[gpu\]"):
        runtime.load(digits_bundle(), "cuda")


@pytest.fixture
def cuda_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime-gpu without CUDA libraries: it lists the provider, and falls back to the CPU without a word."""
    import onnxruntime

    gpu = Gpu("NVIDIA Test", (9, 0), 80 << 30)
    monkeypatch.setattr(onnxrt, "find_driver", lambda: Driver((13, 0), (gpu,), None))
    original = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, providers, enable_fallback: original(model, options, providers=["CPUExecutionProvider"]),
    )


def test_cuda_that_does_not_start_is_not_called_cuda(digits_bundle: Bundles, cuda_that_does_not_start: None) -> None:
    with pytest.raises(EnvironmentLacks, match="CUDAExecutionProvider does not start here"):
        runtime.load(digits_bundle(), "cuda")
    assert runtime.load(digits_bundle(), "auto").device == "cpu"


def test_cuda_that_does_not_start_is_not_validated_on(digits_bundle: Bundles, cuda_that_does_not_start: None) -> None:
    validate = pytest.importorskip("rxdeploy.export.validate")
    card = find_card("digits_resnext14_8x8d")
    reference = np.zeros((len(validate.validation_samples(card).images), 10), np.float32)
    facts = validate.validate_model(card, digits_bundle("fp32") / bundles.MODEL, "fp32", reference, (1,))
    assert list(facts["providers"]) == ["CPUExecutionProvider"]


def test_cuda_without_a_gpu_is_not_tried(
    digits_bundle: Bundles, monkeypatch: pytest.MonkeyPatch, cuda_that_does_not_start: None
) -> None:
    monkeypatch.setattr(onnxrt, "find_driver", lambda: Driver(None, (), "no NVIDIA driver"))
    with pytest.raises(EnvironmentLacks, match="needs a GPU: no NVIDIA driver"):
        runtime.load(digits_bundle(), "cuda")
    assert onnxrt.available_providers() == ["CPUExecutionProvider"]


def test_a_device_that_is_none(digits_bundle: Bundles) -> None:
    with pytest.raises(InputError, match="device 'tpu': must be auto, tensorrt, cuda, cpu, onnxruntime or openvino"):
        runtime.load(digits_bundle(), "tpu")


def test_without_onnxruntime_the_error_says_what_to_install(
    digits_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = digits_bundle()
    for engine in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(EnvironmentLacks, match=r"pip install 'rxdeploy\[cpu\]'"):
        runtime.load(bundle)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_non_finite_logits_fail_the_check(digits_bundle: Bundles, tmp_path: Path, value: float) -> None:
    ir = pytest.importorskip("onnx_ir")
    model = ir.load(digits_bundle("fp32") / bundles.MODEL)
    bias = model.graph.initializers["fc.bias"]
    array = bias.const_value.numpy().copy()
    array[3] = value
    bias.const_value = ir.tensor(array, name="fc.bias")
    broken = rewritten(
        digits_bundle("fp32"), tmp_path / "broken", {bundles.MODEL: ir.to_proto(model).SerializeToString()}
    )
    session = runtime.load(broken)
    with pytest.raises(CheckFailed, match=r"broken.*NaN or infinity"):
        session.run(np.zeros((1, SIZE, SIZE, 3), np.uint8))


def test_a_model_that_onnxruntime_cannot_read(digits_bundle: Bundles, tmp_path: Path) -> None:
    broken = rewritten(digits_bundle(), tmp_path / "broken", {bundles.MODEL: b"this is no protobuf"})
    with pytest.raises(RxDeployError, match=r"ONNX Runtime cannot load .*broken/model\.onnx"):
        runtime.load(broken)


def rewritten(
    source: Path, destination: Path, changes: dict[str, bytes] | None = None, drop: str | None = None
) -> Path:
    """A copy of a bundle with other files in it, and digests that are right for them."""
    manifest = bundles.open_bundle(source).manifest
    files: dict[str, Path | bytes] = {name: source / name for name in manifest.files if name != drop}
    bundles.write_bundle(destination, manifest, files | (changes or {}), overwrite=False)
    return destination


# Nothing of an altered bundle reaches ONNX Runtime


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def alter_model(folder: Path) -> None:
    flip(folder / "model.onnx", 5000)


def alter_first_byte(folder: Path) -> None:
    flip(folder / "model.onnx", 0)


def alter_labels(folder: Path) -> None:
    flip(folder / "labels.txt", 2)


def truncate(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[:-1])


def append(folder: Path) -> None:
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")


def remove(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def link(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere.onnx")


def change_manifest(change: Callable[[dict[str, Any]], object], sealed: bool = True) -> Callable[[Path], None]:
    """Alters the manifest; `sealed`, with the digest of its own bytes that it then ought to have."""

    def alter(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        if sealed:
            manifest["digest"] = "0" * 64
            manifest["digest"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return alter


def other_mean(manifest: dict[str, Any]) -> None:
    manifest["preprocessing"]["mean"] = [0.5, 0.5, 0.5]


def unlisted(manifest: dict[str, Any]) -> None:
    del manifest["files"]["model.onnx"]


def outside(manifest: dict[str, Any]) -> None:
    manifest["files"]["../model.onnx"] = manifest["files"]["model.onnx"]


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        pytest.param(alter_model, "model.onnx was altered", id="a byte of the model"),
        pytest.param(alter_first_byte, "model.onnx was altered", id="first byte of the model"),
        pytest.param(alter_labels, "labels.txt was altered", id="a byte of the labels"),
        pytest.param(truncate, "model.onnx has", id="one byte too few"),
        pytest.param(append, "model.onnx has", id="one byte too many"),
        pytest.param(remove, "model.onnx is missing", id="no model"),
        pytest.param(link, "model.onnx is not a plain file", id="a link"),
        pytest.param(change_manifest(other_mean, sealed=False), "manifest.json was altered", id="another mean"),
        pytest.param(change_manifest(lambda m: None, sealed=False), "manifest.json was altered", id="another layout"),
        pytest.param(change_manifest(unlisted), "lists no model.onnx", id="model not in the manifest"),
        pytest.param(change_manifest(outside), "../model.onnx", id="a file outside"),
        pytest.param(change_manifest(lambda m: m.update(schema=99)), "schema 99", id="a newer schema"),
        pytest.param(change_manifest(lambda m: m.pop("preprocessing")), "damaged", id="a key missing"),
        pytest.param(change_manifest(lambda m: m.update(num_classes="10")), "damaged", id="a wrong type"),
        pytest.param(lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{}"), "damaged", id="not UTF-8"),
        pytest.param(lambda f: (f / "manifest.json").write_bytes(b""), "damaged", id="empty manifest"),
        pytest.param(lambda f: (f / "manifest.json").unlink(), "not a bundle", id="no manifest"),
        pytest.param(shutil.rmtree, "not a bundle", id="no folder"),
    ],
)
def test_an_altered_bundle_never_reaches_onnxruntime(
    digits_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alter: Callable, says: str
) -> None:
    import onnxruntime

    folder = tmp_path / "bundle"
    shutil.copytree(digits_bundle(), folder)
    alter(folder)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("an altered bundle was loaded"))
    with pytest.raises(InputError) as caught:
        runtime.load(folder)
    assert str(folder) in str(caught.value)
    assert says in str(caught.value)


# A serving host has neither torch nor onnx


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize("run", [False, True], ids=["import", "classify"])
def test_runtime_imports_neither_torch_nor_onnx(digits_bundle: Bundles, run: bool) -> None:
    code = "import rxdeploy, numpy\nrxdeploy.runtime.Batching"
    if run:
        code += (
            f"\nsession = rxdeploy.runtime.load({str(digits_bundle())!r})"
            f"\nsession.top(session.run(numpy.zeros((1, {SIZE}, {SIZE}, 3), numpy.uint8)))"
        )
    found = modules_after(code)
    assert "rxdeploy" in found
    assert not found & {"torch", "onnx", "onnx_ir", "onnxscript", "tensorrt", "tensorrt_rtx", "safetensors", "sklearn"}
    assert not found & {"cuda", "cupy", "matplotlib", "prometheus_client"}
    assert not found & {"rich", "click", "httpx"}
    assert ("onnxruntime" in found) == run  # loaded when a bundle is, not before
