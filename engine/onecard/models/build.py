"""Build the roles of a command: load the base, adapters and heads that its settings name."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from onecard.config import (
    Activation,
    EvaluateConfig,
    ModelConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    TrainConfig,
)
from onecard.models.adapters import add_adapter, read_adapter
from onecard.models.classifier import is_classifier
from onecard.models.load import Source, find_source, find_source_of, load_base
from onecard.models.memory_options import apply_memory_options
from onecard.models.role_setup import RoleSetup, ppo_setup, supervised_setup
from onecard.models.roles import HEAD_WEIGHTS, Roles
from onecard.models.scalar import ScalarHead
from onecard.models.targets import Targets, find_targets
from onecard.utils.errors import OnecardError, reason

AdapterFolders: TypeAlias = dict[str, tuple[str, Path]]  # adapter -> the setting that names it, its folder


def new_scalar_head(roles: Roles) -> ScalarHead:
    """A reward head: weights N(0, 1/sqrt(D + 1)), bias 0 (Stiennon et al., 2020, https://arxiv.org/abs/2009.01325)."""
    hidden_size = roles.head().weight.shape[1]  # not config.hidden_size: some models project before the head
    head = ScalarHead(hidden_size, 1, device=roles.device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / math.sqrt(hidden_size + 1))
    nn.init.zeros_(head.bias)
    return head


def lora_config(config: TrainConfig, model: Any, targets: Targets, *, scalar: bool = False) -> Any:
    """The PEFT config of a new adapter. Dropout is 0, because with dropout old and new log-probs would differ.

    `scalar`: the role has a scalar head. It does not run the language model head, so an adapter there would get no
    gradient, and none is added.
    """
    from peft import LoraConfig

    if scalar:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        targets = targets.without(head)
        if not targets.modules and not targets.parameters:
            raise OnecardError(
                f"lora_target_modules: {head} alone: a scalar head does not run it, so nothing would be trained."
            )
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )


def add_adapters(
    base: Any, config: TrainConfig, setup: RoleSetup, folders: AdapterFolders
) -> tuple[Any, Targets | None]:
    """Add the adapters of `setup` to `base`. Returns the model, and the layers of new adapters (without a folder)."""
    # also if all adapters come from folders and have their own target modules, so that a wrong name raises
    targets = find_targets(base, config.lora_target_modules) if config.use_peft else None
    torch.manual_seed(config.seed)  # new weights depend on the seed alone
    model = base
    for name, role in setup.roles_by_adapter().items():
        if name in folders:
            setting, folder = folders[name]
            model = read_adapter(model, folder, name, setting)
        else:
            assert targets is not None
            model = add_adapter(model, lora_config(config, base, targets, scalar=role in setup.scalar), name)
    return model, targets


def reference_adapter(config: TrainConfig) -> Path | None:
    """The adapter folder that `ref_adapter` names; None without one. Raises for an adapter on another base."""
    if not isinstance(config, ReferenceConfig) or not config.ref_adapter:
        return None
    name = config.ref_adapter
    if not config.use_peft:
        raise OnecardError(
            "ref_adapter: with --no_use_peft the reference is a frozen copy of the model, which has no adapters; leave "
            "one of the two out."
        )
    policy = find_source(config.model)
    source = find_source_of(name, "ref_adapter")
    if source.adapter is None:
        raise OnecardError(f"ref_adapter: {name} is no adapter folder: it has no adapter_config.json.")
    if not same_base(source, policy):
        raise OnecardError(
            f"ref_adapter: {name} was trained on {source.base}, but the policy's base is {policy.base}; policy and "
            "reference share one base."
        )
    check_is_policy(source, "ref_adapter")
    return source.adapter


def check_full_training(config: TrainConfig, *, adapter: bool) -> None:
    """Raise if all weights are to be trained, but `config.model` is an adapter (`adapter` is True)."""
    if adapter and not config.use_peft:
        name = find_source(config.model).adapter
        raise OnecardError(f"use_peft: {name} is an adapter, not a whole model; leave --no_use_peft out.")


def check_no_float16(roles: Roles) -> None:
    """Raise if trained weights are float16, as an adapter's `modules_to_save` may be."""
    parameters = roles.trained_parameters()
    name = next((name for name, parameter in parameters.items() if parameter.dtype == torch.float16), None)
    if name is not None:
        raise OnecardError(
            f"dtype: {name.removeprefix('model.')} would be trained in float16, where small gradients vanish; use "
            "bfloat16 or float32."
        )


