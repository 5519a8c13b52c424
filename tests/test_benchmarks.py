"""Streams by name: the catalogue, the checks of its files, the layouts, the listing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest

from forgetless.cli import main
from forgetless.config import LearnConfig
from forgetless.data import benchmarks, catalogue, streams
from forgetless.data.batches import Encoder
from forgetless.data.benchmarks import read_llmcl, read_trace
from forgetless.data.catalogue import OLORA, STREAMS, TRACE, DataSet, Named, Part
from forgetless.data.listing import as_text, describe_stream, list_as_text, list_streams
from forgetless.data.readers import alpaca_prompt
from forgetless.data.scoring import SCORERS
from forgetless.data.streams import NAMED_STREAMS, load_stream
from forgetless.data.tasks import Stream
from forgetless.errors import DataError, DownloadError, UsageError
from forgetless.learning.fit import fit_rows
from forgetless.learning.prepare import prepare

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_olora = pytest.mark.skipif(
    not (SHARED / "olora").is_dir(), reason=f"the O-LoRA files are not at {SHARED / 'olora'}"
)


def write(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


# ---------------------------------------------------------------- the catalogue


def test_the_orders_are_the_benchmarks():
    assert list(NAMED_STREAMS) == ["demo", *(f"order-{n}" for n in range(1, 7)), "trace", "ilora"]
    names = {name: [data.name for data in named.tasks] for name, named in STREAMS.items()}
    assert names["order-1"] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert names["order-2"] == ["dbpedia", "amazon", "agnews", "yahoo"]
    assert names["order-3"] == ["yahoo", "amazon", "agnews", "dbpedia"]
    logs = json.loads((Path(__file__).parent / "data" / "olora_logs.json").read_text())
    assert names["order-6"] == logs["runs"]["long_olora"]["tasks"]
    assert names["order-1"] == logs["runs"]["order1_olora"]["tasks"]
    assert {data.name: data.rows[1] for data in STREAMS["order-6"].tasks} == logs["sizes"]
    judged_by = {data.name: data.judged_by for data in STREAMS["order-6"].tasks}
    assert judged_by == logs["sizes"] | {"MNLI": 7600 - 131}, "rows without an answer judge nothing"
    for long in ("order-4", "order-5"):
        assert sorted(names[long]) == sorted(names["order-6"]) and len(set(names[long])) == 15
    assert len(names["trace"]) == len(names["ilora"]) == 8
    assert set(names["ilora"]) - set(names["trace"]) == {"medmcqa", "jecqa"}


def test_every_data_set_is_described():
    for named in STREAMS.values():
        for data in named.tasks:
            assert data.licence and data.prompt and data.scorers and data.layout in benchmarks.LAYOUTS
            assert all(part.sha256 is None or re.fullmatch("[0-9a-f]{64}", part.sha256) for part in data.parts)
            assert data.source in (catalogue.MEDMCQA, catalogue.JECQA) or all(part.sha256 for part in data.parts)
            assert ("options" in data.scorers) == bool(data.options or data.layout == "olora")
    sizes = {data.name: data.rows for named in STREAMS.values() for data in named.tasks}
    assert sizes["dbpedia"] == (14000, 7600) and sizes["COPA"] == (400, 100)
    assert {data.name: data.rows for data in STREAMS["ilora"].tasks}["FOMC"] == (5000, 496)
    assert sizes["medmcqa"] == sizes["jecqa"] == (5000, 500)


def test_every_scorer_is_known():
    wanted = {scorer for named in STREAMS.values() for data in named.tasks for scorer in data.scorers}
    assert not wanted - set(SCORERS)


@needs_olora
def test_hashes_of_real_files(monkeypatch):
    """The whole files among the real ones have the pinned hashes; samples of test files differ."""
    monkeypatch.setenv("FORGETLESS_DATA", str(SHARED))
    states = {
        (data.name, part.file): benchmarks.file_state(data, part)
        for data in STREAMS["order-6"].tasks
        for part in data.parts
    }
    here = ("agnews", "amazon", "CB", "COPA", "MNLI", "RTE", "SST-2")
    assert all(states[name, file] == "as pinned" for name in here for file in ("train.json", "labels.json"))
    assert states["dbpedia", "labels.json"] == "as pinned" and states["dbpedia", "train.json"] == "differs"
    assert states["agnews", "test.json"] == "differs" and states["yahoo", "train.json"] == "missing"
    with pytest.raises(DownloadError, match=r"dbpedia/train\.json: its sha256 is ca9f6e57"):
        load_stream("order-1")


# ---------------------------------------------------------------- a small stream by name


def part(path: Path, rows: int | None = None) -> Part:
    return Part(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), rows)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A stream `small` of two data sets, one in each layout, with their files and hashes."""
    monkeypatch.setenv("FORGETLESS_DATA", str(tmp_path))
    news, views = tmp_path / "olora" / "CL_Benchmark" / "TC" / "news", tmp_path / "trace" / "FOMC"
    rows = [{"label": ("sport", "war")[i % 3 == 0], "sentence": f"Row {i}"} for i in range(20)]
    parts = [part(write(news / "train.json", rows), 20), part(write(news / "test.json", rows[:6]), 6)]
    parts.append(part(write(news / "labels.json", ["sport", "war"])))
    asked = [{"prompt": f"View {i}? Answer:", "answer": "ABC"[i % 3]} for i in range(30)]
    others = [part(write(views / f"{name}.json", asked[:n])) for name, n in (("train", 30), ("eval", 3), ("test", 9))]
    one = DataSet("news", OLORA, "TC/news", "olora", tuple(parts), "free", "Task:TC", ("exact_match", "options"),
                  notes=("of the task",))  # fmt: skip
    two = DataSet("FOMC", TRACE, "FOMC", "trace", tuple(others), "free", "own", ("choice", "options"),
                  options=("A", "B", "C"), max_new_tokens=512, validation="eval")  # fmt: skip
    named = Named("a small stream", "here", "own", "names the data set", (one, two))
    monkeypatch.setitem(STREAMS, "small", named)
    monkeypatch.setitem(NAMED_STREAMS, "small", lambda on_bad_row: streams.benchmark("small", on_bad_row))
    return tmp_path


