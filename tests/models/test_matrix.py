"""A dozen families of the matrix, one for each mechanism; `make test-long` has all of them."""

from __future__ import annotations

import pytest

from tests.models.checks import CHECKS
from tests.models.matrix import make_row

# what each is here for; the way in which batches are laid and prompts sampled
FAMILIES = {
    "llama": "packed, slots",  # plain attention
    "gemma2": "packed, padded",  # windows, capped attention, capped logits
    "mistral": "packed, padded",  # windows alone
    "deepseek_v3": "packed, slots",  # values narrower than keys, experts
    "qwen3_moe": "packed, slots",  # fused experts
    "gpt_oss": "padded, padded",  # attention with sinks, which has its own implementation
    "falcon_h1": "padded, padded",  # Mamba and attention in one layer
    "mamba2": "padded, padded",  # no attention, a cache of another name
    "phi3, longrope": "packed, padded",  # rotations that change beyond the original context
    "opt, projected": "packed, slots",  # a head of another width than the layers
    "bloom": "padded, padded",  # no positions
    "openai-gpt": "padded, uncached",  # no cache
}


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_are_those_of_plain_transformers(name: str) -> None:
    row = make_row(name)
    assert row.how == FAMILIES[name]
    assert row.cells == dict.fromkeys(CHECKS, "exact")
