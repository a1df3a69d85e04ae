"""`python -m benchmarks.sanitize`: every Triton kernel under NVIDIA's compute-sanitizer, for bad addresses and races.

Each tool runs each group of kernels in a process of its own. memcheck sees reads and writes outside of what was
allocated: PyTorch's memory cache is off, so every tensor has bounds of its own. racecheck sees accesses to shared
memory without a barrier between them. Both first run a kernel with a planted fault: a tool that does not find it proves
nothing about the others.

The kernels run at small sizes full of edges: vocabularies are primes, so that no block divides them and rows begin at
any address; masks have holes, a row of a batch has no token at all, and inputs are views with strides. Their results
are compared with the torch backend. Products of the BLAS library are not checked.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import cli, records
from benchmarks.ahead import name_of
from benchmarks.cli import Refused
from benchmarks.records import Case, Recorder
from onecard_kernels import gae, linear_logprobs, logits_ppo_loss, ppo_loss, selective_log_softmax, value_loss
from onecard_kernels.launch import recording, why_not
from onecard_kernels.records import Head

# memcheck: unowned memory after every allocation; errors of the driver's API are not reported
TOOLS: dict[str, tuple[str, ...]] = {"memcheck": ("--padding", "256", "--report-api-errors", "no"), "racecheck": ()}
DRY = "interpreter"  # in the place of a tool
PLANTED = "planted fault"
READY = "kernels agree with the torch backend"
SUMMARY = re.compile(r"(?:RACECHECK SUMMARY: (\d+) hazards?|ERROR SUMMARY: (\d+) errors?)")
USUAL_PLACE = "/usr/local/cuda/bin"  # of the toolkit, which PATH need not name
AT_ONCE = 4  # processes that share the GPU; most of their time is starting Python and compiling
MOST_SECONDS = 90.0  # of one process
TAIL = 40  # lines of a log that are kept

ROUNDED = "rounded"  # outputs that were 16 bits wide
V, FEW = 1031, 257  # primes; the first is a little over a block of the smallest size
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")

Outputs = dict[str, Tensor]
GroupCase = Callable[[torch.device, str], Outputs]  # of the inputs' device and the backend


# --- planted faults


@triton.jit
def past_the_end(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """The last lane reads one element more than x has."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at + 1))


@triton.jit
def race(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All warps write different numbers into one word of shared memory, and read it, with no barrier."""
    at = tl.arange(0, BLOCK)
    read = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 cell; st.volatile.shared.b32 [cell], $1; ld.volatile.shared.b32 $0, [cell]; }",
        "=r,r",
        [tl.load(x_ptr + at)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(y_ptr + at, read)


FAULTS: dict[str, Any] = {"memcheck": past_the_end, "racecheck": race}


# --- the kernels, in groups


class Inputs:
    """Random inputs, inputs on the CPU: the same for every device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * std).to(dtype).to(self.device)

    def holes(self, *shape: int) -> Tensor:
        mask = torch.rand(*shape, generator=self.generator) > 0.3
        mask[0] = False
        return mask.to(self.device)

    def targets(self, *shape: int, below: int) -> Tensor:
        """The first and the last column among them."""
        ids = torch.randint(below, shape, generator=self.generator)
        ids.view(-1)[-1], ids.view(-1)[-2] = below - 1, 0
        return ids.to(self.device)


def selective(
    device: torch.device, backend: str, *, v: int, dtype: torch.dtype, strided: bool, entropy: bool, inplace: bool
) -> Outputs:
    inputs = Inputs(device)
    base = inputs.normal(2, 3 + strided, v, dtype=dtype, std=4.0).requires_grad_()
    logits = base[:, :-1] if strided else base * 1
    targets, mask = inputs.targets(2, 3, below=v), inputs.holes(2, 3)
    options: dict[str, Any] = {"entropy_requires_grad": entropy, "inplace_backward": inplace, "temperature": 0.7}
    out = selective_log_softmax(logits, targets, mask=mask, **options, backend=backend)
    value = out.logprobs if out.entropy is None else out.logprobs + 0.3 * out.entropy
    gradient = torch.autograd.grad((value * inputs.normal(2, 3)).sum(), base)[0]
    return {"value": value, "gradient": gradient}


