"""Built-in rewards, by their names in `reward_funcs`.

| name | value of one answer |
|---|---|
| `fluency` | mean log-prob of its tokens under the reference model, in nats |
| `relevance` | share of the prompt's content words that occur in it |
| `diversity` | share of its words and word pairs that occur in no other answer of the batch |
| `length`, `length:N` | number of tokens; with N, closeness of that number to N, from 0 to 1 |
| `regex:PATTERN` | 1 if the pattern is found in it, else 0 |
| `exact_answer` | 1 if it gives the row's `answer` (or `solution`), else 0 |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch

from onecard.data import Prompt
from onecard.models.passes import per_token
from onecard.rewards.answers import ModelReward, RewardInput
from onecard.utils.errors import OnecardError

NGRAMS = (1, 2)
ANSWER_COLUMNS = ("answer", "solution")
# The words of a prompt that `relevance` ignores
STOP_WORDS = frozenset(re.findall(r"\w+", """
    a about after all also am an and any are as at be because been before being but by can could did do does
    doing for from had has have he her him his how i if in into is it its me more most my no not of on one or
    other our out over please s she should so some such t than that the their them then there these they this
    those to too up us very was we were what when where which who whom whose why will with would you your
"""))  # fmt: skip
# A sign may not follow a word character: in `3-4`, the numbers are 3 and 4.
NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?")
LEADING_ZERO = re.compile(r"[-+]?0[\d,]")  # compared as text: 02134 is a code, not the number 2134
STRIPPED = " \"'`$*"
MINUS = str.maketrans("\u2212", "-")
MAX_DIGITS = 1000  # before or after the decimal point


def fluency(inputs: RewardInput) -> list[float]:
    """1/k sum_t log ref(y_t | x, y_<t) over an answer's k tokens, including its end token; temperature 1."""
    logprobs = per_token(inputs.roles, "reference", inputs.episodes, inputs.roles.logprobs, inputs.batch_size)
    return [float(values.double().mean()) for values in logprobs]


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.casefold())


def user_text(prompt: Prompt) -> str:
    """The contents of the user's messages, or a text prompt unchanged."""
    if prompt.messages is None:
        return prompt.text
    return " ".join(message["content"] for message in prompt.messages if message["role"] == "user")


def relevance(inputs: RewardInput) -> list[float]:
    """|W(prompt) & W(answer)| / |W(prompt)|, where W is a text's set of words without stop words; 0 if W is empty."""
    shares = []
    for prompt, answer in zip(inputs.prompts, inputs.answers.completions, strict=True):
        content_words = set(words(user_text(prompt))) - STOP_WORDS
        shares.append(len(content_words & set(words(answer))) / max(len(content_words), 1))
    return shares


def ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words in a list of words."""
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


def diversity(inputs: RewardInput) -> list[float]:
    """Mean over n = 1, 2 of (distinct n-grams that no other answer of the batch has) / (n-grams of the answer).

    Based on distinct-n of "A Diversity-Promoting Objective Function for Neural Conversation Models"
    (https://arxiv.org/abs/1510.03055, section 5.2). Distinct-n counts distinct n-grams over all answers; here each
    answer gets the share of n-grams that only it has. An answer that is too short for an n-gram gets 0 for that n.
    """
    texts = [words(answer) for answer in inputs.answers.completions]
    shares = torch.zeros(len(texts), dtype=torch.float64)
    for n in NGRAMS:
        grams_by_answer = [ngrams(text, n) for text in texts]
        answers_with = Counter(gram for grams in grams_by_answer for gram in set(grams))
        for index, grams in enumerate(grams_by_answer):
            unique = sum(answers_with[gram] == 1 for gram in set(grams))
            shares[index] += unique / max(len(grams), 1) / len(NGRAMS)
    return shares.tolist()


def length(argument: str | None) -> ModelReward:
    """k, the number of an answer's tokens including its end token; `length:N`: max(0, 1 - |k - N| / N)."""
    if argument is None:
        return lambda inputs: [float(len(ids)) for ids in inputs.answers.completion_ids]
    if not argument.isdecimal() or int(argument) == 0:
        raise ValueError("expected a number of tokens, as in length:50")
    target = int(argument)

    def closeness(inputs: RewardInput) -> list[float]:
        return [max(0.0, 1.0 - abs(len(ids) - target) / target) for ids in inputs.answers.completion_ids]

    return closeness


def regex(argument: str | None) -> ModelReward:
    """1 if the pattern is found anywhere in the answer (`^` and `$` match its start and end), else 0."""
    if not argument:
        raise ValueError("expected a pattern, as in regex:[0-9]+")
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise ValueError(f"invalid regular expression: {error}") from error
    return lambda inputs: [float(bool(pattern.search(answer))) for answer in inputs.answers.completions]


def exact_answer(inputs: RewardInput) -> list[float]:
    """1 if an answer, or its last line, equals the row's `answer` (or else `solution`), else 0.

    Both are normalized first: case, white space, quotes, `*`, `$` and backticks around the text, and full stops and
    exclamation marks after it do not count; of a text with `####`, as in GSM8K, only what follows counts. If a number
    is expected, the last number of the answer is compared too: 1,234.50 equals 1234.5, but 02134 is not 2134.
    Raises OnecardError if the dataset has neither column, or a row's value is not text or an exact number.
    """
    answers = inputs.answers
    columns = [name for name in ANSWER_COLUMNS if name in answers.columns]
    if not columns:
        present = ", ".join(["prompt", *answers.columns])
        raise OnecardError(f"exact_answer: expected a column 'answer' or 'solution' in the dataset, got {present}.")
    return [
        float(is_correct(answer, expected_answer({name: answers.columns[name][index] for name in columns}, prompt)))
        for index, (prompt, answer) in enumerate(zip(answers.prompts, answers.completions, strict=True))
    ]


def expected_answer(columns: Mapping[str, Any], prompt: str) -> str:
    """A row's expected answer, normalized, from the first of ANSWER_COLUMNS that is not null."""
    given = {name: columns[name] for name in ANSWER_COLUMNS if name in columns}
    column = next((name for name, value in given.items() if value is not None), next(iter(given), ANSWER_COLUMNS[0]))
    return expected_text(given.get(column), column, prompt)


def expected_text(expected: Any, column: str, prompt: str) -> str:
    """A row's expected answer, normalized. `column` and `prompt` are for the error message."""
    got = "null" if expected is None else type(expected).__name__
    if isinstance(expected, str):
        return normalized(expected)
    if isinstance(expected, Decimal) and abs(expected.adjusted()) > MAX_DIGITS:
        got = f"{expected}, a number with too many digits"
    elif isinstance(expected, float) and not abs(expected) < 2**53:  # NaN too
        got = f"{expected}, not an exact number"
    elif isinstance(expected, int | float | Decimal) and not isinstance(expected, bool):
        return f"{Decimal(str(expected)):f}"  # 0.00001, not 1e-05
    raise OnecardError(f"exact_answer: {column} is {got}, expected text or a number; prompt {prompt[:80]!r}")


def is_correct(answer: str, expected: str) -> bool:
    """Whether the answer, its last line, or (if a number is expected) its last number equals `expected`."""
    answer = answer.translate(MINUS)
    lines = [line for line in answer.splitlines() if line.strip()]
    if normalized(answer) == expected or (lines and normalized(lines[-1]) == expected):
        return True
    numbers = NUMBER.findall(answer)
    if not numbers or not NUMBER.fullmatch(expected):
        return False
    if LEADING_ZERO.match(expected):
        return bool(numbers[-1] == expected)
    return as_decimal(numbers[-1]) == as_decimal(expected)


def normalized(text: str) -> str:
    """The text after `####`, in lower case, without white space, quotes and marks around it; see `exact_answer`."""
    text = text.translate(MINUS)
    return " ".join(text.rpartition("####")[2].casefold().split()).strip(STRIPPED).rstrip(STRIPPED + ".!")


def as_decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def no_argument(reward: ModelReward) -> Callable[[str | None], ModelReward]:
    """The factory of a reward that takes no argument."""

    def make(argument: str | None) -> ModelReward:
        if argument is not None:
            raise ValueError("expected its name alone, without a colon")
        return reward

    return make


# Name -> function of the text after the colon (None without a colon) that returns the reward, or raises ValueError.
BUILTINS: Mapping[str, Callable[[str | None], ModelReward]] = {
    "fluency": no_argument(fluency),
    "relevance": no_argument(relevance),
    "diversity": no_argument(diversity),
    "length": length,
    "regex": regex,
    "exact_answer": no_argument(exact_answer),
}


def builtin_name(entry: str) -> str | None:
    """The built-in reward's name in an entry: `length` for `length:20`; None if the entry is not built in."""
    name = entry.partition(":")[0]
    return name if name in BUILTINS else None


def load_builtin(entry: str, setting: str) -> ModelReward:
    """The reward that an entry of `setting` names."""
    name, colon, argument = entry.partition(":")
    try:
        return BUILTINS[name](argument if colon else None)
    except ValueError as error:
        raise OnecardError(f"{setting}: '{entry}': {error}.") from error
