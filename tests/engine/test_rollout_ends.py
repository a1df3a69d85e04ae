"""Stop tokens and stop strings, and the order of the responses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onecard.data import Prompt
from onecard.data.tokens import continuation_text
from onecard.rollout import (
    Sampling,
    StopStrings,
    find_stop_tokens,
    make_episode,
    stop_ids,
    text_before_end,
    tokens_before_end,
)
from onecard.rollout.stop_tokens import is_text
from onecard.utils.errors import OnecardError
from tests.engine.data_material import real
from tests.engine.rollout_material import (
    frequent_stop_tokens,
    greedy_by_transformers,
    load,
    one_pass_logprobs,
    recorded_shapes,
)

# --- stop tokens in the sampling loop


def test_responses_include_their_stop_token_and_bodies_do_not(policy):
    torch.manual_seed(2)
    stop_tokens = frequent_stop_tokens(policy)
    found = policy.sample(Sampling(12), policy.prompts * 4, stop_tokens=stop_tokens).responses
    assert {response.finished for response in found} == {True, False}
    for response in found:
        assert not stop_tokens & set(response.body)
        if response.finished:
            assert response.tokens == (*response.body, response.tokens[-1])
            assert response.tokens[-1] in stop_tokens
        else:
            assert response.tokens == response.body
            assert len(response.tokens) == 12


def test_a_stop_token_at_the_length_limit_finishes_the_response(policy):
    longer = policy.sample(Sampling(6, 0.0), [policy.prompts[1]], stop_tokens=()).responses[0]
    assert not longer.finished
    assert len(set(longer.tokens)) == 6
    cut = policy.sample(Sampling(6, 0.0), [policy.prompts[1]], stop_tokens={longer.tokens[-1]}).responses[0]
    assert cut.finished
    assert cut.tokens == longer.tokens
    first = policy.sample(Sampling(6, 0.0), [policy.prompts[1]], stop_tokens={longer.tokens[0]}).responses[0]
    assert first.tokens == longer.tokens[:1]
    assert first.finished
    assert first.body == ()


def test_any_stop_token_ends_a_response(policy):
    plain = policy.sample(Sampling(30, 0.0), stop_tokens=()).responses
    stop_tokens = {plain[0].tokens[7], plain[1].tokens[3]}
    for long, short in zip(plain, policy.sample(Sampling(30, 0.0), stop_tokens=stop_tokens).responses, strict=True):
        length = next((place for place, token in enumerate(long.tokens, 1) if token in stop_tokens), 30)
        assert short.tokens == long.tokens[:length]
        assert short.finished == (long.tokens[length - 1] in stop_tokens)


def test_padding_is_masked_if_its_token_is_a_stop_token(policy):
    """Token 0 is the pad token, a stop token, and inside a prompt. Only masks identify padding."""
    prompts = [(*policy.prompts[1][:4], 0, *policy.prompts[1][4:]), *policy.prompts]
    together = policy.sample(Sampling(30, 0.0), prompts, stop_tokens={0}).responses
    for prompt, one in zip(prompts, together, strict=True):
        other = policy.sample(Sampling(30, 0.0), [prompt], stop_tokens={0}).responses[0]
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_stop_tokens_inside_a_prompt_end_nothing(stories260):
    """BOS is EOS, so each prompt begins with it. One prompt has EOS and the pad token in its middle too."""
    eos, pad = stories260.tokenizer.eos_token_id, stories260.tokenizer.pad_token_id
    assert stories260.prompts[0][0] == eos
    assert stories260.stop_tokens == {eos}
    middle = (*stories260.prompts[3][:9], eos, pad, *stories260.prompts[3][1:6])
    prompts = [stories260.prompts[0], middle, stories260.prompts[1]]
    found = stories260.sample(Sampling(30, 0.0), prompts).responses
    for prompt, response in zip(prompts, found, strict=True):
        assert response.tokens == greedy_by_transformers(stories260, prompt, 30)
        torch.testing.assert_close(
            response.logprobs, one_pass_logprobs(stories260, prompt, response, 1.0), atol=1e-4, rtol=0
        )


def test_responses_come_in_the_order_of_their_prompts(policy):
    alone = [policy.sample(Sampling(10, 0.0), [prompt]).responses[0].tokens for prompt in policy.prompts]
    assert len(set(alone)) == len(alone)
    for batch_size in (1, 2, 4, 6, 100):
        found = policy.sample(Sampling(10, 0.0), batch_size=batch_size)
        assert [response.tokens for response in found.responses] == alone
    backwards = policy.sample(Sampling(10, 0.0), policy.prompts[::-1], batch_size=4)
    assert [response.tokens for response in backwards.responses] == alone[::-1]


def test_the_longest_prompts_come_first(policy):
    """A batch that does not fit into memory fails first, and batches of similar lengths have little padding."""
    with recorded_shapes(policy.model) as shapes:
        policy.sample(Sampling(2), batch_size=2)
    lengths = sorted(map(len, policy.prompts), reverse=True)
    assert [columns for _, columns in shapes if columns > 1] == lengths[::2]


# --- the stop tokens of a tokenizer, a generation config and the stop texts


def test_end_tokens_of_tokenizer_generation_config_and_stops(tinystories):
    policy = load(tinystories)
    eos, vocabulary = policy.tokenizer.eos_token_id, policy.tokenizer.get_vocab()
    assert find_stop_tokens(policy.roles, policy.tokenizer) == {eos}
    policy.model.generation_config.eos_token_id = [5, 7]
    assert find_stop_tokens(policy.roles, policy.tokenizer) == {eos, 5, 7}
    policy.model.generation_config.eos_token_id = 9
    assert find_stop_tokens(policy.roles, policy.tokenizer, [".", "\n"]) == {eos, 9, vocabulary["."], vocabulary["\n"]}
    policy.model.generation_config.eos_token_id = None
    assert find_stop_tokens(policy.roles, policy.tokenizer) == {eos}


def test_a_stop_text_ends_responses(stories260):
    stop_tokens = find_stop_tokens(stories260.roles, stories260.tokenizer, ["."])
    found = stories260.sample(Sampling(30, 0.0), stop_tokens=stop_tokens).responses
    assert any(response.finished for response in found)
    for response in found:
        text = stories260.tokenizer.decode(response.tokens)
        assert text.count(".") == response.finished
        assert text.endswith(".") == response.finished


def test_a_stop_text_matches_tokens_with_and_without_a_space(stories260):
    vocabulary = stories260.tokenizer.get_vocab()
    assert find_stop_tokens(stories260.roles, stories260.tokenizer, ["Once"]) == {
        *stories260.stop_tokens,
        vocabulary["▁Once"],
    }
    both = find_stop_tokens(stories260.roles, stories260.tokenizer, ["to"])
    assert both == {*stories260.stop_tokens, vocabulary["▁to"], *({vocabulary["to"]} if "to" in vocabulary else ())}


def test_a_stop_text_is_found_as_it_stands_behind_other_text(stories260, policy):
    """SentencePiece adds a space before a text. White space is not stripped before texts are compared."""
    vocabulary = stories260.tokenizer.get_vocab()
    for text, piece in {"\n": "<0x0A>", "\t": "<0x09>", "{": "<0x7B>", "}": "<0x7D>", " ": "▁"}.items():
        assert stop_ids(text, stories260.tokenizer) == {vocabulary[piece]}
    assert stop_ids(" ", policy.tokenizer) == {policy.tokenizer.get_vocab()["▁"]}
    assert stop_ids("<|end_story|>", policy.tokenizer) == {2}
    assert stop_ids("<0x0A>", stories260.tokenizer) == {vocabulary["<0x0A>"]}  # the name of a vocabulary entry
    for text in ("\n\n", "zzqq", "\r\n", "### User:"):
        assert stop_ids(text, stories260.tokenizer) == set()


def test_white_space_characters_are_told_apart(policy):
    space = policy.tokenizer.get_vocab()["▁"]
    assert [is_text(space, text, policy.tokenizer) for text in (" ", "\t", "\n")] == [True, False, False]


def test_a_stop_text_without_tokens_raises(policy, stories260):
    for text in ("€", "\t", "{", "\r\n", "###"):  # this tokenizer has no tokens for them
        with pytest.raises(OnecardError, match="is not in the tokenizer's vocabulary"):
            find_stop_tokens(policy.roles, policy.tokenizer, [text])
    with pytest.raises(OnecardError, match="stop_token: the text is empty; expected one character or more"):
        find_stop_tokens(stories260.roles, stories260.tokenizer, [""])
    with pytest.raises(OnecardError, match="stop_token: '<s>!' has a special token and other text"):
        StopStrings(stories260.tokenizer, ["<s>!"])


def test_words_of_a_vocabulary_without_letters_can_be_stops():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "stop": 1, "go": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    assert stop_ids("stop", PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")) == {1}


# --- stop strings


def bpe_tokenizer(*merges: str) -> Any:
    """A byte-level BPE tokenizer with a token for each byte, and one for each of the texts."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in merges])
    return tokenizer


