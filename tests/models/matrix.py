"""Every family of models through every command, and its numbers against plain transformers.

    python tests/models/matrix.py                        # the page on standard output
    python tests/models/matrix.py --write docs/models.md
    python tests/models/matrix.py llama mamba2           # some families

`INTRODUCTION` says what the columns are. The truth is what a user of transformers and PEFT gets: the model loaded by
its Auto class, one text a pass, no cache, evaluation mode. Texts are longer than windows, top-k attention and original
contexts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is not the root that is searched

from onecard import cli, runs
from onecard.batches import TokenSequence, pack, to_device
from onecard.config import DPOConfig, ModelConfig, RewardConfig, SFTConfig
from onecard.data import load_rows, preference_examples, sft_examples
from onecard.errors import OnecardError, nearest
from onecard.models.build import load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import HEAD_WEIGHTS, Roles
from onecard.models.trunk import trunk_of
from onecard.rollout import Sampling, sample_responses
from onecard.startup import check_decoding, check_model
from tests.models.families import CONTEXT, FAMILIES, VIDEO, auto_class, write_model

LENGTHS = (CONTEXT - 6, 11, 40, 23)
PROMPTS = (CONTEXT - 20, 30, 5)
NEW = 10  # tokens behind each prompt
SAME = 1e-4  # nat, or relative to the largest number: float32 over a whole model
WORSE = 1.5  # in bfloat16, how much farther from the truth in float32 than plain transformers' bfloat16 is


def text(length: int, place: int) -> tuple[int, ...]:
    """Tokens that stand for text."""
    generator = torch.Generator().manual_seed(place)
    return tuple(torch.randint(3, VIDEO, (length,), generator=generator).tolist())


def scored(tokens: tuple[int, ...], prompt: int = 1) -> TokenSequence:
    return TokenSequence(tokens, (False,) * prompt + (True,) * (len(tokens) - prompt))


def texts() -> list[TokenSequence]:
    """Of several lengths; the last one goes on from the first one's beginning."""
    found = [text(length, place) for place, length in enumerate(LENGTHS)]
    return [*map(scored, found), scored(found[0][:16] + text(20, 9), 16)]


SHARED = {len(LENGTHS): (0, 16)}  # of `texts`, for `pack`


@dataclass(frozen=True)
class Bench:
    """A family's model folder, its tiny data, and room to write."""

    model: Path
    data: Path
    work: Path

    def folder(self, name: str) -> Path:
        return self.work / name


# --- the truth


