"""How responses end, and in which order they come back."""

from __future__ import annotations

import pytest
import torch

from onecard.errors import OnecardError
from onecard.rollout import Sampling, end_tokens
from tests.engine.rollout_material import (
    common_ends,
    greedy_by_transformers,
    load,
    own_logprobs,
    spied,
)

# --- how responses end


def test_the_ending_token_is_kept_and_told_apart_from_the_body(player):
    torch.manual_seed(2)
    ends = common_ends(player)
    found = player.sample(Sampling(12), player.prompts * 4, ends=ends).responses
    assert {response.finished for response in found} == {True, False}
    for response in found:
        assert not ends & set(response.body)
        if response.finished:
            assert response.tokens == (*response.body, response.tokens[-1])
            assert response.tokens[-1] in ends
        else:
            assert response.tokens == response.body
            assert len(response.tokens) == 12


def test_an_end_on_the_last_token_is_an_end(player):
    longer = player.sample(Sampling(6, 0.0), [player.prompts[1]], ends=()).responses[0]
    assert not longer.finished
    assert len(set(longer.tokens)) == 6
    cut = player.sample(Sampling(6, 0.0), [player.prompts[1]], ends={longer.tokens[-1]}).responses[0]
    assert cut.finished
    assert cut.tokens == longer.tokens
    first = player.sample(Sampling(6, 0.0), [player.prompts[1]], ends={longer.tokens[0]}).responses[0]
    assert first.tokens == longer.tokens[:1]
    assert first.finished
    assert first.body == ()


def test_any_of_several_ids_ends(player):
    plain = player.sample(Sampling(30, 0.0), ends=()).responses
    ends = {plain[0].tokens[7], plain[1].tokens[3]}
    for long, short in zip(plain, player.sample(Sampling(30, 0.0), ends=ends).responses, strict=True):
        length = next((place for place, token in enumerate(long.tokens, 1) if token in ends), 30)
        assert short.tokens == long.tokens[:length]
        assert short.finished == (long.tokens[length - 1] in ends)


def test_padding_is_masked_whatever_its_token_means(player):
    """Token 0 pads. Here it ends responses too, and stands inside a prompt: masks decide."""
    prompts = [(*player.prompts[1][:4], 0, *player.prompts[1][4:]), *player.prompts]
    together = player.sample(Sampling(30, 0.0), prompts, ends={0}).responses
    for prompt, one in zip(prompts, together, strict=True):
        other = player.sample(Sampling(30, 0.0), [prompt], ends={0}).responses[0]
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_ends_inside_a_prompt_are_only_text(stories260):
    """Here BOS is EOS, and each prompt opens with it; one has it, and the pad, in its middle as well."""
    eos, pad = stories260.tokenizer.eos_token_id, stories260.tokenizer.pad_token_id
    assert stories260.prompts[0][0] == eos
    assert stories260.ends == {eos}
    middle = (*stories260.prompts[3][:9], eos, pad, *stories260.prompts[3][1:6])
    prompts = [stories260.prompts[0], middle, stories260.prompts[1]]
    found = stories260.sample(Sampling(30, 0.0), prompts).responses
    for prompt, response in zip(prompts, found, strict=True):
        assert response.tokens == greedy_by_transformers(stories260, prompt, 30)
        torch.testing.assert_close(
            response.logprobs, own_logprobs(stories260, prompt, response, 1.0), atol=1e-4, rtol=0
        )


def test_responses_come_in_the_order_of_their_prompts(player):
    alone = [player.sample(Sampling(10, 0.0), [prompt]).responses[0].tokens for prompt in player.prompts]
    assert len(set(alone)) == len(alone)
    for batch_size in (1, 2, 4, 6, 100):
        found = player.sample(Sampling(10, 0.0), batch_size=batch_size)
        assert [response.tokens for response in found.responses] == alone
    backwards = player.sample(Sampling(10, 0.0), player.prompts[::-1], batch_size=4)
    assert [response.tokens for response in backwards.responses] == alone[::-1]


def test_the_longest_prompts_come_first(player):
    """So a run whose longest batch does not fit into memory says so at once; and little is padded."""
    with spied(player.model) as shapes:
        player.sample(Sampling(2), batch_size=2)
    lengths = sorted(map(len, player.prompts), reverse=True)
    assert [columns for _, columns in shapes if columns > 1] == lengths[::2]


# --- what ends a response


def test_end_tokens_are_the_tokenizers_the_generation_configs_and_the_stops(tinystories):
    player = load(tinystories)
    eos, vocabulary = player.tokenizer.eos_token_id, player.tokenizer.get_vocab()
    assert end_tokens(player.roles, player.tokenizer) == {eos}
    player.model.generation_config.eos_token_id = [5, 7]
    assert end_tokens(player.roles, player.tokenizer) == {eos, 5, 7}
    player.model.generation_config.eos_token_id = 9
    assert end_tokens(player.roles, player.tokenizer, [".", "\n"]) == {eos, 9, vocabulary["."], vocabulary["\n"]}
    player.model.generation_config.eos_token_id = None
    assert end_tokens(player.roles, player.tokenizer) == {eos}


def test_a_stop_text_ends_responses(stories260):
    ends = end_tokens(stories260.roles, stories260.tokenizer, ["."])
    found = stories260.sample(Sampling(30, 0.0), ends=ends).responses
    assert any(response.finished for response in found)
    for response in found:
        text = stories260.tokenizer.decode(response.tokens)
        assert text.count(".") == response.finished
        assert text.endswith(".") == response.finished


def test_a_stop_text_is_taken_as_a_word_and_as_a_piece(stories260):
    vocabulary = stories260.tokenizer.get_vocab()
    assert end_tokens(stories260.roles, stories260.tokenizer, ["Once"]) == {*stories260.ends, vocabulary["▁Once"]}
    both = end_tokens(stories260.roles, stories260.tokenizer, ["to"])
    assert both == {*stories260.ends, vocabulary["▁to"], *({vocabulary["to"]} if "to" in vocabulary else ())}


def test_a_stop_text_that_is_not_one_token_is_one_clear_line(player, stories260):
    with pytest.raises(OnecardError, match=r"stop_token: 'zzqq' is 4 tokens \(▁ zz q q\), expected text that is one t"):
        end_tokens(player.roles, player.tokenizer, ["zzqq"])
    with pytest.raises(OnecardError, match="stop_token: '' is 0 tokens"):
        end_tokens(stories260.roles, stories260.tokenizer, [""])
    with pytest.raises(OnecardError, match="stop_token: '€' is not in the tokenizer's vocabulary"):
        end_tokens(player.roles, player.tokenizer, ["€"])  # this tokenizer drops it, and a space is left
