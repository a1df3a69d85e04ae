"""Where `generate` and `evaluate` write, and what of other people's they leave alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def generate(onecard, tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat"}\n')

    def run(output: Path, *more: object):
        return onecard("generate", "--model", tiny_model, "--dataset", tmp_path / "rows.jsonl", "--max_new_tokens", 3,
                       "--output", output, *more)  # fmt: skip

    return run


def test_a_file_is_replaced_only_where_that_is_asked_for(generate, tmp_path):
    out = tmp_path / "out.jsonl"
    assert generate(out).code == 0
    first = out.read_text()
    refused = generate(out, "--seed", 3)
    assert refused.code == 2
    assert "out.jsonl exists. Give --overwrite to replace it" in refused.err
    assert out.read_text() == first
    assert generate(out, "--overwrite").code == 0
    assert json.loads(out.read_text())["prompt"] == "the cat"


def test_what_is_no_plain_file_is_never_replaced(generate, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "folder", "pipe", "/dev/null"):
        done = generate(tmp_path / name, "--overwrite")
        assert done.code == 2
        assert f"{name} is a folder, a link or a device, expected a file or a new name" in done.err
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_the_dataset_is_not_replaced_by_its_answers(generate, tmp_path):
    done = generate(tmp_path / "." / "rows.jsonl", "--overwrite")
    assert done.code == 2
    assert "is the dataset itself; give another name" in done.err
    assert (tmp_path / "rows.jsonl").read_text() == '{"prompt": "the cat"}\n'


def test_an_evaluation_replaces_its_own_files_alone(onecard, tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat"}\n')
    folder = tmp_path / "found"
    words = ["evaluate", "--model", tiny_model, "--dataset", tmp_path / "rows.jsonl", "--response_length", 3,
             "--output_dir", folder]  # fmt: skip
    assert onecard(*words).code == 0
    assert onecard(*words).code == 0
    (folder / "samples.jsonl").write_text("mine")
    refused = onecard(*words)
    assert refused.code == 2
    assert "has 'samples.jsonl' in it, expected a new or an empty folder" in refused.err
    assert (folder / "samples.jsonl").read_text() == "mine"
