"""What is sampled: models, prompts and lengths, most telling first; and both samplers' common task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from benchmarks.train_step.cases import LLAMA_8B, QWEN_0_5B, QWEN_1_5B, TINY
from benchmarks.train_step.dpo import shake
from benchmarks.train_step.material import DTYPES, FIRST_WORD, PAD, SEED, Model, drawn_weights, write_folder
from onecard.config import ModelConfig, SFTConfig
from onecard.data import load_rows
from onecard.models.build import load_player, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Sampling, end_tokens

SHAPES = {"8B": LLAMA_8B, "1.5B": QWEN_1_5B, "0.5B": QWEN_0_5B}
RANDOM = "random Llama"
SMALL = Model(RANDOM, hidden=128, layers=2, heads=8, key_heads=4, inner=384, vocab=2048)


@dataclass(frozen=True)
class Case:
    """Prompts of `least` to `most` tokens, evenly spread, `batch_size` of them at a time. Of drawn weights one token in
    `mean` ends an answer, so that lengths are geometric around it, and cut at `max_new_tokens`.
    """

    name: str
    model: Model
    prompts: int
    batch_size: int
    least: int
    most: int
    max_new_tokens: int
    mean: int
    load_in_4bit: bool = False
    temperature: float = 1.0


@dataclass(frozen=True)
class Task:
    """What both samplers are given."""

    roles: Roles
    prompts: tuple[tuple[int, ...], ...]
    ends: frozenset[int]
    pad: int
    sampling: Sampling
    batch_size: int


def small() -> Case:
    """Of a CPU: seconds."""
    return Case(RANDOM, SMALL, prompts=64, batch_size=32, least=4, most=64, max_new_tokens=128, mean=32)


def of_shape(shape: str, *, load_in_4bit: bool, batch_size: int = 16) -> Case:
    """A real model's sizes, and two batches of prompts, as a PPO iteration has."""
    name = f"{shape}, {'NF4' if load_in_4bit else 'bf16'}, {batch_size} rows"
    return Case(name, SHAPES[shape], 2 * batch_size, batch_size, 64, 512, 192, 64, load_in_4bit)


def on_a_gpu() -> list[Case]:
    """The table: the README's claim first, then where weights weigh less, then where rows weigh more."""
    return [
        of_shape("8B", load_in_4bit=True),
        of_shape("1.5B", load_in_4bit=False, batch_size=32),
        of_shape("8B", load_in_4bit=False),
        of_shape("0.5B", load_in_4bit=False, batch_size=64),
        of_shape("8B", load_in_4bit=True, batch_size=64),
    ]


def tiny(case: Case) -> Case:
    """The same code at sizes that take a CPU no time."""
    model = replace(TINY, kind=case.model.kind, tied=case.model.tied)
    return replace(case, model=model, prompts=6, batch_size=3, least=2, most=10, max_new_tokens=8, mean=6)


def lengths(case: Case) -> list[int]:
    """Prompt lengths, spread evenly and in no order."""
    span = case.most - case.least + 1
    return [case.least + index * 37 % span for index in range(case.prompts)]  # 37 shares no factor with our spans


def drawn_task(case: Case, folder: Path, dtype: torch.dtype) -> Task:
    """Weights drawn on the device with an active adapter, as PPO's policy has, and drawn prompts."""
    write_folder(case.model, folder)
    name = DTYPES[dtype]
    config = SFTConfig(model=str(folder), dtype=name, adapter_dtype=name, load_in_4bit=case.load_in_4bit)
    with drawn_weights():
        roles = load_roles(config, trained="policy")
    shake(roles.model)
    roles.eval()
    draw = random.Random(SEED)
    prompts = [tuple(draw.randrange(FIRST_WORD, case.model.vocab) for _ in range(length)) for length in lengths(case)]
    ends = frozenset(range(FIRST_WORD, case.model.vocab, case.mean))
    return Task(roles, tuple(prompts), ends, PAD, sampling_of(case), case.batch_size)


def model_task(case: Case, model: str, file: str) -> Task:
    """A pretrained model, and prompts that are the first words of a file's texts."""
    settings = ModelConfig(model=model, load_in_4bit=case.load_in_4bit)
    tokenizer, roles = load_tokenizer(settings), load_player(settings, role="policy")
    rows = load_rows(file, split="train")
    column = next((name for name in ("prompt", "text") if name in rows[0].values), None)
    if column is None:
        raise click.UsageError(f"--prompts: {file} has neither a `prompt` nor a `text` column.")
    texts = [tokenizer.encode(rows[index % len(rows)].values[column])[: case.most] for index in range(case.prompts)]
    prompts = tuple(tuple(text[:length]) for text, length in zip(texts, lengths(case), strict=True))
    ends = end_tokens(roles, tokenizer)
    return Task(roles, prompts, ends, tokenizer.pad_token_id, sampling_of(case), case.batch_size)


def sampling_of(case: Case) -> Sampling:
    return Sampling(case.max_new_tokens, case.temperature)


def picked(found: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Those of these names, in their order."""
    unknown = sorted(set(names) - {case.name for case in found})
    if unknown:
        raise click.UsageError(f"--case {unknown[0]!r}: expected one of {', '.join(repr(c.name) for c in found)}.")
    return [case for case in found if not names or case.name in names]
