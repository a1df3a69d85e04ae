"""The commands on real models and real data: they learn, and what they write loads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def first_and_last(folder: Path, name: str) -> tuple[float, float]:
    values = [row[name] for row in metrics(folder) if name in row]
    return values[0], values[-1]


def test_sft_lowers_heldout_loss(onecard, tmp_path, stories260k, stories):
    result = onecard(
        "sft", "--model", stories260k, "--dataset", stories, "--output_dir", tmp_path / "run", "--max_length", 128,
        "--learning_rate", 2e-3, "--max_steps", 20, "--test_size", 30,
    )  # fmt: skip
    assert result.code == 0, result.err
    first, last = first_and_last(tmp_path / "run", "eval_loss")
    assert last < first - 0.02
    assert (tmp_path / "run" / "report.html").is_file()


def test_reward_learns_pairs_and_keeps_its_head(quick, onecard, tmp_path, tinystories, politeness):
    result = onecard(
        "reward", "--model", tinystories, "--dataset", politeness, "--output_dir", tmp_path / "run", "--max_steps", 40,
        "--learning_rate", 3e-3, "--per_device_train_batch_size", 16, "--test_size", 100,
    )  # fmt: skip
    assert result.code == 0, result.err
    first, last = first_and_last(tmp_path / "run", "eval_loss")
    assert last < first - 0.05
    assert (tmp_path / "run" / "reward" / "head.safetensors").is_file()


def test_dpo_raises_heldout_margin_and_peft_loads_it(quick, onecard, tmp_path, tinystories, politeness):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = onecard(
        "dpo", "--model", tinystories, "--dataset", politeness, "--output_dir", tmp_path / "run", "--max_steps", 25,
        "--learning_rate", 2e-3, "--test_size", 60, "--eval_samples", 0,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert first_and_last(tmp_path / "run", "eval_rewards/margins")[0] == 0.0
    assert first_and_last(tmp_path / "run", "eval_rewards/margins")[1] > 0.1
    assert first_and_last(tmp_path / "run", "eval_rewards/accuracies")[1] > 0.65

    policy = tmp_path / "run" / "policy"
    base = AutoModelForCausalLM.from_pretrained(tinystories)
    ids = AutoTokenizer.from_pretrained(policy)("Once upon a time", return_tensors="pt")["input_ids"]
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, str(policy))(input_ids=ids).logits
    assert (after - before).abs().max() > 0.05
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["model"] == str(tinystories)
    assert settings["max_steps"] == 25


def test_the_adapter_that_dpo_starts_from_is_its_reference(quick, onecard, tmp_path, tiny_model, pairs):
    """DPO on top of an SFT adapter: margin 0 at first, because the reference is that adapter and not the bare base."""
    small = ["--max_steps", 3, "--learning_rate", 1e-2, "--test_size", 4, "--eval_samples", 0]
    rows = tmp_path / "sft.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {i}", "completion": " cat"}) + "\n" for i in range(8)))
    assert onecard("sft", "--model", tiny_model, "--dataset", rows, "--output_dir", tmp_path / "sft", *small).code == 0
    policy = tmp_path / "sft" / "policy"
    result = onecard(
        "dpo", "--model", policy, "--dataset", pairs, "--output_dir", tmp_path / "dpo", "--lora_r", 64, *small
    )
    assert result.code == 0, result.err
    assert f"policy: an adapter of rank 16, continued from {policy}." in result.err
    first, last = first_and_last(tmp_path / "dpo", "eval_rewards/margins")
    assert first == 0.0
    assert last != 0.0
    assert not torch.equal(*(load(folder / "policy") for folder in (tmp_path / "sft", tmp_path / "dpo")))


def load(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    weights = load_file(str(folder / "adapter_model.safetensors"))
    return weights[sorted(weights)[0]]


def test_all_weights_are_written_as_a_plain_model(quick, onecard, tmp_path, tiny_model, pairs):
    from transformers import AutoModelForCausalLM

    small = ["--max_steps", 2, "--learning_rate", 1e-2, "--test_size", 4, "--no_use_peft", "--eval_samples", 0]
    result = onecard("dpo", "--model", tiny_model, "--dataset", pairs, "--output_dir", tmp_path / "run", *small)
    assert result.code == 0, result.err
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run" / "policy", tiny_model))
    assert model.config.hidden_size == before.config.hidden_size
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(changed)
