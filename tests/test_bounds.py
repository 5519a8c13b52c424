"""Bounds of a mean against hand-worked numbers, scipy, slow twins and laws; how often they fail, by simulation."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from forgetless.score.bounds import (
    LARGEST_BET,
    ORDERS,
    PRIOR_ROWS,
    Betting,
    Binomial,
    HoeffdingBentkus,
    _order,
    rows_needed,
)  # fmt: skip

KINDS = (Betting, HoeffdingBentkus)
LOSSES = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=60)


def rows(lost: int, gained: int, n: int) -> np.ndarray:
    return np.array([1.0] * lost + [-1.0] * gained + [0.0] * (n - lost - gained))


# ------------------------------------------------------------------------------------------ a share of rows


def test_no_loss_in_149_rows_bounds_the_share_by_2_percent_and_148_do_not():
    # (1 - p)^n = .05: p = 1 - .05^(1/149) = .019905, and .020038 for 148
    assert Binomial(0, 149).upper(0.95) == pytest.approx(1 - 0.05 ** (1 / 149))
    assert Binomial(0, 149).upper(0.95) < 0.02 < Binomial(0, 148).upper(0.95)
    assert Binomial(0, 149).lower(0.95) == 0 and Binomial(7, 7).upper(0.95) == 1
    assert Binomial(7, 7).lower(0.95) == pytest.approx(0.05 ** (1 / 7))
    assert (Binomial(0, 0).lower(0.95), Binomial(0, 0).upper(0.95)) == (0, 1)


@given(st.integers(1, 500), st.data())
def test_binomial_bounds_are_scipys_and_invert_its_tests(n, data):
    count = data.draw(st.integers(0, n))
    found, test = Binomial(count, n), binomtest(count, n)
    told = test.proportion_ci(0.9, method="exact")  # two sides of 95 % each
    assert (found.lower(0.95), found.upper(0.95)) == pytest.approx((told.low, told.high), abs=1e-9)
    if 0 < count < n:
        assert found.p_at_least(found.upper(0.95)) == pytest.approx(0.05)
        assert found.p_at_most(found.lower(0.95)) == pytest.approx(0.05)
    assert found.p_at_least(0.1) == pytest.approx(binomtest(count, n, 0.1, "less").pvalue)
    assert found.p_at_most(0.1) == pytest.approx(binomtest(count, n, 0.1, "greater").pvalue)


# ------------------------------------------------------------------------------------------ betting


def test_betting_by_hand():
    # Two rows of -1..1 that lost nothing, so x = .5 and every order is the same; against "the mean is .5 or more",
    # m = .75. μ̂ stays 1/2, so σ̂²₀ = 1/4 and σ̂²₁ = (3/4) / 4; λ̇₁ = √(2 ln 20 / (2 · .25)) = 3.46, λ̇₂ = √(ln 20 / .1875)
    # = 4.0; the cap is .9 / .25 = 3.6.
    first, second = math.sqrt(2 * math.log(20) / 0.5), 3.6
    capital = (1 + first * 0.25) * (1 + second * 0.25)
    assert Betting([0.0, 0.0], -1, 1).p_at_least(0.5) == pytest.approx(1 / capital)


def slow_p_at_least(values: list[float], limit: float, least: float, most: float, level: float) -> float:
    """A loop that reads like the formula: K(m) = Π (1 + λ_t (m - x_t)), averaged over the orders."""
    n, m, r = len(values), (limit - least) / (most - least), PRIOR_ROWS
    capitals = []
    for number in range(ORDERS):
        x = [(values[i] - least) / (most - least) for i in _order(n, 0, number)]
        capital, total, squares, variance = 1.0, r / 2, r / 4, 0.25
        for t, one in enumerate(x, start=1):
            bet = min(math.sqrt(2 * math.log(1 / level) / (n * variance)), LARGEST_BET / (1 - m))
            capital *= 1 + bet * (m - one)
            total += one
            squares += (one - total / (t + r)) ** 2
            variance = squares / (t + r)
        capitals.append(capital)
    return min(1.0, ORDERS / sum(capitals))


@given(LOSSES, st.floats(-0.9, 0.9))
def test_betting_is_its_slow_twin(values, limit):
    fast = Betting(values, -1, 1)
    assert fast.p_at_least(limit) == pytest.approx(slow_p_at_least(values, limit, -1, 1, 0.05), rel=1e-9)
    mirrored = slow_p_at_least([-one for one in values], -limit, -1, 1, 0.05)
    assert fast.p_at_most(limit) == pytest.approx(mirrored, rel=1e-9)


def test_hoeffding_bentkus_by_hand():
    # 10 rows, mean .2, against .5 or more: h(.2, .5) = .2 ln .4 + .8 ln 1.6 = .19274; e P(Bin(10, .5) <= 2) = e 56/1024
    found = HoeffdingBentkus([0.2] * 10, 0, 1)
    assert found.p_at_least(0.5) == pytest.approx(min(math.exp(-1.9274), math.e * 56 / 1024), rel=1e-4)
    assert found.p_at_least(0.2) == 1
    # on rows that are right or wrong it is never sharper than the exact test
    assert HoeffdingBentkus(rows(3, 0, 200), 0, 1).upper(0.95) > Binomial(3, 200).upper(0.95)


@pytest.mark.parametrize("kind", KINDS)
@given(
    values=LOSSES, limits=st.tuples(st.floats(-1, 1), st.floats(-1, 1)), confidence=st.sampled_from([0.8, 0.95, 0.99])
)
@settings(max_examples=60)
def test_laws_of_every_bound(kind, values, limits, confidence):
    found = kind(values, -1, 1)
    nearer, farther = sorted(limits)
    assert found.p_at_least(farther) <= found.p_at_least(nearer), "a larger loss is ruled out more easily"
    assert found.p_at_most(nearer) <= found.p_at_most(farther)
    low, high = found.lower(confidence), found.upper(confidence)
    assert -1 <= low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high <= 1
    assert found.upper(0.999) >= high and found.lower(0.999) <= low
    # a bound is the inversion of its test: the claim holds exactly where the bound says so
    for limit in limits:
        if abs(limit - high) > 1e-9 and -1 < limit < 1:
            assert (found.p_at_least(limit) <= 1 - confidence) == (high <= limit)
        if abs(limit - low) > 1e-9 and -1 < limit < 1:
            assert (found.p_at_most(limit) <= 1 - confidence) == (low >= limit)
    mirror = kind([-one for one in values], -1, 1)
    assert (-mirror.upper(confidence), -mirror.lower(confidence)) == pytest.approx((low, high), abs=1e-9)


@given(LOSSES, st.integers(0, 59), st.floats(-0.9, 0.9))
def test_a_worse_row_makes_the_bounds_no_better(values, place, limit):
    """For the bound from the mean alone; betting may first learn from a bad row to bet less."""
    worse = list(values)
    worse[place % len(values)] = 1.0
    assert HoeffdingBentkus(worse, -1, 1).p_at_least(limit) >= HoeffdingBentkus(values, -1, 1).p_at_least(limit)


def test_values_and_scale():
    for bad in ([1.5], [-0.1], [math.nan]):
        for kind in KINDS:
            with pytest.raises(ValueError):
                kind(bad, 0, 1)
    with pytest.raises(ValueError):
        Binomial(3, 2)
    for kind in KINDS:
        nothing = kind([], -1, 1)
        assert (nothing.lower(0.95), nothing.upper(0.95)) == (-1, 1)
        assert kind([0.02] * 50, 0, 0.5).upper(0.95) == pytest.approx(0.5 * kind([0.04] * 50, 0, 1).upper(0.95))


def test_the_seed_moves_little_and_the_order_comes_from_a_hash():
    values = rows(12, 5, 400)
    bounds = [Betting(values, -1, 1, seed=seed).upper(0.95) for seed in range(20)]
    assert np.std(bounds) < 0.05 * np.mean(bounds)
    assert sorted(_order(50, 0, 3)) == list(range(50)) and list(_order(8, 0, 0)) == [2, 1, 5, 0, 3, 6, 7, 4]


def test_ten_thousand_rows_take_well_under_a_second():
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 10_000, p=[0.05, 0.9, 0.05])
    began = time.perf_counter()
    found = Betting(values, -1, 1)
    low, high = found.lower(0.95), found.upper(0.95)
    assert low < 0 < high < 0.01 and time.perf_counter() - began < 1.5  # 0.13 s on an idle core


# ------------------------------------------------------------------------------------------ rows needed


def test_rows_needed_by_hand():
    # nothing lost: x = .5, m = .51, so that K grows by ln(1 + .9 · .01/.49) a row at best: 165 rows. The first bets are
    # lower, since they do not know yet that the rows do not vary.
    assert math.ceil(math.log(20) / math.log1p(0.9 * 0.01 / 0.49)) == 165
    assert rows_needed([0.0], 0.02, 0.95, -1, 1) == 189
    assert rows_needed([0.02], 0.02, 0.95, -1, 1) is None, "at the limit nothing can be shown"
    assert rows_needed([0.03], 0.02, 0.95, -1, 1) is None
    assert rows_needed([0.0], 0.01, 0.95, -1, 1) > 1.9 * 189
    assert rows_needed([0.0], 0.02, 0.99, -1, 1) > 1.4 * 189


@pytest.mark.parametrize(
    "lost,gained,limit", [(0.0, 0.0, 0.05), (0.01, 0.0, 0.04), (0.03, 0.02, 0.04), (0.02, 0.04, 0.02)]
)
def test_with_as_many_rows_as_planned_the_typical_sample_succeeds(lost, gained, limit):
    like = rows(round(1000 * lost), round(1000 * gained), 1000)
    needed = rows_needed(like, limit, 0.95, -1, 1)
    assert needed is not None
    rng = np.random.default_rng(1)

    def share(n: int) -> float:
        drawn = (rng.choice(like, n) for _ in range(60))
        return sum(Betting(one, -1, 1).p_at_least(limit) <= 0.05 for one in drawn) / 60

    assert share(needed) >= 0.35 and share(2 * needed) >= 0.75 and share(needed // 3) <= 0.35


# ------------------------------------------------------------------------------------------ how often they fail

CASES = {
    "rare losses": (lambda rng, n: np.where(rng.random(n) < 0.02, 1.0, 0.0), -1, 1, 0.02),
    "rare and small": (lambda rng, n: np.where(rng.random(n) < 0.002, 1.0, 0.0), -1, 1, 0.002),
    "flips both ways": (lambda rng, n: rng.choice([-1.0, 0.0, 1.0], n, p=[0.1, 0.78, 0.12]), -1, 1, 0.02),
    "a skewed divergence": (lambda rng, n: np.minimum(rng.gamma(0.2, 0.25, n), 1.0), 0, 1, None),
}


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [20, 150])
@pytest.mark.parametrize("case", CASES)
def test_bounds_fail_no_more_often_than_they_say(kind, n, case):
    """600 repeats a case: 5 % a side at most, and 3.5 standard errors of the simulation."""
    draw, least, most, mean = CASES[case]
    rng, repeats = np.random.default_rng(n), 600
    mean = draw(rng, 2_000_000).mean() if mean is None else mean
    found = [kind(draw(rng, n), least, most) for _ in range(repeats)]
    allowed = repeats * 0.05 + 3.5 * math.sqrt(repeats * 0.05 * 0.95)
    assert sum(one.p_at_least(mean) <= 0.05 for one in found) <= allowed
    assert sum(one.p_at_most(mean) <= 0.05 for one in found) <= allowed
