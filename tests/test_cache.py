"""The cache computes a stage once, never returns what was damaged, and keeps what somebody uses.

Where several builds share it they are real processes, and each computation leaves a line in a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

import rxdeploy
from rxdeploy import cache as module
from rxdeploy.cache import Cache, cache_folder, cache_limit, open_cache, recipe_digest
from rxdeploy.errors import EnvironmentLacks, InputError

ROOM = 10**12
KEY = recipe_digest(card="a", options=[1, 2])
PATIENCE = 30  # seconds until a test that waits for another process gives up
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(rxdeploy.__file__).parents[1])}

# python -c BUILD CACHE WORK TEXT: the stage that the tests below compute too, slowly. It waits in the middle of
# the computation for the file WORK/go, and with the entry in its hands until its stdin is closed.
BUILD = """
import logging, sys, time
from pathlib import Path
from rxdeploy.cache import Cache
folder, work, key, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
def produce(new):
    with (work / "computed").open("a") as file:
        file.write(text + "\\n")
    (new / "half").write_text(text)
    print("computing", flush=True)
    while not (work / "go").exists():
        time.sleep(0.01)
    (new / "half").rename(new / "data")
    return {"by": text}
logging.basicConfig(stream=sys.stdout, format="%(message)s")
cache = Cache(folder, 10**12)
entry = cache.stage("stage", key, produce)
print("reused" if entry.reused else "made", entry.facts["by"], (entry.folder / "data").read_text(), flush=True)
sys.stdin.read()
cache.close()
"""


class Producer:
    """Fills an entry with `text` and counts how often it was asked."""

    def __init__(self, text: str = "text", facts: dict[str, Any] | None = None) -> None:
        self.text, self.facts, self.calls = text, facts or {"by": text}, 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        (folder / "data").write_text(self.text)
        (folder / "more").write_bytes(bytes(range(256)))
        return self.facts


Open = Callable[..., Cache]
Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def open_at() -> Iterator[Open]:
    """Opens a cache, by default one that has room for everything, and closes it after the test."""
    opened: list[Cache] = []

    def run(folder: Path, limit: int = ROOM, force: bool = False) -> Cache:
        opened.append(Cache(folder, limit, force))
        return opened[-1]

    yield run
    for cache in opened:
        cache.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts another build that shares the cache tmp_path/cache; its argument says who computed."""
    started: list[tuple[subprocess.Popen[str], threading.Timer]] = []

    def run(text: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(tmp_path), KEY, text]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=ENVIRONMENT
        )
        watchdog = threading.Timer(PATIENCE, process.kill)  # so that a deadlock is a failure
        watchdog.start()
        started.append((process, watchdog))
        return process

    yield run
    for process, watchdog in started:
        watchdog.cancel()
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip("\n")


def computed(folder: Path) -> list[str]:
    return (folder / "computed").read_text().split()


# A stage


def test_a_stage_runs_once_and_is_reused(tmp_path: Path, open_at: Open) -> None:
    produce = Producer(facts={"figures": [1, 2.5, None], "nested": {"a": "ü"}})
    for index in range(3):
        cache = open_at(tmp_path)
        entry = cache.stage("stage", KEY, produce)
        assert entry.facts == {"figures": [1, 2.5, None], "nested": {"a": "ü"}}
        assert (entry.folder / "data").read_text() == "text"
        assert (entry.folder / "more").read_bytes() == bytes(range(256))
        assert entry.reused == (index > 0)
        cache.close()
    assert produce.calls == 1


def test_within_one_build_the_second_use_is_not_called_reused(tmp_path: Path, open_at: Open) -> None:
    cache, produce = open_at(tmp_path), Producer()
    assert [cache.stage("stage", KEY, produce).reused for _ in range(2)] == [False, False]
    assert produce.calls == 1


def test_facts_are_the_same_fresh_and_reused(tmp_path: Path, open_at: Open) -> None:
    """A tuple comes back from JSON as a list: it must do so the first time too."""
    produce = Producer(facts={"shape": (1, 2), 3: "three"})  # type: ignore[dict-item]
    fresh, reused = (open_at(tmp_path).stage("stage", KEY, produce).facts for _ in range(2))
    assert fresh == reused == {"shape": [1, 2], "3": "three"}


