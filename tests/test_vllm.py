"""Answers by vLLM, with a stand-in for the package that records what it is asked and answers by transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from forgetless.auditing.run import audit
from forgetless.config import AuditConfig
from forgetless.errors import UsageError
from forgetless.score.generation import answers, ends_of
from forgetless.subjects.models import find_subjects, opened
from forgetless.subjects.vllm_answers import VllmAnswers

CPU = torch.device("cpu")
CONTEXTS = [[9, 8, 7, 6], [20, 21], [5, 30, 31, 32, 33, 34, 35]]


class StandIn:
    """vllm.LLM: one base, adapters by request."""

    made: list[StandIn] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self, **settings):
        self.settings, self.requests = settings, []
        self.made.append(self)

    def generate(self, prompts, params, lora_request=None, use_tqdm=True):
        self.requests.append((prompts, params, lora_request))
        assert use_tqdm is False and params.temperature == 0.0 and params.detokenize is False
        model = AutoModelForCausalLM.from_pretrained(self.settings["model"])
        if lora_request:
            assert self.settings["enable_lora"] and self.settings["max_lora_rank"] == 8
            model = PeftModel.from_pretrained(model, lora_request.lora_path)
        return [self._answer(model.eval(), prompt["prompt_token_ids"], params) for prompt in prompts]

    def _answer(self, model, ids, params):
        greedy = GenerationConfig(
            max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=params.stop_token_ids, pad_token_id=4
        )
        made = model.generate(input_ids=torch.tensor([ids]), generation_config=greedy)[0, len(ids) :].tolist()
        reason = "stop" if made[-1] in params.stop_token_ids else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=made, finish_reason=reason)])


class Request(SimpleNamespace):
    def __init__(self, lora_name, lora_int_id, lora_path):
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


@pytest.fixture
def vllm(monkeypatch) -> type[StandIn]:
    package, requests = ModuleType("vllm"), ModuleType("vllm.lora.request")
    package.__version__, package.LLM, package.SamplingParams = "0.0", StandIn, SimpleNamespace
    requests.LoRARequest = Request
    for name, module in {"vllm": package, "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": requests}.items():
        monkeypatch.setitem(sys.modules, name, module)
    StandIn.made.clear()
    return StandIn


def make_adapter(tiny: str, folder: Path, **settings) -> str:
    torch.manual_seed(0)
    usual = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = LoraConfig(**(usual | settings))
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(folder)
    return str(folder)


def test_answers_are_those_of_transformers_on_one_base(vllm, tiny, tmp_path):
    adapters = [make_adapter(tiny, tmp_path / f"rank-{r}", r=r) for r in (4, 8)]
    subjects = [one for spec in (tiny, *adapters) for one in find_subjects(spec)]
    fast = VllmAnswers(subjects, torch.float32, 64)
    told = []
    for subject, model in opened(subjects, torch.float32):
        expected = answers(model, subject.tokenizer, CONTEXTS, 6, CPU)
        told.append(fast.of(subject, ends_of(model, subject.tokenizer))(CONTEXTS, 6))
        assert told[-1] == expected
    assert len({str(one) for one in told}) == 3, "the adapters act"
    [llm] = vllm.made
    assert llm.settings["model"] == tiny and llm.settings["dtype"] == "float32" and llm.settings["max_model_len"] == 64
    assert not llm.settings["trust_remote_code"] and llm.settings["generation_config"] == "vllm"
    assert [[one["prompt_token_ids"] for one in prompts] for prompts, _, _ in llm.requests] == [CONTEXTS] * 3
    asked = [request for _, _, request in llm.requests]
    assert asked[0] is None and [one.lora_path for one in asked[1:]] == adapters
    assert len({one.lora_int_id for one in asked[1:]}) == 2


def test_an_audit_asks_vllm_for_every_answer(vllm, tiny, colours, tmp_path):
    rows = [{"prompt": row.prompt, "completion": row.answer} for row in colours.test[:3]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows_of = dict.fromkeys(("train", "test"), "rows.jsonl")
    task = {"name": "colours", "scorers": ["exact_match"], "max_new_tokens": 4} | rows_of
    (tmp_path / "tasks.yaml").write_text(json.dumps({"tasks": [task]}))
    adapter = make_adapter(tiny, tmp_path / "adapter")

    told = {"tasks": str(tmp_path / "tasks.yaml"), "limit": 2, "device": "cpu", "precision": "fp32"}
    record = audit(AuditConfig(tiny, (adapter,), output_dir=str(tmp_path / "audit"), generate_with="vllm", **told))
    assert "answers were generated by vllm 0.0" in json.dumps(record)
    [llm] = vllm.made
    assert len(llm.requests) == 4, "two models: the task, and general prompts"
    asked = [request.lora_path if request else None for _, _, request in llm.requests]
    assert asked == [None, None, adapter, adapter] and [len(prompts) for prompts, _, _ in llm.requests] == [2] * 4


@pytest.mark.parametrize(
    "settings, said",
    [({"use_dora": True}, "has use_dora"), ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
     ({"bias": "lora_only"}, "has bias"), ({"rank_pattern": {"q_proj": 600}}, "rank 600")],
)  # fmt: skip
def test_adapters_that_vllm_does_not_load_are_refused(settings, said, vllm, tiny, tmp_path):
    subject = find_subjects(make_adapter(tiny, tmp_path, **settings))
    with pytest.raises(UsageError, match=said):
        VllmAnswers(subject, torch.float32, 64)


def test_encoder_decoders_are_refused(vllm, tiny_t5):
    with pytest.raises(UsageError, match="decoders alone"):
        VllmAnswers(find_subjects(tiny_t5), torch.float32, 64)


def test_where_vllm_is_not_installed_the_remedy_is_said(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install 'forgetless\[vllm\]'[\s\S]*http://host"):
        VllmAnswers(find_subjects(tiny), torch.float32, 64)
    with pytest.raises(UsageError, match="remedies are answered by transformers"):
        AuditConfig(tiny, (tiny,), remedies=True, generate_with="vllm").check()
    with pytest.raises(UsageError, match="generate_with: no 'vlm'"):
        AuditConfig(tiny, (tiny,), generate_with="vlm").check()
