"""A run folder -> one summary: matrices, intervals, what was forgotten, what the method did. Reads, never scores."""

from __future__ import annotations

import hashlib
from pathlib import Path

from forgetless.errors import RunError
from forgetless.runs.folder import FORGETTING, FORGOTTEN_ROWS, RunFolder, complete, shaped
from forgetless.runs.shapes import (
    FORGOTTEN,
    FORGOTTEN_TASK,
    LABELS,
    LEARNED,
    NUMBER,
    PREDICTION,
    SCORES,
    STEP,
    misfit,
    read,
    read_records,
    read_run,
)
from forgetless.score.intervals import mean_interval, paired_change, wilson
from forgetless.score.metrics import Metric, metrics
from forgetless.score.scorers import MEANINGS, OWN_MEANING, RIGHT_OR_WRONG, label_of


def summarise(root: Path) -> dict:
    """Everything the reports show, as JSON; equal runs give equal summaries (times are not in it)."""
    run = RunFolder(root)
    told = read_run(root)
    tasks, lessons = [{"majority": None} | task for task in told["tasks"]], told["lessons"]
    folders, learned = finished(run, lessons)
    union = list(dict.fromkeys(option for task in tasks for option in task["options"]))
    cells = [_scores(tasks, folders[i], union) for i in learned]
    base = _scores(tasks, run.task(0, "base"), union)
    matrix = [_row(tasks, row.get("deployed", {})) for row in cells]
    base_row = _row(tasks, base.get("deployed", {}))
    sizes = [task["test"] for task in tasks]
    placed = _placed(matrix, [lessons[i]["last_task"] for i in learned], len(tasks))
    here = [j for j, task in enumerate(tasks) if not task.get("gone")]
    views = {view: [row.get(view, {}) for row in cells] for view in _other_views(cells)}
    checks = [read(folders[i] / "learned.json", LEARNED)["checks"] for i in learned]
    adopted = [one["name"] for one in told.get("adopted", [])]
    trained = [i for i in learned if lessons[i]["name"] not in adopted]
    pairs = paired_rows(tasks, lessons, folders, learned, "deployed")
    judged = _judged(tasks, run, folders, learned)
    method = told["method"]["name"]
    borders = [{"after": lessons[i]["name"]} | border for i in learned if (border := _border(folders[i]))]
    return {
        "format": told["format"],
        "status": told["status"],
        "name": f"{method} on {told['stream']}",
        "folder": root.name,
        "method": told["method"],
        "model": told["model"] | {"identity": told["base"], "precision": told["precision"]},
        "tasks": tasks,
        "learned": [lessons[i]["name"] for i in learned],
        "headline": {"matrix": matrix, "base": base_row},
        "measures": _measures(tasks, cells, base),
        "intervals": [_intervals(tasks, row, folders[i]) for row, i in zip(matrix, learned, strict=True)],
        "forgotten": [_forgotten(*pair) for pair in pairs],
        "flips": [_flips(*pair) for pair in pairs],
        "metrics": {name: metric.as_json() for name, metric in _metrics(placed, base_row, sizes, here).items()},
        "views": {
            view: {
                "headline": {"matrix": [_row(tasks, row) for row in rows], "base": base_row},
                "forgotten": [_forgotten(*pair) for pair in paired_rows(tasks, lessons, folders, learned, view)],
            }
            for view, rows in views.items()
        },
        "counts": {
            "gold": [_gold(task, judged.get(task["name"], [])) for task in tasks],
            "after": [[row.get("deployed", {}).get(task["name"], {}).get("counts") for task in tasks] for row in cells],
        },
        "test_rows": {name: _digest(rows) for name, rows in judged.items()},
        "losses": {lessons[i]["name"]: read_records(folders[i] / "log.jsonl", STEP) for i in trained},
        "acts": [{"task": lessons[i]["name"], "checks": found}
                 for i, found in zip(learned, checks, strict=True) if i in trained],
        "warnings": _skipped(folders, lessons, trained) + [
            f"{method} did not act on {lessons[i]['name']}: {check['name']} = {check['value']:.4g} ({check['meaning']})"
            for i, found in zip(learned, checks, strict=True) for check in found if not check["ok"]
        ],
        "config": told["config"],
        "versions": told["versions"],
    } | _only_if_any({
        "forgetting": borders,
        "adopted": told.get("adopted", []),
        "history": _history(told, learned),
        "forgotten_rows": _forgotten_rows(run),
    })  # fmt: skip


def _only_if_any(told: dict[str, list]) -> dict[str, list]:
    return {key: value for key, value in told.items() if value}


def _history(told: dict, learned: list[int]) -> list[dict]:
    """What the lessons were learnt with, where it was not the same for all."""
    entries = told.get("history", [])
    if len(entries) < 2:
        return []
    ends = [entry["from"] + ("step" in entry) for entry in entries[1:]] + [len(told["lessons"]) + 1]
    names = [
        [told["lessons"][i]["name"] for i in learned if entry["from"] <= i + 1 < end]
        for entry, end in zip(entries, ends, strict=True)
    ]
    return [entry | {"lessons": own} for entry, own in zip(entries, names, strict=True)]


