"""Every function of hidden states or logits, on both backends, against fp64 at the sizes of real models.

Plain log-probabilities and their implementations are in test_regressions_on_a_card.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from onecard_kernels import linear_dpo_loss
from onecard_kernels.dpo.dpo import dpo_loss
from onecard_kernels.logprob import tuning
from tests.closeness import LOGPROB_TOLERANCES, assert_like_eager, assert_within
from tests.gpu.card import (
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    SHAPES,
    SHAPES_AND_DTYPES,
    Shape,
    inputs,
    needs_triton,
    over_paths,
)
from tests.kernels import oracle
from tests.kernels.regression_material import LOSS_TOLERANCE, Case, H
from tests.kernels.regression_running import compare

LINEAR = ("linear_logprobs" + H, "linear_ppo_loss", "linear_ppo_loss" + H)
OTHERS = ("linear_kl", "selective_log_softmax", "selective_log_softmax" + H, "logits_ppo_loss", "logits_ppo_loss" + H)
# There are many cases, so the other dtypes have the smallest shape alone
over_sizes = pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape, dtype in SHAPES_AND_DTYPES if dtype == "bf16" or shape == SHAPES[-1]],
    ids=str,
)
OF_16_BITS = ("hidden", "weight", "ref_hidden", "logits")  # what a model makes; the rest is fp32
CASES = [Case(name, backend, way) for name, way, backend in product(LINEAR, IMPLEMENTATIONS, ("torch", "triton"))]
CASES += [Case(name, backend) for name, backend in product(OTHERS, ("torch", "triton"))]


@over_sizes
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=needs_triton if c.backend == "triton" else (), id=str(c)) for c in CASES]
)
def test_values_and_gradients_at_real_sizes(case: Case, shape: Shape, dtype: str) -> None:
    n, d, v = shape
    with torch.device(DEVICE):
        data = case.make((n,), d, v, mask=torch.arange(n) % 7 != 3)
    low = {name: x.to(DTYPES[dtype]) if name in OF_16_BITS else x for name, x in data.items()}
    with tuning.override(implementation=case.implementation):
        compare(case, low, torch.randn(n, device=DEVICE), tolerance=tolerance_of(case, dtype))


def tolerance_of(case: Case, dtype: str) -> float:
    return LOGPROB_TOLERANCES[DTYPES[dtype], 4] if case.function.per_token else LOSS_TOLERANCE


def eager_dpo(hidden: torch.Tensor, weight: torch.Tensor, **batch: Any) -> torch.Tensor:
    """The loss by the reference's log-probabilities, sequence by sequence."""
    ids, ref, mask = batch["sequence_ids"], batch["ref_logps"], batch["sequence_ids"] >= 0
    logps = oracle.linear_logprobs(hidden, weight, batch["targets"], mask=mask).logprobs
    sums = torch.stack([logps[ids == place].sum() for place in range(4)])
    return dpo_loss(sums[:2], sums[2:], ref[:2].to(sums), ref[2:].to(sums), beta=0.1).loss


@over_paths
@over_sizes
def test_dpo_at_real_sizes(shape: Shape, dtype: str, implementation: str, backend: str) -> None:
    """Two pairs, packed, with prompts between; the margin is where the loss bends."""
    n, d, v = shape
    hidden, weight, targets = inputs(n, d, v, DTYPES[dtype])
    ids = torch.tensor([-1, 0, 0, -1, 2, 2, 1, -1, 3], device=DEVICE).repeat_interleave(-(-n // 9))[:n]
    ids[-1] = 3
    with torch.no_grad():
        logps = oracle.linear_logprobs(hidden.float(), weight.float(), targets).logprobs
    ref = torch.stack([logps[ids == place].sum() for place in range(4)]) + torch.tensor([3.0, -2, 4, 1], device=DEVICE)
    batch = {"targets": targets.masked_fill(ids < 0, -100), "sequence_ids": ids, "ref_logps": ref}
    leaf = hidden.requires_grad_()
    with tuning.override(implementation=implementation):
        first, second = (linear_dpo_loss(leaf, weight, **batch, beta=0.1, backend=backend).loss for _ in range(2))
    assert torch.equal(first, second)
    grad, again = (torch.autograd.grad(loss, leaf)[0] for loss in (first, second))
    assert torch.equal(grad, again)
    others = [leaf.detach().to(cast).requires_grad_() for cast in (torch.float64, DTYPES[dtype])]
    found = [eager_dpo(other, weight.to(other.dtype), **batch) for other in others]
    true_grad, eager_grad = (torch.autograd.grad(*pair)[0] for pair in zip(found, others, strict=True))
    most = int((ids == 3).sum().maximum((ids == 0).sum()))
    assert_within(first, found[0], 0.1 * 2 * most * LOGPROB_TOLERANCES[DTYPES[dtype], 4])
    assert_like_eager(grad, eager_grad, true_grad)
