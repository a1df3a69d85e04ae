"""Attention over packed sequences, registered in transformers as an attention implementation.

A batch's layout (`models.layout`) passes a `Segments` record to the trunk, and transformers passes it on to each layer.
Each sequence then attends to its own rows and to those of a prompt that it shares. There is no mask over all pairs of
tokens.

| where | what runs |
|---|---|
| GPU of compute capability 8.0 or newer, 16 bit | varlen kernel of flash-attn if installed, else PyTorch's |
| elsewhere: CPU, float32, older GPUs | PyTorch's `scaled_dot_product_attention`, one sequence at a time |
| head dimension above 256, or not a multiple of 8 | the same |
| models with a softcap on attention logits (Gemma 2), without flash-attn | eager attention, one sequence at a time |

Without `Segments` (padded batches, sampling with a cache, models that apply sliding windows by their masks only) it
calls transformers' SDPA.
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
# Keyword arguments that models pass to the attention function and that do not change its result
IGNORED_ARGUMENTS = ("position_ids", "use_cache", "output_attentions", "output_router_logits", "output_hidden_states")
MAX_FLASH_HEAD_DIM, FLASH_HEAD_DIM_MULTIPLE = 256, 8  # of flash attention's kernels


# Shape of the mask of a packed row: transformers passes 4-D masks on unchanged, and `attend` recognizes this shape
PACKED_MASK = (1, 1, 1, 1)


@dataclass(frozen=True)
class Segments:
    """Which rows attend to which. Queries of sequence i begin at `cu_queries[i]`, its keys at `key_rows[cu_keys[i]]`.

    `lengths`, `key_lengths`: numbers of queries and keys of each sequence, as integers; `cu_queries`, `cu_keys`
    [S + 1]: their cumulative sums; `key_rows` [m]: row of each key; None if the keys are the rows in their order.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor
    key_rows: Tensor | None = None


def segments_of(batch: TokenBatch) -> Segments:
    """The attention pattern of a token batch."""
    if batch.shared is None:
        return Segments(batch.lengths, batch.lengths, batch.cu_seqlens, batch.cu_seqlens)
    spans = batch.shared.spans
    prompts = [stop - start for start, stop in spans]
    keys = tuple(length + prompt for length, prompt in zip(batch.lengths, prompts, strict=True))
    return Segments(batch.lengths, keys, batch.cu_seqlens, batch.shared.cu_seqlens, batch.shared.key_rows)


@dataclass(frozen=True)
class AttentionOptions:
    """Scale and softcap of attention logits, and sliding window in tokens (None: no window)."""

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


