"""One case of a training step: compared and planned, then timed in turns, then its memory in a pass of its own."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.cli import Refused
from benchmarks.harness import one_line
from benchmarks.measure import Timing, free_memory
from benchmarks.records import LIMIT, OURS, WHOLE, Case, Row
from benchmarks.render import TRL, UNSHARED
from benchmarks.train_step import dpo, phases, ppo
from benchmarks.train_step.cases import Flops, StepCase, dpo_flops
from benchmarks.train_step.dpo import SAME, DPOStepper, OnecardDPO, Task, TrlDPO, held_bytes
from benchmarks.train_step.phases import PHASES, Peaks, PhaseTimer, highest, phase_peaks
from benchmarks.train_step.synthetic import random_pairs, write_folder
from onecard.commands.fit.phases import Lengths
from onecard.commands.fit.plan import MemoryPlan, plan_memory
from onecard.config import TrainConfig
from onecard.utils.errors import OnecardError

TRL_ANSWERS, TRL_LIGER, GEMMS = "TRL, head on answers alone", "TRL + Liger's layers", "bare GEMMs"
STEPS = 8  # of different pairs, which then repeat
GEMM_FLOPS = {"cpu": 2e10, "cuda": 2e13}  # of bare products: enough to be timed, and little beside a step
TOO_MUCH = (torch.OutOfMemoryError, OnecardError)  # ours may not fit; any other error is a bug
# By which loss, rewards and gradient norm of the first step may differ: (absolute, relative). In bf16, log-probs of
# hundreds of tokens are added up, each with a rounding of its own, and a reward is a tenth of them.
CLOSE = {torch.float32: (2e-3, 1e-3), torch.bfloat16: (0.25, 0.25)}
MIXED = "lengths are drawn, and the plan is of the longest"
# `onecard fit`'s phases by their names there
PHASE_OF = {
    "rollout": phases.ROLLOUT,
    "reward pass": phases.REWARD,
    "policy pass": phases.OLD,
    "reference pass": phases.REFERENCE,
    "value pass": phases.VALUES,
    "train": phases.TRAIN,
    "optimizer step": phases.OPTIMIZER,
}
Tell = Callable[[str], None]
Build = Callable[[Task], DPOStepper]


# --- the limits: the rate of bare products, and a card's memory


class BareProducts:
    """Products of the feed-forward matrix's shape: the FLOP rate that this machine gives.

    The operands are made in `ready` and freed by the call: under a memory cap they would take a step's memory.
    """

    def __init__(self, case: StepCase, device: torch.device, dtype: torch.dtype, rows: int, step: float) -> None:
        hidden, inner = case.model.hidden, case.model.intermediate
        one = 2 * rows * hidden * inner
        self.times = max(1, int(min(GEMM_FLOPS[device.type], step) / one))
        self.flops = one * self.times
        self.make = partial(torch.randn, device=device, dtype=dtype)
        self.shapes = (rows, hidden), (inner, hidden)
        self.products: measure.Work | None = None

    def ready(self) -> None:
        """Make the operands, and warm up."""
        left, right = (self.make(*shape) for shape in self.shapes)
        measure.gemm_work(left, right, 1)()
        self.products = measure.gemm_work(left, right, self.times)

    def __call__(self) -> None:
        assert self.products is not None
        self.products()
        self.products = None


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


def config_of(case: StepCase, dtype: torch.dtype) -> TrainConfig:
    """The settings that the case trains with, of a folder that is not read."""
    nowhere = Path("no-weights")
    if case.kind == "ppo":
        return ppo.config_of(case, nowhere, dtype)
    return dpo.config_of(Task(case, nowhere, dtype))


@lru_cache
def full_plan(case: StepCase, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    from transformers import AutoConfig

    model = AutoConfig.for_model(**case.model.settings)
    return plan_memory(model, config_of(case, dtype), Lengths(case.prompt, case.response), device)


def plan_of(case: StepCase, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    """The plan of a case at its full lengths. Cases that differ in nothing that a plan depends on share one."""
    plain = replace(case, name="", memory_cap_gib=0.0, interleaved=True, mixed_lengths=False)
    return full_plan(plain, dtype, torch.device(device.type))


def too_large(case: StepCase, dtype: torch.dtype) -> str | None:
    """Why a case cannot be expected to run under its cap, if so."""
    if not case.memory_cap_gib:
        return None
    plan = plan_of(case, dtype, torch.device("cuda"))
    if plan.peak <= case.memory_cap_gib * 2**30:
        return None
    need = f"{plan.peak / 2**30:.2f} GiB in its {plan.highest.name}"
    return f"the plan has {need}, expected at most the cap of {case.memory_cap_gib:g} GiB"


def compared(task: Task, held: int | None = None, peaks: Peaks | None = None) -> list[dict[str, Any]]:
    """Peaks in bytes of each watched phase and of the whole, as planned and as measured (None: not measured).

    All at once, and above what stays between steps. `held`: bytes between steps, measured. Empty for mixed lengths.
    """
    if task.case.mixed_lengths:
        return []
    plan = plan_of(task.case, task.dtype, task.device)
    known = {PHASE_OF[phase.name]: phase for phase in plan.phases if phase.name in PHASE_OF}
    if peaks is not None:
        known = {name: phase for name, phase in known.items() if name in peaks.above}
    between = min(phase.before for phase in known.values())
    planned = {name: phase.peak for name, phase in known.items()}
    planned[WHOLE] = max(planned.values())
    above = {} if peaks is None else peaks.above
    return [
        {
            "phase": name,
            "planned": peak,
            "planned_above": peak - between,
            "measured": held + above[name] if held is not None and above else None,
            "measured_above": above.get(name),
        }
        for name, peak in planned.items()
    ]


# --- a case


def blank(case: StepCase, dtype: torch.dtype) -> Case:
    """The case without its rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.model.settings))
    return Case(
        case.kind,
        case.name,
        {"prompt": case.prompt, "response": case.response, "items": case.batch_size, "per_pass": case.micro_batch_size},
        str(dtype).removeprefix("torch."),
        about={
            "model": case.model.name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "mixed": case.mixed_lengths,
            "cap_gib": case.memory_cap_gib,
            "in_turns": case.interleaved,
            "settings": case.settings,
        },
    )