def test_another_stage_or_key_is_another_entry(tmp_path: Path, open_at: Open) -> None:
    cache = open_at(tmp_path)
    for stage, key in [("a", KEY), ("b", KEY), ("a", recipe_digest(card="b"))]:
        produce = Producer(f"{stage}{key}")
        entry = cache.stage(stage, key, produce)
        assert produce.calls == 1
        assert (entry.folder / "data").read_text() == f"{stage}{key}"


def test_recipe_digest_depends_on_every_ingredient_and_not_on_their_order() -> None:
    assert recipe_digest(a=1, b={"x": 1, "y": 2}) == recipe_digest(b={"y": 2, "x": 1}, a=1)
    others = [recipe_digest(a=1), recipe_digest(a=1, b=None), recipe_digest(a="1"), recipe_digest(b=1), recipe_digest()]
    assert len({*others}) == len(others)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_computation_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException], open_at: Open) -> None:
    cache = open_at(tmp_path)

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "data").write_text("half")
        raise error

    with pytest.raises(error):
        cache.stage("stage", KEY, fail)
    assert not list((tmp_path / "stages").iterdir())
    assert cache.stage("stage", KEY, Producer()).facts == {"by": "text"}, "the lock was not let go"


def test_force_computes_once_more_and_keeps_that(tmp_path: Path, open_at: Open) -> None:
    open_at(tmp_path).stage("stage", KEY, Producer("old"))
    produce = Producer("new")
    forced = open_at(tmp_path, force=True)
    for _ in range(2):
        entry = forced.stage("stage", KEY, produce)
        assert (entry.facts, entry.reused) == ({"by": "new"}, False)
    assert produce.calls == 1
    later = open_at(tmp_path).stage("stage", KEY, Producer("later"))
    assert (later.facts, later.reused, (later.folder / "data").read_text()) == ({"by": "new"}, True, "new")


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage to the record of an entry that leaves it JSON."""

    def damage(path: Path) -> None:
        record = json.loads(path.read_text().partition("\n")[2])
        body = json.dumps(change(record) or record)
        path.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")

    return damage


FILE_DAMAGE = {"flipped": flip, "truncated": truncate, "longer": lengthen, "missing": Path.unlink}


def remade(folder: Path, verify: bool = True) -> bool:
    """Whether the entry is computed again; what comes back must be whole either way."""
    produce = Producer()
    with contextlib.closing(Cache(folder, ROOM)) as cache:
        entry = cache.stage("stage", KEY, produce, verify)
        assert entry.facts == {"by": "text"}
        if verify:
            assert (entry.folder / "data").read_text() == "text"
            assert (entry.folder / "more").read_bytes() == bytes(range(256))
        assert entry.reused == (produce.calls == 0)
    return produce.calls == 1


@pytest.mark.parametrize("damage", FILE_DAMAGE.values(), ids=FILE_DAMAGE)
@pytest.mark.parametrize("name", ["data", "more"])
def test_a_damaged_file_is_computed_again(
    tmp_path: Path, name: str, damage: Callable[[Path], None], open_at: Open
) -> None:
    entry = open_at(tmp_path).stage("stage", KEY, Producer())
    damage(entry.folder / name)
    assert remade(tmp_path)
    assert not remade(tmp_path)


ENTRY_DAMAGE = [
    pytest.param(truncate, id="truncated"),
    pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    pytest.param(lambda path: path.write_bytes(b"\xff\xfe\x00"), id="not text"),
    pytest.param(Path.unlink, id="missing"),
    pytest.param(rewrite(lambda record: record.pop("files") and None), id="no files"),
    pytest.param(rewrite(lambda record: [1]), id="a list"),
    pytest.param(rewrite(lambda record: record["files"].update(data=[1])), id="no digest"),
    pytest.param(rewrite(lambda record: record["files"].update(data=None)), id="null digest"),
    pytest.param(
        rewrite(lambda record: record.update(files=["data"])),
        id="files a list",
    ),
    pytest.param(
        rewrite(lambda record: record.pop("facts") and None),
        id="no facts",
    ),
]


def test_no_flipped_bit_in_the_record_is_returned(tmp_path: Path, open_at: Open) -> None:
    entry = open_at(tmp_path).stage("stage", KEY, Producer())
    record = (entry.folder / "entry.json").read_bytes()
    returned = []
    for position in range(len(record)):
        altered = bytearray(record)
        altered[position] ^= 1
        (entry.folder / "entry.json").write_bytes(altered)
        with contextlib.closing(Cache(tmp_path, ROOM)) as cache:
            try:
                facts = cache.stage("stage", KEY, Producer()).facts
            except Exception as error:
                facts = {"error": str(error)}
        if facts != {"by": "text"}:
            returned.append((position, facts))
    assert not returned


@pytest.mark.parametrize("damage", ENTRY_DAMAGE)
def test_a_damaged_record_is_computed_again(tmp_path: Path, damage: Callable[[Path], None], open_at: Open) -> None:
    entry = open_at(tmp_path).stage("stage", KEY, Producer())
    damage(entry.folder / "entry.json")
    try:
        assert remade(tmp_path)
    except (AttributeError, KeyError) as error:
        traceback.clear_frames(error.__traceback__)  # lets go of files now, not when pytest ends
        raise
    assert not remade(tmp_path)


def test_a_missing_folder_is_computed_again(tmp_path: Path, open_at: Open) -> None:
    entry = open_at(tmp_path).stage("stage", KEY, Producer())
    entry.folder.rename(tmp_path / "elsewhere")
    assert remade(tmp_path)


@pytest.mark.parametrize(("name", "noticed"), [("flipped", False), ("truncated", True), ("missing", True)])
def test_without_verify_only_sizes_are_checked(tmp_path: Path, name: str, noticed: bool, open_at: Open) -> None:
    entry = open_at(tmp_path).stage("stage", KEY, Producer())
    FILE_DAMAGE[name](entry.folder / "data")
    assert remade(tmp_path, verify=False) == noticed
    # And whoever reads the file later does check it.
    assert remade(tmp_path, verify=True) != noticed


# Several processes


def test_two_builds_at_once_compute_once(tmp_path: Path, start: Start) -> None:
    first = start("first")
    assert line(first) == "computing"
    second = start("second")
    assert line(second) == "another build is at the stage stage of the same model; waiting for its result"
    (tmp_path / "go").touch()
    assert line(first) == "made first first"
    assert line(second) == "reused first first"
    assert computed(tmp_path) == ["first"]


def test_when_the_computing_process_is_killed_the_waiting_one_computes(
    tmp_path: Path, start: Start, open_at: Open
) -> None:
    first = start("first")
    assert line(first) == "computing"
    second = start("second")
    assert line(second).startswith("another build")
    first.kill()
    (tmp_path / "go").touch()
    assert line(second) == "computing"
    assert line(second) == "made second second"
    assert second.communicate(timeout=PATIENCE)[0] == "" and second.returncode == 0
    assert computed(tmp_path) == ["first", "second"]
    first.wait()
    open_at(tmp_path / "cache").close()  # sweeps what the killed one left
    (entry,) = (tmp_path / "cache" / "stages").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["data", "entry.json"]


def test_a_lock_left_by_a_killed_process_stops_nobody(tmp_path: Path, start: Start, open_at: Open) -> None:
    first = start("first")
    assert line(first) == "computing"
    first.kill()
    first.wait()
    assert open_at(tmp_path / "cache").stage("stage", KEY, Producer()).facts == {"by": "text"}


def test_no_word_of_waiting_when_nobody_computes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, open_at: Open
) -> None:
    with caplog.at_level(logging.DEBUG, "rxdeploy.cache"):
        open_at(tmp_path).stage("stage", KEY, Producer())
    assert not caplog.records


# Eviction


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def fill(folder: Path, *stages: str) -> dict[str, Path]:
    """Entries of the same size, the first the least recently used."""
    folders = {}
    for age, stage in enumerate(stages):
        cache = Cache(folder, ROOM)
        folders[stage] = cache.stage(stage, KEY, Producer()).folder
        cache.close()
        os.utime(folders[stage] / "entry.json", (1_000_000 + age, 1_000_000 + age))
    return folders


def left(folders: dict[str, Path]) -> str:
    return "".join(stage for stage, folder in folders.items() if folder.exists())


@pytest.mark.parametrize(("room", "kept"), [(4, "abcd"), (3, "bcd"), (2, "cd"), (1, "d"), (0, "")])
def test_the_least_recently_used_go_first(tmp_path: Path, room: int, kept: str, open_at: Open) -> None:
    folders = fill(tmp_path, *"abcd")
    open_at(tmp_path, room * size(folders["a"])).close()
    assert left(folders) == kept
    assert len(list((tmp_path / "stages").iterdir())) == len(kept)


def test_one_byte_too_many_evicts(tmp_path: Path, open_at: Open) -> None:
    folders = fill(tmp_path, *"ab")
    total = sum(map(size, folders.values()))
    open_at(tmp_path, total).close()
    assert left(folders) == "ab"
    open_at(tmp_path, total - 1).close()
    assert left(folders) == "b"


@pytest.mark.parametrize("verify", [True, False])
def test_a_use_makes_an_entry_recent(tmp_path: Path, verify: bool, open_at: Open) -> None:
    folders = fill(tmp_path, *"abc")
    cache = open_at(tmp_path, 2 * size(folders["a"]))
    cache.stage("a", KEY, Producer("not needed"), verify)
    cache.close()
    assert left(folders) == "ac"


def test_an_entry_in_use_by_this_process_is_kept(tmp_path: Path, open_at: Open) -> None:
    folders = fill(tmp_path, *"abc")
    user = open_at(tmp_path, 0)
    user.stage("b", KEY, Producer("not needed"))
    open_at(tmp_path, 0).close()
    assert left(folders) == "b"
    user.close()
    assert left(folders) == ""


def test_an_entry_just_made_is_in_use_too(tmp_path: Path, open_at: Open) -> None:
    user = open_at(tmp_path, 0)
    entry = user.stage("stage", KEY, Producer())
    open_at(tmp_path, 0).close()
    assert (entry.folder / "data").read_text() == "text"
    user.close()
    assert not entry.folder.exists()


def test_an_entry_in_use_by_another_process_is_kept(tmp_path: Path, start: Start, open_at: Open) -> None:
    (tmp_path / "go").touch()
    other = start("other")
    assert [line(other), line(other)] == ["computing", "made other other"]
    (entry,) = (tmp_path / "cache" / "stages").iterdir()
    cache = open_at(tmp_path / "cache", 0)
    cache.close()
    cache.clear()
    assert (entry / "data").read_text() == "other"
    other.kill()
    other.wait()
    cache.close()
    assert not entry.exists()


def test_an_entry_being_computed_survives_eviction_and_clear(tmp_path: Path, start: Start, open_at: Open) -> None:
    other = start("other")
    assert line(other) == "computing"
    open_at(tmp_path / "cache", 0).close()
    open_at(tmp_path / "cache", 0).clear()
    (tmp_path / "go").touch()
    assert line(other) == "made other other"


def test_an_evicted_entry_is_computed_again(tmp_path: Path, open_at: Open) -> None:
    fill(tmp_path, "stage")
    open_at(tmp_path, 0).close()
    assert remade(tmp_path)


# The user's cache


def test_the_folder_is_the_variables_or_the_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXDEPLOY_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("RXDEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / "xdg" / "rxdeploy"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(EnvironmentLacks, match=r"platformdirs.*pip install 'rxdeploy\[build\]'"):
        cache_folder()


@pytest.mark.parametrize(
    ("text", "limit"), [(None, 20 * 10**9), ("0", 0), ("3", 3 * 10**9), ("0.5", 5 * 10**8), ("1e3", 10**12)]
)
def test_the_limit_is_the_variables(monkeypatch: pytest.MonkeyPatch, text: str | None, limit: int) -> None:
    monkeypatch.delenv("RXDEPLOY_CACHE_LIMIT_GB", raising=False)
    if text is not None:
        monkeypatch.setenv("RXDEPLOY_CACHE_LIMIT_GB", text)
    assert cache_limit() == limit


@pytest.mark.parametrize("text", ["-1", "-0.001", "nan", "inf", "-inf", "1e999", "20 GB", "a lot", ""])
def test_a_bad_limit_is_an_input_error_that_names_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RXDEPLOY_CACHE_LIMIT_GB", text)
    with pytest.raises(InputError, match=f"RXDEPLOY_CACHE_LIMIT_GB={text}: must be a number of gigabytes"):
        cache_limit()


def test_open_cache_takes_the_users_settings_and_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXDEPLOY_CACHE", str(tmp_path))
    monkeypatch.setenv("RXDEPLOY_CACHE_LIMIT_GB", "0")
    with pytest.raises(ZeroDivisionError), open_cache() as cache:
        entry = cache.stage("stage", KEY, Producer())
        assert entry.folder.parent == tmp_path / "stages"
        raise ZeroDivisionError
    assert not entry.folder.exists(), "closing evicts, after an error too"


def test_open_cache_forces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXDEPLOY_CACHE", str(tmp_path))
    monkeypatch.delenv("RXDEPLOY_CACHE_LIMIT_GB", raising=False)
    with open_cache() as cache:
        cache.stage("stage", KEY, Producer("old"))
    with open_cache(force=True) as cache:
        assert cache.stage("stage", KEY, Producer("new")).facts == {"by": "new"}


def test_usage_counts_entries_and_bytes(tmp_path: Path, open_at: Open) -> None:
    nothing = {"stage_results": 0, "stage_bytes": 0, "weights_bytes": 0}
    assert open_at(tmp_path / "absent").usage() == nothing
    folders = fill(tmp_path, *"ab")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.pth").write_bytes(bytes(1000))
    usage = {"stage_results": 2, "stage_bytes": sum(map(size, folders.values())), "weights_bytes": 1000}
    assert open_at(tmp_path).usage() == usage


def test_clear_removes_everything_that_is_not_in_use(tmp_path: Path, open_at: Open) -> None:
    folders = fill(tmp_path, *"abc")
    for folder in ("weights", "timing"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_bytes(bytes(1000))
    user = open_at(tmp_path)
    user.stage("b", KEY, Producer("not needed"))
    open_at(tmp_path).clear()
    assert left(folders) == "b"
    assert not (tmp_path / "weights" / "file").exists() and not (tmp_path / "timing").exists()
    user.close()
    open_at(tmp_path).clear()
    assert open_at(tmp_path).usage() == {"stage_results": 0, "stage_bytes": 0, "weights_bytes": 0}


def test_clear_leaves_a_download_alone(tmp_path: Path, open_at: Open) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("net.pth.part", "net.pth.part.json", "other.pth"):
        (weights / name).write_text("bytes so far")
    with filelock.FileLock(weights / "net.pth.lock"):
        open_at(tmp_path).clear()
        assert {path.name for path in weights.iterdir() if path.suffix != ".lock"} == {
            "net.pth.part",
            "net.pth.part.json",
        }
    open_at(tmp_path).clear()
    assert [path.name for path in weights.iterdir() if path.suffix != ".lock"] == []
    open_at(tmp_path / "absent").clear()


def test_clear_removes_damaged_entries(tmp_path: Path, open_at: Open) -> None:
    folders = fill(tmp_path, "a")
    (folders["a"] / "entry.json").unlink()
    open_at(tmp_path).clear()
    assert left(folders) == ""


def test_without_filelock_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_at: Open
) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        open_at(tmp_path).stage("stage", KEY, Producer())
    assert "rxdeploy[build]" in str(module.missing_module(caught.value))
