"""Means, intervals and variety, against hand-worked constants and other formulas."""

from __future__ import annotations

import json
import math
from statistics import NormalDist, mean, stdev

import pytest
import torch

from onecard.commands.statistics import Z95, Estimate, distinct, estimate, win_rate
from onecard.rollout import Sampling, sample_token, uniforms_of
from tests.engine.rollout_material import frequent_stop_tokens


def test_the_standard_error_is_that_of_a_mean():
    values = [1.0, 2.0, 2.5, 7.0]
    found = estimate(values)
    assert found.mean == mean(values)
    assert found.stderr == pytest.approx(stdev(values) / 2)
    assert estimate([3.0]) == Estimate(3.0, None)


def test_ties_count_half():
    found = win_rate([1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 1.0])
    assert (found.wins, found.ties, found.losses, found.mean) == (2, 1, 1, 0.625)


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (10, 10), (3, 10), (60, 100), (1, 1)])
def test_the_interval_holds_shares_that_counts_allow(wins, count):
    """Wilson's bounds are the p at which the observed share is z standard deviations of p away."""
    found = win_rate([1.0] * wins + [0.0] * (count - wins), [0.5] * count)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    for bound in (found.low, found.high):
        away = abs(found.mean - bound)
        assert away == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / count), abs=1e-9)
    assert NormalDist().inv_cdf(0.975) == pytest.approx(Z95, abs=1e-6)


def test_wilsons_interval_of_three_in_ten():
    """Worked by hand: (0.3 + 0.19207 +- 1.96 sqrt(0.021 + 0.0096037)) / 1.38415."""
    found = win_rate([1.0] * 3 + [0.0] * 7, [0.5] * 10)
    assert found.low == pytest.approx(0.107789, abs=1e-5)
    assert found.high == pytest.approx(0.603222, abs=1e-5)


def test_distinct_counts_runs_over_all_answers():
    answers = [[1, 2, 1, 2], [1, 2], [3], []]
    assert distinct(answers, 1) == 3 / 7
    assert distinct(answers, 2) == 2 / 4
    assert distinct(answers, 5) == 0.0


# --- draws of a prompt's own


def test_chances_pick_by_the_sums_of_the_probabilities():
    """Probabilities 0.2, 0, 0.5, 0.3: a chance on a bound belongs to the token after it; none to the impossible one."""
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(8, 4)
    uniforms = torch.tensor([0.0, 0.19999, 0.20001, 0.5, 0.69999, 0.70001, 0.9, 1 - 2**-24])
    tokens, logprobs = sample_token(logits, Sampling(1), [], uniforms)
    assert tokens.tolist() == [0, 0, 2, 2, 2, 3, 3, 3]
    torch.testing.assert_close(logprobs, torch.tensor([0.2, 0.2, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3]).log())


def test_a_token_of_probability_0_is_not_drawn_at_chance_0():
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]]).expand(2, 4)
    tokens, _ = sample_token(logits, Sampling(1), [], torch.tensor([0.0, 1 - 2**-24]))
    assert tokens.tolist() == [1, 2]


def test_chances_draw_the_models_own_distribution():
    """Chi-square over 20,000 chances as they are made for a prompt."""
    torch.manual_seed(0)
    logits = torch.randn(50)
    count = 20_000
    tokens, _ = sample_token(logits.expand(count, 50), Sampling(1, 1.3), [], uniforms_of(42, 7, count))
    expected = (logits / 1.3).softmax(-1) * count
    chi = ((torch.bincount(tokens, minlength=50) - expected) ** 2 / expected).sum()
    assert chi < 49 + 4 * (2 * 49) ** 0.5


def test_chances_depend_on_seed_and_prompt_alone():
    state = torch.get_rng_state()
    first = uniforms_of(1, 2, 8)
    assert torch.equal(first[:3], uniforms_of(1, 2, 3))
    assert not torch.equal(first, uniforms_of(1, 3, 8))
    assert not torch.equal(first, uniforms_of(2, 2, 8))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 5, 18])
def test_each_prompt_has_its_own_draws_whatever_leaves_the_batch(policy, batch_size):
    """Answers of many lengths: rows leave, and those that stay keep their numbers."""
    settings = {"stop_tokens": frequent_stop_tokens(policy), "seed": 3}
    prompts = policy.prompts * 3
    found = policy.sample(Sampling(24), prompts, batch_size=batch_size, **settings).responses
    assert len({len(response.tokens) for response in found}) > 5
    last = policy.sample(Sampling(24), prompts, batch_size=7, **settings).responses
    assert [response.tokens for response in found] == [response.tokens for response in last]
    assert len({response.tokens for response in found}) == len(prompts)


def test_estimates_go_into_json():
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(Estimate(1.0)))) == {"mean": 1.0, "stderr": None}
