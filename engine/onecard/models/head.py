"""What stands between a hidden state and the logits, read from the model into one small record for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import OnecardError
from onecard_kernels import linear_logprobs


@dataclass(frozen=True)
class LanguageHead:
    """`z = softcap * tanh((h @ weight.T + bias) * logit_scale / softcap)`; `weight` [V, D], `bias` [V] or None."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def keywords(self) -> dict[str, Any]:
        """The kernels' keyword arguments for this head (all but `weight`)."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def read_scale(config: Any) -> float:
    """Cohere multiplies its logits by `logit_scale`, Granite divides them by `logits_scaling`."""
    scale = getattr(config, "logit_scale", None) or 1.0
    return float(scale) / float(getattr(config, "logits_scaling", None) or 1.0)


def adapted_weight(layer: Any) -> Tensor:
    """The head's weight with its active LoRA adapters added. A product of trained factors, so the kernels train it."""
    weight = layer.get_base_layer().weight
    if layer.disable_adapters:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            delta = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
            weight = weight + delta.to(weight.dtype)
    return weight


def read_head(model: Any) -> LanguageHead:
    """The head of a Hugging Face causal language model, adapters on it included."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise OnecardError(
            f"model: {type(model).__name__} has no language model head; expected a causal language model."
        )
    config = model.config.get_text_config()
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    softcap = getattr(config, "final_logit_softcapping", None)
    return LanguageHead(
        weight=adapted_weight(layer) if base is not layer else base.weight,
        bias=getattr(base, "bias", None),
        logit_scale=read_scale(config),
        softcap=None if softcap is None else float(softcap),
    )


@torch.no_grad()
def check_head(model: nn.Module, trunk: nn.Module, head: LanguageHead) -> None:
    """Stop if `head` on the trunk's hidden states does not give the model's own log-probs.

    There are more ways to make logits than config names to read them by. An unknown one is an error here, not a guess:
    on a few tokens the model's own logits are the judge.
    """
    device, vocabulary = head.weight.device, head.weight.shape[0]
    tokens = (torch.arange(16, device=device) * 7919 % vocabulary).unsqueeze(0)
    own = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
    hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state[0]
    targets = own.topk(4, dim=-1).indices
    ours = linear_logprobs(
        hidden.repeat_interleave(4, dim=0), head.weight, targets.flatten(), **head.keywords()
    ).logprobs
    error = (ours - own.gather(-1, targets).flatten()).abs().max().item()
    limit = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 0.25  # 16-bit logits are rounded by up to 0.06
    if not error <= limit:
        raise OnecardError(
            f"model: {type(model).__name__} makes its logits in a way that onecard does not know: "
            f"log-probs from its hidden states are off by {error:.3g} nat (limit {limit:g})."
        )
