"""The benchmark's cases and its command: what is wrong is not timed, and what was finished is written."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import anatomy, candidates, cases, kernels, measure, records, render
from benchmarks.anatomy import EAGER, OURS, Benchmark, Candidate, Inputs
from benchmarks.candidates import eager_logprobs, takes
from benchmarks.cases import Timing
from benchmarks.shapes import Shapes, linear
from benchmarks.suite.linear_logprobs import BENCHMARK, FORWARD, FROZEN, MODES, TENSORS, TRAINED

CPU = torch.device("cpu")
# V and N divide by no block size; D is small enough for the whole file to take seconds
TINY = linear("tiny", 13, 8, 37)


def logprobs_from(function) -> Candidate:
    """Something under our name."""
    return Candidate(OURS, lambda device: takes(function, TENSORS), role="ours")


PEER = Candidate(EAGER, lambda device: takes(eager_logprobs, TENSORS))
RIGHT = logprobs_from(eager_logprobs)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)


def tiny_case(mode: str, *chosen: Candidate, repeats: int = 3, main: bool = True) -> list[records.Row]:
    sets = anatomy.input_sets(BENCHMARK, TINY, CPU)
    true = BENCHMARK.truth(sets[0], MODES[TRAINED].results)
    return cases.measure_case(BENCHMARK, TINY, mode, sets, true, chosen, Timing(repeats), main=main)


# --- cases and the verdict


@pytest.mark.parametrize("mode", MODES)
def test_a_case_has_every_number(mode: str) -> None:
    rows = tiny_case(mode, RIGHT, PEER)
    ours, eager, gemms, copy = rows
    assert [r.candidate for r in rows] == ["onecard", "eager", f"bare GEMMs, {gemms.gemms}u", "copy"]
    assert [r.role for r in rows] == ["ours", "peer", "limit", "limit"]
    for found in (ours, eager):
        assert len(found.seconds) == 3
        assert found.q1 <= found.median <= found.q3
        assert found.launches is None
        assert found.peak_bytes > TINY["N"] * TINY["V"] * 4  # eager holds all logits
        assert tuple(found.errors) == MODES[mode].results
        assert found.errors["logp"] < 1e-5
    assert copy.rate == pytest.approx(measure.COPY_BYTES / copy.median)
    assert ours.of_limit is not None


def biased(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return eager_logprobs(h, w, t) + 1e-3


def uniform_gradient(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The bug that a uniform grad_output hides: every token gets the mean of the gradients."""
    values = eager_logprobs(h, w, t)
    if values.requires_grad:
        values.register_hook(lambda grad: grad.mean().expand_as(grad))
    return values


