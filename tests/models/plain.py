"""The truth of the matrix: what a user of transformers and PEFT computes, one text a pass, in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.data.batches import TokenSequence
from onecard.models.roles import HEAD_WEIGHTS
from onecard.models.trunk import trunk_of
from tests.models.families import CONTEXT, VIDEO, auto_class

LENGTHS = (CONTEXT - 6, 11, 40, 23)
PROMPTS = (CONTEXT - 20, 30, 5)
NEW = 10  # tokens behind each prompt


def text(length: int, place: int) -> tuple[int, ...]:
    """Tokens that stand for text."""
    generator = torch.Generator().manual_seed(place)
    return tuple(torch.randint(3, VIDEO, (length,), generator=generator).tolist())


def scored(tokens: tuple[int, ...], prompt: int = 1) -> TokenSequence:
    return TokenSequence(tokens, (False,) * prompt + (True,) * (len(tokens) - prompt))


def texts() -> list[TokenSequence]:
    """Of several lengths; the last one goes on from the first one's beginning."""
    found = [text(length, place) for place, length in enumerate(LENGTHS)]
    return [*map(scored, found), scored(found[0][:16] + text(20, 9), 16)]


SHARED = {len(LENGTHS): (0, 16)}  # of `texts`, for `pack`


def plain(folder: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers and PEFT load it."""
    from peft import PeftModel
    from transformers import AutoConfig

    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype)
    return (PeftModel.from_pretrained(model, str(adapter), is_trainable=True) if adapter else model).eval()


def plain_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def plain_logprobs(model: Any, sequences: Sequence[TokenSequence]) -> Tensor:
    """Of each scored token."""
    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence.tokens)
        logprobs = plain_logits(model, sequence.tokens)[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        found.append(logprobs[torch.tensor(sequence.response_mask[1:])])
    return torch.cat(found)


def plain_hidden(model: Any, tokens: Sequence[int]) -> Tensor:
    """The text decoder's last hidden states, fp32 [n, D]."""
    trunk = trunk_of(model.get_base_model() if hasattr(model, "peft_config") else model)
    return trunk(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0].float()


def plain_scores(model: Any, folder: Path, sequences: Sequence[TokenSequence]) -> Tensor:
    """A reward model's scores: its scalar head on the last token's hidden state."""
    from safetensors.torch import load_file

    head = load_file(str(folder / HEAD_WEIGHTS))
    states = torch.stack([plain_hidden(model, sequence.tokens)[-1] for sequence in sequences])
    return (states @ head["weight"].T + head["bias"]).squeeze(1)


@torch.no_grad()
def plain_greedy(model: Any, prompt: Sequence[int], ends: Sequence[int] = ()) -> list[int]:
    """The likeliest token each time, by whole passes."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]
