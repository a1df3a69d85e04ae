"""Tuning: every knob runs and changes something; what is wrong is not timed; what is faster is so beyond the spread."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ahead, records
from benchmarks.anatomy import OURS
from benchmarks.cases import Refused, Timing
from benchmarks.launches import LAUNCHES, Configuration, meta
from benchmarks.records import Row
from benchmarks.tune import __main__ as command
from benchmarks.tune import knobs, render, sweep, turning
from benchmarks.tune.knobs import CPU, CUDA, DRY, KNOBS, Knob
from onecard_kernels import launch
from onecard_kernels.launch import recording
from onecard_kernels.logprob import tuning
from onecard_kernels.records import Head

HERE = torch.device("cpu")
needs_triton = pytest.mark.skipif(launch.why_not(HERE) is not None, reason="triton does not run here")
PACKAGE = Path(tuning.__file__).resolve().parents[1]
ON_PLANS = [knob for knob in KNOBS.values() if knob.turns[0].endswith("tuning:TABLE")]
ON_KERNELS = [knob for knob in KNOBS.values() if CUDA in knob.settings and knob not in ON_PLANS]


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[Path]]:
    status = command.main(["--dry", "--out", str(tmp_path), *arguments])
    return status, sorted(tmp_path.glob("*.json"))


@pytest.mark.long
@needs_triton
def test_every_knob_runs_dry_on_tritons_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: knob.turn for name, knob in KNOBS.items()}, dict(tuning.TABLE)
    status, files = run(tmp_path)
    assert status == 0, capsys.readouterr().err
    report = render.load(files[0])
    assert [result.benchmark for result in report.results] == list(KNOBS)
    assert report.complete
    assert report.quick
    for result in report.results:
        knob = KNOBS[result.benchmark]
        labels = [row.candidate for row in result.rows if row.role == "ours"]
        assert labels == [OURS, *map(knobs.label_of, knobs.settings_of(knob, "cpu", dry=True))]
        assert [row.reason for row in result.rows if row.reason] == []
        assert all(row.seconds for row in result.rows)
        assert any(row.rate for row in result.rows if row.role == records.LIMIT)
    assert ({name: knob.turn for name, knob in KNOBS.items()}, dict(tuning.TABLE)) == before
    page = files[0].with_suffix(".md").read_text()
    assert all(f"## {name}" in page for name in KNOBS)
    assert "QUICK RUN" in page


@cache
def typical() -> dict[str, list[Configuration]]:
    """By kernel's module, what is launched at real sizes."""
    found: dict[str, list[Configuration]] = {}
    for configuration in (c for launches in LAUNCHES for c in launches() if c.typical):
        with recording() as launches:
            configuration.launch((9, 0))
        for module in {f"onecard_kernels.{ahead.name_of(one).split(':')[0]}" for one in launches}:
            found.setdefault(module, []).append(configuration)
    return found


def launched(knob: Knob) -> list[Any]:
    """What the kernels of a knob's module are started with at real sizes."""
    module = knob.turns[0].split(":")[0].removesuffix("launches")
    if module.endswith("triton_tiled"):
        return tiled_launches()
    configurations = [c for name, found in typical().items() if name.startswith(module) for c in found]
    assert configurations, module
    with recording() as launches:
        for configuration in configurations:
            configuration.launch((9, 0))
    return [starts(one) for one in launches]


def starts(one: launch.Launch) -> tuple[Any, ...]:
    return ahead.name_of(one), one.grid, one.num_warps, one.num_stages, sorted(map(str, one.constexprs.items()))


def tiled_launches() -> list[Any]:
    from onecard_kernels.logprob import triton_tiled

    hidden, weight = meta(8192, 4096, dtype=torch.bfloat16), meta(128256, 4096, dtype=torch.bfloat16)
    with recording() as launches:
        triton_tiled.tiled_statistics(
            hidden, weight, meta(8192, dtype=torch.int64), Head(), entropy=False, sum_sq=False
        )
    return [starts(one) for one in launches]


@needs_triton
@pytest.mark.parametrize("knob", ON_KERNELS, ids=lambda knob: knob.name)
def test_every_setting_changes_the_launches_at_real_sizes_and_leaves_no_trace(knob: Knob) -> None:
    default = launched(knob)
    seen = [default]
    twins = 0
    for values in knob.settings[CUDA]:
        with knob.turn(values):
            found = launched(knob)
        twins += found == default
        assert found == default or found not in seen, f"{values} is another setting under another name"
        seen.append(found)
    assert twins <= 1, "the default may be timed twice, no more"
    assert launched(knob) == default
    with knob.turn({}):
        assert launched(knob) == default


