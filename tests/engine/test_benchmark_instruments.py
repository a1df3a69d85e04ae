"""The benchmark's instruments, on things whose answers are known: numbers in tables are only as good as these."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


class FakeClock:
    """Answers the given times in turn."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> float:
        return self.times.pop(0)


def test_stopwatch_reads_the_clock_around_the_work() -> None:
    seconds = measure.stopwatch(CPU, FakeClock(10.0, 12.5))
    assert seconds(lambda: None) == 2.5


def test_interleave_ends_when_the_budget_is_spent_but_not_before_three_rounds() -> None:
    def count(budget: float, repeats: int) -> int:
        ticks = iter(range(1000))
        seconds = measure.stopwatch(CPU, lambda: float(next(ticks)))  # every call takes a second
        return len(measure.interleave({"a": [lambda: None]}, seconds, repeats=repeats, budget=budget)["a"])

    assert count(0.5, 9) == 3
    assert count(4.5, 9) == 5
    assert count(4.5, 2) == 2


def test_preparing_a_work_is_outside_of_its_time_and_memory() -> None:
    class Prepared:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def ready(self) -> None:
            self.calls.append("ready")
            self.held = torch.empty(1 << 20, dtype=torch.uint8)

        def __call__(self) -> torch.Tensor:
            self.calls.append("call")
            return self.held.zero_()

    work, clock = Prepared(), FakeClock(1.0, 3.0)
    assert measure.stopwatch(CPU, clock)(work) == 2.0
    assert measure.peak_bytes(work, CPU) == 0
    assert work.calls == ["ready", "call"] * 2


def test_interleave_takes_turns_drops_the_warmup_and_rotates_the_inputs() -> None:
    calls: list[str] = []
    works = {name: [lambda n=name, i=i: calls.append(f"{n}{i}") for i in range(2)] for name in "ab"}
    # a warm-up round of 100 s, then 1, 2, 3, 4 s
    clock = FakeClock(0, 100, 0, 100, 0, 1, 0, 2, 0, 3, 0, 4)
    times = measure.interleave(works, measure.stopwatch(CPU, clock), repeats=2, warmup=1)
    assert times == {"a": [1, 3], "b": [2, 4]}
    assert [call[0] for call in calls] == ["a", "b"] * 3
    assert all(before[1] != after[1] for before, after in zip(calls[::2], calls[1::2], strict=True))


def test_spread_of_a_fake_clock_is_median_and_quartiles() -> None:
    assert measure.spread([5.0, 1.0, 9.0, 3.0, 7.0]) == measure.Spread(5.0, 3.0, 7.0, 5)
    assert measure.spread([2.0]) == measure.Spread(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        measure.spread([])


def test_peak_memory_of_known_allocations_is_exact() -> None:
    before = torch.empty(5 << 20, dtype=torch.uint8)  # an input: not counted

    def work() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first
        return torch.cat([second, second[: 1 << 19]])

    # second and its longer copy live together at the end: 2 + 2.5 MiB, more than first and second
    assert measure.peak_bytes(work, CPU) == (2 << 20) + (5 << 19)
    assert measure.peak_bytes(lambda: before.zero_(), CPU) == 0
    assert measure.highest([5, -5, 4, 3, -7]) == 7


@pytest.mark.parametrize("budget", [1, 2 << 30])  # a token at a time, all at once
def test_bare_gemms_are_the_products_they_claim(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LOGITS_BYTES", budget)
    hidden, weight = torch.randn(4, 3), torch.randn(6, 3)
    logits = hidden @ weight.t()
    for products in ((1, 0, 0), (2, 1, 0), (1, 1, 1)):
        work = measure.gemm_work(hidden, weight, *products)
        assert measure.peak_bytes(work, CPU) == 0  # into buffers that exist
        _, d_hidden, d_weight = work()
        assert (d_hidden is None, d_weight is None) == (not products[1], not products[2])
    torch.testing.assert_close(d_hidden, logits @ weight)
    torch.testing.assert_close(d_weight, logits.t() @ hidden)
