"""Readers: shapes, and every way in which a row can be wrong."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgetless.data.readers import alpaca_prompt, read_olora, read_rows
from forgetless.data.tasks import Row
from forgetless.errors import DataError, DownloadError, UsageError

OLORA = Path(__file__).parents[2] / "shared" / "data" / "olora"
needs_olora = pytest.mark.skipif(not OLORA.is_dir(), reason=f"the O-LoRA files are not at {OLORA}")


def lines(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def one(tmp_path, row, **options):
    return read_rows(lines(tmp_path, row), **options).rows[0]


SHARED = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "row, prompt, answer, shape",
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=", "4", "pair"),
        ({"prompt": "2+2=", "answer": "4"}, "2+2=", " 4", "pair"),
        ({"prompt": "2+2= ", "answer": "4"}, "2+2= ", "4", "pair"),
        ({"prompt": "2+2=", "answer": "\n4"}, "2+2=", "\n4", "pair"),
        ({"prompt": "2+2=", "answer": 4}, "2+2=", " 4", "pair"),
        ({"prompt": "so?", "answer": True}, "so?", " true", "pair"),
        ({"prompt": "p", "answer": 0.5, "more": None}, "p", " 0.5", "pair"),
        ({"text": "Once upon a time"}, "", "Once upon a time", "text"),
        ({"messages": [USER, REPLY]}, "", "4", "chat"),
        ({"prompt": [USER], "completion": [REPLY]}, "", "4", "chat"),
        ({"conversations": SHARED}, "", "4", "chat"),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, alpaca_prompt("Add.", "2, 2"), "4", "pair"),
        ({"instruction": "2+2?", "input": "", "output": 4, "text": "all"}, alpaca_prompt("2+2?"), "4", "pair"),
        ({"instruction": "2+2?", "output": "4", "history": [], "system": ""}, alpaca_prompt("2+2?"), "4", "pair"),
    ],
)
def test_shapes(tmp_path, row, prompt, answer, shape):
    got = one(tmp_path, row)
    assert (got.prompt, got.answer, got.shape) == (prompt, answer, shape)
    assert got.source == f"{tmp_path}/rows.jsonl:1"


def test_named_columns(tmp_path):
    row = one(tmp_path, {"question": "2+2?", "label": 4}, prompt="question", answer="label")
    assert (row.prompt, row.answer, row.label) == ("2+2?", " 4", "4")
    with pytest.raises(UsageError, match="name both columns"):
        read_rows("x.jsonl", prompt="question")


@pytest.mark.parametrize(
    "row, said",
    [
        ('{"prompt": "a", "completion": ', "broken JSON"),
        ("[1, 2]", "expected an object {...}, found a list"),
        ("null", "found null"),
        ({"propmt": "a", "answer": "b"}, "is 'propmt' meant to be 'prompt'?"),
        ({"question": "a", "label": "b"}, "found: label, question"),
        ({"prompt": 3, "completion": "b"}, "'prompt' must be text, found a number: 3"),
        ({"prompt": "a", "completion": None}, "'completion' must be text, found null"),
        ({"prompt": "a", "completion": " \n"}, "'completion' is empty"),
        ('{"prompt": "a", "completion": NaN}', "must be text, found a number: nan"),
        ({"prompt": "", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "completion": [REPLY]}, "must be text, found a list"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [REPLY]}, "the first turn is the assistant's"),
        (
            {"messages": [USER, {"role": "asistant", "content": "4"}]},
            "turn 2: unknown role 'asistant'; did you mean",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"turn 2 \(assistant\): 'content' must be",
        ),
        ({"messages": [USER, {**REPLY, "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": ["hello"]}, "turn 1: expected"),
        ({"conversations": []}, "conversations must be a list"),
        ({"conversations": ["hello"]}, r'turn 1: expected \{"from", "value"\}'),
        ({"conversations": [{"from": "human"}]}, "turn 1: expected"),
        ({"conversations": [{"from": "humam", "value": "?"}]}, "turn 1: unknown speaker 'humam'; did you mean 'human'"),
        ({"conversations": [*SHARED, {"from": "function_call", "value": "f()"}]}, "turn 3: unknown speaker"),
        ({"conversations": [SHARED[0], {"from": "gpt", "value": " "}]}, r"turn 2 \(gpt\): 'value' is empty"),
        ({"conversations": SHARED[:1]}, "no assistant turn"),
        ({"conversations": SHARED[1:]}, "the first turn is the assistant's"),
        ({"conversations": SHARED, "tools": "[]"}, "'tools' cannot be learnt from"),
        ({"conversations": SHARED, "system": 3}, "'system' must be text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be text, found a number"),
        ({"instruction": "", "output": "b"}, "'instruction' is empty"),
        ({"instruction": "a", "output": None}, "'output' must be text, found null"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' has no place in the Alpaca prompt"),
        ({"instruction": "a", "output": "b", "system": "be brief"}, "'system' has no place"),
        ({"instruktion": "a", "output": "b"}, "is 'instruktion' meant to be 'instruction'?"),
        ("[" * 100_000, "cannot be read as JSON|broken JSON"),
        ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_bad_rows_are_named_or_dropped(tmp_path, row, said):
    path = lines(tmp_path, {"text": "good"}, "", row, {"text": "good too"})
    with pytest.raises(DataError, match=said) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    reading = read_rows(path, on_bad_row="skip")
    assert [row.answer for row in reading.rows] == ["good", "good too"]
    assert len(reading.dropped) == 1 and reading.dropped[0].startswith(f"{path}:3: ")


def test_the_alpaca_prompt():
    assert alpaca_prompt("Add.", "2, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n"
    )
    assert alpaca_prompt("Add.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )


def test_share_gpt_turns(tmp_path):
    told = [{"from": "system", "value": "Be brief."}, *SHARED, {"from": "user", "value": "3+3?"}]
    row = one(tmp_path, {"conversations": [*told, {"from": "assistant", "value": "6"}], "id": "x"})
    assert [role for role, _ in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert row.answer == "6"
    row = one(tmp_path, {"conversations": SHARED, "system": "Be brief.", "tools": ""})
    assert row.messages == (("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"))


def parquet(path, rows, features=None):
    import datasets

    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def test_parquet(tmp_path):
    import datasets

    path = parquet(tmp_path / "rows.parquet", [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": None}])
    with pytest.raises(DataError, match=r"rows\.parquet:1: 'answer' must be text, found null"):
        read_rows(path)
    reading = read_rows(path, on_bad_row="skip")
    assert reading.rows == [Row("a", " b", source=f"{path}:0")] and len(reading.dropped) == 1
    chat = parquet(tmp_path / "chat.parquet", [{"conversations": SHARED}])
    assert read_rows(chat).rows[0].messages == (("user", "2+2?"), ("assistant", "4"))
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    labelled = parquet(tmp_path / "labels.parquet", [{"text": "x", "label": 1}], names)
    assert read_rows(labelled, prompt="text", answer="label").rows[0].label == "good"


def test_broken_parquet(tmp_path):
    whole = parquet(tmp_path / "whole.parquet", [{"text": "a"}] * 50).read_bytes()
    for content in (b"", b"PAR1", b'{"text": "a"}', whole[:-20]):
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.parquet: not a Parquet file that can be read"):
            read_rows(tmp_path / "rows.parquet", on_bad_row="skip")
    with pytest.raises(DataError, match=r"cannot be read .*; did you mean 'rows\.parquet'"):
        read_rows(tmp_path / "row.parquet")
    import datasets

    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="it is empty"):
        read_rows(tmp_path / "none.parquet")


def test_wrong_column_names_the_nearest(tmp_path):
    path = lines(tmp_path, {"question": "a", "label": "b"})
    with pytest.raises(DataError, match="no column 'questoin'; did you mean 'question'"):
        read_rows(path, prompt="questoin", answer="label")


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8 \(byte 14: 0xe9\)"):
        read_rows(path)
    path.write_bytes('{"text": "x"}'.encode("utf-16"))
    with pytest.raises(DataError, match="begins like UTF-16"):
        read_rows(path)
    path.write_bytes(b'\xef\xbb\xbf{"text": "with a mark"}\r\n')
    assert read_rows(path).rows[0].answer == "with a mark"
    path.write_text('{"text": "one\u2028line"}\n')  # str.splitlines would cut here
    assert read_rows(path).rows[0].answer == "one\u2028line"


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"no rows \(it is empty\)"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"cannot be read .*; did you mean 'empty\.jsonl'"):
        read_rows(tmp_path / "emty.jsonl")
    with pytest.raises(DataError, match="rows are read from"):
        read_rows(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="not one written by datasets"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="all 1 are bad"):
        read_rows(lines(tmp_path, "x"), on_bad_row="skip")
    with pytest.raises(UsageError, match="did you mean 'skip'"):
        read_rows(tmp_path / "empty.jsonl", on_bad_row="skp")


def test_json_lists_keep_their_lines(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    path.write_text(json.dumps(rows, indent=1))
    assert [row.source for row in read_rows(path).rows] == [f"{path}:2", f"{path}:6"]
    path.write_text('[\n {"text": "a"},\n {"txt": "b"}\n]')
    with pytest.raises(DataError, match=r"rows\.json:3: no known columns"):
        read_rows(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="it is empty"):
        read_rows(path)
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # JSON Lines by another name
    assert len(read_rows(path).rows) == 2


@pytest.mark.parametrize(
    "text, line",
    [
        ('[\n {"text": "a"},\n {"text": }\n]', 3),
        ('[\n {"text": "a"}\n {"text": "b"}\n]', 3),
        ('[{"text": "a"}', 1),
        ('[{"text": "a"}]\nmore', 1),
    ],
)
def test_broken_json_lists(tmp_path, text, line):
    path = tmp_path / "rows.json"
    path.write_text(text)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=rf"rows\.json:{line}: broken JSON"):
            read_rows(path, on_bad_row=on_bad_row)


def test_saved_data_sets(tmp_path):
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    data = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    reading = read_rows(tmp_path / "both", prompt="sentence", answer="label", split="test", on_bad_row="skip")
    assert [row.label for row in reading.rows] == ["good", "bad"]
    assert "found null" in reading.dropped[0]
    with pytest.raises(DataError, match="no split 'dev'; known: train, test"):
        read_rows(tmp_path / "both", split="dev")


def test_a_hub_name_without_network(monkeypatch):
    import datasets

    def refuse(name, config, split):
        assert (name, config, split) == ("some/data", "cfg", "train[:10]")
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DownloadError, match="save_to_disk"):
        read_rows("hub:some/data:cfg#train[:10]", split="test")


def test_a_hub_name_with_network(monkeypatch):
    import datasets

    data = datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: data)
    assert read_rows("hub:some/data", split="test").rows == [Row("a", "b", source="hub:some/data#test:0")]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "completion", "answer", "messages", "text", "role", "content"]), inner
        )
    ),
    max_leaves=12,
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.one_of(json_values.map(json.dumps), st.text(), st.binary()))
def test_whatever_stands_there_is_rows_or_a_data_error(tmp_path, content):
    for name in ("any.jsonl", "any.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        try:
            rows = read_rows(path, on_bad_row="skip").rows
        except DataError as error:
            assert name in str(error)
        else:
            assert rows and all(row.answer.strip() for row in rows)


text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@quick
@given(st.lists(st.tuples(text, text), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_rows_come_back_as_they_were_written(tmp_path, pairs, as_list, ascii_only):
    told = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    path = tmp_path / ("rows.json" if as_list else "rows.jsonl")
    written = [json.dumps(row, ensure_ascii=ascii_only) for row in told]
    path.write_text("[" + ",\n".join(written) + "]" if as_list else "\n".join(written), encoding="utf-8")
    assert [(row.prompt, row.answer) for row in read_rows(path).rows] == pairs


def olora(tmp_path, rows, labels=("yes", "no"), group="TC", name="toy"):
    folder = tmp_path / group / name
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps(labels))
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=0))
    return folder


def test_olora_layout(tmp_path):
    rows = [
        {"sentence": "S", "label": "yes"},
        {"sentence": "T", "label": "-"},
        {"sentence": "U", "label": "no"},
    ]
    folder = olora(tmp_path, rows)
    reading = read_olora(folder, "test")
    assert [row.answer for row in reading.rows] == [" yes", " no"]
    assert reading.rows[0].prompt == (
        "Task:TC\nDataset:toy\nWhat is the topic of the following paragraph? Choose one from the option.\n"
        "Option: yes, no \nS\nAnswer:"
    )
    assert reading.notes == ["test.json: 1 rows without an answer ('-') dropped"] and not reading.dropped


def test_olora_labels_and_names(tmp_path):
    folder = olora(tmp_path, [{"sentence": "S", "label": "yess"}, {"sentence": "S", "label": "no"}])
    with pytest.raises(DataError, match=r"test\.json:2: the label 'yess' is not in labels\.json; did you mean 'yes'"):
        read_olora(folder, "test")
    assert len(read_olora(folder, "test", on_bad_row="skip").rows) == 1
    with pytest.raises(DataError, match=r"dev\.json: cannot be read"):
        read_olora(folder, "dev")
    with pytest.raises(UsageError, match="no category 'NIL'; did you mean 'NLI'"):
        read_olora(olora(tmp_path, [], group="NIL"), "test")
    (folder / "labels.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a JSON list of label words"):
        read_olora(folder, "test")


@needs_olora
@pytest.mark.parametrize(
    "task, train, test",
    [
        ("TC/agnews", 4000, 1000),
        ("TC/dbpedia", 5000, 1000),
        ("SC/amazon", 5000, 1000),
        ("SC/SST-2", 2000, 872),
        ("NLI/MNLI", 3000, 980),
        ("NLI/RTE", 2000, 277),
        ("NLI/CB", 250, 56),
        ("COPA/COPA", 400, 100),
    ],
)
def test_real_olora_files(task, train, test):
    assert len(read_olora(OLORA / task, "train").rows) == train
    reading = read_olora(OLORA / task, "test")
    assert len(reading.rows) == test
    assert reading.notes == (["test.json: 20 rows without an answer ('-') dropped"] if task == "NLI/MNLI" else [])


@needs_olora
def test_real_olora_prompts():
    row = read_olora(OLORA / "SC" / "SST-2", "test").rows[0]
    assert row.prompt == (
        "Task:SC\nDataset:SST-2\n"
        "What is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: Good, Bad \nText: a solid examination of the male midlife crisis . \nAnswer:"
    )
    assert row.answer == " Good"
    copa = read_olora(OLORA / "COPA" / "COPA", "test").rows[0].prompt
    assert copa.startswith("Task:COPA\nDataset:COPA\nWhich sentence is the cause") and "Option:" not in copa


def test_the_alphabet_is_not_special(tmp_path):
    assert one(tmp_path, {"text": string.printable}).answer == string.printable


def test_columns_beside_a_text_are_noted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a film", "label": "good"}\n')
    [note] = read_rows(tmp_path / "rows.jsonl").notes
    assert "label" in note and "prompt: text" in note
    assert read_rows(tmp_path / "rows.jsonl", prompt="text", answer="label").notes == []
