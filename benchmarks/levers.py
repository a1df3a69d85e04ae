"""`python -m benchmarks.levers [--device cuda]`: what each memory lever saves and costs, into docs/memory.md.

A whole optimizer step of DPO on a random Llama with a bfloat16 base, once with no lever, once with each, and once with
all of them. The steps take turns; memory is counted apart from time (on CPU by the profiler's events).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch

from benchmarks import measure, options, records
from benchmarks.kernels import main as guarded
from onecard.algorithms.dpo.command import make_recipe
from onecard.algorithms.supervised import Supervised
from onecard.config import DPOConfig
from onecard.data.batches import PreferencePair, TokenSequence
from onecard.models.build import load_roles
from onecard.models.memory_options import head_chunks
from onecard.models.roles import Roles
from onecard.training.trainer import Trainer
from onecard.utils.progress import Bar, progress

PAGE = records.ROOT / "docs" / "memory.md"
MARKS = ("<!-- levers -->", "<!-- /levers -->")
PAIRS, PROMPT, RESPONSE = 4, 128, 64
SIZES: dict[str, dict[str, int]] = {
    "cpu": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    "cuda": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
TOKENS = 2 * (PROMPT + RESPONSE)
LEVERS: dict[str, dict[str, Any]] = {
    "none": {},
    "--load_in_4bit": {"load_in_4bit": True},
    "--gradient_checkpointing": {"gradient_checkpointing": True},
    "--activation_offloading": {"activation_offloading": True},
    "--adapter_dtype bfloat16": {"adapter_dtype": "bfloat16"},
    "--optim paged_adamw_8bit": {"optim": "paged_adamw_8bit"},
    f"--micro_batch_tokens {TOKENS}": {"micro_batch_tokens": TOKENS},
    "--head_chunk_tokens 64": {"head_chunk_tokens": 64},
    "--share_prompts": {"share_prompts": True},
}
GPU_ONLY = ("--activation_offloading",)


@dataclass(frozen=True)
class Row:
    """A lever: bytes between steps, the peak above those within one, and the time of a step over that without any."""

    lever: str
    held: int
    peak: int
    ratio: measure.Spread


def combined(levers: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, and all of them at once."""
    every: dict[str, Any] = {}
    for settings in levers.values():
        every |= settings
    return {**levers, "all of these": every}


def make_model(folder: Path, device: torch.device) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES[device.type], tie_word_embeddings=True)).bfloat16().save_pretrained(folder)


def some_pairs(vocabulary: int) -> list[PreferencePair]:
    """Random answers of one length to random prompts."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    mask = (False,) * PROMPT + (True,) * RESPONSE
    prompts = [words(PROMPT) for _ in range(PAIRS)]
    return [PreferencePair(*(TokenSequence(prompt + words(RESPONSE), mask) for _ in range(2))) for prompt in prompts]


class Step:
    """One lever's run, of which a call makes the next optimizer step."""

    def __init__(self, model: Path, settings: dict[str, Any], bar: Bar) -> None:
        plain = DPOConfig(model=str(model), dtype="bfloat16", per_device_train_batch_size=PAIRS, share_prompts=False)
        config = replace(plain, **settings)
        self.config, self.bar = config, bar
        self.roles: Roles = load_roles(config, trained="policy", reference=True).train()
        pairs = some_pairs(self.roles.head().weight.shape[0])
        self.job: Supervised[Any, Any] = Supervised(config, "dpo", make_recipe(config).objective(self.roles), pairs, [])
        nowhere: Any = SimpleNamespace(folder=None, checkpoint=None)
        self.trainer = Trainer(config, self.job, self.roles, nowhere)

    def __call__(self) -> None:
        with head_chunks(self.config.head_chunk_tokens):
            self.job.step(self.trainer, list(range(PAIRS)), self.bar)

    def held(self) -> int:
        """Bytes of the weights and of what the optimizer keeps."""
        tensors = [*self.roles.parameters(), *self.roles.buffers()]
        for parameter in self.roles.parameters():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code]
        tensors += [value for state in self.trainer.optimizer.state.values() for value in state.values()]
        tensors += getattr(self.trainer.optimizer, "masters", [])
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(storage.nbytes() for storage in storages.values())


