"""Tokenize examples into ids and response masks, and decode ids.

Only this module builds the response masks of training rows.

Four rules hold for text and for chat:

- `prompt_tokens` gives a prompt's ids in training, scoring and sampling, so a response always follows the same ids.
- A response ends with exactly one end token, unless it was cut at `max_length`. For text it is the EOS; for chat
  messages it is the token with which the chat template closes an answer (`templates.closing_token`).
- The text that a chat template writes after the end token (ChatML: a line break) is not part of the answer, because
  generation stops at that token.
- No special token is added twice: a text that begins with the BOS gets no second BOS, and text from a chat template
  gets no special tokens besides those that the template writes.

An example, in which `<s>` is BOS and `</s>` is EOS, prompt "Hello", completion " you":

    tokens           <s>  He  llo  _you  </s>
    response_mask     .   .    .     x     x
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import compress, islice
from typing import Any, TypeAlias

from onecard.config import Truncation
from onecard.data.batches import TokenSequence
from onecard.data.columns import BadRowError, Messages, Text, is_chat
from onecard.data.template_answers import rendered_answer
from onecard.data.templates import NO_ARGUMENTS, closing_token, cut_after_end_token, rendered
from onecard.data.typed_rows import CompletionRow, MessagesRow, SFTRow
from onecard.utils.threads import parallel_tokenizers

Tokenizer: TypeAlias = Any  # a transformers tokenizer; its classes are not imported, to keep start-up fast


@dataclass(frozen=True)
class Transcript:
    """A text before tokenization, as a series of prefixes.

    `prefixes[i]` extends `prefixes[i - 1]`; `is_answer[i]`: whether the part that it adds is an answer. `plain`: the
    text is not from a chat template. `end`: the token with which the template ends the last answer, or None.
    `num_answers`: number of the conversation's answers; `num_left_out` of them are not learned (`chat_transcript`).
    """

    prefixes: tuple[str, ...]
    is_answer: tuple[bool, ...]
    plain: bool = False
    end: int | None = None
    num_answers: int = 1
    num_left_out: int = 0


@dataclass(frozen=True)
class MaskedTokens:
    """Token ids with their response mask, before truncation. `num_answers`, `num_left_out`: as in `Transcript`."""

    tokens: list[int]
    mask: list[bool]
    num_answers: int = 1
    num_left_out: int = 0


@dataclass(frozen=True)
class LengthLimit:
    """The maximum length of a sequence in tokens, and how longer ones are truncated."""

    max_length: int
    truncation_mode: Truncation


@dataclass(frozen=True)
class TruncatedAnswer:
    """One text after truncation.

    `cut`: response tokens were removed. `prompt_cut`: the prompt's first tokens were removed. `empty`: the response is
    only white space and special tokens. `num_answers`, `num_left_out`: as in `Transcript`.
    """

    sequence: TokenSequence
    cut: bool
    prompt_cut: bool
    empty: bool
    num_answers: int = 1
    num_left_out: int = 0


def prompt_tokens(prompt: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> list[int]:
    """The token ids of a prompt, for training and for generation.

    `arguments`: arguments of the chat template besides the messages.
    """
    transcripts = [prompt_transcript(prompt, tokenizer, arguments)]
    return mask_transcripts(transcripts, encode_transcripts(transcripts, tokenizer), tokenizer)[0].tokens


def prompt_text(prompt: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> str:
    """A text prompt as it is; messages as rendered by the chat template, with its generation prompt."""
    return rendered(prompt, tokenizer, arguments, answer_next=True) if is_chat(prompt) else str(prompt)


def prompt_transcript(prompt: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Transcript:
    """The transcript of a prompt."""
    return Transcript((prompt_text(prompt, tokenizer, arguments),), (False,), plain=not is_chat(prompt))


def answer_transcript(
    prompt: Text, response: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> Transcript:
    """The transcript of a prompt and its response."""
    if not isinstance(prompt, str) and not isinstance(response, str):
        return chat_transcript(prompt + response, len(prompt), tokenizer, arguments)
    return Transcript((str(prompt), f"{prompt}{response}"), (False, True), plain=True)


def sft_transcript(
    row: SFTRow, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS, *, assistant_only_loss: bool
) -> Transcript:
    """The transcript of an SFT row. Without `assistant_only_loss`, all of a conversation is learned like an answer."""
    if isinstance(row, CompletionRow):
        return answer_transcript(row.prompt, row.completion, tokenizer, arguments)
    if not isinstance(row, MessagesRow):
        return Transcript((row.text,), (True,), plain=True)
    if assistant_only_loss:
        return chat_transcript(row.messages, 0, tokenizer, arguments)
    if row.messages[-1]["role"] == "assistant" and len(row.messages) > 1:
        answer = chat_transcript(row.messages, len(row.messages) - 1, tokenizer, arguments)
        return replace(answer, is_answer=(True,) * len(answer.prefixes))
    text, end = cut_after_end_token(rendered(row.messages, tokenizer, arguments), tokenizer)
    return Transcript((text,), (True,), end=end)


def chat_transcript(
    messages: Messages, first: int, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> Transcript:
    """The transcript of a chat, up to its last answer: the assistant's turns from message `first` on are answers.

    A template may render an answer differently when more messages follow (Qwen3: without its reasoning). The model
    would not sample that text, so such an answer is not learned. Raises BadRowError if there is no answer, or no prompt
    before the first.
    """
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not turns:
        raise BadRowError("messages: no message of the assistant; expected one or more to learn")
    if turns[0] == 0:
        raise BadRowError("messages: the first message is the assistant's; expected a prompt before it")
    answers = [rendered_answer(messages[: turn + 1], tokenizer, arguments) for turn in turns]
    learned = [answer for answer in answers if answers[-1].whole.startswith(answer.whole)]
    prefixes = tuple(text for answer in learned for text in (answer.prompt, answer.whole))
    num_left_out = len(answers) - len(learned)
    return Transcript(prefixes, (False, True) * len(learned), False, learned[-1].end, len(answers), num_left_out)


def encode_transcripts(transcripts: Iterable[Transcript], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Tokenize all prefixes of the transcripts in one call: prefix -> its ids."""
    texts = list(dict.fromkeys(text for transcript in transcripts for text in transcript.prefixes))
    return dict(zip(texts, encode_batch(texts, tokenizer), strict=True))


