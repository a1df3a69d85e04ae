"""`onecard fit`: from settings to an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onecard.algorithms.ppo.settings import check_settings
from onecard.config import FitConfig, PPOConfig, RewardConfig, TrainConfig
from onecard.errors import OnecardError
from onecard.fit.cards import GIB, Card, context, find_card, fragmentation, smallest
from onecard.fit.model import Planned, find_model
from onecard.fit.phases import Lengths, is_uncut, rows_of
from onecard.fit.plan import Plan, make_plan
from onecard.fit.search import Fitting, flags, largest_tokens, make_fit
from onecard.metrics import say
from onecard.models.build import check_speaks, check_trained_weights
from onecard.models.load import find_source, reason
from onecard.models.trunk import context_of
from onecard.runs import weights_folder


@dataclass(frozen=True)
class Answer:
    """Whether it fits, and what would. `fitting` and `tokens` are there where a card was given."""

    model: str
    algorithm: str
    lengths: Lengths
    plan: Plan
    card: Card | None = None
    fits: bool | None = None
    fitting: Fitting | None = None
    tokens: int | None = None


def lengths_of(fit: FitConfig, config: TrainConfig, model: Any) -> Lengths:
    """How long prompts and answers are: as long as the settings allow, where nothing else is said."""
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
    """Plan a run, and where a card is given look for what fits on it."""
    card = find_card(fit.card) if fit.card else None
    found = find_model(config.model)
    if not isinstance(config, RewardConfig) and weights_folder(Path(config.model)).is_dir():
        check_speaks(find_source(config.model))
    check_trained_weights(config, adapter=found.adapter)
    if isinstance(config, PPOConfig):
        check_settings(config)
    lengths = lengths_of(fit, config, found.config)
    plan_of = planner(found, lengths, torch.device(fit.device))
    plan = plan_of(config)
    known = Answer(found.name, fit.algorithm, lengths, plan, card)
    if card is None:
        return known
    rows, examples = rows_of(config, lengths)

    def tokens_of(fitting: TrainConfig) -> int | None:
        return None if is_uncut(fitting) else largest_tokens(fitting, plan_of, card, rows, examples)

    if card.holds(plan.peak):
        return replace(known, fits=True, tokens=tokens_of(config))
    say(f"fit: {plan.peak / GIB:.2f} GiB is too much for {card.name}; looking for settings that are not.")
    fitting = make_fit(config, plan_of, card, rows)
    if fitting.config is None:
        raise OnecardError(too_little(card, fitting))
    return replace(known, fits=False, fitting=fitting, tokens=tokens_of(fitting.config))


def planner(found: Planned, lengths: Lengths, target: torch.device) -> Callable[[TrainConfig], Plan]:
    """Plans by settings, each made once."""
    plans: dict[str, Plan] = {}

    def plan_of(config: TrainConfig) -> Plan:
        key = repr(config)
        if key not in plans:
            try:
                plans[key] = make_plan(found.config, config, lengths, target, own_reference=found.adapter)
            except OnecardError:
                raise
            except Exception as error:  # a model's code raises whatever it meets where tensors have no numbers
                raise OnecardError(f"model: {found.name} cannot be planned: {reason(error)}") from error
        return plans[key]

    return plan_of


def too_little(card: Card, fitting: Fitting) -> str:
    """The error where no settings help."""
    peak = fitting.plan.peak
    larger = smallest(peak)
    what = flags(fitting.changed) or "these settings"
    where = f"; the smallest card that would hold it: {larger.name} ({larger.memory // GIB} GiB)" if larger else ""
    return (
        f"card: {card.name} is too little. The least that was found is {card.needed(peak) / GIB:.2f} GiB, with {what}"
        f"{where}."
    )


def as_json(found: Answer) -> dict[str, Any]:
    """The answer as plain data; sizes in GiB."""
    plan, card = found.plan, found.card
    record: dict[str, Any] = {
        "model": found.model,
        "algorithm": found.algorithm,
        **{f"{name}_length": value for name, value in asdict(found.lengths).items()},
        **plan_as_json(plan),
        "context_gib": gib(context()),
        "fragmentation_gib": gib(fragmentation(plan.peak)),
    }
    if card is None:
        return record
    record |= {"card": card.name, "card_gib": gib(card.memory), "usable_gib": gib(card.usable)}
    record |= {"needed_gib": gib(card.needed(plan.peak)), "fits": found.fits, "micro_batch_tokens": found.tokens}
    if found.fitting is not None:
        needed = gib(card.needed(found.fitting.plan.peak))
        record["with"] = {"settings": found.fitting.changed, **plan_as_json(found.fitting.plan), "needed_gib": needed}
    return record


def plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        "weights_gib": gib(plan.parameters),
        "trained_parameters": plan.trained,
        "peak_gib": gib(plan.peak),
        "peak_phase": plan.highest.name,
        "paged_gib": gib(plan.paged),
        "phases": {
            phase.name: {"peak_gib": gib(phase.peak), **{kind: gib(size) for kind, size in phase.parts.items()}}
            for phase in plan.phases
        },
        "seconds": round(plan.seconds, 1),
    }


def gib(size: int) -> float:
    return round(size / GIB, 4)


def run(fit: FitConfig, config: TrainConfig) -> Answer:
    """`onecard fit`."""
    found = answer(fit, config)
    if fit.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        from onecard.fit.table import print_answer

        print_answer(found)
    return found
