"""A run goes on: tasks added later, on another machine, with a newer version, after old rows were deleted."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import make_task
from run_folders import made_run

import forgetless.learning.again as again
from forgetless.cli import VERBS, main
from forgetless.cli.learn import parse_learn
from forgetless.config import LearnConfig
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import DataError, RunError, UsageError
from forgetless.geometry.borders import is_run
from forgetless.learning.forget_rows import forget_rows
from forgetless.learning.stream import learn
from forgetless.methods import METHODS, Method
from forgetless.runs.folder import RunFolder, complete, read_json, read_lines, write_json
from forgetless.runs.seal import write_sealed
from forgetless.runs.shapes import read_run
from forgetless.subjects.models import find_subjects

TRAIN = {"learning_rate": 2e-2, "num_train_epochs": 1.0, "batch_size": 6, "r": 4, "max_length": 64, "device": "cpu",
         "forgetting_prompts": 0, "precision": "fp32"}  # fmt: skip


def config(tiny, stream, folder, **more) -> LearnConfig:
    return LearnConfig(**(TRAIN | {"model": tiny, "stream": stream, "output_dir": str(folder)} | more))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("times", ".lock"))
    }


def without_rows(task: Task) -> Task:
    return Task(task.name, (), (), (), gone="they were deleted")


@pytest.fixture(scope="module")
def free() -> Task:
    """A task whose answers are free."""
    rows = tuple(Row(f"Letter number {n} of the novel {n * 7}:", f" secret-{n}", source=f"f:{n}") for n in range(6))
    return Task("letters", rows, (), rows[:3], (), ("exact_match",), max_new_tokens=4)


@pytest.fixture(scope="module")
def replayed(tiny, two, free, tmp_path_factory) -> Path:
    """Learnt with replay: colours, sizes, letters."""
    folder = tmp_path_factory.mktemp("again") / "run"
    learn(config(tiny, Stream("mine", (*two.tasks, free)), folder, method="replay", method_options={"memory": "50%"}))
    return folder


# --------------------------------------------------------------------------------- again and again


@pytest.mark.parametrize(
    "name",
    ["ilora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("per_task", "sdlora"))],
)
def test_three_tasks_in_three_commands_give_the_bytes_of_one(name, tiny, three, free, tmp_path):
    tasks = (free, *three.tasks[:2])  # the first task's scores do not depend on the others' labels
    learn(config(tiny, Stream("mine", tasks), tmp_path / "one", method=name))
    for count in (1, 2, 3):
        learn(config(tiny, Stream("mine", tasks[:count]), tmp_path / "parts", method=name))
    parts, one = ({file: data for file, data in contents(tmp_path / run).items() if not file.startswith("report")}
                  for run in ("parts", "one"))  # fmt: skip
    assert parts == one  # a report names its folder


def test_scores_that_do_not_depend_on_the_new_task_are_not_made_again(tiny, free, sizes, tmp_path, monkeypatch):
    from forgetless.score.scorers import Scorer

    learn(config(tiny, Stream("mine", (free,)), tmp_path / "run"))
    scored, real = [], Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, task, **how: scored.append(task.name) or real(self, task))
    learn(config(tiny, Stream("mine", (free, sizes)), tmp_path / "run"))
    assert scored == ["sizes", "sizes", "letters", "sizes"]  # base, after letters, after sizes


def test_joint_training_begins_anew(tiny, two, tmp_path):
    learn(config(tiny, Stream("mine", two.tasks[:1]), tmp_path / "run", method="joint", max_steps=1))
    with pytest.raises(RunError, match=r"joint learns all its tasks together.*another output_dir"):
        learn(config(tiny, two, tmp_path / "run", method="joint", max_steps=1))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda one, two: (replace(one, train=one.train[1:]), two),
            r"task 1 \(colours\).*training rows.*12 then, 11 now",
        ),
        (lambda one, two: (replace(one, scorers=("options",)), two), r"scorers were \['options', 'exact_match'\]"),
        (lambda one, two: (one, replace(two, options=("small", "large", "big"))), r"task 2 \(sizes\).*options were"),
        (lambda one, two: (replace(one, max_new_tokens=9), two), "max_new_tokens were 4, are now 9"),
        (lambda one, two: (two, one), "task 1 of this run is 'colours', now it is 'sizes'; the order has changed"),
        (lambda one, two: (replace(one, name="hues"), two), "task 1 of this run is 'colours', now it is 'hues'"),
        (lambda one, two: (replace(one, name="hues"), replace(two, name="weights")), "'hues' are those of 'colours'"),
        (lambda one, two: (one,), "task 2 of this run is 'sizes', now it is 'gone'"),
    ],
)
def test_what_changed_in_an_earlier_task_is_named(change, said, tiny, colours, sizes, replayed):
    before = contents(replayed)
    options = {"method": "replay", "method_options": {"memory": "50%"}}
    with pytest.raises(RunError, match=said):
        learn(config(tiny, Stream("mine", change(colours, sizes)), replayed, **options))
    assert contents(replayed) == before


def test_a_changed_option_of_the_method_is_named_alone(tiny, two, replayed):
    with pytest.raises(RunError, match=r"begun with method\.memory='50%', now it is '20%'"):
        learn(config(tiny, two, replayed, method="replay", method_options={"memory": "20%"}))


def test_moved_with_its_base_and_with_a_newer_version(tiny, three, tmp_path, monkeypatch, capsys):
    learn(config(tiny, Stream("mine", three.tasks[:2]), tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    shutil.copytree(tiny, tmp_path / "base")
    real = again.facts
    newer = {"versions": again.versions() | {"forgetless": "9.0"}, "machine": "NVIDIA H100"}
    monkeypatch.setattr(again, "facts", lambda session: real(session) | newer)
    summary = learn(config(str(tmp_path / "base"), three, tmp_path / "there"))
    assert "sounds is learnt with forgetless 9.0 (before: " in " ".join(capsys.readouterr().err.split())
    history = read_json(tmp_path / "there" / "run.json")["history"]
    assert [entry["from"] for entry in history] == [1, 3]
    assert [entry["lessons"] for entry in summary["history"]] == [["colours", "sizes"], ["sounds"]]
    report = (tmp_path / "there" / "report.md").read_text()
    assert "sounds was learnt with forgetless 9.0 (before: " in report and "NVIDIA H100 (before: " in report
    learn(config(str(tmp_path / "base"), three, tmp_path / "there"))  # nothing was learnt: no new entry
    assert read_json(tmp_path / "there" / "run.json")["history"] == history
    moved, whole = tmp_path / "there", tmp_path / "whole"
    learn(config(tiny, three, whole))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = ((run / "tasks" / "02-sizes" / "adapter" / file).read_bytes() for run in (moved, whole))
        assert ours == theirs


def test_a_place_of_the_history_has_one_entry(tiny, two, tmp_path, monkeypatch):
    """Stopped before anything was kept: the new entry stands for the old one. Stopped inside a task: from that step."""
    real, used = again.facts, {"machine": "first"}
    monkeypatch.setattr(again, "facts", lambda session: real(session) | used)
    told = config(tiny, two, tmp_path / "run", max_steps=3)

    def stopped_at(step: int, saves: int) -> list[tuple]:
        def stop(self, examples, at):
            if at == step:
                raise KeyboardInterrupt
            return plain(self, examples, at)

        plain = Method.batch
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Method, "batch", stop)
            learn(replace(told, save_steps=saves))
        return entries()

    def entries() -> list[tuple]:
        history = read_json(tmp_path / "run" / "run.json")["history"]
        return [(entry["from"], entry.get("step", 0), entry["machine"]) for entry in history]

    assert stopped_at(1, saves=0) == [(1, 0, "first")]
    used["machine"] = "second"
    assert stopped_at(2, saves=1) == [(1, 0, "second")]
    used["machine"] = "third"
    assert stopped_at(2, saves=0) == [(1, 0, "second"), (1, 2, "third")]
    used["machine"] = "fourth"
    learn(told)
    assert entries() == [(1, 0, "second"), (1, 2, "fourth")]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "colours, sizes were learnt (the first after step 2) with machine fourth (before: second)" in report


def test_a_folder_of_an_older_format(tiny, two, replayed, tmp_path, capsys):
    shutil.copytree(replayed, tmp_path / "old")
    told = read_json(tmp_path / "old" / "run.json")
    (tmp_path / "old" / "run.json").write_text(json.dumps(told | {"format": 0}))
    for use in (
        lambda: learn(config(tiny, two, tmp_path / "old")),
        lambda: find_subjects(str(tmp_path / "old")),
        lambda: forget_rows(tmp_path / "old", "colours"),
    ):
        with pytest.raises(RunError, match=r"run\.json: format 0 instead of 1.*go on with the version that wrote it"):
            use()
    assert main(["report", str(tmp_path / "old")]) == 1


# --------------------------------------------------------------------------------- old rows are gone


def test_the_new_task_alone_goes_on(tiny, two, sounds, tmp_path, capsys):
    """The old rows are deleted: what was scored stays, replay goes on, and the adapters are those of the whole run."""
    options = {"method": "replay", "method_options": {"memory": 6}}
    learn(config(tiny, two, tmp_path / "run", **options))
    for _ in range(2):  # the same command again finds nothing to do
        summary = learn(config(tiny, Stream("june", (sounds,)), tmp_path / "run", **options))
    assert "colours: the stream leaves it out, so it is not scored" in " ".join(capsys.readouterr().err.split())
    whole = learn(config(tiny, Stream("whole", (*two.tasks, sounds)), tmp_path / "whole", **options))
    assert [task["name"] for task in summary["tasks"]] == ["colours", "sizes", "sounds"]
    mine, theirs = contents(tmp_path / "run"), contents(tmp_path / "whole")
    for file in theirs:
        if file.startswith("tasks/03") and "/scores/" not in file:
            assert mine[file] == theirs[file], file
    assert summary["headline"]["matrix"][0] == [*whole["headline"]["matrix"][0][:2], whole["headline"]["matrix"][0][2]]
    assert summary["headline"]["matrix"][2] == [None, None, whole["headline"]["matrix"][2][2]]
    union = summary["measures"]["likelihood_union"]["matrix"]
    assert union[0][:2] == [None, None]  # the labels of sounds are new, and the old rows cannot be asked again
    assert summary["metrics"]["average_accuracy"]["value"] == whole["headline"]["matrix"][2][2]
    assert summary["metrics"]["bwt"]["value"] is None
    report = (tmp_path / "run" / "report.md").read_text()
    assert "No rows any more of colours, sizes" in report and "cannot compute" in report
    back = learn(config(tiny, Stream("whole", (*two.tasks, sounds)), tmp_path / "run", **options))  # from a backup
    assert back["headline"] == whole["headline"] and back["measures"] == whole["measures"]


def test_marked_or_missing_files(tiny, tmp_path):
    def write(name, rows):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"{name} {i}:", "answer": " yes"}) + "\n" for i in range(rows)))
        return {"name": name, "train": file.name, "test": file.name, "validation": 0}

    stream = tmp_path / "stream.yaml"
    tasks = [write("a", 4), write("b", 5)]
    stream.write_text(yaml.safe_dump({"tasks": tasks}))
    learn(config(tiny, str(stream), tmp_path / "run"))
    (tmp_path / "a.jsonl").unlink()
    tasks = [tasks[0], {"name": "b", "rows": "gone"}, write("c", 6)]
    stream.write_text(yaml.safe_dump({"tasks": tasks}))
    summary = learn(config(tiny, str(stream), tmp_path / "run"))
    assert summary["learned"] == ["a", "b", "c"]
    assert [task.get("gone", "") for task in summary["tasks"]] == [
        f"{tmp_path / 'a.jsonl'} is not there", "the stream says `rows: gone`", ""
    ]  # fmt: skip
    assert [task["train"] for task in summary["tasks"]] == [4, 5, 6]  # as it was learnt
    with pytest.raises(DataError, match=r"task a: .*a\.jsonl is not there, and .* has not learnt it"):
        learn(config(tiny, str(stream), tmp_path / "new"))
    marked = {"tasks": tasks[1:]}
    assert [task.name for task in load_stream(marked, base_dir=tmp_path).tasks] == ["c"]
    with pytest.raises(UsageError, match=r"`rows: 'lost'` must be 'gone'"):
        load_stream({"tasks": [{"name": "b", "rows": "lost"}]})


def test_rows_that_are_needed_are_asked_for(tiny, two, tmp_path):
    gone = Stream("two", (two.tasks[0], without_rows(two.tasks[1])))
    with pytest.raises(DataError, match=r"task sizes: they were deleted, and .* has not learnt it"):
        learn(config(tiny, gone, tmp_path / "run"))
    learn(config(tiny, two, tmp_path / "joint", method="joint", max_steps=1))
    learn(config(tiny, gone, tmp_path / "joint", method="joint", max_steps=1))  # finished: nothing is needed
    shutil.rmtree(tmp_path / "joint" / "tasks" / "01-joint")
    with pytest.raises(DataError, match=r"task sizes"):
        learn(config(tiny, gone, tmp_path / "joint", method="joint", max_steps=1))


def test_per_task_scores_of_gone_rows_stay_true(tiny, two, sounds, tmp_path):
    """Each task has weights of its own, so the old score is the score."""
    learn(config(tiny, two, tmp_path / "run", method="per_task"))
    gone = Stream("mine", (*map(without_rows, two.tasks), sounds))
    matrix = learn(config(tiny, gone, tmp_path / "run", method="per_task"))["headline"]["matrix"]
    assert matrix[2][0] == matrix[0][0] is not None and matrix[2][1] == matrix[1][1] is not None


# --------------------------------------------------------------------------------- rows are deleted


def texts_anywhere(folder: Path, text: str) -> list[str]:
    return [name for name, data in contents(folder).items() if text.encode() in data]


def test_forgotten_rows_are_nowhere(tiny, two, free, sounds, replayed, tmp_path, capsys):
    shutil.copytree(replayed, tmp_path / "run")
    run = tmp_path / "run"
    before = read_json(run / "summary.json")
    kept = [
        record for record in read_lines(run / "tasks" / "03-letters" / "memory" / "rows.jsonl") if record["task"] == 2
    ]
    texts = [record[key].strip() for record in kept for key in ("prompt", "answer")]
    assert len(kept) == 3 and all(texts_anywhere(run, text) for text in texts)
    assert main(["forget-rows", str(run), "letters"]) == 0
    assert "03-letters 3" in capsys.readouterr().out
    for text in (*texts, "secret-", "of the novel"):
        assert texts_anywhere(run, text) == [], text
    records = read_lines(run / "forgotten-rows.jsonl")
    assert [one["status"] for one in records] == ["deleting", "deleted"]
    assert records[1]["rows"] == {"03-letters": 3} and records[1]["task"] == "letters" and "at" not in records[1]
    assert "forget-rows letters" in (run / "times.jsonl").read_text()
    after = read_json(run / "summary.json")
    assert after["headline"] == before["headline"] and after["forgotten"] == before["forgotten"]
    assert "The kept rows of letters (3) were deleted" in (run / "report.md").read_text()
    assert main(["forget-rows", str(run), "letters"]) == 0  # again: nothing is left, nothing breaks
    assert find_subjects(str(run))[-1].name.endswith("03-letters") and is_run(str(run))
    summary = learn(
        config(tiny, Stream("mine", (*two.tasks, free, sounds)), run, method="replay", method_options={"memory": "50%"})
    )
    assert summary["learned"][-1] == "sounds"
    owners = {record["task"] for record in read_lines(run / "tasks" / "04-sounds" / "memory" / "rows.jsonl")}
    assert owners == {0, 1, 3}


def test_forgotten_rows_of_a_reservoir_count_as_never_seen(tiny, two, sounds, tmp_path):
    told = config(tiny, two, tmp_path / "run", method="replay", method_options={"memory": 8}, max_steps=1, cells="last")
    learn(told)
    states = [tmp_path / "run" / "tasks" / name / "method.json" for name in ("01-colours", "02-sizes")]
    assert [read_json(file)["seen"] for file in states] == [12, 24]
    forget_rows(tmp_path / "run", "colours")
    assert [read_json(file) for file in states] == [
        {"seen": 0, "forgotten": {"0": 12}, "replaced": 0}, {"seen": 12, "forgotten": {"0": 12}, "replaced": 0}
    ]  # fmt: skip
    record = read_lines(tmp_path / "run" / "forgotten-rows.jsonl")[-1]
    assert record["seen"] == {"01-colours": [12, 0], "02-sizes": [24, 12]} and record["rows"]["01-colours"] == 8
    assert forget_rows(tmp_path / "run", "colours")["seen"] == {}  # again: they count as never seen already
    assert [read_json(file)["seen"] for file in states] == [0, 12]
    learn(replace(told, stream=Stream("mine", (*two.tasks, sounds))))
    last = read_json(tmp_path / "run" / "tasks" / "03-sounds" / "method.json")
    assert last == {"seen": 24, "forgotten": {"0": 12}, "replaced": 12}
    kept = read_lines(tmp_path / "run" / "tasks" / "03-sounds" / "memory" / "rows.jsonl")
    assert len(kept) == 8 and {record["task"] for record in kept} == {1, 2}


def test_rows_that_a_reservoir_has_dropped_count_as_never_seen_too(tiny, two, tmp_path):
    """A combined method; the memory has no room for colours any more, and still must forget that it saw them."""
    told = config(tiny, two, tmp_path / "run", method="replay+olora", method_options={"memory": 1}, max_steps=1)
    learn(told)
    memory = tmp_path / "run" / "tasks" / "02-sizes" / "memory" / "rows.jsonl"
    [kept] = read_lines(memory)
    name = two.tasks[1 - kept["task"]].name  # the task of which nothing is kept
    record = forget_rows(tmp_path / "run", name)
    assert record["seen"]["02-sizes"] == [24, 12] and "02-sizes" not in record["rows"]
    assert read_lines(memory) == [kept]
    assert read_json(memory.parents[1] / "method.json")["replay"]["seen"] == 12


def test_joint_keeps_no_rows_and_forgets_texts(tiny, two, free, tmp_path, capsys):
    told = config(tiny, Stream("mine", (two.tasks[0], free)), tmp_path / "run", method="joint", max_steps=1)
    learn(told)
    assert texts_anywhere(tmp_path / "run", "secret-")
    assert main(["forget-rows", str(tmp_path / "run"), "letters"]) == 0
    assert "none were kept" in capsys.readouterr().out
    assert not texts_anywhere(tmp_path / "run", "secret-")
    record = read_lines(tmp_path / "run" / "forgotten-rows.jsonl")[-1]
    assert record["rows"] == {} and record["seen"] == {} and record["texts"] > 0
    assert "No training rows of letters were kept" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(UsageError, match="has learnt no task 'joint'"):
        forget_rows(tmp_path / "run", "joint")
    assert learn(told)["status"] == "complete"


def test_rows_kept_together_cannot_be_told_apart(tiny, two, tmp_path, monkeypatch):
    """A method from outside that learns all tasks together and keeps rows of them."""
    monkeypatch.setattr(METHODS["replay"], "lessons", METHODS["joint"].lessons)
    learn(config(tiny, two, tmp_path / "run", method="replay", max_steps=1))
    with pytest.raises(RunError, match=r"rows\.jsonl: keeps rows of several tasks .*does not say which is whose"):
        forget_rows(tmp_path / "run", "colours")


def test_a_long_label_is_no_text_of_a_row(tiny, tmp_path):
    """Labels stand in run.json and in scores, which stay; rows that are answered with them go."""
    news = make_task("news", {"sky": "entertainment", "sea": "economics"}, "topic")
    learn(config(tiny, Stream("news", (news,)), tmp_path / "run", method="replay", method_options={"memory": "100%"}))
    assert forget_rows(tmp_path / "run", "news")["rows"] == {"01-news": len(news.train)}
    assert "entertainment" in (tmp_path / "run" / "run.json").read_text()


def test_what_a_kill_left_between_two_renames_is_put_back(replayed, tmp_path):
    run = RunFolder(Path(shutil.copytree(replayed, tmp_path / "run")))
    [task] = run.root.glob("tasks/01-*")
    task.rename(task.with_name(f".{task.name}.previous"))
    with run.locked():
        assert complete(task) and not list(run.root.rglob(".*.previous"))


def test_a_task_that_is_not_learnt_yet_is_refused(tiny, two, tmp_path, monkeypatch):
    """Stopped inside sizes: its rows would be kept by the next `learn`, whatever a record said."""
    real = METHODS["replay"].batch

    def stopped(self, examples, step):
        if self.task == 1 and step == 1:
            raise KeyboardInterrupt
        return real(self, examples, step)

    monkeypatch.setattr(METHODS["replay"], "batch", stopped)
    run = tmp_path / "run"
    told = config(tiny, two, run, method="replay", method_options={"memory": "50%"}, save_steps=1, cells="last")
    with pytest.raises(KeyboardInterrupt):
        learn(told)
    assert list(run.glob("checkpoints/02-sizes/step-*")) and not (run / "tasks" / "02-sizes").exists()
    for row in two.tasks[1].train:
        assert texts_anywhere(run, row.prompt) == []  # a checkpoint inside a task holds none of its rows
    shutil.copytree(run / "tasks" / "01-colours", run / "tasks" / ".02-sizes.writing")  # killed at its end
    with pytest.raises(UsageError, match=r"run: has not learnt 'sizes' yet.*leave it out of the stream, in another"):
        forget_rows(run, "sizes")
    assert not (run / "forgotten-rows.jsonl").exists() and not list(run.rglob(".*.writing"))
    with pytest.raises(RunError, match="another output_dir"):  # it is a task of this folder
        learn(replace(told, stream=Stream("one", two.tasks[:1])))
    assert forget_rows(run, "colours")["rows"] == {"01-colours": 6}


def test_joint_that_is_not_learnt_yet_is_refused(tmp_path):
    run = made_run(tmp_path / "run", "joint", more={"lessons": [{"name": "joint", "last_task": 2}]})
    with pytest.raises(UsageError, match="has not learnt 'b' yet"):
        forget_rows(run, "b")
    (run / "tasks" / "01-a").rename(run / "tasks" / "01-joint")
    assert forget_rows(run, "b")["rows"] == {}


def test_rows_in_a_later_memory_are_forgotten_without_the_folder_of_their_task(replayed, tmp_path):
    run = Path(shutil.copytree(replayed, tmp_path / "run"))
    shutil.rmtree(run / "tasks" / "02-sizes")
    with pytest.raises(RunError, match="02-sizes: is missing"):  # said by the page, once the rows are gone
        forget_rows(run, "sizes")
    owners = [record["task"] for record in read_lines(run / "tasks" / "03-letters" / "memory" / "rows.jsonl")]
    assert set(owners) == {0, 2}


def test_texts_that_other_tasks_have_too_are_theirs(tiny, tmp_path):
    """The same free answer, and a label of another task."""
    said = [" I do not know that.", " entertainment"]
    first, second = (
        Task(name, tuple(rows), (), tuple(rows[:2]), (), ("exact_match",), max_new_tokens=4)
        for name in ("aa", "bb")
        for rows in [[Row(f"A question to {name}, number {n}:", said[n % 2], source=f"{name}:{n}") for n in range(6)]]
    )
    news = make_task("news", {"sky": "entertainment", "sea": "economics"}, "topic")
    told = config(tiny, Stream("mine", (first, replace(second, train=second.train[::2]), news)), tmp_path / "run",
                  method="replay", method_options={"memory": "100%"}, max_steps=1)  # fmt: skip
    learn(told)
    assert forget_rows(tmp_path / "run", "aa")["rows"] == {"01-aa": 6, "02-bb": 6, "03-news": 6}
    assert not texts_anywhere(tmp_path / "run", "A question to aa")
    assert texts_anywhere(tmp_path / "run", "I do not know that.")
    assert learn(told)["status"] == "complete"


def test_files_of_the_run_are_never_to_be_deleted(replayed, tmp_path):
    """A method from outside may keep texts where `forget-rows` knows of none."""
    run = RunFolder(Path(shutil.copytree(replayed, tmp_path / "run")))
    task = run.root / "tasks" / "01-colours"
    prompt = read_lines(task / "memory" / "rows.jsonl")[0]["prompt"]
    with run.publish(task) as temporary:
        shutil.copytree(task, temporary, dirs_exist_ok=True)
        write_json(temporary / "method.json", read_json(task / "method.json") | {"kept": prompt})
    with pytest.raises(RunError, match=r"method\.json: .*which forgetless wrote, .*learn again without") as found:
        forget_rows(run.root, "colours")
    assert "delete it" not in str(found.value)
    assert not any(one["task"] == 0 for one in read_lines(task / "memory" / "rows.jsonl"))


def test_what_another_command_wrote_before_the_lock_stays(replayed, tmp_path, monkeypatch):
    run, real = Path(shutil.copytree(replayed, tmp_path / "run")), RunFolder.locked
    told = read_run(run)
    write_sealed(run / "run.json", told | {"status": "running"})

    @contextmanager
    def late(self):
        write_sealed(self.config, told)  # a `learn` ends
        with real(self):
            yield

    monkeypatch.setattr(RunFolder, "locked", late)
    forget_rows(run, "letters")
    assert read_run(run)["status"] == "complete"


def test_what_a_kill_left_unfinished_is_deleted(replayed, tmp_path):
    run = Path(shutil.copytree(replayed, tmp_path / "run"))
    (run / "blended").mkdir()
    left = [
        Path(shutil.copytree(run / "tasks" / "03-letters", run / place))
        for place in ("tasks/.04-sounds.writing", "tasks/.03-letters.previous", "checkpoints/04-sounds/.step.removing",
                      "blended/.adapter.writing")
    ]  # fmt: skip
    (run / ".report.md.writing").write_text("secret-1")
    forget_rows(run, "letters")
    assert [folder.exists() for folder in left] == [False, False, False, True]  # a blend may be at work
    shutil.rmtree(run / "blended")
    assert not texts_anywhere(run, "secret-")


def test_what_cannot_be_forgotten_is_named(replayed, tmp_path):
    with pytest.raises(UsageError, match=r"has learnt no task 'colour'; did you mean 'colours'\?"):
        forget_rows(replayed, "colour")
    with pytest.raises(UsageError, match=r"no run\.json"):
        forget_rows(tmp_path, "colours")
    shutil.copytree(replayed, tmp_path / "run")
    prompt = read_lines(tmp_path / "run" / "tasks" / "01-colours" / "memory" / "rows.jsonl")[0]["prompt"]
    (tmp_path / "run" / "mine.txt").write_text(f"see: {prompt}")
    with pytest.raises(RunError, match=r"mine\.txt: .*holds text of theirs; delete it"):
        forget_rows(tmp_path / "run", "colours")


# --------------------------------------------------------------------------------- what the page says


def test_the_page_is_true(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "again.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("forgetless ")]
    assert len(commands) == 3
    for line in commands:
        verb, *arguments = line.split()[1:]
        assert verb in VERBS
        if verb == "learn":
            assert parse_learn(arguments).method in METHODS
    [stream] = re.findall(r"```yaml\n(.*?)```", page, re.S)
    row = json.dumps({"prompt": "It rings:", "answer": " phone"}) + "\n"
    (tmp_path / "product.jsonl").write_text(row * 20)
    (tmp_path / "product-test.jsonl").write_text(row)
    tasks = load_stream(yaml.safe_load(stream), base_dir=tmp_path, keep_gone=True).tasks
    assert [bool(task.gone) for task in tasks] == [True, False]
