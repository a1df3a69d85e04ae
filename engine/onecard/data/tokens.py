"""From examples to token ids and response masks, and back to text. The one place that builds masks.

Four rules hold for text and chat alike:

- A prompt's ids are `prompt_tokens`, which is also what generation feeds, so that a response is learned and scored
  behind the very ids it would be sampled behind.
- A response ends with exactly one end token, unless it was cut at `max_length`: of text the EOS, of chat messages the
  token that the chat template closes an answer with (`templates.closing_token`).
- What a chat template writes behind that token (ChatML: a line break) is no part of the answer: generation stops at
  the token and never writes it.
- No special token is doubled: a text that opens with the BOS gets no other, and a chat template's are the only ones.

A worked example, where `<s>` is BOS and `</s>` is EOS, prompt "Hello", completion " you":

    tokens           <s>  He  llo  _you  </s>
    response_mask     .   .    .     x     x
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import compress
from typing import Any, TypeAlias

from onecard.config import Truncation
from onecard.data.batches import TokenSequence, predicted_tokens
from onecard.data.columns import BadRowError, Messages, Text, is_chat
from onecard.data.template_answers import rendered_answer
from onecard.data.templates import NO_ARGUMENTS, closing_token, rendered, through_end
from onecard.data.typed_rows import CompletionRow, MessagesRow, SFTRow

Tokenizer: TypeAlias = Any  # a transformers tokenizer; its classes are not imported, for the sake of start-up time


@dataclass(frozen=True)
class Transcript:
    """A text before tokenization.

    `prefixes`: each is longer than the one before; `is_answer`: whether what it adds is an answer. `plain`: no chat
    template wrote the text. `end`: the token that the template closes the last answer with, or None. `left_out` of the
    conversation's `answers` are not in the text.
    """

    prefixes: tuple[str, ...]
    is_answer: tuple[bool, ...]
    plain: bool = False
    end: int | None = None
    answers: int = 1
    left_out: int = 0


@dataclass(frozen=True)
class Masked:
    """Token ids with their response mask, before they are cut to length. Of `answers`, `left_out` are not masked."""

    tokens: list[int]
    mask: list[bool]
    answers: int = 1
    left_out: int = 0


@dataclass(frozen=True)
class Limit:
    """The longest that a sequence may be, and what becomes of a longer one."""

    max_length: int
    truncation_mode: Truncation


@dataclass(frozen=True)
class Fitted:
    """What became of one text: `cut` if response tokens were lost, `prompt_cut` if the prompt's first tokens were,
    `empty` if its response holds nothing to read. Of its `answers`, `left_out` are not learned.
    """

    sequence: TokenSequence
    cut: bool
    prompt_cut: bool
    empty: bool
    answers: int = 1
    left_out: int = 0


def prompt_tokens(prompt: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> list[int]:
    """The ids that training puts before a response and that generation continues.

    `arguments` are what a chat template is given beside the messages.
    """
    return tokenize_transcripts([prompt_transcript(prompt, tokenizer, arguments)], tokenizer)[0].tokens


def prompt_text(prompt: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> str:
    """A text prompt as it is; messages as the chat template writes them, up to where the assistant begins."""
    return rendered(prompt, tokenizer, arguments, answer_next=True) if is_chat(prompt) else str(prompt)


def prompt_transcript(prompt: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Transcript:
    """A prompt to answer."""
    return Transcript((prompt_text(prompt, tokenizer, arguments),), (False,), plain=not is_chat(prompt))


def answer_transcript(
    prompt: Text, response: Text, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> Transcript:
    """A prompt and its response."""
    if not isinstance(prompt, str) and not isinstance(response, str):
        return chat_transcript(prompt + response, len(prompt), tokenizer, arguments)
    return Transcript((str(prompt), f"{prompt}{response}"), (False, True), plain=True)


def sft_transcript(
    row: SFTRow, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS, *, assistant_only_loss: bool
) -> Transcript:
    """One SFT example; without `assistant_only_loss` all of a conversation is the answer."""
    if isinstance(row, CompletionRow):
        return answer_transcript(row.prompt, row.completion, tokenizer, arguments)
    if not isinstance(row, MessagesRow):
        return Transcript((row.text,), (True,), plain=True)
    if assistant_only_loss:
        return chat_transcript(row.messages, 0, tokenizer, arguments)
    if row.messages[-1]["role"] == "assistant" and len(row.messages) > 1:
        answer = chat_transcript(row.messages, len(row.messages) - 1, tokenizer, arguments)
        return replace(answer, is_answer=(True,) * len(answer.prefixes))
    text, end = through_end(rendered(row.messages, tokenizer, arguments), tokenizer)
    return Transcript((text,), (True,), end=end)


def chat_transcript(
    messages: Messages, first: int, tokenizer: Tokenizer, arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> Transcript:
    """A chat of which the assistant's turns from message `first` on are answers; it ends with the last of them.

    Each turn is what is sampled behind its own prompt. A template may write a turn differently once the conversation
    goes on (Qwen3: without its thought); such a turn is left out, since behind this text it would not be sampled.
    """
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not turns:
        raise BadRowError("messages: no assistant's message to learn")
    if turns[0] == 0:
        raise BadRowError("messages: the assistant speaks first, so nothing can be told apart as its prompt")
    answers = [rendered_answer(messages[: turn + 1], tokenizer, arguments) for turn in turns]
    learned = [answer for answer in answers if answers[-1].whole.startswith(answer.whole)]
    prefixes = tuple(text for answer in learned for text in (answer.prompt, answer.whole))
    left_out = len(answers) - len(learned)
    return Transcript(prefixes, (False, True) * len(learned), False, learned[-1].end, len(answers), left_out)


def tokenize_transcripts(transcripts: Sequence[Transcript], tokenizer: Tokenizer) -> list[Masked]:
    """Token ids and masks of transcripts. All their texts go to the tokenizer in one call."""
    texts = list(dict.fromkeys(text for transcript in transcripts for text in transcript.prefixes))
    ids = dict(zip(texts, encode_batch(texts, tokenizer), strict=True))
    front = opening(tokenizer)
    eos = closing_token(tokenizer, chat=False) if any(each.plain and each.is_answer[-1] for each in transcripts) else -1
    return [masked(transcript, ids, front, eos, tokenizer) for transcript in transcripts]


def masked(
    transcript: Transcript, ids: Mapping[str, list[int]], front: Sequence[int], eos: int, tokenizer: Tokenizer
) -> Masked:
    """Token ids and mask of one transcript. `ids`: tokens of each prefix; `front`: special tokens before plain text."""
    text, tokens, mask = "", list[int](), list[bool]()
    for prefix, is_answer in zip(transcript.prefixes, transcript.is_answer, strict=True):
        whole = with_front(front, ids[prefix]) if transcript.plain else ids[prefix]
        piece = continued(tokens, whole, prefix[len(text) :], tokenizer)
        if transcript.plain and is_answer:
            kept = 0 if tokens else len(front)  # a BOS may have the id of the EOS
            piece = piece[:kept] + closed(piece[kept:], eos, tokenizer)
        text, tokens, mask = prefix, tokens + piece, mask + [is_answer] * len(piece)
    if transcript.is_answer[-1] and not transcript.plain and tokens[-1:] != [transcript.end]:
        tokens, mask = [*tokens, closing_token(tokenizer, chat=False)], [*mask, True]
    return Masked(tokens, mask, transcript.answers, transcript.left_out)


def fitted_prompt(tokens: list[int], tokenizer: Tokenizer, limit: Limit) -> list[int]:
    """A prompt by itself: with keep_end its beginning is cut; else one that is too long is a bad row."""
    over = len(tokens) - limit.max_length
    if over <= 0:
        return tokens
    front = front_length(tokens, tokenizer)
    if limit.truncation_mode != "keep_end" or front >= limit.max_length:
        raise BadRowError(f"prompt: {len(tokens)} tokens, expected at most {limit.max_length} beside the response")
    return tokens[:front] + tokens[front + over :]


def fitted(answers: Sequence[Masked], tokenizer: Tokenizer, limit: Limit, *, learn_all: bool = False) -> list[Fitted]:
    """Cut answers to one prompt to `limit`, and leave them the same prompt ids.

    What is cut last is their end; a prompt that leaves no room for a response is a bad row.
    """
    before = min(answer.mask.index(True) for answer in answers)
    front, over = 0, max(len(answer.tokens) for answer in answers) - limit.max_length
    lost = 0  # of the prompt's tokens, behind the special ones in front
    if over > 0 and limit.truncation_mode == "error":
        raise BadRowError(f"{over + limit.max_length} tokens, expected at most {limit.max_length} (max_length)")
    if over > 0 and limit.truncation_mode == "keep_end":
        front = front_length(answers[0].tokens[:before], tokenizer)
        lost = max(0, min(over, before - max(front, 1)))  # one is left, from which the response is predicted
    if before - lost >= limit.max_length:
        raise BadRowError(
            f"prompt longer than max_length: its {before} tokens leave no room for a response in {limit.max_length}"
        )
    return [shortened(answer, front, lost, tokenizer, limit.max_length, learn_all) for answer in answers]


def shortened(masked: Masked, front: int, lost: int, tokenizer: Tokenizer, max_length: int, learn_all: bool) -> Fitted:
    """One text without `lost` of its prompt's tokens behind the first `front`, and its end past `max_length`."""
    tokens, mask = masked.tokens, masked.mask
    if lost:
        tokens, mask = tokens[:front] + tokens[front + lost :], mask[lost:]
    learned = [True] * len(mask) if learn_all else mask
    sequence = TokenSequence(tuple(tokens[:max_length]), tuple(learned[:max_length]))
    if not predicted_tokens(sequence):
        raise BadRowError("nothing to learn: no token of the response has one before it")
    empty = is_empty(list(compress(tokens, mask)), tokenizer)
    cut = any(mask[max_length:])
    return Fitted(sequence, cut, prompt_cut=lost > 0, empty=empty, answers=masked.answers, left_out=masked.left_out)


