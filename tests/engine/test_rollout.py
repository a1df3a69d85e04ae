"""What is drawn, on pretrained models: random weights would hide wrong masks and positions."""

from __future__ import annotations

import pytest
import torch

from onecard.rollout import CachedBatch, Sampling, logits_warpers, sample_token
from onecard.rollout.token_sampling import BLOCK, NOT_FINITE, search_cumulative
from onecard.utils.errors import OnecardError
from tests.engine.rollout_material import (
    frequent_stop_tokens,
    greedy_by_transformers,
    load,
    next_logits,
    one_pass_logprobs,
    recorded_shapes,
)

# --- log-probs as drawn


@pytest.mark.parametrize(("model", "temperature"), [("stories656", 0.7), ("stories260", 1.0)])
@pytest.mark.parametrize("batch_size", [1, 3, 18])
def test_logprobs_as_drawn_are_those_of_the_finished_sequences(request, model, temperature, batch_size):
    """Rows leave while others go on, and a wrong mask, position or cache row would show in what is drawn after that."""
    policy = request.getfixturevalue(model)
    torch.manual_seed(1)
    prompts = policy.prompts * 3
    ends = frequent_stop_tokens(policy)
    with recorded_shapes(policy.model) as shapes:
        found = policy.sample(Sampling(40, temperature), prompts, stop_tokens=ends, batch_size=batch_size).responses
    assert len({len(response.tokens) for response in found}) > 5
    if batch_size == 18:
        sizes = [rows for rows, _ in shapes]
        assert len(set(sizes)) > 4  # rows left several times
    for prompt, response in zip(prompts, found, strict=True):
        assert response.logprobs.dtype == torch.float32
        assert response.logprobs.shape == (len(response.tokens),)
        own = one_pass_logprobs(policy, prompt, response, temperature)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)


def test_logprobs_at_temperature_0_are_of_undivided_logits(policy):
    for prompt, response in zip(policy.prompts, policy.sample(Sampling(20, 0.0)).responses, strict=True):
        own = one_pass_logprobs(policy, prompt, response, 1.0)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)


def test_logprobs_after_top_k_and_top_p_are_of_what_was_left(policy):
    """Of three tokens: the softmax over the three likeliest. Of top_p: the smallest set with that much probability."""
    prompt, temperature = policy.prompts[0], 0.8
    probabilities, tokens = (next_logits(policy, prompt) / temperature).softmax(-1).sort(descending=True)
    place = {token: index for index, token in enumerate(tokens.tolist())}
    enough = int((probabilities.cumsum(0) < 0.6).sum()) + 1
    assert enough > 2
    for sampling, left in ((Sampling(1, temperature, top_k=3), 3), (Sampling(1, temperature, top_p=0.6), enough)):
        torch.manual_seed(0)
        found = policy.sample(sampling, [prompt] * 400, batch_size=400).responses
        drawn = {place[response.tokens[0]] for response in found}
        assert drawn <= set(range(left))
        assert {0, 1, 2} <= drawn
        for response in found:
            expected = (probabilities[place[response.tokens[0]]] / probabilities[:left].sum()).log()
            torch.testing.assert_close(response.logprobs[0], expected, atol=1e-4, rtol=0)


# --- what is drawn


def test_the_drawn_distribution_is_the_models_own(policy):
    """Chi-square of 20,000 draws of one token against the model's softmax, at a temperature."""
    torch.manual_seed(5)
    count, prompt, temperature = 20_000, policy.prompts[0], 1.3
    expected = (next_logits(policy, prompt) / temperature).softmax(-1) * count
    found = policy.sample(Sampling(1, temperature), [prompt] * count, batch_size=5_000).responses
    drawn = torch.bincount(torch.tensor([response.tokens[0] for response in found]), minlength=len(expected))
    often = expected >= 10
    rest = torch.stack([drawn[~often].sum(), expected[~often].sum()])
    chi = ((drawn[often] - expected[often]) ** 2 / expected[often]).sum() + (rest[0] - rest[1]) ** 2 / rest[1]
    freedom = int(often.sum())
    assert freedom > 50
    assert chi < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_rows_of_one_batch_are_drawn_independently(policy):
    torch.manual_seed(0)
    found = policy.sample(Sampling(12), [policy.prompts[1]] * 32, batch_size=32).responses
    assert len({response.tokens for response in found}) > 25


def test_the_same_seed_draws_the_same(policy):
    def sampled(seed: int) -> list[tuple[int, ...]]:
        torch.manual_seed(seed)
        return [response.tokens for response in policy.sample(Sampling(24)).responses]

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)


def test_draws_come_from_the_global_generator_alone(policy):
    """A checkpoint keeps its state; sampling goes on from there as if nothing had been."""
    torch.manual_seed(9)
    policy.sample(Sampling(5))
    state = torch.get_rng_state()
    first = [response.tokens for response in policy.sample(Sampling(16)).responses]
    torch.set_rng_state(state)
    assert [response.tokens for response in policy.sample(Sampling(16)).responses] == first


@pytest.mark.parametrize("model", ["stories656", "stories260"])
def test_greedy_is_transformers_greedy_whatever_stands_beside_it(request, model):
    policy = request.getfixturevalue(model)
    together = policy.sample(Sampling(40, 0.0)).responses
    for prompt, response in zip(policy.prompts, together, strict=True):
        assert response.tokens == greedy_by_transformers(policy, prompt, 40)
        assert policy.sample(Sampling(40, 0.0), [prompt]).responses[0].tokens == response.tokens


