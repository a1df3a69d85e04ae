"""What operators say that they hold inside, against the profiler's memory events of the operator alone."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import peak_bytes
from onecard_kernels import linear_kl, linear_logprobs, linear_ppo_loss, selective_log_softmax
from onecard_kernels.logprob import tuning
from onecard_kernels.workspace import TABLE, workspace_bytes

os.environ.setdefault("KINETO_LOG_LEVEL", "9")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16

# One tile and several, of tokens and of columns; a vocabulary that is no multiple of a tile, nor of a wide load.
PLANS = {
    "auto": {},
    "chunked": {"implementation": "chunked"},
    "small chunks": {"implementation": "chunked", "rows": 100},
    "small tiles": {"implementation": "low_memory", "rows": 128, "columns": 640},
}
# tokens, width, vocabulary; dtypes of hidden states and head
MATERIALS = {
    "fp32": (300, 64, 5000, (FP32, FP32)),
    "bf16": (700, 128, 2049, (BF16, BF16)),
    "mixed": (700, 128, 2049, (FP32, BF16)),
}


class Watch(TorchDispatchMode):
    """Runs each of our operators under the profiler: `(name, bytes beyond its results, what it says of them)`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "onecard":
            return func(*args, **(kwargs or {}))
        results = []
        peak = peak_bytes(lambda: results.append(func(*args, **(kwargs or {}))), CPU)
        own = sum(each.numel() * each.element_size() for each in tree_leaves(results))
        name = func._schema.name
        self.found.append((name, peak - own, workspace_bytes(name, CPU, *args, **(kwargs or {}))))
        return results[0]


def check(run) -> set[str]:
    """Within 2 % or 64 KiB. Gives the names of the operators that ran."""
    with Watch() as watch:
        run()
    for name, real, said in watch.found:
        assert abs(real - said) <= max(0.02 * real, 64 << 10), f"{name}: holds {real}, says {said}"
    return {name for name, _, _ in watch.found}


def material(kind):
    tokens, width, vocabulary, dtypes = MATERIALS[kind]
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtypes[0])
    weight = (0.05 * torch.randn(vocabulary, width)).to(dtypes[1])
    return hidden, weight, torch.randint(0, vocabulary, (tokens,))


def grid(plain: tuple, full: tuple) -> pytest.MarkDecorator:
    """Every kind, plan and pair of options, most of them for `make test-all`.

    `make test` has the full options with every plan of mixed dtypes and with every dtype's own plan.
    """

    def marks(kind: str, plan: str, options: tuple) -> tuple:
        if options == full:
            return () if kind == "mixed" or plan == "auto" else (pytest.mark.grid,)
        return () if (kind, plan) == ("mixed", "auto") else (pytest.mark.grid,)

    cases = [(kind, plan, options) for kind in MATERIALS for plan in PLANS for options in (plain, full)]
    return pytest.mark.parametrize(
        ("kind", "plan", "options"), [pytest.param(*case, marks=marks(*case)) for case in cases]
    )


@grid((False, False, None), (True, True, 30.0))
@pytest.mark.parametrize("mode", ["forward", "frozen", "trained"])
def test_linear_logprobs(plan, kind, mode, options):
    masked, entropy, softcap = options
    hidden, weight, targets = material(kind)
    hidden.requires_grad_(mode != "forward")
    weight.requires_grad_(mode == "trained")
    mask = torch.ones(len(targets), dtype=torch.bool) if masked else None
    learns = mode != "forward"

    def run():
        found = linear_logprobs(
            hidden, weight, targets, mask=mask, softcap=softcap, return_entropy=entropy,
            entropy_requires_grad=entropy and learns,
        )  # fmt: skip
        if learns:
            (found.logprobs.sum() + (found.entropy.sum() if entropy else 0.0)).backward()

    with tuning.override(**PLANS[plan]):
        names = check(run)
    backward = {"forward": set(), "frozen": {"scale_directions"}, "trained": {"linear_logprobs_backward"}}[mode]
    assert names == {f"onecard::{name}" for name in {"linear_logprobs"} | backward}


