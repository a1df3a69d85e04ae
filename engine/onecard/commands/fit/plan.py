"""The memory plan of a run: the peak of each phase, on the device that the run is planned for."""

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

from onecard.commands.fit.phases import Lengths, Rehearsal, setup_of
from onecard.commands.fit.tracker import PAGED, Phase, Tracker
from onecard.commands.fit.weights import META, load_peak, plan_base, plan_roles
from onecard.commands.fit.workspaces import workspaces
from onecard.config import PPOConfig, TrainConfig
from onecard.models.attention import has_onecard_attention, planned_for
from onecard.models.memory_options import head_chunks
from onecard.models.trunk import trunk_of
from onecard.utils.progress import say

SHORT = (16, 32)  # sequence lengths in tokens that a plan is extrapolated from, for models that loop over tokens
WEIGHTS, ADAPTERS = "weights", "adapters and heads"


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run, in bytes.

    `parameters`: the base's weights; `trained`: number of trained parameters (a count, not bytes); `phases`: in the
    order in which they run; `paged`: optimizer states that are paged to the host when the card is full; `seconds`:
    the time that planning took.
    """

    parameters: int
    trained: int
    phases: tuple[Phase, ...]
    paged: int
    seconds: float

    @property
    def peak(self) -> int:
        """The largest number of bytes that is allocated at once."""
        return max(phase.peak for phase in self.phases)

    @property
    def highest(self) -> Phase:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda phase: phase.peak)


@contextmanager
def target_attention(target: torch.device) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` is the operator that the target device would run.

    On meta, PyTorch decomposes it into matrix products and a softmax over all pairs of tokens. The function itself is
    patched, because a dispatch mode is not active when a backward recomputes a checkpointed layer.
    """
    original = functional.scaled_dot_product_attention

    def run(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attention(target, query, *args, **kwargs) if query.is_meta else original(query, *args, **kwargs)

    functional.scaled_dot_product_attention = run
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


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
    """The operator that `scaled_dot_product_attention` selects on `target`.

    CPU: flash attention. GPU: flash attention in 16 bit without a mask, else memory-efficient attention.
    """
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
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    compute_log_sumexp = torch.is_grad_enabled() and query.requires_grad
    efficient = ops._scaled_dot_product_efficient_attention
    return efficient(query, key, value, mask, compute_log_sumexp, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def planning(target: torch.device, tracker: Tracker) -> Iterator[None]:
    """Inside, tensors on meta take the code paths of the target device, and `tracker` counts their memory."""
    with planned_for(target), target_attention(target), tracker:
        yield


class OperatorCount(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def runs_token_by_token(model: Any, config: TrainConfig, target: torch.device) -> bool:
    """Whether a model's forward runs more operators for more tokens, as a Python loop over a recurrence does."""
    base = plan_base(model, config, target)
    if has_onecard_attention(base):
        return False
    trunk = trunk_of(base)
    counts = []
    for tokens in SHORT:
        with torch.no_grad(), planning(target, Tracker(target, workspaces())), OperatorCount() as operators:
            trunk(input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=META), use_cache=False)
        counts.append(operators.count)
    return counts[1] > 1.5 * counts[0]


def shortened(config: TrainConfig, lengths: Lengths, tokens: int) -> tuple[TrainConfig, Lengths]:
    """The settings of a run with sequences of `tokens` tokens and the same number of sequences in each pass."""
    prompt = max(1, lengths.prompt * SHORT[0] // lengths.total) * tokens // SHORT[0]
    short, share = Lengths(prompt, tokens - prompt), tokens / lengths.total
    config = replace(config, micro_batch_tokens=math.ceil(config.micro_batch_tokens * share))
    if isinstance(config, PPOConfig):
        cache = config.rollout_cache_gib * share
        config = replace(config, response_length=short.response, rollout_cache_gib=cache)
    return config, short


def extrapolated(plans: Sequence[MemoryPlan], tokens: int) -> MemoryPlan:
    """Extrapolate two plans, for sequences of `SHORT` tokens, to `tokens`: every size is linear in the length."""

    def extrapolate(short: int, long: int) -> int:
        return round(short + (long - short) * (tokens - SHORT[0]) / (SHORT[1] - SHORT[0]))

    short_plan, long_plan = plans
    phases = tuple(
        replace(
            long,
            before=extrapolate(short.before, long.before),
            peak=extrapolate(short.peak, long.peak),
            parts={kind: extrapolate(short.parts.get(kind, 0), size) for kind, size in long.parts.items()},
        )
        for short, long in zip(short_plan.phases, long_plan.phases, strict=True)
    )
    return replace(long_plan, phases=phases, seconds=short_plan.seconds + long_plan.seconds)


def plan_memory(
    model: Any,
    config: TrainConfig,
    lengths: Lengths,
    target: torch.device,
    *,
    from_adapter: bool = False,
) -> MemoryPlan:
    """The memory plan of a training command. `model`: transformers config of the base.

    `from_adapter`: training starts from an adapter, so the reference is a second adapter. A model whose
    forward is a loop over tokens would take minutes to plan: it is planned for two short lengths, and the plan is
    extrapolated linearly.
    """
    if lengths.total > 2 * SHORT[1] and runs_token_by_token(model, config, target):
        say(f"fit: the model runs token by token; planned for {SHORT[0]} and {SHORT[1]} tokens, then extrapolated.")
        settings = [shortened(config, lengths, tokens) for tokens in SHORT]
        plans = [
            plan_once(model, short_config, short, target, from_adapter=from_adapter) for short_config, short in settings
        ]
        return extrapolated(plans, lengths.total)
    return plan_once(model, config, lengths, target, from_adapter=from_adapter)


def plan_once(
    model: Any, config: TrainConfig, lengths: Lengths, target: torch.device, *, from_adapter: bool = False
) -> MemoryPlan:
    """The plan for sequences of these lengths, without extrapolation."""
    began = time.perf_counter()
    if target.type == "cpu":  # activations are in host memory already
        config = replace(config, activation_offloading=False)
    tracker = Tracker(target, workspaces())
    with planning(target, tracker), head_chunks(config.head_chunk_tokens):
        with tracker.making(WEIGHTS):
            base = plan_base(model, config, target, train_all=not config.use_peft)
            setup = setup_of(config, from_adapter=from_adapter)
            copy = plan_base(model, config, target, train_all=True) if setup.reference_copy else None
        load = Phase("load", 0, tracker.current + load_peak(base), dict(tracker.by_kind), "quantization")
        parameters = tracker.by_kind[WEIGHTS]
        with tracker.making(ADAPTERS):
            roles = plan_roles(base, copy, config, setup).train()
        del copy  # `roles` owns the copy and frees it once its log-probs are precomputed
        rehearsal = Rehearsal(tracker, roles, config, lengths)
        phases = rehearsal.run()
        trained = sum(parameter.numel() for parameter in rehearsal.parameters)
        paged = tracker.by_kind.get(PAGED, 0)
    return MemoryPlan(parameters, trained, (load, *phases), paged, time.perf_counter() - began)
