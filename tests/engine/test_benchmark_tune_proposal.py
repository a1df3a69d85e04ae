"""What a sweep proposes, from numbers by hand; the predictions, and the notebook that has them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import records, targets
from benchmarks.anatomy import OURS
from benchmarks.records import Result, Row
from benchmarks.tune import counting, predict, proposal, sweep, turning
from benchmarks.tune.knobs import KNOBS
from onecard_kernels import launch
from onecard_kernels.logprob import tuning

needs_triton = pytest.mark.skipif(launch.why_not(torch.device("meta")) is not None, reason="triton is not installed")


def row(label: str, *seconds: float, vocabulary: int = 70, peak: int = 0, **more: Any) -> Row:
    sizes = {"N": 10, "D": 4, "V": vocabulary}
    blank = Row(f"v{vocabulary}", sizes, "frozen", label, more.pop("role", "ours"), peak_bytes=peak, **more)
    return sweep.timed(blank, list(seconds) or None)


def result(*rows: Row, knob: str = "chunk-rows") -> Result:
    return Result(knob, "", "N x D x V", "bfloat16", {"frozen": ""}, rows)


DEFAULT = row(OURS, 10.0, 10.1, 10.2, 10.3, 10.4)
CLEAR = row("rows=2048", 9.0, 9.1, 9.2, 9.3, 9.4)
OVERLAPS = row("rows=512", 8.0, 8.0, 9.0, 10.3, 10.4)  # the best median, and quartiles in those of the default
SLOWER = row("rows=256", 12.0, 12.1, 12.2, 12.3, 12.4)
FAST_COPY = row("copy", 1.0, 1.0, 1.0, 1.0, 1.0, role=records.LIMIT)


def test_only_what_is_beyond_the_spread_is_proposed() -> None:
    found = proposal.proposed(result(DEFAULT, OVERLAPS, SLOWER, CLEAR, FAST_COPY), "cuda")
    assert found is not None
    assert found.setting == "rows=2048"
    assert found.ratio == pytest.approx(9.2 / 10.2, abs=1e-3)
    assert proposal.proposed(result(DEFAULT, OVERLAPS, SLOWER, FAST_COPY), "cuda") is None
    (best,) = proposal.best_of(result(DEFAULT, OVERLAPS, SLOWER, CLEAR, FAST_COPY))
    assert (best.row.candidate, best.verdict) == ("rows=512", proposal.WITHIN)
    once = [row(one.candidate, one.seconds[0]) for one in (DEFAULT, CLEAR)]
    assert proposal.proposed(result(*once), "cuda") is None
    (best,) = proposal.best_of(result(DEFAULT, SLOWER))
    assert best.verdict == proposal.DEFAULT
    (best,) = proposal.best_of(result(DEFAULT, SLOWER, CLEAR))
    assert best.verdict == proposal.FASTER


def test_a_proposal_is_slower_nowhere_and_ran_everywhere() -> None:
    def other(label: str, *seconds: float) -> Row:
        return row(label, *seconds, vocabulary=256000)

    second = other(OURS, 20.0, 20.1, 20.2, 20.3, 20.4)
    same = other("rows=2048", 20.0, 20.1, 20.2, 20.3, 20.4)
    slower = other("rows=2048", 22.0, 22.1, 22.2, 22.3, 22.4)
    failed = replace(same, seconds=(), median=None, q1=None, q3=None, reason="out of memory")
    assert proposal.proposed(result(DEFAULT, CLEAR, second, same), "cuda") is not None
    assert proposal.proposed(result(DEFAULT, CLEAR, second, slower), "cuda") is None
    assert proposal.proposed(result(DEFAULT, CLEAR, second, failed), "cuda") is None
    assert proposal.proposed(result(DEFAULT, CLEAR, second), "cuda") is None


def test_what_breaks_the_promised_workspace_is_not_proposed() -> None:
    errors = {"dHidden": 0.0}
    returned = 10 * 4 * 2
    at_the_bar = replace(CLEAR, peak_bytes=10**9 + returned, errors=errors)
    above = replace(at_the_bar, peak_bytes=10**9 + returned + 1)
    assert proposal.proposed(result(DEFAULT, at_the_bar), "cuda") is not None
    assert proposal.proposed(result(DEFAULT, above), "cuda") is None
    (best,) = proposal.best_of(result(DEFAULT, above))
    assert best.verdict == proposal.TOO_LARGE


@pytest.mark.parametrize(
    ("knob", "values", "line"),
    [
        ("chunk-rows", {"rows": 2048},
         'tuning.TABLE: "cuda": Choice(CHUNKED, 1002 << 20, 256, 2048, 2048, 4096),'),
        ("low-memory-tiles", {"rows": 1024, "columns": 8192},
         'tuning.TABLE: "cuda": Choice(CHUNKED, 512 << 20, 256, 1024, 1024, 8192),'),
        ("implementation-frozen", {"implementation": "low_memory"},
         'tuning.TABLE: "cuda": Choice(LOW_MEMORY, 512 << 20, 256, 1024, 2048, 4096),  # for all modes'),
        ("hopper-tile", {"depth": 128, "stages": 2},
         "tuning._CARDS: (9, 0): the tile is TileConfig(rows=128, columns=256, depth=128, warps=8, stages=2, "
         "at_once=1, multiprocessors=132, group=16)"),
        ("logits-forward", {"thread_bytes": 32, "warps": 4},
         "onecard_kernels.logprob.triton_rows: FORWARD = Cut(thread_bytes=32, warps=4)"),
        ("gae", {"largest_block": 1024, "per_thread": 8},
         "onecard_kernels.advantages.triton: LARGEST_BLOCK = 1024; PER_THREAD = 8"),
    ],
)  # fmt: skip
def test_the_line_to_put(knob: str, values: dict[str, Any], line: str) -> None:
    assert KNOBS[knob].line(values, [row("x", 1.0, vocabulary=128256)], "cuda") == line


def test_a_line_of_the_table_gives_the_rows_it_was_measured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    text = KNOBS["chunk-rows"].line({"rows": 1536}, [row("x", 1.0, vocabulary=256000)], "cuda")
    given = eval(text.split("Choice")[1].rstrip(","), {**vars(tuning)})
    monkeypatch.setitem(tuning.TABLE, "cuda", tuning.Choice(*given))
    for vocabulary in (128256, 256000):
        assert tuning.choose(vocabulary, torch.float32, torch.device("cuda")).rows == 1536


# Predictions


def test_the_floors_of_the_targets_by_hand() -> None:
    """Llama 3 8B's head and 8192 tokens: u = 2 N D V."""
    found = predict.floors(gemm_rate=1e15, copy_rate=4e12)
    rows = {(r.benchmark, r.mode): r for r in found if not r.variant}
    (low,) = (r for r in found if r.variant)
    u = 2 * 8192 * 4096 * 128256 / 1e15
    assert rows["linear_logprobs", "forward"].arithmetic == pytest.approx(u)
    assert rows["linear_logprobs", "frozen"].arithmetic == pytest.approx(2 * u)
    assert rows["linear_logprobs", "trained"].arithmetic == pytest.approx(3 * u)
    assert rows["linear_logprobs", "forward"].passes == pytest.approx(8192 * 128256 * 4 / 4e12)
    assert rows["linear_logprobs", "frozen"].passes == pytest.approx(8192 * 128256 * 6 / 4e12)
    # 32 tiles of 4096 words; sums in fp32, read and written twice for each
    assert low.passes == pytest.approx((8192 * 128256 * 6 + 32 * 8192 * 4096 * 16) / 4e12)
    assert low.arithmetic == pytest.approx(2 * u)
    assert rows["selective_log_softmax", "forward"].traffic == pytest.approx(8192 * 151936 * 2 / 4e12, rel=1e-3)
    assert not any(math.isnan(r.floor) for r in rows.values())