def plain(folder: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers and PEFT load it."""
    from peft import PeftModel
    from transformers import AutoConfig

    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype)
    return (PeftModel.from_pretrained(model, str(adapter), is_trainable=True) if adapter else model).eval()


def plain_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def plain_logprobs(model: Any, sequences: Sequence[TokenSequence]) -> Tensor:
    """Of each scored token."""
    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence.tokens)
        logprobs = plain_logits(model, sequence.tokens)[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        found.append(logprobs[torch.tensor(sequence.response_mask[1:])])
    return torch.cat(found)


def plain_hidden(model: Any, tokens: Sequence[int]) -> Tensor:
    """The text decoder's last hidden states, fp32 [n, D]."""
    trunk = trunk_of(model.get_base_model() if hasattr(model, "peft_config") else model)
    return trunk(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0].float()


def plain_scores(model: Any, folder: Path, sequences: Sequence[TokenSequence]) -> Tensor:
    """A reward model's scores: its scalar head on the last token's hidden state."""
    from safetensors.torch import load_file

    head = load_file(str(folder / HEAD_WEIGHTS))
    states = torch.stack([plain_hidden(model, sequence.tokens)[-1] for sequence in sequences])
    return (states @ head["weight"].T + head["bias"]).squeeze(1)


@torch.no_grad()
def plain_greedy(model: Any, prompt: Sequence[int], ends: Sequence[int] = ()) -> list[int]:
    """The likeliest token each time, by whole passes."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


# --- what onecard computes


class Inexact(Exception):
    """A number that differs from plain transformers'."""


def same(what: str, found: Tensor, truth: Tensor) -> None:
    """Equal to float32's rounding over a whole model."""
    largest = max(1.0, float(truth.abs().max()))
    off = float((found - truth).abs().max()) / largest
    if not off <= SAME:
        raise Inexact(f"{what} off by {off:.2g}")


@torch.no_grad()
def shaken(roles: Roles) -> Roles:
    """Adapters and heads away from their start, where half of all gradients are 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.trained_parameters().values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return roles


def adapted(bench: Bench, dtype: str = "float32", **settings: Any) -> tuple[Roles, Path]:
    """A policy with a shaken adapter, checked as a run would check it, and the adapter's folder."""
    roles = shaken(load_roles(SFTConfig(model=str(bench.model), dtype=dtype, **settings), trained="policy"))
    folder = bench.folder(f"adapter-{dtype}-{len(settings)}")
    roles.write("policy", folder)
    with contextlib.redirect_stderr(io.StringIO()):
        check_model(roles, max(LENGTHS), row=sum(LENGTHS))
        check_decoding(roles, max(PROMPTS) + NEW)
    return roles.train(), folder


def laid(roles: Roles) -> Iterator[Tensor]:
    """Log-probs of `texts` as the run lays them: apart, and with a shared prompt where it shares them."""
    for continued in ({}, SHARED) if roles.layout == "packed" else ({},):
        batch = to_device(pack(texts(), continued), roles.device)
        yield roles.logprobs(batch, batch.targets)


def check_logprobs(bench: Bench) -> None:
    for padding_free in (True, False):
        roles, adapter = adapted(bench, padding_free=padding_free)
        with torch.no_grad():
            truth = plain_logprobs(plain(bench.model, adapter), texts())
            for found in laid(roles):
                same(f"{roles.layout}", found, truth)


@torch.no_grad()
def check_bf16(bench: Bench) -> None:
    """No farther from float32 (of the same rounded weights) than plain transformers in bfloat16."""
    roles, adapter = adapted(bench, "bfloat16")
    rounded = plain(bench.model, adapter, torch.bfloat16)
    theirs = plain_logprobs(rounded, texts())
    truth = plain_logprobs(rounded.float(), texts())
    worst = float((theirs - truth).abs().mean())
    for found in laid(roles):
        off = float((found - truth).abs().mean())
        if not off <= WORSE * worst + 1e-3:
            raise Inexact(f"{roles.layout} off by {off:.2g} on average, plain by {worst:.2g}")


def check_gradients(bench: Bench) -> None:
    roles, adapter = adapted(bench)
    judge = plain(bench.model, adapter)
    plain_logprobs(judge, texts()).square().sum().backward()
    truth = {name.replace(".default", ""): p.grad for name, p in judge.named_parameters() if p.grad is not None}
    for found in laid(roles):
        roles.zero_grad()
        found.square().sum().backward()
        trained = {name: p.grad for name, p in roles.trained_parameters().items() if p.grad is not None}
        own = {name.removeprefix("model.").replace(".policy", ""): grad for name, grad in trained.items()}
        if own.keys() != truth.keys():
            raise Inexact(f"gradients of {len(own.keys() ^ truth.keys())} parameters more or fewer")
        scale = max(float(each.norm()) for each in truth.values())
        off = max(float((own[name] - truth[name]).norm()) for name in truth) / scale
        if not off <= SAME:
            raise Inexact(f"gradients off by {off:.2g}")


def check_scores(bench: Bench) -> None:
    roles = shaken(load_roles(RewardConfig(model=str(bench.model)), trained="reward", scalar=True))
    folder = bench.folder("scores")
    roles.write("reward", folder)
    with contextlib.redirect_stderr(io.StringIO()):
        check_model(roles, max(LENGTHS), row=sum(LENGTHS))
    with torch.no_grad():
        batch = to_device(pack(texts()), roles.device)
        same("scores", roles.scores(batch), plain_scores(plain(bench.model, folder), folder, texts()))


def check_greedy(bench: Bench) -> None:
    roles, adapter = adapted(bench)
    prompts = [text(length, 20 + place) for place, length in enumerate(PROMPTS)]
    judge = plain(bench.model, adapter)
    found = sample_responses(roles, prompts, Sampling(NEW, 0.0), ends=(), batch_size=2).responses
    for prompt, response in zip(prompts, found, strict=True):
        if list(response.tokens) != plain_greedy(judge, prompt):
            raise Inexact(f"{roles.decoding}: other tokens")


# --- commands


def onecard(*arguments: object) -> str:
    """Standard output of a command, which ends well or with one line; that line is raised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    lines = [line for line in err.getvalue().splitlines() if line.startswith("onecard: error: ")]
    if code == 2 and len(lines) == 1:
        raise OnecardError(lines[0].removeprefix("onecard: error: "))
    if code:
        raise Inexact(f"exit code {code}")
    return out.getvalue()


def train(bench: Bench, command: str, rows: str, *more: object) -> Path:
    """A run of two steps; its folder."""
    folder = bench.folder(command)
    data = bench.data / rows
    onecard(
        command, "--model", bench.model, "--dataset", data, "--eval_dataset", data, "--max_steps", 2,
        "--per_device_train_batch_size", 2, "--learning_rate", 0.01, "--max_length", CONTEXT, "--output_dir", folder,
        *more,
    )  # fmt: skip
    return folder


def last_row(folder: Path, name: str) -> float:
    """The last value of a metric in a run's log."""
    rows = map(json.loads, (folder / runs.METRICS).read_text().splitlines())
    return [row[name] for row in rows if name in row][-1]


def settings(bench: Bench) -> dict[str, Any]:
    return {"max_length": CONTEXT, "skip_bad_rows": False}


def check_sft(bench: Bench) -> None:
    folder = train(bench, "sft", "texts.jsonl", "--eval_samples", 0)
    tokenizer = load_tokenizer(ModelConfig(model=str(bench.model)))
    rows = load_rows(str(bench.data / "texts.jsonl"), split="train")
    examples = sft_examples(
        rows, tokenizer, completion_only_loss=True, assistant_only_loss=True, **settings(bench)
    ).examples
    with torch.no_grad():
        truth = -plain_logprobs(plain(bench.model, folder / "policy"), examples).mean()
    same("eval_loss", torch.tensor(last_row(folder, "eval_loss")), truth)


def check_dpo(bench: Bench) -> None:
    folder = train(bench, "dpo", "pairs.jsonl", "--eval_samples", 0)
    tokenizer = load_tokenizer(ModelConfig(model=str(bench.model)))
    rows = load_rows(str(bench.data / "pairs.jsonl"), split="train")
    pairs = preference_examples(rows, tokenizer, **settings(bench)).examples
    ratios = []
    with torch.no_grad():
        models = plain(bench.model, folder / "policy"), plain(bench.model)
        for pair in pairs:
            chosen, rejected = (
                plain_logprobs(models[0], [side]).sum() - plain_logprobs(models[1], [side]).sum()
                for side in (pair.chosen, pair.rejected)
            )
            ratios.append(chosen - rejected)
    truth = -torch.nn.functional.logsigmoid(DPOConfig().beta * torch.stack(ratios)).mean()
    same("eval_loss", torch.tensor(last_row(folder, "eval_loss")), truth)


def check_reward(bench: Bench) -> None:
    folder = train(bench, "reward", "pairs.jsonl")
    tokenizer = load_tokenizer(ModelConfig(model=str(bench.model)))
    rows = load_rows(str(bench.data / "pairs.jsonl"), split="train")
    pairs = preference_examples(rows, tokenizer, **settings(bench)).examples
    with torch.no_grad():
        judge = plain(bench.model, folder / "reward")
        chosen, rejected = (
            plain_scores(judge, folder / "reward", [getattr(pair, side) for pair in pairs])
            for side in ("chosen", "rejected")
        )
    truth = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    same("eval_loss", torch.tensor(last_row(folder, "eval_loss")), truth)


def check_ppo(bench: Bench) -> None:
    folder = train(
        bench, "ppo", "pairs.jsonl", "--reward_funcs", "length:8", "--response_length", 12, "--batch_size", 4,
        "--num_ppo_epochs", 1, "--learning_rate", 0.001,
    )  # fmt: skip
    plain(bench.model, folder / "policy")
    rows = map(json.loads, (folder / runs.METRICS).read_text().splitlines())
    first = next(row["eval_objective/kl"] for row in rows if "eval_objective/kl" in row)
    same("objective/kl", torch.tensor(first), torch.tensor(0.0))


def check_generate(bench: Bench) -> None:
    prompt = "the cat sat on"
    out = onecard("generate", "--model", bench.model, "--prompt", prompt, "--max_new_tokens", NEW, "--temperature", 0)
    tokenizer = load_tokenizer(ModelConfig(model=str(bench.model)))
    answer = plain_greedy(plain(bench.model), tokenizer(prompt)["input_ids"], [tokenizer.eos_token_id])
    if out.rstrip("\n") != tokenizer.decode(answer, skip_special_tokens=True).rstrip("\n"):
        raise Inexact("another answer")


def check_merge(bench: Bench) -> None:
    _, adapter = adapted(bench)
    onecard("merge", "--model", adapter, "--output_dir", bench.folder("merged"))
    with torch.no_grad():
        found, truth = (
            plain_logits(model, text(40, 3)) for model in (plain(bench.folder("merged")), plain(bench.model, adapter))
        )
    same("logits", found, truth)


CHECKS: dict[str, Callable[[Bench], None]] = {
    "log-probs": check_logprobs,
    "bf16": check_bf16,
    "gradients": check_gradients,
    "scores": check_scores,
    "greedy": check_greedy,
    "sft": check_sft,
    "dpo": check_dpo,
    "reward": check_reward,
    "ppo": check_ppo,
    "generate": check_generate,
    "merge": check_merge,
}
EXACT, REFUSED = "exact", "refused: "


# --- the table


def write_data(folder: Path) -> None:
    """A few rows for each command, some longer than the window and the original context."""
    folder.mkdir(parents=True)
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "good", "dog", "sat", "on", "the", "cat"]
    rows = [
        {
            "prompt": " ".join(words[: 3 + place]),
            "completion": " " + " ".join(words[place:]),
            "chosen": " a good answer " * (1 + place % 3),
            "rejected": " bad mat",
        }
        for place in range(6)
    ]
    for name, columns in {
        "texts": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected")
    }.items():  # fmt: skip
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Row:
    """A family's cells by column: `exact`, `refused: why`, or what is wrong; and how a run lays and samples it."""

    name: str
    how: str
    cells: dict[str, str]

    @property
    def wrong(self) -> dict[str, str]:
        return {column: cell for column, cell in self.cells.items() if cell != EXACT and not cell.startswith(REFUSED)}


