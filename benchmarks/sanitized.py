"""Every Triton kernel of the library at a small size full of edges: what `benchmarks.sanitize` runs under a checker.

Vocabularies are primes, so that no block divides them and rows begin at any address; the numbers of rows divide by
nothing; masks have holes, a row of a batch has no token at all, and inputs are views with strides. Nothing here needs a
matrix product of the BLAS library: its kernels are not ours to check, and slow under a checker.

`python -m benchmarks.sanitized GROUP` runs one group here and compares it with the torch backend: then it prints READY.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ahead import name_of
from onecard_kernels import gae, linear_logprobs, logits_ppo_loss, ppo_loss, selective_log_softmax, value_loss
from onecard_kernels.launch import launch, recording
from onecard_kernels.logprob import online_softmax as online
from onecard_kernels.logprob.online_softmax import SLOPE, TileOutputs
from onecard_kernels.records import Head

ROUNDED = "rounded"  # outputs that were 16 bits wide
READY = "kernels agree with the torch backend"
V, FEW = 1031, 257  # primes; the first is a little over a block of the smallest size
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")

Outputs = dict[str, Tensor]
Case = Callable[[torch.device, str], Outputs]  # of the inputs' device and the backend


class Drawn:
    """Inputs drawn on the CPU, the same for every device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * std).to(dtype).to(self.device)

    def holes(self, *shape: int) -> Tensor:
        mask = torch.rand(*shape, generator=self.generator) > 0.3
        mask[0] = False
        return mask.to(self.device)

    def targets(self, *shape: int, below: int) -> Tensor:
        """The first and the last column among them."""
        ids = torch.randint(below, shape, generator=self.generator)
        ids.view(-1)[-1], ids.view(-1)[-2] = below - 1, 0
        return ids.to(self.device)


def selective(
    device: torch.device, backend: str, *, v: int, dtype: torch.dtype, strided: bool, entropy: bool, inplace: bool
) -> Outputs:
    drawn = Drawn(device)
    base = drawn.normal(2, 3 + strided, v, dtype=dtype, std=4.0).requires_grad_()
    logits = base[:, :-1] if strided else base * 1
    targets, mask = drawn.targets(2, 3, below=v), drawn.holes(2, 3)
    options: dict[str, Any] = {"entropy_requires_grad": entropy, "inplace_backward": inplace, "temperature": 0.7}
    out = selective_log_softmax(logits, targets, mask=mask, **options, backend=backend)
    value = out.logprobs if out.entropy is None else out.logprobs + 0.3 * out.entropy
    gradient = torch.autograd.grad((value * drawn.normal(2, 3)).sum(), base)[0]
    return {"value": value, "gradient": gradient}


EVERYTHING: dict[str, Any] = {"entropy_coef": 0.01, "kl_coef": 0.05, "dual_clip": 3.0}


def policy_of(drawn: Drawn, shape: tuple[int, ...]) -> dict[str, Any]:
    names = ("old_logprobs", "advantages", "ref_logprobs", "weights")
    return {"mask": drawn.holes(*shape), **{name: drawn.normal(*shape, std=0.3) for name in names}}


def from_logits(device: torch.device, backend: str, *, v: int, dtype: torch.dtype, more: dict[str, Any]) -> Outputs:
    drawn = Drawn(device)
    logits = drawn.normal(2, 4, v, dtype=dtype, std=0.3).requires_grad_()
    given = policy_of(drawn, (2, 3))
    given["old_logprobs"] = given["old_logprobs"] - torch.tensor(float(v)).log()  # of nearly even logits
    given["ref_logprobs"] = given["ref_logprobs"] - torch.tensor(float(v)).log()
    loss, metrics = logits_ppo_loss(
        logits[:, 1:], drawn.targets(2, 3, below=v), **given, **more, temperature=0.7, backend=backend
    )
    return {**metrics, "loss": loss, "gradient": torch.autograd.grad(loss * 6, logits)[0]}


def of_tokens(device: torch.device, backend: str, *, shape: tuple[int, int], more: dict[str, Any]) -> Outputs:
    """Both losses. The policy's inputs are a transposed view."""
    drawn = Drawn(device)
    logp = drawn.normal(*shape[::-1], std=0.3).T.requires_grad_()
    entropy = drawn.normal(*shape).requires_grad_() if more else None
    loss, metrics = ppo_loss(logp, **policy_of(drawn, shape), **more, entropy=entropy, backend=backend)
    leaves = [logp] if entropy is None else [logp, entropy]
    slopes = torch.autograd.grad(loss * logp.numel(), leaves)
    values = drawn.normal(*shape).requires_grad_()
    given = (drawn.normal(*shape), drawn.normal(*shape), drawn.holes(*shape))
    critic = value_loss(values, *given, normalizer=torch.tensor(7.0, device=device) if more else None, backend=backend)
    slope = torch.autograd.grad(critic.loss * logp.numel(), values)[0]
    found = {**metrics, **critic.metrics, "loss": loss, "critic": critic.loss, "critic's gradient": slope}
    return {**found, **{f"gradient {place}": x for place, x in enumerate(slopes)}}


