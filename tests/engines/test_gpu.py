"""What the driver library is asked and what becomes of its answers, with a library that is not there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rxdeploy.engines.gpu import Driver, Gpu, find_driver, query


@pytest.fixture
def find_fresh() -> Iterator[Callable[[], Driver]]:
    """find_driver without what it remembers; it is not to remember the fakes either."""

    def find() -> Driver:
        find_driver.cache_clear()
        return find_driver()

    yield find
    find_driver.cache_clear()


def test_no_driver(monkeypatch: pytest.MonkeyPatch, find_fresh: Callable[[], Driver]) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver = find_fresh()
    assert (driver.cuda_version, driver.gpus) == (None, ())
    assert driver.problem == "no NVIDIA driver (libcuda.so.1 is not installed)"


def test_one_gpu(
    monkeypatch: pytest.MonkeyPatch, fake_cuda: Any, fake_gpu: Any, find_fresh: Callable[[], Driver]
) -> None:
    loaded = []

    def load(name: str) -> Any:
        loaded.append(name)
        return fake_cuda(fake_gpu(b"NVIDIA Test", (9, 0), 80 << 30), version=13000)

    monkeypatch.setattr(ctypes, "CDLL", load)
    expected = Driver((13, 0), (Gpu("NVIDIA Test", (9, 0), 80 << 30),), None)
    assert find_fresh() == expected
    assert find_driver() == expected
    assert loaded == ["libcuda.so.1"], "the driver is asked once a process"


def test_several_gpus_in_their_order(fake_cuda: Any, fake_gpu: Any) -> None:
    cuda = fake_cuda(
        fake_gpu(b"A", (8, 6), 24 << 30), fake_gpu(b"B", (12, 0), 1), fake_gpu("Grün".encode("latin-1"), (7, 5), 2)
    )
    driver = query(cuda)
    assert driver.gpus == (Gpu("A", (8, 6), 24 << 30), Gpu("B", (12, 0), 1), Gpu("Gr\ufffdn", (7, 5), 2))
    assert driver.problem is None


@pytest.mark.parametrize(
    ("number", "version"), [(13000, (13, 0)), (12080, (12, 8)), (12090, (12, 9)), (11020, (11, 2))]
)
def test_cuda_version(fake_cuda: Any, fake_gpu: Any, number: int, version: tuple[int, int]) -> None:
    assert query(fake_cuda(fake_gpu(), version=number)).cuda_version == version


def test_a_driver_that_does_not_tell_its_version_still_works(fake_cuda: Any, fake_gpu: Any) -> None:
    driver = query(fake_cuda(fake_gpu(), errors={"cuDriverGetVersion": 1}))
    assert driver.cuda_version is None
    assert len(driver.gpus) == 1 and driver.problem is None


# CUDA_ERROR_NO_DEVICE, _SYSTEM_DRIVER_MISMATCH, _STUB_LIBRARY
@pytest.mark.parametrize("status", [100, 803, 34])
def test_a_driver_that_does_not_start(fake_cuda: Any, fake_gpu: Any, status: int) -> None:
    cuda = fake_cuda(fake_gpu(), errors={"cuInit": status})
    assert query(cuda) == Driver((13, 0), (), f"the NVIDIA driver does not start (cuInit gives error {status})")
    assert cuda.called == ["cuDriverGetVersion", "cuInit"], "after a failed cuInit nothing else may be called"


def test_a_driver_without_a_gpu(fake_cuda: Any) -> None:
    assert query(fake_cuda()) == Driver((13, 0), (), "the NVIDIA driver finds no GPU")


def test_a_driver_that_cannot_count_its_gpus_has_none(fake_cuda: Any, fake_gpu: Any) -> None:
    driver = query(fake_cuda(fake_gpu(), version=12, errors={"cuDeviceGetCount": 999}))
    assert driver.gpus == ()
    assert driver.problem


def test_this_machine_is_no_error(find_fresh: Callable[[], Driver]) -> None:
    driver = find_fresh()
    assert bool(driver.gpus) == (driver.problem is None)
