"""Holding out and shuffling: nothing lost, nothing twice, and no prompt on both sides."""

import pytest

from onecard.data import hold_out, step_indices
from onecard.utils.errors import OnecardError


@pytest.mark.parametrize(
    ("count", "test_size", "held"),
    [(100, 0.05, 5), (100, 0.07, 7), (10, 0.05, 1), (100, 1, 1), (100, 30, 30), (100, 0, 0), (3, 2, 2), (1, 0, 0)],
)
def test_sizes(count: int, test_size: float, held: int) -> None:
    train, test = hold_out(list(range(count)), range(count), test_size=test_size, seed=1)
    assert len(test) == held
    assert sorted(train + test) == list(range(count))
    assert train == sorted(train)
    assert test == sorted(test)


def test_depends_on_the_seed_alone() -> None:
    splits = [tuple(hold_out(list(range(50)), range(50), test_size=0.2, seed=seed)[1]) for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len(set(splits)) == 3


def test_no_prompt_is_on_both_sides() -> None:
    prompts = [10 + index % 20 for index in range(60)]
    train, test = hold_out(range(60), prompts, test_size=0.25, seed=3)
    assert not {prompts[item] for item in train} & {prompts[item] for item in test}
    assert (len(train), len(test)) == (45, 15)


def test_more_are_held_out_where_no_prompt_has_fewer_examples() -> None:
    train, test = hold_out(range(8), [index // 2 for index in range(8)], test_size=1, seed=0)
    assert len(train) == 6
    assert test[0] // 2 == test[1] // 2


@pytest.mark.parametrize("seed", range(5))
def test_where_every_prompt_is_too_large_the_rarest_is_held_out(seed: int) -> None:
    train, test = hold_out(list("aaabbbccddd"), "aaabbbccddd", test_size=1, seed=seed)
    assert ("".join(train), "".join(test)) == ("aaabbbddd", "cc")


@pytest.mark.parametrize(
    ("examples", "test_size", "message"),
    [
        ([1, 2], 2, "test_size: 2 of 2 examples with 2 different prompts would leave nothing to train on; "),
        ([1], 0.05, "test_size: 0.05 of 1 examples with 1 different prompts would leave nothing to train on; "),
        ([7, 7, 7], 1, "test_size: 1 of 3 examples with 1 different prompts would leave nothing to train on; "),
    ],
)
def test_nothing_left_to_train_on(examples: list[int], test_size: float, message: str) -> None:
    with pytest.raises(OnecardError) as error:
        hold_out(examples, examples, test_size=test_size, seed=0)
    assert str(error.value) == message + "set a smaller test_size, or 0, or an eval_dataset."


@pytest.mark.parametrize(
    ("test_size", "message"),
    [
        (-1, "test_size: expected a share below 1, a count, or 0; got -1."),
        (float("nan"), "test_size: expected a share below 1, a count, or 0; got nan."),
        (2.5, "test_size: expected a share below 1 or a whole number of examples, got 2.5."),
    ],
)
def test_sizes_that_mean_nothing(test_size: float, message: str) -> None:
    with pytest.raises(OnecardError) as error:
        hold_out([1, 2, 3, 4], [1, 2, 3, 4], test_size=test_size, seed=0)
    assert str(error.value) == message


@pytest.mark.parametrize(("count", "size"), [(10, 3), (9, 3), (1, 8), (0, 4), (257, 16)])
def test_an_epoch_visits_every_index_once(count: int, size: int) -> None:
    steps = step_indices(count, size, seed=5, epoch=2)
    assert sorted(index for step in steps for index in step) == list(range(count))
    assert all(len(step) == size for step in steps[:-1])
    assert len(steps) == -(-count // size)


def test_order_follows_seed_and_epoch() -> None:
    orders = {(seed, epoch): step_indices(40, 8, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)}
    assert len({str(order) for order in orders.values()}) == 9
    assert orders[1, 2] == step_indices(40, 8, seed=1, epoch=2)
    assert orders[0, 0] != [list(range(start, start + 8)) for start in range(0, 40, 8)]


def test_order_is_the_same_on_every_machine() -> None:
    assert step_indices(8, 3, seed=42, epoch=1) == [[6, 0, 3], [4, 1, 5], [7, 2]]


@pytest.mark.parametrize(("count", "size"), [(-1, 2), (4, 0)])
def test_impossible_batches(count: int, size: int) -> None:
    with pytest.raises(ValueError, match="batch_size >= 1"):
        step_indices(count, size, seed=0, epoch=0)


def test_a_group_for_each_example() -> None:
    with pytest.raises(ValueError, match="shorter"):
        hold_out([1, 2, 3], [1, 2], test_size=1, seed=0)
