"""Draws for fuzzing: layouts, masks, heads and plans; the gradients with which results are compared."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from onecard_kernels.logprob import tuning

NAN = float("nan")
LEADING = st.lists(st.integers(0, 4), max_size=3).map(tuple)  # of tokens: 0-d to 3-d, none among them
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
draws = st.data()


def fuzz(examples: int) -> Any:
    """The same examples in every run. `seeded` and `nan_filled_empty` hold for all examples of a test alike."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes, and the first example found says enough
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def few(backend: str, examples: int, kernel: int) -> int:
    """Triton's interpreter takes milliseconds a program."""
    return kernel if backend == "triton" else examples


def layout(draw: Any, x: Tensor) -> Tensor:
    """The same values in other memory."""
    kind = draw(st.sampled_from(["as is", "transposed", "sliced", "strided", "offset", "expanded"]))
    if x.dim() == 0 or kind == "as is":
        return x
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        return torch.cat([x, x], dim=0).narrow(0, 0, x.shape[0])
    if kind == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if kind == "offset":
        return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
    return x[:1].expand_as(x) if x.shape[0] > 0 else x  # other values, in memory with stride 0


def mask_of(draw: Any, shape: tuple[int, ...]) -> Tensor | None:
    kind = draw(st.sampled_from(["none", "all", "nothing", "some", "few"]))
    if kind == "none":
        return None
    share = {"all": 1.0, "nothing": 0.0, "some": 0.6, "few": 0.15}[kind]
    mask = torch.rand(shape) < share
    return layout(draw, mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32]))))


def head_of(draw: Any, v: int, dtype: torch.dtype) -> dict[str, Any]:
    forbidden = torch.rand(v) < 0.3
    forbidden[draw(st.integers(0, v - 1))] = False
    return {
        "bias": draw(st.sampled_from([None, torch.randn(v).to(dtype)])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.0])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "forbidden": draw(st.sampled_from([None, forbidden])),
    }


def plan_of(draw: Any) -> Any:
    return tuning.override(
        implementation=draw(st.sampled_from(tuning.IMPLEMENTATIONS)),
        rows=draw(st.integers(1, 9)),
        columns=draw(st.integers(1, 40)),
    )


def seed(draw: Any) -> None:
    torch.manual_seed(draw(st.integers(0, 2**16)))


def double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x if name == "mask" else double(x) for name, x in options.items()}


def derive(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Zeros where nothing depends on a leaf, as with no valid token in a formula."""
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