@needs_triton
def test_launches_are_counted_for_every_chunk_and_tile() -> None:
    small = replace(targets.H200, sizes={"N": 3 * 1024, "D": 4096, "V": 128256})
    fast, low = counting.frozen(small, turning.CHUNKED), counting.frozen(small, turning.LOW_MEMORY)
    assert (fast.products, fast.kernels) == (3 * 2, 3)
    assert (low.products, low.kernels) == (2 * 32 * 2, 2 * 32)  # two pieces of 1536 tokens; 32 tiles of the vocabulary
    assert low.small - fast.small > 31  # the sums are brought to each new shift
    assert fast.total == fast.products + fast.kernels + fast.small


NOTES = Path(records.ROOT) / "benchmarks" / "NOTES.md"


def test_the_notebook_has_the_predictions_as_the_command_makes_them(tmp_path: Path) -> None:
    copy = tmp_path / "NOTES.md"
    copy.write_text(NOTES.read_text())
    assert predict.main(["--gemm-rate", "790", "--copy-rate", "4.3", "--readme", str(copy)]) == 0
    assert copy.read_text() == NOTES.read_text()


def test_every_commit_and_file_that_the_notebook_names_is_there() -> None:
    text = NOTES.read_text()
    for name in re.findall(r"`(results/[^`*]+)`", text):
        assert (NOTES.parent / name).exists(), name
    commits = re.findall(r"\bcommit ([0-9a-f]{7})\b", text)
    assert commits
    if records.git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("the history is not all here")
    for commit in commits:
        assert records.git("cat-file", "-t", commit) == "commit", commit
