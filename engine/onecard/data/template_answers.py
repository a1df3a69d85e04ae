"""Answers behind their prompts, as a chat template writes them; thoughts among them.

An answer is what the model has to sample behind its prompt, where `rendered` is the chat template:

    prompt  rendered(messages[:turn], answer_next=True)
    answer  rendered(messages[:turn + 1]) without the prompt, up to and with the token that ends it

Where the prompt ends in an opened thought (`<think>`), or the template cuts the thought off the answer, the answer is
the message's own text behind the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onecard.data.columns import BadRowError, Messages
from onecard.data.templates import ANSWER, NO_ARGUMENTS, QUESTION, rendered, through_end

REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys that transformers knows a thought under
# A thought that a prompt ends in: opened (`<think>\n`) or empty (`<think>\n\n</think>\n\n`); or [THINK].
THOUGHT = re.compile(r"(?P<tag><[\w:]+>|\[[A-Z_]+\])(?P<space>\s*)(?P<closing>(?:</[\w:]+>|\[/[A-Z_]+\])\s*)?\Z")
CLOSED_THOUGHT = re.compile(r"(?:</[\w:]*think\w*>|\[/THINK\w*\])\s*\Z")  # one that has no opening tag (DeepSeek-V3.1)
TAGS = re.compile(r"</?[\w:]+>|\[/?[A-Z_]+\]")


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
    if closing := closed_thought(prompt):
        check_no_thought(messages[-1], len(messages) - 1, closing)
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


def closed_thought(prompt: str) -> str:
    """The tag that closes the thought which a prompt ends in; empty if it ends in none, or in an opened one."""
    empty, closed = THOUGHT.search(prompt), CLOSED_THOUGHT.search(prompt)
    return ((empty and empty["closing"]) or (closed and closed[0]) or "").strip()


def check_no_thought(message: Mapping[str, Any], place: int, closing: str) -> None:
    """Stop at a message with a thought behind a prompt that ends in a closed one: it can have none there."""
    if thought_of(message) or closing in message.get("content", ""):
        raise BadRowError(f"chat template: the prompt ends in an empty thought, but messages[{place}] has one")


def thought_of(message: Mapping[str, Any]) -> str:
    """The thought that a message has beside its content."""
    return next((message[key].strip() for key in REASONING if isinstance(message.get(key), str)), "")


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
    tag, closing, said = thought["tag"], closing_tag(thought["tag"]), thought_of(message)
    if thought["closing"] is not None:
        return content
    own = content.lstrip()
    if closing not in content and not own.startswith(tag):
        return f"{said}\n{closing}\n\n{own}"
    return own[len(tag) :].removeprefix(thought["space"]) if own.startswith(tag) else content


def closing_tag(tag: str) -> str:
    """</think> of <think>, [/THINK] of [THINK]."""
    return f"{tag[:1]}/{tag[1:]}"
