"""What `onecard fit` plans for a case, and how far that is from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.train_step import dpo, ppo
from benchmarks.train_step.cases import Case
from benchmarks.train_step.results import Memory
from benchmarks.train_step.watch import (
    OLD,
    OPTIMIZER,
    REFERENCE,
    REWARD,
    ROLLOUT,
    TRAIN,
    VALUES,
    WHOLE,
    Peaks,
)
from onecard.commands.fit.phases import Lengths
from onecard.commands.fit.plan import Plan, make_plan
from onecard.config import TrainConfig

MOST_OFF = 0.05  # of the measured peak
NOWHERE = Path("no-weights")
PHASE_OF = {
    "rollout": ROLLOUT,
    "reward pass": REWARD,
    "policy pass": OLD,
    "reference pass": REFERENCE,
    "value pass": VALUES,
    "train": TRAIN,
    "optimizer step": OPTIMIZER,
}
MIXED = "lengths are drawn, and the plan is of the longest"


def config_of(case: Case, dtype: torch.dtype) -> TrainConfig:
    """The settings that the case trains with, of a folder that nobody reads."""
    if case.kind == "ppo":
        return ppo.config_of(case, NOWHERE, dtype)
    return dpo.config_of(dpo.task_on(case, NOWHERE, dtype), **dpo.own_settings(case, dtype))


def plan_of(case: Case, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of a case at its full lengths. Cases that differ in nothing a plan knows of share one."""
    return made(replace(case, name="", cap_gib=0.0, in_turns=True, mixed=False), dtype, device.type)


@lru_cache
def made(case: Case, dtype: torch.dtype, device: str) -> Plan:
    from transformers import AutoConfig

    model = AutoConfig.for_model(**case.model.settings)
    return make_plan(model, config_of(case, dtype), Lengths(case.prompt, case.response), torch.device(device))


def too_large(case: Case, dtype: torch.dtype) -> str | None:
    """Why a case cannot be expected to run under its cap, if so."""
    if not case.cap_gib:
        return None
    plan = plan_of(case, dtype, torch.device("cuda"))
    if plan.peak <= case.cap_gib * 2**30:
        return None
    need = f"{plan.peak / 2**30:.2f} GiB in its {plan.highest.name}"
    return f"the plan has {need}, expected at most the cap of {case.cap_gib:g} GiB"


def compared(plan: Plan, held: int | None, peaks: Peaks | None) -> tuple[Memory, ...]:
    """A record for each phase that is watched, and for the whole. `held`: bytes between steps, measured."""
    phases = {PHASE_OF[phase.name]: phase for phase in plan.phases if phase.name in PHASE_OF}
    if peaks is not None:
        phases = {name: phase for name, phase in phases.items() if name in peaks.above}
    between = min(phase.before for phase in phases.values())
    planned = {name: phase.peak for name, phase in phases.items()}
    planned[WHOLE] = max(planned.values())

    def measured(name: str) -> tuple[int | None, int | None]:
        above = None if peaks is None else peaks.above[name]
        return (None if above is None or held is None else held + above), above

    return tuple(Memory(name, peak, peak - between, *measured(name)) for name, peak in planned.items())


def verdict(memory: Sequence[Memory]) -> str:
    """One line: which phases' peaks were planned well enough."""
    judged = {each.phase: off for each in memory if (off := each.off) is not None}
    missed = [f"{name} ({off:+.1%})" for name, off in judged.items() if abs(off) > MOST_OFF]
    if not judged:
        return f"Plan within {MOST_OFF:.0%}: nothing was measured"
    if missed:
        return f"Plan within {MOST_OFF:.0%}: missed in {', '.join(missed)}"
    return f"Plan within {MOST_OFF:.0%}: met in each phase"
