"""Streams: descriptions, sampling, the checks before training."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetless.data.streams import NAMED_STREAMS, asked, cut_validation, load_stream, sample
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import DataError, UsageError

OLORA = Path(__file__).parents[2] / "shared" / "data" / "olora"


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def pairs(word, count, answer="yes"):
    return [{"prompt": f"{word} {i}?", "answer": answer} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", pairs("train", 50))
    write(tmp_path / "test.jsonl", pairs("test", 20))
    return tmp_path


def task(folder, **more):
    told = {"name": "a", "train": "train.jsonl", "test": "test.jsonl", **more}
    return load_stream([told], base_dir=folder).tasks[0]


def test_defaults(folder):
    got = task(folder)
    assert (len(got.train), len(got.validation), len(got.test)) == (45, 5, 20)
    assert (got.scorers, got.max_new_tokens, got.options, got.notes) == (("exact_match",), 32, (), ())
    chosen = task(folder, options=["yes", "no"])
    assert (chosen.scorers, chosen.max_new_tokens, chosen.options) == (("options",), 16, ("yes", "no"))
    both = task(folder, options=["yes", "no"], scorers=["exact_match", "options"], max_new_tokens=4)
    assert (both.scorers, both.max_new_tokens) == (("exact_match", "options"), 4)


def test_a_yaml_file_reads_paths_beside_itself(folder, monkeypatch):
    (folder / "labels.json").write_text('["yes", "no"]')
    (folder / "mine.yaml").write_text(
        "tasks:\n- name: one\n  train: train.jsonl\n  test: test.jsonl\n  options: labels.json\n"
        f"- {{name: two, train: {folder}/train.jsonl, test: test.jsonl}}\n"
    )
    monkeypatch.chdir("/")
    stream = load_stream(str(folder / "mine.yaml"))
    assert (stream.name, [task.name for task in stream.tasks]) == ("mine", ["one", "two"])
    assert stream.tasks[0].options == ("yes", "no")
    some = load_stream(f"{folder}/mine.yaml:two,one")
    assert (some.name, some.tasks) == ("mine-two-one", (stream.tasks[1], stream.tasks[0]))
    entry = {"name": "one", "train": "train.jsonl", "test": "test.jsonl"}
    (folder / "mine.json").write_text(json.dumps({"name": "n", "tasks": [entry]}))
    assert load_stream(folder / "mine.json").name == "n"


@pytest.mark.parametrize(
    "more, said",
    [
        ({"trian": "x"}, "stream: task 1: unknown key 'trian'; did you mean 'train'"),
        ({"scorers": ["option"], "options": ["a", "b"]}, "unknown scorer 'option'; did you mean 'options'"),
        ({"scorers": ["options"]}, "needs `options:`"),
        ({"options": [True, False]}, "put the words in quotes"),
        ({"options": ["a", "b", "a "]}, "'a' is there twice"),
        ({"options": ["a"]}, "leaves nothing to choose"),
        ({"options": {"a": 1}}, "must be a list of words"),
        ({"name": "a/b"}, "cannot name a folder"),
        ({"name": ""}, "cannot name a folder"),
        ({"test": None}, "`test:` is missing"),
        ({"limit": 0}, "`limit: 0` must be a number above 0"),
        ({"limit": True}, "must be a number"),
        ({"limit": "50"}, "must be a number"),
        ({"limit_seed": -1}, "0 or above"),
        ({"validation": 1.5}, "a share such as"),
        ({"train": 3}, "`train: 3` must be text"),
        ({"olora": "TC/agnews"}, "remove the others"),
    ],
)
def test_what_a_task_may_say(folder, more, said):
    with pytest.raises(UsageError, match=said):
        task(folder, **more)


@pytest.mark.parametrize(
    "source, said",
    [
        ("dmo", "no stream 'dmo' .*did you mean 'demo'"),
        ({"taks": []}, "unknown key 'taks'; did you mean 'tasks'"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["a"]}, "task 1: expected keys"),
        (["a"], "task 1: expected keys"),
        (3, "expected `tasks:`"),
    ],
)
def test_what_a_stream_may_be(source, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        load_stream(source)


def test_files_that_are_no_streams(folder):
    (folder / "bad.yaml").write_text("tasks: [")
    with pytest.raises(UsageError, match=r"not YAML(?s:.)*line 1"):
        load_stream(folder / "bad.yaml")
    with pytest.raises(UsageError, match="a folder"):
        load_stream(folder)
    with pytest.raises(UsageError, match="2 tasks are called 'a'"):
        load_stream([{"name": "a", "train": "train.jsonl", "test": "test.jsonl"}] * 2, base_dir=folder)


def test_labels_outside_the_options(folder):
    write(folder / "train.jsonl", [*pairs("x", 20), *pairs("y", 5, "maybe")])
    with pytest.raises(DataError) as error:
        task(folder, options=["yes", "no"])
    said = str(error.value)
    assert "task 'a', train: 5 of 25 rows have an answer that is none of the options" in said
    assert all(f"train.jsonl:{n}: 'maybe'" in said for n in (21, 22, 23)) and "jsonl:24" not in said
    told = [{"name": "a", "train": "train.jsonl", "test": "test.jsonl", "options": ["yes", "no"]}]
    kept = load_stream(told, base_dir=folder, on_bad_row="skip").tasks[0]
    assert len(kept.train) + len(kept.validation) == 20
    assert "5 of 25" in kept.notes[0] and kept.notes[0].endswith("dropped")
    with pytest.raises(DataError, match="no rows are left"):
        load_stream([{**told[0], "options": ["up", "down"]}], base_dir=folder, on_bad_row="skip")


def test_bad_rows_are_counted(folder):
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n{broken\n")
    told = [{"name": "a", "train": "train.jsonl", "test": "test.jsonl"}]
    with pytest.raises(DataError, match=r"train\.jsonl:51: broken JSON"):
        load_stream(told, base_dir=folder)
    notes = load_stream(told, base_dir=folder, on_bad_row="skip").tasks[0].notes
    assert len(notes) == 1 and notes[0].startswith("train: 1 bad rows dropped; first: ")


def test_empty_tasks(folder):
    (folder / "none.jsonl").write_text("")
    for key in ("train", "test"):
        with pytest.raises(DataError, match=r"none\.jsonl: no rows"):
            task(folder, **{key: "none.jsonl"})
    with pytest.raises(DataError, match="50 validation rows are to be cut from train, which has 50"):
        task(folder, validation=50)
    write(folder / "text.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"1 rows are .* without a prompt"):
        task(folder, test="text.jsonl", scorers=["exact_match"])
    assert task(folder, test="text.jsonl").scorers == ("next_token",)


def test_overlaps_are_counted_and_stay(folder):
    shared = {"prompt": " train\n7? ", "answer": "no"}
    write(folder / "test.jsonl", [*pairs("test", 4), shared, *pairs("test", 1)])
    write(folder / "dev.jsonl", pairs("train", 3))
    got = task(folder, validation="dev.jsonl")
    assert (len(got.train), len(got.validation), len(got.test)) == (50, 3, 6)
    assert got.notes == (
        f"1 of 6 test rows have the prompt of a train row; first: {folder}/test.jsonl:5",
        f"3 of 3 validation rows have the prompt of a train row; first: {folder}/dev.jsonl:1",
        "1 of 6 test rows repeat the prompt of an earlier test row",
    )


def test_what_rows_ask():
    chat = Row("", "4", (("user", "2 +\n2?"), ("assistant", "4")))
    assert asked(chat) == asked(Row("", "5", (("user", "2 + 2?"), ("assistant", "5")))) == "user: 2 + 2?"
    assert asked(Row("a  b", "c")) == asked(Row("a b\n", "d"))
    assert asked(Row("", "some text")) == "some text"


def test_sizes_and_shares(folder):
    assert len(task(folder, validation=0).train) == 50
    assert len(task(folder, validation=7).validation) == 7
    assert len(task(folder, validation="50%").validation) == 25
    many = tuple(Row(f"{i}", "a") for i in range(5000))
    assert [len(part) for part in cut_validation(many, "10%", "a")] == [4800, 200]
    assert [len(part) for part in cut_validation(many[:4], "10%", "a")] == [3, 1]


def test_limits_leave_the_judged_rows_alone(folder):
    whole, one, two = task(folder), task(folder, limit=10), task(folder, limit=10, limit_seed=1)
    assert len(one.train) == len(two.train) == 10 and one.train != two.train
    assert one.validation == two.validation == whole.validation
    assert one.test == two.test == whole.test
    assert set(one.train) <= set(whole.train)
    assert whole.notes == () and one.notes == ("learns from 10 of 45 rows",)
    fewer = task(folder, test_limit=5, limit_seed=3)
    assert fewer.notes == ("is judged by 5 of 20 rows",)
    assert len(fewer.test) == 5 and fewer.test == task(folder, test_limit=5).test


def test_the_draw_is_what_it_was():
    """A change here would change every run's rows."""
    assert sample(range(20), 5, seed=0, name="a", purpose="train") == DRAWN


