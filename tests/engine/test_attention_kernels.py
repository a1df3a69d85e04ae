"""Which kernel attends, what each is told, and windows worked by hand."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.data.batches import TokenBatch, pack, to_device
from onecard.models import attention
from onecard.models.attention import AttentionOptions, causal_mask, kernel_for, planned_for, segments_of
from tests.engine.attention_material import answer

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))


@pytest.mark.parametrize(
    ("queries", "keys", "window", "expected"),
    [
        (3, 3, None, ["x..", "xx.", "xxx"]),
        (3, 3, 2, ["x..", "xx.", ".xx"]),
        (3, 3, 1, ["x..", ".x.", "..x"]),
        (2, 4, None, ["xxx.", "xxxx"]),  # the last query stands at the last key: what comes before is the prompt
        (2, 4, 2, [".xx.", "..xx"]),
        (2, 5, 3, [".xxx.", "..xxx"]),
        (1, 4, 9, ["xxxx"]),
        (4, 4, 4, ["x...", "xx..", "xxx.", "xxxx"]),
    ],
)
def test_which_keys_a_query_sees(queries, keys, window, expected):
    seen = causal_mask(queries, keys, AttentionOptions(1.0, window=window), CPU)
    assert ["".join(".x"[key] for key in row) for row in seen.tolist()] == expected


def test_windows_are_those_of_transformers():
    from transformers import MistralConfig
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = MistralConfig(sliding_window=3, attn_implementation="sdpa", num_hidden_layers=1)
    theirs = create_sliding_window_causal_mask(
        config=config, inputs_embeds=torch.zeros(1, 8, 4), attention_mask=None, past_key_values=None
    )
    assert torch.equal(theirs[0, 0], causal_mask(8, 8, AttentionOptions(1.0, window=3), CPU))


# --- which one runs


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "softcap", "package", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, None, False, "by_torch_varlen"),
        ((8, 0), torch.float16, 256, None, False, "by_torch_varlen"),
        ((8, 6), torch.bfloat16, 64, None, True, "by_flash_attn"),
        ((8, 6), torch.bfloat16, 64, 50.0, True, "by_flash_attn"),
        ((9, 0), torch.bfloat16, 64, 50.0, False, "by_eager"),
        ((9, 0), torch.bfloat16, 320, None, True, "by_sdpa"),
        ((9, 0), torch.bfloat16, 256, None, False, "by_torch_varlen"),
        ((9, 0), torch.bfloat16, 72, None, False, "by_torch_varlen"),
        ((9, 0), torch.bfloat16, 76, None, False, "by_sdpa"),
        ((9, 0), torch.bfloat16, 76, 50.0, False, "by_eager"),
        ((7, 5), torch.float16, 64, None, True, "by_sdpa"),
        ((9, 0), torch.float32, 64, None, True, "by_sdpa"),
        ((9, 0), torch.float32, 64, 50.0, True, "by_eager"),
    ],
)
def test_the_table_of_kernels(monkeypatch, capability, dtype, size, softcap, package, expected):
    """A tensor that says it is on a GPU: the choice looks at device, type and size alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if package else None)
    query = SimpleNamespace(device=CUDA, dtype=dtype, shape=(1, 2, 3, size), is_meta=False)
    assert kernel_for(query, query, AttentionOptions(1.0, softcap)).__name__ == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_pytorch_s_own(monkeypatch, dtype):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    query = torch.zeros(1, 2, 3, 8, dtype=dtype)
    assert kernel_for(query, query, AttentionOptions(1.0)) is attention.by_sdpa
    assert kernel_for(query, query, AttentionOptions(1.0, softcap=2.0)) is attention.by_eager


