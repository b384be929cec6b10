"""What is printed and written, for a benchmark whose every figure is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from rxdeploy.bench import facts, report
from rxdeploy.bench.benchmark import BatchResult, Benchmark, Series
from rxdeploy.bench.counts import GraphCounts, NodeCount
from rxdeploy.bench.datasheet import DATASHEETS
from rxdeploy.bench.layers import Layer, LayerTimes
from rxdeploy.bench.measure import WarmUp
from rxdeploy.bench.peaks import Figure, Peaks
from rxdeploy.bench.statistics import latency, throughput
from rxdeploy.cards.card import Figures
from rxdeploy.engines.bundle import Bundle, open_bundle
from rxdeploy.errors import EnvironmentLacks, InputError

Make = Callable[..., Benchmark]

COUNTS = GraphCounts(
    (
        NodeCount("conv", "Conv", "stem", 900_000_000, 3_000_000, 0, 0, (), ()),
        NodeCount("fc", "Gemm", "head", 100_000_000, 1_000_000, 0, 0, (), ()),
    ),
    weight_bytes=4_000_000,
    input_bytes=150_528,
    output_bytes=4_000,
)


def series(seconds: float, images: int, calls: int = 200) -> Series:
    durations = [seconds] * calls
    return Series(latency(durations), throughput(durations, images))


@pytest.fixture
def known(bundle: Callable[..., Path]) -> Bundle:
    """A bundle whose card publishes 1.3 GFLOPs."""
    opened = open_bundle(bundle())
    card = msgspec.structs.replace(opened.manifest.card, figures=Figures(flops=1_300_000_000))
    return replace(opened, manifest=msgspec.structs.replace(opened.manifest, card=card))


@pytest.fixture
def make(known: Bundle) -> Make:
    """A benchmark of a model of 1e9 multiply-adds, 40 images/s in batches of 4, where 400 GFLOP/s are possible."""

    def build(**changes: Any) -> Benchmark:
        peaks = Peaks("fp32", Figure(4e11, "by products"), Figure(1e10, "by copies"), None)
        batch = BatchResult(4, WarmUp(True, 30, 1.5), series(0.1, 4), None, None, None)
        plain: dict[str, Any] = {
            "bundle": known,
            "device": "cpu",
            "description": "ONNX Runtime on CPU",
            "passed_over": (),
            "seconds": 3.0,
            "counts": COUNTS,
            "peaks": peaks,
            "batches": (batch,),
            "failures": {},
            "layers": None,
            "no_device": "no copies",
            "no_enqueue": "no copies",
        }
        return Benchmark(**plain | changes)

    return build


def on_gpu(make: Make, **changes: Any) -> Benchmark:
    """100 ms with copies, 50 ms without: 80 images/s."""
    batch = BatchResult(
        4, WarmUp(True, 30, 1.5), series(0.1, 4), series(0.05, 4), latency([0.001] * 200), latency([0.04] * 200)
    )
    peaks = Peaks("fp16", Figure(1e12, "by products"), Figure(2e12, "by copies"), DATASHEETS["NVIDIA L4"])
    gpu = {"device": "tensorrt", "description": "plan on NVIDIA L4", "no_device": None, "no_enqueue": None}
    return make(**{"batches": (batch,), "peaks": peaks} | gpu | changes)


def printed(bench: Benchmark, width: int = 110) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        for table in report.tables(bench):
            console.print(table)
    return capture.get()


def cells(text: str, first: str) -> list[str]:
    """The cells of the first row that begins with `first`."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line)
    return next(row for row in rows if row[0] == first)


def test_figures_on_paper(make: Make) -> None:
    """40 images/s x 1.3 and x 2 GFLOPs; the floor is 8 GFLOP at 400 GFLOP/s, 20 ms, and 100 ms are 5 times that."""
    batch = facts.as_facts(make())["batches"][0]
    host = batch["host_arrays"]
    assert host["images_per_s"] == pytest.approx(40)
    assert host["card_flop_per_s"] == pytest.approx(52e9)
    assert host["counted_flop_per_s"] == pytest.approx(80e9)
    assert host["share_of_measured_peak"] == pytest.approx(0.2)
    assert host["share_of_datasheet_peak"] is None
    assert batch["device_arrays"] is batch["enqueue"] is batch["device"] is None
    assert batch["floor"] == {
        "seconds": pytest.approx(0.02),
        "bound_by": "compute",
        "compute_seconds": pytest.approx(0.02),
        "memory_seconds": pytest.approx((4_000_000 + 4 * 154_528) / 1e10),
        "median_over_floor": pytest.approx(5),
    }


