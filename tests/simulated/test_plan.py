"""Sessions that run a plan, against ONNX Runtime on the CPU: batch sizes, graphs, streams of batches, many callers."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cuda
from standin.driver import check
from standin.gate import Gate, close_to, on_device
from standin.kernel import Kernel
from standin.plan import make_plan

import rxdeploy
from rxdeploy.errors import CheckFailed, EnvironmentLacks, InputError
from rxdeploy.runtime import Batching, Closed, lanes
from rxdeploy.runtime.arrays import device_view
from rxdeploy.runtime.cuda import Gpu

pytestmark = pytest.mark.usefixtures("steady_garbage")
SIZE, CLASSES, LARGEST = 48, 7, 8
Bundles = Callable[..., Path]
Counters = Callable[[str], int]
Reference = Callable[[np.ndarray], np.ndarray]
LIVE = (
    "live_device_bytes",
    "live_pinned_bytes",
    "live_streams",
    "live_events",
    "live_graphs",
    "live_graph_execs",
)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    """Ends the process, with every thread's whereabouts, when a test does not end."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def larger_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger batches are measured to take longer, whatever else this machine is doing: no more padding than must be."""
    real = lanes.Lane.time

    def time(lane: lanes.Lane, profile: int, size: int) -> float:
        real(lane, profile, size)
        return float(size)

    monkeypatch.setattr(lanes.Lane, "time", time)


@pytest.fixture
def bundle(bundle_with_plan: Bundles, larger_is_slower: None) -> Path:
    """None of its batches is padded."""
    return bundle_with_plan(profiles=((1, 4, LARGEST),), us_per_image=200)


@pytest.fixture
def reference(run_onnx: Callable) -> Callable[[Path], Reference]:
    """reference(folder): what ONNX Runtime on the CPU says."""

    def of(folder: Path) -> Reference:
        model = (folder / "model.onnx").read_bytes()
        return lambda batch: run_onnx(model, batch)

    return of


@pytest.fixture
def expected(bundle: Path, reference: Callable) -> Reference:
    return reference(bundle)


@pytest.fixture
def session(bundle: Path) -> Iterator[rxdeploy.Session]:
    with rxdeploy.load(bundle, "tensorrt") as opened:
        yield opened


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails when it does not come true within some seconds."""
    for _ in range(20_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came true")


def in_threads(work: Callable[[int], None], count: int) -> None:
    """work(0), work(1), ... at once; raises what they raise."""
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work, number) for number in range(count)]:
            future.result()


# Batch sizes


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 30])
def test_every_batch_size_as_it_is_captured_and_replayed(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, counters: Counters, count: int
) -> None:
    dawdle(200)
    for seed in range(5):
        batch = images(count, seed)
        logits = session.run(batch)
        assert (logits.shape, logits.dtype) == ((count, CLASSES), np.float32)
        close_to(logits, expected(batch))
    assert counters("graph_launches") > 0
    assert counters("pageable_copies") == 0


def test_sizes_in_any_order(session: rxdeploy.Session, expected: Reference, dawdle: Callable) -> None:
    dawdle(100)
    rng = random.Random(1)
    for step in range(60):
        batch = images(rng.choice([1, 2, 3, 5, 8, 9, 13, 20]), step)
        close_to(session.run(batch), expected(batch))


def test_large_batches_are_split_at_the_largest_profile(
    session: rxdeploy.Session, expected: Reference, executions: Any
) -> None:
    close_to(session.run(images(19)), expected(images(19)))
    sizes = [each.batch for each in executions]
    assert sizes.count(8) == 2 and 3 in sizes
    out = np.full((17, CLASSES), np.nan, np.float32)
    assert session.run(images(17), out=out) is out
    close_to(out, expected(images(17)))


def test_images_of_any_layout(session: rxdeploy.Session, expected: Reference) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (12, 3, SIZE, 2 * SIZE), np.uint8)
    view = wide[::-2, :, :, ::2].transpose(0, 2, 3, 1)
    assert not view.flags.c_contiguous
    close_to(session.run(view), expected(np.ascontiguousarray(view)))
    close_to(session.run(images(2)[::-1]), expected(images(2)[::-1].copy()))


@pytest.mark.parametrize("count", [2, 11])
def test_the_caller_may_change_images_and_results_at_once(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable, count: int
) -> None:
    dawdle(2000)
    batch, results = np.empty((count, SIZE, SIZE, 3), np.uint8), []
    for seed in range(4):
        batch[:] = images(count, seed)
        results.append(session.run(batch))
        batch[:] = 0
    for seed, result in enumerate(results):
        close_to(result, expected(images(count, seed)))
        result[:] = np.nan  # the caller's own


# Profiles


EXACT = ((4, 4, 4), (8, 8, 8))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, 12, 13])
def test_batches_smaller_than_every_profile_are_padded(
    bundle_with_plan: Bundles,
    reference: Callable,
    dawdle: Callable,
    executions: Any,
    larger_is_slower: None,
    count: int,
) -> None:
    dawdle(200)
    folder = bundle_with_plan(profiles=EXACT)
    expected = reference(folder)
    with rxdeploy.load(folder) as session:
        assert session.engine.largest == 8
        session.run(images(count))  # measures what is worth trying
        session.run(images(min(count, 8)))
        executions.clear()
        for seed in range(4):
            close_to(session.run(images(count, seed)), expected(images(count, seed)))
        array = on_device(session.gpu, images(min(count, 8)))
        for _ in range(3):
            close_to(session.run(array).numpy(), expected(images(min(count, 8))))
    rest = [8] * (count // 8) + ([4 if count % 8 <= 4 else 8] if count % 8 else [])
    assert {(each.profile, each.batch) for each in executions} <= {(0, 4), (1, 8)}
    assert {each.batch for each in executions} == {*rest, 4 if min(count, 8) <= 4 else 8}


@pytest.mark.parametrize(
    ("profiles", "count", "profile"),
    [
        (((1, 8, 8), (1, 4, 4)), 3, 1),
        (((1, 4, 4), (1, 8, 8)), 5, 1),
        (((1, 1, 1), (1, 8, 8), (2, 4, 8)), 3, 2),
        (((1, 8, 8), (1, 1, 1)), 1, 1),
    ],
)
def test_the_tightest_profile_runs_it(
    bundle_with_plan: Bundles,
    reference: Callable,
    executions: Any,
    larger_is_slower: None,
    profiles: Any,
    count: int,
    profile: int,
) -> None:
    folder = bundle_with_plan(profiles=profiles)
    with rxdeploy.load(folder) as session:
        session.run(images(count))
        executions.clear()
        for _ in range(3):
            close_to(session.run(images(count)), reference(folder)(images(count)))
    assert {(each.profile, each.batch) for each in executions} == {(profile, count)}


class Slow:
    """Makes executions of some (profile, batch) take longer, by this many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[int, int], float]) -> None:
        real = Kernel.__init__

        def init(kernel: Kernel, *arguments: Any, **options: Any) -> None:
            real(kernel, *arguments, **options)
            kernel.seconds += seconds.get((kernel.profile, kernel.inputs[0].shape[0]), 0.0)

        monkeypatch.setattr(Kernel, "__init__", init)


