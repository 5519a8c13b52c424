"""MTL-LoRA: tasks share the factors, and each has a small matrix and a mixture of its own between them.

    h = W_0 x + s Σ_i softmax(w_t / τ)_i B_i Λ_t A x                                              arXiv 2410.09437

A (rank, in) and B_1 ... B_n (out, rank) are shared; Λ_t (rank, rank), begun as the identity, and w_t (n) are of task
t alone. For one task that is a plain pair, A and Σ_i softmax(w_t / τ)_i B_i Λ_t, which is what is deployed for it.

In a stream: A and the B_i go on from task to task; Λ_t and w_t begin anew, and earlier ones are frozen.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from forgetless.data.batches import Example, Part
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, Check, Method, State
from forgetless.model.adapters import Pair
from forgetless.model.answers import logits_at, token_losses
from forgetless.seeds import generator, seed_for


class MTLLoRA(Method):
    """Multi-task LoRA, task after task.

    Args:
        n: shared up-projections B_i
        tau: τ, temperature of the mixture: the lower, the nearer to one B_i
    """

    paper = "2410.09437"
    adopts = ADAPTER
    plain_pairs = False
    summary = "shared factors, with a matrix and a mixture per task between them; one adapter per task, chosen by task"
    task_id = True
    extra_memory = "n - 1 more factors B; a rank x rank matrix a layer and task; 16 bytes a training row"
    extra_compute = "PEFT's own forward; rows of several tasks are not packed"
    within_task: ClassVar[tuple[str, ...]] = ("trained",)
    off: ClassVar[str] = "Λ_t is trained in every task; with n = 1 it is plain LoRA only as long as Λ_t is the identity"

    def __init__(self, n: int = 3, tau: float = 0.1):
        if n < 1:
            raise UsageError(f"n {n}: 1 or more up-projections")
        if tau <= 0:
            raise UsageError(f"tau {tau}: above 0")
        self.n, self.tau = n, tau

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        adapters.train_only("A")
        pairs = adapters.pairs()
        device = adapters.device
        self.layer = {name: i for i, name in enumerate(pairs)}
        self.B = {name: nn.Parameter(torch.zeros(self.n, *pair.B.shape, device=device)) for name, pair in pairs.items()}
        self.Lambda = nn.Parameter(torch.zeros(len(pairs), adapters.settings.r, adapters.settings.r, device=device))
        self.w = nn.Parameter(torch.zeros(len(pairs), self.n, device=device))
        self.finished: dict[int, tuple[Tensor, Tensor]] = {}  # task -> Λ, w
        self.task_of: dict[int, int] = {}  # a row, by its tokens -> the last task that had it
        self.tasks: list[int] | None = None  # of each row that is on its way through the model; None: the current one
        adapters.compute_by(self._update, [*self.B.values(), self.Lambda, self.w])

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        w = torch.rand(self.w.shape, generator=generator("mixture", self.seed, task))
        with torch.no_grad():
            self.Lambda.copy_(torch.eye(self.Lambda.shape[-1]).expand_as(self.Lambda))
            self.w.copy_((2 * w - 1) / math.sqrt(self.n))

    def prepare(self, examples: list[Example]) -> None:
        self.task_of |= {seed_for(*example.ids): self.task for example in examples}

    def _update(self, name: str, x: Tensor) -> Tensor:
        """s Σ_i softmax(w_t / τ)_i B_i Λ_t A x, of x (..., in), or (rows, length, in) where each row has its own t."""
        pair, i = self.adapters.pairs()[name], self.layer[name]
        inner = linear(x.to(pair.A.dtype), pair.A)  # (..., rank)
        if self.tasks is None:
            return pair.scale * linear(inner, mixed(self.B[name], self.w[i], self.tau) @ self.Lambda[i])
        own = [self._own(task) for task in self.tasks]
        Lambda, w = (torch.stack([each[i] for each in every]) for every in zip(*own, strict=True))
        return pair.scale * routed(inner, self.B[name], Lambda, w, self.tau)

    def _own(self, task: int) -> tuple[Tensor, Tensor]:
        return (self.Lambda, self.w) if task == self.task else self.finished[task]

    def loss(self, part: Part) -> Tensor:
        """CE, each row with the Λ and w of its task; rows of several tasks are not packed with one another."""
        tasks = self._tasks(part)
        several = set(tasks) != {self.task}
        self.tasks = tasks if several else None  # until after the backward pass, which may compute activations again
        logits = logits_at(
            self.adapters.model, part.keep, input_ids=part.ids, attention_mask=part.mask, pack_rows=not several
        )
        return (part.weights * token_losses(logits, part.targets)).sum()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.tasks = None

    def after_skip(self) -> None:
        self.tasks = None

    def _tasks(self, part: Part) -> list[int]:
        """The task of each row; one that no task had is learnt as the current one's."""
        lengths = part.mask.sum(1).tolist()
        keys = (seed_for(*ids[:n].tolist()) for ids, n in zip(part.ids, lengths, strict=True))
        return [self.task_of.get(key, self.task) for key in keys]

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        self.finished[task] = self.Lambda.detach().clone(), self.w.detach().clone()
        with torch.no_grad():
            for name, pair in self.adapters.pairs().items():
                i = self.layer[name]
                pair.B.copy_(mixed(self.B[name], self.w[i], self.tau) @ self.Lambda[i])

    def weights_for(self, learnt: int, task: int) -> int | None:
        return task if task <= learnt else None

    @property
    def trained(self) -> list[Tensor]:
        return [one.detach() for one in (*self.B.values(), self.Lambda, self.w)]

    @trained.setter
    def trained(self, values: list[Tensor]) -> None:
        for mine, value in zip(self.trained, values, strict=True):
            mine.copy_(value)

    def state(self) -> State:
        tensors: dict[str, Tensor] = {f"{name}.B": B for name, B in self.B.items()}
        for task, (Lambda, w) in self.finished.items():
            tensors |= {f"{task}.Lambda": Lambda, f"{task}.w": w}
        rows = torch.tensor(list(self.task_of.items())).reshape(-1, 2)
        return State(tensors | {"task_of_row": rows}, {"tasks": list(self.finished)})

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        super().resume(adapter, state, task)
        device = self.w.device
        self.finished = {
            one: (state.tensors[f"{one}.Lambda"].to(device), state.tensors[f"{one}.w"].to(device))
            for one in state.values["tasks"]
        }
        self.trained = [*(state.tensors[f"{name}.B"] for name in self.B), *self.finished[task]]
        self.task_of = dict(state.tensors["task_of_row"].tolist())

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """Λ = I, and the up-projection with the largest share holds all of B."""
        self.check_adoption(rows is not None)
        self.begin_task(task)
        self.adapters.take(pairs, task)
        self.prepare([self.encoder(row) for row in rows or ()])
        for (name, pair), w in zip(self.adapters.pairs().items(), self.w.detach(), strict=True):
            share, i = torch.softmax(w / self.tau, 0).max(0)
            self.B[name].detach().zero_()[i] = pair.B.detach() / share
        self.end_task(task, rows or ())
        return self.export()

    def checks(self) -> list[Check]:
        start = torch.eye(self.Lambda.shape[-1], device=self.Lambda.device)
        moved = float((self.Lambda.detach() - start).square().mean().sqrt())
        meaning = "root mean square of the entries of Λ_t - I: what the task has of its own"
        return [*super().checks(), Check("own matrix", moved, moved > 0, meaning)]


def mixed(B: Tensor, w: Tensor, tau: float) -> Tensor:
    """Σ_i softmax(w / τ)_i B_i: (n, out, rank), (n,) -> (out, rank)."""
    return torch.einsum("n,nor->or", torch.softmax(w / tau, 0), B)


def routed(inner: Tensor, B: Tensor, Lambda: Tensor, w: Tensor, tau: float) -> Tensor:
    """Σ_i softmax(w_t / τ)_i B_i Λ_t of each row's A x, t its task.

    (rows, length, rank), (n, out, rank), (rows, rank, rank), (rows, n) -> (rows, length, out).
    """
    z = inner @ Lambda.mT.to(inner.dtype)
    share = torch.softmax(w / tau, -1).to(inner.dtype)
    spread = share[:, None, :, None] * z[:, :, None, :]  # (rows, length, n, rank)
    return linear(spread.flatten(2), B.transpose(0, 1).flatten(1))
