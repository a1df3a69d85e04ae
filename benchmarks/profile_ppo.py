"""`python -m benchmarks.profile_ppo`: a PPO iteration by phase and operator, and its largest avoidable costs.

One warmed-up iteration runs by the stopwatch and one under the profiler. Seconds are the stopwatch's; the profiler says
what they went into. On a GPU an operator is a kernel with the operator that launched it, and the GPU's own time counts;
on a CPU it is the operator's self time. Costs follow from rules, the same for every phase:

    seconds of a phase = waits + copies + sampling + dequantisation + attention + products + all other operators
    products = what the FLOP count asks for at the measured rate + FLOPs beyond the count + products slower than that

Attention and the products that the count asks for are not avoidable; everything else is listed. Of a rollout, whose
steps read all weights for one token a row, products need the time of that reading.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from benchmarks import cli, measure, render
from benchmarks.harness import one_line
from benchmarks.records import WHOLE, Case, Row
from benchmarks.rollout import bandwidth, weight_bytes
from benchmarks.train_step.cases import Flops, StepCase, select_cases
from benchmarks.train_step.dpo import quiet
from benchmarks.train_step.phases import MARK, PHASES, ROLLOUT, PhaseTimer
from benchmarks.train_step.ppo import PPORun
from benchmarks.train_step.run import DOES_NOT_FIT, BareProducts, capped, case_without_rows
from benchmarks.train_step.synthetic import write_folder

TOP = 12  # operators of a phase, and costs of an iteration
LONGEST = 64  # tokens of an answer in the profiled rollout

# --- a profile in numbers

LAUNCHES = re.compile(r"^(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|MemcpyAsync|MemsetAsync)")
SYNCHRONISATIONS = re.compile(r"^cuda(Stream|Event)Synchronize")  # a device's synchronisation is the stopwatch's own


@dataclass(frozen=True)
class Operator:
    """All calls of an operator, or of a kernel on a GPU: its own seconds, and the FLOPs of products where known."""

    seconds: float = 0.0
    count: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Digest:
    """A profiled piece of work, and the seconds it took under the profiler."""

    operators: dict[str, Operator]
    flops: float = 0.0
    launches: int = 0
    synchronisations: int = 0
    seconds: float = 0.0


def profiled(work: Callable[[], Any], device: torch.device) -> Digest:
    """The digest of a call. Nothing else is kept of the profile: an iteration on a GPU is a million events."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, with_flops=True) as profile:
        seconds = measure.stopwatch(device)(work)
    operators: dict[str, Operator] = {}
    flops, counts = 0, {LAUNCHES: 0, SYNCHRONISATIONS: 0}
    for row in profile.key_averages():
        if row.key.startswith(MARK) or getattr(row, "is_user_annotation", False):
            continue  # phase marks cover the operators inside them
        is_kernel = row.device_type == torch.autograd.DeviceType.CUDA
        flops += 0 if is_kernel else row.flops
        for pattern in counts:
            counts[pattern] += 0 if is_kernel or not pattern.match(row.key) else row.count
        if is_kernel == on_gpu:
            own = row.self_device_time_total if on_gpu else row.self_cpu_time_total
            name = short(row.key) if on_gpu else row.key.removeprefix("autograd::engine::evaluate_function: ")
            before = operators.get(name, Operator())
            operators[name] = Operator(before.seconds + own / 1e6, before.count + row.count, before.flops + row.flops)
    return Digest(operators, flops, *counts.values(), seconds)


def short(kernel: str) -> str:
    """A kernel's name without its types: templates are longer than a page."""
    plain = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    inner = re.search(r"(\w*(?:Functor|_kernel_cuda|Cat\w+))", plain[plain.find("<") :] if "<" in plain else "")
    head = re.split(r"[<(]", plain)[0].rpartition("::")[2]
    return f"{head} {inner.group(1)}"[:80] if inner and inner.group(1) != head else head[:80]


# --- the rules

