"""What ends a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onecard.errors import OnecardError
from onecard.models.roles import Roles


def end_tokens(roles: Roles, tokenizer: Any, stop: Sequence[str] = ()) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's EOS, those of the model's generation config (chat models), and
    those of the `stop` texts.
    """
    own = getattr(getattr(roles.causal_model(), "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
    return frozenset(ends.union(*(stop_ids(text, tokenizer) for text in stop)))


def stop_ids(text: str, tokenizer: Any) -> set[int]:
    """The ids of a text that is one token: as a word of its own, and as the vocabulary writes it.

    With SentencePiece these are two (`▁.` and `.`), and the second is the one that follows a word.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = {tokenizer.get_vocab()[text]} if text in tokenizer.get_vocab() else set()
    # Unknown characters become the unknown token, or nothing at all: then one id is left that is not the text.
    if len(ids) == 1 and tokenizer.decode(ids).strip() == text.strip():
        found.add(ids[0])
    if not found and len(ids) == 1:
        raise OnecardError(f"stop_token: {text!r} is not in the tokenizer's vocabulary.")
    if not found:
        pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise OnecardError(f"stop_token: {text!r} is {len(ids)} tokens ({pieces}), expected text that is one token.")
    return found
