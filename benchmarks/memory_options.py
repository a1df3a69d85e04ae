"""`python -m benchmarks.memory_options [--device cuda]`: what each option saves and costs, into docs/memory.md.

An optimizer step of DPO on a random Llama with a bfloat16 base, without memory options, with each of them, and with all
of them. The steps take turns; memory is counted apart from time (on CPU by the profiler's events).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks import cli, measure, records, render
from benchmarks.records import Case, Row
from benchmarks.train_step.cases import StepCase
from benchmarks.train_step.dpo import OnecardDPO, Task, held_bytes
from benchmarks.train_step.synthetic import Model, random_pairs, write_folder
from onecard.models.memory_options import head_chunks
from onecard.utils.progress import progress

PAGE = records.ROOT / "docs" / "memory.md"
PAIRS, PROMPT, RESPONSE, REPEATS = 4, 128, 64, 5
MODELS = {
    "cpu": Model("random Llama", hidden=256, layers=4, heads=8, kv_heads=2, intermediate=704, vocab=8192, tied=True),
    "cuda": Model(
        "random Llama", hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256, tied=True
    ),
}
TOKENS = 2 * (PROMPT + RESPONSE)
ALL = "all of these"
PLAIN: dict[str, Any] = {"share_prompts": False, "adapter_dtype": "float32"}
OPTIONS: dict[str, dict[str, Any]] = {
    render.NO_OPTION: {},
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


class Step(OnecardDPO):
    """Training with some options, of which a call makes the next optimizer step."""

    def __call__(self) -> None:
        with head_chunks(self.config.head_chunk_tokens):
            super().__call__()


def measured(device: torch.device, repeats: int, clock: Callable[[], float]) -> Case:
    """A row for each option that does something on `device`, and for all of them at once."""
    model = MODELS[device.type]
    chosen = {name: option for name, option in OPTIONS.items() if device.type == "cuda" or name not in GPU_ONLY}
    chosen[ALL] = {name: value for option in chosen.values() for name, value in option.items()}
    case = StepCase("memory options", "dpo", model, PROMPT, RESPONSE, batch_size=PAIRS, micro_batch_size=PAIRS)
    pairs = tuple(random_pairs(PAIRS, PROMPT, RESPONSE, model.vocab, mixed=False))
    with tempfile.TemporaryDirectory() as folder, progress("memory options", len(chosen)) as bar:
        task = Task(case, write_folder(model, Path(folder)), torch.bfloat16, device, pairs)
        steps = {name: Step(task, **{**PLAIN, **option}) for name, option in chosen.items()}
        peaks = {}
        for name, step in steps.items():
            step()  # the optimizer's states are made
            peaks[name] = measure.peak_bytes(step, device)
            bar.advance()
        works: dict[str, list[measure.Work]] = {name: [step] for name, step in steps.items()}
        times = measure.interleave(works, measure.stopwatch(device, clock), repeats=repeats)
        rows = tuple(
            Row(name, "ours", seconds=tuple(times[name]), peak_bytes=peaks[name],
                held_bytes=held_bytes(step.model, step.optimizer))
            for name, step in steps.items()
        )  # fmt: skip
    sizes = {"pairs": PAIRS, "prompt": PROMPT, "response": RESPONSE}
    about = {"model": model.name, "layers": model.layers, "hidden size": model.hidden, "vocabulary": model.vocab}
    return Case("memory-options", "a DPO step with LoRA", sizes, "bfloat16", rows=rows, about=about)


@click.command(context_settings=cli.SETTINGS)
@cli.ONLY_PRINT
@cli.options("repeats", "busy")
def command(options: cli.Options, only_print: bool) -> None:
    """Measure what each memory option saves and costs, into docs/memory.md."""
    repeats = options.repeats or REPEATS
    recorder = options.recorder("memory-options", repeats)
    render.show(recorder, measured(options.device, repeats, options.clock), Console())
    render.finish(recorder, data_only=options.data_only, page=None if only_print else PAGE)


if __name__ == "__main__":
    sys.exit(cli.main(command))
