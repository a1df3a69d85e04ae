"""Every code example in docs/kernels.md runs, with the same loss and gradients as the code that it replaces."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import onecard_kernels as k
from onecard_kernels.logprob import tuning
from tests.closeness import assert_like_eager, error
from tests.kernels.kernels_docs import EXAMPLES, PAGE, B, D, Leaves, Namespace, T, V, tokens

LOGITS_TO_KEEP = 5
OPTIONAL_PACKAGES = ("trl",)
LORA_TARGETS = ("q_proj", "v_proj")  # LoRA target modules of the examples with adapters


def split_example(code: str) -> tuple[str, list[str]]:
    """Split an example into the code before, and its replacements: the parts below `# after` and `# or, ...`."""
    pieces = re.split(r"^# (?:before|after|or, .*)$", code, flags=re.MULTILINE)
    assert not pieces[0].strip(), "code above the first heading"
    return pieces[1], pieces[2:]


def as_fp64(code: str) -> str:
    return code.replace(".float()", ".double()").replace("torch.float32", "torch.float64")


def run(code: str, names: Namespace, leaves: Leaves, epilogue: str = "") -> tuple[Tensor, list[Tensor]]:
    """Run an example's code. Returns its variable `loss`, and the gradients of `leaves`."""
    exec(compile(code + epilogue, "docs/kernels.md", "exec"), names)
    loss = names["loss"]
    return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values())))


