"""Attention over packed sequences, as an implementation that transformers calls by name.

The layout hands the trunk a `Segments` record, which transformers passes through to each layer; each sequence then
attends to its own rows (and to a prompt that it shares), with no mask over all pairs of tokens.

| where | what runs |
|---|---|
| GPU of compute capability 8.0 or newer, 16 bit | flash-attn's varlen kernel if it is installed, else PyTorch's own |
| elsewhere: CPU, float32, older GPUs | PyTorch's `scaled_dot_product_attention`, one sequence at a time |
| heads wider than 256, or no multiple of 8 | the same |
| models that cap attention's logits (Gemma 2), without flash-attn | the formula, one sequence at a time |

Without `Segments` (padded batches, sampling with a cache, models whose windows are in their masks alone) it is
transformers' own SDPA.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onecard.data.batches import TokenBatch
from onecard.models.trunk import trunk_of
from onecard.utils.errors import OnecardError

NAME = "onecard"
# What models pass to their attention that changes nothing in it
UNUSED = ("position_ids", "use_cache", "output_attentions", "output_router_logits", "output_hidden_states")
MOST_FLASH_DIMENSIONS, FLASH_STEP = 256, 8  # of one head: at most so many, and a multiple of this


# Of a packed row: transformers takes a mask of four dimensions as it is, and `attend` knows this one by its shape
PACKED_MASK = (1, 1, 1, 1)


@dataclass(frozen=True)
class Segments:
    """Which rows attend to which: queries of sequence i lie at `cu_queries[i]`, its keys at `cu_keys[i]` of `key_rows`.

    `lengths`, `key_lengths` are the same as plain integers; `key_rows` None: the keys are the rows themselves.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor
    key_rows: Tensor | None = None


def segments_of(batch: TokenBatch) -> Segments:
    """The attention pattern of a record of sequences."""
    if batch.shared is None:
        return Segments(batch.lengths, batch.lengths, batch.cu_seqlens, batch.cu_seqlens)
    spans = batch.shared.spans
    more = [stop - start for start, stop in spans]
    keys = tuple(own + shared for own, shared in zip(batch.lengths, more, strict=True))
    return Segments(batch.lengths, keys, batch.cu_seqlens, batch.shared.cu_seqlens, batch.shared.key_rows)


@dataclass(frozen=True)
class Score:
    """How a query and a key make a logit, and how far back a query looks (None: to the beginning)."""

    scale: float
    softcap: float | None = None
    window: int | None = None


_planned: list[torch.device] = []


@contextmanager
def planned_for(device: torch.device) -> Iterator[None]:
    """Inside, tensors on `meta` take the path that tensors on `device` would take."""
    _planned.append(device)
    try:
        yield
    finally:
        _planned.pop()


