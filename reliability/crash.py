"""Crash safety: SIGKILL in the middle of everything that writes, full disks, and caches that cannot be written.

Each kill takes a command of `rxdeploy`, a cache that holds some of what it needs, and a stage; by turns it falls at a
random moment of that stage, or before a random operation of it that changes a file (or half-way through one). Then
nobody may hold a lock, every bundle and entry of the cache must be whole and of one build, and the same command
once more must give what a command that nobody disturbed gives, byte for byte, and leave no temporary file. Then the
same with disks too small for the command, and with read-only caches. Writes reliability/results/crash.json; exit
code 1 when a promise is broken.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import machine
from builds import CALIBRATED, ORDINARY, SMALL, Place, Timeline, bundle_facts, entries, tree, wait, write_inputs

from rxdeploy.engines.bundle import MANIFEST

DIGITS = "digits_resnext14_8x8d"
# What a stage keeps in the cache: killed there, it must not find it.
KEPT = {
    "export": "export",
    "validate": "validate",
    "precision": "precision",
    "pack": "tuned",
    "calibrate": "calibrate",
    "tune": "tuning",
    "engine": "engine",
}
FULL = "No space left on device"
NOBODY = 65534
_TRIES = 40  # to kill a command before it ends; some take little longer than their interpreter


@dataclass(frozen=True)
class Command:
    """Something to kill. `before` is run first and leaves an older `output`, which may be replaced."""

    name: str
    share: int  # of the kills
    arguments: tuple[str, ...]
    output: str
    before: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # a bundle to work on, by a command with this output
    limit: str = "20"  # gigabytes that the cache may hold
    measures: bool = False  # what comes out depends on times, so that only its soundness can be compared


COMMANDS = (
    Command(
        "build with a plan",
        *(40, ("build", DIGITS, "--target", "tensorrt-rtx", "-o", "bundle"), "bundle"),
        before=("build", DIGITS, "--target", "tensorrt-rtx", "--input", "float32", "-o", "bundle"),
    ),
    Command(
        "build without",
        *(30, ("build", *SMALL, "--target", "onnxruntime", "-o", "bundle"), "bundle"),
        before=("build", *SMALL, "--target", "onnxruntime", "--input", "float32", "-o", "bundle"),
    ),
    Command(
        "build int8",
        *(45, ("build", *SMALL, "--int8", *CALIBRATED, "--target", "onnxruntime", "-o", "bundle"), "bundle"),
        before=("build", *SMALL, "--int8", "--keep", "fc", *CALIBRATED, "--target", "onnxruntime", "-o", "bundle"),
    ),
    Command("export", 10, ("export", *SMALL, "-o", "model.onnx", "--overwrite"), "model.onnx"),
    Command("calibrate", 15, ("calibrate", *SMALL, *CALIBRATED, "-o", "c.json", "--overwrite"), "c.json"),
    Command(
        "evict",
        *(25, ("build", *SMALL, "--target", "onnxruntime", "-o", "bundle"), "bundle"),
        limit="0",
    ),
    Command("clear the cache", 10, ("cache", "--clear"), ""),
    Command(
        "package",
        *(9, ("package", "bundle", "--format", "triton", "-o", "repository", "--overwrite"), "repository"),
        needs=("build", *SMALL, "--target", "onnxruntime", "-o", "bundle"),
    ),
    Command(
        "evaluate",
        *(8, ("evaluate", "bundle", "--data", "images", "--save-baseline", "baseline.json"), "baseline.json"),
        needs=("build", *SMALL, "--target", "onnxruntime", "-o", "bundle"),
    ),
    Command(
        "build --tune",
        *(
            4,
            ("build", *SMALL, "--fp32", "--target", "onnxruntime", "--tune", "--batch", "1", "-o", "bundle"),
            "bundle",
        ),
        measures=True,
    ),
    Command(
        "tune",
        *(4, ("tune", "bundle", "--batch", "1"), "bundle"),
        needs=("build", *SMALL, "--fp32", "--target", "onnxruntime", "-o", "bundle"),
        measures=True,
    ),
)


@dataclass
class Known:
    """What a command does and leaves when nobody disturbs it."""

    command: Command
    place: Place
    timeline: Timeline
    before: Path | None  # the older output
    result: Any
    entries: dict[str, str]
    cache: Path  # with everything in it


class Prover:
    """Runs everything in `folder`, and collects what was promised and not kept."""

    def __init__(self, folder: Path, seed: int, patience: float) -> None:
        self.folder, self.patience = folder, patience
        self.seed = seed
        self.problems: list[str] = []
        self._inputs = write_inputs(folder / "inputs")
        self._places = itertools.count(1)

    def place(self) -> Place:
        return Place(self.folder / f"place{next(self._places)}", self._inputs)

    def must(self, kept: bool, what: str, *details: Any) -> None:
        if not kept:
            self.problems.append(": ".join(map(str, (what, *details)))[:2000])

    def do(self, place: Place, *arguments: str, what: str, **changes: str) -> None:
        """A command that has to succeed."""
        done = place.run(*arguments, patience=self.patience, **changes)
        self.must(done.code == 0, f"{what}: exit code {done.code}", done.err.strip()[-300:])

    # Learning

    def learn(self, command: Command) -> Known:
        """Run it undisturbed: twice, and what the two have not in common cannot be promised."""
        place = self.place()
        before = None
        for arguments in (command.before, command.needs):
            if arguments:
                self.do(place, *arguments, what=f"{command.name}, before")
        if command.before:
            before = place.folder / "before"
            shutil.copytree(place.folder / command.output, before)
        if command.name in ("evict", "clear the cache"):
            self.do(place, "build", *SMALL, "--target", "onnxruntime", "-o", "bundle", what=command.name)
        full = place.folder / "full"
        if place.cache.exists():
            shutil.copytree(place.cache, full)
        started_with = self.filled(command, place)
        timeline = started_with.timeline(
            *command.arguments, patience=self.patience, RXDEPLOY_CACHE_LIMIT_GB=command.limit
        )
        if command.limit != "0" and command.output:
            shutil.rmtree(full, ignore_errors=True)
            if started_with.cache.exists():
                shutil.copytree(started_with.cache, full)
        full.mkdir(exist_ok=True)
        known = entries(full)
        return Known(command, place, timeline, before, self.result(command, started_with), known, full)

    def filled(self, command: Command, known: Place) -> Place:
        """A new place with what the command works on, and the whole cache where that is what it is about."""
        place = self.place()
        if command.needs:
            shutil.copytree(known.folder / "bundle", place.folder / "bundle")
        if command.limit == "0" or not command.output:
            shutil.copytree(known.folder / "full", place.cache)
        return place

    def result(self, command: Command, place: Place) -> Any:
        """What the command left, with its soundness checked on the way."""
        path = place.folder / command.output
        if not command.output:
            return None
        if (path / MANIFEST).exists():
            facts = bundle_facts(path)
            return sorted(facts) if command.measures else facts
        return tree(path) if path.is_dir() else path.read_bytes()

    # Killing

    def kill(self, known: Known, number: int) -> dict[str, Any] | None:
        """The `number`-th kill of a command, and what came after; None when the command ended before it."""
        command, by_operation = known.command, number % 2 == 0
        chance = random.Random(f"{self.seed} {command.name} {number}")
        place, older = self.filled(command, known.place), False
        stage = chance.choice(list(known.timeline.operations if by_operation else known.timeline.seconds))
        if command.output and command.limit != "0":
            self.fill(place, known, stage, chance)
        if known.before and chance.random() < 0.5:
            shutil.copytree(known.before, place.folder / command.output)
            older = True
        killed_in, kind = self.disturb(place, known, stage, by_operation, chance)
        if not killed_in:
            shutil.rmtree(place.folder)
            return None
        what = f"{command.name}, killed in {killed_in}"
        left = place.leftovers()
        self.inspect(place, known, older, what)
        seconds = self.recover(place, known, what)
        shutil.rmtree(place.folder)
        return {
            "command": command.name,
            "stage": killed_in,
            "at": kind,
            "temporaries_left": len(left),
            "again_seconds": round(seconds, 2),
        }

    def fill(self, place: Place, known: Known, stage: str, chance: random.Random) -> None:
        """Give the place nothing, or a part of the cache: not what `stage` makes, and of the rest what chance says."""
        if chance.random() < 0.2:
            return
        kept = KEPT.get(stage.partition(" ")[0], "-")
        for folder in sorted((known.cache / "stages").glob("*")) if (known.cache / "stages").exists() else ():
            if not folder.name.startswith(f"{kept}-") and chance.random() < 0.85:
                shutil.copytree(folder, place.cache / "stages" / folder.name)

    def disturb(
        self, place: Place, known: Known, stage: str, by_operation: bool, chance: random.Random
    ) -> tuple[str, str]:
        """Run the command and kill it; the stage it was in, or nothing, and what it had done last."""
        number = chance.randint(1, max(1, known.timeline.operations.get(stage, 1)))
        delay = chance.random() * known.timeline.seconds.get(stage, 0.0)
        arguments, limit = known.command.arguments, known.command.limit
        kill = f"{stage}:{number}" if by_operation else "-"
        process, marks = place.start(kill, *arguments, RXDEPLOY_CACHE_LIMIT_GB=limit)
        where, last, sent = "interpreter", "", False
        for _, mark, what in marks:
            if mark == "stage":
                where = what
                if not by_operation and not sent and what == stage:
                    sent = self.killed_later(process, delay)
            last = f"{mark} {what}"
        wait(process, self.patience)
        if process.returncode == -signal.SIGKILL:
            return where, f"operation {number} ({last} was the last)" if by_operation else f"{delay:.3f} s"
        self.must(process.returncode == 0, f"{known.command.name}: exit code {process.returncode}", self.said(place))
        return "", ""

    @staticmethod
    def killed_later(process: subprocess.Popen, delay: float) -> bool:
        deadline = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(min(0.002, delay))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        return True

    @staticmethod
    def said(place: Place) -> str:
        return (place.folder / "out").read_text()[-300:]

    def inspect(self, place: Place, known: Known, older: bool, what: str) -> None:
        """Right after the kill, when nobody has cleaned up yet."""
        self.must(not (locked := place.locked()), f"{what}: locks are held", locked)
        for name, found in entries(place.cache, known.command.measures).items():
            self.must(
                found == "whole" or found == known.entries.get(name), f"{what}: the cache has a wrong entry", name
            )
        path = place.folder / known.command.output
        if not known.command.output or not path.exists():
            self.must(not older, f"{what}: the older output is gone")
            return
        if path.is_dir() and (path / MANIFEST).exists():
            found = bundle_facts(path)
            allowed = [bundle_facts(known.before)] if older and known.before else []
            allowed += (
                [known.result, bundle_facts(known.place.folder / "bundle")] if known.command.needs else [known.result]
            )
            self.must(found in allowed or known.command.measures, f"{what}: the bundle is of neither build")
        elif path.is_dir():  # a repository, whose models are folders of their own
            self.must(all(tree(path).get(n) == d for n, d in known.result.items()) or not tree(path, _temporary), what)
        else:
            self.must(self.result(known.command, place) == known.result, f"{what}: {path.name} is half there")

    def recover(self, place: Place, known: Known, what: str) -> float:
        """The command again, which must end in time with what it always gives; seconds that it took."""
        start = time.monotonic()
        try:
            self.do(place, *known.command.arguments, what=f"{what}, again")
        except TimeoutError as error:
            self.must(False, what, error)
        seconds = time.monotonic() - start
        self.same(place, known, f"{what}, again")
        return seconds

    def same(self, place: Place, known: Known, what: str, cached: bool = True) -> None:
        """What the command left is what it always leaves."""
        try:
            self.must(self.result(known.command, place) == known.result, f"{what}: the result differs")
        except Exception as error:
            self.must(False, f"{what}: the result cannot be used", error)
        if cached and known.command.output and not known.command.measures:
            there = entries(place.cache)
            for name, found in known.entries.items():
                self.must(there.get(name) in (found, None), f"{what}: the cache's {name} differs")
        self.must(not (left := place.leftovers()), f"{what}: temporaries are left", left)

    # Full disks

    def full_disk(self, known: Known, size: int, output: bool) -> dict[str, Any] | None:
        """The command with a disk of `size` bytes for its output or its cache; None when that was enough."""
        command = known.command
        place = self.filled(command, known.place)
        what = f"{command.name}, {size} bytes for its {'output' if output else 'cache'}"
        disk = place.folder / ("disk" if output else "cache")
        older = bool(known.before and output)
        room = size + (_size(known.before) if older and known.before else 0)
        with small_disk(disk, room) as resize:
            here = place.within(disk) if output else place
            if older and known.before:
                shutil.copytree(known.before, disk / command.output)
            done = here.run(*command.arguments, patience=self.patience)
            if done.code:
                errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
                self.must(done.code == 3, f"{what}: exit code {done.code}", done.err.strip()[-300:])
                self.must(len(errors) == 1 and FULL in errors[0], f"{what}: not one clear error", done.err[-300:])
                left = place.leftovers(interrupted=True)
                self.must(not left, f"{what}: temporaries are left", left)
                path = disk / command.output
                if older and known.before:
                    self.must(tree(path) == tree(known.before), f"{what}: the older output was lost")
                elif output:
                    self.must(not path.exists(), f"{what}: the output is there all the same")
                resize(256 << 20)
                self.do(here, *command.arguments, what=f"{what}, then more")
                if output:
                    shutil.copytree(path, place.folder / command.output)
                self.same(place, known, f"{what}, then more")
        shutil.rmtree(place.folder)
        error = next((line for line in done.err.splitlines() if line.startswith("error: ")), "")
        error = error.replace(str(self.folder), "")
        return (
            {"command": command.name, "bytes": size, "for": "output" if output else "cache", "error": error}
            if error
            else None
        )

    # Caches that cannot be written

    def read_only(self, known: Known, having: str, how: str) -> dict[str, Any]:
        """The command with a cache of which nothing, half or all is there, on a read-only disk or another user's."""
        command = known.command
        place = self.filled(command, known.place)
        what = f"{command.name}, {how} cache that has {having}"
        chance = random.Random(f"{self.seed} {what}")
        (place.cache / "stages").mkdir(parents=True, exist_ok=True)
        for folder in sorted((known.cache / "stages").glob("*")):
            if having == "all" or (having == "half" and chance.random() < 0.5):
                shutil.copytree(folder, place.cache / "stages" / folder.name)
        before = tree(place.cache)
        if how == "another user's":
            for path in (place.cache, *place.cache.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        with read_only(place.cache) if how == "read-only" else _nothing():
            done = place.run(*command.arguments, patience=self.patience, ordinary=how == "another user's")
            self.must(done.code == 0, f"{what}: exit code {done.code}", done.err.strip()[-300:])
            warned = [line for line in done.err.splitlines() if "cannot be written" in line]
            self.must(len(warned) == 1, f"{what}: {len(warned)} warnings")
            self.must(tree(place.cache) == before, f"{what}: it changed")
            self.same(place, known, what, cached=False)
            reused = sum(" reused " in line for line in done.err.splitlines())
        shutil.rmtree(place.folder)
        return {"command": command.name, "cache": how, "has": having, "stages_reused": reused}


def _temporary(name: str) -> bool:
    return ".rxdeploy-" in name


def _size(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of that many bytes, and what gives it another size."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True, capture_output=True)
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` mounted over itself without leave to write."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def why_no_mounts(folder: Path) -> str:
    """Why file systems cannot be mounted here; nothing when they can."""
    try:
        with small_disk(folder, 1 << 20):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return str(getattr(error, "stderr", b"") or error)


def why_no_ordinary_user() -> str:
    """Why commands cannot be run without root's leave to write everywhere; nothing when they can."""
    try:
        subprocess.run([*ORDINARY, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return str(getattr(error, "stderr", b"") or error)
    return ""


def kills(prover: Prover, known: list[Known], count: int, jobs: int) -> list[dict[str, Any]]:
    """So many kills, spread over the commands by their shares."""
    total = sum(each.command.share for each in known)
    quotas = [count * each.command.share // total for each in known]
    quotas[0] += count - sum(quotas)
    done: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool, click.progressbar(length=count, label="kills", file=sys.stderr) as bar:

        def land(each: Known, index: int) -> None:
            # A command that was over before its kill is tried again with another; at last the first takes its place.
            numbers = range(index, index + 1000 * _TRIES, 1000)
            others = range(100_000 + index, 100_000 + index + 1000 * _TRIES, 1000)
            for command, number in [(each, n) for n in numbers] + [(known[0], n) for n in others]:
                if record := prover.kill(command, number):
                    done.append({"number": number, **record})
                    bar.update(1)
                    return

        wanted = [(each, index) for each, quota in zip(known, quotas, strict=True) for index in range(quota)]
        list(pool.map(land, *zip(*wanted, strict=True)))
    return done


def disks(prover: Prover, known: dict[str, Known], count: int, jobs: int) -> list[dict[str, Any]]:
    """Disks of random sizes below what the commands need."""

    def one(index: int) -> dict[str, Any] | None:
        each = known[("build with a plan", "build without", "build int8")[index % 3]]
        output = index % 2 == 0
        need = _size(each.place.folder / each.command.output) if output else _size(each.cache)
        pages = random.Random(f"{prover.seed} disk {index}").randint(2, need // 4096)
        return prover.full_disk(each, 4096 * pages, output)

    with ThreadPoolExecutor(jobs) as pool:
        return [found for found in pool.map(one, range(count)) if found]


@click.command()
@click.option("--kills", "count", default=200, show_default=True)
@click.option("--disks", "disk_count", default=24, show_default=True, help="Sizes of a full disk to try.")
@click.option("--seed", default=0, show_default=True)
@click.option("--patience", default=300.0, show_default=True, help="Seconds after which a command is stuck.")
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Commands at once.")
@click.option("--only", multiple=True, help="Kill these commands alone.")
@click.option("--save/--no-save", "keep", default=True, help="Write results/crash.json.")
def main(count: int, disk_count: int, seed: int, patience: float, jobs: int, only: tuple[str, ...], keep: bool) -> None:
    """Prove it, print it, and write results/crash.json."""
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        Path(folder).chmod(0o755)
        prover = Prover(Path(folder), seed, patience)
        with ThreadPoolExecutor(jobs) as pool:
            known = list(pool.map(prover.learn, [each for each in COMMANDS if not only or each.name in only]))
        killed = kills(prover, known, count, jobs)
        named = {each.command.name: each for each in known}
        result: dict[str, Any] = {"seed": seed, "kills": len(killed), **_summary(killed)}
        _print_kills(result)
        full: list[dict[str, Any]] = []
        no_mounts, no_user = why_no_mounts(Path(folder) / "mount"), why_no_ordinary_user()
        if no_mounts:
            result["full_disk"] = {"skipped": no_mounts}
        elif not only:
            full = disks(prover, named, disk_count, jobs)
            result["full_disk"] = {"failed_and_recovered": len(full), "cases": full}
        cases = [("read-only", no_mounts), ("another user's", no_user)]
        tried = [
            (named[name], having, how)
            for how, lacking in cases
            if not lacking and not only
            for name in ("build with a plan", "build int8")
            for having in ("nothing", "half", "all")
        ]
        with ThreadPoolExecutor(jobs) as pool:
            unwritable = list(pool.map(lambda each: prover.read_only(*each), tried))
        result["read_only"] = {"cases": unwritable, "skipped": {how: lacking for how, lacking in cases if lacking}}
    result["problems"] = prover.problems
    click.echo(f"full disks: {len(full)} failed with one error and exit code 3, and lost nothing {no_mounts}")
    click.echo(f"read-only caches: {len(unwritable)} builds went on without {no_user}")
    if keep:
        machine.RESULTS = Path(__file__).parent / "results"
        click.echo(machine.save("crash", result), err=True)
    for problem in prover.problems[:20]:
        click.echo(f"broken: {problem}", err=True)
    if prover.problems or len(killed) < count:
        sys.exit(1)


def _summary(killed: list[dict[str, Any]]) -> dict[str, Any]:
    again = sorted(each["again_seconds"] for each in killed) or [0.0]
    return {
        "by_command": dict(Counter(each["command"] for each in killed)),
        "by_stage": dict(Counter(each["stage"] for each in killed)),
        "by_moment": dict(Counter("operation" if each["at"].startswith("op") else "time" for each in killed)),
        "left_temporaries": sum(each["temporaries_left"] > 0 for each in killed),
        "again_seconds": {"median": again[len(again) // 2], "most": again[-1]},
        "each": killed,
    }


def _print_kills(result: dict[str, Any]) -> None:
    click.echo(f"{result['kills']} kills: {result['by_command']}")
    click.echo(f"  in the stages {result['by_stage']}; {result['by_moment']}")
    click.echo(
        f"  {result['left_temporaries']} left temporary files, which the next command swept; it took "
        f"{result['again_seconds']['median']} s, at most {result['again_seconds']['most']} s"
    )


if __name__ == "__main__":
    main()
