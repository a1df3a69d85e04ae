"""Identity of a run: its command, and digests of the data, weights and functions that it reads.

A run can be resumed only with the same settings and the same identity.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from onecard.config import PPOConfig, ReferenceConfig, TrainConfig
from onecard.data import Prompt
from onecard.data.example_arrays import texts_and_numbers
from onecard.models.build import reward_adapter
from onecard.models.load import find_source
from onecard.models.roles import ADAPTER_WEIGHTS, HEAD_WEIGHTS
from onecard.rewards.builtin import builtin_name
from onecard.rewards.expressions import parse_terms
from onecard.rewards.functions import import_place
from onecard.utils.files import digest

BLOCK = 1 << 12  # bytes of a tensor that `sampled_digest` reads at each of three places


def examples_digest(examples: Iterable[object]) -> str:
    """SHA-256 of tokenized examples: changes with the data, their order, and the tokenizer."""
    state = hashlib.sha256()
    for texts, numbers in texts_and_numbers(examples):
        state.update(array("q", [len(texts)]).tobytes() + array("d", numbers).tobytes())
        for tokens, mask in texts:
            state.update(array("q", [len(tokens)]).tobytes() + np.asarray(tokens, np.int64).tobytes() + bytes(mask))
    return state.hexdigest()


def sampled_digest(path: Path) -> str:
    """Digest of a safetensors file: its header, and the start, middle and end of each tensor.

    Training and conversion change whole tensors, so samples of them are enough; reading a large base takes minutes.
    """
    state = hashlib.sha256()
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        state.update(header)
        first = file.tell()
        for name, tensor in json.loads(header).items():
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            for offset in (start, (start + end - BLOCK) // 2, end - BLOCK):
                file.seek(first + max(start, offset))
                state.update(file.read(min(BLOCK, end - start)))
    return state.hexdigest()


def weights_digest(model: str) -> str:
    """Digest of the weights and the config in a folder. Empty for a hub name: the name, a setting, identifies them."""
    source, state = find_source(model), hashlib.sha256()
    folders = [Path(source.base), *([source.adapter] if source.adapter else [])]
    names = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
    files = sorted(path for folder in folders if folder.is_dir() for name in names for path in folder.glob(name))
    for path in files:
        file_digest = sampled_digest(path) if path.suffix == ".safetensors" else digest(path)
        state.update(f"{path.name} {file_digest} ".encode())
    return state.hexdigest() if files else ""


def reference_identity(config: TrainConfig) -> dict[str, str]:
    """The digest of the `ref_adapter`, as a part of a run's identity; empty without one."""
    if not isinstance(config, ReferenceConfig) or not config.ref_adapter:
        return {}
    return {"ref_adapter": weights_digest(config.ref_adapter)}


def supervised_identity(
    config: TrainConfig, command: str, training: Sequence[object], heldout: Sequence[object]
) -> dict[str, str]:
    """The identity of an SFT, reward or DPO run."""
    return {
        "command": command,
        "model": weights_digest(config.model),
        **reference_identity(config),
        "training data": examples_digest(training),
        "held-out data": examples_digest(heldout),
    }


def functions_digest(entries: Sequence[str]) -> str:
    """SHA-256 of the functions that `reward_funcs` names, without their weights.

    Of a user's function it includes the source file, but no modules that the file imports. Of a built-in function it
    includes the name.
    """
    state = hashlib.sha256()
    for term in parse_terms(entries, "reward_funcs"):
        state.update(term.entry.encode())
        if ":" in term.entry and builtin_name(term.entry) is None:  # a user's function
            file = getattr(import_place(term.entry.rpartition(":")[0]), "__file__", None)
            state.update(Path(file).read_bytes() if file else b"")
    return state.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Digest of the prompts' tokens and their other columns, which rewards may use."""
    state = hashlib.sha256()
    for prompt in prompts:
        # For values that JSON cannot store (images), only the type is used: their `str` may differ between processes.
        columns = json.dumps(dict(prompt.columns), default=lambda value: type(value).__name__, sort_keys=True)
        state.update(array("q", [len(prompt.tokens), *prompt.tokens]).tobytes() + columns.encode())
    return state.hexdigest()


def scorer_digest(config: PPOConfig, setting: str) -> str:
    """Digest of the weights of the model that a setting names (`reward_model_path`, `constraint_model_path`)."""
    name: str = getattr(config, setting)
    if not name:
        return ""
    folder = reward_adapter(config, setting)
    if folder is None:  # a classifier
        return weights_digest(name)
    files = [folder / name for name in (ADAPTER_WEIGHTS, HEAD_WEIGHTS)]
    return " ".join(digest(file) for file in files if file.is_file())


def ppo_identity(config: PPOConfig, training: Sequence[Prompt], heldout: Sequence[Prompt]) -> dict[str, str]:
    """The identity of a PPO run."""
    return {
        "command": "ppo",
        "model": weights_digest(config.model),
        **reference_identity(config),
        "prompts": prompts_digest(training),
        "held-out prompts": prompts_digest(heldout),
        "reward model": scorer_digest(config, "reward_model_path"),
        "reward functions": functions_digest(config.reward_funcs),
        "constraint model": scorer_digest(config, "constraint_model_path"),
        "constraint functions": functions_digest(config.constraint_funcs),
    }