def _forgotten_rows(run: RunFolder) -> list[dict]:
    """What `forgetless forget-rows` deleted."""
    file = run.root / FORGOTTEN_ROWS
    if not file.exists():
        return []
    return [told for told in read_records(file, FORGOTTEN_TASK) if told["status"] == "deleted"]


def _metrics(
    matrix: list[list[float | None]], base: list[float | None], sizes: list[int], here: list[int]
) -> dict[str, Metric]:
    """Over the tasks that have rows: of the others nothing more can be known."""
    rows = [[matrix[i][j] for j in here] for i in here if i < len(matrix)]
    return metrics(rows, [base[j] for j in here], [sizes[j] for j in here])


def summary_record(summary: dict) -> dict:
    """summary.json: the folder may be moved, so its name is not in it."""
    return {key: value for key, value in summary.items() if key != "folder"}


def matrix_record(summary: dict) -> dict:
    """matrix.json: the scores, for machines."""
    told = {key: summary[key] for key in ("learned", "headline", "measures", "metrics")}
    return told | {"tasks": [task["name"] for task in summary["tasks"]]}


def _skipped(folders: list[Path], lessons: list[dict], learned: list[int]) -> list[str]:
    """How many steps of each lesson moved no weight because their loss or gradient was no finite number."""
    told = []
    for i in learned:
        records = read_records(folders[i] / "log.jsonl", STEP)
        if many := sum("skipped" in record for record in records):
            told.append(
                f"{lessons[i]['name']}: {many} of {len(records)} steps were skipped, because their loss or gradient "
                "was NaN or infinite (log.jsonl names them)"
            )
    return told


def finished(run: RunFolder, lessons: list[dict]) -> tuple[list[Path], list[int]]:
    """Each lesson's folder, and the numbers of those that are finished."""
    folders = [run.task(i + 1, lesson["name"]) for i, lesson in enumerate(lessons)]
    return folders, list(range(len(run.finished([lesson["name"] for lesson in lessons]))))


def _scores(tasks: list[dict], folder: Path, union: list[str]) -> dict:
    """scores.json of a published folder, or nothing: {view: {task: {n, scores, counts}}}."""
    if not complete(folder / "scores"):
        return {}
    file = folder / "scores" / "scores.json"
    scored = read(file, SCORES)
    for task in tasks:
        for cell in (view[task["name"]] for view in scored.values() if task["name"] in view):
            score = cell["scores"].get(task["headline"])
            if score is None or (task["headline"] in RIGHT_OR_WRONG and not 0 <= score <= 1):
                raise RunError(f"{file}: {task['name']}: no {task['headline']}, or one that is no share: {score!r}")
    if read(folder / "scores" / "union.json", LABELS) != union:  # scored when the stream had fewer labels
        for cell in (cell for view in scored.values() for cell in view.values()):
            cell["scores"].pop("likelihood_union", None)
    return scored


def _border(folder: Path) -> dict:
    """Forgetting after a lesson, against the base's own predictions; empty where nobody asked for it."""
    if not complete(folder / FORGETTING):
        return {}
    file = folder / FORGETTING / f"{FORGETTING}.json"
    told = read(file, FORGOTTEN)
    if "not_measured" in told:
        return {"not_measured": told["not_measured"]}
    with shaped(file):
        low, high = told["interval"] or (None, None)
        return {
            "kl": told["per_token"]["kl"],
            "low": low,
            "high": high,
            **{name: told["per_token"][name] for name in ("cross_entropy", "entropy", "agree")},
            "per_document": told["per_document"]["kl"],
            "text": told["text"],
        }


def _row(tasks: list[dict], scored: dict) -> list[float | None]:
    """The headline score of each task; None where it was not scored."""
    return [scored[t["name"]]["scores"][t["headline"]] if t["name"] in scored else None for t in tasks]


def _intervals(tasks: list[dict], scores: list[float | None], folder: Path) -> list[list[float] | None]:
    """95 % of each score: of a share of right answers from their number, of other means from the rows."""
    counted = all(task["headline"] in RIGHT_OR_WRONG for task in tasks)
    rows = {} if counted else _rows(tasks, folder, "deployed")
    return [_interval(score, task, rows) for score, task in zip(scores, tasks, strict=True)]


def _interval(score: float | None, task: dict, rows: dict[str, list[dict]]) -> list[float] | None:
    if score is None:
        return None
    if task["headline"] in RIGHT_OR_WRONG:
        return list(wilson(round(score * task["test"]), task["test"]))
    return list(mean_interval(_scores_of(task, rows[task["name"]])))


def _placed(matrix: list[list[float | None]], last_tasks: list[int], tasks: int) -> list[list[float | None]]:
    """R: row i is what was scored after task i; a lesson of several tasks leaves the rows of the earlier ones empty."""
    rows: list[list[float | None]] = [[None] * tasks for _ in range(max(last_tasks, default=-1) + 1)]
    for row, last in zip(matrix, last_tasks, strict=True):
        rows[last] = row
    return rows


