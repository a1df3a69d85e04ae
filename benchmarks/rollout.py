"""`python -m benchmarks.rollout`: response tokens per second, ours against transformers' `generate`. Writes JSON.

Both get the same batches of prompts (sorted by length), the same model object, temperature, stop tokens and length
limit, and take turns in one process. Each draws its own random numbers, so what is counted is the tokens of responses,
up to and with the one that ended each; padding behind it does not count. `generate` keeps no log-probabilities here,
and ours does.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cli, measure, render
from benchmarks.harness import one_line
from benchmarks.measure import Timing, free_memory
from benchmarks.records import OURS, Case, Row
from benchmarks.train_step.cases import LLAMA_8B, QWEN_0_5B, QWEN_1_5B, TINY, with_names
from benchmarks.train_step.dpo import held_bytes, quantization_of, quiet, randomize_adapters, stored_bytes
from benchmarks.train_step.synthetic import DTYPES, FIRST_WORD, PAD, SEED, Model, random_weights, write_folder
from onecard.config import ModelConfig, SFTConfig
from onecard.data import load_rows
from onecard.data.batches import TokenSequence, pack, to_device
from onecard.models.build import load_frozen_role, load_roles
from onecard.models.cache import cache_bytes
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Sampling, find_stop_tokens, sample_responses
from onecard.rollout.cuda_graphs import cuda_graph, use_capture_function
from onecard.utils.errors import OnecardError

TIMING = {"cpu": Timing(7, warmup=1, least=1), "cuda": Timing(3, warmup=1, budget=40.0, least=1)}
RECORDED, PEER = "onecard, recorded passes", "transformers generate"
BAR = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # nats by which a log-probability as sampled may be off
CHECKED, CHECKED_TOKENS = 8, 32  # responses that are compared, of at most so many tokens
WINDOW = 32  # tokens over which a step of decoding is timed
STEP_REPEATS = 3
NEVER = 1 << 30  # an id that no token has

RANDOM = "random Llama"
SMALL = Model(RANDOM, hidden=128, layers=2, heads=8, kv_heads=4, intermediate=384, vocab=2048)


@dataclass(frozen=True)
class RolloutCase:
    """Prompts of `least` to `most` tokens, evenly spread, `batch_size` of them at a time.

    With random weights one token in `mean` ends an answer: lengths are geometric, cut at `max_new_tokens`.
    """

    name: str
    model: Model
    prompts: int
    batch_size: int
    least: int
    most: int
    max_new_tokens: int
    mean: int
    load_in_4bit: bool = False
    temperature: float = 1.0

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature)


@dataclass(frozen=True)
class Task:
    """The common input of both samplers."""

    roles: Roles
    prompts: tuple[tuple[int, ...], ...]
    stop_tokens: frozenset[int]
    pad: int
    sampling: Sampling
    batch_size: int


def rows_of(name: str, model: Model, rows: int) -> RolloutCase:
    """A real model's sizes, and two batches of prompts, as a PPO iteration has."""
    return RolloutCase(f"{name}, {rows} rows", model, 2 * rows, rows, 64, 512, 192, 64, load_in_4bit="NF4" in name)


# The case of a CPU, which takes seconds
ON_CPU = RolloutCase(RANDOM, SMALL, prompts=64, batch_size=32, least=4, most=64, max_new_tokens=128, mean=32)
# The cases of a GPU: the README's claim first, then smaller models, then more rows.
ON_A_GPU = (
    rows_of("8B, NF4", LLAMA_8B, 16),
    rows_of("1.5B, bf16", QWEN_1_5B, 32),
    rows_of("8B, bf16", LLAMA_8B, 16),
    rows_of("0.5B, bf16", QWEN_0_5B, 64),
    rows_of("8B, NF4", LLAMA_8B, 64),
)


def tiny(case: RolloutCase) -> RolloutCase:
    """The same case at tiny sizes for a CPU."""
    model = replace(TINY, model_type=case.model.model_type, tied=case.model.tied)
    return replace(case, model=model, prompts=6, batch_size=3, least=2, most=10, max_new_tokens=8, mean=6)


