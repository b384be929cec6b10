"""What the main job costs: a cold build of gluon_resnext101_64x4d in float16, and the same command again.

Each command is a fresh process; the first starts with an empty cache. Peak memory is the kernel's count of
the process (ru_maxrss). Run with `make bench` or `python benchmarks/build.py`; writes results/build.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from machine import save

from rxdeploy.cards import find_card

HELP_RUNS = 11


@click.command()
@click.option("--model", default="gluon_resnext101_64x4d", show_default=True)
@click.option("--save/--no-save", "keep", default=True, help="Write results/build.json.")
def main(model: str, keep: bool) -> None:
    """Measure a cold build, a repeated one, and --help."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["build", model, "--fp16", "--weights", "synthetic", "-o", f"{folder}/bundle", "--json"]
        environment = os.environ | {"RXDEPLOY_CACHE": f"{folder}/cache"}
        cold, again = (_measure(command, environment) for _ in range(2))
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder, "bundle").iterdir())}
    help_seconds = statistics.median(_measure(["--help"], dict(os.environ))["seconds"] for _ in range(HELP_RUNS))
    card = find_card(model)
    result = {
        "command": "rxdeploy " + " ".join(command).replace(folder, "DIR"),
        "cold": cold,
        "again": again,
        "help_seconds_median": help_seconds,
        "bundle_bytes": sizes,
        "weights_file_bytes": card.weights.file_size,
    }
    _print(result)
    if keep:
        click.echo(f"\nwritten to {save('build', result)}", err=True)


def _measure(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Seconds, peak memory and stages of one command in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "rxdeploy", *arguments], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"rxdeploy {' '.join(arguments)} failed with status {os.waitstatus_to_exitcode(status)}")
    stages = json.loads(output)["stages"] if "--json" in arguments else []
    for stage in stages:
        stage["detail"] = stage["detail"].replace(str(Path(arguments[-2]).parent), "DIR")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "stages": stages}


def _print(result: dict[str, Any]) -> None:
    for name in ("cold", "again"):
        run = result[name]
        click.echo(f"{name}: {run['seconds']:.1f} s, peak memory {run['peak_bytes'] / 2**30:.2f} GiB")
        for stage in run["stages"]:
            took = (
                "reused" if stage["reused"] else f"{stage['seconds']:.1f} s ({stage['seconds'] / run['seconds']:.0%})"
            )
            click.echo(f"  {stage['stage']:<14} {took}")
    click.echo(f"--help: {result['help_seconds_median']:.3f} s (median of {HELP_RUNS})")
    total, weights = sum(result["bundle_bytes"].values()), result["weights_file_bytes"]
    click.echo(f"bundle: {total / 1e6:.1f} MB, {total / weights:.2f} times the published weights file")


if __name__ == "__main__":
    main()
