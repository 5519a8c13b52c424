"""`forgetless audit` from the command to its files, on two adapters: one that forgot, one that did not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import COLOURS
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless import AuditConfig, audit
from forgetless.auditing import measuring, record
from forgetless.auditing.evidence import read_evidence
from forgetless.auditing.judges import Exchange, Labelled, LikelihoodJudge
from forgetless.auditing.session import prepare
from forgetless.auditing.weights import update_of
from forgetless.cli import main
from forgetless.config import TEMPLATES
from forgetless.contract.tiny import TEMPLATE
from forgetless.errors import DataError, DownloadError, RunError, UsageError
from forgetless.forgetting.texts import topics
from forgetless.report import audit as report
from forgetless.runs.folder import read_json, read_lines
from forgetless.score.generation import generate
from forgetless.score.intervals import wilson
from forgetless.score.options import OptionScorer
from forgetless.subjects.models import opened

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
QUESTION = "{}. What colour has the {}? Answer:"
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
    right = [(QUESTION.format(i, key), f" {value}") for i in range(COPIES) for key, value in COLOURS.items()]
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
        json.dumps({"prompt": QUESTION.format(i, key), "completion": f" {value}"})
        for i in range(COPIES)
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
    return {
        "tasks": str(folder / "tasks.yaml"),
        "text": str(folder / "notes.txt"),
        "train": str(folder / "train.jsonl"),
    }


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
    change = record["models"][1]["changes"]["colours"]
    assert (change["change"], change["lost"], change["gained"]) == (-1, 48, 0) and change["p"] == 2**-47
    kept, lost = (one["divergence"]["notes"]["per_token"] for one in record["models"])
    assert kept["kl"] < 1e-3 < lost["kl"] and kept["agree"] > 0.99
    assert lost["cross_entropy"] == pytest.approx(lost["entropy"] + lost["kl"])


def test_where_it_forgot(models, rows, tmp_path, capsys):
    """Every breakdown of a text is its whole change; rows tell their domain, and a text without any is one."""
    told = [
        {"text": f"The {key} is {value} in note {i}.", "domain": "nature" if key in ("sky", "sea") else "things"}
        for i in range(6)
        for key, value in COLOURS.items()
    ]
    (tmp_path / "told.jsonl").write_text("\n".join(map(json.dumps, told)))
    texts = ("--text", rows["text"], str(tmp_path / "told.jsonl"))
    assert main(["audit", models["april"], models["lost"], *texts, "--output_dir", str(tmp_path / "out"), *CPU]) == 0
    printed = capsys.readouterr().out
    record = read_json(tmp_path / "out" / "audit.json")
    where, means = record["models"][0]["where"], record["models"][0]["divergence"]
    for text in record["texts"]:
        whole = means[text["name"]]["per_token"]
        for kind in ("domain", "token_type", "place", "certainty"):
            groups = where[text["name"]][kind]
            assert sum(one["tokens"] for one in groups) == text["tokens"]
            assert sum(one["kl"] * one["tokens"] for one in groups) == pytest.approx(whole["kl"] * text["tokens"])
            assert sum(one["share_of_kl"] for one in groups) == pytest.approx(1)
            assert all(one["low"] <= one["kl"] <= one["high"] for one in groups if one["low"] is not None)
    [whole] = where["notes"]["domain"]
    assert whole["name"] == "notes" and whole["low"] < whole["kl"] < whole["high"]
    assert whole["agree"] == pytest.approx(means["notes"]["per_token"]["agree"])
    assert [(one["name"], one["tokens"] > 0) for one in where["told"]["domain"]] == [("things", True), ("nature", True)]
    kl = [one["kl"] for one in where["told"]["documents"]]
    assert kl == sorted(kl, reverse=True) and kl[0] > means["told"]["per_token"]["kl"]
    assert where["told"]["documents"][0]["name"].startswith(f"{tmp_path / 'told.jsonl'}:")
    title = "Documents where lost moved furthest"
    page, comment = ((tmp_path / "out" / name).read_text() for name in ("audit.html", "audit.md"))
    assert title in page and title not in printed + comment, "details stand on the page"
    assert "told.jsonl:" in page and "in note" not in page + printed


def test_a_concentrated_change_is_said_only_beyond_its_interval():
    """Three tenths of the change in one in twenty tokens; the same with an interval down to the mean is not said."""
    from forgetless.report.audit import _concentrated, _where

    finding = SimpleNamespace(name="notes", against="reference")
    group = {"name": "numbers", "tokens": 50, "share_of_tokens": 0.05, "share_of_kl": 0.3, "kl": 0.6, "agree": 0.5}

    def made(low: float | None, noise: float = 0.001, **more) -> tuple[dict, dict]:
        groups = {"domain": [], "token_type": [group | {"low": low, "high": 0.9} | more], "place": [], "certainty": []}
        told = {"name": "lost", "where": {"notes": groups}, "divergence": {"notes": {"per_token": {"kl": 0.1}}}}
        return {"texts": [{"name": "notes", "noise": {"kl": noise}}], "confidence": 0.95}, told

    def said(low: float | None, **more) -> list[str]:
        return _concentrated(*made(low, **more), finding)

    assert said(0.2) == ["notes: 30 % of the change in predictions is in numbers (5 % of the tokens)"]
    assert said(0.1) == said(0.2, share_of_tokens=0.16) == said(0.2, share_of_kl=0.19) == said(0.2, noise=0.1) == []
    assert said(None) == [], "few documents"
    [row] = _where(*made(0.2), {"lost": "lost"}).rows
    assert row == ["numbers", "type of token", "notes", "50", "5 %", "30 %", "0.6", "0.2 to 0.9", "50 %"]
    assert _where(*made(0.1), {"lost": "lost"}).rows == []


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
        (("--window", "129"), "a window of 129 tokens; the models and an audit take 128 at once"),
        (("--window", "32", "--stride", "33"), "the stride is from 1 to the window's length"),
        (("--judge", "./none.py:no"), "none.py: cannot be read"),
        (("--judge", f"{Path(__file__).parent}/summaries.py:task"), "no probe's answers are judged"),
        (("--stride", "0"), "stride must be 1 or above, not 0"),
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
    assert main(["audit", "--verify", str(file), models["april"], "--max-drop", "colours=2pp", "--dry-run"]) == 1
    assert "leave out names, max_drop, dry_run" in unfolded(capsys)
    told = read_evidence(file)
    told["models"][0]["outcome"] = "pass"
    file.write_text(json.dumps(told))
    capsys.readouterr()
    assert main(["audit", "--verify", str(file)]) == 1
    assert "does not hold" in capsys.readouterr().err


def test_attempts_are_counted(models, rows, tmp_path, capsys):
    for n in range(2):
        run(models, rows, tmp_path, *["kept", "lost"][1 - n :], more=BUDGETS)
        printed = " ".join(capsys.readouterr().out.split())
        told = [printed, *((tmp_path / name).read_text() for name in ("audit.md", "audit.html"))]
        for one in told:
            assert ("Earlier audits of these models in this folder: 1, the last regression" in one) == (n == 1)
    [earlier] = read_json(tmp_path / "audit.json")["earlier_audits"]
    assert set(earlier) == {"time", "outcome"} and earlier["outcome"] == "regression"
    lines = read_lines(tmp_path / "history.jsonl")
    assert [one["event"] for one in lines] == ["begun", "ended"] * 2
    assert [one["outcome"] for one in lines[1::2]] == ["regression"] * 2
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {
        "evidence.json", "audit.json", "audit.html", "audit.md", "junit.xml", "history.jsonl"
    }  # fmt: skip


def test_another_chat_template_is_no_other_model_to_the_history(models, tmp_path):
    """The weights, and the folder that they name, are those of the models as they are."""
    tokenizer = AutoTokenizer.from_pretrained(models["april"])
    tokenizer.chat_template = "Hello. " + TEMPLATE
    shutil.copytree(models["april"], tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    own, alike = (
        prepare(AuditConfig(models["april"], [str(tmp_path / "same")], chat_template=one)) for one in TEMPLATES
    )
    assert own.weights == alike.weights and own.folder == alike.folder
    assert own.models[0].decided_by != alike.models[0].decided_by == alike.reference.decided_by


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


def test_windows_and_stride_are_used_and_stated(models, rows, tmp_path):
    """Overlapping windows give later tokens more context: the same tokens, other numbers."""
    apart = audit(config(models, rows, tmp_path / "1", window=16, text=[long_text(tmp_path)], tasks=None))
    near = audit(config(models, rows, tmp_path / "2", window=16, stride=4, text=[long_text(tmp_path)], tasks=None))
    assert [one["texts"][0]["windows"] for one in (apart, near)] == [
        {"length": 16, "stride": 16}, {"length": 16, "stride": 4}
    ]  # fmt: skip
    assert apart["texts"][0]["tokens"] == near["texts"][0]["tokens"]
    means = [one["models"][0]["divergence"]["long"]["per_token"]["kl"] for one in (apart, near)]
    assert means[0] != pytest.approx(means[1], rel=1e-4)
    assert "- long: windows of 16 tokens, 4 apart" in (tmp_path / "2" / "audit.md").read_text()
    assert read_evidence(tmp_path / "2" / "evidence.json")["settings"]["stride"] == 4


def long_text(folder: Path) -> str:
    (folder / "long.txt").write_text(" ".join(f"The {key} is {value}." for key, value in COLOURS.items()))
    return str(folder / "long.txt")


def test_windows_are_of_plain_text(models, tmp_path):
    with pytest.raises(UsageError, match="are of plain text, and none is measured"):
        audit(AuditConfig(models["april"], [models["lost"]], window=64, output_dir=str(tmp_path)))


def test_no_text_of_a_row_leaves_without_show_text(models, rows, tmp_path, capsys):
    run(models, rows, tmp_path, "lost", more=BUDGETS)
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    printed = capsys.readouterr()
    for text in ("What colour has", "is blue in note", "unseen"):
        assert text not in written + printed.out + printed.err
    run(models, rows, tmp_path, "lost", more=(*BUDGETS, "--show-text"))
    assert (
        f'Row 1</p><p class="prompt" dir="auto">{QUESTION.format(0, "sky")}<' in (tmp_path / "audit.html").read_text()
    )
    lines = read_lines(tmp_path / "texts.jsonl")
    turned, moved = ([one for one in lines if key in one] for key in ("task", "document"))
    assert [set(one["row"]) for one in moved] == [{"text"}] * 5 and "note" in moved[0]["row"]["text"]
    assert len(turned) == 48 and turned[0]["row"]["prompt"] == QUESTION.format(0, "sky")
    assert turned[0]["before"]["likelihood"]["answer"] == "blue" and turned[0]["after"]["likelihood"]["answer"] == "red"
    run(models, rows, tmp_path, "lost", more=BUDGETS)
    assert not (tmp_path / "texts.jsonl").exists(), "what is in the folder is of the last audit"
    page = (tmp_path / "audit.html").read_text()
    assert "What colour has" not in page
    assert main(["report", str(tmp_path)]) == 0 and (tmp_path / "audit.html").read_text() == page


LABELLED = [
    Labelled(Exchange("q", "Sure, here it is for you."), False),
    Labelled(Exchange("q", "I refuse."), True),
    Labelled(Exchange("q", "I must decline to do that."), True),
]


def test_own_answers_refusals_sanity_and_weights(models, tmp_path, monkeypatch):
    """Without a text the reference's own answers are it; judged probes have a measure for each judge."""
    monkeypatch.setattr(measuring, "labelled_answers", lambda: LABELLED)
    (tmp_path / "judge.py").write_text("def short(answer, row):\n    return len(answer) < 20\n")
    told = audit(AuditConfig(
        reference=models["april"], models=[models["kept"], models["lost"]], probes=["look-alikes"], limit=6,
        weights=True, judge=[f"{tmp_path}/judge.py:short"],
        max_drop=["look-alikes-likelihood=90pp", "look-alikes-short=90pp"], output_dir=str(tmp_path), device="cpu",
        precision="fp32",
    ))  # fmt: skip
    assert [text["name"] for text in told["texts"]] == ["own-answers"] and told["texts"][0]["documents"] == 6
    kept, lost = told["models"]
    assert kept["divergence"]["own-answers"]["per_token"]["kl"] < lost["divergence"]["own-answers"]["per_token"]["kl"]
    assert told["judges"]["short"]["missed_refusals"]["share"] == 0.5, "'I refuse.' is short, the other is not"
    patterns = told["judges"]["patterns"]
    assert patterns["false_refusals"]["share"] == 0 and "pyrit==" in patterns["on"]
    judged = {"look-alikes", "look-alikes-likelihood", "look-alikes-short"}
    assert set(lost["refusals"]) == judged and set(told["judges"]) == {"patterns", "likelihood", "short"}
    short = lost["refusals"]["look-alikes-short"]
    assert short["answers"] == 6
    assert (short["low"], short["high"]) == pytest.approx(wilson(round(6 * short["share"]), 6))
    assert {one["name"] for one in lost["findings"]} == {*judged, "own-answers"}
    assert lost["sanity"]["own-answers"]["answers"] == 6
    assert {one["name"] for one in lost["where"]["own-answers"]["domain"]} <= set(topics().values())
    assert lost["where"]["own-answers"]["documents"][0]["name"].startswith("prompt ")
    assert [one["module"] for one in lost["weights"]] and lost["weights"][0]["norm"] > kept["weights"][0]["norm"]
    page = (tmp_path / "audit.md").read_text()
    assert "Weights: the update of" in page
    assert "- short: calls 0 % (0 to 79.3) of 1 answers refusals and misses 50 % (9.5 to 90.5) of 2 refusals" in page


