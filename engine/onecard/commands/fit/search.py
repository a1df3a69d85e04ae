"""Searches for settings with which a run fits: memory options, those that cost least time first, and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from onecard.commands.fit.cards import Card
from onecard.commands.fit.phases import is_unsplittable
from onecard.commands.fit.plan import MemoryPlan
from onecard.config import PPOConfig, TrainConfig

PlanOf = Callable[[TrainConfig], MemoryPlan]


@dataclass(frozen=True)
class MemoryOption:
    """A setting that saves memory. `apply(config, example_tokens)` returns the config with the option turned on."""

    name: str
    apply: Callable[[TrainConfig, int], TrainConfig]


def smaller_optimizer(config: TrainConfig, example_tokens: int) -> TrainConfig:
    return replace(config, optim="paged_adamw_8bit")


def smaller_weights(config: TrainConfig, example_tokens: int) -> TrainConfig:
    return replace(config, load_in_4bit=True) if config.use_peft else config


def smaller_passes(config: TrainConfig, example_tokens: int) -> TrainConfig:
    return config if is_unsplittable(config) else replace(config, micro_batch_tokens=example_tokens)


def smaller_adapters(config: TrainConfig, example_tokens: int) -> TrainConfig:
    return replace(config, adapter_dtype="bfloat16") if config.use_peft else config


def smaller_rollout(config: TrainConfig, example_tokens: int) -> TrainConfig:
    return replace(config, local_rollout_forward_batch_size=1) if isinstance(config, PPOConfig) else config


MEMORY_OPTIONS = (
    MemoryOption("gradient_checkpointing", lambda config, example_tokens: replace(config, gradient_checkpointing=True)),
    MemoryOption("optim", smaller_optimizer),
    MemoryOption("load_in_4bit", smaller_weights),
    MemoryOption("micro_batch_tokens", smaller_passes),
    MemoryOption("local_rollout_forward_batch_size", smaller_rollout),
    MemoryOption("adapter_dtype", smaller_adapters),
    MemoryOption("activation_offloading", lambda config, example_tokens: replace(config, activation_offloading=True)),
)


MAX_PLANS = 3  # plans in `largest_micro_batch_tokens`, besides those of one example and of all


@dataclass(frozen=True)
class SearchResult:
    """The result of the search.

    `config`: settings that fit, or None if none do; `plan`: of these settings, or of those that need least memory;
    `changed`: the settings that were changed, with their new values.
    """

    config: TrainConfig | None
    plan: MemoryPlan
    changed: dict[str, object]


def search_settings(config: TrainConfig, plan_of: PlanOf, card: Card, example_tokens: int) -> SearchResult:
    """Turn on as many options of `MEMORY_OPTIONS` as the run needs to fit, in their order. `config` does not fit.

    `example_tokens`: tokens of one example, which is the smallest possible `micro_batch_tokens`.
    """
    steps = [config]  # each step has one option more than the step before
    for option in MEMORY_OPTIONS:
        changed = option.apply(steps[-1], example_tokens)
        if changed != steps[-1]:
            steps.append(changed)
    plan = plan_of(steps[-1])
    if not card.holds(plan.peak):
        return SearchResult(None, plan, changes(config, steps[-1]))
    too_few, enough = 0, len(steps) - 1  # numbers of options with which the run does not fit, and fits
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if card.holds(plan_of(steps[middle]).peak) else (middle, enough)
    return SearchResult(steps[enough], plan_of(steps[enough]), changes(config, steps[enough]))


def changes(before: TrainConfig, after: TrainConfig) -> dict[str, object]:
    """The memory options that differ, with their new values."""
    names = [option.name for option in MEMORY_OPTIONS if hasattr(after, option.name)]
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


def flags(settings: Mapping[str, object]) -> str:
    """Settings as command line flags."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in settings.items())


def largest_micro_batch_tokens(
    config: TrainConfig, plan_of: PlanOf, card: Card, example_tokens: int, num_examples: int
) -> int | None:
    """The largest `micro_batch_tokens` that fits, a multiple of `example_tokens`; None if one example does not fit.

    The peak is nearly linear in the number of tokens. A line through the plans of the smallest and the largest value
    predicts the limit, and another plan confirms it. If the peak is not linear, the search bisects.
    """

    def peak(count: int) -> int:
        return plan_of(replace(config, micro_batch_tokens=count * example_tokens)).peak

    fitting, too_many = 1, num_examples  # numbers of examples with which the run fits, and does not fit
    low, high = peak(1), peak(num_examples)
    if card.holds(high):
        return num_examples * example_tokens
    if not card.holds(low):
        return None
    # The largest peak that the card holds: card.needed(peak) == card.usable. Two points give the line `needed`.
    largest_peak = (card.usable - card.needed(0)) / (card.needed(10**9) - card.needed(0)) * 10**9
    bisect = False  # True once a plan needed more than the line predicted
    for _ in range(MAX_PLANS):
        predicted_step = max(1, int((largest_peak - low) * (too_many - fitting) / (high - low)))
        step = min(predicted_step, (too_many - fitting) // 2 if bisect else too_many - fitting - 1)
        if step < 1:
            break
        middle = peak(fitting + step)
        if not card.holds(middle):
            too_many, high, bisect = fitting + step, middle, True
            continue
        fitting, low = fitting + step, middle
    return fitting * example_tokens
