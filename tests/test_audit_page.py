"""The page of an audit: made-up records in, one page out; what real audits write is tested in test_audit.py."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from audit_records import GROUPED, RECORDS, case
from pages import Page, opened_in_browser, self_contained
from summaries import HOSTILE

from forgetless.auditing.evidence import verdict_of
from forgetless.auditing.where import CERTAINTIES
from forgetless.cli import main
from forgetless.report import audit as report_audit
from forgetless.report.audit import audit_markdown, plain
from forgetless.report.audit_page import redraw, render_audit, view
from forgetless.report.glossary import AUDIT_GLOSSARY, OF_METRIC
from forgetless.runs.seal import sealed

SECTIONS = [
    "plain", "losses", "matrix", "turned", "texts", "where", "refusals", "sanity", "weights", "recovery", "remedies",
    "notes", "details", "glossary",
]  # fmt: skip
ROOT = Path(__file__).parents[1]
made = cache(lambda name: RECORDS[name]())


@cache
def drawn(name: str) -> str:
    return render_audit(*made(name))


@cache
def parsed(name: str) -> Page:
    return Page(drawn(name))


def sections(name: str) -> list[str]:
    return [attributes["id"] for tag, attributes in parsed(name).tags if tag == "section"]


@pytest.mark.parametrize("name", RECORDS)
def test_every_audit_gives_a_well_formed_page_without_outside_resources(name):
    self_contained(parsed(name), drawn(name))


def test_what_was_not_measured_has_no_section():
    assert sections("two") == SECTIONS
    assert sections("bare") == ["plain", "losses", "texts", "details", "glossary"]
    assert sections("nothing") == ["plain", "details", "glossary"]
    for name in RECORDS:
        page = parsed(name)
        links = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
        assert {*sections(name)} == links & {*SECTIONS}


def test_the_verdict_and_every_sentence_stand_on_the_page():
    record, evidence = made("two")
    text = " ".join(parsed("two").text.replace("\u00a0", " ").split())
    for model in evidence["models"]:
        for sentence in plain(record, model["name"], verdict_of(model)):
            assert sentence in text
    assert "regression A loss is shown to be over its budget. The largest: letters lost 35.2 points." in text
    kept = "pass Every loss is shown to be within its budget, each document counted as at most 1 nats/token."
    assert f"{kept} No loss of a score is shown." in text
    assert "2pp for invoices; 5pp for letters; 0.1 nats/token for own-answers, manual" in text


def test_a_waived_loss_is_no_plain_pass():
    record, evidence = RECORDS["one"]()
    [told] = evidence["models"]
    lost = next(one for one in told["findings"] if one["budget"] is not None)
    told["outcome"], lost["status"], lost["waived"] = "pass", "over budget", True
    [model] = view(record, evidence)["models"]
    assert (model["badge"], model["sign"]) == ("pass with waivers", "unsure")
    assert model["verdict"].startswith("1 loss over budget is waived. ")
    told["outcome"], lost["waived"] = "regression", False
    [model] = view(record, evidence)["models"]
    assert (model["badge"], model["sign"]) == ("regression", "bad")


def test_what_decides_the_verdict_comes_first():
    may = view(*made("two"))["models"][0]
    assert [line["sign"] for line in may["lines"]] == ["bad", "bad", "bad", "unsure", "unsure", "bad"]
    assert [line["name"] for line in may["lines"]][:4] == ["invoices", "letters", "own-answers", "manual"]


def test_marks_bounds_and_budgets_lie_where_their_values_are():
    losses = view(*made("two"))["losses"][0]["forest"]
    assert [label for _, label in losses["ticks"]] == ["−20", "0", "20", "40", "60"]
    finding = next(one for one in made("two")[0]["models"][0]["findings"] if one["name"] == "invoices")
    line = losses["groups"][0]["lines"][0]
    assert line["stops"] == [("limit", pytest.approx(100 * (2 + 20) / 80))]
    assert line["at"] == pytest.approx(100 * (100 * finding["loss"] + 20) / 80, abs=0.01)
    [bar] = line["bars"]
    assert bar["left"] == pytest.approx(100 * (100 * finding["low"] + 20) / 80, abs=0.01)
    assert bar["left"] + bar["width"] == pytest.approx(100 * (100 * finding["high"] + 20) / 80, abs=0.02)
    assert line["found"] == "over budget" and line["shown"]


def test_scores_have_their_change_and_rows_that_turned():
    rows = view(*made("two"))["matrix"]["rows"]
    assert [row["name"] for row in rows] == ["april", "may", "may-replay"]
    assert rows[0]["cells"][1]["text"] == "84 %" and rows[0]["cells"][1]["between"] == ""
    lost = rows[1]["cells"][1]
    assert (lost["text"], lost["between"]) == ("48.8 %", "−35.2 pp")
    assert "91 worse, 3 better; same answer as the reference in 60 %" in lost["title"]
    turned = view(*made("two"))["turned"]["groups"][1]["lines"][0]
    assert turned["text"] == "91 worse, 3 better"
    worse, better = turned["bars"]
    assert worse["width"] / better["width"] == pytest.approx(91 / 3, rel=0.01)


def test_every_measure_of_a_task_is_on_the_page():
    record, evidence = case(["may"], {"invoices": ("task", 40, 0.9)}, {}, [0.5])
    for scores, share in ((record["reference_scores"], 0.81), (record["models"][0]["scores"], 0.27)):
        scores["invoices"]["exact_match"] = share
    drawn = view(record, evidence)
    assert ["27 % by exact_match" in row["cells"][0]["title"] for row in drawn["matrix"]["rows"]] == [False, True]
    [table] = [one for one in drawn["tables"] if one["title"] == "Scores by further measures"]
    assert table["head"][1:] == ["invoices, exact_match"] and table["rows"] == [["april", "81 %"], ["may", "27 %"]]
    assert "by further measures" in render_audit(record, evidence)


def test_cross_entropy_is_drawn_as_entropy_and_kl():
    line = view(*made("two"))["texts"][0]["forest"]["groups"][0]["lines"][0]
    floor, moved = line["bars"]
    assert (floor["left"], floor["width"]) == (0, 85.0)  # 1.7 of 2 nats
    assert moved["left"] == 85.0 and moved["width"] == pytest.approx(100 * 0.22502 / 2, abs=0.01)
    assert line["text"] == "KL 0.225" and line["found"] == "same word 70 %, 7,300 × the rounding"


def test_the_mass_on_words_that_only_one_model_has_is_shown():
    record, evidence = case(["may", "june"], {}, {"notes": 4}, [0.5, 0.1])
    record["models"][0]["divergence"]["notes"]["per_token"]["outside_model"] = 0.9
    table = view(record, evidence)["texts"][0]["numbers"]
    assert [(cells[0], cells[table["head"].index("other words")]) for cells in table["rows"]] == [
        ("may", "90 %"), ("june", "0 %"),
    ]  # fmt: skip
    comment = audit_markdown(record, {one["name"]: verdict_of(one) for one in evidence["models"]})
    assert comment.count("of the predictions are words that only one") == 1
    assert "- may, notes: 90 % of the predictions are words that only one of the two models has" in comment


def test_refusals_have_their_intervals():
    record, evidence = case(["may"], {}, {"own-answers": 4}, [0.5], judged=("advbench",))
    before, now = view(record, evidence)["refusals"]["groups"][0]["lines"]
    assert (before["text"], before["between"], before["found"]) == ("90 %", "80 to 95", "of 60 answers")
    assert (now["text"], now["between"], len(now["bars"])) == ("55 %", "45 to 60", 2)


def test_groups_of_few_documents_have_no_interval_and_what_was_not_tried_no_curve():
    record, evidence = RECORDS["one"]()
    group = {"name": "numbers", "tokens": 12, "share_of_tokens": 0.1, "share_of_kl": None, "kl": 0.25, "low": None,
             "high": None, "agree": 0.5}  # fmt: skip
    told = record["models"][0]
    told["where"] = {next(iter(told["where"])): {kind: [] for kind in GROUPED} | {"token_type": [group]}}
    task = next(iter(told["recovery"]))
    told["recovery"] = {task: {"reference": 0.9, "model": 0.9, "rows": 0, "steps": [], "recovered": [], "control": [],
                               "base": None, "sentence": "nothing was lost"}}  # fmt: skip
    drawn = view(record, evidence)
    [line] = drawn["where"][0]["charts"][0]["forest"]["groups"][0]["lines"]
    assert len(line["bars"]) == 1 and line["between"] == "" and line["found"] == "- of KL, 10 % of tokens"
    assert drawn["recovery"]["charts"] == [] and drawn["recovery"]["sentences"][0]["text"] == "nothing was lost"
    assert "nothing was lost" in render_audit(record, evidence)


def test_more_answers_that_are_none_are_said_in_words():
    """Of 157 answers 20 are repeated where none was; of `may-replay`'s none are."""
    page = parsed("two").text
    assert "20 of 157 answers to general prompts are one thing repeated; the reference has 0 of 157" in page
    assert page.count("are one thing repeated") == 3 and "are empty" not in page  # and to each judge's prompts


