"""The run folder: what may be started there, and what a resumed run finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from onecard import runs
from onecard.config import DPOConfig
from onecard.errors import OnecardError


@pytest.fixture
def config(tmp_path):
    return DPOConfig(model="m", dataset="d", output_dir=str(tmp_path / "run"))


def test_opening_writes_nothing_and_beginning_writes_a_whole_config(config):
    run = runs.open_run(config)
    assert not run.folder.exists()
    runs.begin(run, config)
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert DPOConfig(**written) == config


def test_the_default_folder_is_named_after_the_command():
    assert runs.with_folder(DPOConfig(), "dpo").output_dir == "runs/dpo"
    assert runs.with_folder(DPOConfig(output_dir="x"), "dpo").output_dir == "x"


def test_a_folder_that_holds_a_run_is_not_started_over_by_accident(config):
    runs.begin(runs.open_run(config), config)
    with pytest.raises(OnecardError, match="holds a run already; add --resume"):
        runs.open_run(config)
    assert runs.open_run(replace(config, overwrite=True)).checkpoint is None


def test_overwriting_takes_the_old_run_away_only_when_the_new_one_begins(config):
    runs.begin(runs.open_run(config), config)
    folder = runs.open_run(config := replace(config, overwrite=True)).folder
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "notes.txt").write_text("mine")
    run = runs.open_run(config)
    assert (folder / "metrics.jsonl").read_text()
    runs.begin(run, config)
    assert (folder / "metrics.jsonl").read_text() == ""
    assert (folder / "notes.txt").read_text() == "mine"


def test_resume_under_other_settings_names_the_first_that_differs(config):
    runs.begin(runs.open_run(config), config)
    with pytest.raises(OnecardError, match=r"learning_rate is 0\.001 here and 5e-05 in"):
        runs.open_run(replace(config, resume=True, learning_rate=1e-3))


def test_resume_may_look_more_often(config):
    runs.begin(runs.open_run(config), config)
    run = runs.open_run(replace(config, resume=True, save_steps=1, eval_steps=5))
    assert run.notes == ("no whole checkpoint to go on from: starting at step 0.",)


def test_metrics_go_back_to_the_step_of_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "eval_loss": 1}\n{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n{"step": 3}\n{"st'
    )
    runs.keep_metrics(path, 2)
    assert path.read_text() == '{"step": 0, "eval_loss": 1}\n{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n'


def test_an_output_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OnecardError, match=r"output_dir: .*file is a file"):
        runs.open_run(DPOConfig(output_dir=str(tmp_path / "file")))


def test_resume_without_the_settings_of_the_run_touches_nothing(config, tmp_path):
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(OnecardError, match=r"holds checkpoints but no readable config\.yaml"):
        runs.open_run(replace(config, resume=True))
    (tmp_path / "run" / "config.yaml").write_text("learning_rate: [1")
    with pytest.raises(OnecardError, match=r"holds checkpoints but no readable config\.yaml"):
        runs.open_run(replace(config, resume=True))
    assert (tmp_path / "run" / "checkpoint-5").is_dir()
