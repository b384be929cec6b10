"""What a serving host costs: installed size and import time of rxdeploy with each of its runtime extras.

Each extra goes into a fresh virtual environment from the package index that pip knows. Writes results/install.json.
An extra that cannot be installed here is listed with pip's reason.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import click
from machine import save

ROOT = Path(__file__).parent.parent
EXTRAS = ("", "cpu", "gpu", "rtx", "lean", "tensorrt")
MODULES = {"cpu": "onnxruntime", "gpu": "onnxruntime", "rtx": "tensorrt_rtx", "lean": "tensorrt_lean"}
PROCESSES = 9


@click.command()
@click.option("--extras", default=",".join(EXTRAS), show_default=True)
def main(extras: str) -> None:
    """Measure every extra."""
    rows = []
    for extra in extras.split(","):
        row = measure(extra)
        rows.append(row)
        click.echo(row)
    click.echo(save("install", {"rows": rows}))


def measure(extra: str) -> dict[str, Any]:
    """Bytes in the environment and seconds of import; what failed, when it does."""
    name = f"rxdeploy[{extra}]" if extra else "rxdeploy"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        before = _size(Path(folder))
        where = f"{ROOT}[{extra}]" if extra else str(ROOT)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", where]
        done = subprocess.run([*command, "-c", str(ROOT / "constraints.txt")], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            return {"install": name, "not installed": lines[0].strip() if lines else f"pip gives {done.returncode}"}
        row: dict[str, Any] = {
            "install": name,
            "installed_bytes": _size(Path(folder)) - before,
            "packages": len(_packages(python)),
        }
        subprocess.run([str(python), "-m", "compileall", "-q", str(Path(folder) / "lib")], capture_output=True)
        bare = _import_seconds(python, "pass")
        row["import_rxdeploy_runtime_seconds"] = _import_seconds(python, "import rxdeploy.runtime") - bare
        if extra in MODULES:
            whole = _import_seconds(python, f"import rxdeploy.runtime, {MODULES[extra]}")
            row[f"with_{MODULES[extra]}_seconds"] = whole - bare
        return row


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def _packages(python: Path) -> list[str]:
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True)
    names = (line.partition("==")[0] for line in listed.stdout.splitlines())
    return [name for name in names if name not in ("pip", "setuptools")]


def _import_seconds(python: Path, code: str) -> float:
    """The median time of fresh processes."""
    times = []
    for _ in range(PROCESSES):
        begin = time.perf_counter()
        subprocess.run([str(python), "-c", code], check=True, cwd="/", capture_output=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
