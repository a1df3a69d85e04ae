"""The language model head as the kernels take it, read from the model (`onecard_kernels.read_head`)."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

import onecard_kernels
from onecard.models.trunk import errors_of, trunk_of
from onecard.utils.errors import OnecardError
from onecard_kernels import LanguageHead, LogitTransform

__all__ = ["LanguageHead", "check_head", "read_head"]

# Found once for each model, by running it on a few tokens. The weights are read for each forward: adapters change.
_transforms: WeakKeyDictionary[nn.Module, LogitTransform] = WeakKeyDictionary()


def read_head(model: Any) -> LanguageHead:
    """The head of a Hugging Face causal language model, adapters on it included."""
    with errors_of(model):
        try:
            if model not in _transforms:
                planned = model.get_input_embeddings().weight.is_meta
                _transforms[model] = (
                    named_transform(model.config)
                    if planned
                    else onecard_kernels.find_logit_transform(model, trunk=trunk_of(model))
                )
            return onecard_kernels.read_head(model, _transforms[model])
        except ValueError as error:
            raise OnecardError(f"model: {error}.") from error


def named_transform(config: Any) -> LogitTransform:
    """For plans on meta, where no model runs: whether there is a softcap, which costs memory."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    text = config.get_text_config()
    return LogitTransform(softcap=next((float(cap) for name in names if (cap := getattr(text, name, None))), None))


def check_head(model: nn.Module, trunk: nn.Module, head: LanguageHead) -> None:
    """Stop if `head` on the trunk's hidden states does not give the model's own logits on a few tokens."""
    try:
        onecard_kernels.check_head(model, head, trunk=trunk)
    except ValueError as error:
        raise OnecardError(f"model: {error}.") from error
