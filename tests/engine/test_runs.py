"""The run folder: what may be started there, and what a resumed run finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from onecard.config import DPOConfig
from onecard.data.batches import PreferencePair, TokenSequence
from onecard.training import checkpoint, run_folder
from onecard.training.identity import examples_digest
from onecard.utils.errors import OnecardError

SAME = {"command": "dpo", "training data": "abc"}


@pytest.fixture
def config(tmp_path):
    return DPOConfig(model="m", dataset="d", output_dir=str(tmp_path / "run"))


def begin(config, identity=SAME) -> run_folder.Run:
    """Open a folder and begin there."""
    run = run_folder.open_run(config)
    with run_folder.locked(run):
        run_folder.begin(run, config, identity)
    return run


def test_opening_writes_nothing_and_beginning_a_whole_config(config):
    assert not run_folder.open_run(config).folder.exists()
    run = begin(config)
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert DPOConfig(**written) == config


def test_the_default_folder_is_named_after_the_command():
    assert run_folder.with_output_dir(DPOConfig(), "dpo").output_dir == "runs/dpo"
    assert run_folder.with_output_dir(DPOConfig(output_dir="x"), "dpo").output_dir == "x"


def test_a_folder_with_a_run_is_not_started_over_unasked(config):
    begin(config)
    with pytest.raises(OnecardError, match="holds a run already; add --resume"):
        run_folder.open_run(config)
    assert run_folder.open_run(replace(config, overwrite=True)).checkpoint is None


def test_overwriting_removes_a_run_when_the_next_begins(config):
    begin(config)
    folder = run_folder.open_run(config := replace(config, overwrite=True)).folder
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "notes.txt").write_text("mine")
    run_folder.open_run(config)
    assert (folder / "metrics.jsonl").read_text()
    begin(config)
    assert (folder / "metrics.jsonl").read_text() == ""
    assert (folder / "notes.txt").read_text() == "mine"


def saved(config) -> None:
    """A run with one whole checkpoint."""
    run = begin(config)
    save(run.folder, 5)


def save(folder: Path, step: int) -> None:
    """A checkpoint of the run that is in the folder."""
    info = run_folder.read_info(folder)
    assert info is not None
    checkpoint.write_checkpoint(
        folder, step, run=info.id, save_weights=lambda _: None, training={}, state={}, keep=2, logs=run_folder.LOGS
    )


def test_resume_names_the_first_setting_that_differs(config):
    saved(config)
    with pytest.raises(OnecardError, match=r"learning_rate is 0\.001 here and 5e-05 in"):
        run_folder.open_run(replace(config, resume=True, learning_rate=1e-3))


def test_resume_may_look_more_often(config):
    begin(config)
    more = replace(config, resume=True, save_steps=1, eval_steps=5)
    assert run_folder.open_run(more).notes == ("no complete checkpoint to resume from: starting at step 0.",)
    saved(replace(config, overwrite=True))
    found = run_folder.open_run(more).checkpoint
    assert found is not None
    assert found.step == 5


@pytest.mark.parametrize("other", [{**SAME, "command": "sft"}, {**SAME, "training data": "abd"}])
def test_another_command_or_other_data_does_not_go_on(config, other):
    saved(config)
    name = next(name for name in SAME if SAME[name] != other[name])
    with pytest.raises(OnecardError, match=f"--resume: expected the {name} of the run in "):
        begin(replace(config, resume=True), other)


def test_the_fingerprint_knows_data_order_and_masks():
    one, two = TokenSequence((1, 2), (False, True)), TokenSequence((1, 2), (True, True))
    apart = [TokenSequence((1,), (True,)), TokenSequence((2,), (True,))]
    prints = [[one], [two], [one, two], [two, one], apart]
    assert len({examples_digest(examples) for examples in prints}) == len(prints)
    assert examples_digest([PreferencePair(one, two)]) != examples_digest([PreferencePair(two, one)])


def test_a_folder_with_things_of_another_is_left_alone(config, tmp_path):
    (tmp_path / "run" / "reward").mkdir(parents=True)
    with pytest.raises(OnecardError, match="is not a run folder, but has 'reward'"):
        run_folder.open_run(config)


@pytest.mark.parametrize("setting", ["model", "dataset"])
def test_overwriting_does_not_take_away_what_the_new_run_reads(config, tmp_path, setting):
    saved(config)
    inside = str(tmp_path / "run" / "policy" / "x")
    with pytest.raises(OnecardError, match=f"{setting}: .* is part of the run in"):
        run_folder.open_run(replace(config, overwrite=True, **{setting: inside}))


def test_going_on_sets_damaged_checkpoints_aside(config):
    saved(config)
    folder = Path(config.output_dir)
    save(folder, 9)
    (folder / "checkpoint-9" / "training.pt").write_bytes(b"")
    (folder / ".checkpoint-7.4194305.tmp").mkdir()  # beyond the largest process id
    run = begin(replace(config, resume=True))
    assert run.notes[0] == "checkpoint-9 is damaged (files are missing or changed) and is skipped."
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-5", "checkpoint-9.damaged"]
    assert not (folder / ".checkpoint-7.4194305.tmp").exists()


def test_logs_go_back_to_the_checkpoint(config):
    run = begin(config)
    for step in (0, 1):
        run_folder.log(run.folder, {"step": step})
    save(run.folder, 1)
    before = (run.folder / "metrics.jsonl").read_text()
    run_folder.log(run.folder, {"step": 2})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"st')
    resumed = replace(config, resume=True)
    begin(resumed)
    assert (run.folder / "metrics.jsonl").read_text() == before


def test_an_output_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OnecardError, match=r"output_dir: .*file is a file"):
        run_folder.open_run(DPOConfig(output_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"holds a run but no readable config\.yaml"),
        ("learning_rate: [1", r"holds a run but no readable config\.yaml"),
        ("learning_rate: 1.0e-4\n", r"config\.yaml has been changed or truncated"),
    ],
)
def test_resume_without_the_settings_of_the_run_touches_nothing(config, text, message):
    saved(config)
    path = Path(config.output_dir) / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(OnecardError, match=message):
        run_folder.open_run(replace(config, resume=True))
    assert (path.parent / "checkpoint-5").is_dir()


def test_a_run_keeps_its_date(config, monkeypatch):
    monkeypatch.setattr(run_folder, "today", lambda: "2026-11-29")
    saved(config)
    monkeypatch.setattr(run_folder, "today", lambda: "2026-11-30")
    resumed = replace(config, resume=True)
    path = Path(config.output_dir) / "run.json"
    assert run_folder.open_run(resumed).info.date == "2026-11-29"
    assert run_folder.open_run(replace(config, overwrite=True)).info.date == "2026-11-30"
    before = path.read_text()
    begin(resumed)
    assert path.read_text() == before
    assert json.loads(before).items() >= {**SAME, "date": "2026-11-29"}.items()
