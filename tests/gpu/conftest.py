"""The order of the files; fp32 products in fp32 and the same draws in every test; a random model in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.card import CARD, LLAMA

# A run that is cut off has then seen what tells most: kernels, cheap ones first, and whole runs last.
ORDER = (
    "test_kernels", "test_tokens_on_a_card", "test_losses_on_a_card", "test_regressions_on_a_card",
    "test_roles_on_a_card", "test_attention_on_a_card", "test_offload_on_a_card", "test_rollout_on_a_card",
    "test_ppo_on_a_card", "test_fit_on_a_card",
)  # fmt: skip
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """This folder's tests by ORDER, a file that is not in it last; tests elsewhere stay before them, as they were."""
    place = {name: rank for rank, name in enumerate(ORDER)}
    items.sort(key=lambda item: place.get(item.path.stem, len(ORDER)) if item.path.parent == HERE else -1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not CARD:
        terminalreporter.write_line("tests/gpu ran dry: no GPU here, so small sizes on the CPU")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama in bf16; no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    return folder
