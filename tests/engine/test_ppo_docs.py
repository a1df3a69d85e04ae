"""The pages on PPO say what the code does: quoted lines, tests, metrics and examples are checked.

`python tests/engine/test_ppo_docs.py` writes the line numbers anew, after code has moved.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onecard.config import TrainConfig
from onecard.training.trainer import Objective, Trainer
from onecard_kernels import Loss

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGE = DOCS / "ppo-internals.md"
PAGES = sorted(DOCS.glob("ppo*.md"))
METRICS_PAGE = DOCS / "metrics.md"
# | detail | [`file.py:12`](../folder/file.py#L12) | `the line` | `tests/file.py::test_name`, ... |
DETAIL = re.compile(
    r"^\| (?P<what>.+?) \| \[`(?P<file>[\w.]+):(?P<number>\d+)`\]\((?P<path>[\w./]+)#L(?P<anchor>\d+)\)"
    r" \| `(?P<code>[^`]+)` \| (?P<tests>.+) \|$"
)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
REWARD_PART = re.compile(r"rewards/.+/mean")  # the name of a run's own reward


@dataclass(frozen=True)
class Detail:
    """One row of the table, and the place of its row in the page."""

    place: int
    row: str
    what: str
    file: Path
    number: int
    code: str
    tests: tuple[tuple[str, str], ...]

    def lines(self) -> list[int]:
        """Where the quoted code stands in its file, counted from 1."""
        texts = self.file.read_text(encoding="utf-8").splitlines()
        return [number for number, text in enumerate(texts, start=1) if text.strip() == self.code]


def details() -> list[Detail]:
    """The rows of the table. A row of another form is an error: nothing would check it."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    places = [place for place, line in enumerate(lines) if line.startswith("|")][2:]  # after the two lines of its head
    found = []
    for place in places:
        match = DETAIL.match(lines[place])
        assert match, f"{PAGE.name}:{place + 1} has another form than {DETAIL.pattern}"
        file = (PAGE.parent / match["path"]).resolve()
        assert match["number"] == match["anchor"], f"{match['what']}: {match['number']} is linked as {match['anchor']}"
        assert match["file"] == file.name, f"{match['what']}: {match['file']} is linked as {file.name}"
        tests = tuple((name[0], name[1]) for name in TEST.findall(match["tests"]))
        assert tests, f"{match['what']}: no test is named"
        found.append(Detail(place, lines[place], match["what"], file, int(match["number"]), match["code"], tests))
    return found


def moved(detail: Detail) -> int:
    """The line where the detail's code stands now; of several, the nearest."""
    lines = detail.lines()
    if not lines:
        raise SystemExit(f"{detail.what}: `{detail.code}` is no line of {detail.file} any more; write the row anew.")
    return min(lines, key=lambda line: abs(line - detail.number))


def rewrite() -> int:
    """Put the right line numbers into the page; how many were wrong."""
    page, wrong = PAGE.read_text(encoding="utf-8").splitlines(keepends=True), 0
    for detail in details():
        line = moved(detail)
        if line != detail.number:
            name = detail.file.name
            old, new = (f"{name}:{detail.number}`]", f"{name}:{line}`]")
            text = page[detail.place].replace(old, new, 1).replace(f"#L{detail.number})", f"#L{line})", 1)
            page[detail.place], wrong = text, wrong + 1
    PAGE.write_text("".join(page), encoding="utf-8")
    return wrong


def test_each_quoted_line_stands_where_the_page_says():
    wrong = []
    for detail in details():
        assert detail.file.is_file(), f"{detail.what}: there is no {detail.file}"
        lines = detail.lines()
        if detail.number not in lines:
            now = f"stands on line {' and '.join(map(str, lines))}" if lines else "is no line of it"
            wrong.append(f"{detail.file.name}:{detail.number}: `{detail.code}` {now}")
    assert not wrong, "\n".join([*wrong, "moved lines: python tests/engine/test_ppo_docs.py writes their numbers anew"])