def test_a_stream_by_name(small):
    stream = load_stream("small")
    news, views = stream.tasks
    assert stream.name == "small" and news.options == ("sport", "war") and views.options == ("A", "B", "C")
    assert news.scorers == ("exact_match", "options") and news.max_new_tokens == 50
    assert (len(news.train), len(news.validation), len(news.test)) == (20, 0, 6), "all of train is learnt"
    assert (len(views.train), len(views.validation), len(views.test)) == (30, 3, 9), "eval.json is for validation"
    assert views.train[1].answer == "B" and views.train[1].prompt == "View 1? Answer:"
    assert news.train[0].prompt.startswith("Task:TC\nDataset:news\n")
    assert news.notes[:3] == (
        "names the data set",
        "train.json, test.json, labels.json: as published (sha256 checked)",
        "of the task",
    )
    assert "names the data set" not in views.notes


def test_runs_are_told_the_protocol(small, tokenizer):
    stream = load_stream("small")
    _, notes = fit_rows(Stream("small", stream.tasks[:1]), Encoder(tokenizer, 256))
    assert "news: names the data set" in notes


def test_scoring_on_validation_rows_that_are_not_there(small, tiny):
    config = LearnConfig(stream="small", model=tiny, score_on="validation")
    with pytest.raises(UsageError, match="score_on=validation: no validation rows in news; cut some from train"):
        prepare(config)


def test_files_that_are_not_there(small):
    (small / "trace" / "FOMC" / "eval.json").unlink()
    with pytest.raises(DownloadError) as error:
        load_stream("small")
    said = str(error.value)
    assert said.startswith(f"{small}/trace/FOMC/eval.json is not there. TRACE, https://github.com/BeyonderXX/TRACE")
    assert f"unzip TRACE-Benchmark.zip -d {small}/trace" in said and "FORGETLESS_DATA" in said
    (small / "olora" / "CL_Benchmark" / "TC" / "news" / "train.json").unlink()
    with pytest.raises(DownloadError, match=rf"git -C {small}/olora checkout {OLORA.revision}"):
        load_stream("small")


