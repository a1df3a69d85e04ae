"""One graph from a trunk through each loss to the trunk's gradients: fullgraph, dynamic sizes, changing numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from onecard_kernels import (
    cpo_loss,
    dispatch,
    gae,
    group_advantages,
    kto_loss,
    linear_dpo_loss,
    linear_kl,
    linear_logprobs,
    linear_ppo_loss,
    logits_ppo_loss,
    masked_whiten,
    orpo_loss,
    ppo_loss,
    selective_log_softmax,
    sequence_sums,
    simpo_loss,
    token_kl,
    value_loss,
)
from onecard_kernels.logprob import tuning
from tests.grid import grid
from tests.kernels.backends import BACKENDS, needs_triton

B, T, D, V = 4, 6, 4, 19
EPS = torch.finfo(torch.float32).eps
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with tuning.override(rows=5):
        yield
    torch.compiler.reset()


def batch(length: int = T) -> Batch:
    shape = (B, length)
    rows = torch.arange(B).unsqueeze(1).expand(shape)
    mask = torch.arange(length) < torch.tensor([length, 2, length - 1, 1]).unsqueeze(1)
    return {
        "x": torch.randn(*shape, D),
        "ref_hidden": torch.randn(*shape, D),
        "weight": torch.randn(V, D),
        "trained": torch.randn(V, D, requires_grad=True),
        "bias": torch.randn(V),
        "targets": torch.randint(V, shape),
        "old": -torch.rand(shape) - 2,
        "advantages": torch.randn(shape),
        "mask": mask,
        "weights": torch.rand(shape),
        "ids": torch.where(mask, rows, -1).contiguous(),
        "ref_logps": torch.randn(B) - 4,
        "lengths": mask.sum(1),
        "desirable": torch.tensor([True, False, True, False]),
        "kl": torch.tensor(0.1),
        "scores": torch.randn(B),
    }


def logps(h: Tensor, b: Batch, backend: str) -> Tensor:
    return linear_logprobs(h, b["weight"], b["targets"], mask=b["mask"], backend=backend).logprobs


def sums(h: Tensor, b: Batch, backend: str) -> tuple[Tensor, Tensor]:
    chosen, rejected = sequence_sums(logps(h, b, backend), b["ids"], B).split(B // 2)
    return chosen, rejected


def lengths(b: Batch) -> tuple[Tensor, Tensor]:
    chosen, rejected = b["lengths"].split(B // 2)
    return chosen, rejected


# Each takes hidden states, a batch, the backend, and a number that changes from call to call.
Step = Callable[[Tensor, Batch, str, float], Tensor]


def frozen(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    kw: dict[str, Any] = {"mask": b["mask"], "entropy_requires_grad": True, "return_log_sum_sq_probs": True}
    out = linear_logprobs(h, b["weight"], b["targets"], bias=b["bias"], temperature=number, backend=backend, **kw)
    assert out.entropy is not None
    assert out.log_sum_sq_probs is not None
    return (out.logprobs * (1 + out.log_sum_sq_probs) + 0.1 * out.entropy).sum()


def trained(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    kw: dict[str, Any] = {"softcap": 5.0, "logit_scale": number, "entropy_requires_grad": True}
    out = linear_logprobs(h, b["trained"], b["targets"], backend=backend, **kw)
    assert out.entropy is not None
    return (out.logprobs + 0.1 * out.entropy).sum()


def logits(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    z = h @ b["weight"].T
    out = selective_log_softmax(z, b["targets"], temperature=number, entropy_requires_grad=True, backend=backend)
    assert out.entropy is not None
    return (out.logprobs + number * out.entropy).sum()


def kl(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    return linear_kl(h, b["ref_hidden"], b["weight"], mask=b["mask"], temperature=number, backend=backend).sum()


def linear_ppo(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    rest = (b["targets"], b["old"], b["advantages"], b["mask"])
    kw: dict[str, Any] = {"ref_logprobs": b["old"], "kl_coef": 0.1, "entropy_coef": 0.01, "weights": b["weights"]}
    return linear_ppo_loss(h, b["weight"], *rest, clip_low=number, clip_high=number, **kw, backend=backend).loss


def linear_ppo_trained(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    rest = (b["targets"], b["old"], b["advantages"], b["mask"])
    return linear_ppo_loss(h, b["trained"], *rest, clip_high=number, normalizer=number + 3, backend=backend).loss


def logits_ppo(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    rest = (b["targets"], b["old"], b["advantages"], b["mask"])
    return logits_ppo_loss(
        h @ b["weight"].T, *rest, clip_low=number, entropy_coef=number, normalizer=b["mask"].sum(), backend=backend
    ).loss


def ppo(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    kw: dict[str, Any] = {"dual_clip": 3.0, "ref_logprobs": b["old"], "kl_coef": number, "kl_estimator": "k2"}
    advantages = masked_whiten(b["advantages"], b["mask"])
    policy = ppo_loss(-h.square().sum(-1), b["old"], advantages, b["mask"], clip_high=number, **kw, backend=backend)
    return policy.loss + policy.metrics["policy/kl"]


def whole_ppo(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    """Rewards to advantages to both losses."""
    values = h.mean(-1)
    old_values = values.detach() - 0.05
    targets = gae(b["advantages"], old_values, b["mask"], gamma=0.99, lam=number, backend=backend)
    rest = (b["targets"], b["old"], masked_whiten(targets.advantages, b["mask"]), b["mask"])
    policy = linear_ppo_loss(h, b["weight"], *rest, clip_low=number, entropy_coef=0.01, backend=backend)
    fit = value_loss(values, old_values, targets.returns, b["mask"], clip=number, backend=backend)
    return policy.loss + 0.1 * fit.loss


def grpo(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    advantages = group_advantages(b["scores"], group_size=2).unsqueeze(1).expand(b["mask"].shape)
    rest = (b["targets"], b["old"], advantages, b["mask"])
    return linear_ppo_loss(h, b["weight"], *rest, clip_high=number, backend=backend).loss


def linear_dpo(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    kw: dict[str, Any] = {"beta": number, "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]}
    return linear_dpo_loss(h, b["weight"], b["targets"], b["ids"], b["ref_logps"], **kw, backend=backend).loss


def preferences(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    pair, long = sums(h, b, backend), lengths(b)
    unpaired = kto_loss(torch.cat(pair), b["ref_logps"], b["desirable"], b["kl"], beta=number)
    others = (simpo_loss(*pair, *long, beta=number), orpo_loss(*pair, *long, beta=number), cpo_loss(*pair, beta=number))
    return unpaired.loss + others[0].loss + others[1].loss + others[2].loss


def sampled_kl(h: Tensor, b: Batch, backend: str, number: float) -> Tensor:
    return (token_kl(logps(h, b, backend), b["old"]) * number).sum()


STEPS: list[Step] = [
    *(frozen, trained, logits, kl, linear_ppo, linear_ppo_trained, logits_ppo, ppo, whole_ppo, linear_dpo),
    *(preferences, sampled_kl, grpo),
]


def train(step: Step, backend: str) -> Callable[[nn.Linear, Batch, float], Tensor]:
    def run(trunk: nn.Linear, b: Batch, number: float) -> Tensor:
        return step(torch.tanh(trunk(b["x"])), b, backend, number)

    return run


def gradients(loss: Tensor, trunk: nn.Linear, b: Batch) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*trunk.parameters(), b["trained"]], allow_unused=True)
    return [x for x in found if x is not None]


def compare(plain: Any, compiled: Any, trunk: nn.Linear, b: Batch, number: float) -> None:
    expected, got = plain(trunk, b, number), compiled(trunk, b, number)
    assert got.dtype == torch.float32
    # The operators are the same; what stands between them may be ordered otherwise.
    torch.testing.assert_close(got, expected, rtol=16 * EPS, atol=16 * EPS)
    for mine, true in zip(gradients(got, trunk, b), gradients(expected, trunk, b), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, true, rtol=16 * EPS, atol=64 * EPS * max(1.0, float(true.abs().max())))


# test_inductor has linear_ppo
@pytest.mark.parametrize("step", grid(STEPS, {*STEPS} - {linear_ppo}), ids=lambda step: step.__name__)
def test_a_training_step_is_one_graph(step: Step) -> None:
    """Then with more tokens and another number, which makes both of them variables, and with others again."""
    trunk, plain = nn.Linear(D, D), train(step, "torch")
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for length, number in ((T, 0.2), (T + 3, 0.3), (T + 5, 0.4)):
        compare(plain, compiled, trunk, batch(length), number)


@pytest.mark.parametrize("step", [frozen, linear_ppo_trained, kl], ids=lambda step: step.__name__)
def test_autocast_is_followed_and_noticed(step: Step) -> None:
    """A graph that was compiled without it is not taken inside of it, nor the other way."""
    trunk, b, plain = nn.Linear(D, D), batch(), train(step, "torch")
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    losses = []
    for inside in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            expected, got = plain(trunk, b, 0.2), compiled(trunk, b, 0.2)
        assert torch.equal(got, expected)
        for mine, true in zip(gradients(got, trunk, b), gradients(expected, trunk, b), strict=True):
            assert torch.equal(mine, true)
        losses.append(got.detach())
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], losses[1])


@needs_triton
@pytest.mark.parametrize("step", grid([frozen, kl, logits_ppo, whole_ppo], [whole_ppo]), ids=lambda step: step.__name__)
def test_the_same_on_triton(step: Step) -> None:
    trunk, plain = nn.Linear(D, D), train(step, "triton")
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for length, number in ((T, 0.2), (T + 1, 0.3)):
        compare(plain, compiled, trunk, batch(length), number)


def test_dynamic_sizes_from_the_start_do_not_compile_again() -> None:
    trunk, plain = nn.Linear(D, D), train(whole_ppo, "torch")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for length in (T, T + 3, T + 8):
        compare(plain, compiled, trunk, batch(length), 0.2)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_has_run_before_it_is_compiled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Implementations are imported when they are first asked for: here while the graph is traced, several of them."""
    monkeypatch.setattr(dispatch, "_LOADED", {})
    b = batch()
    loss = torch.compile(train(whole_ppo, backend), fullgraph=True, backend="aot_eager")(nn.Linear(D, D), b, 0.2)
    assert loss.isfinite()


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
def test_inductor() -> None:
    """The default backend: its C++ code between the operators."""
    trunk, plain = nn.Linear(D, D), train(linear_ppo, "torch")
    torch.use_deterministic_algorithms(False)  # inductor compiles the fill of uninitialised memory in
    compare(plain, torch.compile(plain, fullgraph=True), trunk, batch(), 0.2)


def test_compiled_checks_are_of_shapes_and_not_of_values() -> None:
    """Reading values would break the graph."""
    b = batch()
    compiled = torch.compile(lambda a: linear_ppo_loss(b["x"], b["weight"], b["targets"], b["old"], a, b["mask"]).loss)
    nan = b["advantages"].masked_fill(b["mask"], float("nan"))
    assert compiled(nan).isnan()
    with pytest.raises(Exception, match="advantages has shape"):
        compiled(nan[:, :-1])
