"""Searches for settings that make a run fit: memory options, cheapest in time first, and `micro_batch_tokens`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from onecard.commands.fit.cards import Card
from onecard.commands.fit.phases import is_uncut
from onecard.commands.fit.plan import MemoryPlan
from onecard.config import PPOConfig, TrainConfig

PlanOf = Callable[[TrainConfig], MemoryPlan]


@dataclass(frozen=True)
class MemoryOption:
    """A setting that saves memory. `apply(config, rows)` turns it on; a config that has it already is unchanged."""

    name: str
    apply: Callable[[TrainConfig, int], TrainConfig]


def smaller_optimizer(config: TrainConfig, rows: int) -> TrainConfig:
    return replace(config, optim="paged_adamw_8bit")


def smaller_weights(config: TrainConfig, rows: int) -> TrainConfig:
    return replace(config, load_in_4bit=True) if config.use_peft else config


def smaller_passes(config: TrainConfig, rows: int) -> TrainConfig:
    return config if is_uncut(config) else replace(config, micro_batch_tokens=rows)


def smaller_adapters(config: TrainConfig, rows: int) -> TrainConfig:
    return replace(config, adapter_dtype="bfloat16") if config.use_peft else config


def smaller_rollout(config: TrainConfig, rows: int) -> TrainConfig:
    return replace(config, local_rollout_forward_batch_size=1) if isinstance(config, PPOConfig) else config


MEMORY_OPTIONS = (
    MemoryOption("gradient_checkpointing", lambda config, rows: replace(config, gradient_checkpointing=True)),
    MemoryOption("optim", smaller_optimizer),
    MemoryOption("load_in_4bit", smaller_weights),
    MemoryOption("micro_batch_tokens", smaller_passes),
    MemoryOption("local_rollout_forward_batch_size", smaller_rollout),
    MemoryOption("adapter_dtype", smaller_adapters),
    MemoryOption("activation_offloading", lambda config, rows: replace(config, activation_offloading=True)),
)


PLANS = 3  # plans in the search for the largest `micro_batch_tokens`, besides those of the two ends of the range


@dataclass(frozen=True)
class Fitting:
    """Settings that fit, their plan, and the changed ones with their new values. `config`: None if nothing fits."""

    config: TrainConfig | None
    plan: MemoryPlan
    changed: dict[str, object]


def make_fit(config: TrainConfig, plan_of: PlanOf, card: Card, rows: int) -> Fitting:
    """Turn on the fewest memory options, in the order of the table, that make a run fit. `config` does not fit.

    `rows`: tokens of one example, the smallest possible token budget.
    """
    steps = [config]  # each step has one option more than the step before
    for option in MEMORY_OPTIONS:
        changed = option.apply(steps[-1], rows)
        if changed != steps[-1]:
            steps.append(changed)
    plan = plan_of(steps[-1])
    if not card.holds(plan.peak):
        return Fitting(None, plan, changes(config, steps[-1]))
    few, enough = 0, len(steps) - 1  # indices of a step that does not fit and of one that fits
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if card.holds(plan_of(steps[middle]).peak) else (middle, enough)
    return Fitting(steps[enough], plan_of(steps[enough]), changes(config, steps[enough]))


def changes(before: TrainConfig, after: TrainConfig) -> dict[str, object]:
    """The memory options that differ, with their new values."""
    names = [option.name for option in MEMORY_OPTIONS if hasattr(after, option.name)]
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


def flags(settings: Mapping[str, object]) -> str:
    """Settings as command line flags."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in settings.items())


def largest_tokens(config: TrainConfig, plan_of: PlanOf, card: Card, rows: int, examples: int) -> int | None:
    """The largest `micro_batch_tokens` that fits, a multiple of the `rows` tokens of an example; None if one does not.

    The peak is nearly linear in the number of tokens: a line through two plans gives the limit, and another plan
    confirms it. Where the peak is not linear, the search bisects.
    """

    def peak(count: int) -> int:
        return plan_of(replace(config, micro_batch_tokens=count * rows)).peak

    fits, most = 1, examples
    low, high = peak(1), peak(examples)
    if card.holds(high):
        return examples * rows
    if not card.holds(low):
        return None
    bisect = False  # after a plan above the line: e.g. a step has no more examples, but passes without gradients grow
    for _ in range(PLANS):
        largest_peak = (card.usable - card.needed(0)) / (card.needed(10**9) - card.needed(0)) * 10**9
        linear = max(1, int((largest_peak - low) * (most - fits) / (high - low)))
        step = min(linear, (most - fits) // 2 if bisect else most - fits - 1)
        if step < 1:
            break
        tried = peak(fits + step)
        if not card.holds(tried):
            most, high, bisect = fits + step, tried, True
            continue
        fits, low = fits + step, tried
    return fits * rows
