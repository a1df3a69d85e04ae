"""Resolves `lora_target_modules` to the layers of a model that get an adapter.

| name | layers |
|---|---|
| all-linear | the text decoder's linear layers, except experts, routers, Mamba's output and layers without gradient |
| q_proj, layers.0.mlp.up_proj | the linear layers and embeddings whose path is or ends with the name, and the head |
| experts.down_proj | a name of two or more parts: experts too, as modules or as one stacked parameter |

Vision and audio towers get no adapter: text does not run through them, so the adapter would not be trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.models.trunk import errors_of, trunk_of
from onecard.models.vocabulary import known_tokens
from onecard.utils.errors import OnecardError, nearest

ALL_LINEAR = "all-linear"
SETTING = "lora_target_modules"
PROBE_TOKENS = 24  # of the forward pass that finds the layers with a gradient


@dataclass(frozen=True)
class Targets:
    """Full names of the modules and of the stacked experts' parameters that get an adapter.

    `left_out`: descriptions of the layers that all-linear excludes.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def without(self, module: str) -> Targets:
        """A copy without one module."""
        return Targets(tuple(name for name in self.modules if name != module), self.parameters, self.left_out)


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer that PEFT can adapt, quantized or not."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def is_plain_linear(layer: Any) -> bool:
    """Whether a linear layer computes `x W^T + b`, as LoRA assumes. Some subclasses of `nn.Linear` do not."""
    if type(layer).forward is nn.Linear.forward or not isinstance(layer, nn.Linear) or hasattr(layer, "quant_state"):
        return True
    weight = layer.weight
    inputs = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(3, -1)
    expected = nn.functional.linear(inputs, weight, layer.bias)
    try:
        outputs = layer(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):  # the layer takes inputs of another shape
        return False
    same_shape = isinstance(outputs, Tensor) and outputs.shape == expected.shape
    return same_shape and (outputs.is_meta or torch.allclose(outputs, expected, rtol=0.05, atol=0.05))


def has_stacked_experts(module: Any) -> bool:
    """Whether a module has the weights of several experts as its direct parameters."""
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() >= 2]
    return bool(weights) and "expert" in type(module).__name__.lower() and not is_linear(module)


def is_mamba_mixer(module: Any) -> bool:
    """Whether a module is a Mamba mixer. Its fused kernels read the weights of some layers without calling them."""
    return all(hasattr(module, name) for name in ("A_log", "in_proj", "out_proj"))


def is_rescaled(model: Any, path: str) -> bool:
    """Whether a model divides the weights of a layer in evaluation mode (RWKV's `rescale_every`).

    The adapter's weights are not divided, so the adapted layer would differ between training and evaluation mode.
    """
    return hasattr(model.config, "rescale_every") and path.endswith((".attention.output", ".feed_forward.value"))


def moe_block_of(path: str) -> str:
    """Path of the mixture-of-experts block of the experts at `path`: the part before `.experts`, else the parent."""
    before, separator, _ = f"{path}.".partition(".experts.")
    return before if separator else path.rpartition(".")[0]


@dataclass(frozen=True)
class Layers:
    """The layers of a text decoder by full name, grouped by kind.

    `linear`: plain linear layers, experts among them; `other`: linear layers that do not compute `x W^T + b`, at least
    in evaluation mode; `experts`: linear layers that are experts; `stacked`: parameters of stacked experts; `routers`:
    modules that choose among experts; `read_by_mixers`: linear layers whose weights a Mamba mixer's kernels read;
    `moe_blocks`: mixture-of-experts blocks.
    """

    linear: Mapping[str, nn.Module]
    other: Mapping[str, nn.Module]
    embeddings: tuple[str, ...]
    head: str
    experts: frozenset[str]
    stacked: Mapping[str, nn.Parameter]
    routers: frozenset[str]
    read_by_mixers: frozenset[str]
    moe_blocks: frozenset[str]


def layers_of(model: Any) -> Layers:
    """The layers of a model without adapters."""
    trunk, head = trunk_of(model), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(trunk)]
    inside = {f"{prefix}.{name}" if prefix else name: module for name, module in trunk.named_modules() if name}
    stacked = [name for name, module in inside.items() if has_stacked_experts(module)]
    listed = [name for name in inside if name.endswith(".experts")]
    blocks = frozenset(moe_block_of(name) for name in (*stacked, *listed))
    other = {
        name: module
        for name, module in inside.items()
        if is_linear(module) and (not is_plain_linear(module) or is_rescaled(model, name))
    }
    linear = {name: module for name, module in inside.items() if is_linear(module) and name not in other}
    routers = {name for name in inside if is_router(name, blocks)}
    experts = {name for name in linear if ".experts." in name} - routers
    mixers = {
        f"{name}.{part}"
        for name, module in inside.items()
        if is_mamba_mixer(module)
        for part in ("out_proj", "dt_proj")
    }
    return Layers(
        linear,
        other,
        tuple(name for name, module in inside.items() if isinstance(module, nn.Embedding)),
        names.get(id(head), ""),
        frozenset(experts),
        {
            f"{name}.{parameter_name}": parameter
            for name in stacked
            for parameter_name, parameter in inside[name].named_parameters(recurse=False)
            if parameter.dim() == 3 or getattr(parameter, "quant_state", None) is not None
        },
        frozenset(routers),
        frozenset(mixers & linear.keys()),
        blocks,
    )


