"""`python -m benchmarks.memory_options [--device cuda]`: what each option saves and costs, into docs/memory.md.

An optimizer step of DPO on a random Llama with a bfloat16 base, without memory options, with each of them, and with all
of them. The steps take turns; memory is counted apart from time (on CPU by the profiler's events).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cli, measure, records, render
from benchmarks.train_step.dpo import example, held_bytes
from benchmarks.train_step.synthetic import Model, random_pairs, random_weights, write_folder
from onecard.algorithms.dpo.command import make_recipe
from onecard.algorithms.supervised import Supervised
from onecard.config import DPOConfig
from onecard.models.build import load_roles
from onecard.models.memory_options import head_chunks
from onecard.models.roles import Roles
from onecard.training.run_folder import Run
from onecard.training.trainer import Trainer
from onecard.utils.progress import Bar, progress

PAGE = records.ROOT / "docs" / "memory.md"
MARK = "memory-options"
PAIRS, PROMPT, RESPONSE = 4, 128, 64
MODELS = {
    "cpu": Model("", hidden=256, layers=4, heads=8, key_heads=2, inner=704, vocab=8192, tied=True),
    "cuda": Model("", hidden=2048, layers=16, heads=32, key_heads=8, inner=8192, vocab=128256, tied=True),
}
TOKENS = 2 * (PROMPT + RESPONSE)
OPTIONS: dict[str, dict[str, Any]] = {
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
    """An option: bytes between steps, the peak above those within one, and the time of a step over that without any."""

    option: str
    held: int
    peak: int
    ratio: measure.Spread


class Step:
    """Training with some options, of which a call makes the next optimizer step."""

    def __init__(self, model: Path, settings: dict[str, Any], bar: Bar) -> None:
        plain = DPOConfig(model=str(model), dtype="bfloat16", per_device_train_batch_size=PAIRS, share_prompts=False)
        config = replace(plain, **settings)
        self.config, self.bar = config, bar
        with random_weights():
            self.roles: Roles = load_roles(config, trained="policy", reference=True).train()
        vocabulary = self.roles.head().weight.shape[0]
        pairs = [example(pair) for pair in random_pairs(PAIRS, PROMPT, RESPONSE, vocabulary, mixed=False)]
        self.job: Supervised[Any, Any] = Supervised(config, "dpo", make_recipe(config).objective(self.roles), pairs, [])
        self.trainer = Trainer(config, self.job, self.roles, Run(model, None, ()))

    def __call__(self) -> None:
        with head_chunks(self.config.head_chunk_tokens):
            self.job.step(self.trainer, list(range(PAIRS)), self.bar)

    def held(self) -> int:
        """Bytes of the weights and of what the optimizer keeps."""
        return held_bytes(self.roles, self.trainer.optimizer)


def measured(device: torch.device, repeats: int, *, busy: bool = False) -> list[Row]:
    """A row for each option that does something on `device`, and for all of them at once."""
    chosen = {name: option for name, option in OPTIONS.items() if device.type == "cuda" or name not in GPU_ONLY}
    chosen["all of these"] = {name: value for option in chosen.values() for name, value in option.items()}
    with tempfile.TemporaryDirectory() as folder, progress("memory options", len(chosen)) as bar:
        write_folder(MODELS[device.type], Path(folder))
        steps = {name: Step(Path(folder), settings, bar) for name, settings in chosen.items()}
        peaks = {}
        for name, step in steps.items():
            step()  # the optimizer's states are made
            peaks[name] = measure.peak_bytes(step, device)
            bar.advance()
        works = {name: [step] for name, step in steps.items()}
        times = measure.interleave(works, measure.stopwatch(device, cli.CLOCKS[busy][0]), repeats=repeats)
        base = times["none"]
        return [
            Row(name, step.held(), peaks[name], measure.spread([t / b for t, b in zip(times[name], base, strict=True)]))
            for name, step in steps.items()
        ]


def table(rows: list[Row], device: torch.device, repeats: int, *, busy: bool) -> str:
    """The part of the page between its marks."""
    model = MODELS[device.type]
    head, dirty = records.commit()
    versions = records.versions()
    lines = [
        "| option | held between steps, MiB | peak of a step above that, MiB | time of a step |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        name = f"`{row.option}`" if row.option.startswith("--") else row.option
        time = f"{row.ratio.median:.2f}x ({row.ratio.q1:.2f} .. {row.ratio.q3:.2f})"
        lines.append(f"| {name} | {row.held / 2**20:.1f} | {row.peak / 2**20:.1f} | {time} |")
    about = (
        f"A DPO step of {PAIRS} pairs, prompts of {PROMPT} and answers of {RESPONSE} tokens, on a random Llama of "
        f"{model.layers} layers of {model.hidden} and a vocabulary of {model.vocab}, "
        f"bfloat16 base, LoRA of rank {DPOConfig().lora_r}. Time ({cli.CLOCKS[busy][1]}): median and quartiles of "
        f"{repeats} steps that take turns, over the step without an option beside it. {records.machine(device)[0]}; "
        f"commit {head[:12]}{' with changes' if dirty else ''}; torch {versions['torch']}; {records.now()}; made by "
        f"`python -m benchmarks.memory_options{' --busy' if busy else ''}`."
    )
    return "\n".join([*lines, "", about])


@click.command(context_settings=cli.SETTINGS)
@cli.DEVICE
@click.option("--repeats", type=click.IntRange(2), default=5, show_default=True, help="Timed steps of each option.")
@cli.BUSY
@click.option("--print", "only_print", is_flag=True, help="Print the table and leave the page as it is.")
def command(device: str, repeats: int, busy: bool, only_print: bool) -> None:
    """Measure what each memory option saves and costs, into docs/memory.md."""
    where = cli.ready_device(device)
    cli.pick_clock(device, busy=busy)
    text = table(measured(where, repeats, busy=busy), where, repeats, busy=busy)
    click.echo(text)
    if not only_print:
        render.update(PAGE, {MARK: text})


if __name__ == "__main__":
    sys.exit(cli.main(command))