def lengths(case: RolloutCase) -> list[int]:
    """Prompt lengths, spread evenly and in no order."""
    span = case.most - case.least + 1
    return [case.least + index * 37 % span for index in range(case.prompts)]  # 37 shares no factor with our spans


def random_task(case: RolloutCase, folder: Path, dtype: torch.dtype) -> Task:
    """Random weights with an active adapter, as PPO's policy has, and random prompts."""
    write_folder(case.model, folder)
    name = DTYPES[dtype]
    config = SFTConfig(model=str(folder), dtype=name, adapter_dtype=name, load_in_4bit=case.load_in_4bit)
    with random_weights():
        roles = load_roles(config, trained="policy")
    randomize_adapters(roles.model)
    draw = random.Random(SEED)
    prompts = [tuple(draw.randrange(FIRST_WORD, case.model.vocab) for _ in range(length)) for length in lengths(case)]
    stops = frozenset(range(FIRST_WORD, case.model.vocab, case.mean))
    return Task(roles.eval(), tuple(prompts), stops, PAD, case.sampling, case.batch_size)


def model_task(case: RolloutCase, model: str, file: str) -> Task:
    """A pretrained model, and prompts that are the first words of a file's texts."""
    settings = ModelConfig(model=model, load_in_4bit=case.load_in_4bit)
    tokenizer, roles = load_tokenizer(settings), load_frozen_role(settings, role="policy")
    rows = load_rows(file, split="train")
    column = next((name for name in ("prompt", "text") if name in rows[0].values), None)
    if column is None:
        raise click.UsageError(f"--prompts: {file} has neither a `prompt` nor a `text` column.")
    texts = [tokenizer.encode(rows[index % len(rows)].values[column])[: case.most] for index in range(case.prompts)]
    prompts = tuple(tuple(text[:length]) for text, length in zip(texts, lengths(case), strict=True))
    stops = find_stop_tokens(roles, tokenizer)
    return Task(roles, prompts, stops, tokenizer.pad_token_id, case.sampling, case.batch_size)


# --- what a step of decoding has to read


def weight_bytes(model: Any) -> int:
    """Bytes that a decoding step reads of the weights: all but other rows of the embeddings and idle adapters."""
    embeddings = model.get_input_embeddings().weight
    skipped = set() if embeddings is model.get_output_embeddings().weight else {embeddings}
    for module in model.modules():
        if isinstance(active := getattr(module, "active_adapters", None), list):
            parts = (getattr(module, name, {}) for name in ("lora_A", "lora_B"))
            idle = (one for part in parts for name, one in part.items() if name not in active)
            skipped.update(parameter for one in idle for parameter in one.parameters())
    read = [parameter for parameter in model.parameters() if parameter not in skipped]
    return stored_bytes([*read, *quantization_of(model)])


def bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second that a plain copy moves here, both ways counted."""
    copy, size = measure.copy_work(device)
    return size / statistics.median(measure.interleave({"copy": [copy]}, device, Timing(repeats, warmup=1))["copy"])


# --- the samplers


def sampled(task: Task) -> list[Any]:
    found = sample_responses(
        task.roles, task.prompts, task.sampling, stop_tokens=task.stop_tokens, batch_size=task.batch_size
    )
    return list(found.responses)


def ours(task: Task) -> int:
    """Response tokens of our sampler."""
    return sum(len(response.tokens) for response in sampled(task))


def recorded(task: Task) -> int:
    """The same, with passes that are recorded as CUDA graphs and replayed."""
    with use_capture_function(cuda_graph):
        return ours(task)


def peer(task: Task) -> int:
    """Response tokens of transformers' `generate`."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        temperature=task.sampling.temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=task.pad,
        max_new_tokens=task.sampling.max_new_tokens,
        eos_token_id=sorted(task.stop_tokens) or [NEVER],
    )
    order = sorted(task.prompts, key=len, reverse=True)
    total = 0
    with torch.no_grad():
        for start in range(0, len(order), task.batch_size):
            part = order[start : start + task.batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[task.pad] * (width - len(row)) + list(row) for row in part], device=task.roles.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part], device=task.roles.device)
            out = task.roles.causal_model().generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            total += sum(ended_length(row, task.stop_tokens) for row in out[:, width:].tolist())
    return total