# --- what tokenizers do, each thing once ---


def bare(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the text, with no special tokens but those that the text spells out."""
    # verbose: the warning about the model's longest input is ours to give, as `max_length`
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_batch(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """`bare` of each text; a fast tokenizer encodes them on all cores.

    `encode_batch_fast` of the tokenizers library takes half the time of `__call__`, which computes offsets too. The
    first text is encoded by both, and where they differ (a subclass that changes texts), `__call__` encodes all.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if texts and backend is not None:
        first = bare(texts[0], tokenizer)
        found = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if found[0] == first:
            return found
    return [bare(text, tokenizer) for text in texts]


def opening(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before any text.

    Read off a letter that is none of them: where BOS and EOS are one id, the ids of an empty text do not tell.
    """
    inner, outer = bare("a", tokenizer), list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), 0)
    return outer[:start]


def front_length(tokens: Sequence[int], tokenizer: Tokenizer) -> int:
    """How many of the first tokens are the special ones that the tokenizer puts before any text: they are not cut."""
    front = opening(tokenizer)
    return len(front) if list(tokens[: len(front)]) == front else 0


def opened(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids as `tokenizer(text)` gives them, without what it adds behind (an EOS would end the text) or adds twice."""
    return with_front(opening(tokenizer), bare(text, tokenizer))


def with_front(front: Sequence[int], ids: list[int]) -> list[int]:
    """Put the special tokens `front` before a text's ids, unless the text begins with them."""
    return ids if ids[: len(front)] == front else [*front, *ids]


def continued(before: list[int], whole: list[int], response: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `response` after the ids `before`, where `whole` are those of both texts together.

    Usually they are the rest of `whole`. Where a token of `whole` lies across the border, the response is tokenized by
    itself.
    """
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return behind(before, response, spelled(whole, tokenizer), tokenizer)


def behind(before: list[int], response: str, expected: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `response` by itself that read as `expected` behind the ids `before`.

    A sentencepiece tokenizer puts a space in front of a text; behind another character it does not, unless that one
    merges with it too, so of these ways the first is taken that reads as it should.
    """
    for character in ("", "\n", ".", "0"):
        front, both = bare(character, tokenizer), bare(character + response, tokenizer)
        way = both[len(front) :]
        if both[: len(front)] == front and spelled(before + way, tokenizer) == expected:
            return way
    return bare(response, tokenizer)


def is_empty(response: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a response is white space and special tokens alone. Mostly one of its first tokens tells."""
    if any(is_readable(token, tokenizer) for token in response[:8]):
        return False
    return not tokenizer.decode(response, skip_special_tokens=True).strip()


@lru_cache(maxsize=1 << 16)
def is_readable(token: int, tokenizer: Tokenizer) -> bool:
    """Whether a token by itself is text that is no white space."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    return bool(text.strip()) and HALF not in text


def closed(response: Sequence[int], eos: int, tokenizer: Tokenizer) -> list[int]:
    """The response with exactly one EOS at its end. Text behind its last EOS is kept, white space is not."""
    if eos not in response:
        return [*response, eos]
    end = max(place for place, token in enumerate(response, start=1) if token == eos)
    ids = list(response if spelled(response[end:], tokenizer).strip() else response[:end])
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos]


def spelled(ids: Iterable[int], tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> str:
    """The text of ids, with every space that they stand for."""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return str(text)


HALF = "\ufffd"  # what the first bytes of a character are decoded to while the others are not there


def continuation_text(
    before: Sequence[int], after: Sequence[int], tokenizer: Tokenizer, *, skip_special_tokens: bool = True
) -> str:
    """The text of the ids `after` behind the ids `before`: text(before + after) less text(before).

    By themselves, ids lose the space that opens them in a sentencepiece tokenizer. A character that begins in `before`
    and ends in `after` is part of the result.
    """

    def read(before: Sequence[int]) -> tuple[str, str]:
        both = ([*before], [*before, *after])
        start, whole = (spelled(ids, tokenizer, skip_special_tokens=skip_special_tokens) for ids in both)
        return start, whole

    start, whole = read(before)
    if not whole.startswith(start) and not start.endswith(HALF):
        # The first bytes of `after` belong to no character, and the bytes before them are unreadable together with
        # them: a letter stands for `before`.
        start, whole = read(bare("a", tokenizer))
    while not whole.startswith(start):  # the half character at the end of `before` is whole now
        start = start[:-1]
    return whole[len(start) :]