def test_a_card_without_flops(make: Make, known: Bundle) -> None:
    card = msgspec.structs.replace(known.manifest.card, figures=Figures())
    bench = make(bundle=replace(known, manifest=msgspec.structs.replace(known.manifest, card=card)))
    found = facts.as_facts(bench)
    assert found["counts"]["card_flops_per_image"] is None
    assert found["batches"][0]["host_arrays"]["card_flop_per_s"] is None
    assert "card FLOPs     none: the card publishes no figure" in report.headline(bench)


def test_without_a_measured_peak_there_is_no_floor(make: Make) -> None:
    bench = make(peaks=Peaks("fp32", Figure(None, "not measured: why"), Figure(1e10, "by copies"), None))
    batch = facts.as_facts(bench)["batches"][0]
    assert batch["floor"] is None and batch["host_arrays"]["share_of_measured_peak"] is None
    assert "peak           not measured: why" in report.headline(bench)
    assert cells(printed(bench), "4")


def test_everything_is_json_with_units_in_its_keys(make: Make) -> None:
    data = json.loads(msgspec.json.encode(facts.as_facts(on_gpu(make))))
    assert data["schema"] == 1
    assert set(data) == {
        *("schema", "machine", "bundle", "device", "seconds_per_batch_size", "counts", "peaks", "batches"),
        *("failures", "no_device_arrays_because", "no_enqueue_and_device_time_because", "layers", "numerics", "method"),
    }
    assert set(data["machine"]) >= {"date", "processor", "cores", "gpus", "driver_cuda_version", "versions"}
    assert data["bundle"]["precision"] == "fp32" and len(data["bundle"]["digest"]) == 64
    assert data["peaks"]["datasheet_dense_flop_per_s"] == 121e12
    units = ("_s", "_byte", "_bytes", "_seconds", "calls", "_flop_per_s", "interval", "blocks", "peak")
    for name in ("host_arrays", "device_arrays", "enqueue", "device"):
        for key in data["batches"][0][name]:
            assert key.endswith(units), key


def test_the_tables_say_what_was_measured(make: Make) -> None:
    text = printed(make())
    assert cells(text, "4") == ["4", "100.0", "100.0", "100.0", "-", "40.00", "40.00 to 40.00", "200"]
    assert cells(text.partition("Against")[2], "4") == [
        *("4", "52.00 GFLOP/s", "80.00 GFLOP/s", "20.0%", "20.00", "compute", "5.00")
    ]
    assert "copies" not in text and "datasheet" not in text


def test_on_a_gpu_shares_are_of_the_calls_without_copies(make: Make) -> None:
    """80 images/s are 160 GFLOP/s: 16% of 1 TFLOP/s measured and 0.1% of the datasheet's 121."""
    text = printed(on_gpu(make))
    assert cells(text, "4") == ["4", "with copies", "100.0", "100.0", "100.0", "-", "40.00", "40.00 to 40.00", "200"]
    for name, milliseconds in (("without copies", "50.00"), ("until enqueued", "1.000"), ("GPU's own time", "40.00")):
        row = next(line for line in text.splitlines() if name in line)
        assert milliseconds in row
    limits = text.partition("Against")[2]
    assert "(without copies)" in limits
    assert cells(limits, "4") == [
        "4",
        "104.0 GFLOP/s",
        "160.0 GFLOP/s",
        "16.0%",
        "0.1%",
        "8.000",
        "compute",
        "6.25",
    ]


def test_the_headline_explains_the_cards_flops(make: Make) -> None:
    text = " ".join(report.headline(make()).split())
    assert "2.000 GFLOPs an image: two for each of 1,000,000,000 multiply-adds" in text
    assert "1.300 GFLOPs an image, as the card publishes them. That is 1.30 times the multiply-adds" in text
    assert "neither those nor two for each" in text
    assert "400.0 GFLOP/s measured here: by products" in text and "datasheet" not in text
    text = " ".join(report.headline(on_gpu(make)).split())
    assert "121.0 TFLOP/s in fp16 (dense), 300.0 GB/s: NVIDIA L4 Tensor Core GPU datasheet" in text