def nan(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return eager_logprobs(h, w, t) * float("nan")


def raising(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no\nluck")


@pytest.mark.parametrize(
    ("function", "mode", "says"),
    [
        (biased, FORWARD, "logp: error 0.001"),
        (uniform_gradient, FROZEN, "dHidden"),
        (uniform_gradient, TRAINED, "dW"),
        (nan, FORWARD, "nan"),
        (raising, FORWARD, "RuntimeError: no luck"),
    ],
)
def test_a_wrong_candidate_of_ours_is_refused(function, mode: str, says: str) -> None:
    with pytest.raises(cases.Refused, match=says):
        tiny_case(mode, logprobs_from(function), PEER)


def test_a_wrong_variant_of_ours_is_refused_and_an_absent_one_is_a_row() -> None:
    variant = dataclasses.replace(logprobs_from(biased), name=f"{OURS}, other")
    with pytest.raises(cases.Refused, match=r"onecard, other is wrong in linear_logprobs"):
        tiny_case(FORWARD, RIGHT, PEER, variant)
    rows = tiny_case(FORWARD, RIGHT, PEER, dataclasses.replace(variant, load=candidates.absent("", "not here").load))
    assert [r.reason for r in rows if r.candidate == variant.name] == ["not here"]


def test_a_peer_that_cannot_run_or_is_wrong_keeps_its_row_with_the_reason() -> None:
    off = dataclasses.replace(logprobs_from(nan), name="off", role="peer")
    unlucky = dataclasses.replace(logprobs_from(raising), name="unlucky", role="peer")
    rows = tiny_case(FORWARD, RIGHT, PEER, candidates.absent("absent", "not built here"), off, unlucky)
    by_name = {r.candidate: r for r in rows}
    assert by_name["absent"].reason == "not built here"
    assert by_name["unlucky"].reason == "RuntimeError: no luck"
    assert "wrong here" in by_name["off"].reason
    assert by_name["off"].median is by_name["absent"].median is None
    json.dumps([dataclasses.asdict(r) for r in rows], allow_nan=False)


@pytest.mark.parametrize(("flops", "least"), [(8.0, 2.0), (2.0, 1.0)])  # bound by the products, by the copy
def test_the_share_of_the_limit_is_of_what_binds(flops: float, least: float) -> None:
    blank = records.Row("s", {}, FORWARD, OURS, "ours", median=4.0)
    gemms = dataclasses.replace(blank, candidate="bare", role=records.LIMIT, median=2.0, gemms=1, rate=4.0)
    copy = dataclasses.replace(blank, candidate="copy", role=records.LIMIT, median=1.0, rate=5.0)
    ours, bare, copied = cases.with_share([blank, gemms, copy], anatomy.Work(5, flops, anatomy.Products(1)))
    assert (ours.of_limit, bare.of_limit, copied.of_limit) == (least / 4, least / 2, None)


def test_candidates_take_part_where_they_say() -> None:
    slow = dataclasses.replace(PEER, name="slow", slow_start=True)
    elsewhere = dataclasses.replace(PEER, name="elsewhere", devices=("cuda",))
    backward = dataclasses.replace(PEER, name="backward", modes=(FROZEN,))
    rows = tiny_case(FORWARD, RIGHT, PEER, slow, elsewhere, backward, main=False)
    assert {r.candidate for r in rows} == {OURS, EAGER, "slow", "bare GEMMs, 1u", "copy"}
    assert "compiles for long" in next(r.reason for r in rows if r.candidate == "slow")
    assert "backward" in {r.candidate for r in tiny_case(FROZEN, RIGHT, PEER, backward)}


def test_settings_hold_and_inputs_are_fresh_in_every_call() -> None:
    """A candidate that destroys its inputs gets new ones each time, and the others never see the ruins."""
    inside: list[bool] = []

    @contextmanager
    def settings():
        inside.append(True)
        yield
        inside.pop()

    def destructive(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert inside
        found = eager_logprobs(h, w, t)
        h.zero_()
        return found

    def copied(inputs: Inputs) -> Inputs:
        return {**inputs, "hidden": inputs["hidden"].clone()}

    variant = dataclasses.replace(logprobs_from(destructive), name="d", around=settings, prepare=copied)
    sets = anatomy.input_sets(BENCHMARK, TINY, CPU)
    before = [s["hidden"].clone() for s in sets]
    true = BENCHMARK.truth(sets[0], ("logp",))
    rows = cases.measure_case(BENCHMARK, TINY, FORWARD, sets, true, (RIGHT, PEER, variant), Timing(3))
    assert [r.reason for r in rows] == [None] * 5
    assert not inside
    assert all(torch.equal(s["hidden"], b) for s, b in zip(sets, before, strict=True))


# --- the command


def tiny_benchmark(name: str, *chosen: Candidate) -> Benchmark:
    return dataclasses.replace(BENCHMARK, name=name, shapes={"cpu": Shapes((TINY,), (TINY,))}, candidates=chosen)


@pytest.fixture
def two_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_benchmark("first", RIGHT, PEER, candidates.absent("absent", "not built here"))
    second = tiny_benchmark("second", logprobs_from(biased), PEER)
    monkeypatch.setattr(kernels, "BENCHMARKS", {"first": first, "second": second})


def test_command_writes_json_markdown_and_plots(tmp_path: Path, monkeypatch, capsys) -> None:
    first = tiny_benchmark("linear_logprobs", RIGHT, PEER, candidates.absent("absent", "not built here"))
    monkeypatch.setattr(kernels, "BENCHMARKS", {"linear_logprobs": first})
    chosen = ["--quick", "--repeats", "3", "--mode", FORWARD, "--mode", FROZEN]
    assert kernels.main([*chosen, "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    found = records.load(path)
    assert (found.quick, found.complete, found.repeats) == (True, True, 3)
    assert {r.mode for r in found.results[0].rows} == {FORWARD, FROZEN}
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "absent: not built here" in capsys.readouterr().out
    assert kernels.main(["--quick", "--mode", FORWARD, "--data-only", "--out", str(tmp_path / "data")]) == 0
    assert [p.suffix for p in (tmp_path / "data").iterdir()] == [".json"]


def test_what_is_refused_is_not_written_and_the_rest_is(tmp_path: Path, two_benchmarks, capsys) -> None:
    assert kernels.main(["--quick", "--repeats", "3", "--mode", FORWARD, "--out", str(tmp_path)]) == 1
    [path] = tmp_path.glob("*.json")
    right, refused = records.load(path).results
    assert (right.benchmark, right.refused, bool(right.rows)) == ("first", None, True)
    assert (refused.benchmark, refused.rows) == ("second", ())
    assert "REFUSED, nothing was timed: onecard is wrong in second" in path.with_suffix(".md").read_text()
    said = capsys.readouterr().err
    assert said.startswith("refused: onecard is wrong in second, mode forward: logp: error 0.001")
    assert said.count("\n") == 1


def test_a_run_of_nothing_right_writes_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    wrong = tiny_benchmark("linear_logprobs", logprobs_from(uniform_gradient), PEER)  # right forward, wrong after it
    monkeypatch.setattr(kernels, "BENCHMARKS", {"linear_logprobs": wrong})
    assert kernels.main(["--quick", "--repeats", "3", "--out", str(tmp_path / "out")]) == 1
    assert not list((tmp_path / "out").glob("*"))
    assert capsys.readouterr().err.startswith("refused: onecard is wrong")


def test_a_run_cut_off_leaves_what_was_finished(tmp_path: Path, monkeypatch) -> None:
    def cut(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if h.requires_grad:  # in the second mode
            raise KeyboardInterrupt
        return eager_logprobs(h, w, t)

    monkeypatch.setattr(kernels, "BENCHMARKS", {"linear_logprobs": tiny_benchmark("x", logprobs_from(cut), PEER)})
    assert kernels.main(["--quick", "--repeats", "3", "--out", str(tmp_path)]) == 130
    [path] = tmp_path.glob("*.json")
    found = records.load(path)
    assert not found.complete
    assert {r.mode for r in found.results[0].rows} == {FORWARD}
    assert "CUT OFF" in render.markdown(found, path.name)


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (kernels.main, ["--device", "tpu"], "cpu"),
        (kernels.main, ["--shape", "huge"], "llama2-vocab-1k"),
        (kernels.main, ["--repeats", "0"], "repeats"),
        (kernels.main, ["--without", "onecard"], "eager"),
        (kernels.main, ["--benchmark", "rollout"], "linear_logprobs"),
        (kernels.main, ["--benchmark", "gae", "--mode", "trained"], "no benchmark has them all"),
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
