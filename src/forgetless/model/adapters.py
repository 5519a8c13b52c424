"""The adapters on a base model. The only file that knows PEFT's names.

Each adapted layer holds one trainable pair, `current`, and at most one frozen pair, `past`: the finished
pairs of earlier tasks joined by rank, so that a step costs the same however many tasks came before.
With pairs (A_i, B_i) of one scale s,   s Σ B_i A_i = s [B_1 ... B_t] [A_1; ...; A_t]   exactly.
The past is kept in the precision of the base's weights, in which a layer computes with it anyway: in bf16 a finished
pair is rounded once, to what the layer made of it at every step.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from forgetless.errors import RunError, UsageError, short
from forgetless.model.encoder_decoder import task_type
from forgetless.model.identity import read_tensors
from forgetless.model.lora import lora_linear
from forgetless.runs.shapes import NUMBER, read
from forgetless.seeds import generator

CURRENT, PAST = "default", "past"
OWN_KINDS = {"HYPLORA": "hyplora", "L2P": "l2p", "SHERL": "sherl"}
"""Types in adapter_config.json that PEFT does not know -> the method that alone puts such a folder into a model."""
ALL_LINEAR = "all-linear"
SAVED = {"r": int, "lora_alpha": NUMBER, "use_rslora": bool}
"""What `Adapters.load` reads of its own adapter_config.json."""


@dataclass(frozen=True)
class LoraSettings:
    """The shape of a LoRA pair."""

    r: int = 8
    """rank of the pair that each task trains"""
    lora_alpha: float = 16
    """the update is lora_alpha / r * B A (lora_alpha / sqrt(r) with use_rslora)"""
    lora_dropout: float = 0.0
    """dropout before A in training; 0 makes a step independent of how it is split"""
    target_modules: str | list[str] = ALL_LINEAR
    """'all-linear', or names such as [q_proj, v_proj]"""
    use_rslora: bool = False
    """scale by 1/sqrt(r) instead of 1/r"""


class Pair(NamedTuple):
    """One layer's update: scale * B A."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)
    scale: float


@dataclass(frozen=True)
class Magnitudes:
    """A trained factor for each of the frozen pairs that are joined in the past: B_j A_j counts values[·, j] times."""

    values: nn.Parameter  # (1, pairs), for all layers alike, or (layers, pairs)
    ranks: tuple[int, ...]  # of the pairs, in the order in which they are joined

    def of(self, layer: int) -> Tensor:
        """The factor of each of the joined pair's ranks, (sum of ranks,)."""
        ranks = torch.tensor(self.ranks, device=self.values.device)
        return self.values[layer if len(self.values) > 1 else 0].repeat_interleave(ranks)


Update = Callable[[str, Tensor], Tensor]  # a layer's name, its input (..., in) -> what is added to W x + b


