"""Import reward functions by their address: `module:function` or `file.py:function`."""

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
from onecard.rewards.guard import describe_error, guarded
from onecard.utils.errors import OnecardError, did_you_mean

REWARD_MODEL = "reward_model"  # name of the reward model in metrics; a function of this name keeps its whole address
PYTHON_FILE = ".py"


@dataclass(frozen=True)
class RewardFunction:
    """A reward function. `name`: its address, for messages."""

    name: str
    call: Callable[..., Any]


def load_function(address: str) -> RewardFunction:
    """The function at `package.module:function`, `module:Class.method` or `path/to/file.py:function`.

    The current directory and the file's folder are appended to the import path, so that modules there can be imported
    and do not shadow installed packages. Raises OnecardError if there is no such function, the import fails, or it is
    an async function.
    """
    module, _, attribute = address.rpartition(":")
    is_file = module.endswith(PYTHON_FILE)
    if not is_dotted_name(attribute) or not (is_file or is_dotted_name(module)):
        raise OnecardError(
            f"reward_funcs: '{address}' is unknown, expected module:function, file.py:function, "
            f"or one of {', '.join(BUILTINS)}.{did_you_mean(address.partition(':')[0], BUILTINS)}"
        )
    value: Any = import_module_or_file(module)
    where = module if is_file else f"{module} ({getattr(value, '__file__', None) or 'built in'})"
    for name in attribute.split("."):
        try:
            inner = getattr(value, name)
        except AttributeError as error:
            known = [known for known in dir(value) if not known.startswith("_")]
            raise OnecardError(
                f"reward_funcs: '{address}': {where} has no '{name}'.{did_you_mean(name, known)}"
            ) from error
        except Exception as error:  # a package that imports its attributes lazily
            raise OnecardError(f"reward_funcs: importing {address} raised {describe_error(error)}") from error
        value, where = inner, name
    if not callable(value):
        raise OnecardError(f"reward_funcs: '{address}' is of type {type(value).__name__}, expected a function.")
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(type(value).__call__):
        raise OnecardError(f"reward_funcs: '{address}' is an async function, expected a synchronous one.")
    return RewardFunction(address, value)


def is_dotted_name(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def import_module_or_file(module: str) -> ModuleType:
    """Import a file by its path, or a module by its dotted name."""
    return import_file(module) if module.endswith(PYTHON_FILE) else import_named(module)


def import_named(name: str) -> ModuleType:
    """Import a module by its dotted name, from the current directory too."""
    make_importable(os.getcwd())
    try:
        with guarded(0):
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise anything when it is imported, and a script may exit
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise OnecardError(
                f"reward_funcs: there is no module '{missing}' in the current directory or among installed packages."
                f"{did_you_mean(name, BUILTINS)}"
            ) from error
        raise OnecardError(f"reward_funcs: importing {name} raised {describe_error(error)}") from error


def import_file(file: str) -> ModuleType:
    """Import a file as a module with a unique name. The same file with the same content is the same module."""
    path = Path(file).expanduser().resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OnecardError(f"reward_funcs: {file} cannot be read: {error.strerror}.") from error
    # The name depends on the content, so that an edited file is loaded again in the same process (a notebook).
    name = f"onecard_reward_{hashlib.sha256(os.fsencode(path) + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    make_importable(str(path.parent))
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look up a function's module here
    try:
        with guarded(0):
            exec(compile(content, path, "exec", dont_inherit=True), module.__dict__)  # without our `from __future__`
    except KeyboardInterrupt:
        del sys.modules[name]
        raise
    except BaseException as error:  # as in import_named
        del sys.modules[name]
        raise OnecardError(f"reward_funcs: importing {file} raised {describe_error(error)}") from error
    return module


def make_importable(folder: str) -> None:
    """Append `folder` to the import path."""
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # files may have been written since the last import


def part_names(entries: Sequence[str], *, setting: str = "reward_funcs", model: str = REWARD_MODEL) -> tuple[str, ...]:
    """The name of each entry in metrics and messages.

    It is the text after the colon; for a built-in reward, the text before it. Entries that would share a name keep
    their whole text. Raises OnecardError if an entry is given twice.
    """
    twice = next((entry for entry, count in Counter(entries).items() if count > 1), None)
    if twice is not None:
        raise OnecardError(f"{setting}: '{twice}' is given twice. For a larger share, give it a weight: 2*{twice}")
    short = [builtin_name(entry) or entry.rpartition(":")[2] for entry in entries]
    taken = Counter([model, *short])
    return tuple(name if taken[name] == 1 else entry for name, entry in zip(short, entries, strict=True))
