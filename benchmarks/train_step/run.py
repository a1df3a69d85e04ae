"""Run one benchmark case: check that the first steps agree, time the candidates interleaved, then measure peak memory.

Peak memory is measured in a separate step and shown beside the plan of `onecard fit`.
"""

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
from benchmarks.train_step.dpo import COMPARED_METRICS, DPOStepper, OnecardDPO, Task, TrlDPO, held_bytes
from benchmarks.train_step.phases import PHASES, Peaks, PhaseTimer, highest, phase_peaks
from benchmarks.train_step.synthetic import random_pairs, write_folder
from onecard.commands.fit.phases import Lengths
from onecard.commands.fit.plan import MemoryPlan, plan_memory
from onecard.config import TrainConfig
from onecard.utils.errors import OnecardError

TRL_ANSWERS, TRL_LIGER, GEMMS = "TRL, head on answers alone", "TRL + Liger's layers", "bare GEMMs"
STEPS = 8  # number of steps with different data; later steps use the same pairs again
GEMM_FLOPS = {"cpu": 2e10, "cuda": 2e13}  # most FLOPs of the bare products in a round: enough to time them
DOES_NOT_FIT = (torch.OutOfMemoryError, OnecardError)  # errors of onecard that are reported; any other error is a bug
# Tolerances (absolute, relative) for loss, rewards and gradient norm of the first step. In bf16 a reward is beta (0.1)
# times a sum of hundreds of rounded log-probs.
FIRST_STEP_TOLERANCES = {torch.float32: (2e-3, 1e-3), torch.bfloat16: (0.25, 0.25)}
WHY_UNPLANNED = "lengths are random, and the plan assumes the longest"
# Phase name in `onecard fit` -> phase name in this benchmark
PHASE_OF = {
    "rollout": phases.ROLLOUT,
    "reward pass": phases.REWARD,
    "policy pass": phases.OLD,
    "reference pass": phases.REFERENCE,
    "value pass": phases.VALUES,
    "train": phases.TRAIN,
    "optimizer step": phases.OPTIMIZER,
}
Tell = Callable[[str], None]  # shows a line of progress
Build = Callable[[Task], DPOStepper]


# --- limits: the FLOP rate of bare products, and a memory cap


class BareProducts:
    """Matrix products of the feed-forward layer's shape: their FLOP rate is the limit on this machine.

    `ready` makes the operands and the call frees them, so that they take no memory from a step under a memory cap.
    """

    def __init__(self, case: StepCase, device: torch.device, dtype: torch.dtype, rows: int, step_flops: float) -> None:
        hidden, inner = case.model.hidden, case.model.intermediate
        product_flops = 2 * rows * hidden * inner
        self.times = max(1, int(min(GEMM_FLOPS[device.type], step_flops) / product_flops))
        self.flops = product_flops * self.times
        self.make = partial(torch.randn, device=device, dtype=dtype)
        self.shapes = (rows, hidden), (inner, hidden)
        self.products: measure.Work | None = None

    def ready(self) -> None:
        """Make the operands, and run one product as a warm-up."""
        left, right = (self.make(*shape) for shape in self.shapes)
        measure.gemm_work(left, right, 1)()
        self.products = measure.gemm_work(left, right, self.times)

    def __call__(self) -> None:
        assert self.products is not None
        self.products()
        self.products = None


@contextmanager
def capped(gib: float, device: torch.device) -> Iterator[None]:
    """Inside, allocating more than `gib` GiB in total fails. The cap limits memory only, not speed."""
    if not gib or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# --- planned and measured memory


def config_of(case: StepCase, dtype: torch.dtype) -> TrainConfig:
    """The case's training config. Its model path is a placeholder, because no weights are loaded."""
    placeholder = Path("no-weights")
    if case.kind == "ppo":
        return ppo.config_of(case, placeholder, dtype)
    return dpo.config_of(Task(case, placeholder, dtype))


