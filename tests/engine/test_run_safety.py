"""Run folders and kills, other processes, and other people's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from onecard.config import DPOConfig
from onecard.training import checkpoint, lock, run_folder
from onecard.utils import files
from onecard.utils.errors import OnecardError
from tests.engine.kill_points import die_before

SAME = {"command": "dpo", "training data": "abc"}


@pytest.fixture
def config(tmp_path):
    return DPOConfig(model="m", dataset="d", output_dir=str(tmp_path / "run"))


def begin(config: DPOConfig) -> Path:
    run = run_folder.open_run(config)
    with run_folder.locked(run):
        run_folder.begin(run, config, SAME)
    return run.folder


def log_and_save(folder: Path, step: int) -> None:
    info = run_folder.read_info(folder)
    assert info is not None
    run_folder.log(folder, {"step": step})
    checkpoint.write_checkpoint(
        folder, step, run=info.id, save_weights=weights, training={}, state={}, keep=1, logs=run_folder.LOGS
    )


def weights(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "adapter.safetensors").write_bytes(bytes(100))


def export(folder: Path) -> None:
    run_folder.write_folder(folder, "policy", lambda into: files.write_text(into / "adapter_config.json", "{}"))


def finished(config: DPOConfig) -> Path:
    """A run with logs, a checkpoint and an export, beside somebody's notes."""
    folder = begin(config)
    log_and_save(folder, 1)
    export(folder)
    (folder / "report.html").write_text("<html>")
    (folder / "notes.md").write_text("mine")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files.list_files(folder)}


# --- kills between two file operations


def start(config: DPOConfig) -> None:
    begin(config)


def go_on(config: DPOConfig) -> None:
    begin(replace(config, resume=True))


def overwrite(config: DPOConfig) -> None:
    begin(replace(config, overwrite=True))


def save(config: DPOConfig) -> None:
    log_and_save(Path(config.output_dir), 2)


def write_policy(config: DPOConfig) -> None:
    export(Path(config.output_dir))


