"""Split rendered conversations into prompt and answer, with the reasoning in `<think>` blocks.

An answer is the text that the model has to sample after its prompt. `rendered` applies the chat template:

    prompt  rendered(messages[:turn], answer_next=True)
    answer  rendered(messages[:turn + 1]) without the prompt, up to and including the answer's end token

If the prompt ends in an open `<think>` block, or the template removes the reasoning from the answer, the answer is
built from the message's own text instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onecard.data.columns import BadRowError, Messages
from onecard.data.templates import ANSWER, NO_ARGUMENTS, QUESTION, cut_after_end_token, rendered

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # keys of messages, as in transformers
# A reasoning block at the end of a prompt: open (`<think>\n`) or empty (`<think>\n\n</think>\n\n`); also with [THINK].
BLOCK_AT_END = re.compile(r"(?P<tag><[\w:]+>|\[[A-Z_]+\])(?P<space>\s*)(?P<closing>(?:</[\w:]+>|\[/[A-Z_]+\])\s*)?\Z")
CLOSING_TAG_AT_END = re.compile(r"(?:</[\w:]*think\w*>|\[/THINK\w*\])\s*\Z")  # without an opening tag (DeepSeek-V3.1)
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
    """The prompt that the messages before the last give, and the last message as its answer.

    Raises BadRowError if the answer cannot be separated from the prompt.
    """
    prompt = rendered(messages[:-1], tokenizer, arguments, answer_next=True)
    whole = rendered(messages, tokenizer, arguments)
    text = whole[len(prompt) :] if whole.startswith(prompt) else None
    content: str = messages[-1].get("content", "")
    block = BLOCK_AT_END.search(prompt)
    if closing := closing_tag_at_end(prompt):
        check_no_reasoning(messages[-1], len(messages) - 1, closing)
    repeats_tag = block is not None and content.lstrip().startswith(block["tag"])
    if text is None or repeats_tag or content.strip() not in text:
        marked = rendered((*messages[:-1], {**messages[-1], "content": ANSWER}), tokenizer, arguments)
        before, marker, after = marked.rpartition(ANSWER)
        if marker and text is None and (between := text_before_content(messages, prompt, before)) is not None:
            text = between + content + after
        elif marker and not (text is not None and keeps_content(content, whole, prompt, before, after)):
            text = text_after_prompt(messages, prompt, before) + after
    if text is None:
        raise inseparable_error(messages, prompt)
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


def keeps_content(content: str, whole: str, prompt: str, before: str, after: str) -> bool:
    """Whether a template keeps the answer's `content` whole in the rendered conversation `whole`.

    It does not if it removes the reasoning, or writes a reasoning tag a second time. `before` and `after`: the text
    around the content, found by rendering a marker in its place.
    """
    block = reasoning_block(prompt, before)
    if block and content.lstrip().startswith(block["tag"]):
        return False
    if not whole.startswith(before) or not whole.endswith(after):
        return True
    written, content = whole[len(before) : len(whole) - len(after)].strip(), content.strip()
    return written == content or written not in content


def reasoning_block(prompt: str, before: str) -> re.Match[str] | None:
    """The reasoning block at the end of a prompt, or None.

    `before`: the text that the template writes before an answer's content. If it has the tag but does not close it, the
    tag is a header of answers (`<assistant>`).
    """
    block = BLOCK_AT_END.search(prompt)
    if block and before.startswith(prompt) and closing_tag(block["tag"]) not in before[block.start() :]:
        return None
    return block


def prompt_opens_reasoning(tokenizer: Any) -> bool:
    """Whether prompts end in an open reasoning block. A message's reasoning is then learned after it."""
    try:
        block = BLOCK_AT_END.search(rendered(({"role": "user", "content": QUESTION},), tokenizer, answer_next=True))
    except BadRowError:
        return False
    return block is not None and block["closing"] is None


def text_after_prompt(messages: Messages, prompt: str, before: str) -> str:
    """The last message's text after `prompt`, built without the template.

    `before`: the text that the template writes before an answer's content. Raises BadRowError if they do not match.
    """
    content: str = messages[-1].get("content", "")
    block = reasoning_block(prompt, before)
    if block:
        head = prompt[: block.start()]
        if before.startswith(head) and not TAGS.sub("", before[len(head) :]).strip():  # at most an empty block
            return text_after_block(block, messages)
    elif prompt.startswith(before) and content.startswith(prompt[len(before) :]):
        return content[len(prompt) - len(before) :]
    raise inseparable_error(messages, prompt)


def text_before_content(messages: Messages, prompt: str, before: str) -> str | None:
    """The text between the prompt's end and the answer's content; None if it cannot be found.

    For templates that render earlier messages differently once there is an answer (Mistral: a system message only while
    the user's message is the last; gpt-oss: reasoning only until the answer). Both renderings are the same from the
    last question on.
    """
    question = messages[-2].get("content", "").strip()
    tail = prompt[prompt.rfind(question) :] if question and question in prompt else ""
    start = before.rfind(tail) if tail else -1
    return before[start + len(tail) :] if start >= 0 else None


def closing_tag_at_end(prompt: str) -> str:
    """The closing tag of the reasoning block at the end of a prompt; empty if there is no block, or it is open."""
    empty, closed = BLOCK_AT_END.search(prompt), CLOSING_TAG_AT_END.search(prompt)
    return ((empty and empty["closing"]) or (closed and closed[0]) or "").strip()


def check_no_reasoning(message: Mapping[str, Any], index: int, closing: str) -> None:
    """Raise BadRowError if a message has reasoning. `closing`: the closing tag with which its prompt ends."""
    if reasoning_of(message) or closing in message.get("content", ""):
        raise BadRowError(f"chat template: the prompt ends in closed reasoning, but messages[{index}] has its own")


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning in a key of its own of a message; empty if there is none."""
    return next((message[key].strip() for key in REASONING_KEYS if isinstance(message.get(key), str)), "")


def inseparable_error(messages: Messages, prompt: str) -> BadRowError:
    return BadRowError(
        f"chat template: messages[{len(messages) - 1}] does not follow the prompt, which ends in {prompt[-20:]!r}, "
        "so the answer cannot be separated from it"
    )


def text_after_block(block: re.Match[str], messages: Messages) -> str:
    """The last message's text after a prompt that ends in the reasoning block `block`.

    After an open block come the message's reasoning, the closing tag and the content; without reasoning, the closing
    tag comes first. After an empty block comes only the content.
    """
    message, content = messages[-1], str(messages[-1].get("content", ""))
    tag, closing, reasoning = block["tag"], closing_tag(block["tag"]), reasoning_of(message)
    if block["closing"] is not None:
        return content
    own = content.lstrip()
    if closing not in content and not own.startswith(tag):
        return f"{reasoning}\n{closing}\n\n{own}"
    return own[len(tag) :].removeprefix(block["space"]) if own.startswith(tag) else content


def closing_tag(tag: str) -> str:
    """The closing tag: </think> for <think>, [/THINK] for [THINK]."""
    return f"{tag[:1]}/{tag[1:]}"
