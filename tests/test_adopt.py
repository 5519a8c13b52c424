"""Adapters of other trainers as the first tasks of a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_again import config, contents
from transformers import AutoModelForCausalLM

from forgetless.cli import main
from forgetless.cli.learn import parse_learn
from forgetless.data.batches import Encoder
from forgetless.data.tasks import Stream
from forgetless.errors import ForgetlessError, RunError, UsageError
from forgetless.learning.engine import Engine
from forgetless.learning.state import load_state, save_state
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.learning.stream import learn
from forgetless.methods import ADAPTER, METHODS, ROWS, Method
from forgetless.methods.finding import find_method
from forgetless.methods.oplora import projected_off
from forgetless.model.adapters import LoraSettings, Pair
from forgetless.model.base import load_base
from forgetless.runs.folder import read_json, read_lines
from forgetless.subjects.models import find_subjects
from forgetless.subjects.updates import read_update


def trained(tiny: str, folder: Path, seed: int = 1, kind=LoraConfig, **options) -> str:
    """What another trainer would leave: a PEFT folder whose B is not zero."""
    torch.manual_seed(seed)
    given = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), kind(**given))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def april(tiny, tmp_path_factory) -> str:
    return trained(tiny, tmp_path_factory.mktemp("given") / "trl-april", 1, r=2, lora_alpha=3)


@pytest.fixture(scope="module")
def may(tiny, tmp_path_factory) -> str:
    """Other ranks, another scale, other layers."""
    return trained(
        tiny, tmp_path_factory.mktemp("given") / "trl-may", 2, r=3, lora_alpha=5, use_rslora=True,
        target_modules=["q_proj", "down_proj"], rank_pattern={"layers.0.self_attn.q_proj": 4},
        alpha_pattern={"layers.1.mlp.down_proj": 7},
    )  # fmt: skip


def dense(folder: str | Path) -> dict[str, torch.Tensor]:
    """ΔW of every layer that it changes, multiplied out."""
    pairs = read_update(Path(folder)).layers.items()
    return {layer: pair.scale * pair.B.double() @ pair.A.double() for layer, pair in pairs}


def same(found: dict[str, torch.Tensor], *parts: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.allclose(update, sum(part.get(layer, torch.zeros_like(update)) for part in parts), rtol=0, atol=1e-6)
        for layer, update in found.items()
    ) and all(part.keys() <= found.keys() for part in parts)


def logits(tiny: str, adapter: str | Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.arange(5, 25).unsqueeze(0)).logits


@pytest.fixture(scope="module")
def summed(tiny, april, may, sounds, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "summed"
    given = {"from_adapters": [f"april={april}", f"may={may}"], "from_kind": "summed"}
    learn(config(tiny, Stream("june", (sounds,)), folder, method="olora", **given))
    return folder


def test_summed_adapters_are_deployed_exactly(tiny, april, may, summed):
    first, second, third = (summed / "tasks" / name / "adapter" for name in ("01-april", "02-may", "03-sounds"))
    assert same(dense(first), dense(april)) and same(dense(second), dense(april), dense(may))
    torch.testing.assert_close(logits(tiny, first), logits(tiny, april), rtol=0, atol=1e-5)
    grown = load_file(third / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ]
    assert grown.shape[0] == 2 + 4 + 4  # april's rank, may's, this run's
    assert not same(dense(third), dense(april), dense(may))


def test_the_run_says_what_was_adopted(april, may, sounds, summed):
    told = read_json(summed / "run.json")
    assert [(one["name"], one["source"], one["kind"]) for one in told["adopted"]] == [
        ("april", april, "summed"), ("may", may, "summed")
    ]  # fmt: skip
    assert told["history"][0]["from"] == 3
    learned = read_json(summed / "tasks" / "02-may" / "learned.json")
    assert learned["adopted"]["ranks"] == [3, 4] and learned["adopted"]["sha256"] and learned["steps"] == 0
    summary = read_json(summed / "summary.json")
    assert summary["learned"] == ["april", "may", "sounds"]
    assert all(row[:2] == [None, None] and row[2] is not None for row in summary["headline"]["matrix"])
    assert summary["metrics"]["average_accuracy"]["value"] == summary["headline"]["matrix"][2][2]
    assert [one["task"] for one in summary["acts"]] == ["sounds"]
    overlap = next(check for check in summary["acts"][0]["checks"] if check["name"] == "overlap")
    assert overlap["value"] > 0  # measured against the adopted ones' inputs
    report = (summed / "report.md").read_text()
    assert "Adopted from adapters of other trainers: april, may (their updates are added up)" in report


def test_it_goes_on_without_the_given_folders(tiny, april, may, sounds, sizes, summed, tmp_path):
    """One command, or two of which the second has neither --from nor the folders: the same bytes."""
    given = [str(shutil.copytree(april, tmp_path / "april")), str(shutil.copytree(may, tmp_path / "may"))]
    options = {"method": "olora", "from_adapters": given, "from_kind": "summed"}
    stream = Stream("june", (sounds, sizes))
    learn(config(tiny, stream, tmp_path / "one", **options))
    learn(config(tiny, Stream("june", (sounds,)), tmp_path / "two", **options))
    shutil.rmtree(given[0])
    shutil.rmtree(given[1])
    learn(config(tiny, stream, tmp_path / "two", method="olora"))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    for file in one:
        if file.startswith("tasks/"):
            assert two[file] == one[file], file
    assert [one.name.split("/")[-1] for one in find_subjects(str(tmp_path / "two"))] == [
        "01-april", "02-may", "03-sounds", "04-sizes"
    ]  # fmt: skip


def test_a_continued_adapter_holds_those_before_it(tiny, april, may, sounds, tmp_path, capsys):
    given = [f"april={april}", f"may={may}"]
    learn(config(tiny, Stream("june", (sounds,)), tmp_path / "run", method="incremental", from_adapters=given))
    assert same(dense(tmp_path / "run" / "tasks" / "02-may" / "adapter"), dense(may))
    told = " ".join(capsys.readouterr().err.split())
    assert "hardly looks trained on from it" in told and "--from_kind summed" in told
    assert "this run's 4: the difference goes into B" in told  # lora_alpha 16, r 4


SOME = ("olora", "ewc", "mtllora", "raclora", "replay+olora")


@pytest.mark.parametrize(
    "name",
    ["ilora", *(pytest.param(name, marks=pytest.mark.slow) for name in SOME)],
)
def test_methods_deploy_what_they_adopted_and_go_on(name, tiny, april, two, tmp_path):
    """With the adopted task's rows in the stream: it is scored, kept for replay, and learnt on from."""
    colours = two.tasks[0]
    memory = {"method_options": {"memory": 5}} if find_method(name).old_rows else {}
    given = {"method": name, "from_adapters": [f"colours={april}"], **memory}
    summary = learn(config(tiny, two, tmp_path / "run", **given))
    first, last = (tmp_path / "run" / "tasks" / task for task in ("01-colours", "02-sizes"))
    assert same(dense(first / "adapter"), dense(april))
    assert not same(dense(last / "adapter"), dense(april))
    assert None not in summary["headline"]["matrix"][0] and None not in summary["headline"]["matrix"][1]
    if find_method(name).old_rows:
        learn(config(tiny, Stream("two", (colours,)), tmp_path / "learnt", method=name, **memory))
        for file in ("memory/rows.jsonl", "method.json"):
            assert (first / file).read_text() == (tmp_path / "learnt/tasks/01-colours" / file).read_text()
    learn(config(tiny, Stream("two", (colours,)), tmp_path / "parts", **given))
    learn(config(tiny, two, tmp_path / "parts", **given))
    one, parts = contents(tmp_path / "run"), contents(tmp_path / "parts")
    assert {file: parts[file] for file in one if file.startswith("tasks/02")} == {
        file: data for file, data in one.items() if file.startswith("tasks/02")
    }


