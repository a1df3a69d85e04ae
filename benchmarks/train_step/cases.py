"""Benchmark cases: models, lengths and settings, the most important first; and the least FLOPs of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from benchmarks.train_step.synthetic import Model
from onecard.config import Optim

LORA_RANK = 16


@dataclass(frozen=True)
class StepCase:
    """One setting of one algorithm.

    Lengths are in tokens. `mixed_lengths`: each length is drawn between half of it and all of it. `batch_size`: pairs
    of a step (DPO) or responses of an iteration (PPO). `memory_cap_gib`: limit of the CUDA allocator; 0: no limit.
    """

    name: str
    kind: str  # dpo | ppo
    model: Model
    prompt: int
    response: int
    batch_size: int
    micro_batch_size: int  # pairs or responses of a micro-batch
    mixed_lengths: bool = False
    gradient_checkpointing: bool = False
    precompute_ref_log_probs: bool = False
    load_in_4bit: bool = False
    optim: Optim = "adamw_torch"
    memory_cap_gib: float = 0.0
    micro_batch_tokens: int = 0  # a setting of onecard; TRL sizes micro-batches in pairs
    interleaved: bool = True  # all candidates are in memory and take turns; else one candidate at a time

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the trainers that differ between cases."""
        names = ("gradient_checkpointing", "precompute_ref_log_probs", "load_in_4bit", "optim")
        return {name: getattr(self, name) for name in names}


SMALL = Model("small, 32k words", hidden=256, layers=6, heads=8, kv_heads=4, intermediate=704, vocab=32000)
DEEP = Model("deep, 8k words", hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1408, vocab=8192)
WIDE = Model("wide, 128k words", hidden=256, layers=4, heads=8, kv_heads=4, intermediate=704, vocab=128256)
TINY = Model("tiny", hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocab=128)

