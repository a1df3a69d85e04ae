"""What becomes of scores before they are rewards: dense parts, scale, costs, and the value after a cut answer."""

from __future__ import annotations

import math

import pytest
import torch

from onecard.algorithms.ppo.constraint import apply_constraint, next_multiplier
from onecard.algorithms.ppo.experience import (
    ModelOutputs,
    compute_model_outputs,
    make_experiences,
    objective_metrics,
    shape_rewards,
)
from onecard.algorithms.ppo.job import AdaptiveState, next_adaptive_state, update_metrics
from onecard.algorithms.ppo.scores import Scale, ScoredAnswers, measure_scale, score_metrics
from onecard.config import PPOConfig
from onecard.data import Prompt
from onecard.data.batches import last_rows, pack, pack_experience
from onecard.models.build import load_ppo_roles
from onecard.rewards.mixture import Scores
from onecard.training import metrics
from onecard.utils.errors import OnecardError
from tests.engine.ppo_material import EPISODES, PASSES, episode

DENSE = [torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.0, 3.0])]


def test_dense_rewards_stay_at_their_tokens():
    shaped = shape_rewards(PASSES, torch.tensor([2.0, -1.0]), 0.1, PPOConfig(), dense=DENSE)
    expected = torch.tensor([[-0.05 + 0.5, 0.025 + 0.25 + 2.0, 0.0], [-0.1 + 1.0, 2.0, -0.05 + 3.0 - 1.0]])
    torch.testing.assert_close(shaped.rewards, expected)


def test_a_scale_takes_the_mean_from_the_terminal_part_alone():
    """Sums 2.75 and 5 at mean 1 and deviation 2: 0.875 and 2. Per token only the deviation counts."""
    scores = Scores(torch.tensor([2.0, -1.0]), {"a": torch.tensor([7.0, 8.0])}, DENSE)
    scaled = Scale(mean=1.0, std=2.0).of(scores)
    assert scaled.terminal.tolist() == [0.5, -1.0]
    assert [each.tolist() for each in scaled.dense] == [[0.25, 0.125], [0.5, 1.0, 1.5]]
    assert scaled.sums.tolist() == [0.875, 2.0]
    assert scaled.parts["a"].tolist() == [7.0, 8.0]
    same = Scale().of(scores)
    assert torch.equal(same.terminal, scores.terminal)
    assert all(map(torch.equal, same.dense, DENSE))


class SampledTokens:
    """A sampler and a judge in one: answers are numbers that are drawn, and their own scores."""

    tokenizer = None

    def __init__(self, spread: float) -> None:
        self.spread, self.asked, self.drawn = spread, [], torch.empty(0)

    def sample(self, roles, prompts, bar):
        self.asked.append([prompt.text for prompt in prompts])
        self.drawn = torch.rand(len(prompts)) * self.spread + 5.0
        return SampledTokens.Found(list(self.drawn))

    def scores(self, roles, tokenizer, prompts, episodes):
        return Scores(torch.stack(episodes), {})

    class Found:
        def __init__(self, episodes):
            self.episodes = episodes


class Somewhere:
    device = torch.device("cpu")


