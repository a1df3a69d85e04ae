"""Every family of models through every command, and its numbers against plain transformers.

    python tests/models/matrix.py                        # the page on standard output
    python tests/models/matrix.py --write docs/models.md
    python tests/models/matrix.py llama mamba2           # some families

`INTRODUCTION` describes the columns. Expected values are computed with transformers and PEFT alone: the model loaded by
its Auto class, one text per forward pass, no KV cache, evaluation mode. Texts are longer than sliding windows, top-k
attention and the original contexts of long-context RoPE.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's sys.path lacks the root

from onecard.utils.errors import OnecardError, did_you_mean
from tests.models.checks import CHECKS, EXACT, REFUSED, Bench, Inexact, adapted
from tests.models.families import FAMILIES, write_model


def write_data(folder: Path) -> None:
    """A few rows for each command, some longer than the window and the original context."""
    folder.mkdir(parents=True)
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "good", "dog", "sat", "on", "the", "cat"]
    rows = [
        {
            "prompt": " ".join(words[: 3 + place]),
            "completion": " " + " ".join(words[place:]),
            "chosen": " a good answer " * (1 + place % 3),
            "rejected": " bad mat",
        }
        for place in range(6)
    ]
    for name, columns in {
        "texts": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected")
    }.items():  # fmt: skip
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Row:
    """A family's cells by column: `exact`, `refused: why`, or what is wrong; and its batch layout and decoding mode."""

    name: str
    how: str
    cells: dict[str, str]

    @property
    def wrong(self) -> dict[str, str]:
        return {column: cell for column, cell in self.cells.items() if cell != EXACT and not cell.startswith(REFUSED)}


def how_it_runs(bench: Bench) -> str:
    """The batch layout and decoding mode that the startup check chooses."""
    try:
        roles, _ = adapted(bench)
    except OnecardError:
        return "–"
    return f"{roles.layout}, {roles.decoding}"


def make_row(name: str, columns: Sequence[str] = tuple(CHECKS)) -> Row:
    """Run all checks on one family."""
    cells = {}
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(io.StringIO()):
        bench = Bench(Path(work) / "model", Path(work) / "data", Path(work))
        write_model(FAMILIES[name], bench.model)
        write_data(bench.data)
        how = how_it_runs(bench)
        for column in columns:
            try:
                CHECKS[column](bench)
                cells[column] = EXACT
            except OnecardError as error:
                cells[column] = f"{REFUSED}{error}".replace(f"{work}/", "")
            except Inexact as error:
                cells[column] = f"wrong: {error}"
            except Exception as error:  # a traceback is a wrong cell, and the others are still wanted
                cells[column] = f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Row(name, how, cells)


def page(rows: Sequence[Row]) -> str:
    """The table as Markdown; reasons of refusals are listed below it."""
    import peft
    import transformers

    reasons: dict[str, tuple[int, str]] = {}  # reasons that differ in their numbers alone are one
    lines = [
        f"| model | batches, sampling | {' | '.join(CHECKS)} |",
        "|---|---|" + "---|" * len(CHECKS),
    ]
    for row in rows:
        shown = []
        for cell in row.cells.values():
            refused = cell.startswith(REFUSED)
            key = re.sub(r"\d[\d.e-]*", "N", cell)
            shown.append(f"refused {reasons.setdefault(key, (len(reasons) + 1, cell))[0]}" if refused else cell)
        lines.append(f"| {row.name} | {row.how} | {' | '.join(shown)} |")
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    return "\n".join(
        [
            INTRODUCTION.format(count=len(rows), versions=versions),
            *lines,
            "",
            "Refusals:",
            "",
            *(f"{number}. {cell.removeprefix(REFUSED)}" for number, cell in reasons.values()),
            "",
        ]
    )


INTRODUCTION = """# Models

{count} families of causal language models. A tiny random model of each runs through every command, and
its numbers are compared with plain transformers: one text per forward pass, no KV cache, evaluation
mode. `python tests/models/matrix.py --write docs/models.md` writes this page
({versions}, on a CPU).

A cell is `exact` or `refused`. A refused command ends with exit code 2 and one line that says why, and
writes nothing. The lines are below the table.

| column | what must be equal |
|---|---|
| log-probs | log-probs of the run's batches (packed, padded, with a shared prompt), in training mode, with an adapter |
| bf16 | the same in bfloat16: no farther from float32 than plain transformers in bfloat16 |
| gradients | gradients of a loss over these log-probs, for every trained parameter |
| scores | a reward adapter's scores, read at each text's last token |
| greedy | tokens sampled at temperature 0 from prompts of different lengths in one batch |
| sft, dpo, reward | the exported adapter's loss on held-out rows, and the loss that the run logged |
| ppo | the KL to the reference before the first step equals 0; the startup checks pass; the exported adapter loads |
| generate | the text of the greedy answer |
| merge | logits of the merged model, and of the base with the adapter |

`batches, sampling`: the batch layout and the decoding mode that the startup check chooses, the fastest
exact ones. Layouts: `packed` (texts concatenated, kept apart by onecard's attention), `restarted`
(concatenated, kept apart by transformers' masks), `padded`, or `single` (one text per pass). Decoding:
`slots` (continuous batching: a finished row takes the next prompt), `padded` (static batches), `single`
(one prompt at a time), or `uncached` (no KV cache: each token runs the whole text again).
"""


def main() -> None:
    """The table of the families that are named, or of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", help="names of tests/models/families.py; none: all of them")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page here instead of to standard output")
    given = parser.parse_args()
    unknown = [name for name in given.families if name not in FAMILIES]
    if unknown:
        parser.error(f"unknown family '{unknown[0]}'.{did_you_mean(unknown[0], FAMILIES)}")
    names = given.families or sorted(FAMILIES)
    rows = []
    for place, name in enumerate(names, start=1):
        rows.append(make_row(name))
        print(f"{place}/{len(names)} {name} {rows[-1].wrong or ''}", file=sys.stderr, flush=True)
    if given.write:
        given.write.write_text(page(rows), encoding="utf-8")
    else:
        print(page(rows))
    sys.exit(1 if any(row.wrong for row in rows) else 0)


if __name__ == "__main__":
    main()