def ids(tokenizer: Any, *texts: str) -> list[int]:
    """One token for each of the texts."""
    return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)[0]) for text in texts]


@pytest.mark.parametrize(
    ("stop_strings", "tokens", "stop", "text", "kept"),
    [
        (["\n\n"], ["a", "\n", "\n"], "\n\n", "a", ["a"]),
        (["\n\n"], ["a", "\n\n"], "\n\n", "a", ["a"]),
        (["\n\n"], ["a", ".\n", "\n"], "\n\n", "a.", ["a", "."]),  # the stop string begins inside a token
        (["\n\n"], ["a", ".\n", "\n\n"], "\n\n", "a.", ["a", "."]),
        (["\n"], ["a", "\n\n"], "\n", "a", ["a"]),
        (["\n"], ["a", ".\n"], "\n", "a.", ["a", "."]),
        (["User:"], ["U", "ser: hi"], "User:", "", []),
        (["User:", "r"], ["U", "ser: hi"], "User:", "", []),  # of two, the one that begins first
        (["</s>"], ["a", "</s>"], "</s>", "a", ["a"]),
        (["é"], ["a", "é"], "é", "a", ["a"]),
        (["."], ["a", "\n\n"], "", None, None),
        (["User:"], ["U", "s"], "", None, None),
    ],
)
def test_a_stop_string_is_found_across_tokens(stop_strings, tokens, stop, text, kept):
    tokenizer = bpe_tokenizer("\n\n", ".\n", "ser: hi")
    sampled = [token for each in tokens for token in tokenizer.encode(each)]
    prompt = tokenizer.encode("\nUser")  # a stop string must not begin in the prompt
    found = [StopStrings(tokenizer, stop_strings).match(prompt, sampled[:end]) for end in range(1, len(sampled) + 1)]
    assert found == [""] * (len(sampled) - 1) + [stop]
    if stop:
        end_arguments = {"finished": True, "stop": stop}
        assert text_before_end(tokenizer, prompt, sampled, **end_arguments) == text
        before = tokens_before_end(tokenizer, prompt, sampled, **end_arguments)
        assert before == [token for each in kept for token in tokenizer.encode(each)]


