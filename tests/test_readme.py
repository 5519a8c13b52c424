"""What the README and the examples say is true: the tree, the table, the code, the commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from forgetless.auditing.policy import read_policy
from forgetless.auditing.probes import content_hash
from forgetless.auditing.run import EVIDENCE, HISTORY, JUNIT, MARKDOWN
from forgetless.auditing.verdict import ERROR_EXIT_CODE, EXIT_CODES
from forgetless.cli import VERBS, audit, sweep
from forgetless.cli.learn import parse_learn
from forgetless.data.streams import load_stream
from forgetless.methods import METHODS
from forgetless.sweeping.definition import read_sweep
from forgetless.sweeping.grid import runs_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [body for name, body in fences if name == kind]


def test_the_tree_is_the_tree():
    """A folder with what it is for, and its files without .py beneath it."""
    told = next(block for block in blocks("") if "src/forgetless/" in block)
    said: dict[str, set[str]] = {}
    for line in told.splitlines():
        if folder := re.match(r"  (\S+)/ ", line):
            last = said[folder[1].strip(".")] = set()
        elif re.match(r" {10,}\S", line):
            last |= set(line.split())
    package = ROOT / "src" / "forgetless"
    for folder in [package, *sorted(path for path in package.iterdir() if path.is_dir())]:
        files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
        if files:
            name = "" if folder == package else folder.name
            assert said.get(name) == files, f"README's tree, {name or 'top'}: {said.get(name)} != {files}"


def test_every_method_is_in_the_table_and_has_a_page():
    for name, method in METHODS.items():
        assert f"[{name}](docs/methods/{name}.md) | {method.summary} |" in README
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists()


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_python_code_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = blocks("python")
    small = f'model="{tiny}", r=4, batch_size=4, max_length=64, device="cpu", precision="fp32", forgetting_prompts=0, '
    code = code.replace("LearnConfig(stream=", f"LearnConfig({small}stream=")
    code = code.replace("examples/", f"{ROOT}/examples/")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "support-olora" / "report.html").exists()


def test_commands_exist():
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("forgetless ")]
    assert commands
    for line in commands:
        verb, *arguments = shlex.split(line, comments=True)[1:]
        assert verb in VERBS
        if verb == "learn":
            parse_learn(arguments)
        elif verb == "audit":
            audit.make_parser().parse_args(arguments)


CI, ACCELERATE = ROOT / "examples" / "ci", ROOT / "examples" / "accelerate"
SWEEPS = {*(ROOT / "examples").glob("sweep-*.yaml")}
PUBLISHED = {*(ROOT / "examples/published").iterdir()}  # tests/test_published.py


@pytest.mark.parametrize(
    "file",
    sorted({*(ROOT / "examples").rglob("*.yaml")} - SWEEPS - PUBLISHED - {*CI.iterdir(), *ACCELERATE.iterdir()}),
    ids=lambda path: path.name,
)
def test_examples_begin_with_the_command_that_runs_them(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = file.read_text().splitlines()[0]
    assert first.startswith("# forgetless learn ")
    config = parse_learn(shlex.split(first[2:])[2:])
    if file.name == "stream.yaml":
        assert [task.name for task in load_stream(config.stream).tasks] == ["urgency", "team"]


@pytest.mark.parametrize("file", sorted(SWEEPS), ids=lambda path: path.name)
def test_sweeps_begin_with_the_command_that_runs_them(file):
    verb, *arguments = shlex.split(file.read_text().splitlines()[0][2:])[1:]
    told = sweep.make_parser().parse_args(arguments)
    assert verb == "sweep" and ROOT / told.file == file
    trials, runs = runs_of(read_sweep(file), ["sst2", "bbc", "exams"], file.name)
    assert runs and (trials or "choose" not in yaml.safe_load(file.read_text()))


def test_an_array_of_jobs_makes_the_run_of_its_number(tmp_path):
    """The example script, with a `forgetless` that lists two runs and says which it was given."""
    fake = tmp_path / "forgetless"
    fake.write_text('#!/bin/sh\n[ "$3" = --list ] && printf "forgetless sweep g --cell %s\\n" a b || echo "made $4"\n')
    fake.chmod(0o755)
    for number, said in ((1, "made a"), (2, "made b"), (3, "no run of this number is left")):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7",
                       "SLURM_ARRAY_TASK_ID": str(number)}  # fmt: skip
        done = subprocess.run(["bash", ROOT / "examples" / "sweep-slurm.sh", "g"], capture_output=True, text=True,
                              cwd=tmp_path, env=environment)  # fmt: skip
        assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def commands_in(told) -> list[str]:
    """Every `forgetless ...` line in any text of a YAML file."""
    if isinstance(told, dict):
        return commands_in(list(told.values()))
    if isinstance(told, list):
        return [line for one in told for line in commands_in(one)]
    return [line.strip() for line in str(told).splitlines() if line.strip().startswith("forgetless ")]


@pytest.mark.parametrize("file", sorted(CI.iterdir()), ids=lambda path: path.name)
def test_pipelines_run_commands_that_exist(file):
    """Each begins with its command and runs no other, with flags and files that there are."""
    text = file.read_text()
    first = text.splitlines()[0].removeprefix("# ")
    inside = commands_in(yaml.safe_load(text))
    assert set(inside) == ({first} if file.name != "policy.yaml" else set())
    verb, *arguments = shlex.split(first)[1:]
    told = audit.make_parser().parse_args(arguments)
    assert verb == "audit" and (ROOT / told.policy).is_file() and told.output_dir == "audit"
    named = set(re.findall(rf"\b{told.output_dir}/([\w.]+)", text))
    assert named <= {EVIDENCE, MARKDOWN, JUNIT, HISTORY}, "files that an audit writes"
    assert file.name == "policy.yaml" or {EVIDENCE, MARKDOWN, JUNIT} <= named


@pytest.mark.parametrize("code", sorted({ERROR_EXIT_CODE, *EXIT_CODES.values()}))
def test_pipelines_pass_only_what_is_shown(code):
    """Every code but 0 fails the job: one more budget can turn a 2 into a 3."""
    github = yaml.safe_load((CI / "github.yaml").read_text())["jobs"]["audit"]["steps"]
    script = next(step["run"] for step in github if step.get("name") == "verdict")
    told = script.replace("${{ steps.audit.outputs.code }}", str(code))
    assert subprocess.run(["bash", "-c", told], capture_output=True).returncode == code
    assert "allow_failure" not in yaml.safe_load((CI / "gitlab.yaml").read_text())["audit"]


def test_the_example_policy_is_of_the_rows_beside_it():
    policy = read_policy(CI / "policy.yaml")
    policy.check_files()
    tasks = [task for source in policy.tasks for task in load_stream(source.path).tasks if task.name == source.name]
    policy.check_rows({task.name: content_hash(task) for task in tasks})


def test_pipelines_keep_the_history_of_a_request():
    """It is there before the audit, and kept however the audit ends."""
    github, gitlab = (yaml.safe_load((CI / f"{name}.yaml").read_text()) for name in ("github", "gitlab"))
    steps = github["jobs"]["audit"]["steps"]
    names = [step.get("id") or step.get("uses", "").partition("@")[0] for step in steps]
    before, audit, after = (names.index(one) for one in ("actions/cache/restore", "audit", "actions/cache/save"))
    assert before < audit < after and steps[after]["if"].startswith("always()")
    assert steps[before]["with"]["path"] == steps[after]["with"]["path"] == f"audit/{HISTORY}"
    assert steps[before]["with"]["key"] == steps[after]["with"]["key"]
    assert steps[after]["with"]["key"].startswith(steps[before]["with"]["restore-keys"])
    [kept] = [one for one in gitlab["audit"]["cache"] if one["paths"] == [f"audit/{HISTORY}"]]
    assert kept["when"] == "always" and "$CI_MERGE_REQUEST_IID" in kept["key"]
