"""Stop tokens and stop strings, which end a response, and the response's text without its end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from onecard.data.columns import BadRowError, check_unicode
from onecard.data.templates import answer_end_tokens
from onecard.data.tokens import REPLACEMENT, continuation_text, decode, encode, encode_after
from onecard.models.roles import Roles
from onecard.utils.errors import OnecardError

BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's name of a byte token
CONTEXT_TOKENS = 8  # decoded with the tokens that are searched: decoders may change the first tokens of a text


def find_stop_tokens(roles: Roles, tokenizer: Any, stop: Sequence[str] = ()) -> frozenset[int]:
    """Every token id that ends a response.

    These are the tokenizer's EOS, the EOS ids of the model's generation config (chat models have several), the token
    that the chat template writes after an answer, and the `stop` texts that are a single token.
    """
    eos_ids = getattr(getattr(roles.causal_model(), "generation_config", None), "eos_token_id", None)
    stop_tokens = {*answer_end_tokens(tokenizer).ids, *([eos_ids] if isinstance(eos_ids, int) else eos_ids or [])}
    return frozenset(stop_tokens.union(*(stop_ids(text, tokenizer) for text in stop)))


def stop_ids(text: str, tokenizer: Any) -> set[int]:
    """The ids of the single tokens whose text is exactly the stop text; empty if the text takes several tokens.

    With SentencePiece there may be two (`▁.` and `.`); the second is the one that follows a word. A text that is the
    name of a token (`▁the`, `<0x0A>`) is that token. Raises OnecardError if the text is empty, has a special token
    and other text, or cannot be encoded.
    """
    if not text:
        raise OnecardError("stop_token: the text is empty; expected one character or more.")
    try:
        check_unicode(text, "stop_token")  # command line arguments may be invalid UTF-8
    except BadRowError as error:
        raise OnecardError(f"{error}.") from None
    letter, alone, both = (encode(piece, tokenizer) for piece in ("a", text, f"a{text}"))
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    if special.intersection(both) and len(both) > len(letter) + 1:
        raise OnecardError(f"stop_token: {text!r} has a special token and other text; expected one or the other.")
    # Characters that are not in the vocabulary become the unknown token, or are dropped.
    encodable = decode(both, tokenizer) == f"a{text}" or decode(alone, tokenizer) == text
    entry = tokenizer.get_vocab().get(text)
    if entry is not None and (not encodable or BYTE_NAME.fullmatch(text)):
        return {entry}
    if not encodable:
        raise OnecardError(f"stop_token: {text!r} is not in the tokenizer's vocabulary.")
    single = {ids[0] for ids in (alone, both[len(letter) :]) if len(ids) == 1} | ({entry} - {None})
    return {token for token in single if is_text(token, text, tokenizer)}


def is_text(token: int, text: str, tokenizer: Any) -> bool:
    """Whether a token decodes to `text` after other text, with or without a space before it."""
    letter = encode("a", tokenizer)
    decoded = decode([*letter, token], tokenizer).removeprefix(decode(letter, tokenizer))
    return decoded in (text, f" {text}")


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of all special tokens, which are left out of a response's text."""
    added = (token for token, text in tokenizer.added_tokens_decoder.items() if text.special)
    return frozenset((*tokenizer.all_special_ids, *added))


class StopStrings:
    """Search responses for the stop texts `texts`.

    Most texts are searched in the decoded response, because a token may contain one, or a part of it (`strings`).
    Special tokens, which are not in the decoded text, and names of vocabulary entries are compared by id (`tokens`).
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        special = special_ids(tokenizer)
        self.tokens = {
            token: text
            for text in texts
            for token in stop_ids(text, tokenizer)
            if token in special or not is_text(token, text, tokenizer)
        }
        self.strings = [text for text in texts if text not in self.tokens.values()]
        # Each token has one byte or more, so a string of n bytes has at most n tokens.
        self.window = CONTEXT_TOKENS + max((len(text.encode()) for text in self.strings), default=0)
        self.can_end_cache: dict[int, bool] = {}

    def match(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """The stop string that the response's last token completed; empty if there is none.

        If there are several, the one that begins first.
        """
        token = response[-1]
        if token in self.tokens:
            return self.tokens[token]
        if not self.can_end(token) or not self.first_string(self.last_text(prompt, response)):
            return ""
        return self.first_string(continuation_text(prompt, response, self.tokenizer))

    def can_end(self, token: int) -> bool:
        """Whether a token's text has the last character of a stop string, or may be a part of that character."""
        if token not in self.can_end_cache:
            text = continuation_text(encode("a", self.tokenizer), [token], self.tokenizer)
            self.can_end_cache[token] = REPLACEMENT in text or any(string[-1] in text for string in self.strings)
        return self.can_end_cache[token]

    def first_string(self, text: str) -> str:
        """The stop string that begins first in a text; empty if there is none."""
        return min((string for string in self.strings if string in text), key=text.index, default="")

    def last_text(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """The text of the response's last `window` tokens, which are enough to contain any stop string."""
        start = len(response) - self.window
        if start <= 0:
            return continuation_text(prompt, response, self.tokenizer)
        for first in range(start, max(start - 4, 0), -1):  # do not start inside a character
            text = decode(response[first:], self.tokenizer, skip_special_tokens=True)
            if not text.startswith(REPLACEMENT):
                return text
        return continuation_text(prompt, response, self.tokenizer)


def text_before_end(
    tokenizer: Any, prompt: Sequence[int], response: Sequence[int], *, finished: bool, stop: str = ""
) -> str:
    """The response's text after its prompt, without its end.

    The end is the last token if `finished`, or all text from the stop string `stop` on.
    """
    if stop:
        text = continuation_text(prompt, response, tokenizer)
        if stop in text:
            return text[: text.index(stop)]
    return continuation_text(prompt, response[:-1] if finished else response, tokenizer)


def tokens_before_end(
    tokenizer: Any, prompt: Sequence[int], response: Sequence[int], *, finished: bool, stop: str = ""
) -> list[int]:
    """The tokens of `text_before_end`, as they were sampled.

    If the text ends inside a token, the part of that token before the end is tokenized again.
    """
    if not stop:
        return list(response[:-1] if finished else response)
    text = text_before_end(tokenizer, prompt, response, finished=finished, stop=stop)
    for count in range(len(response) - 1, -1, -1):
        head = list(response[:count])
        start = continuation_text(prompt, head, tokenizer)
        if text.startswith(start):
            rest, before = text[len(start) :], [*prompt, *head]
            return head + encode_after(before, rest, decode(before, tokenizer) + rest, tokenizer)
    return encode(text, tokenizer)
