"""Metrics against hand-worked numbers and the real runs in tests/data/olora_logs.json.

The matrices are facts from the O-LoRA repository's result logs (MIT licence): T5-large, exact match in %.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetless.score.metrics import metrics

LOGS = json.loads((Path(__file__).parent / "data" / "olora_logs.json").read_text())
TEST_ROWS = {
    "yelp": 7600, "amazon": 7600, "MNLI": 7600, "CB": 56, "COPA": 100, "QQP": 7600, "RTE": 277, "IMDB": 7600,
    "SST-2": 872, "dbpedia": 7600, "agnews": 7600, "yahoo": 7600, "MultiRC": 4848, "BoolQA": 3270, "WiC": 638,
}  # fmt: skip


def values(matrix, base=None, sizes=None):
    return {key: metric.value for key, metric in metrics(matrix, base, sizes).items()}


def test_worked_example():
    found = values([[0.9, 0.1, 0.1], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]], [0.1] * 3)
    expected = {"average_accuracy": 0.7333, "bwt": -0.20, "bwt_over_all": -0.1333, "fwt": 0.05, "forgetting": 0.20}
    expected |= {"learning_accuracy": 0.8667, "average_incremental": 0.7944}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=5e-5), key
    assert found["retention"] == pytest.approx((0.6 / 0.9 + 0.7 / 0.8) / 2)
    assert found["running_average"] == pytest.approx([0.9, 0.75, 0.7333], abs=1e-4)


PUBLISHED = {  # methods.md C.5 and G, recomputed there from the same logs
    "order1_olora": {"average_accuracy": 78.37, "bwt": -1.18, "forgetting": 1.18, "learning_accuracy": 79.25,
                     "average_incremental": 82.70, "weighted_accuracy": 78.37},
    "order1_icrlora": {"average_accuracy": 68.62, "bwt": -14.55, "forgetting": 14.55, "learning_accuracy": 79.53,
                       "average_incremental": 75.78},
    "order1_seqft": {"average_accuracy": 67.77, "bwt": -14.50, "forgetting": 14.50, "learning_accuracy": 78.64,
                     "average_incremental": 75.95},
    "order1_seqlora": {"average_accuracy": 62.88},
    "long_olora": {"average_accuracy": 72.17, "weighted_accuracy": 73.88, "bwt": -0.73, "forgetting": 1.74,
                   "learning_accuracy": 72.86, "average_incremental": 67.82},
    "long_icrlora": {"average_accuracy": 58.44, "weighted_accuracy": 58.49, "bwt": -19.44, "forgetting": 20.38,
                     "learning_accuracy": 76.58, "average_incremental": 59.13},
    "long_seqlora": {"average_accuracy": 32.04, "weighted_accuracy": 32.43, "bwt": -47.96, "forgetting": 48.95,
                     "learning_accuracy": 76.81, "average_incremental": 54.90},
}  # fmt: skip


@pytest.mark.parametrize("run", PUBLISHED)
def test_real_runs(run):
    names, matrix = LOGS[run]
    found = values(matrix, sizes=[TEST_ROWS[name] for name in names])
    for key, value in PUBLISHED[run].items():
        assert round(found[key], 2) == value, key


def test_a_missing_cell_is_cannot_compute_never_zero():
    names, matrix = LOGS["order1_seqlora"]
    found = metrics(matrix, sizes=[TEST_ROWS[name] for name in names])
    for key in ("bwt", "learning_accuracy", "forgetting", "average_incremental", "retention"):
        assert found[key].value is None and "cannot compute: R[3," in found[key].why
    assert found["fwt"].value is None and found["weighted_accuracy"].value is not None


def test_one_task_and_joint_training():
    one = metrics([[0.5]])
    assert one["average_accuracy"].value == 0.5 and "one task" in one["bwt"].why
    joint = metrics([[0.5, 0.7, 0.9]])  # one row for all tasks
    assert joint["average_accuracy"].value == pytest.approx(0.7)
    assert joint["bwt"].value is None and "1 of 3 rows" in joint["bwt"].why


def test_retention_of_nothing_learnt():
    assert "is 0" in metrics([[0.0, 0.1], [0.2, 0.3]])["retention"].why


def test_every_metric_says_its_formula_and_divisor():
    for metric in metrics([[0.5]]).values():
        assert metric.name and metric.formula and metric.divisor
    json.dumps([metric.as_json() for metric in metrics([[0.5, None]]).values()])


def squares(size):
    cell = st.floats(0, 1)
    return st.lists(st.lists(cell, min_size=size, max_size=size), min_size=size, max_size=size)


@given(st.integers(2, 6).flatmap(squares))
def test_identities(matrix):
    T, found = len(matrix), values(matrix, [0.0] * len(matrix), [7] * len(matrix))
    assert found["forgetting"] >= -found["bwt"] - 1e-12
    assert found["bwt_over_all"] == pytest.approx(found["bwt"] * (T - 1) / T)
    assert found["weighted_accuracy"] == pytest.approx(found["average_accuracy"])
    assert found["running_average"][-1] == pytest.approx(found["average_accuracy"])
    last_diagonal = matrix[-1][-1]
    told = (T * found["learning_accuracy"] - last_diagonal) + (T - 1) * found["bwt"] + last_diagonal
    assert told / T == pytest.approx(found["average_accuracy"])


@given(st.integers(2, 6).flatmap(squares), st.floats(-1, 1))
def test_a_shift_of_all_scores_moves_averages_and_not_changes(matrix, shift):
    before = values(matrix, [0.0] * len(matrix))
    after = values([[cell + shift for cell in row] for row in matrix], [shift] * len(matrix))
    assert after["average_accuracy"] == pytest.approx(before["average_accuracy"] + shift)
    for key in ("bwt", "forgetting", "fwt"):
        assert after[key] == pytest.approx(before[key], abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_one_adapter_per_task_has_no_backward_transfer(diagonal):
    T = len(diagonal)
    found = values([[diagonal[j] if j <= i else 0.3 for j in range(T)] for i in range(T)])
    assert found["bwt"] == 0 and found["forgetting"] == 0
