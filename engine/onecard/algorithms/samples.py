"""What a policy says to a few held-out prompts while it learns from fixed examples: for the eye, not for a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onecard.batches import LabelledSequence, PreferencePair, TokenSequence
from onecard.config import SpeakingConfig
from onecard.draws import own_draws
from onecard.metrics import Bar
from onecard.models.roles import Roles
from onecard.rollout import Sampling, end_tokens, sample_responses

Speak = Callable[[Bar], list[dict[str, Any]]]

BEGINNING = 8  # tokens of a text without a prompt that stand for one

# record -> a sequence that begins with its prompt
SEQUENCES: dict[type, Callable[[Any], TokenSequence]] = {
    TokenSequence: lambda sequence: sequence,
    PreferencePair: lambda pair: pair.chosen,
    LabelledSequence: lambda labelled: labelled.sequence,
}


def prompt_of(example: object) -> tuple[int, ...]:
    """The tokens before the first one that is learned; of a text that is learned whole, its first few."""
    sequence = SEQUENCES[type(example)](example)
    return sequence.tokens[: sequence.response_mask.index(True)] or sequence.tokens[:BEGINNING]


def speaker(config: SpeakingConfig, roles: Roles, tokenizer: Any, heldout: Sequence[object]) -> Speak | None:
    """A function that lets the policy answer `eval_samples` prompts; None if that is 0, or nothing is held out.

    It draws the same way each time, so answers differ by what was learned in between. Training draws as if it had not
    been called.
    """
    different = list(dict.fromkeys(map(prompt_of, heldout)))
    context = getattr(roles.causal_model().config.get_text_config(), "max_position_embeddings", None)
    room = None if context is None else context - config.eval_sample_length
    prompts = [prompt for prompt in different if room is None or len(prompt) <= room][: config.eval_samples]
    if not prompts:
        return None
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    ends = end_tokens(roles, tokenizer)

    def speak(bar: Bar) -> list[dict[str, Any]]:
        with bar.part("samples", len(prompts)) as part, own_draws(roles.device, config.seed, "samples"):
            rollout = sample_responses(
                roles,
                prompts,
                Sampling(config.eval_sample_length),
                ends=ends,
                pad=tokenizer.pad_token_id,
                batch_size=config.per_device_eval_batch_size,
                bar=part,
            )
        answers = [tokenizer.decode(response.body, skip_special_tokens=True) for response in rollout.responses]
        return [{"prompt": text, "completion": answer} for text, answer in zip(texts, answers, strict=True)]

    return speak
