"""What onecard computes of a family, by its own functions and by its commands, against `plain`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from onecard import reporting
from onecard.commands import cli
from onecard.config import DPOConfig, ModelConfig, RewardConfig, SFTConfig
from onecard.data import load_rows, preference_examples, sft_examples
from onecard.data.batches import pack, to_device
from onecard.models.build import load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Sampling, sample_responses
from onecard.training import run_folder
from onecard.training.startup import check_decoding, check_model
from onecard.utils.errors import OnecardError
from tests.models.families import CONTEXT
from tests.models.plain import (
    LENGTHS,
    NEW,
    PROMPTS,
    SHARED,
    plain,
    plain_greedy,
    plain_logits,
    plain_logprobs,
    plain_scores,
    text,
    texts,
)  # fmt: skip

SAME = 1e-4  # nat, or relative to the largest number: float32 over a whole model
WORSE = 1.5  # in bfloat16, how much farther from the truth in float32 than plain transformers' bfloat16 is


@dataclass(frozen=True)
class Bench:
    """A family's model folder, its tiny data, and room to write."""

    model: Path
    data: Path
    work: Path

    def folder(self, name: str) -> Path:
        return self.work / name


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
    scorer = plain(bench.model, adapter)
    plain_logprobs(scorer, texts()).square().sum().backward()
    truth = {name.replace(".default", ""): p.grad for name, p in scorer.named_parameters() if p.grad is not None}
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
    scorer = plain(bench.model, adapter)
    found = sample_responses(roles, prompts, Sampling(NEW, 0.0), stop_tokens=(), batch_size=2).responses
    for prompt, response in zip(prompts, found, strict=True):
        if list(response.tokens) != plain_greedy(scorer, prompt):
            raise Inexact(f"{roles.decoding}: other tokens")


# --- commands


def onecard(*arguments: object) -> str:
    """Run a command and return its standard output. Its one line of error is raised. No report is drawn."""
    out, err = io.StringIO(), io.StringIO()
    drawn = mock.patch.object(reporting, "write_run_report", lambda folder: folder)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), drawn:
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
    rows = map(json.loads, (folder / run_folder.METRICS).read_text().splitlines())
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
        scorer = plain(bench.model, folder / "reward")
        chosen, rejected = (
            plain_scores(scorer, folder / "reward", [getattr(pair, side) for pair in pairs])
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
    rows = map(json.loads, (folder / run_folder.METRICS).read_text().splitlines())
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