def kernel_device(tensor: Tensor) -> torch.device:
    """A tensor's device; for a tensor on meta, the device that is planned for."""
    return _planned[-1] if tensor.is_meta and _planned else tensor.device


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention's kernels run on `device` in `dtype`. A planned GPU counts as one with these kernels."""
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

    With `segments`, b is 1 and `attention_mask` is ignored. Of `others`, `sliding_window` is supported; other arguments
    that change the attention (top-k indices, sinks, biases) raise `OnecardError`.
    """
    known = {*IGNORED_ARGUMENTS, "sliding_window", "is_causal"}
    unknown = [name for name, value in others.items() if value is not None and name not in known]
    if segments is not None and "sliding_window" not in others:
        unknown += windows_of(getattr(module, "config", None))
    if segments is not None and others.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise OnecardError(
            f"model: {type(module).__name__} has attention with {unknown[0]}, which onecard's attention does not "
            "support; give --attn_implementation eager."
        )
    if segments is None and attention_mask is not None and attention_mask.shape == PACKED_MASK and key.shape[2] > 1:
        raise OnecardError(
            f"model: {type(module).__name__} got a packed batch without `segments`, so a sequence would attend to the "
            "others; give --no_padding_free."
        )
    for name in IGNORED_ARGUMENTS:
        others.pop(name, None)
    options = AttentionOptions(
        query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, others.pop("sliding_window", None)
    )
    if segments is not None and dropout:
        raise OnecardError(
            f"model: {type(module).__name__} has attention dropout {dropout:g} in training mode, expected 0: old and "
            "new log-probs of one policy would differ."
        )
    if segments is None:
        return padded_attention(module, query, key, value, attention_mask, options, dropout=dropout, **others), None
    if segments.key_rows is not None:
        key, value = (tensor.index_select(2, segments.key_rows) for tensor in (key, value))
    run = kernel_for(query, value, options)
    return run(query, key, value, segments, options).to(query.dtype).contiguous(), None


def windows_of(config: Any) -> list[str]:
    """The window settings of a config that are smaller than its context.

    A model that does not pass its window to the attention function applies it by its masks only.
    """
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    names = ("sliding_window", "attention_chunk_size")
    return [name for name in names if (getattr(config, name, None) or math.inf) < longest]


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, AttentionOptions], Tensor]


def kernel_for(query: Tensor, value: Tensor, options: AttentionOptions) -> Kernel:
    """The fastest kernel that supports these tensors and options."""
    device = kernel_device(query)
    width = query.shape[-1]
    fits = width <= MAX_FLASH_HEAD_DIM and width % FLASH_HEAD_DIM_MULTIPLE == 0 and value.shape[-1] <= width
    flash = has_flash(device, query.dtype) and fits
    if flash and importlib.util.find_spec("flash_attn") and not query.is_meta:
        return by_flash_attn
    if options.softcap is not None:
        return by_eager
    return by_torch_varlen if flash else by_sdpa


def varlen_arguments(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> tuple[Any, ...]:
    """The first arguments of both varlen kernels: q, k, v [n, H, d], cumulative lengths, and longest lengths.

    Multi-head latent attention has values narrower than its queries, which the kernels do not support: the values are
    padded with zeros.
    """
    value = functional.pad(value, (0, query.shape[-1] - value.shape[-1]))
    tokens_first = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    longest = max(segments.lengths), max(segments.key_lengths)
    return *tokens_first, segments.cu_queries, segments.cu_keys, *longest


def by_flash_attn(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
    """The varlen kernel of the flash-attn package."""
    flash_attn_varlen_func: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
    window = (-1, -1) if options.window is None else (options.window - 1, 0)
    out: Tensor = flash_attn_varlen_func(
        *varlen_arguments(query, key, value, segments),
        softmax_scale=options.scale,
        causal=True,
        window_size=window,
        softcap=options.softcap or 0.0,
    )
    return out.unsqueeze(0)[..., : value.shape[-1]]


def by_torch_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
    """PyTorch's varlen flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # older versions support grouped heads without the argument
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    back = -1 if options.window is None else options.window - 1
    attention: Callable[..., Any] = varlen_attn
    out: Tensor = attention(
        *varlen_arguments(query, key, value, segments),
        scale=options.scale,
        window_size=(back, 0),
        **grouped,
    )
    return out.unsqueeze(0)[..., : value.shape[-1]]


def causal_mask(queries: int, keys: int, options: AttentionOptions, device: torch.device) -> Tensor:
    """Causal mask with the window, bool [queries, keys]; True: attended to. The last query is at the last key."""
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return causal if options.window is None else causal.triu(keys - queries - options.window + 1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """SDPA on one sequence, [1, H, n, d]. A mask is only created where `is_causal` does not describe it."""
    queries, keys = query.shape[2], key.shape[2]
    if key.shape[1] != query.shape[1]:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    causal = queries == keys and (options.window is None or options.window >= keys)
    mask = None if causal else causal_mask(queries, keys, options, query.device)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=options.scale
    )


def eager_attention(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, visible: Tensor) -> Tensor:
    """Eager attention, softmax(cap(scale q k)) v with the softmax in fp32; [b, H, n, d].

    cap(x) = softcap * tanh(x / softcap), or x without a softcap. `visible`: mask, True where a query attends to a key.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    logits = (query @ key.transpose(2, 3)).float() * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    weights = logits.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)
    return weights.to(value.dtype) @ value


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, run: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`run` on each sequence separately; [1, n, H, d]."""
    pieces: Sequence[tuple[Tensor, ...]] = list(
        zip(
            query.split(segments.lengths, dim=2),
            key.split(segments.key_lengths, dim=2),
            value.split(segments.key_lengths, dim=2),
            strict=True,
        )
    )
    return torch.cat([run(*piece) for piece in pieces], dim=2).transpose(1, 2)


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
    """`scaled_dot_product_attention`, one sequence at a time."""
    return one_by_one(query, key, value, segments, lambda q, k, v: sdpa(q, k, v, options))


