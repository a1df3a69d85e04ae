"""`--dry_run`: what it shows, that it is a config file, and that nothing comes of it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import pytest
import yaml
from rich.console import Console

from onecard.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from onecard.data import Prompt
from onecard.data.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.training import dry_run, run_folder
from tests.e2e.ppo_material import error_line, tree

SMALL = ["--max_steps", 1, "--test_size", 0]


@pytest.fixture
def rows(tmp_path, pairs):
    """Two SFT rows beside the pairs."""
    row = {"prompt": "the cat", "completion": " sat\non it"}
    (tmp_path / "sft.jsonl").write_text(f"{json.dumps(row)}\n" * 6)
    return {"sft": tmp_path / "sft.jsonl", "dpo": pairs, "reward": pairs, "ppo": pairs}


@pytest.mark.parametrize("command", ["sft", "dpo", "reward", "ppo"])
def test_a_dry_run_prints_its_config_and_writes_nothing(onecard, tmp_path, tiny_model, rows, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    words = [command, "--model", tiny_model, "--dataset", rows[command], "--dry_run", "--lora_r", 3, *SMALL]
    words += ["--reward_funcs", "length"] if command == "ppo" else []
    first = onecard(*words)
    assert first.code == 0, first.err
    assert tree(tmp_path) == before
    kind = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig, "ppo": PPOConfig}[command]
    settings = kind(
        model=str(tiny_model), dataset=str(rows[command]), lora_r=3, max_steps=1, test_size=0.0,
        output_dir=f"runs/{command}", **({"reward_funcs": ["length"]} if command == "ppo" else {}),
    )  # fmt: skip
    assert yaml.safe_load(first.out) == asdict(settings)
    (tmp_path / "again.yaml").write_text(first.out)
    assert onecard(command, "--config", tmp_path / "again.yaml", "--dry_run").out == first.out
    assert onecard(command, "--config", tmp_path / "again.yaml", "--lora_r", 2, "--dry_run").out != first.out


def test_the_example_is_shown_with_special_tokens_and_mask(onecard, tmp_path, tiny_model, rows):
    """The response in [[ ]]; a line break in the text is written as \\n, so that the comment stays one."""
    out = onecard("sft", "--model", tiny_model, "--dataset", rows["sft"], "--dry_run", *SMALL).out
    assert out.splitlines()[-1] == r"# the cat[[ sat\non it</s>]]"
    tokenizer = load_tokenizer(SFTConfig(model=str(tiny_model)))
    prompt, response = (len(tokenizer.encode(text)) for text in ("the cat", " sat\non it</s>"))
    assert out.splitlines()[-2] == f"# example: {prompt + response} tokens, {response} of them the response"


def test_a_dry_run_is_shown_where_a_run_lies_and_leaves_it_alone(onecard, tmp_path, tiny_model, rows):
    words = ["sft", "--model", tiny_model, "--dataset", rows["sft"], "--output_dir", tmp_path / "run", *SMALL]
    (tmp_path / "run").mkdir()
    run_folder.write_info(tmp_path / "run", run_folder.RunInfo("a", "2026-11-30"))
    before = tree(tmp_path)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert onecard(*words, "--dry_run", *more).code == 0
        assert tree(tmp_path) == before
    assert "holds a run already" in error_line(onecard(*words))


def test_a_dry_run_is_no_setting_of_a_run():
    assert "dry_run" in run_folder.CHANGEABLE_SETTINGS


# --- parameters


def lines(config, **roles) -> dict[str, str]:
    found = dry_run.parameter_lines(load_roles(config, **roles))
    return dict(line.split(": ", 1) for line in found)


def test_parameters_of_each_role(tiny_model):
    """By hand: the tiny Llama has 97,600 parameters, and rank 4 adds 4 * (inputs + outputs) for each linear layer."""
    base = 2 * 300 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
    lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    config = DPOConfig(model=str(tiny_model), lora_r=4)
    expected = f"adapter of rank 4, {base + lora:,} parameters, {lora:,} trained"
    assert lines(config, trained="policy", reference=True) == {
        "policy": expected,
        "reference": f"base, {base:,} parameters, 0 trained",
    }
    packed = DPOConfig(model=str(tiny_model), lora_r=4, load_in_4bit=True)
    assert lines(packed, trained="policy")["policy"] == expected
    reward = lines(config, trained="reward", scalar=True)["reward"]
    assert reward == f"adapter of rank 4 and a scalar head, {base + lora + 65:,} parameters, {lora + 65:,} trained"
    whole = DPOConfig(model=str(tiny_model), use_peft=False)
    assert lines(whole, trained="policy", reference=True) == {
        "policy": f"base, {base:,} parameters, {base:,} trained",
        "reference": f"a frozen copy, {base:,} parameters, 0 trained",
    }


@pytest.mark.parametrize(("critic", "weights"), [("adapter", "adapter of rank 4"), ("shared", "the policy's weights")])
def test_parameters_of_ppos_roles(tiny_model, critic, weights):
    roles = load_ppo_roles(PPOConfig(model=str(tiny_model), lora_r=4, critic=critic))
    found = dict(line.split(": ", 1) for line in dry_run.parameter_lines(roles))
    assert found["value"].startswith(f"{weights} and a scalar head, ")
    numbers = {role: found[role].rpartition("parameters, ")[2] for role in ("policy", "value", "reference")}
    trained = {role: int(text.replace(",", "").removesuffix(" trained")) for role, text in numbers.items()}
    assert trained["value"] == trained["policy"] + 65  # the head's
    assert trained["reference"] == 0


# --- every kind of example


def sequence(tokenizer, prompt: str, response: str) -> TokenSequence:
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, response))
    return TokenSequence((*before, *after), (False,) * len(before) + (True,) * len(after))


def test_every_kind_of_example(tiny_model):
    tokenizer = load_tokenizer(SFTConfig(model=str(tiny_model)))
    good, bad = sequence(tokenizer, "ab", "cd</s>"), sequence(tokenizer, "ab", "e")
    kinds = {
        good: ["example", "ab[[cd</s>]]"],
        PreferencePair(good, bad): ["chosen", "ab[[cd</s>]]", "rejected", "ab[[e]]"],
        PreferencePair(good, bad, margin=0.5): ["chosen, margin 0.5", "ab[[cd</s>]]", "rejected", "ab[[e]]"],
        ScoredSequence(good, 0.25): ["score 0.25", "ab[[cd</s>]]"],
        Ranking((good, bad)): ["rank 1", "ab[[cd</s>]]", "rank 2", "ab[[e]]"],
        LabelledSequence(good, False, bad): ["undesirable", "ab[[cd</s>]]", "mismatched", "ab[[e]]"],
    }
    for example, expected in kinds.items():
        shown = [line.plain for line in dry_run.example_lines(example, tokenizer, colour=False)]
        assert [line.split(":")[0] if ": " in line else line for line in shown] == expected
    prompt = Prompt("ab", tuple(tokenizer.encode("ab")))
    assert [line.plain for line in dry_run.example_lines(prompt, tokenizer, colour=False)] == ["prompt: 2 tokens", "ab"]


def test_in_a_terminal_the_response_has_a_colour_and_no_brackets(tiny_model):
    tokenizer = load_tokenizer(SFTConfig(model=str(tiny_model)))
    text = dry_run.marked(sequence(tokenizer, "ab", "cd"), tokenizer, colour=True)
    assert text.plain == "abcd"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(0, 2, "dim"), (2, 4, "bold green")]
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    terminal.print(text)
    assert "\x1b[2mab\x1b[0m\x1b[1;32mcd\x1b[0m" in terminal.file.getvalue()


@pytest.mark.parametrize("colour", [False, True])
def test_the_space_that_opens_a_response_is_shown(stories260k, colour):
    """A sentencepiece tokenizer drops it where it decodes the response by itself."""
    tokenizer = load_tokenizer(SFTConfig(model=str(stories260k)))
    ids = tokenizer.encode("there was a little girl")
    start = len(tokenizer.encode("there was a"))
    sequence = TokenSequence(tuple(ids), (False,) * start + (True,) * (len(ids) - start))
    shown = dry_run.marked(sequence, tokenizer, colour=colour).plain
    assert shown == ("<s> there was a little girl" if colour else "<s> there was a[[ little girl]]")
