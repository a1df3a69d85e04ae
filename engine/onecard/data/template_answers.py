"""Split rendered conversations into prompt and answer, with thoughts (`<think>`).

An answer is the text that the model has to sample after its prompt. `rendered` applies the chat template:

    prompt  rendered(messages[:turn], answer_next=True)
    answer  rendered(messages[:turn + 1]) without the prompt, up to and including the token that ends it

If the prompt ends in an open thought (`<think>`), or the template cuts the thought from the answer, the answer is the
message's own text after the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onecard.data.columns import BadRowError, Messages
from onecard.data.templates import ANSWER, NO_ARGUMENTS, QUESTION, cut_after_end_token, rendered

REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys of a thought in transformers' messages
# A thought at the end of a prompt: open (`<think>\n`) or empty (`<think>\n\n</think>\n\n`); also with [THINK].
THOUGHT = re.compile(r"(?P<tag><[\w:]+>|\[[A-Z_]+\])(?P<space>\s*)(?P<closing>(?:</[\w:]+>|\[/[A-Z_]+\])\s*)?\Z")
CLOSED_THOUGHT = re.compile(r"(?:</[\w:]*think\w*>|\[/THINK\w*\])\s*\Z")  # without an opening tag (DeepSeek-V3.1)
TAGS = re.compile(r"</?[\w:]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class RenderedAnswer:
    """A prompt and its answer as text. `end`: the token that ends the answer; None if the template writes none."""

    prompt: str
    answer: str
    end: int | None

    @property
    def whole(self) -> str:
        return self.prompt + self.answer


def rendered_answer(messages: Messages, tokenizer: Any, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> RenderedAnswer:
    """The last message as the answer to those before it. Raises BadRowError if the answer cannot be separated."""
    prompt = rendered(messages[:-1], tokenizer, arguments, answer_next=True)
    whole = rendered(messages, tokenizer, arguments)
    text = whole[len(prompt) :] if whole.startswith(prompt) else None
    content: str = messages[-1].get("content", "")
    thought = THOUGHT.search(prompt)
    if closing := closed_thought(prompt):
        check_no_thought(messages[-1], len(messages) - 1, closing)
    doubled = thought is not None and content.lstrip().startswith(thought["tag"])
    if text is None or doubled or content.strip() not in text:
        other = rendered((*messages[:-1], {**messages[-1], "content": ANSWER}), tokenizer, arguments)
        before, marker, after = other.rpartition(ANSWER)
        if marker and text is None and (between := text_from_prompt(messages, prompt, before)) is not None:
            text = between + content + after
        elif marker and not (text is not None and template_keeps(content, whole, prompt, before, after)):
            text = own_text(messages, prompt, before) + after
    if text is None:
        raise inseparable(messages, prompt)
    return RenderedAnswer(prompt, *cut_after_end_token(text, tokenizer))


def as_content(answer: str, messages: Messages, tokenizer: Any, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> str:
    """A sampled answer as the content of a message.

    Its first space is removed if the template writes a space before answers itself (Vicuna, Mistral).
    """
    if not answer.startswith(" ") or not getattr(tokenizer, "chat_template", None):
        return answer
    reply = {"role": "assistant", "content": answer[1:]}
    try:
        prompt = rendered(messages, tokenizer, arguments, answer_next=True)
        return answer[1:] if rendered((*messages, reply), tokenizer, arguments).startswith(prompt + answer) else answer
    except BadRowError:
        return answer


def template_keeps(content: str, whole: str, prompt: str, before: str, after: str) -> bool:
    """Whether a template that renders `whole` after `prompt` keeps all of the answer's `content`, and only once.

    `before` and `after`: the text around the content when another content is rendered.
    """
    thought = opened_thought(prompt, before)
    if thought and content.lstrip().startswith(thought["tag"]):
        return False
    if not whole.startswith(before) or not whole.endswith(after):
        return True
    kept, content = whole[len(before) : len(whole) - len(after)].strip(), content.strip()
    return kept == content or kept not in content


def opened_thought(prompt: str, before: str) -> re.Match[str] | None:
    """The thought at the end of a prompt, or None.

    If the template writes answers after the same tag and does not close it, the tag is the header of answers
    (`<assistant>`), not a thought.
    """
    thought = THOUGHT.search(prompt)
    if thought and before.startswith(prompt) and closing_tag(thought["tag"]) not in before[thought.start() :]:
        return None
    return thought


def opens_thought(tokenizer: Any) -> bool:
    """Whether prompts end in an open thought, after which a message's own thought is written."""
    try:
        thought = THOUGHT.search(rendered(({"role": "user", "content": QUESTION},), tokenizer, answer_next=True))
    except BadRowError:
        return False
    return thought is not None and thought["closing"] is None


