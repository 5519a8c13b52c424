"""A tiny random model, made in a second, that every test shares. No network, one thread."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

from forgetless.contract import tiny as tiny_model
from forgetless.data.tasks import Row, Stream, Task

USERS_CACHE = os.environ.get("FORGETLESS_CACHE")  # read before the fixture below points it at an empty folder
COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "sea": "blue", "leaf": "green", "rose": "red"}
SIZES = {"ant": "small", "whale": "large", "mouse": "small", "tower": "large", "seed": "small", "hill": "large"}
SOUNDS = {"dog": "bark", "cat": "meow", "wolf": "bark", "lion": "meow", "fox": "bark", "puma": "meow"}


@pytest.fixture(scope="session", autouse=True)
def one_thread(tmp_path_factory):
    torch.set_num_threads(1)
    os.environ["FORGETLESS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def users_cache(monkeypatch):
    """The real cache, with downloads allowed unless FORGETLESS_OFFLINE forbids them."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if USERS_CACHE:
        monkeypatch.setenv("FORGETLESS_CACHE", USERS_CACHE)
    else:
        monkeypatch.delenv("FORGETLESS_CACHE", raising=False)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the test words."""
    return tiny_model.make_tokenizer(
        f"The {key} is {value}. What colour size sound has the {key}? Answer: {value}"
        for table in (COLOURS, SIZES, SOUNDS)
        for key, value in table.items()
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A folder with a random Llama of 2 layers, 32 wide, with grouped-query attention (non-square layers)."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    tiny_model.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_t5(tokenizer: PreTrainedTokenizerFast, kind: str = "t5", **more) -> PreTrainedModel:
    """A random T5 of 2 + 2 layers, 32 wide, whose inner layers are not square."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), d_model=32, d_kv=8, num_heads=3, d_ff=48, num_layers=2, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **more,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny-t5")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_t5(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_task(name: str, table: dict[str, str], question: str, copies: int = 2, scorers=("options",)) -> Task:
    train = tuple(
        Row(f"What {question} has the {'very ' * (i % 3)}{key}? Answer:", f" {value}", source=f"{name}:{i}")
        for i in range(copies) for key, value in table.items()
    )  # fmt: skip
    test = tuple(
        Row(f"What {question} has the {key}? Answer:", f" {value}", source=f"{name}-test:{key}")
        for key, value in table.items()
    )
    return Task(name, train, (), test, tuple(dict.fromkeys(table.values())), scorers, max_new_tokens=4)


@pytest.fixture(scope="session")
def colours() -> Task:
    return make_task("colours", COLOURS, "colour", scorers=("options", "exact_match"))


@pytest.fixture(scope="session")
def sizes() -> Task:
    return make_task("sizes", SIZES, "size")


@pytest.fixture(scope="session")
def sounds() -> Task:
    return make_task("sounds", SOUNDS, "sound")


@pytest.fixture(scope="session")
def two(colours, sizes) -> Stream:
    return Stream("two", (colours, sizes))


@pytest.fixture(scope="session")
def three(colours, sizes, sounds) -> Stream:
    return Stream("three", (colours, sizes, sounds))
