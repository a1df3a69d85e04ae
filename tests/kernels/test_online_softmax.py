"""The pass over a tile as 16-bit products ask for it: results in other dtypes, heads with any strides."""

from __future__ import annotations

import pytest
import torch

from onecard_kernels import linear_kl, linear_logprobs
from onecard_kernels.logprob.online_softmax import TileOutputs, exp_tile, new_state, statistics
from onecard_kernels.records import Head
from tests.closeness import assert_within
from tests.kernels.backends import BACKENDS

N, V = 5, 37
TARGETS = torch.tensor([0, 3, V - 1, 7, 7])


@pytest.mark.parametrize("level", [-25.0, 0.0, 25.0])  # within the lazy shift's reach, past what fp16 holds as e^z
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("moment", [False, True])
def test_results_of_16_bits_are_those_of_fp32_rounded(
    dtype: torch.dtype, level: float, softcap: float | None, moment: bool
) -> None:
    z = torch.randn(N, V) * 4 + level
    wanted, head = TileOutputs(entropy_sum=moment, sum_sq=True, exponentials=True), Head(softcap=softcap)
    shares, found = [], []
    for kept in (torch.float32, dtype):
        logits = z.clone()
        out = logits if kept == torch.float32 else torch.empty(N, V, dtype=kept)
        spread = torch.empty(N, V, dtype=kept) if moment else None
        state = new_state(N, z)
        exp_tile(logits, out, spread, TARGETS, 0, state, head, wanted)
        found.append(statistics(state, head, wanted))
        # Each has its own shift: compared as shares of the row's sum, which is what the direction is made of.
        kinds = (out,) if spread is None else (out, spread)
        shares.append([kind.double() / found[-1].total[:, None] for kind in kinds])
    for rounded, whole in zip(*reversed(shares), strict=True):
        assert_within(rounded, whole, float(torch.finfo(dtype).eps) * float(whole.abs().max()))
    assert_within(found[1].logprobs, found[0].logprobs, 2e-5)
    if found[0].entropy is not None and found[1].entropy is not None:
        assert_within(found[1].entropy, found[0].entropy, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_with_any_strides(backend: str) -> None:
    hidden, weight = torch.randn(N, 8), torch.randn(V, 8)
    table, mask = torch.randn(V, 3), torch.rand(V, 2) < 0.3
    mask[TARGETS] = False
    strided = {"bias": table[:, 1], "forbidden": mask[:, 0]}
    plain = {name: x.contiguous() for name, x in strided.items()}
    expanded = {"bias": torch.tensor([0.7]).expand(V)}
    for given, same in ((strided, plain), (expanded, {"bias": torch.full((V,), 0.7)})):
        got = linear_logprobs(hidden, weight, TARGETS, **given, backend=backend).logprobs
        assert torch.equal(got, linear_logprobs(hidden, weight, TARGETS, **same, backend=backend).logprobs)
        got = linear_kl(hidden, hidden * 0.9, weight, **given, backend=backend)
        assert torch.equal(got, linear_kl(hidden, hidden * 0.9, weight, **same, backend=backend))


def test_a_reference_of_another_precision_is_refused() -> None:
    hidden, weight = torch.randn(N, 8), torch.randn(V, 8)
    with pytest.raises(TypeError, match=r"ref_hidden torch.float64 .* expected torch.float32"):
        linear_kl(hidden, hidden.double(), weight)
