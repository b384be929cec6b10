"""What we compare our calibration with: onnxruntime.quantization.quantize_static, by each of its methods.

Each model is made in a process of its own, watched for its time and its peak memory, and stopped beyond a limit: its
calibrators keep every activation of every image until all have been seen, unless `stride` says after how many batches
to make histograms of them (its option CalibStridedMinMax, which does so for every method). `quantise` is for other
benchmarks; ``python benchmarks/quantize_static.py model.onnx images.npy -o DIR`` is the command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import save
from numpy.typing import NDArray

METHODS = ("MinMax", "Entropy", "Percentile")
# Its settings that suit each target best. Without the exclusions, "int8" would round a convolution's result before
# the ReLU and again after it. The normalisation stays float in both; quantising it would cost both accuracy.
STYLES: dict[str, dict[str, Any]] = {
    "int8": {  # for TensorRT: symmetric, zero_point 0, float bias
        "activation_type": "QInt8",
        "op_types_to_quantize": ["Conv", "Gemm", "Add"],
        "extra_options": {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "Add", "Gemm"],
        },
    },
    "cpu": {  # for ONNX Runtime: asymmetric, int32 bias, ReLU left to the quantiser
        "activation_type": "QUInt8",
        "op_types_to_quantize": ["Conv", "Gemm", "Add", "Relu", "MaxPool", "GlobalAveragePool", "Flatten"],
        "extra_options": {"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]},
    },
}
GIB = 2**30
_POLL_S = 0.05


@dataclass(frozen=True)
class Quantised:
    """One model that quantize_static made, or why it did not."""

    method: str
    style: str
    model: Path | None
    images: int
    seconds: float
    peak_bytes: int  # of the whole process, as Linux counts resident memory
    problem: str | None


def quantise(
    model: Path,
    images: NDArray[np.uint8],
    folder: Path,
    methods: tuple[str, ...] = METHODS,
    styles: tuple[str, ...] = tuple(STYLES),
    batch: int = 4,
    stride: int | None = None,
    memory_limit: float = 8 * GIB,
    percentile: float | None = None,
) -> list[Quantised]:
    """Models ``<method>-<style>.onnx`` in `folder`, made of the float32 `model` with uint8 `images` (n, h, w, 3).

    The images go through in batches of `batch`, all kept, or `stride` batches at a time. `percentile` is that of
    Percentile (ONNX Runtime's own: 99.999). A process beyond `memory_limit` bytes is stopped, and its `problem` says
    so. Weights have 8 bits where this CPU multiplies them exactly, else 7 ("int8" always 8: TensorRT does).
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        array = Path(scratch, "images.npy")
        np.save(array, images)
        for method in methods:
            for style in styles:
                target = folder / f"{method.lower()}-{style}.onnx"
                job = {
                    "model": str(model), "images": str(array), "batch": batch, "stride": stride, "method": method,
                    "style": style, "percentile": percentile, "target": str(target),
                }  # fmt: skip
                seconds, peak, problem = _in_new_process(job, memory_limit)
                made = None if problem else target
                results.append(Quantised(method, style, made, len(images), seconds, peak, problem))
    return results


def _in_new_process(job: dict[str, Any], memory_limit: float) -> tuple[float, int, str | None]:
    """Seconds, peak bytes and what went wrong."""
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as messages:
        command = [sys.executable, __file__, "--one", json.dumps(job)]
        process = subprocess.Popen(command, stdout=messages, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                peak = max(peak, _peak(process.pid))
                if peak > memory_limit:
                    return time.perf_counter() - begin, peak, f"stopped at {peak / GIB:.1f} GiB"
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - begin
        messages.seek(0)
        text = messages.read().decode(errors="replace").strip()
    last = text.splitlines()[-1] if text else "nothing said"
    if process.returncode:
        return seconds, peak, f"exit status {process.returncode}: {last}"
    return seconds, max(peak, int(json.loads(last)["peak_bytes"])), None


def _peak(pid: int | str) -> int:
    """The largest resident memory of a process so far, in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


class _Reader:
    """Batches of images, as quantize_static asks for them."""

    def __init__(self, path: str, batch: int, name: str) -> None:
        self._images = np.load(path, mmap_mode="r")
        self._batch, self._name = batch, name
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        if self._next >= self._end:
            return None
        begin = self._next * self._batch
        self._next += 1
        return {self._name: np.ascontiguousarray(self._images[begin : begin + self._batch])}


def _one(job: dict[str, Any]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    from rxdeploy.calibration.cpu import weight_bits

    style = STYLES[job["style"]]
    options = dict(style["extra_options"])
    if job["stride"]:
        options["CalibStridedMinMax"] = job["stride"]
    if job["percentile"] and job["method"] == "Percentile":
        options["CalibPercentile"] = job["percentile"]
    (image,) = onnx.load(job["model"], load_external_data=False).graph.input
    quantize_static(
        job["model"],
        job["target"],
        _Reader(job["images"], job["batch"], image.name),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=style["op_types_to_quantize"],
        per_channel=True,
        reduce_range=job["style"] == "cpu" and weight_bits() == 7,
        activation_type=QuantType[style["activation_type"]],
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[job["method"]],
        extra_options=options,
    )
    click.echo(json.dumps({"peak_bytes": _peak("self")}))


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.argument("images", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("-o", "folder", type=click.Path(path_type=Path), help="Keep the models here.")
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS)
@click.option("--style", "styles", type=click.Choice(list(STYLES)), multiple=True, default=list(STYLES))
@click.option("--count", type=int, help="Use the first so many images only.")
@click.option("--batch", default=4, show_default=True)
@click.option("--stride", type=int, help="Batches kept at a time; all, when not given.")
@click.option("--memory-limit", default=8.0, show_default=True, help="GiB at which to stop.")
@click.option("--save/--no-save", "keep", default=False, help="Write results/quantize_static.json.")
@click.option("--one", hidden=True, help="JSON: one model, in this process.")
def main(
    model: Path | None,
    images: Path | None,
    folder: Path | None,
    methods: tuple[str, ...],
    styles: tuple[str, ...],
    count: int | None,
    batch: int,
    stride: int | None,
    memory_limit: float,
    keep: bool,
    one: str | None,
) -> None:
    """Quantise MODEL with the uint8 IMAGES (an .npy file, or `images` of an .npz one) by every method."""
    if one:
        _one(json.loads(one))
        return
    if model is None or images is None:
        raise click.UsageError("MODEL and IMAGES are needed")
    stored = np.load(images)
    array = (stored if isinstance(stored, np.ndarray) else stored["images"])[:count]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for result in quantise(
            model, array, folder or Path(scratch), methods, styles, batch, stride, memory_limit * GIB
        ):
            rows.append({**asdict(result), "model": model.name, "stride": stride, "batch": batch})
            click.echo(
                f"{result.method} {result.style}, {result.images} images: {result.seconds:.1f} s, "
                f"{result.peak_bytes / GIB:.2f} GiB" + (f", {result.problem}" if result.problem else "")
            )
    if keep:
        click.echo(f"\nwritten to {save('quantize_static', {'rows': rows})}", err=True)


if __name__ == "__main__":
    main()
