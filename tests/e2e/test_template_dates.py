"""A run keeps the date on which it began, which chat templates write: resumed on another day it is the same run."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from tests.e2e.test_resume import metrics, stop_at, weights

pytestmark = pytest.mark.usefixtures("quick")

DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Clock:
    """The clock that transformers gives to templates, on one day."""

    def __init__(self, day: int) -> None:
        self.day = datetime(2026, 11, day, 12)

    def now(self) -> datetime:
        return self.day


@pytest.fixture
def dated(tmp_path: Path, tiny_model: Path) -> Path:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "dated"))
    (folder / "chat_template.jinja").write_text(DATED)
    chats = [[{"role": "user", "content": f"the cat {place}"}] for place in range(12)]
    answer = [{"role": "assistant", "content": "sat on the mat"}]
    rows = [{"prompt": chat, "completion": answer} for chat in chats]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


COMMANDS = {
    "sft": ["--per_device_train_batch_size", 2],
    "ppo": ["--reward_funcs", "length:5", "--response_length", 4, "--batch_size", 4,
            "--per_device_train_batch_size", 2, "--num_ppo_epochs", 1],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_resumes_on_another_day(onecard, monkeypatch, quick, tmp_path, dated, command):
    def run(name: str, day: int, *more: object):
        monkeypatch.setattr(chat_template_utils, "datetime", Clock(day))
        settings = ["--test_size", 2, "--max_steps", 4, "--save_steps", 1, "--learning_rate", 1e-2, *COMMANDS[command]]
        return onecard(command, "--model", dated, "--dataset", tmp_path / "rows.jsonl", "--output_dir",
                       tmp_path / name, *settings, *more)  # fmt: skip

    assert run("whole", 29).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run("stopped", 29).code == 130
    resumed = run("stopped", 30, "--resume")
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.err
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    identities = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "stopped")]
    assert identities[0].pop("id") != identities[1].pop("id")
    assert identities[0] == identities[1]
    assert identities[0]["date"] == "2026-11-29"
    if command == "sft":  # and a run of the other day is another one
        assert run("next", 30).code == 0
        assert json.loads((tmp_path / "next" / "run.json").read_text())["date"] == "2026-11-30"
        assert weights(tmp_path / "next") != weights(tmp_path / "whole")
