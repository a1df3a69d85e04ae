"""What a policy says to a few held-out prompts while it learns from fixed examples: for the eye, not for a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.config import PolicyTrainConfig
from onecard.data.batches import LabelledSequence, PreferencePair, TokenSequence
from onecard.data.tokens import decode
from onecard.models.roles import Roles
from onecard.models.trunk import context_of, trunk_of
from onecard.rollout import Response, Sampling, find_stop_tokens, sample_responses, text_before_end
from onecard.utils.progress import Bar
from onecard.utils.rng import seeded_rng

BEGINNING = 8  # tokens of a text without a prompt that stand for one

# record -> a sequence that begins with its prompt
SEQUENCES: dict[type, Callable[[Any], TokenSequence]] = {
    TokenSequence: lambda sequence: sequence,
    PreferencePair: lambda pair: pair.chosen,
    LabelledSequence: lambda labelled: labelled.sequence,
}


def prompt_of(example: object) -> tuple[int, ...]:
    """The tokens before the first one that is learned; the first few of a text that is learned whole."""
    sequence = SEQUENCES[type(example)](example)
    return sequence.tokens[: sequence.response_mask.index(True)] or sequence.tokens[:BEGINNING]


@dataclass(frozen=True)
class HeldoutSamples:
    """The policy's responses to a few held-out prompts.

    They are drawn the same way each time, so they differ by what was learned in between. Training draws as if nothing
    had been drawn here.
    """

    config: PolicyTrainConfig
    roles: Roles
    tokenizer: Any
    prompts: Sequence[tuple[int, ...]]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its response."""
        return max(map(len, self.prompts)) + self.config.eval_sample_length

    def __call__(self, bar: Bar) -> list[dict[str, Any]]:
        """A row of prompt and completion, both as text, for each prompt."""
        config, roles, prompts = self.config, self.roles, self.prompts
        with bar.part("samples", len(prompts)) as part, seeded_rng(roles.device, config.seed, "samples"):
            rollout = sample_responses(
                roles,
                prompts,
                Sampling(config.eval_sample_length),
                stop_tokens=find_stop_tokens(roles, self.tokenizer),
                batch_size=config.per_device_eval_batch_size,
                bar=part,
            )
        return [self.row(prompt, response) for prompt, response in zip(prompts, rollout.responses, strict=True)]

    def row(self, prompt: Sequence[int], response: Response) -> dict[str, str]:
        """Prompt and completion, which together read as their tokens do."""
        completion = text_before_end(self.tokenizer, prompt, response.tokens, finished=response.finished)
        whole = decode([*prompt, *response.body], self.tokenizer, skip_special_tokens=True)
        return {"prompt": whole.removesuffix(completion), "completion": completion}


def heldout_samples(
    config: PolicyTrainConfig, roles: Roles, tokenizer: Any, heldout: Sequence[object]
) -> HeldoutSamples | None:
    """Samples for the first `eval_samples` held-out prompts that leave room for a response; None if there are none."""
    different = list(dict.fromkeys(map(prompt_of, heldout)))
    context = context_of(trunk_of(roles.causal_model()).config)
    room = None if context is None else context - config.eval_sample_length
    prompts = [prompt for prompt in different if room is None or len(prompt) <= room][: config.eval_samples]
    return HeldoutSamples(config, roles, tokenizer, prompts) if prompts else None
