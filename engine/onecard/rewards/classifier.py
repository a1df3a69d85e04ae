"""Scores from a sequence classifier of its own kind: the answers are texts to it, tokenized anew."""

from __future__ import annotations

from typing import Any

from onecard.data import Prompt
from onecard.data.columns import BadRowError
from onecard.data.template_answers import as_content
from onecard.data.templates import rendered
from onecard.data.tokens import opening
from onecard.models.classifier import Classifier
from onecard.rewards.answers import RewardInput
from onecard.utils.errors import OnecardError
from onecard.utils.progress import say


class ClassifierReward:
    """The classifier's value of prompt and answer, one text; chat prompts by its own chat template if it has one."""

    def __init__(self, classifier: Classifier, setting: str) -> None:
        self.classifier, self.setting = classifier, setting
        # What the tokenizer puts before any text. A chat template may have written it already.
        self.front = "".join(classifier.tokenizer.convert_ids_to_tokens(opening(classifier.tokenizer)))
        self.said = False  # that texts are cut

    def __call__(self, inputs: RewardInput) -> list[float]:
        answers = inputs.answers.completions
        texts = [
            self.tokenized(prompt, answer, inputs.tokenizer)
            for prompt, answer in zip(inputs.prompts, answers, strict=True)
        ]
        limit = self.classifier.limit
        cut = sum(text["cut"] for text in texts)
        if cut and not self.said:
            self.said = True
            say(
                f"{self.setting}: {cut} of {len(texts)} texts are longer than the {limit} tokens that the classifier "
                "reads, and lose their beginning; so will others."
            )
        return self.classifier.values([text["inputs"] for text in texts], inputs.batch_size)

    def tokenized(self, prompt: Prompt, answer: str, policy_tokenizer: Any = None) -> dict[str, Any]:
        """What the classifier's tokenizer makes of one text, and whether it was `cut` at the left.

        `policy_tokenizer`: its chat template wrote the prompt that the answer was sampled behind.
        """
        tokenizer, limit = self.classifier.tokenizer, self.classifier.limit
        templated = prompt.messages is not None and bool(tokenizer.chat_template)
        text = (
            self.conversation(prompt, answer, policy_tokenizer)
            if templated
            else (prompt.text + answer).removeprefix(self.front)
        )
        # verbose: the warning about the model's longest input is ours to give
        inputs = tokenizer(text, add_special_tokens=not templated, verbose=False)
        cut = limit is not None and len(inputs["input_ids"]) > limit
        if cut:
            inputs = tokenizer(text, add_special_tokens=not templated, truncation=True, max_length=limit)
        if not inputs["input_ids"]:
            raise OnecardError(f"{self.setting}: its tokenizer makes no token of {text[:80]!r}.")
        return {"inputs": inputs, "cut": cut}

    def conversation(self, prompt: Prompt, answer: str, policy_tokenizer: Any = None) -> str:
        """The chat as the classifier's own template writes it."""
        content = as_content(answer, prompt.messages or (), policy_tokenizer, prompt.arguments)
        said = {"role": "assistant", "content": content}
        try:
            return rendered((*(prompt.messages or ()), said), self.classifier.tokenizer, prompt.arguments)
        except BadRowError as error:
            raise OnecardError(f"{self.setting}: {error}; prompt {prompt.text[:80]!r}") from error