def measure_case(
    case: StepCase, device: torch.device, dtype: torch.dtype, timing: Timing, tell: Tell, names: Sequence[str] = ()
) -> Case:
    """All of a case, or of DPO these candidates. One whose plan is above its cap is refused before it begins."""
    result = blank(case, dtype)
    wrong = too_large(case, dtype)
    if wrong:
        return replace(result, refused=wrong)
    with tempfile.TemporaryDirectory() as name, capped(case.memory_cap_gib, device):
        task = task_of(case, write_folder(case.model, Path(name)), device, dtype)
        try:
            if case.kind == "dpo":
                rows, found = measure_dpo(task, names or list(candidates(device)), timing, tell)
            else:
                rows, found = measure_ppo(task, timing, tell)
            for pair in found["learned"]:
                if not all(map(math.isfinite, pair)):  # nothing measured of such a run means anything
                    raise Refused(f"loss and gradient norm of a step are {pair}")
        except Refused as error:
            return replace(result, refused=str(error), found={"learned": []})
        finally:
            free_memory()
    return replace(result, rows=tuple(rows), found=found)


def found_of(task: Task, memory: Sequence[Mapping[str, Any]] = (), side: Any = None) -> dict[str, Any]:
    """What is reported beside the rows: the plan, also where nothing was measured, and what the steps learned."""
    return {
        "memory": list(memory) or compared(task),
        "unplanned": MIXED if task.case.mixed_lengths else None,
        "learned": [] if side is None else list(side.learned),
        "shrunk": side is not None and side.cuts() != side.first_cuts,
    }


# --- DPO


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
    pairs = random_pairs(
        STEPS * case.batch_size, case.prompt, case.response, case.model.vocab, mixed=case.mixed_lengths
    )
    return Task(case, folder, dtype, device, tuple(pairs))


def check_first_steps(firsts: Mapping[str, Mapping[str, float]], dtype: torch.dtype) -> None:
    """Raise Refused where a candidate's first step is not ours."""
    absolute, relative = CLOSE[dtype]
    mine = firsts.get(OURS, {})
    for other, theirs in firsts.items():
        for name, value in mine.items():
            if not math.isclose(value, theirs[name], rel_tol=relative, abs_tol=absolute):
                raise Refused(f"{name} of the first step is {value:.6g}, and {theirs[name]:.6g} in {other}")


def step_flops(task: Task, step: int) -> int:
    """What a step cannot do without."""
    sequences = [
        (len(pair.prompt) + len(answer), len(answer))
        for pair in (task.pairs[index] for index in task.indices(step))
        for answer in (pair.chosen, pair.rejected)
    ]
    return dpo_flops(task.case.model, sequences, precomputed=task.case.precompute_ref_log_probs)


def measure_dpo(task: Task, names: Sequence[str], timing: Timing, tell: Tell) -> tuple[list[Row], dict[str, Any]]:
    """Rows and findings of candidates, in turns, or one after the other where they cannot be held at once."""
    rows: list[Row] = []
    found = found_of(task)
    firsts: dict[str, dict[str, float]] = {}
    for group in [names] if task.case.interleaved else [[name] for name in names]:
        more, ours = measure_together(task, group, firsts, timing, tell)
        rows, found = rows + more, ours or found
        free_memory()
    return rows, found


