"""`rxdeploy ARGUMENTS` in this process, with marks of where it is, and death at a chosen moment.

    python reliability/victim.py MARKS KILL ARGUMENTS...

MARKS is the number of a file descriptor that gets a line for each mark: "stage NAME" as a stage begins, "compute
ENTRY" as it begins to compute an entry of the cache, "op EVENT" before each operation that changes a file or takes a
lock, and within each file that is written at once. KILL is "-", or "STAGE:N": before the N-th such operation of that
stage the whole process group gets SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime", "os.truncate", "fcntl.flock"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OUTSIDE = ("/dev/", "/proc/", "/sys/")


class _Marks:
    def __init__(self, descriptor: int, kill: str) -> None:
        self._descriptor, self._stage = descriptor, "start"
        self._at, _, number = kill.rpartition(":")
        self._number = int(number) if self._at else 0
        self._seen: Counter[str] = Counter()

    def say(self, kind: str, what: str) -> None:
        os.write(self._descriptor, f"{kind} {what}\n".encode())

    def stage(self, name: str) -> None:
        self._stage = name
        self.say("stage", name)

    def operation(self, event: str) -> None:
        self._seen[self._stage] += 1
        if self._stage == self._at and self._seen[self._stage] == self._number:
            os.killpg(0, signal.SIGKILL)
        self.say("op", event)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            self.operation(event)
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else "/dev/"
            if not path.startswith(_OUTSIDE) and not path.endswith(".pyc"):
                self.operation("open")


def _watch(marks: _Marks) -> None:
    """Put the marks where the stages, the cache and the writing are."""
    from rxdeploy import cache
    from rxdeploy.engines import bundle
    from rxdeploy.terminal import TerminalReporter

    started, stage, evict, write = TerminalReporter.started, cache.Cache.stage, cache.Cache._evict, bundle.write_bundle

    def on_started(self: TerminalReporter, name: str) -> None:
        marks.stage(name)
        started(self, name)

    def on_stage(self: cache.Cache, name: str, key: str, produce: Callable, verify: bool = True) -> cache.Entry:
        def on_produce(folder: Path) -> dict[str, Any]:
            marks.say("compute", f"{name}-{key[:40]}")
            return produce(folder)

        return stage(self, name, key, on_produce, verify)

    def on_evict(self: cache.Cache) -> None:
        marks.stage("evict")
        evict(self)

    def on_write(*arguments: Any, **options: Any) -> Any:
        marks.stage("bundle")
        return write(*arguments, **options)

    def write_in_two(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(memoryview(data)[: len(data) // 2])
            file.flush()
            marks.operation("write")
            file.write(memoryview(data)[len(data) // 2 :])
        return len(data)

    TerminalReporter.started = on_started  # type: ignore[method-assign]
    cache.Cache.stage = on_stage  # type: ignore[method-assign]
    cache.Cache._evict = on_evict  # type: ignore[method-assign]
    bundle.write_bundle = on_write  # type: ignore[assignment]
    Path.write_bytes = write_in_two  # type: ignore[assignment]


if __name__ == "__main__":
    from rxdeploy.__main__ import main

    it = _Marks(int(sys.argv[1]), sys.argv[2])
    sys.argv = ["rxdeploy", *sys.argv[3:]]
    _watch(it)
    sys.addaudithook(it.audit)
    it.stage("start")
    main()