def test_ranks_that_the_adapter_leaves_free_are_trained(tiny, april, two, tmp_path):
    """april has rank 2 in q_proj and v_proj; the run trains rank 4 in all layers."""
    given = {"from_adapters": [f"colours={april}"]}
    learn(config(tiny, two, tmp_path / "run", **given))
    before, after = (
        load_file(tmp_path / "run" / "tasks" / task / "adapter" / "adapter_model.safetensors")
        for task in ("01-colours", "02-sizes")
    )
    moved = [(after[name] - before[name]).abs() for name in before if name.endswith("lora_B.weight")]
    assert len(moved) == 14 and all(bool((change.amax(0) > 0).all()) for change in moved)


def other_base(tiny, folder) -> str:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    shutil.copytree(tiny, folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "make, method, said",
    [
        (lambda tiny, to: [trained(other_base(tiny, to / "b"), to / "a", r=2)], "olora",
         "was trained on .*which has other weights of equal shapes, not on"),
        (lambda tiny, to: [shutil.copytree(tiny, to / "a")], "olora", "holds full weights, no adapter"),
        (lambda tiny, to: [trained(tiny, to / "a", r=2, use_dora=True)], "olora", "use_dora=True: DoRA.*merge it into"),
        (lambda tiny, to: [trained(tiny, to / "a", kind=IA3Config, feedforward_modules=[])], "olora",
         "is no LoRA adapter .peft_type IA3.; merge it into"),
        (lambda tiny, to: [trained(tiny, to / "a", r=2, modules_to_save=["lm_head"])], "olora", "modules_to_save"),
        (lambda tiny, to: [trained(tiny, to / "a", r=6)], "sequential",
         "--from a: .*rank 6, the pair that is trained has rank 4. Give --r 6, .*forgetless merge .*--rank 4.*olora"),
        (lambda tiny, to: [trained(tiny, to / "a", r=2)], "replay",
         "--from a: Replay keeps something of each task's rows .*list the task with its rows first in the stream"),
        (lambda tiny, to: [trained(tiny, to / "a", r=2)], "joint", "a method that learns one task after another"),
        (lambda tiny, to: [trained(tiny, to / "a", r=2)], "hyplora", "--from a: .*an adopted one does not"),
        (lambda tiny, to: ["a=x", "y/a"], "olora", "two adapters are called 'a'"),
        (lambda tiny, to: ["a b=x"], "olora", "'a b=x' cannot name a task"),
        (lambda tiny, to: [str(to / "nothing")], "olora", "no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_adopted_is_named(make, method, said, tiny, sounds, tmp_path):
    given = list(map(str, make(tiny, tmp_path)))
    with pytest.raises(ForgetlessError, match=said):
        learn(config(tiny, Stream("june", (sounds,)), tmp_path / "run", method=method, from_adapters=given))
    assert not (tmp_path / "run" / "tasks" / "01-a").exists()


def test_layers_outside_the_targets(tiny, may, sounds, tmp_path):
    with pytest.raises(
        UsageError, match=r"changes 2 layers that target_modules leaves out .*give --target_modules down_"
    ):
        learn(config(tiny, Stream("j", (sounds,)), tmp_path / "run", from_adapters=[may], target_modules=["q_proj"]))


def test_a_run_keeps_what_it_adopted(tiny, april, may, sounds, sizes, summed, two, tmp_path):
    stream = Stream("june", (sounds, sizes))
    with pytest.raises(RunError, match=r"this run adopted april, may when it was begun, now --from names april"):
        learn(config(tiny, stream, summed, method="olora", from_adapters=[f"april={april}"]))
    with pytest.raises(RunError, match=r"is not the adapter that this run adopted as 'april'"):
        learn(config(tiny, stream, summed, method="olora", from_kind="summed",
                     from_adapters=[f"april={may}", f"may={may}"]))  # fmt: skip
    with pytest.raises(RunError, match=r"were adopted as summed, now from_kind=continued"):
        learn(config(tiny, stream, summed, method="olora", from_adapters=[f"april={april}", f"may={may}"]))
    with pytest.raises(
        UsageError, match=r"the adopted tasks come first \(sizes\), but olora would learn colours, sizes"
    ):
        learn(config(tiny, two, tmp_path / "run", method="olora", from_adapters=[f"sizes={april}"]))


def test_command_line_and_yaml(tiny, april, may, tmp_path, capsys):
    parsed = parse_learn(["--stream", "demo", "--from", f"april={april}", may, "--from_kind", "summed"])
    assert parsed.from_adapters == [f"april={april}", may] and parsed.from_kind == "summed"
    file = tmp_path / "c.yaml"
    file.write_text(f"stream: demo\nfrom: {{april: {april}, may: {may}}}\n")
    assert parse_learn(["--config", str(file)]).from_adapters == [f"april={april}", f"may={may}"]
    assert main(["learn", "--help"]) == 0
    assert "--from april=./trl-april" in " ".join(capsys.readouterr().out.split())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"n {i}:", "answer": " yes"}) + "\n" for i in range(4)))
    stream = tmp_path / "stream.yaml"
    stream.write_text(f"tasks: [{{name: new, train: {rows}, test: {rows}, validation: 0}}]\n")
    arguments = ["learn", "--stream", str(stream), "--model", tiny, "--device", "cpu", "--max_length", "64",
                 "--forgetting_prompts", "0", "--method", "nlora", "--from", f"april={april}"]  # fmt: skip
    assert main([*arguments, "--dry_run"]) == 0
    table = capsys.readouterr().out
    assert "new" in table and not (tmp_path / "run").exists()
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 0
    assert [one["lesson"] for one in map(read_json, sorted((tmp_path / "run").glob("tasks/*/learned.json")))] == [
        "april", "new"
    ]  # fmt: skip
    assert read_lines(tmp_path / "run" / "tasks" / "01-april" / "log.jsonl") == []


