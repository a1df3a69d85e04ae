"""Adapters in bfloat16: nothing is cast on the way, the float32 masters learn what a bfloat16 weight would lose."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from onecard.config import DPOConfig, PPOConfig, RewardConfig, TrainConfig
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.training.optim import (
    MASTER_GRADIENT_BYTES,
    MasterOptimizer,
    clip_grad_norm,
    make_optimizer,
    make_scheduler,
)
from onecard.utils.errors import OnecardError
from tests.engine.roles_material import some_batch

pytestmark = pytest.mark.usefixtures("quick")

BASES = {"bf16": {"dtype": "bfloat16"}, "nf4": {"dtype": "bfloat16", "load_in_4bit": True}}
BF16 = TrainConfig(adapter_dtype="bfloat16")


def policy(model, **settings):
    """A policy away from its start, where half of all gradients are zero."""
    roles = load_roles(DPOConfig(model=str(model), **settings), trained="policy", reference=True).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_((torch.randn(parameter.shape) * 0.05).to(parameter.dtype))
    return roles


class Casts(TorchDispatchMode):
    """Notes each copy from one floating dtype to another, by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype and out.is_floating_point():
            self.found.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("base", BASES)
def test_each_adapter_runs_in_bfloat16_without_a_cast(tiny_model, base):
    """Adapted layers alone, both ways: no tensor changes its dtype; with float32 adapters each input does."""
    counts = {}
    for dtype in ("float32", "bfloat16"):
        roles = policy(tiny_model, adapter_dtype=dtype, **BASES[base])
        layers = [each for each in roles.modules() if hasattr(each, "lora_A") and "Linear" in type(each).__name__]
        assert len(layers) == 14  # seven of each of two decoder layers
        found = []
        for layer in layers:
            states = torch.randn(5, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
            with Casts() as casts:
                layer(states).sum().backward()
            found += casts.found
            assert states.grad.dtype == torch.bfloat16
        counts[dtype] = sum(shape[0] == 5 for shape in found)
    assert counts["bfloat16"] == 0
    assert counts["float32"] >= 2 * 14  # the input to float32, the output back


@pytest.mark.parametrize("base", BASES)
def test_the_gradient_is_float32_s_to_bfloat16_rounding(tiny_model, base):
    """Same weights in both; compared with the gradient of the same weights on a float32 base's arithmetic."""
    batch, gradients = some_batch(), {}
    for dtype in ("float32", "bfloat16"):
        roles = policy(tiny_model, adapter_dtype=dtype, **BASES[base])
        with torch.no_grad():
            for parameter in roles.trained_parameters().values():
                parameter.copy_(parameter.bfloat16())
        roles.logprobs(batch, batch.targets).mean().backward()
        gradients[dtype] = torch.cat([p.grad.float().flatten() for p in roles.trained_parameters().values()])
    error = (gradients["bfloat16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert 0 < error < 2e-2  # one part in 256 for each of a handful of roundings


def test_every_role_s_adapter_is_in_bfloat16_and_heads_are_not(tiny_model, tmp_path):
    reward = load_roles(RewardConfig(model=str(tiny_model)), trained="reward", scalar=True)
    reward.export("reward", tmp_path / "reward", load_tokenizer(RewardConfig(model=str(tiny_model))))
    config = PPOConfig(
        model=str(tiny_model), dtype="bfloat16", reward_model_path=str(tmp_path / "reward"), adapter_dtype="bfloat16"
    )
    for dtype, expected in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        roles = load_ppo_roles(replace(config, adapter_dtype=dtype))
        adapters = {name: p for name, p in roles.named_parameters() if ".lora_" in name}
        assert {name.split(".")[-2] for name in adapters} == {"policy", "value", "reward"}
        assert {parameter.dtype for parameter in adapters.values()} == {expected}
        assert {parameter.dtype for parameter in roles.heads.parameters()} == {torch.float32}
        trained = set(roles.trained_parameters())
        assert trained
        assert not any(".reward." in name for name in trained)


def test_without_adapters_it_is_refused(tiny_model):
    config = DPOConfig(model=str(tiny_model), use_peft=False, adapter_dtype="bfloat16")
    with pytest.raises(OnecardError, match="adapter_dtype: bfloat16, but with --no_use_peft there are no adapters"):
        config.validate()


def test_updates_too_small_for_bfloat16_add_up_in_the_masters():
    """A weight of 1 moves by 2^-12 a step: bfloat16's next number is 2^-8 away, so the weight moves at each half."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    lost = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=2.0**-12), [weight])
    plain = torch.optim.SGD([lost], lr=2.0**-12)
    for step in range(1, 41):
        for each in (weight, lost):
            each.grad = -torch.ones_like(each)
        optimizer.step()
        plain.step()
        exact = torch.full((3,), 1 + step * 2.0**-12)
        assert torch.equal(optimizer.masters[0], exact)
        assert torch.equal(weight, exact.bfloat16())
        assert weight.grad is None
        assert optimizer.masters[0].grad is None
    assert weight[0] == 1 + 2.0**-7  # 40 steps are 2.5 of 2^-8, and half rounds to even
    assert lost[0] == 1


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("piecewise", [False, True])
def test_masters_move_as_float32_weights_do(monkeypatch, optim, piecewise):
    """Bit for bit what the same optimizer makes of float32 weights from the same gradients, in any number of pieces."""
    if piecewise:
        monkeypatch.setattr("onecard.training.optim.MASTER_GRADIENT_BYTES", 1)
    config = replace(BF16, optim=optim, learning_rate=1e-3, weight_decay=0.1)
    torch.manual_seed(0)
    starts = [torch.randn(96, 96).bfloat16(), torch.randn(7).bfloat16(), torch.randn(96)]
    held = [torch.nn.Parameter(start.clone()) for start in starts]
    full = [torch.nn.Parameter(start.float()) for start in starts]
    optimizer = make_optimizer(config, held)
    plain = make_optimizer(replace(config, adapter_dtype="float32"), full)
    assert isinstance(optimizer, MasterOptimizer)
    assert optimizer.masters[2] is held[2]  # a float32 head is its own master
    schedules = [make_scheduler(replace(config, warmup_steps=2), each, 6) for each in (optimizer, plain)]
    for _ in range(6):
        for mine, theirs in zip(held, full, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.float()
        for each in (optimizer, plain, *schedules):
            each.step()
        plain.zero_grad()
        for mine, master, theirs in zip(held, optimizer.masters, full, strict=True):
            assert torch.equal(master, theirs)
            assert torch.equal(mine, theirs.to(mine.dtype))
            assert mine.grad is None
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()


def test_a_step_holds_the_float32_gradients_of_a_part_at_a_time(monkeypatch):
    """Each of four weights is a part: no two masters have a gradient at once."""
    monkeypatch.setattr("onecard.training.optim.MASTER_GRADIENT_BYTES", 4 * 64)
    weights = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(4)]
    optimizer = MasterOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.5), weights)
    held = []
    inner = optimizer.inner.step
    optimizer.inner.step = lambda: (held.append(sum(m.grad is not None for m in optimizer.masters)), inner())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert [count for count in held if count] == [1, 1, 1, 1]
    assert all(torch.equal(weight, torch.full_like(weight, 0.5)) for weight in weights)
    assert MASTER_GRADIENT_BYTES == 32 << 20


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, optim):
    """Masters between two bfloat16 numbers survive, through a file read with weights_only."""
    config = replace(BF16, optim=optim, learning_rate=1e-4)

    def gradient(step: int) -> torch.Tensor:
        return torch.randn(96, 96, generator=torch.Generator().manual_seed(step)).bfloat16()

    def run(weight, optimizer, schedule, steps) -> None:
        for step in steps:
            weight.grad = gradient(step)
            optimizer.step()
            schedule.step()

    def fresh():
        weight = torch.nn.Parameter(torch.ones(96, 96).bfloat16())
        optimizer = make_optimizer(config, [weight])
        return weight, optimizer, make_scheduler(config, optimizer, 10)

    whole = fresh()
    run(*whole, range(10))
    first = fresh()
    run(*first, range(5))
    torch.save({"optimizer": first[1].state_dict(), "schedule": first[2].state_dict()}, tmp_path / "state.pt")
    weight, optimizer, schedule = second = fresh()
    with torch.no_grad():
        weight.copy_(first[0])
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    assert not torch.equal(optimizer.masters[0], weight.float())
    run(*second, range(5, 10))
    assert torch.equal(optimizer.masters[0], whole[1].masters[0])
    assert torch.equal(weight, whole[0])


@pytest.mark.parametrize("limit", [0.5, 1e9, math.inf])
def test_the_norm_of_bfloat16_gradients_is_float32(limit):
    """Against float64 of the same numbers; PyTorch's own is rounded to 8 bits. In float32 both are the same bits."""
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(257, 33, generator=generator), torch.randn(91, generator=generator)]

    def weights(*dtypes):
        made = [torch.nn.Parameter(torch.zeros_like(g, dtype=d)) for g, d in zip(gradients, dtypes, strict=True)]
        for weight, gradient in zip(made, gradients, strict=True):
            weight.grad = gradient.to(weight.dtype, copy=True)
        return [*made, torch.nn.Parameter(torch.zeros(2))]  # one without a gradient

    mixed = weights(torch.bfloat16, torch.float32)
    before = [weight.grad.double().clone() for weight in mixed[:2]]
    exact = math.sqrt(sum(float(each.square().sum()) for each in before))
    norm = clip_grad_norm(mixed, limit)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    theirs = torch.nn.utils.clip_grad_norm_(weights(torch.bfloat16, torch.bfloat16), math.inf)
    assert abs(float(theirs) / exact - 1) > 1e-4
    scale = min(1.0, limit / (float(norm) + 1e-6))
    for weight, was in zip(mixed[:2], before, strict=True):
        step = 2.0**-8 if weight.dtype == torch.bfloat16 else 2.0**-22
        torch.testing.assert_close(weight.grad.double(), was * scale, rtol=step, atol=0)
    ours, torchs = weights(torch.float32, torch.float32), weights(torch.float32, torch.float32)
    assert torch.equal(clip_grad_norm(ours, limit), torch.nn.utils.clip_grad_norm_(torchs, limit))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], torchs[:2], strict=True))


