"""How a knob is turned: for the time of a `with`, a number somewhere in the kernel library is another one.

A turn is a function of values by name. Without values it leaves the library as it is. The library is imported when a
knob is turned, not before: whoever wants Triton's interpreter says so first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

CHUNKED, LOW_MEMORY, TILED = "chunked", "low_memory", "tiled"  # as onecard_kernels.logprob.tuning has them

Values = Mapping[str, Any]
Turn = Callable[[Values], AbstractContextManager[object]]


def library(module: str) -> Any:
    return import_module(f"onecard_kernels.{module}")


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def entered(table: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """`table[key]` is `value` inside."""
    before = dict(table)
    table[key] = value
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def planned(**always: Any) -> Turn:
    """The plan of the linear path: implementation, rows, columns. `always` holds for the default too."""
    return lambda values: library("logprob.tuning").override(**{**always, **values})


def constants(module: str, **always: Any) -> Turn:
    """Numbers of a module by their names in small letters; `always` is a plan that holds for the default too."""

    @contextmanager
    def turn(values: Values) -> Iterator[None]:
        with ExitStack() as held:
            held.enter_context(planned(**always)({}))
            for name, value in values.items():
                held.enter_context(swapped(import_module(module), name.upper(), value))
            yield

    return turn


def record(address: str) -> Turn:
    """Fields of a named tuple, which lies at `module:NAME`."""
    module, name = address.split(":")

    @contextmanager
    def turn(values: Values) -> Iterator[None]:
        owner = import_module(module)
        with swapped(owner, name, getattr(owner, name)._replace(**values)):
            yield

    return turn


@contextmanager
def tile(values: Values) -> Iterator[None]:
    """Fields of the TileConfig that the tiled forward takes from its table of cards."""
    kernels = library("logprob.triton_tiled")
    table = kernels.config_on
    with (
        planned(implementation=TILED)({}),
        swapped(kernels, "config_on", lambda *asked: replace(table(*asked), **values)),
    ):
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """On CPU tensors, what a GPU would run: its plans, and Triton's kernels where their interpreter is on."""
    dispatch, plans = library("dispatch"), library("logprob.tuning")
    with (
        entered(dispatch.PREFERENCE, "cpu", dispatch.PREFERENCE["cuda"]),
        entered(plans.TABLE, "cpu", plans.TABLE["cuda"]),
    ):
        yield
