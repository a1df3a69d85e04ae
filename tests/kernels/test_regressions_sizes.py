"""Named regression tests of size: addresses past 2^31, more rows than a grid dimension holds.

The table of all of them is at the top of test_regressions.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch

from onecard_kernels import launch
from onecard_kernels.logprob import tuning
from onecard_kernels.logprob.online_softmax import TileOutputs, new_state
from onecard_kernels.records import Head
from tests.closeness import assert_within
from tests.kernels.regression_material import COEFFICIENT, EPS, Case, H, V
from tests.kernels.regression_running import EVERY, WITH_VOCABULARY, cases, double, evaluate, over

pytest.importorskip("triton", reason="triton is not installed")

LIMIT = 65535  # programs in the second and the third dimension of a grid
META = torch.device("meta")


def far_rows(values: torch.Tensor) -> torch.Tensor:
    """The last row of `values` 2^31 elements from the first, in a mapping of which nothing else is ever touched."""
    rows, columns = values.shape
    apart_by = (1 << 31) // (rows - 1) + 16
    length = ((rows - 1) * apart_by + columns) * values.element_size()
    space = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE
    apart = torch.frombuffer(space, dtype=values.dtype).as_strided((rows, columns), (apart_by, 1))
    return apart.copy_(values)


@over([case for case in [*WITH_VOCABULARY, *cases("gae")] if not case.name.startswith("logits_ppo_loss" + H)])
def test_offsets_beyond_two_to_the_31(case: Case) -> None:
    """Rows so far apart that the last one's offset does not fit an int32."""
    # the tiles of a block of 16 rows begin at its first one
    rows = 17 if case.implementation == tuning.TILED else 3
    data = case.make((1, rows) if case.name != "gae" else (rows, 4))
    if "mask" in data:
        data["mask"] = torch.ones_like(data["mask"])
    if case.function.per_token:
        del data["mask"]  # with a mask, rows of hidden states are gathered first
    with case.tiles():
        value, grads = evaluate(case.call, data, case.leaves)
        for name in ("logits", "hidden", "ref_hidden", "rewards"):
            if name not in data:
                continue
            small = data[name].bfloat16() if name == "logits" else data[name]
            held = {**data, name: small}
            value, grads = evaluate(case.call, held, case.leaves)
            far = far_rows(small.reshape(rows, -1))
            far = far if name == "rewards" else far.unsqueeze(0)
            leaf = far.requires_grad_() if name in case.leaves else far
            got = case.call(**{**held, name: leaf})
            assert_within(got, value, 16 * EPS * float(value.abs().max()), name)
            if name in case.leaves:
                grad = torch.autograd.grad(got.sum(), leaf)[0]
                assert_within(grad, grads[name], 32 * EPS * float(grads[name].abs().max()))


def test_offsets_beyond_two_to_the_31_in_a_tile() -> None:
    """The passes over a chunk of 20,000 rows of 151,936 logits: what they read and what they write."""
    from onecard_kernels.kl.triton import kl_pass_
    from onecard_kernels.logprob.triton_exp import exp_tile

    z, r, spread, y = torch.randn(3, V), torch.randn(3, V), torch.zeros(3, V), torch.tensor([0, 5, V - 1])
    results = []
    for place in (torch.clone, far_rows):
        tile, other, beside, out = place(z), place(r), place(spread), place(spread)
        kl = kl_pass_(tile, other, Head(), out=out)
        state = new_state(3, z)
        exp_tile(tile, other, beside, y, 0, state, Head(), TileOutputs(entropy_sum=True, exponentials=True))
        results.append((kl, out, other, beside, state))
    for near, far in zip(*results, strict=True):
        assert_within(far, near, 8 * EPS * float(near.abs().max()))


# Launching functions may be called with any number of rows.
N = 70000


def rows_on_meta() -> None:
    from onecard_kernels.logprob import triton_rows
    from onecard_kernels.ppo import triton_logits
    from onecard_kernels.ppo.options import PolicyOptions, PolicyTokens

    logits, ids, numbers = meta(N, 37), meta(N, dtype=torch.int64), meta(N)
    mask = meta(N, dtype=torch.bool)
    _, _, stats = triton_rows.forward(logits, ids, mask, 1.0, True)
    triton_rows.backward(logits, ids, mask, stats, numbers, numbers, 1.0)
    tokens, options = PolicyTokens(numbers, numbers, mask), PolicyOptions(0.2, 0.2, None, COEFFICIENT, 0.0, "k3")
    _, _, divisor, stats, slope, entropy_slope = triton_logits.forward(logits, ids, tokens, options, 1.0, None)
    triton_logits.backward(logits, ids, mask, divisor, stats, slope, entropy_slope, meta(), 1.0)


def tiles_on_meta() -> None:
    from onecard_kernels.kl.triton import kl_pass_
    from onecard_kernels.logprob.triton_exp import exp_tile
    from onecard_kernels.logprob.triton_tiled import tiled_statistics

    z, ids = meta(N, 37), meta(N, dtype=torch.int64)
    exp_tile(z, z, meta(N, 37), ids, 0, new_state(N, z), Head(), TileOutputs(entropy_sum=True, exponentials=True))
    kl_pass_(z, meta(N, 37), Head(), out=z)
    tiled_statistics(meta(N, 16), meta(37, 16), ids, Head(), entropy=True, sum_sq=True)


def tokens_on_meta() -> None:
    from onecard_kernels.advantages.triton import launch_gae
    from onecard_kernels.ppo import triton as launches
    from onecard_kernels.ppo.options import PolicyOptions, PolicyTokens

    x, mask = meta(N * 1024), meta(N * 1024, dtype=torch.bool)
    launches.value_terms(x, x, x, mask, clip=0.2, weights=None)
    options = PolicyOptions(0.2, 0.2, None, 0.1, 0.0, "k3")
    tokens = launches.policy_terms(x, x, PolicyTokens(x, x, mask), options)
    launches.scale(meta(), meta(), tokens.grad, tokens.entropy_grad, torch.float32, torch.float32)
    launch_gae(meta(N, 4), meta(N, 4), meta(N, 4, dtype=torch.bool), None, 1.0, 0.95)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.mark.parametrize("launching", [rows_on_meta, tiles_on_meta, tokens_on_meta])
def test_more_rows_than_a_grid_dimension_holds(launching: Callable[[], None]) -> None:
    """The second and third dimension of a grid end at 65,535, so rows are on the first. As launches at that size."""
    with launch.recording() as launches:
        launching()
    assert len(launches) >= 4
    assert all(size <= LIMIT for one in launches for size in one.grid[1:])
    assert any(one.grid[0] > LIMIT or one.grid[0] * 128 >= N for one in launches)


@over([case for case in EVERY if case.backend == "torch" and case.name != "dpo_loss"])
def test_more_rows_than_a_grid_dimension_holds_in_torch(case: Case) -> None:
    n = LIMIT + 5
    data = case.make((1, n) if case.name != "gae" else (n, 1), 2, 3)
    with tuning.override(implementation=case.implementation, rows=1 << 20, columns=2):
        value, grads = evaluate(case.call, data, case.leaves)
    truth, true_grads = evaluate(case.function.equation, double(data), case.leaves)
    assert_within(value, truth, case.tolerance)
    for name, true in true_grads.items():
        assert_within(grads[name], true, 1e-5 * max(1e-3, float(true.abs().max())), name)
