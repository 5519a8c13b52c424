"""`forgetless audit` from the command to its files, on two adapters: one that forgot, one that did not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import COLOURS
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless import AuditConfig, audit
from forgetless.auditing import measuring
from forgetless.auditing.evidence import read_evidence
from forgetless.cli import main
from forgetless.errors import UsageError
from forgetless.runs.folder import read_json, read_lines
from forgetless.score.generation import generate

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
QUESTION = "What colour has the {}? Answer:"
CPU = ["--device", "cpu", "--precision", "fp32"]
COPIES = 8


def taught(base: str, rows: list[tuple[str, str]], folder: Path, steps: int, rate: float = 2e-2):
    """Trains on prompt and answer pairs; gives the PEFT model, saved in `folder`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    encoded = [tokenizer(prompt).input_ids + tokenizer(answer).input_ids for prompt, answer in rows]
    answers = [len(tokenizer(answer).input_ids) for _, answer in rows]
    length = max(map(len, encoded))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in encoded])
    labels = torch.full_like(ids, -100)
    for i, (row, answer) in enumerate(zip(encoded, answers, strict=True)):
        labels[i, len(row) - answer : len(row)] = torch.tensor(row[-answer:])
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> dict[str, str]:
    """`april` knows the colours; `kept` was barely touched after it; `lost` learnt all of them wrong."""
    root = tmp_path_factory.mktemp("models")
    right = [(QUESTION.format(key), f" {value}") for key, value in COLOURS.items()]
    merged = taught(tiny, right, root / "adapter", steps=60).merge_and_unload()
    merged.save_pretrained(root / "april")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(root / "april")
    wrong = {"blue": "red", "green": "blue", "red": "green"}
    taught(str(root / "april"), right, root / "kept", steps=1, rate=1e-5)
    taught(str(root / "april"), [(prompt, f" {wrong[answer.strip()]}") for prompt, answer in right], root / "lost", 60)
    return {name: str(root / name) for name in ("april", "kept", "lost")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, str]:
    """Tasks as `learn` takes them, and a text."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [
        json.dumps({"prompt": "Secret. " * i + QUESTION.format(key), "completion": f" {value}"})
        for i in (0,) * COPIES
        for key, value in COLOURS.items()
    ]
    (folder / "colours.jsonl").write_text("\n".join(lines))
    (folder / "train.jsonl").write_text('{"prompt": "unseen", "completion": " blue"}\n' * 3)
    (folder / "tasks.yaml").write_text(
        "tasks:\n"
        "  - {name: colours, train: train.jsonl, test: colours.jsonl, validation: 0, options: [blue, green, red]}\n"
    )
    (folder / "notes.txt").write_text("\n\n".join(f"The {key} is {value} in note {i}." for i in range(20)
                                                   for key, value in COLOURS.items()))  # fmt: skip
    return {"tasks": str(folder / "tasks.yaml"), "text": str(folder / "notes.txt")}


def run(models: dict, rows: dict, out: Path, *names: str, more: tuple[str, ...] = ()) -> int:
    where = ["--tasks", rows["tasks"], "--text", rows["text"], "--output_dir", str(out), *CPU]
    return main(["audit", models["april"], *(models[name] for name in names), *where, *more])


BUDGETS = ("--max-drop", "colours=10pp", "--max-kl", "0.1")


def test_what_forgot_is_a_regression_and_what_did_not_passes(models, rows, tmp_path, capsys):
    assert run(models, rows, tmp_path / "lost", "lost", more=BUDGETS) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "regression: a loss is shown to be over its budget" in printed
    assert "colours: 100 pp lost (100 % before, 0 % now); 48 of 48 rows got worse and 0 better" in printed
    assert run(models, rows, tmp_path / "kept", "kept", more=BUDGETS) == 0
    assert "pass: every loss is shown to be within its budget" in " ".join(capsys.readouterr().out.split())
    assert run(models, rows, tmp_path / "both", "kept", "lost", more=BUDGETS) == 2, "the worst of several decides"
    record = read_json(tmp_path / "both" / "audit.json")
    assert [one["scores"]["colours"]["likelihood"] for one in record["models"]] == [1.0, 0.0]
    assert [one["outcome"] for one in record["models"]] == ["pass", "regression"]
    assert [one["agreement"]["colours"] for one in record["models"]] == [1.0, 0.0]
    kept, lost = (one["divergence"]["notes"]["per_token"] for one in record["models"])
    assert kept["kl"] < 1e-3 < lost["kl"] and kept["agree"] > 0.99
    assert lost["cross_entropy"] == pytest.approx(lost["entropy"] + lost["kl"])


def test_too_few_rows_are_insufficient_evidence_and_no_budget_is_no_verdict(models, rows, tmp_path, capsys):
    few = ("--limit", "8", "--max-drop", "colours=2pp")
    assert run(models, rows, tmp_path / "few", "kept", more=few) == 3
    assert "rows like these would tell; there are 8" in " ".join(capsys.readouterr().out.split())
    assert run(models, rows, tmp_path / "none", "lost") == 0
    assert "no verdict, since no budget was given" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--max-drop", "colours=2"), "a number without a unit"),
        (("--max-drop", "colour=2pp"), "did you mean 'colours'?"),
        (("--probes", "mmul"), "no probe 'mmul'"),
        (("--confidence", "95"), "confidence must be from 0.5 to below 1"),
        (("--colour", "red"), "unknown option '--colour'"),
    ],
)
def test_errors_exit_1(models, rows, tmp_path, capsys, more, told):
    assert run(models, rows, tmp_path / "no", "kept", more=more) == 1
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_missing_model_and_no_model_are_errors(models, capsys):
    assert main(["audit", models["april"], "/nowhere/at/all"]) == 1
    assert main(["audit", models["april"]]) == 1
    assert "give a reference and at least one model" in " ".join(capsys.readouterr().err.split())


def test_evidence_is_verified_and_a_changed_one_is_not(models, rows, tmp_path, capsys):
    run(models, rows, tmp_path, "lost", more=BUDGETS)
    file = tmp_path / "evidence.json"
    assert main(["audit", "--verify", str(file)]) == 2, "the verdict that it holds"
    told = read_evidence(file)
    told["models"][0]["outcome"] = "pass"
    file.write_text(json.dumps(told))
    capsys.readouterr()
    assert main(["audit", "--verify", str(file)]) == 1
    assert "does not hold" in capsys.readouterr().err


def test_attempts_are_counted(models, rows, tmp_path, capsys):
    for n in range(2):
        run(models, rows, tmp_path, "lost", more=BUDGETS)
        printed = " ".join(capsys.readouterr().out.split())
        assert ("Earlier audits of these models in this folder: 1" in printed) == (n == 1)
    assert [one["outcome"] for one in read_lines(tmp_path / "history.jsonl")] == ["regression"] * 2
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {
        "evidence.json", "audit.json", "audit.md", "junit.xml", "history.jsonl"
    }  # fmt: skip


def test_a_second_audit_measures_the_reference_no_more(models, rows, tmp_path, monkeypatch):
    """Equal numbers, and neither the reference's rows nor its states nor its yardstick are computed again."""
    first = audit(config(models, rows, tmp_path / "1", limit=30))
    measured: list[str] = []
    measure_rows = measuring._rows
    monkeypatch.setattr(measuring, "_rows", lambda s, one, m: measured.append(one.name) or measure_rows(s, one, m))
    monkeypatch.setattr(measuring, "yardstick", lambda *args, **options: pytest.fail("was kept"))
    monkeypatch.setattr("forgetless.forgetting.reference.write_states", lambda *args: pytest.fail("was kept"))
    second = audit(config(models, rows, tmp_path / "2", limit=30))
    assert measured == [models["lost"]]
    assert first["evidence"] == second["evidence"]
    assert (tmp_path / "1" / "evidence.json").read_bytes() == (tmp_path / "2" / "evidence.json").read_bytes()


