"""logits_ppo_loss in one kernel against the composition of the torch functions, and against the equation in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard_kernels import logits_ppo_loss
from onecard_kernels.ppo import triton_ops
from tests.closeness import assert_within, error, floor
from tests.kernels.policy_records import records

pytest.importorskip("triton")

NAN, INF = float("nan"), float("inf")
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "entropy_coef": 0.0,
    "ref_logprobs": None,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "weights": None,
    "normalizer": None,
}
ALL = {"temperature": 0.7, "clip_low": 0.15, "clip_high": 0.25, "dual_clip": 2.0, "entropy_coef": 0.3, "kl_coef": 0.2}


def fused(logits: torch.Tensor, **kw: Any) -> Any:
    return triton_ops.logits_ppo_loss(logits, **records(**{**DEFAULTS, **kw}))


def composed(logits: torch.Tensor, **kw: Any) -> Any:
    return logits_ppo_loss(logits, **kw, backend="torch")


def batch(shape: tuple[int, ...], v: int, temperature: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-ratios on both sides of the clip range and away from its borders; NaN and -100 where the mask is 0."""
    logits = torch.randn(*shape, v) * 4
    n = logits[..., 0].numel()
    order = torch.arange(n).view(shape)
    mask = order % 5 != 3
    targets = torch.randint(v, shape)
    logp = (logits.double() / temperature).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    junk = torch.where(mask, 0.0, NAN)
    offsets = torch.tensor([-0.6, -0.05, 0.0, 0.1, 0.5, 1.2, 30.0]).double()
    rest = {
        "targets": targets.masked_fill(~mask, -100),
        "old_logprobs": (logp - offsets[order % 7] + junk).float(),
        "advantages": torch.randn(shape) + junk,
        "mask": mask,
        "ref_logprobs": (logp - torch.randn(shape)).float() + junk,
        "weights": torch.rand(shape) + junk,
    }
    return logits.masked_fill(~mask.unsqueeze(-1), NAN), rest


def run(fn: Any, logits: torch.Tensor, upstream: float = 1.0, **kw: Any) -> tuple[Any, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    out = fn(leaf, **kw)
    return out, torch.autograd.grad(out.loss * upstream, leaf)[0]


def as_fp64(rest: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in rest.items()}


def compare(logits: torch.Tensor, rest: dict[str, Any]) -> None:
    tolerance = 1e-4
    truth, true_grad = run(composed, logits.double(), 1.7, **as_fp64(rest))
    _, eager_grad = run(composed, logits, 1.7, **rest)
    got, grad = run(fused, logits, 1.7, **rest)
    assert got.loss.dtype == torch.float32
    assert got.loss.shape == ()
    assert_within(got.loss, truth.loss, tolerance, "loss")
    assert set(got.metrics) == set(truth.metrics)
    for name, value in truth.metrics.items():
        assert not got.metrics[name].requires_grad
        assert_within(got.metrics[name], value, tolerance * max(1.0, float(value.abs())), name)
    assert grad.dtype == logits.dtype
    mask = rest["mask"].bool()
    # A log-probability rounded in its last place moves the ratio, and with it the gradient, by as much.
    ulp = torch.finfo(torch.float32).eps * float(rest["old_logprobs"][mask].abs().max())
    tolerance = 2 * error(eager_grad, true_grad) + floor(true_grad, grad.dtype) + ulp * float(true_grad.abs().max())
    assert_within(grad, true_grad, tolerance, "gradient")
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))


@pytest.mark.parametrize("v", [1, 7, 131, 1000, 4099])
def test_vocabularies(v: int) -> None:
    logits, rest = batch((2, 4), v, 0.7)
    rest["old_logprobs"] = rest["old_logprobs"].clamp(min=-25)  # a ratio of e^20 would drown the others
    compare(logits, {**rest, **ALL, "kl_estimator": "k2"})


# No KL in the loss, none at all, each estimator; with and without every optional tensor.
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dual_clip": 3.0},
        {"entropy_coef": 0.5},
        {"entropy_coef": -0.5, "normalizer": 12.0},
        {"kl_coef": 0.1, "kl_estimator": "k1"},
        {"kl_coef": 0.1, "kl_estimator": "k2"},
        {"kl_coef": 0.1, "kl_estimator": "k3", "normalizer": torch.tensor(3)},
        {"without": ("ref_logprobs",)},
        {"without": ("weights",)},
        {"without": ("ref_logprobs", "weights"), "entropy_coef": 0.1, "dual_clip": 1.5},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    logits, rest = batch((14,), 37)
    far = rest["old_logprobs"] < -20
    rest["mask"] &= ~far
    options = dict(options)
    for name in options.pop("without", ()):
        del rest[name]
    compare(logits, {**rest, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype: torch.dtype) -> None:
    logits, rest = batch((2, 4), 131, 0.7)
    rest["mask"] &= rest["old_logprobs"] > -20
    compare(logits.to(dtype), {**rest, **ALL, "kl_estimator": "k2"})


def test_fp64_is_exact() -> None:
    logits, rest = batch((2, 4), 131, 0.7)
    rest["mask"] &= rest["old_logprobs"] > -20
    kw = {**as_fp64(rest), **ALL}
    truth, true_grad = run(composed, logits.double(), 1.7, **kw)
    got, grad = run(fused, logits.double(), 1.7, **kw)
    assert got.loss.dtype == torch.float64
    assert_within(got.loss, truth.loss, 1e-11)
    assert_within(grad, true_grad, 1e-12)
    # fp64 per-token inputs beside fp32 logits: the loss is fp64, the gradient the logits'
    got, grad = run(fused, logits, 1.7, **kw)
    assert (got.loss.dtype, grad.dtype) == (torch.float64, torch.float32)
    assert_within(got.loss, truth.loss, 1e-4)


def test_far_log_ratios_are_finite() -> None:
    logits, rest = batch((7,), 37)
    rest["old_logprobs"] = torch.tensor([-200.0, 200.0, -INF, 0.0, -1.0, -2.0, -3.0])
    got, grad = run(fused, logits, **rest, kl_coef=0.1)
    assert got.loss.isfinite()
    assert grad.isfinite().all()
    expected, expected_grad = run(composed, logits, **rest, kl_coef=0.1)
    assert_within(got.loss / expected.loss, torch.tensor(1.0), 1e-5)
    assert_within(grad, expected_grad, 1e-5 * float(expected_grad.abs().max()))


def test_a_forbidden_target_has_no_gradient() -> None:
    logits, rest = batch((2,), 9)
    logits[0, rest["targets"][0]] = -INF
    logits[1, (rest["targets"][1] + 1) % 9] = -INF
    rest["old_logprobs"] = torch.tensor([-INF, -1.0])
    del rest["ref_logprobs"]
    got, grad = run(fused, logits, **rest, entropy_coef=0.1)
    expected, expected_grad = run(composed, logits, **rest, entropy_coef=0.1)
    assert_within(got.loss, expected.loss, 1e-5)
    assert_within(grad, expected_grad, 1e-6)


def test_constants_get_no_gradient() -> None:
    logits, rest = batch((4,), 7)
    leaf, old = logits.requires_grad_(), rest["old_logprobs"].requires_grad_()
    fused(leaf, **{**rest, "old_logprobs": old}).loss.backward()
    assert old.grad is None
    assert not fused(logits.detach(), **{**rest, "old_logprobs": old}).loss.requires_grad
