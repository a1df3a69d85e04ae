"""Each benchmark's truth, inputs and counted work: what all its candidates are held against."""

from __future__ import annotations

import pytest
import torch

from benchmarks import anatomy, truth
from benchmarks.anatomy import EAGER, OURS, Benchmark, Candidate, Inputs, Products, Unavailable, Work
from benchmarks.shapes import LOGIT_STD, Shape, linear, logits
from benchmarks.suite import BENCHMARKS, formulas, gae, linear_dpo, linear_kl, linear_logprobs, linear_ppo, selective
from benchmarks.suite import tokens as token_losses

CPU = torch.device("cpu")
# V and N divide by no block size; N is enough for two pairs
TINY = {
    "N x D x V": linear("tiny", 1061, 8, 37),
    "N x V": logits("tiny", 13, 37),
    "B x T": Shape("tiny", {"B": 5, "T": 11}),
}
CASES = [(name, mode) for name, benchmark in BENCHMARKS.items() for mode in benchmark.modes]


def candidate(benchmark: Benchmark, name: str) -> Candidate:
    return next(c for c in benchmark.candidates if c.name == name)


def outputs(benchmark: Benchmark, mode: str, name: str, inputs: Inputs) -> anatomy.Outputs:
    chosen = candidate(benchmark, name)
    try:
        function = chosen.load(CPU)
    except Unavailable as reason:
        pytest.skip(str(reason))
    given = chosen.prepare(inputs) if chosen.prepare else inputs
    with chosen.around():
        return anatomy.run(function, given, benchmark.modes[mode])


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_truth_is_ours_in_fp64(name: str, mode: str) -> None:
    """Two ways that share no line: the equations written out, and the library with fp64 tensors."""
    benchmark = BENCHMARKS[name]
    inputs = benchmark.inputs(TINY[benchmark.axes], CPU, torch.float32, 0)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    true = benchmark.truth(inputs, benchmark.modes[mode].results)
    errors = truth.errors_of(outputs(benchmark, mode, OURS, exact), true, benchmark.bars)
    assert errors.keys() == set(benchmark.modes[mode].results)
    assert max(errors.values()) < 1e-11


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_ours_and_eager_are_within_their_bars(name: str, mode: str) -> None:
    benchmark = BENCHMARKS[name]
    inputs = benchmark.inputs(TINY[benchmark.axes], CPU, torch.float32, 0)
    true = benchmark.truth(inputs, benchmark.modes[mode].results)
    eager = truth.errors_of(outputs(benchmark, mode, EAGER, inputs), true, benchmark.bars)
    assert truth.peer_objection(benchmark, eager) is None
    ours = truth.errors_of(outputs(benchmark, mode, OURS, inputs), true, benchmark.bars)
    assert truth.objections(benchmark, ours, eager, torch.float32) == []
    assert truth.objections(benchmark, {name: error + 1.0 for name, error in ours.items()}, eager, torch.float32)


def test_in_place_is_the_same_gradient_and_leaves_the_inputs_alone() -> None:
    benchmark, mode = selective.BENCHMARK, selective.BACKWARD
    inputs = benchmark.inputs(TINY["N x V"], CPU, torch.float32, 0)
    before = inputs["logits"].clone()
    found, plain = (outputs(benchmark, mode, name, inputs) for name in (f"{OURS}, in place", OURS))
    assert torch.equal(found["dLogits"], plain["dLogits"])
    assert torch.equal(inputs["logits"], before)


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.axes == "N x D x V"])
def test_a_trained_models_logits(name: str) -> None:
    inputs = BENCHMARKS[name].inputs(linear("", 64, 512, 500), CPU, torch.float32, 0)
    found = inputs["hidden"] @ inputs["weight"].t()
    assert float(found.std()) == pytest.approx(LOGIT_STD, rel=0.02)
    assert torch.equal(inputs["targets"][::2], found.argmax(-1)[::2])
    assert inputs["grad"].unique().numel() == 64


def test_another_seed_gives_other_inputs() -> None:
    for benchmark in BENCHMARKS.values():
        first, second = (benchmark.inputs(TINY[benchmark.axes], CPU, torch.float32, seed) for seed in (0, 1))
        same = [name for name in first if torch.equal(first[name], second[name])]
        assert set(same) <= {"one", "mask"}


