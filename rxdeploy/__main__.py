"""The entry point: from the first import to the last byte, Ctrl-C is one message and an exit code."""

import contextlib
import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main() -> NoReturn:
    """Run the command line with the process's arguments and exit with its code."""
    try:
        from rxdeploy.cli import run

        code = run(sys.argv[1:])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was done is done
    except KeyboardInterrupt:
        code = INTERRUPTED
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            if stream is not None:  # as when it was closed from the start
                stream.flush()
    # Not sys.exit: Python kills itself by SIGINT at the end, handled or not, when a Ctrl-C met code run by exec(),
    # as every dataclass is made by; and taking torch and TensorRT apart only costs time.
    os._exit(code)


if __name__ == "__main__":
    main()
