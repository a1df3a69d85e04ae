"""The text of an answer is text(prompt + answer) less text(prompt), wherever an answer is text."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onecard.algorithms.samples import HeldoutSampler
from onecard.config import SFTConfig
from onecard.data import Prompt, prompt_examples
from onecard.data.batches import Episode, TokenSequence
from onecard.data.tokens import continuation_text, decode
from onecard.rewards.scorer import make_answers
from onecard.rollout import Response
from tests.engine.data_material import built, real, rows, sft

NAMES = ["stories260K", "TinyStories-656K"]


def bytes_of(text: str, tokenizer: Any) -> list[int]:
    """A token for each byte of the text."""
    names = tokenizer.get_vocab()
    if "<0x41>" in names:
        return [names[f"<0x{byte:02X}>"] for byte in text.encode()]
    return [names[byte_letters()[byte]] for byte in text.encode()]


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


@pytest.mark.parametrize("name", NAMES)
def test_the_space_that_opens_an_answer_is_kept(name: str) -> None:
    tokenizer = real(name)
    word, token = next(
        (word, token) for word, token in tokenizer.get_vocab().items() if re.fullmatch("▁[a-z]{3,}", word)
    )
    prompt, ids, text = tokenizer("there was a")["input_ids"], [token], f" {word[1:]}"
    assert tokenizer.decode(ids, skip_special_tokens=True) == word[1:]
    assert continuation_text(prompt, ids, tokenizer) == text
    sequence = TokenSequence((*prompt, *ids), (False,) * len(prompt) + (True,) * len(ids))
    episode = Episode(sequence, torch.zeros(len(ids)), False)
    assert make_answers(tokenizer, [Prompt("there was a", tuple(prompt))], [episode]).completions == (text,)


def wordpiece() -> Any:
    names = ["[UNK]", "play", "##ing", "i", "do", "not", ".", "'", "##s"]
    core = Tokenizer(models.WordPiece({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


@pytest.mark.parametrize("make", [lambda: real(NAMES[0]), lambda: real(NAMES[1]), lambda: built("<s> $A"), wordpiece],
                         ids=[*NAMES, "bytes", "WordPiece"])  # fmt: skip
def test_prompt_and_answer_read_as_the_whole_at_any_border(make: Any) -> None:
    """Of random tokens, special ones and lone bytes among them. A prompt that is no whole text is left out."""
    tokenizer, rng, whole_prompts = make(), random.Random(1), 0
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(24)]
        for border in range(1, 24):
            before, whole = (decode(part, tokenizer, skip_special_tokens=True) for part in (ids[:border], ids))
            if whole.startswith(before):
                assert before + continuation_text(ids[:border], ids[border:], tokenizer) == whole
                whole_prompts += 1
    assert whole_prompts > 3000


@pytest.mark.parametrize("make", [lambda: real("stories260K"), lambda: built()], ids=["byte fallback", "bytes"])
def test_a_character_is_never_lost_or_doubled_at_the_border(make: Any) -> None:
    tokenizer = make()
    letter, parts = tokenizer("b", add_special_tokens=False)["input_ids"], bytes_of("字", tokenizer)
    # begun in the prompt, ended in the answer: the answer's
    assert continuation_text([*letter, *parts[:1]], [*parts[1:], *parts], tokenizer) == "字字"
    # a lone first byte behind a whole character: it makes both unreadable where bytes fall back, and is one mark
    assert continuation_text([*letter, *parts], parts[:1], tokenizer) == "\ufffd"
    assert continuation_text([*letter, *parts], parts, tokenizer) == "字"


@pytest.mark.parametrize("name", NAMES)
def test_generated_rows_are_learned_as_the_sampled_tokens(name: str, onecard, tmp_path) -> None:
    """`generate` writes prompt and completion; tokenized as training rows they are the greedy tokens again."""
    model = onecard_model(name)
    result = onecard(
        "generate", "--model", model, "--prompt", "Once upon a time, there was a", "--prompt", "Lily and Tom went to",
        "--max_new_tokens", 24, "--temperature", 0, "--output", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert result.code == 0, result.err
    tokenizer = real(name)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, sequence in zip(found, sft(found, tokenizer, max_length=99).examples, strict=True):
        [prompt] = prompt_examples(rows({"prompt": row["prompt"]}), tokenizer).examples
        assert sequence.tokens[: len(prompt.tokens)] == prompt.tokens
        assert greedy(model, prompt.tokens, 24) == sequence.tokens[len(prompt.tokens) : -1]


def onecard_model(name: str) -> str:
    return str(real(name).name_or_path)


def greedy(model: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([prompt])
    out = AutoModelForCausalLM.from_pretrained(model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return tuple(out[0, len(prompt) :].tolist())


def test_samples_of_a_prompt_that_ends_within_a_character() -> None:
    """A text without a prompt begins with its first tokens; what follows goes on from the half character."""
    tokenizer = built()
    parts = bytes_of("字", tokenizer)
    samples = HeldoutSampler(SFTConfig(), None, tokenizer, ())  # type: ignore[arg-type]
    prompt = (*bytes_of("ab", tokenizer), *parts[:2])
    row = samples.row(prompt, Response((parts[2], *bytes_of(" c", tokenizer)), torch.zeros(3), False))
    assert row == {"prompt": "ab", "completion": "字 c"}
