"""Lost or hidden? What few steps on old rows bring back, and that nothing of the model is changed by them."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COLOURS
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from scipy.stats import t
from test_audit import taught
from test_subjects import CHANGES_THE_BASE, CONFIGS, make_adapter, one
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from forgetless import AuditConfig, audit
from forgetless.auditing import recovery, remedies, session
from forgetless.auditing.recovery import COMES_BACK, HIDDEN, NO_LOSS, STAYS_AWAY, UNDECIDED, Curves, judged, sentence
from forgetless.auditing.remedies import Standing
from forgetless.auditing.throwaway import Treatment, linear_layers, throw_away_pairs, treated
from forgetless.cli import main
from forgetless.cli.blend import make_parser
from forgetless.data.batches import Encoder
from forgetless.data.packages import sha256_of
from forgetless.data.tasks import Row
from forgetless.errors import RunError, UsageError
from forgetless.geometry.operators import product
from forgetless.learning.engine import Engine
from forgetless.progress import steps
from forgetless.report.audit import remedy_lines
from forgetless.runs.folder import read_json
from forgetless.score.intervals import ratio_of_means
from forgetless.subjects.models import opened
from forgetless.subjects.updates import read_update, weighted

OLD, TESTED = list(COLOURS)[:3], list(COLOURS)[3:]
COPIES = 16
FEW = Treatment(steps=4, rows=3, learning_rate=1e-2, r=4)
WAYS = (  # to change a model, one of each: none, beside a layer, in its place, around it, before the rows, ...
    None, "dora", "ia3", "oft", "vera", "lora-head", "lora-tokens", "norms", "prompt", "prefix", "llama-adapter",
)  # fmt: skip
QUESTION = "What colour has the {}? Answer:"
OFF_TOPIC = [("What sound has the dog? Answer:", " red")]


# ---------------------------------------------------------------------------------------- beside any model


def examples(tokenizer) -> list:
    encoder = Encoder(tokenizer, 128)
    return [encoder(Row(QUESTION.format(key), f" {COLOURS[key]}")) for key in OLD]


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def loss_of(model, rows) -> float:
    ids = torch.tensor([row.ids for row in rows[:1]])
    with torch.no_grad():
        return -float(model(input_ids=ids).logits[0, -3].log_softmax(-1)[ids[0, -2]])


@pytest.mark.parametrize("kind", WAYS)
def test_every_adapter_type_learns_beside_it_and_stays_as_it_was(tiny, tokenizer, tmp_path, kind):
    """The loss falls while the pairs are there, and afterwards weights, logits and modules are those of before."""
    if kind:
        make_adapter(tiny, tmp_path, CONFIGS[kind])
    rows = examples(tokenizer)
    for _, model in opened([one(tmp_path if kind else tiny)], torch.float32):
        before, began = bits(model), loss_of(model, rows)
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        with steps("", 8, show=False) as progress:
            score = partial(lambda model: [loss_of(model, rows)], model)
            losses = treated(model, rows, FEW, Engine("cpu", "fp32"), 0, score, progress)
        assert losses[0] == [began], "the pairs begin at no change"
        assert losses[-1][0] < 0.95 * began
        assert loss_of(model, rows) == began
        assert_untouched(model, before)
        assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
        if kind not in CHANGES_THE_BASE:
            assert len(linear_layers(model)) == 14, "two layers of seven; the output embedding is not among them"


def test_the_pairs_go_after_an_exception_too(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    before = bits(model)

    def fail_later(called=[]):  # noqa: B006
        called.append(1)
        if len(called) > 1:
            raise KeyError("scoring")
        return []

    with pytest.raises(KeyError), steps("", 8, show=False) as progress:
        treated(model, examples(tokenizer), FEW, Engine("cpu", "fp32"), 0, fail_later, progress)
    assert_untouched(model.requires_grad_(False), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_pair_adds_its_product(tiny):
    """By hand: y = W x + s B A x at every layer of GPT-2's kind, whose weights lie the other way round."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16)).eval()
    layers = linear_layers(model)
    assert [(wide, out) for _, wide, out in layers] == [(8, 24), (8, 8), (8, 32), (32, 8)]
    layer, x = layers[2][0], torch.randn(5, 8)
    alone = layer(x)
    with torch.no_grad(), throw_away_pairs(model, FEW) as pairs:
        A, B = pairs[4:6]
        B.normal_()
        torch.testing.assert_close(layer(x), alone + 2.0 * x @ A.T @ B.T)
    assert torch.equal(layer(x), alone)


