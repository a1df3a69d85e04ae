"""Which settings make a run fit: levers tried in order of what they cost in time, and the largest budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from onecard.commands.fit.cards import Card
from onecard.commands.fit.phases import is_uncut
from onecard.commands.fit.plan import Plan
from onecard.config import PPOConfig, TrainConfig

PlanOf = Callable[[TrainConfig], Plan]


@dataclass(frozen=True)
class Lever:
    """A setting that takes less memory: `pulled(config, rows)` gives it, or the same config where it is pulled."""

    name: str
    pulled: Callable[[TrainConfig, int], TrainConfig]


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


LEVERS = (
    Lever("gradient_checkpointing", lambda config, rows: replace(config, gradient_checkpointing=True)),
    Lever("optim", smaller_optimizer),
    Lever("load_in_4bit", smaller_weights),
    Lever("micro_batch_tokens", smaller_passes),
    Lever("local_rollout_forward_batch_size", smaller_rollout),
    Lever("adapter_dtype", smaller_adapters),
    Lever("activation_offloading", lambda config, rows: replace(config, activation_offloading=True)),
)


PLANS = 3  # in search of the largest budget, beside its two ends


@dataclass(frozen=True)
class Fitting:
    """Settings that fit, their plan, and which of them were changed; `config` None where nothing fits."""

    config: TrainConfig | None
    plan: Plan
    changed: dict[str, object]


def make_fit(config: TrainConfig, plan_of: PlanOf, card: Card, rows: int) -> Fitting:
    """Pull as few levers as make a run fit, from the first on. The run as it is does not fit.

    `rows`: tokens of one example, the smallest budget there is.
    """
    steps = [config]  # each with one lever more
    for lever in LEVERS:
        pulled = lever.pulled(steps[-1], rows)
        if pulled != steps[-1]:
            steps.append(pulled)
    plan = plan_of(steps[-1])
    if not card.holds(plan.peak):
        return Fitting(None, plan, changes(config, steps[-1]))
    few, enough = 0, len(steps) - 1  # too few levers, and enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if card.holds(plan_of(steps[middle]).peak) else (middle, enough)
    return Fitting(steps[enough], plan_of(steps[enough]), changes(config, steps[enough]))


def changes(before: TrainConfig, after: TrainConfig) -> dict[str, object]:
    """Settings of the levers that differ, with their new values."""
    names = [lever.name for lever in LEVERS if hasattr(after, lever.name)]
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


def flags(settings: Mapping[str, object]) -> str:
    """Settings as they are written on the command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in settings.items())


def largest_tokens(config: TrainConfig, plan_of: PlanOf, card: Card, rows: int, examples: int) -> int | None:
    """The most `micro_batch_tokens` that fit, in whole examples of `rows` tokens; None if one is too much.

    What a phase holds is nearly a straight line in the number of tokens: from two points it is known where the limit is
    crossed, and what is found is planned to be sure. Where the line has a bend, halves are tried.
    """

    def peak(count: int) -> int:
        return plan_of(replace(config, micro_batch_tokens=count * rows)).peak

    fits, most = 1, examples
    low, high = peak(1), peak(examples)
    if card.holds(high):
        return examples * rows
    if not card.holds(low):
        return None
    bent = False  # such as where a step has no more examples, and passes without gradients go on growing
    for _ in range(PLANS):
        room = (card.usable - card.needed(0)) / (card.needed(10**9) - card.needed(0)) * 10**9
        chord = max(1, int((room - low) * (most - fits) / (high - low)))
        step = min(chord, (most - fits) // 2 if bent else most - fits - 1)
        if step < 1:
            break
        height = peak(fits + step)
        if not card.holds(height):
            most, high, bent = fits + step, height, True
            continue
        fits, low = fits + step, height
    return fits * rows
