"""The head of a causal language model, read from a Hugging Face model and compared with the model's own logits.

Models compute their logits in different ways that the names in their configs do not tell: Granite divides by
`logits_scaling`, HyperCLOVA X multiplies by it, MiniCPM divides the hidden states by it. So nothing is read from the
config. Instead, the model is run on a few tokens, the head's output is replaced by known numbers, and the transform is
read from the logits. transformers and peft are not imported; their classes are recognized by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .logprob.matmul import autocast_is_on

TOKENS = 12
TINY, HUGE = 2.0**-40, 2.0**100  # tanh(x) is x at the first and 1 at the second
# Numbers that replace the head's output. With 13 numbers and 12 tokens, each column gets all of them but one.
PROBES = (0.0, TINY, HUGE, 0.5, -0.5, 3.0, -3.0, 20.0, -20.0, 100.0, -100.0, -TINY, -HUGE)
FP32_TOLERANCE = 1e-5  # relative error of a few operations in fp32
# Largest error of the model's product with the head against ours, relative to the largest logit, by the logits' dtype
PRODUCT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class LogitTransform:
    """From `x = h @ W.T + b` to logits: `z = x * logit_scale`, and with a softcap `z = softcap * tanh(z / softcap)`.

    columns: number of logits if the head has more rows (padding); None: as many logits as rows.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    columns: int | None = None


@dataclass(frozen=True)
class LanguageHead:
    """`weight` [V, D], `bias` [V] or None, `logit_scale` and `softcap` as the linear functions take them."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def keywords(self) -> dict[str, Any]:
        """The linear functions' keyword arguments for this head (all but `weight`)."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def read_head(model: Any, transform: LogitTransform | None = None, *, trunk: Any = None) -> LanguageHead:
    """The head of a Hugging Face causal language model: what the linear functions need for the model's own logits.

    logits = head(h);  h = trunk(input_ids).last_hidden_state

    Without `transform`, finds it (`find_logit_transform`) and compares the head with the model's own logits
    (`check_head`): two forward passes of 12 tokens, needed once per model. With `transform`, only reads the
    weights: read the head again after each step that changes weights or adapters.

    Args:
        model: a causal language model of transformers, or a PeftModel, DistributedDataParallel or torch.compile around
            one. LoRA on the head (also tied to the embeddings) and PEFT's modules_to_save are read if they are active.
        transform: the result of an earlier `find_logit_transform`.
        trunk: the module that gives the hidden states; `model.get_decoder()` by default.

    Returns:
        LanguageHead. With LoRA on the head, `weight` is W + scaling * B @ A with gradients to A and B. It is fp32 also
        if W has 16 bits, where adding a small product would be rounded away.

    Raises:
        ValueError: the linear functions cannot give this model's logits, or an adapter on the head is of another kind
            (DoRA and other variants of LoRA, dropout in training mode, IA3, trainable tokens), or LoRA is on the head
            under autocast.
    """
    causal = _causal_model(model)
    if transform is not None:
        return _head_of(causal, transform)
    head = _head_of(causal, find_logit_transform(causal, trunk=trunk))
    check_head(causal, head, trunk=trunk)
    return head


@torch.no_grad()
def find_logit_transform(model: Any, *, trunk: Any = None) -> LogitTransform:
    """The transform of a causal language model between the product with its head and its logits.

    One forward pass of 12 tokens, in which known numbers replace the outputs of trunk and head.

    Args:
        model, trunk: see `read_head`.

    Raises:
        ValueError: the transform is not a scale and a softcap.
    """
    causal = _causal_model(model)
    layer = _head_layer(causal)
    observed = _run(causal, layer, trunk, probing=True)
    scale, softcap = _fit(causal, observed)
    factor = _fit_factor(causal, observed)
    if factor != 1.0 and _weight_and_bias(causal, layer)[1] is not None:
        raise _unsupported(causal, f"it multiplies its hidden states by {factor:g} before a head with a bias")
    columns = observed.logits.shape[-1]
    return LogitTransform(scale * factor, softcap, columns if columns < observed.head_output.shape[-1] else None)


@torch.no_grad()
def check_head(model: Any, head: LanguageHead, *, trunk: Any = None) -> None:
    """Raise unless `head` on the trunk's hidden states gives the model's own logits, on 12 tokens.

    Args:
        model, trunk: see `read_head`.

    Raises:
        ValueError: a logit is off by more than the rounding of its dtype.
    """
    causal = _causal_model(model)
    observed = _run(causal, _head_layer(causal), trunk)
    own, hidden = observed.logits.flatten(0, -2), observed.hidden.flatten(0, -2)
    dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
    weight = head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight
    hidden, own = hidden.to(weight.device, dtype), own.to(weight.device, dtype)
    with torch.autocast(weight.device.type, enabled=False):
        z = torch.cat([hidden @ rows.to(dtype).T for rows in weight.split(16384)], 1)  # no copy of the whole head
    z = (z if head.bias is None else z + head.bias) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    if z.shape != own.shape:
        raise _unsupported(causal, f"it has {own.shape[-1]} logits, but the head has {z.shape[-1]} rows")
    largest = own.abs().max().item()
    error, limit = (z - own).abs().max().item(), PRODUCT_TOLERANCE[observed.rounded] * largest
    if not error <= limit:
        raise _unsupported(
            causal, f"a logit of its head is off by {error:.3g} (limit {limit:.3g}, largest {largest:.3g})"
        )


