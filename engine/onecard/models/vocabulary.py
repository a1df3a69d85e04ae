"""The tokens that a model knows: a tokenizer may have more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from onecard.models.trunk import trunk_of
from onecard.utils.errors import OnecardError

PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


def known_tokens(model: Any) -> int:
    """How many tokens a causal language model has both an embedding and a logit for."""
    layers = trunk_of(model).get_input_embeddings(), model.get_output_embeddings()
    return min(layer.weight.shape[0] for layer in layers if getattr(layer, "weight", None) is not None)


def placeholders(model: Any) -> dict[int, str]:
    """Tokens that stand for an image, a video or a sound, by the names in a model's config."""
    named = {name: PLACEHOLDER.fullmatch(name) for name in vars(model.config)}
    return {getattr(model.config, name): match[1] for name, match in named.items() if match}


def check_tokens(model: Any, tokenizer: Any, texts: Iterable[Sequence[int]]) -> None:
    """Stop where the tokens of a text, or the one that ends answers, are none that the model knows as text."""
    rows, others = known_tokens(model), placeholders(model)
    for tokens in (*texts, (tokenizer.eos_token_id,)):
        beyond = next((token for token in tokens if token >= rows), None)
        if beyond is not None:
            raise OnecardError(
                f"model: token {tokenizer.convert_ids_to_tokens(beyond)!r} has id {beyond}, but the model knows "
                f"{rows} tokens, ids 0 to {rows - 1}: its tokenizer has more (resize_token_embeddings makes room)."
            )
        other = next((token for token in tokens if token in others), None)
        if other is not None:
            name = tokenizer.convert_ids_to_tokens(other)
            raise OnecardError(
                f"model: token {name!r} in the data stands for {others[other]} input; expected text alone."
            )
