"""What a reward function is given, what it may return, and what a run says when it does anything else."""

from __future__ import annotations

import re
from decimal import Decimal
from operator import itemgetter

import numpy as np
import pytest
import torch

from onecard.rewards.answers import Answers
from onecard.rewards.functions import RewardFunction
from onecard.rewards.validation import call_function
from onecard.utils.errors import OnecardError

ANSWERS = Answers(
    prompts=("Once\nupon a time", "2 + 2 =", "Say it"),
    completions=(" there was", " 4", " it\n\nis\tsaid"),
    completion_ids=((5, 6, 2), (7,), (8, 9, 10, 2)),
    columns={"solution": ("a", "4", None), "level": (1, 2, 3)},
)
# Each answer as a message shows it: on one line, quoted.
SHOWN = (
    r"prompt 'Once\nupon a time', response ' there was'",
    r"prompt '2 + 2 =', response ' 4'",
    r"prompt 'Say it', response ' it\n\nis\tsaid'",
)


def scores(call, answers: Answers = ANSWERS) -> list[float]:
    return call_function(RewardFunction("judges:polite", call), answers)


def complaint(call, answers: Answers = ANSWERS) -> str:
    """The one line that a bad function ends the run with; it names the function."""
    with pytest.raises(OnecardError) as caught:
        scores(call, answers)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("reward function judges:polite ")
    return message


def test_a_trl_function_gets_texts_tokens_and_columns():
    got = {}

    def reward(prompts, completions, **kwargs):
        got.update(kwargs, prompts=prompts, completions=completions)
        return [float(len(completion)) for completion in completions]

    assert scores(reward) == [10.0, 2.0, 12.0]
    assert got == {
        "prompts": ["Once\nupon a time", "2 + 2 =", "Say it"],
        "completions": [" there was", " 4", " it\n\nis\tsaid"],
        "completion_ids": [[5, 6, 2], [7], [8, 9, 10, 2]],
        "solution": ["a", "4", None],
        "level": [1, 2, 3],
    }


def test_a_function_gets_no_more_than_it_names():
    assert scores(lambda completions: [1] * len(completions)) == [1.0] * 3
    assert scores(lambda *, level, solution: level) == [1.0, 2.0, 3.0]
    assert scores(lambda level, unknown=0.5: [each + unknown for each in level]) == [1.5, 2.5, 3.5]


def test_stars_are_no_names_of_columns():
    """A column may be called as a function's *args or a positional-only parameter; neither takes a keyword."""
    answers = Answers(("p",), ("c",), ((1,),), {"args": (1,), "first": (2,)})
    assert scores(lambda completions, *args: [len(args)], answers) == [0.0]

    def positional(first=7, /, **kwargs):
        return [first + len(kwargs)]

    def without_stars(first=7, /, completions=()):
        return [first + len(completions)]

    assert scores(positional, answers) == [12.0]
    assert scores(without_stars, answers) == [8.0]


def test_a_callable_without_a_signature_gets_everything():
    """`dict` has none, and makes a dictionary of all its keywords, which is no list of scores."""
    assert "'completions': [" in complaint(dict, Answers((), (), (), {}))


def test_a_class_with_call_is_a_function():
    class Scorer:
        def __call__(self, completion_ids, **kwargs):
            return [len(ids) for ids in completion_ids]

    assert scores(Scorer()) == [3.0, 1.0, 4.0]


def test_a_column_cannot_pass_for_a_text():
    answers = Answers(("p",), ("real",), ((1,),), {"completions": ("from the dataset",)})
    assert scores(lambda completions: [completions == ["real"]], answers) == [1.0]


def test_one_answer_of_several():
    assert ANSWERS.only(1) == Answers(("2 + 2 =",), (" 4",), ((7,),), {"solution": ("4",), "level": (2,)})


def test_answers_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="level: 2 entries for 1 prompts"):
        Answers(("p",), ("c",), ((1,),), {"level": (1, 2)})
    with pytest.raises(ValueError, match="completion_ids: 0 entries for 1 prompts"):
        Answers(("p",), ("c",), (), {})


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, -2],
        (1.0, 0.5, -2.0),
        np.array([1.0, 0.5, -2.0], dtype=np.float32),
        torch.tensor([1.0, 0.5, -2.0]),
        torch.tensor([1.0, 0.5, -2.0], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(1), torch.tensor(0.5), np.int64(-2)],
    ],
    ids=["list", "tuple", "numpy", "tensor", "bf16 with gradient", "mixed scalars"],
)
def test_whatever_holds_numbers_is_taken(returned):
    got = scores(lambda completions: returned)
    assert got == [1.0, 0.5, -2.0]
    assert [type(value) for value in got] == [float] * 3


