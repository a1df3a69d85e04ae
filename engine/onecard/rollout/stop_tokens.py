"""What ends a response: end tokens and stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from onecard.data.columns import BadRowError, unicode
from onecard.data.templates import answer_ends
from onecard.data.tokens import HALF, bare, behind, continuation_text, spelled
from onecard.models.roles import Roles
from onecard.utils.errors import OnecardError

BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # what SentencePiece calls the token of a byte
CONTEXT_TOKENS = 8  # decoded before the tokens that are looked at: a decoder may change the first tokens of a text


def end_tokens(roles: Roles, tokenizer: Any, stop: Sequence[str] = ()) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's EOS, those of the model's generation config (chat models), the one
    that the chat template closes answers with, and those of the `stop` texts that are a token.
    """
    own = getattr(getattr(roles.causal_model(), "generation_config", None), "eos_token_id", None)
    ends = {*answer_ends(tokenizer).ids, *([own] if isinstance(own, int) else own or [])}
    return frozenset(ends.union(*(stop_ids(text, tokenizer) for text in stop)))


def stop_ids(text: str, tokenizer: Any) -> set[int]:
    """The ids of tokens that are a stop text by themselves; none where it takes several tokens.

    With SentencePiece there may be two (`▁.` and `.`), and the second is the one that follows a word. A text that the
    tokenizer cannot write is an error, unless it is the name of a token (`▁the`; `<0x0A>` is one anyway).
    """
    if not text:
        raise OnecardError("stop_token: '' is 0 tokens, expected a text.")
    try:
        unicode(text, "stop_token")  # bytes of a command line that are no UTF-8
    except BadRowError as error:
        raise OnecardError(f"{error}.") from None
    letter, alone, both = (bare(each, tokenizer) for each in ("a", text, f"a{text}"))
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    if special.intersection(both) and len(both) > len(letter) + 1:
        raise OnecardError(f"stop_token: {text!r} has a special token beside other text, expected one or the other.")
    # Unknown characters become the unknown token, or nothing at all.
    written = spelled(both, tokenizer) == f"a{text}" or spelled(alone, tokenizer) == text
    named = tokenizer.get_vocab().get(text)
    if named is not None and (not written or BYTE_NAME.fullmatch(text)):
        return {named}
    if not written:
        raise OnecardError(f"stop_token: {text!r} is not in the tokenizer's vocabulary.")
    single = {each[0] for each in (alone, both[len(letter) :]) if len(each) == 1} | ({named} - {None})
    return {token for token in single if is_text(token, text, tokenizer)}


def is_text(token: int, text: str, tokenizer: Any) -> bool:
    """Whether a token is written as `text` behind other text, or as a word of its own with a space before it."""
    letter = bare("a", tokenizer)
    behind = spelled([*letter, token], tokenizer).removeprefix(spelled(letter, tokenizer))
    return behind in (text, f" {text}")


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that have no text in an answer."""
    added = (token for token, text in tokenizer.added_tokens_decoder.items() if text.special)
    return frozenset((*tokenizer.all_special_ids, *added))


class StopStrings:
    """The `stop` texts, which are looked for in answers as text: a token may hold one, or a part of it. Special tokens,
    which have no text, and names of the vocabulary are looked for as tokens.
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
        # Each token of a string has a byte of it, or more.
        self.window = CONTEXT_TOKENS + max((len(text.encode()) for text in self.strings), default=0)
        self.may_end: dict[int, bool] = {}

    def found(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """The stop string that a response has since its last token; empty if it has none.

        Of several, the one that begins first.
        """
        token = response[-1]
        if token in self.tokens:
            return self.tokens[token]
        if not self.can_end(token) or not self.first(self.last_text(prompt, response)):
            return ""
        return self.first(continuation_text(prompt, response, self.tokenizer))

    def can_end(self, token: int) -> bool:
        """Whether a token may hold the last character of a string, or a part of it."""
        if token not in self.may_end:
            text = continuation_text(bare("a", self.tokenizer), [token], self.tokenizer)
            self.may_end[token] = HALF in text or any(string[-1] in text for string in self.strings)
        return self.may_end[token]

    def first(self, text: str) -> str:
        """The string that begins first in a text; empty if there is none."""
        return min((string for string in self.strings if string in text), key=text.index, default="")

    def last_text(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """The text of the response's last tokens, as many as may hold a string."""
        start = len(response) - self.window
        if start <= 0:
            return continuation_text(prompt, response, self.tokenizer)
        for first in range(start, max(start - 4, 0), -1):  # not from the middle of a character
            text = spelled(response[first:], self.tokenizer, skip_special_tokens=True)
            if not text.startswith(HALF):
                return text
        return continuation_text(prompt, response, self.tokenizer)


def text_before_end(
    tokenizer: Any, prompt: Sequence[int], response: Sequence[int], *, finished: bool, stop: str = ""
) -> str:
    """The answer as text behind its prompt, without what ended it: a last token, or from the stop string on."""
    if stop:
        text = continuation_text(prompt, response, tokenizer)
        if stop in text:
            return text[: text.index(stop)]
    return continuation_text(prompt, response[:-1] if finished else response, tokenizer)


def tokens_before_end(
    tokenizer: Any, prompt: Sequence[int], response: Sequence[int], *, finished: bool, stop: str = ""
) -> list[int]:
    """The tokens of `text_before_end`, as they were sampled. Of a token that is partly in it, that part is tokenized
    anew.
    """
    if not stop:
        return list(response[:-1] if finished else response)
    text = text_before_end(tokenizer, prompt, response, finished=finished, stop=stop)
    for count in range(len(response) - 1, -1, -1):
        kept = list(response[:count])
        start = continuation_text(prompt, kept, tokenizer)
        if text.startswith(start):
            rest, before = text[len(start) :], [*prompt, *kept]
            return kept + behind(before, rest, spelled(before, tokenizer) + rest, tokenizer)
    return bare(text, tokenizer)