@pytest.mark.parametrize("make", [linear_ppo.make_inputs, token_losses.policy_inputs])
def test_clipped_tokens_are_so_clearly_that_no_rounding_decides(make) -> None:
    shape = linear("", 2000, 8, 50) if make is linear_ppo.make_inputs else Shape("", {"B": 20, "T": 100})
    inputs = make(shape, CPU, torch.float32, 0)
    exact = inputs.get("exact", inputs.get("logprobs")).double()
    difference, a = exact - inputs["old_logprobs"].double(), inputs["advantages"]
    ratio = difference.exp()
    stopped = ((a > 0) & (ratio > 1 + formulas.CLIP)) | ((a < 0) & (ratio < 1 - formulas.CLIP))
    assert float(stopped.float().mean()) == pytest.approx(formulas.CLIPPED_SHARE, abs=0.03)
    edges = torch.tensor([1 - formulas.CLIP, 1 + formulas.CLIP], dtype=torch.float64).log()
    # Further from an edge than the errors of bf16 logits, 0.06 nat
    assert float((difference[..., None] - edges).abs().min()) > 0.08
    _, slopes = formulas.policy_truth(exact, inputs)
    assert bool((slopes[stopped] == 0).all())


def test_pairs_are_packed_and_undecided() -> None:
    inputs = linear_dpo.make_inputs(linear("", 2048, 8, 50), CPU, torch.float32)
    ids = inputs["sequence_ids"]
    assert bool((ids.diff() >= 0).all())
    assert len(inputs["ref_logps"]) == 8
    assert set(ids.tolist()) == set(range(8))
    ratios = inputs["exact"] - inputs["ref_logps"]
    assert 0.1 < float((linear_dpo.BETA * ratios).std()) < 2  # the loss is curved there


def test_work_counts_every_term_by_hand() -> None:
    shape = linear("", 2, 3, 5)
    ends, one = (2 * 3 + 5 * 3) * 4, 60
    found = {mode: how.work(shape, 4) for mode, how in linear_logprobs.MODES.items()}
    assert found["forward"] == Work(ends + 2 * (8 + 4), one, Products(1))
    assert found["frozen"] == Work(ends + 2 * (8 + 4 + 4) + 2 * 3 * 4, 2 * one, Products(1, 1))
    assert found["trained"] == Work(ends + 2 * 16 + 2 * 3 * 4 + 5 * 3 * 4, 3 * one, Products(1, 1, 1))
    assert linear_ppo.work(shape, 2) == Work(42 + 2 * (8 + 4 + 4 + 1) + 12, 2 * one, Products(1, 1))
    assert linear_dpo.work(shape, 2) == Work(42 + 2 * (8 + 8) + 12, 2 * one, Products(1, 1))
    assert linear_kl.forward_work(shape, 4) == Work(ends + 2 * 3 * 4 + 2 * 4, 2 * one, Products(2))
    assert linear_kl.frozen_work(shape, 4) == Work(ends + 2 * 24 + 2 * 8, 3 * one, Products(2, 1))
    row = logits("", 2, 5)
    assert selective.forward_work(row, 2) == Work(2 * 5 * 2 + 2 * 16)
    assert selective.backward_work(row, 2) == Work(3 * 2 * 5 * 2 + 2 * 20)
    grid = Shape("", {"B": 2, "T": 3})
    assert token_losses.forward_work(grid, 4) == Work(6 * 13)
    assert token_losses.backward_work(grid, 4) == Work(6 * 17)
    assert gae.work(grid, 4) == Work(6 * 17)


def test_shapes_have_names_of_their_own() -> None:
    for benchmark in BENCHMARKS.values():
        for shapes in benchmark.shapes.values():
            every = shapes.of(quick=False, every=True)
            assert len({shape.name for shape in every}) == len(every)
            assert all(shape in every for shape in shapes.usual)
            assert all(" x ".join(shape.sizes) == benchmark.axes for shape in (*every, *shapes.quick))


def test_zero_rows_are_held_against_the_largest() -> None:
    true = torch.tensor([[0.0, 0.0], [4.0, 2.0]], dtype=torch.float64)
    assert truth.relative(true, true) == 0.0
    assert truth.relative(true + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), true) == 0.25
    small = torch.tensor([[0.5, 0.0], [4.0, 2.0]], dtype=torch.float64)
    off = small + torch.tensor([[0.25, 0.0], [0.0, 0.0]])
    assert (truth.relative(off, small), truth.overall(off, small)) == (0.5, 0.0625)
