"""What TensorRT says while it builds and loads plans."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("rxdeploy.tensorrt")


_KEPT = 20


class Messages:
    """What TensorRT said: everything goes to the log, errors are kept for our own error."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings = 0

    def add(self, severity: int, text: str) -> None:
        levels = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
        # Errors reach the user in our exception and warnings as a count, so the log shows them only when asked.
        log.log(min(levels[severity], logging.INFO), "%s", text)
        if severity <= 1:
            self.errors = [*self.errors[-_KEPT:], text]
        self.warnings += severity == 2

    def summary(self) -> str:
        return self._text(self.errors[:3])

    def latest(self) -> str:
        """The last error: what a session that has run for long is told of its latest failure."""
        return self._text(self.errors[-1:])

    def _text(self, errors: list[str]) -> str:
        return "; ".join(" ".join(text.split()) for text in errors) or "it gave no reason"


def logger_for(trt: Any, messages: Messages) -> Any:
    """An ILogger of the TensorRT module `trt` that tells `messages`; it must outlive what TensorRT makes with it."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.add(int(severity), text)

    return Logger()