def test_each_named_test_exists():
    missing = []
    for detail in details():
        for file, name in detail.tests:
            path = ROOT / file
            tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
            if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
                missing.append(f"{detail.what}: {file}::{name}")
    assert not missing, "\n".join(missing)


def test_each_linked_file_and_heading_exists():
    for page in sorted(DOCS.glob("*.md")):
        text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))  # code may look like a link
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            if not target.startswith("http"):
                assert linked.is_file(), f"{page.name} links {target}"
            if linked.suffix == ".md" and anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in slugs, f"{page.name} links {target}"


@dataclass(frozen=True)
class Nothing:
    """A record of no tensors."""


@pytest.mark.parametrize(("limit", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_the_gradient_is_clipped_over_all_trained_weights(limit, expected):
    """Two roles' gradients of 3 and 4 from two backwards: one norm of 5, logged as it was."""
    policy, value = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    weights = SimpleNamespace(
        device=torch.device("cpu"), layout="packed", trained_parameters=lambda: {"policy": policy, "value": value}
    )
    job = SimpleNamespace(name="ppo", total_steps=1, first_schedule_step=0)
    trainer = Trainer(TrainConfig(max_grad_norm=limit), job, weights, None)
    objective = Objective(
        collate=lambda examples: Nothing(),
        count=len,
        losses=lambda batch, normalizer: (Loss((factor * w).sum(), {}) for factor, w in ((3, policy), (4, value))),
    )
    assert trainer.compute_gradients(objective, [[0]])["grad_norm"] == pytest.approx(5.0)
    assert [policy.grad.item(), value.grad.item()] == pytest.approx(expected, rel=1e-5)


def defined(lines: Iterable[str]) -> set[str]:
    """The names in the first cells of tables."""
    rows = [line for line in lines if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def example(name: str) -> str:
    """One of the pages' example files."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def general(names: Iterable[str]) -> set[str]:
    """Metric names with the reward's own name left open."""
    return {"rewards/NAME/mean" if REWARD_PART.fullmatch(name) else name for name in names}


def test_every_logged_metric_is_defined(onecard, tmp_path, tiny_model, pairs):
    """With the pages' own examples as rewards and costs. Both ways: nothing is defined that no run logs."""
    (tmp_path / "costs.py").write_text(example("costs.py"))
    (tmp_path / "rewards.py").write_text(example("rewards.py"))
    functions = re.findall(r"^def (\w+)", example("rewards.py"), re.MULTILINE)
    rewards = [word for name in functions for word in ("--reward_funcs", f"{tmp_path / 'rewards.py'}:{name}")]
    result = onecard(
        "ppo", "--model", tiny_model, "--dataset", pairs, *rewards, "--output_dir", tmp_path / "run",
        "--test_size", 2, "--response_length", 6, "--per_device_train_batch_size", 2, "--num_mini_batches", 2,
        "--num_ppo_epochs", 2, "--max_steps", 2,
        "--constraint_funcs", f"{tmp_path / 'costs.py'}:too_long", "--constraint_mode", "lagrangian",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = general(name for row in rows if "loss" in row for name in row)
    evaluated = general(
        name.removeprefix("eval_") for row in rows if "loss" not in row for name in row if name != "step"
    )
    lines = (DOCS / "ppo-metrics.md").read_text(encoding="utf-8").splitlines()
    ours, shared = defined(lines), defined(METRICS_PAGE.read_text(encoding="utf-8").splitlines())
    assert trained - shared <= ours
    assert ours <= trained
    [sentence] = [line for line in lines if line.startswith("Evaluation rows")]
    assert evaluated == {name.removeprefix("eval_") for name in re.findall(r"`(eval_[^`]+)`", sentence)}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert set(samples[0]) == {"step", "prompt", "completion", "score"}


if __name__ == "__main__":
    print(f"{PAGE}: {rewrite()} line numbers were wrong")
