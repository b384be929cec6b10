"""Batches in shares, on computes that say what they were given: a logit is its image's number."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rxdeploy.runtime.shares import Shares

LONG = 20  # seconds that no test should take


class Computes:
    """Three classes; the first is the image's number, the second the session's. Notes the size of every share."""

    def __init__(
        self, sessions: int, on_share: Callable[[int, NDArray], object] = lambda session, images: None
    ) -> None:
        self.sizes: list[int] = []
        self.sessions: list[int] = []
        self._on_share, self._count = on_share, sessions

    def all(self) -> list[Callable[[NDArray], NDArray[np.float32]]]:
        return [lambda images, n=n: self._compute(n, images) for n in range(self._count)]  # type: ignore[misc]

    def _compute(self, session: int, images: NDArray) -> NDArray[np.float32]:
        self.sizes.append(len(images))
        self.sessions.append(session)
        self._on_share(session, images)
        return np.stack([images[:, 0], np.full(len(images), session), images[:, 0] * 2], axis=1).astype(np.float32)


def numbers(count: int) -> NDArray[np.int64]:
    return np.arange(count)[:, None] + 100


@settings(deadline=None)
@given(images=st.integers(1, 40), sessions=st.integers(1, 5), largest=st.integers(1, 9), into=st.booleans())
def test_every_image_is_computed_once_and_lands_in_its_row(
    images: int, sessions: int, largest: int, into: bool
) -> None:
    computes = Computes(sessions)
    shares = Shares(computes.all(), largest, 3)
    out = np.full((2 * images, 3), np.nan, np.float32)[::2] if into else None  # not contiguous
    found = shares.run(numbers(images), out)
    assert (found is None) == into
    logits = out if found is None else found
    assert logits is not None
    np.testing.assert_array_equal(logits[:, 0], np.arange(images) + 100)
    np.testing.assert_array_equal(logits[:, 2], 2 * (np.arange(images) + 100))
    # As few and as even as can be, but so that every session has one where there are enough images.
    size = min(largest, -(-images // sessions))
    assert sorted(computes.sizes, reverse=True) == [size] * (images // size) + [images % size] * bool(images % size)
    assert set(computes.sizes) == shares.sizes(images)
    shares.close()


def test_sessions_compute_at_the_same_time() -> None:
    together = threading.Barrier(3)
    computes = Computes(3, lambda session, images: together.wait(LONG))
    shares = Shares(computes.all(), 64, 3)
    found = shares.run(numbers(7))
    assert found is not None
    np.testing.assert_array_equal(found[:, 0], np.arange(7) + 100)
    assert sorted(computes.sizes) == [1, 3, 3] and sorted(computes.sessions) == [0, 1, 2]
    shares.close()


@pytest.mark.parametrize(("images", "whole"), [(1, True), (4, True), (5, False), (9, False)])
def test_batches_below_a_size_are_left_to_one(images: int, whole: bool) -> None:
    split, one = Computes(2), Computes(1)
    shares = Shares(split.all(), 3, 3, *one.all(), split_from=5)
    found = shares.run(numbers(images))
    assert found is not None
    np.testing.assert_array_equal(found[:, 0], np.arange(images) + 100)
    mine, others = (one, split) if whole else (split, one)
    assert set(mine.sizes) == shares.sizes(images) and sum(mine.sizes) == images and not others.sizes
    shares.close()


def test_single_images_go_to_the_sessions_in_turn() -> None:
    computes = Computes(3)
    shares = Shares(computes.all(), 64, 3)
    for _ in range(6):
        shares.run(numbers(1))
    assert computes.sessions == [0, 1, 2, 0, 1, 2]
    shares.close()


def test_one_session_needs_no_threads() -> None:
    before = threading.active_count()
    shares = Shares(Computes(1, lambda *_: None).all(), 2, 3)
    shares.run(numbers(9))
    assert threading.active_count() == before
    shares.close()


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    shares = Shares(Computes(4).all(), 2, 3)
    shares.run(numbers(9))
    shares.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_any_share_is_the_batchs(failing: int) -> None:
    """Whoever computes it; the others that have begun end first, since they write into the caller's array."""
    running: list[int] = []
    begun = threading.Barrier(3)

    def fail(session: int, images: NDArray) -> None:
        running.append(session)
        begun.wait(LONG)
        if session == failing:
            raise ValueError(f"session {session}")
        threading.Event().wait(0.05)
        running.remove(session)

    shares = Shares(Computes(3, fail).all(), 64, 3)
    with pytest.raises(ValueError, match=f"session {failing}"):
        shares.run(numbers(3))
    assert running == [failing]
    shares.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_after_an_error_no_more_shares_are_begun(failing: int) -> None:
    """Of the caller or of the helper; the other one needs a second for 100 shares."""
    failed = threading.Event()

    def fail(session: int, images: NDArray) -> None:
        if session == failing:
            failed.set()
            raise ValueError("no")
        assert failed.wait(LONG)
        threading.Event().wait(0.01)

    computes = Computes(2, fail)
    shares = Shares(computes.all(), 1, 3)
    with pytest.raises(ValueError, match="no"):
        shares.run(numbers(1000))
    assert len(computes.sizes) < 100
    shares.close()


def test_many_callers_get_their_own_results() -> None:
    shares = Shares(Computes(3).all(), 4, 3)

    def one(seed: int) -> bool:
        images = np.random.default_rng(seed).integers(0, 1000, (1 + seed % 17, 1))
        found = shares.run(images)
        return found is not None and np.array_equal(found[:, 0], images[:, 0])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))
    shares.close()


def test_a_caller_does_not_wait_for_helpers_that_are_busy_with_others() -> None:
    """The one helper hangs in another caller's share: this caller computes all of its own."""
    busy, release = threading.Event(), threading.Event()

    def hang(session: int, images: NDArray) -> None:
        if images[0, 0] == 0:
            busy.set()
            assert release.wait(LONG)

    shares = Shares(Computes(2, hang).all(), 64, 3)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(shares.run, np.zeros((2, 1), np.int64))
        assert busy.wait(LONG)
        found: Any = shares.run(numbers(6))
        np.testing.assert_array_equal(found[:, 0], np.arange(6) + 100)
        assert not other.done()
        release.set()
        assert other.result(LONG) is not None
    shares.close()


def test_a_batch_that_is_running_when_it_is_closed_is_computed() -> None:
    shares = Shares(Computes(2, lambda *_: shares.close()).all(), 1, 3)
    found = shares.run(numbers(1))
    assert found is not None
    found = shares.run(numbers(5))  # nobody helps any more
    assert found is not None
    np.testing.assert_array_equal(found[:, 0], np.arange(5) + 100)
