"""The report: realistic summaries in, one page, one Markdown file and one terminal print out."""

from __future__ import annotations

import copy
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from forgetless.report import page, words
from forgetless.report.page import write_report
from forgetless.report.terminal import print_matrices

SECTIONS = ["plain", "changes", "matrix", "over-time", "losses", "method", "metrics", "measures", "details", "glossary"]
HOSTILE = "<script>alert(1)</script>"
SECRET = "the film was a triumph of patience over plot"
VOID = {"meta", "link", "br", "img", "input", "hr"}


def task(name: str, options: list[str], majority: float, **more) -> dict:
    return {"name": name, "train": 150, "validation": 20, "test": 100, "options": options, "headline": "likelihood",
            "majority": {"label": options[0], "share": majority}, "notes": []} | more  # fmt: skip


def between(score: float | None) -> list[float] | None:
    return None if score is None else [max(0, score - 0.09), min(1, score + 0.07)]


def metric(name: str, value, formula: str, divisor: str, why: str | None = None) -> dict:
    return {"name": name, "value": value, "formula": formula, "divisor": divisor, "why": why}


def steps(start: float, penalty: float | None = None) -> list[dict]:
    found = []
    for i in range(38):
        loss = 0.3 + start * math.exp(-i / 9) + 0.08 * math.sin(7 * i)
        found.append({"step": i + 1, "loss": loss, "learning_rate": 1e-3, "tokens": 900, "gradient_norm": 1.0})
        if penalty is not None:
            found[-1] |= {"penalty": penalty * math.exp(-i / 15), "penalty_share": 0.05}
    return found


def summary(method: str = "sequential") -> dict:
    """A finished run over three tasks; `replay` forgets less."""
    forgets = method == "sequential"
    tasks = [
        task("sst2", ["negative", "positive"], 0.52, notes=["3 rows were cut to 256 tokens"]),
        task("bbc", ["business", "entertainment", "politics", "sport", "tech"], 0.23),
        task("mmlu", ["A", "B", "C", "D"], 0.29),
    ]
    matrix = [[0.89, 0.31, 0.25], [0.72, 0.93, 0.24], [0.61, 0.4, 0.33]]
    if not forgets:
        matrix = [[0.89, 0.31, 0.25], [0.87, 0.92, 0.26], [0.86, 0.9, 0.31]]
    union = [[score * 0.9 for score in row] for row in matrix]
    forgotten = [
        {"task": "sst2", "learned": 0.89, "now": 0.61, "change": -0.28, "low": -0.36, "high": -0.2, "p": 3e-7,
         "lost": 30, "gained": 2, "n": 100},
        {"task": "bbc", "learned": 0.93, "now": 0.4, "change": -0.53, "low": -0.62, "high": -0.42, "p": 1e-12,
         "lost": 54, "gained": 1, "n": 100},
    ]  # fmt: skip
    if not forgets:
        forgotten = [
            forgotten[0] | {"now": 0.86, "change": -0.03, "low": -0.09, "high": 0.03, "p": 0.51,
                            "lost": 6, "gained": 3},
            forgotten[1] | {"learned": 0.92, "now": 0.9, "change": -0.02, "low": -0.07, "high": 0.03, "p": 0.69,
                            "lost": 4, "gained": 2},
        ]  # fmt: skip
    average = sum(matrix[-1]) / 3
    learning = sum(matrix[i][i] for i in range(3)) / 3
    backward = sum(matrix[2][j] - matrix[j][j] for j in range(2)) / 2
    check = {"name": "adapter", "value": 12.345678, "ok": True, "meaning": "norm of B: the adapter changes answers"}
    return {
        "format": 1,
        "status": "complete",
        "name": f"{method} on demo",
        "folder": method,
        "method": {"name": method, "options": {} if forgets else {"memory": "20%"}, "stock_peft": True,
                   "summary": "one adapter, trained on task after task", "deployed": "the last adapter"},
        "model": {"name": "SmolLM2-135M", "identity": {"weights": "ab12" * 16}, "parameters": 134515008,
                  "trainable": 4884480, "precision": "float32"},
        "tasks": tasks,
        "learned": ["sst2", "bbc", "mmlu"],
        "headline": {"matrix": matrix, "base": [0.54, 0.28, 0.26]},
        "measures": {
            "likelihood": {"meaning": "the task's own likeliest option is right", "matrix": matrix,
                           "base": [0.54, 0.28, 0.26]},
            "likelihood_union": {"meaning": "the same among all options", "matrix": union, "base": [0.2, 0.1, 0.05]},
            "exact_match": {"meaning": "the greedy answer equals the right one", "base": [None, 0.0, None],
                            "matrix": [[None, row[1], None] for row in union]},
        },
        "intervals": [[between(score) for score in row] for row in matrix],
        "forgotten": forgotten,
        "metrics": {
            "average_accuracy": metric("average accuracy", average, "(1/T) Σ_j R[T,j]", "T (macro over tasks)"),
            "learning_accuracy": metric("learning accuracy", learning, "(1/T) Σ_j R[j,j]", "T"),
            "bwt": metric("backward transfer (GEM)", backward, "(1/(T-1)) Σ_{j<T} (R[T,j] - R[j,j])", "T-1"),
            "fwt": metric("forward transfer (GEM)", None, "(1/(T-1)) Σ_{j>=2} (R[j-1,j] - b_j)", "T-1",
                          "cannot compute: R[1,2] was not scored"),
            "running_average": metric("TRACE OP_t", [0.89, 0.825, average], "(1/t) Σ_{j<=t} R[t,j]", "t"),
        },
        "views": {},
        "counts": {"after": [
            [{"negative": 48, "positive": 52}, None, {"A": 90, "B": 10, "C": 0, "D": 0}],
            [{"negative": 70, "positive": 30}, dict(zip(tasks[1]["options"], [20] * 5, strict=True)), None],
            [{"negative": 8, "positive": 92}, dict(zip(tasks[1]["options"], [9, 1, 60, 10, 20], strict=True)),
             {"A": 30, "B": 20, "C": 25, "D": 25}],
        ]},
        "losses": {name: steps(2 - i / 3, None if forgets else 0.4) for i, name in enumerate(("sst2", "bbc", "mmlu"))},
        "acts": [
            {"task": name, "checks": [check] if forgets else [
                check, {"name": "replayed rows", "value": 40 * (i == 2), "ok": i != 1,
                        "meaning": "old rows learnt again"}]}
            for i, name in enumerate(("sst2", "bbc", "mmlu"))
        ],
        "warnings": [] if forgets else ["replay did not act on bbc: replayed rows = 0 (old rows learnt again)"],
        "config": {"stream": "demo", "lora": {"r": 8, "targets": ["q_proj", "v_proj"]}, "learning_rate": 1e-3},
        "versions": {"forgetless": "0.1.0", "torch": "2.9.0"},
    }  # fmt: skip