def own_text(messages: Messages, prompt: str, before: str) -> str:
    """The last message's own text after `prompt`, if the template writes `before` in front of an answer."""
    content: str = messages[-1].get("content", "")
    thought = opened_thought(prompt, before)
    if thought:
        head = prompt[: thought.start()]
        if before.startswith(head) and not TAGS.sub("", before[len(head) :]).strip():  # at most an empty thought
            return behind_thought(thought, messages)
    elif prompt.startswith(before) and content.startswith(prompt[len(before) :]):
        return content[len(prompt) - len(before) :]
    raise inseparable(messages, prompt)


def text_from_prompt(messages: Messages, prompt: str, before: str) -> str | None:
    """The text between the prompt's end and the answer's content; None if it cannot be found.

    For templates that render earlier messages differently once there is an answer (Mistral: a system message only while
    the user's message is the last; gpt-oss: thoughts only until the answer). Both renderings are the same from the last
    message on.
    """
    question = messages[-2].get("content", "").strip()
    tail = prompt[prompt.rfind(question) :] if question and question in prompt else ""
    start = before.rfind(tail) if tail else -1
    return before[start + len(tail) :] if start >= 0 else None


def closed_thought(prompt: str) -> str:
    """The closing tag of the thought at the end of a prompt; empty if there is no thought, or it is open."""
    empty, closed = THOUGHT.search(prompt), CLOSED_THOUGHT.search(prompt)
    return ((empty and empty["closing"]) or (closed and closed[0]) or "").strip()


def check_no_thought(message: Mapping[str, Any], index: int, closing: str) -> None:
    """Raise BadRowError if a message has a thought, but its prompt ends in a closed one."""
    if thought_of(message) or closing in message.get("content", ""):
        raise BadRowError(f"chat template: the prompt ends in an empty thought, but messages[{index}] has one")


def thought_of(message: Mapping[str, Any]) -> str:
    """The thought in a key of a message besides its content; empty if there is none."""
    return next((message[key].strip() for key in REASONING if isinstance(message.get(key), str)), "")


def inseparable(messages: Messages, prompt: str) -> BadRowError:
    return BadRowError(
        f"chat template: it does not write messages[{len(messages) - 1}] behind the prompt, which ends in "
        f"{prompt[-20:]!r}, so the assistant's part cannot be told apart"
    )


def behind_thought(thought: re.Match[str], messages: Messages) -> str:
    """The last message's own text after a prompt that ends in `thought`.

    After an open thought come the message's thought, the closing tag and the content; without a thought, the closing
    tag comes first. After an empty thought comes only the content.
    """
    message, content = messages[-1], str(messages[-1].get("content", ""))
    tag, closing, reasoning = thought["tag"], closing_tag(thought["tag"]), thought_of(message)
    if thought["closing"] is not None:
        return content
    own = content.lstrip()
    if closing not in content and not own.startswith(tag):
        return f"{reasoning}\n{closing}\n\n{own}"
    return own[len(tag) :].removeprefix(thought["space"]) if own.startswith(tag) else content


def closing_tag(tag: str) -> str:
    """The closing tag: </think> for <think>, [/THINK] for [THINK]."""
    return f"{tag[:1]}/{tag[1:]}"