@pytest.mark.parametrize(
    ("knob", "device"), [(knob, device) for knob in ON_PLANS for device in knob.shapes if device != DRY],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_every_plan_is_another_one(knob: Knob, device: str) -> None:
    table = torch.device(device)
    found = []
    for values in ({}, *knob.settings[device]):
        with knob.turn(values):
            found.append(tuning.choose(knob.shapes[device][0]["V"], torch.float32, table))
    assert len(set(found[1:])) == len(found) - 1
    assert all(getattr(plan, name) == value for plan, v in zip(found[1:], knob.settings[device], strict=True)
               for name, value in v.items())  # fmt: skip


def tunables() -> Iterator[str]:
    """Numbers and cuts in capital letters at the top of the modules that start kernels."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        starts_kernels = any(
            isinstance(node, ast.Call) and ast.unparse(node.func) in ("launch", "launch.launch")
            for node in ast.walk(tree)
        )
        if path.name == "launch.py" or not starts_kernels:
            continue
        module = "onecard_kernels." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in tree.body:
            if (isinstance(node, ast.Assign) and ast.unparse(node.value) in ("Cut()",)) or (
                isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and type(node.value.value) is int
            ):
                yield from (f"{module}:{ast.unparse(target)}" for target in node.targets)


COUNTS: set[str] = set()  # of how many there are, not of how they are cut


def test_every_number_of_every_kernel_file_has_a_knob() -> None:
    turned = {address for knob in KNOBS.values() for address in knob.turns}
    found = set(tunables())
    assert "onecard_kernels.logprob.triton_rows:BACKWARD" in found  # chained assignments too
    assert found - COUNTS - turned == set()
    for address in turned:
        module, name = address.split(":")
        if "triton" not in module or launch.why_not(HERE) is None:
            assert hasattr(turning.library(module.removeprefix("onecard_kernels.")), name)


@needs_triton
def test_tiles_fit_on_a_multiprocessor() -> None:

    default = tuning.config_for((9, 0), torch.bfloat16, Head())
    for values in knobs.TILES:
        tile = replace(default, **values)
        staged = tile.stages * (tile.rows + tile.columns) * tile.depth * 2  # bytes, bf16
        assert tile.at_once * staged <= ahead.CARDS["sm_90"].shared, values


def test_implementations_are_the_librarys() -> None:
    assert tuning.IMPLEMENTATIONS == (turning.CHUNKED, turning.LOW_MEMORY, turning.TILED)


@pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)
def test_every_shape_has_the_axes_of_its_benchmark(knob: Knob) -> None:
    axes = knob.benchmark.axes.split(" x ")
    assert {tuple(shape.sizes) for shapes in knob.shapes.values() for shape in shapes} == {tuple(axes)}
    assert set(knob.shapes) == {*knob.settings, DRY} or knob.shapes.keys() == {CUDA, DRY}
    assert knob.mode in knob.benchmark.modes


def test_short_kernels_are_replayed_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what only a GPU has: one call beforehand, so many inside, and one replay is a timed call."""
    said: list[str] = []

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    class Stream:
        def wait_stream(self, other: Any) -> None:
            said.append("wait")

    class Job:
        def ready(self) -> None:
            said.append("ready")

        def __call__(self) -> None:
            said.append("call")

    @contextmanager
    def inside(what: Any) -> Iterator[None]:
        said.append(type(what).__name__)
        yield
        said.append("end")

    for name, value in {"CUDAGraph": Graph, "Stream": Stream, "stream": inside, "graph": inside}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    replayed = sweep.Replayed(Job())
    assert said == ["ready", "wait", "Stream", "call", "end", "wait", "Graph", *["call"] * sweep.CALLS, "end"]
    said.clear()
    replayed()
    assert said == ["replay"]
    assert sweep.each([2.0, 4.0], 20) == [0.1, 0.2]
    assert sweep.each(None, 20) is None


# Refused, and why

PLAN = replace(KNOBS["chunk-rows"], settings={CPU: ({"rows": 1}, {"rows": 2})})


def rows_of(knob: Knob, *settings: turning.Values, **options: Any) -> dict[str, Row]:
    shape = knob.shapes[DRY][0]
    rows = sweep.measure_case(knob, shape, settings or knob.settings[CPU], HERE, Timing(3), **options)
    return {row.candidate: row for row in rows}


def spoiled(knob: Knob, spoil: Any) -> Knob:
    """The same, but every second setting meets with an accident."""

    def turn(values: turning.Values) -> Any:
        if values.get("rows") == 2:
            return spoil()
        return knob.turn(values)

    return replace(knob, turn=turn)


def test_a_wrong_setting_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard_kernels.logprob import linear

    right = linear.logprob_factors

    def slightly_wrong(of: Any, *rest: Any) -> Any:  # a gradient that is off by a thousandth, as of a lost token
        factors = right(of, *rest)
        return factors._replace(of_exp=factors.of_exp * 1.001)

    knob = spoiled(PLAN, lambda: turning.swapped(linear, "logprob_factors", slightly_wrong))
    rows = rows_of(knob)
    assert "WRONG, not timed: dHidden" in (rows["rows=2"].reason or "")
    assert rows["rows=2"].seconds == ()
    assert rows["rows=2"].median is None
    assert rows["rows=1"].reason is None
    assert len(rows["rows=1"].seconds) == len(rows[OURS].seconds) == 3


def test_a_setting_that_is_wrong_where_fp64_does_not_look_is_held_against_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Truths are of some tokens; the default's result is of all."""
    from onecard_kernels.logprob import linear

    monkeypatch.setattr("benchmarks.truth.ROWS", 1)  # the first token
    right = linear.HeadTiles.sweep

    def last_wrong(self: Any, h: Any, *given: Any, **options: Any) -> Any:
        of, *sums = right(self, h, *given, **options)
        of.logprobs[-1] += 1.0
        return of, *sums

    knob = spoiled(PLAN, lambda: turning.swapped(linear.HeadTiles, "sweep", last_wrong))
    assert "from the default's" in (rows_of(knob)["rows=2"].reason or "")


def test_a_setting_that_raises_has_its_reason() -> None:
    def out_of_shared_memory() -> Any:
        raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448")

    rows = rows_of(spoiled(PLAN, out_of_shared_memory))
    assert rows["rows=2"].reason.startswith("does not run: RuntimeError: out of resource: shared memory")
    assert rows["rows=1"].seconds


def test_a_wrong_default_stops_its_knob_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    from onecard_kernels.logprob import linear

    right = linear.logprob_factors
    monkeypatch.setattr(
        linear, "logprob_factors", lambda of, *rest: right(of, *rest)._replace(of_exp=right(of, *rest).of_exp * 1.1)
    )
    status, files = run(tmp_path, "--knob", "chunk-rows", "--knob", "chunk-rows-forward")
    assert status == 1
    found = {result.benchmark: result for result in render.load(files[0]).results}
    assert "is wrong in linear_logprobs" in found["chunk-rows"].refused
    assert found["chunk-rows"].rows == ()
    assert found["chunk-rows-forward"].rows
    assert "refused: chunk-rows at" in capsys.readouterr().err


def test_a_default_that_does_not_run_is_refused() -> None:
    def broken() -> Any:
        raise RuntimeError("no such card")

    knob = replace(PLAN, turn=lambda values: broken())
    with pytest.raises(Refused, match="the default does not run at 2 x 16 x 70: RuntimeError: no such card"):
        rows_of(knob)


# Time and order


def test_settings_that_come_too_late_are_not_tried() -> None:
    clock = itertools.count()
    rows = rows_of(PLAN, late=lambda: next(clock) >= 1)
    assert rows["rows=1"].seconds
    assert rows["rows=2"].reason == sweep.LATE
    assert rows[OURS].seconds


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path, capsys) -> None:
    status, files = run(tmp_path, "--minutes", "0")
    assert (status, files) == (0, [])
    assert "nothing was begun" in capsys.readouterr().out