def target_of(tensor: Tensor) -> torch.device:
    """Where a tensor is, or is planned to be."""
    return _planned[-1] if tensor.is_meta and _planned else tensor.device


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention's kernels run there. A planned GPU is taken for one that has them."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return bool(_planned) or torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [b, H, n, d], key [b, G, m, d], value [b, G, m, e] -> [b, n, H, e].

    With `segments`, b is 1 and `attention_mask` is not looked at. Of `others` a `sliding_window` is known; what else
    says something of the attention (top-k indices, sinks, biases) raises.
    """
    known = {*UNUSED, "sliding_window", "is_causal"}
    unknown = [name for name, value in others.items() if value is not None and name not in known]
    if segments is not None and "sliding_window" not in others:
        unknown += windows_of(getattr(module, "config", None))
    if segments is not None and others.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise OnecardError(
            f"model: {type(module).__name__} has attention with {unknown[0]}, which onecard's own does not know; "
            "give --attn_implementation eager."
        )
    if segments is None and attention_mask is not None and attention_mask.shape == PACKED_MASK and key.shape[2] > 1:
        raise OnecardError(f"model: {type(module).__name__} is not told where packed sequences begin.")
    for name in UNUSED:
        others.pop(name, None)
    score = Score(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, others.pop("sliding_window", None))
    if segments is not None and dropout:
        raise OnecardError(
            f"model: {type(module).__name__} drops {dropout:g} of its attention in training, expected 0: old and new "
            "log-probs of one policy would differ."
        )
    if segments is None:
        return batched(module, query, key, value, attention_mask, score, dropout=dropout, **others), None
    if segments.key_rows is not None:
        key, value = (each.index_select(2, segments.key_rows) for each in (key, value))
    run = kernel_for(query, value, score)
    return run(query, key, value, segments, score).to(query.dtype).contiguous(), None


def windows_of(config: Any) -> list[str]:
    """Settings by which a model looks less far back than it could. Where it does not pass them on, only masks know."""
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    names = ("sliding_window", "attention_chunk_size")
    return [name for name in names if (getattr(config, name, None) or math.inf) < longest]


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, Score], Tensor]


def kernel_for(query: Tensor, value: Tensor, score: Score) -> Kernel:
    """The fastest of the kernels that can do it."""
    device = target_of(query)
    width = query.shape[-1]
    fits = width <= MOST_FLASH_DIMENSIONS and width % FLASH_STEP == 0 and value.shape[-1] <= width
    flash = has_flash(device, query.dtype) and fits
    if flash and importlib.util.find_spec("flash_attn") and not query.is_meta:
        return by_flash_attn
    if score.softcap is not None:
        return by_formula
    return by_torch_varlen if flash else by_sdpa


def flat(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> tuple[Any, ...]:
    """What both varlen kernels begin with: [n, H, d] each, where sequences begin, and the longest of them.

    Multi-head latent attention has values narrower than its queries, which the kernels do not take: zeros fill them up.
    """
    value = functional.pad(value, (0, query.shape[-1] - value.shape[-1]))
    heads_last = [each.squeeze(0).transpose(0, 1) for each in (query, key, value)]
    longest = max(segments.lengths), max(segments.key_lengths)
    return *heads_last, segments.cu_queries, segments.cu_keys, *longest


def by_flash_attn(query: Tensor, key: Tensor, value: Tensor, segments: Segments, score: Score) -> Tensor:
    """The flash-attn package."""
    flash_attn_varlen_func: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
    window = (-1, -1) if score.window is None else (score.window - 1, 0)
    out: Tensor = flash_attn_varlen_func(
        *flat(query, key, value, segments),
        softmax_scale=score.scale,
        causal=True,
        window_size=window,
        softcap=score.softcap or 0.0,
    )
    return out.unsqueeze(0)[..., : value.shape[-1]]


def by_torch_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, score: Score) -> Tensor:
    """PyTorch's own flash attention over sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # older versions share heads without being asked
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    back = -1 if score.window is None else score.window - 1
    attention: Callable[..., Any] = varlen_attn
    out: Tensor = attention(
        *flat(query, key, value, segments),
        scale=score.scale,
        window_size=(back, 0),
        **grouped,
    )
    return out.unsqueeze(0)[..., : value.shape[-1]]


def sees(queries: int, keys: int, score: Score, device: torch.device) -> Tensor:
    """Which keys each query attends to, bool [queries, keys]: the last query stands at the last key."""
    ahead = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return ahead if score.window is None else ahead.triu(keys - queries - score.window + 1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, score: Score) -> Tensor:
    """One sequence, [1, H, n, d]. A mask is only made where "each key up to its own place" does not say it."""
    queries, keys = query.shape[2], key.shape[2]
    if key.shape[1] != query.shape[1]:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    plain = queries == keys and (score.window is None or score.window >= keys)
    mask = None if plain else sees(queries, keys, score, query.device)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=plain, scale=score.scale
    )


def formula(query: Tensor, key: Tensor, value: Tensor, score: Score, visible: Tensor) -> Tensor:
    """softmax(cap(q k)) v in fp32, with `softcap * tanh(q k / softcap)` where there is one; [b, H, n, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    logits = (query @ key.transpose(2, 3)).float() * score.scale
    if score.softcap is not None:
        logits = score.softcap * torch.tanh(logits / score.softcap)
    weights = logits.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)
    return weights.to(value.dtype) @ value


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, run: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`run` of each sequence by itself; [1, n, H, d]."""
    pieces: Sequence[tuple[Tensor, ...]] = list(
        zip(
            query.split(segments.lengths, dim=2),
            key.split(segments.key_lengths, dim=2),
            value.split(segments.key_lengths, dim=2),
            strict=True,
        )
    )
    return torch.cat([run(*piece) for piece in pieces], dim=2).transpose(1, 2)


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, score: Score) -> Tensor:
    """PyTorch's attention, sequence by sequence."""
    return one_by_one(query, key, value, segments, lambda q, k, v: sdpa(q, k, v, score))


