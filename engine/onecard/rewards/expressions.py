"""Parse `reward_funcs`: rewards with optional weights, several of them in one entry if ` + ` separates them.

0.5*fluency + 0.3*relevance + 2*judge.py:polite
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onecard.utils.errors import OnecardError

PLUS = " + "
WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*")
REGEX = "regex:"


@dataclass(frozen=True)
class Term:
    """One reward and its weight. `entry`: a built-in reward or `module:function`; `weight`: None if none is given."""

    entry: str
    weight: float | None = None


def parse_terms(entries: Sequence[str], setting: str) -> list[Term]:
    """All terms of all entries, in order. Raises OnecardError if a weight is not finite."""
    terms = [term for entry in entries for term in split_terms(entry)]
    for term in terms:
        if term.weight is not None and not math.isfinite(term.weight):
            raise OnecardError(f"{setting}: the weight of '{term.entry}' is {term.weight}; expected a finite number.")
    return terms


def split_terms(entry: str) -> Iterator[Term]:
    """The terms of one entry. A regex pattern extends to the end of the entry, because it may contain a plus."""
    rest, plus = entry, PLUS
    while plus:
        match = WEIGHT.match(rest)
        weight, name = (float(match[1]), rest[match.end() :]) if match else (None, rest)
        if name.lstrip().startswith(REGEX):
            yield Term(name.lstrip(), weight)
            return
        name, plus, rest = name.partition(PLUS)
        yield Term(name.strip(), weight)
