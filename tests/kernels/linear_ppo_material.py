"""Inputs of linear_ppo_loss, the functions that it is compared with, and small tile sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard_kernels import linear_logprobs, linear_ppo_loss, ppo_loss
from onecard_kernels.logprob import tuning
from tests.kernels import oracle

N, D, V = 24, 8, 131
NAN = float("nan")
EPS = torch.finfo(torch.float32).eps
HEAD: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0, "forbidden": torch.arange(V) == 0}


@contextmanager
def use_small_tiles(implementation: str) -> Iterator[None]:
    """Tile sizes with several tiles and a remainder in tokens and vocabulary, and several blocks of rows per tile."""
    with pytest.MonkeyPatch.context() as patch, tuning.override(implementation=implementation, rows=7, columns=40):
        patch.setattr("onecard_kernels.logprob.rows.BLOCK_BYTES", 3 * 40 * 4)
        yield


chunked_only = pytest.mark.parametrize("small_tiles", ["chunked"], indirect=True)


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random inputs. Half precision moves no log-ratio across a clip bound. Masked tokens are NaN."""
    mask = torch.arange(N) % 5 != 3
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) * 0.5, torch.randn(V) * 0.3
    targets = torch.randint(1, V, (N,)).masked_fill(~mask, -100)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    logp = oracle.linear_logprobs(
        hidden.double(), weight.double(), targets, bias=bias.double(), mask=mask, **HEAD
    ).logprobs
    log_ratio = torch.tensor([-0.6, -0.05, 0.04, 0.09, 0.5, 1.2]).double()[torch.arange(N) % 6]
    nan_where_masked = torch.where(mask, 0.0, NAN)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": targets,
        "old_logprobs": (logp - log_ratio + nan_where_masked).to(out),
        "advantages": (torch.randn(N) + nan_where_masked).to(out),
        "mask": mask,
        "ref_logprobs": (logp - torch.randn(N) + nan_where_masked).to(out),
        "weights": (torch.rand(N) + nan_where_masked).to(out),
    }


LEAVES = ("hidden", "weight", "bias")


def composed(data: dict[str, Any], logprobs_function: Any = linear_logprobs, **kw: Any) -> Any:
    """`linear_logprobs` (or another `logprobs_function`), then `ppo_loss`."""
    names = ("hidden", "weight", "targets")
    mask, entropy_coef = data["mask"], kw.get("entropy_coef", 0.0)
    policy = logprobs_function(
        *(data[name] for name in names),
        **{"bias": data["bias"], "mask": mask, **HEAD},
        return_entropy=True,
        entropy_requires_grad=entropy_coef != 0.0,
    )
    rest = (data["old_logprobs"], data["advantages"], mask)
    more = {name: data[name] for name in ("ref_logprobs", "weights")}
    return ppo_loss(policy.logprobs, *rest, entropy=policy.entropy, **more, **kw)


def fused(data: dict[str, Any], **kw: Any) -> Any:
    return linear_ppo_loss(**data, **HEAD, **kw)


def run(fn: Any, data: dict[str, Tensor], train: tuple[str, ...], **kw: Any) -> tuple[Any, dict[str, Tensor]]:
    data = {**data, **{name: data[name].detach().clone() for name in LEAVES}}
    leaves = [data[name].requires_grad_() for name in train]
    out = fn(data, **kw)
    return out, dict(zip(train, torch.autograd.grad(out.loss, leaves), strict=True))


def to(dtype: torch.dtype, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}


def eager(data: dict[str, Any], **kw: Any) -> Any:
    return composed(data, logprobs_function=oracle.linear_logprobs, **kw)
