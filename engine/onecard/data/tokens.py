"""From examples to token ids and response masks. The one place that builds masks.

Four rules hold for text and chat alike:

- A prompt's ids are `prompt_tokens`, which is also what generation feeds, so that a response is learned and scored
  behind the very ids it would be sampled behind.
- A response ends with exactly one EOS, unless it was cut at `max_length`.
- What a chat template writes after the EOS of an answer (ChatML: a line break) is no part of the answer: generation
  stops at the EOS and never writes it.
- No special token is doubled: a text that opens with the BOS gets no other, and a chat template's are the only ones.

A worked example, where `<s>` is BOS and `</s>` is EOS, prompt "Hello", completion " you":

    tokens           <s>  He  llo  _you  </s>
    response_mask     .   .    .     x     x
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onecard.batches import TokenSequence, predicted_tokens
from onecard.config import Truncation
from onecard.data.columns import BadRowError, Messages, Text
from onecard.data.examples import CompletionRow, MessagesRow, SFTRow
from onecard.data.files import reason
from onecard.errors import OnecardError

Tokenizer: TypeAlias = Any  # a transformers tokenizer; its classes are not imported, for the sake of start-up time


@dataclass(frozen=True)
class Masked:
    """Token ids with their response mask, before they are cut to length."""

    tokens: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Limit:
    """The longest that a sequence may be, and what becomes of a longer one."""

    max_length: int
    truncation_mode: Truncation


@dataclass(frozen=True)
class Fitted:
    """What became of one text: `cut` if response tokens were lost, `prompt_cut` if the prompt's first tokens were,
    `empty` if its response holds nothing to read.
    """

    sequence: TokenSequence
    cut: bool
    prompt_cut: bool
    empty: bool


def prompt_tokens(prompt: Text, tokenizer: Tokenizer) -> list[int]:
    """The ids that training puts before a response and that generation continues."""
    if isinstance(prompt, str):
        return opened(prompt, tokenizer)
    return bare(prompt_text(prompt, tokenizer), tokenizer)


def prompt_text(prompt: Text, tokenizer: Tokenizer) -> str:
    """A text prompt as it is; messages as the chat template writes them, up to where the assistant begins."""
    return prompt if isinstance(prompt, str) else rendered(prompt, tokenizer, answer_next=True)


def sft_tokens(
    row: SFTRow, tokenizer: Tokenizer, limit: Limit, *, completion_only_loss: bool, assistant_only_loss: bool
) -> Fitted:
    """One SFT example; the loss options say whether the prompt, or all turns, are learned too."""
    if isinstance(row, CompletionRow):
        masked = answered(row.prompt, row.completion, tokenizer)
        return fitted([masked], tokenizer, limit, learn_all=not completion_only_loss)[0]
    if isinstance(row, MessagesRow):
        if assistant_only_loss:
            return fitted([conversation(row.messages, 0, tokenizer)], tokenizer, limit)[0]
        ids = closed(bare(rendered(row.messages, tokenizer), tokenizer), tokenizer)
    else:
        front, ids = opening(tokenizer), opened(row.text, tokenizer)
        ids = front + closed(ids[len(front) :], tokenizer)  # the front apart: a BOS may have the id of the EOS
    return fitted([Masked(ids, [True] * len(ids))], tokenizer, limit)[0]


def answer_tokens(prompt: Text, answers: Sequence[Text], tokenizer: Tokenizer, limit: Limit) -> list[Fitted]:
    """Answers to one prompt, each behind the same prompt ids."""
    return fitted([answered(prompt, answer, tokenizer) for answer in answers], tokenizer, limit)


def fitted_prompt(tokens: list[int], tokenizer: Tokenizer, limit: Limit) -> list[int]:
    """A prompt by itself: with keep_end its beginning is cut; else one that is too long is a bad row."""
    over = len(tokens) - limit.max_length
    if over <= 0:
        return tokens
    front = front_length(tokens, tokenizer)
    if limit.truncation_mode != "keep_end" or front >= limit.max_length:
        raise BadRowError(f"prompt: {len(tokens)} tokens, expected at most {limit.max_length} beside the response")
    return tokens[:front] + tokens[front + over :]


def answered(prompt: Text, response: Text, tokenizer: Tokenizer) -> Masked:
    """A prompt and its response, of which the response is masked."""
    if not isinstance(prompt, str) and not isinstance(response, str):
        return conversation(prompt + response, len(prompt), tokenizer)
    before = prompt_tokens(prompt, tokenizer)
    whole = opened(f"{prompt}{response}", tokenizer)
    after = closed(continued(before, whole, str(response), tokenizer), tokenizer)
    return Masked(before + after, [False] * len(before) + [True] * len(after))


def conversation(messages: Messages, first: int, tokenizer: Tokenizer) -> Masked:
    """A chat of which the assistant's turns from message `first` on are masked; it ends with the last of them.

    Each turn is found by rendering the messages before it and those up to it, so the template must write a
    conversation the same way however it goes on.
    """
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not turns:
        raise BadRowError("messages: no assistant's message to learn")
    if turns[0] == 0:
        raise BadRowError("messages: the assistant speaks first, so nothing can be told apart as its prompt")
    text, tokens, mask = "", list[int](), list[bool]()
    for turn in turns:
        for end, answer in ((turn, False), (turn + 1, True)):
            longer = rendered(messages[:end], tokenizer, answer_next=not answer)
            if not longer.startswith(text):
                raise BadRowError(
                    f"chat template: up to messages[{turn}] it writes the conversation differently when it goes on, "
                    "so the assistant's part cannot be told apart"
                )
            whole = bare(longer, tokenizer)
            piece = continued(tokens, whole, longer[len(text) :], tokenizer)
            if answer and turn == turns[-1]:
                piece = closed(piece, tokenizer)
            learned = through_eos(piece, tokenizer) if answer else 0
            text, tokens = longer, tokens + piece
            mask += [True] * learned + [False] * (len(piece) - learned)
    return Masked(tokens, mask)


def fitted(answers: Sequence[Masked], tokenizer: Tokenizer, limit: Limit, *, learn_all: bool = False) -> list[Fitted]:
    """Cut answers to one prompt to `limit`, and leave them the same prompt ids.

    What is cut last is their end; a prompt that leaves no room for a response is a bad row.
    """
    before = answers[0].mask.index(True)
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
    tokens, mask = masked.tokens[:front] + masked.tokens[front + lost :], masked.mask[lost:]
    learned = [True] * len(mask) if learn_all else mask
    sequence = TokenSequence(tuple(tokens[:max_length]), tuple(learned[:max_length]))
    if not predicted_tokens(sequence):
        raise BadRowError("nothing to learn: no token of the response has one before it")
    response = [token for token, answer in zip(tokens, mask, strict=True) if answer]
    empty = not tokenizer.decode(response, skip_special_tokens=True).strip()
    return Fitted(sequence, cut=any(mask[max_length:]), prompt_cut=lost > 0, empty=empty)


# --- what tokenizers do, each thing once ---


def bare(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the text, with no special tokens but those that the text spells out."""
    # verbose: the warning about the model's longest input is ours to give, as `max_length`
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


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
    front, ids = opening(tokenizer), bare(text, tokenizer)
    return ids if ids[: len(front)] == front else front + ids