@pytest.mark.parametrize(("prompts", "expected"), [(200, 64), (10, 10)])
def test_the_scale_is_of_the_starting_policy_s_answers(capsys, prompts, expected):
    """The same draws whatever was drawn before, and no draw of the run's own is used up."""
    training, config = [Prompt(str(i), (i,)) for i in range(prompts)], PPOConfig()
    first = SampledTokens(2.0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    scale = measure_scale(Somewhere, first, first, training, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert f"from {expected} answers" in " ".join(capsys.readouterr().err.split())
    [places] = first.asked
    assert len(set(places)) == len(places) == expected
    assert 5.0 < scale.mean < 7.0
    drawn = first.drawn.double()
    assert scale.mean == pytest.approx(float(drawn.mean()), rel=1e-12)
    assert scale.std == pytest.approx(float((drawn - drawn.mean()).square().mean().sqrt()), rel=1e-12)
    torch.manual_seed(1)
    assert measure_scale(Somewhere, SampledTokens(2.0), SampledTokens(2.0), training, config) == scale
    assert measure_scale(Somewhere, SampledTokens(2.0), SampledTokens(2.0), training, PPOConfig(seed=1)) != scale


def test_scores_that_are_all_alike_cannot_be_normalised():
    with pytest.raises(
        OnecardError, match=r"normalize_reward: 3 answers .* all score 5, so their standard deviation is 0"
    ):
        measure_scale(Somewhere, SampledTokens(0.0), SampledTokens(0.0), [Prompt("a", (1,))] * 3, PPOConfig())


# ---------------------------------------------------------------------------------------------------------- constraints

COSTS = torch.tensor([0.5, 1.5])


def test_skip_leaves_out_what_costs_more_than_the_threshold():
    scores = torch.tensor([2.0, -1.0])
    found = apply_constraint(scores, COSTS, 3.0, PPOConfig(constraint_mode="skip", constraint_threshold=0.5))
    assert found.in_loss.tolist() == [True, False]
    assert torch.equal(found.scores, scores)
    none = apply_constraint(scores, None, 3.0, PPOConfig(constraint_mode="lagrangian"))
    assert none.in_loss.all()
    assert torch.equal(none.scores, scores)


def test_lagrangian_subtracts_lambda_times_the_cost():
    config = PPOConfig(constraint_mode="lagrangian", constraint_threshold=0.5)
    found = apply_constraint(torch.tensor([2.0, -1.0]), COSTS, 3.0, config)
    assert found.in_loss.all()
    assert found.scores.tolist() == [0.5, -5.5]


def test_lambda_follows_the_mean_cost_and_never_falls_below_0():
    """Threshold 0.5, rate 0.1: a mean cost of 2.5 adds 0.2 each time; one of 0 takes 0.05, down to 0."""
    config = PPOConfig(constraint_mode="lagrangian", constraint_threshold=0.5, constraint_lambda_lr=0.1)
    multiplier = 1.0
    for _ in range(3):
        multiplier = next_multiplier(multiplier, 2.5, config)
    assert multiplier == pytest.approx(1.6)
    assert next_multiplier(multiplier, 0.5, config) == multiplier
    for _ in range(40):
        multiplier = next_multiplier(multiplier, 0.0, config)
    assert multiplier == 0.0


def test_lambda_moves_in_lagrangian_alone():
    config = PPOConfig(adap_kl_ctrl=True, adap_kl_target=6.0, adap_kl_horizon=1000, constraint_lambda_lr=0.1)
    before = AdaptiveState(0.1, 1.0, Scale(2.0, 3.0))
    row = {"objective/kl": 12.0, "constraint/cost": 2.0}
    assert next_adaptive_state(before, row, 100, config) == AdaptiveState(pytest.approx(0.102), 1.0, Scale(2.0, 3.0))
    after = next_adaptive_state(before, {**row, "constraint/lambda": 1.0}, 100, config)
    assert after == AdaptiveState(pytest.approx(0.102), pytest.approx(1.2), Scale(2.0, 3.0))


def test_cost_metrics():
    scored = ScoredAnswers(Scores(torch.zeros(2), {"a": torch.tensor([1.0, 2.0])}), COSTS)
    row = score_metrics(scored, PPOConfig(constraint_threshold=0.5))
    assert row == {"rewards/a/mean": 1.5, "constraint/cost": 1.0, "constraint/violation_rate": 0.5}
    assert score_metrics(ScoredAnswers(scored.scores), PPOConfig()) == {"rewards/a/mean": 1.5}


def test_an_answer_left_out_is_in_no_experience_and_no_mean():
    """lam = 1: of the first answer alone, raw advantages 1.5 and 1.75; whitened, -+1/sqrt(2)."""
    in_loss = torch.tensor([True, False])
    shaped = shape_rewards(PASSES, torch.tensor([2.0, 50.0]), 0.0, PPOConfig(lam=1.0), in_loss=in_loss)
    root = math.sqrt(0.5)
    torch.testing.assert_close(shaped.advantages, torch.tensor([[-root, root, 0], [0, 0, 0]]), atol=1e-5, rtol=0)
    [experience] = make_experiences(EPISODES, PASSES, shaped)
    assert experience.episode is EPISODES[0]
    white = shape_rewards(
        PASSES, torch.tensor([2.0, 50.0]), 0.0, PPOConfig(whiten_rewards=True, lam=1.0), in_loss=in_loss
    ).rewards
    # Rewards 0 and 2: mean 1, unbiased variance 2
    torch.testing.assert_close(white[0, :2], torch.tensor([1 - root, 1 + root]))


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_an_answer_alone_in_its_group_gives_no_experience(estimator):
    """Of groups of 2, 1 and 0 answers in the loss, the first is learned from, and is what it would be by itself."""
    passes = ModelOutputs(3 * PASSES.logprobs, 3 * PASSES.ref_logprobs)
    scores = torch.tensor([2.0, -1.0, 5.0, 7.0, 1.0, 3.0])
    in_loss = torch.tensor([True, True, True, False, False, False])
    config = PPOConfig(advantage_estimator=estimator, num_generations=2)
    shaped = shape_rewards(passes, scores, 0.1, config, in_loss=in_loss)
    found = make_experiences(3 * EPISODES, passes, shaped)
    whole = shape_rewards(ModelOutputs(PASSES.logprobs, PASSES.ref_logprobs), scores[:2], 0.1, config)
    assert [experience.advantages.tolist() for experience in found] == [
        row[: len(piece)].tolist() for row, piece in zip(whole.advantages, PASSES.logprobs, strict=True)
    ]
    assert shaped.mask.sum(1).tolist() == [2, 3, 0, 0, 0, 0]


def test_where_nothing_is_left_no_update_is_made():
    shaped = shape_rewards(PASSES, torch.zeros(2), 0.1, PPOConfig(), in_loss=torch.zeros(2).bool())
    assert make_experiences(EPISODES, PASSES, shaped) == []
    row = objective_metrics(EPISODES, PASSES, shaped, torch.zeros(2), 0.1)
    assert "val/explained_variance" not in row
    assert all(map(math.isfinite, row.values()))
    assert update_metrics([], 0) == {"policy/updates": 0.0}


def test_what_is_maximised_is_less_what_a_constraint_takes():
    shaped = shape_rewards(PASSES, torch.tensor([2.0, -1.0]), 0.1, PPOConfig())
    row = objective_metrics(EPISODES, PASSES, shaped, torch.tensor([2.0, -1.0]), 0.1, 0.75)
    assert row["objective/scores"] == 0.5
    assert row["objective/rlhf_reward"] == pytest.approx(0.5 - 0.0875 - 0.75)


# ------------------------------------------------------------------------------------------------- critics, and without


def with_values(model, **settings):
    """Roles whose critic's values are no zeros."""
    config = PPOConfig(model=str(model), **settings)
    roles = load_ppo_roles(config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in roles.heads["value"].parameters():
            parameter.copy_(torch.randn_like(parameter))
    return roles, config


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_a_cut_answer_ends_in_the_critic_s_value_of_its_last_row(tiny_model, critic):
    """0 where it ended by itself; and without the setting there is none."""
    roles, config = with_values(tiny_model, bootstrap_truncated=True, critic=critic)
    episodes = [episode(4, 6, finished=False), episode(2, 3), episode(3, 1, finished=False)]
    passes = compute_model_outputs(roles, episodes, config)
    assert [len(values) for values in passes.values] == [6, 3, 1]
    for place, one in enumerate(episodes):
        batch = pack([one.sequence])
        with torch.no_grad(), roles.active("value"):
            k = len(passes.values[place])
            alone = roles.scalars(batch, torch.arange(len(one) - k - 1, len(one)))
            assert torch.equal(last_rows(batch), torch.tensor([len(one) - 1]))
        torch.testing.assert_close(passes.values[place], alone[:-1])
        expected = torch.tensor(0.0) if one.finished else alone[-1]
        torch.testing.assert_close(passes.last_values[place], expected)
    off = compute_model_outputs(roles, episodes, PPOConfig(model=str(tiny_model), critic=critic))
    assert off.last_values is None
    assert all(map(torch.equal, off.values, passes.values))
    scores = torch.tensor([1.0, 2.0, 3.0])
    gained = [shape_rewards(p, scores, 0.0, PPOConfig(lam=1.0)).returns for p in (passes, off)]
    torch.testing.assert_close((gained[0] - gained[1])[:, 0], passes.last_values)  # gamma = 1


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "grpo"])
def test_without_a_critic_there_is_no_role_no_pass_and_no_value(tiny_model, estimator):
    config = PPOConfig(model=str(tiny_model), advantage_estimator=estimator, num_generations=2)
    roles = load_ppo_roles(config)
    assert roles.trained == ("policy",)
    assert set(roles.adapters) == {"policy", "reference"}
    assert not roles.heads
    passes = compute_model_outputs(roles, EPISODES, config)
    assert passes.values is None
    shaped = shape_rewards(passes, torch.tensor([1.0, 2.0]), 0.1, config)
    made = make_experiences(EPISODES, passes, shaped)
    assert pack_experience(made).old_values is None
    assert "val/explained_variance" not in objective_metrics(EPISODES, passes, shaped, torch.zeros(2), 0.1)


def test_each_phase_has_its_own_peak_and_the_run_the_highest(monkeypatch):
    """Peaks of 5 GiB before, 3 in one phase, 4 in the next: the counter begins anew, the run's peak does not."""
    peak = [5.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0] * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 1.0))
    monkeypatch.setattr(metrics, "EARLIER_PEAK", [0.0])
    row: dict[str, float] = {}
    with metrics.phase_memory(row, "memory/rollout_gib"):
        peak[0] = 3.0
    peak[0] = 3.5
    with metrics.phase_memory(row, "memory/learn_gib"):
        assert peak == [1.0]
        peak[0] = 4.0
    assert row == {"memory/rollout_gib": 3.0, "memory/learn_gib": 4.0}
    assert metrics.peak_memory_gib() == 5.0
    peak[0] = 6.0
    assert metrics.peak_memory_gib() == 6.0
