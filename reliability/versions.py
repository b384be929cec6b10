"""Which versions work: the tests of what depends on torch, ONNX, ONNX Runtime, NumPy and the rest, once an environment.

An environment is a Python and a set of versions: `lock`, what CI installs; `lowest`, the minimums that pyproject.toml
declares; `highest`, what the index has today of everything that the product itself asks for. Each is installed fresh,
the first two with hashes. A torch that comes as a CUDA build runs on stand-ins for CUDA (standin_cuda.py), so of CUDA
nothing is downloaded, and nothing is tested. A Python that is not here is listed as not run.

Writes reliability/results/versions.json; exit code 1 when a test fails. Needs the packages' index, cc and readelf.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import machine
import standin_cuda

from rxdeploy.cards.card import tomllib

ROOT = Path(__file__).resolve().parents[1]
machine.RESULTS = Path(__file__).parent / "results"
CELLS = ("3.10-lock", "3.11-lock", "3.12-lock", "3.13-lock", "3.10-lowest", "3.11-lowest", "3.11-highest")
REPORTED = ("torch", "onnx", "onnxruntime", "numpy", "onnx-ir", "openvino", "msgspec", "safetensors", "pillow", "click")
SERVED = ("cpu", "openvino", "build", "bench")  # extras whose packages `highest` raises
# Every stage's tests against an independent reference, without the long ones: about two minutes of one core a cell.
TESTS = (
    "tests/export",
    "tests/calibration/test_cpu.py",
    "tests/calibration/test_ranges.py",
    "tests/calibration/test_recipe.py",
    "tests/calibration/test_weights.py",
    "tests/cards/test_card.py",
    "tests/engines/test_options.py",
    "tests/bench",
    "tests/runtime/test_arrays.py",
    "tests/runtime/test_cpu.py",
    "tests/runtime/test_openvino.py",
    "tests/runtime/test_preprocess.py",
    "tests/runtime/test_metrics.py",
    "tests/test_doctor.py",
)
LONG = (
    "--deselect=tests/export/test_graph.py::test_equals_the_module[stem as wide as the first output-3]",
    "--deselect=tests/runtime/test_openvino.py::test_every_batch_size_gives_the_same_logits",
)


@click.command()
@click.option("--cells", default=",".join(CELLS), show_default=True, help="PYTHON-SET,... to run.")
@click.argument("pytest_options", nargs=-1, type=click.UNPROCESSED)
def main(cells: str, pytest_options: tuple[str, ...]) -> None:
    """Run every cell and say how it went."""
    kept = machine.RESULTS / "versions.json"
    earlier = json.loads(kept.read_text())["cells"] if kept.exists() else []
    rows = {row["cell"]: row for row in earlier if row["cell"] in CELLS}
    failed = False
    for cell in cells.split(","):
        row = {"cell": cell} | run_cell(*cell.split("-"), pytest_options)
        rows[cell] = row
        failed |= bool(row.get("failed"))
        click.echo(describe(row))
        ordered = sorted(rows.values(), key=lambda row: CELLS.index(row["cell"]))
        machine.save("versions", {"tests": TESTS, "without": LONG, "cells": ordered})
    sys.exit(1 if failed else 0)


def run_cell(python: str, which: str, pytest_options: tuple[str, ...]) -> dict[str, Any]:
    """Make the environment, test in it and remove it. A failed installation is a failure too."""
    interpreter = f"python{python}"
    if not shutil.which(interpreter) or subprocess.run([interpreter, "-V"], capture_output=True).returncode:
        return {"not run": f"no {interpreter} here"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        bin_ = Path(folder) / "bin"
        try:
            standins = install(bin_, which)
        except subprocess.CalledProcessError as error:
            return {"failed": [f"not installed: {_last_line(error.stderr)}"]}
        freeze = json.loads(_pip(bin_, "list", "--format=json"))
        found = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in freeze}
        check = subprocess.run([bin_ / "pip", "check"], capture_output=True, text=True).stdout.splitlines()
        unmet = [line for line in check if not (standins and re.search(r"requires (nvidia-|cuda-|triton)", line))]
        row: dict[str, Any] = {
            "python": subprocess.run([bin_ / "python", "-V"], capture_output=True, text=True).stdout.split()[1],
            "versions": {name: found[name] for name in REPORTED},
            "cuda_stand_ins": len(standins),
            "unmet": [line for line in unmet if "No broken" not in line],
        }
        return row | run_tests(bin_, Path(folder), pytest_options)


def install(bin_: Path, which: str) -> list[str]:
    """The versions of the set and rxdeploy; returns the stand-ins that torch got."""
    requirements = ROOT / "requirements"
    if which == "lowest":
        _pip(bin_, "install", "--no-deps", "--require-hashes", "-r", str(requirements / "lowest.txt"))
        _pip(bin_, "install", "--no-deps", *_setuptools())
    else:
        locked = ("install", "--no-deps", "--require-hashes", "-r")
        _pip(bin_, *locked, str(requirements / "lock.txt"))
        try:
            _pip(bin_, *locked, str(requirements / "torch-cpu.txt"))
        except subprocess.CalledProcessError:
            _pip(bin_, *locked, str(requirements / "torch.txt"))
    if which == "highest":
        wanted = _direct()
        _pip(bin_, "install", "--upgrade", "--upgrade-strategy=eager", *(name for name in wanted if name != "torch"))
        _pip(bin_, "install", "--upgrade", "--no-deps", "torch")
    _pip(bin_, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    (torch_lib,) = bin_.parent.glob("lib/python*/site-packages/torch/lib")
    return standin_cuda.install(torch_lib)


def run_tests(bin_: Path, folder: Path, pytest_options: tuple[str, ...]) -> dict[str, Any]:
    """Counts, and the failed tests by name with their last line."""
    report = folder / "report.xml"
    command = [bin_ / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command.append("--continue-on-collection-errors")
    done = subprocess.run([*command, *LONG, *pytest_options, *TESTS], cwd=ROOT, capture_output=True, text=True)
    if not report.exists():
        return {"failed": [f"pytest gives {done.returncode}: {_last_line(done.stdout + done.stderr)}"]}
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {bad.get('message', '')[:99]}: {_last_line(bad.text or '')[:99]}"
        for case in suite.iter("testcase")
        for bad in case
        if bad.tag in ("failure", "error")
    ]
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    return {"passed": total - skipped - len(failed), "skipped": skipped, "failed": failed}


def describe(row: dict[str, Any]) -> str:
    """A few lines for people."""
    if "versions" not in row:
        return f"{row['cell']}: {row.get('not run') or row['failed'][0]}"
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    torch = " (torch on stand-ins for CUDA)" if row["cuda_stand_ins"] else ""
    counts = f"{row.get('passed', 0)} passed, {len(row['failed'])} failed, {row.get('skipped', 0)} skipped"
    return "\n  ".join([f"{row['cell']}: {counts}: {versions}{torch}", *row["unmet"], *row["failed"]])


def _direct() -> list[str]:
    """What the product itself asks for, without its versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in SERVED)]
    lines = (line for requirements in lists for line in requirements if "python_version" not in line)
    return sorted({re.split(r"[\[<>=;! ]", line, maxsplit=1)[0] for line in lines})


def _setuptools() -> list[str]:
    """What builds rxdeploy, which the lowest torch does not bring."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])


def _pip(bin_: Path, *arguments: str) -> str:
    command = [
        bin_ / "python",
        "-m",
        "pip",
        *arguments,
        *(["--quiet", "--no-compile"] if arguments[0] == "install" else []),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1].strip() if lines else "no word of why"


if __name__ == "__main__":
    main()
