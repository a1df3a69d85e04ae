"""Settings of PPO that a run would not look at, or that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from onecard.algorithms.ppo import command
from onecard.config import PPOConfig
from onecard.utils.errors import OnecardError

Settings = dict[str, Any]
NOWHERE = "where there is neither a constraint_model_path nor constraint_funcs"
COSTS: Settings = {"constraint_funcs": ["length"]}
LAGRANGIAN: Settings = COSTS | {"constraint_mode": "lagrangian"}


def estimated(*names: str) -> dict[str, Settings]:
    """Runs by an estimator, under what is said of a setting that they do not use."""
    groups = {name: {"num_generations": 2} if name in ("rloo", "grpo") else {} for name in names}
    return {f"with advantage_estimator {name}": {"advantage_estimator": name, **groups[name]} for name in names}


UNCLIPPED, NO_CRITIC = estimated("reinforce", "a2c"), estimated("reinforce", "rloo", "grpo")
IN_SKIP = {NOWHERE: {}, "with constraint_mode skip": COSTS}
NOT_ADAPTED: dict[str, Settings] = {"without adap_kl_ctrl": {}}
ADAPTED: Settings = {"adap_kl_ctrl": True}
RLOO = estimated("rloo")["with advantage_estimator rloo"]
# what the setting is where it is given, the runs that have no use for it, and those that have
USED: dict[str, tuple[object, dict[str, Settings], list[Settings]]] = {
    "constraint_mode": ("lagrangian", {NOWHERE: {}}, [COSTS, {"constraint_model_path": "x"}]),
    "constraint_threshold": (1.0, {NOWHERE: {}}, [COSTS, LAGRANGIAN]),
    "constraint_lambda": (2.0, IN_SKIP, [LAGRANGIAN]),
    "constraint_lambda_lr": (0.2, IN_SKIP, [LAGRANGIAN]),
    "adap_kl_target": (3.0, NOT_ADAPTED, [ADAPTED]),
    "adap_kl_horizon": (500, NOT_ADAPTED, [ADAPTED]),
    "cliprange": (0.1, UNCLIPPED, [{}, RLOO]),
    "cliprange_high": (0.3, UNCLIPPED, [{}, RLOO]),
    "cliprange_value": (0.0, UNCLIPPED | NO_CRITIC, [{}, {"critic": "shared"}]),
    "lam": (0.9, UNCLIPPED | NO_CRITIC, [{}, {"critic": "shared"}]),
    "vf_coef": (0.5, NO_CRITIC, [{}, {"advantage_estimator": "a2c"}, {"critic": "shared"}]),
    "value_init": ("zero", NO_CRITIC | {"with critic shared": {"critic": "shared"}}, [{}]),
}


@pytest.mark.parametrize("name", USED)
def test_a_setting_that_is_of_no_use_is_refused(name: str) -> None:
    value, unused, used = USED[name]
    for where, others in unused.items():
        PPOConfig(**others).validate()
        with pytest.raises(OnecardError) as error:
            PPOConfig(**{**others, name: value}).validate()
        assert str(error.value) == f"{name}: {value} is not used {where}; leave it out."
    for others in used:
        PPOConfig(**{**others, name: value}).validate()


def test_normalised_scores_are_not_for_a_critic_on_another_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the critic would be the reward adapter: not without a critic, at zero, or on the policy's trunk."""
    monkeypatch.setattr(command, "reward_adapter", lambda config: config.reward_model_path or None)
    adapter: Settings = {"normalize_reward": True, "reward_model_path": "rm"}
    with pytest.raises(OnecardError, match=r"^normalize_reward: add --value_init zero"):
        command.check_value_init(PPOConfig(**adapter))
    fine: list[Settings] = [
        {"normalize_reward": False}, {"reward_model_path": ""}, {"value_init": "zero"}, {"critic": "shared"}, RLOO,
    ]  # fmt: skip
    for others in fine:
        command.check_value_init(PPOConfig(**{**adapter, **others}))
