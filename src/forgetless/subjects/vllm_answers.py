"""Greedy answers by vLLM, an extra: the same tokens go in, and adapters are LoRA requests on one base in memory.

What vLLM computes is rounded otherwise than what transformers computes, so a token that is nearly as likely as another
may be answered in its place; likelihoods and divergences are measured by transformers in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from forgetless.errors import UsageError
from forgetless.model.base import find_model, load_config
from forgetless.model.encoder_decoder import decoder_start
from forgetless.model.loading import AS_STORED, is_trusted
from forgetless.score.generation import Answer
from forgetless.subjects.models import Subject, adapter_config

VLLM = "vllm"  # its name in the settings
MEMORY = 0.45  # share of the GPU that vLLM takes; the rest is for the model that measures the rest
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told to make room for
BESIDE_THE_PAIRS = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")  # of an adapter's settings

Generate = Callable[[list[list[int]], int], list[Answer]]  # contexts, at most so many new tokens


class VllmAnswers:
    """The models of an audit in vLLM, one base in memory at a time. UsageError for what vLLM is not or cannot take."""

    def __init__(self, subjects: Sequence[Subject], dtype: torch.dtype, max_length: int):
        self._vllm = _vllm()
        self._ranks = {one.name: _rank(one) for one in subjects}
        self._subjects, self._dtype, self._max_length = subjects, dtype, max_length
        self._base: tuple[str, str] | None = None
        self._llm: Any = None

    @property
    def told(self) -> str:
        """'vllm 0.11.0': what answers are computed by."""
        return f"vllm {self._vllm.__version__}"

    def of(self, subject: Subject, ends: Sequence[int]) -> Generate:
        """The subject's greedy answers, ended by any of the tokens `ends`."""

        def generate(contexts: list[list[int]], max_new_tokens: int) -> list[Answer]:
            settings = self._vllm.SamplingParams(
                temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(ends), detokenize=False
            )
            prompts = [{"prompt_token_ids": context} for context in contexts]
            llm = self._on(subject)  # before the request: the base may have to be loaded
            found = llm.generate(prompts, settings, lora_request=self._request(subject), use_tqdm=False)
            made = [one.outputs[0] for one in found]
            texts = subject.tokenizer.batch_decode([one.token_ids for one in made], skip_special_tokens=True)
            return [Answer(text, one.finish_reason != "length") for text, one in zip(texts, made, strict=True)]

        return generate

    def _on(self, subject: Subject) -> Any:
        """The subject's base in memory, with room for the adapters on it."""
        if self._base != subject.runs_as:
            self._llm = None  # before the next one is loaded
            ranks = [self._ranks[one.name] for one in self._subjects if one.runs_as == subject.runs_as]
            largest = max(ranks)
            adapters = {"enable_lora": True, "max_lora_rank": next(r for r in RANKS if r >= largest)} if largest else {}
            self._llm = self._vllm.LLM(
                model=str(subject.base),
                dtype=str(self._dtype).removeprefix("torch."),
                max_model_len=self._max_length,
                gpu_memory_utilization=MEMORY,
                generation_config="vllm",  # the model's own may sample or punish repetition
                trust_remote_code=is_trusted(subject.base, find_model),
                seed=0,
                **adapters,
            )
            self._base = subject.runs_as
        return self._llm

    def _request(self, subject: Subject) -> Any:
        if subject.adapter is None:
            return None
        number = 1 + [one.name for one in self._subjects].index(subject.name)
        return import_module("vllm.lora.request").LoRARequest(subject.name, number, str(subject.adapter))


def _vllm() -> Any:
    try:
        return import_module("vllm")
    except ImportError as error:
        raise UsageError(
            "generate_with vllm: vLLM is not installed: pip install 'forgetless[vllm]' (it brings a torch of its own), "
            "or serve the model anywhere and give its address, http://host:port/v1#NAME"
        ) from error


def _rank(subject: Subject) -> int:
    """The largest rank of the subject's LoRA pairs, 0 without an adapter; UsageError for what vLLM does not load."""
    if subject.load_in != AS_STORED:
        raise UsageError(f"{subject.name}: generate_with vllm is not for a base in 4 bits, which it would quantise "
                         "otherwise; leave out one of both")  # fmt: skip
    if decoder_start(load_config(subject.base)) is not None:
        raise UsageError(f"{subject.name}: generate_with vllm is for decoders alone, and this is an encoder-decoder; "
                         "leave out --generate-with vllm")  # fmt: skip
    if subject.adapter is None:
        return 0
    config = adapter_config(subject.adapter)
    more = [name for name in BESIDE_THE_PAIRS if config.get(name)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    if config["peft_type"] != "LORA" or more:
        what = f"has {', '.join(more)}" if more else f"is of the type {config['peft_type']}"
        raise UsageError(
            f"{subject.adapter}: {what}, and vLLM takes plain LoRA pairs only; leave out --generate-with vllm"
        )
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if largest > RANKS[-1]:
        raise UsageError(f"{subject.adapter}: rank {largest}, and vLLM takes up to {RANKS[-1]}; leave out "
                         "--generate-with vllm")  # fmt: skip
    return largest