def _other_views(cells: list[dict]) -> list[str]:
    return list(dict.fromkeys(view for row in cells for view in row if view != "deployed"))


def _measures(tasks: list[dict], cells: list[dict], base: dict) -> dict:
    """Every measure's matrix; a task that is not scored by it has None."""
    scored = [one["scores"] for row in [base, *cells] for one in row.get("deployed", {}).values()]
    own = sorted({name for scores in scored for name in scores} - MEANINGS.keys())  # users' functions
    names = [name for name in (*MEANINGS, *own) if any(name in scores for scores in scored)]

    def line(row: dict, measure: str) -> list[float | None]:
        scored = row.get("deployed", {})
        return [scored.get(task["name"], {"scores": {}})["scores"].get(measure) for task in tasks]

    return {
        name: {
            "meaning": MEANINGS.get(name, OWN_MEANING),
            "base": line(base, name),
            "matrix": [line(row, name) for row in cells],
        }
        for name in names
    }


def paired_rows(
    tasks: list[dict], lessons: list[dict], folders: list[Path], learned: list[int], view: str
) -> list[tuple[dict, list[dict], list[dict]]]:
    """For each task learnt before the last lesson: its test rows just after it was learnt, and the same rows now."""
    if len(learned) < 2:
        return []
    now = _rows(tasks, folders[learned[-1]], view)
    found = []
    for i in learned[:-1]:
        task = tasks[lessons[i]["last_task"]]
        before = _rows(tasks, folders[i], view)
        if task["name"] in before and task["name"] in now:
            found.append((task, before[task["name"]], now[task["name"]]))
    return found


def _forgotten(task: dict, before: list[dict], now: list[dict]) -> dict:
    """What became of a task's score, tested on the same rows."""
    then_scores, now_scores = _scores_of(task, before), _scores_of(task, now)
    change = paired_change(then_scores, now_scores)
    n = len(then_scores)
    return {
        "task": task["name"],
        "learned": sum(then_scores) / n,
        "now": sum(now_scores) / n,
        **{name: getattr(change, name) for name in ("change", "low", "high", "p", "lost", "gained", "n")},
    }


def _flips(task: dict, before: list[dict], now: list[dict]) -> dict:
    """The rows behind the change. Answers are named only where they are labels: a free answer is a row's text."""
    flips: dict = {"task": task["name"], "n": len(now), "lost": [], "gained": []}
    then_scores, now_scores = _scores_of(task, before), _scores_of(task, now)
    for old, new, was, now_is in zip(before, now, then_scores, now_scores, strict=True):
        if was == now_is:
            continue
        row = {"row": new["row"], "key": new["key"], "before": _label(task, old), "now": _label(task, new)}
        flips["lost" if now_is < was else "gained"].append(row)
    # a share of a row's tokens goes up and down; only whole answers are right or wrong
    return flips | {"whole": all(score in (0, 1) for score in then_scores + now_scores)}


def _scores_of(task: dict, rows: list[dict]) -> list[float]:
    return [float(row[task["headline"]]["score"]) for row in rows]


def _label(task: dict, row: dict) -> str | None:
    """The answer as one of the task's labels; None for free answers and measures without an answer."""
    return label_of(row[task["headline"]], task["headline"], task["options"])


def _judged(tasks: list[dict], run: RunFolder, folders: list[Path], learned: list[int]) -> dict[str, list[dict]]:
    """Any record of each test row: the last lesson's, or the base's before there is one."""
    return {
        name: rows
        for folder in [run.task(0, "base"), *(folders[i] for i in learned[-1:])]
        for name, rows in _rows(tasks, folder, "deployed").items()
    }


def _gold(task: dict, rows: list[dict]) -> dict[str, int] | None:
    """How often each label is the right answer."""
    if not rows or not task["options"]:
        return None
    golds = [row["gold"] for row in rows]
    return {option: golds.count(option) for option in task["options"]}


def _digest(rows: list[dict]) -> str:
    """Names a set of test rows: two runs with the same digest were judged on the same rows."""
    return hashlib.sha256(" ".join(sorted(row["key"] for row in rows)).encode()).hexdigest()[:16]


def _rows(tasks: list[dict], folder: Path, view: str) -> dict[str, list[dict]]:
    """Prediction records by task, in the order of the rows; each has its task's headline score."""
    file = folder / "scores" / "predictions.jsonl"
    by_task: dict[str, list[dict]] = {}
    for record in read_records(file, PREDICTION) if file.exists() else []:
        if record["view"] == view:
            by_task.setdefault(record["task"], []).append(record)
    for task in tasks:
        rows = by_task.get(task["name"], [])
        wrong = next((said for row in rows if (said := misfit(row, {task["headline"]: {"score": NUMBER}}))), "")
        if wrong or (rows and len(rows) != task["test"]):
            what = wrong or f"{len(rows)} rows, and run.json says {task['test']}"
            raise RunError(f"{file}: {task['name']}: {what}; restore the run folder from a copy")
    return by_task
