"""Which roles a run has. The loader (`build`) and the memory planner (`onecard fit`) build their roles from this."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onecard.config import PPOConfig, ReferenceConfig, TrainConfig


@dataclass(frozen=True)
class RoleSetup:
    """The roles of a run on one base.

    `trained`: roles whose weights change. `adapters`: role -> its adapter; None: the base alone. `scalar`: roles with a
    scalar head. `reference_copy`: the reference is a frozen copy of the whole model, because all weights are trained.
    """

    trained: tuple[str, ...]
    adapters: dict[str, str | None]
    scalar: tuple[str, ...] = ()
    reference_copy: bool = False

    def roles_by_adapter(self) -> dict[str, str]:
        """Adapter -> its role (the first of several), in the order in which adapters are added."""
        roles: dict[str, str] = {}
        for role, adapter in self.adapters.items():
            if adapter is not None:
                roles.setdefault(adapter, role)
        return roles


def supervised_setup(
    config: TrainConfig, *, trained: str, reference: bool, scalar: bool, from_adapter: bool
) -> RoleSetup:
    """The roles of sft, reward and dpo. `from_adapter`: training starts from an adapter."""
    heads = (trained,) if scalar else ()
    if not config.use_peft:
        roles = (trained, "reference") if reference else (trained,)
        return RoleSetup((trained,), dict.fromkeys(roles), heads, reference_copy=reference)
    adapters: dict[str, str | None] = {trained: trained}
    if reference:
        adapters["reference"] = reference_adapter_name(config, from_adapter=from_adapter)
    return RoleSetup((trained,), adapters, heads)


def ppo_setup(config: PPOConfig, scorers: Collection[str], *, from_adapter: bool) -> RoleSetup:
    """The roles of ppo. `scorers`: the roles "reward" and "constraint", if they are adapters on the base."""
    adapters: dict[str, str | None] = {
        "policy": "policy",
        "reference": reference_adapter_name(config, from_adapter=from_adapter),
    }
    trained: tuple[str, ...] = ("policy",)
    if config.has_critic:
        adapters["value"] = "value" if config.critic == "adapter" else "policy"
        trained += ("value",)
    adapters |= {role: role for role in scorers}
    return RoleSetup(trained, adapters, (*trained[1:], *scorers))


def reference_adapter_name(config: TrainConfig, *, from_adapter: bool) -> str | None:
    """The reference's adapter: `ref_adapter`, or a copy of the one that training starts from. None: the base alone."""
    named = isinstance(config, ReferenceConfig) and bool(config.ref_adapter)
    return "reference" if named or from_adapter else None
