"""Call a reward function and validate what it returns."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onecard.rewards.answers import Answers
from onecard.rewards.functions import RewardFunction
from onecard.rewards.guard import describe_error, guarded, short_repr, truncated, warn_when_slow
from onecard.rewards.mixture import MAX_SCORE, Part
from onecard.utils.errors import OnecardError, did_you_mean

MAX_FLOAT32 = torch.finfo(torch.float32).max
MAX_CHARACTERS = 80  # of a prompt, a response or a value in a message


def call_function(function: RewardFunction, answers: Answers, timeout: float = 0.0) -> Part:
    """Call a reward function: one score for each answer, or one for each token of each answer.

    The protocol is that of TRL's GRPO. The keyword arguments are `prompts`, `completions`, `completion_ids`, and the
    dataset's other columns, all lists; a function without `**kwargs` gets those that it names. It must return one
    finite number for each answer. A dense reward returns a list for each answer, with one number for each of its
    `completion_ids`. (TRL lets a function return None for "does not apply"; here that is an error.)

    The function gets copies of the lists, and random states that depend on the answers alone. The process state that it
    changes is restored (`guard`). `timeout`: seconds after which a warning names the function; it is not stopped.
    Raises OnecardError if the function raises, or returns anything else.
    """
    try:
        with warn_when_slow(f"reward function {function.name}", timeout):
            return call_once(function, answers)
    except (OnecardError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the function may raise anything
        what = f"reward function {function.name} raised {describe_error(error)}{error_location(error)}"
        raise OnecardError(f"{what}; {failing_answer(function, answers, error)}") from error


def call_once(function: RewardFunction, answers: Answers) -> Part:
    """Call the function once and check what it returns. User code in the returned objects runs inside the guard too."""
    keywords = copy.deepcopy(accepted_arguments(function, answers.keywords()))
    texts = json.dumps([answers.prompts, answers.completion_ids]).encode()
    with guarded(int.from_bytes(hashlib.sha256(texts).digest()[:8], "little")):
        returned = function.call(**keywords)
        values = as_list(returned)
        expected = f"expected a list of {len(answers)}, one number for each response"
        if values is None:
            raise OnecardError(f"reward function {function.name} returned {describe_value(returned)}; {expected}.")
        if len(values) != len(answers):
            raise OnecardError(f"reward function {function.name} returned a list of {len(values)}; {expected}.")
        return checked_part(function, answers, values)


def accepted_arguments(function: RewardFunction, keywords: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The keyword arguments that the function takes. Raises OnecardError if a required one is missing."""
    try:
        parameters = inspect.signature(function.call).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return keywords
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in keywords:
            raise OnecardError(
                f"reward function {function.name} requires an argument '{name}', expected one of "
                f"{', '.join(sorted(keywords))}."
                f"{did_you_mean(name, keywords)}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return keywords
    return {name: values for name, values in keywords.items() if name in named}


def failing_answer(function: RewardFunction, answers: Answers, error: BaseException) -> str:
    """Describe the first answer that raises the same type of error alone; if none does, the size of the batch."""
    if len(answers) > 1:
        for index in range(len(answers)):
            alone = answers.only(index)
            try:
                call_once(function, alone)
            except KeyboardInterrupt:
                raise
            except BaseException as again:
                if type(again) is type(error):
                    return prompt_and_response(alone, 0)
        return f"only for the whole batch of {len(answers)} answers, not for a single one"
    return prompt_and_response(answers, 0) if len(answers) else "for an empty batch"


def error_location(error: BaseException) -> str:
    """` (file.py:12)`: the first frame of the traceback outside this file. The one-line message has no traceback."""
    frame = error.__traceback__
    while frame and frame.tb_frame.f_code.co_filename == __file__:  # skip this module's frames
        frame = frame.tb_next
    return f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})" if frame else ""


def as_list(returned: Any) -> Sequence[Any] | None:
    """A list, tuple, numpy array or tensor as a sequence of Python values; None for anything else."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    return list(values) if isinstance(values, list | tuple) else None


def checked_part(function: RewardFunction, answers: Answers, values: Sequence[Any]) -> Part:
    """`values` as floats: one per answer, or one per token of each answer. Raises OnecardError, naming the answer."""
    rows = [as_list(value) for value in values]
    numbers = {
        index: checked_number(function, answers, index, value)
        for index, (value, row) in enumerate(zip(values, rows, strict=True))
        if row is None
    }
    if len(numbers) == len(rows):
        return list(numbers.values())
    dense = []
    for index, row in enumerate(rows):
        if row is None:
            continue
        tokens = len(answers.completion_ids[index])
        if numbers:
            wrong = "and a number for another; expected lists for all or numbers for all"
        elif len(row) != tokens:
            wrong = f"of length {len(row)}; expected {tokens}, one number for each of its completion_ids"
        else:
            dense.append(
                [checked_number(function, answers, index, value, f" for token {i}") for i, value in enumerate(row)]
            )
            continue
        what = describe_value(values[index])
        raise OnecardError(
            f"reward function {function.name} returned {what} for one response, {wrong}; "
            f"{prompt_and_response(answers, index)}"
        )
    return dense


def checked_number(function: RewardFunction, answers: Answers, index: int, value: Any, where: str = "") -> float:
    """One returned value as a float. Raises OnecardError, naming the answer, if it is not a finite number."""
    if getattr(value, "ndim", None) == 0:  # a numpy scalar, or a tensor of one number
        value = value.item()
    if isinstance(value, bool | int | float):
        if abs(value) <= MAX_SCORE:  # false for NaN
            return float(value)
        problem = f"beyond {MAX_SCORE:g}" if abs(value) <= MAX_FLOAT32 else "not finite in 32 bits"
        wrong = f"{short_repr(value, MAX_CHARACTERS)}{where}, which is {problem}"
    else:
        wrong = f"{describe_value(value)}{where}, which is not a number"
    raise OnecardError(f"reward function {function.name} returned {wrong}; {prompt_and_response(answers, index)}")


def describe_value(value: Any) -> str:
    """`None`, or the value with its type."""
    return "None" if value is None else f"{short_repr(value, MAX_CHARACTERS)} ({type(value).__name__})"


def prompt_and_response(answers: Answers, index: int) -> str:
    """`prompt '...', response '...'`, on one line."""
    prompt = truncated(answers.prompts[index], MAX_CHARACTERS)
    response = truncated(answers.completions[index], MAX_CHARACTERS)
    return f"prompt {prompt!r}, response {response!r}"