# The first that matches an operator's name decides
RULES = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("attention", r"scaled_dot_product|flash|efficient_attention|fmha|FlexAttention|attention"),
        ("dequantisation of the 4-bit base", r"dequant"),
        ("concatenation, as of the cache of keys and values", r"\bcat\b|CatArray|aten::stack"),
        (
            "drawing tokens, and log-probabilities",
            r"multinomial|exponential|log_softmax|searchsorted|cumsum|\bsort\b|topk|argmax",
        ),
        ("selections of rows", r"aten::index|gather|scatter|embedding"),
        ("products", r"\b(mm|addmm|bmm|baddbmm|linear|matmul|addmv|mv|dot)_?\b|gemm|gemv|cutlass|nvjet|xmma|cublas"),
        ("copies and casts", r"copy|Memcpy|to_copy|contiguous|clone|Memset|zero_|fill_"),
        (
            "views and allocations: dispatch alone",
            r"^(aten::)?(t|transpose|view|_unsafe_view|reshape|_reshape_alias|as_strided|unsqueeze|squeeze|slice|expand|"
            r"detach|permute|select|split\w*|narrow|alias|empty\w*|new_empty\w*|resize_|resolve_\w+|to|chunk|unbind)$",
        ),
        ("optimizer", r"adam|optimizer|foreach|lerp|addcdiv|addcmul"),
    )
)
OTHER = "elementwise and other operators"
WAITS = {False: "outside of any operator: Python", True: "the GPU waits for its next kernel: launches and Python"}
BEYOND = "products beyond the count: what is recomputed, or run on padding"
SLOW = "products slower than bare ones, or than the reading of weights"


def kind(operator: str) -> str:
    return next((name for name, pattern in RULES if pattern.search(operator)), OTHER)


def phase_row(
    name: str, seconds: float, count: tuple[int, int], part: float, digest: Digest, rate: float, *, on_gpu: bool,
    reading: float = 0.0,
) -> tuple[Row, dict[str, float]]:  # fmt: skip
    """A phase by the stopwatch with its operators, and the seconds of its avoidable costs.

    `count`: tokens, and FLOPs that it cannot do without. `digest` is of a part that takes `part` seconds without the
    profiler, in which the part's weights can be read in `reading`. `rate`: FLOP/s of bare products.
    """
    tokens, flops = count
    scale = seconds / part if part else 0.0  # from what was profiled to the timed phase
    total = sum(each.seconds for each in digest.operators.values())
    # A profiler slows the host down, operators and what is between them alike, and not a GPU's kernels: those are held
    # against the seconds without it.
    whole = part if on_gpu else digest.seconds
    busy = min(total / whole, 1.0) if whole else 0.0
    factor = busy * seconds / total if total else 0.0  # from an operator's profiled seconds to those of the phase
    costs: dict[str, float] = {}
    for operator, each in digest.operators.items():
        costs[kind(operator)] = costs.get(kind(operator), 0.0) + each.seconds * factor
    products, done = costs.pop("products", 0.0), digest.flops * scale
    costs.pop("attention", None)
    costs[WAITS[on_gpu]] = (1 - busy) * seconds
    costs[BEYOND] = 0.0 if reading else max(done - flops, 0.0) / rate
    costs[SLOW] = products - max(done / rate, reading * scale)
    top = sorted(digest.operators.items(), key=lambda item: -item[1].seconds)[:TOP]
    operators = [
        {"name": operator, "kind": kind(operator), "seconds": each.seconds * factor, "count": each.count * scale,
         "flops": each.flops * scale}
        for operator, each in top
    ]  # fmt: skip
    more = {"busy": busy, "profiled": part / seconds, "operators": operators}
    if on_gpu:
        more |= {"launches": digest.launches * scale, "synchronisations": digest.synchronisations * scale}
    share = flops / seconds / rate if flops else None
    row = Row(name, "ours", seconds=(seconds,), tokens=(tokens,), flops=(flops,), of_limit=share, more=more)
    return row, {what: taken for what, taken in costs.items() if taken > 0}


# --- an iteration


