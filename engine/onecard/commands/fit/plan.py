"""The memory plan of a run: what each phase holds at most, on the device that it is planned for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.commands.fit.phases import Lengths, Rehearsal, has_reference
from onecard.commands.fit.tracker import PAGED, Phase, Tracker
from onecard.commands.fit.weights import META, cast_of, load_peak, plan_base, plan_roles
from onecard.commands.fit.workspaces import workspaces
from onecard.config import PPOConfig, TrainConfig
from onecard.models.attention import has_own_attention, planned_for
from onecard.models.memory_options import head_chunks
from onecard.models.trunk import trunk_of
from onecard.utils.progress import say

SHORT = (16, 32)  # tokens of the texts that models are planned for which run token by token
WEIGHTS, ADAPTERS = "weights", "adapters and heads"


@dataclass(frozen=True)
class Plan:
    """Bytes of a run. `phases` in their order; `paged`: optimizer states that leave the card when it is full."""

    parameters: int
    trained: int
    phases: tuple[Phase, ...]
    paged: int
    seconds: float

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return max(phase.peak for phase in self.phases)

    @property
    def highest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)


@contextmanager
def target_attention(target: torch.device) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` is the operator that the target device would run.

    On meta it would be taken apart into products and a softmax over all pairs of tokens. The function itself is
    replaced: a mode is not there when a backward recomputes a checkpointed layer.
    """
    own = functional.scaled_dot_product_attention

    def run(query: Tensor, *given: Any, **more: Any) -> Tensor:
        return attention(target, query, *given, **more) if query.is_meta else own(query, *given, **more)

    functional.scaled_dot_product_attention = run
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def attention(
    target: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` chooses: flash attention; the memory-efficient one where there is a mask."""
    ops, mask = torch.ops.aten, attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), float("-inf"))
    if target.type == "cpu":
        flash = ops._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if mask is None and half:
        out = ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
        return out[0]
    if key.shape[1] != query.shape[1]:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    grows = torch.is_grad_enabled() and query.requires_grad
    efficient = ops._scaled_dot_product_efficient_attention
    return efficient(query, key, value, mask, grows, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def planning(target: torch.device, tracker: Tracker) -> Iterator[None]:
    """Inside, tensors on meta take the ways of the target device, and are counted."""
    with planned_for(target), target_attention(target), tracker:
        yield


class OperatorCount(TorchDispatchMode):
    """How many operators run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def runs_token_by_token(model: Any, config: TrainConfig, target: torch.device) -> bool:
    """Whether a model's forward takes more operators for more tokens, as Python loops over a recurrence do."""
    base = plan_base(model, config, target)
    if has_own_attention(base):
        return False
    trunk = trunk_of(base)
    counts = []
    for tokens in SHORT:
        with torch.no_grad(), planning(target, Tracker(target, workspaces())), OperatorCount() as operators:
            trunk(input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=META), use_cache=False)
        counts.append(operators.count)
    return counts[1] > 1.5 * counts[0]


def shortened(config: TrainConfig, lengths: Lengths, tokens: int) -> tuple[TrainConfig, Lengths]:
    """The settings of a run whose texts have so many tokens, with as many texts in each pass as before."""
    prompt = max(1, lengths.prompt * SHORT[0] // lengths.total) * tokens // SHORT[0]
    short, share = Lengths(prompt, tokens - prompt), tokens / lengths.total
    config = replace(config, micro_batch_tokens=math.ceil(config.micro_batch_tokens * share))
    if isinstance(config, PPOConfig):
        cache = config.rollout_cache_gib * share
        config = replace(config, response_length=short.response, rollout_cache_gib=cache)
    return config, short


def extrapolated(plans: Sequence[Plan], tokens: int) -> Plan:
    """What plans for texts of `SHORT` tokens come to at `tokens`: every size is a constant and so much a token."""

    def line(one: int, other: int) -> int:
        return round(one + (other - one) * (tokens - SHORT[0]) / (SHORT[1] - SHORT[0]))

    one, other = plans
    phases = tuple(
        replace(
            last,
            before=line(first.before, last.before),
            peak=line(first.peak, last.peak),
            parts={kind: line(first.parts.get(kind, 0), size) for kind, size in last.parts.items()},
        )
        for first, last in zip(one.phases, other.phases, strict=True)
    )
    return replace(other, phases=phases, seconds=one.seconds + other.seconds)


def make_plan(
    model: Any,
    config: TrainConfig,
    lengths: Lengths,
    target: torch.device,
    *,
    own_reference: bool = False,
) -> Plan:
    """The plan of a training command with these settings, for a transformers config of its base.

    A model whose forward is a loop over tokens would take minutes: it is planned for short texts, and the plan goes on
    from these in a straight line.
    """
    if lengths.total > 2 * SHORT[1] and runs_token_by_token(model, config, target):
        say(f"fit: the model runs token by token; planned for {SHORT[0]} and {SHORT[1]} tokens, and on from there.")
        settings = [shortened(config, lengths, tokens) for tokens in SHORT]
        plans = [plan_once(model, *each, target, own_reference=own_reference) for each in settings]
        return extrapolated(plans, lengths.total)
    return plan_once(model, config, lengths, target, own_reference=own_reference)


def plan_once(
    model: Any, config: TrainConfig, lengths: Lengths, target: torch.device, *, own_reference: bool = False
) -> Plan:
    """The plan of texts as long as `lengths` say."""
    began = time.perf_counter()
    if target.type == "cpu":  # there is nowhere to offload to
        config = replace(config, activation_offloading=False)
    tracker = Tracker(target, workspaces())
    with planning(target, tracker), head_chunks(config.head_chunk_tokens):
        with tracker.making(WEIGHTS):
            base = plan_base(model, config, target, train_all=not config.use_peft)
            cast = cast_of(config, reference=has_reference(config), own_reference=own_reference)
            whole = "reference" in cast.adapters and not config.use_peft
            copy = plan_base(model, config, target, train_all=True) if whole else None
        load = Phase("load", 0, tracker.current + load_peak(base), dict(tracker.by_kind), "quantization")
        parameters = tracker.by_kind[WEIGHTS]
        with tracker.making(ADAPTERS):
            roles = plan_roles(base, copy, config, cast).train()
        del copy  # the roles have it, and let it go where its log-probs are known
        rehearsal = Rehearsal(tracker, roles, config, lengths)
        phases = rehearsal.run()
        trained = sum(parameter.numel() for parameter in rehearsal.parameters)
        paged = tracker.by_kind.get(PAGED, 0)
    return Plan(parameters, trained, (load, *phases), paged, time.perf_counter() - began)