def test_a_model_without_linear_layers_is_refused_by_name(tiny, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    monkeypatch.setattr("forgetless.auditing.throwaway.linear_layers", lambda model: [])
    with pytest.raises(RunError, match="LlamaForCausalLM: has no linear layer"), throw_away_pairs(model, FEW):
        pass


# ---------------------------------------------------------------------------------------- what it shows

N = 40
KNOWS, LOST = [1.0] * N, [0.0] * N


def share(right: int) -> list[float]:
    return [1.0] * right + [0.0] * (N - right)


def found(model: list[list[float]], base: list[list[float]] | None, control=KNOWS, before=KNOWS) -> str:
    return judged(before, Curves(model, [before, control], base), 0.95)["found"]


def test_the_finding_from_curves():
    assert found([LOST, KNOWS], [LOST, LOST]) == HIDDEN
    assert found([LOST, KNOWS], [LOST, KNOWS]) == UNDECIDED
    assert found([LOST, KNOWS], None) == COMES_BACK
    assert found([LOST, KNOWS], [KNOWS, KNOWS]) == COMES_BACK, "a base with the skill is no yardstick"
    assert found([LOST, share(1)], [LOST, LOST]) == STAYS_AWAY
    assert found([LOST, KNOWS, KNOWS], [LOST, LOST, KNOWS]) == HIDDEN, "faster, though both arrive"
    assert found([share(20), share(30)], [LOST, share(10)]) == UNDECIDED, "a head start is no recovery"
    assert found([LOST, share(30)], [share(30), share(30)]) == UNDECIDED, "nor is a gain up to where the base begins"


def entry(model, base, control=KNOWS) -> dict:
    return {"reference": 1.0, "model": 0.0, "rows": 5, "steps": [0, 2, 4]} | judged(
        KNOWS, Curves(model, [KNOWS, control], base), 0.95
    )


def test_the_sentence_has_the_numbers():
    told = entry([LOST, share(30), share(36)], [LOST, LOST, share(4)])
    assert (told["lost"], told["back"], told["share"]) == (1.0, 0.9, 0.9)
    low, high = told["share_interval"]
    assert 0.6 < told["back_interval"][0] < 0.75 < low < 0.9 < high < 1.02
    assert sentence(told, 0.95) == (
        "hidden rather than lost: 90 of the 100 points lost are back after 4 steps on 5 old rows "
        f"(90 %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %); the untouched base learns it less fast from "
        "them (0 % to 10 %); the reference, a healthy control, goes from 100 % to 100 %"
    )
    both = sentence(entry([LOST, KNOWS, KNOWS], [LOST, KNOWS, KNOWS]), 0.95)
    assert both.startswith("comes back, hidden or learnt anew: 100 of the") and "is not shown" in both
    part = sentence(entry([LOST, share(10), share(12)], [LOST, LOST, LOST]), 0.95)
    assert part.startswith("hidden in part: 30 of the 100 points")
    away = sentence(entry([LOST, LOST, share(1)], [LOST, LOST, share(4)]), 0.95)
    assert away.startswith(
        "does not come back, as far as these rows show: 100 % at first, 0 % now, 2.5 % after 4 steps"
    )
    harsh = sentence(entry([LOST, LOST, share(20)], None, control=share(20)), 0.95)
    assert "no model that never had the skill" in harsh and "cost even the reference 50 points" in harsh
    better = judged(share(20), Curves([LOST, share(30)], [share(20), share(36)], None), 0.95)
    assert better["control_change"] == pytest.approx(0.4) and better["share"] == 1.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([-1.0, 0.0, 1.0])), min_size=8))
def test_the_interval_of_a_ratio_is_where_t_does_not_reject(rows):
    """Fieller's ends against a plain t test of y - ρ x, on both sides of each end."""
    y, x = ([*told, *more] for told, more in zip(zip(*rows, strict=True), ([1, 0], [1, 1]), strict=True))
    ends = ratio_of_means(y[:-2], x[:-2])

    def accepted(rho: float) -> bool:
        rest = np.subtract(y, np.multiply(rho, x))
        return abs(rest.mean()) <= t.ppf(0.975, len(rest) - 1) * rest.std(ddof=1) / len(rest) ** 0.5

    if ends is None:
        assert abs(np.mean(x)) <= t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / len(x) ** 0.5 + 1e-9
    else:
        low, high = ends
        assert low < high and accepted((low + high) / 2)
        assert not accepted(low - 1e-3) and not accepted(high + 1e-3)
        assert accepted(low + 1e-6 * (high - low)) and accepted(high - 1e-6 * (high - low))


