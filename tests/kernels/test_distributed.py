"""Two processes: the documented recipe keeps ranks equal, and a sharded head is gathered with the right gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

import onecard_kernels as k
from tests.closeness import error
from tests.kernels import distributed_program as program

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch has no gloo here")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has left."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(program.work, (str(folder),), nprocs=program.RANKS)
    return [torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(program.RANKS)]


def test_the_recipe_of_the_page_averages_over_ranks(ranks: list[dict[str, Any]]) -> None:
    """Every rank has the gradients of one process with all tokens."""
    model, both = program.toy(), program.data()
    ids, mask = both["input_ids"].flatten(0, 1), both["mask"].flatten(0, 1)
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    logprobs = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    (-(logprobs * mask).sum() / mask.sum()).backward()
    truth = program.gradients(model)
    assert {*truth} == {"trunk.embed.weight", "trunk.layer.weight", "trunk.layer.bias", "lm_head.weight"}
    for rank in ranks:
        for name, expected in truth.items():
            assert expected.abs().max() > 1e-3
            assert error(rank["docs"][name], expected) < 1e-12, name


def test_around_the_wrapper_ranks_drift_apart(ranks: list[dict[str, Any]]) -> None:
    """What the page warns of is so: if torch should ever average there, the warning can go."""
    first, second = (rank["around"]["lm_head.weight"] for rank in ranks)
    assert error(first, second) > 1e-2


def test_a_sharded_head_is_gathered_as_its_error_says(ranks: list[dict[str, Any]]) -> None:
    """The gradient of the mean of both ranks' losses, which is what FSDP gives the rest of the model."""
    weight = program.toy().lm_head.weight
    losses = [
        -k.linear_logprobs(r["sharded"]["hidden"], weight, r["sharded"]["targets"]).logprobs.mean() for r in ranks
    ]
    (truth,) = torch.autograd.grad(sum(losses) / len(losses), weight)
    for rank in ranks:
        found = rank["sharded"]
        assert found["error"].startswith("weight is a DTensor, expected a plain tensor: pass weight.full_tensor(")
        assert error(found["named"], truth) < 1e-12
        assert error(found["alone"], truth) > 1e-3
        assert found["hidden_error"].startswith("hidden is a DTensor, expected a plain tensor: pass hidden.to_local()")