def load_roles(config: TrainConfig, *, trained: str, reference: bool = False, scalar: bool = False) -> Roles:
    """The roles of sft, reward or dpo. `trained`: the trained role; `reference`: with a reference role; `scalar`: the
    trained role has a scalar head.
    """
    source = find_source(config.model)
    if not scalar:
        check_is_policy(source)
    check_full_training(config, adapter=source.adapter is not None)
    setup = supervised_setup(
        config, trained=trained, reference=reference, scalar=scalar, from_adapter=source.adapter is not None
    )
    roles = load_base_with_adapters(config, setup, adapter_folders(config, setup))
    if scalar:
        if source.adapter is not None:
            check_no_head_adapter(roles, trained, source.adapter)
        folder = source.adapter or Path(source.base)
        continued = (folder / HEAD_WEIGHTS).is_file()  # training continues from a reward model
        head = read_scalar_head(roles, folder) if continued else new_scalar_head(roles)
        activation: Activation = config.score_activation if isinstance(config, RewardConfig) else "none"
        if continued and head.activation != activation:
            raise OnecardError(
                f"score_activation: {activation}, but the reward model {folder}, from which training continues, was "
                f"trained with {head.activation}."
            )
        head.activation = activation
        roles.heads[trained] = head
    return roles


def adapter_folders(config: TrainConfig, setup: RoleSetup) -> AdapterFolders:
    """The folders of the trained role's adapter and of the reference's, where settings name them."""
    source, ref_adapter = find_source(config.model).adapter, reference_adapter(config)
    folders: AdapterFolders = {}
    if source is not None:
        folders = {setup.trained[0]: ("model", source), "reference": ("model", source)}
    if ref_adapter is not None:
        folders["reference"] = ("ref_adapter", ref_adapter)
    return folders


def load_base_with_adapters(config: TrainConfig, setup: RoleSetup, folders: AdapterFolders) -> Roles:
    """The base and the adapters of `setup`, without scalar heads."""
    base = load_base(config, train_all=not config.use_peft)
    reference = copy.deepcopy(base).requires_grad_(False) if setup.reference_copy else None
    model, targets = add_adapters(base, config, setup, folders)
    roles = Roles(model, setup.trained, dict(setup.adapters), "packed" if config.padding_free else "padded")
    is_new = bool(setup.roles_by_adapter().keys() - folders.keys())
    roles.left_out = targets.left_out if targets and is_new else ()
    check_no_float16(roles)
    apply_memory_options(roles, config)
    if reference is not None:
        roles.copies["reference"] = reference
    return roles


def check_no_head_adapter(roles: Roles, role: str, folder: Path) -> None:
    """Raise if the adapter that reward training starts from includes the language model head."""
    head = roles.causal_model().get_output_embeddings()
    if any(role in getattr(head, parts, {}) for parts in ("lora_A", "modules_to_save")):
        raise OnecardError(
            f"model: adapter {folder} adapts the language model head, which a reward model does not run, so that part "
            "would get no gradient; merge the adapter (onecard merge), and give the merged model."
        )


def read_scalar_head(roles: Roles, folder: Path) -> ScalarHead:
    """The scalar head in a reward model's folder."""
    head = new_scalar_head(roles)
    try:
        head.read(folder / HEAD_WEIGHTS)
    except Exception as error:  # a damaged file: the parsers raise different exceptions
        raise OnecardError(f"{folder / HEAD_WEIGHTS}: {reason(error)}") from error
    return head


def load_ppo_roles(config: PPOConfig) -> Roles:
    """The roles of PPO on one base: policy, reference and, if configured, value, reward and constraint.

    Policy and value are trained. A critic with its own adapter starts as a copy of the reward model (adapter and head),
    or with a new adapter and a zero head: its first values are 0. A critic on the policy's trunk starts with a zero
    head, because the reward head was trained on the reward adapter's hidden states.
    """
    source = find_source(config.model)
    check_is_policy(source)
    scorers = {role: reward_adapter(config, setting) for role, setting in SCORER_SETTINGS.items()}
    frozen = {role: folder for role, folder in scorers.items() if folder is not None}
    setup = ppo_setup(config, frozen, from_adapter=source.adapter is not None)
    folders = adapter_folders(config, setup) | {role: (SCORER_SETTINGS[role], frozen[role]) for role in frozen}
    separate_critic = config.has_critic and config.critic == "adapter"
    critic_init = frozen.get("reward") if separate_critic and config.value_init == "reward" else None
    if critic_init is not None:
        folders["value"] = (SCORER_SETTINGS["reward"], critic_init)
    roles = load_base_with_adapters(config, setup, folders)
    for role, folder in frozen.items():
        roles.heads[role] = read_scalar_head(roles, folder).requires_grad_(False)
    if critic_init is not None:
        roles.heads["value"] = read_scalar_head(roles, critic_init).as_critic()
    elif config.has_critic:
        head = new_scalar_head(roles)
        nn.init.zeros_(head.weight)
        roles.heads["value"] = head
    return roles