def test_names_are_text():
    page = parsed("odd")
    assert "<script" not in drawn("odd") and "\x1b" not in drawn("odd")
    assert page.text.count(HOSTILE) > 10 and "الفواتير القديمة" in page.text


def test_texts_of_rows_only_where_they_are_given(tmp_path):
    record, evidence = made("one")
    turned = [
        {"model": "models/may", "task": "invoices", "row": {"prompt": f"Sum {HOSTILE} up", "answer": "12"},
         "before": {"row": 4, "gold": "12", "likelihood": {"answer": "12", "score": 1}},
         "after": {"row": 4, "gold": "12", "likelihood": {"answer": "", "score": 0}}},
        {"model": "models/may", "task": "invoices", "row": {"messages": [
            {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]},
         "before": {"row": 6, "gold": "Yes", "likelihood": {"score": 0.25}},
         "after": {"row": 6, "gold": "Yes", "likelihood": {"score": 0.5}}},
    ]  # fmt: skip
    text = " ".join(Page(render_audit(record, evidence, turned)).text.split())
    assert f"Row 5Sum {HOSTILE} up right answer12reference12now(empty)" in text
    assert "Row 7user: Sure? right answerYesreferencescore 0.25nowscore 0.5" in text
    assert "This page holds texts of test rows" in text and "holds no text of a row" in drawn("one")


def test_a_folder_is_drawn_again_and_files_of_two_audits_are_refused(tmp_path, capsys):
    record, evidence = made("one")
    (tmp_path / "audit.json").write_text(json.dumps(sealed(record)))
    (tmp_path / "evidence.json").write_text(json.dumps(evidence))
    assert main(["report", str(tmp_path), "--output_dir", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "audit.html").read_text() == drawn("one") == redraw(tmp_path).read_text()
    for more, why in ((["--show-text"], "no texts.jsonl"), (["--json"], "an audit is drawn by itself")):
        assert main(["report", str(tmp_path), *more]) == 1
        assert why in " ".join(capsys.readouterr().err.split())
    (tmp_path / "audit.json").write_text(json.dumps(sealed(record | {"evidence": "another"})))
    assert main(["report", str(tmp_path)]) == 1
    assert "are not of the same audit" in " ".join(capsys.readouterr().err.split())


def test_markdown_fits_a_comment_and_keeps_every_verdict(monkeypatch):
    record, evidence = made("five")
    verdicts = {one["name"]: verdict_of(one) for one in evidence["models"]}
    whole = audit_markdown(record, verdicts)
    assert len(whole) < report_audit.MOST_CHARACTERS < 65_536, "what GitHub takes"
    assert "first line" not in whole and "2 rows were cut" in whole and "#### Change on the same rows" in whole
    assert "moved furthest" not in whole, "details are on the page"
    monkeypatch.setattr(report_audit, "MOST_CHARACTERS", 12_000)
    cut = audit_markdown(record, verdicts)
    assert len(cut) < 13_500 and "parts are cut to their first line, for length: audit.html has them" in cut
    assert cut.count("### runs/stream") == 5 and "2 rows were cut" in cut and "#### Change on the same rows" in cut


def test_certainty_and_judge_are_explained_as_what_they_are():
    assert all("nats" in group for group in CERTAINTIES), "groups of an entropy, not of a probability"
    assert "entropy of its prediction in nats" in AUDIT_GLOSSARY["certainty"][1]
    assert "opening likelier, after turns that were refused" in AUDIT_GLOSSARY["judge"][1]


def test_every_word_is_explained_and_used():
    lines = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    rows = [line.split("|")[1].lower() for line in lines if line.startswith("| ")]
    terms = {re.sub(r"[*`]", "", term).strip() for row in rows for term in [row, *row.split(",")]}
    missing = [term for term, _ in AUDIT_GLOSSARY.values() if term.lower() not in terms]
    assert not missing, f"docs/glossary.md has no {missing}"
    pages = "".join(map(drawn, RECORDS))
    never = {anchor for anchor in AUDIT_GLOSSARY if f'href="#g-{anchor}"' not in pages}
    assert never <= {*OF_METRIC.values()}, "the made-up audits do not have every metric"


def test_the_page_opens_in_a_browser(tmp_path):
    file = tmp_path / "audit.html"
    file.write_text(drawn("two"))
    page = opened_in_browser(file, tmp_path)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == SECTIONS
    assert [tag for tag, _ in page.tags].count("svg") > 40
    assert [attributes.get("class") for _, attributes in page.tags].count("line") > 40
