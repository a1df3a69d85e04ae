"""`python -m benchmarks.sharing`: a DPO step that runs each prompt once for both answers, against one with two copies.

Both are timed as `benchmarks.train_step` times them, without its peers: same weights, same pairs, in turns. Loss,
rewards and gradient norm of the first step are compared before. A rate counts the tokens of the pairs, both answers
with the prompt: both ways have the same number of them.
"""

from __future__ import annotations

import re
import sys
from unittest import mock

import click
import torch

from benchmarks import cli, render
from benchmarks.measure import Timing
from benchmarks.records import OURS
from benchmarks.render import UNSHARED
from benchmarks.train_step.cases import StepCase
from benchmarks.train_step.dpo import quiet
from benchmarks.train_step.run import measure_case
from benchmarks.train_step.synthetic import Model
from onecard.data.batches import answers

SHAPES = {"cpu": ("256/128", "64/64", "16/48"), "cuda": ("1024/256", "256/256", "64/256", "16/256")}
QUICK_SHAPES = ("32/16", "8/16")
TOKENS, QUICK_TOKENS = {"cpu": 3072, "cuda": 32768}, 256  # of the pairs of a step, laid apart
REPEATS, QUICK_REPEATS = {"cpu": 15, "cuda": 20}, 3
MODELS = {
    "cpu": Model("sharing", hidden=256, layers=4, heads=8, kv_heads=4, intermediate=704, vocab=2048),
    "cuda": Model("sharing", hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=5632, vocab=32768),
}


def case_of(shape: str, device: str, tokens: int) -> StepCase:
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", shape):
        raise click.UsageError(f"--shape {shape}: expected tokens of prompt and answer, such as 256/128.")
    prompt, response = map(int, shape.split("/"))
    pairs = max(2, tokens // (2 * (prompt + response)))
    return StepCase(shape, "dpo", MODELS[device], prompt, response, batch_size=pairs, micro_batch_size=pairs)


@click.command(context_settings=cli.SETTINGS)
@click.option("--shape", "shapes", multiple=True, help="Tokens of prompt/answer; several times. Default: the device's.")
@click.option("--tokens", type=click.IntRange(1), help="Of a step's pairs, laid apart. Default: the device's.")
@click.option("--quick", is_flag=True, help="Tiny shapes: does it run here?")
@cli.options("repeats", "busy")
def command(options: cli.Options, shapes: tuple[str, ...], tokens: int | None, quick: bool) -> None:
    """Time and memory of a DPO step that runs each prompt once for both answers, against two copies of it.

    Before anything is timed, the first steps of both are compared. If they differ by more than rounding, the exit
    status is 1.
    """
    device = options.device.type
    tokens = tokens or (QUICK_TOKENS if quick else TOKENS[device])
    cases = [case_of(shape, device, tokens) for shape in shapes or (QUICK_SHAPES if quick else SHAPES[device])]
    timing = options.timing(Timing(QUICK_REPEATS if quick else REPEATS[device], warmup=1))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    quiet()
    # Short prompts are shared too: from which length sharing pays is what is measured.
    with mock.patch.object(answers, "MIN_SHARED_TOKENS", 1):
        render.run(
            options.recorder("sharing", timing.repeats, quick=quick),
            cases,
            lambda case, tell: measure_case(case, options.device, dtype, timing, tell, (OURS, UNSHARED)),
        )


if __name__ == "__main__":
    sys.exit(cli.main(command))