@lru_cache
def cached_plan(case: StepCase, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    from transformers import AutoConfig

    model = AutoConfig.for_model(**case.model.settings)
    return plan_memory(model, config_of(case, dtype), Lengths(case.prompt, case.response), device)


def plan_of(case: StepCase, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    """The memory plan of a case, for its longest sequences. Cases that differ only in these fields share a plan."""
    plain = replace(case, name="", memory_cap_gib=0.0, interleaved=True, mixed_lengths=False)
    return cached_plan(plain, dtype, torch.device(device.type))


def why_too_large(case: StepCase, dtype: torch.dtype) -> str | None:
    """Why the case is expected not to fit under its memory cap; None if it fits or has no cap."""
    if not case.memory_cap_gib:
        return None
    plan = plan_of(case, dtype, torch.device("cuda"))
    if plan.peak <= case.memory_cap_gib * 2**30:
        return None
    need = f"{plan.peak / 2**30:.2f} GiB in its {plan.highest.name}"
    return f"the plan has {need}, expected at most the cap of {case.memory_cap_gib:g} GiB"


def planned_and_measured(task: Task, held: int | None = None, peaks: Peaks | None = None) -> list[dict[str, Any]]:
    """Planned and measured peak bytes of each timed phase and of the whole step. Empty for mixed lengths.

    Each peak is given as a total, and as the part above the bytes that stay allocated between steps. `held`: the
    measured number of those bytes. Measured values are None if nothing was measured.
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


# --- one case


def case_without_rows(case: StepCase, dtype: torch.dtype) -> Case:
    """The case's record, with its model and settings. Rows are added when it has been measured."""
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
    """Measure a case. `names`: the DPO candidates to measure (empty: all).

    A case whose plan is above its memory cap is refused before it begins.
    """
    result = case_without_rows(case, dtype)
    reason = why_too_large(case, dtype)
    if reason is not None:
        return replace(result, refused=reason)
    with tempfile.TemporaryDirectory() as name, capped(case.memory_cap_gib, device):
        task = task_of(case, write_folder(case.model, Path(name)), device, dtype)
        try:
            if case.kind == "dpo":
                rows, found = measure_dpo(task, names or list(candidates(device)), timing, tell)
            else:
                rows, found = measure_ppo(task, timing, tell)
            for loss_and_norm in found["learned"]:
                if not all(map(math.isfinite, loss_and_norm)):  # training diverged, so its times mean nothing
                    raise Refused(f"loss and gradient norm of a step are {loss_and_norm}")
        except Refused as error:
            return replace(result, refused=str(error), found={"learned": []})
        finally:
            free_memory()
    return replace(result, rows=tuple(rows), found=found)


def found_of(
    task: Task, memory: Sequence[Mapping[str, Any]] = (), run: OnecardDPO | ppo.PPORun | None = None
) -> dict[str, Any]:
    """What is reported beside the rows: the memory plan, and what is known of onecard's run.

    "learned": loss and gradient norm of each step. "shrunk": memory ran out, and micro-batches were made smaller.
    """
    return {
        "memory": list(memory) or planned_and_measured(task),
        "unplanned": WHY_UNPLANNED if task.case.mixed_lengths else None,
        "learned": [] if run is None else list(run.losses_and_grad_norms),
        "shrunk": run is not None and run.micro_batch_sizes() != run.first_micro_batch_sizes,
    }


# --- DPO


def candidates(device: torch.device) -> dict[str, tuple[str, Build]]:
    """Candidate -> its role ("ours" or "peer"), and the function that builds its stepper."""
    found: dict[str, tuple[str, Build]] = {
        OURS: ("ours", OnecardDPO),
        UNSHARED: ("ours", partial(OnecardDPO, share_prompts=False)),
        TRL: ("peer", TrlDPO),
    }
    if device.type == "cpu":  # on a GPU, TRL's head runs on answers alone anyway
        found[TRL_ANSWERS] = ("peer", partial(TrlDPO, answers_alone=True))
    return {**found, TRL_LIGER: ("peer", partial(TrlDPO, liger=True))}


def task_of(case: StepCase, folder: Path, device: torch.device, dtype: torch.dtype) -> Task:
    pairs = random_pairs(
        STEPS * case.batch_size, case.prompt, case.response, case.model.vocab, mixed=case.mixed_lengths
    )
    return Task(case, folder, dtype, device, tuple(pairs))


def check_first_steps(firsts: Mapping[str, Mapping[str, float]], dtype: torch.dtype) -> None:
    """Raise Refused if a candidate's first-step metrics differ from onecard's."""
    absolute, relative = FIRST_STEP_TOLERANCES[dtype]
    ours = firsts.get(OURS, {})
    for other, theirs in firsts.items():
        for name, value in ours.items():
            if not math.isclose(value, theirs[name], rel_tol=relative, abs_tol=absolute):
                raise Refused(f"{name} of the first step is {value:.6g}, and {theirs[name]:.6g} in {other}")


def dpo_step_flops(task: Task, step: int) -> int:
    """FLOPs that every implementation of the step has to do."""
    sequences = [
        (len(pair.prompt) + len(answer), len(answer))
        for pair in (task.pairs[index] for index in task.indices(step))
        for answer in (pair.chosen, pair.rejected)
    ]
    return dpo_flops(task.case.model, sequences, precomputed=task.case.precompute_ref_log_probs)


def measure_dpo(task: Task, names: Sequence[str], timing: Timing, tell: Tell) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the candidates, and `found_of` onecard's run.

    The candidates take turns or, if they do not fit in memory together, run one after the other.
    """
    rows: list[Row] = []
    found = found_of(task)
    firsts: dict[str, dict[str, float]] = {}
    for group in [names] if task.case.interleaved else [[name] for name in names]:
        group_rows, found_of_ours = measure_together(task, group, firsts, timing, tell)
        rows, found = rows + group_rows, found_of_ours or found
        free_memory()
    return rows, found


def measure_together(
    task: Task, names: Sequence[str], firsts: dict[str, dict[str, float]], timing: Timing, tell: Tell
) -> tuple[list[Row], dict[str, Any] | None]:
    """First step, times and memory of candidates that are in memory together; their rows, and `found_of` onecard's run.

    The metrics of their first steps are added to `firsts`, and must agree with those already there.
    """
    case, device, known = task.case, task.device, candidates(task.device)
    steppers: dict[str, DPOStepper] = {}
    reasons: dict[str, str] = {}  # why a candidate did not run
    tell(f"{case.name}: first step")
    for name in names:
        role, build = known[name]
        try:
            stepper = build(task)
            measure.ready(stepper)
            stepper()
            steppers[name], firsts[name] = stepper, {key: stepper.row[key] for key in COMPARED_METRICS}
        except Exception as error:  # a peer that cannot run is in the table with the reason
            if role == "ours" and not isinstance(error, DOES_NOT_FIT):
                raise
            reasons[name] = one_line(error)
    check_first_steps(firsts, task.dtype)
    longest = max(pair.tokens for pair in task.pairs)
    bare = BareProducts(case, device, task.dtype, longest, dpo_step_flops(task, 0))
    works: dict[str, list[measure.Work]] = {name: [stepper] for name, stepper in steppers.items()}
    works[GEMMS] = [bare]
    times = measure.interleave(works, device, timing, lambda name: tell(f"{case.name}: {name}"))
    first_timed = 1 + timing.warmup  # step 0 was the first step, above
    timed = range(first_timed, first_timed + len(times[GEMMS]))
    flops = tuple(dpo_step_flops(task, step) for step in timed)
    tokens = tuple(task.tokens(step) for step in timed)
    rows = [Row(name, known[name][0], reason) for name, reason in reasons.items()]
    found = None
    for name, stepper in steppers.items():
        tell(f"{case.name}: memory of {name}")
        held = held_bytes(stepper.model, stepper.optimizer)
        if name == OURS:
            assert isinstance(stepper, OnecardDPO)
            peaks = phase_peaks(stepper.timed_step, device)
            peak = peaks.above[WHOLE]
            if len(steppers) == 1 and peaks.held is not None:
                between_steps = peaks.held
            else:
                # If other candidates are in memory too, the allocator's number includes theirs: use the sum of
                # onecard's own tensors.
                between_steps = held_bytes(stepper.model, stepper.optimizer, paged=device.type == "cpu")
            found = found_of(task, planned_and_measured(task, between_steps, peaks), stepper)
        else:
            peak = measure.peak_bytes(stepper, device)
        metrics: dict[str, Any] = dict(firsts[name])
        rows.append(Row(name, known[name][0], None, tuple(times[name]), tokens, flops, peak, held, more=metrics))
    rows.sort(key=lambda row: names.index(row.name))
    return [*rows, Row(GEMMS, LIMIT, seconds=tuple(times[GEMMS]), flops=(bare.flops,) * len(times[GEMMS]))], found


# --- PPO


def measure_ppo(task: Task, timing: Timing, tell: Tell) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the phases of whole iterations, which take turns with bare products, and `found_of` the run."""
    case, device = task.case, task.device
    tell(f"{case.name}: loading")
    ppo_run: ppo.PPORun | None = None
    length = case.prompt + case.response
    step_flops = case.batch_size * Flops.of(case.model, length, case.response).forward
    bare = BareProducts(case, device, task.dtype, case.micro_batch_size * length, step_flops)
    timers: list[PhaseTimer] = []  # one for each iteration
    counts: list[dict[str, tuple[int, int]]] = []  # of each iteration: (tokens, FLOPs) by phase
    try:
        ppo_run = ppo.PPORun(case, task.folder, device, task.dtype)

        def iterate() -> None:
            timers.append(PhaseTimer(device, timing.clock))
            ppo_run.run(timers[-1])
            counts.append(ppo_run.counts())

        # One warm-up iteration, which creates the optimizer states; and only one timed iteration is required, because
        # it takes a minute with a large model.
        timing = replace(timing, warmup=1, least=1)
        works: dict[str, list[measure.Work]] = {WHOLE: [iterate], GEMMS: [bare]}
        times = measure.interleave(works, device, timing, lambda name: tell(f"{case.name}: {name}"))
        tell(f"{case.name}: memory")
        del timers[0], counts[0]  # of the warm-up
        held = held_bytes(ppo_run.roles, ppo_run.trainer.optimizer)
        # On a GPU the timers have recorded the peaks of the timed iterations too.
        peaks = highest(timers) if device.type == "cuda" else phase_peaks(ppo_run.run, device)
    except DOES_NOT_FIT as error:
        return [Row(WHOLE, "ours", one_line(error))], found_of(task, run=ppo_run)
    rows = [
        Row(
            name,
            "ours",
            seconds=tuple(timer.seconds[name] for timer in timers),
            tokens=tuple(count[name][0] for count in counts),
            flops=tuple(count[name][1] for count in counts),
            peak_bytes=peaks.above[name],
            held_bytes=held,
        )
        for name in (*PHASES, WHOLE)
    ]
    rows.append(Row(GEMMS, LIMIT, seconds=tuple(times[GEMMS]), flops=(bare.flops,) * len(timers)))
    return rows, found_of(task, planned_and_measured(task, peaks.held or held, peaks), ppo_run)