EVERYTHING: dict[str, Any] = {"entropy_coef": 0.01, "kl_coef": 0.05, "dual_clip": 3.0}


def policy_of(inputs: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    names = ("old_logprobs", "advantages", "ref_logprobs", "weights")
    return {"mask": inputs.holes(*shape), **{name: inputs.normal(*shape, std=0.3) for name in names}}


def from_logits(device: torch.device, backend: str, *, v: int, dtype: torch.dtype, more: dict[str, Any]) -> Outputs:
    inputs = Inputs(device)
    logits = inputs.normal(2, 4, v, dtype=dtype, std=0.3).requires_grad_()
    given = policy_of(inputs, (2, 3))
    given["old_logprobs"] = given["old_logprobs"] - torch.tensor(float(v)).log()  # of nearly even logits
    given["ref_logprobs"] = given["ref_logprobs"] - torch.tensor(float(v)).log()
    loss, metrics = logits_ppo_loss(
        logits[:, 1:], inputs.targets(2, 3, below=v), **given, **more, temperature=0.7, backend=backend
    )
    return {**metrics, "loss": loss, "gradient": torch.autograd.grad(loss * 6, logits)[0]}


def of_tokens(device: torch.device, backend: str, *, shape: tuple[int, int], more: dict[str, Any]) -> Outputs:
    """Both losses. The policy's inputs are a transposed view."""
    inputs = Inputs(device)
    logp = inputs.normal(*shape[::-1], std=0.3).T.requires_grad_()
    entropy = inputs.normal(*shape).requires_grad_() if more else None
    loss, metrics = ppo_loss(logp, **policy_of(inputs, shape), **more, entropy=entropy, backend=backend)
    leaves = [logp] if entropy is None else [logp, entropy]
    slopes = torch.autograd.grad(loss * logp.numel(), leaves)
    values = inputs.normal(*shape).requires_grad_()
    given = (inputs.normal(*shape), inputs.normal(*shape), inputs.holes(*shape))
    critic = value_loss(values, *given, normalizer=torch.tensor(7.0, device=device) if more else None, backend=backend)
    slope = torch.autograd.grad(critic.loss * logp.numel(), values)[0]
    found = {**metrics, **critic.metrics, "loss": loss, "critic": critic.loss, "critic's gradient": slope}
    return {**found, **{f"gradient {place}": x for place, x in enumerate(slopes)}}


def estimates(device: torch.device, backend: str, *, shape: tuple[int, int], bootstrapped: bool) -> Outputs:
    inputs = Inputs(device)
    rewards, values = inputs.normal(*shape[::-1]).T, inputs.normal(shape[0], 2 * shape[1])[:, ::2]
    last = inputs.normal(shape[0]) if bootstrapped else None
    out = gae(rewards, values, inputs.holes(*shape), gamma=0.99, lam=0.9, last_values=last, backend=backend)
    return out._asdict()


def head_of(inputs: Inputs, v: int, kind: str) -> Head:
    if kind == "plain":
        return Head()
    forbidden = (torch.arange(v) % 7 == 3).to(inputs.device)
    return Head(inputs.normal(v), temperature=1.3, logit_scale=0.8, softcap=5.0, forbidden=forbidden)


def exponentials(device: torch.device, backend: str, *, dtype: torch.dtype | None, kind: str, spread: bool) -> Outputs:
    """Two tiles of one row of products, in views that are wider; `dtype` None: in place."""
    from onecard_kernels.logprob import online_softmax as online
    from onecard_kernels.logprob import triton_exp
    from onecard_kernels.logprob.online_softmax import SLOPE, TileOutputs

    function = triton_exp.exp_tile if backend == "triton" else online.exp_tile
    inputs, rows, first = Inputs(device), 5, FEW
    z, head = inputs.normal(rows, V + 4, std=4.0), head_of(inputs, V, kind)
    y = torch.tensor([0, first - 1, first, V - 1, 1 + 7 * 50]).to(device)
    state, wanted, outs = online.new_state(rows, z), TileOutputs(moment=True, square=True, direction=True), []
    state[SLOPE] = 1.0
    for part in (slice(0, first), slice(first, V)):
        tile = z[:, part]
        out = tile if dtype is None else torch.empty_like(tile, dtype=dtype)
        beside = torch.empty_like(tile, dtype=dtype or FP32) if spread else None
        function(tile, out, beside, y, part.start, state, head.columns(part), wanted)
        scale = online.statistics(state, head, wanted)
        probabilities = out.float() / scale.total.unsqueeze(1)
        outs.append(probabilities)
        if beside is not None:  # e (z - shift) of any shift, as p z
            outs.append(beside.float() / scale.total.unsqueeze(1) + probabilities * scale.shift.unsqueeze(1))
    done = online.statistics(state, head, wanted)
    assert done.entropy is not None
    assert done.log_sum_sq_probs is not None
    values = {"logprobs": done.logprobs, "entropy": done.entropy, "squares": done.log_sum_sq_probs}
    kind_of_out = ROUNDED if dtype is not None else "exponentials"
    return {**values, **{f"{kind_of_out} {place}": x for place, x in enumerate(outs)}}


def divergence(device: torch.device, backend: str, *, out: torch.dtype | None, kind: str) -> Outputs:
    from onecard_kernels.kl import torch_kl as passes
    from onecard_kernels.kl import triton as fused

    inputs, rows = Inputs(device), 5
    z, head = inputs.normal(rows, V + 4, std=4.0)[:, :V], head_of(inputs, V, kind)
    r, ref_bias = z + inputs.normal(rows, V), None if kind == "plain" else inputs.normal(V)
    into = None if out is None else z if out == FP32 else torch.empty_like(z, dtype=out)
    function = fused.kl_pass_ if backend == "triton" else passes.kl_pass_
    kl = function(z, r, head, ref_bias=ref_bias, out=into)
    return {"kl": kl} if into is None else {"kl": kl, "direction": into}


def tiles(device: torch.device, backend: str, *, dtype: torch.dtype, kind: str, splits: int | None) -> Outputs:
    """More rows than a tile has; hidden states and head in views of any strides."""
    from onecard_kernels.logprob import triton_tiled

    inputs, rows, d, v = Inputs(device), 131, 70, FEW
    hidden, weight = inputs.normal(rows, d + 3, dtype=dtype)[:, 1:-2], inputs.normal(d, v, dtype=dtype, std=0.5).T
    targets, head = inputs.targets(rows, below=v), head_of(inputs, v, kind)
    if backend == "torch":
        parts = {name: getattr(head, name) for name in ("temperature", "logit_scale", "softcap", "forbidden")}
        parts["bias"] = None if head.bias is None else head.bias.double()
        options: dict[str, Any] = {"return_entropy": True, "return_log_sum_sq_probs": True}
        found = tuple(linear_logprobs(hidden.double(), weight.double(), targets, **parts, **options, backend=backend))
    else:
        found = triton_tiled.tiled_statistics(hidden, weight, targets, head, entropy=True, sum_sq=True, splits=splits)
    return {name: x for name, x in zip(("logprobs", "entropy", "squares"), found, strict=True) if x is not None}


GROUPS: dict[str, dict[str, GroupCase]] = {
    "log-softmax": {
        "a view, entropy": partial(selective, v=V, dtype=FP32, strided=True, entropy=True, inplace=False),
        "to the last byte": partial(selective, v=V, dtype=FP32, strided=False, entropy=False, inplace=False),
        "bf16": partial(selective, v=FEW, dtype=BF16, strided=False, entropy=True, inplace=False),
        "bf16, in place": partial(selective, v=FEW, dtype=BF16, strided=False, entropy=True, inplace=True),
    },
    "PPO from logits": {
        "everything": partial(from_logits, v=V, dtype=FP32, more=EVERYTHING),
        "bf16": partial(from_logits, v=FEW, dtype=BF16, more={}),
    },
    "PPO of tokens, GAE": {
        "two programs": partial(of_tokens, shape=(3, 347), more=EVERYTHING),
        "a few": partial(of_tokens, shape=(3, 5), more={}),
        "GAE": partial(estimates, shape=(5, 131), bootstrapped=True),
        "GAE of long rows": partial(estimates, shape=(2, 4099), bootstrapped=False),
    },
    "exponentials": {
        "bf16, spread": partial(exponentials, dtype=BF16, kind="plain", spread=True),
        "fp16, full head": partial(exponentials, dtype=FP16, kind="full", spread=False),
        "in place, full head, spread": partial(exponentials, dtype=None, kind="full", spread=True),
    },
    "vocabulary KL": {
        "bf16": partial(divergence, out=BF16, kind="plain"),
        "in place, full head": partial(divergence, out=FP32, kind="full"),
        "no direction": partial(divergence, out=None, kind="full"),
    },
    "tiled": {
        "bf16": partial(tiles, dtype=BF16, kind="plain", splits=None),
        "fp16, full head, three shares": partial(tiles, dtype=FP16, kind="full", splits=3),
        "fp32": partial(tiles, dtype=FP32, kind="plain", splits=2),
    },
}


def kernels_of(case: GroupCase, device: torch.device) -> Iterator[str]:
    """The names of the kernels that a case launches, without running them."""
    with recording() as launches:
        case(device, "triton")
    yield from map(name_of, launches)


def difference(got: Outputs, right: Outputs) -> str | None:
    """What the torch backend does not agree with."""
    assert got.keys() == right.keys()
    for name, expected in right.items():
        mine, true = got[name].detach().cpu().double(), expected.detach().double()
        off = float(torch.where(mine == true, 0.0, mine - true).abs().max())  # infinities are equal
        largest = float(true[true.isfinite()].abs().max())
        coarse = got[name].dtype.itemsize < 4 or name.startswith(ROUNDED)
        bar = 2.0**-6 * largest if coarse else 1e-4 * (1 + largest)
        if not off <= bar:
            return f"{name} is off by {off:.3g}, bar {bar:.3g}"
    return None


def run_group(group: str, device: torch.device) -> int:
    """The child process: run a group, or plant a fault, and print READY if the results are right."""
    if group in FAULTS:
        x = torch.arange(128, dtype=torch.int32, device=device)
        FAULTS[group][(1,)](x, torch.empty_like(x), BLOCK=128)
        torch.cuda.synchronize(device)
        return 0
    names, wrong = {}, []
    for name, case in GROUPS[group].items():
        names |= dict.fromkeys(kernels_of(case, device))
        off = difference(case(device, "triton"), case(CPU, "torch"))
        wrong += [] if off is None else [f"{group}, {name}: {off}"]
    print("\n".join([*wrong, f"{', '.join(names)}: {'wrong' if wrong else READY}"]))
    return 1 if wrong else 0


# --- the parent process

Job = tuple[str, str]  # tool, group
Ended = tuple[str, int | None, float]  # output, exit status (None: stopped at its limit), seconds


def find_checker() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=USUAL_PLACE)


