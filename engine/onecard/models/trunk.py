"""The trunk of a causal language model: the part that computes hidden states from token ids, without the head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from onecard.utils.errors import OnecardError, is_out_of_memory, reason


def trunk_of(model: Any) -> Any:
    """The text decoder without its head; for a vision-language model, that of its language model.

    `get_decoder` returns it for most models. For some it returns the model itself, a model with a head, or a layer.
    """
    for module in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if module is None or module is model or "input_ids" not in inspect.signature(module.forward).parameters:
            continue
        return trunk_of(module) if has_head(module) else module
    raise OnecardError(
        f"model: {type(model).__name__} has no decoder that takes token ids; expected a causal language model."
    )


def has_head(model: Any) -> bool:
    """Whether a module is a language model with a head."""
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def context_of(config: Any) -> int | None:
    """The context length in a config, in tokens, or None. MPT calls it `max_seq_len`."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def rotation_limit(config: Any) -> int | None:
    """Longest sequence in tokens whose RoPE does not depend on the other sequences of its pass; None: no limit.

    longrope uses other factors for all sequences of a pass if one of them is longer than the original context. Dynamic
    NTK scales by the longest sequence so far.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    settings = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [
        setting.get("original_max_position_embeddings") if setting["rope_type"] == "longrope" else None
        for setting in settings
        if setting.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((limit or config.max_position_embeddings for limit in limits), default=None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode; afterwards every module has its earlier mode again.

    Checkpointed layers in training mode would not cache keys and values, without an error.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def errors_of(model: Any) -> Iterator[None]:
    """Turn exceptions of the model's forward into a one-line `OnecardError`; out-of-memory errors pass through."""
    try:
        yield
    except OnecardError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        dtype = str(model.dtype).removeprefix("torch.")
        raise OnecardError(f"model: {type(model).__name__} cannot be run in {dtype}: {reason(error)}.") from error
