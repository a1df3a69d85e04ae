"""Chat templates: messages to text, what of it is an answer, and the token that ends an answer.

An answer is what the model has to sample behind its prompt, where `rendered` is the chat template:

    prompt  rendered(messages[:turn], answer_next=True)
    answer  rendered(messages[:turn + 1]) without the prompt, up to and with the token that ends it

A worked example of ChatML, where `<|im_end|>` ends an answer and the line break behind it is no part of it:

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n    fine<|im_end|>    \\n
    -------------------------- prompt ------------------------    --- answer ---

Where the prompt ends in an opened thought (`<think>`), or the template cuts the thought off the answer, the answer is
the message's own text behind the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from onecard.data.columns import BadRowError, Messages, unicode
from onecard.data.readers import reason
from onecard.errors import OnecardError

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})
QUESTION, ANSWER, CALL = "onecardquestion", "onecardanswer", "onecardcall"  # letters, which no template changes
CALL_ID = "onecallid"  # of nine letters, which Mistral's templates ask for
REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys that transformers knows a thought under
# A thought that a prompt ends in, opened (`<think>\n`) or empty (`<think>\n\n</think>\n\n`); or [THINK].
THOUGHT = re.compile(r"(?P<tag><[\w:]+>|\[[A-Z_]+\])(?P<space>\s*)(?P<closing>(?:</[\w:]+>|\[/[A-Z_]+\])\s*)?\Z")
TAGS = re.compile(r"</?[\w:]+>|\[/?[A-Z_]+\]")

_date: ContextVar[datetime | None] = ContextVar("template_date", default=None)


# --- rendering ---


def today() -> str:
    """The date of the clock that chat templates read, as YYYY-MM-DD."""
    from transformers.utils import chat_template_utils

    return str(chat_template_utils.datetime.now().strftime("%Y-%m-%d"))


@contextmanager
def template_date(date: str) -> Iterator[None]:
    """Inside, `date` (YYYY-MM-DD) is the current date of every chat template that writes one."""
    token = _date.set(datetime.fromisoformat(date))
    try:
        yield
    finally:
        _date.reset(token)


@dataclass(frozen=True)
class FixedClock:
    """Stands for the `datetime` class of which transformers' `strftime_now` takes `now`."""

    moment: datetime

    def now(self) -> datetime:
        return self.moment


@contextmanager
def fixed_clock(moment: datetime) -> Iterator[None]:
    """Inside, `strftime_now` of chat templates formats `moment`. Templates are given no functions, so the clock that
    transformers' own function reads is exchanged.
    """
    from transformers.utils import chat_template_utils

    own = chat_template_utils.datetime
    chat_template_utils.datetime = FixedClock(moment)
    try:
        yield
    finally:
        chat_template_utils.datetime = own


def rendered(
    messages: Messages,
    tokenizer: Any,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
    *,
    answer_next: bool = False,
) -> str:
    """What the chat template makes of the messages; its own special tokens are in the text.

    `arguments`: what the template is given beside them, such as `tools`. Where the template refuses the messages as
    they are, messages without content get an empty one; then arguments of tool calls become JSON text (DeepSeek-V3).
    """
    if not tokenizer.chat_template:
        raise OnecardError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template, which rows of chat messages need: take a "
            "model that was tuned for chat, put a chat_template.jinja beside its tokenizer, or give rows of plain text."
        )

    def write(messages: Messages) -> str:
        filled = tuple({"content": "", **each} for each in messages)
        ways = (messages, filled, tuple(map(with_text_arguments, filled)))
        errors = []
        for place, way in enumerate(ways):
            if way not in ways[:place]:
                try:
                    return apply_template(way, tokenizer, arguments, answer_next)
                except BadRowError as error:
                    errors.append(error)
        raise errors[0]

    text = write(messages)
    unseen = [place for place, each in enumerate(messages) if each.get("content", "").strip() not in text]
    check_written(messages, write, unseen if answer_next else [place for place in unseen if place == len(messages) - 1])
    return unicode(text, "chat template")


