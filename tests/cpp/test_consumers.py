"""Programs in C and C++ that find the installed library, shared and static, with CMake and with pkg-config."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

MAIN = """
#include "rxdeploy.h"
int main(void) {
    rxdeploy_options options;
    rxdeploy_options_init(&options);
    return rxdeploy_abi() != RXDEPLOY_ABI || options.size != sizeof options || rxdeploy_open("x", &options, 0) == 0;
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES {languages})
find_package(rxdeploy REQUIRED)
foreach(kind rxdeploy static)
    add_executable(with_${{kind}} main.c)
    target_link_libraries(with_${{kind}} PRIVATE rxdeploy::${{kind}})
endforeach()
"""


def run(*command: str | Path, **environment: str) -> str:
    """What it prints; a failure with all of it when it does not end well."""
    done = subprocess.run(command, text=True, capture_output=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `cmake --install` put somewhere, moved elsewhere."""
    library = os.environ.get("RXDEPLOY_CPP_LIBRARY")
    if not library or not all(map(shutil.which, ("cmake", "cc", "pkg-config"))):
        pytest.skip("RXDEPLOY_CPP_LIBRARY names none, or there is no cmake, cc or pkg-config")
    if not (Path(library).parent / "cmake_install.cmake").is_file():
        pytest.skip("RXDEPLOY_CPP_LIBRARY is not in a build folder")
    folder = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", Path(library).parent, "--prefix", folder / "first")
    return (folder / "first").rename(folder / "moved")


@pytest.mark.parametrize("languages", ["C", "C CXX"])
def test_cmake(installed: Path, tmp_path: Path, languages: str) -> None:
    (tmp_path / "main.c").write_text(MAIN)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(languages=languages))
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path / "build")
    for kind in ("rxdeploy", "static"):
        run(tmp_path / "build" / f"with_{kind}")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("standard", ["c89", "c99", "c11"])
def test_pkg_config(installed: Path, tmp_path: Path, standard: str, static: bool) -> None:
    (where,) = {path.parent for path in installed.rglob("rxdeploy.pc")}
    (archive,) = installed.rglob("librxdeploy.a")

    def flags(*what: str) -> Sequence[str]:
        return run("pkg-config", *what, "rxdeploy", PKG_CONFIG_PATH=str(where)).split()

    (tmp_path / "main.c").write_text(MAIN)
    libraries = flags("--static", "--libs") if static else flags("--libs")
    libraries = [str(archive) if static and flag == "-lrxdeploy" else flag for flag in libraries]
    strict = ("-pedantic", "-Wall", "-Wextra", "-Werror", f"-std={standard}")
    run("cc", *strict, tmp_path / "main.c", *flags("--cflags"), *libraries, "-o", tmp_path / "main")
    run(tmp_path / "main", LD_LIBRARY_PATH=str(archive.parent))