def estimates(device: torch.device, backend: str, *, shape: tuple[int, int], bootstrapped: bool) -> Outputs:
    drawn = Drawn(device)
    rewards, values = drawn.normal(*shape[::-1]).T, drawn.normal(shape[0], 2 * shape[1])[:, ::2]
    last = drawn.normal(shape[0]) if bootstrapped else None
    out = gae(rewards, values, drawn.holes(*shape), gamma=0.99, lam=0.9, last_values=last, backend=backend)
    return out._asdict()


def head_of(drawn: Drawn, v: int, kind: str) -> Head:
    if kind == "plain":
        return Head()
    forbidden = (torch.arange(v) % 7 == 3).to(drawn.device)
    return Head(drawn.normal(v), temperature=1.3, logit_scale=0.8, softcap=5.0, forbidden=forbidden)


def exponentials(device: torch.device, backend: str, *, dtype: torch.dtype | None, kind: str, spread: bool) -> Outputs:
    """Two tiles of one row of products, in views that are wider; `dtype` None: in place."""
    from onecard_kernels.logprob import triton_exp

    function = triton_exp.exp_tile if backend == "triton" else online.exp_tile
    drawn, rows, first = Drawn(device), 5, FEW
    z, head = drawn.normal(rows, V + 4, std=4.0), head_of(drawn, V, kind)
    y = torch.tensor([0, first - 1, first, V - 1, 1 + 7 * 50]).to(device)
    state, wanted, outs = online.new_state(rows, z), TileOutputs(moment=True, square=True, direction=True), []
    state[SLOPE] = 1.0
    for part in (slice(0, first), slice(first, V)):
        tile = z[:, part]
        out = tile if dtype is None else torch.empty_like(tile, dtype=dtype)
        beside = torch.empty_like(tile, dtype=dtype or FP32) if spread else None
        function(tile, out, beside, y, part.start, state, head.columns(part), wanted)
        scale = online.statistics(state, head, wanted)
        probabilities = out.float() / scale.total.unsqueeze(1)
        outs.append(probabilities)
        if beside is not None:  # e (z - shift) of any shift, as p z
            outs.append(beside.float() / scale.total.unsqueeze(1) + probabilities * scale.shift.unsqueeze(1))
    done = online.statistics(state, head, wanted)
    assert done.entropy is not None
    assert done.log_sum_sq_probs is not None
    values = {"logprobs": done.logprobs, "entropy": done.entropy, "squares": done.log_sum_sq_probs}
    kind_of_out = ROUNDED if dtype is not None else "exponentials"
    return {**values, **{f"{kind_of_out} {place}": x for place, x in enumerate(outs)}}


def divergence(device: torch.device, backend: str, *, out: torch.dtype | None, kind: str) -> Outputs:
    from onecard_kernels.kl import torch_kl as passes
    from onecard_kernels.kl import triton as fused

    drawn, rows = Drawn(device), 5
    z, head = drawn.normal(rows, V + 4, std=4.0)[:, :V], head_of(drawn, V, kind)
    r, ref_bias = z + drawn.normal(rows, V), None if kind == "plain" else drawn.normal(V)
    into = None if out is None else z if out == FP32 else torch.empty_like(z, dtype=out)
    function = fused.kl_pass_ if backend == "triton" else passes.kl_pass_
    kl = function(z, r, head, ref_bias=ref_bias, out=into)
    return {"kl": kl} if into is None else {"kl": kl, "direction": into}


def tiles(device: torch.device, backend: str, *, dtype: torch.dtype, kind: str, splits: int | None) -> Outputs:
    """More rows than a tile has; hidden states and head in views of any strides."""
    from onecard_kernels.logprob import triton_tiled

    drawn, rows, d, v = Drawn(device), 131, 70, FEW
    hidden, weight = drawn.normal(rows, d + 3, dtype=dtype)[:, 1:-2], drawn.normal(d, v, dtype=dtype, std=0.5).T
    targets, head = drawn.targets(rows, below=v), head_of(drawn, v, kind)
    if backend == "torch":
        parts = {name: getattr(head, name) for name in ("temperature", "logit_scale", "softcap", "forbidden")}
        parts["bias"] = None if head.bias is None else head.bias.double()
        options: dict[str, Any] = {"return_entropy": True, "return_log_sum_sq_probs": True}
        found = tuple(linear_logprobs(hidden.double(), weight.double(), targets, **parts, **options, backend=backend))
    else:
        found = triton_tiled.tiled_statistics(hidden, weight, targets, head, entropy=True, sum_sq=True, splits=splits)
    return {name: x for name, x in zip(("logprobs", "entropy", "squares"), found, strict=True) if x is not None}