def how_it_runs(bench: Bench) -> str:
    """The layout of batches and the way of sampling that the startup check takes."""
    try:
        roles, _ = adapted(bench)
    except OnecardError:
        return "–"
    return f"{roles.layout}, {roles.decoding}"


def make_row(name: str, columns: Sequence[str] = tuple(CHECKS)) -> Row:
    """All of one family."""
    cells = {}
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(io.StringIO()):
        bench = Bench(Path(work) / "model", Path(work) / "data", Path(work))
        write_model(FAMILIES[name], bench.model)
        write_data(bench.data)
        how = how_it_runs(bench)
        for column in columns:
            try:
                CHECKS[column](bench)
                cells[column] = EXACT
            except OnecardError as error:
                cells[column] = f"{REFUSED}{error}".replace(f"{work}/", "")
            except Inexact as error:
                cells[column] = f"wrong: {error}"
            except Exception as error:  # a traceback is a wrong cell, and the others are still wanted
                cells[column] = f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Row(name, how, cells)


def page(rows: Sequence[Row]) -> str:
    """The table as Markdown; reasons of refusals are listed below it."""
    import peft
    import transformers

    reasons: dict[str, tuple[int, str]] = {}  # reasons that differ in their numbers alone are one
    lines = [
        f"| model | batches, sampling | {' | '.join(CHECKS)} |",
        "|---|---|" + "---|" * len(CHECKS),
    ]
    for row in rows:
        shown = []
        for cell in row.cells.values():
            refused = cell.startswith(REFUSED)
            key = re.sub(r"\d[\d.e-]*", "N", cell)
            shown.append(f"refused {reasons.setdefault(key, (len(reasons) + 1, cell))[0]}" if refused else cell)
        lines.append(f"| {row.name} | {row.how} | {' | '.join(shown)} |")
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    return "\n".join(
        [
            INTRODUCTION.format(count=len(rows), versions=versions),
            *lines,
            "",
            "Refusals:",
            "",
            *(f"{number}. {cell.removeprefix(REFUSED)}" for number, cell in reasons.values()),
            "",
        ]
    )


