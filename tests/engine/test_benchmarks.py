"""The benchmark's instruments, on things whose answers are known: numbers in tables are only as good as these."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import candidates, cases, kernels, measure, records, render, shapes, tables, truth
from benchmarks.candidates import Candidate
from benchmarks.shapes import FORWARD, FROZEN, MODES, TRAINED, Shape

CPU = torch.device("cpu")
# V and N divide by no block size; D is small enough for the whole file to take seconds
TINY = Shape("tiny", 13, 8, 37)
EAGER = Candidate(candidates.EAGER, candidates.eager)
OURS = Candidate(candidates.OURS, candidates.eager)  # something right under our name


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)


class FakeClock:
    """Answers the given times in turn."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> float:
        return self.times.pop(0)


def tiny_case(mode: str, *chosen: Candidate, repeats: int = 3) -> list[records.Row]:
    sets = shapes.input_sets(TINY, CPU, torch.float32)
    return cases.measure_case(TINY, mode, sets, truth.truth_of(sets[0], TRAINED), chosen, repeats=repeats)


def report(rows: list[records.Row], **changes: object) -> records.Report:
    values: dict[str, object] = {
        "benchmark": "linear_logprobs",
        "device": "cpu",
        "machine": "a machine",
        "folder": "cpu-2-cores",
        "dtype": "float32",
        "quick": False,
        "clock": "wall time",
        "repeats": 3,
        "date": "2026-01-02T03:04Z",
        "commit": "0123456789abcdef",
        "dirty": False,
        "load": 0.5,
        "versions": {"torch": "9.9"},
        "rows": tuple(rows),
    }
    return records.Report(**{**values, **changes})


def row(candidate: str, role: str, seconds: tuple[float, ...], **changes: object) -> records.Row:
    spread = measure.spread(seconds)
    return records.Row(
        *("s", 5, 6, 7, FROZEN, candidate, role),
        **{"seconds": seconds, "median": spread.median, "q1": spread.q1, "q3": spread.q3, **changes},
    )


ROWS = [
    row("onecard", "ours", (0.1, 0.2, 0.4), peak_bytes=3 << 20, error_logprobs=1e-6, error_hidden=2e-6, of_limit=0.75),
    row("eager", "peer", (0.2, 0.5, 0.6), peak_bytes=150 << 20, error_logprobs=3e-6, error_hidden=4e-6, of_limit=0.3),
    records.Row("s", 5, 6, 7, FROZEN, "Liger", "peer", reason="no | such module"),
    row("bare GEMMs, 2u", "limit", (0.15, 0.15, 0.15), gemms=2, rate=2e12, of_limit=1.0),
    row("copy", "limit", (0.01, 0.01, 0.01), rate=3e10),
]


# --- instruments


def test_stopwatch_reads_the_clock_around_the_work() -> None:
    seconds = measure.stopwatch(CPU, FakeClock(10.0, 12.5))
    assert seconds(lambda: None) == 2.5


def test_interleave_takes_turns_drops_the_warmup_and_rotates_the_inputs() -> None:
    calls: list[str] = []
    works = {name: [lambda n=name, i=i: calls.append(f"{n}{i}") for i in range(2)] for name in "ab"}
    # a warm-up round of 100 s, then 1, 2, 3, 4 s
    clock = FakeClock(0, 100, 0, 100, 0, 1, 0, 2, 0, 3, 0, 4)
    times = measure.interleave(works, measure.stopwatch(CPU, clock), repeats=2, warmup=1)
    assert times == {"a": [1, 3], "b": [2, 4]}
    assert [call[0] for call in calls] == ["a", "b"] * 3
    assert all(before[1] != after[1] for before, after in zip(calls[::2], calls[1::2], strict=True))