def test_files_that_are_others(small):
    path = small / "olora" / "CL_Benchmark" / "TC" / "news" / "test.json"
    expected = STREAMS["small"].tasks[0].parts[1].sha256
    path.write_text(path.read_text().replace("Row 1", "Row 7"))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DownloadError) as error:
        load_stream("small")
    said = str(error.value)
    assert said.startswith(f"{path}: its sha256 is {found}, expected {expected}") and OLORA.revision in said
    assert "Remove it and get it again:" in said and f"`- {{olora: {path.parent}}}`" in said
    own = load_stream([{"olora": str(path.parent), "validation": 0}])
    assert len(own.tasks[0].test) == 6, "the remedy works"


def test_files_nobody_pinned_are_said(small, monkeypatch):
    named = STREAMS["small"]
    loose = tuple(
        dataclasses.replace(data, parts=tuple(Part(part.file, None) for part in data.parts)) for data in named.tasks
    )
    monkeypatch.setitem(STREAMS, "small", dataclasses.replace(named, tasks=loose))
    assert "train.json, eval.json, test.json: not checked, no published hash could be confirmed" in (
        load_stream("small").tasks[1].notes
    )
    half = dataclasses.replace(loose[0], parts=(named.tasks[0].parts[0], *loose[0].parts[1:]))
    assert benchmarks.check(half) == (
        "train.json: as published (sha256 checked); test.json, labels.json: not checked, no published hash could be "
        "confirmed"
    )
    assert {file["sha256"] for task in describe_stream("small")["tasks"] for file in task["files"]} == {"not pinned"}


def test_bad_rows_of_a_stream_by_name(small, monkeypatch):
    path = write(small / "trace" / "FOMC" / "train.json", [{"prompt": "a", "answer": "A"}] * 5 + [{"prompt": "b"}])
    named = STREAMS["small"]
    parts = tuple(part(small / "trace" / "FOMC" / one.file) for one in named.tasks[1].parts)
    two = dataclasses.replace(named.tasks[1], parts=parts)
    monkeypatch.setitem(STREAMS, "small", dataclasses.replace(named, tasks=(named.tasks[0], two)))
    with pytest.raises(DataError, match=rf"{path}:1: no column 'answer'"):
        load_stream("small")
    task = load_stream("small", on_bad_row="skip").tasks[1]
    assert len(task.train) == 5 and any(note.startswith("train: 1 bad rows dropped") for note in task.notes)


def test_where_the_data_lies(tmp_path, monkeypatch):
    monkeypatch.delenv("FORGETLESS_DATA", raising=False)
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path))
    assert OLORA.root == tmp_path / "data" / "olora" / "CL_Benchmark", "where it is to be"
    (tmp_path / "data" / "olora").mkdir(parents=True)
    assert OLORA.root == tmp_path / "data" / "olora" / "."
    (tmp_path / "data" / "olora" / "CL_Benchmark").mkdir()
    assert OLORA.root == tmp_path / "data" / "olora" / "CL_Benchmark", "a clone of the repository"


# ---------------------------------------------------------------- layouts


def trace_folder(tmp_path, name="FOMC", with_eval=True):
    rows = [{"prompt": f"Q{i}:", "answer": "ABC"[i % 3]} for i in range(30)]
    for split, count in (("train", 30), ("eval", 4), ("test", 8)):
        if split != "eval" or with_eval:
            write(tmp_path / name / f"{split}.json", rows[:count])
    return tmp_path / name


@pytest.mark.parametrize("layout", ["trace", "llmcl"])
def test_folders_in_a_stream_file(tmp_path, layout):
    trace_folder(tmp_path)
    [task] = load_stream([{layout: "FOMC"}], base_dir=tmp_path).tasks
    assert (task.name, task.scorers, task.options) == ("FOMC", ("choice", "options"), ("A", "B", "C"))
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 4, 8)
    assert task.validation[0].answer == "A", "no space between prompt and answer"
    [task] = load_stream([{layout: "FOMC", "validation": "20%", "scorers": "exact_match"}], base_dir=tmp_path).tasks
    assert (len(task.train), len(task.validation), task.scorers, task.options) == (24, 6, ("exact_match",), ())
    trace_folder(tmp_path, "mine", with_eval=False)
    [task] = load_stream([{layout: "mine", "name": "own", "limit": 9}], base_dir=tmp_path).tasks
    assert (task.name, task.scorers, len(task.validation)) == ("own", ("exact_match",), 3)
    assert "learns from 9 of 27 rows" in task.notes