def mask_transcripts(
    transcripts: Sequence[Transcript], ids: Mapping[str, list[int]], tokenizer: Tokenizer
) -> list[MaskedTokens]:
    """Token ids and response masks of transcripts. `ids`: prefix -> its ids, from `encode_transcripts`."""
    leading = leading_special_tokens(tokenizer)
    eos = closing_token(tokenizer, chat=False) if any(item.plain and item.is_answer[-1] for item in transcripts) else -1
    return [masked_tokens(transcript, ids, leading, eos, tokenizer) for transcript in transcripts]


def masked_tokens(
    transcript: Transcript, ids: Mapping[str, list[int]], leading: Sequence[int], eos: int, tokenizer: Tokenizer
) -> MaskedTokens:
    """Token ids and mask of one transcript. `ids`: prefix -> its ids; `leading`: special tokens before plain text."""
    text, tokens, mask = "", list[int](), list[bool]()
    for prefix, is_answer in zip(transcript.prefixes, transcript.is_answer, strict=True):
        whole = with_leading_tokens(leading, ids[prefix]) if transcript.plain else ids[prefix]
        piece = continuation_ids(tokens, whole, prefix[len(text) :], tokenizer)
        if transcript.plain and is_answer:
            start = 0 if tokens else len(leading)  # `with_eos` would take a BOS with the EOS's id for an end
            piece = piece[:start] + with_eos(piece[start:], eos, tokenizer)
        text = prefix
        tokens += piece
        mask += [is_answer] * len(piece)
    if transcript.is_answer[-1] and not transcript.plain and tokens[-1:] != [transcript.end]:
        # the chat template writes no end token after the answer, so it ends with EOS
        tokens, mask = [*tokens, closing_token(tokenizer, chat=False)], [*mask, True]
    return MaskedTokens(tokens, mask, transcript.num_answers, transcript.num_left_out)


