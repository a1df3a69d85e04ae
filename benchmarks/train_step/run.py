"""Measuring one case: right first, then in turns, then memory in a pass of its own."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.records import LIMIT
from benchmarks.train_step import planned, ppo
from benchmarks.train_step.agreement import agreed, disagreement
from benchmarks.train_step.cases import Case, Flops, dpo_flops
from benchmarks.train_step.dpo import SAME, Ours, Side, Task, forget, held_bytes, own_settings, task_on
from benchmarks.train_step.limits import BareProducts, capped
from benchmarks.train_step.material import draw_pairs, write_folder
from benchmarks.train_step.peer import Theirs
from benchmarks.train_step.results import OURS, Memory, Result, Row
from benchmarks.train_step.watch import PHASES, WHOLE, Peaks, Watch, highest, phase_peaks
from onecard.utils.errors import OnecardError

UNSHARED, TRL = "onecard, prompts not shared", "TRL"
TRL_ANSWERS, TRL_LIGER, GEMMS = "TRL, head on answers alone", "TRL + Liger's layers", "bare GEMMs"
STEPS = 8  # of pairs that differ; then they come again
LONG = 15.0  # seconds of a PPO iteration from which one is timed at least, and not three


@dataclass(frozen=True)
class Timing:
    """How often a step is timed: `repeats` rounds, or fewer once a case has taken `budget` seconds."""

    repeats: int
    warmup: int
    budget: float
    clock: Callable[[], float] = time.perf_counter


TOO_MUCH = (torch.OutOfMemoryError, OnecardError)  # ours may not fit; anything else is a fault of ours
Build = Callable[[Task], Side]


def candidates(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, Build]]:
    """Each candidate's role, and what makes it."""
    settings = own_settings(case, dtype)
    found: dict[str, tuple[str, Build]] = {
        OURS: ("ours", partial(Ours, **settings)),
        UNSHARED: ("ours", partial(Ours, share_prompts=False, **settings)),
        TRL: ("peer", Theirs),
    }
    if device.type == "cpu":  # on a GPU it does that anyway
        found[TRL_ANSWERS] = ("peer", partial(Theirs, answers_alone=True))
    return {**found, TRL_LIGER: ("peer", partial(Theirs, liger=True))}


def reason(error: BaseException) -> str:
    """One line of why something could not run."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")


def empty(case: Case, dtype: torch.dtype, parameters: int) -> Result:
    """The case without its rows."""
    return Result(
        kind=case.kind,
        name=case.name,
        model=case.model.name,
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        sizes={"prompt": case.prompt, "response": case.response, "items": case.items, "per_pass": case.per_pass},
        mixed=case.mixed,
        settings=case.settings,
        cap_gib=case.cap_gib,
        in_turns=case.in_turns,
    )


def parameters_of(case: Case) -> int:
    """Of the base."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        settings = AutoConfig.from_pretrained(write_folder(case.model, Path(folder)))
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(settings).parameters())


def measure_case(
    case: Case, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Callable[[str], None]
) -> Result:
    """All of a case. One whose plan is above its cap is refused before it is begun."""
    wrong = planned.too_large(case, dtype)
    if wrong:
        return replace(empty(case, dtype, parameters_of(case)), refused=wrong)
    with tempfile.TemporaryDirectory() as folder, capped(case.cap_gib, device):
        write_folder(case.model, Path(folder))
        measured = {"dpo": measure_dpo, "ppo": measure_ppo}[case.kind]
        try:
            return checked(with_plan(measured(case, Path(folder), device, dtype, timing, tell), case, device, dtype))
        finally:
            forget()


def with_plan(result: Result, case: Case, device: torch.device, dtype: torch.dtype) -> Result:
    """The plan beside what was measured; alone where nothing could be."""
    if case.mixed or result.refused:
        return replace(result, memory=(), unplanned=result.refused or planned.MIXED)
    if result.memory:
        return result
    return replace(result, memory=planned.compared(planned.plan_of(case, dtype, device), None, None))


