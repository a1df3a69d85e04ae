"""Which functions launch Triton kernels, and at which real sizes: what `benchmarks.cards` compiles for every card.

Each configuration calls launching functions with tensors on the meta device, which have shapes and no memory, so the
sizes can be real ones. A new kernel needs a configuration here: a test compares this list with the package's source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from onecard_kernels.ppo.options import PolicyOptions, PolicyTokens
from onecard_kernels.records import Head

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32, "fp64": FP64}  # fp64 is what truths are computed in
TOKENS, CHUNK = 8192, 1024
TILE = (2048, 4096)  # tokens and vocabulary of a tile of the low-memory path
ROLLOUT = (64, 4096)  # sequences, and tokens of each
ODD = 50257  # GPT-2's vocabulary: rows begin at any address, so none of their loads can be wide
VOCABULARIES = (128256, 151936, 256000, 32000, ODD)
MODELS = ((4096, 128256), (896, 151936), (2304, 256000), (2048, 32000), (768, ODD))  # (hidden size, vocabulary)

Capability = tuple[int, int]
EVERY_CARD: Capability = (7, 5)
TENSOR_CORES: Capability = (8, 0)  # on a T4 Triton's dot spills, so its kernels are not offered there


@dataclass(frozen=True)
class Configuration:
    """`launch` gets a compute capability, for tiles are chosen by it. `least`: the smallest that the code is for.

    `typical`: what most users run, or what asks most of a card. A short run compiles these alone.
    """

    name: str
    launch: Callable[[Capability], object]
    typical: bool = False
    least: Capability = EVERY_CARD


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def combinations(options: Iterable[str], sizes: Iterable[Any]) -> Iterator[tuple[str, str, Any]]:
    """(option, dtype, size): everything of the first option; of the others what real use has, and what asks least."""
    first = None
    for option, dtype, at in product(options, DTYPES, sizes):
        first = option if first is None else first
        if option == first or not (dtype == "fp64" or at == ODD):
            yield option, dtype, at


def size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


PLAIN_HEAD, FULL_HEAD = "plain head", "bias, softcap, forbidden"
HEADS: dict[str, Callable[[int], Head]] = {
    PLAIN_HEAD: lambda v: Head(),
    "tempered head": lambda v: Head(temperature=0.7),
    "softcap": lambda v: Head(softcap=30.0),
    "bias, forbidden": lambda v: Head(meta(v, dtype=BF16), forbidden=meta(v, dtype=torch.bool)),
    FULL_HEAD: lambda v: Head(meta(v, dtype=BF16), softcap=30.0, forbidden=meta(v, dtype=torch.bool)),
}


def rows() -> Iterator[Configuration]:
    """Log-softmax of targets from logits, and its gradient."""
    from onecard_kernels.logprob import triton_rows

    def run(shape: tuple[int, ...], dtype: torch.dtype, masked: bool, entropy: bool, kind: str, _: Capability) -> None:
        logits = meta(*shape, dtype=dtype)
        if kind == "[:, :-1]":  # the logits of all tokens but the last
            logits = logits[:, :-1]
        targets = meta(*logits.shape[:-1], dtype=torch.int64)
        mask = meta(*targets.shape, dtype=torch.bool) if masked else None
        logprobs, entropies, stats = triton_rows.forward(logits, targets, mask, 1.0, entropy)
        grad_entropy = torch.empty_like(entropies) if entropy else None
        out = logits if kind == "in place" else None
        triton_rows.backward(logits, targets, mask, stats, torch.empty_like(logprobs), grad_entropy, 1.0, out=out)

    options = {"masked, entropy": (True, True), "masked": (True, False), "entropy": (False, True), "": (False, False)}
    for option, dtype, v in combinations(options, VOCABULARIES):
        typical = (option, dtype, v) == ("masked, entropy", "bf16", VOCABULARIES[0])
        launch = partial(run, (TOKENS, v), DTYPES[dtype], *options[option], "")
        yield Configuration(f"V={v} {dtype} {option}", launch, typical)
    for kind, shape in (
        ("in place", (TOKENS, VOCABULARIES[0])),
        ("[:, :-1]", (8, 1025, VOCABULARIES[0])),
        ("[:, :-1]", (2, 16385, VOCABULARIES[1])),  # a stride beyond 2^31
    ):
        yield Configuration(f"{size(shape)} {kind} bf16 masked", partial(run, shape, BF16, True, True, kind))


def logits_ppo() -> Iterator[Configuration]:
    """PPO's policy loss from logits."""
    from onecard_kernels.ppo import triton_logits

    def run(v: int, dtype: torch.dtype, options: dict[str, Any], _: Capability) -> None:
        logits = meta(TOKENS, v, dtype=dtype)
        targets, mask = meta(TOKENS, dtype=torch.int64), meta(TOKENS, dtype=torch.bool)
        _entropy, given = policy_arguments(options, meta(TOKENS), mask)  # the entropy comes from the logits
        normalizer = options.get("normalizer")
        loss, _totals, divisor, stats, slope, entropy_slope = triton_logits.forward(
            logits, targets, *given, 0.7, normalizer
        )
        grad = torch.empty_like(loss)
        triton_logits.backward(logits, targets, mask, divisor, stats, slope, entropy_slope, grad, 0.7)

    for option, dtype, v in combinations(POLICY, VOCABULARIES):
        typical = (option, dtype, v) == ("everything", "bf16", VOCABULARIES[0])
        yield Configuration(f"V={v} {dtype} {option}", partial(run, v, DTYPES[dtype], POLICY[option]), typical)