@pytest.mark.parametrize(
    ("slow", "chosen"),
    [
        ({(0, 3): 0.01}, (1, 4)),  # the exact profile of 4 is faster than 3 images in the wide one
        ({(1, 4): 0.01}, (0, 3)),
        ({(0, 3): 0.01, (1, 4): 0.02}, (0, 3)),
    ],
)
@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_padding_is_chosen_where_it_is_measured_to_be_faster(
    bundle_with_plan: Bundles,
    reference: Callable,
    executions: Any,
    monkeypatch: pytest.MonkeyPatch,
    dawdle: Callable,
    slow: dict[tuple[int, int], float],
    chosen: tuple[int, int],
    device: bool,
) -> None:
    Slow(monkeypatch, slow)
    folder = bundle_with_plan(profiles=((1, 8, 8), (4, 4, 4)))
    expected = reference(folder)
    with rxdeploy.load(folder) as session:
        array = session.gpu.empty((3, SIZE, SIZE, 3), np.uint8)
        out = session.gpu.empty((3, CLASSES), np.float32)
        session.run(images(3))
        tried = {(each.profile, each.batch) for each in executions}
        assert tried == {(0, 3), (1, 4)}  # both were measured
        dawdle(200)
        executions.clear()
        for seed in range(4):
            batch = images(3, seed)
            if device:
                array.fill(batch)
                session.run(array, out=out)
                close_to(out.numpy(), expected(batch))
            else:
                close_to(session.run(batch), expected(batch))
        assert {(each.profile, each.batch) for each in executions} == {chosen}


def test_what_pads_a_batch_does_not_show(bundle_with_plan: Bundles, reference: Callable, dawdle: Callable) -> None:
    """Rows of earlier batches lie in the memory that pads later ones; only the caller's own rows come back."""
    dawdle(300)
    folder = bundle_with_plan(profiles=((8, 8, 8),))
    with rxdeploy.load(folder) as session:
        guard = on_device(session.gpu, np.full((8, CLASSES), 5, np.float32))
        for count in (8, 3, 8, 1, 3, 3):
            close_to(session.run(images(count, count)), reference(folder)(images(count, count)))
            room = np.full((8, CLASSES), 5, np.float32)
            session.run(images(count, count), out=room[:count])
            assert (room[count:] == 5).all()
        for _ in range(3):
            array = on_device(session.gpu, images(3))

            part = SimpleNamespace(__cuda_array_interface__=guard.__cuda_array_interface__ | {"shape": (3, CLASSES)})
            session.run(array, out=part)
            close_to(guard.numpy()[:3], reference(folder)(images(3)))
            assert (guard.numpy()[3:] == 5).all()


def test_a_size_is_measured_once(bundle_with_plan: Bundles, executions: Any) -> None:
    folder = bundle_with_plan(profiles=((1, 4, 8),))
    with rxdeploy.load(folder) as session:
        session.run(images(3))
        executions.clear()
        for _ in range(4):
            session.run(images(3))
        in_threads(lambda _: session.run(images(3)), 4)
        # As it is or before the capture at most once more on each lane, otherwise from a graph.
        assert sum(not each.captured for each in executions) <= 3
        assert len(executions) == 8


# Graphs and memory


def test_a_size_seen_twice_is_one_launch(session: rxdeploy.Session, counters: Counters, executions: Any) -> None:
    for _ in range(2):
        session.run(images(5))
    executions.clear()
    launches, copies = counters("graph_launches"), counters("copies")
    for _ in range(10):
        session.run(images(5))
    assert counters("graph_launches") - launches == 10
    assert [(each.batch, each.captured) for each in executions] == [(5, True)] * 10
    assert counters("copies") - copies == 20  # one in, one out
    assert counters("pageable_copies") == 0


@pytest.mark.parametrize(
    ("device_in", "device_out", "expected_copies"),
    [(False, False, 2), (True, False, 1), (False, True, 1), (True, True, 0)],
    ids=str,
)
def test_nothing_is_copied_that_is_where_it_is_needed(
    session: rxdeploy.Session, counters: Counters, device_in: bool, device_out: bool, expected_copies: int
) -> None:
    batch = on_device(session.gpu, images(5)) if device_in else images(5)
    out = session.gpu.empty((5, CLASSES), np.float32) if device_out else np.empty((5, CLASSES), np.float32)
    pageable = counters("pageable_copies")
    for _ in range(4):  # as it is, captured, replayed
        copies = counters("copies")
        session.run(batch, out=out)
    assert counters("copies") - copies == expected_copies
    assert counters("pageable_copies") == pageable


def test_once_warm_nothing_is_allocated(session: rxdeploy.Session, counters: Counters) -> None:
    sizes = (1, 3, 8, 11)
    session.prepare([*sizes, 3])
    for size in sizes:
        session.run(images(size))
    list(session.map([images(size) for size in sizes] * 2))
    before = [counters(name) for name in ("allocations", *LIVE)]
    for _ in range(5):
        for size in sizes:
            session.run(images(size))
    list(session.map([images(size) for size in sizes] * 3))
    assert [counters(name) for name in ("allocations", *LIVE)] == before


def test_a_graph_is_of_its_addresses(session: rxdeploy.Session, expected: Reference, executions: Any) -> None:
    """Captured when the same addresses come the second time; others are not served by it, and come from none."""
    gpu = session.gpu
    arrays = [gpu.empty((4, SIZE, SIZE, 3), np.uint8) for _ in range(2)]
    outs = [gpu.empty((4, CLASSES), np.float32) for _ in range(2)]
    session.run(images(4))
    captured = []
    pairs = ((0, 0), (0, 0), (0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1))
    for seed, (source, target) in enumerate(pairs):
        arrays[source].fill(images(4, seed))
        outs[target].fill(np.full((4, CLASSES), np.nan, np.float32))
        executions.clear()
        session.run(arrays[source], out=outs[target])
        close_to(outs[target].numpy(), expected(images(4, seed)))
        captured.append(executions[-1].captured)
    assert captured == [False, False, True, False, False, False, True, False, True, False, True]


