"""The commands on real models and real data: they learn, and what they write loads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def first_and_last(folder: Path, name: str) -> tuple[float, float]:
    values = [row[name] for row in metrics(folder) if name in row]
    return values[0], values[-1]


@pytest.mark.slow
def test_sft_lowers_heldout_loss(onecard, tmp_path, stories260k, stories):
    result = onecard(
        "sft", "--model", stories260k, "--dataset", stories, "--output_dir", tmp_path / "run", "--max_length", 128,
        "--learning_rate", 2e-3, "--max_steps", 20, "--test_size", 30,
    )  # fmt: skip
    assert result.code == 0, result.err
    first, last = first_and_last(tmp_path / "run", "eval_loss")
    assert last < first - 0.02
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_reward_learns_pairs_and_keeps_its_head(onecard, tmp_path, tinystories, politeness):
    result = onecard(
        "reward", "--model", tinystories, "--dataset", politeness, "--output_dir", tmp_path / "run", "--max_steps", 40,
        "--learning_rate", 3e-3, "--per_device_train_batch_size", 16, "--test_size", 100,
    )  # fmt: skip
    assert result.code == 0, result.err
    first, last = first_and_last(tmp_path / "run", "eval_loss")
    assert last < first - 0.05
    assert (tmp_path / "run" / "reward" / "head.safetensors").is_file()


@pytest.mark.slow
def test_dpo_raises_heldout_margin_and_peft_loads_the_policy(onecard, tmp_path, tinystories, politeness):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = onecard(
        "dpo", "--model", tinystories, "--dataset", politeness, "--output_dir", tmp_path / "run", "--max_steps", 25,
        "--learning_rate", 2e-3, "--test_size", 60,
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


def test_a_run_goes_on_from_an_adapter_whose_frozen_copy_is_the_reference(onecard, tmp_path, tiny_model, pairs):
    """DPO on top of an SFT adapter: margin 0 at first, because the reference is that adapter and not the bare base."""
    small = ["--max_steps", 3, "--learning_rate", 1e-2, "--test_size", 4]
    rows = tmp_path / "sft.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {i}", "completion": " cat"}) + "\n" for i in range(8)))
    assert onecard("sft", "--model", tiny_model, "--dataset", rows, "--output_dir", tmp_path / "sft", *small).code == 0
    policy = tmp_path / "sft" / "policy"
    result = onecard(
        "dpo", "--model", policy, "--dataset", pairs, "--output_dir", tmp_path / "dpo", "--lora_r", 64, *small
    )
    assert result.code == 0, result.err
    assert f"policy: an adapter of rank 16, as it is in {policy}." in result.err
    first, last = first_and_last(tmp_path / "dpo", "eval_rewards/margins")
    assert first == 0.0
    assert last != 0.0
    assert not torch.equal(*(load(folder / "policy") for folder in (tmp_path / "sft", tmp_path / "dpo")))


def load(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    weights = load_file(str(folder / "adapter_model.safetensors"))
    return weights[sorted(weights)[0]]


def test_all_weights_are_written_as_a_plain_model(onecard, tmp_path, tiny_model, pairs):
    from transformers import AutoModelForCausalLM

    small = ["--max_steps", 2, "--learning_rate", 1e-2, "--test_size", 4, "--no_use_peft"]
    result = onecard("dpo", "--model", tiny_model, "--dataset", pairs, "--output_dir", tmp_path / "run", *small)
    assert result.code == 0, result.err
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run" / "policy", tiny_model))
    assert model.config.hidden_size == before.config.hidden_size
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(changed)


def test_generate_prints_and_writes(onecard, tmp_path, tiny_model):
    words = ["--max_new_tokens", 5, "--seed", 3]
    first = onecard("generate", "--model", tiny_model, "--prompt", "the cat", "--prompt", "a", *words)
    again = onecard("generate", "--model", tiny_model, "--prompt", "the cat", "--prompt", "a", *words)
    assert first.code == 0, first.err
    assert first.out == again.out
    assert len(first.out.splitlines()) >= 2
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a long prompt about a hen"}\n')
    result = onecard(
        "generate", "--model", tiny_model, "--dataset", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl",
        "--num_generations", 2, *words,
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat"] * 2 + ["a long prompt about a hen"] * 2
    assert result.out == ""


def test_temperature_0_takes_the_likeliest_token_and_batching_changes_nothing(tinystories):
    """Greedy responses of prompts of several lengths, together and alone, equal transformers' own."""
    from onecard.config import GenerateConfig
    from onecard.data import prompt_examples, prompt_rows
    from onecard.models.build import load_player
    from onecard.models.load import load_tokenizer
    from onecard.rollout import Sampling, generate

    config = GenerateConfig(model=str(tinystories))
    tokenizer, roles = load_tokenizer(config), load_player(config, role="policy")
    texts = ["Once upon a time", "Lily", "The big dog ran to the park and"]
    prompts = prompt_examples(prompt_rows(texts), tokenizer).examples
    greedy = Sampling(max_new_tokens=12, temperature=0.0)
    together = generate(roles, tokenizer, prompts, greedy, batch_size=3)
    assert together == generate(roles, tokenizer, prompts, greedy, batch_size=1)
    for prompt, text in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt.tokens])
        own = roles.causal_model().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert tokenizer.decode(own[0], skip_special_tokens=True) == prompt.text + text


