"""What `onecard fit` finds out: a memory plan, whether it fits on the card, and settings that fit if it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onecard.algorithms.ppo.command import check_value_init
from onecard.commands.fit.cards import GIB, Card, find_card, smallest_card
from onecard.commands.fit.model import PlannedModel, find_model
from onecard.commands.fit.phases import Lengths, is_unsplittable, largest_pass
from onecard.commands.fit.plan import MemoryPlan, plan_memory
from onecard.commands.fit.search import SearchResult, flags, largest_micro_batch_tokens, search_settings
from onecard.config import FitConfig, PPOConfig, RewardConfig, TrainConfig
from onecard.models.build import check_full_training, check_is_policy
from onecard.models.folders import weights_folder
from onecard.models.load import find_source
from onecard.models.trunk import context_of
from onecard.utils.errors import OnecardError, reason
from onecard.utils.progress import say


@dataclass(frozen=True)
class FitResult:
    """The plan of a run and, if a card is given, whether the run fits on it.

    `search`: settings that fit, if those of the run do not. `micro_batch_tokens`: the largest value that fits; None
    without a card, if one example does not fit, or if the loss cannot split a batch.
    """

    model: str
    algorithm: str
    lengths: Lengths
    plan: MemoryPlan
    card: Card | None = None
    fits: bool | None = None
    search: SearchResult | None = None
    micro_batch_tokens: int | None = None


def lengths_of(fit: FitConfig, config: TrainConfig, model_config: Any) -> Lengths:
    """Planned lengths of prompt and response, in tokens. Default: the longest that the settings allow."""
    limit = context_of(model_config.get_text_config()) or config.max_length
    total = min(config.max_length, limit)
    response = config.response_length if isinstance(config, PPOConfig) else fit.response_length or total // 2
    prompt = fit.prompt_length or total - response
    if prompt + response > limit:
        raise OnecardError(
            f"prompt_length ({prompt}) and response_length ({response}) together exceed the {limit} tokens of the "
            "model's context."
        )
    if prompt < 1:
        raise OnecardError(
            f"response_length: {response} leaves no room for a prompt in {total} tokens, the smaller of max_length "
            f"({config.max_length}) and the model's context; give --prompt_length, or a larger --max_length."
        )
    return Lengths(prompt, response)


def plan_and_search(fit: FitConfig, config: TrainConfig) -> FitResult:
    """Plan a run. If it does not fit on the given card, search for settings that do."""
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
    result = FitResult(model.name, fit.algorithm, lengths, plan, card)
    if card is None:
        return result
    example_tokens, examples = largest_pass(config, lengths)

    def micro_batch_tokens(settings: TrainConfig) -> int | None:
        if is_unsplittable(settings):
            return None
        return largest_micro_batch_tokens(settings, plan_of, card, example_tokens, examples)

    if card.holds(plan.peak):
        return replace(result, fits=True, micro_batch_tokens=micro_batch_tokens(config))
    say(f"fit: {plan.peak / GIB:.2f} GiB do not fit on {card.name}; searching for settings that fit.")
    search = search_settings(config, plan_of, card, example_tokens)
    if search.config is None:
        raise OnecardError(no_fit_message(card, search))
    return replace(result, fits=False, search=search, micro_batch_tokens=micro_batch_tokens(search.config))


def planner(model: PlannedModel, lengths: Lengths, target: torch.device) -> Callable[[TrainConfig], MemoryPlan]:
    """A function that plans a run with given settings. It caches the plans."""
    plans: dict[str, MemoryPlan] = {}

    def plan_of(config: TrainConfig) -> MemoryPlan:
        key = repr(config)
        if key not in plans:
            try:
                plans[key] = plan_memory(model.config, config, lengths, target, from_adapter=model.adapter)
            except OnecardError:
                raise
            except Exception as error:  # model code that reads values raises any exception on meta tensors
                raise OnecardError(f"model: {model.name} cannot be planned: {reason(error)}") from error
        return plans[key]

    return plan_of


def no_fit_message(card: Card, search: SearchResult) -> str:
    """The error message if no settings fit on the card."""
    peak = search.plan.peak
    larger = smallest_card(peak)
    settings = flags(search.changed) or "these settings"
    hint = f"; the smallest card with that much: {larger.name} ({larger.memory // GIB} GiB)" if larger else ""
    return (
        f"card: {card.name} does not have enough memory. The smallest need that was found is "
        f"{card.needed(peak) / GIB:.2f} GiB, with {settings}{hint}."
    )
