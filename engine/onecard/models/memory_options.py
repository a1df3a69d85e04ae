"""Applies the settings that save memory at a cost. docs/memory.md says what each saves and costs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from onecard.config import TrainConfig
from onecard.models.roles import Roles
from onecard_kernels.logprob import tuning


def apply_memory_options(roles: Roles, config: TrainConfig) -> None:
    """Set the dtype of adapters, gradient checkpointing and activation offloading."""
    if config.use_peft and config.adapter_dtype != "float32":
        roles.cast_adapters(getattr(torch, config.adapter_dtype))
    if config.gradient_checkpointing:
        roles.checkpoint_activations()
    if config.activation_offloading and roles.device.type != "cpu":
        roles.offload_activations()


def memory_option_notes(roles: Roles, config: TrainConfig) -> list[str]:
    """One message for each setting that saves little or nothing on this device. These are not errors."""
    notes = []
    if config.activation_offloading and roles.device.type == "cpu":
        notes.append("activation_offloading: not used on the CPU, where activations are in host memory anyway.")
    dtype = roles.causal_model().dtype
    if config.adapter_dtype != "float32" and dtype != getattr(torch, config.adapter_dtype):
        notes.append(
            f"adapter_dtype: the base is {str(dtype).removeprefix('torch.')}, so each layer's input is cast for "
            f"adapters in {config.adapter_dtype}; it saves little here."
        )
    return notes


def head_chunks(tokens: int) -> AbstractContextManager[None]:
    """Context in which the linear losses compute the logits of `tokens` tokens at a time; 0: the device's default."""
    return tuning.override(rows=tokens) if tokens else nullcontext()
