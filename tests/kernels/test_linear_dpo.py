"""linear_dpo_loss and sequence_sums: padded, packed, and equal to the parts they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecard_kernels import dpo_loss, linear_dpo_loss, sequence_sums
from onecard_kernels.dpo.losses import LOSSES
from tests.kernels import oracle

B, T, D, V = 2, 6, 8, 131


def padded() -> dict[str, torch.Tensor]:
    """Two pairs, [2B, T]: two prompt tokens, then responses of 4, 1, 3 and 2 tokens."""
    lengths = torch.tensor([4, 1, 3, 2])
    position = torch.arange(T) - 2
    valid = (position >= 0) & (position < lengths.unsqueeze(1))
    ids = torch.where(valid, torch.arange(2 * B).unsqueeze(1), -1)
    return {
        "hidden": torch.randn(2 * B, T, D, dtype=torch.float64),
        "weight": torch.randn(V, D, dtype=torch.float64),
        "targets": torch.randint(V, (2 * B, T)).masked_fill(~valid, -100),
        "sequence_ids": ids,
        "ref_logps": -torch.rand(2 * B, dtype=torch.float64) * 20,
    }


def restated(hidden: torch.Tensor, weight: torch.Tensor, batch: dict[str, torch.Tensor], **kw: Any) -> torch.Tensor:
    """The same from the reference functions, one sequence at a time."""
    logps = oracle.linear_logprobs(hidden, weight, batch["targets"], mask=batch["sequence_ids"] >= 0).logprobs
    sums = torch.stack([logps[batch["sequence_ids"] == i].sum() for i in range(2 * B)])
    counts = torch.stack([(batch["sequence_ids"] == i).sum() for i in range(2 * B)])
    ref = batch["ref_logps"]
    lengths = {"chosen_lengths": counts[:B], "rejected_lengths": counts[B:]}
    return dpo_loss(sums[:B], sums[B:], ref[:B], ref[B:], **lengths, **kw).loss


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_padded_and_packed_equal_the_restatement(loss_type: str, train: bool) -> None:
    batch = padded()
    hidden = batch.pop("hidden").requires_grad_()
    weight = batch.pop("weight").requires_grad_(train)
    leaves = (hidden, weight) if train else (hidden,)
    kw: dict[str, Any] = {"loss_type": loss_type, "beta": 0.2, "label_smoothing": 0.1}
    truth = restated(hidden, weight, batch, **kw)
    true_grads = torch.autograd.grad(truth, leaves)

    order = torch.randperm(2 * B * T)  # packed in any order: ids say where a token belongs
    packed = {k: x.reshape(-1)[order] if k != "ref_logps" else x for k, x in batch.items()}
    for h, rest in ((hidden, batch), (hidden.reshape(-1, D)[order], packed)):
        got = linear_dpo_loss(h, weight, **rest, **kw)
        torch.testing.assert_close(got.loss, truth)
        assert set(got.metrics) == {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")}
        torch.testing.assert_close(torch.autograd.grad(got.loss, leaves), true_grads)


OPTIONS: list[dict[str, Any]] = [
    {"loss_type": "discopop", "discopop_tau": 0.5},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9},
    {"loss_type": ["sft", "hinge"], "loss_weights": [0.1, 2.0]},
    {"weights": torch.tensor([0.2, 0.7])},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_arrives(options: dict[str, Any]) -> None:
    batch = padded()
    got = linear_dpo_loss(**batch, **options)
    hidden, weight = batch.pop("hidden"), batch.pop("weight")
    torch.testing.assert_close(got.loss, restated(hidden, weight, batch, **options))
    assert not torch.allclose(got.loss, restated(hidden, weight, batch, loss_type=options.get("loss_type", "sigmoid")))


def test_micro_batches_of_pairs_add_up() -> None:
    batch = padded()
    hidden = batch.pop("hidden").requires_grad_()
    weight = batch.pop("weight")
    whole = linear_dpo_loss(hidden, weight, **batch)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        pick = torch.tensor([i, B + i])
        ids = torch.where(batch["sequence_ids"][pick] < 0, -1, torch.tensor([[0], [1]]))
        total = (
            total
            + linear_dpo_loss(
                hidden[pick], weight, batch["targets"][pick], ids, batch["ref_logps"][pick], normalizer=B
            ).loss
        )
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(total, hidden), torch.autograd.grad(whole.loss, hidden))


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "sft"])
def test_given_lengths_replace_the_counts(loss_type: str) -> None:
    batch = padded()
    ones = torch.ones(B)
    by_token = linear_dpo_loss(**batch, loss_type=loss_type).loss
    by_sum = linear_dpo_loss(**batch, loss_type=loss_type, chosen_lengths=ones, rejected_lengths=ones).loss
    assert not torch.allclose(by_token, by_sum)
    counts = {"chosen_lengths": torch.tensor([4, 1]), "rejected_lengths": torch.tensor([3, 2])}
    assert torch.equal(linear_dpo_loss(**batch, loss_type=loss_type, **counts).loss, by_token)


def test_sequence_sums() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, float("nan"), float("-inf")]], requires_grad=True)
    ids = torch.tensor([[2, 0, 2], [0, -1, -1]], dtype=torch.int32)
    sums = sequence_sums(values, ids, 4)
    assert torch.equal(sums, torch.tensor([10.0, 0.0, 5.0, 0.0]))
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert torch.equal(values.grad, torch.tensor([[3.0, 1.0, 3.0], [1.0, 0.0, 0.0]]))
    assert sequence_sums(values.detach().bfloat16(), ids, 4).dtype == torch.float32
    big = torch.randn(10_000)
    spread = torch.randint(-1, 7, (10_000,))
    assert torch.equal(sequence_sums(big, spread, 7), sequence_sums(big, spread, 7))
