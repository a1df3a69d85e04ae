"""The benchmark of the kernels: instruments, fp64 oracles, refusals, a dry run, and the numbers that pages publish."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from benchmarks import cli, harness, kernels, measure, records, render, targets
from benchmarks.harness import EAGER, Candidate, Products, Unavailable, Work, eager_logprobs, takes
from benchmarks.measure import Timing
from benchmarks.records import LIMIT, OURS, Case, Row
from benchmarks.shapes import Shape, Shapes, linear, logits
from benchmarks.suite import BENCHMARKS, linear_kl, linear_losses, selective
from benchmarks.suite import tokens as token_losses
from benchmarks.suite.linear_logprobs import BENCHMARK, FORWARD, FROZEN, TENSORS, TRAINED

CPU = torch.device("cpu")
CASES = [(name, mode) for name, benchmark in BENCHMARKS.items() for mode in benchmark.modes]
# V and N divide by no block size; N is enough for two pairs.
TINY = {
    ("N", "D", "V"): linear("tiny", 1061, 8, 37),
    ("N", "V"): logits("tiny", 13, 37),
    ("B", "T"): Shape("tiny", {"B": 5, "T": 11}),
}
SMALL = linear("tiny", 13, 8, 37)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)


# --- instruments


def test_interleaved_times_without_warmup_within_the_budget() -> None:
    calls: list[str] = []
    works = {name: [lambda n=name, i=i: calls.append(f"{n}{i}") for i in range(2)] for name in "ab"}
    clock = iter([0, 100, 0, 100, 0, 1, 0, 2, 0, 3, 0, 4])  # a warm-up round of 100 s, then 1, 2, 3, 4 s
    times = measure.interleave(works, CPU, Timing(2, warmup=1, clock=lambda: next(clock)))
    assert times == {"a": [1, 3], "b": [2, 4]}
    assert all(before[1] != after[1] for before, after in zip(calls[::2], calls[1::2], strict=True))  # other inputs
    for budget, rounds in ((0.5, 3), (4.5, 5)):
        ticks = iter(range(1000))  # every call takes a second
        timing = Timing(9, budget=budget, clock=lambda ticks=ticks: float(next(ticks)))
        assert len(measure.interleave({"a": [lambda: None]}, CPU, timing)["a"]) == rounds


def test_peak_memory_of_known_allocations_is_exact() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first
        return torch.cat([second, second[: 1 << 19]])

    # second and its longer copy live together at the end: 2 + 2.5 MiB, more than first and second
    assert measure.peak_bytes(work, CPU) == (2 << 20) + (5 << 19)


@pytest.mark.parametrize("budget", [1, 2 << 30])  # a token at a time, all at once
def test_bare_gemms_are_the_products_they_claim(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LOGITS_BYTES", budget)
    hidden, weight = torch.randn(4, 3), torch.randn(6, 3)
    logits = hidden @ weight.t()
    work = measure.gemm_work(hidden, weight, 1, 1, 1)
    assert measure.peak_bytes(work, CPU) == 0  # into buffers that exist
    _, d_hidden, d_weight = work()
    torch.testing.assert_close(d_hidden, logits @ weight)
    torch.testing.assert_close(d_weight, logits.t() @ hidden)


# --- oracles and counted work


def outputs(name: str, mode: str, candidate: str, inputs: dict[str, torch.Tensor]) -> harness.Outputs:
    chosen = next(c for c in BENCHMARKS[name].candidates if c.name == candidate)
    with chosen.around():
        return harness.run(chosen.load(CPU), inputs, BENCHMARKS[name].modes[mode])


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_ours_in_fp64_is_the_oracle_and_in_fp32_within_the_bars(name: str, mode: str) -> None:
    """Two ways that share no line: the equations written out, and the library."""
    benchmark = BENCHMARKS[name]
    shape = next(TINY[axes] for axes in TINY if axes == tuple(benchmark.shapes["cpu"].usual[0].sizes))
    inputs = benchmark.inputs(shape, CPU, torch.float32, 0)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = benchmark.expected(inputs, benchmark.modes[mode].results)
    errors = harness.errors_of(outputs(name, mode, OURS, exact), expected, benchmark.bars)
    assert errors.keys() == set(benchmark.modes[mode].results)
    assert max(errors.values()) < 1e-11
    check = harness.Check(benchmark, mode, inputs, expected)
    for candidate in (EAGER, OURS):
        check(next(c for c in benchmark.candidates if c.name == candidate))


def test_work_counts_every_term_by_hand() -> None:
    shape = linear("", 2, 3, 5)
    ends, one = (2 * 3 + 5 * 3) * 4, 60
    found = {mode: how.work(shape, 4) for mode, how in BENCHMARK.modes.items()}
    assert found[FORWARD] == Work(ends + 2 * (8 + 4), one, Products(1))
    assert found[FROZEN] == Work(ends + 2 * (8 + 4 + 4) + 2 * 3 * 4, 2 * one, Products(1, 1))
    assert found[TRAINED] == Work(ends + 2 * 16 + 2 * 3 * 4 + 5 * 3 * 4, 3 * one, Products(1, 1, 1))
    ppo, dpo = (loss.modes[FROZEN].work(shape, 2) for loss in (linear_losses.PPO, linear_losses.DPO))
    assert ppo == Work(42 + 2 * (8 + 4 + 4 + 1) + 12, 2 * one, Products(1, 1))
    assert dpo == Work(42 + 2 * (8 + 8) + 12, 2 * one, Products(1, 1))
    assert linear_kl.forward_work(shape, 4) == Work(ends + 2 * 3 * 4 + 2 * 4, 2 * one, Products(2))
    assert linear_kl.frozen_work(shape, 4) == Work(ends + 2 * 24 + 2 * 8, 3 * one, Products(2, 1))
    assert selective.forward_work(logits("", 2, 5), 2) == Work(2 * 5 * 2 + 2 * 16)
    assert selective.backward_work(logits("", 2, 5), 2) == Work(3 * 2 * 5 * 2 + 2 * 20)
    grid = Shape("", {"B": 2, "T": 3})
    assert token_losses.forward_work(grid, 4) == Work(6 * 13)
    assert token_losses.backward_work(grid, 4) == Work(6 * 17)
    assert token_losses.gae_work(grid, 4) == Work(6 * 17)


# --- what is wrong is not timed


def named(function, name: str = OURS, role: str = "ours") -> Candidate:
    return Candidate(name, lambda device: takes(function, TENSORS), role=role)


def biased(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return eager_logprobs(h, w, t) + 1e-3


def uniform_gradient(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The bug that a uniform grad_output hides: every token gets the mean of the gradients."""
    values = eager_logprobs(h, w, t)
    if values.requires_grad:
        values.register_hook(lambda grad: grad.mean().expand_as(grad))
    return values


