"""`learn` from end to end on the tiny model: the run folder, going on, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from forgetless.cli import main
from forgetless.config import LearnConfig
from forgetless.data.tasks import Stream
from forgetless.errors import ForgetlessError, RunError, UsageError
from forgetless.learning.stream import learn
from forgetless.methods import METHODS
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import load_base
from forgetless.runs.folder import read_json, read_lines

TRAIN = {"learning_rate": 2e-2, "num_train_epochs": 1.0, "batch_size": 4, "r": 4, "max_length": 64, "device": "cpu",
         "forgetting_prompts": 0}  # fmt: skip


def config(tiny, stream, folder, **more) -> LearnConfig:
    told = {"model": tiny, "stream": stream, "output_dir": str(folder), "precision": "fp32"}
    return LearnConfig(**(TRAIN | told | more))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that must be the same in equal runs: all but times and locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("times", ".lock", "report"))
    }


@pytest.fixture(scope="module")
def ran(tiny, three, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    summary = learn(config(tiny, three, folder, method="ilora", method_options={"memory": 6}))
    return folder, summary


def test_the_run_folder_is_complete(ran):
    folder, summary = ran
    assert summary["status"] == "complete" and summary["learned"] == ["colours", "sizes", "sounds"]
    for name in ("run.json", "matrix.json", "summary.json", "report.html", "report.md", "report.json"):
        assert (folder / name).exists(), name
    task = folder / "tasks" / "02-sizes"
    for name in ("adapter/adapter_model.safetensors", "method.safetensors", "memory/rows.jsonl", "log.jsonl"):
        assert (task / name).exists(), name
    assert (task / "memory" / "HOLDS_TRAINING_ROWS").exists()
    assert not [path for path in (task / "adapter").iterdir() if "row" in path.name or "predict" in path.name]
    stored = read_json(folder / "run.json")
    assert set(stored["base"]) == {"weights", "tokenizer", "chat_template", "settings"}
    assert stored["versions"]["torch"] == torch.__version__


def test_matrix_base_union_views_and_predictions(ran, three):
    folder, summary = ran
    assert len(summary["headline"]["matrix"]) == 3 and None not in summary["headline"]["base"]
    assert summary["measures"]["likelihood_union"]["matrix"][2][0] is not None
    exact = summary["measures"]["exact_match"]["matrix"][0]
    assert exact[0] is not None and exact[1:] == [None, None]
    assert set(summary["views"]) == {"fast"}
    records = read_lines(folder / "tasks" / "03-sounds" / "scores" / "predictions.jsonl")
    assert len(records) == 2 * sum(len(task.test) for task in three.tasks)  # slow and fast
    for task, column in zip(three.tasks, range(3), strict=True):
        mine = [r for r in records if r["task"] == task.name and r["view"] == "deployed"]
        share = sum(r["likelihood"]["score"] for r in mine) / len(mine)
        assert share == pytest.approx(summary["headline"]["matrix"][2][column])
        counts = summary["counts"]["after"][2][column]
        assert sum(counts.values()) == len(mine)


def test_same_seed_same_bytes(ran, tiny, three, tmp_path):
    folder, _ = ran
    learn(config(tiny, three, tmp_path / "one", method="ilora", method_options={"memory": 6}))
    assert contents(tmp_path / "one") == contents(folder)


def test_finished_tasks_are_not_learnt_again_and_a_longer_stream_goes_on(ran, tiny, three, tmp_path):
    """One task, then three: the bytes of learning three at once, except the base scores' and first rows' columns."""
    folder, _ = ran
    mine = tmp_path / "one"
    options = {"method": "ilora", "method_options": {"memory": 6}}
    learn(config(tiny, Stream("three", three.tasks[:1]), mine, **options))
    kept = (mine / "tasks" / "01-colours" / "times.json").read_bytes()
    learn(config(tiny, three, mine, **options))
    assert (mine / "tasks" / "01-colours" / "times.json").read_bytes() == kept
    ours, theirs = contents(mine), contents(folder)
    for name in theirs:
        if name.startswith("tasks/0") and "/scores/" not in name:
            assert ours[name] == theirs[name], name
    assert ours["adapter/adapter_model.safetensors"] == theirs["adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["ilora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdlora", "ewc"))])
def test_a_run_goes_on_where_it_stopped(name, tiny, three, tmp_path, monkeypatch):
    """Stopped while the last task is learnt; the same command again gives the uninterrupted bytes."""
    import forgetless.learning.stream as module

    whole = learn(config(tiny, three, tmp_path / "whole", method=name))
    real, calls = module.learn_task, []

    def stops(*arguments, **options):
        calls.append(options["task"])
        if options["task"] == len(whole["learned"]) - 1 and len(calls) <= len(whole["learned"]):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "learn_task", stops)
    with pytest.raises(KeyboardInterrupt):
        learn(config(tiny, three, tmp_path / "parts", method=name))
    learn(config(tiny, three, tmp_path / "parts", method=name))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_stopped_and_gone_on_in_bf16(tiny, three, tmp_path):
    """Finished pairs are rounded when they are joined: once and for all, stopped or not."""
    told = {"method": "olora", "precision": "bf16", "cells": "last", "num_train_epochs": 1.0}
    for count in (1, 2, 3):
        learn(config(tiny, Stream("three", three.tasks[:count]), tmp_path / "parts", **told))
    learn(config(tiny, three, tmp_path / "whole", **told))
    parts, whole = contents(tmp_path / "parts"), contents(tmp_path / "whole")
    for file in whole:
        if "adapter" in file or "predictions" in file:
            assert parts[file] == whole[file], file


def broken(tiny: str, folder: Path, change) -> str:
    shutil.copytree(tiny, folder)
    change(folder)
    return str(folder)


def without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_a_layer, "layers.1"),
        (lambda folder: [file.unlink() for file in folder.glob("token*")], "tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "safetensors"),
    ],
)
def test_a_broken_model_folder_is_a_named_error(change, told, tiny, two, tmp_path):
    with pytest.raises(ForgetlessError, match=told):
        learn(config(broken(tiny, tmp_path / "model", change), two, tmp_path / "run"))


def test_a_target_that_is_no_linear_layer_is_refused(tiny, two, tmp_path):
    with pytest.raises(UsageError, match="embed_tokens"):
        learn(config(tiny, two, tmp_path / "run", target_modules=["embed_tokens"]))


def test_special_tokens_are_part_of_the_identity(tiny, tmp_path):
    def other_end(folder: Path) -> None:
        told = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(told | {"eos_token": "<|user|>"}))

    def other_version(folder: Path) -> None:
        told = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(told | {"transformers_version": "1"}))

    first = load_base(tiny, torch.float32).identity
    assert load_base(broken(tiny, tmp_path / "a", other_end), torch.float32).identity != first
    assert load_base(broken(tiny, tmp_path / "b", other_version), torch.float32).identity == first


def test_every_tasks_adapter_loads_in_stock_peft(tiny, three, tmp_path):
    from forgetless.learning.prepare import prepare
    from forgetless.learning.state import resume

    told = config(tiny, three, tmp_path / "run", method="olora")
    learn(told)
    logits = []
    ids = torch.tensor([[5, 6, 7, 8]])
    for name in ("tasks/01-colours/adapter", "tasks/02-sizes/adapter", "tasks/03-sounds/adapter", "adapter"):
        stock = PeftModel.from_pretrained(load_base(tiny, torch.float32).model, tmp_path / "run" / name)
        with torch.no_grad():
            logits.append(stock(ids).logits)
    assert torch.equal(logits[2], logits[3]) and not torch.equal(logits[1], logits[2])
    for number, name in enumerate(("01-colours", "02-sizes", "03-sounds")):  # the run's own model after each task
        session = prepare(told)
        resume(session, tmp_path / "run" / "tasks" / name, number)
        with torch.no_grad():
            assert torch.allclose(session.adapters.model(ids).logits, logits[number], atol=1e-5)


@pytest.mark.parametrize(
    "cells, scored", [("all", [3, 3, 3, 3]), ("seen", [3, 1, 2, 3]), ("ends", [3, 1, 1, 3]), ("last", [0, 0, 0, 3])]
)
def test_only_the_cells_asked_for_are_scored(cells, scored, tiny, three, tmp_path):
    summary = learn(config(tiny, three, tmp_path / "run", cells=cells, method="per_task"))
    rows = [summary["headline"]["base"], *summary["headline"]["matrix"]]
    assert [sum(value is not None for value in row) for row in rows] == scored
    if cells != "all":
        assert "not scored" in (tmp_path / "run" / "report.md").read_text()


def test_per_task_forgets_nothing(tiny, three, tmp_path):
    summary = learn(config(tiny, three, tmp_path / "run", method="per_task"))
    matrix = summary["headline"]["matrix"]
    assert all(matrix[2][j] == matrix[j][j] for j in range(3))
    assert all(matrix[0][j] == summary["headline"]["base"][j] for j in (1, 2))


def test_scores_left_out_are_made_when_asked_for_later(tiny, three, tmp_path):
    learn(config(tiny, three, tmp_path / "run", cells="last", method="incremental"))
    later = learn(config(tiny, three, tmp_path / "run", cells="all", method="incremental"))
    whole = learn(config(tiny, three, tmp_path / "whole", cells="all", method="incremental"))
    assert later["headline"] == whole["headline"]


# --------------------------------------------------------------------------------- what is refused


def test_another_option_value_is_refused(ran, tiny, three):
    folder, _ = ran
    before = contents(folder)
    with pytest.raises(RunError, match=r"begun with learning_rate=0\.02, now it is 0\.5"):
        learn(config(tiny, three, folder, method="ilora", method_options={"memory": 6}, learning_rate=0.5))
    assert contents(folder) == before


def test_a_changed_task_is_refused(ran, tiny, three, sizes):
    folder, _ = ran
    changed = Stream("three", (replace(sizes, name="weights"), *three.tasks[1:]))
    with pytest.raises(RunError, match="task 1 of this run is 'colours'"):
        learn(config(tiny, changed, folder, method="ilora", method_options={"memory": 6}))


def test_another_base_is_refused(ran, tiny, three, tmp_path):
    folder, _ = ran
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    base = load_base(tiny, torch.float32).model
    with torch.no_grad():
        base.model.norm.weight[0] += 1
    base.save_pretrained(other)
    with pytest.raises(RunError, match="another base: its weights"):
        learn(config(str(other), three, folder, method="ilora", method_options={"memory": 6}))


def test_a_changed_adapter_is_found(ran, tiny, three, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(ran[0], folder)
    file = folder / "tasks" / "01-colours" / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"adapter_model\.safetensors: has changed"):
        learn(config(tiny, three, folder, method="ilora", method_options={"memory": 6}))


def test_a_folder_with_other_things_is_not_written_to(tiny, three, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"no run\.json"):
        learn(config(tiny, three, tmp_path))


def test_two_processes_cannot_share_a_folder(tiny, three, tmp_path):
    from forgetless.runs.folder import RunFolder

    with RunFolder(tmp_path / "run").locked(), pytest.raises(RunError, match="another process"):
        learn(config(tiny, three, tmp_path / "run"))


def test_a_loss_that_is_no_number_stops_and_keeps_what_was_there(tiny, three, tmp_path):
    learn(config(tiny, Stream("three", three.tasks[:1]), tmp_path / "run"))
    before = contents(tmp_path / "run" / "tasks" / "01-colours" / "adapter")
    with pytest.raises(RunError, match=r"task 2, step 1: loss nan.*--on_nan skip"):
        _learn_with_nan(tiny, three, tmp_path / "run")
    assert contents(tmp_path / "run" / "tasks" / "01-colours" / "adapter") == before
    assert not (tmp_path / "run" / "tasks" / "02-sizes").exists()


def _learn_with_nan(tiny, stream, folder):
    from forgetless.methods import Method

    real = Method.loss
    try:
        Method.loss = lambda self, part: real(self, part) * float("nan")
        learn(config(tiny, stream, folder))
    finally:
        Method.loss = real


@pytest.mark.parametrize(
    "options, said",
    [
        ({"target_modules": ["query"]}, r"no layer named \['query'\] in LlamaForCausalLM; it has .*q_proj"),
        ({"max_length": 4000}, "longer than the 128 tokens"),
        ({"max_length": 3}, "max_length"),
        ({"method": "olra"}, "did you mean 'olora'"),
        ({"cells": "some"}, "cells"),
        ({"r": 0}, "r must be above 0"),
        ({"method": "olora", "method_options": {"lamb": 1}}, "lamb"),
        ({"model": "no/such/folder"}, "no such folder"),
        ({"model": "smollm2-135"}, "did you mean 'smollm2-135m-instruct'"),
        ({"stream": ""}, "no stream"),
        ({"lr_scheduler_type": "linaer"}, "did you mean 'linear'"),
        ({"device": "gpu"}, "device"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or above"),
        ({"lora_dropout": 2.0}, "lora_dropout must be from 0"),
        ({"max_steps": 0}, "max_steps must be above 0"),
        ({"report_to": ["wundb"]}, "not installed"),
        ({"method": "ilora", "method_options": {"lam": 2.0}}, "lam 2"),
        ({"method": "replay", "method_options": {"replay_rows": -1}}, "replay_rows"),
    ],
)
def test_bad_options_are_named(options, said, tiny, three, tmp_path):
    with pytest.raises(ForgetlessError, match=said):
        learn(replace(config(tiny, three, tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists()


def test_options_longer_than_the_context_are_refused(tiny, colours, tmp_path):
    long = replace(colours, options=(*colours.options, "word " * 60))
    with pytest.raises(ForgetlessError, match="fills the"):
        learn(config(tiny, Stream("one", (long,)), tmp_path / "run"))


def test_streams_made_in_python_are_checked_too(tiny, colours, tmp_path):
    for tasks, said in (
        ((), "no tasks"),
        ((colours, colours), "two tasks are called 'colours'"),
        ((replace(colours, test=()),), "no test rows"),
        ((replace(colours, options=("blue", "red")),), "none of the options"),
    ):
        with pytest.raises(ForgetlessError, match=said):
            learn(config(tiny, Stream("made", tasks), tmp_path / "run"))
    some = Stream("made", (replace(colours, options=("blue", "red")),))
    summary = learn(config(tiny, some, tmp_path / "run", on_bad_row="skip"))
    assert "4 train rows left out" in summary["tasks"][0]["notes"][0] and summary["tasks"][0]["train"] == 8


def test_an_empty_model_folder_is_named(tiny, two, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no config\.json"):
        learn(config(str(tmp_path / "empty"), two, tmp_path / "run"))


def test_validation_rows_can_be_scored_instead(tiny, two, tmp_path):
    tasks = tuple(replace(task, validation=task.train[:5]) for task in two.tasks)
    summary = learn(config(tiny, Stream("two", tasks), tmp_path / "run", score_on="validation"))
    assert [task["test"] for task in summary["tasks"]] == [5, 5]
    with pytest.raises(ForgetlessError, match="no validation rows in colours, sizes"):
        learn(config(tiny, two, tmp_path / "none", score_on="validation"))


def test_odd_line_ends_in_answers_survive(tiny, colours, tmp_path):
    from forgetless.data.tasks import Row

    odd = Row("What? Answer:", " green\u2028x\x85y")
    task = replace(
        colours, train=(*colours.train, odd), test=(*colours.test, odd), options=(), scorers=("exact_match",)
    )
    other = replace(task, name="other")
    told = {"method": "replay", "method_options": {"memory": 50}}
    learn(config(tiny, Stream("odd", (task,)), tmp_path / "run", **told))
    summary = learn(config(tiny, Stream("odd", (task, other)), tmp_path / "run", **told))
    assert summary["status"] == "complete"


def test_target_modules_by_name_list_or_regex(tiny, tmp_path):
    for i, targets in enumerate(("q_proj", "q_proj,v_proj", ["q_proj", "v_proj"], ".*q_proj")):
        adapters = Adapters(load_base(tiny, torch.float32).model, LoraSettings(r=2, target_modules=targets), tiny, 0)
        adapters.save(tmp_path / str(i), adapters.pairs())
        stock = PeftModel.from_pretrained(load_base(tiny, torch.float32).model, tmp_path / str(i))
        layers = {name.split(".")[-4] for name, _ in stock.named_parameters() if "lora_A" in name}
        assert layers == ({"q_proj"} if i in (0, 3) else {"q_proj", "v_proj"})


def test_unions_of_different_size_do_not_stand_in_one_matrix(tiny, three, tmp_path):
    learn(config(tiny, Stream("three", three.tasks[:2]), tmp_path / "run", cells="last"))
    summary = learn(config(tiny, three, tmp_path / "run", cells="last"))
    union = summary["measures"]["likelihood_union"]["matrix"]
    assert union[1] == [None] * 3 and None not in union[2]
    assert None not in summary["headline"]["matrix"][1][:2]


def test_joint_training_gives_no_forward_transfer(tiny, two, tmp_path):
    summary = learn(config(tiny, two, tmp_path / "run", method="joint"))
    assert summary["metrics"]["fwt"]["value"] is None and summary["metrics"]["average_accuracy"]["value"] is not None


def test_an_interrupted_first_write_does_not_lock_the_folder(tiny, two, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.writing").write_text("{")
    assert learn(config(tiny, two, tmp_path / "run", cells="last"))["status"] == "complete"


def test_defaults_given_or_left_out_are_the_same_run(tiny, two, tmp_path):
    learn(config(tiny, two, tmp_path / "run", method="replay", cells="last"))
    given = {"memory": "10%", "policy": "reservoir", "replay_rows": 0}
    learn(config(tiny, two, tmp_path / "run", method="replay", method_options=given, cells="last"))


def test_cut_rows_are_counted(tiny, colours, tmp_path):
    from forgetless.data.tasks import Row

    long = replace(colours, train=(*colours.train, Row("word " * 90 + "sky? Answer:", " blue")))
    summary = learn(config(tiny, Stream("one", (long,)), tmp_path / "run"))
    assert any("1 of 13 train rows are longer than max_length=64" in note for note in summary["tasks"][0]["notes"])


def test_a_penalty_that_does_nothing_is_reported(tiny, two, tmp_path, capsys):
    summary = learn(config(tiny, two, tmp_path / "run", method="nlora", method_options={"lam": 1e-12}))
    assert any("did not act" in warning and "penalty share" in warning for warning in summary["warnings"])
    assert "did not act" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the command line


@pytest.fixture
def stream_file(tmp_path, two):
    for task in two.tasks:
        for split in ("train", "test"):
            lines = [json.dumps({"prompt": row.prompt, "completion": row.answer}) for row in getattr(task, split)]
            (tmp_path / f"{task.name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
    told = {
        "name": "filed",
        "tasks": [
            {"name": t.name, "train": f"{t.name}-train.jsonl", "test": f"{t.name}-test.jsonl",
             "options": list(t.options), "validation": 2}
            for t in two.tasks
        ],
    }  # fmt: skip
    (tmp_path / "stream.yaml").write_text(json.dumps(told))
    return tmp_path / "stream.yaml"


FLAGS = ["--r", "4", "--batch-size", "4", "--max_length=64", "--device", "cpu", "--precision", "fp32"]
FLAGS += ["--forgetting_prompts", "0"]


def test_learn_command(stream_file, tiny, tmp_path, capsys):
    flags = ["--stream", str(stream_file), "--model", tiny, "--output-dir", str(tmp_path / "run"), *FLAGS]
    assert main(["learn", *flags, "--method", "replay", "--method.memory", "50%"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "run.json")["method"]["options"]["memory"] == "50%"
    assert main(["report", str(tmp_path / "run")]) == 0


def test_yaml_gives_the_options_and_flags_win(stream_file, tiny, tmp_path):
    from forgetless.cli.learn import parse_learn

    file = tmp_path / "learn.yaml"
    file.write_text(f"stream: {stream_file}\nmethod: {{name: olora, lam: 0.1}}\nlearning_rate: 0.5\nr: 2\n")
    found = parse_learn(["--config", str(file), "--r", "3", "--method.lam_norm", "0.2"])
    assert (found.method, found.learning_rate, found.r) == ("olora", 0.5, 3)
    assert found.method_options == {"lam": 0.1, "lam_norm": 0.2, "as_released": False}
    file.write_text("stream: demo\nmethod: nlora\ntarget_modules: [q_proj, v_proj]\nreport_to: [tensorboard]\n")
    found = parse_learn(["--config", str(file)])
    assert found.target_modules == ["q_proj", "v_proj"] and found.report_to == ["tensorboard"]


def test_dry_run_trains_nothing(stream_file, tiny, tmp_path, capsys):
    flags = ["--stream", str(stream_file), "--model", tiny, "--output_dir", str(tmp_path / "run"), *FLAGS]
    assert main(["learn", *flags, "--method", "ilora", "--dry-run", "--forgetting-prompts", "2"]) == 0
    told = capsys.readouterr().out
    assert "after each of 2 lessons on 2 documents" in told
    for word in ("colours", "steps", "trainable", "time", "memory", "disk"):
        assert word in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["lern"], "did you mean 'learn'"),
        (["learn", "--stream", "demo", "--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["learn", "--stream", "demo", "--method.lamb", "1", "--method", "olora"], "did you mean 'method.lam'"),
        (["learn", "--stream", "demo", "--learning_rate", "fast"], "learning_rate"),
        (["learn", "--stream", "demo", "--seed"], "needs a value"),
        (["learn", "stray"], "unexpected 'stray'"),
        (["learn"], "no stream"),
        (["learn", "--stream", "nowhere.yaml"], "nowhere.yaml"),
        (["learn", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["report", "nowhere"], "run.json"),
    ],
)
def test_usage_errors_exit_1_and_say_what_to_do(arguments, said, capsys):
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_unknown_yaml_key_names_the_nearest(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("stream: demo\nlearning_rte: 0.1\n")
    assert main(["learn", "--config", str(tmp_path / "c.yaml")]) == 1
    told = capsys.readouterr().err
    assert "learning_rte" in told and "learning_rate" in told and "c.yaml" in told
    (tmp_path / "c.yaml").write_text("stream: demo\n5: 3\n")
    assert main(["learn", "--config", str(tmp_path / "c.yaml")]) == 1
    assert "5 is no option's name" in capsys.readouterr().err


def test_help_suffices(capsys):
    for arguments in ([], ["learn", "--help"], ["learn", "--method", "nlora", "--help"], ["methods"], ["--version"]):
        assert main(arguments) == 0
    told = capsys.readouterr().out
    for name in ("learning_rate", "target_modules", "method.proximal", *METHODS):
        assert name in told
    for explained in ("rank of the pair that each task trains", "soft-threshold A and B"):
        assert explained in " ".join(told.split())


def test_usage_error_type_is_a_forgetless_error():
    with pytest.raises(UsageError):
        LearnConfig(stream="x", method="nothing").check()


def test_gradient_checkpointing_changes_memory_only(tiny, two, tmp_path):
    plain = learn(config(tiny, two, tmp_path / "plain", cells="last"))
    kept = learn(config(tiny, two, tmp_path / "kept", cells="last", gradient_checkpointing=True))
    for task in plain["losses"]:
        for a, b in zip(plain["losses"][task], kept["losses"][task], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_micro_batch_size_may_change_when_a_run_goes_on(tiny, three, tmp_path):
    learn(config(tiny, Stream("three", three.tasks[:1]), tmp_path / "run"))
    summary = learn(config(tiny, three, tmp_path / "run", micro_batch_size=2))
    whole = learn(config(tiny, three, tmp_path / "whole"))
    for task in whole["losses"]:
        for a, b in zip(whole["losses"][task], summary["losses"][task], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_trackers_get_every_step(tiny, two, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = learn(config(tiny, two, tmp_path / "run", report_to=["tensorboard"], cells="last"))
    found = {}
    for folder in {file.parent for file in (tmp_path / "run" / "trackers").rglob("events*")}:
        events = EventAccumulator(str(folder)).Reload()
        found |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for task in ("colours", "sizes"):
        losses = [record["loss"] for record in summary["losses"][task]]
        assert found[f"{task}/loss"] == pytest.approx(losses, rel=1e-5)


def test_chat_and_text_rows_are_learnt_and_scored(tiny, tmp_path):
    chat = [{"messages": [{"role": "user", "content": f"colour of {k}?"}, {"role": "assistant", "content": v}]}
            for k, v in (("sky", "blue"), ("grass", "green"), ("sea", "blue"), ("leaf", "green"))]  # fmt: skip
    text = [{"text": f"The {k} is {v}."} for k, v in (("sky", "blue"), ("grass", "green"), ("sea", "blue"))]
    for name, rows in (("chat", chat), ("text", text)):
        for split in ("train", "test"):
            (tmp_path / f"{name}-{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    told = {"tasks": [
        {"name": "chat", "train": "chat-train.jsonl", "test": "chat-test.jsonl", "options": ["blue", "green"],
         "scorers": ["options", "exact_match"], "validation": 0},
        {"name": "text", "train": "text-train.jsonl", "test": "text-test.jsonl", "validation": 0},
    ]}  # fmt: skip
    (tmp_path / "stream.yaml").write_text(json.dumps(told))
    summary = learn(config(tiny, str(tmp_path / "stream.yaml"), tmp_path / "run", num_train_epochs=30.0))
    matrix = summary["headline"]["matrix"]
    assert summary["measures"]["exact_match"]["matrix"][0][0] == matrix[0][0] == 1.0
    assert matrix[1][1] > summary["headline"]["base"][1] + 0.3
    low, high = summary["intervals"][1][1]  # of the rows' shares of tokens
    assert low <= matrix[1][1] <= high and low < high and summary["intervals"][1][0] is not None