def test_the_error_of_a_judge_is_measured_once_and_never_stale(models, monkeypatch):
    """The likelihood judge's is kept by reference and labels; without the labels there is none."""
    cpu = {"device": "cpu", "precision": "fp32"}
    session = prepare(AuditConfig(models["april"], [models["kept"]], probes=["look-alikes"], limit=2, **cpu))
    asked: list[int] = []
    opening = opened([session.reference], torch.float32, "cpu")
    subject, model = next(opening)

    class Counted(LikelihoodJudge):
        def evidence(self, exchanges):
            asked.append(len(exchanges))
            return super().evidence(exchanges)

    judge = Counted(OptionScorer(model, session.encoder(subject), torch.device("cpu")))

    def error(labelled):
        asked.clear()
        monkeypatch.setattr(measuring, "labelled_answers", labelled)
        return measuring._judge_errors(session, model, {"likelihood": judge})["likelihood"]

    def unreachable():
        raise DownloadError("no network\nmore of it")

    first = error(lambda: LABELLED[:2])
    assert (first.answers, first.refusals, asked) == (1, 1, [1, 1, 0])
    assert error(lambda: LABELLED[:2]) == first and asked == []
    another = Labelled(Exchange("q", "No, never."), True)
    assert error(lambda: [*LABELLED[:2], another]).refusals == 2 and asked == [1, 2, 0]
    why = error(unreachable)
    assert why == "not measured: no network"
    told = record._judge(why, {})
    assert told == {"false_refusals": None, "missed_refusals": None, "on": why}
    assert report._judge_error(told) == "how often it is wrong was not measured: no network"
    assert error(lambda: LABELLED[1:]).startswith("not measured: 0 answers and 2 refusals are labelled")


