"""One case of a training step: compared and planned, then timed in turns, then its memory in a pass of its own."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.harness import Timing, one_line
from benchmarks.records import LIMIT, OURS, WHOLE, Case, Row
from benchmarks.render import TRL, UNSHARED
from benchmarks.train_step import dpo, ppo
from benchmarks.train_step.cases import Flops, StepCase, dpo_flops
from benchmarks.train_step.dpo import SAME, DPOStepper, OnecardDPO, Task, TrlDPO, free_memory, held_bytes
from benchmarks.train_step.phases import (
    OLD,
    OPTIMIZER,
    PHASES,
    REFERENCE,
    REWARD,
    ROLLOUT,
    TRAIN,
    VALUES,
    Peaks,
    PhaseTimer,
    highest,
    phase_peaks,
)
from benchmarks.train_step.synthetic import random_pairs, write_folder
from onecard.commands.fit.phases import Lengths
from onecard.commands.fit.plan import MemoryPlan, plan_memory
from onecard.config import TrainConfig
from onecard.utils.errors import OnecardError

TRL_ANSWERS, TRL_LIGER, GEMMS = "TRL, head on answers alone", "TRL + Liger's layers", "bare GEMMs"
STEPS = 8  # of different pairs, which then repeat
LONG = 15.0  # seconds of a PPO iteration from which one round is enough, instead of three
GEMM_FLOPS = {"cpu": 2e10, "cuda": 2e13}  # of bare products: enough to be timed, and little beside a step
TOO_MUCH = (torch.OutOfMemoryError, OnecardError)  # ours may not fit; any other error is a bug
# By which loss, rewards and gradient norm of the first step may differ: (absolute, relative). In bf16, log-probs of
# hundreds of tokens are added up, each with a rounding of its own, and a reward is a tenth of them.
CLOSE = {torch.float32: (2e-3, 1e-3), torch.bfloat16: (0.25, 0.25)}
MIXED = "lengths are drawn, and the plan is of the longest"
# `onecard fit`'s phases by their names there
PHASE_OF = {
    "rollout": ROLLOUT,
    "reward pass": REWARD,
    "policy pass": OLD,
    "reference pass": REFERENCE,
    "value pass": VALUES,
    "train": TRAIN,
    "optimizer step": OPTIMIZER,
}
Tell = Callable[[str], None]
Build = Callable[[Task], DPOStepper]


# --- the limits: the rate of bare products, and a card's memory


class BareProducts:
    """Products of the feed-forward matrix's shape: the FLOP rate that this machine gives.

    The operands are made in `ready` and freed by the call: under a memory cap they would take a step's memory.
    """

    def __init__(self, case: StepCase, device: torch.device, dtype: torch.dtype, rows: int, step: float) -> None:
        one = 2 * rows * case.model.hidden * case.model.inner
        self.sizes, self.device, self.dtype = (rows, case.model.hidden, case.model.inner), device, dtype
        self.times = max(1, int(min(GEMM_FLOPS[device.type], step) / one))
        self.flops = one * self.times
        self.operands: tuple[torch.Tensor, ...] = ()

    def ready(self) -> None:
        """Make the operands, and warm up."""
        rows, hidden, inner = self.sizes
        left = torch.randn(rows, hidden, device=self.device, dtype=self.dtype)
        right = torch.randn(hidden, inner, device=self.device, dtype=self.dtype)
        self.operands = left, right, left @ right

    def __call__(self) -> None:
        left, right, out = self.operands
        for _ in range(self.times):
            torch.mm(left, right, out=out)
        self.operands = ()


@contextmanager
def capped(gib: float, device: torch.device) -> Iterator[None]:
    """Inside, an allocation past `gib` fails. A big card with a cap is not a consumer card: it is as fast as before."""
    if not gib or device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# --- the memory plan beside what is measured


@dataclass(frozen=True)
class Memory:
    """A phase's peak in bytes as `onecard fit` plans it and as measured (None: not measured): all at once, and above
    what stays between steps.
    """

    phase: str
    planned: int
    planned_above: int
    measured: int | None = None
    measured_above: int | None = None


def config_of(case: StepCase, dtype: torch.dtype) -> TrainConfig:
    """The settings that the case trains with, of a folder that is not read."""
    nowhere = Path("no-weights")
    if case.kind == "ppo":
        return ppo.config_of(case, nowhere, dtype)
    return dpo.config_of(Task(case, nowhere, dtype))


def plan_of(case: StepCase, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    """The plan of a case at its full lengths. Cases that differ in nothing that a plan depends on share one."""
    return cached_plan(replace(case, name="", cap_gib=0.0, in_turns=True, mixed=False), dtype, device.type)


@lru_cache
def cached_plan(case: StepCase, dtype: torch.dtype, device: str) -> MemoryPlan:
    from transformers import AutoConfig

    model = AutoConfig.for_model(**case.model.settings)
    return plan_memory(model, config_of(case, dtype), Lengths(case.prompt, case.response), torch.device(device))


def too_large(case: StepCase, dtype: torch.dtype) -> str | None:
    """Why a case cannot be expected to run under its cap, if so."""
    if not case.cap_gib:
        return None
    plan = plan_of(case, dtype, torch.device("cuda"))
    if plan.peak <= case.cap_gib * 2**30:
        return None
    need = f"{plan.peak / 2**30:.2f} GiB in its {plan.highest.name}"
    return f"the plan has {need}, expected at most the cap of {case.cap_gib:g} GiB"


def compared(plan: MemoryPlan, held: int | None = None, peaks: Peaks | None = None) -> list[Memory]:
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

    return [Memory(name, peak, peak - between, *measured(name)) for name, peak in planned.items()]


# --- a case


def blank(case: StepCase, dtype: torch.dtype) -> Case:
    """The case without its rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.model.settings))
    return Case(
        case.kind,
        case.name,
        {"prompt": case.prompt, "response": case.response, "items": case.items, "per_pass": case.per_pass},
        str(dtype).removeprefix("torch."),
        about={
            "model": case.model.name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "mixed": case.mixed,
            "cap_gib": case.cap_gib,
            "in_turns": case.in_turns,
            "settings": case.settings,
        },
    )


