"""Losses of tokens and GAE at a rollout's size, with very long rows and with very many, against fp64."""

from __future__ import annotations

import pytest
import torch

from onecard_kernels import gae, ppo_loss, value_loss
from tests.closeness import assert_within, error
from tests.gpu.card import DEVICE, needs_triton, normal, over_backends, sized
from tests.kernels import oracle
from tests.kernels.regression_material import Case
from tests.kernels.regression_running import compare

# A grid's second and third dimension end at 65,535
SHAPES = sized({"rollout": (64, 4096), "long rows": (3, 70001), "many rows": (65541, 3)},
               {"rollout": (3, 65), "long rows": (2, 1100), "many rows": (9, 3)})  # fmt: skip
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def holes(shape: tuple[int, int]) -> torch.Tensor:
    """Tokens that count; rows end anywhere, have holes, and the second has none at all."""
    ends = torch.randint(1, shape[1] + 1, (shape[0], 1), device=DEVICE)
    mask = (torch.arange(shape[1], device=DEVICE) < ends) & (torch.rand(shape, device=DEVICE) > 0.1)
    mask[1] = False
    return mask


@over_backends
@over_shapes
@pytest.mark.parametrize("loss", ["ppo_loss", "value_loss"])
def test_losses_of_tokens_against_fp64(loss: str, shape: tuple[int, int], backend: str) -> None:
    case = Case(loss, backend)
    with torch.device(DEVICE):
        data = case.make(shape, mask=holes(shape))
    value, grads = compare(case, data)
    again, grads_again = compare(case, data)
    assert torch.equal(value, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@over_backends
@over_shapes
def test_gae_against_fp64(shape: tuple[int, int], backend: str) -> None:
    rewards, values, mask, last = normal(*shape), normal(*shape), holes(shape), normal(shape[0])
    options = {"gamma": 0.99, "lam": 0.95}
    got = gae(rewards, values, mask, last_values=last, **options, backend=backend)
    exact = [x.double().cpu() for x in (rewards, values)]
    right = oracle.gae(*exact, mask.cpu(), last_values=last.double().cpu(), **options)
    eager = oracle.gae(rewards.cpu(), values.cpu(), mask.cpu(), last_values=last.cpu(), **options)
    for ours, plain, true in zip(got, eager, right, strict=True):
        assert_within(ours.cpu(), true, 2 * error(plain, true) + 2e-5)
        assert torch.equal(ours[~mask], torch.zeros_like(ours[~mask]))
    again = gae(rewards, values, mask, last_values=last, **options, backend=backend)
    assert all(torch.equal(one, two) for one, two in zip(got, again, strict=True))


@needs_triton
@over_shapes
def test_both_backends_log_the_same(shape: tuple[int, int]) -> None:
    mask, (logp, old, ref, gain, entropy) = holes(shape), (normal(*shape) * 0.1 - 3 for _ in range(5))
    found = []
    for backend in ("torch", "triton"):
        options = {"entropy": entropy, "entropy_coef": 0.01, "ref_logprobs": ref, "kl_coef": 0.05, "dual_clip": 3.0}
        policy = ppo_loss(logp, old, gain + 3, mask, **options, backend=backend)
        critic = value_loss(logp, old, ref, mask, backend=backend)
        found.append({**policy.metrics, **critic.metrics, "loss": policy.loss, "critic": critic.loss})
    assert found[0].keys() == found[1].keys()
    for name, right in found[0].items():
        assert_within(found[1][name], right, 1e-5 + 1e-5 * float(right.abs()), name)
