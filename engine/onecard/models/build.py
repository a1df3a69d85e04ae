"""Putting roles together: base, adapters, heads, as a command's settings ask for them."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from onecard.config import ModelConfig, PPOConfig, TrainConfig
from onecard.errors import OnecardError
from onecard.models.load import find_source, load_base, reason
from onecard.models.roles import HEAD_WEIGHTS, Roles


def scalar_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A reward head: weights N(0, 1/sqrt(D + 1)), bias 0 (Stiennon et al., 2020, https://arxiv.org/abs/2009.01325)."""
    head = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / math.sqrt(hidden_size + 1))
    nn.init.zeros_(head.bias)
    return head


def lora_config(config: TrainConfig, model: Any, *, scalar: bool = False) -> Any:
    """PEFT's record of our LoRA settings. Dropout stays 0: it would make old and new log-probs differ.

    A role with a scalar head does not run the language model's, where an adapter would be weights that never learn.
    """
    from peft import LoraConfig

    modules = config.lora_target_modules
    if scalar:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        modules = [name for name in modules if f".{head}".rpartition(".")[2] != name]
        if not modules:
            raise OnecardError(f"lora_target_modules: {head} alone is nothing that a scalar head would learn with.")
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
    )


def add_adapters(
    base: Any, config: TrainConfig, trained: str, *, reference: bool, scalar: bool = False
) -> tuple[Any, dict[str, str | None]]:
    """`base` with the adapter of the trained role, new or read from the folder that `config.model` names.

    An adapter that training starts from is also what the reference is: a frozen second copy of it.
    """
    from peft import PeftModel, get_peft_model

    source = find_source(config.model).adapter
    adapters: dict[str, str | None] = {trained: trained}
    try:
        if source is None:
            model = get_peft_model(base, lora_config(config, base, scalar=scalar), adapter_name=trained)
        else:
            model = PeftModel.from_pretrained(base, str(source), adapter_name=trained, is_trainable=True)
            if reference:
                model.load_adapter(str(source), adapter_name="reference", is_trainable=False)
    except OnecardError:
        raise
    except Exception as error:  # PEFT raises ValueError, KeyError or RuntimeError as its parsers do
        name = "lora_target_modules" if source is None else f"model: adapter {source}"
        raise OnecardError(f"{name}: {reason(error)}") from error
    remove_adapter_dropout(model)
    if reference:
        adapters["reference"] = None if source is None else "reference"
    return model, adapters


def remove_adapter_dropout(model: Any) -> None:
    """An adapter that came with dropout would make old and new log-probs of one policy differ."""
    for name, module in model.named_modules():
        if ".lora_dropout." in name and isinstance(module, nn.Dropout):
            module.p = 0.0
    for settings in model.peft_config.values():
        settings.lora_dropout = 0.0


def load_roles(config: TrainConfig, *, trained: str, reference: bool = False, scalar: bool = False) -> Roles:
    """The weights of a training run: the trained role, a reference if asked for, a scalar head if asked for."""
    source = find_source(config.model)
    if not config.use_peft and (config.load_in_4bit or source.adapter is not None):
        what = "a 4-bit base" if config.load_in_4bit else f"the adapter {source.adapter}"
        raise OnecardError(f"use_peft: all weights cannot be trained on {what}; leave --no_use_peft out.")
    if not config.use_peft and config.dtype == "float16":
        raise OnecardError("dtype: all weights cannot be trained in float16, where small updates vanish; use float32.")
    base = load_base(config, train_all=not config.use_peft)
    adapters: dict[str, str | None] = {trained: None}
    frozen = copy.deepcopy(base).requires_grad_(False) if reference and not config.use_peft else None
    torch.manual_seed(config.seed)  # new weights depend on the seed alone, not on what loading drew
    model = base
    if config.use_peft:
        model, adapters = add_adapters(base, config, trained, reference=reference, scalar=scalar)
    roles = Roles(model, (trained,), adapters, "packed" if config.padding_free else "padded")
    if config.gradient_checkpointing:
        roles.checkpoint_activations()
    if frozen is not None:
        roles.copies["reference"] = frozen
        roles.adapters["reference"] = None
    if scalar:
        folder = source.adapter or Path(source.base)
        goes_on = (folder / HEAD_WEIGHTS).is_file()  # training goes on with a reward model
        roles.heads[trained] = read_scalar_head(roles, folder) if goes_on else scalar_head(*head_shape(roles))
    return roles