@dataclass
class PhaseProfiler(PhaseTimer):
    """Profiles the first occurrence of each wanted phase."""

    wanted: tuple[str, ...] = ()
    found: dict[str, Digest] = field(default_factory=dict)

    def wrap(self, name: str | Callable[..., str], work: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            phase = name if isinstance(name, str) else name(*arguments, **keywords)
            if phase not in self.wanted or phase in self.found:
                return work(*arguments, **keywords)
            results: list[Any] = []
            self.found[phase] = profiled(lambda: results.append(work(*arguments, **keywords)), self.device)
            return results[0]

        return watched

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


def measured(case: StepCase, device: torch.device, dtype: torch.dtype, tell: Callable[[str], None]) -> Case:
    """Warm up, time an iteration, then profile one; of the rollout, one with answers of at most LONGEST tokens."""
    with tempfile.TemporaryDirectory() as folder, capped(case.memory_cap_gib, device):
        write_folder(case.model, Path(folder))
        tell("loading")
        iterations = PPORun(case, Path(folder), device, dtype)
        sampler = iterations.job.sampler
        few = replace(sampler, sampling=replace(sampler.sampling, max_new_tokens=min(case.response, LONGEST)))
        short = mock.patch.object(iterations.job, "sampler", few)
        tell("a first iteration, which is not timed")
        with short:
            iterations.run(PhaseTimer(device))
        tell("the stopwatch")
        timer, short_timer = PhaseTimer(device), PhaseTimer(device)
        iterations.run(timer)
        counts = iterations.counts()
        rate, copies = product_rate(case, device, dtype), bandwidth(device)
        tell("the profiler")
        profiler = PhaseProfiler(device, wanted=tuple(name for name in PHASES if name != ROLLOUT))
        start = time.perf_counter()
        iterations.run(profiler, again=True)
        again, profiled_seconds = iterations.counts(), time.perf_counter() - start
        # After another update a few sampled tokens may differ.
        parts = {name: timer.first[name] * again[name][0] / counts[name][0] for name in profiler.found}
        tell("the profiler: the rollout")
        profiler.wanted = (ROLLOUT,)
        with short:
            iterations.run(short_timer, again=True)
            iterations.run(profiler, again=True)
        parts[ROLLOUT] = short_timer.first[ROLLOUT]
        reading = decode_steps(iterations) * weight_bytes(iterations.roles.causal_model()) / copies
    rows, costs = [], []
    for name in PHASES:
        row, found = phase_row(
            name, timer.seconds[name], counts[name], parts[name], profiler.found[name], rate,
            on_gpu=device.type == "cuda", reading=reading if name == ROLLOUT else 0.0,
        )  # fmt: skip
        rows.append(row)
        costs += [{"phase": name, "what": what, "seconds": taken} for what, taken in found.items()]
    return replace(
        case_without_rows(case, dtype),
        rows=(*rows, Row(WHOLE, "ours", seconds=(timer.seconds[WHOLE],))),
        found={
            "profiled_seconds": profiled_seconds,
            "rate": rate,  # FLOP/s of bare products
            "bandwidth": copies,  # bytes/s of a plain copy
            "costs": sorted(costs, key=lambda cost: -cost["seconds"])[:TOP],
        },
    )


def decode_steps(iterations: PPORun) -> int:
    """Decoding steps of a rollout in batches: at least the longest answer's of each batch."""
    answers = sorted((len(each.sampling_logprobs) for each in iterations.episodes), reverse=True)
    batches = -(-len(answers) // iterations.config.local_rollout_forward_batch_size)
    return max(1, batches) * answers[0]


def product_rate(case: StepCase, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of bare products of a micro-batch's rows."""
    length = case.prompt + case.response
    rows = max(case.micro_batch_size * length, case.micro_batch_tokens)
    step = case.batch_size * Flops.of(case.model, length, case.response).forward
    bare, seconds = BareProducts(case, device, dtype, rows, step), measure.stopwatch(device)
    return bare.flops / statistics.median(seconds(bare) for _ in range(5))


@click.command(context_settings=cli.SETTINGS)
@click.option("--case", "case_name", default="", help="A PPO case of benchmarks.train_step. Default: the first.")
@click.option("--smoke", is_flag=True, help="A GPU's case at tiny sizes: shows that it runs, and measures nothing.")
@cli.options()
def command(options: cli.Options, case_name: str, smoke: bool) -> None:
    """One warmed-up PPO iteration by the stopwatch, and one under the profiler.

    Seconds are the stopwatch's. The profiler says what they went into: operators by their own time, on a GPU kernels,
    how long the GPU was idle, and which costs are avoidable by rule.
    """
    device = options.device
    case = select_cases(device.type, ["ppo"], [case_name] if case_name else [], smoke=smoke)[0]
    quiet()
    dtype = torch.bfloat16 if smoke or device.type == "cuda" else torch.float32
    recorder = options.recorder("ppo-profile", 1, quick=smoke, name=case.name)
    try:
        render.run(recorder, [case], lambda case, tell: measured(case, device, dtype, tell))
    except DOES_NOT_FIT as error:
        raise click.ClickException(f"--case {case.name!r}: {one_line(error)}") from None


if __name__ == "__main__":
    sys.exit(cli.main(command))
