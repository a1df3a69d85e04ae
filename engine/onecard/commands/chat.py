"""`onecard chat`: a conversation with a model or an adapter. Answers come as they are sampled.

With a chat template the model is told the whole conversation; without one it goes on with the text so far. What no
longer fits into its context is forgotten from the oldest turn on. The cache of a turn is not kept for the next.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from onecard.commands.generate import longest_prompt
from onecard.config import ChatConfig
from onecard.data import prompt_tokens
from onecard.data.columns import BadRowError, Text
from onecard.data.template_answers import as_content
from onecard.data.templates import template_date, today
from onecard.data.tokens import HALF, continuation_text
from onecard.models.build import load_player
from onecard.models.load import context_length, load_tokenizer
from onecard.models.roles import Roles
from onecard.models.vocabulary import check_tokens
from onecard.rollout import Sampling, end_tokens, sample_responses
from onecard.training.startup import check_decoding
from onecard.utils.errors import OnecardError, nearest, visible
from onecard.utils.progress import say

CHECKED_TOKENS = 512  # of the text that the startup check samples behind; how long a conversation gets is not known


@dataclass(frozen=True)
class Turn:
    """What was said, and the answer."""

    line: str
    answer: str = ""


@dataclass(frozen=True)
class Conversation:
    """The turns that are still known."""

    system: str
    turns: tuple[Turn, ...] = ()
    template: bool = True

    def prompt(self) -> Text:
        """All of it, up to where the answer to the last line begins."""
        if not self.template:
            return "\n".join(turn.line + turn.answer for turn in self.turns)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.line})
            messages.append({"role": "assistant", "content": turn.answer})
        return tuple(messages[:-1])

    def said(self, line: str) -> Conversation:
        return replace(self, turns=(*self.turns, Turn(line)))

    def answered(self, answer: str) -> Conversation:
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], answer=answer)))

    def without_oldest(self) -> Conversation:
        return replace(self, turns=self.turns[1:])


@dataclass
class AnswerStream:
    """Writes an answer while its tokens come, and nothing of a character before all of it is there."""

    tokenizer: Any
    prompt: list[int]
    write: Callable[[str], object]
    tokens: list[int] = field(default_factory=list)
    written: int = 0

    def text(self) -> str:
        """The answer so far."""
        return continuation_text(self.prompt, self.tokens, self.tokenizer)

    def on_token(self, token: int) -> None:
        """One more token."""
        self.tokens.append(token)
        self.tell(self.text().rstrip(HALF))

    def tell(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)

    def end(self) -> str:
        """The whole answer; what could not be decoded is written as it is."""
        text = self.text()
        self.tell(text)
        return text


class Chat:
    """The model, how it is sampled, and the conversation so far."""

    def __init__(self, config: ChatConfig, roles: Roles, tokenizer: Any, room: int | None) -> None:
        self.roles, self.tokenizer, self.room = roles, tokenizer, room
        self.sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
        self.ends = end_tokens(roles, tokenizer)
        self.begin = self.conversation = Conversation(config.system, template=bool(tokenizer.chat_template))

    def reset(self) -> None:
        """Forget everything that was said."""
        self.conversation = self.begin
        say("The conversation begins anew.")

    def fitting(self, conversation: Conversation) -> tuple[Conversation, list[int]]:
        """The conversation without its oldest turns, as many as do not fit, and its tokens."""
        dropped, tokens = 0, self.tokens_of(conversation)
        while self.room is not None and len(tokens) > self.room:
            if len(conversation.turns) == 1:
                raise OnecardError(f"that is {len(tokens)} tokens, and {self.room} are the most that fit; not taken.")
            conversation, dropped = conversation.without_oldest(), dropped + 1
            tokens = self.tokens_of(conversation)
        if dropped:
            say(f"{dropped} of the oldest turns no longer fit into the model's context and are forgotten.")
        return conversation, tokens

    def tokens_of(self, conversation: Conversation) -> list[int]:
        try:
            return prompt_tokens(conversation.prompt(), self.tokenizer)
        except BadRowError as error:  # a chat template that refuses, as one without a system message does
            raise OnecardError(str(error)) from error

    def answer(self, line: str) -> None:
        """Say a line, and write the answer as it comes. Ctrl-C ends the answer; what was written of it is kept."""
        conversation, prompt = self.fitting(self.conversation.said(line))
        check_tokens(self.roles.causal_model(), self.tokenizer, [prompt])
        voice = AnswerStream(self.tokenizer, prompt, write)
        with suppress(KeyboardInterrupt):
            sample_responses(
                self.roles,
                [prompt],
                self.sampling,
                stop_tokens=self.ends,
                batch_size=1,
                on_token=lambda token: None if token in self.ends else voice.on_token(token),
            )
        text, messages = voice.end(), conversation.prompt()
        self.conversation = conversation.answered(
            text if isinstance(messages, str) else as_content(text, messages, self.tokenizer)
        )
        write("\n")


COMMANDS: dict[str, Callable[[Chat], None]] = {"/reset": Chat.reset}
QUIT = "/quit"
UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are no text, by Python's surrogateescape


def write(text: str) -> None:
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def read_line() -> str | None:
    """The next line, None at the end of them. In a terminal with a prompt, and with the lines before at hand."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            write("\n")
        return None
    except KeyboardInterrupt:
        write("\n")
        say(f"{QUIT} or Ctrl-D ends the conversation.")
        return ""


def talk(chat: Chat) -> None:
    """Line after line, until there is no more."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while (line := read_line()) is not None and line.strip() != QUIT:
        word = line.strip()
        if not word:
            continue
        if UNDECODED.search(line):
            say("The line is not UTF-8 and was skipped.")
            continue
        try:
            if word in COMMANDS:
                COMMANDS[word](chat)
            elif re.fullmatch(r"/\w+", word):
                known = [*COMMANDS, QUIT]
                say(f"{word}: there is no such command, only {' and '.join(known)}.{nearest(word, known)}")
            else:
                chat.answer(line)
        except KeyboardInterrupt:  # between tokens
            write("\n")
        except OnecardError as error:  # of this line, and the next one may do
            say(str(error))


def with_room(config: ChatConfig) -> ChatConfig:
    """The same settings with answers of at most half the model's context: the conversation needs the rest."""
    limit = context_length(config)
    if limit is None or config.max_new_tokens <= limit // 2:
        return config
    say(f"max_new_tokens: {limit // 2} instead of {config.max_new_tokens}, half of the model's context of {limit}.")
    return replace(config, max_new_tokens=limit // 2)


def run(config: ChatConfig) -> None:
    """`onecard chat`."""
    config.validate()
    config = with_room(config)
    tokenizer = load_tokenizer(config)
    if config.system and not tokenizer.chat_template:
        raise OnecardError("system: the model's tokenizer has no chat template, so it knows no system message.")
    room = longest_prompt(config)
    roles = load_player(config, role="policy")
    check_tokens(roles.causal_model(), tokenizer, [])
    check_decoding(roles, min(CHECKED_TOKENS, config.max_new_tokens + (room or CHECKED_TOKENS)))
    chat = Chat(config, roles, tokenizer, room)
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # from now on `input` knows the lines before
    if not tokenizer.chat_template:
        say("The tokenizer has no chat template: the model goes on with the text, lines and answers alike.")
    say("/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer.")
    torch.manual_seed(config.seed)
    with template_date(today()):
        talk(chat)
