"""`python -m benchmarks.train_step`: DPO steps against TRL's `DPOTrainer`, and PPO by phases. Writes JSON."""

from __future__ import annotations

import sys

import click
import torch

from benchmarks import cli, render
from benchmarks.measure import Timing
from benchmarks.train_step.cases import select_cases
from benchmarks.train_step.dpo import quiet
from benchmarks.train_step.run import measure_case

TIMING = {"cpu": Timing(7, warmup=1, budget=60.0), "cuda": Timing(10, warmup=2, budget=30.0)}


@click.command(context_settings=cli.SETTINGS)
@click.option("--quick", is_flag=True, help="The first DPO and the first PPO case, few rounds.")
@click.option("--smoke", is_flag=True, help="A GPU's cases at tiny sizes: shows that they run, measures nothing.")
@click.option("--only", "kinds", multiple=True, type=click.Choice(["dpo", "ppo"]), help="Only this algorithm.")
@click.option("--case", "names", multiple=True, help="Only this case, by name.")
@cli.options("minutes", "repeats", "busy")
def command(options: cli.Options, quick: bool, smoke: bool, kinds: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Time whole training steps: DPO against TRL's DPOTrainer, PPO by phases.

    Both DPO trainers get the same weights, adapters, pairs and settings. A case in which loss, rewards and gradient
    norm of the first step do not agree is not timed, and the exit status is 1. The file is written after every case.
    """
    device, few = options.device.type, quick or smoke
    cli.refuse_unused_gpu(options.device)
    cases = select_cases(device, kinds, names, quick=quick, smoke=smoke)
    timing = options.timing(Timing(3, budget=0.0) if few else TIMING[device])
    dtype = torch.bfloat16 if smoke or device == "cuda" else torch.float32
    quiet()
    render.run(
        options.recorder("train-step", timing.repeats, quick=few),
        cases,
        lambda case, tell: measure_case(case, options.device, dtype, timing, tell),
        options.minutes,
    )


if __name__ == "__main__":
    sys.exit(cli.main(command))