def test_folders_that_are_not_in_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"none/train\.json: not there; a data set of TRACE or LLMCL is a folder"):
        load_stream([{"trace": "none"}], base_dir=tmp_path)
    with pytest.raises(UsageError, match="`trace:` brings its own train"):
        load_stream([{"trace": "a", "llmcl": "b", "name": "x"}], base_dir=tmp_path)
    with pytest.raises(UsageError, match="must be text"):
        load_stream([{"trace": 3}], base_dir=tmp_path)
    write(tmp_path / "bad" / "train.json", [{"prompt": "a", "answer": "b"}, {"prompt": "", "answer": "b"}])
    with pytest.raises(DataError, match=r"bad/train\.json:1: 'prompt' is empty"):
        read_trace(tmp_path / "bad", "train")
    assert len(read_trace(tmp_path / "bad", "train", on_bad_row="skip").rows) == 1


MEDICAL = {
    "id": "1", "question": "Which?", "opa": "one", "opb": "two", "opc": "three", "opd": "four", "cop": 2,
    "choice_type": "single", "exp": None, "subject_name": "s", "topic_name": None,
}  # fmt: skip
LAW = {"id": "1", "statement": "哪项？", "option_list": {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}, "answer": ["C"]}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def test_medmcqa(tmp_path):
    lines(tmp_path / "train.json", [MEDICAL, MEDICAL | {"choice_type": "multi"}, MEDICAL | {"cop": 4}])
    lines(tmp_path / "dev.json", [MEDICAL | {"question": "Judged?"}])
    lines(tmp_path / "test.json", [{key: value for key, value in MEDICAL.items() if key != "cop"}])
    reading = read_llmcl(tmp_path, "train")
    assert [row.answer for row in reading.rows] == ["B", "D"]
    assert reading.rows[0].prompt == (
        "Solve the following medical problem by choosing the correct answer from following four choices.\n"
        "Question:\nWhich?\nChoices: \nA.one, B.two, C.three, D.four\n Answer:"
    )
    assert reading.notes == ["train.json: 1 questions with several right answers left out"]
    assert "Judged?" in read_llmcl(tmp_path, "test").rows[0].prompt, "test.json has no answers"
    for broken, said in (({"cop": 5}, "'cop' must be"), ({"opb": None}, "'opb' must be"), ({"cop": True}, "'cop'")):
        lines(tmp_path / "train.json", [MEDICAL, MEDICAL | broken])
        with pytest.raises(DataError, match=rf"train\.json:2: {said}"):
            read_llmcl(tmp_path, "train")
    lines(tmp_path / "train.json", [MEDICAL | {"choice_type": "multi"}] * 2)
    with pytest.raises(DataError, match=r"no rows \(all 2 left out\)"):
        read_llmcl(tmp_path, "train")
    lines(tmp_path / "train.json", [{"question": "a", "label": "b"}])
    with pytest.raises(DataError, match=r"train\.json:1: no known columns \(found: question, label\)"):
        read_llmcl(tmp_path, "train")


def test_jecqa(tmp_path):
    lines(tmp_path / "0_train.json", [LAW, LAW | {"answer": ["A", "B"]}])
    lines(tmp_path / "1_train.json", [LAW | {"answer": ["D"]}])
    reading = read_llmcl(tmp_path, "train")
    assert [row.answer for row in reading.rows] == ["C", "D"]
    assert reading.rows[0].prompt == (
        "根据以下法律问题，从选项A，B，C，D中选择一项正确的答案\n"
        "问题：哪项？\n选项: \nA. 甲，B. 乙，C. 丙，D. 丁\n 答案:"
    )
    assert reading.notes == ["0_train.json: 1 questions with several right answers left out"]
    assert len(read_llmcl(tmp_path, "test").rows) == 1
    for broken in ({"answer": "C"}, {"answer": []}, {"answer": ["E"]}, {"option_list": ["甲"]}):
        lines(tmp_path / "1_train.json", [LAW | broken])
        with pytest.raises(DataError, match=r"1_train\.json:1: "):
            read_llmcl(tmp_path, "train")