@pytest.mark.parametrize("returned", [[True, False, True], np.array([True, False, True]), [np.True_, False, 1]])
def test_right_and_wrong_are_one_and_zero(returned):
    got = scores(lambda completions: returned)
    assert got == [1.0, 0.0, 1.0]
    assert [type(value) for value in got] == [float] * 3


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "returned None, which is not a number"),
        (float("nan"), "returned nan, which is not finite in 32 bits"),
        (float("-inf"), "returned -inf, which is not finite in 32 bits"),
        (np.float32("nan"), "returned nan, which is not finite in 32 bits"),
        (torch.tensor(float("inf")), "returned inf, which is not finite in 32 bits"),
        (-1e39, "returned -1e+39, which is not finite in 32 bits"),
        (10**5000, "returned a value without a repr, which is not finite in 32 bits"),
        ("0.5", "returned '0.5' (str), which is not a number"),
        (1j, "returned 1j (complex), which is not a number"),
        (Decimal("0.5"), "returned Decimal('0.5') (Decimal), which is not a number"),
        ({"score\n": 1}, r"returned {'score\n': 1} (dict), which is not a number"),
        ([0.1, 0.2], "returned [0.1, 0.2] (list) for one response, and a number for another; expected lists for"),
        ((0.1,), "returned (0.1,) (tuple) for one response, and a number for another; expected lists for all"),
        (np.zeros(2), "returned array([0., 0.]) (ndarray) for one response, and a number for another; expected"),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "huge",
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_bad_score_is_shown_with_its_answer(value, what, place):
    values = [0.5, 0.5, 0.5]
    values[place] = value
    message = complaint(lambda completions: values)
    assert what in message
    assert message.endswith(SHOWN[place])


def test_a_bad_score_in_an_array():
    assert complaint(lambda completions: np.array([1, np.nan, 1])).endswith(SHOWN[1])
    message = complaint(lambda completions: torch.zeros(3, 2))
    assert "for one response, of length 2; expected 3, one number for each of its completion_ids" in message
    assert message.endswith(SHOWN[0])


DENSE = [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0, 7.0, 8.0]]  # as many as each answer has tokens


@pytest.mark.parametrize(
    "returned",
    [
        DENSE,
        [tuple(row) for row in DENSE],
        [np.array(row, dtype=np.float32) for row in DENSE],
        tuple(torch.tensor(row, dtype=torch.bfloat16, requires_grad=True) for row in DENSE),
        [[torch.tensor(1), np.float32(2), 3], [4], DENSE[2]],
    ],
    ids=["lists", "tuples", "numpy", "tensors", "mixed scalars"],
)
def test_a_dense_reward_is_one_number_for_each_token(returned):
    got = scores(lambda completions: returned)
    assert got == DENSE
    assert {type(value) for row in got for value in row} == {float}


@pytest.mark.parametrize(
    ("place", "row", "what"),
    [
        (1, [4.0, 5.0], "returned [4.0, 5.0] (list) for one response, of length 2; expected 1, one number for each"),
        (2, [], "returned [] (list) for one response, of length 0; expected 4"),
        (0, [1.0, float("nan"), 3.0], "returned nan for token 1, which is not finite in 32 bits"),
        (2, [1, 2, 3, None], "returned None for token 3, which is not a number"),
        (1, [[4.0]], "returned [4.0] (list) for token 0, which is not a number"),
        (1, None, "returned None, which is not a number"),
        (2, "abcd", "returned 'abcd' (str), which is not a number"),
    ],
)
def test_a_bad_dense_reward_is_shown_with_its_answer(place, row, what):
    returned = list(DENSE)
    returned[place] = row
    message = complaint(lambda completions: returned)
    assert what in message
    assert message.endswith(SHOWN[place])


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "returned None"),
        (0.5, "returned 0.5 (float)"),
        ("abc", "returned 'abc' (str)"),
        ({0: 1, 1: 1, 2: 1}, "returned {0: 1, 1: 1, 2: 1} (dict)"),
        (np.array(1.0), "returned array(1.) (ndarray)"),
        ([1.0, 2.0], "returned a list of 2"),
        ([[1.0, 2.0, 3.0]], "returned a list of 1"),
        (torch.zeros(4), "returned a list of 4"),
        ([], "returned a list of 0"),
    ],
    ids=lambda value: value.removeprefix("returned ") if isinstance(value, str) else "",
)
def test_anything_but_one_number_each_is_an_error(returned, what):
    expected = "; expected a list of 3, one number for each response."
    assert complaint(lambda completions: returned) == f"reward function judges:polite {what}{expected}"


