"""Methods that break the contract, and the clause that must catch each: `CAUGHT_BY`."""

from __future__ import annotations

import torch

from forgetless.methods import Method, State
from forgetless.methods.incremental import Incremental
from forgetless.methods.replay import Replay


class Broken(Method):
    hooks = 1
    summary = "breaks one clause"


class DoesNothing(Broken):
    """Has an option that nobody reads.

    Args:
        lam: weight of a penalty that is never added
    """

    off = {"lam": 0.0}  # noqa: RUF012

    def __init__(self, lam: float = 1.0):
        self.lam = lam


class SaysThatItActs(Broken):
    """Overrides a hook without any effect."""

    def after_backward(self):
        for parameter in self.adapters.parameters():
            parameter.grad = parameter.grad * 1.0


class NeverLearns(Broken):
    def after_backward(self):
        for parameter in self.adapters.parameters():
            parameter.grad = None


class WeakPenalty(Broken):
    def penalty(self):
        return 1e-9 * sum(tensor.square().sum() for tensor in self.adapters.parameters())


class LeaksIntoTheBase(Broken):
    def after_step(self, optimizer):
        with torch.no_grad():
            next(p for n, p in self.adapters.model.named_parameters() if "base_layer" in n).add_(1e-6)


class LeaksIntoThePast(Incremental):
    hooks = 1

    def after_step(self, optimizer):
        with torch.no_grad():
            for pair in self.adapters.past().values():
                pair.B.mul_(0.999)


class DependsOnTheSplit(Broken):
    def loss(self, part):
        return super().loss(part) / len(part.ids)


class DrawsWithoutSeed(Broken):
    drawn = 0

    def begin_task(self, task):
        super().begin_task(task)
        DrawsWithoutSeed.drawn += 1

    def loss(self, part):
        return super().loss(part) * (1 + 1e-3 * DrawsWithoutSeed.drawn)


class ForgetsItsState(Replay):
    """Replays rows, and not after a stop.

    Args:
        memory: rows kept
    """

    hooks = 1
    plain = None

    def __init__(self, memory: int = 6):
        super().__init__(memory)

    def restore(self, state: State) -> None:
        pass


class ForgetsWithinATask(Broken):
    """Its penalty grows from step to step, and a checkpoint does not know how far."""

    def begin_task(self, task):
        super().begin_task(task)
        self.steps = 0

    def penalty(self):
        return 1e-3 * self.steps * sum(tensor.square().sum() for tensor in self.adapters.parameters())

    def after_step(self, optimizer):
        self.steps += 1


class NotPlainWhenOff(Broken):
    """Is not what it says.

    Args:
        lam: weight of the norm
    """

    off = {"lam": 0.1}  # noqa: RUF012

    def __init__(self, lam: float = 0.2):
        self.lam = lam

    def penalty(self):
        return self.lam * sum(tensor.norm() for tensor in self.adapters.parameters())


class NotPlainAtFirst(Broken):
    def penalty(self):
        return 0.2 * sum(tensor.norm() for tensor in self.adapters.parameters())


class CostsMoreEachTask(Broken):
    def penalty(self):
        first = self.adapters.parameters()[0]
        return 0.1 * sum((first.square().sum() for _ in range(self.task)), first.new_zeros(())) if self.task else None


class SaysThatItGrows(Broken):
    growth = "linear"


class DeploysAnother(Broken):
    def export(self):
        return {name: pair._replace(B=2 * pair.B) for name, pair in super().export().items()}


class NoPeftNoRemedy(Broken):
    stock_peft = False


class Undocumented(Broken):
    """Says nothing of its option."""

    def __init__(self, lam: float = 1.0):
        self.lam = lam


class OptionThatIsNoJson(Broken):
    """Its default cannot be written down.

    Args:
        device: where
    """

    def __init__(self, device: object = object):
        self.device = device


class Raises(Broken):
    def begin_task(self, task):
        raise ZeroDivisionError("nothing to divide by")


CAUGHT_BY = [
    (DoesNothing, "it acts"),
    (SaysThatItActs, "it acts"),
    (NeverLearns, "it acts"),
    (NeverLearns, "loss falls on each task"),
    (WeakPenalty, "it acts"),
    (LeaksIntoTheBase, "frozen weights stay"),
    (LeaksIntoThePast, "frozen weights stay"),
    (DependsOnTheSplit, "any split, one gradient"),
    (DrawsWithoutSeed, "same seed, same bytes"),
    (ForgetsItsState, "resumes at a border"),
    (ForgetsWithinATask, "resumes inside a task"),
    (NotPlainWhenOff, "switched off it is plain"),
    (NotPlainAtFirst, "switched off it is plain"),
    (CostsMoreEachTask, "cost of a step"),
    (SaysThatItGrows, "cost of a step"),
    (DeploysAnother, "loads in stock PEFT"),
    (NoPeftNoRemedy, "loads in stock PEFT"),
    (Undocumented, "options explained"),
    (OptionThatIsNoJson, "options explained"),
]