def test_a_plan_takes_the_path_of_the_planned_device():
    query = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16, device=META)
    assert kernel_for(query, query, AttentionOptions(1.0)) is attention.by_sdpa
    with planned_for(CUDA):
        assert kernel_for(query, query, AttentionOptions(1.0)) is attention.by_torch_varlen
        assert kernel_for(query.float(), query, AttentionOptions(1.0)) is attention.by_sdpa
        assert (
            kernel_for(*[torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)] * 2, AttentionOptions(1.0)) is attention.by_sdpa
        )  # is real
        with planned_for(CPU):
            assert kernel_for(query, query, AttentionOptions(1.0)) is attention.by_sdpa
        assert kernel_for(query, query, AttentionOptions(1.0)) is attention.by_torch_varlen
    assert kernel_for(query, query, AttentionOptions(1.0)) is attention.by_sdpa


# --- what each is told

PROMPT = list(range(10, 16))
LONG, SHORT = answer(PROMPT, [1, 2, 3, 4]), answer(PROMPT, [5, 6])
RECORDS = {
    "apart": pack([LONG, SHORT, answer([9], [8])]),
    "shared": pack([LONG, SHORT, answer([9], [8])], {1: (0, 6)}),
    "one": pack([LONG]),
}
SCORES = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, window=3),
    "window of one": AttentionOptions(0.3, window=1),
    "wide window": AttentionOptions(0.3, window=50),
    "capped": AttentionOptions(0.3, softcap=0.7),
    "capped, window": AttentionOptions(0.3, softcap=0.7, window=4),
}


def inputs(batch: TokenBatch, groups: int, device: torch.device = CPU) -> list[Tensor]:
    """Query with 4 heads, key and value with fewer, as a layer makes them: a transposed view of [1, n, H, d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, batch.num_tokens, heads, 8) for heads in (4, groups, groups)]
    made = [torch.randn(shape, generator=generator).to(device).transpose(1, 2) for shape in shapes]
    return [each.requires_grad_() for each in made]


def by_hand(query: Tensor, key: Tensor, value: Tensor, batch: TokenBatch, score: AttentionOptions) -> Tensor:
    """The formula, row by row and head by head, in fp64: [n, H, d]."""
    query, key, value = (each[0].double() for each in (query, key, value))
    spans = batch.shared.spans if batch.shared else ((0, 0),) * len(batch.lengths)
    out, start = [], 0
    for length, span in zip(batch.lengths, spans, strict=True):
        before = list(range(*span))
        for place in range(length):
            rows = [*before, *range(start, start + place + 1)][-(score.window or 10**6) :]
            heads = []
            for head in range(query.shape[0]):
                group = head * key.shape[0] // query.shape[0]
                logits = key[group, rows] @ query[head, start + place] * score.scale
                if score.softcap:
                    logits = score.softcap * (logits / score.softcap).tanh()
                heads.append(logits.softmax(0) @ value[group, rows])
            out.append(torch.stack(heads))
        start += length
    return torch.stack(out)


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scale: float, back: int, ahead: int, softcap: float,
) -> Tensor:  # fmt: skip
    """What both varlen kernels promise: causal from the bottom right corner, `back` keys before a query's own place."""
    assert query.dim() == key.dim() == 3
    assert query.shape[2] == key.shape[2] == value.shape[2]  # the kernels take no other widths
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert ahead == 0
    queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max_q, max_k) == (max(queries), max(keys))
    assert (sum(queries), sum(keys)) == (len(query), len(key))
    assert len(key) == len(value)
    out = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        logits = softcap * (logits / softcap).tanh() if softcap else logits
        places = torch.arange(len(q))[:, None] + len(k) - len(q)
        age = places - torch.arange(len(k))
        seen = (age >= 0) & ((age <= back) if back >= 0 else True)
        out.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ones with the signatures of PyTorch's and flash-attn's varlen attention."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert scale is not None
        return varlen_reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, *window_size, 0.0)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert causal
        assert not dropout_p
        assert softmax_scale is not None
        back = window_size[0]  # causal says that there is nothing ahead, whatever the window does
        return varlen_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, back, 0, softcap
        )

    package: Any = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", varlen_attn)


KERNELS = {
    "by_sdpa": ["plain", "window", "window of one", "wide window"],
    "by_eager": list(SCORES),
    "by_torch_varlen": ["plain", "window", "window of one", "wide window"],
    "by_flash_attn": list(SCORES),
}


