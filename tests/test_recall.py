"""Recall: the base's own answers and the kept rows of tasks in one memory, with the weights of the equation."""

from __future__ import annotations

import pytest
from test_methods import build

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.state import load_state, save_state
from forgetless.methods.finding import find_method
from forgetless.methods.recall import BASE
from forgetless.model.adapters import Adapters


def rows_of(stream, task, count):
    return stream.tasks[task].train[:count]


def step_of(method, stream, task, step=0, count=3):
    return method.batch([method.encoder(row) for row in rows_of(stream, task, count)], step)


def contents(memory):
    return [row.content() for row in memory.rows]


def weight_of(batch, rows):
    chosen = [example for example in batch if example.ids in {row.ids for row in rows}]
    return sum(example.weight * example.answers for example in chosen)


@pytest.mark.parametrize("share, step", [(0.0, 0), (0.1, 7), (0.5, 8)])
def test_a_step_weighs_its_three_parts(tiny, two, recall, share, step):
    recall.general.share = share
    batch = step_of(recall, two, 1, step)
    own = [recall.encoder(row) for row in recall.general.general.rows]
    kept = [recall.encoder(row) for row in recall.memory.rows]
    assert sum(example.weight * example.answers for example in batch) == pytest.approx(1)
    assert weight_of(batch, own) == pytest.approx(share)
    assert weight_of(batch, kept) == pytest.approx((1 - share) / 2)
    assert weight_of(batch, [example for example in batch if not example.memory]) == pytest.approx((1 - share) / 2)


@pytest.fixture
def recall(tiny, two):
    """In its second task, with rows of the first in memory."""
    method = build("recall", tiny, {"memory": 4, "prompts": 2})
    method.begin_task(0)
    method.end_task(0, rows_of(two, 0, 6))
    method.begin_task(1)
    return method


def test_the_base_is_remembered_from_the_first_step(tiny, two):
    method = build("recall", tiny, {"memory": 4, "prompts": 2, "share": 0.25})
    method.begin_task(0)
    batch = step_of(method, two, 0)
    own = [example for example in batch if example.memory]
    assert len(own) == len(method.general.general.rows) > 0 and method.recalled == len(own)
    assert sum(example.weight * example.answers for example in own) == pytest.approx(0.25)


def test_kept_rows_and_own_answers_come_back_apart(tiny, two, recall, tmp_path):
    state = recall.state()
    assert state.memory.tasks == [BASE] * len(recall.general.general.rows) + [0] * 4
    save_state(tmp_path, state)
    other = build("recall", tiny, {"memory": 4, "prompts": 2})
    other.task = 1
    other.restore(load_state(tmp_path))
    assert contents(other.memory) == contents(recall.memory) and contents(other.general.general)
    assert contents(other.general.general) == contents(recall.general.general)
    assert other.memory.tasks == [0] * 4 and other.memory.seen == 6
    other.begin_task(1)
    assert step_of(other, two, 1, 3) == step_of(recall, two, 1, 3)


def test_a_text_stands_for_the_base(tiny, two, tmp_path):
    text = tmp_path / "general.txt"
    text.write_text("The sky is blue.\n\nThe sea is large and blue.")
    method = build("recall", tiny, {"memory": 4, "text": str(text)})
    method.begin_task(0)
    step_of(method, two, 0)
    method.end_task(0, rows_of(two, 0, 6))
    assert BASE not in method.state().memory.tasks
    save_state(tmp_path, method.state())
    other = build("recall", tiny, {"memory": 4, "text": str(text)})
    other.task = 0
    other.restore(load_state(tmp_path))
    assert other.general.general.rows == [Row("", row.answer, (), row.source) for row in method.general.general.rows]
    assert other.memory.tasks == method.memory.tasks


def test_it_goes_under_methods_with_adapters_and_beside_no_other_memory(tiny, two):
    kind = find_method("recall+nlora")
    assert kind.ours and kind.old_rows and issubclass(kind.adapter_class, Adapters)
    with pytest.raises(UsageError, match="both change batch"):
        find_method("general_replay+recall")
    with pytest.raises(UsageError, match=r"share 1\.0"):
        build("recall", tiny, {"share": 1.0})