def make_model(kind: str, dtype: torch.dtype, lora: Sequence[str] = ()) -> tuple[Any, Leaves]:
    """A random two-layer model and its trainable parameters. The head is scaled up to the logits of a trained model."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        **LOGIT_CONFIGS[kind],
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(lora)))
        with torch.no_grad():
            for name, x in model.named_parameters():
                if "lora_B" in name:
                    x.normal_(std=0.2)
        model.to(dtype)
    return model, {name: x for name, x in model.named_parameters() if x.requires_grad}


# Each architecture's own logit scale or softcap. The values are small enough that leaving one out changes the loss.
LOGIT_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "HyperCLOVAX": {"logits_scaling": 0.3},
}


def batch(dtype: torch.dtype, model: Any) -> Namespace:
    input_ids = torch.randint(3, V, (B, T))
    lengths = torch.tensor([[9], [5], [7], [6]])
    attention_mask = (torch.arange(T) < lengths).long()
    completion_mask = attention_mask * (torch.arange(T) >= 3)
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    return {
        "torch": torch,
        "F": F,
        "model": model,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "mask": completion_mask[:, 1:].to(dtype),
        "labels": labels,
        "num_items_in_batch": 37,
        "ref_logps": -20.0 * torch.rand(B, dtype=dtype),
        "logits_to_keep": LOGITS_TO_KEEP,
        "temperature": 0.7,
        "coefficients": torch.randn(B, T - 1, dtype=dtype),
    }


def model_inputs(dtype: torch.dtype, kind: str = "Llama", lora: Sequence[str] = ()) -> tuple[Namespace, Leaves]:
    model, leaves = make_model(kind, dtype, lora)
    return batch(dtype, model), leaves


def last_logits_inputs(dtype: torch.dtype) -> tuple[Namespace, Leaves]:
    names, leaves = model_inputs(dtype)
    return {**names, "coefficients": names["coefficients"][:, -LOGITS_TO_KEEP:]}, leaves


CALL = """
loss = (get_per_token_logps(model, input_ids, attention_mask, logits_to_keep, temperature) * coefficients).sum()
"""
# Example with a `# before` block -> its inputs, and code that is run after each of its blocks.
EXAMPLE_INPUTS: dict[str, tuple[Callable[[torch.dtype], tuple[Namespace, Leaves]], str]] = {
    "sft": (model_inputs, ""),
    "ppo": (lambda dtype: ({**tokens(dtype)[0], "torch": torch}, {}), ""),
    "per_token_logps": (last_logits_inputs, CALL),
    "dpo": (model_inputs, ""),
    "completions": (model_inputs, ""),
    "lora": (lambda dtype: model_inputs(dtype, lora=LORA_TARGETS), ""),
    "adapter_on_the_head": (lambda dtype: model_inputs(dtype, lora=(*LORA_TARGETS, "lm_head")), ""),
}


def test_every_block_has_a_test() -> None:
    assert len(EXAMPLES) == PAGE.count("```python"), "a block without <!-- example: NAME --> above it"
    assert set(EXAMPLES) == {
        *EXAMPLE_INPUTS,
        "recipes",
        "token_local_sft",
        "override",
        "ddp",
    }  # ddp: in test_distributed


def make_inputs(
    make: Callable[[torch.dtype], tuple[Namespace, Leaves]], dtype: torch.dtype
) -> tuple[Namespace, Leaves]:
    """The inputs in a dtype. Those in fp64 are the fp32 ones, cast, so the numbers are the same."""
    torch.manual_seed(1)
    names, leaves = make(torch.float32)
    if not leaves:
        leaves = {name: names[name] for name in ("hidden", "weight")}
    if dtype == torch.float32:
        return names, leaves
    fp64_names = {
        n: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in names.items()
    }
    if "model" in fp64_names:
        model = fp64_names["model"].double()
        return fp64_names, {name: x for name, x in model.named_parameters() if x.requires_grad}
    return fp64_names, {name: fp64_names[name].requires_grad_() for name in leaves}


def compare(code: str, make: Callable[[torch.dtype], tuple[Namespace, Leaves]], epilogue: str) -> None:
    """Replacements equal the code before in fp64. In fp32 their error is at most twice that of the code before."""
    before, replacements = split_example(code)
    assert replacements
    names, leaves = make_inputs(make, torch.float64)
    truth, true_grads = run(as_fp64(before), names, leaves, epilogue)
    for replacement in replacements:
        loss, grads = run(as_fp64(replacement), names, leaves, epilogue)
        for got, expected in zip([loss, *grads], [truth, *true_grads], strict=True):
            assert error(got, expected) <= 1e-11 * max(1.0, float(expected.abs().max()))
    assert any(float(g.abs().max()) > 1e-3 for g in true_grads), "no gradient to compare"
    names, leaves = make_inputs(make, torch.float32)
    eager, eager_grads = run(before, names, leaves, epilogue)
    for replacement in replacements:
        loss, grads = run(replacement, names, leaves, epilogue)
        assert_like_eager(loss, eager, truth, "loss")
        for name, *results in zip(leaves, grads, eager_grads, true_grads, strict=True):
            assert_like_eager(*results, f"gradient of {name}")


@pytest.mark.parametrize("name", EXAMPLE_INPUTS)
def test_before_and_after_are_the_same(name: str) -> None:
    for peer in OPTIONAL_PACKAGES:
        if peer in EXAMPLES[name]:
            pytest.importorskip(peer)
    compare(EXAMPLES[name], *EXAMPLE_INPUTS[name])


@pytest.mark.parametrize("kind", [kind for kind in LOGIT_CONFIGS if kind != "Llama"])
def test_logit_scales_and_softcaps(kind: str) -> None:
    compare(EXAMPLES["lora"], lambda dtype: model_inputs(dtype, kind, lora=LORA_TARGETS), "")


def test_recipes_are_the_papers_formulas() -> None:
    torch.manual_seed(2)
    group, max_length = 2, 12
    logprobs = (-3 * torch.rand(B, T, dtype=torch.float64)).requires_grad_()
    old, ref = (logprobs.detach() + 0.3 * torch.randn(B, T) for _ in range(2))
    lengths = torch.tensor([9, 4, 7, 1])
    mask = (torch.arange(T) < lengths[:, None]).double()
    scores, advantages = torch.randn(B, dtype=torch.float64), torch.randn(B, T, dtype=torch.float64)
    names: Namespace = {"B": B, "G": group, "max_length": max_length, "scores": scores, "advantages": advantages}
    names |= {"logprobs": logprobs, "old_logprobs": old, "ref_logprobs": ref, "mask": mask}
    exec(compile(EXAMPLES["recipes"], "docs/kernels.md", "exec"), names)

    pairs = scores.view(-1, group)
    centred = (pairs - pairs.mean(1, keepdim=True)).view(B, 1)
    grouped = centred / (pairs.std(1, keepdim=True).repeat_interleave(group, 0) + 1e-4)
    ratio, d = (logprobs - old).exp(), logprobs - ref

    def clipped(a: Tensor, r: Tensor, low: float, high: float) -> Tensor:
        return torch.max(-a * r, -a * r.clamp(1 - low, 1 + high))

    sequence_ratio = (((logprobs - old) * mask).sum(1) / lengths).exp()[:, None]
    truth = {
        "ppo": (clipped(advantages, ratio, 0.2, 0.2) * mask).sum() / mask.sum(),
        "grpo": (((clipped(grouped, ratio, 0.2, 0.2) + 0.04 * ((-d).exp() - 1 + d)) * mask).sum(1) / lengths).mean(),
        "dr_grpo": (clipped(centred, ratio, 0.2, 0.2) * mask).sum() / (B * max_length),
        "dapo": (clipped(grouped, ratio, 0.2, 0.28) * mask).sum() / mask.sum(),
        "gspo": clipped(grouped, sequence_ratio, 3e-4, 4e-4).mean(),
    }
    for name, expected in truth.items():
        got = names[name].loss
        grads = [torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (got, expected)]
        assert error(got, expected.detach()) < 1e-12, name
        assert error(*grads) < 1e-12, name


def test_token_local_sft() -> None:
    names, leaves = tokens(torch.float32)
    loss, grads = run(EXAMPLES["token_local_sft"], {**names, "torch": torch}, leaves)
    logprobs = "(hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]"
    plain = f"loss = -({logprobs} * mask).sum() / mask.sum()"
    fp64_names = {n: x.detach().double() if x.is_floating_point() else x for n, x in names.items()}
    truth = run(plain, fp64_names, {n: fp64_names[n].requires_grad_() for n in leaves})
    eager = run(plain, dict(names), leaves)
    for got, same, true in zip([loss, *grads], [eager[0], *eager[1]], [truth[0], *truth[1]], strict=True):
        assert_like_eager(got, same, true)


def test_override_changes_tile_sizes_and_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = tokens(torch.float64)
    plain = k.linear_logprobs(names["hidden"], names["weight"], names["targets"]).logprobs
    used: list[tuning.TileSizes] = []
    choose = tuning.choose

    def recorded_choose(*args: Any, **options: Any) -> tuning.TileSizes:
        used.append(choose(*args, **options))
        return used[-1]

    monkeypatch.setattr("onecard_kernels.logprob.linear.choose", recorded_choose)
    exec(compile(EXAMPLES["override"], "docs/kernels.md", "exec"), names)
    assert used == [tuning.TileSizes("low_memory", 1024, 2048)]
    assert error(names["logprobs"], plain) < 1e-12