def is_router(path: str, blocks: frozenset[str]) -> bool:
    """Whether a module of a mixture-of-experts block is its router, or the gate of its shared expert."""
    block = next((name for name in blocks if path.startswith(f"{name}.")), None)
    if block is None:
        return False
    parts = path[len(block) + 1 :].split(".")
    return any(part == "gate" or "router" in part or part.endswith("_gate") for part in parts)


def layers_without_gradient(model: Any, layers: Layers) -> frozenset[str]:
    """Linear layers, except experts, that get no gradient from a few tokens in evaluation mode or in training mode.

    Empty for a model on meta, which is not run.
    """
    if model.device.type == "meta":
        return frozenset()
    excluded = layers.experts | layers.routers
    candidates = {name: module for name, module in layers.linear.items() if name not in excluded}
    without, training = set[str](), model.training
    try:
        for mode in (False, True):
            with errors_of(model):
                without |= candidates.keys() - layers_with_gradient(model.train(mode), candidates)
    finally:
        model.train(training)
    return frozenset(without)


@torch.enable_grad()
def layers_with_gradient(model: Any, layers: Mapping[str, nn.Module]) -> set[str]:
    """The layers whose outputs get a gradient from the sum of the text decoder's hidden states."""
    trunk, leaves = trunk_of(model), dict[str, Tensor]()

    def add_leaf(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            leaves[name] = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            return output + leaves[name]

        return hook

    hooks = [module.register_forward_hook(add_leaf(name)) for name, module in layers.items()]
    try:
        tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] % known_tokens(model)
        trunk(input_ids=tokens, use_cache=False).last_hidden_state.float().sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, leaf in leaves.items() if leaf.grad is not None}


def find_targets(model: Any, names: Sequence[str]) -> Targets:
    """The layers of a model without adapters that `lora_target_modules` names. Unknown names raise `OnecardError`."""
    if not names:
        raise OnecardError(f"{SETTING}: empty, expected {ALL_LINEAR} or names of layers.")
    layers = layers_of(model)
    unused = layers_without_gradient(model, layers)
    chosen: set[str] = set()
    parameters: set[str] = set()
    left_out: dict[str, int] = {}
    for name in names:
        if name == ALL_LINEAR:
            excluded = layers.experts | layers.routers | layers.read_by_mixers
            chosen |= layers.linear.keys() - excluded - unused
            mixers = {path.rpartition(".")[0] for path in layers.read_by_mixers}
            other = layers.other.keys() - layers.routers
            left_out = {
                f"the experts of {len(layers.moe_blocks)} layers": len(layers.moe_blocks),
                f"out_proj and dt_proj of {len(mixers)} Mamba layers": len(mixers),
                f"{len(other)} layers that are not plain linear layers": len(other),
                f"{len(unused - excluded)} layers that get no gradient": len(unused - excluded),
            }
            continue
        modules, stacks = select_layers(model, layers, name)
        chosen |= set(modules)
        parameters |= set(stacks)
    order = [name for name, _ in model.named_modules() if name in chosen]
    return Targets(tuple(order), tuple(sorted(parameters)), tuple(layer for layer, count in left_out.items() if count))


def matches(path: str, name: str) -> bool:
    """Whether a path is or ends with a name. Expert numbers are optional: experts.w1 names experts.0.w1."""
    unnumbered = re.sub(r"\.experts\.\d+\.", ".experts.", path)
    return any(form == name or form.endswith(f".{name}") for form in (path, unnumbered))


def select_layers(model: Any, layers: Layers, name: str) -> tuple[list[str], list[str]]:
    """The modules and the stacked experts' parameters that one name selects. No match raises `OnecardError`."""
    adaptable = [*layers.linear, *layers.embeddings, *([layers.head] if layers.head else [])]
    modules = [path for path in dict.fromkeys(adaptable) if matches(path, name)]
    stacks = [path for path in layers.stacked if matches(path, name)]
    matched = [*modules, *stacks]
    if "." not in name:  # a name of one part does not select experts, of which there may be hundreds
        modules, stacks = [path for path in modules if path not in layers.experts], []
    if path := next((path for path in layers.other if matches(path, name)), None):
        raise OnecardError(f"{SETTING}: {path} is a {type(layers.other[path]).__name__}, which takes no adapter.")
    if quantized := next((path for path in stacks if not layers.stacked[path].is_floating_point()), None):
        raise OnecardError(f"{SETTING}: {quantized} is quantized to 4 bit, where stacked experts take no adapter.")
    if not modules and not stacks:
        raise OnecardError(f"{SETTING}: {no_match_message(model, layers, name, matched)}")
    return modules, stacks


def no_match_message(model: Any, layers: Layers, name: str, matched: Sequence[str]) -> str:
    """The error message for a name that selects no layer. `matched`: experts that it would match."""
    if matched:
        return f"{name} matches only experts ({matched[0]}, ...); to adapt them, write experts.{name}."
    others = {path: type(module).__name__ for path, module in model.named_modules() if path and matches(path, name)}
    if path := next((path for path in others if path in layers.routers), None):
        return f"{path} is a {others[path]}, which takes no adapter."
    if path := next(iter(others), None):
        prefix = next(trunk for trunk, module in model.named_modules() if module is trunk_of(model))
        where = "" if path.startswith(f"{prefix}.") else " outside of the text decoder"
        return f"{path} is a {others[path]}{where}; expected linear layers or embeddings of the text decoder."
    paths = [*layers.linear, *layers.embeddings, layers.head]
    known = {ALL_LINEAR, *paths, *(path.rpartition(".")[2] for path in paths)}
    return (
        f"no layer of {type(model).__name__} is called {name}; expected {ALL_LINEAR} or names of its layers."
        f"{nearest(name, sorted(known))}"
    )
