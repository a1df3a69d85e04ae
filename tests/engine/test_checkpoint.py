"""Checkpoints are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onecard import checkpoint
from onecard.errors import OnecardError


def write(run_dir: Path, step: int, keep: int = 3) -> Path:
    def weights(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_bytes(bytes([step]) * 1000)

    return checkpoint.write_checkpoint(
        run_dir,
        step,
        save_weights=weights,
        training={"optimizer": {"lr": 0.1 * step}},
        state={"num_tokens": 10 * step},
        keep=keep,
    )


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path, 4)
    found, torn = checkpoint.newest_checkpoint(tmp_path)
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
    found, _ = checkpoint.newest_checkpoint(tmp_path)
    assert found is not None
    checkpoint.read_checkpoint(found)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint_10_is_newer_than_9_and_old_ones_go(tmp_path):
    for step in (8, 9, 10):
        write(tmp_path, step, keep=2)
    assert [folder.name for folder in checkpoint.checkpoint_folders(tmp_path)] == ["checkpoint-10", "checkpoint-9"]


def test_a_later_torn_checkpoint_does_not_push_out_the_one_just_written(tmp_path):
    (tmp_path / "checkpoint-40").mkdir()
    write(tmp_path, 20, keep=1)
    assert checkpoint.is_whole(tmp_path / "checkpoint-20")


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
    found, torn = checkpoint.newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [folder.name for folder in torn] == ["checkpoint-2"]


def test_a_save_that_fails_leaves_nothing_new_and_keeps_what_was_there(tmp_path):
    write(tmp_path, 1)

    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OnecardError, match="No space left"):
        checkpoint.write_checkpoint(tmp_path, 2, save_weights=full_disk, training={}, state={}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.is_whole(tmp_path / "checkpoint-1")


def test_a_temporary_folder_left_by_a_kill_is_no_checkpoint(tmp_path):
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    assert checkpoint.newest_checkpoint(tmp_path) == (None, ())


def test_forget_takes_the_run_and_leaves_the_rest(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "policy").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "thesis.tex").write_text("mine")
    checkpoint.forget(tmp_path, ("policy", "metrics.jsonl", "report.html"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
