"""`reward_funcs` as it is written: names and addresses, each maybe with a weight, several of them maybe on one line.

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
TO_THE_END = "regex:"


@dataclass(frozen=True)
class Term:
    """`entry` is a name or an address; `weight` is None where none is written."""

    entry: str
    weight: float | None = None


def parse_terms(entries: Sequence[str], setting: str) -> list[Term]:
    """Every term of every entry, in order."""
    terms = [term for entry in entries for term in split_terms(entry)]
    for term in terms:
        if term.weight is not None and not math.isfinite(term.weight):
            raise OnecardError(f"{setting}: the weight of '{term.entry}' is {term.weight}; expected a finite number.")
    return terms


def split_terms(entry: str) -> Iterator[Term]:
    """The terms of one entry. A pattern may hold anything, a plus too, so it goes on to the end."""
    rest, more = entry, PLUS
    while more:
        found = WEIGHT.match(rest)
        weight, name = (float(found[1]), rest[found.end() :]) if found else (None, rest)
        if name.lstrip().startswith(TO_THE_END):
            yield Term(name.lstrip(), weight)
            return
        name, more, rest = name.partition(PLUS)
        yield Term(name.strip(), weight)
