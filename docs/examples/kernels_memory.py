"""What log-probabilities with a gradient hold in GPU memory: the figure of docs/kernels.md, counted and not measured.

python docs/examples/kernels_memory.py docs/kernels-memory.png    # writes the picture, prints its bytes

Bytes beyond hidden states and head, the head frozen, at the peak of the forward, between the passes, and at the peak of
the backward. Tile sizes are the library's own table's. A test counts the same by running the library without data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from onecard_kernels.logprob import tuning
from onecard_kernels.logprob.rows import BLOCK_BYTES
from onecard_kernels.records import Head

PHASES = ("forward", "held between", "backward")
LOGITS, FULL, TILE, SUMS, DIRECTION, RESULT = KINDS = (
    "[N, V] logits, 16 bits",
    "[N, V] in fp32",
    "a tile of logits",
    "sums of a tile, [rows, D]",
    "dlogp/dh, [N, D]",
    "the gradient of hidden, [N, D]",
)
STYLES = {  # grey, hatch: told apart without colour
    LOGITS: ("#ffffff", "////"),
    FULL: ("#d9d9d9", "...."),
    TILE: ("#8c8c8c", ""),
    SUMS: ("#ffffff", "xxxx"),
    DIRECTION: ("#1a1a1a", ""),
    RESULT: ("#ffffff", ""),
}
HIGH, LOW = 4, 2  # bytes of fp32, of bf16

Phases = tuple[dict[str, int], dict[str, int], dict[str, int]]  # bytes by kind, in the order of PHASES


@dataclass(frozen=True)
class Shape:
    tokens: int = 8192
    hidden: int = 4096
    vocabulary: int = 128256

    @property
    def logits(self) -> int:
        return self.tokens * self.vocabulary

    @property
    def states(self) -> int:
        return self.tokens * self.hidden


def eager(shape: Shape) -> Phases:
    """`log_softmax(hidden @ weight.T, -1, dtype=torch.float32).gather(...)`."""
    forward = {
        LOGITS: LOW * shape.logits,  # the product; freed after the forward, unless the caller keeps it
        FULL: HIGH * shape.logits  # its copy in fp32
        + HIGH * shape.logits,  # the log-softmax, which is kept for the backward
    }
    backward = {
        FULL: HIGH * shape.logits  # the log-softmax
        + HIGH * shape.logits  # what gather scatters into: zeros but for the targets
        + HIGH * shape.logits  # the log-softmax's gradient, before it is cast to 16 bits
    }
    return forward, {FULL: HIGH * shape.logits}, backward


def recompute(shape: Shape) -> Phases:
    """TRL 1.16's `ChunkedLogProbFunction`. Liger's tiles are 2048 x 4096, in fp32, with temporaries of their size."""
    tile = LOW * min(shape.tokens, 4096) * 32768  # its TOKEN_CHUNK_SIZE, and the width that the trainers give
    backward = {
        TILE: tile,  # the logits once more, overwritten by their gradient
        SUMS: HIGH * shape.states,  # sums of the gradient, over all tokens
        RESULT: LOW * shape.states,
    }
    return {TILE: tile}, {}, backward


def ours(implementation: str) -> Callable[[Shape], Phases]:
    def phases(shape: Shape) -> Phases:
        with tuning.override(implementation=implementation):
            sizes = tuning.choose(shape.vocabulary, torch.float32, torch.device("cuda"))
        rows = min(sizes.rows, shape.tokens)
        block = BLOCK_BYTES // (HIGH * shape.hidden)
        tile = rows * tuning.columns_of(sizes, shape.vocabulary, rows)
        forward = {
            TILE: HIGH * tile  # logits: the product's accumulators as they are
            + LOW * tile,  # e^(z - shift), the second product's operand
            SUMS: HIGH * rows * shape.hidden  # the second product, sum_v e_v W_v, which becomes the direction
            + HIGH * block * shape.hidden  # W[y] of some of these tokens
            + LOW * block * shape.hidden,  # the same as it was gathered
            DIRECTION: LOW * shape.states,
        }
        backward = {DIRECTION: LOW * shape.states, RESULT: LOW * shape.states}
        return forward, {DIRECTION: LOW * shape.states}, backward

    return phases


def tiled(shape: Shape) -> Phases:
    """Forward alone; logits stay on the chip. Of an H100's split of the vocabulary."""
    config = tuning.config_for((9, 0), torch.bfloat16, Head())
    tiles = -(-shape.vocabulary // config.columns)
    splits = -(-tiles // tuning.tiles_per_program(-(-shape.tokens // config.rows), tiles, config))
    sums = HIGH * shape.tokens * 2 * splits  # the largest logit and the sum, of each split
    sums += HIGH * shape.tokens  # the targets' logits
    return {SUMS: sums}, {}, {}


METHODS: dict[str, Callable[[Shape], Phases]] = {
    "eager PyTorch": eager,
    "recomputed\n(TRL 1.16)": recompute,
    "onecard,\nchunked": ours(tuning.CHUNKED),
    "onecard,\nlow memory": ours(tuning.LOW_MEMORY),
    "onecard, tiled\n(forward only)": tiled,
}


def count(shape: Shape) -> dict[str, Phases]:
    return {name.replace("\n", " "): method(shape) for name, method in METHODS.items()}


def readable(total: int) -> str:
    return f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"


def draw(path: str, shape: Shape) -> None:
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    pyplot.rcParams["hatch.linewidth"] = 0.6
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5.6), sharey=True, layout="constrained")
    most = 1.2e9  # of the right panel
    places, names, heads = [], [], []
    place = 0.0
    for label, method in METHODS.items():
        shown = [(name, held) for name, held in zip(PHASES, method(shape), strict=True) if held or method is not tiled]
        heads.append((place + (len(shown) - 1) / 2, label))
        for phase, held in shown:
            bar(panels, place, held, most)
            places.append(place)
            names.append(phase)
            place += 1
        place += 0.8
    panels[0].set_yticks(places, names, fontsize=9)
    panels[0].set_ylim(place - 0.9, -0.9)
    for middle, label in heads:
        panels[0].text(-0.26, middle, label, transform=panels[0].get_yaxis_transform(), ha="right", va="center",
                       fontsize=10, fontweight="bold")  # fmt: skip
    panels[0].set_xlim(0, 14.9e9)
    panels[0].set_xticks([0, 4e9, 8e9, 12e9], ["0", "4", "8", "12"])
    panels[0].set_title("GB, all on one scale", fontsize=10, loc="left")
    panels[1].set_xlim(0, most)
    panels[1].set_xticks([0, 2.5e8, 5e8, 7.5e8, 1e9], ["0", "250", "500", "750", "1000"])
    panels[1].set_title("MB, the lower part", fontsize=10, loc="left")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.35)
        panel.set_axisbelow(True)
    patches = [Patch(facecolor=c, hatch=h, edgecolor="black", linewidth=0.7) for c, h in STYLES.values()]
    figure.legend(patches, KINDS, loc="outside lower center", ncols=3, fontsize=9, frameon=False, handlelength=3)
    figure.suptitle(
        f"Memory beyond hidden states and a frozen head: N = {shape.tokens}, D = {shape.hidden}, "
        f"V = {shape.vocabulary}, bf16",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": json.dumps(count(shape))})


def bar(panels: Any, place: float, held: dict[str, int], most: float) -> None:
    """One phase of one method in both panels; on the right it stops at the border, with an arrow."""
    start = 0
    for kind in KINDS:
        if size := held.get(kind, 0):
            colour, hatch = STYLES[kind]
            for panel in panels:
                panel.barh(place, size, left=start, color=colour, hatch=hatch, edgecolor="black", linewidth=0.7)
            start += size
    text = readable(start)
    panels[0].annotate(text, (start, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    if start < most:
        panels[1].annotate(text, (start, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    else:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        panels[1].text(most * 0.99, place, f"{text} →", ha="right", va="center", fontsize=8.5, bbox=box)


if __name__ == "__main__":
    draw(sys.argv[1], Shape())
    for method, phases in count(Shape()).items():
        totals = (f"{phase}: {readable(sum(held.values()))}" for phase, held in zip(PHASES, phases, strict=True))
        print(f"{method:30}", *totals)
