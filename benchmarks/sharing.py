"""`python -m benchmarks.sharing`: a DPO step that runs each prompt once for both answers, against one with two copies.

Same model, same pairs, same loss (reference and policy forward, policy backward; no optimizer), in turns. The gradients
are compared before anything is timed. A rate counts the tokens of the pairs, both answers with the prompt: both ways
have the same number of them.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import click
import torch

from benchmarks import cli, measure, render
from benchmarks.cli import Refused
from benchmarks.records import Case, Recorder, Row
from benchmarks.train_step.dpo import example, randomize_adapters
from benchmarks.train_step.synthetic import DTYPES, Model, random_pairs, random_weights, write_folder
from onecard.algorithms.dpo import make_recipe
from onecard.config import DPOConfig
from onecard.data.batches import PreferencePair, answers
from onecard.models.build import load_roles
from onecard.models.micro_batching import MicroBatchSize
from onecard.models.roles import Roles
from onecard.training.trainer import Objective, accumulate

SHARED, APART = "shared prompts", "apart"
SHAPES = {"cpu": ("256/128", "64/64", "16/48"), "cuda": ("1024/256", "256/256", "64/256", "16/256")}
QUICK_SHAPES = ("32/16", "8/16")
TOKENS, QUICK_TOKENS = {"cpu": 3072, "cuda": 32768}, 256  # of the pairs of a step, laid apart
REPEATS, QUICK_REPEATS = {"cpu": 15, "cuda": 20}, 3
BAR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # how far the gradients may be from each other, relative, in norm
MODELS = {
    "cpu": Model("sharing", hidden=256, layers=4, heads=8, key_heads=4, inner=704, vocab=2048),
    "cuda": Model("sharing", hidden=2048, layers=16, heads=32, key_heads=8, inner=5632, vocab=32768),
}


def random_roles(device: str) -> Roles:
    """Policy and reference as `onecard dpo` loads them: a LoRA adapter on a Llama of random weights."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder, random_weights():
        config = DPOConfig(model=str(write_folder(MODELS[device], Path(folder))), dtype=DTYPES[dtype])
        roles = load_roles(config, trained="policy", reference=True)
    randomize_adapters(roles.model)  # away from the reference, where the gradient would be the same for all pairs
    return roles.train()


class Step:
    """The gradient of a step's pairs, with prompts shared or not."""

    def __init__(self, roles: Roles, pairs: Sequence[PreferencePair], *, share: bool) -> None:
        self.roles, self.pairs = roles, pairs
        self.objective: Objective[PreferencePair, object] = make_recipe(DPOConfig(share_prompts=share)).objective(roles)

    def ready(self) -> None:
        self.roles.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        accumulate(self.objective, self.pairs, MicroBatchSize(len(self.pairs)), self.roles.device)

    def gradient(self) -> torch.Tensor:
        self.ready()
        self()
        return torch.cat([parameter.grad.flatten() for parameter in self.roles.trained_parameters().values()])


def measure_case(
    roles: Roles, shape: str, tokens: int, repeats: int, clock: Callable[[], float], where: torch.device
) -> Case:
    """One shape: gradients are compared, then memory, then time in turns."""
    prompt, response = map(int, shape.split("/"))
    count = max(2, tokens // (2 * (prompt + response)))
    pairs = [example(pair) for pair in random_pairs(count, prompt, response, 2048, mixed=False)]
    steps = {SHARED: Step(roles, pairs, share=True), APART: Step(roles, pairs, share=False)}
    shared, apart = (step.gradient() for step in steps.values())
    error = float((shared - apart).norm() / apart.norm())
    dtype = roles.causal_model().dtype
    if not error <= BAR[dtype]:
        raise Refused(f"prompt/response {shape}: gradients are off by {error:.3g} of their norm")
    peaks = {name: measure.peak_bytes(step, where) for name, step in steps.items()}
    works: dict[str, list[measure.Work]] = {name: [step] for name, step in steps.items()}
    times = measure.interleave(works, measure.stopwatch(where, clock), repeats=repeats, warmup=1)
    rows = tuple(
        Row(name, "ours", seconds=tuple(times[name]), tokens=(sum(map(len, pairs)),) * repeats, peak_bytes=peaks[name],
            more={"rows": sum(step.objective.size(pair) for pair in pairs)})
        for name, step in steps.items()
    )  # fmt: skip
    sizes = {"prompt": prompt, "response": response, "pairs": len(pairs)}
    about = {"parameters": sum(parameter.numel() for parameter in roles.causal_model().parameters())}
    return Case("sharing", shape, sizes, str(dtype).removeprefix("torch."), rows=rows, about=about,
                found={"error": error})  # fmt: skip


@click.command(context_settings=cli.SETTINGS)
@cli.DEVICE
@click.option("--shape", "shapes", multiple=True, help="Tokens of prompt/answer; several times. Default: the device's.")
@click.option("--tokens", type=click.IntRange(1), help="Of a step's pairs, laid apart. Default: the device's.")
@click.option("--quick", is_flag=True, help="Tiny shapes: does it run here?")
@cli.REPEATS
@cli.BUSY
@cli.OUT
def command(
    device: str,
    shapes: tuple[str, ...],
    tokens: int | None,
    quick: bool,
    repeats: int | None,
    busy: bool,
    out: Path | None,
) -> None:
    """Time and memory of a DPO step that runs each prompt once for both answers, against two copies of it.

    Before anything is timed, the gradients of both are compared. If they differ by more than rounding, the exit status
    is 1.
    """
    where = cli.ready_device(device)
    clock, clock_name = cli.pick_clock(device, busy=busy)
    wanted = shapes or (QUICK_SHAPES if quick else SHAPES[device])
    for shape in wanted:
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", shape):
            raise click.UsageError(f"--shape {shape}: expected tokens of prompt and answer, such as 256/128.")
    rounds = repeats or (QUICK_REPEATS if quick else REPEATS[device])
    recorder = Recorder("sharing", where, clock=clock_name, repeats=rounds, quick=quick, out=out)
    roles, count = random_roles(device), tokens or (QUICK_TOKENS if quick else TOKENS[device])
    # Short prompts are shared too: from which length sharing pays is what is measured.
    with mock.patch.object(answers, "LEAST_SHARED", 1):
        render.run(recorder, wanted, lambda shape, _: measure_case(roles, shape, count, rounds, clock, where))


if __name__ == "__main__":
    sys.exit(cli.main(command))
