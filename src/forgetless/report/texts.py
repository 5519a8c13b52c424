"""The texts of the rows that turned, for `--show-text` only: prompts from the stream, answers from the predictions.

A run folder keeps answers but no prompts. The stream that run.json names is read again, and a row is found in it
by its key, which is a hash of its content: a prompt that is shown is the prompt that was scored.
"""

from __future__ import annotations

from pathlib import Path

from forgetless.data.streams import load_stream
from forgetless.data.tasks import Row
from forgetless.report.summary import finished, paired_rows
from forgetless.runs.folder import RunFolder
from forgetless.runs.shapes import read_run


def with_texts(summary: dict, root: Path) -> dict:
    """The summary with `texts`: {task: {row number: prompt, answers, source}} of the rows that turned, and notes."""
    told = read_run(root)
    known, notes = _stream_rows(told["config"])
    turned = {one["task"]: {row["row"] for side in ("lost", "gained") for row in one[side]} for one in summary["flips"]}
    folders, learned = finished(RunFolder(root), told["lessons"])
    texts: dict[str, dict[str, dict]] = {}
    for task, before, now in paired_rows(told["tasks"], told["lessons"], folders, learned, "deployed"):
        name, measure = task["name"], task["headline"]
        rows = [pair for pair in zip(before, now, strict=True) if pair[1]["row"] in turned[name]]
        texts[name] = {
            str(new["row"]): {
                **_prompt(known.get(new["key"])),
                "gold": new["gold"],
                "before": old[measure].get("answer"),
                "now": new[measure].get("answer"),
            }
            for old, new in rows
        }
        missing = sum(new["key"] not in known for _, new in rows)
        if known and missing:
            notes.append(f"{name}: {missing} of {len(rows)} rows that turned are not in the stream as it is read now.")
    return summary | {"texts": {"rows": texts, "notes": notes}}


def _prompt(row: Row | None) -> dict:
    """The prompt as it is in the data, of a chat the messages before the answer; of a plain text the text."""
    if row is None:
        return {"prompt": None, "source": None}
    chat = [{"role": role, "content": text} for role, text in row.turns_before] if row.messages else None
    return {"prompt": chat or row.prompt or row.answer, "source": row.source}


def _stream_rows(config: dict) -> tuple[dict[str, Row], list[str]]:
    """Every row by its key; or none, and why."""
    try:
        stream = load_stream(config["stream"], on_bad_row=config["on_bad_row"], keep_gone=True)
    except Exception as error:  # files moved, a hub away, a package gone: whatever it is, the report is drawn
        why = " ".join(str(error).split())
        return {}, [
            f"No prompts: the stream {config['stream']!r} could not be read ({why}). "
            "Paths are relative to the folder in which the run was made."
        ]
    return {row.key: row for task in stream.tasks for row in (*task.test, *task.validation)}, []
