"""linear_ppo_loss and logits_ppo_loss against the plain formula in fp64: padded, packed, frozen and trained heads."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from onecard_kernels import dispatch, launch, linear_ppo_loss, logits_ppo_loss
from tests.closeness import assert_like_eager, assert_within
from tests.kernels import oracle

B, T, D, V = 3, 5, 8, 131
NAN = float("nan")
KEYS = {"policy/approxkl", "policy/clipfrac", "policy/entropy", "val/ratio"}
CLIP: dict[str, Any] = {"clip_low": 0.15, "clip_high": 0.25, "dual_clip": 2.0}


def batch(head: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Log-ratios far enough from the borders of the clip range that a bf16 head does not cross them."""
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
    hidden, weight = torch.randn(B, T, D) * 0.5, torch.randn(V, D) * 0.5
    targets = torch.randint(1, V, (B, T)).masked_fill(~mask, -100)
    logp = oracle.linear_logprobs(hidden.double(), weight.double(), targets, mask=mask, **head).logprobs
    offsets = torch.tensor([-0.6, -0.05, 0.0, 0.1, 0.5, 1.2]).double()
    d = offsets[torch.arange(B * T).view(B, T) % 6]
    junk = torch.where(mask, 0.0, NAN)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "old_logprobs": logp - d + junk,
        "advantages": torch.randn(B, T) + junk,
        "mask": mask,
        "ref_logprobs": logp - torch.randn(B, T) + junk,
        "weights": torch.rand(B, T) + junk,
    }


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, head: dict[str, Any], data: dict[str, torch.Tensor], **kw: Any
) -> torch.Tensor:
    """The equation as it stands, over the valid tokens taken out."""
    mask = data["mask"]
    out = oracle.linear_logprobs(hidden, weight, data["targets"], mask=mask, entropy_requires_grad=True, **head)
    logp, entropy = out.logprobs[mask], out.entropy[mask]
    old, a, ref, w = (data[name][mask].to(logp) for name in ("old_logprobs", "advantages", "ref_logprobs", "weights"))
    ratio = torch.exp(logp - old)
    clipped = ratio.clip(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    surrogate = torch.min(a * ratio, a * clipped)
    surrogate = torch.where(a < 0, torch.max(surrogate, CLIP["dual_clip"] * a), surrogate)
    k2 = (logp - ref) ** 2 / 2
    return (w * (-surrogate - kw["entropy_coef"] * entropy + kw["kl_coef"] * k2)).mean()


HEADS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {
        "bias": torch.linspace(-1, 1, V),
        "temperature": 1.3,
        "logit_scale": 0.8,
        "softcap": 3.0,
        "forbidden": torch.arange(V) == 0,
    },
]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "temperature", "everything"])
def test_padded_and_packed_equal_the_equation(
    head: dict[str, Any], dtype: torch.dtype, train: bool, entropy_coef: float
) -> None:
    data = batch(head)
    hidden, weight = data.pop("hidden").to(dtype), data.pop("weight").to(dtype)
    kw = {"entropy_coef": entropy_coef, "kl_coef": 0.2, "kl_estimator": "k2"}

    def leaves_of(to: torch.dtype) -> tuple[torch.Tensor, ...]:
        return hidden.to(to, copy=True).requires_grad_(), weight.to(to, copy=True).requires_grad_(train)

    def grads(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, leaves if train else leaves[:1])

    leaves = leaves_of(torch.float64)
    truth = plain(*leaves, head, data, **kw)
    true_grads = grads(truth, leaves)
    leaves = leaves_of(dtype)
    eager_grads = grads(plain(*leaves, head, data, **kw), leaves)

    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    per_token = {n: x.to(out_dtype) if x.is_floating_point() else x for n, x in data.items()}
    order = torch.randperm(B * T)  # a packed batch knows no rows
    packed = {name: x.reshape(-1)[order] for name, x in per_token.items()}
    for reorder, rest in ((False, per_token), (True, packed)):
        leaves = leaves_of(dtype)
        h = leaves[0].reshape(-1, D)[order] if reorder else leaves[0]
        got = linear_ppo_loss(h, leaves[1], **rest, **CLIP, **kw, **head)
        assert got.loss.dtype == out_dtype
        assert set(got.metrics) == KEYS | {"policy/kl"}
        # 1e-5 nat of a log-probability moves a loss of ratios up to 3 and advantages up to 3 by no more than 1e-4
        assert_within(got.loss, truth, 1e-10 if dtype == torch.float64 else 1e-4, "loss")
        for mine, eager, true in zip(grads(got.loss, leaves), eager_grads, true_grads, strict=True):
            if dtype == torch.float64:  # eager is the truth here
                assert_within(mine, true, 1e-12, "gradient")
            else:
                assert_like_eager(mine, eager, true)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_logits_equal_the_equation(entropy_coef: float) -> None:
    head = {"temperature": 0.7}
    data = batch(head)
    hidden, weight = data.pop("hidden"), data.pop("weight")
    kw = {"entropy_coef": entropy_coef, "kl_coef": 0.2, "kl_estimator": "k2"}

    def through_logits(dtype: torch.dtype, loss: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (hidden.double() @ weight.double().T).to(dtype).requires_grad_()
        value = loss(logits)
        return value, torch.autograd.grad(value, logits)[0]

    def equation(logits: torch.Tensor) -> torch.Tensor:
        return plain(logits, torch.eye(V, dtype=logits.dtype), head, data, **kw)

    truth, true_grad = through_logits(torch.float64, equation)
    _, eager_grad = through_logits(torch.float32, equation)
    fp32 = {name: x.float() if x.is_floating_point() else x for name, x in data.items()}
    for dtype, rest in ((torch.float64, data), (torch.float32, fp32)):
        value, grad = through_logits(
            dtype, lambda x, rest=rest: logits_ppo_loss(x, **rest, **CLIP, **kw, temperature=0.7).loss
        )
        assert value.dtype == dtype
        assert_within(value, truth, 1e-10 if dtype == torch.float64 else 1e-4, "loss")
        assert_like_eager(grad, eager_grad, true_grad)
        assert torch.equal(grad[~data["mask"]], torch.zeros_like(grad[~data["mask"]]))


def test_linear_and_logits_report_the_same() -> None:
    data = batch({})
    hidden, weight = data.pop("hidden"), data.pop("weight")
    data.pop("ref_logprobs")
    data["old_logprobs"] = data["old_logprobs"].float()
    linear = linear_ppo_loss(hidden, weight, **data, normalizer=20)
    direct = logits_ppo_loss(hidden @ weight.T, **data, normalizer=torch.tensor(20))
    assert set(linear.metrics) == set(direct.metrics) == KEYS
    entropy = -(p := (hidden @ weight.T).log_softmax(-1)).exp().mul(p).sum(-1)[data["mask"]].sum() / 20
    for got in (linear, direct):
        torch.testing.assert_close(got.metrics["policy/entropy"], entropy)
    for name in KEYS:
        torch.testing.assert_close(linear.metrics[name], direct.metrics[name])
    torch.testing.assert_close(linear.loss, direct.loss)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_the_entropy_s_gradient_is_paid_for_only_where_it_counts(
    kind: str, entropy_coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"linear": "linear.HeadTiles", "logits": "torch_losses.ppo_loss"}[kind]
    module, attribute = name.split(".")
    original = getattr(importlib.import_module(f"onecard_kernels.ppo.{module}"), attribute)
    asked: list[bool] = []

    def spy(*args: Any, **kw: Any) -> Any:
        asked.append(kw["entropy_term"] if kind == "linear" else args[1].requires_grad)
        return original(*args, **kw)

    monkeypatch.setattr(f"onecard_kernels.ppo.{name}", spy)
    data = batch({})
    hidden, weight = data.pop("hidden").requires_grad_(), data.pop("weight")
    if kind == "linear":
        linear_ppo_loss(hidden, weight, **data, entropy_coef=entropy_coef)
    else:
        logits_ppo_loss(hidden @ weight.T, **data, entropy_coef=entropy_coef)
    assert asked == [entropy_coef != 0.0]


def test_bad_tokens_are_refused_before_the_head_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("worked before it checked")

    monkeypatch.setattr("onecard_kernels.ppo.linear.HeadTiles.sweep", never)
    monkeypatch.setattr("onecard_kernels.logprob.torch_rows.forward", never)
    data = batch({})
    hidden, weight = data.pop("hidden"), data.pop("weight")
    for wrong in (
        {"advantages": data["advantages"][0]},
        {"old_logprobs": data["advantages"].long()},
        {"clip_low": 2.0},
        {"kl_coef": 0.1, "ref_logprobs": None},
        {"normalizer": 0},
    ):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong)) if len(wrong) == 1 else "ref_logprobs"):
            linear_ppo_loss(hidden, weight, **{**data, **wrong})
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong)) if len(wrong) == 1 else "ref_logprobs"):
            logits_ppo_loss(hidden @ weight.T, **{**data, **wrong})


@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_torch_means_torch_throughout(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of it goes to another backend, also where that one is preferred."""
    data = batch({})
    hidden, weight = data.pop("hidden"), data.pop("weight")

    def run(backend: str) -> torch.Tensor:
        if kind == "linear":
            return linear_ppo_loss(hidden, weight, **data, backend=backend).loss
        return logits_ppo_loss(hidden @ weight.T, **data, backend=backend).loss

    plain_loss = run("torch")
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))
    for name, row in dispatch.TABLE.items():
        monkeypatch.setitem(dispatch.TABLE, name, {**row, "triton": "nowhere:at_all"})
    assert torch.equal(run("torch"), plain_loss)
    if launch.unavailable_reason(torch.device("cpu")) is None:  # the other one is there to be preferred
        with pytest.raises(ModuleNotFoundError, match="nowhere"):
            run("auto")
