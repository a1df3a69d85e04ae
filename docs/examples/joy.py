"""PPO towards happier stories: the data and the reward function of docs/ppo.md, and its table and curves.

python docs/examples/joy.py data ../shared/data/text/tinystories.jsonl joy.jsonl
python docs/examples/joy.py table docs/ppo.md docs/ppo-curves.png runs/joy-function-* runs/joy-model-*
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

JOY = re.compile(r"happy|happi|smil|lov|fun\b|laugh|joy|glad|hug", re.IGNORECASE)
MARKS = "<!-- results -->", "<!-- /results -->"


def joy(completions: list[str], **columns: object) -> list[float]:
    """A reward function: how many words of joy an answer has."""
    return [float(len(JOY.findall(text))) for text in completions]


def data(stories: str, output: str) -> None:
    """Beginnings of stories as prompts; as chosen a piece of some story with joy in it, as rejected one without."""
    draw = random.Random(0)
    pieces: dict[bool, list[str]] = {True: [], False: []}
    starts: list[str] = []
    for line in Path(stories).read_text(encoding="utf-8").splitlines():
        words = json.loads(line)["text"].split()
        starts += [" ".join(words[:count]) for count in (4, 6, 8)]
        for place in range(8, len(words) - 30, 10):
            piece = " " + " ".join(words[place : place + 30])
            pieces[len(JOY.findall(piece)) > 1].append(piece)
    rows = [
        {"prompt": start, "chosen": draw.choice(pieces[True]), "rejected": draw.choice(pieces[False])}
        for start in starts
        for _ in range(3)
    ]
    Path(output).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def table(page: str, picture: str, *runs: str) -> None:
    """Write what the runs came to between the marks in `page`, and their curves into `picture`."""
    lines = [
        "| run | score before | after | gain, in standard deviations of before | KL to the start, nats per answer |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        first, last = ([row for row in read(run) if "eval_objective/scores" in row][end] for end in (0, -1))
        gain = last["eval_objective/scores"] - first["eval_objective/scores"]
        deviations = gain / first["eval_objective/scores_std"]
        scores = f"{first['eval_objective/scores']:.2f} | {last['eval_objective/scores']:.2f}"
        lines.append(f"| {Path(run).name} | {scores} | {deviations:+.1f} | {last['eval_objective/kl']:.1f} |")
    text = Path(page).read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[-1] if MARKS[1] in rest else rest
    body = "\n".join(lines) + f"\n\n![Score, KL, entropy and explained variance of the six runs]({Path(picture).name})"
    Path(page).write_text(f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}", encoding="utf-8")
    curves(picture, runs)


def curves(picture: str, runs: tuple[str, ...]) -> None:
    """Reward, KL, clip fraction, entropy, and explained variance of each run; seeds of one reward share a colour."""
    from matplotlib import pyplot

    names = {
        "objective/scores": "score",
        "objective/kl": "KL to the start (nats per answer)",
        "policy/clipfrac_avg": "share of tokens clipped",
        "policy/entropy_avg": "entropy (nats per token)",
        "val/explained_variance": "variance explained by the critic",
    }
    kinds = list(dict.fromkeys(Path(run).name.rsplit("-", 1)[0] for run in runs))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.4), layout="constrained")
    for run in runs:
        kind = Path(run).name.rsplit("-", 1)[0]
        rows = [row for row in read(run) if "objective/scores" in row]
        for place, name in enumerate(names):
            label = kind if run == next(other for other in runs if Path(other).name.startswith(kind)) else None
            style = {"color": f"C{kinds.index(kind)}", "alpha": 0.8, "label": label}
            axes[place].plot([row["step"] for row in rows], [row[name] for row in rows], **style)
    for axis, title in zip(axes, names.values(), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    {"data": data, "table": table}[sys.argv[1]](*sys.argv[2:])
