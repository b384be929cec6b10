"""int8 on a CPU that has AVX2 and no more, for which the aim of 1.1 over OpenVINO was set, shown on one that has more.

OpenVINO is held to AVX2 by oneDNN's own switch (ONEDNN_MAX_CPU_ISA; the names of the kernels that it then runs are
kept). rxdeploy is told of AVX2 alone, so that weights have 7 bits, for it as for ONNX Runtime's `quantize_static`. ONNX
Runtime has no such switch: it takes no part, neither as a peer nor as an engine that the tuning may choose. Everything
else is as in peers.py, and the clock and caches are those of the machine. Writes results/avx2.json.

    python benchmarks/avx2.py --models gluon_resnext50_32x4d --work DIR
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import contenders
import peers
from contenders import LARGEST, OURS, UNSIGNED
from machine import RESULTS, save

from rxdeploy.bench import machine
from rxdeploy.calibration.cpu import weight_bits
from rxdeploy.runtime.openvino import import_openvino
from rxdeploy.tuning import device

ISA, AIM = "AVX2", 1.1


@click.command()
@click.option("--models", default=",".join(peers.MODELS), show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=0.3, show_default=True, help="Of a turn, and one call at least.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where models are made and kept.")
def main(models: str, rounds: int, seconds: float, work: Path) -> None:
    """Tune each of MODELS for OpenVINO on AVX2, and time it beside OpenVINO on the file of `quantize_static`."""
    path = RESULTS / "avx2.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result.pop("machine", None)
    for model in models.split(","):
        folder = work / model
        with held():
            piece = measure(model, folder, rounds, seconds)
        result[model] = piece
        click.echo(f"{model}: {piece['over_openvino']:.3f} over OpenVINO (aim {AIM}): {json.dumps(piece, indent=1)}")
        click.echo(save("avx2", {**result, "isa": ISA, "batch": LARGEST}))


def measure(model: str, folder: Path, rounds: int, seconds: float) -> peers.Piece:
    """What peers.py finds, and what of it shows that everything was held to AVX2."""
    contenders.prepare(model, "int8", folder)
    piece = peers.speed(model, "int8", LARGEST, folder, rounds, seconds)
    manifest = json.loads((folder / "ours-int8" / "manifest.json").read_text())
    return piece | {
        "groups": manifest["tuning"]["groups"],
        "cpu": manifest["tuning"]["cpu"],
        "kernels": kernels(folder / f"{UNSIGNED}.onnx"),
        "weight_bits": weight_bits(),
        "over_openvino": min(each["time_over_ours"] for name, each in piece["contenders"].items() if name != OURS),
        "aim": AIM,
    }


@contextmanager
def held() -> Iterator[None]:
    """rxdeploy sees no more than AVX2, and OpenVINO as the only engine to tune for and to race against.

    Not so when results are saved: the machine's facts are its own.
    """
    cpuinfo, installed_version, all_contenders = machine._cpuinfo, device.installed_version, peers.contenders

    def of_avx2() -> dict[str, str]:
        facts = cpuinfo()
        flags = (flag for flag in facts.get("flags", "").split() if not flag.startswith(("avx512", "avx_", "amx")))
        return facts | {"flags": " ".join(flags)}

    def without_onnx_runtime(names: tuple[str, ...]) -> str | None:
        return None if "onnxruntime" in names else installed_version(names)

    def of_openvino(precision: Any, batch: int) -> Any:
        return tuple(
            each
            for each in all_contenders(precision, batch)
            if each.name == OURS or ("OpenVINO" in each.name and (UNSIGNED in each.name or each.operations))
        )

    os.environ["ONEDNN_MAX_CPU_ISA"] = ISA  # before OpenVINO is loaded; each contender's process inherits it
    with (
        patch.object(machine, "_cpuinfo", of_avx2),
        patch.object(device, "installed_version", without_onnx_runtime),
        patch.object(peers, "contenders", of_openvino),
    ):
        yield


def kernels(path: Path) -> list[str]:
    """The kernels that OpenVINO runs the file with: nothing of AVX-512 may be among the convolutions'."""
    compiled = import_openvino().Core().compile_model(str(path), "CPU")
    operators = compiled.get_runtime_model().get_ordered_ops()
    facts = [{name: each.astype(str) for name, each in operator.get_rt_info().items()} for operator in operators]
    return sorted({each["primitiveType"] for each in facts if each["layerType"] == "Convolution"})


if __name__ == "__main__":
    main()