def raising(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no\nluck")


PEER, RIGHT = named(eager_logprobs, EAGER, "peer"), named(eager_logprobs)


def tiny_rows(mode: str, *chosen: Candidate) -> dict[str, Row]:
    return {row.name: row for row in harness.measure_case(BENCHMARK, SMALL, mode, chosen, CPU, Timing(3))}


@pytest.mark.parametrize(
    ("function", "mode", "says"),
    [
        (biased, FORWARD, "logp: error 0.001"),
        (uniform_gradient, FROZEN, "dHidden"),
        (uniform_gradient, TRAINED, "dW"),
        (lambda h, w, t: eager_logprobs(h, w, t) * float("nan"), FORWARD, "nan"),
        (raising, FORWARD, "RuntimeError: no luck"),
    ],
)
def test_a_wrong_candidate_of_ours_is_refused(function, mode: str, says: str) -> None:
    with pytest.raises(cli.Refused, match=says):
        tiny_rows(mode, named(function), PEER)


def test_wrong_peers_and_settings_have_a_reason_and_no_time() -> None:
    off = named(lambda h, w, t: eager_logprobs(h, w, t) + 1, "off", "peer")
    rows = tiny_rows(FROZEN, RIGHT, PEER, off, named(raising, "unlucky", "peer"), named(biased, "setting", "setting"))
    assert rows["off"].reason.startswith("WRONG, not timed: logp: error 1 ")
    assert rows["unlucky"].reason == "RuntimeError: no luck"
    assert rows["setting"].reason.startswith("WRONG, not timed: logp")
    assert not rows["off"].seconds + rows["unlucky"].seconds + rows["setting"].seconds
    for name in (OURS, EAGER):
        assert len(rows[name].seconds) == 3
        assert rows[name].peak_bytes > SMALL["N"] * SMALL["V"] * 4  # the logits
        assert set(rows[name].errors) == {"logp", "dHidden"}
    assert {row.name for row in rows.values() if row.role == LIMIT} == {"bare GEMMs, 2u", "copy"}
    assert rows["bare GEMMs, 2u"].rate > 0


# --- the command


def test_the_command_writes_what_is_right_and_refuses_the_rest(tmp_path: Path, monkeypatch, capsys) -> None:
    shapes = {"cpu": Shapes((SMALL,), (SMALL,))}
    right = dataclasses.replace(BENCHMARK, shapes=shapes, candidates=(RIGHT, PEER, harness.absent("gone", "not here")))
    wrong = dataclasses.replace(right, name="wrong", candidates=(named(biased), PEER))
    monkeypatch.setattr(kernels, "BENCHMARKS", {BENCHMARK.name: right, "wrong": wrong})
    words = ["--quick", "--repeats", "3", "--mode", FORWARD, "--out", str(tmp_path)]
    assert cli.main(kernels.command, words) == 1
    assert capsys.readouterr().err.startswith("refused: onecard is wrong in wrong, mode forward: logp: error 0.001")
    [path] = tmp_path.glob("*.json")
    found = records.load(path)
    assert (found.quick, found.complete, found.repeats) == (True, True, 3)
    assert [(case.what, bool(case.rows), bool(case.refused)) for case in found.cases] == [
        (BENCHMARK.name, True, False),
        ("wrong", False, True),
    ]
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    page = path.with_suffix(".md").read_text()
    heads = "time, ms | quartiles | time / onecard | of limit | peak, MiB | error logp"
    for text in (heads, "QUICK RUN", "| gone | not here |", "REFUSED"):
        assert text in page
    assert cli.main(kernels.command, ["--shape", "huge"]) == 2


def test_a_run_cut_off_leaves_what_was_finished(tmp_path: Path, monkeypatch) -> None:
    def cut(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if h.requires_grad:  # in the second mode
            raise KeyboardInterrupt
        return eager_logprobs(h, w, t)

    shapes = {"cpu": Shapes((SMALL,), (SMALL,))}
    benchmark = dataclasses.replace(BENCHMARK, shapes=shapes, candidates=(named(cut), PEER))
    monkeypatch.setattr(kernels, "BENCHMARKS", {BENCHMARK.name: benchmark})
    assert cli.main(kernels.command, ["--quick", "--repeats", "3", "--out", str(tmp_path)]) == 130
    [path] = tmp_path.glob("*.json")
    found = records.load(path)
    assert (found.complete, [case.mode for case in found.cases]) == (False, [FORWARD])


def test_every_target_is_a_case_of_the_usual_run() -> None:
    """A typing error in a name would read "not measured" for ever."""
    for target in targets.TARGETS:
        benchmark = BENCHMARKS[target.benchmark]
        assert target.shape in {shape.name for shape in benchmark.shapes[target.device].usual}
        names = [c.name for c in benchmark.candidates if target.mode in (c.modes or (target.mode,))]
        made = Row("", "peer", seconds=(1.0,), peak_bytes=1, of_limit=1.0, launches=1, errors={"logp": 1.0})
        rows = [dataclasses.replace(made, name=name) for name in names]
        rows.append(Row("bare", LIMIT, seconds=(1.0,), gemms=2))
        case = Case(target.benchmark, target.shape, {}, "", target.mode, tuple(rows))
        assert target.cells(case)[-1] in ("met", "missed")


# --- what pages publish

PAGES = [records.ROOT / "README.md", *sorted((records.ROOT / "docs").glob("*.md"))]
SOURCE = re.compile(r"From `(?:benchmarks/results/cpu-2-cores/)?([\w-]+\.json)`")
PUBLISHED = [
    (page, name, source[1])
    for page in PAGES
    for name, body in re.findall(r"<!-- benchmark:([\w-]+) -->(.*?)<!-- /benchmark -->", page.read_text(), re.DOTALL)
    if (source := SOURCE.search(body))
]


@pytest.mark.parametrize(("page", "name", "file"), PUBLISHED, ids=[f"{p.name}-{n}" for p, n, _ in PUBLISHED])
def test_published_numbers_are_those_of_their_files(page: Path, name: str, file: str) -> None:
    path = records.RESULTS / "cpu-2-cores" / file
    source = path.relative_to(page.parent).as_posix() if path.is_relative_to(page.parent) else file
    body = render.summaries(records.load(path), source)[name]
    assert f"<!-- benchmark:{name} -->\n{body}\n<!-- /benchmark -->" in page.read_text()


def test_every_committed_report_and_its_page_are_readable() -> None:
    assert len(PUBLISHED) >= 7
    for path in records.RESULTS.glob("cpu-2-cores/*.json"):
        report = records.load(path)
        assert path.with_suffix(".md").read_text() == render.markdown(report, path.name)


def test_other_files_are_named_and_pages_without_marks_stay(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in ("{", "[]", '{"schema": 2}', '{"schema": 4, "cases": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json is no benchmark report"):
            records.load(path)
    text = "before\n<!-- benchmark:a -->\nold\n<!-- /benchmark -->\nafter \\1\n"
    once = render.updated(text, {"a": "new", "b": "none"})
    assert once == text.replace("old", "new") == render.updated(once, {"a": "new"})
    for bad in ("no marks", "<!-- benchmark:a --> unclosed"):
        with pytest.raises(ValueError, match="expected one block"):
            render.updated(bad, {"a": "new"})


def test_unavailable_peers_have_a_reason_and_variants_run() -> None:
    with pytest.raises(Unavailable, match="ModuleNotFoundError"):
        harness.attribute("no_such_package", "x")
    rows = tiny_rows(FROZEN, *(c for c in BENCHMARK.candidates if c.role == "ours" or c.name == EAGER))
    assert rows["onecard, chunked"].seconds
    assert rows["onecard, low memory"].reason == "the default on this device: see onecard"