class Adapters:
    """A base model with LoRA pairs of our making; `model` is a plain `PeftModel`."""

    _trained = "AB"  # the factors of the trainable pairs that are trained
    _magnitudes: Magnitudes | None = None
    _beside: Sequence[nn.Parameter] = ()  # trained with the pairs
    _kind = "LORA"  # what PEFT is told that a saved adapter is
    kind, tag = "LoRA adapter", "lora"  # for the model card
    comes_back = 1.0  # the share of the model's layers through which a backward pass goes
    moves = "norm of B: the adapter changes the model's answers"

    def __init__(self, base: PreTrainedModel, settings: LoraSettings, base_name: str, seed: int):
        self.settings, self.base_name, self.seed = settings, base_name, seed
        self.model = _wrap(base, settings).eval()  # PEFT's new dropout would be active until a first task is learnt
        prefix = "base_model.model."
        self._layers = {
            name.removeprefix(prefix): module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        for name, layer in self._layers.items():
            if CURRENT not in layer.lora_A:
                raise UsageError(f"target_modules: {name} is no linear layer ({type(layer.get_base_layer()).__name__})")
        self._joined: dict[str, tuple[Tensor, Tensor]] = {}  # both pairs of a layer in one piece of memory
        for name, layer in self._layers.items():
            if _is_plain(layer):
                layer.forward = partial(_forward, layer, name, self._joined)  # type: ignore[method-assign]
        self.reset(0)

    # ------------------------------------------------------------------ the pairs of each layer

    def layers(self) -> dict[str, LoraLayer]:
        """Every adapted layer by its name in the base model, in the model's order."""
        return self._layers

    def pairs(self) -> dict[str, Pair]:
        """The trainable pair of each layer."""
        return {name: _pair(layer, CURRENT) for name, layer in self.layers().items()}

    def past(self) -> dict[str, Pair]:
        """The joined frozen pair of each layer; empty before the first `finish`."""
        return {name: _pair(layer, PAST) for name, layer in self.layers().items() if PAST in layer.lora_A}

    def summed(self) -> dict[str, Pair]:
        """What the model computes with now: past and current joined into one pair a layer."""
        past = self.past()
        if self._magnitudes:
            past = {
                name: Pair(pair.A, pair.B.detach().float() * self._magnitudes.of(i).detach(), pair.scale)
                for i, (name, pair) in enumerate(past.items())
            }
        return {name: join([past[name], pair] if past else [pair]) for name, pair in self.pairs().items()}

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, in a fixed order."""
        trained = [getattr(pair, side) for pair in self.pairs().values() for side in self._trained]
        return trained + ([self._magnitudes.values] if self._magnitudes else []) + [*self._beside]

    def base_weight(self, name: str) -> Tensor:
        """W (out, in) of a layer, of a base in shards with all its parts, for which every process must ask.

        UsageError where it is quantised.
        """
        pair, layer = self.pairs()[name], self.layers()[name]
        W = layer.get_base_layer().get_parameter("weight").detach()
        W = W.full_tensor() if isinstance(W, DTensor) else W
        if W.shape != (pair.B.shape[0], pair.A.shape[1]) or not W.is_floating_point():
            raise UsageError(
                f"this method works on the weights of {name} as numbers, and they are {W.dtype} {tuple(W.shape)}: "
                "quantised. Load the base without quantisation, or take clora, which needs no weights."
            )
        return W

    @property
    def device(self) -> torch.device:
        return next(iter(self.pairs().values())).A.device

    def moved(self) -> float:
        """How far training went, as `moves` says; 0: the model answers as it did."""
        return norm_of_B(self.pairs())

    def described(self) -> str:
        """'210 layers, rank 8': where the trained parameters are."""
        return f"{len(self.pairs())} layers, rank {self.settings.r}"

    def base_parameters(self) -> int:
        """How many parameters the base has, without any adapter's."""
        pairs = [*self.pairs().values(), *self.past().values()]
        everything = self.model.get_nb_trainable_parameters()[1]  # two to a byte where they lie in 4 bits
        return everything - sum(p.A.numel() + p.B.numel() for p in pairs)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors by name: `<layer>.A`, `<layer>.B`."""
        return {name: tensor.detach().clone() for name, tensor in named(self.pairs()).items()}

    # ------------------------------------------------------------------ task borders

    def train_only(self, sides: str) -> None:
        """Trains one factor of each pair, "A" or "B", or both, "AB"; the other is no parameter of any optimizer."""
        self._trained = sides
        self._freeze_the_rest()

    def reset(self, task: int, *part: int) -> None:
        """A fresh trainable pair: A uniform in ±1/sqrt(in) (PEFT's kaiming initialisation), B zero.

        `part`: which of several fresh pairs of one task.
        """
        with torch.no_grad():
            for name, pair in self.pairs().items():
                pair.A.copy_(self.drawn_A(name, task, *part))
                pair.B.zero_()

    def drawn_A(self, layer: str, task: int, *part: int) -> Tensor:
        """The A with which a fresh pair begins, (rank, in), on CPU."""
        shape = _pair(self._layers[layer], CURRENT).A.shape
        fresh = torch.rand(shape, generator=generator("init", self.seed, task, *part, layer))
        return (2 * fresh - 1) / math.sqrt(shape[1])

    def take(self, pairs: dict[str, Pair], task: int) -> None:
        """A trainable pair that computes as `pairs` do, each of this rank or less; what they leave free is fresh."""
        self.reset(task)
        for name, mine in self.pairs().items():
            if name in pairs:
                given, rank = pairs[name], pairs[name].A.shape[0]
                if rank > self.settings.r:
                    raise UsageError(f"{name} has rank {rank}, the pair that is trained has rank {self.settings.r}")
                with torch.no_grad():
                    mine.A[:rank].copy_(given.A)
                    mine.B[:, :rank].copy_(given.B * (given.scale / mine.scale))

    def filled(self, pairs: dict[str, Pair]) -> dict[str, Pair]:
        """The same update as a pair for every layer, of one rank and this model's scale; zeros fill them up."""
        rank = max(pair.A.shape[0] for pair in pairs.values())
        whole = {}
        for name, mine in self.pairs().items():
            A = torch.zeros(rank, mine.A.shape[1])
            B = torch.zeros(mine.B.shape[0], rank)
            if name in pairs:
                own = pairs[name].A.shape[0]
                A[:own] = pairs[name].A
                B[:, :own] = pairs[name].B * (pairs[name].scale / mine.scale)
            whole[name] = Pair(A, B, mine.scale)
        return whole

    def finish(self, task: int) -> None:
        """Freezes the trainable pair into the past and starts a fresh one; the function is unchanged."""
        self.set_past(self.summed())
        self.reset(task)

    def drop_past(self) -> None:
        """Forgets the frozen pairs."""
        if PAST in self.model.peft_config:
            self.model.delete_adapter(PAST)
            self._joined.clear()
            self._magnitudes = None

    def set_past(self, pairs: dict[str, Pair]) -> None:
        """Replaces the frozen pairs."""
        self.drop_past()
        self.model.add_adapter(PAST, self._config(pairs, dropout=0.0))
        with torch.no_grad():
            for name, layer in self.layers().items():
                frozen = _pair(layer, PAST)
                frozen.A.copy_(pairs[name].A)
                frozen.B.copy_(pairs[name].B)
                if _is_plain(layer):
                    dtype = layer.get_base_layer().get_parameter("weight").dtype
                    self._joined[name] = _with_room(frozen, self.settings.r, dtype)
        self.model.base_model.set_adapter([CURRENT, PAST])  # type: ignore[operator]  # torch's stub: a Tensor
        self._freeze_the_rest()

    def _freeze_the_rest(self) -> None:
        trained = tuple(f".lora_{side}.{CURRENT}." for side in self._trained)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))

    def magnify(self, magnitudes: Magnitudes) -> None:
        """Multiplies the frozen pairs by magnitudes that are trained with the pair, until the past is replaced."""
        self._magnitudes = magnitudes
        self._joined.clear()  # the layers compute by PEFT's own forward, in which A x can be multiplied
        for i, layer in enumerate(self.layers().values()):
            layer.lora_A[PAST].register_forward_hook(partial(_magnified, magnitudes, i))

    def compute_by(self, update: Update, parameters: Sequence[nn.Parameter] = (), kind: str = "LORA") -> None:
        """Every layer computes W x + b + update(layer, x) from now on; `parameters` are trained beside the pairs.

        `kind`: PEFT's name for what is saved, "LORA" where the pairs that are saved give what `update` gives. Another
        name keeps PEFT from loading the folder as something that it is not.
        """
        self._beside, self._kind = parameters, kind
        for name, layer in self._layers.items():
            layer.forward = partial(_computed, layer, partial(update, name))  # type: ignore[attr-defined]

    def set_current(self, pairs: dict[str, Pair]) -> None:
        """Overwrites the trainable tensors; names and shapes must be those of this model."""
        mine = self.pairs()
        if mine.keys() != pairs.keys():
            missing = sorted(mine.keys() ^ pairs.keys())
            raise RunError(f"adapter has other layers than this run: {missing[0]} and {len(missing) - 1} more")
        with torch.no_grad():
            for name, pair in pairs.items():
                if pair.A.shape != mine[name].A.shape or pair.B.shape != mine[name].B.shape:
                    raise RunError(f"adapter layer {name}: rank {pair.A.shape[0]}, expected {mine[name].A.shape[0]}")
                mine[name].A.copy_(pair.A)
                mine[name].B.copy_(pair.B)

    @contextmanager
    def using(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Computes with other trainable tensors (as `snapshot` names them) inside the block."""
        mine = named(self.pairs())
        kept = {name: tensor.data for name, tensor in mine.items()}
        try:
            _swap(mine, tensors)
            yield
        finally:
            _swap(mine, kept)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched base inside the block."""
        with self.model.disable_adapter():
            yield

    # ------------------------------------------------------------------ PEFT folders

    def save(self, folder: Path, pairs: dict[str, Pair]) -> None:
        """Writes a plain PEFT adapter folder; equal tensors give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        told = self._config(pairs, self.settings.lora_dropout).to_dict()
        told = {key: sorted(value) if isinstance(value, set) else value for key, value in told.items()}
        told |= {"peft_type": self._kind, "inference_mode": True, "base_model_name_or_path": self.base_name}
        (folder / CONFIG_NAME).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        tensors = {}
        for name, pair in pairs.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = pair.A.detach().float().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = pair.B.detach().float().cpu().contiguous()
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def load(self, folder: Path) -> dict[str, Pair]:
        """The pairs of a folder that `save` wrote."""
        told = read(folder / CONFIG_NAME, SAVED)
        rank = told["r"]
        scale = told["lora_alpha"] / (math.sqrt(rank) if told["use_rslora"] else rank)
        file = folder / SAFETENSORS_WEIGHTS_NAME
        tensors, pairs = read_tensors(file), {}
        for name, mine in self.pairs().items():
            keys = [f"base_model.model.{name}.lora_{side}.weight" for side in "AB"]
            A, B = (tensors.get(key) for key in keys)
            shapes = (rank, mine.A.shape[1]), (mine.B.shape[0], rank)
            if A is None or B is None or (tuple(A.shape), tuple(B.shape)) != shapes:
                raise RunError(f"{file}: no A and B of the shapes {shapes[0]} and {shapes[1]} for {name}; restore it")
            pairs[name] = Pair(A, B, scale)
        return pairs

    def _config(self, pairs: dict[str, Pair], dropout: float) -> LoraConfig:
        """One rank and one scale for all layers: a joined pair of rank R keeps scale s by alpha = s R."""
        first = next(iter(pairs.values()))
        rank, scale = first.A.shape[0], first.scale
        alpha = scale * (math.sqrt(rank) if self.settings.use_rslora else rank)
        return LoraConfig(
            r=rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # peft: int, takes float
            lora_dropout=dropout,
            target_modules=_listed(self.model.peft_config[CURRENT].to_dict()["target_modules"]),
            use_rslora=self.settings.use_rslora,
            task_type=self.model.peft_config[CURRENT].task_type,
        )


class Attached(Adapters):
    """The active LoRA pairs of a PEFT model that others made and train; its task borders are theirs.

    `folders`: PEFT adapters of earlier tasks, joined to `past()`: to look at, the model does not compute with them.
    UsageError where there are no such pairs, and where a method would begin a task by itself.
    """

    def __init__(self, model: PeftModel, folders: Sequence[Path], seed: int):
        self.model, self.seed = model, seed
        self._trained, self._magnitudes = "AB", None
        self._name = model.active_adapters[0]
        self._layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and self._name in module.lora_A
        }
        if len(model.active_adapters) > 1 or not self._layers:
            active = ", ".join(model.active_adapters)
            raise UsageError(f"one LoRA adapter on linear layers must be active in the model; active: {active}")
        found = [self.load(Path(folder)) for folder in folders]
        self._past = {
            name: join([_scaled(pairs[name], found[0][name].scale, self.device) for pairs in found])
            for name in (self._layers if found else ())
        }

    def pairs(self) -> dict[str, Pair]:
        return {name: _pair(layer, self._name) for name, layer in self._layers.items()}

    def past(self) -> dict[str, Pair]:
        return self._past

    def load(self, folder: Path) -> dict[str, Pair]:
        try:
            return super().load(folder)
        except (OSError, KeyError, ValueError, SafetensorError, RunError) as error:
            raise UsageError(
                f"{folder}: no LoRA adapter on the {len(self._layers)} layers that are trained ({short(str(error))}); "
                "give a folder that PEFT wrote, of an adapter with the same target_modules"
            ) from error

    def reset(self, task: int, *part: int) -> None:
        raise UsageError("this method begins tasks with adapters of its own, which a trainer does not give it")

    def set_past(self, pairs: dict[str, Pair]) -> None:
        self.reset(0)

    def train_only(self, sides: str) -> None:
        raise UsageError(f"this method trains {sides} alone, and what is trained here is the trainer's")

    def compute_by(self, update: Update, parameters: Sequence[nn.Parameter] = (), kind: str = "LORA") -> None:
        raise UsageError("this method computes the layers' update itself, and these layers are the trainer's")


def _scaled(pair: Pair, scale: float, device: torch.device) -> Pair:
    """The same update told with another scale."""
    return Pair(pair.A.to(device), pair.B.to(device) * (pair.scale / scale), scale)


def pairs_of(model: PeftModel) -> dict[str, Pair]:
    """The pair of each layer, by the layer's name in the base, of a model with one LoRA adapter that PEFT loaded."""
    return {
        name.removeprefix("base_model.model."): _pair(module, CURRENT)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def join(pairs: list[Pair]) -> Pair:
    """Pairs of one scale as one pair whose product is the sum of theirs."""
    first = pairs[0]
    if not all(math.isclose(pair.scale, first.scale, rel_tol=1e-6) for pair in pairs):
        raise ValueError("pairs of different scale cannot be joined by rank")
    if len(pairs) == 1:
        return first
    A = torch.cat([pair.A.detach() for pair in pairs], dim=0)
    B = torch.cat([pair.B.detach() for pair in pairs], dim=1)
    return Pair(A, B, first.scale)


def whole(product: Tensor, rank: int, scale: float) -> Pair:
    """A pair of `rank` whose B A is the product (out, in): itself times the identity, filled up with zeros."""
    out, width = product.shape
    identity = torch.eye(min(out, width), device=product.device)
    A, B = (identity, product) if width <= out else (product, identity)
    room = rank - A.shape[0]
    return Pair(pad(A, (0, 0, 0, room)), pad(B, (0, room)), scale)


def norm_of_B(pairs: dict[str, Pair]) -> float:
    """||B||_F over all layers: 0 where the pairs change nothing."""
    return sum(float(pair.B.detach().float().square().sum()) for pair in pairs.values()) ** 0.5


def inner(a: Pair, b: Pair) -> float:
    """<ΔW_a, ΔW_b>, the sum of the entries' products, in fp64."""
    left, right = a.B.double().T @ b.B.double(), a.A.double() @ b.A.double().T
    return float(a.scale * b.scale * (left * right).sum())


def named(pairs: Mapping[str, NamedTuple]) -> dict[str, Tensor]:
    """The tensors of pairs as a flat dictionary: `<layer>.A`, `<layer>.B`; of prompts `<name>.P`."""
    return {
        f"{name}.{side}": tensor
        for name, pair in pairs.items()
        for side, tensor in pair._asdict().items()
        if isinstance(tensor, Tensor)
    }


def _named(targets: str | list[str]) -> str | list[str]:
    """'q_proj,v_proj' and 'q_proj' are names; any other text is PEFT's: 'all-linear' or a regular expression."""
    names = targets.split(",") if isinstance(targets, str) else targets
    return [name.strip() for name in names] if all(name.strip().isidentifier() for name in names) else targets


def _listed(targets: str | set[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else sorted(targets)


def _swap(tensors: dict[str, Tensor], data: dict[str, Tensor]) -> None:
    """Points tensors at other data. Autocast keeps bf16 copies by tensor, not by content: they must go."""
    for name, tensor in tensors.items():
        tensor.data = data[name]
    torch.clear_autocast_cache()


def _pair(layer: LoraLayer, adapter: str) -> Pair:
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    return Pair(A.get_parameter("weight"), B.get_parameter("weight"), layer.scaling[adapter])


def _is_plain(layer: LoraLayer) -> TypeGuard[Linear]:
    """PEFT's own layer over torch's own: a subclass (quantised weights) has more to its product than its weight."""
    return type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear


def _with_room(past: Pair, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pair with room for one of `rank` before it. From now on `past`'s tensors are part of this memory."""
    A, B = past.A, past.B
    both_A = A.new_zeros(rank + A.shape[0], A.shape[1], dtype=dtype)
    both_B = B.new_zeros(B.shape[0], rank + B.shape[1], dtype=dtype)
    both_A[rank:], both_B[:, rank:] = A, B
    A.data, B.data = both_A[rank:], both_B[:, rank:]
    return both_A, both_B


def _forward(layer: Linear, name: str, joined: dict[str, tuple[Tensor, Tensor]], x: Tensor, *args, **kwargs) -> Tensor:
    """A LoRA layer's forward as one operation; PEFT's own where there is more to do than add the pairs."""
    active, dropout = [name for name in layer.active_adapters if name in layer.lora_A], layer.lora_dropout
    plain = (
        not (args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant)
        and CURRENT in active
        and set(active) <= {CURRENT, PAST}
        and (PAST not in active or name in joined)
        and all(math.isclose(layer.scaling[name], layer.scaling[CURRENT], rel_tol=1e-6) for name in active)
        and not (layer.training and isinstance(dropout[CURRENT], nn.Dropout))
    )
    if not plain:
        return type(layer).forward(layer, x, *args, **kwargs)
    linear = layer.get_base_layer()
    assert isinstance(linear, nn.Linear)
    current = _pair(layer, CURRENT)
    both = joined[name] if PAST in active else None
    return lora_linear(x, linear.weight, linear.bias, current.A, current.B, current.scale, both)


def _computed(layer: LoraLayer, update: Callable[[Tensor], Tensor], x: Tensor, *args, **kwargs) -> Tensor:
    """A layer's forward with an update of a method's own."""
    y = layer.get_base_layer()(x, *args, **kwargs)
    return y if layer.disable_adapters else y + update(layer.lora_dropout[CURRENT](x)).to(y.dtype)


def _magnified(magnitudes: Magnitudes, layer: int, A: nn.Module, given: tuple, inner: Tensor) -> Tensor:
    """A's output (..., ranks), each rank multiplied by its pair's magnitude."""
    return inner * magnitudes.of(layer).to(inner.dtype)


def _wrap(base: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # peft: int, takes float
        lora_dropout=settings.lora_dropout,
        target_modules=_named(settings.target_modules),
        use_rslora=settings.use_rslora,
        task_type=task_type(base.config),
    )
    try:
        with warnings.catch_warnings():  # PEFT 0.21 asks for an attribute that transformers 5.23 has renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            return get_peft_model(base, config)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise UsageError(f"target_modules={settings.target_modules!r}: {error}") from error
        linear = {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        raise UsageError(
            f"no layer named {settings.target_modules!r} in {type(base).__name__}; it has {sorted(linear)}, "
            f"or give {ALL_LINEAR!r}"
        ) from error