DRAWN = (0, 2, 5, 10, 11)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 3), st.text(max_size=5))
def test_samples_are_ordered_nested_subsets(rows, count, seed, name):
    drawn = sample(range(rows), count, seed=seed, name=name, purpose="train")
    assert drawn == sample(range(rows), count, seed=seed, name=name, purpose="train")
    assert len(drawn) == min(rows, count) == len(set(drawn)) and list(drawn) == sorted(drawn)
    assert set(drawn) <= set(sample(range(rows), count + 1, seed=seed, name=name, purpose="train"))


def test_names_are_streams(monkeypatch):
    stream = Stream("demo", (Task("a", (), (), ()),))
    monkeypatch.setitem(NAMED_STREAMS, "demo", lambda on_bad_row: stream)
    assert load_stream("demo") is stream
    one = load_stream("demo:a")
    assert one.name == "demo-a" and one.tasks == stream.tasks
    with pytest.raises(UsageError, match="stream demo: no task 'b'"):
        load_stream("demo:b")


@pytest.mark.skipif(not OLORA.is_dir(), reason=f"the O-LoRA files are not at {OLORA}")
def test_real_olora_stream():
    stream = load_stream(
        [{"olora": "TC/agnews", "limit": 400, "test_limit": 200}, {"olora": "NLI/MNLI", "validation": 30}],
        base_dir=OLORA,
    )
    news, mnli = stream.tasks
    assert (news.name, len(news.train), len(news.validation), len(news.test)) == ("agnews", 400, 200, 200)
    assert news.options == ("World", "Sports", "Business", "Science or Technology")
    assert news.scorers == ("options",)
    assert (len(mnli.train), len(mnli.validation), len(mnli.test)) == (2970, 30, 980)
    assert "test.json: 20 rows without an answer ('-') dropped" in mnli.notes
