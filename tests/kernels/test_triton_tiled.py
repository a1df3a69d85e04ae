"""The tiled Triton kernel against the reference in fp64: every row statistic, without logits in memory."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch

from onecard_kernels.logprob.tuning import TileConfig, config_for, tiles_per_program
from onecard_kernels.records import Head
from tests.closeness import LOGPROB_TOLERANCES, assert_within
from tests.kernels import oracle
from tests.kernels.operator_material import HEAD_KINDS, head_options

triton = pytest.importorskip("triton")
import triton.language as tl

from onecard_kernels.logprob.triton_math import log, log1p, tanh
from onecard_kernels.logprob.triton_tiled import tiled_statistics

# Few multiprocessors, so that small problems have several splits, waves and groups of row blocks too.
SMALL = TileConfig(16, 32, 16, warps=4, stages=2, at_once=1, multiprocessors=4, group=2)


def head_of(kind: str, v: int, dtype: torch.dtype = torch.float32) -> Head:
    return Head(**head_options(kind, v, dtype))


def inputs(n: int, d: int, v: int, dtype: torch.dtype, std: float = 4.0) -> tuple[torch.Tensor, ...]:
    weight = (torch.randn(v, d) * std / d**0.5).to(dtype)
    return torch.randn(n, d).to(dtype), weight, torch.randint(v, (n,))


def truth_of(hidden: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, head: Head) -> tuple[torch.Tensor, ...]:
    out = oracle.linear_logprobs(
        hidden.double(),
        weight.double(),
        y,
        bias=None if head.bias is None else head.bias.double(),
        temperature=head.temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        forbidden=head.forbidden,
        return_entropy=True,
        return_log_sum_sq_probs=True,
    )
    assert out.entropy is not None
    assert out.log_sum_sq_probs is not None
    return tuple(out)


def compare(
    hidden: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, head: Head, std: int = 4, **kw: Any
) -> tuple[torch.Tensor, ...]:
    got = tiled_statistics(hidden, weight, y, head, entropy=True, sum_sq=True, **kw)
    tolerance = LOGPROB_TOLERANCES[hidden.dtype, std] / head.temperature
    for value, truth, name in zip(got, truth_of(hidden, weight, y, head), ("logprobs", "H", "lssp"), strict=True):
        assert value is not None
        assert value.dtype == torch.float32
        assert_within(value, truth, tolerance, name)
    return got


@triton.jit
def _apply(x, out, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, FUNCTION(tl.load(x + at)))


@pytest.mark.parametrize(
    ("function", "truth", "low", "high"),
    [(tanh, torch.tanh, 1e-6, 1e3), (log1p, torch.log1p, 1e-9, 1e6), (log, torch.log, 1.0 + 1e-7, 1e6)],
)
def test_functions_are_right_to_four_units_in_the_last_place(
    function: Any, truth: Any, low: float, high: float
) -> None:
    x = torch.logspace(math.log10(low), math.log10(high), 4096)
    x = torch.cat([-x, x]) if function is tanh else torch.cat([x, 1.0 + torch.logspace(-7, 0, 4096)])
    for dtype in (torch.float32,) if function is tanh else (torch.float32, torch.float64):
        x = x.to(dtype)
        out = torch.empty_like(x)
        _apply[(1,)](x, out, FUNCTION=function, SIZE=8192)
        assert float((out / truth(x.double()) - 1).abs().max()) < 4 * torch.finfo(dtype).eps


# (tokens, D, V): one token and one column; D under, over and no multiple of the depth; V one above and one below a
# multiple of the columns, and under one tile; tokens one above a block.
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 8, 1), (17, 40, 129), (33, 16, 95), (16, 48, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_by_shape(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, weight, y = inputs(*shape, dtype)
    y[-1] = shape[2] - 1
    compare(hidden, weight, y, Head(), config=SMALL)


def test_each_result_alone_is_the_same() -> None:
    args = (*inputs(17, 16, 129, torch.float32), Head())
    both = compare(*args, config=SMALL)
    for entropy, sum_sq in ((False, False), (True, False), (False, True)):
        got = tiled_statistics(*args, entropy=entropy, sum_sq=sum_sq, config=SMALL)
        for value, whole, wanted in zip(got, both, (True, entropy, sum_sq), strict=True):
            assert torch.equal(value, whole) if wanted else value is None


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_part_of_the_head(kind: str) -> None:
    hidden, weight, y = inputs(17, 40, 129, torch.float32)
    head = head_of(kind, 129)
    y[:2] = torch.tensor([50, 128])  # 50 is forbidden where something is
    got = compare(hidden, weight, y, head, config=SMALL)
    assert bool(got[0][0].isinf()) == (head.forbidden is not None)


def test_the_device_table_s_tile_in_bf16_with_everything() -> None:
    hidden, weight, y = inputs(5, 40, 300, torch.bfloat16)
    compare(hidden, weight, y, head_of("all", 300, torch.bfloat16))
    compare(hidden, weight, y, Head())


def test_wide_logits() -> None:
    compare(*inputs(17, 16, 259, torch.float32, std=30), Head(), std=30, config=SMALL)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("margin", [7.0, 10.0, 14.0, 18.0])
def test_confident_tokens(margin: float, splits: int) -> None:
    """p from 0.99 to 0.999999 at |z| = 150, in the first, a middle and the last tile; 1 - p is right in 1e-5 of itself.

    The hidden states pick rows of an identity, so the products are exact and only the softmax is judged."""
    v = 127
    y = torch.tensor([0, 40, 126])
    hidden = torch.full((3, v), -150.0)
    hidden[torch.arange(3), y] += margin
    got = tiled_statistics(hidden, torch.eye(v), y, Head(), entropy=True, sum_sq=True, config=SMALL, splits=splits)
    truth = truth_of(hidden, torch.eye(v), y, Head())
    assert got[1] is not None
    assert float((got[0] / truth[0] - 1).abs().max()) < 1e-5
    assert float((got[1] / truth[1] - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("allowed", [0, 77, 128])
def test_all_but_one_token_forbidden(allowed: int) -> None:
    """Whole tiles and whole splits have nothing in the softmax; the one token has p = 1, every other target -inf."""
    hidden, weight, _ = inputs(3, 16, 129, torch.float32)
    forbidden = torch.arange(129) != allowed
    y = torch.tensor([allowed, 5, 127])
    for splits in (1, 5):
        logp, h, lssp = tiled_statistics(
            hidden, weight, y, Head(forbidden=forbidden), entropy=True, sum_sq=True, config=SMALL, splits=splits
        )
        assert logp.tolist() == [0.0, float("-inf"), float("-inf")]
        assert h is not None
        assert lssp is not None
        assert h.tolist() == lssp.tolist() == [0.0, 0.0, 0.0]


def test_what_is_in_forbidden_rows_of_the_head_does_not_matter() -> None:
    hidden, weight, y = inputs(3, 16, 70, torch.float32)
    head = Head(forbidden=torch.arange(70) >= 64)
    dirty = weight.clone()
    dirty[64:] = float("nan")
    y %= 64
    kw: dict[str, Any] = {"entropy": True, "sum_sq": True, "config": SMALL}
    for clean, other in zip(
        tiled_statistics(hidden, weight, y, head, **kw), tiled_statistics(hidden, dirty, y, head, **kw), strict=True
    ):
        assert torch.equal(clean, other)


def test_nan_stays_in_its_row_and_a_target_outside_is_nan() -> None:
    hidden, weight, y = inputs(5, 16, 70, torch.float32)
    hidden[1, 3] = float("nan")
    y[2], y[3] = 70, -100
    logp = tiled_statistics(hidden, weight, y, Head(), entropy=False, sum_sq=False, config=SMALL)[0]
    assert logp.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_hidden_and_transposed_weight(dtype: torch.dtype) -> None:
    hidden, weight, y = inputs(20, 40, 129, dtype)
    plain = compare(hidden[::2].contiguous(), weight, y[::2].contiguous(), Head(), config=SMALL)
    head = Head()
    for h in (hidden[::2], hidden.t().contiguous().t()[::2]):
        for w in (weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :40]):
            got = tiled_statistics(h, w, y[::2], head, entropy=True, sum_sq=True, config=SMALL)
            assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize(("rows", "stride"), [(70, 1 << 25), (3, 1 << 30)])
def test_rows_more_than_two_to_the_31_elements_away(rows: int, stride: int) -> None:
    """Across tiles and within one. Nothing of what lies between is touched, so it takes addresses and no memory."""
    size = 2 * ((rows - 1) * stride + 16)
    storage = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.float16)
    far = storage.as_strided((rows, 16), (stride, 1))
    weight = far.copy_(torch.randn(rows, 16)).clone()
    y = torch.arange(rows)
    want = tiled_statistics(weight, weight, y, Head(), entropy=False, sum_sq=False, config=SMALL)[0]
    for hidden, head in ((far, weight), (weight, far)):
        got = tiled_statistics(hidden, head, y, Head(), entropy=False, sum_sq=False, config=SMALL)[0]
        assert torch.equal(got, want)


def test_splits_and_tiles_change_only_the_rounding() -> None:
    hidden, weight, y = inputs(20, 20, 200, torch.float32)
    head = head_of("forbidden", 200)
    y[0] = 100  # forbidden
    results = [
        tiled_statistics(hidden, weight, y, head, entropy=True, sum_sq=True, config=config, splits=splits)
        for config, splits in ((SMALL, 1), (SMALL, 4), (SMALL, None), (replace(SMALL, rows=32), 3))
    ]
    # Sums of 200 positive numbers, twice in another order: a few ulps of log-sum, and of a logit of size 16.
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is not None
            assert b is not None
            assert_within(a, b, 8 * torch.finfo(torch.float32).eps * 16)


def test_no_tokens() -> None:
    hidden, weight, y = inputs(0, 8, 7, torch.float32)
    got = tiled_statistics(hidden, weight, y, Head(), entropy=True, sum_sq=False)
    assert got[0].shape == (0,)
    assert got[1] is not None
    assert got[1].shape == (0,)


def test_what_it_does_not_take() -> None:
    hidden, weight, y = inputs(2, 8, 7, torch.float32)
    kw: dict[str, Any] = {"entropy": False, "sum_sq": False}
    with pytest.raises(TypeError, match=r"hidden has dtype torch.float64, expected bfloat16.*accumulator is fp32"):
        tiled_statistics(hidden.double(), weight.double(), y, Head(), **kw)
    with pytest.raises(TypeError, match=r"weight has dtype torch.bfloat16, expected torch.float32 like hidden"):
        tiled_statistics(hidden, weight.bfloat16(), y, Head(), **kw)
    with pytest.raises(ValueError, match=r"8\.0 or more, this card has 7\.5"):
        config_for((7, 5), torch.float16, Head())


# Shapes of real models, and one token; on an H100.
@pytest.mark.parametrize("n", [1, 300, 2048, 8192, 16384])
@pytest.mark.parametrize("v", [32000, 50257, 128256, 151936, 256000])
def test_the_card_is_filled(n: int, v: int) -> None:
    config = config_for((9, 0), torch.bfloat16, Head())
    row_blocks, tiles = -(-n // config.rows), -(-v // config.columns)
    per_program = tiles_per_program(row_blocks, tiles, config)
    programs = row_blocks * -(-tiles // per_program)
    assert -(-tiles // per_program) <= 256
    waves = -(-programs // config.multiprocessors)
    needed = row_blocks * tiles / config.multiprocessors
    # A quarter of a tile's time is lost at most where there is a tile for each program, 5 % where there are many.
    assert waves * per_program <= max(1.05 * needed, needed + 1)