GROUPS: dict[str, dict[str, Case]] = {
    "log-softmax": {
        "a view, entropy": partial(selective, v=V, dtype=FP32, strided=True, entropy=True, inplace=False),
        "to the last byte": partial(selective, v=V, dtype=FP32, strided=False, entropy=False, inplace=False),
        "bf16": partial(selective, v=FEW, dtype=BF16, strided=False, entropy=True, inplace=False),
        "bf16, in place": partial(selective, v=FEW, dtype=BF16, strided=False, entropy=True, inplace=True),
    },
    "PPO from logits": {
        "everything": partial(from_logits, v=V, dtype=FP32, more=EVERYTHING),
        "bf16": partial(from_logits, v=FEW, dtype=BF16, more={}),
    },
    "PPO of tokens, GAE": {
        "two programs": partial(of_tokens, shape=(3, 347), more=EVERYTHING),
        "a few": partial(of_tokens, shape=(3, 5), more={}),
        "GAE": partial(estimates, shape=(5, 131), bootstrapped=True),
        "GAE of long rows": partial(estimates, shape=(2, 4099), bootstrapped=False),
    },
    "exponentials": {
        "bf16, spread": partial(exponentials, dtype=BF16, kind="plain", spread=True),
        "fp16, full head": partial(exponentials, dtype=FP16, kind="full", spread=False),
        "in place, full head, spread": partial(exponentials, dtype=None, kind="full", spread=True),
    },
    "vocabulary KL": {
        "bf16": partial(divergence, out=BF16, kind="plain"),
        "in place, full head": partial(divergence, out=FP32, kind="full"),
        "no direction": partial(divergence, out=None, kind="full"),
    },
    "tiled": {
        "bf16": partial(tiles, dtype=BF16, kind="plain", splits=None),
        "fp16, full head, three shares": partial(tiles, dtype=FP16, kind="full", splits=3),
        "fp32": partial(tiles, dtype=FP32, kind="plain", splits=2),
    },
}


def kernels_of(case: Case, device: torch.device) -> Iterator[str]:
    """The names of what it launches, without running them."""
    with recording() as launches:
        case(device, "triton")
    yield from map(name_of, launches)


def difference(got: Outputs, right: Outputs) -> str | None:
    """What the torch backend does not agree with."""
    assert got.keys() == right.keys()
    for name, expected in right.items():
        mine, true = got[name].detach().cpu().double(), expected.detach().double()
        off = float(torch.where(mine == true, 0.0, mine - true).abs().max())  # infinities are equal
        largest = float(true[true.isfinite()].abs().max())
        coarse = got[name].dtype.itemsize < 4 or name.startswith(ROUNDED)
        bar = 2.0**-6 * largest if coarse else 1e-4 * (1 + largest)
        if not off <= bar:
            return f"{name} is off by {off:.3g}, bar {bar:.3g}"
    return None


def run(group: str, device: torch.device) -> tuple[list[str], list[str]]:
    """(names of the kernels, what is wrong) of a group."""
    names: dict[str, None] = {}
    wrong = []
    for name, case in GROUPS[group].items():
        names |= dict.fromkeys(kernels_of(case, device))
        off = difference(case(device, "triton"), case(CPU, "torch"))
        wrong += [] if off is None else [f"{group}, {name}: {off}"]
    return list(names), wrong


# Faults that a checker has to see, or its silence about the others says nothing


def plant(tool: str, device: torch.device) -> None:
    """memcheck: one element past the end of a tensor is read. racecheck: warps write into each other's place."""
    from benchmarks import planted

    x = torch.arange(128, dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    launch(planted.FAULTS[tool], (1,), x, y, BLOCK=128)
    torch.cuda.synchronize(device)


def main(arguments: list[str]) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments[0] == "--plant":
        plant(arguments[1], device)
        print(f"{arguments[1]}: planted")
        return 0
    names, wrong = run(arguments[0], device)
    for line in wrong:
        print(line)
    print(f"{', '.join(names)}: {'wrong' if wrong else READY}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
