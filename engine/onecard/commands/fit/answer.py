"""The answer of `onecard fit` to settings and a card: a memory plan, and settings that fit if those given do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onecard.algorithms.ppo.command import check_value_init
from onecard.commands.fit.cards import GIB, Card, find_card, smallest_card
from onecard.commands.fit.model import PlannedModel, find_model
from onecard.commands.fit.phases import Lengths, is_uncut, rows_of
from onecard.commands.fit.plan import MemoryPlan, plan_memory
from onecard.commands.fit.search import Fitting, flags, largest_tokens, make_fit
from onecard.config import FitConfig, PPOConfig, RewardConfig, TrainConfig
from onecard.models.build import check_full_training, check_is_policy
from onecard.models.folders import weights_folder
from onecard.models.load import find_source, reason
from onecard.models.trunk import context_of
from onecard.utils.errors import OnecardError
from onecard.utils.progress import say


@dataclass(frozen=True)
class Answer:
    """The plan of a run and, where a card is given, whether the card holds it.

    `fitting`: changed settings that fit, where those given do not. `tokens`: largest `micro_batch_tokens` that fits;
    None without a card, if one example does not fit, and for losses that do not split a batch.
    """

    model: str
    algorithm: str
    lengths: Lengths
    plan: MemoryPlan
    card: Card | None = None
    fits: bool | None = None
    fitting: Fitting | None = None
    tokens: int | None = None


def lengths_of(fit: FitConfig, config: TrainConfig, model: Any) -> Lengths:
    """Planned lengths of prompt and response, in tokens. Default: the longest that the settings allow."""
    limit = context_of(model.get_text_config()) or config.max_length
    total = min(config.max_length, limit)
    response = config.response_length if isinstance(config, PPOConfig) else fit.response_length or total // 2
    prompt = fit.prompt_length or total - response
    if prompt + response > limit:
        raise OnecardError(
            f"prompt_length: {prompt} and response_length {response} are more than the {limit} tokens of the model."
        )
    if prompt < 1:
        raise OnecardError(
            f"response_length: {response} leaves no room for a prompt in {total} tokens, the smaller of max_length "
            f"({config.max_length}) and the model's context; give --prompt_length, or a larger --max_length."
        )
    return Lengths(prompt, response)


def answer(fit: FitConfig, config: TrainConfig) -> Answer:
    """Plan a run; where a card is given, search for settings that fit on it."""
    card = find_card(fit.card) if fit.card else None
    model = find_model(config.model)
    if not isinstance(config, RewardConfig) and weights_folder(Path(config.model)).is_dir():
        check_is_policy(find_source(config.model))
    check_full_training(config, adapter=model.adapter)
    config.validate()
    if isinstance(config, PPOConfig):
        check_value_init(config)
    lengths = lengths_of(fit, config, model.config)
    plan_of = planner(model, lengths, torch.device(fit.device))
    plan = plan_of(config)
    base_answer = Answer(model.name, fit.algorithm, lengths, plan, card)
    if card is None:
        return base_answer
    rows, examples = rows_of(config, lengths)

    def tokens_of(settings: TrainConfig) -> int | None:
        return None if is_uncut(settings) else largest_tokens(settings, plan_of, card, rows, examples)

    if card.holds(plan.peak):
        return replace(base_answer, fits=True, tokens=tokens_of(config))
    say(f"fit: {plan.peak / GIB:.2f} GiB is too much for {card.name}; looking for settings that fit.")
    fitting = make_fit(config, plan_of, card, rows)
    if fitting.config is None:
        raise OnecardError(too_little(card, fitting))
    return replace(base_answer, fits=False, fitting=fitting, tokens=tokens_of(fitting.config))


def planner(model: PlannedModel, lengths: Lengths, target: torch.device) -> Callable[[TrainConfig], MemoryPlan]:
    """A function from settings to their plan, with a cache."""
    plans: dict[str, MemoryPlan] = {}

    def plan_of(config: TrainConfig) -> MemoryPlan:
        key = repr(config)
        if key not in plans:
            try:
                plans[key] = plan_memory(model.config, config, lengths, target, from_adapter=model.adapter)
            except OnecardError:
                raise
            except Exception as error:  # model code may raise any exception on meta tensors, which have no values
                raise OnecardError(f"model: {model.name} cannot be planned: {reason(error)}") from error
        return plans[key]

    return plan_of


def too_little(card: Card, fitting: Fitting) -> str:
    """The error message where no settings fit on the card."""
    peak = fitting.plan.peak
    larger = smallest_card(peak)
    what = flags(fitting.changed) or "these settings"
    where = f"; the smallest card that would hold it: {larger.name} ({larger.memory // GIB} GiB)" if larger else ""
    return (
        f"card: {card.name} is too little. The least that was found is {card.needed(peak) / GIB:.2f} GiB, with {what}"
        f"{where}."
    )
