"""Pillow's warnings while we decode: they are not for our user, and must not become errors that spoil an image.

Test suites and careful services turn warnings into errors. `warnings.catch_warnings` cannot shield the decoding from
that: it swaps the filters of the whole process, and images are decoded by several threads. So one filter is put before
the others for good, that ignores everything in a thread that is decoding for us and matches nothing elsewhere.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_here = threading.local()


class _ThisThread:
    """In the place of a filter's regular expression for the module, of which `warnings` asks only `match`."""

    def match(self, module: str) -> bool:
        return getattr(_here, "quiet", False)


_FILTER = ("ignore", None, Warning, _ThisThread(), 0)  # action, message, category, module, line


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Ignore all warnings in this thread."""
    filters: Any = warnings.filters
    if not filters or filters[0] is not _FILTER:  # others were put before it, or it went with somebody's catch_warnings
        with contextlib.suppress(ValueError):
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)
    before, _here.quiet = getattr(_here, "quiet", False), True
    try:
        yield
    finally:
        _here.quiet = before
