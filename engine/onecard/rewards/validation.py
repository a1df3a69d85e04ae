"""Calling a reward function, and believing nothing that it returns."""

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
from onecard.rewards.guard import described, guarded, shortened, warn_when_slow, written
from onecard.rewards.mixture import LARGEST, Part
from onecard.utils.errors import OnecardError, nearest

FLOAT32 = torch.finfo(torch.float32).max
SHOWN = 80  # characters of a prompt or a response that fit a line which is still read


def call_function(function: RewardFunction, answers: Answers, timeout: float = 0.0) -> Part:
    """One score for each answer, or one for each token of each answer.

    The protocol is that of TRL's GRPO: keywords `prompts`, `completions`, `completion_ids`, and the dataset's other
    columns, all of them lists; a function without `**kwargs` gets those that it names. What it returns must be one
    finite number for each answer; or (a dense reward) for each answer a list of them, one for each of its
    `completion_ids`. (TRL lets a function return None for "does not apply"; here that is an error.)

    The function gets copies, and random states that depend on the answers alone. What it changes of the process is
    restored (`guard`). `timeout`: seconds after which a warning names it; it is not stopped.
    """
    try:
        with warn_when_slow(f"reward function {function.name}", timeout):
            return judge_once(function, answers)
    except (OnecardError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a function does
        what = f"reward function {function.name} raised {described(error)}{line(error)}"
        raise OnecardError(f"{what}; {culprit(function, answers, error)}") from error


def judge_once(function: RewardFunction, answers: Answers) -> Part:
    """Call the function once and check what it returns. The guard covers the reading of returned objects too."""
    keywords = copy.deepcopy(accepted(function, answers.keywords()))
    texts = json.dumps([answers.prompts, answers.completion_ids]).encode()
    with guarded(int.from_bytes(hashlib.sha256(texts).digest()[:8], "little")):
        returned = function.call(**keywords)
        values = as_list(returned)
        expected = f"expected a list of {len(answers)}, one number for each response"
        if values is None:
            raise OnecardError(f"reward function {function.name} returned {described_value(returned)}; {expected}.")
        if len(values) != len(answers):
            raise OnecardError(f"reward function {function.name} returned a list of {len(values)}; {expected}.")
        return checked_part(function, answers, values)


def accepted(function: RewardFunction, keywords: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The keywords that the function takes."""
    try:
        parameters = inspect.signature(function.call).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return keywords
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in keywords:
            raise OnecardError(
                f"reward function {function.name} asks for '{name}', and there is only {', '.join(sorted(keywords))}."
                f"{nearest(name, keywords)}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return keywords
    return {name: values for name, values in keywords.items() if name in named}


def culprit(function: RewardFunction, answers: Answers, error: BaseException) -> str:
    """The first answer that raises the same kind of error alone; if none does, how many were judged together."""
    if len(answers) > 1:
        for place in range(len(answers)):
            alone = answers.only(place)
            try:
                judge_once(function, alone)
            except KeyboardInterrupt:
                raise
            except BaseException as again:
                if type(again) is type(error):
                    return shown(alone, 0)
        return f"for a batch of {len(answers)} answers, and for none of them alone"
    return shown(answers, 0) if len(answers) else "for no answers at all"


def line(error: BaseException) -> str:
    """Where in the function's own file it was, since the one-line message leaves no traceback."""
    frame = error.__traceback__
    while frame and frame.tb_frame.f_code.co_filename == __file__:  # the first frames are ours
        frame = frame.tb_next
    return f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})" if frame else ""


def as_list(returned: Any) -> Sequence[Any] | None:
    """A list, tuple, numpy array or tensor as a sequence of Python values; None for anything else."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    return list(values) if isinstance(values, list | tuple) else None


def checked_part(function: RewardFunction, answers: Answers, values: Sequence[Any]) -> Part:
    """A number for each answer, or a list of as many as it has tokens; an error that names the answer otherwise."""
    rows = [as_list(value) for value in values]
    numbers = {
        place: checked(function, answers, place, value)
        for place, (value, row) in enumerate(zip(values, rows, strict=True))
        if row is None
    }
    if len(numbers) == len(rows):
        return list(numbers.values())
    dense = []
    for place, row in enumerate(rows):
        if row is None:
            continue
        tokens = len(answers.completion_ids[place])
        if numbers:
            wrong = "and one number for another; expected either for all of them"
        elif len(row) != tokens:
            wrong = f"of {len(row)}; expected {tokens}, one number for each of its completion_ids"
        else:
            dense.append([checked(function, answers, place, value, f" for token {i}") for i, value in enumerate(row)])
            continue
        what = described_value(values[place])
        raise OnecardError(
            f"reward function {function.name} returned {what} for one response, {wrong}; {shown(answers, place)}"
        )
    return dense


def checked(function: RewardFunction, answers: Answers, place: int, value: Any, where: str = "") -> float:
    """One returned value as a float, or an error that names its answer."""
    if getattr(value, "ndim", None) == 0:  # a numpy number, a tensor of one number
        value = value.item()
    if isinstance(value, bool | int | float):
        if abs(value) <= LARGEST:  # false for NaN
            return float(value)
        beyond = f"which is beyond {LARGEST:g}" if abs(value) <= FLOAT32 else "which is no finite 32-bit number"
        wrong = f"{written(value, SHOWN)}{where}, {beyond}"
    else:
        wrong = f"{described_value(value)}{where}, which is no number"
    raise OnecardError(f"reward function {function.name} returned {wrong}; {shown(answers, place)}")


def described_value(value: Any) -> str:
    """`None`, or the value and what it is."""
    return "None" if value is None else f"{written(value, SHOWN)} ({type(value).__name__})"


def shown(answers: Answers, place: int) -> str:
    """`prompt '...', response '...'`, on one line whatever is in them."""
    prompt, response = shortened(answers.prompts[place], SHOWN), shortened(answers.completions[place], SHOWN)
    return f"prompt {prompt!r}, response {response!r}"