def test_sampling_is_from_the_model_itself(tinystories):
    """The model's own generation config (here: top_k 1, a repetition penalty) is not used unless it is asked for."""
    from onecard.config import GenerateConfig
    from onecard.data import prompt_examples, prompt_rows
    from onecard.models.build import load_player
    from onecard.models.load import load_tokenizer
    from onecard.rollout import Sampling, generate

    config = GenerateConfig(model=str(tinystories))
    tokenizer, roles = load_tokenizer(config), load_player(config, role="policy")
    prompts = prompt_examples(prompt_rows(["Once upon a time"] * 8), tokenizer).examples

    def sampled() -> list[str]:
        torch.manual_seed(0)
        return generate(roles, tokenizer, prompts, Sampling(max_new_tokens=24), batch_size=8)

    plain = sampled()
    own = roles.causal_model().generation_config
    own.top_k, own.repetition_penalty, own.do_sample = 1, 5.0, True
    assert sampled() == plain
    assert len(set(plain)) > 1
    assert roles.causal_model().generation_config is own


BAD = {
    "unknown model folder": (["--model", "./nowhere"], "model: no folder ./nowhere"),
    "a folder that is no model": (["--model", "{tmp}"], "has neither config.json nor adapter_config.json"),
    "no model": (["--model", ""], "--model is missing"),
    "no dataset": (["--dataset", ""], "--dataset is missing"),
    "no such file": (["--dataset", "{tmp}/none.jsonl"], "none.jsonl"),
    "empty file": (["--dataset", "{tmp}/empty.jsonl"], "empty.jsonl"),
    "malformed row": (["--dataset", "{tmp}/torn.jsonl"], "torn.jsonl:2"),
    "missing column": (["--dataset", "{tmp}/columns.jsonl"], "rejected"),
    "prompt longer than max_length": (["--max_length", "8"], "pairs.jsonl:1"),
    "unknown loss": (["--loss_type", "sigmoidal"], "loss_type"),
    "loss weights of another count": (["--loss_weights", "1", "--loss_weights", "2"], "loss_weights"),
    "beta 0": (["--beta", "0"], "beta"),
    "4-bit and all weights": (["--load_in_4bit", "--no_use_peft"], "use_peft"),
    "no such layer": (["--lora_target_modules", "flux"], "lora_target_modules"),
    "an output_dir that is a file": (["--output_dir", "{tmp}/pairs.jsonl"], "output_dir"),
    "no row left to train on": (["--test_size", "40"], "test_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(onecard, tmp_path, tiny_model, pairs, case):
    changes, expected = BAD[case]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", \n')
    (tmp_path / "columns.jsonl").write_text('{"prompt": "a", "chosen": "b", "reject": "c"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    flags = {"--model": str(tiny_model), "--dataset": str(pairs), "--output_dir": str(tmp_path / "run")}
    changes = [word.replace("{tmp}", str(tmp_path)) for word in changes]
    more = [word for flag, value in flags.items() if flag not in changes for word in (flag, value)]
    result = onecard("dpo", *more, *changes, "--max_steps", 1)
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if line.startswith("onecard: error:")]
    assert len(lines) == 1
    assert result.err.splitlines()[-1] == lines[0]
    assert expected in lines[0], lines[0]
    assert "Traceback" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