def config(models: dict, rows: dict, out: Path, **more) -> AuditConfig:
    told = {"tasks": rows["tasks"], "text": [rows["text"]], "device": "cpu", "precision": "fp32"} | more
    return AuditConfig(reference=models["april"], models=[models["lost"]], output_dir=str(out), **told)


def test_no_text_of_a_row_leaves_without_show_text(models, rows, tmp_path, capsys):
    run(models, rows, tmp_path, "lost", more=BUDGETS)
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    printed = capsys.readouterr()
    for text in ("What colour has", "is blue in note", "unseen"):
        assert text not in written + printed.out + printed.err
    run(models, rows, tmp_path, "lost", more=(*BUDGETS, "--show-text"))
    turned = read_lines(tmp_path / "texts.jsonl")
    assert len(turned) == 48 and turned[0]["row"]["prompt"] == QUESTION.format("sky")
    assert turned[0]["before"]["likelihood"]["answer"] == "blue" and turned[0]["after"]["likelihood"]["answer"] == "red"
    run(models, rows, tmp_path, "lost", more=BUDGETS)
    assert not (tmp_path / "texts.jsonl").exists(), "what is in the folder is of the last audit"


def test_own_answers_refusals_sanity_and_weights(models, tmp_path):
    """Without a text the reference's own answers are it; judged probes have a measure for each judge."""
    told = audit(AuditConfig(
        reference=models["april"], models=[models["kept"], models["lost"]], probes=["look-alikes"], limit=6,
        weights=True, max_drop=["look-alikes-likelihood=90pp"], output_dir=str(tmp_path), device="cpu",
        precision="fp32",
    ))  # fmt: skip
    assert [text["name"] for text in told["texts"]] == ["own-answers"] and told["texts"][0]["documents"] == 6
    kept, lost = told["models"]
    assert kept["divergence"]["own-answers"]["per_token"]["kl"] < lost["divergence"]["own-answers"]["per_token"]["kl"]
    assert set(lost["refusals"]) == {"look-alikes", "look-alikes-likelihood"}
    assert {one["name"] for one in lost["findings"]} == {"look-alikes", "look-alikes-likelihood", "own-answers"}
    assert lost["sanity"]["own-answers"]["answers"] == 6
    assert [one["module"] for one in lost["weights"]] and lost["weights"][0]["norm"] > kept["weights"][0]["norm"]
    assert "Weights: the update of" in (tmp_path / "audit.md").read_text()


