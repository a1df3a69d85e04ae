"""`python -m benchmarks.memory_options [--device cuda]`: what each memory option saves and costs.

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

from benchmarks import cli, measure, render
from benchmarks.measure import Timing
from benchmarks.records import Case, Row
from benchmarks.train_step.cases import StepCase
from benchmarks.train_step.dpo import OnecardDPO, Task, held_bytes
from benchmarks.train_step.synthetic import Model, random_pairs, write_folder
from onecard.models.memory_options import head_chunks

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


def measure_case(device: torch.device, timing: Timing, tell: Callable[[str], None]) -> Case:
    """A row for each option that does something on `device`, and for all of them at once."""
    model = MODELS[device.type]
    chosen = {name: option for name, option in OPTIONS.items() if device.type == "cuda" or name not in GPU_ONLY}
    chosen[ALL] = {name: value for option in chosen.values() for name, value in option.items()}
    case = StepCase("memory options", "dpo", model, PROMPT, RESPONSE, batch_size=PAIRS, micro_batch_size=PAIRS)
    pairs = tuple(random_pairs(PAIRS, PROMPT, RESPONSE, model.vocab, mixed=False))
    with tempfile.TemporaryDirectory() as folder:
        task = Task(case, write_folder(model, Path(folder)), torch.bfloat16, device, pairs)
        steps = {name: Step(task, **{**PLAIN, **option}) for name, option in chosen.items()}
        peaks = {}
        for name, step in steps.items():
            tell(f"memory: {name}")
            step()  # the optimizer's states are made
            peaks[name] = measure.peak_bytes(step, device)
        times = measure.interleave({name: [step] for name, step in steps.items()}, device, timing, tell)
        rows = []
        for name, step in steps.items():
            held = held_bytes(step.model, step.optimizer)
            rows.append(Row(name, "ours", seconds=tuple(times[name]), peak_bytes=peaks[name], held_bytes=held))
    sizes = {"pairs": PAIRS, "prompt": PROMPT, "response": RESPONSE}
    about = {"model": model.name, "layers": model.layers, "hidden size": model.hidden, "vocabulary": model.vocab}
    return Case("memory-options", "a DPO step with LoRA", sizes, "bfloat16", rows=tuple(rows), about=about)


@click.command(context_settings=cli.SETTINGS)
@cli.options("repeats", "busy")
def command(options: cli.Options) -> None:
    """Measure what each memory option saves and costs in a DPO step."""
    timing = options.timing(Timing(REPEATS))
    recorder = options.recorder("memory-options", timing.repeats)
    render.run(recorder, [timing], lambda timing, tell: measure_case(options.device, timing, tell))


if __name__ == "__main__":
    sys.exit(cli.main(command))