NO_OPTIONS = PolicyOptions(0.2, 0.2, dual_clip=None, entropy_coef=0.0, kl_coef=0.0, kl_estimator="k3")


def policy_arguments(
    given: dict[str, Any], x: Tensor, mask: Tensor
) -> tuple[Tensor | None, tuple[PolicyTokens, PolicyOptions]]:
    """The entropy and the records of a row of POLICY, every tensor of it `x`."""
    entropy, ref, weights = (x if given.get(name) else None for name in ("entropy", "ref_logprobs", "weights"))
    options = NO_OPTIONS._replace(**{name: given[name] for name in PolicyOptions._fields if name in given})
    old = None if given.get("on_policy") else x
    return entropy, (PolicyTokens(old, x, mask, ref, weights), options)


POLICY: dict[str, dict[str, Any]] = {
    "everything": {
        "entropy": True, "entropy_coef": 0.01, "ref_logprobs": True, "kl_coef": 0.05, "weights": True, "dual_clip": 3.0
    },
    "plain": {},
    "on policy": {"on_policy": True},
    "entropy": {"entropy": True, "entropy_coef": 0.01},
    "KL shown": {"ref_logprobs": True},
    "KL k1": {"ref_logprobs": True, "kl_coef": 0.05, "kl_estimator": "k1"},
    "KL k2": {"ref_logprobs": True, "kl_coef": 0.05, "kl_estimator": "k2"},
    "KL k3": {"ref_logprobs": True, "kl_coef": 0.05, "normalizer": 1000.0},
}  # fmt: skip


def tokens() -> Iterator[Configuration]:
    """PPO's policy and value losses of tokens, the sums of their programs, and their gradients."""
    from onecard_kernels.ppo import triton as launches

    def gradient(of: launches.Terms, dtype: torch.dtype) -> None:
        launches.scale(torch.empty_like(of.loss), of.divisor, of.grad, of.entropy_grad, dtype, dtype)

    def policy(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], _: Capability) -> None:
        x, mask = meta(*shape, dtype=dtype), meta(*shape, dtype=options.get("mask", torch.bool))
        entropy, given = policy_arguments(options, x, mask)
        normalizer, slope = options.get("normalizer"), options.get("needs_slope", True)
        gradient(launches.policy_terms(x, entropy, *given, normalizer=normalizer, needs_slope=slope), dtype)

    def value(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], _: Capability) -> None:
        x, mask = meta(*shape, dtype=dtype), meta(*shape, dtype=torch.bool)
        weights = x if options.get("weights") else None
        clip, slope = options.get("clip"), options.get("needs_slope", True)
        gradient(launches.value_terms(x, x, x, mask, clip=clip, weights=weights, needs_slope=slope), dtype)

    of_policy = {
        **POLICY,
        "entropy shown": {"entropy": True},
        "no gradient": {"needs_slope": False},
        "mask of fp32, divisor a tensor": {"mask": FP32, "normalizer": meta()},
    }
    of_value: dict[str, dict[str, Any]] = {
        "clip, weights": {"clip": 0.2, "weights": True},
        "clip": {"clip": 0.2},
        "plain": {},
        "clip, no gradient": {"clip": 0.2, "needs_slope": False},
    }
    for loss, run, table in (("policy", policy, of_policy), ("value", value, of_value)):
        for option, dtype, shape in combinations(table, (ROLLOUT, (TOKENS,))):
            typical = (option, dtype, shape) == (next(iter(table)), "fp32", ROLLOUT)
            launch = partial(run, shape, DTYPES[dtype], table[option])
            yield Configuration(f"{loss} {size(shape)} {dtype} {option}", launch, typical)


def advantages() -> Iterator[Configuration]:
    """Generalised advantage estimation."""
    from onecard_kernels.advantages import triton as gae

    def run(x: Tensor, mask: torch.dtype, bootstrapped: bool, _: Capability) -> None:
        last = meta(x.shape[0], dtype=x.dtype) if bootstrapped else None
        gae.launch_gae(x, x, meta(*x.shape, dtype=mask), last, 1.0, 0.95)

    options = {"bootstrapped": (torch.bool, True), "": (torch.bool, False), "mask of fp32": (FP32, False)}
    for option, dtype, shape in combinations(options, (ROLLOUT, (64, 1000), (16, 32768))):
        typical = (option, dtype, shape) == ("bootstrapped", "fp32", ROLLOUT)
        launch = partial(run, meta(*shape, dtype=DTYPES[dtype]), *options[option])
        yield Configuration(f"{size(shape)} {dtype} {option}", launch, typical)
    yield Configuration("4096 x 64 fp32 transposed", partial(run, meta(*ROLLOUT[::-1]).T, torch.bool, False))


