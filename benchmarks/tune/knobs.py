"""The knobs, as a table: what is varied, at which shapes, and which public function in which mode feels it.

The most telling ones come first: a run that is short of time leaves out the last ones. Values that the library already
has may be among the settings: they are then timed twice, which shows how much of a difference is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from benchmarks.anatomy import Benchmark
from benchmarks.records import Row
from benchmarks.shapes import CPU_LINEAR, LOGITS, MAIN, ROWS, TOKENS, Shape, linear, logits, of_model
from benchmarks.suite import gae, linear_kl, linear_logprobs, linear_ppo, selective
from benchmarks.suite import tokens as token_losses
from benchmarks.tune import logits_ppo, turning
from benchmarks.tune.turning import CHUNKED, LOW_MEMORY, TILED, Turn, Values, library

DRY, CPU, CUDA = "dry", "cpu", "cuda"
Line = Callable[[Values, Sequence[Row], str], str]  # of a setting, the knob's rows, and the device


@dataclass(frozen=True)
class Knob:
    name: str
    about: str
    benchmark: Benchmark
    mode: str
    turns: tuple[str, ...]  # what is another number meanwhile, as `module:NAME`
    turn: Turn
    settings: Mapping[str, tuple[Values, ...]]  # by device
    shapes: Mapping[str, tuple[Shape, ...]]  # by device, and DRY
    line: Line
    workspace: float | None = None  # bytes beyond the gradient of the hidden states; what takes more is not proposed
    replayed: bool = False  # short kernels: many calls in one CUDA graph, or starting them would be all that is timed

    def named(self, label: str) -> Values | None:
        """The setting behind a row of a report."""
        return next((v for values in self.settings.values() for v in values if label_of(v) == label), None)


def label_of(values: Values) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def grid(**values: Sequence[Any]) -> tuple[Values, ...]:
    return tuple(dict(zip(values, point, strict=True)) for point in product(*values.values()))


# The line of tuning.TABLE


def choice_line(device: str, **changes: Any) -> str:
    """A line of tuning.TABLE; sizes of chunks are whole MiB."""
    choice = replace(library("logprob.tuning").TABLE[device], **changes)
    rows = f"{choice.row_bytes >> 20} << 20, {choice.least_rows}, {choice.most_rows}"
    tile = f"{choice.tile_rows}, {choice.tile_columns}"
    return f'tuning.TABLE: "{device}": Choice({choice.default.upper()}, {rows}, {tile}),'


def chunk_line(values: Values, rows: Sequence[Row], device: str) -> str:
    """So many bytes that the widest vocabulary gets its rows too."""
    widest = max(row.sizes["V"] for row in rows)
    needed = -(-values["rows"] * widest * 4 >> 20) << 20
    return choice_line(device, row_bytes=needed, most_rows=values["rows"])


def tile_line(values: Values, rows: Sequence[Row], device: str) -> str:
    return choice_line(device, tile_rows=values["rows"], tile_columns=values["columns"])


def default_line(values: Values, rows: Sequence[Row], device: str) -> str:
    return choice_line(device, default=values["implementation"]) + "  # for all modes"


HOPPER = (9, 0)


def card_line(values: Values, rows: Sequence[Row], device: str) -> str:
    plain, dtype = library("records").Head(), linear_logprobs.BENCHMARK.dtypes[CUDA]
    config = replace(library("logprob.tuning").config_for(HOPPER, dtype, plain), **values)
    fields = ", ".join(f"{name}={value}" for name, value in asdict(config).items())
    return f"tuning._CARDS: {HOPPER}: the tile is TileConfig({fields})"


def record_line(address: str) -> Line:
    module, name = address.split(":")
    return lambda values, rows, device: f"{module}: {name} = Cut({label_of(values)})"


def constants_line(module: str) -> Line:
    return lambda values, rows, device: (
        f"{module}: " + "; ".join(f"{name.upper()} = {value}" for name, value in values.items())
    )


# Shapes

FEW = tuple(of_model(model, 8192) for model in (MAIN, "qwen2.5-0.5b", "gemma2-2b"))
ONE = FEW[:1]
TINY = {DRY: (linear("tiny", 2, 16, 70),)}
TINY_LOGITS = {DRY: (logits("tiny", 2, 70),)}
TINY_BATCH = {DRY: (Shape("tiny", {"B": 2, "T": 10}),)}

# Settings

CUTS = tuple(
    values for values in grid(thread_bytes=(32, 64, 128), warps=(4, 8, 16)) if tuple(values.values()) != (64, 8)
)
IMPLEMENTATIONS = grid(implementation=(CHUNKED, LOW_MEMORY, TILED))
# None of these spills on sm_90 in bf16; `at_once` is what registers and shared memory leave room for.
TILES: tuple[Values, ...] = (
    {"stages": 3},
    {"group": 8},
    {"group": 32},
    {"depth": 128, "stages": 2},
    {"depth": 32},
    {"rows": 256, "columns": 128},
    {"columns": 128},
    {"columns": 128, "warps": 4, "stages": 3, "at_once": 2},
    {"rows": 64, "depth": 32, "warps": 4, "at_once": 2},
)
KL_BLOCKS = (
    *grid(block=(2048, 4096), warps=(4, 8)),
    *grid(block=(4096,), warps=(16,)),
    *grid(block=(8192,), warps=(8, 16)),
)
# More than 16 warps are never taken: a long block has no more threads for fewer positions each
GAE_BLOCKS = (
    grid(largest_block=(1024,), per_thread=(2, 4, 8))
    + grid(largest_block=(2048,), per_thread=(4, 8))
    + grid(largest_block=(4096,), per_thread=(8,))
)
TOKENS_AT_ONCE = grid(block=(256, 512, 1024, 2048, 4096), per_thread=(4, 8))


# Workspaces that were promised

FAST, LOW = 1e9, 1e8

_LOGPROB, _PPO = "onecard_kernels.logprob", "onecard_kernels.ppo"


def chunk_rows(name: str, benchmark: Benchmark, mode: str, cuda: tuple[Shape, ...], on_cpu: bool) -> Knob:
    return Knob(
        name,
        "tokens of a chunk of the fast path",
        benchmark,
        mode,
        (f"{_LOGPROB}.tuning:TABLE",),
        turning.planned(implementation=CHUNKED),
        {CUDA: grid(rows=(256, 512, 1024, 1536, 2048, 4096)), CPU: grid(rows=(64, 128, 256, 512, 1024))},
        {CUDA: cuda, **TINY, **({CPU: CPU_LINEAR.usual} if on_cpu else {})},
        chunk_line,
        workspace=FAST,
    )


def implementation(mode: str, cuda: tuple[Shape, ...], default: str = CHUNKED) -> Knob:
    others = [v for v in IMPLEMENTATIONS if mode == linear_logprobs.FORWARD or v["implementation"] != TILED]
    of_cpu = tuple(v for v in others if v["implementation"] == CHUNKED)
    return Knob(
        f"implementation-{mode}",
        "how the linear path cuts its work",
        linear_logprobs.BENCHMARK,
        mode,
        (f"{_LOGPROB}.tuning:TABLE",),
        turning.planned(),
        {CUDA: tuple(v for v in others if v["implementation"] != default), CPU: of_cpu},
        {CUDA: cuda, CPU: CPU_LINEAR.usual, **TINY},
        default_line,
    )


def row_pass(
    name: str, about: str, benchmark: Benchmark, mode: str, address: str, shapes: Mapping[str, tuple[Shape, ...]]
) -> Knob:
    settings = {CUDA: CUTS}
    about = f"{about}: bytes of a row in flight for each thread, and warps"
    return Knob(
        name, about, benchmark, mode, (address,), turning.record(address), settings, shapes, record_line(address)
    )


def token_pass(name: str, benchmark: Benchmark) -> Knob:
    module = f"{_PPO}.triton"
    return Knob(
        name,
        "tokens of a program, and of a thread",
        benchmark,
        token_losses.BACKWARD,
        (f"{module}:BLOCK", f"{module}:PER_THREAD"),
        turning.constants(module),
        {CUDA: TOKENS_AT_ONCE},
        {CUDA: TOKENS[CUDA].usual, **TINY_BATCH},
        constants_line(module),
        replayed=True,
    )


def of_constants(
    name: str,
    about: str,
    benchmark: Benchmark,
    mode: str,
    module: str,
    settings: Mapping[str, tuple[Values, ...]],
    shapes: Mapping[str, tuple[Shape, ...]],
    *,
    replayed: bool = False,
    **always: Any,
) -> Knob:
    turns = tuple(f"{module}:{constant.upper()}" for constant in next(iter(settings.values()))[0])
    turn = turning.constants(module, **always)
    return Knob(name, about, benchmark, mode, turns, turn, settings, shapes, constants_line(module), replayed=replayed)


FORWARD, FROZEN, TRAINED = linear_logprobs.FORWARD, linear_logprobs.FROZEN, linear_logprobs.TRAINED
WIDE = LOGITS[CUDA].usual

KNOBS: dict[str, Knob] = {
    knob.name: knob
    for knob in (
        chunk_rows("chunk-rows", linear_logprobs.BENCHMARK, FROZEN, FEW, True),
        implementation(FORWARD, FEW),
        Knob(
            "hopper-tile",
            "the tile of the tiled forward",
            linear_logprobs.BENCHMARK,
            FORWARD,
            (f"{_LOGPROB}.triton_tiled:config_on",),
            turning.tile,
            {CUDA: TILES},
            {CUDA: ONE, **TINY},
            card_line,
        ),
        implementation(FROZEN, FEW),
        Knob(
            "low-memory-tiles",
            "tokens and vocabulary of a tile of low memory",
            linear_logprobs.BENCHMARK,
            FROZEN,
            (f"{_LOGPROB}.tuning:TABLE",),
            turning.planned(implementation=LOW_MEMORY),
            {
                CUDA: grid(rows=(1024, 2048, 4096), columns=(2048, 4096, 8192)),
                CPU: grid(rows=(512, 1024, 2048), columns=(1024, 2048, 4096)),
            },
            {CUDA: ONE, CPU: CPU_LINEAR.usual, **TINY},
            tile_line,
            workspace=LOW,
        ),
        row_pass("logits-forward", "log-softmax of logits", selective.BENCHMARK, selective.FORWARD,
                 f"{_LOGPROB}.triton_rows:FORWARD", {CUDA: WIDE, **TINY_LOGITS}),
        row_pass("linear-pass", "the pass over products with the head", linear_logprobs.BENCHMARK, FROZEN,
                 f"{_LOGPROB}.triton_exp:CUT", {CUDA: ONE, **TINY}),
        row_pass("logits-backward", "the gradient of logits", selective.BENCHMARK, selective.BACKWARD,
                 f"{_LOGPROB}.triton_rows:BACKWARD", {CUDA: WIDE[:1], **TINY_LOGITS}),
        row_pass("linear-pass-forward", "the pass over products with the head, nothing written",
                 linear_logprobs.BENCHMARK, FORWARD, f"{_LOGPROB}.triton_exp:CUT", {CUDA: ONE, **TINY}),
        chunk_rows("chunk-rows-ppo", linear_ppo.BENCHMARK, linear_ppo.FROZEN, ONE, False),
        chunk_rows("chunk-rows-forward", linear_logprobs.BENCHMARK, FORWARD, ONE, False),
        implementation(TRAINED, ONE),
        row_pass("logits-ppo", "PPO's loss from logits", logits_ppo.BENCHMARK, logits_ppo.BACKWARD,
                 f"{_PPO}.triton_logits:CUT", {CUDA: WIDE[:1], **TINY_LOGITS}),
        of_constants("kl-pass", "the KL's pass: columns at once, and warps", linear_kl.BENCHMARK, linear_kl.FROZEN,
                     "onecard_kernels.kl.triton", {CUDA: KL_BLOCKS},
                     {CUDA: ONE, **TINY}),
        chunk_rows("kl-rows", linear_kl.BENCHMARK, linear_kl.FROZEN, ONE, False),
        of_constants("tiled-shares", "rows of a program that puts the tiled forward's shares together",
                     linear_logprobs.BENCHMARK, FORWARD, f"{_LOGPROB}.triton_tiled",
                     {CUDA: grid(combined=(8, 16, 64))}, {CUDA: ONE, **TINY}, implementation=TILED),
        of_constants("gae", "positions at once, and of a thread", gae.BENCHMARK, gae.FORWARD,
                     "onecard_kernels.advantages.triton",
                     {CUDA: GAE_BLOCKS},
                     {CUDA: ROWS[CUDA].usual, **TINY_BATCH}, replayed=True),
        token_pass("ppo-tokens", token_losses.PPO_LOSS),
        token_pass("value-tokens", token_losses.VALUE_LOSS),
        of_constants("ppo-sums", "programs whose sums are added at once", token_losses.PPO_LOSS, token_losses.FORWARD,
                     f"{_PPO}.triton", {CUDA: grid(columns=(64, 128))},
                     {CUDA: TOKENS[CUDA].usual, **TINY_BATCH}, replayed=True),
        of_constants("cpu-blocks", "bytes of an elementwise block of the torch path", linear_logprobs.BENCHMARK,
                     FROZEN, f"{_LOGPROB}.rows",
                     {CPU: grid(block_bytes=tuple(n << 20 for n in (1, 2, 4, 8, 16)))},
                     {CPU: CPU_LINEAR.usual[:1], **TINY}),
    )
}  # fmt: skip


def of_device(device: str, *, dry: bool) -> list[Knob]:
    """The knobs that are there to be turned, in their order."""
    return [knob for knob in KNOBS.values() if dry or (device in knob.settings and device in knob.shapes)]


def settings_of(knob: Knob, device: str, *, dry: bool) -> tuple[Values, ...]:
    """Dry, the first and the last of the GPU's, where there are any: they are what may never have run."""
    if not dry:
        return knob.settings[device]
    found = knob.settings.get(CUDA) or knob.settings[CPU]
    return (found[0], found[-1])[: len(found)]