@pytest.mark.parametrize(("kernel", "score"), [(kernel, score) for kernel, names in KERNELS.items() for score in names])
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_every_kernel_is_the_formula(monkeypatch, kernel, score, record, groups):
    """Values and gradients, over the whole path from what a layer hands over."""
    stand_ins(monkeypatch)
    monkeypatch.setattr(attention, "kernel_for", lambda query, value, score: getattr(attention, kernel))
    batch, wanted = RECORDS[record], SCORES[score]
    query, key, value = inputs(batch, groups)
    out, _ = attention.attend(
        torch.nn.Identity(), query, key, value, None, scaling=wanted.scale, softcap=wanted.softcap,
        sliding_window=wanted.window, segments=segments_of(batch),
    )  # fmt: skip
    truth = by_hand(query, key, value, batch, wanted)
    assert out.shape == (1, batch.num_tokens, 4, 8)
    torch.testing.assert_close(out[0].double(), truth, atol=1e-6, rtol=1e-5)
    slope = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out[0] * slope).sum(), [query, key, value])
    expected = torch.autograd.grad((truth * slope).sum(), [query, key, value])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_may_be_narrower_than_queries(monkeypatch, kernel):
    """As in multi-head latent attention: queries and keys of 8 numbers, values of 5."""
    stand_ins(monkeypatch)
    monkeypatch.setattr(attention, "kernel_for", lambda query, value, score: getattr(attention, kernel))
    batch = RECORDS["shared"]
    query, key, value = inputs(batch, 4)
    narrow = value.detach()[..., :5].requires_grad_()
    out, _ = attention.attend(torch.nn.Identity(), query, key, narrow, None, scaling=0.3, segments=segments_of(batch))
    truth = by_hand(query, key, narrow, batch, SCORES["plain"])
    assert out.is_contiguous()
    torch.testing.assert_close(out[0].double(), truth, atol=1e-6, rtol=1e-5)
    [found], [expected] = (torch.autograd.grad(each.square().sum(), [narrow]) for each in (out, truth))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_values_wider_than_queries_take_pytorchs_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    query, narrow, wide = (
        SimpleNamespace(device=CUDA, dtype=torch.bfloat16, shape=(1, 2, 3, size), is_meta=False)
        for size in (192, 128, 256)
    )
    assert kernel_for(query, narrow, AttentionOptions(1.0)) is attention.by_flash_attn
    assert kernel_for(query, wide, AttentionOptions(1.0)) is attention.by_sdpa


def test_an_older_pytorch_shares_heads_without_being_asked(monkeypatch):
    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return varlen_reference(query, key, value, cu_q, cu_k, max_q, max_k, scale, *window_size, 0.0)

    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", varlen_attn)
    batch = RECORDS["shared"]
    query, key, value = inputs(RECORDS["shared"], 2)
    keys = [each.index_select(2, batch.shared.key_rows) for each in (key, value)]
    out = attention.by_torch_varlen(query, *keys, segments_of(batch), AttentionOptions(0.3))
    torch.testing.assert_close(
        out[0].double(), by_hand(query, key, value, batch, AttentionOptions(0.3)), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("score", SCORES)
def test_on_meta_tensors_shapes_and_types_are_right(device, dtype, record, score):
    """Forward and backward, as a plan of a step's memory runs them."""
    batch, wanted = to_device(RECORDS[record], META), SCORES[score]
    made = [each.detach().to(dtype).requires_grad_() for each in inputs(batch, 2, META)]
    with planned_for(torch.device(device)):
        out, _ = attention.attend(
            torch.nn.Identity(), *made, None, scaling=wanted.scale, softcap=wanted.softcap,
            sliding_window=wanted.window, segments=segments_of(batch),
        )  # fmt: skip
        out.float().square().sum().backward()
    assert out.is_meta
    assert (out.shape, out.dtype) == ((1, batch.num_tokens, 4, 8), dtype)
    assert [each.grad.shape for each in made] == [each.shape for each in made]
