"""The policy's responses to a few held-out prompts at each evaluation of SFT and DPO; written to `samples.jsonl`."""

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

PREFIX_LENGTH = 8  # tokens at the start of a text without a prompt that are used as its prompt

# type of an example -> its sequence that starts with the prompt
SEQUENCES: dict[type, Callable[[Any], TokenSequence]] = {
    TokenSequence: lambda sequence: sequence,
    PreferencePair: lambda pair: pair.chosen,
    LabelledSequence: lambda labelled: labelled.sequence,
}


def prompt_of(example: object) -> tuple[int, ...]:
    """The tokens before the response; of a text without a prompt, the first `PREFIX_LENGTH` tokens."""
    sequence = SEQUENCES[type(example)](example)
    return sequence.tokens[: sequence.response_mask.index(True)] or sequence.tokens[:PREFIX_LENGTH]


@dataclass(frozen=True)
class HeldoutSampler:
    """Samples the policy's responses to a few held-out prompts.

    Each call uses the same seed, so responses differ only because the weights do. The random state of training is
    restored.
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
        """Sample one response to each prompt. Returns rows of prompt and completion, both as text."""
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
        """Prompt and completion as text. Joined, they are the decoded text of all tokens."""
        completion = text_before_end(self.tokenizer, prompt, response.tokens, finished=response.finished)
        full_text = decode([*prompt, *response.body], self.tokenizer, skip_special_tokens=True)
        return {"prompt": full_text.removesuffix(completion), "completion": completion}


def make_heldout_sampler(
    config: PolicyTrainConfig, roles: Roles, tokenizer: Any, heldout: Sequence[object]
) -> HeldoutSampler | None:
    """A sampler for the first `eval_samples` held-out prompts that leave room for a response; None without any."""
    unique_prompts = list(dict.fromkeys(map(prompt_of, heldout)))
    context = context_of(trunk_of(roles.causal_model()).config)
    limit = None if context is None else context - config.eval_sample_length
    prompts = [prompt for prompt in unique_prompts if limit is None or len(prompt) <= limit][: config.eval_samples]
    return HeldoutSampler(config, roles, tokenizer, prompts) if prompts else None
