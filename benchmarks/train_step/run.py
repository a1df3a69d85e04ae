"""Measuring one case: right first, then in turns, then memory in a pass of its own."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.records import LIMIT
from benchmarks.train_step import ppo
from benchmarks.train_step.cases import Case, Flops, dpo_flops
from benchmarks.train_step.dpo import SAME, Ours, Side, Task, forget, held_bytes
from benchmarks.train_step.material import draw_pairs, write_folder
from benchmarks.train_step.peer import Theirs
from benchmarks.train_step.results import OURS, Result, Row
from onecard.errors import OnecardError

UNSHARED, TRL = "onecard, prompts not shared", "TRL"
TRL_ANSWERS, TRL_LIGER, GEMMS = "TRL, head on answers alone", "TRL + Liger's layers", "bare GEMMs"
STEPS = 8  # of pairs that differ; then they come again
# By which loss, rewards and gradient norm of the first step may differ: absolutely, and relative to themselves. In
# bf16, log-probs of hundreds of tokens are added up, each with a rounding of its own, and a reward is a tenth of them.
CLOSE = {torch.float32: (2e-3, 1e-3), torch.bfloat16: (0.25, 0.25)}
GEMM_FLOPS = {"cpu": 2e10, "cuda": 2e13}  # enough to be timed, and little beside a step; of small steps as many


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
    settings = {
        "micro_batch_tokens": case.micro_batch_tokens,
        "adapter_dtype": str(dtype).removeprefix("torch."),
    }
    found: dict[str, tuple[str, Build]] = {
        OURS: ("ours", partial(Ours, **settings)),
        UNSHARED: ("ours", partial(Ours, share_prompts=False, **settings)),
        TRL: ("peer", Theirs),
    }
    if device.type == "cpu":  # on a GPU it does that anyway
        found[TRL_ANSWERS] = ("peer", partial(Theirs, answers_alone=True))
    return {**found, TRL_LIGER: ("peer", partial(Theirs, liger=True))}


def gemm(case: Case, device: torch.device, dtype: torch.dtype, rows: int, step: float) -> tuple[measure.Work, int]:
    """Bare products of the feed-forward matrix's shape, and their FLOPs: the rate that this machine gives."""
    model = case.model
    left = torch.randn(rows, model.hidden, device=device, dtype=dtype)
    right = torch.randn(model.hidden, model.inner, device=device, dtype=dtype)
    out = torch.empty(rows, model.inner, device=device, dtype=dtype)
    one = 2 * rows * model.hidden * model.inner
    times = max(1, int(min(GEMM_FLOPS[device.type], step) / one))

    def run() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return run, one * times


def reason(error: BaseException) -> str:
    """One line of why something could not run."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")


@contextmanager
def capped(gib: float, device: torch.device) -> Iterator[None]:
    """Inside, an allocation past `gib` fails. A big card with a cap is not a consumer card: it is as fast as before."""
    if not gib or device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(
        gib * 2**30 / torch.cuda.get_device_properties(device).total_memory, device
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def disagreement(mine: Mapping[str, float], theirs: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What of a first step is not the same, if anything."""
    absolute, relative = CLOSE[dtype]
    for name in SAME:
        if not math.isclose(mine[name], theirs[name], rel_tol=relative, abs_tol=absolute):
            return f"{name} of the first step is {mine[name]:.6g}, and {theirs[name]:.6g} in"
    return None


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
    """All of a case."""
    with tempfile.TemporaryDirectory() as folder, capped(case.cap_gib, device):
        write_folder(case.model, Path(folder))
        measured = {"dpo": measure_dpo, "ppo": measure_ppo}[case.kind]
        try:
            return measured(case, Path(folder), device, dtype, timing, tell)
        finally:
            forget()


def task_of(case: Case, folder: Path, device: torch.device, dtype: torch.dtype) -> Task:
    pairs = draw_pairs(STEPS * case.items, case.prompt, case.response, case.model.vocab, mixed=case.mixed)
    return Task(
        folder,
        device,
        dtype,
        tuple(pairs),
        case.items,
        case.per_pass,
        **case.settings,
    )