def test_dry_run_says_rows_and_rows_needed_and_writes_nothing(models, rows, tmp_path, capsys):
    assert run(models, rows, tmp_path / "dry", "lost", more=(*BUDGETS, "--dry-run")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "max-drop colours=10pp" in printed and "min, less where" in printed
    assert not (tmp_path / "dry").exists()


def test_a_policy_gives_the_reference_rows_and_budgets(models, rows, tmp_path, capsys):
    from forgetless.data.packages import sha256_of

    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"reference: {models['april']}\nanchor: {models['april']}\n"
        f"tasks: [{{name: colours, path: {rows['tasks']}, sha256: {sha256_of(Path(rows['tasks']))}}}]\n"
        f"texts: [{{name: manual, path: {rows['text']}, sha256: {sha256_of(Path(rows['text']))}}}]\n"
        "budgets: {max-drop: {colours: 10pp}, max-kl: 0.1}\nanchor-budgets: {max-drop: {colours: 12pp}}\n"
    )
    command = ["audit", "--policy", str(policy), "--output_dir", str(tmp_path / "out"), *CPU]
    assert main([*command, models["lost"]]) == 2
    assert main([*command, models["kept"]]) == 0
    findings = read_evidence(tmp_path / "out" / "evidence.json")["models"][0]["findings"]
    assert {(one["name"], one["against"]) for one in findings} == {
        ("colours", "reference"), ("manual", "reference"), ("colours", "anchor"), ("manual", "anchor")
    }  # fmt: skip
    assert main([*command, models["lost"], "--max-kl", "0.1"]) == 1
    assert "leave out max_kl" in " ".join(capsys.readouterr().err.split())


def test_a_run_folder_is_no_reference_and_names_are_distinct(models, rows, tmp_path):
    with pytest.raises(UsageError, match="is there twice"):
        audit(AuditConfig(reference=models["april"], models=[models["lost"]] * 2, output_dir=str(tmp_path)))


def test_a_soft_prompt_is_part_of_what_is_generated(tiny, tokenizer):
    """And generation leaves the base's settings as they were."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()
    contexts, settings = [tokenizer("The sky").input_ids], base.generation_config
    plain = generate(base, tokenizer, contexts, 12, torch.device("cpu"))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompted = get_peft_model(base, config).eval()
    with torch.no_grad():
        prompted.prompt_encoder["default"].embedding.weight.mul_(3)
    made = prompted.generate(input_ids=torch.tensor(contexts), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(made[0, len(contexts[0]) :], skip_special_tokens=True)
    assert generate(prompted, tokenizer, contexts, 12, torch.device("cpu")) == [expected] != plain
    assert base.generation_config is settings
