"""`onecard chat`: a conversation with a model or an adapter. Answers are streamed token by token.

With a chat template, the prompt is the whole conversation; without one, the model continues the text so far. If the
conversation exceeds the context, the oldest turns are dropped. The KV cache is not kept between turns.
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
from onecard.data.tokens import REPLACEMENT, continuation_text
from onecard.models.build import load_frozen_role
from onecard.models.load import context_length, load_tokenizer
from onecard.models.roles import Roles
from onecard.models.vocabulary import check_tokens
from onecard.rollout import Sampling, find_stop_tokens, sample_responses
from onecard.training.startup import check_decoding
from onecard.utils.errors import OnecardError, did_you_mean, escape_controls
from onecard.utils.progress import say

CHECKED_TOKENS = 512  # longest sequence of the startup check: the length of a conversation is not known in advance


@dataclass(frozen=True)
class Turn:
    """A line that the user typed, and the model's answer."""

    line: str
    answer: str = ""


@dataclass(frozen=True)
class Conversation:
    """The turns since the last reset, without dropped ones. `template`: the tokenizer has a chat template."""

    system: str
    turns: tuple[Turn, ...] = ()
    template: bool = True

    def prompt(self) -> Text:
        """The prompt for the answer to the last line: messages if there is a chat template, else text."""
        if not self.template:
            return "\n".join(turn.line + turn.answer for turn in self.turns)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.line})
            messages.append({"role": "assistant", "content": turn.answer})
        return tuple(messages[:-1])

    def with_line(self, line: str) -> Conversation:
        """A copy of the conversation with a new line from the user."""
        return replace(self, turns=(*self.turns, Turn(line)))

    def with_answer(self, answer: str) -> Conversation:
        """A copy of the conversation with the answer to the last line."""
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], answer=answer)))

    def without_oldest(self) -> Conversation:
        return replace(self, turns=self.turns[1:])


@dataclass
class AnswerStream:
    """Writes an answer while its tokens are sampled. A character of several tokens is written when it is complete."""

    tokenizer: Any
    prompt: list[int]
    write: Callable[[str], object]
    tokens: list[int] = field(default_factory=list)
    written: int = 0

    def text(self) -> str:
        """The answer so far."""
        return continuation_text(self.prompt, self.tokens, self.tokenizer)

    def on_token(self, token: int) -> None:
        """Append a token and write the text that it completes."""
        self.tokens.append(token)
        self.write_new(self.text().rstrip(REPLACEMENT))

    def write_new(self, text: str) -> None:
        """Write the part of `text` that has not been written."""
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)

    def end(self) -> str:
        """Write the rest, including incomplete characters, and return the whole answer."""
        text = self.text()
        self.write_new(text)
        return text


class Chat:
    """The model, its sampling settings, and the conversation. `max_prompt_tokens`: None for no limit."""

    def __init__(self, config: ChatConfig, roles: Roles, tokenizer: Any, max_prompt_tokens: int | None) -> None:
        self.roles, self.tokenizer, self.max_prompt_tokens = roles, tokenizer, max_prompt_tokens
        self.sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
        self.stop_tokens = find_stop_tokens(roles, tokenizer)
        self.empty_conversation = self.conversation = Conversation(
            config.system, template=bool(tokenizer.chat_template)
        )

    def reset(self) -> None:
        """Start a new conversation."""
        self.conversation = self.empty_conversation
        say("Started a new conversation.")

    def drop_oldest_turns(self, conversation: Conversation) -> tuple[Conversation, list[int]]:
        """Drop the oldest turns until the prompt fits. Returns the conversation and the tokens of its prompt.

        Raises `OnecardError` if the last line alone does not fit.
        """
        dropped, tokens = 0, self.tokens_of(conversation)
        while self.max_prompt_tokens is not None and len(tokens) > self.max_prompt_tokens:
            if len(conversation.turns) == 1:
                raise OnecardError(
                    f"the line was skipped: its prompt has {len(tokens)} tokens, and the context has room for "
                    f"{self.max_prompt_tokens}."
                )
            conversation, dropped = conversation.without_oldest(), dropped + 1
            tokens = self.tokens_of(conversation)
        if dropped:
            say(f"Dropped the {dropped} oldest turns, which no longer fit into the model's context.")
        return conversation, tokens

    def tokens_of(self, conversation: Conversation) -> list[int]:
        """The tokens of the conversation's prompt."""
        try:
            return prompt_tokens(conversation.prompt(), self.tokenizer)
        except BadRowError as error:  # a chat template may raise, e.g. if it has no system message
            raise OnecardError(str(error)) from error

    def answer(self, line: str) -> None:
        """Add a line and stream the answer. Ctrl-C ends the answer; the part that was written is kept."""
        conversation, prompt = self.drop_oldest_turns(self.conversation.with_line(line))
        check_tokens(self.roles.causal_model(), self.tokenizer, [prompt])
        stream = AnswerStream(self.tokenizer, prompt, write)
        with suppress(KeyboardInterrupt):
            sample_responses(
                self.roles,
                [prompt],
                self.sampling,
                stop_tokens=self.stop_tokens,
                batch_size=1,
                on_token=lambda token: None if token in self.stop_tokens else stream.on_token(token),
            )
        text, messages = stream.end(), conversation.prompt()
        self.conversation = conversation.with_answer(
            text if isinstance(messages, str) else as_content(text, messages, self.tokenizer)
        )
        write("\n")