def test_what_a_benchmark_takes_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGETLESS_DATA", str(tmp_path))
    lines(tmp_path / "medmcqa" / "train.json", [MEDICAL | {"question": f"Q{i}"} for i in range(7)])
    lines(tmp_path / "medmcqa" / "dev.json", [MEDICAL | {"question": f"Q{i}"} for i in range(6)])
    data = dataclasses.replace(STREAMS["ilora"].tasks[6], first=4, last=2)
    train, test = benchmarks.read(data, "train"), benchmarks.read(data, "test")
    assert len(train.rows) == 4 and train.notes == ["train: the first 4 of 7 rows, as its code has it"]
    assert "Q4" in test.rows[0].prompt and test.notes == ["test: the last 2 of 6 rows, as its code has it"]
    instruction = train.rows[0].prompt
    assert instruction.startswith(alpaca_prompt("x").split("x")[0]) and instruction.endswith("### Response:\n")


# ---------------------------------------------------------------- the listing


def test_the_listing(small, capsys):
    assert main(["streams"]) == 0
    text = capsys.readouterr().out
    for name in NAMED_STREAMS:
        assert re.search(rf"^{name}: ", text, re.M), name
    assert "names the data set" in text and OLORA.revision in text and "here: no, missing all of them" in text
    assert main(["streams", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == list(NAMED_STREAMS)
    assert told["order-1"]["train"] == 33_000 and told["order-1"]["test"] == 30_400
    assert told["small"]["available"] and not told["order-1"]["available"]
    assert told["order-4"]["majority"]["BoolQA"] == 0.622 and told["order-4"]["majority"]["yahoo"] is None


def test_one_stream_in_full(small, capsys):
    assert main(["streams", "small"]) == 0
    text = capsys.readouterr().out
    first, second = STREAMS["small"].tasks
    for part in first.parts + second.parts:
        assert f"sha256 {part.sha256}" in text
    assert "1. news: 20 rows to learn from, 6 to be judged by" in text and "majority answer: 66.7% ('sport')" in text
    assert "here: yes, no network needed" in text and "git clone https://github.com/cmnfriend/O-LoRA" in text
    assert main(["streams", "small", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [file["state"] for file in told["tasks"][0]["files"]] == ["as pinned"] * 3
    write(small / "trace" / "FOMC" / "test.json", [])
    told = describe_stream("small")
    assert told["missing"] == ["FOMC"] and told["tasks"][1]["files"][2]["state"] == "differs"
    assert "here: no, missing FOMC" in as_text(told)


def test_files_that_cannot_be_read_are_listed(small, monkeypatch):
    path = write(small / "trace" / "FOMC" / "train.json", [{"prompt": "a"}])
    named = STREAMS["small"]
    parts = (part(path), *named.tasks[1].parts[1:])
    two = dataclasses.replace(named.tasks[1], parts=parts)
    monkeypatch.setitem(STREAMS, "small", dataclasses.replace(named, tasks=(two,)))
    assert "cannot be read: " in " ".join(as_text(describe_stream("small")).split())


def test_the_listing_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGETLESS_DATA", str(tmp_path))
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path))
    for name in NAMED_STREAMS:
        told = describe_stream(name)
        assert not told["available"] and told["name"] in as_text(told, 60)
    assert len(list_as_text(list_streams(), 60).splitlines()) > 50


def test_names_that_are_near(capsys):
    assert main(["streams", "order1"]) == 1
    assert "no stream 'order1'; did you mean 'order-1'" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UsageError, match="did you mean 'order-1'"):
        load_stream("order1")
    assert main(["streams", "--jso"]) == 1
