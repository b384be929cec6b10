"""Builds the simulated driver and runs pytest with it: in this folder, or on the files named among the arguments.

After ``--``, the arguments are a command to run with it instead: ``run.py -- python -m rxdeploy doctor``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent


def build(folder: Path) -> None:
    """Compile driver.c to libcuda.so.1 in `folder`; CalledProcessError when the compiler objects."""
    flags = ["-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *flags, str(FOLDER / "driver.c"), "-ldl", "-o", str(folder / "libcuda.so.1")], check=True)


def environment(folder: Path) -> dict[str, str]:
    """The variables under which a process finds the driver in `folder` and the stand-ins of TensorRT."""
    paths = {"LD_LIBRARY_PATH": [folder], "PYTHONPATH": [FOLDER / "modules", FOLDER.parent.parent]}
    joined = {k: os.pathsep.join(map(str, [*v, *filter(None, [os.environ.get(k)])])) for k, v in paths.items()}
    return {"SIM_GPUS": "2", **os.environ, **joined, "RXDEPLOY_SIMULATED_GPU": "1"}


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        named = any(Path(argument.partition("::")[0]).exists() for argument in arguments)
        pytest = [sys.executable, "-m", "pytest", *([] if named else [str(FOLDER)]), *arguments]
        command = arguments[1:] if arguments[:1] == ["--"] else pytest
        return subprocess.run(command, env=environment(Path(name))).returncode


if __name__ == "__main__":
    if shutil.which("cc") is None:
        sys.exit("there is no C compiler (cc)")
    sys.exit(main(sys.argv[1:]))