def test_the_most_telling_come_first_and_the_rest_is_named(tmp_path: Path, monkeypatch) -> None:
    names = ["chunk-rows-forward", "kl-rows"]
    seconds = iter([0.0, 1.0, 61.0, 61.0, 61.0, 61.0])  # start, first knob, its settings, second knob
    monkeypatch.setattr(command.time, "monotonic", lambda: next(seconds))
    _, files = run(tmp_path, "--minutes", "1", *itertools.chain(*(("--knob", name) for name in reversed(names))))
    report = render.load(files[0])
    assert [result.benchmark for result in report.results] == names[:1]
    assert report.left_out == ("kl-rows at 2 x 16 x 70",)
    assert not report.complete
    assert "Not begun, the time was over: kl-rows" in render.summary(report, "x")


def test_the_file_is_there_after_every_case(tmp_path: Path, monkeypatch) -> None:
    real = sweep.measure_case

    def cut_off(knob: Knob, *rest: Any, **options: Any) -> Any:
        if knob.name == "kl-rows":
            raise KeyboardInterrupt
        return real(knob, *rest, **options)

    monkeypatch.setattr(sweep, "measure_case", cut_off)
    status, files = run(tmp_path, "--knob", "chunk-rows-forward", "--knob", "kl-rows")
    assert status == 130
    assert not json.loads(files[0].read_text())["complete"]
    assert [result.benchmark for result in render.load(files[0]).results] == ["chunk-rows-forward"]


# Words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry", "--device", "cuda"], "--dry runs a GPU's knobs on CPU"),
        (["--knob", "gae"], "--knob gae: not a knob of cpu"),
        (["--knob", "colour"], "'colour' is not one of"),
        (["--minutes", "-1"], "-1"),
    ],
)
def test_misuse_is_one_line_and_status_2(arguments: list[str], says: str, capsys) -> None:
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_another_file_is_no_sweep(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": records.SCHEMA}))
    assert render.main([str(path)]) == 2
    assert "is no report of benchmarks.tune: kind None, expected 'tune'" in capsys.readouterr().err
