"""Intervals on hand-worked numbers, and by simulation: how often they cover."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from forgetless.score.intervals import holm, mcnemar, paired_change, wilson


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(pair):
    correct, n = pair
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError):
        wilson(3, 0)


def rows(both, lost, gained, neither):
    before = [1] * (both + lost) + [0] * (gained + neither)
    after = [1] * both + [0] * lost + [1] * gained + [0] * neither
    return before, after


def test_newcombe():
    """36 right both times, 12 and 2 changed, none wrong both times: Newcombe 1998, method 10."""
    found = paired_change(*rows(36, 2, 12, 0))
    assert (found.low, found.high) == (pytest.approx(0.0569, abs=1e-4), pytest.approx(0.3404, abs=1e-4))


def test_change_counts_and_p():
    found = paired_change(*rows(50, 30, 2, 18))
    assert (found.lost, found.gained, found.n) == (30, 2, 100)
    assert found.change == pytest.approx(-0.28) and found.low < -0.28 < found.high < 0
    assert found.p == pytest.approx(binomtest(30, 32).pvalue)
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 0) == pytest.approx(2 * 0.5**5)


def test_no_change_covers_zero():
    found = paired_change(*rows(40, 0, 0, 60))
    assert found.change == 0 and found.low <= 0 <= found.high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_interval_holds_the_change_and_turns_with_it(pairs):
    before, after = [float(b) for b, _ in pairs], [float(a) for _, a in pairs]
    found, turned = paired_change(before, after), paired_change(after, before)
    assert -1 <= found.low <= found.change + 1e-12 and found.change - 1e-12 <= found.high <= 1
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("lost, gained, both", [(0.3, 0.02, 0.5), (0.03, 0.01, 0.8), (0.1, 0.1, 0.4)])
def test_it_covers_as_often_as_it_says(n, lost, gained, both):
    """1,000 samples: not below 95 % by more than three standard errors (92.9 %); rare changes make it wide."""
    draw, inside, repeats = np.random.default_rng(0), 0, 1000
    for _ in range(repeats):
        counts = draw.multinomial(n, [both, lost, gained, 1 - both - lost - gained])
        found = paired_change(*rows(*counts.tolist()))
        inside += found.low <= gained - lost <= found.high
    assert inside / repeats > 0.929


def test_scores_between_zero_and_one_get_a_bootstrap():
    draw = np.random.default_rng(1)
    before = draw.uniform(0.4, 0.9, 200)
    after = before - draw.uniform(0, 0.2, 200)
    found = paired_change(before.tolist(), after.tolist())
    assert found.p is None and found.low < -0.1 < found.high < 0
    assert found == paired_change(before.tolist(), after.tolist())


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        paired_change([1, 0], [1])