def test_few_graphs_are_kept_and_the_oldest_goes(
    session: rxdeploy.Session,
    expected: Reference,
    counters: Counters,
    monkeypatch: pytest.MonkeyPatch,
    dawdle: Callable,
) -> None:
    monkeypatch.setattr(lanes, "_GRAPHS", 3)
    dawdle(300)
    gpu, stream = session.gpu, session.gpu.stream()
    array = on_device(gpu, images(4))
    outs = [gpu.empty((4, CLASSES), np.float32) for _ in range(5)]
    before = counters("live_graph_execs")
    for number, out in enumerate(outs, 1):
        for _ in range(3):
            session.run(array, out=out, stream=stream)
        assert counters("live_graph_execs") - before == min(number, 3)
    stream.synchronize()
    for out in outs:
        close_to(out.numpy(), expected(images(4)))
    assert counters("live_graphs") == 0

    def launched(number: int) -> bool:
        launches = counters("graph_launches")
        session.run(array, out=outs[number], stream=stream)
        return counters("graph_launches") > launches

    assert launched(2) and launched(4)  # still there, and now later than outs[3]
    assert not launched(0) and not launched(0) and launched(0)  # pushes that out
    assert launched(2) and launched(4) and launched(0)
    assert not launched(3)
    stream.synchronize()
    assert counters("live_graph_execs") - before == 3


def test_a_graph_that_is_running_is_not_pushed_out(
    bundle_with_plan: Bundles, reference: Callable, monkeypatch: pytest.MonkeyPatch, dawdle: Callable
) -> None:
    """By another part of the same batch, on the lane's own stream."""
    monkeypatch.setattr(lanes, "_GRAPHS", 1)
    dawdle(2000)
    folder = bundle_with_plan(profiles=((1, 1, 2),), us_per_batch=3000)
    with rxdeploy.load(folder) as session:
        array, out = on_device(session.gpu, images(6)), session.gpu.empty((6, CLASSES), np.float32)
        for _ in range(4):
            session.run(array, out=out)
            close_to(out.numpy(), reference(folder)(images(6)))