def test_a_token_without_text_of_its_own_stops_as_a_token(stories260):
    tokenizer = stories260.tokenizer
    prompt, answer = tokenizer.encode("Once"), tokenizer.encode(" upon\n", add_special_tokens=False)
    for stop, token in (("</s>", 2), ("<0x0A>", answer[-1])):
        stop_strings = StopStrings(tokenizer, [stop])
        sampled = [*answer[:-1], token]
        assert [stop_strings.match(prompt, sampled[:end]) for end in range(1, len(sampled) + 1)][-2:] == ["", stop]
        assert text_before_end(tokenizer, prompt, sampled, finished=True, stop=stop).strip() == "upon"
        assert tokens_before_end(tokenizer, prompt, sampled, finished=True, stop=stop) == answer[:-1]


def test_a_stop_string_is_found_behind_a_long_run_of_bytes(stories260):
    """This tokenizer decodes a run of bytes as one. If it begins inside a character, all of it is undecodable."""
    tokenizer = stories260.tokenizer
    for text in ("漢" * 12 + "字", "漢" * 13 + "字。"):
        answer = tokenizer.encode(text, add_special_tokens=False)
        stop_strings = StopStrings(tokenizer, [text[12:].lstrip("漢")])
        found = [stop_strings.match([1], answer[:end]) for end in range(1, len(answer) + 1)]
        assert found == [""] * (len(answer) - 1) + stop_strings.strings


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K", "bytes"])
def test_stop_strings_are_found_where_the_text_first_has_one(name):
    """Compared with decoding the whole answer after each token; tokens are random, incomplete characters included."""
    tokenizer = bpe_tokenizer("\n\n", ".\n", "漢", "字\n") if name == "bytes" else real(name)
    texts = [". ", "\n\n", "he", "ed.\n", "漢字"][: 5 if name == "bytes" else 4]
    if name == "stories260K":
        texts.append("字")
    stop_strings = StopStrings(tokenizer, texts)
    likely = [token for text in ("the red. He\n\nled.\n", "漢字漢字\n\n") for token in tokenizer.encode(text)]
    rng, found_at = random.Random(0), []
    for _ in range(150):
        prompt = [rng.choice(likely) for _ in range(3)]
        answer = [rng.choice(likely) if rng.random() < 0.7 else rng.randrange(3, len(tokenizer)) for _ in range(60)]
        texts_so_far = [continuation_text(prompt, answer[:end], tokenizer) for end in range(1, 61)]
        expected = next((end for end, whole in enumerate(texts_so_far) if any(text in whole for text in texts)), None)
        got = next((end for end in range(60) if stop_strings.match(prompt, answer[: end + 1])), None)
        assert got == expected
        found_at.append(got)
    assert 0 < found_at.count(None) < 150 or len(set(found_at)) > 10


def test_sampling_stops_where_the_text_first_has_a_stop_string(stories260):
    plain = stories260.sample(Sampling(60, 0.0), stop_tokens=()).responses
    tokenizer, texts = stories260.tokenizer, ["was a", ". S"]
    stop_strings = StopStrings(tokenizer, texts)
    found = stories260.sample(Sampling(60, 0.0), stop_tokens=(), stop_strings=stop_strings).responses
    assert {response.finished for response in found} >= {True}
    for prompt, whole, response in zip(stories260.prompts, plain, found, strict=True):
        texts_so_far = [continuation_text(prompt, whole.tokens[:end], tokenizer) for end in range(1, 61)]
        end = next((place for place, text in enumerate(texts_so_far, 1) if any(stop in text for stop in texts)), 60)
        assert response.tokens == whole.tokens[:end]
        assert response.finished == bool(response.stop) == any(stop in texts_so_far[end - 1] for stop in texts)
        text = text_before_end(tokenizer, prompt, response.tokens, finished=response.finished, stop=response.stop)
        assert not any(stop in text for stop in texts)
        assert texts_so_far[end - 1].startswith(text + response.stop)
        episode = make_episode(Prompt("", prompt), response)
        assert (episode.stop, episode.response, episode.prompt_tokens) == (response.stop, response.tokens, prompt)
