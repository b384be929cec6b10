"""Which module runs a plan and with which shapes: decided from facts, so that no driver and no TensorRT is needed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxdeploy.engines.bundle import TargetFacts
from rxdeploy.engines.options import Profile
from rxdeploy.errors import EnvironmentLacks
from rxdeploy.runtime import plan as plans
from rxdeploy.runtime.lanes import candidate_shapes

Profiles = tuple[Profile, ...]


def profiles(*sizes: tuple[int, int, int]) -> Profiles:
    return tuple(Profile(*each) for each in sizes)


@pytest.mark.parametrize(
    ("images", "sizes", "expected"),
    [
        # The profile that holds them; its opt where that is at most twice as many.
        (1, [(1, 8, 32)], [(0, 1)]),
        (3, [(1, 8, 32)], [(0, 3)]),
        (4, [(1, 8, 32)], [(0, 4), (0, 8)]),
        (7, [(1, 8, 32)], [(0, 7), (0, 8)]),
        (8, [(1, 8, 32)], [(0, 8)]),
        (32, [(1, 8, 32)], [(0, 32)]),
        # Of several the tightest: the least max, then the greatest min, then the first.
        (4, [(1, 8, 32), (4, 4, 4)], [(1, 4), (0, 8)]),
        (3, [(1, 8, 32), (1, 2, 4)], [(1, 3)]),
        (3, [(1, 4, 4), (2, 4, 4)], [(1, 3), (0, 4)]),
        (2, [(1, 2, 4), (1, 2, 4)], [(0, 2)]),
        # An exact profile a little above may be faster than a wide one that fits.
        (3, [(1, 32, 32), (4, 4, 4)], [(0, 3), (1, 4)]),
        (3, [(1, 32, 32), (8, 8, 8)], [(0, 3)]),
        (5, [(1, 32, 32), (8, 8, 8), (6, 6, 6)], [(0, 5), (2, 6), (1, 8)]),
        (3, [(1, 4, 32), (4, 4, 4), (4, 5, 6)], [(0, 3), (1, 4), (2, 5)]),
        # None fits: the least padding there is, however much.
        (1, [(4, 4, 4), (8, 8, 8)], [(0, 4)]),
        (5, [(4, 4, 4), (8, 8, 8)], [(1, 8)]),
        (1, [(16, 16, 32)], [(0, 16)]),
        (2, [(1, 1, 1), (8, 8, 8), (4, 6, 6)], [(2, 4)]),
        # Larger than all: the caller splits.
        (9, [(4, 4, 4), (8, 8, 8)], []),
    ],
)
def test_the_shapes_worth_trying(images: int, sizes: list, expected: list[tuple[int, int]]) -> None:
    assert candidate_shapes(images, profiles(*sizes)) == expected


def test_every_shape_that_is_tried_fits_its_profile() -> None:
    """Whatever the profiles: legal shapes, no more than twice the images where something fits, the least padding."""
    import random

    rng = random.Random(7)
    for _ in range(400):
        some = profiles(*(tuple(sorted(rng.choices(range(1, 20), k=3))) for _ in range(rng.randint(1, 4))))
        for images in range(1, max(profile.max for profile in some) + 1):
            found = candidate_shapes(images, some)
            assert found, (images, some)
            assert len(set(found)) == len(found)
            for index, size in found:
                assert some[index].min <= size <= some[index].max and size >= images
            fitting = [profile for profile in some if profile.min <= images <= profile.max]
            index, size = found[0]
            if fitting:
                assert size == images
                assert some[index].max == min(profile.max for profile in fitting)
                assert all(size <= 2 * images for _, size in found)
            else:
                assert len(found) == 1
                assert size == min(profile.min for profile in some if profile.min > images)


# Which module runs it


def manifest(
    target: str = "tensorrt",
    version: str = "11.4.0.106",
    gpu: str | None = "NVIDIA H100",
    **engine: Any,
) -> Any:
    facts = {"version": version, "version_compatible": False, "hardware_compatible": False, **engine}
    return SimpleNamespace(
        target=TargetFacts(name=target, version=version, reason="", gpu=gpu),  # type: ignore[arg-type]
        engine=facts,
        files={"engine.plan": None},
        command=("rxdeploy", "build", "my card.toml", "--fp16"),
    )


def gpu(name: str = "NVIDIA H100", compute_capability: tuple[int, int] = (9, 0)) -> Any:
    return SimpleNamespace(name=name, compute_capability=compute_capability)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """installed(tensorrt="11.4.0.106", ...): these modules are here in these versions, no others. None: no version."""
    found: dict[str, str | None] = {}
    monkeypatch.setattr(plans, "is_installed", lambda module: module in found)

    def version(distributions: tuple[str, ...]) -> str | None:
        runners = {runner.distributions: runner.module for each in plans.RUNNERS.values() for runner in each}
        return found[runners[distributions]]

    monkeypatch.setattr(plans, "installed_version", version)
    return lambda **modules: found.update(modules)


def test_the_very_version_runs_it(installed: Any) -> None:
    installed(tensorrt="11.4.0.106", tensorrt_lean="11.4.0.106", tensorrt_rtx="1.7.1.116")
    assert plans.find_runner(manifest(), gpu()).module == "tensorrt"
    assert plans.find_runner(manifest("tensorrt-rtx", "1.7.1.116"), gpu()).module == "tensorrt_rtx"


def test_a_version_that_cannot_be_told_is_tried(installed: Any) -> None:
    installed(tensorrt=None)
    assert plans.find_runner(manifest(), gpu()).module == "tensorrt"


@pytest.mark.parametrize("here", ["11.4.0.105", "11.4.0.107", "10.9.0.34", "12.0.0.1"])
def test_another_version_is_refused_with_the_way_out(installed: Any, here: str) -> None:
    installed(tensorrt=here)
    with pytest.raises(EnvironmentLacks) as failure:
        plans.find_runner(manifest(), gpu())
    assert f"tensorrt {here} is installed" in str(failure.value)
    assert "the plan needs tensorrt 11.4.0.106" in str(failure.value)
    assert "rxdeploy build 'my card.toml' --fp16" in str(failure.value)


def test_what_is_not_installed_is_named_with_its_extra(installed: Any) -> None:
    with pytest.raises(EnvironmentLacks, match=r"tensorrt is not installed \(pip install 'rxdeploy\[tensorrt\]'"):
        plans.find_runner(manifest(), gpu())
    installed(tensorrt="11.4.0.106")
    with pytest.raises(EnvironmentLacks, match=r"tensorrt_rtx is not installed \(pip install 'rxdeploy\[rtx\]'"):
        plans.find_runner(manifest("tensorrt-rtx", "1.7.1.116"), gpu())


def test_lean_runs_version_compatible_plans_only(installed: Any) -> None:
    installed(tensorrt_lean="11.4.0.106")
    with pytest.raises(EnvironmentLacks, match="only plans built with --version-compatible"):
        plans.find_runner(manifest(), gpu())
    assert plans.find_runner(manifest(version_compatible=True), gpu()).module == "tensorrt_lean"


@pytest.mark.parametrize(
    ("full", "lean", "expected"),
    [
        ("11.4.0.106", "11.4.0.106", "tensorrt"),
        ("11.10.0.2", None, "tensorrt"),  # 11.10 is newer than 11.4, though not as a text
        ("11.3.9.999", "11.5.0.1", "tensorrt_lean"),
        ("11.3.9.999", "11.4.0.105", None),
    ],
)
def test_a_version_compatible_plan_takes_what_is_not_older(
    installed: Any, full: str, lean: str | None, expected: str | None
) -> None:
    installed(tensorrt=full, **({"tensorrt_lean": lean} if lean else {}))
    if expected:
        assert plans.find_runner(manifest(version_compatible=True), gpu()).module == expected
    else:
        with pytest.raises(EnvironmentLacks, match=r"11\.3\.9\.999 is installed, which is older") as failure:
            plans.find_runner(manifest(version_compatible=True), gpu())
        assert "tensorrt_lean 11.4.0.105 is installed, which is older" in str(failure.value)


def test_a_version_that_cannot_be_told_is_tried_with_compatible_plans_too(installed: Any) -> None:
    installed(tensorrt=None)
    assert plans.find_runner(manifest(version_compatible=True), gpu()).module == "tensorrt"


def test_a_plan_of_tensorrt_belongs_to_the_gpu_it_was_built_on(installed: Any) -> None:
    installed(tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    with pytest.raises(EnvironmentLacks, match="built for NVIDIA H100, and the GPU here is NVIDIA L4; build it again"):
        plans.find_runner(manifest(), gpu("NVIDIA L4", (8, 9)))
    wide = manifest(hardware_compatible=True)
    assert plans.find_runner(wide, gpu("NVIDIA L4", (8, 9))).module == "tensorrt"
    assert plans.find_runner(wide, gpu("NVIDIA A100", (8, 0))).module == "tensorrt"
    with pytest.raises(EnvironmentLacks, match="the GPU here is Tesla T4"):
        plans.find_runner(wide, gpu("Tesla T4", (7, 5)))
    # RTX's plans are for several generations, and made where no GPU is.
    assert plans.find_runner(manifest("tensorrt-rtx", "1.7.1.116"), gpu("NVIDIA L4")).module == "tensorrt_rtx"
    assert plans.find_runner(manifest(gpu=None), gpu("NVIDIA L4")).module == "tensorrt"


def test_a_bundle_without_a_plan(installed: Any) -> None:
    installed(tensorrt="11.4.0.106")
    bare = manifest("onnxruntime")
    bare.engine = None
    with pytest.raises(EnvironmentLacks, match=r"no plan; `rxdeploy build 'my card\.toml' --fp16`"):
        plans.find_runner(bare, gpu())


def test_the_command_can_be_pasted_into_a_shell() -> None:
    found = plans.rebuild_command(manifest())
    assert shlex.split(found) == ["rxdeploy", "build", "my card.toml", "--fp16"]


def test_a_runner_knows_its_version_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "makebelieve.py").write_text("raise SystemError('imported')\n")
    info = tmp_path / "makebelieve_cu13-4.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: makebelieve-cu13\nVersion: 4.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plans.Runner("makebelieve", ("makebelieve", "makebelieve-cu13"), "").version() == "4.5"
    assert plans.Runner("makebelieve", ("makebelieve-cu12",), "").version() == "unknown"
    assert plans.Runner("makebelieve_not", ("makebelieve-cu13",), "").version() is None
    assert plans.Runner("makebelieve_not.at.all", (), "").version() is None
    assert "makebelieve" not in sys.modules
