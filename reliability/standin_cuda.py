"""Stand-ins for the CUDA libraries that a CUDA build of torch is linked with, so that its CPU half runs without them.

PyPI's torch for Linux is a CUDA build: `import torch` loads some 2.5 GB of NVIDIA's libraries, on a machine without a
GPU too, where it then calls nothing of them but the question how many devices there are. These stand-ins, a few kB of C
made from the symbols that torch's own libraries ask for, answer 100, which is cudaErrorNoDevice. They lie in torch/lib,
which is where those libraries look. What torch computes on the CPU is torch's own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

NVIDIA = re.compile(r"lib(cu|nccl|nvrtc|nvToolsExt|nvshmem|nvJitLink)")
SYMBOL = re.compile(r"\bUND (?P<name>\w+)(?:@(?P<version>[\w.]+))?(?: \(\d+\))?$", re.MULTILINE)
NO_DEVICE = 100
# torch opens this one by itself, on the first use of a GPU; its libcuda.so.1 is the driver, which must stay missing.
ON_DEMAND = "libcaffe2_nvrtc.so"


def install(torch_lib: Path) -> list[str]:
    """Write the stand-ins into torch/lib and return their names; none for a CPU build. Needs cc and readelf."""
    wanted: dict[str, set[str]] = defaultdict(set)  # library -> the symbol versions asked of it
    symbols: dict[str, set[str]] = defaultdict(set)  # symbol version, "" for none -> symbols
    for library in sorted(torch_lib.glob("lib*.so*")):
        if library.name == ON_DEMAND or NVIDIA.match(library.name):
            continue
        text = _readelf(library, "--dynamic", "--version-info", "--dyn-syms")
        for name in re.findall(r"\(NEEDED\)\s+Shared library: \[(.*?)\]", text):
            if NVIDIA.match(name):
                wanted[name] |= _versions(text, name)
        for match in SYMBOL.finditer(text):
            symbols[match["version"] or ""].add(match["name"])
    own = {symbol for symbol in symbols[""] if re.match(r"_*(cu|nccl|nvrtc|nvtx|nvshmem)", symbol)}
    for number, (name, versions) in enumerate(sorted(wanted.items())):
        bare = own if number == 0 else set()
        _build(torch_lib / name, {version: symbols[version] for version in versions}, bare)
    return sorted(wanted)


def _versions(text: str, library: str) -> set[str]:
    """What `readelf --version-info` lists under the library: the names of the versions needed from it."""
    found = re.search(rf"File: {re.escape(library)}  Cnt: \d+\n((?:\s+\w+:\s+Name: .*\n)*)", text)
    return set(re.findall(r"Name: (\S+)", found[1])) if found else set()


def _build(path: Path, versioned: dict[str, set[str]], bare: set[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch) / "standin.c", Path(scratch) / "versions"
        names = bare.union(*versioned.values())
        source.write_text("".join(_function(name) for name in sorted(names)))
        nodes = (f"{version} {{ {'; '.join(sorted(names))}; }};\n" for version, names in versioned.items() if names)
        script.write_text("".join(nodes))
        link = [f"-Wl,-soname,{path.name}", *([f"-Wl,--version-script={script}"] if script.stat().st_size else [])]
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", str(source), "-o", str(path), *link]
        subprocess.run(command, check=True)


def _function(name: str) -> str:
    if re.search(r"Error(String|Name)", name):
        return f'const char *{name}(void) {{ return "no CUDA here: a stand-in"; }}\n'
    return f"long {name}(void) {{ return {NO_DEVICE}; }}\n"


def _readelf(library: Path, *what: str) -> str:
    return subprocess.run(["readelf", "--wide", *what, str(library)], capture_output=True, text=True, check=True).stdout