def truncate_prompt(tokens: list[int], tokenizer: Tokenizer, limit: LengthLimit) -> list[int]:
    """Truncate a prompt: keep_end cuts its beginning; with any other mode, a prompt over the limit is a bad row."""
    excess = len(tokens) - limit.max_length
    if excess <= 0:
        return tokens
    num_leading = leading_length(tokens, tokenizer)
    if limit.truncation_mode != "keep_end" or num_leading >= limit.max_length:
        raise BadRowError(
            f"prompt: {len(tokens)} tokens, expected at most {limit.max_length}, so that the response has room"
        )
    return tokens[:num_leading] + tokens[num_leading + excess :]


def truncate_answers(
    answers: Sequence[MaskedTokens], tokenizer: Tokenizer, limit: LengthLimit, *, learn_all: bool = False
) -> list[TruncatedAnswer]:
    """Truncate the answers to one prompt. All of them keep the same prompt ids.

    keep_end first cuts the beginning of the prompt, then the ends of the answers. Raises BadRowError if the
    prompt leaves no room for a response, or the mode is `error` and an answer is too long.
    """
    prompt_length = min(answer.mask.index(True) for answer in answers)
    num_leading, excess = 0, max(len(answer.tokens) for answer in answers) - limit.max_length
    num_cut = 0  # prompt tokens to cut, after the leading special tokens
    if excess > 0 and limit.truncation_mode == "error":
        raise BadRowError(f"{excess + limit.max_length} tokens, expected at most {limit.max_length} (max_length)")
    if excess > 0 and limit.truncation_mode == "keep_end":
        num_leading = leading_length(answers[0].tokens[:prompt_length], tokenizer)
        # at least one prompt token is kept, because it predicts the first response token
        num_cut = max(0, min(excess, prompt_length - max(num_leading, 1)))
    if prompt_length - num_cut >= limit.max_length:
        raise BadRowError(
            f"prompt longer than max_length: its {prompt_length} tokens leave no room for a response in "
            f"{limit.max_length}"
        )
    return [truncate_answer(answer, num_leading, num_cut, tokenizer, limit.max_length, learn_all) for answer in answers]


def truncate_answer(
    item: MaskedTokens, num_leading: int, num_cut: int, tokenizer: Tokenizer, max_length: int, learn_all: bool
) -> TruncatedAnswer:
    """Cut `num_cut` tokens after the first `num_leading`, and all tokens after `max_length`.

    `learn_all`: the response mask is True for every token.
    """
    tokens, mask = item.tokens, item.mask
    if num_cut:
        tokens, mask = tokens[:num_leading] + tokens[num_leading + num_cut :], mask[num_cut:]
    learned = [True] * len(mask) if learn_all else mask
    sequence = TokenSequence(tuple(tokens[:max_length]), tuple(learned[:max_length]))
    if True not in sequence.response_mask[1:]:
        raise BadRowError("nothing to learn: expected a response token with a token before it")
    empty = is_empty(tokens, mask, tokenizer)
    cut = any(mask[max_length:])
    return TruncatedAnswer(
        sequence, cut, prompt_cut=num_cut > 0, empty=empty, num_answers=item.num_answers, num_left_out=item.num_left_out
    )


# --- tokenizer helpers ---


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the text. No special tokens are added; special tokens written in the text are parsed as such."""
    # verbose=False: the tokenizer would warn about long texts, which `max_length` handles
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def is_transformers_fast(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is one of transformers' own classes on the tokenizers library, without code of its own."""
    own = type(tokenizer).__module__.startswith("transformers.")
    return own and getattr(tokenizer, "backend_tokenizer", None) is not None


def encode_batch(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """`encode` of each text. A fast tokenizer encodes them on all cores (`parallel_tokenizers`).

    `encode_batch_fast` of the tokenizers library takes half the time of `__call__`, which also computes offsets. The
    first text is encoded by both. If they differ (a subclass that changes texts), `__call__` encodes all texts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if texts and backend is not None:
        first = encode(texts[0], tokenizer)
        with parallel_tokenizers():
            ids = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if ids[0] == first:
            return ids
    return [encode(text, tokenizer) for text in texts]


def leading_special_tokens(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer adds before a text.

    Found by tokenizing a letter. The ids of an empty text would be ambiguous if BOS and EOS are the same id.
    """
    inner, outer = encode("a", tokenizer), list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), 0)
    return outer[:start]


