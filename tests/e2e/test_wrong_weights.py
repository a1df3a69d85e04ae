"""Weights that are not what they seem: one line from every command that reads them, and nothing written."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from onecard.config import ModelConfig
from onecard.models.load import load_tokenizer
from tests.e2e.ppo_material import error_line, tree, write_rows
from tests.e2e.wrong_weights_material import ADAPTERS, BASES, on_base, write_adapters, write_bases
from tests.grid import grid

pytestmark = pytest.mark.usefixtures("quick")

SPEAKS = "--output_dir {out} --max_steps 1 --test_size 0 --dataset {data}/"
PPO = "ppo --reward_funcs length:8 --response_length 4 --batch_size 8 " + SPEAKS + "prompts.jsonl "
EVALUATE = "evaluate --max_prompts 1 --response_length 4 --output_dir {out} --dataset {data}/prompts.jsonl "
# every command that reads a model, where it reads one; {it} is the wrong one
MODELS = {
    "sft": "sft --model {it} " + SPEAKS + "texts.jsonl",
    "all weights": "sft --no_use_peft --model {it} " + SPEAKS + "texts.jsonl",
    "reward": "reward --model {it} " + SPEAKS + "pairs.jsonl",
    "dpo": "dpo --model {it} " + SPEAKS + "pairs.jsonl",
    "kto": "dpo --loss_type kto --model {it} " + SPEAKS + "labels.jsonl",
    "ppo": PPO + "--model {it}",
    "generate": "generate --prompt a --max_new_tokens 4 --output {out} --model {it}",
    "chat": "chat --max_new_tokens 4 --model {it}",
    "evaluate": EVALUATE + "--model {it}",
    "baseline": EVALUATE + "--model {model} --baseline {it}",
}
# and where an adapter is read beside a model's own
ADAPTED = {name: words for name, words in MODELS.items() if name != "all weights"} | {
    "merge": "merge --output_dir {out} --model {it}",
    "dpo's reference": MODELS["dpo"].replace("{it}", "{model} --ref_adapter {it}"),
    "ppo's reference": MODELS["ppo"].replace("{it}", "{model} --ref_adapter {it}"),
    "evaluate's reference": MODELS["evaluate"].replace("{it}", "{model} --ref_adapter {it}"),
}
SCORED = {
    "ppo's reward": MODELS["ppo"].replace("{it}", "{model} --reward_model_path {it}"),
    "ppo's constraint": MODELS["ppo"].replace("{it}", "{model} --constraint_model_path {it}"),
    "evaluate's reward": MODELS["evaluate"].replace("{it}", "{model} --reward_model_path {it}"),
}
SETTINGS = {
    "baseline": "baseline", "dpo's reference": "ref_adapter", "ppo's reference": "ref_adapter",
    "evaluate's reference": "ref_adapter", "ppo's reward": "reward_model_path",
    "ppo's constraint": "constraint_model_path", "evaluate's reward": "reward_model_path",
}  # fmt: skip
PAIR = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}
CHATS = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, material: Path) -> Path:
    """A folder with wrong bases, policies, reward models and data."""
    folder = tmp_path_factory.mktemp("wrong")
    write_bases(folder / "bases", tiny_model)
    write_adapters(folder / "adapters", material / "sft" / "policy")
    write_adapters(folder / "rewards", material / "rm" / "reward")
    on_base(material / "sft" / "policy", folder / "adapters" / "no head", folder / "bases" / "no head")
    data = folder / "data"
    data.mkdir()
    write_rows(data / "texts.jsonl", [{"text": f"the cat sat on {i}"} for i in range(4)])
    write_rows(data / "pairs.jsonl", [PAIR] * 4)
    write_rows(data / "labels.jsonl", [{"prompt": "a", "completion": f" {i}", "label": i % 2 == 0} for i in range(4)])
    write_rows(data / "prompts.jsonl", [{"prompt": f"the {i}"} for i in range(4)])
    return folder


@pytest.fixture
def refused(onecard, wrong, tiny_model, tmp_path, monkeypatch):
    """`refused(words, it)`: the one line of a command; nothing is there afterwards that was not there before."""

    def run(words: str, it: Path, lines: str = "hello\n") -> str:
        monkeypatch.chdir(tmp_path)  # a default such as runs/sft would be seen too
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        places = {"it": it, "out": tmp_path / "out", "data": wrong / "data", "model": tiny_model}
        before = tree(wrong)
        result = onecard(*(word.format(**places) for word in words.split(" ")))
        assert list(tmp_path.iterdir()) == []
        assert tree(wrong) == before
        assert not result.out
        return error_line(result)

    return run


def check(line: str, command: str, name: str, parts: list[str]) -> None:
    assert line.startswith(f"onecard: error: {SETTINGS.get(command, 'model')}: ")
    assert name in line
    for part in parts:
        assert part in line, line


def every_kind(commands: Iterable[str], kinds: Iterable[str], usual: Collection[str]) -> list[Any]:
    """Every command with every kind of wrong weights. `make test` has all kinds in generate and the usual in all."""
    return [
        pytest.param(command, kind, marks=() if command == "generate" or kind in usual else pytest.mark.grid)
        for command in commands
        for kind in kinds
    ]


@pytest.mark.parametrize(("command", "kind"), every_kind(MODELS, BASES, ["no head", "classifier"]))
def test_a_wrong_base_is_one_line_from_every_command(refused, wrong, command, kind):
    check(refused(MODELS[command], wrong / "bases" / kind), command, f"bases/{kind}'", BASES[kind][2])


@pytest.mark.parametrize("command", ["merge", "generate", "dpo"])
def test_the_base_of_an_adapter_is_looked_at(refused, wrong, command):
    check(refused(ADAPTED[command], wrong / "adapters" / "no head"), command, "bases/no head'", BASES["no head"][2])


@pytest.mark.parametrize(("command", "kind"), every_kind(ADAPTED | SCORED, ADAPTERS, ["half there", "other kind"]))
def test_a_wrong_adapter_is_one_line_from_every_command(refused, wrong, command, kind):
    it = wrong / ("rewards" if command in SCORED or command == "reward" else "adapters") / kind
    check(refused((ADAPTED | SCORED)[command], it), command, f"{it.parent.name}/{kind} ", ADAPTERS[kind][2])


@pytest.mark.parametrize("command", grid(ADAPTED, ["generate", "dpo's reference"]))
def test_adapters_that_name_themselves_or_each_other_as_base(refused, wrong, command):
    setting = SETTINGS.get(command, "model")
    itself, mutual = (refused(ADAPTED[command], wrong / "adapters" / name) for name in ("itself", "first"))
    assert f"{setting}: adapter {wrong}/adapters/itself names itself as its base." in itself
    assert f"{setting}: adapter {wrong}/adapters/first names {wrong}/adapters/second as its base, which is an" in mutual


@pytest.mark.parametrize("names", ["v_prj", "q_proj v_prj", "all-linear v_prj", "norm"])
@pytest.mark.parametrize("command", grid(["sft", "reward", "dpo", "kto", "ppo"], ["sft", "ppo"]))
def test_a_target_that_means_no_layer_is_one_line(refused, tiny_model, command, names):
    words = " ".join(f"--lora_target_modules {name}" for name in names.split())
    line = refused(f"{MODELS[command]} {words}", tiny_model)
    assert line.startswith("onecard: error: lora_target_modules: ")
    assert names.split()[-1] in line


@pytest.fixture(scope="module")
def dora_on_the_head(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter whose output on the head no single weight stands for; with a scalar head beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("dora") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(use_dora=True, target_modules=["q_proj", "lm_head"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", grid([name for name in ADAPTED if name != "reward"], ["merge", "dpo"]))
def test_a_variant_of_lora_on_the_head_is_one_line(refused, dora_on_the_head, command):
    line = refused(ADAPTED[command], dora_on_the_head)
    assert "on the head; expected plain LoRA there" in line


def with_tokens(folder: Path, right: Path, template: str | None = None, **special: Any) -> Path:
    """A model with special tokens in its tokenizer that it has no embeddings for: their ids begin at 300."""
    from transformers import AutoTokenizer

    shutil.copytree(right, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<filler {i}>" for i in range(300 - len(tokenizer))])
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a chat template whose tokens it does not know."""
    template = "{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}<turn>"
    folder = tmp_path_factory.mktemp("talkative") / "model"
    return with_tokens(folder, tiny_model, template, additional_special_tokens=["<turn>", "<end>"])


