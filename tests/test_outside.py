"""Methods from outside, and several as one: found by name, refused with a remedy, learnt, shown."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import broken_methods
import pytest

from forgetless.cli import main
from forgetless.cli.learn import parse_learn
from forgetless.config import LearnConfig
from forgetless.contract.check import FAILS, check
from forgetless.contract.trial import Bench
from forgetless.errors import UsageError
from forgetless.methods import HOOKS, METHODS, Method, finding
from forgetless.methods.finding import code_of, find_method, label_of, options_of
from forgetless.methods.incremental import Incremental
from forgetless.methods.olora import OLoRA
from forgetless.methods.replay import Replay
from forgetless.model.adapters import named
from forgetless.runs.folder import read_json

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "add-a-method.md").read_text()
[CODE] = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.S | re.M)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


@pytest.fixture(scope="module")
def bench():
    return Bench()


# ---------------------------------------------------------------- the guide


def test_the_guides_method_keeps_the_contract(here, bench):
    assert len(CODE.splitlines()) < 60
    assert not [one for one in check("./mine.py:Stay", bench) if one.outcome == FAILS]


def test_the_guide_leads_to_a_row_in_a_comparison(here, tiny):
    options = {"model": tiny, "stream": f"{ROOT}/examples/support/stream.yaml", "r": 2, "max_steps": 2,
               "max_length": 64, "cells": "last", "device": "cpu", "precision": "fp32",
               "forgetting_prompts": 0}  # fmt: skip
    small = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    lines = [line.split("#")[0].split()[1:] for line in GUIDE.splitlines() if line.startswith("forgetless ")]
    commands = {line[0]: line for line in lines if "--help" not in line}
    assert list(commands) == ["check", "learn", "report"]
    learned = [line for line in lines if line[0] == "learn" and "--help" not in line]
    for line in learned:
        at = line.index("--stream")
        assert main([*line[:at], *line[at + 2 :], *small]) == 0
    assert main(commands["report"]) == 0
    page = (here / "runs" / "stay" / "report.md").read_text()
    assert "Stay" in page and "sequential" in page
    told = read_json(here / "runs" / "stay" / "run.json")
    assert told["method"]["name"] == "Stay" and told["method"]["options"] == {"lam": 0.3}
    assert told["method"]["summary"] == "one adapter, pulled back to where the task began"
    (here / "mine.py").write_text(CODE + "\n# another\n")
    at = learned[0].index("--stream")
    assert main([*learned[0][:at], *learned[0][at + 2 :], *small]) == 1  # the run was begun with another file


def test_the_guide_names_every_hook_and_attribute():
    own = [name for name in vars(Method) if not name.startswith("_")]
    left_out = {"logits", "told", "lessons", "weights_for", "bound"}
    for name in {*own} - left_out:
        assert re.search(rf"`{name}\b", GUIDE), name
    table = GUIDE.split("## What the class says of itself")[1].split("## The contract")[0]
    for name, kind in Method.__annotations__.items():
        assert "ClassVar" not in kind or f"`{name}`" in table, f"the table does not explain {name}"
    assert f"hooks = {HOOKS}" in GUIDE


def test_help_lists_the_options_and_yaml_takes_them(here, capsys):
    assert main(["learn", "--method", "./mine.py:Stay", "--help"]) == 0
    assert "--method.lam" in (told := capsys.readouterr().out) and "weight of the squared distance" in told
    (here / "c.yaml").write_text("stream: demo\nmethod: {name: ./mine.py:Stay, lam: 0.3}\n")
    config = parse_learn(["--config", "c.yaml"])
    assert config.method == "./mine.py:Stay" and config.method_options == {"lam": 0.3}
    assert config.decides()["method"] == "Stay" and set(config.decides()["method_code"]) == {"Stay"}
    assert main(["learn", "--method", "./mine.py:Stay", "--method.lamb", "1"]) == 1
    assert "method.lam" in capsys.readouterr().err


# ---------------------------------------------------------------- names


def test_names_lead_to_methods(here):
    assert find_method("olora") is METHODS["olora"]
    assert find_method("broken_methods:DoesNothing") is broken_methods.DoesNothing
    assert find_method("./mine.py:Stay") is find_method(f"{here}/mine.py:Stay")
    (here / "c++").mkdir()
    (here / "c++" / "mine.py").write_text(CODE)
    assert options_of(find_method("replay+./c++/mine.py:Stay"))["lam"] == 0.1
    assert label_of("replay+./c++/mine.py:Stay") == "replay+Stay"
    assert code_of("replay+./mine.py:Stay") == code_of("./c++/mine.py:Stay") and not code_of("replay+olora")


HEAD = "from forgetless.methods import Method\n"


@pytest.mark.parametrize(
    "code, told, said",
    [
        ("", "./there.py:Mine", r"there\.py: cannot be read .*did you mean 'mine\.py'|there\.py: cannot be read"),
        (HEAD + "class Mine(Method):\n    hooks = 1", "./mine.py:Mien", "no class 'Mien'; did you mean 'Mine'"),
        ("x = 1", "./mine.py:Mine", "no class 'Mine' and no other method"),
        ("Mine = 3", "./mine.py:Mine", r"is of type int, no subclass .* write `class Mine\(Method\):`"),
        ("class Mine: pass", "./mine.py:Mine", "is the class Mine, no subclass of forgetless.methods.Method"),
        (HEAD + "class Mine(Method): pass", "./mine.py:Mine", "for which version of the hooks .* write `hooks = 1`"),
        (HEAD + "class Mine(Method): hooks = 9", "./mine.py:Mine", "written for version 9 of the hooks, and these are"),
        (HEAD + "class Mine(Method):\n  hooks = 1\n  def __init__(self, lam: float): pass", "./mine.py:Mine",
         "the option 'lam' has no default; write `lam: TYPE = VALUE`"),
        (HEAD + "class Mine(Method):\n  hooks = 1\n  def __init__(self, **more): pass", "./mine.py:Mine",
         r"\*\*more in __init__ names no option"),
        (HEAD + "class Mine(Method):\n  hooks = 1\n  def __init__(self, name: str = ''): pass", "./mine.py:Mine",
         "an option cannot be called 'name'"),
        ("1 / 0", "./mine.py:Mine", "cannot be run: ZeroDivisionError"),
        ("", "./mine.py", "named ./FILE.py:CLASS"),
        ("", "no.such.module:Mine", "cannot be imported .* install its package"),
        ("", "olra", "did you mean 'olora'.*one of yours is named"),
    ],
)  # fmt: skip
def test_what_is_no_method_is_named_with_the_remedy(code, told, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UsageError, match=said):
        find_method(told)
    with pytest.raises(UsageError):
        LearnConfig(stream="demo", method=told).check()


def test_only_the_named_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("open('ran', 'w')")
    find_method("olora")
    label_of("./mine.py:Mine")
    code_of("./mine.py:Mine")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UsageError, match="no class 'Mine'"):
        find_method("./mine.py:Mine")
    assert (tmp_path / "ran").exists()


def test_installed_methods_go_by_name_and_clashes_are_named(monkeypatch, capsys):
    def offer(*pairs):
        found = tuple(EntryPoint(name, value, finding.GROUP) for name, value in pairs)
        monkeypatch.setattr(finding, "installed_methods", lambda: found)

    offer(("nothing", "broken_methods:DoesNothing"), ("gone", "broken_methods:Gone"))
    assert find_method("nothing") is broken_methods.DoesNothing
    with pytest.raises(UsageError, match="broken_methods:Gone of an unnamed package cannot be loaded"):
        find_method("gone")
    with pytest.raises(UsageError, match="did you mean 'nothing'"):
        find_method("nothin")
    assert main(["methods"]) == 0 and "nothing: installed, broken_methods:DoesNothing" in capsys.readouterr().out
    offer(("olora", "broken_methods:DoesNothing"))
    with pytest.raises(UsageError, match=r"two are called 'olora' \(built in; .*forgetless.methods.olora:OLoRA"):
        find_method("olora")
    assert find_method("forgetless.methods.olora:OLoRA") is OLoRA


# ---------------------------------------------------------------- several as one


def test_replay_over_another_is_exact(bench):
    """replay+sequential is replay; replay+olora with λ = 0 is replay+incremental, which is not incremental."""

    def learnt(name, **options):
        kind = find_method(name)
        return named(bench.run(kind, kind.example | options).borders[-1].pairs)

    def equal(one, other):
        return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)

    assert equal(learnt("replay+sequential"), learnt("replay"))
    over = learnt("replay+incremental")
    assert equal(learnt("replay+olora", lam=0.0), over)
    assert not equal(learnt("replay+olora"), over)
    assert {key: value.shape for key, value in over.items()} == {k: v.shape for k, v in learnt("incremental").items()}
    assert not equal(over, learnt("incremental"))


def test_several_as_one_keep_the_contract(bench):
    assert not [one for one in check("replay+olora", bench) if one.outcome == FAILS]


@pytest.mark.parametrize(
    "told, said",
    [
        ("replay+ilora", "replay and ilora both change batch"),
        ("olora+replay", "olora cannot go under another method: it changes resume"),
        ("sequential+olora", "sequential cannot go under another method: it has adapters of its own"),
        ("lwf+sdlora", "compares with the model of the last border"),
        ("replay+joint", "joint is a bound"),
        ("replay+replay", "replay is named twice"),
        ("replay+olra", "did you mean 'olora'"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(told, said):
    with pytest.raises(UsageError, match=said):
        find_method(told)


class Half(Method):
    """Half a penalty.

    Args:
        lam: its weight
    """

    hooks = 1
    summary = "half"
    under_any = True
    within_task = ("seen",)

    def __init__(self, lam: float = 0.25):
        self.lam, self.seen = lam, 0


def test_options_that_two_parts_have_are_told_apart():
    from forgetless.methods.together import together

    kind = together({"half": Half, "replay": Half, "olora": OLoRA})
    assert list(options_of(kind)) == ["half_lam", "replay_lam", "olora_lam", "lam_norm", "as_released"]
    method = kind(half_lam=1.0, olora_lam=2.0)
    assert [part.lam for part in method.parts.values()] == [1.0, 0.25, 2.0]
    assert method.within_task == ("half_seen", "replay_seen")
    method.half_seen = 3
    assert method.parts["half"].seen == method.half_seen == 3 and method.replay_seen == 0


def test_what_the_whole_says_of_itself():
    kind = find_method("replay+olora")
    assert kind.old_rows and not kind.task_id and kind.growth == Incremental.growth and kind.plain is Incremental
    assert Replay.summary in kind.summary and OLoRA.summary in kind.summary
    assert kind.off == {"memory": 0, "lam": 0.0} and find_method("replay+incremental").plain is Incremental
    assert "(olora) λ1, weight" in kind.__doc__ and "(replay) rows kept" in kind.__doc__
