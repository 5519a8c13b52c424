"""Attention for processors without a fused kernel worth its name.

On CPU the backward pass of torch's fused attention takes a quarter of a step of a small model. Here it is five batched
products. Heads that share keys and values lie behind one another, so nothing is repeated; the weights are computed
again in the backward pass, so nothing of size length x length is kept; queries go in blocks, so the memory in use is
bounded. `docs/performance.md` has the comparison.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from forgetless.model.packing import Packed, pack

BLOCKED = "blocked"  # the name under which transformers finds it
PACKED = "packed"  # the same, in a model that also takes rows packed (`packing.py`)
TRIAL = "blocked trial"
BLOCKED_ON = ("cpu",)  # elsewhere torch's fused attention computes, of packed rows too
BLOCK = 2**23  # attention weights in memory at once


class BlockedAttention(torch.autograd.Function):
    """softmax(scale q k^T where seen) v.

    q (batch, heads, queries, width); k, v (batch, groups, keys, their width) with heads a multiple of groups;
    seen (batch or 1, 1, queries, keys) of truth values -> (batch, heads, queries, width of v).

    Scores and weights are at least fp32, as in torch's fused attention, and rounded only for the product with values.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, seen)
        ctx.scale = scale
        keys, values = _flat(k), _flat(v)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for block in _blocks(q, k):
            weights = _weights(q[:, :, block], keys, seen[:, :, block], scale)
            out[:, :, block] = (weights.to(q.dtype) @ values).view_as(out[:, :, block])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, seen = ctx.saved_tensors
        keys, values = _flat(k), _flat(v)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(q, k):
            queries, out = _grouped(q[:, :, block], keys), _grouped(grad[:, :, block], keys)
            weights = _weights(q[:, :, block], keys, seen[:, :, block], ctx.scale)
            grad_v += weights.to(q.dtype).transpose(1, 2) @ out
            inner = out.to(weights.dtype) @ values.transpose(1, 2).to(weights.dtype)
            inner = torch._softmax_backward_data(inner, weights, -1, weights.dtype).to(q.dtype)  # P (dP - Σ dP P)
            grad_q[:, :, block] = (inner @ keys).mul_(ctx.scale).view_as(q[:, :, block])
            grad_k += (inner.transpose(1, 2) @ queries).mul_(ctx.scale)
        return grad_q, grad_k.view_as(k), grad_v.view_as(v), None, None


def _weights(q: Tensor, keys: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T where seen), at least fp32: (batch * groups, heads / groups * queries, keys)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = (_grouped(q, keys).to(precise) * scale) @ keys.transpose(1, 2).to(precise)
    hidden = torch.zeros_like(seen, dtype=precise).masked_fill_(~seen, torch.finfo(precise).min)
    scores.view(q.shape[0], q.shape[1], q.shape[2], -1).add_(hidden)  # finite: a row that sees nothing is padding
    return torch.softmax(scores, -1)


def _flat(keys: Tensor) -> Tensor:
    """(batch, groups, keys, width) -> (batch * groups, keys, width)."""
    return keys.reshape(-1, keys.shape[2], keys.shape[3])


