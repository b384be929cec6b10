"""Concurrency: eight processes that build with one cache, the same model and different ones.

Each entry of the cache must be computed by one process while the others wait for it, or find it; every bundle must be
that of a build alone, byte for byte. Then the process that computes an entry is killed while others wait for it:
another has to take over, and all the rest must end. Then eight builds with a cache that may hold nothing, so that each
evicts what the others make. Writes reliability/results/concurrency.json; exit code 1 when a promise is broken.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import machine
from builds import CALIBRATED, SMALL, Place, bundle_facts, entries, wait, write_inputs

TARGET = ("--target", "onnxruntime")
SAME = ("build", *SMALL, "--int8", *CALIBRATED, *TARGET)
# They have weights, PyTorch's logits, the export or the calibration in common, by twos and threes.
DIFFERENT = (
    ("build", *SMALL, "--fp32", *TARGET),
    ("build", *SMALL, "--fp16", *TARGET),
    ("build", *SMALL, "--int8", *CALIBRATED, *TARGET),
    ("build", *SMALL, "--int8", "--keep", "fc", *CALIBRATED, *TARGET),
    ("build", *SMALL, "--fp16", "--input", "float32", *TARGET),
    ("build", "small.toml", "--weights", "synthetic:2", "--fp32", *TARGET),
    ("build", "small.toml", "--weights", "synthetic:2", "--fp16", *TARGET),
    ("build", "digits_resnext14_8x8d", "--fp16", *TARGET),
)
# Where the holder is killed: while it computes the n-th different entry that anybody computes.
MOMENTS = range(1, 8)


@dataclass
class Builder:
    """One of the processes."""

    number: int
    process: subprocess.Popen
    reader: threading.Thread | None = None
    computed: list[tuple[float, str]] = field(default_factory=list)  # when it began, and what


class Crowd:
    """Builders side by side in one place, each with an output of its own."""

    def __init__(
        self, place: Place, commands: Sequence[tuple[str, ...]], limit: str = "20", same: bool = False
    ) -> None:
        self.place, self.computing = place, threading.Condition()
        self.outputs = [f"bundle{0 if same else index}" for index in range(len(commands))]
        self.builders: list[Builder] = []
        for index, (arguments, output) in enumerate(zip(commands, self.outputs, strict=True)):
            process, marks = place.start("-", *arguments, "-o", output, RXDEPLOY_CACHE_LIMIT_GB=limit)
            builder = Builder(index, process)
            builder.reader = threading.Thread(target=self._read, args=(builder, marks))
            self.builders.append(builder)
        for builder in self.builders:
            assert builder.reader
            builder.reader.start()

    def _read(self, builder: Builder, marks: Any) -> None:
        for at, kind, what in marks:
            if kind == "compute":
                with self.computing:
                    builder.computed.append((at, what))
                    self.computing.notify_all()

    def events(self) -> list[tuple[float, str, Builder]]:
        """What has been begun to be computed so far, in order."""
        return sorted(
            ((at, what, builder) for builder in self.builders for at, what in builder.computed),
            key=lambda event: event[:2],
        )

    def finish(self, patience: float) -> None:
        """Wait for all; TimeoutError when one is stuck."""
        for builder in self.builders:
            wait(builder.process, patience)
        for builder in self.builders:
            assert builder.reader
            builder.reader.join()


class Prover:
    """Runs everything in `folder`, and collects what was promised and not kept."""

    def __init__(self, folder: Path, patience: float, seed: int) -> None:
        self._folder, self._patience = folder, patience
        self._random = random.Random(seed)
        self._inputs = write_inputs(folder / "inputs")
        self._places = 0
        self.problems: list[str] = []
        self._alone: dict[tuple[str, ...], Any] = {}

    def place(self) -> Place:
        self._places += 1
        return Place(self._folder / f"place{self._places}", self._inputs)

    def must(self, kept: bool, what: str, *details: Any) -> None:
        if not kept:
            self.problems.append(": ".join(map(str, (what, *details)))[:2000])

    def alone(self, arguments: tuple[str, ...], output: str) -> Any:
        """The bundle of a build that nobody disturbs. (Its command is in its manifest, and so its output's name.)"""
        command = (*arguments, "-o", output)
        if command not in self._alone:
            place = self.place()
            done = place.run(*command, patience=self._patience)
            self.must(done.code == 0, f"{' '.join(command)}: exit code {done.code}", done.err[-300:])
            self._alone[command] = bundle_facts(place.folder / output)
        return self._alone[command]

    def together(self, what: str, commands: Sequence[tuple[str, ...]], **options: Any) -> dict[str, Any]:
        """All at once with an empty cache; nothing is to be computed twice, unless the cache may hold nothing."""
        crowd, start = Crowd(self.place(), commands, **options), time.monotonic()
        self._finish(crowd, what)
        seconds = time.monotonic() - start
        self._all_right(crowd, commands, what, but=())
        counts = Counter(entry for _, entry, _ in crowd.events())
        if "limit" not in options:
            twice = [entry for entry, count in counts.items() if count > 1]
            self.must(not twice, f"{what}: computed twice", twice)
            self.must(set(entries_of(crowd.place)) == set(counts), f"{what}: other entries than were computed")
        workers = sum(bool(builder.computed) for builder in crowd.builders)
        return {
            "processes": len(commands),
            "entries": len(counts),
            "computed": sum(counts.values()),
            "processes_that_computed": workers,
            "seconds": round(seconds, 1),
        }

    def killed(self, commands: Sequence[tuple[str, ...]], moment: int) -> dict[str, Any]:
        """Kill who computes the `moment`-th entry; how long it took until another began with it, if it had to.

        Nothing when that process had done all of its work before the kill.
        """
        crowd, what = Crowd(self.place(), commands), f"holder of entry {moment} killed"
        at = lambda: crowd.events()[moment - 1 : moment]  # noqa: E731
        with crowd.computing:
            crowd.computing.wait_for(lambda: bool(at()), self._patience)
        if not at():
            self.must(False, f"{what}: it was never computed")
            return {}
        _, entry, holder = at()[0]
        time.sleep(self._random.random() * 0.2)
        os.killpg(holder.process.pid, signal.SIGKILL)
        holder.process.wait()
        died, finished_first = time.monotonic(), (crowd.place.cache / "stages" / entry).exists()
        but = (holder.number,) if holder.process.returncode else ()
        self._finish(crowd, what, *but)
        self._all_right(crowd, commands, what, but)
        if not but:
            return {}
        again = [event for event in crowd.events() if event[1] == entry and event[2] is not holder]
        wanted = range(1, 2) if not finished_first and len(set(commands)) == 1 else range(2)  # others may not need it
        self.must(len(again) in wanted, f"{what}: {entry} was computed {len(again)} times after it")
        others = Counter(name for _, name, builder in crowd.events() if builder is not holder)
        self.must(max(others.values(), default=0) <= 1, f"{what}: computed twice", others.most_common(1))
        takeover = round(again[0][0] - died, 3) if again else None
        return {"stage": entry.partition("-")[0], "was_done": finished_first, "taken_over_after_seconds": takeover}

    def _finish(self, crowd: Crowd, what: str, but: int = -1) -> None:
        try:
            crowd.finish(self._patience)
        except TimeoutError as error:
            self.must(False, what, error)
        for builder in crowd.builders:
            expected = -signal.SIGKILL if builder.number == but else 0
            code = builder.process.returncode
            self.must(code == expected, f"{what}: process {builder.number} ended with {code}")

    def _all_right(self, crowd: Crowd, commands: Sequence[tuple[str, ...]], what: str, but: tuple[int, ...]) -> None:
        place = crowd.place
        for index, (arguments, output) in enumerate(zip(commands, crowd.outputs, strict=True)):
            if index in but:
                continue
            same = bundle_facts(place.folder / output) == self.alone(arguments, output)
            self.must(same, f"{what}: {output} is not that of a build alone")
        self.must(not (locked := place.locked()), f"{what}: locks are held", locked)
        self.must("damaged" not in entries(place.cache).values(), f"{what}: a damaged entry")
        if but:  # its temporaries may still be there; the next command sweeps
            place.run("cache", patience=self._patience)
            done = place.run(*commands[0], "-o", crowd.outputs[0], patience=self._patience)
            self.must(done.code == 0, f"{what}: the next build", done.err[-300:])
        self.must(not (left := place.leftovers()), f"{what}: temporaries are left", left)


def entries_of(place: Place) -> list[str]:
    """The names of the cache's entries."""
    return [folder.name for folder in (place.cache / "stages").glob("[!.]*")]


@click.command()
@click.option("--processes", default=8, show_default=True)
@click.option("--kills", default=10, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--patience", default=300.0, show_default=True, help="Seconds after which a process is stuck.")
@click.option("--save/--no-save", "keep", default=True, help="Write results/concurrency.json.")
def main(processes: int, kills: int, seed: int, patience: float, keep: bool) -> None:
    """Prove it, print it, and write results/concurrency.json."""
    moments = random.Random(seed)
    same = [SAME] * processes
    different = [DIFFERENT[index % len(DIFFERENT)] for index in range(processes)]
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        prover = Prover(Path(folder), patience, seed)
        result: dict[str, Any] = {
            "seed": seed,
            "same": prover.together("the same", same),
            "same_output": prover.together("the same, to one folder", same, same=True),
            "different": prover.together("different ones", different),
            "no_room": prover.together("different ones in a cache without room", different, limit="0"),
        }
        for name in ("same", "same_output", "different", "no_room"):
            part = result[name]
            click.echo(
                f"{name}: {part['processes']} processes, {part['entries']} entries, computed {part['computed']} times "
                f"by {part['processes_that_computed']} processes, {part['seconds']} s"
            )
        killed: list[dict[str, Any]] = []
        for index in range(4 * kills):
            if len(killed) < kills:
                found = prover.killed((same, different)[index % 2], moments.choice(MOMENTS))
                killed += [found] if found else []
    waits = [each["taken_over_after_seconds"] for each in killed if each.get("taken_over_after_seconds") is not None]
    result |= {"kills": killed, "most_seconds_to_take_over": max(waits, default=None), "problems": prover.problems}
    done = sum(each["was_done"] for each in killed)
    click.echo(
        f"{len(killed)} holders killed, in {dict(Counter(each.get('stage') for each in killed))}: {len(waits)} entries "
        f"were taken over, after at most {max(waits, default=0)} s; {done} were done a moment before, "
        "the others nobody else needed"
    )
    if keep:
        machine.RESULTS = Path(__file__).parent / "results"
        click.echo(machine.save("concurrency", result), err=True)
    for problem in prover.problems[:20]:
        click.echo(f"broken: {problem}", err=True)
    if prover.problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
