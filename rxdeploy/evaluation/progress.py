"""How far an evaluation is, on stderr: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rxdeploy.terminal import stderr

_LINE_EVERY_S = 20.0


class EvaluationProgress:
    """Call it as `rxdeploy.evaluation.accuracy.Progress`; use it in a `with`."""

    def __init__(self) -> None:
        self._console = stderr()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._what = ""
        self._begin = self._line = 0.0
        self._before = self._done = 0

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` images are done. What the first call finds done was there before."""
        now = time.monotonic()
        again = what != self._what or done < self._done
        self._done = done
        if again:
            self._start(what, done, total, now)
            return
        rate = (done - self._before) / max(now - self._begin, 1e-9)
        if self._bar.disable:
            if now - self._line >= _LINE_EVERY_S:
                self._line = now
                left = f", {(total - done) / rate:.0f} s left" if rate else ""
                self._console.print(f"{what}: {done:,} of {total:,} images, {rate:.1f} images/s{left}")
        elif self._task is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.1f} images/s")

    def _start(self, what: str, done: int, total: int, now: float) -> None:
        self._what, self._before, self._begin, self._line = what, done, now, now
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total, completed=done, rate="")
        if done:
            self._console.print(f"{what}: {done:,} of {total:,} images were done before")
