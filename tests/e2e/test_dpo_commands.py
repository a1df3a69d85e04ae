"""`onecard dpo` with each kind of loss and of reference: whole runs, stopped runs, and runs that read the cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ppo_material import all_finite, error_line, flags, metrics, without_clock
from tests.e2e.test_resume import stop_at
from tests.engine.dpo_material import labelled_rows


@pytest.fixture(autouse=True)
def own_cache(quick, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dpo(onecard, tiny_model, pairs, tmp_path):
    """`dpo("run", {"--beta": 0.5})`: a small run in tmp_path/run."""

    def run(folder: str, changes: dict[str, Any] | None = None):
        settings = {
            "--model": tiny_model,
            "--dataset": pairs,
            "--output_dir": tmp_path / folder,
            "--test_size": 4,
            "--max_steps": 4,
            "--save_steps": 2,
            "--per_device_train_batch_size": 2,
            "--gradient_accumulation_steps": 2,
            "--per_device_eval_batch_size": 3,
            "--learning_rate": 1e-2,
            "--eval_samples": 0,
        }
        return onecard("dpo", *flags({**settings, **(changes or {})}))

    return run


def worked(result: Any) -> str:
    assert result.code == 0, result.err
    return result.err


KINDS: dict[str, dict[str, Any]] = {
    "simpo": {"--loss_type": "simpo", "--beta": 2.0},
    "orpo": {"--loss_type": "orpo"},
    "cpo": {"--loss_type": "cpo", "--no_use_peft": True},
    "kto": {"--loss_type": "kto"},
    "apo_zero_unpaired": {"--loss_type": "apo_zero_unpaired", "--precompute_ref_log_probs": True},
    "WPO": {"--use_weighting": True},
    "MPO": {"--loss_type": ["sigmoid", "bco_pair", "sft"], "--loss_weights": [0.8, 0.2, 1.0]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_loss_learns_what_it_is_given(dpo, tmp_path, kind):
    """The held-out loss falls, and chosen answers gain on rejected ones."""
    changes = dict(KINDS[kind])
    if "kto" in kind or "unpaired" in kind:
        changes["--dataset"] = labelled_rows(tmp_path / "labelled.jsonl")
    worked(dpo("run", changes))
    assert all_finite(tmp_path / "run")
    first, *_, last = (row for row in metrics(tmp_path / "run") if "eval_loss" in row)
    assert last["eval_loss"] < first["eval_loss"] - 0.01
    assert last["eval_logps/chosen"] - last["eval_logps/rejected"] > (
        first["eval_logps/chosen"] - first["eval_logps/rejected"]
    )


def test_a_loss_without_a_reference_loads_none(dpo, monkeypatch):
    from onecard.algorithms import common

    asked = []

    def watched(config, *, trained, reference=False, scalar=False):
        asked.append(reference)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_roles", watched)
    dpo("run", {"--loss_type": "simpo"})
    dpo("run", {"--loss_type": "hinge"})
    assert asked == [False, True]


def same_weights(first: Path, second: Path) -> bool:
    """Of an adapter, or of a whole model."""
    names = [path.name for path in (first / "policy").glob("*.safetensors")]
    return bool(names) and all(
        (first / "policy" / n).read_bytes() == (second / "policy" / n).read_bytes() for n in names
    )


@pytest.mark.parametrize("kind", ["lora", "all weights", "kto"])
def test_a_stopped_run_with_a_reference_pass_goes_on_bit_for_bit(dpo, monkeypatch, tmp_path, kind):
    """With the log-probs that the first run left on disk, and where somebody has cleared them away."""
    changes: dict[str, Any] = {"--precompute_ref_log_probs": True}
    if kind == "all weights":
        changes["--no_use_peft"] = True
    if kind == "kto":
        changes |= {"--loss_type": "kto", "--dataset": labelled_rows(tmp_path / "labelled.jsonl")}
    assert "read from" not in worked(dpo("whole", changes))
    cache = tmp_path / "cache" / "ref_logps"
    files = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert len(files) == 2  # training and held-out examples
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert dpo("kept", changes).code == 130
    shutil.copytree(tmp_path / "kept", tmp_path / "lost")
    for folder in ("kept", "lost"):
        if folder == "lost":
            shutil.rmtree(cache)
        said = worked(dpo(folder, {**changes, "--resume": True}))
        assert "checkpoint-2" in said
        assert said.count("are read from") == (2 if folder == "kept" else 0)
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == files
        assert without_clock(tmp_path / folder) == without_clock(tmp_path / "whole")
        assert same_weights(tmp_path / folder, tmp_path / "whole")


def test_a_reference_pass_learns_what_asking_each_step_does(dpo, tmp_path):
    """To rounding: log-probs of about 60 nats from other batches, 1e-5; four steps of Adam do not undo that.

    All but the accuracies, which at first are of differences that are nothing but rounding.
    """
    worked(dpo("asked"))
    worked(dpo("read", {"--precompute_ref_log_probs": True}))
    for asked, read in zip(metrics(tmp_path / "asked"), metrics(tmp_path / "read"), strict=True):
        for name in asked:
            if not name.startswith(("time/", "memory/")) and "accuracies" not in name:
                assert read[name] == pytest.approx(asked[name], rel=1e-3, abs=1e-4), name


@pytest.fixture
def adapter(dpo, tmp_path) -> Path:
    worked(dpo("before"))
    return tmp_path / "before" / "policy"


def test_rewards_are_counted_from_the_reference_of_its_own(dpo, tmp_path, adapter):
    worked(dpo("run", {"--ref_adapter": adapter}))
    start = metrics(tmp_path / "run")[0]
    before = [row for row in metrics(tmp_path / "before") if "eval_loss" in row]
    # The new policy is the base, and the reference what it had become: all that was learned, backwards.
    for name in ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"):
        assert start[name] == pytest.approx(-before[-1][name], abs=1e-4)
        assert abs(start[name]) > 1e-3
    assert start["eval_logps/chosen"] == pytest.approx(before[0]["eval_logps/chosen"], abs=1e-4)


def test_a_run_goes_on_with_the_reference_that_it_began_with(dpo, tmp_path, adapter):
    worked(dpo("run", {"--ref_adapter": tmp_path / "before"}))
    worked(dpo("before", {"--overwrite": True, "--seed": 3}))
    line = error_line(dpo("run", {"--ref_adapter": tmp_path / "before", "--resume": True}))
    assert "the ref_adapter of the run" in line


def test_a_run_does_not_replace_its_own_reference(dpo, tmp_path, adapter):
    line = error_line(dpo("before", {"--ref_adapter": adapter, "--overwrite": True}))
    assert "ref_adapter: " in line
    assert (adapter / "adapter_config.json").is_file()