def measure_together(
    task: Task, names: Sequence[str], firsts: dict[str, dict[str, float]], timing: Timing, tell: Tell
) -> tuple[list[Row], dict[str, Any] | None]:
    """First step, rounds and memory of candidates that are in memory together. `firsts` gets their first steps."""
    case, device, known = task.case, task.device, candidates(task.device)
    sides: dict[str, DPOStepper] = {}
    reasons: dict[str, str] = {}
    tell(f"{case.name}: first step")
    for name in names:
        role, build = known[name]
        try:
            side = build(task)
            measure.ready(side)
            side()
            sides[name], firsts[name] = side, {key: side.row[key] for key in SAME}
        except Exception as error:  # a peer that cannot run stands in the table with the reason
            if role == "ours" and not isinstance(error, TOO_MUCH):
                raise
            reasons[name] = one_line(error)
    check_first_steps(firsts, task.dtype)
    longest = max(pair.tokens for pair in task.pairs)
    bare = BareProducts(case, device, task.dtype, longest, step_flops(task, 0))
    works: dict[str, list[measure.Work]] = {**{name: [side] for name, side in sides.items()}, GEMMS: [bare]}
    times = measure.interleave(works, device, timing, lambda name: tell(f"{case.name}: {name}"))
    timed = range(1 + timing.warmup, 1 + timing.warmup + len(times[GEMMS]))
    flops = tuple(step_flops(task, step) for step in timed)
    tokens = tuple(task.tokens(step) for step in timed)
    rows = [Row(name, known[name][0], reason) for name, reason in reasons.items()]
    found = None
    for name, side in sides.items():
        tell(f"{case.name}: memory of {name}")
        held = held_bytes(side.model, side.optimizer)
        if name == OURS:
            assert isinstance(side, OnecardDPO)
            peaks = phase_peaks(side.watched, device)
            peak = peaks.above[WHOLE]
            # Where others are in memory too, what is held is ours, added up.
            own = held_bytes(side.model, side.optimizer, paged=device.type == "cpu")
            between = peaks.held if len(sides) == 1 and peaks.held is not None else own
            found = found_of(task, compared(task, between, peaks), side)
        else:
            peak = measure.peak_bytes(side, device)
        more: dict[str, Any] = dict(firsts[name])
        rows.append(Row(name, known[name][0], None, tuple(times[name]), tokens, flops, peak, held, more=more))
    rows.sort(key=lambda row: names.index(row.name))
    return [*rows, Row(GEMMS, LIMIT, seconds=tuple(times[GEMMS]), flops=(bare.flops,) * len(times[GEMMS]))], found


# --- PPO


def measure_ppo(task: Task, timing: Timing, tell: Tell) -> tuple[list[Row], dict[str, Any]]:
    """Rows and findings of whole iterations, watched by phase, in turns with bare products."""
    case, device = task.case, task.device
    tell(f"{case.name}: loading")
    iterations: ppo.PPORun | None = None
    length = case.prompt + case.response
    step = case.batch_size * Flops.of(case.model, length, case.response).forward
    bare = BareProducts(case, device, task.dtype, case.micro_batch_size * length, step)
    watches: list[PhaseTimer] = []
    counts: list[dict[str, tuple[int, int]]] = []
    try:
        iterations = ppo.PPORun(case, task.folder, device, task.dtype)

        def iterate() -> None:
            watches.append(PhaseTimer(device, timing.clock))
            iterations.run(watches[-1])
            counts.append(iterations.counts())

        # The warm-up makes the optimizer's states. An iteration of a large model takes a minute: one is enough.
        timing = replace(timing, warmup=1, least=1)
        works: dict[str, list[measure.Work]] = {WHOLE: [iterate], GEMMS: [bare]}
        times = measure.interleave(works, device, timing, lambda name: tell(f"{case.name}: {name}"))
        tell(f"{case.name}: memory")
        del watches[0], counts[0]
        held = held_bytes(iterations.roles, iterations.trainer.optimizer)
        # A GPU's allocator has kept the peaks of the timed iterations, at no cost.
        peaks = highest(watches) if device.type == "cuda" else phase_peaks(iterations.run, device)
    except TOO_MUCH as error:
        return [Row(WHOLE, "ours", one_line(error))], found_of(task, side=iterations)
    rows = [
        Row(
            name,
            "ours",
            seconds=tuple(timer.seconds[name] for timer in watches),
            tokens=tuple(count[name][0] for count in counts),
            flops=tuple(count[name][1] for count in counts),
            peak_bytes=peaks.above[name],
            held_bytes=held,
        )
        for name in (*PHASES, WHOLE)
    ]
    rows.append(Row(GEMMS, LIMIT, seconds=tuple(times[GEMMS]), flops=(bare.flops,) * len(watches)))
    return rows, found_of(task, compared(task, peaks.held or held, peaks), iterations)