# Frozen roles that score responses -> the setting that names the adapter
SCORER_SETTINGS = {"reward": "reward_model_path", "constraint": "constraint_model_path"}


def reward_adapter(config: PPOConfig | EvaluateConfig, setting: str = "reward_model_path") -> Path | None:
    """The folder of the reward adapter that a setting names; None if it is empty or names a sequence classifier.

    A folder that is no reward adapter, or one on another base, raises `OnecardError`.
    """
    name: str = getattr(config, setting)
    if not name or is_classifier(name, setting, trust_remote_code=config.trust_remote_code):
        return None
    source, policy = find_source_of(name, setting), find_source(config.model)
    path = source.adapter
    if path is None or not (path / HEAD_WEIGHTS).is_file():
        raise OnecardError(
            f"{setting}: {name} is no reward adapter of onecard: expected a folder with "
            f"adapter_config.json and {HEAD_WEIGHTS}, as `onecard reward` writes, or a sequence classifier."
        )
    if not same_base(source, policy):
        raise OnecardError(
            f"{setting}: {path} was trained on {source.base}, but the policy's base is {policy.base}; "
            "all roles share one base, so train the reward model on the policy's."
        )
    return path


def same_base(first: Source, second: Source) -> bool:
    """Whether two sources have the same base."""
    return os.path.realpath(first.base) == os.path.realpath(second.base)


def load_frozen_role(config: ModelConfig, *, role: str, head: bool = False) -> Roles:
    """One frozen role for generating or scoring, from the model or adapter that `config.model` names.

    `head`: with the scalar head in its folder.
    """
    source = find_source(config.model)
    if role == "policy":
        check_is_policy(source)
    roles = load_frozen_roles(config, {role: source.adapter})
    if head:
        folder = source.adapter or Path(source.base)
        if not (folder / HEAD_WEIGHTS).is_file():
            raise OnecardError(f"model: {folder} is no reward model of onecard: it has no {HEAD_WEIGHTS}.")
        roles.heads[role] = read_scalar_head(roles, folder).requires_grad_(False)
    return roles


def check_is_policy(source: Source, setting: str = "model") -> None:
    """Raise for a reward model where a policy is expected: it would load, but it was not trained to generate text."""
    for folder in filter(None, (source.adapter, Path(source.base))):
        if (folder / HEAD_WEIGHTS).is_file():
            raise OnecardError(f"{setting}: {folder} is a reward model; expected a language model that generates text.")


def load_frozen_roles(
    config: ModelConfig, adapters: Mapping[str, Path | None], settings: Mapping[str, str] | None = None
) -> Roles:
    """Frozen roles on the base of `config.model`. `adapters`: role -> its adapter folder, or None for the base.

    An adapter that several roles share is loaded once. `settings`: role -> name of its setting in error messages,
    `model` by default; the first role's setting is named in errors of the base too.
    """
    setting_of = dict(settings or {})
    try:
        model = load_base(config)
    except OnecardError as error:
        setting = setting_of.get(next(iter(adapters)), "model")
        raise OnecardError(f"{setting}: {str(error).removeprefix('model: ')}") from error
    role_of: dict[Path, str] = {}  # adapter folder -> the first role with it, which names the adapter
    for role, folder in adapters.items():
        if folder is None or folder.resolve() in role_of:
            continue
        model = read_adapter(model, folder, role, setting_of.get(role, "model"))
        role_of[folder.resolve()] = role
    adapter_of = {role: role_of[folder.resolve()] if folder else None for role, folder in adapters.items()}
    return Roles(model, (next(iter(adapters)),), adapter_of, "packed").eval().requires_grad_(False)
