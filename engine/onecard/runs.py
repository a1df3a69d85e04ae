"""The run folder: what may be started there, its `config.yaml`, and its `metrics.jsonl`."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from onecard import checkpoint
from onecard.batches import LabelledSequence, PreferencePair, Ranking, ScoredSequence, TokenSequence
from onecard.checkpoint import Checkpoint
from onecard.config import TrainConfig
from onecard.data.templates import today
from onecard.errors import OnecardError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # answers to held-out prompts, where a command makes some
IDENTITY = "run.json"
OUTPUTS = (CONFIG, METRICS, SAMPLES, IDENTITY, "report.html", "plots", "policy", "reward")
# Settings that a resumed run may change: they decide when to look, not what is learned.
FREE = {"output_dir", "resume", "overwrite", "dry_run", "save_steps", "save_total_limit"}
FREE |= {"logging_steps", "eval_steps", "eval_samples", "eval_sample_length"}
TRAINED = ("policy", "reward")  # what a finished run's folder holds its weights in

C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True)
class Run:
    """A folder that is ready for a run, the checkpoint to go on from, and what the user should know of it.

    `date`: the day on which the run began, which chat templates that write a date write to its end.
    """

    folder: Path
    checkpoint: Checkpoint | None
    notes: tuple[str, ...]
    date: str = ""


def holds_weights(folder: Path) -> bool:
    """Whether a folder is a model's or an adapter's."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def weights_folder(path: Path) -> Path:
    """`path`, or the folder of the trained weights in it where it is a run folder."""
    inside = (path / role for role in TRAINED)
    return path if holds_weights(path) else next(filter(holds_weights, inside), path)


def with_folder(config: C, command: str) -> C:
    """The same settings with `output_dir` filled in."""
    return config if config.output_dir else replace(config, output_dir=f"runs/{command}")


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says."""
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        raise OnecardError(f"{folder} holds a run but no readable {CONFIG} that says how it came about.")
    return settings


def check_same_settings(config: TrainConfig, folder: Path) -> None:
    """A run goes on under the settings it began with, or its two halves would be different experiments."""
    before = read_settings(folder)
    for name, value in asdict(config).items():
        if name not in FREE and name in before and before[name] != value:
            raise OnecardError(
                f"--resume: {name} is {value!r} here and {before[name]!r} in {folder / CONFIG}; "
                "go on with the same settings, or start anew in another output_dir."
            )


def open_run(config: TrainConfig) -> Run:
    """Decide what a command may do in its folder. Writes nothing."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise OnecardError(f"output_dir: {folder} is a file, expected a folder or a new name.")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise OnecardError(f"output_dir: {parent} cannot be written to.")
    if config.dry_run:
        return Run(folder, None, (), today())
    saved = bool(checkpoint.checkpoint_folders(folder))
    holds_run = saved or (folder / CONFIG).exists()
    if config.resume and saved:
        check_same_settings(config, folder)
        found, torn = checkpoint.newest_checkpoint(folder)
        date = begun_on(folder) if found else ""
        return Run(folder, found, tuple(resume_notes(found, torn)), date or today())
    if holds_run and not (config.overwrite or config.resume):
        raise OnecardError(
            f"output_dir: {folder} holds a run already; add --resume to go on with it, "
            "--overwrite to replace it, or choose another folder."
        )
    check_nothing_is_lost(config, folder, holds_run)
    notes = resume_notes(None, ()) if config.resume and holds_run else []
    return Run(folder, None, tuple(notes), today())


def check_nothing_is_lost(config: TrainConfig, folder: Path, holds_run: bool) -> None:
    """A new run takes the place of an old run's files. They must be an old run's, and not what the new one reads."""
    for name in OUTPUTS:
        if not holds_run and (folder / name).exists():
            raise OnecardError(
                f"output_dir: {folder} holds no run, but '{name}', which a run would replace; choose another folder."
            )
    removed = [
        path.resolve() for path in (*checkpoint.checkpoint_folders(folder), *(folder / name for name in OUTPUTS))
    ]
    for setting in ("model", "dataset", "eval_dataset", "reward_model_path", "ref_adapter", "constraint_model_path"):
        value = getattr(config, setting, "")
        if value and any(weights_folder(Path(value)).resolve().is_relative_to(path) for path in removed):
            raise OnecardError(
                f"{setting}: {value} is part of the run in {folder} that would be replaced; choose another output_dir."
            )