def test_the_context_of_a_graph_is_used_for_nothing_else(
    session: rxdeploy.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shape or address would make the graph invalid, says TensorRT; the stand-in would not mind."""
    import tensorrt_rtx

    captured: list[Any] = []
    kind = tensorrt_rtx.IExecutionContext
    for name in ("set_input_shape", "set_tensor_address", "execute_async_v3"):
        real = getattr(kind, name)

        def call(context: Any, *arguments: Any, name: str = name, real: Callable = real) -> bool:
            assert not any(context is each for each in captured)
            given = real(context, *arguments)
            if name == "execute_async_v3" and int(check(cuda.cuStreamIsCapturing(arguments[0]))):
                captured.append(context)
            return given

        monkeypatch.setattr(kind, name, call)
    array = on_device(session.gpu, images(5))
    for _ in range(4):
        for size in (3, 5):
            session.run(images(size))
            session.run(array)
    session.prepare([3, 4])
    assert len(captured) >= 4


@pytest.mark.parametrize("which", [0, 2, None])
def test_the_callers_stream_is_not_captured(
    session: rxdeploy.Session, counters: Counters, monkeypatch: pytest.MonkeyPatch, which: int | None
) -> None:
    """Other threads may be using it, and what they enqueue would become part of the graph."""
    captured, real = [], lanes.capture
    monkeypatch.setattr(lanes, "capture", lambda gpu, stream: (captured.append(stream), real(gpu, stream))[1])
    own = session.gpu.stream()
    array, out = on_device(session.gpu, images(4)), session.gpu.empty((4, CLASSES), np.float32)
    for _ in range(3):
        session.run(array, out=out, stream=own if which is None else which)
        session.gpu.synchronize(which or (own.handle if which is None else 1))
    assert counters("graph_launches") == 1
    assert captured and set(captured) <= {lane.stream.handle for lane in session.engine._lanes}


@pytest.mark.parametrize("on_device_too", [False, True])
def test_what_tensorrt_cannot_capture_runs_without(
    session: rxdeploy.Session,
    expected: Reference,
    counters: Counters,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_device_too: bool,
) -> None:
    """It is asked once for a size, of the stream that would be captured."""
    import tensorrt_rtx

    asked: list[int] = []
    monkeypatch.setattr(
        tensorrt_rtx.IExecutionContext, "is_stream_capturable", lambda _, stream: bool(asked.append(stream))
    )
    stream = session.gpu.stream()
    array, out = on_device(session.gpu, images(4)), session.gpu.empty((4, CLASSES), np.float32)
    for _ in range(8):
        if on_device_too:
            session.run(array, out=out, stream=stream)
            stream.synchronize()
            close_to(out.numpy(), expected(images(4)))
        else:
            close_to(session.run(images(4)), expected(images(4)))
    assert counters("graph_launches") == 0 and not counters("live_graphs")
    assert asked == [session.engine._lanes[0].stream.handle]
    assert [record.getMessage() for record in caplog.records] == [
        "batches of 4 run without a CUDA graph: the plan cannot be captured: it gave no reason"
    ]


def test_few_addresses_are_remembered(session: rxdeploy.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_SEEN", 5)
    array = on_device(session.gpu, images(2))
    for _ in range(20):
        session.run(array)  # the result lies elsewhere each time
    assert all(len(lane._seen) <= 5 and len(lane._graphs) <= 1 for lane in session.engine._lanes)
    outs = [session.gpu.empty((2, CLASSES), np.float32) for _ in range(5)]
    for out in outs:
        session.run(array, out=out)  # these are the latest five
    for out in outs:
        session.run(array, out=out)
    assert len(session.engine._lanes[0]._graphs) >= 5


@pytest.mark.parametrize("sizes", [[5], range(1, 9), [8, 8, 1]])
def test_prepare_makes_the_first_call_a_replay(
    session: rxdeploy.Session, expected: Reference, counters: Counters, executions: Any, sizes: Any
) -> None:
    session.prepare(sizes)
    allocations, execs = counters("allocations"), counters("live_graph_execs")
    executions.clear()
    for size in sizes:
        launches = counters("graph_launches")
        close_to(session.run(images(size)), expected(images(size)))
        assert counters("graph_launches") - launches == 1
    # On both lanes.
    list(session.map([images(size) for size in sizes] * 2))
    in_threads(lambda number: session.run(images(list(sizes)[number % len(sizes)])), 6)
    assert all(each.captured for each in executions)
    assert (counters("allocations"), counters("live_graph_execs")) == (allocations, execs)


def test_prepare_for_a_batch_that_is_split(session: rxdeploy.Session, executions: Any) -> None:
    session.prepare([19])
    executions.clear()
    session.run(images(19))
    assert [(each.batch, each.captured) for each in sorted(executions, key=lambda each: each.batch)] == [
        (3, True),
        (8, True),
        (8, True),
    ]


@pytest.mark.parametrize("sizes", [[0], [-1], [3, -2]])
def test_prepare_refuses_what_is_no_size(session: rxdeploy.Session, sizes: list[int]) -> None:
    with pytest.raises(InputError):
        session.prepare(sizes)


def test_prepare_beside_other_callers(session: rxdeploy.Session, expected: Reference) -> None:
    def work(number: int) -> None:
        if number % 2:
            session.prepare([1 + number, 4])
        for seed in range(5):
            close_to(session.run(images(1 + number, seed)), expected(images(1 + number, seed)))

    in_threads(work, 8)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_a_capture_that_something_else_breaks_is_no_error(
    bundle_with_plan: Bundles, reference: Callable, flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.synchronize() in another thread, say, which the driver does not allow while any stream captures."""
    folder = bundle_with_plan(flavour, profiles=((1, 4, LARGEST),), us_per_image=200)
    expected = reference(folder)
    real = lanes.capture

    @contextlib.contextmanager
    def disturbed(gpu: Gpu, stream: int) -> Iterator[Any]:
        def synchronize() -> None:
            with gpu.current():
                cuda.cuCtxSynchronize()

        with real(gpu, stream) as graphs:
            yield graphs
            thread = threading.Thread(target=synchronize)
            thread.start()
            thread.join()

    with rxdeploy.load(folder) as session:
        for disturb in (True, False):
            monkeypatch.setattr(lanes, "capture", disturbed if disturb else real)
            for size in (3, 8) if disturb else (1, 2):
                for seed in range(4):
                    close_to(session.run(images(size, seed)), expected(images(size, seed)))
            array, out = on_device(session.gpu, images(4)), session.gpu.empty((4, CLASSES), np.float32)
            for _ in range(4):
                session.run(array, out=out)
                close_to(out.numpy(), expected(images(4)))


def test_garbage_that_is_collected_during_a_capture_is_no_error(
    session: rxdeploy.Session, expected: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing device memory breaks a capture of the same thread, and a collection may come at any time."""
    real = lanes.Lane._execute

    def execute(lane: Any, *arguments: Any) -> None:
        gc.collect()
        real(lane, *arguments)

    session.run(images(3))
    loop: list[Any] = [session.gpu.empty((3,), np.float32)]
    loop.append(loop)
    del loop
    real_capture = lanes.capture

    @contextlib.contextmanager
    def capture(*arguments: Any) -> Iterator[Any]:
        with real_capture(*arguments) as graphs:
            gc.collect()
            yield graphs

    monkeypatch.setattr(lanes, "capture", capture)
    for seed in range(4):
        close_to(session.run(images(3, seed)), expected(images(3, seed)))


# Lanes


def test_each_batch_size_runs_in_its_own_profile(
    bundle_with_plan: Bundles, reference: Callable, executions: Any, larger_is_slower: None
) -> None:
    folder = bundle_with_plan(profiles=((1, 1, 1), (2, 8, 8)))
    with rxdeploy.load(folder) as session:
        for number, size in enumerate((1, 5, 1, 5, 1, 5, 5)):
            executions.clear()
            close_to(session.run(images(size)), reference(folder)(images(size)))
            if number > 1:  # when a size is first met, others are measured too
                assert {each.profile for each in executions} == {int(size > 1)}


@pytest.mark.parametrize("way", ["host", "device", "stream"])
def test_a_lane_that_a_stream_still_uses_is_left_to_it(
    session: rxdeploy.Session, expected: Reference, gate: Callable, way: str
) -> None:
    """Nobody waits while the other lane is free."""
    gpu, first, second = session.gpu, session.gpu.stream(), session.gpu.stream()
    array, outs = on_device(gpu, images(3)), [gpu.empty((3, CLASSES), np.float32) for _ in range(2)]
    session.prepare([3])
    shut = gate(gpu, first.handle)
    session.run(array, out=outs[0], stream=first)
    threading.Timer(2, shut.open).start()
    if way == "host":
        close_to(session.run(images(3)), expected(images(3)))
    elif way == "device":
        close_to(session.run(array, out=outs[1]).numpy(), expected(images(3)))
    else:
        session.run(array, out=outs[1], stream=second)
        second.synchronize()
        close_to(outs[1].numpy(), expected(images(3)))
    assert not shut.is_open()
    shut.open()
    first.synchronize()
    close_to(outs[0].numpy(), expected(images(3)))


def test_a_stream_goes_on_with_the_lane_that_it_has(session: rxdeploy.Session, gate: Callable, executions: Any) -> None:
    """There its graphs are, and the other lane stays free for others."""
    gpu, stream = session.gpu, session.gpu.stream()
    array, out = on_device(gpu, images(3)), gpu.empty((3, CLASSES), np.float32)
    for _ in range(2):
        session.run(array, out=out, stream=stream)  # one lane knows it, and captured it
        stream.synchronize()
    shut = gate(gpu, stream.handle)
    for _ in range(3):
        session.run(array, out=out, stream=stream)
    shut.open()
    stream.synchronize()
    assert [each.captured for each in executions][-3:] == [True] * 3
    session.run(images(5))
    session.run(images(5))
    session.run(array, out=out, stream=stream)
    stream.synchronize()  # and when it is done with the lane, that is the first again
    executions.clear()
    session.run(images(5))
    assert [each.captured for each in executions] == [True]


def test_layer_times_wait_for_a_stream_that_uses_the_lane(
    bundle_with_plan: Bundles, reference: Callable, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes.Lane, "busy", lambda *_: False)  # or the other lane would be taken
    folder = bundle_with_plan(profiles=((4, 4, 4),), us_per_batch=20_000)
    with rxdeploy.load(folder) as session:
        session.prepare([3])
        gpu, stream = session.gpu, session.gpu.stream()
        array, out = on_device(gpu, images(3)), gpu.empty((3, CLASSES), np.float32)
        shut = gate(gpu, stream.handle)
        session.run(array, out=out, stream=stream)
        threading.Timer(0.02, shut.open).start()
        session.engine.layer_times(3, 2)
        assert shut.is_open()
        stream.synchronize()
        close_to(out.numpy(), reference(folder)(images(3)))


def test_a_size_is_measured_after_what_a_stream_does_with_the_lane(
    bundle_with_plan: Bundles, reference: Callable, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes.Lane, "busy", lambda *_: False)
    folder = bundle_with_plan(profiles=((1, 4, 8),), us_per_batch=10_000)
    with rxdeploy.load(folder) as session:
        session.prepare([8])
        gpu, first, second = session.gpu, session.gpu.stream(), session.gpu.stream()
        array, out = on_device(gpu, images(8)), gpu.empty((8, CLASSES), np.float32)
        shut = gate(gpu, first.handle)
        session.run(array, out=out, stream=first)
        threading.Timer(0.02, shut.open).start()
        result = session.run(on_device(gpu, images(3)), stream=second)  # is it worth padding?
        second.synchronize()
        close_to(result.numpy(), reference(folder)(images(3)))
        first.synchronize()
        close_to(out.numpy(), reference(folder)(images(8)))


def test_a_profile_is_set_before_its_context_runs(
    session: rxdeploy.Session, expected: Reference, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT does that on a stream, and whoever runs on another one has to wait for it."""
    import tensorrt_rtx

    setting: dict[int, Gate] = {}
    kind = tensorrt_rtx.IExecutionContext
    real_set, real_execute = kind.set_optimization_profile_async, kind.execute_async_v3

    def set_profile(context: Any, profile: int, stream: int) -> bool:
        setting[id(context)] = gate(session.gpu, stream)
        threading.Timer(0.01, setting[id(context)].open).start()
        return real_set(context, profile, stream)

    def execute(context: Any, stream: int) -> bool:
        assert setting[id(context)].is_open()
        return real_execute(context, stream)

    monkeypatch.setattr(kind, "set_optimization_profile_async", set_profile)
    monkeypatch.setattr(kind, "execute_async_v3", execute)
    stream, array = session.gpu.stream(), on_device(session.gpu, images(3))
    for _ in range(3):
        close_to(session.run(array, stream=stream).numpy(), expected(images(3)))
        close_to(session.run(images(3)), expected(images(3)))
    assert setting


# Streams of batches


def test_map_gives_every_batch_in_order(session: rxdeploy.Session, expected: Reference, dawdle: Callable) -> None:
    dawdle(300)
    sizes = [3, 8, 1, 20, 8, 8, 5, 17, 2, 9, 3, 3]
    batches = [images(size, seed) for seed, size in enumerate(sizes)]
    for _ in range(2):
        results = list(session.map(iter(batches)))
        assert [len(result) for result in results] == sizes
        for result, batch in zip(results, batches, strict=True):
            close_to(result, expected(batch))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_map_of_few_batches(session: rxdeploy.Session, expected: Reference, count: int) -> None:
    results = list(session.map(images(4, seed) for seed in range(count)))
    assert len(results) == count
    for seed, result in enumerate(results):
        close_to(result, expected(images(4, seed)))


def test_map_lets_the_caller_reuse_one_array(session: rxdeploy.Session, expected: Reference, dawdle: Callable) -> None:
    dawdle(1000)
    batch = np.empty((4, SIZE, SIZE, 3), np.uint8)

    def batches() -> Iterator[np.ndarray]:
        for seed in range(8):
            batch[:] = images(4, seed)
            yield batch

    results = list(session.map(batches()))
    for seed, result in enumerate(results):
        close_to(result, expected(images(4, seed)))


def meet(monkeypatch: pytest.MonkeyPatch, count: int) -> threading.Barrier:
    """From now on no execution ends before `count` of them run at once."""
    barrier, real = threading.Barrier(count, timeout=20), Kernel._execute

    def execute(kernel: Kernel, *arguments: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()
        real(kernel, *arguments)

    monkeypatch.setattr(Kernel, "_execute", execute)
    return barrier


def test_map_works_on_two_batches_at_once(
    session: rxdeploy.Session, expected: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prepare([4])
    barrier = meet(monkeypatch, 2)
    for seed, result in enumerate(session.map(images(4, seed) for seed in range(6))):
        close_to(result, expected(images(4, seed)))
    assert not barrier.broken


def test_the_parts_of_a_large_batch_overlap(
    session: rxdeploy.Session, expected: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prepare([8])
    barrier = meet(monkeypatch, 2)
    close_to(session.run(images(32)), expected(images(32)))
    assert not barrier.broken


def test_two_threads_run_at_once(
    session: rxdeploy.Session, expected: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prepare([4])
    barrier = meet(monkeypatch, 2)
    in_threads(lambda number: close_to(session.run(images(4, number)), expected(images(4, number))), 4)
    assert not barrier.broken


def test_map_copies_the_next_batch_while_one_is_computed(
    session: rxdeploy.Session, expected: Reference, counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prepare([4])
    go_on, real = threading.Event(), Kernel._execute

    def execute(kernel: Kernel, *arguments: Any) -> None:
        assert go_on.wait(20)
        real(kernel, *arguments)

    monkeypatch.setattr(Kernel, "_execute", execute)
    before = counters("copies")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: list(session.map(images(4, seed) for seed in range(4))))
        wait_until(lambda: counters("copies") - before == 2)
        assert not future.done()
        go_on.set()
        for seed, result in enumerate(future.result()):
            close_to(result, expected(images(4, seed)))
    assert counters("copies") - before == 8


def test_map_takes_no_more_than_two_batches_ahead(session: rxdeploy.Session) -> None:
    taken = []

    def batches() -> Iterator[np.ndarray]:
        for seed in range(6):
            taken.append(seed)
            yield images(2, seed)

    results = session.map(batches())
    assert not taken
    for number, _ in enumerate(results):
        assert len(taken) <= number + 3


def test_generators_that_are_abandoned_hold_no_lane(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable
) -> None:
    dawdle(300)
    kept = []
    for number in range(6):
        generator = session.map(images(4, seed) for seed in range(5))
        close_to(next(generator), expected(images(4, 0)))
        if number % 3 == 0:
            generator.close()
        elif number % 3 == 1:
            kept.append(generator)
        del generator
        close_to(session.run(images(3, number)), expected(images(3, number)))
        close_to(session.run(images(20, number)), expected(images(20, number)))
    in_threads(lambda number: close_to(session.run(images(2, number)), expected(images(2, number))), 4)
    session.prepare([6])
    for generator in kept:
        rest = list(generator)
        assert len(rest) == 4
        for seed, result in enumerate(rest, 1):
            close_to(result, expected(images(4, seed)))


def test_generators_in_turn_and_run_between_them(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable
) -> None:
    """In one thread: nobody may wait for a lane that only the same thread would give back."""
    dawdle(200)

    def batches(count: int) -> Iterator[np.ndarray]:
        return (images(count, seed) for seed in range(6))

    stream = session.gpu.stream()
    generators = [session.map(batches(1 + number)) for number in range(4)]
    for seed in range(6):
        for number, generator in enumerate(generators):
            close_to(next(generator), expected(images(1 + number, seed)))
            close_to(session.run(images(9, seed)), expected(images(9, seed)))
            array = on_device(session.gpu, images(3, seed))
            close_to(session.run(array, stream=stream).numpy(), expected(images(3, seed)))
    for generator in generators:
        assert next(generator, None) is None


def test_a_generator_inside_a_generator(session: rxdeploy.Session, expected: Reference) -> None:
    """The batches of one are made with the results of another."""
    inner = session.map(images(2, seed) for seed in range(5))
    outer = session.map(images(1 + len(result), seed) for seed, result in enumerate(inner))
    for seed, result in enumerate(outer):
        close_to(result, expected(images(3, seed)))
    assert seed == 4


def test_close_while_a_generator_is_suspended(bundle: Path, expected: Reference, counters: Counters) -> None:
    before = [counters(name) for name in LIVE]
    session = rxdeploy.load(bundle, "tensorrt")
    generator = session.map(images(4, seed) for seed in range(5))
    close_to(next(generator), expected(images(4, 0)))
    session.close()
    assert [counters(name) for name in LIVE] == before
    with pytest.raises(Closed):
        list(generator)


def test_an_error_in_the_batches_ends_map_and_leaves_the_session_whole(
    session: rxdeploy.Session, expected: Reference
) -> None:
    def batches() -> Iterator[np.ndarray]:
        yield images(3)
        yield images(3)
        raise KeyError("the caller's")

    results = session.map(batches())
    with pytest.raises(KeyError, match="the caller's"):
        list(results)
    with pytest.raises(InputError, match="got an empty batch"):
        list(session.map([images(2), images(0)]))
    with pytest.raises(InputError, match="expected uint8"):
        list(session.map([images(2), images(2).astype(np.float32)]))
    for seed in range(3):
        close_to(session.run(images(5, seed)), expected(images(5, seed)))
        close_to(session.run(images(20, seed)), expected(images(20, seed)))


# Many callers


def everything(session: rxdeploy.Session, expected: Reference, number: int) -> None:
    """One caller of many, who uses the session in every way."""
    rng, gpu = random.Random(number), session.gpu
    stream = gpu.stream()
    for step in range(6):
        seed, count = 100 * number + step, rng.choice([1, 2, 3, 5, 8, 9, 17])
        batch = images(count, seed)
        way = rng.randrange(5)
        if way == 0:
            close_to(session.run(batch), expected(batch))
        elif way == 1:
            for result in session.map([batch, batch[:1]]):
                close_to(result, expected(batch[: len(result)]))
        elif way == 2:
            futures = [session.submit(image) for image in batch]
            close_to(np.stack([future.result() for future in futures]), expected(batch))
        elif way == 3:
            result = session.run(on_device(gpu, batch[:8]), stream=stream)
            close_to(result.numpy(), expected(batch[:8]))
        else:
            out = gpu.empty((count, CLASSES), np.float32) if count <= 8 else np.empty((count, CLASSES), np.float32)
            session.run(batch, out=out, stream=stream)
            stream.synchronize()
            close_to(out if isinstance(out, np.ndarray) else out.numpy(), expected(batch))


def test_many_threads_in_every_way(bundle: Path, expected: Reference, counters: Counters, dawdle: Callable) -> None:
    dawdle(150)
    gc.collect()
    before = [counters(name) for name in LIVE]
    session = rxdeploy.load(bundle, "tensorrt", batching=Batching(max_batch=8, max_delay_ms=1))
    in_threads(lambda number: everything(session, expected, number), 8)
    assert session.metrics.snapshot().errors == 0
    session.close()
    gc.collect()
    assert [counters(name) for name in LIVE] == before


def run_until_closed(session: rxdeploy.Session, expected: Reference, number: int, results: list[int]) -> None:
    with contextlib.suppress(Closed):
        for step in range(1000):
            batch = images(1 + (number + step) % 8, step)
            close_to(session.run(batch), expected(batch))
            if number == 3:
                close_to(next(session.map([batch])), expected(batch))
            results.append(number)
        raise AssertionError("never closed")


def test_close_while_others_run(bundle: Path, expected: Reference, counters: Counters, dawdle: Callable) -> None:
    """Each call ends with the right logits or with Closed, and nothing is left."""
    dawdle(150)
    before = [counters(name) for name in LIVE]
    for attempt in range(4):
        session, results = rxdeploy.load(bundle, "tensorrt"), list[int]()
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(run_until_closed, session, expected, number, results) for number in range(4)]
            wait_until(lambda results=results, enough=3 * attempt: len(results) >= enough)
            session.close()
            assert [counters(name) for name in LIVE] == before
            for future in futures:
                future.result()


def test_close_lets_a_call_that_runs_end(bundle: Path, expected: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Calls that are running end first": also one in many parts."""
    session = rxdeploy.load(bundle, "tensorrt")
    running, real = threading.Event(), Kernel._execute

    def execute(kernel: Kernel, *arguments: Any) -> None:
        running.set()
        threading.Event().wait(0.005)
        real(kernel, *arguments)

    monkeypatch.setattr(Kernel, "_execute", execute)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(session.run, images(200))
        assert running.wait(20)
        session.close()
        close_to(future.result(), expected(images(200)))


def test_after_close_everything_says_so(bundle: Path) -> None:
    session = rxdeploy.load(bundle, "tensorrt")
    gpu, array = session.gpu, on_device(session.gpu, images(2))
    session.close()
    for call in (
        lambda: session.run(images(2)),
        lambda: session.run(images(20)),
        lambda: session.run(array),
        lambda: session.run(array, stream=gpu.stream()),
        lambda: session.run(images(0)),
        lambda: list(session.map([images(2)])),
        lambda: session.submit(images(1)[0]),
        lambda: session.prepare([2]),
        lambda: list(session.classify([])),
    ):
        with pytest.raises(Closed, match="the session is closed"):
            call()
    session.close()


def test_a_call_that_comes_into_the_engine_after_close(bundle: Path) -> None:
    """One that had found the session open."""
    session = rxdeploy.load(bundle, "tensorrt")
    array = device_view(on_device(session.gpu, images(2)), "images", 1, session.gpu)
    engine = session.engine
    session.close()
    for call in (
        lambda: engine.run(images(2), None, None),
        lambda: engine.run(images(20), None, None),
        lambda: engine.run(array, None, None),
        lambda: list(engine.map([images(2)])),
        lambda: engine.prepare([2]),
        lambda: engine.layer_times(2, 1),
    ):
        with pytest.raises(Closed, match="the session is closed"):
            call()


def test_map_of_nothing_after_close(bundle: Path) -> None:
    session = rxdeploy.load(bundle, "tensorrt")
    session.close()
    with pytest.raises(Closed):
        list(session.map([]))


# Requests one by one, files, metrics


def test_submit_gathers_requests(bundle: Path, expected: Reference, dawdle: Callable) -> None:
    dawdle(100)
    batch = images(40)
    with rxdeploy.load(bundle, "tensorrt", batching=Batching(max_delay_ms=20)) as session:
        futures = [session.submit(image) for image in batch]
        close_to(np.stack([future.result() for future in futures]), expected(batch))
        seen = session.metrics.snapshot()
    assert seen.requests.count == 40 and seen.images == 40 and seen.errors == 0
    assert sum(size * times for size, times in seen.batches.items()) == 40
    assert max(seen.batches) == LARGEST  # what the plan takes at most


def test_close_computes_what_was_submitted(bundle: Path, expected: Reference) -> None:
    session = rxdeploy.load(bundle, "tensorrt", batching=Batching(max_delay_ms=1000))
    futures = [session.submit(image) for image in images(5)]
    session.close()
    close_to(np.stack([future.result() for future in futures]), expected(images(5)))
    session = rxdeploy.load(bundle, "tensorrt", batching=Batching(max_delay_ms=1000))
    future = session.submit(images(1)[0])
    session.close(drain=False)
    with pytest.raises(Closed):
        future.result()


def test_classify_files(bundle: Path, run_onnx: Callable, tmp_path: Path, dawdle: Callable) -> None:
    from PIL import Image

    dawdle(200)
    paths = []
    for number in range(21):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 70, 3), np.uint8)).save(paths[-1])
    paths[5].write_bytes(b"no image")
    with rxdeploy.load(bundle, "tensorrt") as session:
        found = list(session.classify(paths, k=3))
        batch = np.stack([session.preprocess(path) for path in paths if path != paths[5]])
    assert [each.path for each in found] == paths
    assert isinstance(found[5].error, InputError) and found[5].predictions is None
    logits = run_onnx((bundle / "model.onnx").read_bytes(), batch)
    good = [each for each in found if each is not found[5]]
    for row, each in zip(logits, good, strict=True):
        assert each.predictions is not None
        assert [one.index for one in each.predictions] == np.argsort(-row)[:3].tolist()
        close_to(np.array([one.logit for one in each.predictions]), np.sort(row)[::-1][:3])


def test_metrics_count_every_way(session: rxdeploy.Session) -> None:
    gpu, stream = session.gpu, session.gpu.stream()
    session.run(images(3))
    session.run(images(19))
    session.run(on_device(gpu, images(2)))
    assert session.metrics.snapshot().runs.count == 3
    session.run(on_device(gpu, images(4)), stream=stream)  # enqueued: no time to record
    stream.synchronize()
    list(session.map([images(1), images(5)]))
    seen = session.metrics.snapshot()
    assert (seen.images, seen.runs.count, seen.errors) == (3 + 19 + 2 + 4 + 6, 3, 0)  # nor what overlaps in map


@pytest.fixture
def not_finite(bundle_with_plan: Bundles, make_card: Callable, model: Callable) -> Path:
    """A bundle whose plan gives NaN for the third class, and infinity for the fifth."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(model(make_card("broken")))
    bias = next(each for each in graph.graph.initializer if list(each.dims) == [CLASSES])
    values = numpy_helper.to_array(bias).copy()
    values[2], values[4] = np.nan, np.inf
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    plan = make_plan(graph.SerializeToString(), profiles=((1, 4, LARGEST),))
    return bundle_with_plan(profiles=((1, 4, LARGEST),), plan=plan)


def test_logits_that_are_not_finite(not_finite: Path) -> None:
    with rxdeploy.load(not_finite, "tensorrt") as session:
        out = np.empty((2, CLASSES), np.float32)
        for errors, call in enumerate(
            (
                lambda: session.run(images(2)),
                lambda: session.run(images(20)),
                lambda: session.run(images(2), out=out),
                lambda: session.run(on_device(session.gpu, images(2)), out=out),
                lambda: list(session.map([images(2)])),
                lambda: session.submit(images(1)[0]).result(),
            ),
            1,
        ):
            with pytest.raises(CheckFailed, match="the logits hold NaN or infinity"):
                call()
            assert session.metrics.snapshot().errors >= errors
        # What stays on the device is the caller's to look at.
        logits = session.run(on_device(session.gpu, images(2))).numpy()
        assert np.isnan(logits[:, 2]).all() and np.isinf(logits[:, 4]).all() and np.isfinite(logits[:, [0, 1, 3]]).all()


# Errors of TensorRT and of the device


@pytest.mark.parametrize(
    "method", ["execute_async_v3", "set_input_shape", "set_tensor_address image", "set_tensor_address logits"]
)
@pytest.mark.parametrize("when", ["first", "graph"])
def test_what_tensorrt_refuses_is_said_and_the_next_call_is_right(
    session: rxdeploy.Session, expected: Reference, monkeypatch: pytest.MonkeyPatch, method: str, when: str
) -> None:
    import tensorrt_rtx

    if when == "graph":
        session.run(images(3))
    method, _, tensor = method.partition(" ")
    real = getattr(tensorrt_rtx.IExecutionContext, method)
    with monkeypatch.context() as patch:

        def refuses(context: Any, *arguments: Any) -> bool:
            if tensor and arguments[0] != tensor:
                return real(context, *arguments)
            context.engine._log(f"IExecutionContext::{method}: Error Code 1: Myelin (no reason)")
            return False

        patch.setattr(tensorrt_rtx.IExecutionContext, method, refuses)
        for call in (
            lambda: session.run(images(3)),
            lambda: session.run(images(19)),
            lambda: session.run(on_device(session.gpu, images(3)), stream=session.gpu.stream()),
            lambda: list(session.map([images(3)] * 3)),
        ):
            with pytest.raises(EnvironmentLacks, match=r"does not run a batch of \d.*Myelin \(no reason\)"):
                call()
    assert session.metrics.snapshot().errors >= 3
    for seed in range(3):
        close_to(session.run(images(3, seed)), expected(images(3, seed)))
        close_to(session.run(images(20, seed)), expected(images(20, seed)))


def test_what_was_enqueued_before_an_error_is_waited_for(
    bundle_with_plan: Bundles, reference: Callable, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the images was, to where the next call's images go."""
    import tensorrt_rtx

    folder = bundle_with_plan(profiles=((4, 4, 4),), us_per_batch=40_000)
    monkeypatch.setattr(lanes.Lane, "busy", lambda *_: False)  # or the other lane would be taken
    with rxdeploy.load(folder) as session:
        session.prepare([3])
        stream, array = session.gpu.stream(), on_device(session.gpu, images(3, 1))
        out = session.gpu.empty((3, CLASSES), np.float32)
        shut = gate(session.gpu, stream.handle)
        with monkeypatch.context() as patch, pytest.raises(EnvironmentLacks):
            patch.setattr(tensorrt_rtx.IExecutionContext, "execute_async_v3", lambda *_: False)
            session.run(array, out=out, stream=stream)
        threading.Timer(0.02, shut.open).start()
        close_to(session.run(images(3, 2)), reference(folder)(images(3, 2)))
        stream.synchronize()


@pytest.mark.parametrize("way", ["run", "run in parts", "device"])
def test_what_a_lane_enqueued_before_an_error_is_waited_for(
    session: rxdeploy.Session, expected: Reference, gate: Callable, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """On its own stream: whoever gets the lane next may be on another."""
    import tensorrt_rtx

    session.prepare([3])
    shut = gate(session.gpu, session.engine._lanes[0].stream.handle)
    threading.Timer(0.05, shut.open).start()
    out = session.gpu.empty((4, CLASSES), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_rtx.IExecutionContext, "execute_async_v3", lambda *_: False)
        with pytest.raises(EnvironmentLacks):
            if way == "device":
                session.run(images(4), out=out)
            else:
                session.run(images(4 if way == "run" else 9))
    assert shut.is_open()
    close_to(session.run(images(4)), expected(images(4)))


def test_metrics_count_errors_of_map(session: rxdeploy.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx

    monkeypatch.setattr(tensorrt_rtx.IExecutionContext, "execute_async_v3", lambda *_: False)
    with pytest.raises(EnvironmentLacks):
        list(session.map([images(3)]))
    assert session.metrics.snapshot().errors == 1


def break_device(gpu: Gpu, stream: Any) -> None:
    """A copy from memory that was freed, on `stream`: from then on the device takes no more work."""
    dead = gpu.allocate(100)
    dead.close()
    with gpu.current():
        gpu.copy(dead.pointer, dead.pointer, 100, stream.handle)


def use_broken(folder: Path, lent: bool) -> list[str]:
    """Load on the second GPU, break that, and give what every call says then."""
    session = rxdeploy.load(folder, "tensorrt:1")
    stream = session.gpu.stream()
    array, out = on_device(session.gpu, images(3)), session.gpu.empty((3, CLASSES), np.float32)
    for _ in range(3):
        session.run(images(3))
        session.run(images(20))
        session.run(array, out=out)
    generator = session.map([images(3)] * 5)
    next(generator)
    if lent:
        session.run(array, out=out, stream=stream)
    break_device(session.gpu, stream)
    said = []
    for call in (
        stream.synchronize,
        lambda: session.run(images(3)),
        lambda: session.run(images(20)),
        lambda: session.run(array),
        lambda: next(generator),
        lambda: session.submit(images(1)[0]).result(),
        session.close,
        session.close,
    ):
        try:
            call()
        except EnvironmentLacks as error:
            said.append(str(error))
        else:
            said.append("")
    return said


@pytest.mark.misuse
@pytest.mark.parametrize(
    "lent",
    [
        False,
        True,
    ],
)
def test_a_broken_device_is_said_and_the_session_can_be_closed(bundle: Path, counters: Counters, lent: bool) -> None:
    gc.collect()
    before = [counters(name) for name in (*LIVE, "primary_retained")]
    said = use_broken(bundle, lent)
    assert ["CUDA_ERROR_ILLEGAL_ADDRESS" in each for each in said] == [True] * 6 + [False] * 2, said
    assert said[-2:] == ["", ""]
    gc.collect()
    assert [counters(name) for name in (*LIVE, "primary_retained")] == before
    assert not counters("abandoned")


# Layers


def test_layer_times_give_every_layer_once_a_run(session: rxdeploy.Session, executions: Any) -> None:
    import json

    names = [layer["Name"] for layer in json.loads(session.engine.plan.layers())["Layers"]]
    session.run(images(5))
    executions.clear()
    runs = session.engine.layer_times(5, 3)
    assert len(runs) == 3
    for run in runs:
        assert list(run) == names
        assert all(seconds > 0 for seconds in run.values())
    assert [each.batch for each in executions] == [5] * 4  # one to compile


def test_layer_times_beside_other_callers(session: rxdeploy.Session, expected: Reference, dawdle: Callable) -> None:
    dawdle(200)
    stream, array = session.gpu.stream(), on_device(session.gpu, images(3))

    def work(number: int) -> None:
        if number == 0:
            assert len(session.engine.layer_times(3, 2)) == 2
        for seed in range(3):
            close_to(session.run(images(3, seed)), expected(images(3, seed)))
        if number == 1:
            close_to(session.run(array, stream=stream).numpy(), expected(images(3)))

    in_threads(work, 4)


def test_layer_times_of_too_many_images(session: rxdeploy.Session) -> None:
    with contextlib.suppress(InputError):
        session.engine.layer_times(LARGEST + 1, 1)


# What a real GPU would punish


def test_host_images_into_device_memory_are_complete_on_return(
    session: rxdeploy.Session, expected: Reference, dawdle: Callable
) -> None:
    stream, out = session.gpu.stream(), session.gpu.empty((4, CLASSES), np.float32)
    for seed in range(3):
        dawdle(2000)
        session.run(images(4, seed), out=out, stream=stream)
        with session.gpu.current():
            assert int(cuda.cuStreamQuery(stream.handle)[0]) == 0  # nothing is left to do there
        dawdle(0)
        close_to(out.numpy(), expected(images(4, seed)))


def test_garbage_collected_in_a_capture_does_no_harm(
    session: rxdeploy.Session, expected: Reference, counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is freed while a stream is captured breaks the capture; the collector may free at any time."""
    real, was = lanes.Lane._execute, gc.isenabled()
    gc.enable()

    def execute(lane: Any, *arguments: Any) -> None:
        real(lane, *arguments)
        if gc.isenabled():
            gc.collect()
        elif not garbage:
            garbage.append("was kept")

    garbage: list[str] = []
    monkeypatch.setattr(lanes.Lane, "_execute", execute)
    try:
        for seed in range(3):
            launches = counters("graph_launches")
            cycle: list[Any] = [session.gpu.empty((10,), np.float32)]
            cycle.append(cycle)
            del cycle
            close_to(session.run(images(3, seed)), expected(images(3, seed)))
    finally:
        if not was:
            gc.disable()
    assert garbage == ["was kept"]
    assert counters("graph_launches") - launches == 1


def test_nothing_of_tensorrt_is_enqueued_on_a_default_stream(
    session: rxdeploy.Session, expected: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it would wait for the whole device (NvInferRuntime.h, enqueueV3)."""
    import tensorrt_rtx

    streams, real = [], tensorrt_rtx.IExecutionContext.execute_async_v3

    def execute(context: Any, stream: int) -> bool:
        streams.append(stream)
        return real(context, stream)

    monkeypatch.setattr(tensorrt_rtx.IExecutionContext, "execute_async_v3", execute)
    out = session.gpu.empty((3, CLASSES), np.float32)
    for stream in (0, 1, 2):
        session.run(on_device(session.gpu, images(3)), out=out, stream=stream)
        session.gpu.synchronize(stream)
        close_to(out.numpy(), expected(images(3)))
    assert streams
    assert not {0, 1, 2} & set(streams)


def test_a_result_is_copied_to_the_host_by_numpy(session: rxdeploy.Session, expected: Reference) -> None:
    result = session.run(on_device(session.gpu, images(3)))
    close_to(np.asarray(result), expected(images(3)))
    assert np.asarray(result, np.float64).dtype == np.float64


def test_contexts_share_what_was_compiled(session: rxdeploy.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx

    configs, real = set(), tensorrt_rtx.ICudaEngine.create_execution_context

    def create(engine: Any, config: Any) -> Any:
        configs.add(config)
        return real(engine, config)

    monkeypatch.setattr(tensorrt_rtx.ICudaEngine, "create_execution_context", create)
    session.prepare([1, 4, 8])
    (config,) = configs
    assert config.get_runtime_cache() is not None


def test_a_plan_without_weights_is_refused(bundle_with_plan: Bundles) -> None:
    with pytest.raises(EnvironmentLacks, match="has no weights"):
        rxdeploy.load(bundle_with_plan(claims={"strip_plan": True}), "tensorrt")


def test_a_tensorrt_that_does_not_start_is_passed_over(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pybind's word for the null pointer that a driver older than TensorRT's CUDA gives."""
    import tensorrt_rtx

    def null(*_: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(tensorrt_rtx, "Runtime", null)
    with rxdeploy.load(bundle) as session:
        assert session.device == "cpu"
        assert "tensorrt_rtx does not start" in session.passed_over[0]
