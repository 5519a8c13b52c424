"""Intervals against hand-worked numbers, published examples, scipy, and slow twins; coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from forgetless.score.intervals import holm, mcnemar, mean_interval, paired_change, tango, wilson


def rows(both: int, lost: int, gained: int, neither: int) -> tuple[list[int], list[int]]:
    """Scores before and after with these numbers of rows of each kind."""
    before = [1] * both + [1] * lost + [0] * gained + [0] * neither
    after = [1] * both + [0] * lost + [1] * gained + [0] * neither
    return before, after


# ------------------------------------------------------------------------------------------ one share


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: (.8 + .19207 ± 1.96 √(.016 + .0096)) / 1.38415
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(st.integers(1, 2000), st.data())
def test_wilson_is_scipys(n, data):
    correct = data.draw(st.integers(0, n))
    scipys = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((scipys.low, scipys.high), abs=1e-12)
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1


def test_impossible_counts_are_refused():
    for correct, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError):
            wilson(correct, n)


# --------------------------------------------------------------------------------------- two, same rows


def test_published_examples_without_correction():
    # R's PropCIs documents scoreci.mp(40, 20, 160); one row gained of 44 is the rare case of Tango's paper
    assert tango(20, 40, 160, correction=0) == pytest.approx((0.0309, 0.2181), abs=1e-4)
    assert tango(0, 1, 44, correction=0) == pytest.approx((-0.0594, 0.1181), abs=1e-4)
    # nothing changed in n rows: |Δ| <= z² / (n + z²)
    assert tango(0, 0, 100, correction=0) == pytest.approx((-0.0370, 0.0370), abs=1e-4)


def test_change_by_hand():
    change = paired_change(*rows(50, 30, 2, 18))
    assert (change.lost, change.gained, change.n) == (30, 2, 100)
    assert change.change == pytest.approx(-0.28)
    assert change.p == pytest.approx(2 * (1 + 32 + 32 * 31 / 2) / 2**32)
    assert change.low == pytest.approx(-0.3906, abs=1e-4) and change.high == pytest.approx(-0.1759, abs=1e-4)


@pytest.mark.parametrize("lost,gained,n", [(30, 2, 100), (4, 0, 100), (0, 5, 20), (7, 7, 30), (1, 0, 1000)])
def test_limits_are_where_the_slow_statistic_says_z(lost, gained, n):
    """The twin maximises the likelihood over P(lost) by search instead of in closed form."""

    def distance(delta: float) -> float:
        def unlikely(q: float) -> float:
            stay = 1 - 2 * q - delta
            terms = ((lost, q), (gained, q + delta), (n - lost - gained, stay))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

        q = minimize_scalar(unlikely, bounds=(max(0, -delta), (1 - delta) / 2), options={"xatol": 1e-12}).x
        spread = math.sqrt(n * (2 * q + delta - delta**2))
        return max(abs(gained - lost - n * delta) - 1, 0) / spread

    for limit in tango(lost, gained, n):
        assert distance(limit) == pytest.approx(norm.ppf(0.975), abs=2e-3)


@given(st.integers(1, 200), st.data())
def test_the_interval_holds_the_change_and_mirrors(n, data):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    low, high = tango(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert tango(gained, lost, n) == pytest.approx((-high, -low), abs=1e-9)


def test_interval_and_exact_test_agree_on_whether_anything_was_lost():
    pairs = [(lost, gained) for lost in range(40) for gained in range(40) if lost != gained]
    differ = [pair for pair in pairs if (np.abs(np.sum(np.sign(tango(*pair, 300)))) > 0) != (mcnemar(*pair) <= 0.05)]
    assert all(0.045 < mcnemar(*pair) < 0.055 for pair in differ)
    assert len(differ) / len(pairs) < 0.005


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize("n", [20, 50, 200, 1000])
@pytest.mark.parametrize("before,lost,gained", [(0.9, 0.01, 0.0), (0.9, 0.05, 0.01), (0.7, 0.3, 0.02), (0.5, 0.1, 0.1)])
def test_coverage(n, before, lost, gained):
    """500 repeats: at least 95 %, less three standard errors of the simulation."""
    rng = np.random.default_rng(n)
    kinds = rng.multinomial(n, [before - lost, lost, gained, 1 - before - gained], 500)
    held = 0
    for _, l, g, _ in kinds:
        low, high = tango(int(l), int(g), n)
        held += low <= gained - lost <= high
    assert held / 500 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 500)


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize("n,repeats", [(20, 300), (100, 150)])
def test_coverage_of_the_bootstrap(n, repeats):
    """Skewed changes: most rows keep their score, some lose a lot; the true mean is -.06."""
    rng, held = np.random.default_rng(n), 0
    for _ in range(repeats):
        change = paired_change(np.ones(n), 1 - rng.beta(2, 3, n) * (rng.random(n) < 0.15))
        held += change.low <= -0.06 <= change.high
    assert held / repeats >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / repeats)


def test_interval_of_a_mean_of_shares():
    """150 repeats of skewed scores whose mean is .8: at least 95 %, less three standard errors of the simulation."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(150):
        low, high = mean_interval(1 - rng.beta(1, 4, 60))
        held += low <= 0.8 <= high
    assert held / 150 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 150)
    assert mean_interval([0.5]) == (0, 1)  # one row bounds nothing
    assert mean_interval([0.5, 0.5]) == (0, 1)  # nor do two


