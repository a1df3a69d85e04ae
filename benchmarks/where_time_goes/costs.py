"""From digests to the largest avoidable costs, by rule: the same rule for every phase, and no number by hand.

    seconds of a phase = waits + copies + sampling + dequantisation + attention + products + all other operators
    products = what the FLOP count asks for at the measured rate + FLOPs beyond the count + products slower than that

Attention, and the products that the count asks for, are no cost that could be avoided; everything else stands in the
list. Of a rollout, whose steps read all weights for one token a row, products need the time of that reading.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.where_time_goes.digest import Digest

# The first that matches an operator's name decides
RULES = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("attention", r"scaled_dot_product|flash|efficient_attention|fmha|FlexAttention|attention"),
        ("dequantisation of the 4-bit base", r"dequant"),
        ("concatenation, as of the cache of keys and values", r"\bcat\b|CatArray|aten::stack"),
        (
            "drawing tokens, and log-probabilities",
            r"multinomial|exponential|log_softmax|searchsorted|cumsum|\bsort\b|topk|argmax",
        ),
        ("rows that leave, and other selections", r"aten::index|gather|scatter|embedding"),
        (
            "products",
            r"\b(mm|addmm|bmm|baddbmm|linear|matmul|addmv|mv|dot)_?\b|gemm|gemv|cutlass|nvjet|xmma|cublas",
        ),
        ("copies and casts", r"copy|Memcpy|to_copy|contiguous|clone|Memset|zero_|fill_"),
        (
            "views and allocations: dispatch alone",
            r"^(aten::)?(t|transpose|view|_unsafe_view|reshape|_reshape_alias|as_strided|unsqueeze|squeeze|slice|expand|"
            r"detach|permute|select|split\w*|narrow|alias|empty\w*|new_empty\w*|resize_|resolve_\w+|to|chunk|unbind)$",
        ),
        ("optimizer", r"adam|optimizer|foreach|lerp|addcdiv|addcmul"),
    )
)
OTHER = "elementwise and other operators"
WAITS = {"cpu": "outside of any operator: Python", "cuda": "the GPU waits for its next kernel: launches and Python"}
NEEDED = ("attention", "products")


def kind(operator: str) -> str:
    return next((name for name, pattern in RULES if pattern.search(operator)), OTHER)


@dataclass(frozen=True)
class Phase:
    """A phase of the timed iteration, and a digest of it (or of a part of it) with the seconds that this part takes
    when nobody profiles it. `flops`: what the phase cannot do without.
    """

    name: str
    seconds: float
    flops: int
    part_seconds: float
    digest: Digest
    reading: float = 0.0  # seconds in which the part's weights can be read: no product is done before

    @property
    def scale(self) -> float:
        """From what was profiled to the timed phase: of calls and FLOPs."""
        return self.seconds / self.part_seconds if self.part_seconds else 0.0

    def busy(self, device: str) -> float:
        """The share of the time in which an operator ran, or a kernel on a GPU.

        A profiler slows the host down, operators and what is between them alike, and not a GPU's kernels: those are
        held against the seconds without it.
        """
        whole = self.part_seconds if device == "cuda" else self.digest.seconds
        return min(self.digest.busy / whole, 1.0) if whole else 0.0

    def seconds_of(self, operator: float, device: str) -> float:
        """An operator's profiled seconds as seconds of the timed phase. Operators of several threads, or kernels of
        several streams, run at once: each has its share of the time in which any of them ran.
        """
        total = sum(each.seconds for each in self.digest.operators.values())
        return operator / total * self.busy(device) * self.seconds if total else 0.0


@dataclass(frozen=True)
class Cost:
    """Seconds of an iteration that a rule calls avoidable."""

    phase: str
    what: str
    seconds: float


def by_kind(phase: Phase, device: str) -> dict[str, float]:
    """Seconds of the timed phase by what they went into, waiting included."""
    found: dict[str, float] = {}
    for name, operator in phase.digest.operators.items():
        found[kind(name)] = found.get(kind(name), 0.0) + phase.seconds_of(operator.seconds, device)
    return {**found, WAITS[device]: (1 - phase.busy(device)) * phase.seconds}


def costs_of(phase: Phase, device: str, rate: float) -> list[Cost]:
    """A phase's; `rate`: FLOP/s of bare products."""
    seconds = by_kind(phase, device)
    found = [Cost(phase.name, what, taken) for what, taken in seconds.items() if what not in NEEDED]
    done = phase.digest.flops * phase.scale
    beyond = 0.0 if phase.reading else max(done - phase.flops, 0.0) / rate
    slow = seconds.get("products", 0.0) - max(done / rate, phase.reading * phase.scale)
    found += [
        Cost(phase.name, "products beyond the count: what is recomputed, or run on padding", beyond),
        Cost(phase.name, "products slower than bare ones, or than the reading of weights", slow),
    ]
    return [cost for cost in found if cost.seconds > 0]


def largest(phases: Sequence[Phase], device: str, rate: float, count: int) -> list[Cost]:
    """The costs of all phases, the largest first."""
    found = [cost for phase in phases for cost in costs_of(phase, device, rate)]
    return sorted(found, key=lambda cost: -cost.seconds)[:count]
