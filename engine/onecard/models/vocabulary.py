"""The token ids that a model has weights for. A tokenizer may have more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from onecard.models.trunk import trunk_of
from onecard.utils.errors import OnecardError

PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


def known_tokens(model: Any) -> int:
    """Number of token ids that a causal language model has both an embedding and a logit for."""
    layers = trunk_of(model).get_input_embeddings(), model.get_output_embeddings()
    return min(layer.weight.shape[0] for layer in layers if getattr(layer, "weight", None) is not None)


def placeholders(model: Any) -> dict[int, str]:
    """Token id -> "image", "video" or "audio", for the placeholder tokens in a model's config."""
    matches = {name: PLACEHOLDER.fullmatch(name) for name in vars(model.config)}
    return {getattr(model.config, name): match[1] for name, match in matches.items() if match}


def check_tokens(model: Any, tokenizer: Any, texts: Iterable[Sequence[int]]) -> None:
    """Raise if a token of `texts`, or EOS, has no embedding, or is a placeholder for an image, video or audio."""
    rows, special = known_tokens(model), placeholders(model)
    for tokens in (*texts, (tokenizer.eos_token_id,)):
        unknown = next((token for token in tokens if token >= rows), None)
        if unknown is not None:
            raise OnecardError(
                f"model: token {tokenizer.convert_ids_to_tokens(unknown)!r} has id {unknown}, but the model has "
                f"embeddings for {rows} tokens, ids 0 to {rows - 1}; enlarge them with resize_token_embeddings."
            )
        placeholder = next((token for token in tokens if token in special), None)
        if placeholder is not None:
            name = tokenizer.convert_ids_to_tokens(placeholder)
            raise OnecardError(
                f"model: token {name!r} in the data stands for {special[placeholder]} input; expected text alone."
            )
