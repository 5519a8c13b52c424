"""How models are loaded: whose own code runs, which attention, and what is said where a library is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from forgetless.cli import main
from forgetless.cli.learn import parse_learn
from forgetless.config import LearnConfig, MergeConfig
from forgetless.data.tasks import Stream
from forgetless.errors import UsageError
from forgetless.geometry.merging import merge
from forgetless.learning.step import check_optimizer
from forgetless.learning.stream import learn
from forgetless.model.answers import packs
from forgetless.model.base import load_base
from forgetless.model.loading import LoadSettings, four_bits, loading
from forgetless.runs.folder import read_lines
from forgetless.subjects.models import find_subjects

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def mine(tiny, tmp_path, monkeypatch) -> Path:
    """A model that is loaded by Python code in its folder, which leaves `ran` beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny, tmp_path / "mine"))
    names = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"model_type": "mine", "auto_map": names}))
    (folder / "mine.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def config(model, colours, folder, **more) -> LearnConfig:
    usual = {"r": 2, "max_steps": 2, "max_length": 64, "device": "cpu", "precision": "fp32", "forgetting_prompts": 0}
    return LearnConfig(stream=Stream("one", (colours,)), model=str(model), output_dir=str(folder), **(usual | more))


def test_a_models_own_code_runs_by_its_name_only(mine, tiny, colours, tmp_path):
    ran, run = tmp_path / "ran", tmp_path / "run"
    for allowed in ([], [tiny]):
        with pytest.raises(UsageError, match=rf"code of its own \(AutoConfig: mine.*--trust_remote_code {mine}"):
            learn(config(mine, colours, run, trust_remote_code=allowed))
    assert main(["audit", str(mine), tiny, "--device", "cpu"]) == 1 and not ran.exists()
    learn(config(mine, colours, run, trust_remote_code=[str(mine)]))
    assert ran.exists()
    ran.unlink()
    with pytest.raises(UsageError, match="is not run unless you allow it"):
        find_subjects(str(run))
    merged = tmp_path / "merged"
    told = {"device": "cpu", "precision": "fp32", "limit": 2, "trust_remote_code": [str(mine)]}
    merge(MergeConfig([str(run)], str(merged), **told))
    assert (merged / "mine.py").read_text() == (mine / "mine.py").read_text()
    with loading(LoadSettings(trust_remote_code=[str(mine)])):
        assert type(load_base(str(merged), torch.float32).model).__name__ == "MineForCausalLM"
        (merged / "mine.py").write_text("raise AssertionError('other code')")
        with pytest.raises(UsageError, match="is not run unless you allow it"):
            load_base(str(merged), torch.float32)


def test_code_of_another_repository_is_not_fetched(mine):
    told = json.loads((mine / "config.json").read_text())
    told["auto_map"]["AutoConfig"] = "someone/else--mine.MineConfig"
    (mine / "config.json").write_text(json.dumps(told))
    with loading(LoadSettings(trust_remote_code=[str(mine)])), pytest.raises(UsageError, match="'someone/else'"):
        load_base(str(mine), torch.float32)


def test_other_code_is_another_model(mine):
    with loading(LoadSettings(trust_remote_code=[str(mine)])):
        [subject] = find_subjects(str(mine))
        before = subject.decided_by
        (mine / "mine.py").write_text((mine / "mine.py").read_text() + "\n# changed")
        assert subject.decided_by != before


def test_the_attention_is_the_one_that_is_named(tiny):
    own = load_base(tiny, torch.float32).model
    assert packs(own)
    with loading(LoadSettings(attn_implementation="eager")):
        eager = load_base(tiny, torch.float32).model
    assert eager.config._attn_implementation == "eager" and not packs(eager)
    ids = torch.arange(5, 14).view(1, 9)
    torch.testing.assert_close(eager(ids).logits, own(ids).logits)
    with loading(LoadSettings(attn_implementation="flash_attention_2")), pytest.raises(UsageError, match=r"[Ff]lash"):
        load_base(tiny, torch.float32)
    with pytest.raises(UsageError, match="load_in: no '8bit'"), loading(LoadSettings(load_in="8bit")):
        pass


def test_missing_libraries_are_said_with_the_remedy(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    for told in (lambda: four_bits(torch.bfloat16), lambda: check_optimizer("paged_adamw_8bit", torch.device("cuda"))):
        with pytest.raises(UsageError, match=r"needs bitsandbytes: pip install 'forgetless\[qlora\]'"):
            told()
    check_optimizer("adamw", torch.device("cpu"))


@pytest.mark.parametrize("method", ["ilora"])  # two terms, two passes
def test_gradient_checkpointing_gives_equal_losses_and_gradients(method, tiny, colours, tmp_path):
    for name, again in (("kept", False), ("again", True)):
        learn(config(tiny, colours, tmp_path / name, method=method, gradient_checkpointing=again, max_steps=3))
    kept, again = (read_lines(tmp_path / name / "tasks/01-colours/log.jsonl") for name in ("kept", "again"))
    for one, other in zip(kept, again, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)


def test_the_command_takes_them():
    flags = ["--stream", "demo", "--load_in", "4bit", "--optim", "paged_adamw_8bit", "--trust-remote-code", "a/b,./c"]
    told = parse_learn([*flags, "--attn_implementation", "sdpa"])
    assert (told.load_in, told.optim, told.attn_implementation) == ("4bit", "paged_adamw_8bit", "sdpa")
    assert list(told.trust_remote_code) == ["a/b", "./c"]
    with pytest.raises(UsageError, match="optim: no 'adam'"):
        parse_learn(["--stream", "demo", "--optim", "adam"])