def joint() -> dict:
    told = summary()
    told |= {"name": "joint on demo", "learned": ["joint"], "forgotten": [], "folder": "joint"}
    told["method"]["name"] = "joint"
    told["headline"]["matrix"] = told["headline"]["matrix"][-1:]
    told["intervals"], told["losses"] = told["intervals"][-1:], {"joint": steps(2)}
    told["acts"], told["counts"] = [told["acts"][0] | {"task": "joint"}], {"after": told["counts"]["after"][-1:]}
    for measure in told["measures"].values():
        measure["matrix"] = measure["matrix"][-1:]
    return told


def running() -> dict:
    """Stopped after two of three tasks; only the cells of learnt tasks were scored, and no base."""
    told = summary()
    told |= {"status": "running", "learned": ["sst2", "bbc"], "forgotten": told["forgotten"][:1]}
    told["headline"] = {"matrix": [[0.89, None, None], [0.72, 0.93, None]], "base": [None] * 3}
    told["intervals"] = [[between(score) for score in row] for row in told["headline"]["matrix"]]
    told["measures"] = {"likelihood": told["headline"] | {"meaning": "own option"}}
    told["losses"].pop("mmlu")
    told["acts"].pop()
    told["counts"]["after"].pop()
    told["metrics"]["bwt"] |= {"value": None, "why": "the matrix has 2 of 3 rows"}
    return told


def hostile() -> dict:
    """Every text that a user can choose is a script."""
    told = summary("replay")
    old = [t["name"] for t in told["tasks"]]
    new = {name: f"{HOSTILE}|`{name}` @all \x1b[31m" for name in old}
    for one in told["tasks"]:
        one |= {"name": new[one["name"]], "options": [HOSTILE, "b"], "majority": {"label": HOSTILE, "share": 0.9}}
        one["notes"] = [f"note {HOSTILE}"]
    told["learned"] = [new[name] for name in told["learned"]]
    told["forgotten"] = [entry | {"task": new[entry["task"]]} for entry in told["forgotten"]]
    told["forgotten"][0] |= {"change": -0.3, "low": -0.4, "high": -0.2}
    told["losses"] = {new[name]: records for name, records in told["losses"].items()}
    told["acts"] = [one | {"task": new[one["task"]]} for one in told["acts"]]
    told["counts"] = {"after": [[{HOSTILE: 99, "b": 1}] * 3] * 3}
    told["name"] = told["method"]["name"] = told["model"]["name"] = told["method"]["summary"] = HOSTILE
    told["method"]["options"] = {HOSTILE: HOSTILE}
    told["warnings"], told["config"] = [f"warned {HOSTILE}"], {HOSTILE: HOSTILE, "url": "https://example.com/x"}
    return told


