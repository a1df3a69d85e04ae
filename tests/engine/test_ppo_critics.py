"""The critic as an adapter of its own, as a head on the policy, and as nobody; and the ratio that is not clipped."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from onecard.algorithms.ppo.experience import compute_model_outputs, make_experiences, shape_rewards
from onecard.algorithms.ppo.job import critic_loss, ppo_losses, ppo_objective
from onecard.config import PPOConfig, RewardConfig
from onecard.data.batches import Episode, Experience, ExperienceBatch, TokenSequence, pack_experience
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles

SETTINGS = {"temperature": 0.7, "vf_coef": 0.3, "entropy_coef": 0.02, "cliprange_value": 0.1}


def config_of(model, **settings) -> PPOConfig:
    return PPOConfig(model=str(model), **{**SETTINGS, **settings})


def moved_roles(config: PPOConfig) -> Roles:
    """Adapters and heads away from their start, where half of all gradients are zero."""
    roles = load_ppo_roles(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return roles.train()


def episode(index: int, prompt: int, response: int) -> Episode:
    tokens = torch.randint(3, 300, (prompt + response,), generator=torch.Generator().manual_seed(index)).tolist()
    mask = (False,) * prompt + (True,) * response
    return Episode(TokenSequence(tuple(tokens), mask), torch.zeros(response), True, index)


def experiences(roles: Roles, config: PPOConfig, away: float = 0.3) -> list[Experience]:
    """Old numbers a little off, so that some clip."""
    episodes = [episode(i, 1 + 2 * i, 2 + (3 * i) % 7) for i in range(4)]
    passes = compute_model_outputs(roles, episodes, config)
    made = make_experiences(episodes, passes, shape_rewards(passes, torch.linspace(-1, 2, 4), 0.1, config))
    torch.manual_seed(3)

    def off(old: torch.Tensor | None) -> torch.Tensor | None:
        return None if old is None else old + away * torch.randn_like(old)

    return [replace(x, old_logprobs=off(x.old_logprobs), old_values=off(x.old_values)) for x in made]


def backward(roles: Roles, config: PPOConfig, batch: list[Experience]) -> tuple[dict[str, float], dict]:
    """The objective's own backwards: the metrics and the gradients."""
    objective = ppo_objective(roles, config)
    row: dict[str, float] = {}
    for loss in objective.losses(objective.collate(batch), objective.count(batch)):
        loss.loss.backward()
        row |= {name: float(value) for name, value in loss.metrics.items()}
    return row, taken(roles)


def taken(roles: Roles) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in roles.trained_parameters().items() if p.grad is not None}
    roles.zero_grad()
    return found


def part(roles: Roles, config: PPOConfig, record: ExperienceBatch, name: str) -> torch.Tensor:
    """One of the two losses from a forward of its own."""
    targets = record.sequences.targets
    count = len(targets.rows)
    if name == "policy":  # as if there were no critic
        with mock.patch.dict(roles.adapters):
            roles.adapters.pop("value", None)
            [policy] = ppo_losses(roles, record, config, count)
        return policy.loss
    with roles.active("value"):
        return critic_loss(roles.scalars(record.sequences, targets.rows), record, config, count).loss


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_one_backward_of_both_losses_on_a_shared_trunk_is_the_sum_of_two(tinystories, checkpointing):
    """The adapter gets both losses' gradients, the head its own; the trunk is run once for both."""
    config = config_of(tinystories, critic="shared", gradient_checkpointing=checkpointing)
    roles = moved_roles(config)
    batch = experiences(roles, config)
    record = pack_experience(batch)
    alone = {}
    for name in ("policy", "value"):
        part(roles, config, record, name).backward()
        alone[name] = taken(roles)
    runs = []
    handle = roles.causal_model().get_decoder().register_forward_hook(lambda *_: runs.append(1))
    row, together = backward(roles, config, batch)
    handle.remove()
    assert len(runs) == 1
    assert {"loss/policy", "loss/value", "policy/approxkl", "val/clipfrac"} <= row.keys()
    heads = {"heads.value.weight", "heads.value.bias"}
    assert together.keys() == alone["value"].keys() == alone["policy"].keys() | heads
    assert {name.split(".")[-2] for name in together.keys() - heads} == {"policy"}
    for name, gradient in together.items():
        parts = [alone[role][name] for role in alone if name in alone[role]]
        assert all(one.abs().max() > 0 for one in parts), name
        expected = torch.stack([one.double() for one in parts]).sum(0)
        assert (gradient - expected).abs().max() <= 3e-6 * max(one.abs().max() for one in parts), name


