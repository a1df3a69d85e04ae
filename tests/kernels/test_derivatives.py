"""Every formula's gradient is that of its value; a second derivative is refused, or right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard_kernels import (
    linear_dpo_loss,
    linear_kl,
    linear_logprobs,
    linear_ppo_loss,
    logits_ppo_loss,
    ppo_loss,
    selective_log_softmax,
    value_loss,
)
from onecard_kernels.logprob import tuning
from tests.kernels.backends import BACKENDS
from tests.kernels.operator_material import MASK, TARGETS, D, N, V, head, leaf


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tuning.override(rows=3, columns=4):
        yield


FLOATS = {"dtype": torch.float64}


def policy_batch() -> dict[str, Tensor]:
    """Log-ratios away from log 0.8, log 1.3 and 0, so that a finite difference crosses no kink."""
    d = torch.tensor([-0.7, 0.05, 0.1, -0.1, 0.6], **FLOATS)
    return {
        "d": d,
        "advantages": torch.tensor([1.0, -1.5, 0.7, 0.4, -0.9], **FLOATS),
        "mask": MASK,
        "weights": torch.tensor([0.5, 1.0, 2.0, 1.5, 0.3], **FLOATS),
    }


def head_options() -> dict[str, Any]:
    _, forbidden, temperature, scale, softcap = head()
    return {"forbidden": forbidden, "temperature": temperature, "logit_scale": scale, "softcap": softcap}


def gradcheck(fn: Any, inputs: tuple[Tensor, ...], backend: str) -> bool:
    """Along one random direction for Triton: its interpreter takes milliseconds a program."""
    return torch.autograd.gradcheck(fn, inputs, fast_mode=backend == "triton")


LOSS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.3, "entropy_coef": 0.2}


@pytest.mark.parametrize("implementation", ["chunked", "low_memory", "tiled"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck_of_linear_logprobs(implementation: str, train: bool, entropy: bool) -> None:
    """fp64 takes the torch passes on either backend."""
    hidden, weight, bias = leaf(N, D, **FLOATS), leaf(V, D, **FLOATS), leaf(V, **FLOATS)
    if not train:
        weight, bias = weight.detach(), bias.detach()

    def run(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = linear_logprobs(
            h, w, TARGETS, bias=b, mask=MASK, entropy_requires_grad=entropy, **head_options(), backend="auto"
        )
        return out[:2] if entropy else out[:1]

    with tuning.override(implementation=implementation, rows=3, columns=4 if implementation == "low_memory" else None):
        assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("implementation", ["chunked", "low_memory"])
def test_gradcheck_of_linear_ppo_loss(backend: str, train: bool, implementation: str) -> None:
    hidden, weight, bias = (leaf(*shape, **FLOATS) for shape in ((N, D), (V, D), (V,)))
    if not train:
        weight, bias = weight.detach(), bias.detach()
    batch = policy_batch()
    with torch.no_grad():
        logp = linear_logprobs(hidden, weight, TARGETS, bias=bias, **head_options()).logprobs

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_ppo_loss(
            *(h, w, TARGETS, logp - batch["d"], batch["advantages"], MASK),
            **LOSS,
            **head_options(),
            dual_clip=1.2,
            bias=b,
            ref_logprobs=logp - 0.4,
            weights=batch["weights"],
            backend=backend,
        ).loss

    with tuning.override(implementation=implementation, rows=3, columns=4 if implementation == "low_memory" else None):
        assert gradcheck(run, (hidden, weight, bias), backend)


@pytest.mark.parametrize("other_head", [False, True])
def test_gradcheck_of_linear_kl(other_head: bool) -> None:
    ref, weight, bias = (torch.randn(*shape, **FLOATS) for shape in ((N, D), (V, D), (V,)))
    more = {"ref_weight": torch.randn(V, D, **FLOATS), "ref_bias": torch.randn(V, **FLOATS)} if other_head else {}

    def run(h: Tensor) -> Tensor:
        return linear_kl(h, ref, weight, bias=bias, mask=MASK, **head_options(), **more)

    assert torch.autograd.gradcheck(run, (leaf(N, D, **FLOATS),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_functions_of_logits(backend: str) -> None:
    logits, batch = leaf(N, V, **FLOATS), policy_batch()
    with torch.no_grad():
        logp = selective_log_softmax(logits, TARGETS, temperature=0.7).logprobs

    def both(x: Tensor) -> tuple[Tensor, ...]:
        kw = {"temperature": 0.7, "mask": MASK, "backend": backend}
        return selective_log_softmax(x, TARGETS, entropy_requires_grad=True, **kw)[:2]

    def loss(x: Tensor) -> Tensor:
        old = (logp - batch["d"], batch["advantages"], MASK)
        kw = {"temperature": 0.7, "ref_logprobs": logp - 0.4, "weights": batch["weights"], "backend": backend}
        return logits_ppo_loss(x, TARGETS, *old, **LOSS, **kw).loss

    assert gradcheck(both, (logits,), backend)
    assert gradcheck(loss, (logits,), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_of_functions_of_logprobs(backend: str, estimator: str) -> None:
    logp, entropy, batch = leaf(N, **FLOATS), leaf(N, **FLOATS), policy_batch()
    old, ref = logp.detach() - batch["d"], logp.detach() - 0.4

    def policy(x: Tensor, h: Tensor) -> Tensor:
        kw = {"ref_logprobs": ref, "kl_estimator": estimator, "weights": batch["weights"], "backend": backend}
        return ppo_loss(x, old, batch["advantages"], MASK, entropy=h, dual_clip=1.2, **LOSS, **kw).loss

    assert gradcheck(policy, (logp, entropy), backend)
    values = torch.tensor([0.5, -0.3, 1.2, -0.9, 0.05], **FLOATS).requires_grad_()
    was, target = torch.zeros(N, **FLOATS), torch.tensor([0.7, -0.1, -0.4, 0.3, 0.4], **FLOATS)

    def fit(v: Tensor) -> Tensor:
        return value_loss(v, was, target, MASK, clip=0.2, weights=batch["weights"], backend=backend).loss

    assert gradcheck(fit, (values,), backend)


Derived = tuple[Tensor, Tensor]  # a loss, and the leaf it is a function of


def sampled() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N) - 2, torch.rand(N) + 0.5, MASK


def of_hidden(loss: Callable[..., Tensor], trained: bool = False) -> Callable[[str], Derived]:
    def derived(backend: str) -> Derived:
        hidden, weight = leaf(N, D), torch.randn(V, D).requires_grad_(trained)
        return loss(hidden, weight, backend), weight if trained else hidden

    return derived


def of_tokens(loss: Callable[..., Tensor], *more: int) -> Callable[[str], Derived]:
    def derived(backend: str) -> Derived:
        x = leaf(N, *more)
        return loss(x, backend), x

    return derived


def logprobs_of(h: Tensor, w: Tensor, backend: str) -> Tensor:
    return linear_logprobs(h, w, TARGETS, backend=backend).logprobs


def ppo_of(h: Tensor, w: Tensor, backend: str) -> Tensor:
    return linear_ppo_loss(h, w, TARGETS, *sampled(), backend=backend).loss


def dpo_of(h: Tensor, w: Tensor, backend: str) -> Tensor:
    ids, ref = torch.tensor([0, 0, 1, 1, -1]), torch.tensor([-1.0, -2.0])
    return linear_dpo_loss(h, w, TARGETS, ids, ref, backend=backend).loss


def selective_of(x: Tensor, backend: str, inplace: bool = False) -> Tensor:
    return selective_log_softmax(x * 1, TARGETS, inplace_backward=inplace, backend=backend).logprobs.sum()


SECOND: dict[str, Callable[[str], Derived]] = {
    "frozen": of_hidden(lambda h, w, b: logprobs_of(h, w, b).sum()),
    "frozen, of a curved loss": of_hidden(lambda h, w, b: logprobs_of(h, w, b).exp().sum()),
    "trained": of_hidden(lambda h, w, b: logprobs_of(h, w, b).sum(), trained=True),
    "linear_dpo_loss": of_hidden(dpo_of),
    "linear_kl": of_hidden(lambda h, w, b: linear_kl(h, torch.randn(N, D), w, backend=b).sum()),
    "linear_ppo_loss": of_hidden(ppo_of),
    "linear_ppo_loss, trained": of_hidden(ppo_of, trained=True),
    "selective_log_softmax": of_tokens(selective_of, V),
    "selective_log_softmax, in place": of_tokens(lambda x, b: selective_of(x, b, inplace=True), V),
    "logits_ppo_loss": of_tokens(lambda x, b: logits_ppo_loss(x, TARGETS, *sampled(), backend=b).loss, V),
    "ppo_loss": of_tokens(lambda x, b: ppo_loss(x, x.detach(), *sampled()[1:], backend=b).loss),
    "value_loss": of_tokens(lambda x, b: value_loss(x, x.detach() + 0.05, torch.randn(N), MASK, backend=b).loss),
}
AUTOGRAD_S_OWN = ("ppo_loss", "value_loss")  # in torch these are formulas, and have all derivatives


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_is_refused(name: str, backend: str) -> None:
    """Left out of a sum in silence, as a constant's, it would be a wrong number."""
    loss, x = SECOND[name](backend)
    if backend == "torch" and name in AUTOGRAD_S_OWN:
        assert torch.autograd.grad(loss, x, create_graph=True)[0].requires_grad
        return
    gradient = torch.autograd.grad(loss, x, create_graph=True)[0]
    total = gradient.square().sum() + x.square().sum()
    with pytest.raises(RuntimeError):
        total.backward()