@pytest.mark.parametrize(
    ("work", "least"),
    [
        (overwrite, 18), (save, 10),
        *(pytest.param(*each, marks=pytest.mark.grid) for each in ((start, 8), (go_on, 6), (write_policy, 8))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_run_killed_before_any_file_operation_can_go_on(
    tmp_path: Path, config: DPOConfig, work: Callable[[DPOConfig], None], least: int
) -> None:
    if work is not start:
        finished(config)
        if work is go_on:
            log_and_save(Path(config.output_dir), 2)
            shutil.rmtree(Path(config.output_dir) / "policy")
            os.truncate(Path(config.output_dir) / "checkpoint-2" / "training.pt", 0)
            log_and_save(Path(config.output_dir), 1)
    pristine, number = tmp_path / "pristine", 0
    folder = Path(config.output_dir)
    if folder.exists():
        shutil.copytree(folder, pristine)
    while True:
        killed = die_before(number, lambda: work(config), tmp_path)
        after = tmp_path / "after"
        for way in ("resume", "overwrite"):
            if folder.exists():
                shutil.copytree(folder, after)
            again = replace(config, output_dir=str(after), **{way: True})
            run = run_folder.open_run(again)
            with run_folder.locked(run):
                run_folder.begin(run, again, SAME)
            if way == "resume" and work in (save, write_policy, go_on):
                assert run.checkpoint is not None
            if pristine.exists():
                assert (after / "notes.md").read_text() == "mine"
            assert not [path for path in after.iterdir() if path.name.startswith(".")]
            shutil.rmtree(after)
        if not killed:
            break
        number += 1
        if folder.exists():
            shutil.rmtree(folder)
        if pristine.exists():
            shutil.copytree(pristine, folder)
    assert number >= least


def test_a_kill_while_replacing_leaves_the_old_or_new_folder(tmp_path: Path) -> None:
    target, number = tmp_path / "merged", 0

    def write(text: str) -> None:
        files.replace_folder(target, lambda folder: files.write_text(folder / "config.json", text))

    write("old")
    while die_before(number, lambda: write("new"), tmp_path):
        files.recover(target)
        assert tree(tmp_path) in ({"merged/config.json": b"old"}, {"merged/config.json": b"new"})
        number += 1
        write("old")
    assert number >= 6
    assert tree(tmp_path) == {"merged/config.json": b"new"}


# --- two processes

HOLDER = """
import sys, time
from onecard.training import run_folder
from onecard.config import DPOConfig
config = DPOConfig(model="m", dataset="d", output_dir=sys.argv[1], overwrite=True)
run = run_folder.open_run(config)
with run_folder.locked(run):
    run_folder.begin(run, config, {"command": "dpo", "training data": "abc"})
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_another_process_uses_is_refused(config):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, config.output_dir], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = tree(Path(config.output_dir))
        for changes in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OnecardError, match=f"process {other.pid} is running in "):
                run_folder.open_run(replace(config, **changes))
            assert tree(Path(config.output_dir)) == before
        other.kill()  # the lock dies with its process
    assert begin(replace(config, resume=True)).is_dir()


def test_of_two_that_start_together_one_begins(config):
    first, second = run_folder.open_run(config), run_folder.open_run(config)
    with run_folder.locked(first):
        run_folder.begin(first, config, SAME)
        with pytest.raises(OnecardError, match=f"process {os.getpid()} is running in"), run_folder.locked(second):
            pass
    with pytest.raises(OnecardError, match="another process has started a run in"), run_folder.locked(second):
        pass


def test_a_worker_that_outlives_its_run_keeps_no_lock(config, tmp_path):
    """As one of `multiprocessing` does, which shares the open file."""
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.close(reader)
        run = run_folder.open_run(config)
        with run_folder.locked(run):
            if os.fork() == 0:
                os.close(writer)
                import time

                time.sleep(30)
            os._exit(0)
    os.close(writer)
    os.waitpid(holder, 0)
    lock.check_unlocked(Path(config.output_dir))
    os.close(reader)


# --- other people's files


def hydra(folder: Path) -> None:
    (folder / "plots").mkdir(parents=True)
    (folder / "config.yaml").write_text("defaults: []\n")
    (folder / "plots" / "loss.png").write_text("mine")
    (folder / "metrics.jsonl").write_text("{}\n")


def trainer(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir(parents=True)
    (folder / "checkpoint-500" / "trainer_state.json").write_text("{}")


def a_run_json(folder: Path) -> None:
    folder.mkdir()
    (folder / "run.json").write_text('{"name": "mine"}')


@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("foreign", [hydra, trainer, a_run_json])
def test_a_folder_of_something_else_is_left_alone(config, foreign, changes):
    folder = Path(config.output_dir)
    foreign(folder)
    before = tree(folder)
    with pytest.raises(OnecardError, match=r"is not a run folder, but has '.*', which a run would replace"):
        run_folder.open_run(replace(config, **changes))
    assert tree(folder) == before


def in_the_policy(folder: Path) -> Path:
    return folder / "policy" / "notes.md"


def in_a_checkpoint(folder: Path) -> Path:
    return folder / "checkpoint-1" / "policy" / "notes.md"


def a_checkpoint_of_a_trainer(folder: Path) -> Path:
    (folder / "checkpoint-500").mkdir()
    return folder / "checkpoint-500" / "trainer_state.json"


@pytest.mark.parametrize("changes", [{"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("place", [in_the_policy, in_a_checkpoint, a_checkpoint_of_a_trainer])
def test_somebodys_files_in_the_folders_of_a_run_are_named(config, place, changes):
    folder = finished(config)
    place(folder).write_text("mine")
    before = tree(folder)
    with pytest.raises(OnecardError, match=r"is not a (file|checkpoint) of the run; move it away"):
        run_folder.open_run(replace(config, **changes))
    assert tree(folder) == before


def test_temporary_files_of_others_stay(config):
    folder = finished(config)
    for name in (".notes.tmp", ".notes.4194305.tmp", ".policy.tmp"):
        (folder / name).write_text("mine")
    overwrite(config)
    assert {path.name for path in folder.glob(".*")} == {".notes.tmp", ".notes.4194305.tmp", ".policy.tmp"}


@pytest.mark.parametrize("name", ["policy", "plots", "checkpoint-1", "config.yaml", "metrics.jsonl", "run.lock"])
@pytest.mark.parametrize("changes", [{"resume": True}, {"overwrite": True}])
def test_links_are_not_followed(config, tmp_path, name, changes):
    folder = finished(config)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "elsewhere" if name.partition("-")[0] in ("policy", "plots", "checkpoint") else
                    tmp_path / "elsewhere" / "file")  # fmt: skip
    with pytest.raises(OnecardError, match=f"{name} is not a (plain|regular|checkpoint)"):
        run_folder.open_run(replace(config, **changes))
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


def test_a_link_to_a_folder_works_and_one_to_nothing_does_not(config, tmp_path):
    (tmp_path / "disk").mkdir()
    Path(config.output_dir).symlink_to(tmp_path / "disk")
    begin(config)
    assert (tmp_path / "disk" / "run.json").is_file()
    shutil.rmtree(tmp_path / "disk")
    with pytest.raises(OnecardError, match="run is a broken link"):
        run_folder.open_run(config)


# --- damage


def test_a_finished_run_with_a_torn_checkpoint_is_kept(config):
    folder = finished(config)
    log_and_save(folder, 2)
    os.truncate(folder / "checkpoint-2" / "training.pt", 1)
    before = tree(folder)
    with pytest.raises(OnecardError, match=r"checkpoint-2 is damaged .* no complete checkpoint; add --overwrite"):
        run_folder.open_run(replace(config, resume=True))
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"metrics\.jsonl has 0 rows, expected 1 at checkpoint-1"),
        ('{"step": 7}\n', r"metrics\.jsonl was changed after checkpoint-1 was written"),
    ],
)
def test_logs_that_were_cut_or_changed_are_named(config, text, message):
    folder = finished(config)
    (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(OnecardError, match=message):
        run_folder.open_run(replace(config, resume=True))


def test_a_checkpoint_of_another_run_is_refused(config, tmp_path):
    folder = finished(config)
    other = finished(replace(config, output_dir=str(tmp_path / "other"), seed=3))
    shutil.rmtree(folder / "checkpoint-1")
    shutil.copytree(other / "checkpoint-1", folder / "checkpoint-1")
    with pytest.raises(OnecardError, match="checkpoint-1 is a checkpoint of another run"):
        run_folder.open_run(replace(config, resume=True))
    with pytest.raises(OnecardError, match="checkpoint-1 is a checkpoint of another run"):
        run_folder.open_run(replace(config, overwrite=True))
