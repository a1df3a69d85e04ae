"""Where memory runs out a pass is done again in smaller ones: the same result, and nothing is kept of what failed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onecard.config import ModelConfig, TrainConfig
from onecard.models import micro_batching
from onecard.models.load import load_base
from onecard.models.micro_batching import (
    MicroBatchSize,
    TokenBudget,
    forward_budget,
    map_micro_batches,
    run_micro_batches,
    unless_out_of_memory,
)
from onecard.rollout import CachedBatch, Sampling, sampling_budget
from onecard.training.trainer import Objective, Trainer
from onecard.utils.errors import OnecardError, is_out_of_memory
from onecard_kernels import Loss
from tests.engine.rollout_material import LoadedPolicy, recorded_shapes


def no_memory() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class RaisesInBackward(torch.autograd.Function):
    """The identity, whose backward finds no memory."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise no_memory()


@dataclass(frozen=True)
class Numbers:
    values: Tensor


Example = tuple[float, ...]  # its length is its number of tokens
EXAMPLES: list[Example] = [tuple(float(i * j % 7 + 1) for j in range(1, 2 + i)) for i in range(8)]  # 1 to 8 tokens


class Model:
    """Weights [3], whose loss is a sum over tokens, and a memory of `room` tokens."""

    layout = "packed"
    device = torch.device("cpu")

    def __init__(self, room: int, where: str = "forward") -> None:
        self.weights = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
        self.room, self.where = room, where
        self.passes: list[int] = []
        self.failed: list[weakref.ref[Tensor]] = []  # tensors of passes that failed
        self.alive = 0  # how many of those were still there when a later pass began

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {"weights": self.weights}

    def losses(self, batch: Numbers, normalizer: int) -> Iterator[Loss]:
        """In two parts, as policy and critic have them; the second may be the one that fails."""
        self.alive += sum(reference() is not None for reference in self.failed)
        self.passes.append(len(batch.values))
        short = len(batch.values) > self.room
        hidden = torch.stack([batch.values, batch.values**2, batch.values**3], 1) @ self.weights
        if short:
            self.failed.append(weakref.ref(hidden))
        if short and self.where == "forward":
            raise no_memory()
        if short and self.where == "backward":
            hidden = RaisesInBackward.apply(hidden)
        yield Loss(hidden.sum() / normalizer, {"tokens": torch.tensor(float(len(batch.values)))})
        other = (batch.values * self.weights[0]).square()
        if short:
            self.failed.append(weakref.ref(other))
        if short and self.where == "second part":
            raise no_memory()
        yield Loss(other.sum() / normalizer, {})

    def objective(self, unsplittable_loss: str = "") -> Objective[Example, Numbers]:
        return Objective(
            collate=lambda examples: Numbers(torch.tensor([value for example in examples for value in example])),
            count=lambda examples: sum(map(len, examples)),
            losses=self.losses,
            unsplittable_loss=unsplittable_loss,
        )


def trainer_of(model: Model, **settings: Any) -> Trainer:
    job = SimpleNamespace(name="test", total_steps=1, first_schedule_step=0)
    return Trainer(TrainConfig(learning_rate=0.1, max_grad_norm=0, **settings), job, model, None)


def one_step(model: Model, **settings: Any) -> tuple[dict[str, float], Tensor, Tensor]:
    """The row, the gradient and the weights after a step."""
    trainer = trainer_of(model, **settings)
    row = trainer.compute_gradients(model.objective(), EXAMPLES)
    gradient = model.weights.grad.clone()
    trainer.optimizer_step()
    return row, gradient, model.weights.detach()