INTRODUCTION = """# Models

{count} families of causal language models, each as a tiny random model, through every command and
against plain transformers: one text a pass, no cache, evaluation mode. `python tests/models/matrix.py
--write docs/models.md` makes this page ({versions}, on a CPU).

A cell is `exact` or `refused`: then the command ends with exit code 2 and one line that says why, and
nothing is written.

| column | what is equal |
|---|---|
| log-probs | of texts as the run lays them (packed, padded, with a shared prompt), in training mode, with an adapter |
| bf16 | the same in bfloat16: no farther from float32 than plain transformers in bfloat16 |
| gradients | of a loss over these log-probs, by every trained parameter |
| scores | a reward adapter's, read at each text's last token |
| greedy | tokens sampled at temperature 0 from prompts of different lengths in one batch |
| sft, dpo, reward | the exported adapter's loss on held-out rows, as the run logged it |
| ppo | the KL to the reference before the first step, which is 0; the startup checks; the exported adapter loads |
| generate | the text of the greedy answer |
| merge | logits of the merged model, and of the base with the adapter |

`batches, sampling`: what the startup check takes, the fastest that is right. Batches are `packed` (texts
end to end, each with its own attention), `restarted` (the same by transformers' own masks), `padded`, or
`single` (one text a pass). Prompts are sampled in `slots` (a row that ends takes the next prompt), in
`padded` batches, one at a time (`single`), or `uncached` (the whole text again for each token).
"""


def main() -> None:
    """The table of the families that are named, or of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", help="names of tests/models/families.py; none: all of them")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page here instead of to standard output")
    given = parser.parse_args()
    unknown = [name for name in given.families if name not in FAMILIES]
    if unknown:
        parser.error(f"unknown family '{unknown[0]}'.{nearest(unknown[0], FAMILIES)}")
    names = given.families or sorted(FAMILIES)
    rows = []
    for place, name in enumerate(names, start=1):
        rows.append(make_row(name))
        print(f"{place}/{len(names)} {name} {rows[-1].wrong or ''}", file=sys.stderr, flush=True)
    if given.write:
        given.write.write_text(page(rows), encoding="utf-8")
    else:
        print(page(rows))
    sys.exit(1 if any(row.wrong for row in rows) else 0)


if __name__ == "__main__":
    main()
