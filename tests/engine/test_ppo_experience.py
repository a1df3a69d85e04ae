"""From episodes to advantages, by hand: where the score goes, what the KL costs, what is whitened, what is adapted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from onecard.algorithms.ppo.experience import (
    explained_variance,
    make_experiences,
    next_kl_coef,
    objective_metrics,
    pad,
    shape_rewards,
)
from onecard.config import PPOConfig
from onecard.data.batches import pack_experience
from tests.engine.ppo_material import EPISODES, PASSES

SCORES = torch.tensor([2.0, -1.0])


def test_kl_is_paid_per_token_and_the_score_at_the_last():
    """-0.1 * KL on each token; 2 and -1 on the answers' own last tokens, not on the padded row's last place."""
    shaped = shape_rewards(PASSES, SCORES, 0.1, PPOConfig())
    expected = torch.tensor([[-0.05, 0.025 + 2.0, 0.0], [-0.1, 0.0, -0.05 - 1.0]])
    torch.testing.assert_close(shaped.rewards, expected)
    assert shaped.mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("estimator", "first", "second"),
    [
        ("k1", 0.5, -0.25),
        ("k2", 0.125, 0.03125),
        ("k3", math.exp(-0.5) - 0.5, math.exp(0.25) - 1.25),
    ],
)
def test_estimators_of_that_kl(estimator, first, second):
    shaped = shape_rewards(PASSES, torch.zeros(2), 2.0, PPOConfig(kl_estimator=estimator))
    assert shaped.rewards[0].tolist() == pytest.approx([-2.0 * first, -2.0 * second, 0.0], abs=1e-6)


def test_returns_are_monte_carlo_at_lam_1_and_td_at_lam_0():
    """No KL. Answer 1: rewards 0, 2, values 1/2, 1/4. Answer 2: rewards 0, 0, -1, values 1, 0, -1/2."""
    monte_carlo = shape_rewards(PASSES, SCORES, 0.0, PPOConfig(gamma=1.0, lam=1.0))
    torch.testing.assert_close(monte_carlo.returns, torch.tensor([[2.0, 2.0, 0.0], [-1.0, -1.0, -1.0]]))
    td = shape_rewards(PASSES, SCORES, 0.0, PPOConfig(gamma=0.5, lam=0.0))
    # r + gamma V': 0.125, 2 | 0, -0.25, -1
    torch.testing.assert_close(td.returns, torch.tensor([[0.125, 2.0, 0.0], [0.0, -0.25, -1.0]]))


def test_advantages_are_whitened_over_all_response_tokens():
    """lam = 1: raw advantages 1.5, 1.75, -2, -1, -0.5: mean -0.05, unbiased variance (10.5625 - 0.0125) / 4."""
    shaped = shape_rewards(PASSES, SCORES, 0.0, PPOConfig(lam=1.0))
    raw = torch.tensor([[1.5, 1.75, 0.0], [-2.0, -1.0, -0.5]])
    expected = torch.where(shaped.mask, (raw + 0.05) / math.sqrt(2.6375), 0.0)
    torch.testing.assert_close(shaped.advantages, expected, atol=1e-6, rtol=1e-6)


def test_reward_whitening_keeps_the_mean_and_comes_before_gae():
    """Rewards 0, 2, 0, 0, -1: mean 0.2, unbiased variance 1.2; scaled by 1/sqrt(1.2) around 0.2."""
    shaped = shape_rewards(PASSES, SCORES, 0.0, PPOConfig(lam=1.0, whiten_rewards=True))

    def white(reward: float) -> float:
        return (reward - 0.2) / math.sqrt(1.2) + 0.2

    expected = torch.tensor([[white(0), white(2), 0.0], [white(0), white(0), white(-1)]])
    torch.testing.assert_close(shaped.rewards, expected)
    assert shaped.returns[0].tolist() == pytest.approx([white(0) + white(2), white(2), 0.0])
    assert float(shaped.rewards[shaped.mask].mean()) == pytest.approx(0.2)


def test_metrics_by_hand():
    shaped = shape_rewards(PASSES, SCORES, 0.1, PPOConfig())
    metrics = objective_metrics(EPISODES, PASSES, shaped, SCORES, 0.1)
    assert metrics["objective/kl"] == pytest.approx((0.25 + 1.5) / 2)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.0875)
    assert metrics["objective/scores"] == 0.5
    assert metrics["objective/scores_std"] == 1.5
    assert metrics["objective/rlhf_reward"] == pytest.approx(0.4125)
    assert metrics["objective/entropy"] == 3.0
    assert metrics["objective/kl_coef"] == 0.1
    assert metrics["completions/mean_length"] == 2.5
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["val/num_eos_tokens"] == 1.0


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((3,), 2.0), returns) == pytest.approx(0.0)
    assert explained_variance(returns + 5.0, returns) == pytest.approx(1.0)  # a constant offset is no variance
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(3)) == 0.0  # nothing to explain


def test_experiences_hold_each_answer_s_own_tokens_in_order():
    """What is padded for GAE is cut again, so that packing lines up with `response_targets`."""
    shaped = shape_rewards(PASSES, SCORES, 0.1, PPOConfig())
    experiences = make_experiences(EPISODES, PASSES, shaped)
    assert [experience.num_response_tokens for experience in experiences] == [2, 3]
    batch = pack_experience(experiences)
    targets = batch.sequences.targets
    assert targets.sequence_ids.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(batch.old_logprobs, torch.cat(PASSES.logprobs))
    assert torch.equal(batch.old_values, torch.cat(PASSES.values))
    assert torch.equal(batch.returns, shaped.returns[shaped.mask])
    assert torch.equal(batch.advantages, shaped.advantages[shaped.mask])
    assert pad(PASSES.values).shape == (2, 3)


def test_a_fixed_coefficient_stays():
    assert next_kl_coef(0.05, 100.0, 64, PPOConfig(adap_kl_ctrl=False, adap_kl_target=6.0)) == 0.05


def test_the_adaptive_coefficient_follows_its_closed_form():
    """Target 6, horizon 1000, 100 answers: errors of +1 and -1 count as +-0.2, so it changes by 2 % at most."""
    config = PPOConfig(adap_kl_ctrl=True, adap_kl_target=6.0, adap_kl_horizon=1000)
    assert next_kl_coef(0.1, 12.0, 100, config) == pytest.approx(0.1 * 1.02)
    assert next_kl_coef(0.1, 0.0, 100, config) == pytest.approx(0.1 * 0.98)
    assert next_kl_coef(0.1, 6.6, 100, config) == pytest.approx(0.1 * 1.01)
    assert next_kl_coef(0.1, 6.0, 100, config) == 0.1
    coefficient = 0.1
    for _ in range(50):
        coefficient = next_kl_coef(coefficient, 30.0, 100, config)
    assert coefficient == pytest.approx(0.1 * 1.02**50)
    assert next_kl_coef(0.1, 12.0, 100, replace(config, adap_kl_horizon=500)) == pytest.approx(0.1 * 1.04)
