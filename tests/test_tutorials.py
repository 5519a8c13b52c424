"""The code and the commands of all pages: commands parse, Python runs, on a tiny model and files of these names."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from run_folders import made_run
from test_forecast import as_table, points
from test_learn import config
from test_methods import train
from test_subjects import make_adapter
from test_trainer import make

from forgetless.cli import VERBS
from forgetless.cli.learn import parse_learn
from forgetless.data.tasks import Row
from forgetless.learning.stream import learn

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in
         [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}  # fmt: skip
ELSEWHERE = {"README.md", "docs/add-a-method.md"}  # tests/test_readme.py, tests/test_outside.py
OWN_KINDS = ("hyplora", "l2p", "sherl")  # whose folders only this library reads


def blocks(page: str, kind: str) -> list[str]:
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.S | re.M) if name == kind]


# ----------------------------------------------------------------------------------------------- commands


def commands(page: str) -> list[str]:
    """`forgetless ...` lines, whole ones: what stands for something else is left out."""
    lines = [line.strip() for body in blocks(page, "") for line in body.replace("\\\n", " ").splitlines()]
    found = [line[line.index("forgetless ") :] for line in lines if re.match(r"(\w+=\S+ )*forgetless \w", line)]
    found = [re.split(r"\s{3,}| #", line)[0] for line in found]  # what stands behind says what it does
    return [line for line in found if not re.search(r"\.\.\.|[$;|<>{}]", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) and page not in ELSEWHERE])
def test_commands_are_ones_that_the_command_line_takes(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        verb, *arguments = shlex.split(line)[1:]
        assert verb in VERBS, line
        if [verb, *arguments][:2] == ["forecast", "fit"]:
            continue  # tests/test_forecast.py
        if verb == "learn":
            here = [one for one in arguments if one.endswith((".yaml", ".yml"))]
            if all(Path(one).exists() for one in here):
                parse_learn(arguments)
            continue
        module = importlib.import_module(f"forgetless.cli.{verb.replace('-', '_')}")
        if hasattr(module, "make_parser"):
            module.make_parser().parse_args(arguments)


# ------------------------------------------------------------------------------------------------- Python

WITH_PYTHON = {page for page in PAGES if blocks(page, "python")} - ELSEWHERE


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A folder with what the pages name: adapters, rows, runs, a table of points."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("invoices", "letters", "tickets", "A", "B")):
        make_adapter(tiny, tmp_path / name, seed=seed)
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-copy")
        (tmp_path / f"{name}-copy").rename(tmp_path / name / "adapter")
    rows = [{"prompt": f"What colour has the {one}? Answer:", "completion": " blue"} for one in ("sky", "sea", "rose")]
    (tmp_path / "invoices" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bbc.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    tasks = [{"name": name, "train": "bbc.jsonl", "test": "bbc.jsonl", "scorers": ["next_token"]}
             for name in ("bbc", "old")]  # fmt: skip
    (tmp_path / "tasks.yaml").write_text(json.dumps(tasks))
    for seed in range(3):
        made_run(tmp_path / "runs" / "sweep" / str(seed), seed=seed, falls=0.2)
    return tmp_path


def run(page: str, names: dict, number: int = 0, **replaced: str) -> dict:
    code = blocks(page, "python")[number]
    for before, after in replaced.items():
        assert before in code
        code = code.replace(before, after)
    exec(compile(code, page, "exec"), names)
    return names


def test_no_python_is_left_out():
    tested = {"audit", "compare", "forecast", "interpolate", "overlap", "tasks", "trainers", "methods/mbpa"}
    assert {f"docs/{page}.md" for page in (*tested, *(f"methods/{name}" for name in OWN_KINDS))} == WITH_PYTHON


@pytest.mark.slow
def test_callbacks(here, tiny):
    trainer = run("docs/audit.md", {"trainer": make(tiny, here / "audited", max_steps=1)})["trainer"]
    assert any("forgetting/kl" in one for one in trainer.state.log_history)
    names = run("docs/trainers.md", {"trainer": make(tiny, here / "olora", max_steps=1)})
    run("docs/trainers.md", {**names, "trainer": make(tiny, here / "ewc", max_steps=1)}, 1)


@pytest.mark.slow
def test_records(here, tiny):
    assert "mean" in str(run("docs/compare.md", {})["record"]["sets"])
    as_table(points(), here / "points.csv")
    assert run("docs/forecast.md", {})["record"]["laws"]
    assert run("docs/overlap.md", {})["record"]["pairs"]
    assert run("docs/interpolate.md", {})["told"]


def test_a_scorer_of_ones_own():
    assert run("docs/tasks.md", {})["polite"]("Please wait", Row("How long?", " wait")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_KINDS)
def test_folders_that_only_this_library_reads(name, here, tiny, two):
    learn(config(tiny, two, here / "run", method=name, r=8, forgetting_prompts=0))
    learnt = {f"runs/demo-{name}-seed0/tasks/03-mmlu": "run/tasks/02-sizes", "smollm2-135m-instruct": tiny}
    found = run(f"docs/methods/{name}.md", {}, **learnt, **{"load_state(folder), 2)": "load_state(folder), 1)"})
    assert found["method"].adapters.moved() > 0


@pytest.mark.slow
def test_answers_fitted_to_their_neighbours(tiny, two):
    method = train("mbpa", tiny, two).method
    run("docs/methods/mbpa.md", {"method": method, "tokens_before_the_answer": [5, 6, 7]})