def measure_case(case: StepCase, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Tell) -> Case:
    """All of a case. One whose plan is above its cap is refused before it begins."""
    result = blank(case, dtype)
    wrong = too_large(case, dtype)
    if wrong:
        return replace(result, refused=wrong)
    with tempfile.TemporaryDirectory() as folder, capped(case.cap_gib, device):
        write_folder(case.model, Path(folder))
        measured = {"dpo": measure_dpo, "ppo": measure_ppo}[case.kind]
        try:
            result = measured(result, case, Path(folder), device, dtype, timing, tell)
        finally:
            free_memory()
    wrong = next((pair for pair in result.found["learned"] if not all(map(math.isfinite, pair))), None)
    if wrong:  # nothing measured of such a run means anything
        refused = f"loss and gradient norm of a step are {wrong}"
        return replace(result, rows=(), found={"learned": []}, refused=refused)
    return result


def found_of(
    case: StepCase, dtype: torch.dtype, device: torch.device, memory: Sequence[Memory], side: Any
) -> dict[str, Any]:
    """What is reported beside the rows: the plan, also where nothing was measured, and what the steps learned."""
    if not case.mixed and not memory:
        memory = compared(plan_of(case, dtype, device))
    return {
        "memory": [] if case.mixed else [asdict(each) for each in memory],
        "unplanned": MIXED if case.mixed else None,
        "learned": [] if side is None else list(side.learned),
        "shrunk": side is not None and side.cuts() != side.first_cuts,
    }


def candidates(device: torch.device) -> dict[str, tuple[str, Build]]:
    """Each candidate's role, and what makes it."""
    found: dict[str, tuple[str, Build]] = {
        OURS: ("ours", OnecardDPO),
        UNSHARED: ("ours", partial(OnecardDPO, share_prompts=False)),
        TRL: ("peer", TrlDPO),
    }
    if device.type == "cpu":  # on a GPU it does that anyway
        found[TRL_ANSWERS] = ("peer", partial(TrlDPO, answers_alone=True))
    return {**found, TRL_LIGER: ("peer", partial(TrlDPO, liger=True))}


