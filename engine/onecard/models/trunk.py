"""The part of a causal language model between its token ids and the hidden states that its head reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from onecard.utils.errors import OnecardError, is_out_of_memory, reason


def trunk_of(model: Any) -> Any:
    """The text decoder, without a head: of a vision-language model its language model's.

    `get_decoder` finds it for most models. For some it finds the model itself, a model with a head, or a layer.
    """
    for found in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if found is None or found is model or "input_ids" not in inspect.signature(found.forward).parameters:
            continue
        return trunk_of(found) if has_head(found) else found
    raise OnecardError(
        f"model: {type(model).__name__} has no decoder that takes token ids; expected a causal language model."
    )


def has_head(model: Any) -> bool:
    """Whether a module is a whole language model."""
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def context_of(config: Any) -> int | None:
    """How many positions a model was made for, where its config says so (MPT under a name of its own)."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def rotation_limit(config: Any) -> int | None:
    """The longest text whose rotations (RoPE) do not depend on the longest text of its pass; None: there is none.

    longrope rotates all texts of a pass by other factors once one is longer than the original context; dynamic NTK
    scales them by the longest text so far.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    settings = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    limits = [
        each.get("original_max_position_embeddings") if each["rope_type"] == "longrope" else None
        for each in settings
        if each.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((limit or config.max_position_embeddings for limit in limits), default=None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module as it was. In training mode, checkpointed layers silently keep no cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def errors_of(model: Any) -> Iterator[None]:
    """One line for what the plain model raises: whatever its arithmetic raises on what it was not made for."""
    try:
        yield
    except OnecardError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        dtype = str(model.dtype).removeprefix("torch.")
        raise OnecardError(f"model: {type(model).__name__} cannot be run in {dtype}: {reason(error)}.") from error
