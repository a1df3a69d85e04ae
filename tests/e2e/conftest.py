"""A small PPO run, and the files that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard import reporting
from tests.e2e.ppo_material import (
    GOOD,
    WORDS,
    flags,
    no_report,
    run_command,
    settings,
    write_rows,
)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with prompts, functions, a reward adapter, an SFT adapter and a finished PPO run."""
    folder = tmp_path_factory.mktemp("material")
    rows = [{"prompt": f"the {WORDS[i % 6]} {'sat on ' * (i % 4)}", "solution": str(i)} for i in range(24)]
    write_rows(folder / "prompts.jsonl", rows)
    (folder / "good.py").write_text(GOOD)
    answers = [(f"the {word} {i}", " good answer", " bad mat") for i in range(4) for word in WORDS]
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in answers]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    small = ["--model", tiny_model, "--max_steps", 4, "--learning_rate", 1e-2, "--test_size", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "write_run_report", no_report)
        run_command("reward", "--dataset", folder / "pairs.jsonl", "--output_dir", folder / "rm", *small)
        run_command("sft", "--dataset", folder / "sft.jsonl", "--output_dir", folder / "sft", *small)
        run_command("ppo", *flags(settings(tiny_model, folder, folder / "old")))
    return folder


@pytest.fixture
def ppo(onecard, tmp_path, tiny_model, material) -> Callable[..., Any]:
    """`ppo({"--seed": 1})`: the small run in tmp_path/run with other settings."""

    def run(changes: dict[str, Any] | None = None):
        return onecard("ppo", *flags({**settings(tiny_model, material, tmp_path / "run"), **(changes or {})}))

    return run
