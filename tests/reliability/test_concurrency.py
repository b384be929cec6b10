"""Eight processes with one cache: one computes, the others wait or reuse, and whoever is killed is replaced.

reliability/concurrency.py does it with real builds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("filelock", reason="the cache needs filelock")

import rxdeploy
from rxdeploy import atomic
from rxdeploy.cache import Cache
from rxdeploy.engines.bundle import open_bundle

PROCESSES = 8
PATIENCE = 60  # seconds until a test that waits for another process gives up
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join((str(Path(rxdeploy.__file__).parents[1]), str(Path(__file__).parent)))
}

# python -c BUILD FOLDER BUILD BUNDLE LIMIT: the stages of a build, of which the first is common to all builds, and a
# bundle. Says what it computes, and while the file `hold` is there goes on with it. FOLDER/log has a line for that too,
# and for each wait.
BUILD = """
import logging, sys, time
from pathlib import Path
import job
from rxdeploy.cache import Cache, recipe_digest
from rxdeploy.engines.bundle import write_bundle
folder, build, bundle, limit = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
logging.basicConfig(filename=folder / "log", format="%(message)s")
cache = Cache(folder / "cache", limit)
def produce(new, stage):
    logging.warning("computing")
    print("computing", new.name.split(".")[1], flush=True)
    while (folder / "hold").exists():
        time.sleep(0.01)
    return job.produce(new, stage)
for stage in job.STAGES:
    key = recipe_digest(build="" if stage == job.STAGES[0] else build)
    entry = cache.stage(stage, key, lambda new: produce(new, stage))
write_bundle(folder / bundle, job.manifest(build), {"model.onnx": entry.folder / "model.onnx"}, overwrite=False)
cache.close()
"""

Process = subprocess.Popen[str]
Start = Callable[..., list[Process]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts builds, each with its name, in one folder; they go on together."""
    started: list[tuple[Process, threading.Timer]] = []

    def run(*builds: str, bundle: str | None = None, limit: int = 10**9) -> list[Process]:
        for index, build in enumerate(builds):
            arguments = [str(tmp_path), build, bundle or f"bundle{index}", str(limit)]
            process = subprocess.Popen(
                [sys.executable, "-c", BUILD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
            watchdog = threading.Timer(PATIENCE, process.kill)  # so that a deadlock is a failure
            watchdog.start()
            started.append((process, watchdog))
        for process, _ in started:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for process, _ in started:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        return [process for process, _ in started]

    yield run
    for process, watchdog in started:
        watchdog.cancel()
        process.kill()
        process.communicate()


def computed(processes: list[Process]) -> Counter[str]:
    """What all of them computed, after they ended well."""
    lines: Counter[str] = Counter()
    for process in processes:
        lines.update(process.communicate()[0].splitlines())
        assert process.returncode == 0
    return lines


def check(folder: Path, *builds: str, bundle: str | None = None) -> None:
    """Every bundle is whole and of its build, and nothing else is there."""
    for index, build in enumerate(builds):
        opened = open_bundle(folder / (bundle or f"bundle{index}"))
        assert opened.manifest.card.description == build
    assert not [path for path in folder.rglob("*") if ".rxdeploy-" in path.name]


@pytest.mark.parametrize("bundle", [None, "bundle"])
def test_the_same_build_is_computed_once(tmp_path: Path, start: Start, bundle: str | None) -> None:
    builds = ["it"] * PROCESSES
    (tmp_path / "log").touch()
    (tmp_path / "hold").touch()
    processes, deadline = start(*builds, bundle=bundle), time.monotonic() + PATIENCE
    while len((tmp_path / "log").read_text().splitlines()) < PROCESSES and time.monotonic() < deadline:
        time.sleep(0.01)
    logged = Counter((tmp_path / "log").read_text().splitlines())
    assert logged["computing"] == 1 and max(logged.values()) == PROCESSES - 1, "one computes, the others wait"
    (tmp_path / "hold").unlink()
    lines = computed(processes)
    assert len(lines) == 3 and set(lines.values()) == {1}
    check(tmp_path, *builds, bundle=bundle)


def test_different_builds_compute_what_they_have_in_common_once(tmp_path: Path, start: Start) -> None:
    builds = [f"build {index}" for index in range(PROCESSES)]
    lines = computed(start(*builds))
    assert len(lines) == 1 + 2 * PROCESSES and set(lines.values()) == {1}
    check(tmp_path, *builds)


def test_builds_that_evict_each_others_entries_end_well(tmp_path: Path, start: Start) -> None:
    builds = [f"build {index % 2}" for index in range(PROCESSES)]
    computed(start(*builds, limit=0))
    check(tmp_path, *builds)
    Cache(tmp_path / "cache", 0).close()
    assert list((tmp_path / "cache" / "stages").iterdir()) == []


def test_of_each_holder_that_is_killed_another_takes_the_place(tmp_path: Path, start: Start) -> None:
    """Seven in a row, at the same entry, until the last finishes."""
    (tmp_path / "hold").touch()
    waiting = start(*["it"] * PROCESSES)
    told: dict[int, Process] = {}
    began = threading.Condition()

    def listen(process: Process) -> None:
        assert process.stdout
        if process.stdout.readline().startswith("computing"):
            with began:
                told[process.pid] = process
                began.notify_all()

    listeners = [threading.Thread(target=listen, args=(process,)) for process in waiting]
    for listener in listeners:
        listener.start()
    for round_ in range(PROCESSES):
        with began:
            assert began.wait_for(lambda: told, PATIENCE), f"nobody took over after {round_} were killed"
            assert len(told) == 1, "two compute the same"
            _, holder = told.popitem()
        waiting.remove(holder)
        if waiting:
            holder.kill()
            holder.wait()
    (tmp_path / "hold").unlink()
    for listener in listeners:
        listener.join()
    holder.communicate()
    assert holder.returncode == 0
    atomic.sweep(tmp_path)
    bundles = list(tmp_path.glob("bundle*"))
    assert len(bundles) == 1 and open_bundle(bundles[0]).manifest.card.description == "it"
    assert not [path for path in tmp_path.rglob("*") if ".rxdeploy-" in path.name], "its eviction sweeps what they left"