def leading_length(tokens: Sequence[int], tokenizer: Tokenizer) -> int:
    """The number of special tokens that the tokenizer added before the text; truncation keeps them."""
    leading = leading_special_tokens(tokenizer)
    return len(leading) if list(tokens[: len(leading)]) == leading else 0


def with_leading_tokens(leading: Sequence[int], ids: list[int]) -> list[int]:
    """Prepend the special tokens `leading` to a text's ids, unless the ids begin with them."""
    return ids if ids[: len(leading)] == leading else [*leading, *ids]


def continuation_ids(before: list[int], whole: list[int], response: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `response` after the ids `before`. `whole` are the ids of both texts tokenized together.

    They are the rest of `whole`, unless a token of `whole` spans the boundary; then the response is tokenized by
    itself.
    """
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return encode_after(before, response, decode(whole, tokenizer), tokenizer)


def encode_after(before: list[int], response: str, expected: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `response`, tokenized apart from the ids `before`, so that both together decode to `expected`.

    A SentencePiece tokenizer adds a space at the start of a text, but not after another character. So `response` is
    tokenized after a character, whose ids are then removed. A character may merge with the response: several are tried,
    and the first that decodes correctly is used. If none does, the result is the ids of the response alone.
    """
    for character in ("", "\n", ".", "0"):
        character_ids, both = encode(character, tokenizer), encode(character + response, tokenizer)
        ids = both[len(character_ids) :]
        if both[: len(character_ids)] == character_ids and decode(before + ids, tokenizer) == expected:
            return ids
    return encode(response, tokenizer)


def is_empty(tokens: Sequence[int], mask: Sequence[bool], tokenizer: Tokenizer) -> bool:
    """Whether the tokens where `mask` is True are white space and special tokens only."""
    # usually one of the first tokens is readable, so that the text need not be decoded
    if any(is_readable(token, tokenizer) for token in islice(compress(tokens, mask), 8)):
        return False
    return not tokenizer.decode(list(compress(tokens, mask)), skip_special_tokens=True).strip()


@lru_cache(maxsize=1 << 16)
def is_readable(token: int, tokenizer: Tokenizer) -> bool:
    """Whether a token by itself decodes to text other than white space."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    return bool(text.strip()) and REPLACEMENT not in text


def with_eos(response: Sequence[int], eos: int, tokenizer: Tokenizer) -> list[int]:
    """The response with exactly one EOS at its end. White space after its last EOS is removed, other text is not."""
    if eos not in response:
        return [*response, eos]
    end = max(stop for stop, token in enumerate(response, start=1) if token == eos)
    ids = list(response if decode(response[end:], tokenizer).strip() else response[:end])
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos]


def decode(ids: Iterable[int], tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> str:
    """Decode ids without cleaning up spaces."""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return str(text)


REPLACEMENT = "\ufffd"  # the decoded text of an incomplete character


def continuation_text(
    before: Sequence[int], after: Sequence[int], tokenizer: Tokenizer, *, skip_special_tokens: bool = True
) -> str:
    """The text that the ids `after` add to the ids `before`: text(before + after) without text(before).

    Decoded alone, `after` would lose its leading space with a SentencePiece tokenizer. A character that begins in
    `before` and ends in `after` is part of the result.
    """

    def start_and_whole(before: Sequence[int]) -> tuple[str, str]:
        both = ([*before], [*before, *after])
        start, whole = (decode(ids, tokenizer, skip_special_tokens=skip_special_tokens) for ids in both)
        return start, whole

    start, whole = start_and_whole(before)
    if not whole.startswith(start) and not start.endswith(REPLACEMENT):
        # `after` begins with bytes that are no valid character, and the decoder replaces the bytes before them too.
        # Decode `after` behind a letter instead of `before`.
        start, whole = start_and_whole(encode("a", tokenizer))
    while not whole.startswith(start):  # the incomplete character at the end of `before` is complete now
        start = start[:-1]
    return whole[len(start) :]
