"""Scores of a reward adapter on sampled tokens, and sums of several rewards."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from onecard.config import ModelConfig, RewardConfig
from onecard.data import Row, sft_examples
from onecard.data.batches import TokenSequence
from onecard.models.build import load_frozen_role, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rewards.adapter import score, score_sequences
from onecard.rewards.mixture import apply_missing_eos_penalty, combine, reward_weights
from onecard.utils.errors import OnecardError

PROMPTS = ("Once upon a time", "One day", "Lily went to the park and", "The cat")
RESPONSES = (" there was a dog.", " a big cat sat on the mat and smiled at all of them.", " ran.", " slept a long time")


@pytest.fixture(scope="module")
def scorer(tinystories, tmp_path_factory):
    """A reward adapter that is no copy of its base, and its tokenizer."""
    config = RewardConfig(model=str(tinystories))
    roles, tokenizer = load_roles(config, trained="reward", scalar=True), load_tokenizer(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in roles.trained_parameters().items():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("reward")
    roles.export("reward", folder, tokenizer)
    return load_frozen_role(ModelConfig(model=str(folder)), role="reward", head=True), tokenizer


def sequences_of(tokenizer) -> list[TokenSequence]:
    rows = [
        Row("here", place, {"prompt": prompt, "completion": response})
        for place, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]
    made = sft_examples(
        rows, tokenizer, max_length=64, completion_only_loss=True, assistant_only_loss=True, skip_bad_rows=False
    )
    return list(made.examples)


def extended(sequence: TokenSequence, *tokens: int) -> TokenSequence:
    return TokenSequence((*sequence.tokens, *tokens), (*sequence.response_mask, *(True for _ in tokens)))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_sampled_tokens_score_as_their_texts_in_order(scorer, batch_size):
    """Lengths go up and down, so an order by length that is not undone would show."""
    roles, tokenizer = scorer
    sequences = sequences_of(tokenizer)
    lengths = [len(sequence) for sequence in sequences]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    expected = score(roles, tokenizer, PROMPTS, RESPONSES, max_length=64, batch_size=1)
    assert max(expected) - min(expected) > 0.05
    assert score_sequences(roles, sequences, batch_size=batch_size) == pytest.approx(expected, abs=2e-6)


def test_the_score_is_read_at_the_last_token(scorer):
    """At the last and no other, whatever the mask says: tokens before it count only through attention."""
    roles, tokenizer = scorer
    first = sequences_of(tokenizer)[0]
    other = TokenSequence((*first.tokens[:-1], first.tokens[4]), first.response_mask)
    unmasked = TokenSequence(first.tokens, (False,) * len(first))
    values = score_sequences(roles, [first, other, extended(first, first.tokens[4]), unmasked], batch_size=4)
    assert len({round(value, 4) for value in values[:3]}) == 3
    assert values[3] == pytest.approx(values[0], abs=1e-6)
    ids = torch.tensor([first.tokens])  # the judge: transformers' own hidden states of this sequence alone
    states = roles.causal_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    by_hand = roles.heads["reward"](states[0]).squeeze(-1)
    assert values[0] == pytest.approx(by_hand[-1].item(), abs=1e-6)
    assert abs(by_hand[-1] - by_hand[-2]) > 1e-3


def test_like_lengths_share_a_pass(scorer, monkeypatch):
    """The longest first; 3 + 1 tokens of padding instead of the 8 + 3 in the given order."""
    roles, tokenizer = scorer
    base = sequences_of(tokenizer)[0].tokens[:1]
    sequences = [TokenSequence(base * length, (False,) * length) for length in (2, 10, 4, 7, 3)]
    seen = []
    scores = Roles.scores
    monkeypatch.setattr(Roles, "scores", lambda self, batch: (seen.append(batch.lengths), scores(self, batch))[1])
    score_sequences(roles, sequences, batch_size=2)
    assert seen == [(10, 7), (4, 3), (2,)]
    assert score_sequences(roles, [], batch_size=2) == []


def test_another_role_plays_the_reward_only_while_it_scores(tinystories, scorer):
    """In PPO the policy is active: the scores are those of the reward adapter, and the policy is active again after."""
    alone, tokenizer = scorer
    sequences = sequences_of(tokenizer)
    folder = alone.model.peft_config["reward"]
    roles = load_roles(RewardConfig(model=str(tinystories)), trained="policy")
    roles.model.add_adapter("reward", folder)
    roles.adapters["reward"] = "reward"
    weights = {name: value for name, value in alone.model.state_dict().items() if ".reward." in name}
    roles.model.load_state_dict(weights, strict=False)
    roles.heads["reward"] = alone.heads["reward"]
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(0.1)
    trained = set(roles.trained_parameters())
    got = score_sequences(roles, sequences, batch_size=2)
    assert got == pytest.approx(score_sequences(alone, sequences, batch_size=2), abs=1e-6)
    assert roles.current == "policy"
    assert set(roles.trained_parameters()) == trained
    roles.adapters["constraint"] = "reward"  # the same adapter under another head
    roles.heads["constraint"] = copy.deepcopy(alone.heads["reward"]).requires_grad_(False)
    roles.heads["constraint"].bias += 2.0
    costs = score_sequences(roles, sequences, batch_size=2, role="constraint")
    assert costs == pytest.approx([score + 2.0 for score in got], abs=1e-5)


def test_scoring_keeps_nothing_for_a_backward_pass(scorer, monkeypatch):
    roles, tokenizer = scorer
    seen = []
    scores = Roles.scores
    monkeypatch.setattr(
        Roles, "scores", lambda self, batch: (seen.append(torch.is_grad_enabled()), scores(self, batch))[1]
    )
    score_sequences(roles, sequences_of(tokenizer), batch_size=4)
    assert seen == [False]


def test_a_mixture_is_the_weighted_sum_and_keeps_its_parts():
    got = combine({"reward_model": [0.5, -1.0], "length": (3, 20)}, {"length": 0.1, "reward_model": 1.0})
    assert got.terminal.tolist() == pytest.approx([0.8, 1.0])
    assert list(got.parts) == ["reward_model", "length"]
    assert got.parts["reward_model"].tolist() == [0.5, -1.0]
    assert got.parts["length"].tolist() == [3.0, 20.0]
    assert {got.terminal.dtype, *(part.dtype for part in got.parts.values())} == {torch.float32}


def test_dense_parts_stay_at_tokens_and_nothing_counts_twice():
    """Two answers, of two tokens and one: 1 * a + 0.5 * b on whole answers, 0.1 * c + 2 * d on tokens."""
    parts = {"c": [[1.0, 2.0], [20.0]], "a": [0.5, -1.0], "d": [(0.0, 1.0), (0.25,)], "b": [4.0, 0.0]}
    got = combine(parts, {"a": 1.0, "b": 0.5, "c": 0.1, "d": 2.0})
    assert got.terminal.tolist() == [2.5, -1.0]
    assert [each.tolist() for each in got.dense] == [pytest.approx([0.1, 2.2]), pytest.approx([2.5])]
    assert got.sums.tolist() == pytest.approx([4.8, 1.5])
    assert {name: part.tolist() for name, part in got.parts.items()} == {
        "c": [3.0, 20.0], "a": [0.5, -1.0], "d": [1.0, 0.25], "b": [4.0, 0.0],
    }  # fmt: skip
    assert list(got.parts) == ["c", "a", "d", "b"]
    assert {x.dtype for x in (got.terminal, got.sums, *got.dense, *got.parts.values())} == {torch.float32}
    paid = replace(got, terminal=apply_missing_eos_penalty(got.terminal, [True, False], 1.0))
    assert paid.sums.tolist() == pytest.approx([4.8, 0.5])


def test_dense_parts_alone_and_none_at_all():
    alone = combine({"c": [[1.0, 2.0], [20.0]]}, {"c": -1.0})
    assert alone.terminal.tolist() == [0.0, 0.0]
    assert alone.sums.tolist() == [-3.0, -20.0]
    whole = combine({"a": [1.0]}, {"a": 2.0})
    assert whole.dense is None
    assert whole.sums.tolist() == [2.0]
    with pytest.raises(OnecardError, match="reward: the weighted sum is inf for response 2 of 2"):
        combine({"c": [[1.0], [3e38, 1.0]]}, {"c": 2.0})


def test_a_mixture_does_not_depend_on_the_order_of_its_parts():
    parts = {"a": [1e8], "b": [1.0], "c": [-1e8]}  # in fp32 the 1 would be lost in one order
    for names in ("abc", "acb", "cab"):
        assert combine({name: parts[name] for name in names}, dict.fromkeys("abc", 1.0)).terminal.tolist() == [1.0]


def test_a_mixture_of_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="must have the same names"):
        combine({"a": [1.0]}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        combine({}, {})
    with pytest.raises(ValueError, match=r"one score for each answer, got \{'a': 1, 'b': 2\}"):
        combine({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1.0, "b": 1.0})


def test_a_score_that_is_no_number_does_not_reach_the_advantages():
    """Whitening would spread one NaN of a reward model over the whole batch."""
    with pytest.raises(OnecardError, match="reward: model is nan for response 2 of 3; expected a finite number"):
        combine({"model": [0.0, math.nan, 0.0], "b": [0.0] * 3}, {"model": 0.0, "b": 1.0})
    with pytest.raises(OnecardError, match="reward: the weighted sum is inf for response 1 of 1"):
        combine({"a": [3e38]}, {"a": 2.0})


def test_weights_are_one_each_or_as_many_as_there_are_rewards():
    assert reward_weights(["reward_model", "length"], []) == {"reward_model": 1.0, "length": 1.0}
    assert reward_weights(["reward_model", "length"], [1.0, -0.1]) == {"reward_model": 1.0, "length": -0.1}
    with pytest.raises(OnecardError) as caught:
        reward_weights(["reward_model", "length"], [0.25])
    assert str(caught.value) == (
        "reward_weights: 1 given (0.25), expected 2: one for each of reward_model, length; "
        "or none, for a weight of 1 each."
    )
    with pytest.raises(OnecardError, match="reward_weights: 3 given"):
        reward_weights(["reward_model", "length"], [1.0, 2.0, 3.0])
    with pytest.raises(OnecardError, match="reward_weights: nan, expected finite numbers"):
        reward_weights(["reward_model", "length"], [1.0, math.nan])


def test_the_penalty_falls_on_responses_that_did_not_end():
    scores = torch.tensor([1.0, 2.0, -3.0])
    got = apply_missing_eos_penalty(scores, [True, False, False], 0.5)
    assert got.tolist() == [1.0, 1.5, -3.5]
    assert got.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.0, -3.0]
    assert apply_missing_eos_penalty(scores, (True,) * 3, 0.5).data_ptr() != scores.data_ptr()
    with pytest.raises(ValueError, match=r"scores: expected shape \(1,\) as finished has, got \(3,\)"):
        apply_missing_eos_penalty(scores, [True], 0.5)
