"""The lock files agree with pyproject.toml, with one another and with the constraints, for every Python we support."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rxdeploy.cards.card import tomllib

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
PYTHONS = ("3.10.13", "3.11.2", "3.12.1", "3.13.0")
FILES = ("lock.txt", "torch.txt", "torch-cpu.txt", "cuda.txt", "lowest.txt", "tools.txt")
LOCKED = ("lock.txt", "torch.txt")  # what `make setup` installs everywhere
# requirements/lock.py says why these are not locked, or have no lowest versions.
NOT_LOCKED = {"gpu", "tensorrt", "lean", "pycuda"}
NOT_LOWEST = {*NOT_LOCKED, "dev", "fuzz", "rtx"}


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    return [Requirement(line.partition(" --hash")[0].strip()) for line in lines if line and line[0] not in "# "]


def versions(names: tuple[str, ...], python: str) -> dict[str, str]:
    """Package -> the one version that these files give it on this Python."""
    found: dict[str, str] = {}
    for pin in (pin for name in names for pin in pins(name)):
        if pin.marker is None or pin.marker.evaluate(environment(python)):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} twice on Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            found[name] = specifier.version
    return found


def environment(python: str) -> dict[str, str]:
    return {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }


def wanted(python: str, without: set[str]) -> Iterator[Requirement]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lists = [project["project"]["dependencies"], *(extras[name] for name in extras.keys() - without)]
    for line in (line for lines in lists for line in lines):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            yield requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_project_asks_for_is_locked(python: str) -> None:
    locked = versions(tuple(f"requirements/{name}" for name in LOCKED), python)
    for requirement in wanted(python, NOT_LOCKED):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_builds_the_project_is_locked() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in map(Requirement, build):
        assert versions(("requirements/lock.txt",), PYTHONS[0])[requirement.name] in requirement.specifier


@pytest.mark.parametrize("python", PYTHONS[:2])
def test_the_lowest_versions_are_the_declared_ones(python: str) -> None:
    raised = {"cryptography", "pyopenssl"}  # model-signing asks for more than we do
    lowest = versions(("requirements/lowest.txt",), python)
    for requirement in wanted(python, NOT_LOWEST):
        version = lowest[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, requirement
        minimums = [part.version for part in requirement.specifier if part.operator == ">="]
        same = [Requirement(f"x=={minimum}").specifier.contains(version) for minimum in minimums]
        assert any(same) or requirement.name in raised, f"{requirement} is tested with {version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_are_the_lock_without_hashes(python: str) -> None:
    locked = versions(tuple(f"requirements/{name}" for name in (*LOCKED, "cuda.txt")), python)
    assert versions(("constraints.txt",), python) == locked


def test_both_builds_of_torch_are_one_version() -> None:
    (cuda,), (cpu,) = pins("requirements/torch.txt"), pins("requirements/torch-cpu.txt")
    assert str(cpu.specifier) == f"{cuda.specifier}+cpu"


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_a_hash_and_no_file_names_a_host(name: str) -> None:
    text = (REQUIREMENTS / name).read_text()
    logical = [line for line in text.replace("\\\n", " ").splitlines() if line and line[0] not in "# "]
    assert logical
    for line in logical:
        assert re.search(r"==\S+ .*--hash=sha256:[0-9a-f]{64}\b", line), line[:80]
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--\w*index|--find-links|--extra-index-url)", text, re.MULTILINE)
    assert "/tmp" not in text


def test_exceptions_of_the_audit_say_why() -> None:
    for line in (REQUIREMENTS / "audit-ignore.txt").read_text().splitlines():
        assert line.startswith("#") or re.match(r"(PYSEC|CVE|GHSA)-[\w-]+ \w+( \S+){3}", line), line
