"""ppo_terms: the derivatives that are written out are autograd's, at the borders and for impossible tokens too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onecard_kernels import dispatch
from onecard_kernels.ppo.options import SUMS
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS
from tests.kernels.policy_records import records

INF = float("inf")
BORDERS: dict[str, tuple[float, float]] = {  # log-ratio, advantage
    "no advantage": (0.5, 0.0),
    "no advantage, clipped": (-0.9, 0.0),
    "ratio of one": (0.0, 1.0),
    "far above": (25.0, -1.0),
    "far below": (-25.0, 1.0),
    "at the limit": (20.0, -1.0),
    "at the other limit": (-20.0, 1.0),
    "beyond fp32": (200.0, -1.0),
    "beyond fp32, below": (-200.0, 1.0),
}


def terms_of(backend: str) -> Any:
    return dispatch.implementation("policy_terms", backend, torch.device("cpu"))


def by_autograd(values: dict[str, Any], **kw: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sums and derivatives of the formula, in SUMS' order."""
    logp, mask = values["logprobs"].detach().clone().requires_grad_(), torch.ones_like(values["logprobs"]).bool()
    entropy = values["entropy"]
    entropy = None if entropy is None else entropy.detach().clone().requires_grad_()
    given = {**values, "logprobs": logp, "entropy": entropy, "mask": mask}
    loss = oracle.ppo_loss(**records(**given, **kw), normalizer=1.0)
    leaves = [x for x in (logp, entropy) if x is not None]
    grads = torch.autograd.grad(loss.loss, leaves, allow_unused=True)
    sums = [loss.loss.detach(), *(loss.metrics.get(name, torch.zeros_like(loss.loss)) for name in SUMS[1:-1])]
    return torch.stack([*sums, mask.sum().to(logp.dtype)]), grads[0], grads[1] if len(grads) == 2 else None


def check_terms(values: dict[str, Any], backend: str, **kw: Any) -> None:
    mask = torch.ones_like(values["logprobs"]).bool()
    terms = terms_of(backend)(**records(**values, mask=mask, **kw))
    sums, slope, grad_entropy = terms.totals, terms.grad, terms.entropy_grad
    true_sums, true_slope, true_entropy = by_autograd(values, **kw)
    # a few roundings each of numbers of this size
    eps = torch.finfo(values["logprobs"].dtype).eps
    torch.testing.assert_close(sums, true_sums, rtol=16 * eps, atol=16 * eps)
    torch.testing.assert_close(slope, true_slope, rtol=16 * eps, atol=16 * eps)
    if kw["entropy_coef"] != 0.0:
        torch.testing.assert_close(grad_entropy, true_entropy, rtol=4 * eps, atol=0.0)
    else:
        assert grad_entropy.numel() == 0


TERMS: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("estimator", "dual", "entropy_coef"), [("k1", None, 0.2), ("k2", 1.3, 0.0), ("k3", None, 0.0), ("k3", 1.3, 0.2)]
)
def test_terms_at_random_points(
    backend: str, dtype: torch.dtype, estimator: str, dual: float | None, entropy_coef: float
) -> None:
    n = 200
    logp = -3 * torch.rand(n, dtype=dtype)
    values = {
        "logprobs": logp,
        "old_logprobs": logp - 0.5 * torch.randn(n, dtype=dtype),
        "advantages": torch.randn(n, dtype=dtype),
        "entropy": torch.rand(n, dtype=dtype) if entropy_coef else None,
        "ref_logprobs": logp - torch.randn(n, dtype=dtype),
        "weights": torch.rand(n, dtype=dtype),
    }
    kw = {**TERMS, "dual_clip": dual, "kl_estimator": estimator, "kl_coef": 0.3, "entropy_coef": entropy_coef}
    if dtype == torch.float32:  # sums of 200: compare token by token
        for i in range(0, n, 40 if backend == "triton" else 8):
            check_terms({k: x if x is None else x[i : i + 1] for k, x in values.items()}, backend, **kw)
    else:
        check_terms(values, backend, **kw)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dual", [None, 3.0])
def test_terms_at_the_borders(backend: str, border: str, dual: float | None) -> None:
    d, advantage = BORDERS[border]
    logp = torch.tensor([-1.5], dtype=torch.float64)
    values = {
        "logprobs": logp,
        "old_logprobs": logp - d,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "entropy": None,
        "ref_logprobs": logp - d,
        "weights": None,
    }
    for kl_coef, estimator in ((0.0, "k3"), (0.1, "k3"), (0.1, "k2")):
        check_terms(values, backend, **{**TERMS, "dual_clip": dual, "kl_coef": kl_coef, "kl_estimator": estimator})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ratio", "advantage"), [(1.25, 1.0), (1.25, -1.0), (0.75, 1.0), (0.75, -1.0)])
def test_terms_on_the_border_of_the_clip_range(backend: str, ratio: float, advantage: float) -> None:
    """1 + 0.25 and 1 - 0.25 are exact; so is the ratio, as 0 - log of it is rounded the way exp undoes it."""
    old = -torch.tensor([ratio], dtype=torch.float64).log()
    assert torch.exp(-old) == ratio
    values: dict[str, Any] = {
        "logprobs": torch.zeros(1, dtype=torch.float64),
        "old_logprobs": old,
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "entropy": None,
        "ref_logprobs": None,
        "weights": None,
    }
    kw = {**TERMS, "clip_low": 0.25, "clip_high": 0.25}
    check_terms(values, backend, **kw)
    terms = terms_of(backend)(**records(**values, mask=torch.ones(1).bool(), **kw))
    sums, slope = terms.totals, terms.grad
    assert sums[2] == 0.0  # not clipped: the border is inside
    torch.testing.assert_close(slope, -values["advantages"] * ratio, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("logp", "old", "ref"), [(-INF, -INF, -INF), (-INF, -1.0, -2.0), (-1.0, -INF, -1.5), (-1.0, -2.0, -INF)]
)
def test_terms_of_impossible_tokens(backend: str, logp: float, old: float, ref: float) -> None:
    """As one token among others; the slope of an impossible one is zero, never NaN."""

    def column(first: float) -> Tensor:
        return torch.tensor([first, -1.0], dtype=torch.float64)

    values: dict[str, Any] = {
        "logprobs": column(logp),
        "old_logprobs": column(old),
        "advantages": torch.tensor([0.7, -0.4], dtype=torch.float64),
        "entropy": None,
        "ref_logprobs": column(ref),
        "weights": None,
    }
    for estimator in ("k3",):
        kw = {**TERMS, "kl_coef": 0.1, "kl_estimator": estimator}
        check_terms(values, backend, **kw)
        slope = terms_of(backend)(**records(**values, mask=torch.ones(2).bool(), **kw)).grad
        assert slope.isfinite().all()
        if logp == -INF:
            assert slope[0] == 0.0
