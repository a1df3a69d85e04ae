"""Each advantage estimator against numbers worked by hand, and against the others where they must be equal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from onecard.algorithms.ppo.estimators import ESTIMATORS, AdvantageInput
from onecard.config import PPOConfig
from onecard_kernels import gae, masked_whiten

# Four answers of 2, 3, 1 and 2 tokens; the first two have one prompt, the last two another.
REWARDS = torch.tensor([[-0.5, 2.0, 9.0], [0.25, 0.0, -1.25], [3.0, 9.0, 9.0], [0.0, 1.0, 9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
VALUES = torch.tensor([[0.5, 0.25, 9.0], [1.0, 0.0, -0.5], [2.0, 9.0, 9.0], [0.0, 0.5, 9.0]])
GIVEN = AdvantageInput(REWARDS, MASK, VALUES, gamma=0.5, lam=0.9, group_size=2)
# Sums: 1.5, -1 | 3, 1


def whitened(raw: list[list[float]], mask: torch.Tensor = MASK) -> torch.Tensor:
    """Mean 0 and unbiased variance 1 over the entries that count."""
    values = torch.tensor(raw)[mask].tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return torch.where(mask, (torch.tensor(raw) - mean) / deviation, 0.0)


def test_gae_is_the_kernel_s_whitened():
    found = ESTIMATORS["gae"](GIVEN)
    plain = gae(REWARDS, VALUES, MASK, gamma=0.5, lam=0.9)
    assert torch.equal(found.advantages, masked_whiten(plain.advantages, MASK))
    assert torch.equal(found.returns, plain.returns)


def test_a2c_is_the_reward_to_go_less_the_value_for_any_lam():
    """gamma = 1/2. Returns 0.5, 2 | -1/16, -5/8, -5/4 | 3 | 1/2, 1; less values 1/2, 1/4 | 1, 0, -1/2 | 2 | 0, 1/2."""
    found = ESTIMATORS["a2c"](GIVEN)
    returns = torch.tensor([[0.5, 2.0, 0.0], [-0.0625, -0.625, -1.25], [3.0, 0.0, 0.0], [0.5, 1.0, 0.0]])
    torch.testing.assert_close(found.returns, returns)
    raw = [[0.0, 1.75, 0.0], [-1.0625, -0.625, -0.75], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    torch.testing.assert_close(found.advantages, whitened(raw))
    again = ESTIMATORS["a2c"](replace(GIVEN, lam=0.3))
    assert torch.equal(again.advantages, found.advantages)
    assert torch.equal(found.advantages, ESTIMATORS["gae"](replace(GIVEN, lam=1.0)).advantages)


def test_reinforce_is_the_whitened_reward_to_go_without_a_critic():
    found = ESTIMATORS["reinforce"](replace(GIVEN, values=None))
    raw = [[0.5, 2.0, 0.0], [-0.0625, -0.625, -1.25], [3.0, 0.0, 0.0], [0.5, 1.0, 0.0]]
    torch.testing.assert_close(found.advantages, whitened(raw))
    torch.testing.assert_close(found.returns, torch.tensor(raw))


def test_rloo_and_grpo_compare_whole_answers_to_one_prompt():
    """Sums 1.5 and -1: each less the other is +-2.5. 3 and 1: +-2. Over the group's deviation, +-1/sqrt(2)."""
    given = replace(GIVEN, values=None, gamma=1.0)
    rloo = ESTIMATORS["rloo"](given).advantages
    expected = torch.tensor([[2.5, 2.5, 0.0], [-2.5, -2.5, -2.5], [2.0, 0.0, 0.0], [-2.0, -2.0, 0.0]])
    torch.testing.assert_close(rloo, expected)
    grpo = ESTIMATORS["grpo"](given).advantages
    first, second = 1.25 / (1.25 * math.sqrt(2) + 1e-4), 1.0 / (math.sqrt(2) + 1e-4)
    expected = torch.tensor([[first, first, 0], [-first, -first, -first], [second, 0, 0], [-second, -second, 0]])
    torch.testing.assert_close(grpo, expected)
    three = AdvantageInput(torch.tensor([[1.0], [4.0], [7.0]]), torch.ones(3, 1).bool(), group_size=3)
    assert ESTIMATORS["rloo"](three).advantages.flatten().tolist() == [-4.5, 0.0, 4.5]
    # std (unbiased) of 1, 4, 7 is 3
    assert ESTIMATORS["grpo"](three).advantages.flatten().tolist() == pytest.approx([-1, 0, 1], abs=1e-4)


@pytest.mark.parametrize("name", ["gae", "a2c"])
def test_a_cut_answer_s_return_goes_on_with_its_last_value(name):
    """gamma = 1/2: half the last value at the last token, a quarter one before. (With lam = 1, that is all it adds.)"""
    last = torch.tensor([8.0, 0.0, 0.0, 4.0])
    given = replace(GIVEN, lam=1.0)
    more = ESTIMATORS[name](replace(given, last_values=last)).returns
    added = more - ESTIMATORS[name](given).returns
    torch.testing.assert_close(added, torch.tensor([[2.0, 4, 0], [0, 0, 0], [0, 0, 0], [1, 2, 0]]))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_answer_left_out_has_no_part_in_others_advantages(name):
    """Whatever it earned: no mean, no deviation and no group has it. Alone in its group, an answer has advantage 0."""
    kept = torch.tensor([True, True, True, False])
    values = VALUES if name in ("gae", "a2c") else None
    given = replace(GIVEN, mask=MASK & kept.unsqueeze(1), values=values)
    found = ESTIMATORS[name](given).advantages
    other = given.rewards.clone()
    other[3] = 1e6
    assert torch.equal(ESTIMATORS[name](replace(given, rewards=other)).advantages, found)
    assert not found[3].any()
    assert found[:2].any()
    if PPOConfig(advantage_estimator=name).has_groups:
        assert not found[2].any()
        whole = ESTIMATORS[name](replace(given, mask=MASK)).advantages
        assert torch.equal(found[:2], whole[:2])
    else:
        assert float(found.sum()) == pytest.approx(0.0, abs=1e-5)  # mean 0 over what is left


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_padding_may_hold_anything(name):
    values = VALUES if PPOConfig(advantage_estimator=name).has_critic else None
    given = replace(GIVEN, values=values)
    dirty = replace(given, rewards=torch.where(MASK, REWARDS, float("nan")))
    for clean, found in zip(ESTIMATORS[name](given), ESTIMATORS[name](dirty), strict=True):
        assert torch.equal(clean, found)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_those_that_ask_a_critic_are_those_that_get_one(name):
    given = replace(GIVEN, values=None)
    if PPOConfig(advantage_estimator=name).has_critic:
        with pytest.raises(ValueError, match="values is None"):
            ESTIMATORS[name](given)
    else:
        with_critic = ESTIMATORS[name](replace(given, values=VALUES))
        assert torch.equal(ESTIMATORS[name](given).advantages, with_critic.advantages)
