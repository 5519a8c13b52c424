"""What a method needs to go on with the next task, as files beside its adapter."""

from __future__ import annotations

from pathlib import Path

from forgetless.data.tasks import Row
from forgetless.learning.checkpoint import save_tensors
from forgetless.learning.memory import Memory
from forgetless.learning.session import Session
from forgetless.methods import State
from forgetless.model.identity import read_tensors
from forgetless.runs.folder import write_json, write_lines
from forgetless.runs.shapes import KEPT_ROW, read, read_records


def save_state(folder: Path, state: State) -> None:
    """method.safetensors, method.json, and memory/ for kept rows."""
    if state.tensors:
        save_tensors(state.tensors, folder / "method.safetensors")
    write_json(folder / "method.json", state.values)
    if state.memory is not None:
        (folder / "memory").mkdir()
        (folder / "memory" / "HOLDS_TRAINING_ROWS").write_text(
            "rows.jsonl holds rows of the training data, kept for replay. Do not publish it with the adapter.\n"
        )
        records = [
            {"task": task, "source": row.source} | ({"domain": row.domain} if row.domain else {}) | row.content()
            for row, task in zip(state.memory.rows, state.memory.tasks, strict=True)
        ]
        write_lines(folder / "memory" / "rows.jsonl", records)


def load_state(folder: Path) -> State:
    """What `save_state` wrote."""
    tensors = read_tensors(folder / "method.safetensors") if (folder / "method.safetensors").exists() else {}
    memory = None
    if (folder / "memory").exists():
        memory = Memory(0)
        for record in read_records(folder / "memory" / "rows.jsonl", KEPT_ROW):
            turns = tuple((turn["role"], turn["content"]) for turn in record.get("messages", ()))
            answer = record.get("answer", record.get("text", ""))
            if turns:
                answer = [text for role, text in turns if role == "assistant"][-1]
            options = tuple(record.get("options", ()))
            place = (record["source"], options, record.get("domain", ""))
            memory.rows.append(Row(record.get("prompt", ""), answer, turns, *place))
            memory.tasks.append(record["task"])
    return State(tensors, read(folder / "method.json", dict), memory)


def resume(session: Session, folder: Path, number: int) -> None:
    """Puts the model and the method back to where they were when lesson `number` was finished."""
    session.method.task = number
    session.method.resume(session.adapters.load(folder / "adapter"), load_state(folder), number)