def _grouped(q: Tensor, keys: Tensor) -> Tensor:
    """(batch, heads, queries, width) -> (batch * groups, heads / groups * queries, width)."""
    return q.reshape(keys.shape[0], -1, q.shape[3])


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, start + size) for start in range(0, q.shape[2], size))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed: Packed | None = None,
    **more,
) -> tuple[Tensor, None]:
    """transformers' attention function; what is not plain masked attention goes to torch's fused one."""
    if packed is not None:

        def each(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            return _attend(module, q, k, v, seen, dropout, scaling, is_causal, **more)[0].transpose(1, 2)

        return packed.attend(query, key, value, each).transpose(1, 2).contiguous(), None
    if query.device.type not in BLOCKED_ON:
        more |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    square = query.shape[2] == key.shape[2]
    if attention_mask is None and causal and square:
        attention_mask = torch.ones(query.shape[2:3] * 2, dtype=torch.bool, device=query.device).tril()[None, None]
    plain = (
        query.requires_grad
        and dropout == 0
        and not any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape[1] == 1
        and query.dtype == key.dtype == value.dtype
    )
    if not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):  # it would round what is to be fp32
        out = BlockedAttention.apply(query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def use_blocked_attention(model: PreTrainedModel) -> None:
    """Computes with `BlockedAttention`, on a CPU, and takes rows packed, where the model uses torch's fused attention
    and loses nothing by the change.

    Tried on a few tokens, since some models look at the name of their attention and do something else by it: under
    the new name torch's attention must give the model's own logits, and in each call ours what torch's gives. What
    passed holds for every model of the same code and configuration.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    if model.config.is_encoder_decoder:  # T5 adds a bias to its scores
        return
    kind = _kind(model)
    found = _tried.get(kind) or _tried_on(model)
    if found != "sdpa":
        _tried[kind] = found
    model.set_attn_implementation(found)


def window(model: PreTrainedModel) -> float:
    """How many tokens a token of some layer sees at most, where its place in the row decides it; else infinity."""
    told = model.config.get_text_config().to_dict()
    return min(told.get(name) or math.inf for name in ("sliding_window", "attention_chunk_size"))


_tried: dict[tuple, str] = {}


def _kind(model: PreTrainedModel) -> tuple:
    """What decides how a model computes, but for its weights."""
    told = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return type(model), json.dumps(told, sort_keys=True, default=str), model.dtype, model.device.type


def _tried_on(model: PreTrainedModel) -> str:
    """The attention that the model may take; it is left with torch's or with that one."""
    agreed: list[bool] = []

    def both(*args, **more) -> tuple[Tensor, None]:
        told, own = sdpa_attention_forward(*args, **more)[0], _attend(*args, **more)[0]
        agreed.append(own.shape == told.shape and bool((own - told).abs().max() <= 0.02 * told.abs().max()))
        return told, None

    AttentionInterface.register(TRIAL, both)
    told = _trial(model)
    try:
        model.set_attn_implementation(TRIAL)
        same = torch.allclose(_trial(model), told) and bool(agreed) and all(agreed)
    except (RuntimeError, TypeError, ValueError):  # the model asks for more than plain masked attention
        same = False
    model.set_attn_implementation(BLOCKED if same else "sdpa")
    if same and _takes_packed(model):
        return PACKED
    if model.device.type not in BLOCKED_ON:
        model.set_attn_implementation("sdpa")
    return model.config._attn_implementation


def _trial(model: PreTrainedModel) -> Tensor:
    """Logits of two short rows, one of them padded, computed as in training."""
    ids, mask = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    embedded = model.get_input_embeddings()(ids.to(model.device)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=mask.to(model.device), use_cache=False).logits
    return logits.detach()[mask.bool()].float()


def _takes_packed(model: PreTrainedModel) -> bool:
    """Whether packed rows give what padded ones give.

    A row must not change by a bit when another one's own tokens do, and must change with the beginning they share. In
    16 bits values are compared loosely, since the rounding of one layer grows in the next.
    """
    if window(model) < math.inf:  # `Packed` knows of none
        return False
    ids = torch.tensor([[*range(3, 15), 5, 6, 7], [*range(3, 15), 8, 0, 0], [9, 4, *range(8, 18), 0, 0, 0]])
    mask, others, beginning = (ids > 0).long(), ids.clone(), ids.clone()
    others[0, 12:], beginning[:2, 0] = torch.tensor([11, 12, 13]), 4

    def packed_rows(tokens: Tensor) -> Tensor:
        packed = pack(tokens.to(model.device), mask)
        embedded = model.get_input_embeddings()(packed.ids).detach().requires_grad_()
        inputs = {name: value for name, value in packed.inputs.items() if name != "input_ids"}
        return model(inputs_embeds=embedded, use_cache=False, **inputs).logits[0, packed.place].detach().float()

    try:
        told = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        own, beside, after = packed_rows(ids), packed_rows(others), packed_rows(beginning)
    except (RuntimeError, TypeError, ValueError):
        return False
    real, told = mask.bool(), told.detach().float()
    apart = torch.equal(own[1:][real[1:]], beside[1:][real[1:]]) and not torch.equal(own[1, 12], after[1, 12])
    difference, size = (own - told)[real].abs(), told[real].abs().max()
    near = difference.max() <= 1e-4 * size if model.dtype == torch.float32 else difference.median() <= 0.02 * size
    return apart and bool(near)


AttentionInterface.register(BLOCKED, _attend)
AttentionInterface.register(PACKED, _attend)
for name in (BLOCKED, PACKED, TRIAL):
    AttentionMaskInterface.register(name, sdpa_mask)
