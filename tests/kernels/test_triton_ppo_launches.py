"""ppo_loss and value_loss on Triton: shapes, strides, autograd, operators, from one launch each way."""

from __future__ import annotations

import pytest
import torch

from onecard_kernels import launch, ppo_loss, value_loss
from tests.kernels.policy_records import records
from tests.kernels.triton_ppo_material import (
    DEVICE,
    NAN,
    OPTIONS,
    compare,
    masks,
    run,
    run_policy,
    tokens,
    values,
)

triton = pytest.importorskip("triton")
import triton.language as tl

from onecard_kernels.ppo import triton as launches
from onecard_kernels.ppo.triton import token_terms

OF_TOKENS = ("old_logprobs", "advantages", "entropy", "ref_logprobs", "weights")


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_shapes_of_no_token_and_of_one(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, device=DEVICE)
    compare(ppo_loss, ("logprobs", "entropy"), tokens(shape, torch.float32), mask=mask, entropy_coef=0.1)
    compare(value_loss, ("values",), values(shape, torch.float32), mask=mask)


def test_several_programs_and_turns_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """327 tokens: 11 programs of 32, added up 4 at a time."""
    monkeypatch.setattr(launches, "BLOCK", 32)
    monkeypatch.setattr(launches, "COLUMNS", 4)
    mask = torch.rand(3, 109, device=DEVICE) < 0.7
    for dtype in (torch.float32, torch.float64):
        options = {k: v for k, v in OPTIONS["all"].items() if k != "normalizer"}
        compare(ppo_loss, ("logprobs", "entropy"), tokens((3, 109), dtype), mask=mask, **options)
        compare(value_loss, ("values",), values((3, 109), dtype), mask=mask)


def test_backward_again_and_through_other_operations() -> None:
    batch = tokens((4, 6), torch.float32)
    logp, entropy = batch["logprobs"].requires_grad_(), batch["entropy"].requires_grad_()
    mask = torch.ones(4, 6, device=DEVICE)
    got = ppo_loss(**batch, mask=mask, entropy_coef=0.2, backend="triton")
    leaves = (logp, entropy)
    first = torch.autograd.grad(got.loss, leaves, retain_graph=True)
    for value in got.metrics.values():
        value.mul_(0.0)  # the metrics are the caller's
    second = torch.autograd.grad(got.loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    twice = torch.autograd.grad(got.loss * 3.0 + got.loss, leaves)
    torch.testing.assert_close(twice, tuple(4.0 * g for g in first))
    v = values((4, 6), torch.float32)
    v["values"].requires_grad_()
    loss = value_loss(**v, mask=mask, backend="triton").loss
    once = torch.autograd.grad(loss, v["values"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, v["values"], retain_graph=True)[0], once)
    torch.testing.assert_close(torch.autograd.grad(loss * -2.0, v["values"])[0], -2.0 * once)


def test_two_runs_agree_in_every_bit() -> None:
    batch, mask = tokens((3, 1000), torch.float32), torch.rand(3, 1000, device=DEVICE) < 0.9
    one_, two = (run_policy(batch, mask=mask, backend="triton", **OPTIONS["all"]) for _ in range(2))
    assert all(torch.equal(one_[name], two[name]) for name in one_)


def test_gradients_go_where_the_reference_s_go() -> None:
    batch = {name: x.requires_grad_() for name, x in tokens((6,), torch.float32).items()}
    normalizer = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    mask = torch.ones(6, device=DEVICE)
    got = ppo_loss(**batch, mask=mask, entropy_coef=0.1, normalizer=normalizer, backend="triton")
    grads = torch.autograd.grad(got.loss, [*batch.values(), normalizer], allow_unused=True)
    reached = {name for name, g in zip([*batch, "normalizer"], grads, strict=True) if g is not None}
    assert reached == {"logprobs", "entropy"}
    assert not any(value.requires_grad for value in got.metrics.values())
    frozen = {name: x.detach() for name, x in batch.items()}
    assert not ppo_loss(**frozen, mask=mask, backend="triton").loss.requires_grad
    only_entropy = {**frozen, "entropy": batch["entropy"]}
    got = ppo_loss(**only_entropy, mask=mask, entropy_coef=0.1, backend="triton")
    torch.testing.assert_close(torch.autograd.grad(got.loss, batch["entropy"])[0], -0.1 * frozen["weights"] / 6)
    v = {name: x.requires_grad_() for name, x in values((6,), torch.float32).items()}
    got = value_loss(**v, mask=mask, backend="triton")
    grads = torch.autograd.grad(got.loss, list(v.values()), allow_unused=True)
    assert [g is not None for g in grads] == [True, False, False, False]
    assert not got.metrics["val/clipfrac"].requires_grad


def test_mixed_dtypes() -> None:
    """Each gradient has the dtype of its input; one fp64 input makes all arithmetic fp64."""
    batch = tokens((2, 5), torch.float32)
    batch["logprobs"] = batch["logprobs"].bfloat16()
    mask = masks((2, 5))["holes"]
    compare(ppo_loss, ("logprobs", "entropy"), batch, mask=mask, entropy_coef=0.3)
    batch["entropy"] = batch["entropy"].half()
    batch["advantages"] = batch["advantages"].double()
    got = run_policy(batch, mask=mask, entropy_coef=0.3, backend="triton")
    assert [got[name].dtype for name in ("loss", "dlogprobs", "dentropy")] == [
        torch.float64,
        torch.bfloat16,
        torch.float16,
    ]


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward, one backward, also with the entropy's gradient; without a gradient its memory is not written."""
    count = []
    kind = type(launches.policy_kernel)
    run = kind.run
    monkeypatch.setattr(kind, "run", lambda *args, **given: (count.append(given), run(*args, **given)))
    mask = torch.ones(4, device=DEVICE)
    batch = tokens((4,), torch.bfloat16)
    batch["logprobs"].requires_grad_()
    batch["entropy"].requires_grad_()
    loss = ppo_loss(**batch, mask=mask, entropy_coef=0.1, backend="triton").loss
    assert len(count) == 2
    loss.backward()
    assert len(count) == 3
    v = values((4,), torch.bfloat16)
    v["values"].requires_grad_()
    loss = value_loss(**v, mask=mask, backend="triton").loss
    assert len(count) == 5
    loss.backward()
    assert len(count) == 6
    with torch.no_grad():
        ppo_loss(**batch, mask=mask, entropy_coef=0.1, backend="triton")
    assert len(count) == 8
    assert count[0]["SLOPE"]
    assert count[0]["ENTROPY_SLOPE"]
    assert not count[6]["SLOPE"]
    assert not count[6]["ENTROPY_SLOPE"]


def test_real_sizes_are_recorded_without_a_card() -> None:
    """64 x 4096 tokens on `meta`: nothing is read back."""
    batch = {name: torch.empty(64, 4096, device="meta") for name in ("logprobs", *OF_TOKENS)}
    mask = torch.empty(64, 4096, device="meta", dtype=torch.bool)
    options = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "entropy_coef": 0.1, "kl_coef": 0.1}
    with launch.recording() as recorded:
        done = launches.policy_terms(**records(**batch, mask=mask, **options, kl_estimator="k3"))
        launches.scale(done.loss, done.divisor, done.grad, done.entropy_grad, torch.bfloat16, torch.bfloat16)
    assert [r.grid for r in recorded] == [(256,), (1,), (256,)]
    assert recorded[0].constexprs["BLOCK"] == 1024