def continued(before: list[int], whole: list[int], response: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `response` after the ids `before`, where `whole` are those of both texts together.

    Usually they are the rest of `whole`. Where a token of `whole` lies across the border, the response is tokenized by
    itself. A sentencepiece tokenizer then puts a space in front of it; behind another character it does not, unless
    that one merges with it too, so of these ways the first is taken that reads as `whole` does.
    """
    if whole[: len(before)] == before:
        return whole[len(before) :]
    expected = spelled(whole, tokenizer)
    for character in ("", "\n", ".", "0"):
        front, both = bare(character, tokenizer), bare(character + response, tokenizer)
        way = both[len(front) :]
        if both[: len(front)] == front and spelled(before + way, tokenizer) == expected:
            return way
    return bare(response, tokenizer)


def through_eos(response: Sequence[int], tokenizer: Tokenizer) -> int:
    """How many tokens of an answer there are up to its last EOS; all, if it has none or goes on behind it."""
    end = max((i + 1 for i, token in enumerate(response) if token == tokenizer.eos_token_id), default=len(response))
    return end if not spelled(response[end:], tokenizer).strip() else len(response)


def closed(response: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The response with exactly one EOS at its end."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise OnecardError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token, so no response could end.")
    ids = list(response[: through_eos(response, tokenizer)])
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos]


def spelled(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def rendered(messages: Messages, tokenizer: Tokenizer, *, answer_next: bool = False) -> str:
    """What the chat template makes of the messages; its own special tokens are in the text."""
    if not tokenizer.chat_template:
        raise OnecardError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template, which rows of chat messages need: take a "
            "model that was tuned for chat, put a chat_template.jinja beside its tokenizer, or give rows of plain text."
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=answer_next, tokenize=False)
    except Exception as error:  # a template raises what it likes, such as that roles must alternate
        raise BadRowError(f"chat template: {reason(error)}") from error
    return str(text)