def with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text."""

    def text(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": text(call["function"])}
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} if "arguments" in call else call

    return (
        {**message, "tool_calls": [text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
    )


def apply_template(
    messages: Sequence[dict[str, Any]], tokenizer: Any, arguments: Mapping[str, Any], answer_next: bool
) -> str:
    """`apply_chat_template`, with the current date of `template_date`."""
    date = _date.get()
    dated = date is not None and "strftime_now" in str(tokenizer.chat_template)
    try:
        with fixed_clock(date) if date is not None and dated else nullcontext():
            return str(
                tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=answer_next, tokenize=False, **arguments
                )
            )
    except Exception as error:  # a template raises what it likes, such as that roles must alternate
        raise BadRowError(f"chat template: {reason(error)}") from error


def check_written(messages: Messages, write: Callable[[Messages], str], unseen: Sequence[int]) -> None:
    """A template that leaves out the text of a message, or tool calls, makes a bad row: an empty answer, or one to
    another question, would be learned. Both are looked for by names that no other text has; `unseen` are the places of
    messages whose own text is not in what the template writes.
    """
    for place in unseen:
        marked = {**messages[place], "content": ANSWER}
        if not marked.get("tool_calls") and ANSWER not in write((*messages[:place], marked, *messages[place + 1 :])):
            raise BadRowError(f"chat template: it does not write the content of messages[{place}]")
    calls = sum(len(message.get("tool_calls", ())) for message in messages)
    for key, word in (("name", CALL), ("id", CALL_ID)) if calls else ():
        named = tuple(
            {**message, "tool_calls": [renamed(call, key, word) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        )
        if write(named).count(word) >= calls:
            return
    if calls:
        raise BadRowError("chat template: it does not write the tool calls of the messages")


def renamed(call: dict[str, Any], key: str, word: str) -> dict[str, Any]:
    """A tool call to a function called `word`, whether it has its name under `function`, as OpenAI's do, or not; or
    with that id, which is what some templates write (Kimi-K2).
    """
    if key == "name" and "function" in call:
        return {**call, "function": {**call["function"], key: word}}
    return {**call, key: word}


# --- what ends an answer ---


@dataclass(frozen=True)
class Ends:
    """The ids that end an answer. `texts`: how they and all special tokens are written.

    `turn` is the one that the chat template closes an answer with; None without a template, and where it writes none.
    `chat`: those that a template with `turn` may close answers with, such as another one behind tool calls.
    """

    ids: frozenset[int]
    turn: int | None = None
    chat: frozenset[int] = frozenset()
    texts: Mapping[str, int] = field(default_factory=dict)


def answer_ends(tokenizer: Any) -> Ends:
    """What ends an answer: the tokenizer's EOS, the EOS ids of the model's generation config (which `load_tokenizer`
    notes on the tokenizer), and the token that the chat template closes an answer with.
    """
    template = getattr(tokenizer, "chat_template", None)
    listed = frozenset({tokenizer.eos_token_id, *getattr(tokenizer, "generation_eos", ())} - {None})
    return find_ends(tokenizer, str(template), listed) if template else Ends(listed)


def closing_token(tokenizer: Any, *, chat: bool) -> int:
    """The token that answers in training data end with: of chat messages the template's, else EOS."""
    turn = answer_ends(tokenizer).turn if chat else None
    end = tokenizer.eos_token_id if turn is None else turn
    if end is None:
        raise OnecardError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token, so no response could end.")
    return int(end)