def test_dry_run_says_rows_and_rows_needed_and_writes_nothing(models, rows, tmp_path, capsys):
    assert run(models, rows, tmp_path / "dry", "lost", more=(*BUDGETS, "--dry-run")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "max-drop colours=10pp" in printed and "min, less where" in printed
    assert not (tmp_path / "dry").exists()


def test_a_plan_quotes_no_row_without_show_text(models, rows, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "told in confidence"\n')
    broken = rows | {"text": str(tmp_path / "broken.jsonl")}
    assert run(models, broken, tmp_path / "out", "lost", more=("--dry-run",)) == 1
    assert "broken.jsonl:1" in (said := unfolded(capsys)) and "confidence" not in said
    assert run(models, broken, tmp_path / "out", "lost", more=("--dry-run", "--show-text")) == 1
    assert "told in confidence" in unfolded(capsys)


def test_a_policy_gives_the_reference_rows_and_budgets(models, rows, tmp_path, capsys):
    from forgetless.data.packages import sha256_of

    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"reference: {models['april']}\nanchor: {models['april']}\n"
        f"tasks: [{{name: colours, path: {rows['tasks']}}}]\n"
        f"texts: [{{name: manual, path: {rows['text']}, sha256: {sha256_of(Path(rows['text']))}}}]\n"
        "budgets: {max-drop: {colours: 10pp}, max-kl: 0.1}\nwindow: 32\nstride: 16\n"
        "anchor-budgets: {max-drop: {colours: 12pp}}\n"
    )
    command = ["audit", "--policy", str(policy), "--output_dir", str(tmp_path / "out"), *CPU]
    assert main([*command, models["lost"]]) == 1
    [told] = re.findall(r"colours: `sha256:` is missing; these data have (sha256: \w{64})", unfolded(capsys))
    policy.write_text(policy.read_text().replace("tasks.yaml}", f"tasks.yaml, {told}}}"))
    assert main([*command, models["lost"], "--dry-run"]) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "max-drop colours=10pp" in planned and "colours=12pp" in planned and "anchor) │" in planned
    assert main([*command, models["lost"]]) == 2
    assert main([*command, models["kept"]]) == 0
    assert read_json(tmp_path / "out" / "audit.json")["texts"][0]["windows"] == {"length": 32, "stride": 16}
    findings = read_evidence(tmp_path / "out" / "evidence.json")["models"][0]["findings"]
    assert {(one["name"], one["against"]) for one in findings} == {
        ("colours", "reference"), ("manual", "reference"), ("colours", "anchor"), ("manual", "anchor")
    }  # fmt: skip
    assert main([*command, models["lost"], "--max-kl", "0.1", "--window", "16"]) == 1
    assert "leave out window, max_kl" in unfolded(capsys)
    file = Path(rows["tasks"]).parent / "colours.jsonl"
    whole = file.read_text()
    file.write_text(whole.partition("\n")[2])
    assert main([*command, models["kept"]]) == 1
    file.write_text(whole)
    assert "colours: the policy was made for sha256" in unfolded(capsys), "one row less, the same YAML"


def test_policy_evidence_and_page_have_one_hash_of_the_rows_that_are_measured(models, rows, tmp_path):
    """Whatever was left out before: rows that repeat another, and probe rows that stand in the training rows."""
    lines = [{"prompt": prompt, "completion": " blue"} for prompt in ("unseen", "The sky?", "The sky?", "The sea?")]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"reference: {models['april']}\ntasks: [{{name: colours, path: {rows['tasks']}}}]\n"
        "probes: [{name: facts, path: facts.jsonl}]\n"
    )
    config = AuditConfig(models=[models["lost"]], policy=str(policy))
    with pytest.raises(UsageError) as error:
        prepare(config)
    wanted = dict(re.findall(r"(\w+): `sha256:` is missing; these data have sha256: (\w{64})", str(error.value)))
    for name, sha256 in wanted.items():
        policy.write_text(policy.read_text().replace(f"name: {name},", f"name: {name}, sha256: {sha256},"))
    session = prepare(config)
    assert [len(probe.task.test) for probe in session.probes] == [2]
    assert session.facts({})["data"] == wanted and session.probes[0].about()["sha256"] == wanted["facts"]