@grid((0.0, None), (0.1, 30.0))
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_linear_ppo(plan, kind, trained, options):
    entropy_coef, softcap = options
    hidden, weight, targets = material(kind)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    old, advantages = -torch.rand(len(targets)), torch.randn(len(targets))
    mask = torch.ones(len(targets), dtype=torch.bool)

    def run():  # clips nothing: every token has a gradient
        linear_ppo_loss(
            hidden, weight, targets, old, advantages, mask, entropy_coef=entropy_coef, softcap=softcap, normalizer=5,
            clip_low=0.99, clip_high=1e9,
        ).loss.backward()  # fmt: skip

    with tuning.override(**PLANS[plan]):
        assert check(run) == {"onecard::linear_ppo", "onecard::scale_linear_ppo"}


@grid((False, False, None), (True, True, 30.0))
def test_linear_kl(plan, kind, options):
    learns, masked, softcap = options
    hidden, weight, targets = material(kind)
    reference = torch.randn_like(hidden)
    hidden.requires_grad_(learns)
    mask = torch.ones(len(targets), dtype=torch.bool) if masked else None

    def run():
        kl = linear_kl(hidden, reference, weight, mask=mask, softcap=softcap)
        if learns:
            kl.sum().backward()

    with tuning.override(**PLANS[plan]):
        assert "onecard::linear_kl" in check(run)


@pytest.mark.parametrize(("dtype", "tokens", "vocabulary"), [(FP32, 300, 5000), (BF16, 50, 60000)], ids=str)
@pytest.mark.parametrize(("masked", "entropy"), [(False, False), (True, True)])
def test_selective_log_softmax(dtype, tokens, vocabulary, masked, entropy):
    logits = torch.randn(tokens, vocabulary).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    mask = torch.ones(tokens, dtype=torch.bool) if masked else None

    def run():
        found = selective_log_softmax(logits, targets, mask=mask, return_entropy=entropy, entropy_requires_grad=entropy)
        (found.logprobs.sum() + (found.entropy.sum() if entropy else 0.0)).backward()

    assert check(run) == {"onecard::selective_forward", "onecard::selective_backward"}


def test_hidden_states_that_are_no_flat_view_are_gathered():
    hidden = torch.randn(2, 400, 64)[:, :-1].requires_grad_()
    weight, targets = 0.05 * torch.randn(5000, 64), torch.randint(0, 5000, (2, 399))
    with tuning.override(implementation="chunked", rows=100):
        check(lambda: linear_logprobs(hidden, weight, targets).logprobs.sum().backward())


def meta_arguments(mode: str, dtype: torch.dtype) -> tuple:
    hidden, weight = (torch.empty(size, dtype=dtype, device="meta") for size in ((2048, 4096), (128256, 4096)))
    targets = torch.empty(2048, dtype=torch.int64, device="meta")
    return hidden, weight, targets, None, None, None, 1.0, 1.0, None, False, False, False, mode, "auto"


def test_a_gpu_is_planned_for_without_one():
    """1024 tokens of 128256 logits in fp32 and, for the second product, in bf16; sums, saved statistics beside them."""
    said = workspace_bytes("onecard::linear_logprobs", CUDA, *meta_arguments("frozen", BF16))
    tile = 1024 * 128256 * (4 + 2)
    sums = 1024 * 4096 * 4 + 256 * 4096 * (2 + 4)  # over the head's rows; a block of 4 MiB of the targets' rows
    assert said == pytest.approx(tile + sums, rel=2e-3)


def test_a_forward_on_a_gpu_has_no_second_buffer():
    said = workspace_bytes("onecard::linear_logprobs", CUDA, *meta_arguments("forward", BF16))
    assert said == pytest.approx(1024 * 128256 * 4, rel=2e-3)


def test_a_smaller_chunk_takes_less_memory():
    with tuning.override(rows=128):
        said = workspace_bytes("onecard::linear_logprobs", CUDA, *meta_arguments("forward", BF16))
    assert said == pytest.approx(128 * 128256 * 4, rel=2e-2)


def test_operators_of_a_few_numbers_per_token_say_nothing():
    assert workspace_bytes("onecard::gae", CPU) == workspace_bytes("aten::mm", CPU) == 0


def test_no_tokens_hold_next_to_nothing():
    hidden, weight = torch.empty(0, 64), torch.empty(5000, 64)
    nothing = torch.empty(0, dtype=torch.int64)
    given = (hidden, weight, nothing, *meta_arguments("frozen", FP32)[3:])
    assert workspace_bytes("onecard::linear_logprobs", CPU, *given) < 1 << 20


def test_every_name_in_the_table_is_an_operator():
    for name in TABLE:
        assert hasattr(torch.ops.onecard, name.removeprefix("onecard::")), name
