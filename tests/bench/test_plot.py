"""The picture: real files, and what is drawn in them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from rxdeploy.bench.benchmark import Benchmark, benchmark
from rxdeploy.errors import EnvironmentLacks, InputError

pytest.importorskip("matplotlib", reason="it draws")
pytest.importorskip("onnx", reason="counting reads the model with onnx")
pytest.importorskip("onnxruntime", reason="the bundle runs on it")


@pytest.fixture
def bench(bundle: Callable[..., Path], quick: None) -> Benchmark:
    return benchmark(bundle(), "cpu", (1, 2, 8), seconds=0.01)


@pytest.mark.parametrize("name", ["plot.png", "plot.SVG"])
def test_a_valid_picture_appears_by_rename(bench: Benchmark, tmp_path: Path, name: str) -> None:
    from rxdeploy.bench.plot import plot

    destination = tmp_path / "pictures" / name
    destination.parent.mkdir()
    destination.write_bytes(b"an older one")
    plot(bench, destination)
    if name.endswith("png"):
        with Image.open(destination) as image:
            image.load()
            assert image.format == "PNG" and image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 10
    else:
        assert ElementTree.parse(destination).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert [path.name for path in destination.parent.iterdir()] == [name]


def test_what_is_drawn(bench: Benchmark) -> None:
    from rxdeploy.bench.plot import draw

    figure = draw(bench)
    figure.draw_without_rendering()
    speed, latency = figure.axes[:2]
    assert speed.get_xscale() == latency.get_xscale() == "log"
    assert [text.get_text() for text in speed.get_xticklabels()] == ["1", "2", "8"]
    curve, _, _ = speed.containers[0]
    expected = [result.host.throughput.images_per_s for result in bench.batches]
    assert list(curve.get_xdata()) == [1, 2, 8] and list(curve.get_ydata()) == expected
    roofline = next(line for line in speed.lines if line.get_linestyle() == "--")
    floors = [bench.floor(result) for result in bench.batches]
    assert list(roofline.get_ydata()) == [
        size / floor.seconds for size, floor in zip((1, 2, 8), floors, strict=True) if floor
    ]
    medians, floor = latency.lines[0], next(line for line in latency.lines if line.get_linestyle() == "--")
    assert list(medians.get_ydata()) == [result.host.latency.median * 1e3 for result in bench.batches]
    assert list(floor.get_ydata()) == [floor.seconds * 1e3 for floor in floors if floor]
    (right,) = speed.child_axes  # images/s as counted GFLOP/s
    low, high = speed.get_ylim()
    assert right.get_ylim() == pytest.approx((low * bench.counted_flops / 1e9, high * bench.counted_flops / 1e9))


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "png", ".png"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    from rxdeploy.bench.plot import check_plot

    with pytest.raises(InputError, match=r"must end in \.png or \.svg"):
        check_plot(tmp_path / name)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rxdeploy.bench.plot import check_plot

    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    finder: Any = type("Blind", (), {"find_spec": staticmethod(_no_matplotlib)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(EnvironmentLacks, match=r"pip install 'rxdeploy\[bench\]'"):
        check_plot(tmp_path / "plot.png")


def _no_matplotlib(name: str, *_: Any) -> None:
    if name.partition(".")[0] == "matplotlib":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
