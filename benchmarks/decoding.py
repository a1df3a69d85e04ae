"""What one step of decoding cannot do without: every weight is read once, and the cache of every row."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import measure
from onecard.models.cache import cache_bytes


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a pass over one token reads: all but the embeddings' other rows, and what quantized ones
    need beside them. Adapters count where one is active.
    """
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    skipped = set() if embeddings is head else {id(embeddings)}
    found: dict[int, int] = {}
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), parameter.numel() * parameter.element_size())
            state = getattr(parameter, "quant_state", None)
            if name == "weight" and state is not None:
                extra = [state.absmax, *([state.state2.absmax] if state.nested else [])]
                found[id(state)] = sum(each.numel() * each.element_size() for each in extra)
        if isinstance(active, list):
            for part in ("lora_A", "lora_B"):
                idle = [one for key, one in getattr(module, part, {}).items() if key not in active]
                skipped |= {id(parameter) for one in idle for parameter in one.parameters()}
    return sum(size for key, size in found.items() if key not in skipped)


def step_bytes(model: Any, rows: int, length: int) -> int:
    """Bytes that a step over so many rows reads, each with `length` tokens in its cache."""
    return weight_bytes(model) + rows * cache_bytes(model, length)


def bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second that a plain copy moves here, both ways counted."""
    copy, size = measure.copy_work(device)
    seconds = measure.stopwatch(device)
    copy()
    return size / statistics.median(seconds(copy) for _ in range(repeats))