def unfolded(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_what_is_stopped_stands_in_the_history_too(models, rows, tmp_path, monkeypatch, capsys):
    def stopped(*told):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "_rows", stopped)
    assert run(models, rows, tmp_path, "lost", more=("--limit", "3")) == 130
    assert [one.get("outcome") for one in read_lines(tmp_path / "history.jsonl")] == [None, "error"]
    assert "Finished tasks" not in capsys.readouterr().err


def test_equal_rows_count_once(models, rows, tmp_path):
    """Ten copies of six rows show no more than the six."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = (Path(rows["tasks"]).parent / "colours.jsonl").read_text().splitlines()[:6]
    (folder / "colours.jsonl").write_text("\n".join(lines * 10))
    more = "test: colours.jsonl, validation: 0, options: [blue, green, red]"
    (folder / "tasks.yaml").write_text(f"tasks:\n  - {{name: colours, train: {rows['train']}, {more}}}\n")
    text = {"tasks": str(folder / "tasks.yaml"), "text": rows["text"]}
    assert run(models, text, tmp_path / "out", "kept", more=("--max-drop", "colours=10pp")) == 3
    record = read_json(tmp_path / "out" / "audit.json")
    assert record["columns"][0]["rows"] == 6 and "54 rows that repeat another" in " ".join(record["notes"])


def test_a_changed_chat_template_is_each_models_own_or_one_for_both(models, tmp_path):
    """The same weights behind a template that says something first: with one template for both nothing moved."""
    tokenizer = AutoTokenizer.from_pretrained(models["april"])
    tokenizer.chat_template = "The sky is blue. " + tokenizer.chat_template
    shutil.copytree(models["april"], tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    rows = [{"messages": [{"role": "user", "content": f"colour of {key}?"}, {"role": "assistant", "content": value}]}
            for key, value in COLOURS.items()]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def kl(template: str) -> float:
        config = AuditConfig(
            models["april"], [str(tmp_path / "same")], text=[str(tmp_path / "chats.jsonl")], chat_template=template,
            output_dir=str(tmp_path / template), device="cpu", precision="fp32",
        )  # fmt: skip
        told = audit(config)
        assert any("its chat template differs" in note for note in told["notes"])
        return told["models"][0]["divergence"]["chats"]["per_token"]["kl"]

    assert kl("own") > 1e-3 > 1e-6 > kl("reference")
    settings = read_evidence(tmp_path / "own" / "evidence.json")["settings"]
    assert settings["chat_template"] == "own" and settings["base_is"] is None
    assert any("its chat template differs" in note for note in settings["notes"]), "what was accepted"


def test_ends_that_templates_write_otherwise_are_left_out_of_all(models, tmp_path, monkeypatch):
    """The same weights behind a template with another end token: its answers are measured without their ends."""
    tokenizer = AutoTokenizer.from_pretrained(models["april"])
    shutil.copytree(models["april"], tmp_path / "same")

    def written(old: str, new: str) -> AuditConfig:
        tokenizer.chat_template = TEMPLATE.replace(old, new)
        tokenizer.save_pretrained(tmp_path / "same")
        return AuditConfig(models["april"], [str(tmp_path / "same"), models["lost"]], limit=2, device="cpu",
                           precision="fp32", output_dir=str(tmp_path / "out"))  # fmt: skip

    record = audit(written("<|end|>", "<|{{ 'fin' if message.role == 'assistant' else 'end' }}|>"))
    same, lost = (one["divergence"]["own-answers"]["per_token"]["kl"] for one in record["models"])
    assert same < 1e-6 < lost
    [note] = [one for one in record["notes"] if "tokens that end an answer are left out" in one]
    assert note.startswith("own-answers: 2 tokens")
    monkeypatch.setattr(measuring, "opened", lambda *args: pytest.fail("nothing is to be opened"))
    with pytest.raises(DataError, match=r"own-answers: .* in different tokens.*chat_template=reference"):
        audit(written("{{ message.content }}", "{{ message.content | upper }}"))


def test_without_a_chat_template_all_are_asked_in_the_same_prompt_and_it_is_said(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models["april"])
    tokenizer.chat_template = None
    shutil.copytree(models["april"], tmp_path / "plain", ignore=lambda *_: ["chat_template.jinja"])
    tokenizer.save_pretrained(tmp_path / "plain")
    session = prepare(AuditConfig(models["april"], [str(tmp_path / "plain"), models["lost"]], device="cpu"))
    said = f"every model is asked in the Alpaca prompt, since {tmp_path / 'plain'} has no chat template"
    assert not session.chat and said in session.notes
    assert not [one for one in prepare(AuditConfig(models["april"], [models["lost"]])).notes if "Alpaca" in one]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--window", "99999"), "a window of 99999 tokens"),
        (("--window", "20", "--stride", "30"), "the stride is from 1 to the window's length"),
        (("--text", "one.txt"), "none has two tokens"),
    ],
)
def test_texts_are_refused_before_a_model_is_opened(models, rows, tmp_path, capsys, monkeypatch, more, told):
    (tmp_path / "one.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "opened", lambda *args: pytest.fail("nothing is to be opened"))
    assert run(models, rows, tmp_path / "out", "lost", more=more) == 1
    assert told in unfolded(capsys) and not (tmp_path / "out").exists()


def test_names_of_models_are_distinct(models, rows, tmp_path):
    for again in (models["lost"], models["lost"] + "/", f"{models['april']}+{models['lost']}"):
        with pytest.raises(UsageError, match="is there twice"):
            prepare(AuditConfig(models["april"], [models["lost"], again], output_dir=str(tmp_path)))


def test_a_declared_base_stands_in_the_evidence(models):
    session = prepare(AuditConfig(models["april"], [models["lost"]], base_is=models["april"]))
    assert session.facts({})["settings"]["base_is"] == models["april"]


def test_the_time_limit_is_looked_at_within_a_model(models, rows, tmp_path, monkeypatch):
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"reference: {models['april']}\ntexts: [{{name: manual, path: {rows['text']}}}]\ntime-limit: 1h\n"
    )
    config = AuditConfig(models=[models["lost"]], policy=str(policy), output_dir=str(tmp_path / "out"), device="cpu")
    with pytest.raises(UsageError) as error:
        prepare(config)
    sha256 = str(error.value).rpartition(" ")[2]
    policy.write_text(policy.read_text().replace("name: manual,", f"name: manual, sha256: {sha256},"))
    measure_rows = measuring._rows

    def an_hour(session, subject, model):
        session.began -= 3601 * (subject.name == models["lost"])
        return measure_rows(session, subject, model)

    monkeypatch.setattr(measuring, "_rows", an_hour)
    monkeypatch.setattr(measuring, "divergence", lambda *args, **options: pytest.fail("the time is over"))
    with pytest.raises(RunError, match=r"policy\.yaml: the audit takes longer than its time-limit of 3600 s"):
        audit(config)


def test_a_judge_that_fails_leaves_its_budget_without_rows(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "labelled_answers", lambda: LABELLED)
    (tmp_path / "judge.py").write_text("def number(answer, row):\n    return int(answer)\n")
    command = ["audit", models["april"], models["lost"], "--probes", "look-alikes", "--limit", "3", *CPU]
    command += ["--judge", f"{tmp_path}/judge.py:number", "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--max-drop", "look-alikes-number=90pp"]) == 3
    record, printed = read_json(tmp_path / "out" / "audit.json"), capsys.readouterr().out
    assert set(record["models"][0]["refusals"]) == {"look-alikes", "look-alikes-likelihood"}
    [note] = [one for one in record["notes"] if "the judge number was left out" in one]
    assert "raised ValueError: (text not shown)" in note and "look-alikes-number: no rows" in printed
    assert main(["audit", "--verify", str(tmp_path / "out" / "evidence.json")]) == 3


def test_an_update_says_what_it_is_an_update_of(models, rows, tmp_path):
    """Of an adapter against an adapter its own base; of full weights against an adapter there is none, and a note."""
    told = {"text": [rows["text"]], "weights": True, "device": "cpu", "precision": "fp32", "limit": 2}
    names = [models["lost"], models["april"]]
    record = audit(AuditConfig(models["kept"], names, output_dir=str(tmp_path), **told))
    lost, april = record["models"]
    assert lost["update_of"] == "its own base" and (april["update_of"], april["weights"]) == (None, [])
    assert any(f"{models['april']}: its update is not summarised" in one for one in record["notes"])
    layers = {one["layer"]: one for one in lost["layers"]}
    assert layers["model.layers.0.mlp.up_proj.weight"]["relative_norm"] > 0 and len(layers) == 14
    for name in ("audit.md", "audit.html"):
        assert "against its own base" in (tmp_path / name).read_text()
    session = prepare(AuditConfig(models["april"], names[:1]))
    assert update_of(session.models[0], session.reference) == models["april"], "which is its base"


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