def test_a_shared_critic_is_a_head_of_zeros_whatever_the_reward_model_is(tinystories, tmp_path):
    """The reward's head knows other hidden states than the policy's."""
    trained = load_roles(RewardConfig(model=str(tinystories)), trained="reward", scalar=True)
    trained.export("reward", tmp_path / "reward", load_tokenizer(RewardConfig(model=str(tinystories))))
    roles = load_ppo_roles(config_of(tinystories, critic="shared", reward_model_path=str(tmp_path / "reward")))
    assert not roles.heads["value"].weight.any()
    assert roles.heads["reward"].weight.any()
    assert set(roles.adapters) == {"policy", "reference", "value", "reward"}
    assert roles.adapters["value"] == "policy"
    assert all(".policy." in name or "heads.value" in name for name in roles.trained_parameters())


def test_a_shared_critic_is_saved_as_its_head_and_comes_back_and_is_not_exported(tinystories, tmp_path):
    config = config_of(tinystories, critic="shared")
    roles = moved_roles(config)
    roles.save(tmp_path / "saved")
    found = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*.safetensors")}
    assert found == {"policy/adapter_model.safetensors", "value/head.safetensors"}
    again = load_ppo_roles(replace(config, seed=7))
    again.restore(tmp_path / "saved")
    for name, parameter in roles.trained_parameters().items():
        assert torch.equal(again.trained_parameters()[name], parameter), name
    roles.export("policy", tmp_path / "policy", load_tokenizer(config))
    assert not (tmp_path / "policy" / "head.safetensors").exists()
    assert load_file(tmp_path / "policy" / "adapter_model.safetensors")


def test_without_a_critic_the_policy_s_loss_is_all(tiny_model):
    config = config_of(tiny_model, advantage_estimator="rloo", num_generations=2)
    roles = moved_roles(config)
    row, found = backward(roles, config, experiences(roles, config))
    assert not [name for name in row if "value" in name or name == "val/clipfrac"]
    assert found.keys() == roles.trained_parameters().keys()


@pytest.mark.parametrize("estimator", ["reinforce", "a2c"])
def test_an_estimator_that_learns_once_has_the_gradient_of_the_free_ratio(tiny_model, estimator):
    """Ratios from e^-9 to e^9, far outside of any clip: still -A ratio, and its gradient, for every token."""
    config = config_of(tiny_model, advantage_estimator=estimator, entropy_coef=0.0)
    roles = moved_roles(config)
    batch = experiences(roles, config, away=3.0)
    record = pack_experience(batch)
    targets = record.sequences.targets
    count = len(targets.rows)
    ratio = (roles.logprobs(record.sequences, targets, 0.7) - record.old_logprobs).exp()
    assert ratio.min() < 0.1
    assert ratio.max() > 10
    (-(record.advantages * ratio).sum() / count).backward()
    expected = taken(roles)
    loss = part(roles, config, record, "policy")
    loss.backward()
    for name, gradient in taken(roles).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(ratio.max()), msg=name)
    assert float(loss) == pytest.approx(float(-(record.advantages * ratio).sum() / count), rel=1e-5)
    clipped = part(roles, replace(config, advantage_estimator="gae"), record, "policy")
    assert float(clipped) > float(loss) + 0.1  # the clip is a pessimist


def test_a2c_s_values_are_not_clipped_either(tiny_model):
    config = config_of(tiny_model, advantage_estimator="a2c", cliprange_value=0.01)
    roles = moved_roles(config)
    record = pack_experience(experiences(roles, config, away=1.0))
    targets = record.sequences.targets
    with torch.no_grad(), roles.active("value"):
        values = roles.scalars(record.sequences, targets.rows)
    expected = 0.3 * 0.5 * (values - record.returns).square().mean()
    torch.testing.assert_close(part(roles, config, record, "value").detach(), expected)
