"""Rewards from a sequence classifier. Prompt and answer are decoded text, tokenized with the classifier's tokenizer."""

from __future__ import annotations

from typing import Any

from onecard.data import Prompt
from onecard.data.columns import BadRowError
from onecard.data.template_answers import as_content
from onecard.data.templates import rendered
from onecard.data.tokens import leading_special_tokens
from onecard.models.classifier import Classifier
from onecard.rewards.answers import RewardInput
from onecard.utils.errors import OnecardError
from onecard.utils.progress import say


class ClassifierReward:
    """The classifier's score for prompt + answer. Chats are rendered with its own chat template if it has one."""

    def __init__(self, classifier: Classifier, setting: str) -> None:
        self.classifier, self.setting = classifier, setting
        # Special tokens that the tokenizer adds before a text. A rendered prompt may begin with them already.
        self.prefix = "".join(classifier.tokenizer.convert_ids_to_tokens(leading_special_tokens(classifier.tokenizer)))
        self.warned = False  # of truncated texts, once per run

    def __call__(self, inputs: RewardInput) -> list[float]:
        answers = inputs.answers.completions
        texts = [
            self.tokenized(prompt, answer, inputs.tokenizer)
            for prompt, answer in zip(inputs.prompts, answers, strict=True)
        ]
        limit = self.classifier.limit
        truncated = sum(text["truncated"] for text in texts)
        if truncated and not self.warned:
            self.warned = True
            say(
                f"{self.setting}: {truncated} of {len(texts)} texts are longer than the {limit} tokens that the "
                "classifier reads, so their beginning is cut off. Later ones are cut without a message."
            )
        return self.classifier.scores([text["inputs"] for text in texts], inputs.batch_size)

    def tokenized(self, prompt: Prompt, answer: str, policy_tokenizer: Any = None) -> dict[str, Any]:
        """`inputs`: the classifier's model inputs of one text; `truncated`: whether its beginning was cut off.

        `policy_tokenizer`: its chat template rendered the prompt. Raises OnecardError if the text has no token.
        """
        tokenizer, limit = self.classifier.tokenizer, self.classifier.limit
        uses_template = prompt.messages is not None and bool(tokenizer.chat_template)
        text = (
            self.rendered_chat(prompt, answer, policy_tokenizer)
            if uses_template
            else (prompt.text + answer).removeprefix(self.prefix)
        )
        # verbose=False: no warning about long texts, which are truncated below
        inputs = tokenizer(text, add_special_tokens=not uses_template, verbose=False)
        truncated = limit is not None and len(inputs["input_ids"]) > limit
        if truncated:
            inputs = tokenizer(text, add_special_tokens=not uses_template, truncation=True, max_length=limit)
        if not inputs["input_ids"]:
            raise OnecardError(f"{self.setting}: its tokenizer makes no token of {text[:80]!r}.")
        return {"inputs": inputs, "truncated": truncated}

    def rendered_chat(self, prompt: Prompt, answer: str, policy_tokenizer: Any = None) -> str:
        """The chat, rendered by the classifier's own template."""
        content = as_content(answer, prompt.messages or (), policy_tokenizer, prompt.arguments)
        reply = {"role": "assistant", "content": content}
        try:
            return rendered((*(prompt.messages or ()), reply), self.classifier.tokenizer, prompt.arguments)
        except BadRowError as error:
            raise OnecardError(f"{self.setting}: {error}; prompt {prompt.text[:80]!r}") from error