@pytest.mark.parametrize("where", ["forward", "backward", "second part"])
@pytest.mark.parametrize(("room", "said"), [(20, [18]), (10, [18, 9]), (8, [18, 9, 4])])
def test_a_step_is_done_again_in_smaller_micro_batches(capsys, where, room, said):
    """All 36 tokens in one pass, then at most 18, ...: half of what the largest pass of several examples held."""
    expected = one_step(Model(10**6))
    model = Model(room, where)
    row, gradient, weights = one_step(model)
    assert row == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(weights, expected[2], rtol=1e-6, atol=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert lines == [
        f"out of memory: micro-batches of at most {tokens} tokens from here on; the step is done again, and nothing is "
        "lost."
        for tokens in said
    ]
    assert model.passes[0] == 36
    assert max(model.passes[-len(said) :]) <= room
    assert model.alive == 0


def test_what_was_accumulated_before_the_error_is_thrown_away():
    """Two micro-batches of three examples have been added up when the third, of 27 tokens, finds room for 20."""
    examples = [*EXAMPLES[:6], (9.0,) * 7, (8.0,) * 12, (7.0,) * 8]
    model, whole = Model(20), Model(10**6)
    for one in (model, whole):
        trainer_of(one, per_device_train_batch_size=3).compute_gradients(one.objective(), examples)
    assert model.passes[:3] == whole.passes == [6, 15, 27]
    assert max(model.passes[3:]) <= 13
    assert sum(model.passes[3:]) == 48
    torch.testing.assert_close(model.weights.grad, whole.weights.grad, rtol=1e-6, atol=0)


def test_the_smaller_cut_stays(capsys):
    model = Model(10)
    trainer = trainer_of(model)
    for _ in range(3):
        trainer.compute_gradients(model.objective(), EXAMPLES)
        trainer.optimizer_step()
    assert capsys.readouterr().err.count("out of memory") == 2
    assert trainer.micro_batch_size == MicroBatchSize(8, tokens=9)
    assert model.passes.count(36) == 1


def test_one_example_that_is_too_much_stops_the_run(capsys):
    model = Model(7)
    trainer = trainer_of(model)
    with pytest.raises(OnecardError) as error:
        trainer.compute_gradients(model.objective(), EXAMPLES)
    assert str(error.value).startswith("out of memory: an example of 8 tokens is too much for a micro-batch of its own")
    for setting in ("max_length", "response_length", "gradient_checkpointing", "load_in_4bit", "head_chunk_tokens"):
        assert setting in str(error.value)
    assert "onecard fit" in str(error.value)
    assert model.weights.grad is None
    assert torch.equal(model.weights.detach(), Model(1).weights.detach())


def test_a_loss_that_sorts_its_batch_is_never_cut():
    model = Model(20)
    trainer = trainer_of(model)
    with pytest.raises(OnecardError, match="out of memory: loss_type aot sorts the 8 examples of a step as one batch"):
        trainer.compute_gradients(model.objective(unsplittable_loss="loss_type aot"), EXAMPLES)
    assert model.passes == [36]
    assert model.weights.grad is None


def test_an_error_of_the_optimizer_is_not_taken_for_one(monkeypatch):
    model = Model(10**6)
    trainer = trainer_of(model)
    trainer.compute_gradients(model.objective(), EXAMPLES)

    def step() -> None:
        raise no_memory()

    monkeypatch.setattr(trainer.optimizer, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.optimizer_step()
    assert model.passes == [36]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_of_a_failed_pass_is_alive_when_memory_is_freed(monkeypatch, where):
    """An exception keeps the frames that it passed, and they their tensors: it has to be gone by then."""
    model, alive = Model(20, where), []
    monkeypatch.setattr(micro_batching.gc, "collect", lambda: alive.extend(reference() for reference in model.failed))
    one_step(model)
    assert alive
    assert all(each is None for each in alive)


def test_other_errors_are_not_taken_for_it():
    def wrong() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        unless_out_of_memory(wrong)
    assert unless_out_of_memory(lambda: None) == (None,)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("Allocation on device"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (type("AcceleratorError", (RuntimeError,), {})("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (OnecardError("out of memory: one sequence of 9 tokens is too much"), False),
        (OSError("DefaultCPUAllocator: out of memory"), False),
        (type("OutOfMemoryError", (Exception,), {})("of another library"), False),
    ],
)
def test_by_what_it_is_told(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_out_of_memory_is_no_model_that_cannot_be_loaded(monkeypatch, tiny_model):
    def from_pretrained(*arguments: Any, **options: Any) -> None:
        raise no_memory()

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(torch.OutOfMemoryError):
        load_base(ModelConfig(model=str(tiny_model)))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *a, **o: {}["a bug"])
    with pytest.raises(OnecardError, match="model: cannot load"):
        load_base(ModelConfig(model=str(tiny_model)))


def test_what_the_host_really_cannot_hold_is_recovered_from():
    """Not a made-up error: an allocation of 2^60 bytes."""
    sizes = [2**20] * 2

    def read(places: list[int]) -> list[int]:
        if len(places) > 1:
            torch.empty(2**60, dtype=torch.uint8)
        return places

    assert map_micro_batches(sizes, TokenBudget(MicroBatchSize(8)), read) == [0, 1]


class Reader:
    """`read` of items whose result is their size; a memory of `room`, and what it was asked."""

    def __init__(self, sizes: Sequence[int], room: int, padded: bool = False) -> None:
        self.sizes, self.room, self.padded = sizes, room, padded
        self.asked: list[list[int]] = []
        self.failed: list[weakref.ref[Tensor]] = []

    def __call__(self, places: list[int]) -> list[int]:
        assert not torch.is_grad_enabled()
        assert all(reference() is None for reference in self.failed)
        self.asked.append(places)
        sizes = [self.sizes[place] for place in places]
        activations = torch.ones(4)
        if (len(sizes) * max(sizes) if self.padded else sum(sizes)) > self.room:
            self.failed.append(weakref.ref(activations))
            raise no_memory()
        return sizes


def test_only_the_pass_that_failed_is_done_again(capsys):
    """20 | 9 + 9 fit; 8 + 8 + 8 do not: at most 12 from there on."""
    sizes = [8, 20, 9, 8, 9, 8, 3]
    read = Reader(sizes, 20)
    budget = TokenBudget(MicroBatchSize(8, tokens=24))
    assert map_micro_batches(sizes, budget, read) == sizes
    assert read.asked == [[1], [2, 4], [0, 3, 5], [0], [3], [5, 6]]
    assert capsys.readouterr().err == "out of memory: passes without gradients of at most 12 tokens from here on.\n"
    again = Reader(sizes, 20)
    assert map_micro_batches(sizes, budget, again) == sizes  # and it stays so
    assert again.asked == [[1], [2], [4], [0], [3], [5, 6]]
    assert capsys.readouterr().err == ""


def test_passes_are_halved_as_often_as_it_takes(capsys):
    sizes = [5, 5, 5, 5]
    read = Reader(sizes, 5)
    assert run_micro_batches(sizes, TokenBudget(MicroBatchSize(4)), read) == [([place], [5]) for place in range(4)]
    assert [len(places) for places in read.asked] == [4, 2, 1, 1, 1, 1]
    assert capsys.readouterr().err.count("out of memory") == 2


def test_padding_counts_when_a_pass_is_halved():
    """Padded, 9 + 3 + 3 take 27: then 13, in which the 9 is alone and the others fill 6."""
    sizes = [9, 3, 3]
    read = Reader(sizes, 13, padded=True)
    assert map_micro_batches(sizes, TokenBudget(MicroBatchSize(8)), read, padded=True) == sizes
    assert read.asked == [[0, 1, 2], [0], [1, 2]]


def test_a_single_item_that_is_too_much_stops_it():
    with pytest.raises(OnecardError, match="one sequence of 1,200 tokens is too much for a pass without gradients"):
        map_micro_batches([1200, 7], TokenBudget(MicroBatchSize(8)), Reader([1200, 7], 1000))


def test_a_training_command_s_passes_follow_micro_batch_tokens():
    assert forward_budget(TrainConfig(per_device_eval_batch_size=3)).size == MicroBatchSize(3, sort_by_length=True)
    assert forward_budget(TrainConfig(micro_batch_tokens=99)).size.tokens == 99


def short_of_rows(monkeypatch, rows: int, after: int = 5) -> list[int]:
    """Sampling finds no memory for more than so many rows, once they have drawn a few tokens. The rows that failed."""
    whole, failed = CachedBatch.logits, []

    def logits(self: CachedBatch) -> Tensor:
        if len(self.row_prompts) > rows and int(self.generated.max()) > after:
            failed.append(len(self.row_prompts))
            raise no_memory()
        return whole(self)

    monkeypatch.setattr(CachedBatch, "logits", logits)
    return failed


@pytest.mark.parametrize("seed", [None, 7])
def test_a_batch_of_prompts_is_drawn_again_from_where_it_began(monkeypatch, capsys, policy: LoadedPolicy, seed):
    """As if it had been sampled in halves from the start: nothing that was drawn before the error is left."""
    prompts = [policy.prompts[1]] * 12
    sampling, moves = Sampling(20), []
    bar = SimpleNamespace(advance=lambda row: moves.append(row))
    with monkeypatch.context() as patch:
        failed = short_of_rows(patch, 3)
        torch.manual_seed(5)
        budget = sampling_budget(6)
        with recorded_shapes(policy.model) as shapes:
            found = policy.sample(sampling, prompts, stop_tokens=(), batch_size=budget, bar=bar, seed=seed)
        after = torch.get_rng_state()
    assert failed == [6]
    assert [rows for rows, columns in shapes if columns > 1] == [6, 3, 3, 3, 3]  # later batches are halved too
    assert len(moves) == 12
    torch.manual_seed(5)
    halves = policy.sample(sampling, prompts, stop_tokens=(), batch_size=3, seed=seed)
    assert [one.tokens for one in found.responses] == [one.tokens for one in halves.responses]
    assert torch.equal(torch.get_rng_state(), after)
    assert "the KV cache of a batch of prompts takes at most" in capsys.readouterr().err


def test_answers_that_ended_before_the_error_are_drawn_again(monkeypatch, policy: LoadedPolicy):
    """Kept, they would be the short ones; and the bar counts each prompt once."""
    ends = policy.stop_tokens | {
        token for piece, token in policy.tokenizer.get_vocab().items() if "." in piece or "," in piece
    }
    moves: list[Any] = []
    with monkeypatch.context() as patch:
        failed = short_of_rows(patch, 4, after=12)
        torch.manual_seed(3)
        found = policy.sample(
            Sampling(40), [policy.prompts[1]] * 16, stop_tokens=ends, batch_size=16,
            bar=SimpleNamespace(advance=moves.append),
        )  # fmt: skip
    assert failed
    assert failed[0] < 16  # some had ended, and left
    torch.manual_seed(3)
    rows = 16 // 2 ** len(failed)
    again = policy.sample(Sampling(40), [policy.prompts[1]] * 16, stop_tokens=ends, batch_size=rows)
    assert [one.tokens for one in found.responses] == [one.tokens for one in again.responses]
    assert len(moves) == 16


def test_one_prompt_that_is_too_much_stops_sampling(monkeypatch, policy: LoadedPolicy):
    short_of_rows(monkeypatch, 0)
    with pytest.raises(OnecardError, match=r"cache of one prompt and its answer \(.* MiB\) does not fit"):
        policy.sample(Sampling(20), [policy.prompts[1]] * 2, stop_tokens=())
