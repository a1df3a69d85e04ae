"""The records and the one shift by one, on cases small enough to write down."""

from __future__ import annotations

import pytest
import torch

from onecard.batches import (
    PreferencePair,
    TokenSequence,
    last_rows,
    pack,
    pack_pairs,
    predicted_tokens,
    to_device,
)


def sequence(prompt: list[int], response: list[int]) -> TokenSequence:
    return TokenSequence((*prompt, *response), (False,) * len(prompt) + (True,) * len(response))


def test_pack_is_the_worked_example_of_the_module():
    batch = pack([sequence([7, 8], [9, 2]), sequence([7], [5, 2])])
    assert batch.tokens.tolist() == [7, 8, 9, 2, 7, 5, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.response_mask.tolist() == [False, False, True, True, False, True, True]
    assert batch.lengths == (4, 3)
    assert batch.num_tokens == 7


def test_each_response_token_is_paired_with_the_row_before_it():
    targets = pack([sequence([7, 8], [9, 2]), sequence([7], [5, 2])]).targets
    assert targets.rows.tolist() == [1, 2, 4, 5]
    assert targets.targets.tolist() == [9, 2, 5, 2]
    assert targets.sequence_ids.tolist() == [0, 0, 1, 1]


def test_no_row_predicts_across_the_border_of_two_sequences():
    """A sequence that opens with a response token: nothing before it may predict it, least of all its neighbour."""
    targets = pack([sequence([7], [2]), sequence([], [5, 6])]).targets
    assert targets.rows.tolist() == [0, 2]
    assert targets.targets.tolist() == [2, 6]
    assert targets.sequence_ids.tolist() == [0, 1]


def test_mask_with_holes():
    """Chat turns: only the marked tokens are predicted, each from the row right before it."""
    turns = TokenSequence((1, 2, 3, 4, 5), (False, True, False, False, True))
    targets = pack([turns]).targets
    assert targets.rows.tolist() == [0, 3]
    assert targets.targets.tolist() == [2, 5]


@pytest.mark.parametrize(
    "texts",
    [
        [sequence([1], [2])],
        [sequence([], [1, 2, 3]), sequence([4, 5], [])],
        [sequence([1, 2], [3]), sequence([], [4]), sequence([5], [6, 7])],
    ],
)
def test_the_count_of_a_step_is_the_number_of_rows(texts):
    assert sum(map(predicted_tokens, texts)) == pack(texts).targets.rows.numel()


def test_pairs_lie_chosen_first_rejected_after():
    first = PreferencePair(sequence([1], [10, 2]), sequence([1], [11, 2]), margin=0.5)
    second = PreferencePair(sequence([3], [12, 2]), sequence([3], [13]))
    batch = pack_pairs([first, second])
    assert batch.num_pairs == 2
    assert batch.sequences.tokens.tolist() == [1, 10, 2, 3, 12, 2, 1, 11, 2, 3, 13]
    assert batch.margins.tolist() == [0.5, 0.0]
    assert last_rows(batch.sequences).tolist() == [2, 5, 8, 10]


def test_to_device_moves_every_tensor_and_keeps_the_rest():
    batch = to_device(pack_pairs([PreferencePair(sequence([1], [2]), sequence([1], [3]))]), torch.device("meta"))
    assert batch.margins.device.type == batch.sequences.tokens.device.type == "meta"
    assert batch.sequences.lengths == (2, 2)