@lru_cache(maxsize=8)
def find_ends(tokenizer: Any, template: str, listed: frozenset[int]) -> Ends:
    """`answer_ends` of a tokenizer with a template, which is an argument for the sake of the cache."""
    special = {str(token): place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = special | {text: place for place in listed if (text := tokenizer.decode([place]))}
    turn = closing_turn(tokenizer, listed, texts)
    if turn is None:
        return Ends(listed, texts=texts)
    chat = {turn} | {place for text, place in texts.items() if place in listed and text in template}
    return Ends(listed | {turn}, turn, frozenset(chat), texts)


def closing_turn(tokenizer: Any, listed: frozenset[int], texts: Mapping[str, int]) -> int | None:
    """The first token behind an answer that is one of `listed`, or else the first special one.

    Some templates write more behind the last answer than behind others (Phi-3: EOS): then what is written behind both
    counts.
    """
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    for opening in ((question,), ({**question, "role": "system"}, question)):
        last = text_behind(ANSWER, (*opening, answer), tokenizer)
        middle = text_behind(ANSWER, (*opening, answer, question), tokenizer) or ""
        if last is None:
            continue
        tokens = leading_tokens(last, texts)
        found = [token for end, token in tokens if middle.startswith(last[:end])] or [token for _, token in tokens]
        return next((token for token in found if token in listed), found[0] if found else None)
    return None


def text_behind(content: str, messages: Messages, tokenizer: Any) -> str | None:
    """What the template writes behind a message's content; None where it refuses the messages or leaves it out."""
    try:
        _, found, behind = rendered(messages, tokenizer).rpartition(content)
    except BadRowError:
        return None
    return behind if found else None


def leading_tokens(text: str, texts: Mapping[str, int]) -> list[tuple[int, int]]:
    """(where it ends, its id) of each special token that the text begins with; white space may stand between them."""
    found, place = list[tuple[int, int]](), 0
    while place < len(text):
        match = max((each for each in texts if text.startswith(each, place)), key=len, default="")
        if match:
            found.append((place + len(match), texts[match]))
        elif not text[place].isspace():
            break
        place += max(len(match), 1)
    return found


def trailing_tokens(text: str, texts: Mapping[str, int]) -> list[tuple[int, int]]:
    """The same of those that the text ends with, in their order in the text."""
    found, place, all_texts = list[tuple[int, int]](), len(text), tuple(texts)
    while place:
        match = ""
        if text.endswith(all_texts, 0, place):
            match = max((each for each in texts if text.endswith(each, 0, place)), key=len)
            found.append((place, texts[match]))
        elif not text[place - 1].isspace():
            break
        place -= max(len(match), 1)
    return found[::-1]


def through_end(text: str, tokenizer: Any) -> tuple[str, int | None]:
    """A rendered text up to the token that ends its last turn, and that token; all of it and None if there is none."""
    ends = answer_ends(tokenizer)
    tail = trailing_tokens(text, ends.texts)
    place, end = next(((place, token) for place, token in tail if token in ends.ids), (len(text), None))
    return text[:place], end


# --- answers behind their prompts ---


@dataclass(frozen=True)
class RenderedAnswer:
    """A prompt and the answer behind it, as text. `end` is the token that ends the answer; None if none is written."""

    prompt: str
    answer: str
    end: int | None

    @property
    def whole(self) -> str:
        return self.prompt + self.answer


def rendered_answer(messages: Messages, tokenizer: Any, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> RenderedAnswer:
    """The last message as the answer to those before it."""
    prompt = rendered(messages[:-1], tokenizer, arguments, answer_next=True)
    whole = rendered(messages, tokenizer, arguments)
    text = whole[len(prompt) :] if whole.startswith(prompt) else None
    content: str = messages[-1].get("content", "")
    thought = THOUGHT.search(prompt)
    check_closed_thought(messages, prompt)
    doubled = thought is not None and content.lstrip().startswith(thought["tag"])
    if text is None or doubled or content.strip() not in text:
        other = rendered((*messages[:-1], {**messages[-1], "content": ANSWER}), tokenizer, arguments)
        before, found, after = other.rpartition(ANSWER)
        if found and text is None and (between := text_from_prompt(messages, prompt, before)) is not None:
            text = between + content + after
        elif found and not (text is not None and template_keeps(content, whole, prompt, before, after)):
            text = own_text(messages, prompt, before) + after
    if text is None:
        raise unlike(messages, prompt)
    return RenderedAnswer(prompt, *through_end(text, tokenizer))


def as_content(answer: str, messages: Messages, tokenizer: Any, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> str:
    """The content of the message that a sampled answer is: without its first space where the template writes one in
    front of answers by itself (Vicuna, Mistral).
    """
    if not answer.startswith(" ") or not getattr(tokenizer, "chat_template", None):
        return answer
    said = {"role": "assistant", "content": answer[1:]}
    try:
        prompt = rendered(messages, tokenizer, arguments, answer_next=True)
        return answer[1:] if rendered((*messages, said), tokenizer, arguments).startswith(prompt + answer) else answer
    except BadRowError:
        return answer


def template_keeps(content: str, whole: str, prompt: str, before: str, after: str) -> bool:
    """Whether a template that writes `whole` behind its own `prompt` keeps all of the answer's `content` and doubles
    nothing. `before` and `after` stand around another content.
    """
    thought = opened_thought(prompt, before)
    if thought and content.lstrip().startswith(thought["tag"]):
        return False
    if not whole.startswith(before) or not whole.endswith(after):
        return True
    kept, content = whole[len(before) : len(whole) - len(after)].strip(), content.strip()
    return kept == content or kept not in content


def opened_thought(prompt: str, before: str) -> re.Match[str] | None:
    """The thought that a prompt ends in, if it is one: where the template writes an answer behind the same tag and does
    not close it, the tag is the header of answers (`<assistant>`).
    """
    thought = THOUGHT.search(prompt)
    if thought and before.startswith(prompt) and closing_tag(thought["tag"]) not in before[thought.start() :]:
        return None
    return thought


def opens_thought(tokenizer: Any) -> bool:
    """Whether prompts end in an opened thought, behind which a message's own thought is written."""
    try:
        found = THOUGHT.search(rendered(({"role": "user", "content": QUESTION},), tokenizer, answer_next=True))
    except BadRowError:
        return False
    return found is not None and found["closing"] is None


def own_text(messages: Messages, prompt: str, before: str) -> str:
    """The last message's own text behind `prompt`, where the template writes `before` in front of an answer."""
    content: str = messages[-1].get("content", "")
    thought = opened_thought(prompt, before)
    if thought:
        head = prompt[: thought.start()]
        if before.startswith(head) and not TAGS.sub("", before[len(head) :]).strip():  # at most an empty thought
            return behind_thought(thought, messages)
    elif prompt.startswith(before) and content.startswith(prompt[len(before) :]):
        return content[len(prompt) - len(before) :]
    raise unlike(messages, prompt)


def text_from_prompt(messages: Messages, prompt: str, before: str) -> str | None:
    """What the template writes between the prompt's end and the answer's content, where it writes the messages before
    otherwise once there is an answer (Mistral: a system message only while the user's is the last; gpt-oss: thoughts
    only until the answer). From the last message on both are alike.
    """
    question = messages[-2].get("content", "").strip()
    tail = prompt[prompt.rfind(question) :] if question and question in prompt else ""
    place = before.rfind(tail) if tail else -1
    return before[place + len(tail) :] if place >= 0 else None


CLOSED_THOUGHT = re.compile(r"(?P<closing></[\w:]*think\w*>|\[/THINK\w*\])\s*\Z")


def check_closed_thought(messages: Messages, prompt: str) -> None:
    """A row with a thought behind a prompt that ends in a closed one (`</think>`) is bad: it can have none there."""
    closed, last = CLOSED_THOUGHT.search(prompt), messages[-1]
    said = any(isinstance(last.get(key), str) and last[key].strip() for key in REASONING)
    if closed and (said or closed["closing"] in last.get("content", "")):
        place = len(messages) - 1
        raise BadRowError(f"chat template: the prompt ends in a closed thought, but messages[{place}] has one")


def unlike(messages: Messages, prompt: str) -> BadRowError:
    return BadRowError(
        f"chat template: it does not write messages[{len(messages) - 1}] behind the prompt, which ends in "
        f"{prompt[-20:]!r}, so the assistant's part cannot be told apart"
    )


def behind_thought(thought: re.Match[str], messages: Messages) -> str:
    """The last message's own text behind a prompt that ends in `thought`.

    Behind an opened one come the message's thought, the closing tag and the rest; a message without a thought closes
    it at once. Behind an empty one a message can have none.
    """
    message, content = messages[-1], str(messages[-1].get("content", ""))
    tag, closing = thought["tag"], closing_tag(thought["tag"])
    said = next((message[key].strip() for key in REASONING if isinstance(message.get(key), str)), "")
    if thought["closing"] is not None:
        if said or closing in content:
            place = len(messages) - 1
            raise BadRowError(f"chat template: the prompt ends in an empty thought, but messages[{place}] has one")
        return content
    own = content.lstrip()
    if closing not in content and not own.startswith(tag):
        return f"{said}\n{closing}\n\n{own}"
    return own[len(tag) :].removeprefix(thought["space"]) if own.startswith(tag) else content


def closing_tag(tag: str) -> str:
    """</think> of <think>, [/THINK] of [THINK]."""
    return f"{tag[:1]}/{tag[1:]}"