# --------------------------------------------------------------------- what each method makes of an adopted task

ADOPTS = {
    "sequential": ADAPTER, "incremental": ADAPTER, "per_task": ADAPTER, "joint": "rows of all tasks at once",
    "replay": ROWS, "olora": ADAPTER, "nlora": ADAPTER, "ilora": ROWS, "ewc": ROWS, "lwf": ADAPTER, "gem": ROWS,
    "agem": ROWS, "ogd": ROWS, "general_replay": ADAPTER, "sdlora": "magnitudes", "inflora": ROWS, "raclora": ADAPTER,
    "clora": ADAPTER, "oplora": ADAPTER, "lori": "an adopted B is full", "slao": ADAPTER, "hiddenkey": ADAPTER,
    "mtllora": ADAPTER, "hyplora": "bends", "duallora_reconstructed": ROWS, "mbpa": ROWS,
    "osf": ADAPTER, "corda": "part of the weights", "loranull": "part of the weights",
    "sherl": "a side network", "recall": ROWS,
    **dict.fromkeys(("prompt_tuning", "progressive_prompts", "l2p", "lfpt5"), "a soft prompt"),
    "replay+olora": ROWS, "hiddenkey+nlora": ADAPTER, "replay+hyplora": "hyplora: its update bends",
}  # fmt: skip
BEGINS_ANEW = ("per_task", "mtllora", "slao")  # a fresh pair, a fresh mixture, an orthogonal start: by their equations


