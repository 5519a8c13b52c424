"""Formulas of R: the worked example, real logs, and what must hold for every matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetless.score.metrics import METRICS, metrics

LOGS = json.loads((Path(__file__).parent / "data" / "olora_logs.json").read_text())
EXAMPLE = [[0.9, 0.1, 0.1], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]


def value(key: str, *args, **kwargs):
    return metrics(*args, **kwargs)[key].value


def square(least: int = 2, most: int = 5):
    """Full T x T matrices of scores."""
    cell = st.floats(0, 1, allow_nan=False)
    return st.integers(least, most).flatmap(
        lambda T: st.lists(st.lists(cell, min_size=T, max_size=T), min_size=T, max_size=T)
    )


def test_worked_example():
    found = metrics(EXAMPLE, base=[0.1] * 3, sizes=[10, 10, 20])
    expected = {
        "average_accuracy": 0.7333, "weighted_accuracy": (6 + 7 + 18) / 40, "average_incremental": 0.7944,
        "learning_accuracy": 0.8667, "bwt": -0.2, "bwt_over_all": -0.1333, "fwt": 0.05, "forgetting": 0.2,
        "retention": (0.6 / 0.9 + 0.7 / 0.8) / 2,
    }  # fmt: skip
    for key, number in expected.items():
        assert found[key].value == pytest.approx(number, abs=5e-5), key
    assert found["running_average"].value == pytest.approx([0.9, 0.75, 0.7333], abs=5e-5)
    assert found.keys() == METRICS.keys()


# average, sample-weighted, BWT, forgetting, learning, incremental (and G; the weighted column of C.5)
REAL = {
    "order1_olora": (78.37, 78.37, -1.18, 1.18, 79.25, None),
    "order1_icrlora": (68.62, 68.62, -14.55, None, None, None),
    "order1_seqft": (67.77, 67.77, -14.50, None, None, None),
    "long_olora": (72.17, 73.88, -0.73, 1.74, 72.86, 67.82),
    "long_icrlora": (58.44, 58.49, -19.44, 20.38, 76.58, 59.13),
    "long_seqlora": (32.04, 32.43, -47.96, 48.95, 76.81, 54.90),
}
COLUMNS = ("average_accuracy", "weighted_accuracy", "bwt", "forgetting", "learning_accuracy", "average_incremental")


@pytest.mark.parametrize("run", REAL)
def test_real_logs_give_the_published_figures(run):
    told = LOGS["runs"][run]
    found = metrics(told["matrix"], sizes=[LOGS["sizes"][task] for task in told["tasks"]])
    for key, number in zip(COLUMNS, REAL[run], strict=True):
        if number is not None:
            assert round(found[key].value, 2) == number, key


def test_a_log_without_a_row_is_not_guessed():
    told = LOGS["runs"]["order1_seqlora"]
    found = metrics(told["matrix"], sizes=[LOGS["sizes"][task] for task in told["tasks"]])
    assert round(found["average_accuracy"].value, 2) == 62.88
    assert found["bwt"].value is None and found["bwt"].why == "cannot compute: R[3,3] was not scored"
    assert found["forgetting"].why == "cannot compute: R[3,1] was not scored"


def test_missing_numbers_are_named_and_never_zero():
    found = metrics([[0.9, None], [0.8, 0.7]], base=[0.5, None])
    assert found["bwt"].value == pytest.approx(-0.1)
    assert found["fwt"].why == "cannot compute: R[1,2] was not scored"
    assert found["weighted_accuracy"].why == "cannot compute: n_1, the number of test rows of task 1, is not known"
    found = metrics([[0.9, 0.2], [0.8, 0.7]], base=[0.5, None])
    assert found["fwt"].why == "cannot compute: b_2, the untouched model on task 2, was not scored"
    assert "nan" in metrics([[float("nan")]])["average_accuracy"].why
    assert metrics([[0.0, 0.1], [0.0, 0.5]])["retention"].why.startswith("cannot compute: R[1,1] is 0")


def test_ragged_rows_are_lower_triangles():
    ragged, padded = [[0.9], [0.7, 0.8]], [[0.9, None], [0.7, 0.8]]
    assert metrics(ragged) == metrics(padded)


def test_one_task_has_nothing_to_forget():
    found = metrics([[0.9]], base=[0.1], sizes=[7])
    for key in ("bwt", "bwt_over_all", "fwt", "forgetting", "retention"):
        assert found[key].value is None and "one task" in found[key].why
    for key in ("average_accuracy", "weighted_accuracy", "learning_accuracy", "average_incremental"):
        assert found[key].value == pytest.approx(0.9)


def test_joint_training_has_one_row_for_all_tasks():
    found = metrics([[0.9, 0.8, 0.7]], sizes=[1, 1, 1])
    assert found["average_accuracy"].value == pytest.approx(0.8)
    assert found["bwt"].why == "cannot compute: R[3,1]: the matrix has 1 row for 3 tasks"
    assert found["learning_accuracy"].value is None


@pytest.mark.parametrize("matrix", [[], [[]]])
def test_nothing_scored_is_no_crash(matrix):
    assert all(metric.value is None and metric.why for metric in metrics(matrix).values())
    assert metrics([], sizes=[5, 5])["average_accuracy"].why.endswith("nothing has been scored after learning")


def test_json():
    text = json.dumps({key: metric.as_json() for key, metric in metrics(EXAMPLE).items()}, allow_nan=False)
    assert json.loads(text)["bwt"] == {
        "name": "backward transfer (GEM)", "value": pytest.approx(-0.2), "divisor": "T-1", "why": None,
        "formula": "(1/(T-1)) Σ_{j<T} (R[T,j] - R[j,j])",
    }  # fmt: skip


@given(square())
def test_forgetting_is_at_least_minus_bwt(matrix):
    assert value("forgetting", matrix) >= -value("bwt", matrix) - 1e-12


@given(square())
def test_divisors_are_t_minus_1_and_t(matrix):
    T = len(matrix)
    assert value("bwt_over_all", matrix) * T == pytest.approx(value("bwt", matrix) * (T - 1), abs=1e-12)
    last, learning = value("average_accuracy", matrix), value("learning_accuracy", matrix)
    assert last - learning == pytest.approx(value("bwt_over_all", matrix), abs=1e-12)


@given(square(), st.floats(-1, 1))
def test_a_shift_of_all_scores_moves_levels_and_no_changes(matrix, shift):
    base = [0.5] * len(matrix)
    one = metrics(matrix, base)
    two = metrics([[cell + shift for cell in row] for row in matrix], [cell + shift for cell in base])
    for key in ("bwt", "bwt_over_all", "fwt", "forgetting"):
        assert two[key].value == pytest.approx(one[key].value, abs=1e-9)
    for key in ("average_accuracy", "learning_accuracy", "average_incremental"):
        assert two[key].value == pytest.approx(one[key].value + shift, abs=1e-9)


@given(square(), st.data())
def test_the_order_of_columns_does_not_matter_at_the_end(matrix, data):
    order = data.draw(st.permutations(range(len(matrix))))
    sizes = [10 * (j + 1) for j in range(len(matrix))]
    moved = [[row[j] for j in order] for row in matrix]
    for key in ("average_accuracy", "weighted_accuracy"):
        one, two = value(key, matrix, sizes=sizes), value(key, moved, sizes=[sizes[j] for j in order])
        assert one == pytest.approx(two)


@given(square())
def test_one_adapter_a_task_forgets_nothing(matrix):
    """The bound R[i,j] = R[j,j] for i >= j."""
    kept = [[matrix[j][j] if i >= j else None for j in range(len(matrix))] for i in range(len(matrix))]
    found = metrics(kept)
    assert found["bwt"].value == 0 and found["forgetting"].value == 0
    assert found["average_accuracy"].value == found["learning_accuracy"].value
