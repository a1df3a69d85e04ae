"""Training weights that are held in 16 bit: updates too small for them add up in float32 masters."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config import SFTConfig
from onecard.models.build import load_roles
from onecard.training.optim import make_optimizer
from tests.engine.roles_material import some_batch

RATE = 1e-6  # TRL's for DPO of all weights
STEPS = 10


def trained(model, **settings):
    """Each trained weight's name, start, end and what the optimizer works on, after some steps."""
    config = SFTConfig(model=str(model), learning_rate=RATE, **settings)
    roles = load_roles(config, trained="policy").train()
    weights = roles.trained_parameters()
    optimizer = make_optimizer(config, weights.values())
    exact = getattr(optimizer, "masters", list(weights.values()))
    starts = [each.detach().clone() for each in exact]
    batch = some_batch()
    for _ in range(STEPS):
        (-roles.logprobs(batch, batch.targets).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (weight, start, end) for (name, weight), start, end in zip(weights.items(), starts, exact, strict=True)
    }


def check_moves(half, full):
    """In each weight the masters move as float32 weights do, but for what bfloat16 products lose."""
    assert list(half) == list(full)
    for name, (weight, start, end) in half.items():
        _, their_start, their_end = full[name]
        assert torch.equal(start.to(weight.dtype), their_start.to(weight.dtype)), name
        assert torch.equal(weight.float(), end.to(weight.dtype).float()), name
        assert cosine_similarity((end - start).flatten(), (their_end - their_start).flatten(), 0) > 0.98, name


def test_all_weights_move_as_they_do_in_float32(tiny_model):
    half = trained(tiny_model, use_peft=False, dtype="bfloat16")
    assert {weight.dtype for weight, _, _ in half.values()} == {torch.bfloat16}
    full = trained(tiny_model, use_peft=False)
    check_moves(half, full)
    assert all(torch.equal(half[name][1], full[name][1]) for name in full)  # not rounded where they start


def test_weights_that_an_adapter_replaces_do_too(tiny_model, tmp_path):
    """PEFT raises its own factors to float32, and not the weights that it copies (modules_to_save)."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["up_proj"])
    get_peft_model(base, settings).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    half = trained(tmp_path, dtype="bfloat16")
    assert any(weight.dtype == torch.bfloat16 for weight, _, _ in half.values())
    copies = {name: each for name, each in half.items() if "modules_to_save" in name}
    assert len(copies) == 2
    full = trained(tmp_path)
    check_moves(copies, {name: full[name] for name in copies})