ASKED = {"prompt": CHATS[:1]}
TALKS = {
    "sft": {"messages": CHATS},
    "reward": {**ASKED, "chosen": CHATS[1:], "rejected": CHATS[1:]},
    "dpo": {**ASKED, "chosen": CHATS[1:], "rejected": CHATS[1:]},
    "kto": {**ASKED, "completion": CHATS[1:], "label": True},
    "ppo": ASKED,
    "evaluate": ASKED,
}


@pytest.mark.parametrize("command", TALKS)
def test_tokens_beyond_the_embeddings_are_one_line(refused, talkative, wrong, command):
    rows = wrong / "data" / "talks.jsonl"
    write_rows(rows, [{**TALKS[command], "label": i % 2 == 0} for i in range(4)])
    words = MODELS[command].replace("{data}/" + MODELS[command].split("{data}/")[1].split(" ")[0], str(rows))
    line = refused(words, talkative)
    assert "model: token '<turn>' has id 300, but the model has embeddings for 300 tokens, ids 0 to 299" in line
    rows.unlink()


def test_generate_names_a_token_beyond_the_embeddings(refused, talkative):
    assert "token '<turn>' has id 300" in refused(
        MODELS["generate"].replace("--prompt a", "--prompt <turn>"), talkative
    )


def test_chat_answers_such_a_token_with_a_line_and_goes_on(onecard, talkative, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello again\n"))
    result = onecard("chat", "--model", talkative, "--max_new_tokens", 4)
    assert result.code == 0
    assert result.err.count("model: token '<turn>' has id 300, but the model has embeddings for 300 tokens") == 2


@pytest.mark.parametrize("command", ["sft", "ppo", "generate", "chat", "evaluate"])
def test_an_end_token_beyond_the_embeddings_is_one_line(refused, tiny_model, tmp_path_factory, command):
    """No answer could end."""
    folder = with_tokens(tmp_path_factory.mktemp("endless") / "model", tiny_model, eos_token="<over>")
    assert "model: token '<over>' has id 300, but the model has embeddings for 300" in refused(MODELS[command], folder)


def test_padding_needs_no_embedding(onecard, tiny_model, tmp_path, pairs):
    folder = with_tokens(tmp_path / "padded", tiny_model, pad_token="<padding>")
    assert load_tokenizer(ModelConfig(model=str(folder))).pad_token_id == 300
    answers = []
    for model in (tiny_model, folder):
        result = onecard(
            "generate", "--model", model, "--prompt", "a", "--prompt", "the cat sat", "--max_new_tokens", 4
        )
        assert result.code == 0, result.err
        answers.append(re.sub(r"<filler \d+>", "", result.out))
    assert answers[0] == answers[1]
    result = onecard(
        "dpo", "--model", folder, "--dataset", pairs, "--eval_dataset", pairs, "--max_steps", 1, "--no_padding_free",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run" / "policy" / "tokenizer_config.json").read_text())["pad_token"] == "<padding>"