def checked(result: Result) -> Result:
    """The result; a refusal where a step of ours came to no numbers."""
    wrong = next((pair for pair in result.learned if not all(map(math.isfinite, pair))), None)
    if wrong:  # JSON has no such numbers, and nothing measured of such a run says anything
        return replace(result, rows=(), memory=(), learned=(), refused=f"loss and gradient norm of a step are {wrong}")
    return result


def task_of(case: Case, folder: Path, device: torch.device, dtype: torch.dtype) -> Task:
    pairs = draw_pairs(STEPS * case.items, case.prompt, case.response, case.model.vocab, mixed=case.mixed)
    return task_on(case, folder, dtype, device, pairs)


def measure_dpo(
    case: Case, folder: Path, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Callable[[str], None]
) -> Result:
    """All candidates in turns, or one after the other where they cannot be held at once."""
    task = task_of(case, folder, device, dtype)
    names = list(candidates(case, device, dtype))
    groups = [names] if case.in_turns else [[name] for name in names]
    result = empty(case, dtype, parameters_of(case))
    for names in groups:
        found = measure_sides(case, task, names, timing, tell)
        result = replace(
            result,
            rows=(*result.rows, *found.rows),
            memory=result.memory or found.memory,
            learned=result.learned or found.learned,
            shrunk=result.shrunk or found.shrunk,
        )
        forget()
    return agreed(result, dtype)


def first_steps(task: Task, builds: Mapping[str, Build]) -> tuple[dict[str, Side], dict[str, str]]:
    """Each side after its first step; or why there is none."""
    sides: dict[str, Side] = {}
    reasons: dict[str, str] = {}
    for name, build in builds.items():
        try:
            side = build(task)
            side.ready()
            side()
            sides[name] = side
        except Exception as error:  # a peer that cannot run stands in the table with the reason
            if isinstance(build, partial) and build.func is Ours and not isinstance(error, TOO_MUCH):
                raise
            reasons[name] = reason(error)
    return sides, reasons


@dataclass(frozen=True)
class Measured:
    """Of candidates that are in memory together: their rows; of ours, its memory by phase and what it learned."""

    rows: list[Row]
    memory: tuple[Memory, ...] = ()
    learned: tuple[tuple[float, float], ...] = ()
    shrunk: bool = False


def measure_sides(
    case: Case, task: Task, names: Sequence[str], timing: Timing, tell: Callable[[str], None]
) -> Measured:
    """First step, rounds, memory."""
    known = candidates(case, task.device, task.dtype)
    tell(f"{case.name}: first step")
    sides, reasons = first_steps(task, {name: known[name][1] for name in names})
    firsts = {name: {key: side.row[key] for key in SAME} for name, side in sides.items()}
    if OURS in sides and any(disagreement(firsts[OURS], found, task.dtype) for found in firsts.values()):
        # `agreed` says what is wrong
        return Measured([Row(name, known[name][0], first=firsts[name]) for name in sides])
    longest, first = max(pair.tokens for pair in task.pairs), step_flops(case, task, 0)
    bare = BareProducts(case, task.device, task.dtype, longest, first)
    works: dict[str, list[measure.Work]] = {**{name: [side] for name, side in sides.items()}, GEMMS: [bare]}
    begun = 1 + timing.warmup
    times = measure.interleave(
        works,
        measure.stopwatch(task.device, timing.clock),
        repeats=timing.repeats,
        warmup=timing.warmup,
        budget=timing.budget,
        tick=lambda name: tell(f"{case.name}: {name}"),
    )
    rounds = len(times[GEMMS])
    steps = range(begun, begun + rounds)
    flops = tuple(step_flops(case, task, step) for step in steps)
    tokens = tuple(task.tokens(step) for step in steps)
    rows: list[Row] = []
    memory: tuple[Memory, ...] = ()
    for name in names:
        role = known[name][0]
        if name in reasons:
            rows.append(Row(name, role, reasons[name]))
            continue
        tell(f"{case.name}: memory of {name}")
        side = sides[name]
        held = held_bytes(side.model(), side.optimizer())
        if name == OURS and isinstance(side, Ours):
            found = phase_peaks(side.watched, task.device)
            peak, memory = found.above[WHOLE], memory_of(case, task, side, found, alone=len(sides) == 1)
        else:
            peak = measure.peak_bytes(side, task.device)
        rows.append(Row(name, role, None, tuple(times[name]), tokens, flops, peak, held, firsts[name]))
    limit = Row(GEMMS, LIMIT, None, tuple(times[GEMMS]), flops=(bare.flops,) * rounds)
    ours = sides.get(OURS)
    if not isinstance(ours, Ours):
        return Measured([*rows, limit])
    return Measured([*rows, limit], memory, tuple(ours.learned), ours.cuts() != ours.first_cuts)


