"""The entry point: imports the command line where Ctrl-C is already handled."""

import sys
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main() -> NoReturn:
    """Run the command line with the process's arguments and exit with its code."""
    try:
        from rxdeploy.cli import run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