def test_top_k_1_is_greedy_and_greedy_draws_nothing(policy):
    state = torch.get_rng_state()
    filtered = policy.sample(Sampling(24, 0.0, top_p=0.5, top_k=3)).responses
    for response, plain in zip(filtered, policy.sample(Sampling(24, 0.0)).responses, strict=True):
        assert torch.equal(response.logprobs, plain.logprobs)  # of all tokens: nothing is left out at temperature 0
    greedy = [response.tokens for response in filtered]
    assert torch.equal(torch.get_rng_state(), state)
    only = policy.sample(Sampling(24, 1.0, top_k=1)).responses
    assert [response.tokens for response in only] == greedy
    assert all(response.logprobs.abs().max() == 0 for response in only)  # nothing else was left


def test_the_models_own_generation_config_is_ignored(stories260k):
    policy = load(stories260k)

    def sampled() -> list[tuple[int, ...]]:
        torch.manual_seed(0)
        return [response.tokens for response in policy.sample(Sampling(24)).responses]

    plain = sampled()
    own = policy.model.generation_config
    own.top_k, own.top_p, own.repetition_penalty, own.temperature, own.do_sample = 1, 0.1, 5.0, 0.1, True
    own.max_new_tokens, own.min_new_tokens, own.suppress_tokens, own.num_beams = 3, 2, [10, 11, 12], 4
    assert sampled() == plain
    assert policy.model.generation_config is own


# --- sample_token


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.0), Sampling(1, top_k=2), Sampling(1, top_p=0.5)])
def test_a_row_of_logits_that_are_not_finite_gets_no_token(bad, sampling):
    logits = torch.zeros(3, 5)
    logits[1, 3] = bad
    tokens, _ = sample_token(logits, sampling, logits_warpers(sampling))
    assert tokens[1] == NOT_FINITE
    assert (tokens[::2] >= 0).all()


def test_logits_that_are_not_finite_are_one_line(policy, monkeypatch):
    """From the third pass on, in one row of several: nothing goes on with what they gave."""
    whole, calls = CachedBatch.logits, []

    def broken(self: CachedBatch) -> torch.Tensor:
        calls.append(whole(self))
        calls[-1][-1, 2] = float("nan") if len(calls) == 2 else 0.0
        return calls[-1]

    monkeypatch.setattr(CachedBatch, "logits", broken)
    with pytest.raises(OnecardError, match="logits are not finite"):
        policy.sample(Sampling(8), stop_tokens=())
    assert len(calls) == 2


def test_the_token_is_the_first_beyond_the_chance():
    """Blocks of words against one float64 sum over all of them, at sizes around those of a block."""
    torch.manual_seed(0)
    for words in (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 50257):
        probs = (torch.randn(64, words) * 4).softmax(-1)
        probs[:, ::3] *= torch.rand(64, 1) > 0.5  # runs of words that cannot come, sums that are not 1
        uniforms = torch.rand(64)
        sums = probs.double().cumsum(-1)
        expected = torch.searchsorted(sums, uniforms.double().unsqueeze(1) * sums[:, -1:], right=True)
        possible = (sums[:, -1] > 0).nonzero().flatten()
        assert torch.equal(search_cumulative(probs, uniforms)[possible], expected[possible])


def test_the_least_and_the_largest_chance_find_possible_words():
    words = 2 * BLOCK + 77
    least, largest = torch.zeros(1), torch.full((1,), 1 - 2.0**-24)
    for first, last in ((0, words - 1), (BLOCK - 1, BLOCK), (BLOCK, 2 * BLOCK - 1), (2 * BLOCK, 2 * BLOCK + 76)):
        probs = torch.zeros(1, words)
        probs[0, first], probs[0, last] = 0.3, 0.7
        assert search_cumulative(probs, least) == first
        assert search_cumulative(probs, largest) == last
    even = torch.full((1, words), 1 / words)  # its blocks' sums and its words' are rounded differently
    assert search_cumulative(even, least) == 0
    assert search_cumulative(even, largest) == words - 1


def test_a_token_of_no_probability_is_never_drawn():
    torch.manual_seed(0)
    logits = torch.full((500, 40), -float("inf"))
    logits[:, 7], logits[:, 30] = 0.0, 1.0
    tokens, logprobs = sample_token(logits, Sampling(1, 2.0), [])
    assert set(tokens.tolist()) == {7, 30}
    expected = torch.tensor([0.0, 0.5]).log_softmax(0)
    torch.testing.assert_close(logprobs, expected[(tokens == 30).long()])


def test_a_chance_between_two_sums_of_a_block_stays_in_it():
    """A block's sum, added up at once, may lie a rounding beyond the sum of its words one by one."""
    found = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        probs = torch.zeros(1, 3 * BLOCK)
        probs[0, :BLOCK] = (torch.randn(BLOCK, generator=generator) * 8).exp()  # of all sizes, or sums are exact
        probs[0, -1] = probs.sum()
        at_once, one_by_one = probs[0, :BLOCK].sum(dtype=torch.float64), probs[0, :BLOCK].double().cumsum(0)[-1]
        total = at_once + probs[0, -1].double()
        chance = one_by_one / total
        if one_by_one <= chance * total < at_once:
            found += 1
            assert search_cumulative(probs, chance.reshape(1)) < BLOCK  # beyond it, words that cannot come
    assert found > 5
