"""The report: realistic summaries in, one page, one Markdown file and one terminal print out."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, SIZES
from pages import Page, opened_in_browser, self_contained
from rich.console import Console
from summaries import CASES, HOSTILE, joint, many_tasks, running, summary, two_learners

from forgetless.cli import main
from forgetless.config import LearnConfig
from forgetless.data.tasks import Row
from forgetless.errors import RunError
from forgetless.learning.stream import learn
from forgetless.report import charts, contents, page, texts, words
from forgetless.report.bounds import BOUNDS, bounds, why_not
from forgetless.report.files import write_report
from forgetless.report.glossary import GLOSSARY, OF_FIGURE, OF_MEASURE, OF_METRIC
from forgetless.report.summary import summarise
from forgetless.report.terminal import print_matrices
from forgetless.runs.seal import sealed
from forgetless.score.metrics import METRICS
from forgetless.score.scorers import MEANINGS

SECTIONS = [
    "plain", "ends", "changes", "matrix", "over-time", "predictions", "losses", "flips", "method", "metrics",
    "measures", "details", "glossary",
]  # fmt: skip
FILES = ["report.html", "report.json", "report.md"]
ROOT = Path(__file__).parents[1]
SECRET = "the film was a triumph of patience over plot"


@cache
def drawn(name: str) -> str:
    return page.render_html(CASES[name]())


def printed(summaries: list[dict], width: int = 160) -> str:
    out = io.StringIO()
    print_matrices(summaries, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_run_gives_a_well_formed_page_without_outside_resources(name, tmp_path):
    files = write_report(CASES[name](), tmp_path)
    text = files["html"].read_text()
    told = Page(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    self_contained(told, text)


def test_every_section_is_there_in_order(tmp_path):
    text = write_report(CASES["two runs"](), tmp_path)["html"].read_text()
    told = Page(text)
    order = [attributes["id"] for tag, attributes in told.tags if tag == "section"]
    assert order == SECTIONS
    assert "<h1>sequential and replay on demo</h1>" in text
    assert "did nothing" in told.text and "cannot compute: R[1,2] was not scored" in told.text
    assert "replay did not act on bbc" in told.text and "3 rows were cut to 256 tokens" in told.text
    assert "(1/(T-1)) Σ_{j<T} (R[T,j] - R[j,j])" in told.text
    assert "82.5 %" in told.text  # a list: TRACE's OP_t
    assert text.count('class="cell diagonal') >= 6
    assert told.text.count("training step") == 4  # two losses, one penalty and its share
    assert "sst2, step 1: loss" in told.text and "95 % interval 80 to 96" in text
    assert "lora.targets" in told.text and "q_proj, v_proj" in told.text and "2.9.0" in told.text


def test_the_other_learner_is_shown(tmp_path):
    told = Page(write_report([two_learners()], tmp_path)["html"].read_text())
    assert "views" in told.ids() and "ilora: fast" in told.text


def test_no_text_of_a_row_reaches_the_report(tmp_path):
    """Keys that the report does not know stay out of it."""
    told = summary()
    told["rows"] = told["predictions"] = [{"prompt": SECRET}]
    told["tasks"][0]["rows"] = [SECRET]
    told["losses"]["sst2"][0]["prompt"] = SECRET
    files = write_report([told], tmp_path)
    assert not [path for path in files.values() if SECRET in path.read_text()]
    assert SECRET not in printed([told])


def test_hostile_names_are_text(tmp_path):
    files = write_report(CASES["two hostile"](), tmp_path)
    for path in files.values():
        assert "<script" not in path.read_text()
        assert "\x1b" not in path.read_text()
    assert Page(files["html"].read_text()).text.count(HOSTILE) > 10
    markdown = files["markdown"].read_text()
    assert "&lt;script&gt;" in markdown and "@all" not in markdown
    scores = markdown[: markdown.index("## Details")]
    tables = [line for line in scores.splitlines() if line.startswith(("| after", "| majority"))]
    assert tables and all(len(re.findall(r"(?<!\\)\|", line)) in (5, 8) for line in tables)
    assert "\x1b" not in printed(CASES["hostile"]())


def test_markup_in_names_does_not_steer_the_terminal():
    told = summary()
    told["tasks"][0]["name"] = told["learned"][0] = "[red]sst2[/nope]"
    assert "[red]sst2[/nope]" in printed([told])


def test_joint_says_that_nothing_can_be_forgotten(tmp_path):
    files = write_report([joint()], tmp_path)
    for text in (files["html"].read_text(), files["markdown"].read_text(), printed([joint()])):
        assert "nothing can be forgotten yet" in " ".join(text.split())
        assert "after all at once" in text
    assert "changes" not in Page(files["html"].read_text()).ids()


def test_a_running_run_says_what_is_missing(tmp_path):
    files = write_report([running()], tmp_path)
    for text in (files["html"].read_text(), files["markdown"].read_text(), printed([running()])):
        assert "not scored" in text
        assert "2 of 3 lessons are done" in text
    text = files["html"].read_text()
    assert text.count('class="cell none') >= 6 and "cannot compute: the matrix has 2 of 3 rows" in text


def test_before_the_first_task_is_learnt_there_is_a_report_too(tmp_path):
    told = running() | {"learned": [], "forgotten": [], "intervals": [], "losses": {}, "acts": []}
    told["headline"]["matrix"], told["counts"] = [], {"gold": [None] * 3, "after": []}
    told["flips"] = []
    told["measures"] = {}
    assert "Nothing is learnt yet" in write_report([told], tmp_path)["html"].read_text()
    assert "Nothing is learnt yet" in printed([told])


def test_a_loss_is_said_with_its_interval_and_rows():
    said = words.forgotten_sentence(summary(), summary()["forgotten"][0])
    assert said == (
        "After learning 3 tasks, sst2 fell from 89 % to 61 %: 28 points lost (95 % interval 20 to 36), 30 of 100 "
        "answers that were right are now wrong and 2 that were wrong are now right. 92 of its 100 answers are now "
        '"positive".'
    )


def test_a_change_that_the_rows_cannot_show_is_not_called_a_loss():
    told = summary("replay")
    said = words.forgotten_sentence(told, told["forgotten"][0])
    assert "no loss that these 100 rows can show (95 % interval 9 lost to 3 gained)" in said
    assert "points lost" not in said
    assert words.verdict(told) == "No loss that the test rows can show on any of the 2 earlier tasks."


def test_a_gain_is_said_as_a_gain():
    entry = summary()["forgotten"][0] | {"now": 0.97, "change": 0.08, "low": 0.02, "high": 0.15, "lost": 1, "gained": 9}
    said = words.forgotten_sentence(summary(), entry)
    assert "rose from 89 % to 97 %: 8 points gained (95 % interval 2 to 15)" in said
    assert "1 of 100 answers that was right is now wrong" in said


def test_no_skill_left_is_said():
    told = summary()
    entry = told["forgotten"][0] | {"now": 0.5}
    assert 'Always answering "negative" would give 52 %.' in words.forgotten_sentence(told, entry)


def test_shares_of_tokens_are_not_called_right_or_wrong():
    told = summary()
    told["tasks"][0]["headline"] = "next_token"
    assert "30 of 100 rows score lower and 2 higher" in words.forgotten_sentence(told, told["forgotten"][0])


def test_runs_that_differ_in_data_are_marked(tmp_path):
    other = summary("replay")
    other["tasks"][0]["train"] = 75
    text = write_report([summary(), other], tmp_path)["markdown"].read_text()
    assert "replay and sequential do not have the same number of training rows" in text


def test_runs_of_one_method_get_names_that_tell_them_apart():
    a, b = summary(), summary() | {"folder": "other"}
    assert words.run_labels([a, b]) == ["sequential (sequential)", "sequential (other)"]
    assert words.run_labels([a, a]) == ["sequential #1", "sequential #2"]


def test_markdown_has_matrix_metrics_and_warnings(tmp_path):
    text = write_report(CASES["two runs"](), tmp_path)["markdown"].read_text()
    assert "| after sst2 | **89 %** | 31 % | 25 % |" in text
    assert "**Warning (replay):**" in text and "28 points lost" in text
    assert "cannot compute: R\\[1,2\\] was not scored" in text
    assert len(text) < 65536  # a comment's limit


def test_terminal_puts_matrices_side_by_side_where_they_fit():
    wide, narrow = printed(CASES["two runs"](), 170), printed(CASES["two runs"](), 80)
    assert re.search(r"sequential: scores +replay: scores", wide)
    assert not re.search(r"sequential: scores +replay: scores", narrow)
    for text in (wide, narrow):
        assert text.count("majority answer") == text.count("base, untouched") == text.count("after mmlu") == 2
        assert "warning (replay): replay did not act on bbc" in " ".join(text.split())
        assert "28 points lost" in " ".join(text.split())
    assert max(map(len, narrow.splitlines())) <= 80


def test_terminal_cuts_a_wide_matrix_into_tables():
    text = printed([many_tasks()], 80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"benchmark_{j:02}" in text for j in range(1, 16))


def test_long_loss_curves_are_averaged_and_say_so():
    records = [{"step": i + 1, "loss": float(i)} for i in range(1000)]
    points = charts._thinned(records, "loss")
    assert len(points) <= charts.POINTS_PER_LINE
    assert sum(value for _, value in points) / len(points) == pytest.approx(499.5, abs=4)
    assert "mean of up to 9 steps" in page.render_html([summary() | {"losses": {"sst2": records}}])


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    write_report([summary()], tmp_path)
    before = (tmp_path / "report.html").read_text()

    def fail(*_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RunError, match=r"report\.html: could not be written \(disk full\)"):
        write_report([joint()], tmp_path)
    assert (tmp_path / "report.html").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_summaries_are_not_changed(tmp_path):
    told = CASES["two runs"]()
    kept = copy.deepcopy(told)
    write_report(told, tmp_path)
    printed(told)
    assert told == kept


# ---- bounds --------------------------------------------------------------------------------------------


def test_other_runs_ends_are_bounds_in_the_table(tmp_path):
    files = write_report(CASES["four runs"](), tmp_path)
    told = json.loads(files["json"].read_text())
    below, beside = ["majority answer", "untouched base"], ["naive sequence", "one adapter per task", "joint training"]
    for run in told["runs"]:
        own = {"sequential": beside[0], "per_task": beside[1], "joint": beside[2]}.get(run["method"]["name"])
        assert [one["name"] for one in run["bounds"]] == below + [name for name in beside if name != own]
    assert told["runs"][1]["bounds"][3]["scores"] == [0.89, 0.95, 0.36]  # the last row of per_task
    assert not told["compare_with_care"]
    text = files["html"].read_text()
    assert text.count('href="#g-per-task">one adapter per task</a>') == 3
    markdown = files["markdown"].read_text()
    assert markdown.count("| one adapter per task | 89 % | 95 % | 36 % |") == 3
    assert "| per\\_task | 89 % | 95 % | 36 % | 73.3 % |" in markdown


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"status": "running"}, "not finished"),
        (
            {"test_rows": {"sst2": "aa11", "bbc": "other", "mmlu": "cc33"}},
            "judged otherwise: bbc (test rows)",
        ),
        ({"tasks": [*joint()["tasks"][:2], joint()["tasks"][2] | {"options": list("ABCE")}]}, "mmlu (options)"),
        ({"tasks": [joint()["tasks"][0] | {"max_new_tokens": 4}, *joint()["tasks"][1:]]}, "sst2 (longest answer)"),
        ({"model": joint()["model"] | {"identity": {"weights": "another"}}}, "another base"),
        ({"tasks": [joint()["tasks"][0] | {"name": "qqp"}, *joint()["tasks"][1:]]}, "other tasks"),
    ],
)
def test_a_run_that_cannot_be_compared_is_no_bound_and_says_why(change, why, tmp_path):
    files = write_report([summary("replay"), joint() | change], tmp_path)
    for text in (Page(files["html"].read_text()).text, files["markdown"].read_text()):
        assert "joint is not shown as a bound (joint training) in the table of replay" in text and why in text
    assert "| joint training |" not in files["markdown"].read_text()


def test_another_pattern_is_another_measure(tmp_path):
    runs = [summary("replay"), joint()]
    for told, pattern in zip(runs, (r"is (\w+)", r"(\w+)\."), strict=True):
        told["tasks"][1] |= {"headline": "regex", "scorers": [["regex", pattern]]}
    told = json.loads(write_report(runs, tmp_path)["json"].read_text())
    assert "joint and replay do not have the same scorers in bbc." in told["compare_with_care"]
    assert "joint training" not in [one["name"] for one in told["runs"][0]["bounds"]]
    runs[1]["tasks"] = copy.deepcopy(runs[0]["tasks"])
    runs[1]["tasks"][1].pop("max_new_tokens")  # a run of an earlier version: not known is not different
    assert why_not(*runs) is None and not contents.differences(runs)


def test_runs_of_two_bases_have_no_common_floor():
    runs = [summary("replay"), summary()]
    names = [row["name"] for row in page.view(runs)["ends"]["rows"]]
    assert names == ["majority answer", "untouched base", "replay", "sequential"]
    runs[1]["model"]["identity"] = {"weights": "another"}
    runs[1]["test_rows"]["bbc"] = "other"
    ends = page.view(runs)["ends"]
    assert [row["name"] for row in ends["rows"]] == ["replay", "sequential"]
    assert "not have the same base, nor the same test rows and measures" in ends["note"]
    assert ends["note"] in Page(page.render_html(runs)).text


def test_only_the_sequence_depends_on_the_order_of_tasks():
    turned = summary("replay")
    turned["tasks"] = turned["tasks"][::-1]
    assert "another order" in why_not(turned, summary("sequential"))
    found = bounds([turned, joint()], 0)
    assert why_not(turned, joint()) is None and found[0]["scores"] == joint()["headline"]["matrix"][-1][::-1]


# ---- rows that turned ----------------------------------------------------------------------------------


def test_rows_that_turned_are_counted_with_their_answers(tmp_path):
    files = write_report([summary()], tmp_path)
    told = " ".join(Page(files["html"].read_text()).text.split())
    assert "54 of 100 rows right when just learnt, wrong now" in told
    assert re.search("24 ?sport ?→ politics", told) and re.search("12 ?tech ?→ no label of the task", told)
    assert "30 of 100 rows right when just learnt, wrong now. Numbers: 1, 4, 7," in files["markdown"].read_text()
    assert "  - 24 rows: sport → politics" in files["markdown"].read_text()
    lost = json.loads(files["json"].read_text())["runs"][0]["flips"][1]["lost"]
    assert lost["turns"][0] == {"before": "sport", "now": "politics", "rows": 24}
    assert lost["rows"][1] == {"row": 3, "key": f"{1:016x}", "before": "sport", "now": "politics"}


def test_shares_of_tokens_turn_no_row_right_or_wrong(tmp_path):
    told = summary()
    told["flips"][0] |= {"whole": False, "lost": [{"row": 0, "key": "k", "before": None, "now": None}]}
    assert "1 of 100 rows score lower now" in write_report([told], tmp_path)["markdown"].read_text()


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory) -> Path:
    """A run over a task with free answers and one with labels, out of files."""
    root = tmp_path_factory.mktemp("texts")
    for name, table in (("colours", COLOURS), ("sizes", SIZES)):
        for split in ("", "-test"):
            rows = [{"prompt": f"What {name} has the {key}? Answer:", "completion": f" {value}"}
                    for key, value in table.items()]  # fmt: skip
            (root / f"{name}{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    tasks = [{"name": name, "train": f"{name}.jsonl", "test": f"{name}-test.jsonl", "validation": 0}
             for name in ("colours", "sizes")]  # fmt: skip
    tasks[1]["options"] = ["small", "large"]
    (root / "stream.yaml").write_text(json.dumps({"name": "words", "tasks": tasks}))
    learn(LearnConfig(
        model=tiny, stream=str(root / "stream.yaml"), method="ilora", output_dir=str(root / "run"), r=4, batch_size=4,
        learning_rate=2e-2, num_train_epochs=4.0, max_length=64, device="cpu", precision="fp32",
        forgetting_prompts=0,
    ))  # fmt: skip
    return root / "run"


def test_a_real_run_tells_which_rows_turned_and_shows_no_text(ran):
    told = summarise(ran)
    [turned], [change] = told["flips"], told["forgotten"]
    assert turned["whole"] and [len(turned["lost"]), len(turned["gained"])] == [change["lost"], change["gained"]]
    assert change["lost"], "the tiny model forgets its first task"
    assert {row["before"] for row in turned["lost"]} == {None}, "free answers are texts"
    assert told["counts"]["gold"] == [None, {"small": 6, "large": 6}]
    for kind in FILES:
        text = (ran / kind).read_text()
        assert "has the sky" not in text and "blue" not in text and "small" in text
    known = {check["name"] for one in told["acts"] for check in one["checks"]} | set(contents.log_keys(told))
    assert known <= OF_FIGURE.keys()


def test_texts_are_shown_only_where_asked_for(ran, tmp_path, capsys):
    assert main(["report", str(ran), "--show-text", "--output_dir", str(tmp_path)]) == 0
    told = summarise(ran)
    for kind in FILES:
        text = (tmp_path / kind).read_text()
        assert "What colours has the" in text
    assert "This page holds texts of test rows" in (tmp_path / "report.html").read_text()
    kept = json.loads((tmp_path / "report.json").read_text())["runs"][0]["texts"]
    assert len(kept["rows"]["colours"]) == sum(len(told["flips"][0][side]) for side in ("lost", "gained"))
    assert all(one["source"].startswith(str(ran.parent)) for one in kept["rows"]["colours"].values())
    assert not kept["notes"]


def test_prompts_are_kept_as_they_are_and_shown_on_one_line():
    chat = Row("", "5", (("user", "2 +\n2?"), ("assistant", "4"), ("user", "Sure?"), ("assistant", "5")))
    turns = texts._prompt(chat)["prompt"]
    assert turns == [{"role": role, "content": text} for role, text in chat.messages[:3]]
    assert contents.shown_prompt(turns) == "user: 2 + 2? assistant: 4 user: Sure?"
    assert texts._prompt(Row("def f():\n    pass\n", "x"))["prompt"] == "def f():\n    pass\n"
    assert contents.shown_prompt("def f():\n    pass\n") == "def f(): pass"


def test_a_stream_that_is_gone_is_a_note(ran, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(ran, moved)
    config = json.loads((moved / "run.json").read_text())
    config["config"]["stream"] = "gone.yaml"
    (moved / "run.json").write_text(json.dumps(sealed(config)))
    assert main(["report", str(moved), "--show_text"]) == 0
    text = Page((moved / "report.html").read_text()).text
    assert "could not be read (no stream 'gone.yaml'" in text and "(the prompt is not known)" in text


def test_json_on_standard_output_writes_nothing(ran, capsys):
    before = (ran / "report.json").stat().st_mtime_ns
    assert main(["report", str(ran), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["learned"] == ["colours", "sizes"]
    assert (ran / "report.json").stat().st_mtime_ns == before


def test_notes_on_the_data_do_not_quote_rows(tmp_path):
    told = summary()
    told["tasks"][0]["notes"] = [f"sst2: train: 2 bad rows dropped; first: x.jsonl:3: {SECRET!r}"]
    for file in write_report([told], tmp_path).values():
        assert "2 bad rows dropped" in file.read_text() and SECRET not in file.read_text()


# ---- JSON, words, drawing ------------------------------------------------------------------------------


def test_every_key_of_the_json_is_documented(ran):
    told = json.loads((ran / "report.json").read_text())
    listed = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "report.md").read_text()))
    assert told.keys() | told["runs"][0].keys() <= listed
    assert told["runs"][0]["matrix"] == summarise(ran)["headline"]["matrix"]


def test_every_word_is_in_the_glossary():
    anchors = {*OF_FIGURE.values(), *OF_METRIC.values(), *OF_MEASURE.values()}
    anchors |= {anchor for _, anchor in BOUNDS.values()}
    assert anchors <= GLOSSARY.keys() and METRICS.keys() == OF_METRIC.keys() and MEANINGS.keys() == OF_MEASURE.keys()
    lines = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    rows = [line.split("|")[1].lower() for line in lines if line.startswith("| ")]
    terms = {re.sub(r"[*`]", "", term).strip() for row in rows for term in [row, *row.split(",")]}
    missing = [term for term, _ in GLOSSARY.values() if term.lower() not in terms]
    assert not missing, f"docs/glossary.md has no {missing}"


def test_every_word_of_the_glossary_is_linked_from_some_page():
    pages = "".join(map(drawn, CASES))
    never = {anchor for anchor in GLOSSARY if f'href="#g-{anchor}"' not in pages}
    # the made-up runs do not have every metric, figure and measure
    assert never <= {*OF_METRIC.values(), *OF_FIGURE.values(), *OF_MEASURE.values()}


def test_a_long_stream_has_a_small_chart_per_task():
    for name in ("many tasks", "many tasks, two runs"):
        found = Page(drawn(name))
        assert len([1 for tag, attributes in found.tags if attributes.get("class") == "mini"]) == 15
    told = charts.task_charts([("sequential", 0, many_tasks()), ("joint", 1, joint())])
    assert [len(one["lines"]) for one in told] == [1] * 15, "a run without the task has no line"


def test_text_on_every_colour_of_the_heat_map_can_be_read():
    """4.5 to 1, WCAG AA, on the colour that the browser mixes in oklab."""
    css = (ROOT / "src" / "forgetless" / "report" / "page.css").read_text()
    for mode, switch in ((css.split("@media")[0], 73), (css.split("@media")[1], 50)):
        cold, heat, light = (re.search(rf"--{name}:(#\w+)", mode)[1] for name in ("cold", "heat", "on-cold"))
        dark = "#fff" if light == "#000" else "#000"
        for share in range(101):
            assert contrast(mixed(cold, heat, share / 100), dark if share >= switch else light) >= 4.5, share


def linear(colour: str) -> list[float]:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def mixed(a: str, b: str, share: float) -> list[float]:
    """Linear RGB of a mix in oklab (Ottosson 2020)."""
    to_lms = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                       [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    # oklab is linear in the cube roots, so mixing those is mixing in oklab
    roots = [np.cbrt(to_lms @ linear(colour)) for colour in (a, b)]
    return list(np.linalg.solve(to_lms, (roots[0] + share * (roots[1] - roots[0])) ** 3))


def contrast(colour: list[float], text: str) -> float:
    light = sorted(float(np.dot([0.2126, 0.7152, 0.0722], one)) + 0.05 for one in (colour, linear(text)))
    return light[1] / light[0]


@pytest.mark.parametrize("name", ["two runs", "four runs", "many tasks", "hostile"])
def test_the_page_opens_in_a_browser(name, tmp_path):
    told = opened_in_browser(write_report(CASES[name](), tmp_path / "report")["html"], tmp_path)
    wanted = set(SECTIONS) - ({"ends"} if len(CASES[name]()) == 1 else set())
    assert {attributes["id"] for tag, attributes in told.tags if tag == "section"} >= wanted
    assert [tag for tag, _ in told.tags].count("svg") >= 2
    assert len([1 for tag, attributes in told.tags if tag == "path" and attributes.get("class") == "line"]) >= 6