def test_the_exported_adapter_is_bfloat16_and_loads_with_peft(onecard, tiny_model, pairs, tmp_path):
    """A whole run; PEFT's model from its folder gives the run's own log-probs."""
    run = tmp_path / "run"
    arguments = ["dpo", "--model", tiny_model, "--dataset", pairs, "--dtype", "bfloat16", "--adapter_dtype", "bfloat16",
                 "--learning_rate", 1e-2, "--max_steps", 3, "--output_dir", run, "--save_steps", 1]  # fmt: skip
    result = onecard(*arguments)
    assert result.code == 0, result.err
    weights = load_file(str(run / "policy" / "adapter_model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(base, run / "policy", autocast_adapter_dtype=False)
    tokens = torch.tensor([[5, 9, 17, 33, 65]])
    ours = load_roles(
        DPOConfig(model=str(run / "policy"), dtype="bfloat16", adapter_dtype="bfloat16"), trained="policy"
    )
    own = ours.causal_model()(input_ids=tokens).logits
    assert torch.equal(theirs(input_ids=tokens).logits, own)
    default = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16), run / "policy"
    )
    torch.testing.assert_close(default(input_ids=tokens).logits, own, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("command", ["dpo", "ppo"])
def test_a_run_that_goes_on_ends_where_it_would_have(onecard, tiny_model, pairs, tmp_path, command):
    """Bit for bit, from a checkpoint in the middle."""
    more = {
        "dpo": ["--optim", "paged_adamw_8bit", "--lora_r", 64],
        "ppo": ["--reward_funcs", "length", "--response_length", 6, "--num_mini_batches", 2],
    }[command]
    run, ends = tmp_path / "run", []
    for resume in ([], ["--resume"]):
        if resume:
            shutil.rmtree(run / "checkpoint-4")
        result = onecard(
            command, "--model", tiny_model, "--dataset", pairs, "--dtype", "bfloat16", "--adapter_dtype", "bfloat16",
            "--learning_rate", 3e-4, "--max_steps", 4, "--save_steps", 2, "--output_dir", run,
            "--per_device_train_batch_size", 4, *more, *resume,
        )  # fmt: skip
        assert result.code == 0, result.err
        training = torch.load(run / "checkpoint-4" / "training.pt", weights_only=True)["optimizer"]
        ends.append((load_file(str(run / "policy" / "adapter_model.safetensors")), training["masters"]))
    (weights, masters), (again, masters_again) = ends
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert all(torch.equal(masters[place], masters_again[place]) for place in masters)
