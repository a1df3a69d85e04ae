"""Each lever of docs/memory.md: a lower peak by the profiler's memory events, and the result it is said to have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import memory_options, records, render
from benchmarks.measure import peak_bytes
from benchmarks.records import Case, Row
from onecard.config import DPOConfig, TrainConfig
from onecard.data.batches import TokenSequence, pack
from onecard.models.build import load_roles
from onecard.models.memory_options import head_chunks
from onecard.training.optim import make_optimizer
from onecard_kernels import linear_logprobs
from onecard_kernels.logprob import tuning

pytestmark = pytest.mark.usefixtures("quick")

SEQUENCES, LENGTH, HIDDEN, LAYERS, VOCABULARY = 4, 128, 128, 4, 4096


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Large enough that activations, and not small change, are the peak."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=352, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def some_batch():
    sequences = [tuple((31 * i + 7 * j) % 4000 + 5 for i in range(LENGTH)) for j in range(SEQUENCES)]
    return pack([TokenSequence(each, (False,) * 64 + (True,) * (LENGTH - 64)) for each in sequences])


def moved(model, **settings):
    roles = load_roles(DPOConfig(model=str(model), **settings), trained="policy").train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_((torch.randn(parameter.shape) * 0.02).to(parameter.dtype))
    return roles


def step_of(roles, batch):
    """A forward and backward, and the gradients it leaves."""

    def step() -> None:
        roles.zero_grad(set_to_none=True)
        roles.logprobs(batch, batch.targets).mean().backward()

    return step


def peak(roles, batch) -> int:
    step = step_of(roles, batch)
    step()
    roles.zero_grad(set_to_none=True)
    return peak_bytes(step, roles.device)


def gradient(roles, batch) -> torch.Tensor:
    step_of(roles, batch)()
    return torch.cat([parameter.grad.flatten() for parameter in roles.trained_parameters().values()])


def test_checkpointed_layers_keep_their_inputs_alone(llama):
    """Off: far more than one hidden state a layer stays. On: bit for bit the same gradient."""
    batch, plain, checkpointed = some_batch(), moved(llama), moved(llama, gradient_checkpointing=True)
    high, low = peak(plain, batch), peak(checkpointed, batch)
    assert low < 0.55 * high
    assert torch.equal(gradient(plain, batch), gradient(checkpointed, batch))


def test_bfloat16_adapters_spare_float32_copies_of_inputs(llama):
    """q, k and v, gate and up cast the same input each for itself: five copies of a hidden state a layer, and more."""
    batch = some_batch()
    peaks = {
        dtype: peak(moved(llama, dtype="bfloat16", adapter_dtype=dtype), batch) for dtype in ("float32", "bfloat16")
    }
    state = SEQUENCES * LENGTH * HIDDEN
    assert peaks["float32"] - peaks["bfloat16"] > LAYERS * 5 * state * 4 * 0.6
    assert peaks["bfloat16"] < 0.8 * peaks["float32"]


def test_smaller_chunks_of_the_head_take_less_memory(monkeypatch):
    """Chunks of 32 of 512 tokens, on a head whose logits are the peak; as GPUs cut it, and as CPUs do."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 64), torch.randn(20000, 64) / 8
    targets = torch.randint(20000, (512,))
    for implementation in tuning.IMPLEMENTATIONS[:2]:
        monkeypatch.setenv("ONECARD_LINEAR", implementation)
        found = {}
        for rows in (512, 32):
            leaf = hidden.clone().requires_grad_()

            def step(leaf=leaf, rows=rows):
                leaf.grad = None
                with head_chunks(rows):
                    linear_logprobs(leaf, weight, targets).logprobs.sum().backward()

            step()
            gradient = leaf.grad.clone()
            leaf.grad = None
            found[rows] = (peak_bytes(step, leaf.device), gradient)
        assert found[32][0] < 0.5 * found[512][0]
        torch.testing.assert_close(found[32][1], found[512][1], rtol=1e-5, atol=1e-6)


def test_head_chunks_hold_inside_the_context_alone():
    """0 is the device's own choice."""

    def rows() -> int:
        return tuning.choose(32000, torch.float32, torch.device("cuda")).rows

    own = rows()
    assert own > 96
    with head_chunks(96):
        assert rows() == 96
    with head_chunks(0):
        assert rows() == own