LLAMA_8B = Model("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256)
QWEN_1_5B = Model("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151936, model_type="qwen2", tied=True)
QWEN_0_5B = Model("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, model_type="qwen2", tied=True)


def cpu_cases() -> list[StepCase]:
    """Cases for a CPU: fp32, small models. `deep` has most of its FLOPs in the layers, as large models do."""
    base = StepCase("small", "dpo", SMALL, prompt=256, response=128, batch_size=2, micro_batch_size=2)
    ppo = StepCase("small", "ppo", SMALL, prompt=64, response=64, batch_size=16, micro_batch_size=4, mixed_lengths=True)
    deep = replace(base, name="deep", model=DEEP)
    return [
        base,
        deep,
        replace(deep, name="deep, checkpointed", gradient_checkpointing=True),
        replace(deep, name="deep, mixed lengths", mixed_lengths=True),
        ppo,
        replace(base, name="small, checkpointed", gradient_checkpointing=True),
        replace(base, name="small, mixed lengths", mixed_lengths=True),
        replace(deep, name="deep, reference precomputed", precompute_ref_log_probs=True),
        replace(base, name="wide", model=WIDE, batch_size=1, micro_batch_size=1),
        replace(ppo, name="deep", model=DEEP),
        replace(ppo, name="small, one length", mixed_lengths=False),
    ]


def gpu_cases() -> list[StepCase]:
    """Cases for a GPU: bf16, real model shapes. First the README's claims, then memory caps, then smaller models.

    Cases with a memory cap have one length, the longest: the memory plan assumes it too.
    """
    dpo = StepCase(
        "8B, NF4", "dpo", LLAMA_8B, prompt=512, response=512, batch_size=4, micro_batch_size=1,
        gradient_checkpointing=True, load_in_4bit=True, optim="paged_adamw_8bit", micro_batch_tokens=2048,
    )  # fmt: skip
    ppo = replace(dpo, kind="ppo", batch_size=16)
    small: dict[str, Any] = {"load_in_4bit": False, "optim": "adamw_torch"}
    cards = [
        replace(case, name=name, memory_cap_gib=cap, interleaved=False, **more)
        for name, cap, more in (
            ("8B, NF4, 12 GB card", 10.5, {}),
            ("1.5B, NF4, under 5 GiB", 5.0, {"model": QWEN_1_5B}),
            ("8B, NF4, 16 GB card", 15.0, {}),
            ("8B, bf16, 24 GB card", 23.0, small),
        )
        for case in (ppo, dpo)
    ]
    return [
        dpo,
        *cards[:4],
        replace(ppo, mixed_lengths=True),
        replace(dpo, name="8B, bf16", interleaved=False, **small),
        *cards[4:],
        replace(dpo, name="8B, NF4, mixed lengths", mixed_lengths=True),
        *(
            replace(case, name=name, model=model, gradient_checkpointing=False, **small)
            for name, model in (("1.5B, bf16", QWEN_1_5B), ("0.5B, bf16", QWEN_0_5B))
            for case in (dpo, replace(ppo, mixed_lengths=True))
        ),
    ]


def tiny(case: StepCase) -> StepCase:
    """The same case at tiny sizes for a CPU, without a memory cap."""
    model = replace(TINY, model_type=case.model.model_type, tied=case.model.tied)
    return replace(
        case,
        model=model,
        prompt=24,
        response=16,
        batch_size=min(case.batch_size, 4),
        micro_batch_tokens=80,
        memory_cap_gib=0.0,
    )


def with_names(cases: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The cases with these names, or all. Raises UsageError for an unknown name."""
    known = dict.fromkeys(case.name for case in cases)
    for name in names:
        if name not in known:
            raise click.UsageError(f"--case {name!r}: expected one of {', '.join(map(repr, known))}.")
    return [case for case in cases if not names or case.name in names]


def select_cases(
    device: str, kinds: Sequence[str] = (), names: Sequence[str] = (), *, quick: bool = False, smoke: bool = False
) -> list[StepCase]:
    """The cases that the options select. `quick`: the first of each kind; `smoke`: GPU cases at tiny sizes."""
    found = with_names(gpu_cases() if smoke or device == "cuda" else cpu_cases(), names)
    found = [case for case in found if not kinds or case.kind in kinds]
    if quick:
        found = list({case.kind: case for case in reversed(found)}.values())[::-1]
    if not found:
        raise click.UsageError("--only and --case: no case matches both.")
    return [tiny(case) for case in found] if smoke else found


def layer_matrices(model: Model) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of one transformer layer: query, key, value, output; gate, up, down."""
    d, kv = model.hidden, model.hidden // model.heads * model.kv_heads
    return [(d, d), (d, kv), (d, kv), (d, d), (d, model.intermediate), (d, model.intermediate), (model.intermediate, d)]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sequence. A multiply-add counts two. Norms, softmax, RoPE and the optimizer are not counted.

    Recomputation by gradient checkpointing is not counted, and a shared prompt is counted for each of its sequences.
    So a step has the same number of FLOPs for every candidate.
    """

    trunk: int
    adapters: int
    attention: int
    head: int

    @classmethod
    def of(cls, model: Model, tokens: int, logit_rows: int) -> Flops:
        """`tokens` go through the layers; `logit_rows` of them are multiplied with the head."""
        matrices = layer_matrices(model)
        return cls(
            trunk=2 * tokens * model.layers * sum(i * o for i, o in matrices),
            # each matrix has factors in -> LORA_RANK -> out
            adapters=2 * tokens * model.layers * sum(LORA_RANK * (i + o) for i, o in matrices),
            # causal: each query has its own and all earlier keys, in two products (q k, and probabilities times v)
            attention=2 * 2 * model.hidden * model.layers * tokens * (tokens + 1) // 2,
            head=2 * logit_rows * model.hidden * model.vocab,
        )

    @property
    def reference(self) -> int:
        """A forward pass with the adapters off."""
        return self.trunk + self.attention + self.head

    @property
    def forward(self) -> int:
        """A forward pass of a role with an adapter."""
        return self.reference + self.adapters

    @property
    def backward(self) -> int:
        """Frozen matrices have input gradients only, adapters weight gradients too; attention's 2 products have 4."""
        return self.trunk + self.head + 2 * self.adapters + 2 * self.attention


def dpo_flops(model: Model, sequences: Sequence[tuple[int, int]], *, precomputed: bool) -> int:
    """FLOPs of a step on sequences of (tokens, response tokens): reference and policy forward, policy backward."""
    found = [Flops.of(model, tokens, logit_rows) for tokens, logit_rows in sequences]
    return sum(each.forward + each.backward + (0 if precomputed else each.reference) for each in found)