def test_a_gpu_that_is_listed_or_not(make: Make) -> None:
    peaks = Peaks("fp32", Figure(1e13, "-"), Figure(1e11, "-"), DATASHEETS["Tesla T4"])
    assert "8.100 TFLOP/s in fp32 (dense), 320.0 GB/s" in " ".join(report.headline(on_gpu(make, peaks=peaks)).split())
    assert "this GPU is not in rxdeploy's list" in report.headline(on_gpu(make, peaks=replace(peaks, datasheet=None)))


def test_layers(make: Make) -> None:
    """A batch of 4: 3.6e9 multiply-adds in 30 ms and 0.4e9 in 10 ms, 10 ms of neither."""
    times = LayerTimes(
        4,
        10,
        0.05,
        "a profiler; mean of 10 runs",
        (
            Layer("a", "stem", 0.03, 3_600_000_000, ("conv",)),
            Layer("b", "head", 0.01, 400_000_000, ("fc",)),
            Layer("between layers", "between layers", 0.01, 0, ()),
        ),
    )
    bench = make(layers=times)
    text = printed(bench).partition("Layers, batch 4")[2]
    assert cells(text, "stem") == ["stem", "1", "30.00", "60.0%", "90.0%", "240.0 GFLOP/s", "60.0%"]
    assert cells(text, "head") == ["head", "1", "10.00", "20.0%", "10.0%", "80.00 GFLOP/s", "20.0%"]
    assert cells(text, "between layers") == ["between layers", "", "10.00", "20.0%", "-", "-", "-"]
    assert cells(text, "all") == ["all", "", "50.00", "100.0%", "100.0%", "", ""]
    assert "a profiler; mean of 10 runs" in text
    kinds = facts.as_facts(bench)["layers"]["kinds"]
    assert [kind["kind"] for kind in kinds] == ["stem", "head", "between layers"]
    assert sum(kind["seconds"] for kind in kinds) == pytest.approx(0.05)


def test_everything_fits_into_110_columns(make: Make) -> None:
    huge = on_gpu(make, batches=tuple(replace(on_gpu(make).batches[0], batch=size) for size in (1, 256, 4096)))
    for text in (printed(huge, 200), report.headline(huge), *report.notes(huge)):
        assert max(map(len, text.rstrip().splitlines())) <= 110


def test_notes(make: Make) -> None:
    bench = make()
    unstable = replace(bench.batches[0], warm_up=WarmUp(False, 3, 10.1))
    failures = {"batch 64": EnvironmentLacks("batch 64 could not be measured: no memory")}
    text = " ".join(" ".join(report.notes(make(batches=(unstable,), failures=failures))).split())
    assert "batch 4: the warm-up ended after 10 s without getting stable" in text
    assert "-: p99.9 needs at least 1000 calls" in text
    assert "batch 64 could not be measured: no memory" in text
    assert "no copies" not in text
    assert "ONNX Runtime returns only" in " ".join(
        report.notes(on_gpu(make, device="cuda", no_enqueue="ONNX Runtime returns only then"))
    )
    durations = [0.1] * 10 + [0.15] * 10
    varied = replace(bench.batches[0], host=Series(latency(durations), throughput(durations, 4)))
    assert any("batch 4: images/s is uncertain by more than 10%" in n for n in report.notes(make(batches=(varied,))))
    assert not any("uncertain" in note for note in report.notes(bench))
    fast = make(peaks=replace(bench.peaks, compute=Figure(1e10, "a neighbour was busy")))
    assert any("batch 4: faster than its floor" in note for note in report.notes(fast))
    assert not any("floor" in note for note in report.notes(bench))


@pytest.mark.parametrize(
    ("value", "text"),
    [(488.2e9, "488.2 G"), (1e12, "1.000 T"), (2.5e15, "2.500 P"), (999, "999.0 "), (1234e15, "1,234 P")],
)
def test_prefixes(value: float, text: str) -> None:
    assert report.scaled(value) == text


# Files


def test_json_appears_by_rename(make: Make, tmp_path: Path) -> None:
    destination = tmp_path / "new" / "result.json"
    facts.check_output(destination, "--json")
    facts.write_json(make(), destination)
    assert json.loads(destination.read_text())["batches"][0]["batch"] == 4
    assert [path.name for path in destination.parent.iterdir()] == ["result.json"]


def test_where_no_file_can_be(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for destination in (tmp_path, tmp_path / "file" / "below.json"):
        with pytest.raises(InputError, match=r"^--json "):
            facts.check_output(destination, "--json")
            facts.write_json(make(), destination)
