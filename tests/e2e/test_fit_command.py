"""`onecard fit` as a person runs it: answers, and one clear line where there is none."""

from __future__ import annotations

import json

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("quick")

SMALL = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A `config.json` without weights."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def test_a_plan_from_a_config_alone(onecard, small):
    done = onecard("fit", "--model", small, "--algorithm", "sft", "--max_length", 64)
    assert done.code == 0
    assert "sft: 32 + 32 tokens" in done.out
    for word in ("load", "train", "optimizer step", "context", "fragmentation"):
        assert word in done.out


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_json_has_every_phase_and_what_it_is_made_of(onecard, small, algorithm):
    length = ["--response_length", 16]
    done = onecard("fit", "--model", small, "--algorithm", algorithm, "--prompt_length", 16, *length, "--json")
    answer = json.loads(done.out)
    assert (answer["prompt_length"], answer["response_length"]) == (16, 16)
    phases = answer["phases"]
    passes = ["rollout", "policy pass", "reference pass", "value pass"] if algorithm == "ppo" else []
    assert list(phases) == ["load", *passes, "train", "optimizer step"]
    assert answer["peak_gib"] == max(phase["peak_gib"] for phase in phases.values())
    assert {"weights", "adapters and heads", "gradients", "optimizer states"} <= set(phases["optimizer step"])
    assert "card" not in answer


def test_a_card_that_holds_it(onecard, small):
    done = onecard("fit", "--model", small, "--algorithm", "dpo", "--card", "RTX 3060", "--json")
    answer = json.loads(done.out)
    assert answer["fits"] is True
    assert answer["needed_gib"] == pytest.approx(
        answer["peak_gib"] + answer["context_gib"] + answer["fragmentation_gib"], abs=2e-4
    )
    assert answer["micro_batch_tokens"] == 8 * (512 + 256)  # all pairs of a step; max_length is the model's


def test_a_card_that_holds_it_with_other_settings(onecard, small):
    large = ("--per_device_train_batch_size", 512, "--max_length", 512)
    free = json.loads(onecard("fit", "--model", small, "--algorithm", "sft", *large, "--json").out)
    card = f"{(free['peak_gib'] / 2 + 0.5) / 0.96:.2f}GiB"
    done = onecard("fit", "--model", small, "--algorithm", "sft", *large, "--card", card, "--json")
    answer = json.loads(done.out)
    assert done.code == 0
    assert answer["fits"] is False
    settings = answer["with"]["settings"]
    assert settings["gradient_checkpointing"] is True
    assert answer["with"]["needed_gib"] <= answer["usable_gib"] < answer["needed_gib"]
    # what is advised is a command that fits
    flags = [word for name, value in settings.items() for word in ([f"--{name}"] + ([] if value is True else [value]))]
    again = onecard("fit", "--model", small, "--algorithm", "sft", *large, *flags, "--card", card, "--json")
    assert json.loads(again.out)["fits"] is True


def test_a_runs_own_config_file(onecard, small, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(small), "algorithm": "ppo", "response_length": 24, "max_length": 64}))
    answer = json.loads(onecard("fit", "--config", path, "--json").out)
    assert (answer["algorithm"], answer["prompt_length"], answer["response_length"]) == ("ppo", 40, 24)


def test_a_shipped_shape_by_its_hub_name(onecard):
    small = ("--max_length", 32, "--per_device_train_batch_size", 1, "--json")
    done = onecard("fit", "--model", "Qwen/Qwen2.5-0.5B-Instruct", "--algorithm", "sft", "--load_in_4bit", *small)
    assert json.loads(done.out)["model"] == "Qwen2.5-0.5B"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--card", "0"], "card: 0, expected a size above 0"),
        (["--card", "RTX 9999"], "no card is called 'RTX 9999'"),
        (["--model", "nowhere.json"], "model: cannot read nowhere.json"),
        (["--model", "no/such/model"], "model: no file or folder no/such/model"),
        (["--model", "Llama-3.1-9B"], "Did you mean 'Llama-3.1-8B'?"),
        (["--algorithm", "pop"], "'pop' is not one of"),
        (["--algorithm", "sft", "--cliprange", "0.1"], "No such option"),
        (["--response_length", "512"], "leaves no room for a prompt"),
        (["--gamma", "2"], "gamma: 2, expected 0 to 1"),
        (["--no_use_peft"], "use_peft: PPO holds its roles as adapters"),
        (
            ["--algorithm", "dpo", "--no_use_peft", "--load_in_4bit"],
            "use_peft: a 4-bit base can only be trained with adapters",
        ),
        (
            ["--prompt_length", "500"],
            "prompt_length (500) and response_length (16) together exceed the 512 tokens of the model's context",
        ),
        (["--card", "0.3GB"], "card: 0.3 GiB does not have enough memory. The smallest need that was found is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(onecard, small, arguments, line):
    done = onecard("fit", "--model", small, "--max_length", 64, "--response_length", 16, *arguments)
    assert done.code == 2
    assert done.out == ""
    assert line in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not JSON"),
        ("[]", "has no model_type"),
        ('{"model_type": "llamma"}', "is not a valid transformers config"),
        (json.dumps({**SMALL, "num_attention_heads": 0}), "config"),
        (json.dumps({**SMALL, "hidden_size": "wide"}), "config"),
        (json.dumps({"model_type": "t5"}), "config"),
        # It copies the number of tokens of each expert to the CPU, which meta tensors do not have.
        (json.dumps({**SMALL, "model_type": "jetmoe"}), "model: config cannot be planned"),
    ],
)
def test_a_config_that_cannot_be_built_is_one_clear_line(onecard, tmp_path, content, line):
    path = tmp_path / "config.json"
    path.write_text(content)
    done = onecard("fit", "--model", path, "--algorithm", "sft", "--max_length", 32)
    assert done.code == 2
    assert line in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_a_loss_that_sorts_its_batch_has_no_budget_to_look_for(onecard, small):
    done = onecard("fit", "--model", small, "--algorithm", "dpo", "--loss_type", "aot", "--card", "24GB", "--json")
    assert json.loads(done.out)["micro_batch_tokens"] is None


def test_a_run_folders_config_is_planned_as_its_command(onecard, small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"command": "dpo"}))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"model": str(small), "beta": 0.2, "max_length": 64}))
    done = onecard("fit", "--config", tmp_path / "run" / "config.yaml", "--json")
    assert json.loads(done.out)["algorithm"] == "dpo", done.err


def test_too_little_memory_names_the_card_that_would_do(onecard):
    lean = ("--load_in_4bit", "--max_length", 32, "--per_device_train_batch_size", 1)
    done = onecard("fit", "--model", "Qwen2.5-7B", "--algorithm", "sft", *lean, "--card", "4GB")
    assert done.code == 2
    assert "the smallest card with that much: RTX 3060 (12 GiB)" in done.err.splitlines()[-1]