def test_every_linear_loss_of_a_run_is_cut_so(onecard, tiny_model, pairs, tmp_path, monkeypatch):
    """DPO with its reference, evaluations and a reference pass beforehand; PPO from its start to its evaluation."""
    asked, choose = [], tuning.choose

    def spy(*args, **keywords):
        plan = choose(*args, **keywords)
        asked.append(plan.rows)
        return plan

    for module in ("logprob.linear", "ppo.linear"):
        monkeypatch.setattr(f"onecard_kernels.{module}.choose", spy)
    commands = {
        "dpo": ["--precompute_ref_log_probs"],
        "ppo": ["--reward_funcs", "length", "--response_length", 6, "--num_mini_batches", 1],
    }
    for command, more in commands.items():
        rows = {}
        for tokens in (0, 5):
            asked.clear()
            run = tmp_path / f"{command}{tokens}"
            result = onecard(command, "--model", tiny_model, "--dataset", pairs, "--max_steps", 2, "--output_dir", run,
                             "--per_device_train_batch_size", 4, "--head_chunk_tokens", tokens, *more)  # fmt: skip
            assert result.code == 0, result.err
            assert asked
            assert (set(asked) == {5}) == (tokens == 5)
            rows[tokens] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for one, two in zip(rows[0], rows[5], strict=True):
            for name in one:
                if not name.startswith(("time/", "memory/")):
                    assert two[name] == pytest.approx(one[name], rel=2e-4, abs=2e-5), name
    assert not tuning._overrides


def test_nf4_with_double_quantization_is_a_quarter_of_bfloat16(llama):
    """4 bits and 8 / 64 of a scale a number (float32 scales of scales: 1 / 2048 more), where the linear layers are."""
    sizes = {}
    for name, settings in {"bf16": {"dtype": "bfloat16"}, "nf4": {"load_in_4bit": True}}.items():
        roles = load_roles(DPOConfig(model=str(llama), **settings), trained="policy")
        layers = [m for n, m in roles.named_modules() if n.endswith("base_layer")]
        assert len(layers) == 7 * LAYERS
        total = numbers = 0
        for layer in layers:
            state = getattr(layer.weight, "quant_state", None)
            total += layer.weight.numel() * layer.weight.element_size()
            numbers += layer.in_features * layer.out_features
            if state is not None:
                assert state.nested
                assert state.quant_type == "nf4"
                assert state.absmax.dtype == torch.uint8
                held = (state.absmax, state.state2.absmax)
                total += sum(each.numel() * each.element_size() for each in held)
        sizes[name] = total / numbers
    assert sizes["bf16"] == 2
    assert sizes["nf4"] == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=0.01)


@pytest.mark.parametrize(("optim", "adapters", "each"), [
    ("adamw_torch", "float32", 8), ("adamw_8bit", "float32", 2), ("paged_adamw_8bit", "float32", 2),
    ("adamw_torch", "bfloat16", 12), ("paged_adamw_8bit", "bfloat16", 6),
])  # fmt: skip
def test_bytes_of_optimizer_states_per_trained_number(optim, adapters, each):
    """Moments of 4 bytes or 1 byte each, and 4 bytes of a master, as docs/memory.md says. 8 bit: 2 / 256 of scales."""
    dtype = getattr(torch, adapters)
    weight = torch.nn.Parameter(torch.zeros(1 << 16, dtype=dtype))
    optimizer = make_optimizer(TrainConfig(optim=optim, adapter_dtype=adapters), [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    kept = {id(value): value for value in values if torch.is_tensor(value)}
    kept |= {id(master): master for master in getattr(optimizer, "masters", [])}
    shared = [value for name, value in kept.items() if value.numel() == 256]  # the codes of 8 bits, one for all weights
    total = sum(value.numel() * value.element_size() for value in kept.values())
    total -= sum(value.numel() * value.element_size() for value in shared if value.dtype == torch.float32)
    assert total / weight.numel() == pytest.approx(each, rel=0.02)


def test_the_measured_table_has_every_option():
    base, other = (
        Row(name, "ours", seconds=(1.0 + n,), peak_bytes=0, held_bytes=1 << 20)
        for n, name in enumerate(("none", "--x 1"))
    )
    case = Case("memory-options", "", {"pairs": 4}, "bfloat16", rows=(base, other))
    text = render.memory_summary([case], "From here.")
    assert "| `--x 1` | 1.0 | 0.0 | 2.00x |" in text
    page = (records.ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert text in render.updated(page, {"memory-options": text})
    measured = page.split("<!-- benchmark:memory-options -->")[1].split("<!-- /benchmark -->")[0]
    for option in (*memory_options.OPTIONS, memory_options.ALL):
        assert (f"| {option} |" in measured.replace("`", "")) == (option not in memory_options.GPU_ONLY), option