def command_of(checker: str | None, tool: str, group: str) -> list[str]:
    child = [sys.executable, "-m", "benchmarks.sanitize", "--child", tool if group == PLANTED else group]
    return child if checker is None else [checker, "--tool", tool, *TOOLS[tool], "--target-processes", "all", *child]


def environment(*, dry: bool) -> dict[str, str]:
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    path = os.pathsep.join([*(str(records.ROOT / part) for part in ("kernels", "engine", "")), *given])
    more = {"TRITON_INTERPRET": "1"} if dry else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def run_process(command: Sequence[str], env: Mapping[str, str], limit: float) -> Ended:
    """In a session of its own, which is ended at the limit."""
    begun = time.monotonic()
    with subprocess.Popen(
        command, cwd=records.ROOT, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text, status = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, status = process.communicate()[0], None
    return text, status, time.monotonic() - begun


def judged(tool: str, group: str, ended: Ended) -> Case:
    """What a process ended with: clean only with right results and a summary without errors."""
    text, status, seconds = ended
    summaries = SUMMARY.findall(text)
    errors = sum(int(hazards or other) for hazards, other in summaries) if summaries else None
    if status is None:
        state = "cut off"
    elif tool != DRY and errors is None:
        state = "no summary"
    elif errors:
        state = f"{errors} error{'s' * (errors > 1)}"
    elif group != PLANTED and (READY not in text or status != 0):
        state = "wrong results"
    else:
        state = "clean"
    ok = bool(errors) if group == PLANTED else state == "clean"
    tail = [] if ok else text.splitlines()[-TAIL:]
    return Case(tool, group, {}, "", found={"state": state, "ok": ok, "seconds": round(seconds, 1), "tail": tail})


def check(jobs: Sequence[Job], checker: str | None, deadline: float) -> list[Case]:
    """All jobs, some at a time. What has not ended at the deadline is cut off."""
    env = environment(dry=checker is None)

    def one(job: Job) -> Case:
        left = deadline - time.monotonic()
        ended = run_process(command_of(checker, *job), env, min(left, MOST_SECONDS)) if left > 0 else ("", None, 0.0)
        return judged(*job, ended)

    with ThreadPoolExecutor(max_workers=min(AT_ONCE, records.cores())) as pool:
        return list(pool.map(one, jobs))


def verdict(cases: Sequence[Case]) -> str | None:
    """What is wrong, in a line."""
    blind = [case.what for case in cases if case.name == PLANTED and not case.found["ok"]]
    if blind:
        return f"{', '.join(blind)}: the tool does not see a planted fault here, so it proves nothing about our kernels"
    return "; ".join(f"{case.what} of {case.name}: {case.found['state']}" for case in cases if not case.found["ok"])


def refuse_without(checker: str | None) -> None:
    if not torch.cuda.is_available():
        raise click.UsageError("a GPU is needed, torch sees none (--dry runs the same kernels in the interpreter).")
    missing = why_not(torch.device("cuda"))
    if missing is not None:
        raise click.UsageError(f"{missing}: there are no kernels to check.")
    if checker is None:
        raise click.UsageError(f"compute-sanitizer is neither on PATH nor in {USUAL_PLACE}; it is in the CUDA toolkit.")


@click.command(context_settings=cli.SETTINGS)
@click.option("--group", "groups", type=click.Choice(list(GROUPS)), multiple=True, help="Only this group.")
@click.option("--minutes", type=float, default=2.5, show_default=True, help="After these, what is left is cut off.")
@click.option("--dry", is_flag=True, help="No tool and no GPU: the same processes, in Triton's interpreter.")
@cli.OUT
@click.option("--child", hidden=True)
def command(groups: Sequence[str], minutes: float, dry: bool, out: Path | None, child: str | None) -> None:
    """Run every Triton kernel at a small size under compute-sanitizer's memcheck and racecheck.

    Exit status: 0 if every group is clean with both tools and their planted faults were found; 1 if not; 2 where there
    is no GPU or no compute-sanitizer.
    """
    if child is not None:
        sys.exit(run_group(child, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    deadline = time.monotonic() + 60 * minutes
    checker = None if dry else find_checker()
    if not dry:
        refuse_without(checker)
    recorder = Recorder("sanitizer", CPU if dry else torch.device("cuda"), quick=dry, out=out)
    if checker is not None:
        version = run_process([checker, "--version"], os.environ, 30.0)[0].strip().splitlines()
        versions = {**recorder.report.versions, "compute-sanitizer": version[-1] if version else checker}
        recorder.report = replace(recorder.report, versions=versions)
    tools = (DRY,) if dry else tuple(TOOLS)
    cases = [] if dry else check([(tool, PLANTED) for tool in tools], checker, deadline)
    seeing = [tool for tool in tools if dry or any(case.found["ok"] for case in cases if case.what == tool)]
    cases += check([(tool, group) for tool in seeing for group in groups or GROUPS], checker, deadline)
    cut_off = any(case.found["state"] == "cut off" for case in cases)
    recorder.put(cases, complete=not groups and not cut_off and len(seeing) == len(tools))
    for case in cases:
        click.echo(f"{case.what:12} {case.name:20} {case.found['state']}, {case.found['seconds']:.0f} s")
        for text in case.found["tail"]:
            click.echo(f"    {text}")
    click.echo(f"wrote {recorder.path}")
    problem = verdict(cases)
    if problem:
        raise Refused(problem)


if __name__ == "__main__":
    sys.exit(cli.main(command))