def begun_on(folder: Path) -> str:
    """The date in `run.json`; empty where a run has none, as those of earlier versions."""
    date = read_identity(folder).get("date", "")
    try:
        return datetime.fromisoformat(date).strftime("%Y-%m-%d")
    except (TypeError, ValueError):
        return ""


def resume_notes(found: Checkpoint | None, torn: tuple[Path, ...]) -> list[str]:
    """What `--resume` tells the user."""
    notes = [f"{folder.name} is torn (files are missing or damaged) and is passed over." for folder in torn]
    notes.append(
        f"going on from {found.folder}." if found else "no whole checkpoint to go on from: starting at step 0."
    )
    return notes


# record -> its sequences, and its numbers
CONTENTS: dict[type, Callable[[Any], tuple[Sequence[TokenSequence], Sequence[float]]]] = {
    TokenSequence: lambda sequence: ((sequence,), ()),
    PreferencePair: lambda pair: ((pair.chosen, pair.rejected), (pair.margin,)),
    ScoredSequence: lambda scored: ((scored.sequence,), (scored.score,)),
    Ranking: lambda ranking: (ranking.sequences, ()),
    LabelledSequence: lambda labelled: ((labelled.sequence, labelled.mismatched), (labelled.desirable,)),
}


def fingerprint(examples: Iterable[object]) -> str:
    """SHA-256 of tokenized examples: changes with the data, their order, and the tokenizer."""
    state = hashlib.sha256()
    for example in examples:
        sequences, numbers = CONTENTS[type(example)](example)
        state.update(array("q", [len(sequences)]).tobytes() + array("d", numbers).tobytes())
        for sequence in sequences:
            state.update(array("q", [len(sequence), *sequence.tokens]).tobytes() + bytes(sequence.response_mask))
    return state.hexdigest()


def read_identity(folder: Path) -> dict[str, str]:
    """What `run.json` says; nothing where it cannot be read."""
    try:
        found = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_same_run(folder: Path, identity: dict[str, str]) -> None:
    """Settings are not all that makes a run: the command and what its files held then count too."""
    before = read_identity(folder)
    for name, value in identity.items():
        if before.get(name) != value:
            raise OnecardError(f"--resume: the {name} of the run in {folder} was another one ({folder / IDENTITY}).")


def begin(run: Run, config: TrainConfig, identity: dict[str, str]) -> None:
    """Make the folder, write `config.yaml`, and bring `metrics.jsonl` back to where the checkpoint stands.

    `identity` says what the run is beyond its settings; a run that is gone on with must have the same. `run.json` keeps
    it, and the date of the run.
    """
    if run.checkpoint is not None:
        check_same_run(run.folder, identity)
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.checkpoint is None:
        checkpoint.forget(run.folder, OUTPUTS)
    checkpoint.forget_after(run.folder, run.checkpoint.step if run.checkpoint else -1)
    (run.folder / METRICS).touch()
    for name in (METRICS, SAMPLES):
        keep_rows(run.folder / name, run.checkpoint.step if run.checkpoint else -1)
    settings = yaml.safe_dump({**asdict(config), "resume": False, "overwrite": False}, sort_keys=False)
    written = {**identity, "date": run.date}
    checkpoint.write_text(run.folder / IDENTITY, json.dumps(written, indent=1) + "\n")
    checkpoint.write_text(run.folder / CONFIG, settings)


def keep_rows(path: Path, step: int) -> None:
    """Drop the rows after `step`, and a last row that was cut off in the middle."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    checkpoint.write_text(path, "".join(kept))


def log(folder: Path, row: dict[str, Any], name: str = METRICS) -> None:
    """Append one row to `metrics.jsonl`, or to another file of rows."""
    with open(folder / name, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
