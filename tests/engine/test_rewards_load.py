"""From `reward_funcs` on the command line to functions and the names of their parts."""

from __future__ import annotations

import sys
import uuid

import pytest

from onecard.rewards.functions import REWARD_MODEL, load_function, part_names
from onecard.training.identity import functions_digest
from onecard.utils.errors import OnecardError

SOURCE = """
from dataclasses import dataclass

@dataclass
class Judge:
    weight: "int" = 2

    def call(self, completions):
        return [self.weight] * len(completions)

    @staticmethod
    def strict(completions):
        return [0] * len(completions)

def length(completions):
    return [len(text) for text in completions]

async def later(completions):
    return []

class Later:
    async def __call__(self, completions):
        return []

judge = Judge()
slow = Later()
size = 3
"""


@pytest.fixture(autouse=True)
def _same_imports_after(monkeypatch, tmp_path):
    """Each test in its own current directory, and what it imported is gone after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder, source: str, name: str | None = None) -> str:
    """A module of a name that no other test has imported, unless one is given."""
    name = name or f"judges_{uuid.uuid4().hex[:8]}"
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return name


def complaint(address: str) -> str:
    with pytest.raises(OnecardError) as caught:
        load_function(address)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("reward_funcs: ")
    return str(caught.value)


def test_a_function_by_module_and_by_file(tmp_path):
    name = write(tmp_path, SOURCE)
    write(tmp_path, SOURCE, "lib/reward")
    for address in (f"{name}:length", f"{tmp_path}/{name}.py:length", "lib/reward.py:length", "lib.reward:length"):
        function = load_function(address)
        assert function.name == address
        assert function.call(completions=["abc"]) == [3]
    assert load_function(f"{name}:judge.call").call(["a", "b"]) == [2, 2]
    assert load_function(f"{name}.py:Judge.strict").call(["a"]) == [0]
    assert load_function("os.path:basename").call("a/b") == "b"


def test_a_file_takes_no_other_modules_name(tmp_path):
    """Neither that of an installed module, nor that of a file of the same name in another folder."""
    import json

    for folder, value in (("a", 1), ("b", 2)):
        write(tmp_path, f"def reward(completions): return [{value}]", f"{folder}/json")
    first, second = load_function("a/json.py:reward"), load_function("b/json.py:reward")
    assert (first.call([]), second.call([])) == ([1], [2])
    assert sys.modules["json"] is json
    assert sys.modules[first.call.__module__].reward is first.call


def test_a_file_is_loaded_once_until_it_is_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    write(tmp_path, "loaded = []\ndef one(c): return loaded\ndef two(c): return loaded", "mine")
    first, second = load_function("mine.py:one"), load_function(f"{tmp_path}/mine.py:two")
    assert first.call([]) is second.call([])
    for value in (5, 6):  # of the same size and within the same second, which Python's own cache takes for the same
        write(tmp_path, f"def one(c): return [{value}]", "mine")
        assert load_function("mine.py:one").call([]) == [value]
    assert first.call([]) == []


def test_a_file_is_read_as_python_reads_it(tmp_path):
    """Without the `from __future__ import annotations` of the module that loads it."""
    write(tmp_path, "def reward(completions: 1 + 1): return []", "mine")
    assert load_function("mine.py:reward").call.__annotations__ == {"completions": 2}


def test_two_files_of_the_same_content_are_two_modules(tmp_path):
    """Each may read what lies beside it."""
    for folder in ("a", "b"):
        write(tmp_path, "def where(c): return [__file__]", f"{folder}/reward")
        assert load_function(f"{folder}/reward.py:where").call([]) == [str(tmp_path / folder / "reward.py")]


def test_a_path_may_hold_a_colon(tmp_path):
    write(tmp_path, "def reward(c): return [1]", "run 12:30/reward")
    assert load_function("run 12:30/reward.py:reward").call([]) == [1]


def test_a_file_imports_its_neighbours(tmp_path):
    neighbour = write(tmp_path / "lib", "value = 7")
    write(tmp_path, f"def now(c):\n    from {neighbour} import value\n    return [value]", "lib/reward")
    assert load_function("lib/reward.py:now").call([]) == [7]


def test_the_current_directory_hides_nothing_that_is_installed(tmp_path, monkeypatch):
    """A folder `datasets/` or a file `torch.py` beside the run must not become what the engine imports."""
    before = list(sys.path)
    name = write(tmp_path, SOURCE)
    load_function(f"{name}:length")
    load_function(f"{name}:judge.call")
    assert sys.path == [*before, str(tmp_path)]


@pytest.mark.parametrize(
    "address", ["length", "judges", ":length", "judges:", "", "a b:length", "judges/x:length", "judges:a..b", "a:b:c"]
)
def test_what_is_no_address(address):
    assert complaint(address).startswith(
        f"reward_funcs: '{address}' is unknown, expected module:function, file.py:function, or one of "
        "fluency, relevance, diversity, length, regex, exact_answer."
    )


@pytest.mark.parametrize(
    ("address", "near"),
    [("fluncy", "fluency"), ("lenght:20", "length"), ("regx:[0-9]", "regex"), ("regx:abc", "regex"), ("x*length", "")],
)
def test_a_misspelt_built_in_reward(address, near):
    assert complaint(address).endswith(f" Did you mean '{near}'?" if near else "exact_answer. Did you mean 'length'?")


@pytest.mark.parametrize(
    ("module", "missing"), [("no_such_thing", "no_such_thing"), ("no_such.thing", "no_such"), ("json.no", "json.no")]
)
def test_no_such_module(module, missing):
    expected = f"there is no module '{missing}' in the current directory or among installed packages."
    assert complaint(f"{module}:length") == f"reward_funcs: {expected}"


def test_a_module_s_own_missing_import_is_named(tmp_path):
    """Not even where the names begin alike."""
    name = write(tmp_path, "import judges")
    assert complaint(f"{name}:length").startswith(f"reward_funcs: importing {name} raised ModuleNotFoundError: ")


def test_no_such_file(tmp_path):
    assert complaint("lib/no.py:length") == "reward_funcs: lib/no.py cannot be read: No such file or directory."
    (tmp_path / "folder.py").mkdir()
    assert complaint("folder.py:length") == "reward_funcs: folder.py cannot be read: Is a directory."


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ValueError('two\\nlines')", "raised ValueError: two lines"),
        ("import no_such_thing", "raised ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def (:", "raised SyntaxError: "),
        ("import sys\nsys.exit(2)", "raised SystemExit: 2"),
        ("assert False", "raised AssertionError"),
    ],
)
def test_a_module_that_raises(tmp_path, source, expected):
    name = write(tmp_path, source)
    for place in (name, f"{name}.py"):
        before = set(sys.modules)
        assert f"reward_funcs: importing {place} {expected}" in complaint(f"{place}:length")
        assert not {module for module in set(sys.modules) - before if "reward_" in module}


def test_an_interrupted_import_leaves_no_module(tmp_path):
    name = write(tmp_path, "raise KeyboardInterrupt")
    for place in (name, f"{name}.py"):
        before = set(sys.modules)
        with pytest.raises(KeyboardInterrupt):
            load_function(f"{place}:length")
        assert not {module for module in set(sys.modules) - before if "reward_" in module}


def test_no_such_function_names_the_nearest_and_the_place(tmp_path):
    name = write(tmp_path, SOURCE)
    assert complaint(f"{name}:lenght") == (
        f"reward_funcs: '{name}:lenght': {name} ({tmp_path}/{name}.py) has no 'lenght'. Did you mean 'length'?"
    )
    assert complaint(f"{name}.py:nothing") == f"reward_funcs: '{name}.py:nothing': {name}.py has no 'nothing'."
    assert complaint(f"{name}:Judge.strikt").endswith("': Judge has no 'strikt'. Did you mean 'strict'?")
    assert "sys (built in) has no 'lenght'" in complaint("sys:lenght")


def test_what_a_package_imports_late_may_be_missing(tmp_path):
    """As TRL does it: `trl.rewards` imports its parts when they are asked for."""
    name = write(tmp_path, "def __getattr__(name):\n    raise RuntimeError(f'needs more for {name}')")
    assert (
        complaint(f"{name}:length")
        == f"reward_funcs: importing {name}:length raised RuntimeError: needs more for length"
    )


def test_what_is_no_plain_function(tmp_path):
    name = write(tmp_path, SOURCE)
    assert complaint(f"{name}:size") == f"reward_funcs: '{name}:size' is of type int, expected a function."
    for attribute in ("later", "slow"):
        expected = f"'{name}:{attribute}' is an async function, expected a synchronous one."
        assert complaint(f"{name}:{attribute}") == f"reward_funcs: {expected}"


def test_parts_have_short_names_where_they_are_unique():
    assert part_names([]) == ()
    assert part_names(["a.b:length", "c.py:polite", "d:Judge.call"]) == ("length", "polite", "Judge.call")
    assert part_names(["a:length", "b.py:length", "c:polite"]) == ("a:length", "b.py:length", "polite")
    assert part_names([f"a:{REWARD_MODEL}"]) == (f"a:{REWARD_MODEL}",)
    assert part_names(["length:20", "regex:a:b", "fluency"]) == ("length", "regex", "fluency")
    assert part_names(["length", "length:20", "my.py:fluency"]) == ("length", "length:20", "fluency")
    assert part_names(["length", "my.py:length"]) == ("length", "my.py:length")


def test_one_function_twice_is_refused():
    with pytest.raises(
        OnecardError, match=r"reward_funcs: 'a:length' is given twice. For a larger share, give it .* 2\*a:length"
    ):
        part_names(["a:length", "b:length", "a:length"])


def test_the_digest_is_of_functions_files_and_not_of_weights(tmp_path):
    module, file = write(tmp_path, SOURCE), write(tmp_path, SOURCE, "mine")
    entries = [f"{module}:length", f"0.5*fluency + 2*{file}.py:length + reward_model", "regex:a + b"]
    before = functions_digest(entries)
    assert before == functions_digest([entries[0], f"fluency + {file}.py:length", "3*reward_model", "regex:a + b"])
    others = [
        functions_digest([*entries[:2], "regex:a + c"]),
        functions_digest([*entries[:2], "length:3"]),
        functions_digest([f"{module}:judge.call", *entries[1:]]),
        functions_digest([entries[0]]),
        functions_digest([]),
    ]
    assert len({before, *others}) == 6
    write(tmp_path, SOURCE + "\n# edited", "mine")
    edited = functions_digest(entries)
    write(tmp_path, SOURCE, "mine")
    assert functions_digest(entries) == before != edited
    write(tmp_path, SOURCE + "\n# edited", module)
    assert functions_digest(entries) not in (before, edited)
    assert functions_digest(["sys:intern"])  # a module without a file
