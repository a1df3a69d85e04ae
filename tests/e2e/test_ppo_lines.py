"""Each line that docs/ppo-internals.md quotes is run by `onecard ppo`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from onecard.commands import cli
from tests.e2e.ppo_material import flags, settings
from tests.engine.data_material import built
from tests.engine.test_ppo_docs import details

FUNCTIONS = """
def dense(completion_ids):
    return [[0.1 * (i % 3) for i in ids] for ids in completion_ids]

def cost(completion_ids):
    return [len(ids) / 4 for ids in completion_ids]
"""


@contextmanager
def executed(lines: set[tuple[str, int]]) -> Iterator[set[tuple[str, int]]]:
    """Context that collects those of these lines (file, number) that are executed."""
    found: set[tuple[str, int]] = set()
    files = {file for file, _ in lines}
    has_lines: dict[CodeType, bool] = {}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in files:
            return None
        if code not in has_lines:
            numbers = {number for _, _, number in code.co_lines()}
            has_lines[code] = any(file == code.co_filename and number in numbers for file, number in lines)
        return each_line if has_lines[code] else None

    def each_line(frame: FrameType, event: str, argument: object) -> Any:
        line = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and line in lines:
            found.add(line)
        return each_line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(before)


def write_judge(folder: Path) -> Path:
    """A classifier with several labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {0: "rude", 1: "kind"}
    config = BertConfig(vocab_size=340, max_position_embeddings=64, id2label=names, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    built("<s> $A </s>").save_pretrained(folder)
    return folder


def test_each_quoted_line_is_run_by_the_command(quick, tmp_path, tiny_model, material):
    """Together these four runs have every detail of the page."""
    functions = tmp_path / "mine.py"
    functions.write_text(FUNCTIONS)
    rm = material / "rm" / "reward"
    runs = {
        "gae": {
            "--reward_model_path": rm, "--reward_funcs": f"reward_model + {functions}:dense", "--whiten_rewards": True,
            "--bootstrap_truncated": True, "--dual_clip": 3, "--entropy_coef": 0.01, "--adap_kl_ctrl": True,
            "--normalize_reward": True, "--value_init": "zero", "--missing_eos_penalty": 1,
            "--gradient_checkpointing": True,
            "--constraint_funcs": f"{functions}:cost", "--constraint_mode": "lagrangian",
        },
        "rloo": {
            "--advantage_estimator": "rloo", "--num_generations": 2, "--temperature": 0.7,
            "--constraint_funcs": f"{functions}:cost", "--constraint_threshold": 1.9,
            "--reward_model_path": write_judge(tmp_path / "judge"), "--reward_label": "kind", "--reward_funcs": None,
        },
        "a2c": {"--advantage_estimator": "a2c", "--critic": "shared"},
        "reinforce": {"--advantage_estimator": "reinforce"},
    }  # fmt: skip
    lines = {(str(detail.file), detail.number): detail.what for detail in details()}
    with executed(set(lines)) as found:
        for name, changes in runs.items():
            words = flags({**settings(tiny_model, material, tmp_path / name), "--max_steps": 1, **changes})
            with pytest.raises(SystemExit) as stop:
                cli.main(["ppo", *words])
            assert not stop.value.code, name
    missing = [what for line, what in lines.items() if line not in found]
    assert not missing, "\n".join(missing)
