"""From an address on the command line to a Python function."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from onecard.rewards.builtin import BUILTINS, builtin_name
from onecard.rewards.guard import described, guarded
from onecard.utils.errors import OnecardError, nearest

REWARD_MODEL = "reward_model"  # the name of the reward model's part; no function gets it as a short name

FILE = ".py"


@dataclass(frozen=True)
class RewardFunction:
    """A function and the address it was found under, which is what messages call it."""

    name: str
    call: Callable[..., Any]


def load_function(address: str) -> RewardFunction:
    """The function at `package.module:function` or `path/to/file.py:function`; `module:Class.method` is one too.

    The current directory, and the folder of a file, come last on the import path: what lies there can be imported, and
    takes the place of no installed package.
    """
    place, _, attribute = address.rpartition(":")
    is_file = place.endswith(FILE)
    if not dotted(attribute) or not (is_file or dotted(place)):
        raise OnecardError(
            f"reward_funcs: '{address}' is no address of a function; expected module:function, file.py:function, "
            f"or one of {', '.join(BUILTINS)}.{nearest(address.partition(':')[0], BUILTINS)}"
        )
    found: Any = import_place(place)
    where = place if is_file else f"{place} ({getattr(found, '__file__', None) or 'built in'})"
    for name in attribute.split("."):
        try:
            inner = getattr(found, name)
        except AttributeError as error:
            known = [known for known in dir(found) if not known.startswith("_")]
            raise OnecardError(f"reward_funcs: '{address}': {where} has no '{name}'.{nearest(name, known)}") from error
        except Exception as error:  # a package that imports its parts when they are asked for
            raise OnecardError(f"reward_funcs: importing {address} raised {described(error)}") from error
        found, where = inner, name
    if not callable(found):
        raise OnecardError(f"reward_funcs: '{address}' is no function, but {type(found).__name__}.")
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
        raise OnecardError(f"reward_funcs: '{address}' is an async function; expected a plain one.")
    return RewardFunction(address, found)


def dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def import_place(place: str) -> ModuleType:
    """A file or a module by its dotted name."""
    return import_file(place) if place.endswith(FILE) else import_named(place)


def import_named(name: str) -> ModuleType:
    """A module by its dotted name, from the current directory too."""
    make_importable(os.getcwd())
    try:
        with guarded(0):
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module does when it is imported, and a script that exits
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise OnecardError(
                f"reward_funcs: there is no module '{missing}' in the current directory nor among the installed ones."
                f"{nearest(name, BUILTINS)}"
            ) from error
        raise OnecardError(f"reward_funcs: importing {name} raised {described(error)}") from error


def import_file(place: str) -> ModuleType:
    """A file as a module of its own, under a name that nothing else has; the same file again is the same module."""
    path = Path(place).expanduser().resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OnecardError(f"reward_funcs: {place} cannot be read: {error.strerror}.") from error
    # The name has the content in it, so that a file which was edited meanwhile, as in a notebook, is loaded anew.
    name = f"onecard_reward_{hashlib.sha256(os.fsencode(path) + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    make_importable(str(path.parent))
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look a function's module up there
    try:
        with guarded(0):
            exec(compile(content, path, "exec", dont_inherit=True), module.__dict__)  # without our `from __future__`
    except KeyboardInterrupt:
        del sys.modules[name]
        raise
    except BaseException as error:  # as in import_named
        del sys.modules[name]
        raise OnecardError(f"reward_funcs: importing {place} raised {described(error)}") from error
    return module


def make_importable(folder: str) -> None:
    """Put `folder` last on the import path."""
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # files may have been written since Python last looked


def part_names(entries: Sequence[str], *, setting: str = "reward_funcs", model: str = REWARD_MODEL) -> tuple[str, ...]:
    """What each entry's part of the reward is called: what follows the colon, and of what is built in what is before
    it; or all of it if two share that.
    """
    twice = next((entry for entry, count in Counter(entries).items() if count > 1), None)
    if twice is not None:
        raise OnecardError(f"{setting}: '{twice}' is given twice; to make it count more, give it a weight: 2*{twice}")
    short = [builtin_name(entry) or entry.rpartition(":")[2] for entry in entries]
    taken = Counter([model, *short])
    return tuple(name if taken[name] == 1 else entry for name, entry in zip(short, entries, strict=True))