def measure_dpo(
    case: Case, folder: Path, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Callable[[str], None]
) -> Result:
    """All candidates in turns, or one after the other where they cannot be held at once."""
    task = task_of(case, folder, device, dtype)
    names = list(candidates(case, device, dtype))
    groups = [names] if case.in_turns else [[name] for name in names]
    result = empty(case, dtype, parameters_of(case))
    rows: list[Row] = []
    for names in groups:
        rows += measure_sides(case, task, names, timing, tell)
        forget()
    return agreed(replace(result, rows=tuple(rows)), dtype)


def agreed(result: Result, dtype: torch.dtype) -> Result:
    """The result, or a refusal without times where ours and TRL do not do the same thing."""
    first = {row.name: row.first for row in result.rows if row.first}
    for name, found in first.items():
        wrong = OURS in first and disagreement(first[OURS], found, dtype)
        if wrong:
            return replace(result, rows=(), refused=f"{wrong} {name}")
    return result


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


def measure_sides(
    case: Case, task: Task, names: Sequence[str], timing: Timing, tell: Callable[[str], None]
) -> list[Row]:
    """Rows of candidates that are in memory together: first step, rounds, memory."""
    known = candidates(case, task.device, task.dtype)
    tell(f"{case.name}: first step")
    sides, reasons = first_steps(task, {name: known[name][1] for name in names})
    firsts = {name: {key: side.row[key] for key in SAME} for name, side in sides.items()}
    if OURS in sides and any(disagreement(firsts[OURS], found, task.dtype) for found in firsts.values()):
        return [Row(name, known[name][0], first=firsts[name]) for name in sides]  # `agreed` says what is wrong
    longest, first = max(pair.tokens for pair in task.pairs), step_flops(case, task, 0)
    bare, bare_flops = gemm(case, task.device, task.dtype, longest, first)
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
    rows = []
    for name in names:
        role = known[name][0]
        if name in reasons:
            rows.append(Row(name, role, reasons[name]))
            continue
        tell(f"{case.name}: memory of {name}")
        side = sides[name]
        held = held_bytes(side.model(), side.optimizer())
        peak = measure.peak_bytes(side, task.device)
        rows.append(Row(name, role, None, tuple(times[name]), tokens, flops, peak, held, firsts[name]))
    return [*rows, Row(GEMMS, LIMIT, None, tuple(times[GEMMS]), flops=(bare_flops,) * rounds)]


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
        return replace(result, rows=(Row(ppo.WHOLE, "ours", reason(error)),))
    length = case.prompt + case.response
    step = case.items * Flops.of(case.model, length, case.response).forward
    bare, bare_flops = gemm(case, device, dtype, case.per_pass * length, step)
    seconds_of = measure.stopwatch(device, timing.clock)
    names = (*ppo.PHASES, ppo.WHOLE)
    seconds: dict[str, list[float]] = {name: [] for name in (*names, GEMMS)}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    flops: dict[str, list[int]] = {name: [] for name in names}
    try:
        for turn in range(-1, timing.repeats):  # the first one warms up, and makes the optimizer's states
            tell(f"{case.name}: iteration {max(turn, 0) + 1}")
            watch = ppo.Watch(device, timing.clock)
            iterations.run(watch)
            taken = seconds_of(bare)
            if turn < 0:
                continue
            seconds[GEMMS].append(taken)
            counts = iterations.counts()
            for name in names:
                seconds[name].append(watch.seconds[name])
                tokens[name].append(counts[name][0])
                flops[name].append(counts[name][1])
            if turn + 1 >= measure.LEAST_ROUNDS and sum(seconds[ppo.WHOLE]) > timing.budget:
                break
        tell(f"{case.name}: memory")
        held, peaks = iterations.held(), ppo.phase_peaks(iterations.run, device)
    except TOO_MUCH as error:
        return replace(result, rows=(Row(ppo.WHOLE, "ours", reason(error)),))
    rows = [
        Row(name, "ours", None, tuple(seconds[name]), tuple(tokens[name]), tuple(flops[name]), peaks[name], held)
        for name in names
    ]
    limit = Row(GEMMS, LIMIT, None, tuple(seconds[GEMMS]), flops=(bare_flops,) * len(seconds[GEMMS]))
    return replace(result, rows=(*rows, limit))