COMMANDS: dict[str, Callable[[Chat], None]] = {"/reset": Chat.reset}
QUIT = "/quit"
INVALID_UTF8 = re.compile("[\udc80-\udcff]")  # how Python's surrogateescape decodes bytes that are not UTF-8


def write(text: str) -> None:
    print(escape_controls(text) if sys.stdout.isatty() else text, end="", flush=True)


def read_line() -> str | None:
    """The next line of standard input, or None at its end. In a terminal, with a prompt and the history of lines."""
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


def chat_loop(chat: Chat) -> None:
    """Answer line after line until the input ends or the user quits."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while (line := read_line()) is not None and line.strip() != QUIT:
        command = line.strip()
        if not command:
            continue
        if INVALID_UTF8.search(line):
            say("The line is not UTF-8 and was skipped.")
            continue
        try:
            if command in COMMANDS:
                COMMANDS[command](chat)
            elif re.fullmatch(r"/\w+", command):
                known = [*COMMANDS, QUIT]
                say(f"{command}: unknown command, expected {' or '.join(known)}.{did_you_mean(command, known)}")
            else:
                chat.answer(line)
        except KeyboardInterrupt:  # Ctrl-C outside of sampling
            write("\n")
        except OnecardError as error:  # an error of this line; the conversation continues
            say(str(error))


def limit_new_tokens(config: ChatConfig) -> ChatConfig:
    """The settings with `max_new_tokens` limited to half of the model's context; the prompt needs the rest."""
    limit = context_length(config)
    if limit is None or config.max_new_tokens <= limit // 2:
        return config
    say(f"max_new_tokens: {limit // 2} instead of {config.max_new_tokens}, half of the model's context of {limit}.")
    return replace(config, max_new_tokens=limit // 2)


def run(config: ChatConfig) -> None:
    """`onecard chat`."""
    config.validate()
    config = limit_new_tokens(config)
    tokenizer = load_tokenizer(config)
    if config.system and not tokenizer.chat_template:
        raise OnecardError("system: the model's tokenizer has no chat template, so a system message cannot be given.")
    max_prompt_tokens = longest_prompt(config)
    roles = load_frozen_role(config, role="policy")
    check_tokens(roles.causal_model(), tokenizer, [])
    check_decoding(roles, min(CHECKED_TOKENS, config.max_new_tokens + (max_prompt_tokens or CHECKED_TOKENS)))
    chat = Chat(config, roles, tokenizer, max_prompt_tokens)
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has no readline
            importlib.import_module("readline")  # gives `input` a history of lines
    if not tokenizer.chat_template:
        say("The tokenizer has no chat template: the model continues the text of all lines and answers.")
    say("/reset starts a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer.")
    torch.manual_seed(config.seed)
    with template_date(today()):
        chat_loop(chat)
