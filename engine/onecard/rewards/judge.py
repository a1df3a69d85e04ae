"""Everything that judges a run's answers, as one function of prompts and episodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.batches import Episode, TokenSequence
from onecard.config import PPOConfig
from onecard.data import Prompt
from onecard.errors import OnecardError
from onecard.models.roles import Roles
from onecard.rewards.adapter import score_sequences
from onecard.rewards.answers import Answers
from onecard.rewards.calls import call_function
from onecard.rewards.functions import REWARD_MODEL, RewardFunction, load_function, part_names
from onecard.rewards.mixture import Scores, apply_missing_eos_penalty, combine, reward_weights
from onecard.rollout import end_tokens


@dataclass(frozen=True)
class Judge:
    """The rewards of a run: the reward adapter's role if there is one, and functions, each with its weight."""

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]
    missing_eos_penalty: float
    batch_size: int

    def scores(self, roles: Roles, tokenizer: Any, prompts: Sequence[Prompt], episodes: Sequence[Episode]) -> Scores:
        """One score for each episode, which answers the prompt at its place; an unfinished one pays its penalty."""
        parts: dict[str, list[float]] = {}
        if REWARD_MODEL in self.weights:
            ends = end_tokens(roles, tokenizer)
            sequences = [ended(episode.sequence, ends, tokenizer.eos_token_id) for episode in episodes]
            parts[REWARD_MODEL] = score_sequences(roles, sequences, batch_size=self.batch_size)
        if self.functions:
            answers = make_answers(tokenizer, prompts, episodes)
            parts |= {name: call_function(function, answers) for name, function in self.functions.items()}
        scores = combine(parts, self.weights)
        finished = [episode.finished for episode in episodes]
        return Scores(apply_missing_eos_penalty(scores.total, finished, self.missing_eos_penalty), scores.parts)


def load_judge(config: PPOConfig) -> Judge:
    """The rewards that the settings name; functions are imported now, so that a wrong name stops at once."""
    names = part_names(config.reward_funcs)
    functions = {name: load_function(address) for name, address in zip(names, config.reward_funcs, strict=True)}
    everything = [*([REWARD_MODEL] if config.reward_model_path else []), *names]
    if not everything:
        raise OnecardError(
            "--reward_model_path or --reward_funcs is missing: give a reward adapter, or a function as module:function."
        )
    weights = reward_weights(everything, config.reward_weights)
    return Judge(functions, weights, config.missing_eos_penalty, config.per_device_eval_batch_size)


def ended(sequence: TokenSequence, ends: Collection[int], eos: int) -> TokenSequence:
    """The sequence as the reward model knows texts: its training pairs end with EOS, and its score was read there.

    Without it, an answer that was cut, or that a stop token ended, would be scored at a place that was never trained.
    """
    if sequence.tokens[-1] in ends:
        return sequence
    return TokenSequence((*sequence.tokens, eos), (*sequence.response_mask, True))


def response_text(tokenizer: Any, episode: Episode) -> str:
    """The answer as text, without the token that ended it (a stop token need not be a special one)."""
    body = episode.response[:-1] if episode.finished else episode.response
    text: str = tokenizer.decode(list(body), skip_special_tokens=True)
    return text


def make_answers(tokenizer: Any, prompts: Sequence[Prompt], episodes: Sequence[Episode]) -> Answers:
    """What reward functions look at. A column that only some rows have is None for the others."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return Answers(
        prompts=tuple(prompt.text for prompt in prompts),
        completions=tuple(response_text(tokenizer, episode) for episode in episodes),
        completion_ids=tuple(episode.response for episode in episodes),
        columns={name: tuple(prompt.columns.get(name) for prompt in prompts) for name in names},
    )
