"""Rewards from sequence classifiers of other kinds, against transformers' own forward of one text at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from onecard.config import PPOConfig
from onecard.data import Prompt, prompt_examples
from onecard.data.batches import Episode, TokenSequence
from onecard.models.build import load_ppo_roles, reward_adapter
from onecard.models.classifier import Classifier, is_classifier, label_index
from onecard.rewards.scorer import load_constraint, load_scorer
from onecard.utils.errors import OnecardError
from tests.engine.data_material import CHATML, PLAIN, built, rows, say

TEXTS = (
    "fine",
    "Hello there, how are you today? I am fine, thank you.",
    "user tool",
    "I am not. And you, are you fine?",
    "yes<s>",  # ends with id 0, which must not pass for padding
)
SIZES = {
    "vocab_size": 340,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}
HEADS = {"num_attention_heads": 2}
BERT_LIKE = SIZES | HEADS | {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
GPT2_LIKE = {"vocab_size": 340, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, "n_positions": 64}
# config, model, the form of a text, the settings that matter: encoders and decoders, with and without a padding id
KINDS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "bert": (BertConfig, BertForSequenceClassification, "<s> $A </s>", BERT_LIKE | {"max_position_embeddings": 64}),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, "<s> $A </s>",
                BERT_LIKE | {"max_position_embeddings": 66, "pad_token_id": 1}),
    "gpt2": (GPT2Config, GPT2ForSequenceClassification, "$A", GPT2_LIKE),
    "gpt2 pads with its last id": (GPT2Config, GPT2ForSequenceClassification, "$A", GPT2_LIKE | {"pad_token_id": 339}),
    "llama": (LlamaConfig, LlamaForSequenceClassification, "<s> $A", SIZES | HEADS | {"max_position_embeddings": 64}),
    "llama pads with eos": (LlamaConfig, LlamaForSequenceClassification, "<s> $A </s>",
                            SIZES | HEADS | {"max_position_embeddings": 64, "pad_token_id": 1}),
}  # fmt: skip


def classifier(
    folder: Path, kind: str, *, template: str | None = None, limit: int | None = None, **settings: Any
) -> Path:
    """A random classifier with its tokenizer; as BERT's, the tokenizer gives token types too."""
    make_config, make_model, form, sizes = KINDS[kind]
    torch.manual_seed(5)
    model = make_model(make_config(**sizes, **(settings if "id2label" in settings else {"num_labels": 1})))
    model.save_pretrained(folder)
    tokenizer = built(form, template=template)
    tokenizer.save_pretrained(folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    described |= {"model_input_names": names} if kind in ("bert", "llama") else {}
    described |= {"model_max_length": limit} if limit else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def config(folder: Path, **settings: Any) -> PPOConfig:
    return PPOConfig(reward_model_path=str(folder), per_device_eval_batch_size=3, **settings)


class Texts:
    """A policy's tokenizer: the answers are texts already."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(map(chr, ids))


def scores(scorer: Any, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    sequences = [TokenSequence((1, *map(ord, text)), (False, *(True,) * len(text))) for text in answers]
    episodes = [Episode(each, torch.zeros(len(each) - 1), False) for each in sequences]
    found: list[float] = scorer.scores(None, Texts(), prompts, episodes).parts["reward_model"].tolist()
    return found


@torch.no_grad()
def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """Of one text alone, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return found


def own(folder: Path, text: str, **keywords: Any) -> float:
    return logits(folder, AutoTokenizer.from_pretrained(folder)(text, **keywords)["input_ids"]).item()


PROMPTS = [Prompt("Hello ", (1,)), Prompt("", (1,)), Prompt("I am", (1,)), Prompt("And you: ", (1,)), Prompt("?", (1,))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_scores_as_each_text_alone(tmp_path, kind):
    """Prompt and answer as one text, by the classifier's own tokenizer; batches of 3 and 1, of different lengths."""
    folder = classifier(tmp_path, kind)
    got = scores(load_scorer(config(folder)), PROMPTS, TEXTS)
    expected = [own(folder, prompt.text + text) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    assert max(expected) - min(expected) > 0.05
    assert got == pytest.approx(expected, abs=1e-5)


class Strict:
    """As code that comes with a model may be: it takes these two and nothing else."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None: ...


def test_a_model_is_given_no_more_than_it_takes():
    texts = [{"input_ids": [5, 6], "token_type_ids": [0, 0], "attention_mask": [1, 1]},
             {"input_ids": [7], "token_type_ids": [0], "attention_mask": [1]}]  # fmt: skip
    inputs = Classifier(Strict(), SimpleNamespace(pad_token_type_id=0), 0, None, 9).batch(texts, 9)
    assert {name: value.tolist() for name, value in inputs.items()} == {
        "input_ids": [[5, 6], [7, 9]], "attention_mask": [[1, 1], [1, 0]],
    }  # fmt: skip


def test_the_classifier_is_frozen_and_draws_nothing(tmp_path):
    """With dropout of 0.5 in its config, it scores the same twice."""
    folder = classifier(tmp_path, "bert")
    scorer = load_scorer(config(folder))
    model = scorer.input_rewards["reward_model"].classifier.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert scores(scorer, PROMPTS, TEXTS) == scores(scorer, PROMPTS, TEXTS)


@pytest.mark.parametrize(("kind", "limit"), [("bert", None), ("roberta", None), ("gpt2", None), ("llama", 20)])
def test_a_long_text_loses_its_beginning_and_that_is_said_once(tmp_path, capfd, kind, limit):
    """64 positions (RoBERTa has two more, for its padding) or what the tokenizer says; special tokens stay."""
    folder = classifier(tmp_path, kind, limit=limit)
    room, form = limit or 64, KINDS[kind][2]
    scorer = load_scorer(config(folder))
    got = [scores(scorer, PROMPTS[:2], ["what? " * 30 + "fine", "short"]) for _ in range(2)]
    ids = AutoTokenizer.from_pretrained(folder)("Hello " + "what? " * 30 + "fine", add_special_tokens=False)[
        "input_ids"
    ]
    front, end = [0] * form.count("<s>"), [1] * form.count("</s>")
    kept = [*front, *ids[len(front) + len(end) - room :], *end]
    assert len(kept) == room < len(ids)
    assert got[0] == got[1] == pytest.approx([logits(folder, kept).item(), own(folder, "short")], abs=1e-5)
    said = capfd.readouterr().err
    assert said.count(f"reward_model_path: 1 of 2 texts are longer than the {room} tokens") == 1


def test_a_chat_is_written_by_the_classifier_s_own_template(tmp_path):
    """Not by the policy's, in which the prompt's text is; and no special tokens beside the template's."""
    folder = classifier(tmp_path, "llama", template=CHATML)
    messages = (say("system", "Be fine."), say("user", "Hello"))
    policy = built("$A", template=PLAIN)
    [chat] = prompt_examples(rows({"prompt": list(messages)}), policy).examples
    assert chat.messages == messages
    assert chat.text == "system: Be fine.\nuser: Hello\nassistant: "
    text = (
        "<|im_start|>system\nBe fine.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nI am fine<|im_end|>\n"
    )
    [got] = scores(load_scorer(config(folder)), [chat], ["I am fine"])
    assert got == pytest.approx(own(folder, text, add_special_tokens=False), abs=1e-5)
    assert abs(got - own(folder, text)) > 1e-3
    [plain] = prompt_examples(rows({"prompt": "Hello"}), policy).examples
    assert plain.messages is None
    assert scores(load_scorer(config(folder)), [plain], [" you"]) == pytest.approx([own(folder, "Hello you")], abs=1e-5)


def test_without_a_template_a_chat_is_the_policy_s_text(tmp_path):
    """If that text opens with the classifier's first special token, it is not doubled."""
    folder = classifier(tmp_path, "llama")
    chat = Prompt("<s>user: Hello\n", (1,), messages=(say("user", "Hello"),))
    expected = own(folder, "<s>user: Hello\nfine", add_special_tokens=False)
    assert scores(load_scorer(config(folder)), [chat], ["fine"]) == pytest.approx([expected], abs=1e-5)
    assert abs(expected - own(folder, "<s>user: Hello\nfine")) > 1e-3


def test_a_template_that_refuses_the_chat_is_named(tmp_path):
    folder = classifier(tmp_path, "llama", template="{{ raise_exception('two users') }}")
    with pytest.raises(OnecardError, match="reward_model_path: chat template: two users; prompt 'Hi'"):
        scores(load_scorer(config(folder)), [Prompt("Hi", (1,), messages=(say("user", "Hi"),))], ["fine"])


LABELS = {0: "bad", 1: "good", 2: "neither"}


@pytest.mark.parametrize("label", ["good", "1"])
def test_of_several_labels_the_reward_is_the_log_odds(tmp_path, label):
    """log p / (1 - p) of the softmax."""
    folder = classifier(tmp_path, "bert", id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
    [got] = scores(load_scorer(config(folder, reward_label=label)), PROMPTS[:1], ["fine"])
    ids = AutoTokenizer.from_pretrained(folder)("Hello fine")["input_ids"]
    p = logits(folder, ids).double().softmax(-1)[1]
    assert got == pytest.approx((p.log() - (1 - p).log()).item(), abs=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_label_with_a_sigmoid_of_its_own_is_its_logit(tmp_path, problem):
    folder = classifier(tmp_path, "bert", id2label=LABELS, problem_type=problem)
    [got] = scores(load_scorer(config(folder, reward_label="good")), PROMPTS[:1], ["fine"])
    ids = AutoTokenizer.from_pretrained(folder)("Hello fine")["input_ids"]
    assert got == pytest.approx(logits(folder, ids)[1].item(), abs=1e-5)


def test_a_label_s_name_goes_before_its_number():
    """Stars: the label called 1 is number 0."""
    assert [label_index(name, "reward_label", {0: "1", 1: "2", 2: "3"}) for name in ("1", "2", "3", "0")] == [
        0,
        1,
        2,
        0,
    ]


def test_a_label_that_is_missing_or_none_lists_those_there_are(tmp_path):
    folder = classifier(tmp_path, "bert", id2label=LABELS)
    listed = "expected one of 0 (bad), 1 (good), 2 (neither)."
    for label, what in (
        ("", f"missing, and the classifier has several labels; {listed}"),
        ("god", f"'god' is no label of the classifier; {listed} Did you mean 'good'?"),
        ("3", f"'3' is no label of the classifier; {listed}"),
    ):
        with pytest.raises(OnecardError) as caught:
            load_scorer(config(folder, reward_label=label))
        assert str(caught.value) == f"reward_label: {what}"
        with pytest.raises(OnecardError) as caught:
            load_constraint(PPOConfig(constraint_model_path=str(folder), constraint_label=label))
        assert str(caught.value) == f"constraint_label: {what}"
    assert load_constraint(PPOConfig(constraint_model_path=str(folder), constraint_label="bad")) is not None


def test_what_is_a_classifier_and_what_is_not(tmp_path, tiny_model):
    folder = classifier(tmp_path / "bert", "bert")
    assert is_classifier(str(folder), "reward_model_path")
    assert not is_classifier(str(tiny_model), "reward_model_path")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert not is_classifier(str(adapter), "reward_model_path")
    for name, what in (
        (str(tmp_path / "nowhere"), "constraint_model_path: no folder"),
        (str(tmp_path), "constraint_model_path: folder .* has neither config.json nor adapter_config.json"),
        ("", None),
    ):
        if what is not None:
            with pytest.raises(OnecardError, match=what):
                is_classifier(name, "constraint_model_path")
    settings = config(tiny_model, model=str(tiny_model))
    with pytest.raises(
        OnecardError, match=r"reward_model_path: .* is no reward adapter of onecard: .* or a sequence cla"
    ):
        reward_adapter(settings)
    with pytest.raises(OnecardError, match=r"reward_label: 'x' is a classifier's label, but .* is not a classifier"):
        load_scorer(config(tiny_model, reward_label="x"))


def test_weights_that_are_not_there_are_not_drawn(tmp_path, tiny_model):
    """A language model's folder whose config says that it classifies: transformers would only warn."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    described = json.loads((tmp_path / "config.json").read_text())
    described |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(OnecardError, match=r"reward_model_path: '.*' has no weights for score.weight"):
        load_scorer(config(tmp_path))


def test_out_of_memory_is_no_classifier_that_cannot_be_loaded(tmp_path, monkeypatch):
    def from_pretrained(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    folder = classifier(tmp_path, "bert")
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", from_pretrained)
    with pytest.raises(torch.OutOfMemoryError):
        load_scorer(config(folder))


def test_a_text_of_no_tokens_is_named(tmp_path):
    folder = classifier(tmp_path, "gpt2")
    with pytest.raises(OnecardError, match="reward_model_path: the classifier's tokenizer returned no tokens for ''"):
        scores(load_scorer(config(folder)), [Prompt("", (1,))], [""])


def test_beside_a_classifier_ppo_has_no_reward_role(tmp_path, tiny_model):
    folder = classifier(tmp_path, "bert")
    roles = load_ppo_roles(config(folder, model=str(tiny_model)))
    assert set(roles.adapters) == {"policy", "reference", "value"}
    assert not roles.heads["value"].weight.any()
