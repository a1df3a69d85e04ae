"""The records and the one shift by one, on cases small enough to write down."""

from __future__ import annotations

import pytest
import torch

from onecard.data.batches import (
    MIN_SHARED_TOKENS,
    PreferencePair,
    TokenSequence,
    last_rows,
    pack,
    pack_pairs,
    predicted_tokens,
    shared_tokens,
    slice_sequences,
    to_device,
    unpack,
)
from onecard.models.layout import repeat_shared_prompts


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


def test_a_shared_prompt_is_the_worked_example_of_the_module():
    """Six rows, not eight; the second answer's first token is predicted by the prompt's last row."""
    batch = pack([sequence([7, 8], [9, 2]), sequence([7, 8], [5, 2])], {1: (0, 2)})
    assert batch.tokens.tolist() == [7, 8, 9, 2, 5, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert (batch.lengths, batch.num_tokens, batch.num_targets) == ((4, 2), 6, (2, 2))
    assert batch.shared.spans == ((0, 0), (0, 2))
    assert batch.shared.key_rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 5]
    assert batch.shared.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.targets.rows.tolist() == [1, 2, 1, 4]
    assert batch.targets.targets.tolist() == [9, 2, 5, 2]
    assert batch.targets.sequence_ids.tolist() == [0, 0, 1, 1]
    assert last_rows(batch).tolist() == [3, 5]


def test_laid_apart_again_it_is_the_record_of_whole_sequences():
    sequences = [sequence([1], [3]), sequence([7, 8], [9, 2]), sequence([7, 8], [5, 2]), sequence([7], [4])]
    shared, whole = pack(sequences, {2: (1, 2), 3: (1, 1)}), pack(sequences)
    again, places = repeat_shared_prompts(shared)
    for name in ("tokens", "positions", "cu_seqlens"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert again.lengths == whole.lengths
    assert torch.equal(whole.tokens[places], shared.tokens)
    assert torch.equal(whole.positions[places], shared.positions)


def test_a_record_that_shares_prompts_has_no_parts_of_its_own():
    batch = pack([sequence([7, 8], [9, 2]), sequence([7, 8], [5, 2])], {1: (0, 2)})
    for take in (lambda: slice_sequences(batch, 0, 1), lambda: unpack(batch)):
        with pytest.raises(ValueError, match="shared prompts"):
            take()


PROMPT = list(range(50, 50 + MIN_SHARED_TOKENS + 4))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (sequence(PROMPT, [1, 2]), sequence(PROMPT, [3]), len(PROMPT)),
        (sequence(PROMPT, [1, 2]), sequence(PROMPT, [1, 2]), len(PROMPT)),  # answers are never shared
        (sequence(PROMPT, []), sequence(PROMPT, []), len(PROMPT) - 1),  # one row at least is a sequence's own
        (sequence(PROMPT, [1]), sequence([*PROMPT[:-1], 9], [1]), len(PROMPT) - 1),
        (sequence(PROMPT, [1]), sequence([9, *PROMPT], [1]), 0),
        (sequence(PROMPT[:MIN_SHARED_TOKENS], [1]), sequence(PROMPT[:MIN_SHARED_TOKENS], [2]), MIN_SHARED_TOKENS),
        (sequence(PROMPT[: MIN_SHARED_TOKENS - 1], [1]), sequence(PROMPT[: MIN_SHARED_TOKENS - 1], [2]), 0),
        (sequence(PROMPT, [1]), sequence(PROMPT[:-2], [*PROMPT[-2:], 1]), len(PROMPT) - 2),  # an answer to one of them
        (sequence([], [1]), sequence([], [2]), 0),
    ],
)
def test_how_much_two_answers_share(first, second, expected):
    assert shared_tokens(first, second) == shared_tokens(second, first) == expected


def test_to_device_moves_every_tensor_and_keeps_the_rest():
    batch = to_device(pack_pairs([PreferencePair(sequence([1], [2]), sequence([1], [3]))]), torch.device("meta"))
    assert batch.margins.device.type == batch.sequences.tokens.device.type == "meta"
    assert batch.sequences.lengths == (2, 2)
    shared = to_device(pack([sequence([7, 8], [9]), sequence([7, 8], [5])], {1: (0, 2)}), torch.device("meta"))
    assert shared.shared.key_rows.is_meta
    assert shared.targets.rows.is_meta
