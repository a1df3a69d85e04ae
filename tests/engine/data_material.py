"""Tokenizers of several kinds, and short ways to write rows down, for the tests of the data."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onecard.data import Row, load_rows, preference_examples, sft_examples
from onecard.data.batches import TokenSequence

REAL = Path(__file__).parents[2].parent / "shared" / "data"
SENTENCES = ["Hello there, how are you today?", "user assistant system tool", "I am fine, thank you.\n\nAnd you?"] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (  # no special token at all, and a border inside a word: "Bot:" + " hi"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def real(name: str) -> Any:
    path = REAL / "models" / name
    if not path.exists():
        pytest.skip(f"no tokenizer at {path}")
    return AutoTokenizer.from_pretrained(path)


def real_rows(name: str) -> list[Row]:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    return load_rows(str(path), split="train")


@cache
def built(form: str = "$A", eos: str = "</s>", template: str | None = None) -> Any:
    """Byte-level BPE; `form` is what the tokenizer makes of a text, such as `<s> $A </s>`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    if form != "$A":
        core.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[(token, core.token_to_id(token)) for token in special]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, name_or_path="built")
    wrapped.chat_template = template
    return wrapped


def all_tokenizers() -> Iterator[Any]:
    for name in ("TinyStories-656K", "stories260K"):
        yield pytest.param(lambda name=name: real(name), id=name)
    for form, eos in (
        ("$A", "</s>"),
        ("<s> $A", "</s>"),
        ("<s> $A </s>", "</s>"),
        ("$A </s>", "</s>"),
        ("<s> $A", "<s>"),
        ("<s> $A <s>", "<s>"),
    ):
        yield pytest.param(lambda form=form, eos=eos: built(form, eos), id=f"{form} eos={eos}")


every_tokenizer = pytest.mark.parametrize("make", list(all_tokenizers()))


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row("x.jsonl", number, record) for number, record in enumerate(records, start=1)]


def sft(records: Sequence[dict[str, Any]], tokenizer: Any, **settings: Any) -> Any:
    defaults = {
        "max_length": 64,
        "completion_only_loss": True,
        "assistant_only_loss": True,
        "skip_bad_rows": False,
    }
    return sft_examples(rows(*records), tokenizer, **{**defaults, **settings})


def pairs(records: Sequence[dict[str, Any]], tokenizer: Any, max_length: int = 64, skip_bad_rows: bool = False) -> Any:
    return preference_examples(rows(*records), tokenizer, max_length=max_length, skip_bad_rows=skip_bad_rows)


def answer(prompt: Any, completion: Any, tokenizer: Any) -> TokenSequence:
    [sequence] = sft([{"prompt": prompt, "completion": completion}], tokenizer, max_length=1000).examples
    return sequence


def split(sequence: TokenSequence) -> tuple[list[int], list[int]]:
    """Prompt and response ids; the mask must be off before the border and on behind it."""
    border = sequence.response_mask.index(True)
    assert sequence.response_mask == (False,) * border + (True,) * (len(sequence) - border)
    return list(sequence.tokens[:border]), list(sequence.tokens[border:])


def spelled(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, BOT = say("user", "Hello"), say("assistant", "fine")
