"""A reward adapter reads an answer at the token that its training answers end with, in training, PPO and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from onecard.commands import evaluate as evaluation
from onecard.config import EvaluateConfig, PPOConfig, RewardConfig
from onecard.data import Prompt, preference_examples, prompt_examples
from onecard.data.batches import Episode, pack
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.rewards.adapter import with_closing_token
from onecard.rewards.scorer import load_scorer
from onecard.rollout import Response, Rollout, find_stop_tokens, make_episode
from tests.engine.data_material import BOT, USER, rows, say, spelled
from tests.engine.template_material import FAMILIES, of_family

NAMES = ["Gemma", "Gemma, not listed", "Phi-3", "ChatML beside another EOS", "Llama 2"]


def answered(tokenizer: Any, *texts: str, finished: bool = True, stop: str = "", chat: bool = True) -> Episode:
    """The pieces of an answer, as tokens that were sampled behind the prompt `USER`."""
    [prompt] = prompt_examples(rows({"prompt": [USER] if chat else "Hello"}), tokenizer).examples
    tokens = tuple(token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"])
    return make_episode(prompt, Response(tokens, torch.zeros(len(tokens)), finished, stop))


def read(tokenizer: Any, episode: Episode, *, chat: bool = True) -> str:
    """The text that the adapter reads behind the prompt."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=list(tokenizer.generation_eos)))
    roles: Any = SimpleNamespace(causal_model=lambda: model)
    prompt = Prompt("", episode.prompt_tokens, messages=(USER,) if chat else None)
    sequence = with_closing_token(prompt, episode, tokenizer, find_stop_tokens(roles, tokenizer))
    start = len(episode.prompt_tokens)
    assert sequence.tokens[:start] == episode.prompt_tokens
    assert sequence.response_mask == (False,) * start + (True,) * (len(sequence) - start)
    return spelled(sequence.tokens[start:], tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_read_as_the_pair_was_that_trained_it(name: str) -> None:
    """However it ended: by the template's token, cut, by another end token, or by a stop string."""
    family, tokenizer = FAMILIES[name], of_family(name)
    said = f"{family.lead}fine{family.trail}"
    record = {"prompt": [USER], "chosen": [BOT], "rejected": [say("assistant", "how")]}
    [pair] = preference_examples(rows(record), tokenizer, max_length=900, skip_bad_rows=False).examples
    trained = spelled(pair.chosen.tokens[pair.chosen.response_mask.index(True) :], tokenizer)
    assert trained == said + family.end
    assert read(tokenizer, answered(tokenizer, said, family.end)) == trained
    assert read(tokenizer, answered(tokenizer, said, finished=False)) == trained
    assert read(tokenizer, answered(tokenizer, said, "</s>")) == trained
    assert read(tokenizer, answered(tokenizer, said, "\n\nUser:", stop="\n\nUser:")) == trained
    assert read(tokenizer, answered(tokenizer, said, "</s>", chat=False), chat=False) == f"{said}</s>"
    assert read(tokenizer, answered(tokenizer, said, family.end, chat=False), chat=False) == f"{said}</s>"
    assert read(tokenizer, answered(tokenizer, said, finished=False, chat=False), chat=False) == f"{said}</s>"


def test_another_token_that_the_template_ends_answers_with_stays() -> None:
    """As behind tool calls."""
    family = FAMILIES["ChatML beside another EOS"]
    tokenizer = of_family("ChatML beside another EOS")
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.special, "<|call|>"]})
    tokenizer.generation_eos = frozenset({tokenizer.convert_tokens_to_ids("<|call|>")})
    tokenizer.chat_template = family.template.replace("<|im_end|>", "{{ '<|call|>' if m.calls else '<|im_end|>' }}")
    assert read(tokenizer, answered(tokenizer, "fine", "<|call|>")) == "fine<|call|>"
    assert read(tokenizer, answered(tokenizer, "fine", "</s>")) == "fine<|im_end|>"


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model whose template ends turns with another token than EOS."""
    folder = tmp_path_factory.mktemp("gemma-like")
    tokenizer = of_family("Gemma")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=sorted(tokenizer.generation_eos),
    ))  # fmt: skip
    model.save_pretrained(folder)
    return folder


def test_training_ppo_and_evaluation_give_an_answer_one_score(gemma_like: Path, tmp_path: Path, monkeypatch) -> None:
    config = RewardConfig(model=str(gemma_like))
    trained, tokenizer = load_roles(config, trained="reward", scalar=True), load_tokenizer(config)
    assert tokenizer.generation_eos == of_family("Gemma").generation_eos
    with torch.no_grad():
        for parameter in trained.trained_parameters().values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    trained.export("reward", tmp_path / "reward", tokenizer)
    record = {"prompt": [USER], "chosen": [BOT], "rejected": [say("assistant", "how are you")]}
    [pair] = preference_examples(rows(record), tokenizer, max_length=99, skip_bad_rows=False).examples
    with torch.no_grad():
        expected = trained.scores(pack([pair.chosen, pair.rejected])).tolist()
    assert abs(expected[0] - expected[1]) > 1e-3

    endings = [("fine", "<end_of_turn>"), ("how are you",)]  # one that ended, one that was cut
    episodes = [answered(tokenizer, *texts, finished=len(texts) > 1) for texts in endings]
    settings = PPOConfig(model=str(gemma_like), reward_model_path=str(tmp_path / "reward"))
    [prompt] = prompt_examples(rows({"prompt": [USER]}), tokenizer).examples
    scores = load_scorer(settings).scores(load_ppo_roles(settings), tokenizer, [prompt] * 2, episodes)
    torch.testing.assert_close(scores.terminal, torch.tensor(expected), atol=1e-5, rtol=0)

    def sampled(*args: object, **settings: object) -> Rollout:
        return Rollout(tuple(Response(e.response, e.sampling_logprobs, e.finished) for e in episodes), 1.0)

    monkeypatch.setattr(evaluation, "sample_responses", sampled)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [USER]}) + "\n" + json.dumps({"prompt": [USER]}) + "\n")
    found = evaluation.evaluate(
        EvaluateConfig(
            model=str(gemma_like), dataset=str(tmp_path / "rows.jsonl"), reward_model_path=str(tmp_path / "reward"),
            response_length=12,
        )
    )  # fmt: skip
    assert [row["score"] for row in found.samples] == pytest.approx(expected, abs=1e-5)
    assert [row["completion"] for row in found.samples] == ["fine", "how are you"]
