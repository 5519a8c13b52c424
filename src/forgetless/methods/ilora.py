"""I-LoRA: a fast learner that is trained, a slow one that follows it, and rows replayed to both.

    L      = 1/2 (CE_current + CE_memory)(θ_w) + γ MSE( f(x_m; θ_w), f(x_m; θ_l) )
    θ_l^k  = λ θ_l^{k-1} + (1 - λ) θ_w^k                   Ren et al. 2024, arXiv 2402.18865

θ_w fast, θ_l slow, x_m replayed rows, no gradient on θ_l. The equations are known from notes on the paper, not
from its text (docs/methods/ilora.md); the paper's λ, γ and f are not known to us. The released code never moves the
slow learner; `as_released` gives what it computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from forgetless.data.batches import Example, Part
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import Check, State
from forgetless.methods.replay import Replay
from forgetless.model.adapters import Pair, named
from forgetless.model.answers import token_losses
from forgetless.model.encoder_decoder import refuse_encoder_decoder

TARGETS = ("logits", "hidden_last", "hidden_all")
LEARNERS = ("slow", "fast")
FOLLOWS = "||θ_l after - θ_l before the task||; below 1 % of the slow-fast distance what is deployed has hardly learnt"


class ILoRA(Replay):
    """Interpolation-based LoRA.

    Args:
        lam: λ, the share of itself that the slow learner keeps at a step
        gamma: γ, weight of the consistency term
        target: what is kept consistent: 'logits' (at answer tokens), 'hidden_last' or 'hidden_all' (at all tokens)
        gated: only pull up: relu(slow - fast)² instead of (slow - fast)²
        deploy: the learner that is exported and heads the table, 'slow' or 'fast'; both are scored
        restart: the slow learner starts each task as a copy of the fast one
        warmup: λ_k = min(1 - 1/(k+1), λ), k counted in each task
        as_released: no averaging (the slow learner is the fast one at the end of the previous task), gated,
            all hidden states, fast learner deployed
        memory: rows kept in all (a number), or a share of each task (a number and a percent sign)
        policy: 'reservoir' or 'quota', for a number of rows
        replay_rows: replayed rows of a step; 0: as many as the step has current rows
    """

    paper = "2402.18865"
    summary = "a fast learner and a slow average of it, kept consistent on replayed rows"
    extra_memory = "the kept rows and one more adapter"
    extra_compute = "2.5x: replayed rows forward and backward, and forward through the slow learner"
    under_any = False
    plain = Replay
    off = {"gamma": 0.0, "deploy": "fast"}
    within_task = (*Replay.within_task, "slow", "k", "compared", "consistency")

    def __init__(
        self,
        lam: float = 0.95,
        gamma: float = 1.0,
        target: str = "logits",
        gated: bool = False,
        deploy: str = "slow",
        restart: bool = False,
        warmup: bool = False,
        as_released: bool = False,
        memory: int | str = "10%",
        policy: str = "reservoir",
        replay_rows: int = 0,
    ):
        super().__init__(memory, policy, replay_rows)
        if as_released:
            lam, target, gated, deploy, restart, warmup = 1.0, "hidden_all", True, "fast", True, False
        if target not in TARGETS:
            raise UsageError(f"target {target!r}: one of {', '.join(TARGETS)}")
        if not 0 <= lam <= 1:
            raise UsageError(f"lam {lam}: from 0 (the slow learner is the fast one) to 1 (it never moves)")
        if deploy not in LEARNERS:
            raise UsageError(f"deploy {deploy!r}: one of {', '.join(LEARNERS)}")
        self.lam, self.gamma, self.target, self.gated = lam, gamma, target, gated
        self.deploy, self.restart, self.warmup = deploy, restart, warmup

    def start(self, adapters, encoder, seed) -> None:
        if self.target != "logits":
            refuse_encoder_decoder(adapters.model, f"ilora target={self.target}", "take target=logits")
        super().start(adapters, encoder, seed)
        self.slow = adapters.snapshot()

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        if self.restart:
            self.slow = self.adapters.snapshot()
        self.slow_before = {name: tensor.clone() for name, tensor in self.slow.items()}
        self.k = 0
        self.step_consistency = 0.0
        self.compared, self.consistency = 0, 0.0  # replayed rows compared, and their term summed over steps

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        examples = super().batch(examples, step)
        replayed = [example for example in examples if example.memory]
        self.memory_tokens = sum(len(example.ids) for example in replayed)
        self.memory_answers = sum(example.answers for example in replayed)
        self.step_consistency = 0.0
        return examples

    def loss(self, part: Part) -> Tensor:
        if not self.gamma or not bool(part.memory.any()):
            return super().loss(part)
        replayed = part.only(part.memory)
        with torch.no_grad(), self.adapters.using(self.slow):
            slow = self._f(replayed, *self._forward(replayed))
        logits, states = self._forward(part)
        cross_entropy = (part.weights * token_losses(logits, part.targets)).sum()
        inside = part.memory.unsqueeze(1).expand_as(part.keep)[part.keep]
        fast = self._f(replayed, logits[inside], [state[part.memory] for state in states])
        # the part's share of the step's mean over layers, replayed positions and width
        positions = self.memory_answers if self.target == "logits" else self.memory_tokens
        distances = (squared_distance(w, l, self.gated).sum() for w, l in zip(fast, slow, strict=True))
        total = sum(distances, cross_entropy.new_zeros(()))
        consistency = total / (len(fast) * positions * fast[0].shape[-1])
        self.compared += len(replayed.ids)
        self.step_consistency += float(consistency.detach())
        return cross_entropy + self.gamma * consistency

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        forward, backward = super().passes(rows, task)
        return forward + (self.asked(rows, task) if self.gamma else 0), backward

    def _forward(self, part: Part) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (answers, vocabulary) and, where the target needs them, hidden states."""
        return (self.logits(part), ()) if self.target == "logits" else self.logits(part, hidden=True)

    def _f(self, part: Part, logits: Tensor, states) -> list[Tensor]:
        """What is compared: logits (answers, vocabulary), or hidden states (tokens, width), one tensor a layer."""
        if self.target == "logits":
            return [logits.float()]
        chosen = states[-1:] if self.target == "hidden_last" else states
        return [state[part.mask.bool()].float() for state in chosen]

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.k += 1
        self.consistency += self.step_consistency
        lam = warmed(self.lam, self.k) if self.warmup else self.lam
        average(self.slow, named(self.adapters.pairs()), lam)

    def export(self) -> dict[str, Pair]:
        if self.deploy == "fast":
            return self.adapters.pairs()
        return {
            name: Pair(self.slow[f"{name}.A"], self.slow[f"{name}.B"], pair.scale)
            for name, pair in self.adapters.pairs().items()
        }

    def views(self) -> dict[str, AbstractContextManager]:
        learners: dict[str, AbstractContextManager] = {"slow": self.adapters.using(self.slow), "fast": nullcontext()}
        other = "fast" if self.deploy == "slow" else "slow"
        return {self.deploy: learners[self.deploy], other: learners[other]}

    def state(self) -> State:
        """The deployed learner is the adapter itself; the other one is kept here."""
        kept = super().state()
        other = self.slow if self.deploy == "fast" else self.adapters.snapshot()
        return State(other, kept.values, kept.memory)

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        super().resume(adapter, state, task)
        deployed = self.adapters.snapshot()
        other = {name: tensor.to(self.adapters.device) for name, tensor in state.tensors.items()}
        if self.deploy == "fast":
            self.slow = other
        else:
            self.slow = deployed
            with torch.no_grad():
                for name, tensor in named(self.adapters.pairs()).items():
                    tensor.copy_(other[name])

    def only_here(self) -> str:
        """Without memory and consistency only the average is left, which goes with any loop."""
        return super().only_here() if self.gamma or self.memory.capacity else ""

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        super().end_task(task, rows)
        self.moved = distance(self.slow, self.slow_before)
        self.apart = distance(self.slow, named(self.adapters.pairs()))

    def told(self) -> dict[str, float]:
        return {
            "consistency": self.step_consistency,
            "slow_fast_distance": distance(self.slow, named(self.adapters.pairs())),
        }

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """Both learners begin at the adopted adapter: its trainer kept no average of its steps."""
        super().adopt(task, pairs, rows)
        self.slow = self.adapters.snapshot()
        return self.export()

    def checks(self) -> list[Check]:
        still = self.lam == 1.0  # by choice
        follows = self.moved > 0.01 * self.apart
        used = self.consistency > 0 or not self.compared or self.lam == 0
        return [
            *super().checks(),
            Check("slow learner moved", self.moved, follows or still, FOLLOWS),
            Check("slow-fast distance", self.apart, self.apart > 0 or self.lam == 0, "||θ_l - θ_w|| after the task"),
            Check("consistency", self.consistency, used, "Σ over steps of the consistency term"),
        ]


def average(slow: dict[str, Tensor], fast: dict[str, Tensor], lam: float) -> None:
    """θ_l <- λ θ_l + (1 - λ) θ_w, in place on `slow`."""
    with torch.no_grad():
        for name, tensor in slow.items():
            tensor.mul_(lam).add_(fast[name], alpha=1 - lam)


def warmed(lam: float, k: int) -> float:
    """λ_k = min(1 - 1/(k+1), λ), k >= 1."""
    return min(1 - 1 / (k + 1), lam)


def squared_distance(fast: Tensor, slow: Tensor, gated: bool) -> Tensor:
    """(f_l - f_w)², or relu(f_l - f_w)² when gated; entry by entry."""
    difference = slow - fast
    return difference.relu().square() if gated else difference.square()


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """||a - b||₂ over all tensors."""
    with torch.no_grad():
        return float(sum((a[name] - b[name]).square().sum() for name in a)) ** 0.5
