"""`--precompute_ref_log_probs`: compute the reference's log-probs before training, and cache them for other runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard import __version__
from onecard.algorithms.common import padded_size
from onecard.config import DPOConfig
from onecard.data.batches import LabelledSequence, PreferencePair, to_device
from onecard.data.example_arrays import all_lengths
from onecard.models.load import find_source, pick_attention, pick_dtype
from onecard.models.micro_batching import TokenBudget, as_budget, forward_budget, map_micro_batches
from onecard.models.roles import Roles
from onecard.training.identity import examples_digest, weights_digest
from onecard.utils.files import cache_folder
from onecard.utils.progress import progress, say

E = TypeVar("E", PreferencePair, LabelledSequence)

NAME = "ref_logps"
DIGEST = "sha256"


def cache_key(config: DPOConfig, roles: Roles, examples: Sequence[E]) -> str:
    """Digest of everything that the log-probs depend on, so a resumed run finds its own cache file.

    It includes what changes the rounding: batch size, head chunks, layout, device and number of threads.
    """
    reference = config.ref_adapter or config.model
    dtype = pick_dtype(config, train_all=not config.use_peft)
    base = find_source(reference).base
    import transformers

    parts = {
        "weights": weights_digest(reference),
        "base": "" if Path(base).is_dir() else base,  # a hub name stands for its weights
        "examples": examples_digest(examples),
        "dtype": str(dtype),
        "adapter_dtype": config.adapter_dtype,
        "load_in_4bit": config.load_in_4bit,
        "attention": pick_attention(config, dtype),
        "layout": roles.layout,
        "batch": f"{config.micro_batch_tokens} tokens"
        if config.micro_batch_tokens
        else config.per_device_eval_batch_size,
        "head_chunk_tokens": config.head_chunk_tokens,
        "device": roles.device.type,
        "threads": torch.get_num_threads() if roles.device.type == "cpu" else 0,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_table(path: Path, rows: int) -> Tensor | None:
    """Log-probs of a cache file, fp32 [rows, 2]; None if the file is missing or damaged."""
    if not path.exists():
        return None
    try:
        tensors = load_file(str(path))
        table, written_digest = tensors[NAME], tensors.get(DIGEST, torch.empty(0, dtype=torch.uint8))
    except (OSError, SafetensorError, KeyError) as error:
        say(f"reference: {path} is damaged ({error}); the log-probs are computed again.")
        return None
    if not torch.equal(written_digest, digest_of(table)):
        say(f"reference: {path} is damaged (its checksum differs); the log-probs are computed again.")
        return None
    if table.dtype != torch.float32 or table.shape != (rows, 2) or bool(table.isnan().any()):
        say(f"reference: {path} does not have {rows} rows of log-probs; they are computed again.")
        return None
    say(f"reference: log-probs of {rows} examples are read from {path}.")
    return table


def digest_of(table: Tensor) -> Tensor:
    """SHA-256 of a table's numbers, uint8 [32]."""
    return torch.tensor(list(hashlib.sha256(table.numpy().tobytes()).digest()), dtype=torch.uint8)


def write_table(path: Path, table: Tensor) -> None:
    """Write a cache file atomically. After a write error the run continues without the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({NAME: table, DIGEST: digest_of(table)}, str(temporary))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        say(f"reference: {path} cannot be written ({error}); the next run computes the log-probs again.")


def compute_table(
    roles: Roles,
    examples: Sequence[E],
    collate: Callable[[Sequence[E]], Any],
    compute_ref_logps: Callable[[Roles, Any], Tensor],
    size: int | TokenBudget,
) -> Tensor:
    """`ref_logps` of N examples, fp32 [N, 2], on the CPU: chosen and rejected, or answer and mismatched answer."""
    padded = roles.layout == "padded"
    sizes = [padded_size(lengths) if padded else sum(lengths) for lengths in all_lengths(examples)]
    with progress("reference", len(examples)) as bar:

        def compute_rows(indices: list[int]) -> list[Tensor]:
            batch = to_device(collate([examples[index] for index in indices]), roles.device)
            rows = compute_ref_logps(roles, batch).view(2, -1).T.float().cpu()
            bar.advance(by=len(indices))
            return list(rows)

        return torch.stack(map_micro_batches(sizes, as_budget(size), compute_rows, padded=padded))


@dataclass(frozen=True, eq=False)
class WithRefLogps(Sequence[E]):
    """A view of the examples in which each has its row of the table as `ref_logps`."""

    examples: Sequence[E]
    table: Tensor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return WithRefLogps(self.examples[index], self.table[index])
        first, second = self.table[index].tolist()
        return replace(self.examples[index], ref_logps=(first, second))


def with_ref_logps(
    config: DPOConfig,
    roles: Roles,
    examples: Sequence[E],
    collate: Callable[[Sequence[E]], Any],
    compute_ref_logps: Callable[[Roles, Any], Tensor],
) -> Sequence[E]:
    """The examples with their `ref_logps`, which are read from the cache or computed and written to it."""
    if not examples:
        return examples
    path = cache_folder() / NAME / f"{cache_key(config, roles, examples)}.safetensors"
    table = read_table(path, len(examples))
    if table is None:
        table = compute_table(roles, examples, collate, compute_ref_logps, forward_budget(config))
        write_table(path, table)
    return WithRefLogps(examples, table)