@pytest.mark.parametrize("name", ADOPTS)
def test_what_a_method_makes_of_an_adopted_task(name, tiny, april, two):
    """Rebuilt from rows, refused with the reason, or fine; and what was adopted is there when the next task begins."""
    method, needs = build_any(name, tiny), ADOPTS[name]
    pairs, rows = read_update(Path(april)).layers, two.tasks[0].train
    if needs not in (ADAPTER, ROWS):
        assert needs in method.adopts
        for given in (rows, None):
            with pytest.raises(UsageError, match=needs):
                method.adopt(0, pairs, given)
        return
    assert method.adopts == needs
    if needs == ROWS:
        with pytest.raises(UsageError, match=r"keeps something of each task's rows .* list the task with its rows"):
            method.adopt(0, pairs, None)
    if name == "oplora":
        with pytest.raises(UsageError, match=r"\d+% of a layer's update lies in the leading singular directions"):
            method.adopt(0, pairs, None)
        pairs = {layer: Pair(*projected_off(*pair[:2], *method.UV[layer]), pair.scale) for layer, pair in pairs.items()}
    deployed = method.adopt(0, pairs, rows if needs == ROWS else None)
    assert away(deployed, pairs) < 1e-5
    again = build_any(name, tiny)
    with TemporaryDirectory() as folder:  # what is on disk is enough to go on
        method.adapters.save(Path(folder) / "adapter", deployed)
        save_state(Path(folder), method.state())
        again.task = 0
        again.resume(again.adapters.load(Path(folder) / "adapter"), load_state(Path(folder)), 0)
    for one in (method, again):
        one.begin_task(1)
        examples = [one.encoder(row) for row in two.tasks[1].train]
        still = TrainSettings(learning_rate=0.0, max_steps=1, batch_size=4)
        learn_task(one, examples, still, Engine("cpu", "fp32"), seed=0, task=1, log=lambda record: None)
        one.end_task(1, two.tasks[1].train)
        assert name in BEGINS_ANEW or away(one.export(), pairs) < 1e-5
    assert away(method.export(), again.export()) == 0


def build_any(name: str, tiny: str) -> Method:
    base, kind = load_base(tiny, torch.float32), find_method(name)
    method = kind(**kind.example)
    method.start(kind.adapter_class(base.model, LoraSettings(r=4), tiny, 0), Encoder(base.tokenizer, 64), 0)
    return method


def away(found: dict[str, Pair], pairs: dict[str, Pair]) -> float:
    """The largest entry of a layer's ΔW - ΔW'."""
    return max(
        float((product(found[layer]) - (product(pairs[layer]) if layer in pairs else 0)).abs().max()) for layer in found
    )


def product(pair: Pair) -> torch.Tensor:
    return pair.scale * pair.B.detach() @ pair.A.detach()


def test_every_method_is_in_the_table():
    assert ADOPTS.keys() >= METHODS.keys()
    page = (Path(__file__).parents[1] / "docs" / "again.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    told = {name: line.split("|")[3].strip() for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    for name, kind in METHODS.items():
        starts = {ADAPTER: "not needed", ROWS: "needed"}.get(kind.adopts, "refused")
        assert told[name].startswith(starts), name


def test_a_method_that_cannot_adopt_says_so_before_anything_is_written(tiny, april, two, tmp_path):
    with pytest.raises(UsageError, match=r"--from colours: .*bends"):
        learn(config(tiny, two, tmp_path / "run", method="replay+hyplora", from_adapters=[f"colours={april}"]))
    assert not (tmp_path / "run" / "run.json").exists()
