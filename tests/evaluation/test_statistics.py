"""Intervals and test, against published examples and SciPy's figures."""

from __future__ import annotations

import math

import pytest

from rxdeploy.evaluation.statistics import Z_975, difference, images_to_decide, mcnemar, share


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3, to four digits.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # scipy 1.17.1, binomtest(538, 540).proportion_ci(method="wilson")
        (538, 540, 0.98659762895894, 0.9989837225663774),
    ],
)
def test_wilson(count: int, total: int, low: float, high: float) -> None:
    found = share(count, total)
    digits = 4 if low < 0.9 else 12
    assert found.value == count / total
    assert (round(found.low, digits), round(found.high, digits)) == (round(low, digits), round(high, digits))


def test_wilson_mirrors_and_touches_the_ends() -> None:
    assert share(0, 7).low == 0 and share(7, 7).high == 1
    for count in range(8):
        one, other = share(count, 7), share(7 - count, 7)
        assert one.low == pytest.approx(1 - other.high) and one.low <= one.value <= one.high


@pytest.mark.parametrize(
    ("lost", "gained", "total", "low", "high", "within"),
    [
        # Tests of the R package contingencytables (its data cavo_2012: 59, 6, 16, 80): estimate -0.0621,
        # 95% CI -0.1240 to -0.0054.
        (6, 16, 161, -0.1240, -0.0054, 5e-5),
        # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850, airway hyper-responsiveness
        # (1, 1, 7, 12): -0.517 to -0.026.
        (1, 7, 21, -0.517, -0.026, 5e-4),
        # Computed once without Tango's closed form: the trinomial likelihood maximised by
        # scipy.optimize.minimize_scalar, the score's roots by brentq (SciPy 1.17.1).
        (40, 20, 160, 0.0308645325, 0.2180642437, 2e-8),
        (1, 0, 540, -0.0052247926, 0.0104141340, 2e-8),
        (14, 0, 540, 0.0155052246, 0.0430439322, 2e-8),
        (0, 3, 540, -0.0162050392, 0.0015472502, 2e-8),
        (25, 8, 5000, 0.0012228246, 0.0059327370, 2e-8),
        (310, 150, 50000, 0.0023695141, 0.0040563049, 2e-8),
        (3, 3, 10, -0.4442178, 0.4442178, 2e-8),
        (10, 0, 10, 0.4449344003, 1, 2e-8),
    ],
)
def test_tango(lost: int, gained: int, total: int, low: float, high: float, within: float) -> None:
    found = difference(lost, gained, total)
    assert found.value == pytest.approx((lost - gained) / total)
    assert (found.low, found.high) == (pytest.approx(low, abs=within), pytest.approx(high, abs=within))
    mirrored = difference(gained, lost, total)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


@pytest.mark.parametrize("total", [1, 20, 540, 50_000])
def test_no_image_that_changed_leaves_an_interval(total: int) -> None:
    found, end = difference(0, 0, total), Z_975**2 / (total + Z_975**2)
    assert (found.low, found.value, found.high) == (pytest.approx(-end), 0, pytest.approx(end))


@pytest.mark.parametrize("share_of_lost", [0.0, 0.004, 0.02])
def test_the_interval_holds_the_truth_as_often_as_it_says(share_of_lost: float) -> None:
    """Exact coverage, summed over every outcome of 200 images of which 1 % are gained."""
    total, gained_share, covered = 200, 0.01, 0.0
    truth = share_of_lost - gained_share
    for lost in range(20):
        for gained in range(20):
            if not (share_of_lost or lost == 0):
                continue
            ways = math.comb(total, lost) * math.comb(total - lost, gained)
            rest = (1 - share_of_lost - gained_share) ** (total - lost - gained)
            found = difference(lost, gained, total)
            if found.low <= truth <= found.high:
                covered += ways * share_of_lost**lost * gained_share**gained * rest
    assert 0.93 <= covered <= 0.995


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (6, 16, 0.052479),  # contingencytables' tests, McNemar_exact_cond_test_paired_2x2
        # scipy 1.17.1, binomtest(min(lost, gained), lost + gained).pvalue
        (9, 5, 0.4239501953125),
        (1, 7, 0.0703125),
        (40, 20, 0.01348929373119186),
        (1200, 1000, 2.1817026407914194e-05),
        (25, 1, 8.046627044677734e-07),
        (0, 0, 1),
        (10, 10, 1),
        (0, 1, 1),
    ],
)
def test_mcnemar(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-5 if p == 0.052479 else 1e-9)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_how_many_images_would_tell() -> None:
    # Without a change, z^2 / (n + z^2) must be at most 0.005, so n at least 199 z^2 = 764.5.
    assert images_to_decide(0, 0, 540, 0.005) == pytest.approx(765, abs=1)
    needed = images_to_decide(5, 1, 1000, 0.005)
    assert needed
    times = needed / 1000
    assert (
        difference(5 * times, times, needed).high <= 0.005 < difference(5 * times * 0.9, times * 0.9, needed * 0.9).high
    )
    assert images_to_decide(5, 0, 1000, 0.005) is None  # right at the limit
