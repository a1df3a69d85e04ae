"""Optimizers and learning rate schedules, by TRL's names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from onecard.config import TrainConfig
from onecard.errors import OnecardError


def adamw_torch(parameters: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """PyTorch's AdamW."""
    return torch.optim.AdamW(parameters, **settings)


def adamw_8bit(parameters: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit states: 2 bytes a parameter instead of 8. Small tensors keep 32-bit states."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def paged_adamw_8bit(parameters: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """The same, with states that move to host memory when the GPU is full. On CPU there is nothing to page."""
    import bitsandbytes

    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return bitsandbytes.optim.PagedAdamW8bit(parameters, **settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": adamw_torch,
    "adamw_8bit": adamw_8bit,
    "paged_adamw_8bit": paged_adamw_8bit,
}


def make_optimizer(config: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` names."""
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise OnecardError(f"{name}: {getattr(config, name)}, expected a number from 0 to below 1.")
    return OPTIMIZERS[config.optim](
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def make_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int, *, first: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule of that name over `total_steps` steps, beginning at its place `first`."""
    from transformers import get_scheduler

    share = config.warmup_steps
    warmup = int(share * total_steps) if share < 1 else int(share)
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps + first
    )
    if first == 0:
        return scheduler
    shape = scheduler.lr_lambdas[0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step + first))
