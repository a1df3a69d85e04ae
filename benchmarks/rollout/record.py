"""What a run leaves: one JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure, records

BENCHMARK, SCHEMA = "rollout", 3
OURS, RECORDED, PEER = "onecard", "onecard, recorded passes", "transformers generate"
TARGET = 2.0  # times generate's tokens per second, on mixed lengths


@dataclass(frozen=True)
class Row:
    """One sampler: for each round its seconds and response tokens, and the spread of tokens per second."""

    sampler: str
    role: str  # ours | peer
    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    rate: measure.Spread
    peak_bytes: int | None = None  # above what was held before: the cache of keys and values, and what a pass needs


@dataclass(frozen=True)
class Step:
    """One step of decoding: so many rows with so many tokens each in the cache."""

    rows: int
    length: int
    seconds: dict[str, float]  # by sampler
    bytes_read: int  # that it cannot do without: weights and cache
    bandwidth: float  # bytes/s of a plain copy, in the same run

    @property
    def floor(self) -> float:
        """Seconds of reading those bytes."""
        return self.bytes_read / self.bandwidth


@dataclass(frozen=True)
class Result:
    """One case. `refused`: why nothing was timed."""

    name: str
    model: str
    parameters: int
    dtype: str
    load_in_4bit: bool
    prompts: int
    prompt_lengths: tuple[int, int]  # tokens of the shortest and the longest
    batch_size: int
    max_new_tokens: int
    temperature: float
    held_bytes: int | None = None  # weights and adapters
    mean_response: float | None = None  # tokens
    error_logprobs: float | None = None  # nats, the largest: as drawn, against a pass over the finished sequences
    rows: tuple[Row, ...] = ()  # ours first, the peer last
    ratio: measure.Spread | None = None  # tokens per second of ours over the peer's, round by round
    step: Step | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Report:
    device: str
    machine: str
    folder: str
    quick: bool
    complete: bool
    clock: str  # what a second is: of the wall, or of one processor
    repeats: int  # at most
    date: str
    commit: str
    dirty: bool
    load: float
    versions: dict[str, str]
    results: tuple[Result, ...] = ()
    schema: int = SCHEMA
    benchmark: str = BENCHMARK


def spread_of(values: dict[str, Any] | None) -> measure.Spread | None:
    return None if values is None else measure.Spread(**values)


def row_of(values: dict[str, Any]) -> Row:
    lists = {name: tuple(values[name]) for name in ("seconds", "tokens")}
    return Row(**{**values, **lists, "rate": measure.Spread(**values["rate"])})


def result_of(values: dict[str, Any]) -> Result:
    least, most = values["prompt_lengths"]
    changed = {
        "prompt_lengths": (least, most),
        "rows": tuple(map(row_of, values["rows"])),
        "ratio": spread_of(values["ratio"]),
        "step": None if values["step"] is None else Step(**values["step"]),
    }
    return Result(**{**values, **changed})


def report_of(values: dict[str, Any]) -> Report:
    return Report(results=tuple(map(result_of, values.pop("results"))), **values)


def load(path: Path) -> Report:
    expected = {"benchmark": BENCHMARK, "schema": SCHEMA}
    return records.read(path, "report of benchmarks.rollout", expected, report_of)


def verdict(result: Result) -> str:
    """Whether the target was met; nothing is claimed of a case without times."""
    what = f"rollout tokens/s at least {TARGET:g}x plain generate on mixed lengths"
    if result.ratio is None:
        return f"{what}: not measured"
    return f"{what}: {result.ratio.median:.2f}x, {'met' if result.ratio.median >= TARGET else 'MISSED'}"
