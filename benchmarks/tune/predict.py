"""`python -m benchmarks.tune.predict`: how fast a card can be at best, and what is expected of ours, by counting alone.

Two floors, from the FLOPs and bytes that the benchmarks count: products over the rate of products, bytes over that of a
copy. Ours pays for the products that it really runs, and for its passes over the logits of a chunk, which are in memory
between two products. What this leaves out (launches, waves that are not full, products that are small) makes it slower.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import records, render, tables, targets
from benchmarks.kernels import main as guarded
from benchmarks.shapes import Shape
from benchmarks.suite import BENCHMARKS, linear_kl, linear_logprobs, linear_ppo
from benchmarks.tune import counting
from benchmarks.tune.turning import CHUNKED, LOW_MEMORY, library

MARK = "predicted"
HEADINGS = ("case", "floor of products, ms", "floor of bytes, ms", "ours: products, ms", "ours: passes, ms",
            "ours in all, ms", "share of the limit", "targets")  # fmt: skip


@dataclass(frozen=True)
class Spent:
    """What ours really runs: products, and bytes of each logit that its own passes read and write."""

    products: float
    logit_bytes: int
    sum_bytes: int = 0  # of each number of the sums [N, D] over the head's rows, for every tile of the vocabulary


FP32, BF16 = 4, 2
EXPONENTIALS = FP32 + BF16  # products read, exponentials written as the second product's operand
LOW = "low memory"
SPENT: dict[tuple[str, str, str], Spent] = {  # by benchmark, mode and variant
    (linear_logprobs.NAME, linear_logprobs.FORWARD, ""): Spent(1, FP32),
    (linear_logprobs.NAME, linear_logprobs.FROZEN, ""): Spent(2, EXPONENTIALS),
    # The sums are read and written by the second product, and by the pass that brings them to the new shift
    (linear_logprobs.NAME, linear_logprobs.FROZEN, LOW): Spent(2, EXPONENTIALS, 4 * FP32),
    (linear_logprobs.NAME, linear_logprobs.TRAINED, ""): Spent(
        4,
        FP32  # the forward's pass
        + 2 * FP32  # the backward's, in place
        + 2 * FP32  # times each token's coefficient
        + FP32 + BF16,  # rounded to the products' operand
    ),
    # Tokens that the clip stops, 15 %, have no second product
    (linear_ppo.NAME, linear_ppo.FROZEN, ""): Spent(1.85, EXPONENTIALS),
    # Both rows are read three times, with or without products between them
    (linear_kl.NAME, linear_kl.FROZEN, ""): Spent(3, 6 * FP32 + BF16),
}  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """Seconds."""

    benchmark: str
    mode: str
    variant: str
    shape: Shape
    arithmetic: float
    traffic: float
    spent: float | None  # on products; None: ours has none
    passes: float
    bars: tuple[str, ...]

    @property
    def floor(self) -> float:
        return max(self.arithmetic, self.traffic)

    @property
    def ours(self) -> float | None:
        return None if self.spent is None else self.spent + self.passes


def floors(*, gemm_rate: float, copy_rate: float) -> list[Floor]:
    """Of every case that a target is set for, and of the other linear ones; rates in FLOP/s and bytes/s."""
    set_for = [
        (t, (t.benchmark, t.mode, LOW if t.what.startswith(LOW) else "", t.shape)) for t in targets.gpu_targets()
    ]
    cases = [*(case for _, case in set_for), *((*key, targets.H200.name) for key in SPENT)]
    found = []
    for case in dict.fromkeys(cases):
        name, mode, variant, at = case
        benchmark = BENCHMARKS[name]
        shape = next(s for s in benchmark.shapes["cuda"].usual if s.name == at)
        work = benchmark.modes[mode].work(shape, benchmark.dtypes["cuda"].itemsize)
        spent = SPENT.get((name, mode, variant))
        bars = tuple(f"{t.what}: {targets.Verdict(t, None).cells[1]}" for t, of in set_for if of == case)
        times = work.flops / gemm_rate, work.bytes / copy_rate
        if spent is None or work.products is None:
            found.append(Floor(name, mode, variant, shape, *times, None, 0.0, bars))
            continue
        products = spent.products * times[0] / work.products.count
        moved = spent.logit_bytes * shape["N"] * shape["V"] + spent.sum_bytes * tiles(shape) * shape["N"] * shape["D"]
        found.append(Floor(name, mode, variant, shape, *times, products, moved / copy_rate, bars))
    return found


def tiles(shape: Shape) -> int:
    """Of the vocabulary, in low memory on a GPU."""
    return -(-shape["V"] // int(library("logprob.tuning").TABLE["cuda"].tile_columns))


def table(gemm_rate: float, copy_rate: float) -> str:
    """Rates in TFLOP/s and TB/s."""
    lines = [
        [
            f"{', '.join(filter(None, (row.benchmark, row.mode, row.variant)))}, {row.shape}",
            tables.milliseconds(row.arithmetic) if row.arithmetic else tables.NONE,
            f"{row.traffic * 1e3:.3g}",
            tables.milliseconds(row.spent),
            tables.milliseconds(row.passes) if row.passes else tables.NONE,
            tables.milliseconds(row.ours),
            tables.NONE if row.ours is None else f"{row.floor / row.ours:.0%}",
            "; ".join(row.bars) or tables.NONE,
        ]
        for row in floors(gemm_rate=gemm_rate * 1e12, copy_rate=copy_rate * 1e12)
    ]
    said = f"Counted by `python -m benchmarks.tune.predict --gemm-rate {gemm_rate:g} --copy-rate {copy_rate:g}`"
    rates = f"products at {gemm_rate:g} TFLOP/s, bytes at {copy_rate:g} TB/s."
    return f"{render.table(HEADINGS, lines)}\n\n{said}: {rates} {launches()}"


def launches() -> str:
    """What the table leaves out, counted."""
    found = []
    for name, implementation in (("the fast path", CHUNKED), (LOW, LOW_MEMORY)):
        of = counting.frozen(targets.H200, implementation)
        parts = f"{of.products} products, {of.kernels} of Triton and {of.small} small ones"
        found.append(f"{name} makes {of.total} launches ({parts})")
    return f"With a frozen head at {targets.H200}, {'; '.join(found)}."


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--gemm-rate", type=click.FloatRange(min=0, min_open=True), required=True, help="TFLOP/s of products.")
@click.option("--copy-rate", type=click.FloatRange(min=0, min_open=True), required=True, help="TB/s of a copy.")
@click.option(
    "--readme",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put the table between <!-- benchmark:predicted --> and <!-- /benchmark --> in this file.",
)
def command(gemm_rate: float, copy_rate: float, readme: Path | None) -> None:
    """Print the floors of every target on a card of these rates, and the time expected of ours. Nothing is measured.

    \b
    python -m benchmarks.tune.predict --gemm-rate 790 --copy-rate 4.3 --readme benchmarks/NOTES.md
    """
    made = table(gemm_rate, copy_rate)
    if readme is None:
        click.echo(made)
        return
    try:
        text = render.updated(readme.read_text(encoding="utf-8"), {MARK: made})
    except ValueError as error:
        raise click.ClickException(f"{readme}: {error}") from None
    records.write_atomically(readme, text.encode())
    click.echo(f"updated {readme}")


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
