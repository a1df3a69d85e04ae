"""How the linear path's plan is chosen: the table, what overrules it and for how long, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import onecard_kernels as k
from onecard_kernels import launch, linear_logprobs, linear_ppo_loss
from onecard_kernels.logprob import tuning
from onecard_kernels.logprob.tuning import CHUNKED, LOW_MEMORY, TILED, TileSizes, choose, columns_of, override
from tests.closeness import LOGPROB_TOLERANCES, assert_within
from tests.kernels import oracle

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("ONECARD_LINEAR", "ONECARD_ROWS", "ONECARD_COLUMNS")


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def now(vocabulary: int = 1000, device: torch.device = CPU, **kw: Any) -> TileSizes:
    return choose(vocabulary, torch.float32, device, **kw)


def test_an_override_ends_with_its_block() -> None:
    before = now()
    with override(implementation="chunked", rows=3):
        assert now() == TileSizes(CHUNKED, 3)
    assert now() == before


def test_the_inner_override_stands_alone() -> None:
    """It replaces the outer one, field by field nothing is handed down; then the outer one is back."""
    with override(implementation="chunked", rows=3):
        with override(columns=7):
            table = tuning.TABLE["cpu"]
            assert now() == TileSizes(LOW_MEMORY, table.tile_rows, 7)
        assert now() == TileSizes(CHUNKED, 3)


def test_an_exception_ends_the_override() -> None:
    before = now()
    with pytest.raises(KeyError), override(rows=3), override(rows=5):
        raise KeyError
    assert now() == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"implementation": "fused"}, "implementation is 'fused', expected one of 'chunked', 'low_memory', 'tiled'"),
        ({"rows": 0}, "rows is 0, expected a whole number of 1 or more"),
        ({"rows": -3}, "rows is -3, expected a whole number"),
        ({"rows": 2.5}, "rows is 2.5, expected a whole number"),
        ({"columns": "many"}, "columns is 'many', expected a whole number of 1 or more"),
        ({"columns": 0}, "columns is 0, expected a whole number of 1 or more"),
    ],
)
def test_a_bad_override_is_refused_and_leaves_nothing(wrong: dict[str, Any], words: str) -> None:
    before = now()
    with pytest.raises(ValueError, match=words), override(**wrong):
        pytest.fail("entered")
    assert now() == before


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_LINEAR", "low_memory")
    monkeypatch.setenv("ONECARD_ROWS", "12")
    monkeypatch.setenv("ONECARD_COLUMNS", "34")
    assert now() == TileSizes(LOW_MEMORY, 12, 34)
    assert now(device=CUDA) == TileSizes(LOW_MEMORY, 12, 34)
    monkeypatch.setenv("ONECARD_LINEAR", "chunked")
    assert now() == TileSizes(CHUNKED, 12)  # columns are of low_memory alone
    for name in NAMES:
        monkeypatch.setenv(name, "")
    assert now() == TileSizes(LOW_MEMORY, tuning.TABLE["cpu"].tile_rows, tuning.TABLE["cpu"].tile_columns)


def test_an_override_is_above_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_LINEAR", "low_memory")
    with override(implementation="chunked", rows=2):
        assert now() == TileSizes(CHUNKED, 2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ONECARD_LINEAR", "Chunked", "implementation is 'Chunked', expected one of 'chunked'"),
        ("ONECARD_ROWS", "1e3", "rows is '1e3', expected a whole number"),
        ("ONECARD_COLUMNS", "0", "columns is '0', expected a whole number of 1 or more"),
    ],
)
def test_a_bad_environment_is_refused(name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        linear_logprobs(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]))


def test_defaults_of_each_device() -> None:
    cpu, cuda = tuning.TABLE["cpu"], tuning.TABLE["cuda"]
    assert now() == TileSizes(cpu.default, cpu.tile_rows, cpu.tile_columns)
    assert cpu.default == LOW_MEMORY
    assert now(device=CUDA).implementation == cuda.default == CHUNKED
    assert now(device=torch.device("xpu")) == now(device=CUDA)  # an unknown card is a card
    with override(implementation="low_memory"):
        assert now(device=CUDA) == TileSizes(LOW_MEMORY, cuda.tile_rows, cuda.tile_columns)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "rows"),
    [
        (131072, torch.float32, 1024),  # 512 MiB are 1024 rows of 128 Ki fp32 logits
        (131072, torch.float64, 512),
        (200_000, torch.float32, 671),
        (32_000, torch.float32, 1024),  # more would not help
        (1 << 24, torch.float32, 256),  # fewer would be bound by reading the head
    ],
)
def test_a_chunk_is_as_large_as_its_memory_allows(vocabulary: int, dtype: torch.dtype, rows: int) -> None:
    assert choose(vocabulary, dtype, CUDA) == TileSizes(CHUNKED, rows)


def test_only_is_above_everything_but_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_LINEAR", "low_memory")
    assert now(only=CHUNKED).implementation == CHUNKED
    with override(implementation="low_memory", rows=3, columns=4):
        assert now(only=CHUNKED) == TileSizes(CHUNKED, 3)
        assert now() == TileSizes(LOW_MEMORY, 3, 4)


@pytest.mark.parametrize(
    ("plan", "vocabulary", "tokens", "columns"),
    [
        (TileSizes(CHUNKED, 8), 100, 5, 100),
        (TileSizes(LOW_MEMORY, 8, 10), 100, 8, 10),
        (TileSizes(LOW_MEMORY, 8, 10), 100, 80, 10),
        (TileSizes(LOW_MEMORY, 8, 64), 1000, 4, 128),  # half the rows, twice the columns
        (TileSizes(LOW_MEMORY, 8, 64), 1000, 3, 128),  # 170 in whole 64s
        (TileSizes(LOW_MEMORY, 8, 10), 100, 4, 10),  # what was asked for, where there is no whole 64
        (TileSizes(LOW_MEMORY, 8, 10), 25, 1, 25),  # no more than there are
        (TileSizes(LOW_MEMORY, 8, 10), 100, 0, 64),
        (TileSizes(LOW_MEMORY, 8, 1000), 100, 80, 100),
    ],
)
def test_columns_of_a_tile(plan: TileSizes, vocabulary: int, tokens: int, columns: int) -> None:
    assert columns_of(plan, vocabulary, tokens) == columns


# ---------------------------------------------------------------------------------------------------------------------
# tiled: for forward passes, where Triton runs

N, D, V = 5, 3, 37


def watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """True for each call that took the tiled way. Its kernel is tested in its own file."""
    from onecard_kernels.logprob import linear

    calls: list[bool] = []
    original = linear._tiled_kernel_runs

    def spy(*given: Any) -> bool:
        calls.append(original(*given))
        return False  # how it was decided is the question; go the other way

    monkeypatch.setattr(linear, "_tiled_kernel_runs", spy)
    return calls


def run(backend: str, dtype: torch.dtype = torch.float32, grad: bool = False, train: bool = False) -> None:
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=grad)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=train)
    targets = torch.randint(V, (N,))
    with override(implementation="tiled", rows=2):
        out = linear_logprobs(hidden, weight, targets, backend=backend)
    truth = oracle.linear_logprobs(hidden.double(), weight.double(), targets)
    assert_within(out.logprobs, truth.logprobs, LOGPROB_TOLERANCES[torch.float32, 4])
    if grad or train:
        truth.logprobs.sum().backward()
        expected = [x.grad.clone() for x in (hidden, weight) if x.grad is not None]
        hidden.grad = weight.grad = None
        out.logprobs.sum().backward()
        for mine, true in zip([x.grad for x in (hidden, weight) if x.grad is not None], expected, strict=True):
            assert_within(mine, true, 1e-5)


@pytest.mark.skipif(not launch.interpreted(), reason="triton's interpreter does not run here")
def test_tiled_runs_without_a_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(monkeypatch)
    run("triton")
    assert calls == [True]
    run("triton", torch.float64)
    run("torch")
    assert calls == [True, False, False]
    run("triton", grad=True)  # decided before: a direction is asked for
    assert calls == [True, False, False]


def test_tiled_with_a_trained_head_has_its_gradients() -> None:
    """The tiled forward saves no statistics for a backward: it must not be taken here."""
    run("auto", grad=True, train=True)
    run("auto", train=True)


def test_tiled_where_triton_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "unavailable_reason", lambda device: "triton is not installed")
    calls = watched(monkeypatch)
    run("auto")
    run("auto", grad=True)
    assert calls == [False]


@pytest.mark.skipif(not launch.interpreted(), reason="triton's interpreter does not run here")
def test_tiled_end_to_end() -> None:
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    mask = torch.tensor([1, 1, 0, 1, 0])
    truth = oracle.linear_logprobs(
        hidden.double(), weight.double(), targets, mask=mask, return_entropy=True, return_log_sum_sq_probs=True
    )
    with override(implementation=TILED):
        got = linear_logprobs(
            hidden, weight, targets, mask=mask, return_entropy=True, return_log_sum_sq_probs=True, backend="triton"
        )
    for mine, true in zip(got, truth, strict=True):
        assert_within(mine, true, 2e-5)


@pytest.mark.skipif(not launch.interpreted(), reason="triton's interpreter does not run here")
@pytest.mark.parametrize("train", [False, True])
def test_tiled_with_a_trained_head_on_triton(train: bool) -> None:
    run("triton", train=train, grad=not train)


@pytest.mark.parametrize("implementation", tuning.IMPLEMENTATIONS)
@pytest.mark.parametrize("train", [False, True])
def test_a_loss_s_plan_is_its_own_where_the_asked_one_cannot_be(implementation: str, train: bool) -> None:
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=train)
    leaves = (hidden, weight) if train else (hidden,)
    tokens = (torch.randint(V, (N,)), torch.full((N,), -3.0), torch.randn(N), torch.ones(N))
    plain = torch.autograd.grad(linear_ppo_loss(hidden, weight, *tokens).loss, leaves)
    with override(implementation=implementation, rows=2):
        got = torch.autograd.grad(linear_ppo_loss(hidden, weight, *tokens).loss, leaves)
    for mine, expected in zip(got, plain, strict=True):
        assert_within(mine, expected, 16 * torch.finfo(torch.float32).eps * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# chunk_tokens: the rows of one call


def test_chunk_tokens_go_before_the_override_and_the_table() -> None:
    assert now(chunk_tokens=5).rows == 5
    with override(implementation="low_memory", rows=3, columns=4):
        assert now(chunk_tokens=5) == TileSizes(LOW_MEMORY, 5, 4)
        assert now(chunk_tokens=5, only=CHUNKED) == TileSizes(CHUNKED, 5)


def calls(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    targets, ones = torch.arange(N), torch.ones(N)
    ids = torch.tensor([0, 0, 1, 1, -1])
    return {
        "linear_logprobs": lambda **kw: k.linear_logprobs(hidden, weight, targets, **kw).logprobs.sum(),
        "linear_ppo_loss": lambda **kw: k.linear_ppo_loss(hidden, weight, targets, None, ones, ones, **kw).loss,
        "linear_dpo_loss": lambda **kw: k.linear_dpo_loss(hidden, weight, targets, ids, torch.zeros(2), **kw).loss,
        "linear_kl": lambda **kw: k.linear_kl(hidden, hidden.detach() * 0.9, weight.detach(), **kw).sum(),
    }


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_ppo_loss", "linear_dpo_loss", "linear_kl"])
def test_chunk_tokens_do_what_the_override_does(name: str, train: bool) -> None:
    """Bit for bit, in the backward of a trained head too."""
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=train)
    call = calls(hidden, weight)[name]
    got = torch.autograd.grad(call(chunk_tokens=2), hidden)[0]
    with override(rows=2):
        expected = torch.autograd.grad(call(), hidden)[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "many"])
def test_bad_chunk_tokens_are_refused(wrong: Any) -> None:
    for call in calls(torch.randn(N, D), torch.randn(V, D)).values():
        with pytest.raises(ValueError, match=r"^chunk_tokens is .*expected a whole number of 1 or more, or None"):
            call(chunk_tokens=wrong)