@triton.jit
def one_row_a_program(
    logp_ptr, old_ptr, adv_ptr, ref_ptr, mask_ptr, out_ptr, low: tl.float64, high: tl.float64, dual: tl.float64
):
    i = tl.program_id(0)
    logp, old = tl.load(logp_ptr + i), tl.load(old_ptr + i)
    loss, slope, approxkl, clipped, ratio, kl = token_terms(
        logp,
        old,
        tl.load(adv_ptr + i),
        tl.load(ref_ptr + i),
        tl.load(mask_ptr + i) != 0,
        low,
        high,
        dual,
        0.3,
        True,
        True,
        True,
        "k3",
    )
    n = tl.num_programs(0)
    tl.store(out_ptr + i, loss)
    tl.store(out_ptr + n + i, slope)
    tl.store(out_ptr + 2 * n + i, approxkl)
    tl.store(out_ptr + 3 * n + i, clipped)
    tl.store(out_ptr + 4 * n + i, ratio)
    tl.store(out_ptr + 5 * n + i, kl)


def test_token_terms_take_one_token_too() -> None:
    batch, mask = tokens((9,), torch.float64, ("weights", "entropy")), torch.arange(9, device=DEVICE) % 4 != 0
    batch = {name: x.masked_fill(~mask, NAN) for name, x in batch.items()}
    out = torch.empty(6, 9, dtype=torch.float64, device=DEVICE)
    tensors = [batch[name] for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs")]
    one_row_a_program[(9,)](*tensors, mask.view(torch.uint8), out, 0.2, 0.3, 1.4)
    options = {"clip_high": 0.3, "dual_clip": 1.4, "kl_coef": 0.3, "normalizer": 1.0, "backend": "torch"}
    truth = run(ppo_loss, ("logprobs",), batch, mask=mask, **options)
    names = ("loss", "policy/approxkl", "policy/clipfrac", "val/ratio", "policy/kl")
    torch.testing.assert_close(out.sum(1)[[0, 2, 3, 4, 5]], torch.stack([truth[name] for name in names]))
    torch.testing.assert_close(out[1], truth["dlogprobs"])
    assert torch.equal(out[:, ~mask], torch.zeros(6, 3, dtype=torch.float64, device=DEVICE))