def test_spread_of_a_fake_clock_is_median_and_quartiles() -> None:
    assert measure.spread([5.0, 1.0, 9.0, 3.0, 7.0]) == measure.Spread(5.0, 3.0, 7.0, 5)
    assert measure.spread([2.0]) == measure.Spread(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        measure.spread([])


def test_peak_memory_of_known_allocations_is_exact() -> None:
    before = torch.empty(5 << 20, dtype=torch.uint8)  # an input: not counted

    def work() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first
        return torch.cat([second, second[: 1 << 19]])

    # second and its longer copy live together at the end: 2 + 2.5 MiB, more than first and second
    assert measure.peak_bytes(work, CPU) == (2 << 20) + (5 << 19)
    assert measure.peak_bytes(lambda: before.zero_(), CPU) == 0
    assert measure.highest([5, -5, 4, 3, -7]) == 7


def test_work_counts_every_term_by_hand() -> None:
    shape = Shape("", 2, 3, 5)
    forward = (2 * 3 + 5 * 3) * 4 + 2 * 8 + 2 * 4
    assert shapes.work_of(shape, FORWARD, 4) == shapes.Work(1, 60, forward)
    assert shapes.work_of(shape, FROZEN, 4) == shapes.Work(2, 120, forward + 2 * 4 + 2 * 3 * 4)
    assert shapes.work_of(shape, TRAINED, 4) == shapes.Work(3, 180, forward + 2 * 4 + 2 * 3 * 4 + 5 * 3 * 4)


def test_inputs_have_the_logits_of_a_trained_model() -> None:
    inputs = shapes.make_inputs(Shape("", 64, 512, 500), CPU, torch.float32)
    logits = inputs.hidden @ inputs.weight.t()
    assert float(logits.std()) == pytest.approx(shapes.LOGIT_STD, rel=0.02)
    assert torch.equal(inputs.targets[::2], logits.argmax(-1)[::2])
    assert inputs.grad.unique().numel() == 64


@pytest.mark.parametrize("budget", [1, 2 << 30])  # a token at a time, all at once
def test_bare_gemms_are_the_products_they_claim(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LOGITS_BYTES", budget)
    hidden, weight = torch.randn(4, 3), torch.randn(6, 3)
    logits = hidden @ weight.t()
    for gemms in (1, 2, 3):
        work = measure.gemm_work(hidden, weight, gemms)
        assert measure.peak_bytes(work, CPU) == 0  # into buffers that exist
        _, d_hidden, d_weight = work()
        assert (d_hidden is None, d_weight is None) == (gemms < 2, gemms < 3)
    torch.testing.assert_close(d_hidden, logits @ weight)
    torch.testing.assert_close(d_weight, logits.t() @ hidden)


# --- the truth and the verdict


def test_truth_is_autograd_in_fp64() -> None:
    inputs = shapes.make_inputs(TINY, CPU, torch.float32)
    exact = shapes.Inputs(inputs.hidden.double(), inputs.weight.double(), inputs.targets, inputs.grad.double())

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(hidden @ weight.t(), -1).gather(-1, targets[:, None]).squeeze(-1)

    errors = truth.errors_of(candidates.run(logprobs, exact, TRAINED), truth.truth_of(inputs, TRAINED))
    assert max(errors.logprobs, errors.hidden, errors.weight) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_a_case_has_every_number(mode: str) -> None:
    rows = tiny_case(mode, OURS, EAGER)
    ours, eager, gemms, copy = rows
    assert [r.candidate for r in rows] == ["onecard", "eager", f"bare GEMMs, {gemms.gemms}u", "copy"]
    assert [r.role for r in rows] == ["ours", "peer", "limit", "limit"]
    for found in (ours, eager):
        assert len(found.seconds) == 3
        assert found.q1 <= found.median <= found.q3
        assert found.peak_bytes > TINY.tokens * TINY.vocab * 4  # eager holds all logits
        assert found.error_logprobs < 1e-5
        assert (found.error_hidden is None, found.error_weight is None) == (mode == FORWARD, mode != TRAINED)
    assert copy.rate == pytest.approx(measure.COPY_BYTES / copy.median)
    assert ours.of_limit is not None


def biased(device: torch.device) -> candidates.LogProbs:
    return lambda h, w, t: candidates.eager_logprobs(h, w, t) + 1e-3


def uniform_gradient(device: torch.device) -> candidates.LogProbs:
    """The bug that a uniform grad_output hides: every token gets the mean of the gradients."""

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        values = candidates.eager_logprobs(hidden, weight, targets)
        if values.requires_grad:
            values.register_hook(lambda grad: grad.mean().expand_as(grad))
        return values

    return logprobs


def nan(device: torch.device) -> candidates.LogProbs:
    return lambda h, w, t: candidates.eager_logprobs(h, w, t) * float("nan")


def broken(device: torch.device) -> candidates.LogProbs:
    raise candidates.Unavailable("not built here")


@pytest.mark.parametrize(
    ("load", "mode", "says"),
    [
        (biased, FORWARD, "logprobs"),
        (uniform_gradient, FROZEN, "gradient of hidden"),
        (uniform_gradient, TRAINED, "gradient of weight"),
        (nan, FORWARD, "nan"),
        (broken, FORWARD, "not built here"),
    ],
)
def test_a_wrong_candidate_of_ours_is_refused(load, mode: str, says: str) -> None:
    with pytest.raises(cases.Refused, match=says):
        tiny_case(mode, Candidate(candidates.OURS, load), EAGER)


def test_a_peer_that_cannot_run_or_is_wrong_keeps_its_row_with_the_reason() -> None:
    rows = tiny_case(FORWARD, OURS, EAGER, Candidate("absent", broken), Candidate("off", nan))
    by_name = {r.candidate: r for r in rows}
    assert by_name["absent"].reason == "not built here"
    assert "wrong here" in by_name["off"].reason
    assert by_name["off"].median is by_name["absent"].median is None
    json.dumps([dataclasses.asdict(r) for r in rows], allow_nan=False)


# --- the command


@pytest.fixture
def tiny_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.shapes, "QUICK", {"cpu": (TINY,)})


def test_command_writes_json_markdown_and_plots(tmp_path: Path, monkeypatch, tiny_command, capsys) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", (OURS, EAGER, Candidate("absent", broken)))
    assert kernels.main(["--quick", "--repeats", "3", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    found = records.load(path)
    assert found.quick
    assert found.repeats == 3
    assert {r.mode for r in found.rows} == set(MODES)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "absent: not built here" in capsys.readouterr().out


def test_command_refuses_with_status_1_and_writes_nothing(tmp_path: Path, monkeypatch, tiny_command, capsys) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", (Candidate(candidates.OURS, biased), EAGER))
    assert kernels.main(["--quick", "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith("refused: onecard is wrong")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (kernels.main, ["--device", "tpu"], "cpu"),
        (kernels.main, ["--shape", "huge"], "llama2-vocab-1k"),
        (kernels.main, ["--repeats", "0"], "repeats"),
        (kernels.main, ["--without", "onecard"], "eager"),
        (render.main, ["no-such-file.json"], "no-such-file.json"),
    ],
)
def test_misuse_is_one_line_and_status_2(main, arguments: list[str], says: str, capsys) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_says_so(capsys) -> None:
    assert kernels.main(["--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("module", [kernels, render])
def test_help_teaches(module, capsys) -> None:
    assert module.main(["--help"]) == 0
    assert f"python -m {module.__name__} " in capsys.readouterr().out


# --- records and rendering


def test_report_survives_the_file_and_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.json"
    records.save(report(ROWS), path)
    assert records.load(path) == report(ROWS)
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]  # no temporary file stays
    for text in ("{", "[]", "{}", '{"schema": 1, "rows": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json is no benchmark report"):
            records.load(path)
    assert render.main([str(path)]) == 2


def test_file_name_tells_dirty_and_quick_runs_apart() -> None:
    assert records.file_name(report([])) == "linear_logprobs-20260102T0304Z-0123456.json"
    assert records.file_name(report([], dirty=True, quick=True)).endswith("-0123456-dirty-quick.json")


def test_markdown_has_the_numbers_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.save(report(ROWS, dirty=True), path)
    made = render.render(path)
    assert [p.name for p in made] == ["run.md", "run-frozen.png"]
    assert made[1].read_bytes().startswith(b"\x89PNG")
    text = made[0].read_text()
    assert "DIRTY TREE" in text
    assert "0123456789ab" in text
    # medians of 0.1 0.2 0.4 and 0.2 0.5 0.6 s; the ratio is the median over rounds of 2, 2.5 and 1.5
    assert "| onecard | 200 | 150 to 300 | 1.00x (1.00 to 1.00) | 75% | 3.0 | 1.0e-06 | 2.0e-06 | – |" in text
    assert "| eager | 500 | 350 to 550 | 2.00x (1.75 to 2.25) | 30% | 150 | 3.0e-06 | 4.0e-06 | – |" in text
    assert "| bare GEMMs, 2u (2 TFLOP/s) | 150 |" in text
    assert "no \\| such module" in text
    assert "DIRTY" not in render.markdown(report(ROWS), "run.json")
    before = [p.read_bytes() for p in made]
    assert [p.read_bytes() for p in render.render(path)] == before


def test_every_cell_has_a_heading() -> None:
    for found in ROWS:
        assert len(tables.cells(found, ROWS[0])) == len(tables.HEADINGS)
    assert len(tables.brief(ROWS[0], ROWS[0])) == len(tables.BRIEF_HEADINGS)


def test_readme_update_is_idempotent_and_touches_nothing_else(tmp_path: Path) -> None:
    path, readme = tmp_path / "results" / "run.json", tmp_path / "README.md"
    records.save(report(ROWS), path)
    readme.write_text("before\n<!-- benchmark:linear_logprobs -->\nold\n<!-- /benchmark -->\nafter \\1\n")
    assert render.main([str(path), "--readme", str(readme)]) == 0
    once = readme.read_text()
    assert render.main([str(path), "--readme", str(readme)]) == 0
    assert readme.read_text() == once
    assert once.startswith("before\n<!-- benchmark:linear_logprobs -->\n| pass |")
    assert once.endswith("<!-- /benchmark -->\nafter \\1\n")
    assert "old" not in once
    assert "2.00x, 150 MiB" in once
    assert "results/run.json" in once


@pytest.mark.parametrize("text", ["no markers", "<!-- benchmark:linear_logprobs --> unclosed"])
def test_readme_without_markers_is_an_error_and_stays(tmp_path: Path, text: str, capsys) -> None:
    path, readme = tmp_path / "run.json", tmp_path / "README.md"
    records.save(report(ROWS), path)
    readme.write_text(text)
    assert render.main([str(path), "--readme", str(readme)]) == 2
    assert readme.read_text() == text
    assert "expected one block" in capsys.readouterr().err