def exponentials() -> Iterator[Configuration]:
    """The pass over a tile of products with the head, as the linear path uses it."""
    from onecard_kernels.logprob import triton_exp
    from onecard_kernels.logprob.online_softmax import SLOTS, TileOutputs

    def run(n: int, v: int, use: str, kind: str, _: Capability) -> None:
        dtype, with_spread, wanted = uses[use]
        z = meta(n, v)
        # An address of its own, which is 0 for all else on meta: by it the function tells that it writes over z.
        out = z if dtype is None else meta(n * v + 64, dtype=dtype)[64:].view(n, v)
        spread = meta(n, v, dtype=dtype or FP32) if with_spread else None
        state = meta(SLOTS, n)
        triton_exp.exp_tile(z, out, spread, meta(n, dtype=torch.int64), 0, state, HEADS[kind](v), wanted)

    uses = {
        "frozen bf16, entropy": (BF16, True, TileOutputs(entropy_sum=True, exponentials=True)),
        "frozen bf16": (BF16, False, TileOutputs(exponentials=True)),
        "frozen fp16": (FP16, False, TileOutputs(exponentials=True)),
        "trained, entropy": (None, True, TileOutputs(entropy_sum=True, exponentials=True)),
        "trained": (None, False, TileOutputs(exponentials=True)),
        "forward, entropy": (None, False, TileOutputs(entropy_sum=True, sum_sq=True)),
        "forward": (None, False, TileOutputs()),
    }
    shapes = (*((CHUNK, v) for v in VOCABULARIES), TILE, (TILE[0], ODD % TILE[1]))
    for kind, use, shape in product(HEADS, uses, shapes):
        if kind != FULL_HEAD and shape[1] % 16:
            continue
        typical = use in ("frozen bf16, entropy", "trained") and shape == (CHUNK, VOCABULARIES[0])
        typical = typical and kind in (PLAIN_HEAD, FULL_HEAD)
        yield Configuration(f"{size(shape)} {use}, {kind}", partial(run, *shape, use, kind), typical)


def tiled() -> Iterator[Configuration]:
    """Log-probabilities straight from hidden states, the logits on chip."""
    from onecard_kernels.logprob import triton_tiled

    def run(d: int, v: int, dtype: torch.dtype, kind: str, more: bool, card: Capability) -> None:
        hidden, weight, head = meta(TOKENS, d, dtype=dtype), meta(v, d, dtype=dtype), HEADS[kind](v)
        config = triton_tiled.config_for(card, dtype, head, 2 * more)
        targets = meta(TOKENS, dtype=torch.int64)
        triton_tiled.tiled_statistics(hidden, weight, targets, head, entropy=more, sum_sq=more, config=config)

    for kind, dtype, more, (d, v) in product(HEADS, ("bf16", "fp16", "fp32"), (True, False), MODELS):
        # D, V and fp16 hardly change the code: at most one thing differs from the plain head's full statistics.
        if (kind != PLAIN_HEAD or not more) + ((d, v) != MODELS[0]) + (dtype == "fp16") > 1:
            continue
        typical = kind in (PLAIN_HEAD, "softcap", FULL_HEAD) and dtype == "bf16" and more and (d, v) == MODELS[0]
        name = f"D={d} V={v} {dtype} {kind}{', entropy, sum of squares' if more else ''}"
        yield Configuration(name, partial(run, d, v, DTYPES[dtype], kind, more), typical, TENSOR_CORES)


def divergence() -> Iterator[Configuration]:
    """The exact KL over the vocabulary, from rows of logits."""
    from onecard_kernels.kl import triton as kl

    def run(n: int, v: int, out: torch.dtype | None, in_place: bool, kind: str, _: Capability) -> None:
        z, head = meta(n, v), HEADS[kind](v)
        into = z if in_place else None if out is None else meta(n, v, dtype=out)
        kl.kl_pass_(z, meta(n, v), head, ref_bias=head.bias, out=into)

    uses = {"bf16": (BF16, False), "fp16": (FP16, False), "in place": (None, True), "forward": (None, False)}
    for kind, (use, chosen), v in product(HEADS, uses.items(), VOCABULARIES):
        if kind != FULL_HEAD and v == ODD:
            continue
        typical = kind in (PLAIN_HEAD, FULL_HEAD) and use == "bf16" and v == VOCABULARIES[0]
        yield Configuration(f"{CHUNK} x {v} {use}, {kind}", partial(run, CHUNK, v, *chosen, kind), typical)


# One function for each file of kernels.
LAUNCHES: tuple[Callable[[], Iterator[Configuration]], ...] = (
    rows, logits_ppo, tokens, advantages, exponentials, tiled, divergence
)  # fmt: skip