def test_an_exception_is_named_with_the_answer_that_causes_it():
    def reward(completions, solution):
        return [float(len(text) + len(reference)) for text, reference in zip(completions, solution, strict=True)]

    message = complaint(reward)
    assert re.search(r"raised TypeError: object of type 'NoneType' has no len\(\) \(test_rewards.py:\d+\); ", message)
    assert message.endswith(SHOWN[2])


def test_a_single_answer_is_not_asked_twice():
    calls = []

    def reward(completions):
        calls.append(completions)
        raise ValueError("two\nlines")

    assert "raised ValueError: two lines (" in complaint(reward, ANSWERS.only(1))
    assert complaint(reward, ANSWERS.only(1)).endswith(SHOWN[1])
    assert len(calls) == 2


def test_the_answer_to_blame_fails_in_the_same_way():
    """Here every answer fails alone, since one alone has no spread; the batch failed for another reason."""

    def reward(completions):
        if " 4" in completions:
            raise KeyError("no unit")
        raise ZeroDivisionError

    message = complaint(reward)
    assert "raised KeyError: 'no unit'" in message
    assert message.endswith(SHOWN[1])


def test_a_batch_that_fails_only_as_a_whole():
    def reward(completions):
        if len(completions) > 1:
            raise RuntimeError
        return [1.0]

    message = complaint(reward)
    assert re.search(r"raised RuntimeError \(test_rewards.py:\d+\); only for the whole batch of 3 answers", message)
    assert "prompt" not in message


@pytest.mark.parametrize("size", [3, 1], ids=["in the batch", "while looking for the culprit"])
def test_the_interrupt_key_is_not_swallowed(size):
    def reward(completions):
        raise KeyboardInterrupt if len(completions) == size else ValueError

    with pytest.raises(KeyboardInterrupt):
        scores(reward)


def test_long_texts_and_messages_are_shortened():
    answers = Answers(("p" * 500,), ("r" * 500,), ((1,),), {})

    def reward(completions):
        raise ValueError("m" * 5000)

    message = complaint(reward, answers)
    assert f"prompt '{'p' * 77}...', response '{'r' * 77}...'" in message
    assert f"ValueError: {'m' * 197}..." in message
    assert len(complaint(lambda completions: [["x" * 5000]], answers)) < 400


def test_a_column_that_is_not_there_is_named_with_the_nearest():
    message = complaint(lambda completions, solutions: [0, 0, 0])
    expected = "completion_ids, completions, level, prompts, solution. Did you mean 'solution'?"
    assert message == f"reward function judges:polite requires an argument 'solutions', expected one of {expected}"
    assert "requires an argument 'solutions'" in complaint(lambda *, solutions, **kwargs: [0, 0, 0])


def test_an_error_before_any_line_of_the_function():
    """`itemgetter` takes no keywords; the error is raised by the call itself, so it has no line to name."""
    message = complaint(itemgetter(0), ANSWERS.only(0))
    assert re.search(r"raised TypeError: .* takes no keyword arguments; prompt 'Once", message)


def test_functions_of_trl_itself():
    """Those that take plain text or tokens."""
    pytest.importorskip("trl")
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    answers = Answers(("p", "p"), ("a", "b"), ((1, 2, 3, 4), (5, 5, 5, 5, 5)), {})
    assert scores(get_repetition_penalty_reward(ngram_size=2), answers) == [0.0, -0.75]
    assert scores(get_soft_overlong_punishment(5, 2), answers) == [-0.5, -1.0]