def test_real_scores():
    rng = np.random.default_rng(1)
    before = rng.uniform(0.4, 1, 60)
    after = before - rng.uniform(0, 0.2, 60)
    change = paired_change(before, after)
    assert change.low < change.change < change.high < 0
    assert change.p < 0.001 and (change.lost, change.gained) == (60, 0)
    assert change == paired_change(before, after), "same rows, same numbers"
    same = paired_change(before, before)
    assert (same.change, same.p) == (0, 1) and same.low < 0 < same.high


@pytest.mark.parametrize("n,width", [(2, 2.0), (60, 0.3), (400, 0.05)])
def test_equal_shares_leave_room_for_rows_that_differ(n, width):
    """Unchanged: of 400 rows a loss of a whole score in 1 of 100 rows would be seen with 98 %, in 1 of 1,000 not."""
    same, fell = paired_change([0.5] * n, [0.5] * n), paired_change([0.5, 0.9] * n, [0.4, 0.8] * n)
    assert -width / 2 <= same.low < -1 / n and 1 / n < same.high <= width / 2
    assert fell.low < -0.1 - 1 / n and -0.1 + 1 / n < fell.high, "differences that are equal up to rounding"
    low, high = mean_interval([0.5] * n)
    assert (low < 0.5 - 1 / n and high > 0.5 + 1 / n) or (low, high) == (0, 1)


def test_bootstrap_is_near_students_t_for_many_rows():
    rng = np.random.default_rng(2)
    before, change = rng.uniform(0, 1, 400), rng.normal(0.05, 0.1, 400)
    found = paired_change(before, before + change)
    half = 1.96 * change.std(ddof=1) / 20
    assert found.low == pytest.approx(change.mean() - half, abs=6e-4)
    assert found.high == pytest.approx(change.mean() + half, abs=6e-4)


def test_few_or_unequal_rows():
    assert paired_change([0.5], [0.25]).low == -1  # one row bounds nothing
    assert paired_change([True], [False]).lost == 1
    for before, after in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError):
            paired_change(before, after)


def test_nothing_changed_is_no_proof_that_nothing_can():
    change = paired_change(*rows(80, 0, 0, 20))
    assert change.p == 1 and change.low < 0 < change.high


# ---------------------------------------------------------------------------------------- many, and power


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_order_and_never_lowers(p):
    adjusted = holm(p)
    assert all(p[i] <= adjusted[i] <= 1 for i in range(len(p)))
    assert all(adjusted[i] <= adjusted[j] for i in range(len(p)) for j in range(len(p)) if p[i] <= p[j])
