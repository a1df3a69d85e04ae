"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from onecard.training import checkpoint
from onecard.utils import files
from onecard.utils.errors import OnecardError


def write(run_dir: Path, step: int, keep: int = 3) -> Path:
    def weights(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_bytes(bytes([step]) * 1000)

    return checkpoint.write_checkpoint(
        run_dir,
        step,
        run="a",
        save_weights=weights,
        training={"optimizer": {"lr": 0.1 * step}},
        state={"num_tokens": 10 * step},
        keep=keep,
    )


def is_complete(folder: Path) -> bool:
    manifest = checkpoint.read_manifest(folder)
    return manifest is not None and checkpoint.is_complete(folder, manifest)


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path, 4)
    found, torn = checkpoint.newest_checkpoint(tmp_path, "a")
    assert found is not None
    assert (found.step, torn) == (4, ())
    training, state = checkpoint.read_checkpoint(found)
    assert training == {"optimizer": {"lr": 0.4}}
    assert state == {"num_tokens": 40, "step": 4}


def test_random_states_go_on_where_they_were(tmp_path):
    torch.manual_seed(3)
    torch.rand(5)
    write(tmp_path, 1)
    expected = torch.rand(3)
    torch.manual_seed(99)
    found, _ = checkpoint.newest_checkpoint(tmp_path, "a")
    assert found is not None
    checkpoint.read_checkpoint(found)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint_10_is_newer_than_9_and_old_ones_go(tmp_path):
    for step in (8, 9, 10):
        write(tmp_path, step, keep=2)
    assert [folder.name for folder in checkpoint.checkpoint_folders(tmp_path)] == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize("left", ["some files", "folders alone"])
def test_a_removal_that_a_kill_has_cut_off_is_gone_on_with(tmp_path, left):
    for step in (1, 2, 3):
        write(tmp_path, step)
    for path in sorted((tmp_path / "checkpoint-1").rglob("*")):
        if path.is_file() and (left == "folders alone" or path.name != checkpoint.MANIFEST):
            path.unlink()
    checkpoint.remove_old_checkpoints(tmp_path, 3, run="a", keep=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_torn_checkpoint_does_not_push_out_a_new_one(tmp_path):
    (tmp_path / "checkpoint-40").mkdir()
    write(tmp_path, 20, keep=1)
    assert is_complete(tmp_path / "checkpoint-20")


def cut_short(folder: Path) -> None:
    path = folder / "policy" / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(folder: Path) -> None:
    path = folder / "training.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def lose_a_file(folder: Path) -> None:
    (folder / "state.json").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def half_a_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:20])


def a_manifest_of_another_shape(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps(["a"]))


@pytest.mark.parametrize(
    "damage", [cut_short, flip_a_byte, lose_a_file, lose_the_manifest, half_a_manifest, a_manifest_of_another_shape]
)
def test_a_torn_checkpoint_is_passed_over(tmp_path, damage):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    found, torn = checkpoint.newest_checkpoint(tmp_path, "a")
    assert found is not None
    assert found.step == 1
    assert [folder.name for folder in torn] == ["checkpoint-2"]


def test_a_save_that_fails_keeps_what_was_there(tmp_path):
    write(tmp_path, 1)

    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OnecardError, match="No space left"):
        checkpoint.write_checkpoint(tmp_path, 2, run="a", save_weights=full_disk, training={}, state={}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert is_complete(tmp_path / "checkpoint-1")


def test_a_temporary_folder_left_by_a_kill_is_no_checkpoint(tmp_path):
    (tmp_path / ".checkpoint-7.4711.tmp").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    assert checkpoint.newest_checkpoint(tmp_path, "a") == (None, ())


def test_a_checkpoint_of_another_run_or_name_is_refused(tmp_path):
    folder = write(tmp_path, 2)
    with pytest.raises(OnecardError, match="checkpoint-2 is a checkpoint of another run; move it away"):
        checkpoint.newest_checkpoint(tmp_path, "b")
    folder.rename(tmp_path / "checkpoint-9")
    with pytest.raises(OnecardError, match="checkpoint-9 was written as checkpoint-2; rename it back"):
        checkpoint.newest_checkpoint(tmp_path, "a")


def test_old_checkpoints_of_other_runs_and_files_of_others_stay(tmp_path):
    checkpoint.write_checkpoint(tmp_path, 1, run="b", save_weights=lambda _: None, training={}, state={}, keep=1)
    (write(tmp_path, 2) / "policy" / "notes.md").write_text("mine")
    write(tmp_path, 3, keep=1)
    assert files.list_files(tmp_path / "checkpoint-2") == ["policy/notes.md"]
    assert (tmp_path / "checkpoint-1" / "manifest.json").is_file()


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_what_cannot_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch, number):
    write(tmp_path, 1)

    def fails(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "digest", fails)
    with pytest.raises(OnecardError, match=rf"cannot be read \(.*{os.strerror(number)}.*\); nothing was changed"):
        checkpoint.newest_checkpoint(tmp_path, "a")
