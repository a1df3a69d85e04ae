"""`python -m benchmarks.rollout`: response tokens per second, ours against transformers' `generate`. Writes JSON.

Both get the same batches of prompts (sorted by length), the same model object, temperature, end tokens and length
limit, and take turns in one process. Each draws its own random numbers, so what is counted is the tokens of responses,
up to and with the one that ended each; columns that only hold padding behind an end are no work done. `generate` keeps
no log-probabilities here, and ours does: a trainer would have to ask `generate` for its scores on top.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks import decoding, options, records
from benchmarks.cases import closing
from benchmarks.kernels import main as guarded
from benchmarks.kernels import ready_device
from benchmarks.rollout import cases, record, render
from benchmarks.rollout.cases import SHAPES, Case, Task
from benchmarks.rollout.record import Report, Result
from benchmarks.rollout.samplers import BAR, error_of_ours, ratio_of, take_turns, time_a_step
from benchmarks.train_step.dpo import forget, held_bytes, quiet
from benchmarks.train_step.results import versions
from onecard.utils.errors import OnecardError

REPEATS = {"cpu": 7, "cuda": 3}
BUDGET = {"cpu": math.inf, "cuda": 40.0}  # seconds of timed rounds of a case


def chosen(shape: str, table: bool, names: Sequence[str], *, smoke: bool, load_in_4bit: bool) -> list[Case]:
    """The cases that were asked for."""
    if shape and (table or names or smoke):
        raise click.UsageError("--shape is a case of its own; leave out --table, --case and --smoke.")
    if load_in_4bit and (table or names or smoke):
        raise click.UsageError("--load-in-4bit: the table's cases say it themselves; give it with --shape or --model.")
    if shape:
        return [cases.of_shape(shape, load_in_4bit=load_in_4bit)]
    if table or names or smoke:
        found = cases.picked(cases.on_a_gpu(), names)
        return [cases.tiny(case) for case in found] if smoke else found
    return [replace(cases.small(), load_in_4bit=load_in_4bit)]


def resized(case: Case, prompts: int | None, batch: int | None, tokens: int | None, temperature: float) -> Case:
    """The case with what was asked for in place of its own."""
    given = {"prompts": prompts, "batch_size": batch, "max_new_tokens": tokens}
    return replace(case, temperature=temperature, **{name: value for name, value in given.items() if value})


def measured(case: Case, task: Task, repeats: int, budget: float, clock: Callable[[], float]) -> Result:
    """Right first, then a step, then whole rollouts in turns."""
    causal = task.roles.causal_model()
    result = Result(
        name=case.name,
        model=case.model.name,
        parameters=sum(each.numel() for each in causal.parameters()),
        dtype=str(causal.dtype).removeprefix("torch."),
        load_in_4bit=case.load_in_4bit,
        prompts=len(task.prompts),
        prompt_lengths=(min(map(len, task.prompts)), max(map(len, task.prompts))),
        batch_size=task.batch_size,
        max_new_tokens=case.max_new_tokens,
        temperature=case.temperature,
        held_bytes=held_bytes(causal, torch.optim.SGD(causal.parameters())),
    )
    error = error_of_ours(task)
    if not error <= BAR.get(causal.dtype, 0.5):
        return replace(result, refused=f"log-probabilities as drawn are off by {error:.3g} nat")
    device = task.roles.device
    step = time_a_step(task, device, decoding.bandwidth(device), clock)
    rows = take_turns(task, device, repeats, budget=budget, clock=clock)
    return replace(
        result,
        error_logprobs=error,
        mean_response=sum(rows[0].tokens) / len(rows[0].tokens) / len(task.prompts),
        rows=rows,
        ratio=ratio_of(rows[0], rows[-1]),
        step=step,
    )


def measure_case(
    case: Case, model: str, prompts: str, device: torch.device, repeats: int, clock: Callable[[], float]
) -> Result:
    """One case; what does not fit stands in the table with the reason."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = (
                partial(cases.model_task, case, model, prompts)
                if model
                else partial(cases.drawn_task, case, Path(folder), dtype)
            )
            return measured(case, made(), repeats, BUDGET[device.type], clock)
        except torch.OutOfMemoryError as error:
            return Result(
                case.name, case.model.name, 0, str(dtype).removeprefix("torch."), case.load_in_4bit, case.prompts,
                (case.least, case.most), case.batch_size, case.max_new_tokens, case.temperature,
                refused=f"out of memory: {str(error).splitlines()[0][:160]}",
            )  # fmt: skip
        except OnecardError as error:
            raise click.UsageError(str(error)) from None
        finally:
            forget()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", default="", help="Hugging Face name or folder. Default: a small Llama of drawn weights.")