class _Observed:
    """Tensors of a forward pass. With probing, `hidden` and `head_output` are the known numbers."""

    hidden: Tensor  # the trunk's output
    head_input: Tensor
    head_output: Tensor
    logits: Tensor
    rounded: torch.dtype  # dtype of the head's output or of the logits, whichever has fewer bits


def _run(model: Any, layer: nn.Module, trunk: Any, *, probing: bool = False) -> _Observed:
    """A forward pass of a few tokens. Probing replaces the outputs of trunk and head by known numbers."""
    trunk = getattr(model, "get_decoder", lambda: model)() if trunk is None else trunk
    if trunk is model:
        raise ValueError(
            f"trunk is the whole {type(model).__name__}, expected the submodule that returns hidden states: pass trunk"
        )
    observed, trunk_output = _Observed(), list[Tensor]()

    def after_trunk(_: Any, __: Any, output: Any) -> Any:
        trunk_output[:] = [output[0]]
        observed.hidden = _powers_of_two(output[0]) if probing else output[0]
        if isinstance(output, tuple):
            return (observed.hidden, *output[1:])
        output[next(iter(output))] = observed.hidden
        return output

    def before_head(_: Any, inputs: tuple[Any, ...]) -> Any:
        observed.head_input = inputs[0]
        if not probing or not trunk_output:
            return None
        dtype = next(layer.parameters()).dtype  # the layer would raise for the dtype of the known numbers
        return (trunk_output[0].to(dtype) if dtype.is_floating_point else trunk_output[0], *inputs[1:])

    def after_head(_: Any, __: Any, output: Tensor) -> Tensor | None:
        observed.head_output, observed.rounded = output, output.dtype
        if not probing:
            return None
        observed.head_output = _probes(output)
        torch.set_grad_enabled(True)  # until the pass ends: logits after a trained transform require a gradient
        return observed.head_output.clone()

    handles = [
        trunk.register_forward_hook(after_trunk),
        layer.register_forward_pre_hook(before_head),
        layer.register_forward_hook(after_head),
    ]
    try:
        with torch.no_grad(), _evaluating(model):
            observed.logits = model(input_ids=_tokens(model), use_cache=False, return_dict=True).logits
    except (RuntimeError, TypeError, ValueError) as error:
        if not probing or not hasattr(observed, "hidden"):
            raise
        side = "after" if hasattr(observed, "head_input") else "before"
        reason = " ".join(str(error).split())[:160]
        raise _unsupported(
            model, f"{side} its output embeddings, a {type(layer).__name__}, it does more than scale and cap ({reason})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, module in (("hidden", trunk), ("head_output", layer)):
        if not hasattr(observed, name):
            raise _unsupported(model, f"it does not call its {type(module).__name__}")
    if observed.logits.dtype.itemsize < observed.rounded.itemsize:
        observed.rounded = observed.logits.dtype
    return observed


def _fit(model: Any, observed: _Observed) -> tuple[float, float | None]:
    """Scale and softcap that turn the known numbers in `observed.head_output` into `observed.logits`."""
    logits, probes = observed.logits, observed.head_output
    if logits.requires_grad:
        raise _unsupported(model, "it multiplies its logits by a trained parameter, which would get no gradient")
    if logits.shape[:-1] != probes.shape[:-1] or logits.shape[-1] > probes.shape[-1]:
        raise _unsupported(model, f"its head returns {tuple(probes.shape)}, but its logits are {tuple(logits.shape)}")
    z, x = logits.double(), probes[..., : logits.shape[-1]].double()
    scale, top = z[x == TINY].median().item() / TINY, z[x == HUGE].median().abs().item()
    softcap = top if 0.0 < top < HUGE**0.5 else None
    fitted = x * scale if softcap is None else softcap * torch.tanh(x * (scale / softcap))
    coarse = logits.dtype.itemsize < 4
    odd = ~((z - fitted).abs() <= (torch.finfo(logits.dtype).eps if coarse else FP32_TOLERANCE) * fitted.abs())
    if bool(odd.any()):
        at = tuple(odd.nonzero()[0].tolist())
        raise _unsupported(model, f"{x[at].item():.7g} from its head becomes {z[at].item():.7g} for token {at[-1]}")
    if scale == 0.0 or (coarse and (scale, softcap) != (1.0, None)):
        raise _unsupported(
            model, f"it scales its logits by about {scale:.3g} in {logits.dtype}, where they are rounded"
        )
    return scale, softcap


def _fit_factor(model: Any, observed: _Observed) -> float:
    """The factor between the trunk's hidden states and the head's input."""
    given, powers = observed.head_input, observed.hidden.double()
    if given.shape != powers.shape:
        raise _unsupported(model, f"its trunk returns {tuple(powers.shape)}, but its head takes {tuple(given.shape)}")
    factor = (given.double() / powers).median().item()
    if not torch.allclose(given.double(), powers * factor, rtol=FP32_TOLERANCE, atol=0.0):
        raise _unsupported(model, "it does more than scale the hidden states between its trunk and its head")
    if given.dtype.itemsize < 4 and factor != 1.0:
        raise _unsupported(model, f"it scales its hidden states by about {factor:.3g} in {given.dtype}")
    return factor


def _head_of(model: Any, transform: LogitTransform) -> LanguageHead:
    weight, bias = _weight_and_bias(model, _head_layer(model))
    if transform.columns is not None:
        weight, bias = weight[: transform.columns], None if bias is None else bias[: transform.columns]
    return LanguageHead(weight, bias, transform.logit_scale, transform.softcap)


def _weight_and_bias(model: Any, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer, with PEFT's active adapters."""
    kind = type(layer).__name__
    if type(layer).__module__.startswith("peft."):
        if kind == "ModulesToSaveWrapper":
            active = [] if layer.disable_adapters else [x for x in layer.active_adapters if x in layer.modules_to_save]
            return _weight_and_bias(model, layer.modules_to_save[active[0]] if active else layer.original_module)
        if kind == "Linear" and ".lora." in type(layer).__module__:
            return _with_lora(model, layer)
        raise ValueError(f"{type(model).__name__} has a {kind} of peft on its head, expected LoRA or modules_to_save")
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        shape = f"of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        raise ValueError(f"{type(model).__name__}'s head is a {kind} with weight {shape}, expected a tensor [V, D]")
    if not weight.is_floating_point():
        raise ValueError(f"{type(model).__name__}'s head is a {kind} in {weight.dtype}, expected an unquantized weight")
    return weight, getattr(layer, "bias", None)


def _with_lora(model: Any, layer: Any) -> tuple[Tensor, Tensor | None]:
    """W + sum of scaling * B @ A over the active adapters, and the bias with theirs."""
    weight, bias = _weight_and_bias(model, layer.base_layer)
    if layer.merged or layer.disable_adapters:
        if layer.merged and layer.disable_adapters:
            raise ValueError("LoRA on the head is merged and disabled, expected unmerged: call unmerge_adapter()")
        return weight, bias
    if autocast_is_on(weight):
        raise ValueError(
            "the head has LoRA, and autocast would round W + scaling * B @ A to 16 bits, where B @ A can vanish: "
            "read the head and call the loss under torch.autocast(enabled=False)"
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        _check_lora(layer, name)
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        weight = weight + scaling * (b.weight.to(wide) @ a.weight.to(wide))
        if b.bias is not None:
            lora_bias = scaling * b.bias.to(wide)
            bias = lora_bias if bias is None else bias + lora_bias
    return weight, bias


def _check_lora(layer: Any, name: str) -> None:
    """Raise if the adapter is not a change of the head's weight."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or getattr(layer, "use_dora", {}).get(name):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise ValueError(f"adapter {name!r} has {kind} on the head, expected plain LoRA (or no adapter on the head)")
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0.0:
        raise ValueError(
            f"adapter {name!r} has dropout {layer.lora_dropout[name].p:g} on the head in training mode, expected 0: it "
            "acts on the hidden states, so it is not a change of the weight"
        )
    if layer.fan_in_fan_out:
        raise ValueError(f"adapter {name!r} has fan_in_fan_out=True on the head, expected a weight of shape [V, D]")


def _causal_model(model: Any) -> Any:
    """Unwrap PEFT, DistributedDataParallel and torch.compile."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError(f"{type(model).__name__} has virtual tokens, expected adapters on weights (LoRA)")
            model = model.get_base_model()
        else:
            break
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder with a decoder, expected a causal language model")
    return model


def _head_layer(model: Any) -> Any:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no language model head, expected a causal language model")
    return layer


def _tokens(model: Any) -> Tensor:
    weight = model.get_input_embeddings().weight
    if weight.is_meta and not hasattr(model, "hf_device_map"):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, expected weights in memory: it is run on a few tokens"
        )
    return (torch.arange(TOKENS, device=model.device) * 7919 % weight.shape[0]).unsqueeze(0)


def _probes(output: Tensor) -> Tensor:
    """PROBES in turn over tokens and columns, in fp64 (fp32 on a device without it)."""
    dtype = torch.float32 if output.device.type == "mps" else torch.float64
    values = torch.tensor(PROBES, dtype=dtype, device=output.device)
    count, columns = output.shape[:-1].numel(), output.shape[-1]
    indices = torch.arange(count, device=output.device)[:, None] + torch.arange(columns, device=output.device)
    return values[indices % len(PROBES)].view(output.shape)


def _powers_of_two(hidden: Tensor) -> Tensor:
    """Powers of two of hidden's shape, which no dtype rounds, in fp64 (fp32 on a device without it)."""
    dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    exponents = torch.arange(hidden.numel(), device=hidden.device) % 7
    return (2.0 ** (exponents.to(dtype) - 3.0)).view(hidden.shape)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode; afterwards every module has its earlier mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _unsupported(model: Any, why: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} computes its logits in a way that the linear functions cannot reproduce: {why}"
    )