def ended_length(tokens: Sequence[int], stop_tokens: Collection[int]) -> int:
    """Number of tokens up to and including the first stop token."""
    return next((count for count, token in enumerate(tokens, start=1) if token in stop_tokens), len(tokens))


def samplers(device: torch.device) -> dict[str, Callable[[Task], int]]:
    return {OURS: ours, **({RECORDED: recorded} if device.type == "cuda" else {}), PEER: peer}


@torch.no_grad()
def error_of_ours(task: Task) -> float:
    """The largest difference between a log-probability as sampled and that of one pass over the finished sequence."""
    torch.manual_seed(0)
    short = min(task.sampling.max_new_tokens, CHECKED_TOKENS)
    task = replace(task, sampling=replace(task.sampling, max_new_tokens=short))
    worst = 0.0
    for prompt, response in list(zip(task.prompts, sampled(task), strict=True))[:CHECKED]:
        mask = (False,) * len(prompt) + (True,) * len(response.tokens)
        batch = to_device(pack([TokenSequence(prompt + response.tokens, mask)]), task.roles.device)
        own = task.roles.logprobs(batch, batch.targets, temperature=task.sampling.temperature)
        worst = max(worst, (own.cpu() - response.logprobs).abs().max().item())
    return worst


class Work:
    """A sampler with its task. It keeps the number of tokens of each call, and a GPU's peak."""

    def __init__(self, task: Task, sampler: Callable[[Task], int]) -> None:
        self.task, self.sampler, self.device = task, sampler, task.roles.device
        self.tokens: list[int] = []
        self.before, self.peak = 0, 0

    def ready(self) -> None:
        torch.manual_seed(len(self.tokens))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def __call__(self) -> None:
        self.tokens.append(self.sampler(self.task))
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - self.before)


def time_rollouts(task: Task, timing: Timing) -> Iterator[Row]:
    """All samplers, timed in turns on the same seeds."""
    device = task.roles.device
    works = {name: Work(task, sampler) for name, sampler in samplers(device).items()}
    times = measure.interleave({name: [work] for name, work in works.items()}, device, timing)
    for name, work in works.items():
        peak = work.peak if device.type == "cuda" else measure.peak_bytes(work, device)
        tokens = tuple(work.tokens[timing.warmup : timing.warmup + len(times[name])])
        role = "peer" if name == PEER else "ours"
        yield Row(name, role, seconds=tuple(times[name]), tokens=tokens, peak_bytes=peak)