def head_shape(roles: Roles) -> tuple[int, torch.device]:
    """What `scalar_head` needs to know of a model."""
    return roles.causal_model().config.get_text_config().hidden_size, roles.device


def read_scalar_head(roles: Roles, folder: Path) -> nn.Linear:
    """The scalar head in a reward model's folder."""
    head = scalar_head(*head_shape(roles))
    try:
        head.load_state_dict(load_file(str(folder / HEAD_WEIGHTS)))
    except Exception as error:  # as in add_adapters
        raise OnecardError(f"{folder / HEAD_WEIGHTS}: {reason(error)}") from error
    return head


def load_ppo_roles(config: PPOConfig) -> Roles:
    """Policy, value, reference, and reward where there is one: adapters on one base. Policy and value are trained.

    The critic starts as the reward model, adapter and head, which knows what whole answers score; or with
    a new adapter and a head of zeros, so that the first advantages are plain returns.
    """
    if not config.use_peft:
        raise OnecardError("use_peft: PPO holds its roles as adapters on one base; leave --no_use_peft out.")
    reward = reward_adapter(config)
    base = load_base(config)
    torch.manual_seed(config.seed)
    model, adapters = add_adapters(base, config, "policy", reference=True)
    copied = reward if config.value_init == "reward" else None
    if copied is None:
        model.add_adapter("value", lora_config(config, base, scalar=True))
    try:
        for role, folder in {"value": copied, "reward": reward}.items():
            if folder is not None:
                model.load_adapter(str(folder), adapter_name=role, is_trainable=role == "value")
    except Exception as error:  # as in add_adapters
        raise OnecardError(f"reward_model_path: {reward}: {reason(error)}") from error
    remove_adapter_dropout(model)
    adapters |= {"value": "value"} if reward is None else {"value": "value", "reward": "reward"}
    roles = Roles(model, ("policy", "value"), adapters, "packed" if config.padding_free else "padded")
    if config.gradient_checkpointing:
        roles.checkpoint_activations()
    if reward is not None:
        roles.heads["reward"] = read_scalar_head(roles, reward).requires_grad_(False)
    if copied is not None:
        roles.heads["value"] = read_scalar_head(roles, copied)
    else:
        head = scalar_head(*head_shape(roles))
        nn.init.zeros_(head.weight)
        roles.heads["value"] = head
    return roles


def reward_adapter(config: PPOConfig) -> Path | None:
    """The folder of the reward adapter, if there is one, after a look at whether it can be one for this base."""
    if not config.reward_model_path:
        return None
    try:
        source, policy = find_source(config.reward_model_path), find_source(config.model)
    except OnecardError as error:
        raise OnecardError(f"reward_model_path: {str(error).removeprefix('model: ')}") from error
    path = source.adapter
    if path is None or not (path / HEAD_WEIGHTS).is_file():
        raise OnecardError(
            f"reward_model_path: {config.reward_model_path} is no reward adapter of onecard: expected a folder with "
            f"adapter_config.json and {HEAD_WEIGHTS}, as `onecard reward` writes."
        )
    if os.path.realpath(source.base) != os.path.realpath(policy.base):
        raise OnecardError(
            f"reward_model_path: {path} was trained on {source.base}, but the policy's base is {policy.base}; "
            "all roles share one base, so train the reward on that one."
        )
    return path


def load_player(config: ModelConfig, *, role: str, head: bool = False) -> Roles:
    """A frozen role for generating or scoring: the model or adapter that `config.model` names, nothing trained."""
    from peft import PeftModel

    source = find_source(config.model)
    base = load_base(config)
    adapters: dict[str, str | None] = {role: None}
    model = base
    if source.adapter is not None:
        try:
            model = PeftModel.from_pretrained(base, str(source.adapter), adapter_name=role)
        except Exception as error:  # as in add_adapters
            raise OnecardError(f"model: adapter {source.adapter}: {reason(error)}") from error
        adapters = {role: role}
    roles = Roles(model, (role,), adapters, "packed").eval().requires_grad_(False)
    if head:
        folder = source.adapter or Path(source.base)
        if not (folder / HEAD_WEIGHTS).is_file():
            raise OnecardError(f"model: {folder} is no reward model of onecard: it has no {HEAD_WEIGHTS}.")
        roles.heads[role] = read_scalar_head(roles, folder).requires_grad_(False)
    return roles