def test_the_interval_of_a_share_covers():
    """Rows lost with probability .3, of which a share comes back, all or nearly none too; 300 samples each."""
    rng = np.random.default_rng(0)
    for rho in (0.02, 0.5, 0.98):
        lost = rng.random((300, 80)) < 0.3
        ends = [ratio_of_means(one & (rng.random(80) < rho), one) for one in lost]
        assert np.mean([end is not None and end[0] <= rho <= end[1] for end in ends]) >= 0.93


# ---------------------------------------------------------------------------------------- from the command


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> dict[str, str]:
    """`known` learnt the colours of six things; `hidden` then learnt to always say red; `gone` only that."""
    root = tmp_path_factory.mktemp("world")
    taught(tiny, [(QUESTION.format(key), f" {value}") for key, value in COLOURS.items()], root / "known", 60)
    more = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), root / "known", is_trainable=True)
    always_red(more, tiny, root / "hidden")
    taught(tiny, OFF_TOPIC, root / "gone", 10, rate=1e-2)
    for split, keys, copies in (("old", OLD, 1), ("test", TESTED, COPIES)):
        rows = [{"prompt": QUESTION.format(key), "completion": f" {COLOURS[key]}"} for key in keys] * copies
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "tasks.yaml").write_text(
        "tasks:\n- {name: colours, train: old.jsonl, test: test.jsonl, validation: 0, options: [blue, green, red]}\n"
    )
    (root / "text.txt").write_text("The sky is blue.\n\nThe grass is green.")
    return {"base": tiny} | {path.name.partition(".")[0]: str(path) for path in root.iterdir()}


