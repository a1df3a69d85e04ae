"""Several trained roles on one base: one step's gradients are those of each role alone, whatever is active when."""

from __future__ import annotations

import pytest
import torch

from onecard.config import PPOConfig, RewardConfig
from onecard.data.batches import TokenSequence, pack
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.utils.errors import OnecardError
from tests.engine.roles_material import gradients, policy_part, ppo_roles, value_part

TEXTS = ("Once upon a time there was a dog.", "Lily likes to play in the park with her friends", "One day a big cat")
BASES = {"fp32": {}, "bf16": {"dtype": "bfloat16"}, "nf4": {"load_in_4bit": True}}


def texts_of(model) -> list[TokenSequence]:
    tokenizer = load_tokenizer(PPOConfig(model=str(model)))
    ids = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [TokenSequence(tokens, (False, *(True,) * (len(tokens) - 1))) for tokens in ids]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("base", BASES)
def test_one_backward_gives_each_role_its_own_gradients(tinystories, base, checkpointing):
    """Both forwards, then one backward: no role is frozen, and no layer is recomputed under the other's adapter."""
    roles = ppo_roles(tinystories, gradient_checkpointing=checkpointing, **BASES[base])
    batch = pack(texts_of(tinystories))
    policy_part(roles, batch).backward()
    value_part(roles, batch).backward()
    apart = gradients(roles)
    assert apart.keys() == roles.trained_parameters().keys()
    (policy_part(roles, batch) + value_part(roles, batch)).backward()
    together = gradients(roles)
    assert {name.split(".")[-2] for name in apart if "lora" in name} == {"policy", "value"}
    for name, gradient in apart.items():
        assert gradient.abs().max() > 0, name
        # Backwards meet in the same leaves in the same order: not a rounding apart, in any dtype
        torch.testing.assert_close(together[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("active", ["reference", "value"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_backward_under_another_role_is_the_same(tinystories, checkpointing, active):
    """The policy's backward, run while another role is active."""
    roles = ppo_roles(tinystories, gradient_checkpointing=checkpointing)
    batch = pack(texts_of(tinystories))
    policy_part(roles, batch).backward()
    expected = gradients(roles)
    loss = policy_part(roles, batch)
    with roles.active(active):
        loss.backward()
        assert roles.current == active
    got = gradients(roles)
    assert got.keys() == expected.keys()
    assert all(".policy." in name for name in got)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_the_reference_and_the_reward_never_move(tinystories, tmp_path):
    """A step of both trained roles leaves the base, the reference and the reward adapter bit for bit."""
    trained = load_roles(RewardConfig(model=str(tinystories)), trained="reward", scalar=True)
    trained.export("reward", tmp_path / "reward", load_tokenizer(RewardConfig(model=str(tinystories))))
    roles = ppo_roles(tinystories, reward_model_path=str(tmp_path / "reward"))
    batch = pack(texts_of(tinystories))
    names = set(roles.trained_parameters())
    assert not any(".reward." in name or "heads.reward" in name for name in names)
    assert {"heads.value.weight", "heads.value.bias"} <= names

    def looks():
        with torch.no_grad(), roles.active("reward"):
            scores = roles.scores(batch)
        with torch.no_grad(), roles.active("reference"):
            return scores, roles.logprobs(batch, batch.targets)

    before = looks()
    optimizer = torch.optim.SGD(roles.trained_parameters().values(), lr=0.1)
    (policy_part(roles, batch) + value_part(roles, batch)).backward()
    optimizer.step()
    assert set(roles.trained_parameters()) == names
    assert all(torch.equal(a, b) for a, b in zip(before, looks(), strict=True))


def test_the_critic_starts_as_the_reward_model_or_at_zero(tinystories, tmp_path):
    trained = load_roles(RewardConfig(model=str(tinystories)), trained="reward", scalar=True)
    with torch.no_grad():
        for parameter in trained.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    trained.export("reward", tmp_path / "reward", load_tokenizer(RewardConfig(model=str(tinystories))))
    batch = pack(texts_of(tinystories))
    path = str(tmp_path / "reward")
    scores = trained.scores(batch).detach()
    for value_init in ("reward", "zero"):
        roles = load_ppo_roles(PPOConfig(model=str(tinystories), reward_model_path=path, value_init=value_init))
        with torch.no_grad(), roles.active("reward"):
            torch.testing.assert_close(roles.scores(batch), scores, rtol=0, atol=0)
        with torch.no_grad(), roles.active("value"):
            values = roles.scores(batch)
        assert torch.equal(values, scores if value_init == "reward" else torch.zeros_like(scores))
        assert roles.heads["value"].weight.requires_grad
        assert not roles.heads["reward"].weight.requires_grad
    assert scores.abs().max() > 0


def test_what_is_saved_comes_back(tinystories, tmp_path):
    """Both trained roles with their heads, bit for bit, into roles that began elsewhere."""
    roles = ppo_roles(tinystories)
    roles.save(tmp_path)
    again = load_ppo_roles(PPOConfig(model=str(tinystories), seed=7))
    again.restore(tmp_path)
    for name, parameter in roles.trained_parameters().items():
        assert torch.equal(again.trained_parameters()[name], parameter), name


def test_the_critic_has_no_adapter_on_the_language_head(tinystories):
    """It never runs it, so those weights would not learn; the policy's does, and is trained."""
    roles = ppo_roles(tinystories, lora_target_modules=["lm_head", "q_proj"])
    names = [name for name in roles.trained_parameters() if "lm_head" in name]
    assert names
    assert all(".policy." in name for name in names)
    batch = pack(texts_of(tinystories))
    (policy_part(roles, batch) + value_part(roles, batch)).backward()
    assert all(parameter.grad is not None for parameter in roles.trained_parameters().values())
    for kind, load in {"ppo": PPOConfig, "reward": RewardConfig}.items():
        config = load(model=str(tinystories), lora_target_modules=["lm_head"])
        with pytest.raises(OnecardError, match="lora_target_modules: lm_head alone"):
            load_ppo_roles(config) if kind == "ppo" else load_roles(config, trained="reward", scalar=True)