def by_formula(query: Tensor, key: Tensor, value: Tensor, segments: Segments, score: Score) -> Tensor:
    """The formula, sequence by sequence."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return formula(q, k, v, score, sees(q.shape[2], k.shape[2], score, q.device))

    return one_by_one(query, key, value, segments, run)


def newest(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, score: Score) -> Tensor:
    """One query of each row over all its keys, [b, H, 1, d] -> [b, 1, H, d].

    Heads that share keys are queries of them, and nothing is repeated: else every step would write and read a copy of
    the whole cache for each of these heads. Older releases of transformers do.
    """
    rows, heads, _, width = query.shape
    shared = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = functional.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=score.scale)
    return out.reshape(rows, 1, heads, value.shape[-1])


def batched(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, score: Score, **others: Any
) -> Tensor:
    """Padded rows, or one step of sampling: transformers' SDPA; the formula where it is capped."""
    if score.softcap is not None:
        seen = sees(query.shape[2], key.shape[2], score, query.device) if mask is None else mask
        return formula(query, key, value, score, seen).transpose(1, 2)
    one_for_all = mask is None or mask.shape[1] == 1
    if query.shape[2] == 1 and key.shape[1] != query.shape[1] and one_for_all and not others.get("dropout"):
        return newest(query, key, value, mask, score)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=score.scale, **others)[0]
    return out


def use_own_attention(model: Any) -> bool:
    """Give a model this attention, if it takes one by name and passes on what belongs to it. Says whether it did."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    trunk = trunk_of(model)
    passes_on = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(trunk.forward).parameters.values())
    capped = getattr(trunk.config, "attn_logit_softcapping", None) is not None
    known = capped or getattr(trunk, "_supports_sdpa", False)  # others have something of their own in their attention
    takes_a_name = getattr(trunk, "_supports_attention_backend", False)
    if not (passes_on and known and takes_a_name and has_plain_attention(trunk.config)):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.plain_attention = trunk.config._attn_implementation
    trunk.set_attn_implementation(NAME)
    return True


# transformers' caches of layers that attend to all keys before a query, or to a window of them, or keep nothing
PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


def cached_layers(config: Any) -> set[str]:
    """The kinds of layers of a model, by the names of the caches they keep."""
    from transformers import DynamicCache

    return {type(layer).__name__ for layer in DynamicCache(config=config).layers}


def has_plain_attention(config: Any) -> bool:
    """Whether all layers are attention to all keys before a query, or to a window of them.

    Others keep a state that goes on from token to token (Mamba, linear attention, short convolutions), or choose their
    keys (sparse attention).
    """
    return cached_layers(config) <= PLAIN_LAYERS


def chooses_keys(config: Any) -> bool:
    """Whether a layer attends to keys that it chooses: which of several that score alike depends on what is beside
    them, so such a model is exact one text a pass alone.
    """
    states = {name for name in cached_layers(config) if name.startswith("LinearAttention")}
    return not cached_layers(config) <= PLAIN_LAYERS | states


def has_own_attention(model: Any) -> bool:
    """Whether `use_own_attention` has been there."""
    return getattr(trunk_of(model).config, "_attn_implementation", "") == NAME


def use_plain_attention(model: Any) -> None:
    """Give a model back the attention that transformers chose for it."""
    if has_own_attention(model):
        trunk_of(model).set_attn_implementation(model.plain_attention)


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Inside, the model attends as transformers would have it."""
    own = has_own_attention(model)
    use_plain_attention(model)
    try:
        yield
    finally:
        if own:
            trunk_of(model).set_attn_implementation(NAME)


def takes_segments(model: Any) -> bool:
    """Whether packed sequences attend by `Segments`: this attention is told of all that the model's masks would say."""
    return has_own_attention(model) and (not windows_of(trunk_of(model).config) or passes_windows_on(model))


def structural_layout(model: Any, layout: str) -> str:
    """The fastest of the layouts that a model's structure allows, if `layout` is packed; else `layout`."""
    if layout != "packed" or takes_segments(model):
        return layout
    trunk = trunk_of(model)
    if chooses_keys(trunk.config):
        return "single"
    takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters
    return "restarted" if takes_positions and has_plain_attention(trunk.config) else "padded"


def passes_windows_on(model: Any) -> bool:
    """Whether every kind of attention layer hands on a `sliding_window`; `attend` stops at one that does not."""
    kinds = {type(module) for module in trunk_of(model).modules() if type(module).__name__.endswith("Attention")}
    try:
        return bool(kinds) and all("sliding_window=" in inspect.getsource(kind.forward) for kind in kinds)
    except OSError:  # a class without a source
        return False
