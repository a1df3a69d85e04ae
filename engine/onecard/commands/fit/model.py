"""Finds the transformers config of a model: in a folder, a file, the shipped configs or the local cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.models.folders import weights_folder
from onecard.models.load import check_causal_lm, find_source
from onecard.utils.errors import OnecardError, did_you_mean, reason

SHIPPED = Path(__file__).parent / "shapes"  # transformers configs of some models, without weights


@dataclass(frozen=True)
class PlannedModel:
    """A model's name and its transformers config. `adapter`: `--model` is an adapter on this model."""

    name: str
    config: Any
    adapter: bool = False


def shipped_configs() -> dict[str, Path]:
    """The paths of the model configs that ship with onecard, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def find_model(name: str) -> PlannedModel:
    """The config of a model, by a folder, a `config.json`, the name of a shipped config or a hub name in the cache.

    Nothing is downloaded, and no weights are read. Unknown names raise `OnecardError`.
    """
    if not name:
        raise OnecardError("--model is missing: give a folder, a config.json, a hub name, or one of "
                           f"{', '.join(shipped_configs())}.")  # fmt: skip
    path = weights_folder(Path(name))
    if path.suffix == ".json" or path.is_file():
        return PlannedModel(path.stem, read_config(path))
    if (path / "adapter_config.json").is_file():
        base = find_model(find_source(name).base)
        return PlannedModel(base.name, base.config, adapter=True)
    if path.is_dir():
        settings = read_config(path / "config.json")
        check_causal_lm(settings, f"model: {name}")
        return PlannedModel(path.name, settings)
    by_name = {key.lower(): file for key, file in shipped_configs().items()}
    shipped = by_name.get(name.rpartition("/")[2].lower().removesuffix("-instruct").removesuffix("-it"))
    if shipped is not None and not name.startswith((".", "~", "/")):
        return PlannedModel(shipped.stem, read_config(shipped))
    return PlannedModel(name, cached_config(name))


def read_config(path: Path) -> Any:
    """A transformers config from a JSON file."""
    from transformers import AutoConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_hook=special_float)
    except OSError as error:
        raise OnecardError(f"model: cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise OnecardError(f"model: {path} is not JSON: {reason(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise OnecardError(f"model: {path} has no model_type, expected a transformers config.")
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # the validation in config classes may raise any exception
        raise OnecardError(f"model: {path} is not a valid transformers config: {reason(error)}") from error


def special_float(values: dict[str, Any]) -> Any:
    """Decode infinity, which JSON does not have: transformers writes `{"__float__": "Infinity"}`."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


def cached_config(name: str) -> Any:
    """The config of a hub model in the local cache; `OnecardError` if it is not there."""
    from transformers import AutoConfig

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise OnecardError(f"model: no file or folder {name}.")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except Exception as error:
        known = shipped_configs()
        raise OnecardError(
            f"model: '{name}' was not found. Expected a folder, a file, a hub name in the local cache, or one of "
            f"{', '.join(known)}.{did_you_mean(name.rpartition('/')[2], known)}"
        ) from error
