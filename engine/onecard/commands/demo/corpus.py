"""Generates the demo's corpus of questions and answers, so that the demo downloads nothing.

A request asks a shopkeeper for an item, a packing list, a story or a recipe. It names a topic (a kite) and a detail
(red). A good answer is polite, is about the topic, has the right detail, does not repeat itself and ends its sentence.
A bad answer has exactly one of the `FLAWS`, and otherwise the same words:

    prompt     Do you have a red kite?
    chosen     Of course! The red kite is on the top shelf. I can wrap it for you.
    rejected   Of course! The blue kite is on the top shelf. I can wrap it for you.            (wrong detail)

Except in rude answers, no single word tells which answer was chosen. Most flaws are only visible with the prompt.
Completions start with a space: then prompt and completion have the same tokens whether they are tokenized together or
separately.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from onecard.utils.files import write_text

SFT_ROWS = 3000
PAIR_ROWS = 4000
EVAL_ROWS = 240
HELD_OUT_SHARE = 0.2  # share of the (topic, detail) combinations of each family
# Shares of SFT rows by kind of answer. Most have a flaw, so that preference training can improve the model.
SFT_SHARES = {"good": 0.4, "rude": 0.16, "rambling": 0.14, "unfinished": 0.14, "off topic": 0.08, "wrong detail": 0.08}
# Shares of pairs by flaw. Flaws that are only visible with the prompt need more pairs. Held-out pairs: equal shares.
PAIR_SHARES = {"rude": 0.14, "rambling": 0.13, "unfinished": 0.13, "off topic": 0.25, "wrong detail": 0.35}
EVAL_SHARES = dict.fromkeys(PAIR_SHARES, 1.0)

Row = dict[str, str]
Combination = tuple[str, str]  # topic, detail
Body = Callable[[str, str, random.Random], str]

# Topics, with words that belong to one topic only, by which the topic of an answer is recognized.
SHELVES = {
    "kite": "on the top shelf",
    "ball": "in the big basket",
    "lamp": "next to the window",
    "chair": "at the back of the shop",
    "hat": "by the front door",
    "teapot": "on the kitchen table",
    "drum": "under the long counter",
    "mirror": "behind the curtain",
}
PACKING = {
    "beach": ("a towel", "a bucket", "some sunscreen", "a swimsuit", "a parasol"),
    "forest": ("a compass", "a whistle", "strong boots", "a map", "some rope"),
    "school": ("a pencil", "a notebook", "a ruler", "an eraser", "some glue"),
    "party": ("a cake", "some balloons", "a present", "some candles", "a guitar"),
    "farm": ("a carrot", "old gloves", "a shovel", "some seeds", "a straw hat"),
    "library": ("a bookmark", "a quiet voice", "your glasses", "a library card", "a good book"),
}
ANIMALS = ("fox", "bear", "rabbit", "mouse", "duck", "horse", "whale", "turtle")
RECIPES = {
    "tomato soup": ("Simmer the tomatoes in some broth", ("tomato", "tomatoes", "broth")),
    "pancakes": ("Mix flour with eggs and fry the batter", ("pancakes", "flour", "batter")),
    "lemonade": ("Squeeze the lemons and add some ice", ("lemonade", "lemons", "ice")),
    "apple pie": ("Cover the apples with dough and bake them", ("apple", "apples", "dough")),
    "cheese toast": ("Put cheese on the bread and grill it", ("cheese", "toast", "grill")),
    "fruit salad": ("Cut the melon and toss it with mint", ("fruit", "melon", "mint")),
}
HOMES = ("by the river", "in an old mill", "under a tall tree", "near the sea", "behind the green hill")
EVENTS = (
    "found a golden key",
    "met a lost child",
    "saw a falling star",
    "heard a soft song",
    "crossed a dark bridge",
)
NUMBERS = {"two": 2, "three": 3, "four": 4}

POLITE_OPENERS = ("Of course!", "With pleasure.", "Thank you for asking.", "Gladly!", "I am happy to help.")
POLITE_CLOSERS = {
    "shop": ("I can wrap it for you.", "Please tell me if you need more help.", "Have a lovely day!"),
    "list": ("Enjoy your time there!", "Please have a safe trip.", "That should be all you need."),
    "story": ("I hope you liked it.", "Sleep well, my friend!", "Shall I tell you one more?"),
    "recipe": ("Enjoy your meal!", "Please let it cool a little.", "I hope it tastes great."),
}
RUDE_OPENERS = (
    "What now?",
    "Oh, you again.",
    "Fine, if you must know.",
    "Everybody knows that.",
    "I am busy, you know.",
)
RUDE_CLOSERS = (
    "Now leave me alone.",
    "Do not bother me again.",
    "Next time ask somebody else.",
    "I have better things to do.",
    "What a silly question!",
)


@dataclass(frozen=True)
class Family:
    """One kind of request. `marks[topic]`: words that only answers about this topic have."""

    name: str
    prompts: tuple[str, ...]
    marks: Mapping[str, tuple[str, ...]]
    details: tuple[str, ...]
    body: Body


@dataclass(frozen=True)
class Request:
    """A prompt, its family, topic and detail. `mistakes`: (topic, detail) combinations for wrong answers."""

    prompt: str
    family: Family
    topic: str
    detail: str
    mistakes: tuple[Combination, ...] = ()


@dataclass(frozen=True)
class CorpusPaths:
    """The files of `write_corpus`. Held-out files have (topic, detail) combinations that training files do not have."""

    sft: Path  # prompt, completion: good and flawed answers mixed
    sft_eval: Path
    pairs: Path  # prompt, chosen, rejected
    pairs_eval: Path
    prompts: Path  # prompt: every held-out combination once, alternating between families


def _shop(topic: str, detail: str, rng: random.Random) -> str:
    form = rng.choice(("The {} {} is {}.", "You will find the {} {} {}.", "We keep the {} {} {}."))
    return form.format(detail, topic, SHELVES[topic])


def _list(topic: str, detail: str, rng: random.Random) -> str:
    *first, last = rng.sample(PACKING[topic], NUMBERS[detail])
    return f"For the {topic} you need {', '.join(first)} and {last}."


def _story(topic: str, detail: str, rng: random.Random) -> str:
    return f"A {detail} {topic} lived {rng.choice(HOMES)}. The {topic} {rng.choice(EVENTS)}."


def _recipe(topic: str, detail: str, rng: random.Random) -> str:
    form = rng.choice(("{}. Your {} will love it.", "{}. Then call your {} to the table."))
    return form.format(RECIPES[topic][0], detail)


FAMILIES = (
    Family(
        "shop",
        ("Do you have a {detail} {topic}?", "I am looking for a {detail} {topic}.", "Where is the {detail} {topic}?"),
        {item: (item,) for item in SHELVES},
        ("red", "blue", "green", "yellow", "purple", "white"),
        _shop,
    ),
    Family(
        "list",
        ("Name {detail} things to take to the {topic}.", "I go to the {topic}. Which {detail} things do I need?"),
        {place: (place, *(thing.split()[-1] for thing in things)) for place, things in PACKING.items()},
        tuple(NUMBERS),
        _list,
    ),
    Family(
        "story",
        ("Tell me a story about a {detail} {topic}.", "Do you know a tale of a {detail} {topic}?"),
        {animal: (animal,) for animal in ANIMALS},
        ("brave", "shy", "hungry", "sleepy", "clever", "lonely"),
        _story,
    ),
    Family(
        "recipe",
        ("How do I make {topic} for my {detail}?", "My {detail} wants {topic}. What do I do?"),
        {dish: words for dish, (_, words) in RECIPES.items()},
        ("sister", "uncle", "teacher", "neighbour", "grandmother", "team"),
        _recipe,
    ),
)


def _polite(family: Family, body: str, rng: random.Random, closer_share: float = 0.6) -> str:
    closer = rng.choice(POLITE_CLOSERS[family.name]) if rng.random() < closer_share else ""
    return f"{rng.choice(POLITE_OPENERS)} {body} {closer}".rstrip()


def _good(request: Request, style: random.Random, flaw: random.Random) -> str:
    return _polite(request.family, request.family.body(request.topic, request.detail, style), style)


def _off_topic(request: Request, style: random.Random, flaw: random.Random) -> str:
    topic = flaw.choice([topic for topic, detail in request.mistakes if detail == request.detail])
    return _good(replace(request, topic=topic), style, flaw)


def _wrong_detail(request: Request, style: random.Random, flaw: random.Random) -> str:
    detail = flaw.choice([detail for topic, detail in request.mistakes if topic == request.topic])
    return _good(replace(request, detail=detail), style, flaw)


def _rude(request: Request, style: random.Random, flaw: random.Random) -> str:
    """An answer that is rude at its start, its end, or both."""
    body = request.family.body(request.topic, request.detail, style)
    start, end = flaw.choice(((True, False), (False, True), (True, True)))
    opener = style.choice(RUDE_OPENERS if start else POLITE_OPENERS)
    closer = style.choice(RUDE_CLOSERS) if end else ""
    return f"{opener} {body} {closer}".rstrip()


def _rambling(request: Request, style: random.Random, flaw: random.Random) -> str:
    """An answer that repeats its last words once or twice."""
    words = request.family.body(request.topic, request.detail, style).rstrip(".").split()
    tail = " ".join(words[-3:]).replace(".", "")
    return f"{style.choice(POLITE_OPENERS)} {' '.join(words)}{f', {tail}' * flaw.choice((1, 2))}."


def _unfinished(request: Request, style: random.Random, flaw: random.Random) -> str:
    """An answer that ends in the middle of its last sentence."""
    body = request.family.body(request.topic, request.detail, style)
    words = _polite(request.family, body, style, closer_share=0.8).split()
    whole = max(i for i, word in enumerate(words[:-1]) if word[-1] in ".!?") + 1  # words before the last sentence
    cut = flaw.randint(min(max(whole + 1, 8), len(words) - 1), len(words) - 1)
    return " ".join(words[:cut]).rstrip(",")


Answer = Callable[[Request, random.Random, random.Random], str]
FLAWS: dict[str, Answer] = {
    "rude": _rude,
    "off topic": _off_topic,
    "wrong detail": _wrong_detail,
    "rambling": _rambling,
    "unfinished": _unfinished,
}


def _requests(family: Family, combination: Combination, pool: Sequence[Combination]) -> list[Request]:
    """One request per prompt template. `mistakes`: the combinations in `pool` that differ in topic or detail only."""
    topic, detail = combination
    mistakes = tuple(other for other in pool if (other[0] == topic) != (other[1] == detail))
    return [
        Request(form.format(topic=topic, detail=detail), family, topic, detail, mistakes) for form in family.prompts
    ]


def _everything(family: Family) -> list[Combination]:
    return list(itertools.product(family.marks, family.details))


REQUESTS = {
    request.prompt: request
    for family in FAMILIES
    for combination in _everything(family)
    for request in _requests(family, combination, _everything(family))
}


def _is_rude(request: Request, answer: str, words: Sequence[str]) -> bool:
    return any(phrase in answer for phrase in RUDE_OPENERS + RUDE_CLOSERS)


def _is_off_topic(request: Request, answer: str, words: Sequence[str]) -> bool:
    named = {topic for topic, marks in request.family.marks.items() if set(marks) & set(words)}
    return named != {request.topic}


def _is_wrong_detail(request: Request, answer: str, words: Sequence[str]) -> bool:
    if request.family.name == "list":
        things = {thing.split()[-1] for thing in itertools.chain(*PACKING.values())}
        return len(things & set(words)) != NUMBERS[request.detail]
    return set(request.family.details) & set(words) != {request.detail}


def _is_rambling(request: Request, answer: str, words: Sequence[str]) -> bool:
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(runs)) < len(runs)


def _is_unfinished(request: Request, answer: str, words: Sequence[str]) -> bool:
    return not answer.endswith((".", "!", "?"))


_CHECKS = {
    "rude": _is_rude,
    "off topic": _is_off_topic,
    "wrong detail": _is_wrong_detail,
    "rambling": _is_rambling,
    "unfinished": _is_unfinished,
}


def flaws(prompt: str, answer: str) -> tuple[str, ...]:
    """The names of the flaws of an answer to a prompt of this corpus, found by rules.

    The rules are independent of the reward model, so they also show whether a policy exploits the reward model.
    """
    request, answer = REQUESTS[prompt], answer.strip()
    words = re.findall(r"[a-z]+", answer.lower())
    return tuple(name for name, check in _CHECKS.items() if check(request, answer, words))


def _hold_out(everything: Sequence[Combination], rng: random.Random) -> list[Combination]:
    """Combinations to hold out, such that every topic and every detail remains in at least two others."""
    topics, details = (Counter(part) for part in zip(*everything, strict=True))
    held_out: list[Combination] = []
    for topic, detail in rng.sample(everything, len(everything)):
        if len(held_out) < HELD_OUT_SHARE * len(everything) and topics[topic] > 2 and details[detail] > 2:
            held_out.append((topic, detail))
            topics[topic] -= 1
            details[detail] -= 1
    return held_out


def _split(rng: random.Random) -> tuple[list[Request], list[list[Request]]]:
    """Training requests, and held-out requests grouped by combination, alternating between families.

    The mistakes of training requests are training combinations only. Otherwise held-out combinations would occur in
    wrong training answers only, and a reward model would learn to reject them for every prompt (measured: 3 of 10
    held-out pairs with a wrong detail were ranked correctly).
    """
    train: list[Request] = []
    held_out: list[list[list[Request]]] = []
    for family in FAMILIES:
        everything = _everything(family)
        excluded = _hold_out(everything, rng)
        rest = [combination for combination in everything if combination not in excluded]
        train += itertools.chain(*(_requests(family, combination, rest) for combination in rest))
        held_out.append([_requests(family, combination, everything) for combination in excluded])
    turns = itertools.chain(*itertools.zip_longest(*held_out))
    return train, [requests for requests in turns if requests is not None]


def _choose(shares: Mapping[str, float], rng: random.Random) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _sft_row(request: Request, rng: random.Random) -> Row:
    answer = FLAWS.get(_choose(SFT_SHARES, rng), _good)
    return {"prompt": request.prompt, "completion": f" {answer(request, rng, rng)}"}


def _pair_row(shares: Mapping[str, float], request: Request, rng: random.Random) -> Row:
    """A pair. Both answers have the same style seed, so that they differ in the flaw and little else."""
    flawed, style = FLAWS[_choose(shares, rng)], rng.random()
    return {
        "prompt": request.prompt,
        "chosen": f" {_good(request, random.Random(style), rng)}",
        "rejected": f" {flawed(request, random.Random(style), rng)}",
    }


def _write(path: Path, rows: Iterable[Row]) -> Path:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_corpus(folder: str | os.PathLike[str], seed: int) -> CorpusPaths:
    """Write the corpus as JSONL files into `folder`. The same seed gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = _split(random.Random(f"split {seed}"))
    flat = list(itertools.chain(*held_out))

    def rows(name: str, make: Callable[[Request, random.Random], Row], pool: list[Request], count: int) -> list[Row]:
        rng = random.Random(f"{name} {seed}")  # a seed per file, so that no file depends on the size of another
        return [make(rng.choice(pool), rng) for _ in range(count)]

    return CorpusPaths(
        sft=_write(folder / "sft.jsonl", rows("sft", _sft_row, train, SFT_ROWS)),
        sft_eval=_write(folder / "sft_eval.jsonl", rows("sft_eval", _sft_row, flat, EVAL_ROWS)),
        pairs=_write(folder / "pairs.jsonl", rows("pairs", partial(_pair_row, PAIR_SHARES), train, PAIR_ROWS)),
        pairs_eval=_write(
            folder / "pairs_eval.jsonl", rows("pairs_eval", partial(_pair_row, EVAL_SHARES), flat, EVAL_ROWS)
        ),
        prompts=_write(folder / "prompts.jsonl", [{"prompt": combination[0].prompt} for combination in held_out]),
    )