def measured(device: torch.device, repeats: int, *, busy: bool = False) -> list[Row]:
    """A row for each lever that does something on `device`."""
    levers = {name: lever for name, lever in LEVERS.items() if device.type == "cuda" or name not in GPU_ONLY}
    with tempfile.TemporaryDirectory() as folder, progress("levers", len(levers) + 1) as bar:
        make_model(Path(folder), device)
        steps = {name: Step(Path(folder), settings, bar) for name, settings in combined(levers).items()}
        peaks = {}
        for name, step in steps.items():
            step()  # the optimizer's states are made
            peaks[name] = measure.peak_bytes(step, device)
            bar.advance()
        works = {name: [step] for name, step in steps.items()}
        times = measure.interleave(works, measure.stopwatch(device, options.CLOCKS[busy][0]), repeats=repeats)
        base = times["none"]
        return [
            Row(name, step.held(), peaks[name], measure.spread([t / b for t, b in zip(times[name], base, strict=True)]))
            for name, step in steps.items()
        ]


def table(rows: list[Row], device: torch.device, repeats: int, *, busy: bool) -> str:
    """The part of the page between its marks."""
    size = SIZES[device.type]
    head, dirty = records.commit()
    versions = records.versions()
    lines = [
        "| lever | held between steps, MiB | peak of a step above that, MiB | time of a step |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        name = f"`{row.lever}`" if row.lever.startswith("--") else row.lever
        time = f"{row.ratio.median:.2f}x ({row.ratio.q1:.2f} .. {row.ratio.q3:.2f})"
        lines.append(f"| {name} | {row.held / 2**20:.1f} | {row.peak / 2**20:.1f} | {time} |")
    about = (
        f"A DPO step of {PAIRS} pairs, prompts of {PROMPT} and answers of {RESPONSE} tokens, on a random Llama of "
        f"{size['num_hidden_layers']} layers of {size['hidden_size']} and a vocabulary of {size['vocab_size']}, "
        f"bfloat16 base, LoRA of rank {DPOConfig().lora_r}. Time ({options.CLOCKS[busy][1]}): median and quartiles of "
        f"{repeats} steps that take turns, over the step without a lever beside it. {records.machine(device)[0]}; "
        f"commit {head[:12]}{' with changes' if dirty else ''}; torch {versions['torch']}; {records.now()}; made by "
        f"`python -m benchmarks.levers{' --busy' if busy else ''}`."
    )
    return "\n".join([*lines, "", about])


def between(page: str, text: str) -> str:
    """`page` with `text` between its marks."""
    start, end = MARKS
    if page.count(start) != 1 or page.count(end) != 1:
        raise click.UsageError(f"{PAGE.name}: expected {start} and {end} once each.")
    before, rest = page.split(start)
    return f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--repeats", type=click.IntRange(2), default=5, show_default=True, help="Timed steps of each lever.")
@click.option("--busy", is_flag=True, help="Count one thread's processor time: for a machine that others use.")
@click.option("--print", "only_print", is_flag=True, help="Print the table and leave the page as it is.")
def command(device: str, repeats: int, busy: bool, only_print: bool) -> None:
    """What each memory lever saves and costs, into docs/memory.md."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device: cuda, but there is no GPU here.")
    options.pick_clock(device, busy=busy)
    where = torch.device(device)
    text = table(measured(where, repeats, busy=busy), where, repeats, busy=busy)
    click.echo(text)
    if not only_print:
        page = between(PAGE.read_text(encoding="utf-8"), text)
        records.write_atomically(PAGE, page.encode())


def main(arguments: list[str] | None = None) -> int:
    """Errors of use are one line, with status 2."""
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
