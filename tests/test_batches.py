"""Rows as tokens: where the answer begins, what is cut, what each token weighs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetless.data.batches import Encoder, collate, split, weigh
from forgetless.data.tasks import Row
from forgetless.errors import DataError, quoting


def text_of(tokenizer, example, answer: bool) -> str:
    return tokenizer.decode([t for t, a in zip(example.ids, example.answer, strict=True) if a == answer])


def test_loss_is_on_the_answer_and_its_end(tokenizer):
    example = Encoder(tokenizer, 64)(Row("The sky is", " blue"))
    assert text_of(tokenizer, example, False) == "The sky is"
    assert text_of(tokenizer, example, True) == " blue<|end|>"


def test_a_space_at_the_prompts_end_goes_to_the_answer(tokenizer):
    encode = Encoder(tokenizer, 64)
    assert encode(Row("The sky is ", "blue")).ids == encode(Row("The sky is", " blue")).ids


def test_loss_is_on_every_assistant_turn(tokenizer):
    turns = (("system", "Be short."), ("user", "sky"), ("assistant", "blue"), ("user", "rose"), ("assistant", "red"))
    example = Encoder(tokenizer, 128)(Row("", "red", turns))
    assert text_of(tokenizer, example, True) == "blue<|end|>red<|end|>"
    rebuilt = tokenizer.decode(example.ids)
    told = [{"role": role, "content": content} for role, content in turns]
    assert rebuilt == tokenizer.apply_chat_template(told, tokenize=False).rstrip("\n")


def test_text_rows_learn_every_token_but_the_first(tokenizer):
    example = Encoder(tokenizer, 64)(Row("", "The sky is blue"))
    assert example.answer == (False,) + (True,) * (len(example.ids) - 1)


def test_a_long_prompt_loses_its_beginning_and_the_answer_stays(tokenizer):
    example = Encoder(tokenizer, 12)(Row("word " * 50 + "The sky is", " blue"))
    assert example.truncated and len(example.ids) == 12
    assert text_of(tokenizer, example, True) == " blue<|end|>"


def test_a_cut_context_keeps_the_token_that_begins_every_sequence(tokenizer):
    encode = Encoder(tokenizer, 10)
    bos = encode._ids("word")[0]
    encode.tokenizer = type("T", (), {"bos_token_id": bos, "eos_token_id": tokenizer.eos_token_id,
                                      "__call__": lambda self, *a, **k: tokenizer(*a, **k)})()  # fmt: skip
    ids = encode(Row("word " * 50 + "sky is", " blue")).ids
    assert ids[0] == bos and len(ids) == 10


def test_a_cut_context_is_the_same_for_all_options(tokenizer):
    splits = Encoder(tokenizer, 16).scoring_splits(
        Row("word " * 50 + "The sky is", " blue"), ["blue", "very dark blue"]
    )
    assert splits[0][0] == splits[1][0] and len(splits[1][0]) + len(splits[1][1]) == 16


def test_an_option_that_fills_everything_is_an_error_that_names_the_row_and_need_not_quote_it(tokenizer):
    row, options = Row("The sky is", " blue", source="rows.jsonl:7"), ["blue", "told in confidence " * 9]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the option 'told in confidence told"):
        Encoder(tokenizer, 16).scoring_splits(row, options)
    with quoting(False), pytest.raises(DataError, match=r"rows\.jsonl:7: the option \(text not shown\) has \d+ tokens"):
        Encoder(tokenizer, 16).scoring_splits(row, options)


def test_no_room_for_the_prompt_is_an_error_that_names_the_row(tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*max_length=4"):
        Encoder(tokenizer, 4)(Row("x", " a long answer of many words", source="rows.jsonl:7"))


def test_a_long_chat_loses_its_beginning_and_the_answer_stays(tokenizer):
    example = Encoder(tokenizer, 12)(Row("", "blue", (("user", "word " * 50), ("assistant", "blue"))))
    assert example.truncated and len(example.ids) == len(example.answer) == 12
    assert text_of(tokenizer, example, True) == "blue<|end|>"


def test_no_answer_token_left_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl:3: no answer token"):
        Encoder(tokenizer, 1)(Row("", "word", source="rows.jsonl:3"))


def test_an_answer_is_scored_where_the_template_puts_it(tokenizer, monkeypatch):
    """Qwen3's template writes an empty thought before a turn without one: it is learnt, so it is there in scoring."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}think none {% endif %}{{ m.content }}"
        "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    encoder = Encoder(tokenizer, 128)
    row = Row("", "blue", (("user", "What colour is the sky?"), ("assistant", "blue")))
    assert encoder.context(row)[0].endswith("<|assistant|>think none ")
    [(before, after)] = encoder.scoring_splits(row, ["blue"])
    learnt = encoder(row).ids
    assert tuple(before + after) == learnt[: len(before + after)]


def test_messages_need_a_chat_template(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="chat template"):
        Encoder(bare, 64)(Row("", "b", (("user", "a"), ("assistant", "b"))))


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=10))
def test_context_is_the_same_in_training_and_scoring(tokenizer, prompt, answer):
    if not prompt.strip(" ") or not answer.strip():
        return
    encode, row = Encoder(tokenizer, 256), Row(prompt, answer)
    example = encode(row)
    [(context, option)] = encode.scoring_splits(row, [row.label])
    before = [t for t, a in zip(example.ids, example.answer, strict=True) if not a]
    assert before == context
    if row.answer.rstrip() == row.answer:
        assert list(example.ids) == [*context, *option, tokenizer.eos_token_id]


def test_collate_pads_and_points_at_the_next_token(tokenizer):
    encode = Encoder(tokenizer, 64)
    rows = weigh([encode(Row("The sky is", " blue")), encode(Row("The", " red"))], 1.0)
    part = collate(rows, tokenizer.pad_token_id)
    assert part.weights.sum().item() == pytest.approx(1.0)
    assert part.mask.sum().item() == sum(len(row.ids) for row in rows)
    for b, row in enumerate(rows):
        places = part.keep[b].nonzero().flatten().tolist()
        assert [row.ids[p + 1] for p in places] == [t for t, a in zip(row.ids, row.answer, strict=True) if a]


def test_only_keeps_the_rows_asked_for(tokenizer):
    encode = Encoder(tokenizer, 64)
    new = weigh([encode(Row("The sky is", " blue"))], 0.5)
    old = weigh([encode(Row("The", " red")), encode(Row("A rose is", " red"))], 0.5, memory=True)
    part = collate(new + old, tokenizer.pad_token_id)
    only = part.only(part.memory)
    assert len(only.ids) == 2 and only.weights.sum().item() == pytest.approx(0.5)
    assert only.targets.tolist() == collate(old, tokenizer.pad_token_id).targets.tolist()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 8))
def test_split_keeps_every_example_once(lengths, size):
    from forgetless.data.batches import Example

    examples = [Example((i,) * n, (True,) * n) for i, n in enumerate(lengths)]
    parts = split(examples, size)
    assert sorted(e.ids for part in parts for e in part) == sorted(e.ids for e in examples)
    assert max(map(len, parts)) <= size
    flat = [len(e.ids) for part in parts for e in part]
    assert flat == sorted(flat, reverse=True)


def test_weights_do_not_depend_on_the_split(tokenizer):
    encode = Encoder(tokenizer, 64)
    rows = weigh([encode(Row("The sky is", " " + "blue " * n)) for n in (1, 2, 5)], 1.0)
    whole = collate(rows, 0).weights
    apart = torch.cat([collate([row], 0).weights for row in rows])
    assert torch.equal(whole, apart)
