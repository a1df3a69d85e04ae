"""A dozen families of the matrix, one for each mechanism; `make test-long` has all of them.

`make test` has the numbers of each family, and the commands of four: a command adds to a family's numbers only the
batch layout and the decoding mode that the startup check chose, and the four have every one of these.
"""

from __future__ import annotations

import pytest

from tests.grid import grid
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


NUMBERS = ("log-probs", "bf16", "gradients", "scores", "greedy")
WITH_COMMANDS = ("llama", "gemma2", "mamba2", "openai-gpt")


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_are_those_of_plain_transformers(name: str) -> None:
    row = make_row(name, NUMBERS)
    assert row.how == FAMILIES[name]
    assert row.cells == dict.fromkeys(NUMBERS, "exact")


@pytest.mark.parametrize("name", grid(FAMILIES, WITH_COMMANDS))
def test_commands_have_the_numbers_of_plain_transformers(name: str) -> None:
    columns = [column for column in CHECKS if column not in NUMBERS]
    assert make_row(name, columns).cells == dict.fromkeys(columns, "exact")
