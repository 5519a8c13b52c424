"""What CorDA and LoRA-Null share: the pair begins as a part of each weight that general text hardly reads.

    W = (W - s B_0 A_0) + s B A,   B A begins as B_0 A_0: a part of W
    C = mean of x xᵀ over general text, per layer, which chooses that part

At the start nothing has changed. W itself stays as it is: -B_0 A_0 is a frozen pair beside it, so that both
together, of rank 2 r, are what is deployed. The pair goes on from task to task.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.general_rows import own_answers, text_rows
from forgetless.methods.base import Check, Method, State, each_layer
from forgetless.model.adapters import Pair
from forgetless.model.encoder_decoder import refuse_reading_inputs
from forgetless.model.inputs import second_moments

READS = (
    "tr(A_0 C A_0ᵀ) / (||A_0||² tr(C) / in), over layers: what the pair begins to read of general text, as a share of "
    "what a random one reads"
)


class AwareStart(Method):
    """One pair, begun from the weights and from what general text gives each layer to read."""

    extra_memory = "one frozen pair of rank r; at the start in x in numbers for each tensor that layers read"
    extra_compute = "one more product a layer, of rank r; at the start one pass over the general rows"
    adopts = "its pair begins as a part of the weights, which an adopted one does not; take sequential"
    off: ClassVar[str] = "the pair begins as a part of the weights, in the first task too"
    example: ClassVar[dict] = {"prompts": 1}

    def __init__(self, text: str, prompts: int):
        if prompts < 1:
            raise UsageError(f"prompts {prompts}: 1 or more")
        self.text, self.prompts = text, prompts

    def part(self, W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """A_0 (r, in) and B_0 (out, r) of a weight W (out, in) whose inputs have the second moment C (in, in)."""
        raise NotImplementedError

    def start(self, adapters, encoder, seed) -> None:
        refuse_reading_inputs(adapters.model)
        super().start(adapters, encoder, seed)

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        if not self.adapters.past():
            self._begin()

    def _begin(self) -> None:
        rows = text_rows(self.text, self.encoder) if self.text else self._own_answers()
        examples = [self.encoder(row) for row in rows]
        moments = second_moments(self.adapters, examples, self.encoder.tokenizer.pad_token_id)
        start, read, expected = {}, 0.0, 0.0
        for name, pair in self.adapters.pairs().items():
            C = moments.of[moments.first[name]]
            A, B = self.part(self.adapters.base_weight(name).float(), C, self.adapters.settings.r)
            start[name] = Pair(A, B / pair.scale, pair.scale)
            read += float(((A @ C) * A).sum())
            expected += float(A.square().sum() * C.trace() / len(C))
        self.adapters.set_past({name: pair._replace(B=-pair.B) for name, pair in start.items()})
        self.adapters.set_current(start)
        self.reads = read / max(expected, 1e-30)

    def _own_answers(self) -> list[Row]:
        return own_answers(self.adapters, self.encoder, self.prompts)

    def state(self) -> State:
        return State({}, {"reads": self.reads})

    def restore(self, state: State) -> None:
        self.reads = state.values["reads"]

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        """The deployed adapter holds -B_0 A_0, then the trained pair."""
        r = self.adapters.settings.r
        self.adapters.set_past({name: Pair(p.A[:r], p.B[:, :r], p.scale) for name, p in adapter.items()})
        self.adapters.set_current({name: Pair(p.A[r:], p.B[:, r:], p.scale) for name, p in adapter.items()})
        self.restore(state)

    def checks(self) -> list[Check]:
        layers = each_layer(self.adapters.pairs(), self.adapters.past())
        moved = max(float((now.B.detach().to(start.B.dtype) + start.B).abs().max()) for now, start in layers)
        meaning = "largest |B - B_0|: 0 means that nothing was learnt"
        return [Check("moved", moved, moved > 0, meaning), Check("reads", self.reads, self.reads < 1, READS)]
