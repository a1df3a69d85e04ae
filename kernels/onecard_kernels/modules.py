"""The public functions as `nn.Module`s: numbers and choices at construction, tensors at the call.

Each class is made from its function's signature. The head's weight is an argument of the call, not a parameter of the
module: it belongs to the model, where it may be tied to the embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from .advantages import gae, group_advantages, masked_whiten
from .dpo import cpo_loss, dpo_loss, kto_loss, linear_dpo_loss, orpo_loss, simpo_loss
from .kl import linear_kl, token_kl
from .logprob import linear_logprobs, selective_log_softmax
from .ppo import linear_ppo_loss, logits_ppo_loss, ppo_loss, value_loss

__all__ = [
    "GAE",
    "CPOLoss",
    "DPOLoss",
    "GroupAdvantages",
    "KTOLoss",
    "LinearDPOLoss",
    "LinearKL",
    "LinearLogProbs",
    "LinearPPOLoss",
    "LogitsPPOLoss",
    "MaskedWhiten",
    "ORPOLoss",
    "PPOLoss",
    "SelectiveLogSoftmax",
    "SimPOLoss",
    "TokenKL",
    "ValueLoss",
]


class FunctionModule(nn.Module):
    """Calls `function` with the options of its construction.

    The options are the function's keyword-only arguments that take no tensor; `forward` takes all other arguments.
    """

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, function: Callable[..., Any] | None = None) -> None:
        super().__init_subclass__()
        if function is None:  # a subclass of one of the modules
            return
        signature = inspect.signature(function)
        options = [
            x for x in signature.parameters.values() if x.kind == x.KEYWORD_ONLY and "Tensor" not in x.annotation
        ]
        tensors = [x for x in signature.parameters.values() if x not in options]
        cls.__signature__ = inspect.Signature(options)
        cls.__doc__ = f"`{function.__name__}` as a module.\n\n{inspect.getdoc(function)}"

        def forward(self: FunctionModule, *args: Any, **keywords: Any) -> Any:
            return function(*args, **keywords, **self.options)

        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[this, *tensors])  # type: ignore[attr-defined]
        cls.forward = forward

    def __init__(self, **options: Any) -> None:
        super().__init__()
        bound = self.__signature__.bind(**options)
        bound.apply_defaults()
        self.options: dict[str, Any] = bound.arguments

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SelectiveLogSoftmax(FunctionModule, function=selective_log_softmax): ...


class LinearLogProbs(FunctionModule, function=linear_logprobs): ...


class LinearKL(FunctionModule, function=linear_kl): ...


class TokenKL(FunctionModule, function=token_kl): ...


class PPOLoss(FunctionModule, function=ppo_loss): ...


class LogitsPPOLoss(FunctionModule, function=logits_ppo_loss): ...


class LinearPPOLoss(FunctionModule, function=linear_ppo_loss): ...


class ValueLoss(FunctionModule, function=value_loss): ...


class GAE(FunctionModule, function=gae): ...


class GroupAdvantages(FunctionModule, function=group_advantages): ...


class MaskedWhiten(FunctionModule, function=masked_whiten): ...


class DPOLoss(FunctionModule, function=dpo_loss): ...


class LinearDPOLoss(FunctionModule, function=linear_dpo_loss): ...


class SimPOLoss(FunctionModule, function=simpo_loss): ...


class ORPOLoss(FunctionModule, function=orpo_loss): ...


class CPOLoss(FunctionModule, function=cpo_loss): ...


class KTOLoss(FunctionModule, function=kto_loss): ...
