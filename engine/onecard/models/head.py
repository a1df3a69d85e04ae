"""Reads a model's language model head into the form that the kernels take (`onecard_kernels.read_head`)."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

import onecard_kernels
from onecard.models.trunk import errors_of, trunk_of
from onecard.utils.errors import OnecardError
from onecard_kernels import LanguageHead, LogitTransform

__all__ = ["LanguageHead", "check_head", "read_head"]

# model -> its logit transform, found once by running the model on a few tokens. The weights are read for each forward,
# because adapters change them.
_transforms: WeakKeyDictionary[nn.Module, LogitTransform] = WeakKeyDictionary()


def read_head(model: Any) -> LanguageHead:
    """The head of a Hugging Face causal language model, with the adapters on it."""
    with errors_of(model):
        try:
            if model not in _transforms:
                on_meta = model.get_input_embeddings().weight.is_meta
                _transforms[model] = (
                    transform_from_config(model.config)
                    if on_meta
                    else onecard_kernels.find_logit_transform(model, trunk=trunk_of(model))
                )
            return onecard_kernels.read_head(model, _transforms[model])
        except ValueError as error:
            raise OnecardError(f"model: {error}.") from error


def transform_from_config(config: Any) -> LogitTransform:
    """The logit transform for memory plans on meta: the config's softcap, the one part that takes memory."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    text = config.get_text_config()
    return LogitTransform(softcap=next((float(cap) for name in names if (cap := getattr(text, name, None))), None))


def check_head(model: nn.Module, trunk: nn.Module, head: LanguageHead) -> None:
    """Raise if `head` on the trunk's hidden states differs from the model's logits on a few tokens."""
    try:
        onecard_kernels.check_head(model, head, trunk=trunk)
    except ValueError as error:
        raise OnecardError(f"model: {error}.") from error