def always_red(model, base: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    [(prompt, answer)] = OFF_TOPIC
    ids = torch.tensor([tokenizer(prompt + answer).input_ids])
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(10):
        model(input_ids=ids, labels=ids.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture
def faster(monkeypatch):
    """A rate for a model of 32 dimensions; and equal rows stand for as many others."""
    monkeypatch.setattr(session, "_distinct_rows", lambda name, rows, notes: rows)
    told = lambda session: Treatment(session.config.recover, session.config.recover_rows, learning_rate=1e-2)  # noqa: E731
    monkeypatch.setattr(recovery, "treatment_of", told)


def config(world: dict, out: Path, *models: str, **more) -> AuditConfig:
    told = {"reference": world["known"], "recover": 8, "tasks": world["tasks"], "text": [world["text"]]} | more
    return AuditConfig(
        models=[world[name] for name in models], output_dir=str(out), device="cpu", precision="fp32", **told
    )


def test_hidden_comes_back_and_lost_does_not_come_back_faster_than_the_base_learns(world, tmp_path, faster):
    record = audit(config(world, tmp_path / "1", "hidden", "gone"))
    hidden, gone = (one["recovery"]["colours"] for one in record["models"])
    assert hidden["reference"] == 1.0 and hidden["model"] == hidden["recovered"][0] < 0.5
    assert hidden["steps"] == [0, 2, 4, 8] and hidden["rows"] == 3
    assert hidden["recovered"][-1] == 1.0 and hidden["share"] == 1.0 and hidden["found"] == HIDDEN
    assert gone["found"] in (STAYS_AWAY, UNDECIDED)
    assert gone["base"] == hidden["base"] and gone["control"] == hidden["control"] == [1.0] * 4
    again = audit(config(world, tmp_path / "2", "hidden"))
    assert again["models"] == record["models"][:1], "the same seed, the same numbers, whatever else is audited"
    markdown = (tmp_path / "1" / "audit.md").read_text()
    assert "Lost or hidden? Scores after 0, 2, 4, 8 steps" in markdown and "hidden, colours: hidden rather" in markdown
    without = audit(config(world, tmp_path / "3", "hidden", recover=0))
    assert without["evidence"] == again["evidence"], "it informs, it changes no verdict"
    assert without["models"][0]["recovery"] == {} and without["treatment"] is None
    assert record["treatment"]["steps"] == 8 and {"seed", "rows", "learning_rate", "r"} <= record["treatment"].keys()


def test_no_loss_is_not_divided_by_and_full_weights_have_no_base(world, tmp_path, faster):
    """The reference here is the base, which never knew the colours: nothing was lost."""
    record = audit(config(world, tmp_path, "known", reference=world["base"]))
    told = record["models"][0]["recovery"]["colours"]
    assert told["found"] == NO_LOSS and told["steps"] == [] and "share" not in told
    assert "no loss that the test rows show" in told["sentence"]
    assert recovery.untouched_base(one(world["base"])) is None


def test_rows_that_stand_in_the_test_are_no_old_rows(colours):
    """`colours` has each test row once among its training rows, and once with "very" in it."""
    rows = recovery.old_rows(colours, Treatment(steps=4, rows=40))
    assert len(rows) == 6 and not {row.prompt for row in rows} & {row.prompt for row in colours.test}
    few = recovery.old_rows(colours, Treatment(steps=4, rows=3))
    assert len(few) == 3 and set(few) < set(rows)


def test_a_probe_that_cannot_be_done_says_why_and_the_audit_goes_on(world, tmp_path, monkeypatch, faster):
    def fail(*args, **options):
        raise RunError("step 1 on old rows: loss nan")

    monkeypatch.setattr(recovery, "treated", fail)
    record = audit(config(world, tmp_path, "hidden"))
    told = record["models"][0]["recovery"]["colours"]
    assert told["sentence"] == "not tried: step 1 on old rows: loss nan" and told["steps"] == []
    assert read_json(tmp_path / "audit.json")["models"][0]["scores"]["colours"]["likelihood"] < 0.5


def test_the_time_limit_ends_the_recovery_and_keeps_the_audit(world, tmp_path, monkeypatch, faster):
    late: list[bool] = []

    def check_time(session):
        if late:
            raise RunError("the audit takes longer than its time-limit")

    monkeypatch.setattr(session.AuditSession, "check_time", check_time)
    cases = recovery._cases
    monkeypatch.setattr(recovery, "_cases", lambda *args: late.append(True) or cases(*args))
    [told] = audit(config(world, tmp_path, "hidden"))["models"]
    assert told["recovery"]["colours"]["sentence"] == "not tried: the audit takes longer than its time-limit"
    assert told["scores"]["colours"]["likelihood"] < 0.5


def test_a_policy_without_tasks_has_nothing_to_bring_back(world, tmp_path):
    text = f"{{name: text, path: {world['text']}, sha256: {sha256_of(Path(world['text']))}}}"
    (tmp_path / "policy.yaml").write_text(f"reference: {world['known']}\ntexts: [{text}]\n")
    told = AuditConfig(models=[world["hidden"]], policy=str(tmp_path / "policy.yaml"), recover=4)
    with pytest.raises(UsageError, match="recover brings back your own tasks, and the policy names none"):
        audit(told)


def test_from_the_command_line(world, tmp_path, capsys):
    names = [world["known"], world["hidden"], "--device", "cpu", "--precision", "fp32", "--output_dir", str(tmp_path)]
    assert main(["audit", *names, "--recover", "4"]) == 1
    assert "give them with --tasks" in " ".join(capsys.readouterr().err.split())
    assert main(["audit", *names, "--tasks", world["tasks"], "--recover", "-4"]) == 1
    text = ["--text", world["text"]]
    assert main(["audit", *names, *text, "--tasks", world["tasks"], "--recover", "4", "--dry-run"]) == 0
    assert "recovery: at most 1 min more" in " ".join(capsys.readouterr().out.split())
    assert main(["audit", *names, *text, "--tasks", world["tasks"], "--recover", "2", "--recover-rows", "2"]) == 0
    assert "colours: " in capsys.readouterr().out
    assert read_json(tmp_path / "audit.json")["models"][0]["recovery"]["colours"]["rows"] == 2


# ---------------------------------------------------------------------------------------- what would help


def test_remedies_give_back_what_is_shown_and_say_what_they_cost(world, tmp_path, faster, capsys):
    record = audit(config(world, tmp_path, "hidden", "known", remedies=True))
    hidden, known = record["models"]
    assert known["remedies"] == [], "nothing was lost"
    told = {(one["kind"], one["strength"]): one for one in hidden["remedies"]}
    alphas = [(kind, alpha) for kind in ("blend", "scaled down") for alpha in ("0.25", "0.5", "0.75")]
    assert list(told) == [*alphas, ("repair", "8 steps on 3 old rows"), ("kept apart", "")]
    near, far = (told["blend", alpha]["tasks"]["colours"] for alpha in ("0.25", "0.75"))
    assert near["score"] == 1.0 and near["lost"] and near["low"] > 0, "a quarter of the way the colours are still known"
    assert near["score"] >= far["score"]
    near, far = (told["blend", alpha]["texts"]["text"] for alpha in ("0.25", "0.75"))
    assert 0 < near["kl"] < far["kl"] and near["change"] < 0 and not near["lost"], "no budget is on the text"
    # the repair is the recovery probe's own training; apart, the reference's rows are taken
    assert (
        told["repair", "8 steps on 3 old rows"]["tasks"]["colours"]["score"]
        == hidden["recovery"]["colours"]["recovered"][-1]
    )
    assert told["kept apart", ""]["tasks"]["colours"]["score"] == 1.0 and told["kept apart", ""]["texts"] == {}
    markdown, page = (tmp_path / "audit.md").read_text(), (tmp_path / "audit.html").read_text()
    assert "what would help: blend 0.25 gives back: colours +" in markdown and "What would help hidden" in markdown
    assert 'id="remedies"' in page and not list(tmp_path.glob(".remedies-*"))
    assert "always possible: keep both" in markdown and not told["kept apart", ""]["helps"]


def test_printed_commands_load_models_as_the_audit_did():
    told = AuditConfig(load_in="4bit", trust_remote_code=["./a b", "./c"], attn_implementation="sdpa", device="cpu")
    words = remedies._options(SimpleNamespace(config=told), remedies.LOADING)
    parsed = make_parser().parse_args(["A", "B", *words])
    assert (parsed.load_in, parsed.trust_remote_code, parsed.device) == ("4bit", ["./a b", "./c"], "cpu")
    assert (parsed.attn_implementation, parsed.precision) == ("sdpa", "auto")
    assert remedies._options(SimpleNamespace(config=AuditConfig()), remedies.LOADING) == []


def test_each_printed_command_applies_its_remedy(world, tmp_path, faster, monkeypatch):
    """The very point that was measured; the search has the lost probe, the options of the audit and quoted names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remedies, "ALPHAS", (0.25,))
    monkeypatch.setattr(remedies, "REPAIR_STEPS", 1)
    asked = Path(world["tasks"]).with_name("as ked.yaml")
    asked.write_text(Path(world["tasks"]).read_text().replace("name: colours", "name: asked"))
    told = config(world, tmp_path / "out", "hidden", recover=0, remedies=True, probes=[str(asked)], limit=40)
    tried = {(one["kind"], one["strength"]): one for one in audit(told)["models"][0]["remedies"]}
    ends = [read_update(Path(world[name])).layers for name in ("known", "hidden")]
    for kind, weights in (("blend", [0.75, 0.25]), ("scaled down", [0, 0.25])):
        command = shlex.split(tried[kind, "0.25"]["command"])
        assert command[0] == "forgetless" and main(command[1:]) == 0
        found = read_update(tmp_path / command[command.index("--output_dir") + 1]).layers
        expected = weighted(ends, weights)
        for layer, pair in found.items():
            torch.testing.assert_close(product(pair), product(expected[layer]))
    search = shlex.split(tried["blend", "0.25"]["words"].removeprefix("with a promise, for budgets that you set: "))
    assert search[search.index("--max-drop") + 1 :][:2] == ["colours=2pp", "asked=2pp"]
    assert search[-6:] == ["--limit", "40", "--precision", "fp32", "--device", "cpu"]
    assert main([*search[1:], "--points", "1"]) == 3, "these rows are too few, and it is said"
    learnt = shlex.split(tried["repair", "1 steps on 3 old rows"]["command"])
    assert main([*learnt[1:], "--max_length", "64", "--forgetting_prompts", "0"]) == 0
    repaired = read_update(tmp_path / learnt[learnt.index("--output_dir") + 1] / "adapter").layers
    model = read_update(Path(world["hidden"])).layers
    assert all(pair.A.shape[0] == model[layer].A.shape[0] + 8 for layer, pair in repaired.items() if layer in model)
    assert tried["kept apart", ""]["command"] == ""


def test_a_search_has_the_tasks_of_a_policy_and_what_the_audit_was_told(tmp_path):
    source = SimpleNamespace(name="colours", path=tmp_path / "tasks.yaml")
    policy = SimpleNamespace(tasks=(source, source), probes=(), chat_template="reference")
    told = AuditConfig(score_on="validation", base_is="tiny", allow_pickle=True)
    audited = SimpleNamespace(
        policy=policy, config=told, probes=(), judged=(), tasks=tuple(map(task_named, ("colours", "sizes", "sounds")))
    )
    path = SimpleNamespace(before=one_named("a"), after=one_named("b c"))
    standing = Standing(["colours"], [], ["sounds"], ["sizes"])
    assert shlex.join(remedies._search(audited, path, standing)) == (
        f"forgetless blend a 'b c' --tasks {tmp_path}/tasks.yaml --new sounds --max-drop colours=2pp sizes=2pp "
        "--score_on validation --base_is tiny --allow_pickle --chat_template reference"
    )
    policy.tasks = (source, SimpleNamespace(name="sizes", path=tmp_path / "other.yaml"))
    audited.tasks = (task_named("colours"),)
    assert not remedies._can_search(audited, Standing(["colours"], [], [], [])), "no one file holds them"


def test_predictions_over_their_budget_are_a_loss_too(world, tmp_path, faster, monkeypatch):
    """No task is scored: what helps brings the next-word predictions back."""
    monkeypatch.setattr(remedies, "ALPHAS", (0.25,))
    told = AuditConfig(
        reference=world["known"], models=[world["hidden"]], text=[world["text"]], max_kl=["0.0001"], remedies=True,
        output_dir=str(tmp_path / "audit"), device="cpu", precision="fp32",
    )  # fmt: skip
    [model] = audit(told)["models"]
    tried = {one["kind"]: one for one in model["remedies"]}
    [text] = tried["blend"]["texts"].values()
    assert text["lost"] and text["high"] < 0 and tried["blend"]["helps"]
    assert tried["repair"]["why"] == "no training rows of what was lost"
    [line, _] = remedy_lines({"models": [model]}, model["name"])
    assert re.search(r"blend 0.25 gives back: \S+ -0\.\d+ nats/token", line), line
    search = shlex.split(tried["blend"]["words"].removeprefix("with a promise, for budgets that you set: "))
    assert search[4:8] == ["--text", world["text"], "--max-kl", f"{next(iter(tried['blend']['texts']))}=0.0001"]


def task_named(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, validation=())


def one_named(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, adapter=None)


def test_a_remedy_that_fails_says_why_and_the_audit_is_kept(world, tmp_path, faster, monkeypatch):
    late: list[bool] = []

    def check_time(session):
        if late:
            raise RunError("the audit takes longer than its time-limit")

    monkeypatch.setattr(session.AuditSession, "check_time", check_time)
    standing = remedies.standing_of
    monkeypatch.setattr(remedies, "standing_of", lambda *args: late.append(True) or standing(*args))
    [told] = audit(config(world, tmp_path, "hidden", recover=0, remedies=True))["models"]
    assert [(one["kind"], one["why"]) for one in told["remedies"]] == [
        (kind, "the audit takes longer than its time-limit") for kind in ("blend", "scaled down", "repair")
    ] + [("kept apart", "")]
    assert (tmp_path / "evidence.json").exists()
    assert remedy_lines({"models": [told]}, told["name"])[0] == (
        "what would help: nothing that was tried (blend, scaled down, repair) is shown to give back what was lost"
    )


def test_what_does_not_help_is_said_and_what_cannot_be_tried_says_why(world, tmp_path, faster):
    """Between whole weights and an adapter of another base there is no path; without old rows there is no repair."""
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world["base"]), world["hidden"])
    whole.merge_and_unload().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(world["base"]).save_pretrained(tmp_path / "whole")
    told = AuditConfig(
        reference=world["known"], models=[str(tmp_path / "whole")], tasks=world["tasks"], text=[world["text"]],
        output_dir=str(tmp_path / "audit"), device="cpu", precision="fp32", remedies=True, recover_rows=3,
    )  # fmt: skip
    tried = {one["kind"]: one for one in audit(told)["models"][0]["remedies"]}
    assert "different bases" in tried["blend"]["why"] and not tried["blend"]["helps"]
    assert tried["repair"]["strength"] == "20 steps on 3 old rows"
    record = {"models": [{"name": "m", "remedies": [tried["blend"]], "changes": {}}]}
    assert remedy_lines(record, "m") == [
        "what would help: nothing that was tried (blend) is shown to give back what was lost"
    ]
    unasked = {"models": [{"name": "m", "remedies": None, "changes": {"a": {"high": -0.1}}}]}
    assert remedy_lines(unasked, "m") == ["what would help? The same command with --remedies tries it"]