def memory_of(case: Case, task: Task, side: Side, found: Peaks, *, alone: bool) -> tuple[Memory, ...]:
    """The plan beside the peaks of our step. Where others are in memory too, what is held is ours, added up."""
    if case.mixed:
        return ()
    added_up = held_bytes(side.model(), side.optimizer(), paged=task.device.type == "cpu")
    held = found.held if alone and found.held is not None else added_up
    return planned.compared(planned.plan_of(case, task.dtype, task.device), held, found)


def step_flops(case: Case, task: Task, step: int) -> int:
    """What a step cannot do without."""
    sequences = [
        (len(pair.prompt) + len(answer), len(answer))
        for pair in (task.pairs[place] for place in task.places(step))
        for answer in (pair.chosen, pair.rejected)
    ]
    return dpo_flops(case.model, sequences, precomputed=case.precompute_ref_log_probs)


def measure_ppo(
    case: Case, folder: Path, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Callable[[str], None]
) -> Result:
    """Whole iterations, watched by phase, in turns with bare products."""
    result = empty(case, dtype, parameters_of(case))
    tell(f"{case.name}: loading")
    try:
        iterations = ppo.Iterations(case, folder, device, dtype)
    except TOO_MUCH as error:
        return replace(result, rows=(Row(WHOLE, "ours", reason(error)),))
    length = case.prompt + case.response
    step = case.items * Flops.of(case.model, length, case.response).forward
    bare = BareProducts(case, device, dtype, case.per_pass * length, step)
    seconds_of = measure.stopwatch(device, timing.clock)
    limits: list[float] = []
    watches: list[Watch] = []
    counts: list[dict[str, tuple[int, int]]] = []
    try:
        for turn in range(-1, timing.repeats):  # the first one warms up, and makes the optimizer's states
            tell(f"{case.name}: iteration {max(turn, 0) + 1}")
            watch = Watch(device, timing.clock)
            iterations.run(watch)
            taken = seconds_of(bare)
            if turn < 0:
                continue
            limits.append(taken)
            watches.append(watch)
            counts.append(iterations.counts())
            spent = sum(each.seconds[WHOLE] for each in watches)
            least = measure.LEAST_ROUNDS if spent < LONG * len(watches) else 1
            if len(watches) >= least and spent > timing.budget:
                break
        tell(f"{case.name}: memory")
        held = iterations.held()
        # a GPU's allocator has kept the peaks of the timed iterations, at no cost
        peaks = highest(watches) if device.type == "cuda" else phase_peaks(iterations.run, device)
    except TOO_MUCH as error:
        row = Row(WHOLE, "ours", reason(error))
        return replace(result, rows=(row,), learned=tuple(iterations.learned))
    rows = [
        Row(
            name,
            "ours",
            None,
            tuple(watch.seconds[name] for watch in watches),
            tuple(count[name][0] for count in counts),
            tuple(count[name][1] for count in counts),
            peaks.above[name],
            held,
        )
        for name in (*PHASES, WHOLE)
    ]
    limit = Row(GEMMS, LIMIT, None, tuple(limits), flops=(bare.flops,) * len(limits))
    memory = () if case.mixed else planned.compared(planned.plan_of(case, dtype, device), peaks.held or held, peaks)
    return replace(
        result,
        rows=(*rows, limit),
        memory=memory,
        learned=tuple(iterations.learned),
        shrunk=iterations.cuts() != iterations.first_cuts,
    )