def many_tasks(tasks: int = 15, labels: int = 14) -> dict:
    told = summary()
    names = [f"benchmark_{j + 1:02}" for j in range(tasks)]
    options = [f"label number {k}" for k in range(labels)]
    told["tasks"] = [task(name, options, 0.2) for name in names]
    told["learned"] = names
    matrix = [[0.9 - 0.04 * (i - j) if j <= i else 0.1 + 0.01 * j for j in range(tasks)] for i in range(tasks)]
    told["headline"] = {"matrix": matrix, "base": [0.1] * tasks}
    told["intervals"] = [[between(score) for score in row] for row in matrix]
    told["measures"] = {"likelihood": told["headline"] | {"meaning": "own"}}
    entry = told["forgotten"][0]
    told["forgotten"] = [
        entry | {"task": name, "learned": 0.9, "now": 0.9 - 0.04 * (tasks - 1 - j), "change": -0.04 * (tasks - 1 - j),
                 "low": -0.04 * (tasks - 1 - j) - 0.08, "high": -0.04 * (tasks - 1 - j) + 0.08}
        for j, name in enumerate(names[:-1])
    ]  # fmt: skip
    told["counts"] = {"after": [[dict.fromkeys(options, 7) for _ in names] for _ in names]}
    told["losses"] = {name: steps(2) * 10 for name in names}
    told["acts"] = [{"task": name, "checks": told["acts"][0]["checks"]} for name in names]
    return told


def two_learners() -> dict:
    told = summary("ilora")
    told["views"] = {"fast": {"headline": told["headline"], "forgotten": summary()["forgotten"]}}
    return told


CASES = {
    "one run": lambda: [summary()],
    "two runs": lambda: [summary(), summary("replay")],
    "joint": lambda: [joint()],
    "running": lambda: [running()],
    "hostile": lambda: [hostile()],
    "two hostile": lambda: [hostile(), hostile()],
    "many tasks": lambda: [many_tasks()],
    "many tasks, two runs": lambda: [many_tasks(), many_tasks()],
    "two learners": lambda: [two_learners()],
}


class Page(HTMLParser):
    """The tags, attributes and text of a page; complains about tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def printed(summaries: list[dict], width: int = 160) -> str:
    out = io.StringIO()
    print_matrices(summaries, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_run_gives_a_well_formed_page_without_outside_resources(name, tmp_path):
    files = write_report(CASES[name](), tmp_path)
    text = files["html"].read_text()
    told = Page(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert not [tag for tag, _ in told.tags if tag in ("script", "img", "iframe", "object", "embed", "base")]
    for tag, attributes in told.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:,")), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")]
    assert "url(" not in text and "@import" not in text
    assert {a["href"][1:] for t, a in told.tags if t == "a"} <= told.ids()
    assert "None" not in told.text and "nan" not in told.text


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
    assert told.text.count("training step") == 3  # two losses and one penalty
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
    files = write_report([hostile(), hostile()], tmp_path)
    for path in files.values():
        assert "<script" not in path.read_text()
        assert "\x1b" not in path.read_text()
    assert Page(files["html"].read_text()).text.count(HOSTILE) > 10
    markdown = files["markdown"].read_text()
    assert "&lt;script&gt;" in markdown and "@all" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("| after")]
    assert tables and all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in tables)
    assert "\x1b" not in printed([hostile()])


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
    told["headline"]["matrix"], told["counts"] = [], {"after": []}
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
    told["forgotten"][0]["p"] = None
    assert "30 of 100 rows score lower and 2 higher" in words.forgotten_sentence(told, told["forgotten"][0])
    assert "none: scores are shares" in page.render_html([told])


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
    points = page._thinned(records, "loss")
    assert len(points) <= page.POINTS_PER_LINE
    assert sum(value for _, value in points) / len(points) == pytest.approx(499.5, abs=4)
    assert "mean of up to 9 steps" in page.render_html([summary() | {"losses": {"sst2": records}}])


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    write_report([summary()], tmp_path)
    before = (tmp_path / "report.html").read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(page.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([joint()], tmp_path)
    assert (tmp_path / "report.html").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_summaries_are_not_changed(tmp_path):
    told = CASES["two runs"]()
    kept = copy.deepcopy(told)
    write_report(told, tmp_path)
    printed(told)
    assert told == kept


@pytest.mark.parametrize("name", ["two runs", "many tasks", "hostile"])
def test_the_page_opens_in_a_browser(name, tmp_path):
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("chromium is not on PATH: the page was parsed but not opened in a browser")
    file: Path = write_report(CASES[name](), tmp_path / "report")["html"]
    found = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert "CONSOLE" not in found.stderr and "Uncaught" not in found.stderr, found.stderr[-2000:]
    told = Page(found.stdout)
    assert {attributes["id"] for tag, attributes in told.tags if tag == "section"} >= set(SECTIONS)
    assert [tag for tag, _ in told.tags].count("svg") >= 2
    assert not [tag for tag, _ in told.tags if tag == "script"]