@click.option("--prompts", default="", help="File whose `prompt` or `text` column begins the prompts of --model.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="A model of these sizes, of drawn weights.")
@click.option("--load-in-4bit", is_flag=True, help="The base in NF4.")
@click.option("--table", is_flag=True, help="The cases of a GPU, most telling first.")
@click.option("--case", "names", multiple=True, help="Only this case of the table, by name (repeatable).")
@click.option("--minutes", type=click.FloatRange(min=0), help="No case is begun after so many minutes.")
@click.option("--smoke", is_flag=True, help="The table at tiny sizes: shows that it runs, and measures nothing.")
@options.DEVICE
@click.option("--num-prompts", type=click.IntRange(1), help="Default: the case's, as for the next two.")
@click.option("--batch-size", type=click.IntRange(1))
@click.option("--max-new-tokens", type=click.IntRange(1))
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--repeats", type=click.IntRange(1), help="Timed rollouts of each sampler, at most. Default: 7 or 3.")
@options.BUSY
@options.out_option("the JSON, the Markdown and the plot")
@click.option("--data-only", is_flag=True, help="Write the JSON alone; benchmarks.rollout.render makes the rest later.")
def command(
    model: str,
    prompts: str,
    shape: str | None,
    load_in_4bit: bool,
    table: bool,
    names: tuple[str, ...],
    minutes: float | None,
    smoke: bool,
    device: str,
    num_prompts: int | None,
    batch_size: int | None,
    max_new_tokens: int | None,
    temperature: float,
    repeats: int | None,
    busy: bool,
    out: Path | None,
    data_only: bool,
) -> None:
    """Time onecard's sampler against transformers' generate, in response tokens per second.

    Before anything is timed, the log-probabilities that ours keeps are compared with a pass over the finished
    sequences. A case in which they are off is not timed, and the exit status is 1. The file is written after each case.
    """
    if bool(model) != bool(prompts):
        raise click.UsageError("--model and --prompts: give both, or none for drawn weights and prompts.")
    if model and (shape or table or names or smoke):
        raise click.UsageError("--model is a case of its own; leave out --shape, --table, --case and --smoke.")
    found = chosen(shape or "", table, names, smoke=smoke, load_in_4bit=load_in_4bit)
    found = [resized(case, num_prompts, batch_size, max_new_tokens, temperature) for case in found]
    if model:
        name = Path(model).name
        found = [replace(case, name=name, model=replace(case.model, name=name)) for case in found]
    where = ready_device(device)
    if device == "cpu" and torch.cuda.is_available():
        raise click.UsageError("--device cpu: the engine takes the GPU that is here; set CUDA_VISIBLE_DEVICES= for it.")
    clock, clock_name = options.pick_clock(device, busy=busy)
    quiet()
    about = {**records.header(where), "versions": versions()}
    rounds = repeats or (2 if smoke else REPEATS[device])
    report = Report(**about, quick=smoke, complete=False, clock=clock_name, repeats=rounds)
    click.echo(records.opening(about))
    # the name is that of the whole run, from its first case on
    name = records.slug(found[0].name) if len(found) == 1 else "table"
    stamped = records.stamped(record.BENCHMARK, report.date, report.commit, name, dirty=report.dirty, quick=smoke)
    path = (out or records.ROOT / "benchmarks" / "results" / report.folder) / stamped
    began, left_out = time.monotonic(), 0
    for case in found:
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            left_out += 1
            continue
        result = measure_case(case, model, prompts, where, report.repeats, clock)
        report = replace(report, results=(*report.results, result))
        records.save(report, path)
        click.echo(render.brief(result))
    report = replace(report, complete=left_out == 0, dirty=records.is_dirty(report.commit, dirty=report.dirty))
    if report.results:
        records.save(report, path)
        for made in (path, *([] if data_only else render.render(path))):
            click.echo(f"wrote {made}")
    closing(report.results, left_out, minutes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Errors are one line: of use, status 2; a refusal, status 1."""
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