def time_a_step(task: Task, clock: Callable[[], float]) -> dict[str, Any]:
    """One decoding step of a full batch in which nothing ends, in the middle of the longest answers.

    Its seconds by sampler are what more tokens take beyond one, over their number: the pass over the prompts does not
    count. `bytes_read`: weights and cache. `bandwidth`: of a plain copy in the same run, bytes/s.
    """
    model, device = task.roles.causal_model(), task.roles.device
    count = min(WINDOW, max(1, task.sampling.max_new_tokens // 2))
    length = max(map(len, task.prompts)) + task.sampling.max_new_tokens // 2
    words = [word for prompt in task.prompts for word in prompt]
    draw = random.Random(0)
    # Prompts of one length would need no mask, and real batches need one.
    shortest = length - count // 2
    prompts = tuple(tuple(draw.choices(words, k=max(1, shortest - row % 2))) for row in range(task.batch_size))
    works: dict[str, list[Work]] = {}
    for name, sampler in samplers(device).items():
        for tokens in (1 + count, 1):
            sampling = replace(task.sampling, max_new_tokens=tokens)
            one = replace(task, prompts=prompts, stop_tokens=frozenset(), sampling=sampling)
            works[f"{name} {tokens}"] = [Work(one, sampler)]
    times = measure.interleave(works, device, Timing(STEP_REPEATS, warmup=1, clock=clock))
    seconds = {}
    for name in samplers(device):
        pairs = zip(times[f"{name} {1 + count}"], times[f"{name} 1"], strict=True)
        seconds[name] = statistics.median((many - one) / count for many, one in pairs)
    return {
        "rows": task.batch_size,
        "length": length,
        "seconds": seconds,
        "bytes_read": weight_bytes(model) + task.batch_size * cache_bytes(model, length),
        "bandwidth": bandwidth(device),
    }


# --- the command


def measured(case: RolloutCase, task: Task, timing: Timing) -> Case:
    """Log-probabilities are checked first; then a step is timed, then whole rollouts in turns."""
    causal, lengths = task.roles.causal_model(), [len(prompt) for prompt in task.prompts]
    sizes = {
        "prompts": case.prompts,
        "shortest": min(lengths),
        "longest": max(lengths),
        "batch_size": case.batch_size,
        "max_new_tokens": case.max_new_tokens,
    }
    about = {
        "model": case.model.name,
        "load_in_4bit": case.load_in_4bit,
        "temperature": case.temperature,
        "parameters": sum(each.numel() for each in causal.parameters()),
    }
    result = Case("rollout", case.name, sizes, str(causal.dtype).removeprefix("torch."), about=about)
    error = error_of_ours(task)
    if not error <= BAR.get(causal.dtype, 0.5):
        return replace(result, refused=f"log-probabilities as sampled are off by {error:.3g} nat")
    step = time_a_step(task, timing.clock)
    held = held_bytes(causal, torch.optim.SGD(causal.parameters()))
    rows = tuple(replace(row, held_bytes=held) for row in time_rollouts(task, timing))
    mean = sum(rows[0].tokens) / len(rows[0].tokens) / len(task.prompts)
    return replace(result, rows=rows, found={"mean_response": mean, "error_logprobs": error, "step": step})


def measure_case(case: RolloutCase, model: str, prompts: str, device: torch.device, timing: Timing) -> Case:
    """One case; one that does not fit is reported with the reason."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        try:
            task = model_task(case, model, prompts) if model else random_task(case, Path(folder), dtype)
            return measured(case, task, timing)
        except torch.OutOfMemoryError as error:
            refused = f"out of memory: {one_line(error)}"
            return Case("rollout", case.name, {"prompts": case.prompts}, DTYPES[dtype], refused=refused)
        except OnecardError as error:
            raise click.UsageError(str(error)) from None
        finally:
            free_memory()


@click.command(context_settings=cli.SETTINGS)
@click.option("--model", default="", help="Hugging Face name or folder. Default: random weights.")
@click.option("--prompts", default="", help="File whose `prompt` or `text` column begins the prompts of --model.")
@click.option("--case", "names", multiple=True, help="Only this case of a GPU, by name.")
@click.option("--smoke", is_flag=True, help="A GPU's cases at tiny sizes: shows that they run, measures nothing.")
@cli.options("minutes", "repeats", "busy")
def command(options: cli.Options, model: str, prompts: str, names: tuple[str, ...], smoke: bool) -> None:
    """Time onecard's sampler against transformers' generate, in response tokens per second.

    Before anything is timed, the log-probabilities that ours keeps are compared with a pass over the finished
    sequences. A case in which they are off is not timed, and the exit status is 1. The file is written after each case.
    """
    if bool(model) != bool(prompts):
        raise click.UsageError("--model and --prompts: give both, or none for random weights and prompts.")
    if model and (names or smoke):
        raise click.UsageError("--model is a case of its own; leave out --case and --smoke.")
    device = options.device
    cases = [ON_CPU]
    if model:
        name = Path(model).name
        cases = [replace(ON_CPU, name=name, model=replace(ON_CPU.model, name=name))]
    elif names or smoke or device.type == "cuda":
        cases = [tiny(case) if smoke else case for case in with_names(ON_A_GPU, names)]
    cli.refuse_unused_gpu(device)
    quiet()
    timing = options.timing(replace(TIMING[device.type], repeats=2) if smoke else TIMING[device.type])
    name = cases[0].name if len(cases) == 1 else "table"
    recorder = options.recorder("rollout", timing.repeats, quick=smoke, name=name)
    render.run(recorder, cases, lambda case, _: measure_case(case, model, prompts, device, timing), options.minutes)


if __name__ == "__main__":
    sys.exit(cli.main(command))