def task_of(case: StepCase, folder: Path, device: torch.device, dtype: torch.dtype) -> Task:
    pairs = random_pairs(STEPS * case.items, case.prompt, case.response, case.model.vocab, mixed=case.mixed)
    return Task(case, folder, dtype, device, tuple(pairs))


def disagreement(mine: Mapping[str, float], theirs: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What of a first step is not the same, if anything."""
    absolute, relative = CLOSE[dtype]
    for name in SAME:
        if not math.isclose(mine[name], theirs[name], rel_tol=relative, abs_tol=absolute):
            return f"{name} of the first step is {mine[name]:.6g}, and {theirs[name]:.6g} in"
    return None


def step_flops(case: StepCase, task: Task, step: int) -> int:
    """What a step cannot do without."""
    sequences = [
        (len(pair.prompt) + len(answer), len(answer))
        for pair in (task.pairs[index] for index in task.indices(step))
        for answer in (pair.chosen, pair.rejected)
    ]
    return dpo_flops(case.model, sequences, precomputed=case.precompute_ref_log_probs)


def measure_dpo(
    result: Case, case: StepCase, folder: Path, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Tell
) -> Case:
    """All candidates in turns, or one after the other where they cannot be held at once."""
    task = task_of(case, folder, device, dtype)
    names = list(candidates(device))
    rows: list[Row] = []
    found: dict[str, Any] = found_of(case, dtype, device, (), None)
    for group in [names] if case.in_turns else [[name] for name in names]:
        more, memory, ours = measure_sides(case, task, group, timing, tell)
        rows += more
        if ours is not None:
            found = found_of(case, dtype, device, memory, ours)
        del ours
        free_memory()
    firsts = {row.name: row.more for row in rows if row.more}
    for name, first in firsts.items():
        wrong = OURS in firsts and disagreement(firsts[OURS], first, dtype)
        if wrong:
            return replace(result, found={**found, "memory": []}, refused=f"{wrong} {name}")
    return replace(result, rows=tuple(rows), found=found)


def first_steps(task: Task, builds: Mapping[str, Build]) -> tuple[dict[str, DPOStepper], dict[str, str]]:
    """Each side after its first step; or why there is none."""
    sides: dict[str, DPOStepper] = {}
    reasons: dict[str, str] = {}
    for name, build in builds.items():
        try:
            side = build(task)
            side.ready()
            side()
            sides[name] = side
        except Exception as error:  # a peer that cannot run stands in the table with the reason
            if getattr(build, "func", build) is OnecardDPO and not isinstance(error, TOO_MUCH):
                raise
            reasons[name] = one_line(error)
    return sides, reasons


def measure_sides(
    case: StepCase, task: Task, names: Sequence[str], timing: Timing, tell: Tell
) -> tuple[list[Row], list[Memory], OnecardDPO | None]:
    """First step, rounds, memory, of candidates that are in memory together. Rows, our memory by phase, and ours."""
    known = candidates(task.device)
    tell(f"{case.name}: first step")
    sides, reasons = first_steps(task, {name: known[name][1] for name in names})
    firsts = {name: {key: side.row[key] for key in SAME} for name, side in sides.items()}
    ours = sides.get(OURS)
    assert ours is None or isinstance(ours, OnecardDPO)
    if ours is not None and any(disagreement(firsts[OURS], found, task.dtype) for found in firsts.values()):
        return [Row(name, known[name][0], more=firsts[name]) for name in sides], [], ours  # the caller refuses
    bare = BareProducts(
        case, task.device, task.dtype, max(pair.tokens for pair in task.pairs), step_flops(case, task, 0)
    )
    works: dict[str, list[measure.Work]] = {**{name: [side] for name, side in sides.items()}, GEMMS: [bare]}
    times = measure.interleave(
        works,
        measure.stopwatch(task.device, timing.clock),
        repeats=timing.repeats,
        warmup=timing.warmup,
        budget=timing.budget,
        tick=lambda name: tell(f"{case.name}: {name}"),
    )
    begun, rounds = 1 + timing.warmup, len(times[GEMMS])
    flops = tuple(step_flops(case, task, step) for step in range(begun, begun + rounds))
    tokens = tuple(task.tokens(step) for step in range(begun, begun + rounds))
    rows: list[Row] = []
    memory: list[Memory] = []
    for name in names:
        if name in reasons:
            rows.append(Row(name, known[name][0], reasons[name]))
            continue
        tell(f"{case.name}: memory of {name}")
        side = sides[name]
        held = held_bytes(side.model, side.optimizer)
        if side is ours:
            peaks = phase_peaks(ours.watched, task.device)
            peak = peaks.above[WHOLE]
            if not case.mixed:
                # Where others are in memory too, what is held is ours, added up.
                alone = len(sides) == 1 and peaks.held is not None
                own = held_bytes(side.model, side.optimizer, paged=task.device.type == "cpu")
                memory = compared(plan_of(case, task.dtype, task.device), peaks.held if alone else own, peaks)
        else:
            peak = measure.peak_bytes(side, task.device)
        rows.append(Row(name, known[name][0], None, tuple(times[name]), tokens, flops, peak, held, more=firsts[name]))
    rows.append(Row(GEMMS, LIMIT, seconds=tuple(times[GEMMS]), flops=(bare.flops,) * rounds))
    return rows, memory, ours


def measure_ppo(
    result: Case, case: StepCase, folder: Path, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Tell
) -> Case:
    """Whole iterations, watched by phase, in turns with bare products."""
    tell(f"{case.name}: loading")
    iterations: ppo.PPORun | None = None
    length = case.prompt + case.response
    step = case.items * Flops.of(case.model, length, case.response).forward
    bare = BareProducts(case, device, dtype, case.per_pass * length, step)
    seconds_of = measure.stopwatch(device, timing.clock)
    limits: list[float] = []
    watches: list[PhaseTimer] = []
    counts: list[dict[str, tuple[int, int]]] = []
    try:
        iterations = ppo.PPORun(case, folder, device, dtype)
        for turn in range(-1, timing.repeats):  # the first one warms up, and makes the optimizer's states
            tell(f"{case.name}: iteration {max(turn, 0) + 1}")
            timer = PhaseTimer(device, timing.clock)
            iterations.run(timer)
            taken = seconds_of(bare)
            if turn < 0:
                continue
            limits.append(taken)
            watches.append(timer)
            counts.append(iterations.counts())
            spent = sum(each.seconds[WHOLE] for each in watches)
            least = measure.LEAST_ROUNDS if spent < LONG * len(watches) else 1
            if len(watches) >= least and spent > timing.budget:
                break
        tell(f"{case.name}: memory")
        held = held_bytes(iterations.roles, iterations.trainer.optimizer)
        # A GPU's allocator has kept the peaks of the timed iterations, at no cost.
        peaks = highest(watches) if device.type == "cuda" else phase_peaks(iterations.run, device)
    except TOO_MUCH as error:
        found = found_of(case, dtype, device, (), iterations)
        return replace(result, rows=(Row(WHOLE, "ours", one_line(error)),), found=found)
    rows = [
        Row(
            name,
            "ours",
            None,
            tuple(timer.seconds[name] for timer in watches),
            tuple(count[name][0] for count in counts),
            tuple(count[name][1] for count in counts),
            peaks.above[name],
            held,
        )
        for name in (*PHASES, WHOLE)
    ]
    limit = Row(GEMMS, LIMIT, seconds=tuple(limits), flops=(bare.flops,) * len(limits))
    memory = [] if case.mixed else compared(plan_of(case, dtype, device), peaks.held or held, peaks)
    return replace(result, rows=(*rows, limit), found=found_of(case, dtype, device, memory, iterations))