def by_eager(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
    """Eager attention (`eager_attention`), one sequence at a time."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager_attention(q, k, v, options, causal_mask(q.shape[2], k.shape[2], options, q.device))

    return one_by_one(query, key, value, segments, run)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attention of a decoding step: one query per row over all its keys, [b, H, 1, d] -> [b, 1, H, d].

    Query heads that share a key-value head are passed as several queries of that head, so keys and values are not
    repeated. Older releases of transformers repeat them, which copies the whole cache for each query head in each step.
    """
    rows, heads, _, width = query.shape
    shared = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = functional.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=options.scale)
    return out.reshape(rows, 1, heads, value.shape[-1])


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    **others: Any,
) -> Tensor:
    """Attention over padded rows, or in a decoding step: transformers' SDPA, or `eager_attention` with a softcap."""
    if options.softcap is not None:
        visible = causal_mask(query.shape[2], key.shape[2], options, query.device) if mask is None else mask
        return eager_attention(query, key, value, options, visible).transpose(1, 2)
    same_for_heads = mask is None or mask.shape[1] == 1
    if query.shape[2] == 1 and key.shape[1] != query.shape[1] and same_for_heads and not others.get("dropout"):
        return decode_attention(query, key, value, mask, options)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=options.scale, **others)[0]
    return out


def use_onecard_attention(model: Any) -> bool:
    """Set onecard's attention on a model that looks attention up by name and passes its keyword arguments on.

    Returns whether it was set.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    trunk = trunk_of(model)
    parameters = inspect.signature(trunk.forward).parameters.values()
    has_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    capped = getattr(trunk.config, "attn_logit_softcapping", None) is not None
    # Models with a softcap do not support SDPA, but call a registered function. Others call one if they support SDPA.
    calls_registered = capped or getattr(trunk, "_supports_sdpa", False)
    has_backend = getattr(trunk, "_supports_attention_backend", False)
    if not (has_kwargs and calls_registered and has_backend and has_causal_attention(trunk.config)):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.transformers_attention = trunk.config._attn_implementation
    trunk.set_attn_implementation(NAME)
    return True


# transformers' cache classes of layers with causal attention, sliding-window attention, or no cache
CAUSAL_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


def cached_layers(config: Any) -> set[str]:
    """The kinds of layers of a model, as class names of their caches."""
    from transformers import DynamicCache

    return {type(layer).__name__ for layer in DynamicCache(config=config).layers}


def has_causal_attention(config: Any) -> bool:
    """Whether all layers have causal or sliding-window attention.

    Other layers have a recurrent state (Mamba, linear attention, short convolutions) or select keys (sparse attention).
    """
    return cached_layers(config) <= CAUSAL_LAYERS


def has_sparse_attention(config: Any) -> bool:
    """Whether a layer selects the keys that it attends to.

    Which of several keys with equal scores is selected depends on the rest of the batch, so such a model is only exact
    with one sequence per forward pass.
    """
    recurrent = {name for name in cached_layers(config) if name.startswith("LinearAttention")}
    return not cached_layers(config) <= CAUSAL_LAYERS | recurrent  # a layer of another kind may be sparse


def has_onecard_attention(model: Any) -> bool:
    """Whether `use_onecard_attention` has set onecard's attention on the model."""
    return getattr(trunk_of(model).config, "_attn_implementation", "") == NAME


def use_transformers_attention(model: Any) -> None:
    """Set the attention implementation that transformers chose for the model."""
    if has_onecard_attention(model):
        trunk_of(model).set_attn_implementation(model.transformers_attention)


@contextmanager
def transformers_attention(model: Any) -> Iterator[None]:
    """Inside, the model has the attention implementation that transformers chose."""
    restore = has_onecard_attention(model)
    use_transformers_attention(model)
    try:
        yield
    finally:
        if restore:
            trunk_of(model).set_attn_implementation(NAME)


def takes_segments(model: Any) -> bool:
    """Whether the model can run packed sequences with `Segments`: not if only its masks apply its sliding window."""
    return has_onecard_attention(model) and (not windows_of(trunk_of(model).config) or passes_windows_on(model))


def structural_layout(model: Any, layout: str) -> str:
    """The fastest layout that a model's structure allows, if `layout` is "packed"; else `layout`."""
    if layout != "packed" or takes_segments(model):
        return layout
    trunk = trunk_of(model)
    if has_sparse_attention(trunk.config):
        return "single"
    takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters
    # restarted: packed, with position ids that start again at 0 for each sequence
    return "restarted" if takes_positions and has_causal_attention(trunk.config) else "padded"


def passes_windows_on(model: Any) -> bool:
    """Whether every attention class of the model passes `sliding_window` on; otherwise `attend` raises."""
    kinds = {type(module) for module in trunk_of(model).modules() if type(module).__name__.endswith("Attention")}
    try:
        return bool(kinds) and all("sliding_window=" in inspect.getsource(kind.forward) for kind in kinds)
    except OSError:  # a class without source code
        return False
