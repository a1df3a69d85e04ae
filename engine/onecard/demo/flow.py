"""`onecard demo`: corpus -> tiny model -> SFT -> reward adapter -> DPO -> table, samples, report.

Every stage is the same code as its command, run with the settings below; the run folders say which. A stage that is
done already is taken as it is, so a second demo is quick and an interrupted one goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from onecard import runs
from onecard.algorithms import dpo, reward, sft
from onecard.checkpoint import write_text
from onecard.config import DemoConfig, DPOConfig, ModelConfig, RewardConfig, SFTConfig, TrainConfig
from onecard.data import prompt_examples, prompt_rows
from onecard.demo.corpus import CorpusPaths, flaws, write_corpus
from onecard.demo.tiny import make_tiny_model
from onecard.errors import OnecardError
from onecard.metrics import console, say
from onecard.models.build import load_player
from onecard.models.load import load_tokenizer
from onecard.report import Sample, Stage, TableRow, read_metrics, write_demo_report
from onecard.rewards.adapter import score
from onecard.rollout import Sampling, generate

MAX_LENGTH = 128
LAYOUT = {"padding_free": False}  # on a CPU, attention over a block mask costs more than a little padding
SHOWN_SAMPLES = 4
ANSWERS_EACH = 4  # answers sampled to each held-out prompt, for means with less noise
MARKER = "demo.txt"
STAGES = ("sft", "reward", "dpo")


@dataclass(frozen=True)
class Answers:
    """What one model says to the held-out prompts, with its rewards."""

    texts: list[str]
    rewards: list[float]

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)


def settings(
    folder: Path, model: Path, corpus: CorpusPaths, seed: int
) -> dict[str, tuple[TrainConfig, Callable[[Any], Path]]]:
    """Stage -> its settings and the command that runs it. SFT trains all weights, reward and DPO an adapter on them."""
    common: dict[str, Any] = {"max_length": MAX_LENGTH, "seed": seed, "resume": True, "warmup_steps": 0.1, **LAYOUT}
    pairs: dict[str, Any] = {
        "dataset": str(corpus.pairs), "eval_dataset": str(corpus.pairs_eval), "model": str(folder / "sft" / "policy"),
        "lora_r": 32, "lora_alpha": 64, "per_device_train_batch_size": 16,
    }  # fmt: skip
    return {
        "sft": (
            SFTConfig(
                model=str(model), dataset=str(corpus.sft), eval_dataset=str(corpus.sft_eval), use_peft=False,
                output_dir=str(folder / "sft"), learning_rate=3e-3, num_train_epochs=5, per_device_train_batch_size=32,
                eval_steps=94, **common,
            ),
            sft.run,
        ),
        "reward": (
            RewardConfig(
                output_dir=str(folder / "reward"), learning_rate=1.5e-3, num_train_epochs=4, eval_steps=250,
                **pairs, **common,
            ),
            reward.run,
        ),
        # A beta of 2 keeps close to the SFT model: its answers are nearly deterministic, and a looser pull breaks them.
        "dpo": (
            DPOConfig(
                output_dir=str(folder / "dpo"), learning_rate=3e-4, num_train_epochs=0.5, eval_steps=25, beta=2.0,
                **pairs, **common,
            ),
            dpo.run,
        ),
    }  # fmt: skip


def is_done(config: TrainConfig, stage: str) -> bool:
    """Whether the stage has been run to its end under these settings."""
    folder = Path(config.output_dir)
    exported = folder / ("reward" if stage == "reward" else "policy")
    if not (exported.is_dir() and (folder / runs.CONFIG).is_file()):
        return False
    runs.check_same_settings(config, folder)
    return True


def check_seed(folder: Path, seed: int) -> None:
    """A demo goes on with the seed it began with: a mixture of two would be neither."""
    for stage in STAGES:
        written = folder / stage / runs.CONFIG
        before = runs.read_settings(folder / stage).get("seed", seed) if written.is_file() else seed
        if before != seed:
            raise OnecardError(
                f"--seed: {seed} here and {before} in {written}; --fresh starts over, or give another folder."
            )


def answer(model: Path, reward_model: Path, prompts: list[str], seed: int) -> Answers:
    """One sampled response to each prompt, scored by the reward adapter."""
    tokenizer = load_tokenizer(ModelConfig(model=str(model)))
    policy = load_player(ModelConfig(model=str(model)), role="policy")
    torch.manual_seed(seed)
    tokenized = prompt_examples(prompt_rows(prompts), tokenizer).examples
    texts = generate(policy, tokenizer, tokenized, Sampling(max_new_tokens=48), batch_size=64)
    judge = load_player(ModelConfig(model=str(reward_model)), role="reward", head=True)
    rewards = score(judge, tokenizer, prompts, texts, max_length=MAX_LENGTH, batch_size=64)
    return Answers(texts, rewards)


def last_metric(folder: Path, name: str) -> float:
    """The newest value of a metric in a run."""
    return [row[name] for row in read_metrics(folder / runs.METRICS) if name in row][-1]


def flawless(prompts: list[str], answers: Answers) -> float:
    """Share of answers with nothing wrong, by rules that no model has seen."""
    return sum(not flaws(prompt, text) for prompt, text in zip(prompts, answers.texts, strict=True)) / len(prompts)


def headline(folder: Path, prompts: list[str], before: Answers, after: Answers) -> list[TableRow]:
    """What the demo came to, in the order of its stages."""
    first, last = (
        read_metrics(folder / "sft" / runs.METRICS)[0]["eval_loss"],
        last_metric(folder / "sft", "eval_loss"),
    )
    accuracy, margin = (last_metric(folder / "dpo", f"eval_rewards/{name}") for name in ("accuracies", "margins"))
    judged = last_metric(folder / "reward", "eval_accuracy")
    rewards = f"{before.mean_reward:.2f} -> {after.mean_reward:.2f}"
    shares = f"{flawless(prompts, before):.0%} -> {flawless(prompts, after):.0%}"
    return [
        TableRow("SFT", "held-out loss", f"{first:.2f} -> {last:.2f}", "nats per token of answers it has not seen"),
        TableRow("Reward", "held-out accuracy", f"{judged:.3f}", "pairs whose better answer scores higher"),
        TableRow("DPO", "held-out accuracy", f"{accuracy:.3f}", "pairs whose better answer gains more"),
        TableRow("DPO", "held-out margin", f"{margin:.2f}", "and by how many nats, times beta"),
        TableRow("DPO", "mean reward", rewards, "sampled answers, by the reward adapter"),
        TableRow("DPO", "without a flaw", shares, "sampled answers, by rules that no model has seen"),
    ]


def show(rows: list[TableRow], samples: list[Sample]) -> None:
    """Table and samples in the terminal."""
    table = Table(title="onecard demo")
    for column in ("stage", "metric", "value", "meaning"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        table.add_row(row.stage, row.metric, row.value, row.meaning)
    console.print(table)
    answers = Table(title="before and after DPO (reward)", show_lines=True)
    for column in ("prompt", "SFT", "SFT + DPO"):
        answers.add_column(column, ratio=2)
    for sample in samples:
        answers.add_row(
            sample.prompt,
            f"{sample.before.strip()} ({sample.reward_before:.1f})",
            f"{sample.after.strip()} ({sample.reward_after:.1f})",
        )
    console.print(answers, markup=False)


def run(config: DemoConfig) -> Path:
    """`onecard demo`. Returns the path of its report."""
    began = time.perf_counter()
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise OnecardError(f"output_dir: {folder} is a file, expected a folder or a new name.")
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()) and not marker.is_file():
        raise OnecardError(f"output_dir: {folder} holds other things than a demo; give an empty or a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, "This folder belongs to `onecard demo`, which replaces what is in it.\n")
    if config.fresh:
        for name in ("data", "model", *STAGES):
            shutil.rmtree(folder / name, ignore_errors=True)
    check_seed(folder, config.seed)
    corpus = write_corpus(folder / "data", config.seed)
    rows = [json.loads(line) for file in (corpus.sft, corpus.pairs) for line in file.read_text().splitlines()]
    model = make_tiny_model(folder / "model", [text for row in rows for text in row.values()], config.seed)
    stages = settings(folder, model, corpus, config.seed)
    for stage, (stage_config, command) in stages.items():
        if is_done(stage_config, stage):
            say(f"{stage}: done already in {stage_config.output_dir} (onecard demo --fresh starts over).")
        else:
            say(f"\n{stage}: {stage_config.dataset}")
            command(stage_config)
    prompts = ANSWERS_EACH * [json.loads(line)["prompt"] for line in corpus.prompts.read_text().splitlines()]
    judge = folder / "reward" / "reward"
    before, after = (answer(folder / stage / "policy", judge, prompts, config.seed) for stage in ("sft", "dpo"))
    samples = [
        Sample(*texts) for texts in zip(prompts, before.texts, after.texts, before.rewards, after.rewards, strict=True)
    ][:SHOWN_SAMPLES]
    table = headline(folder, prompts, before, after)
    show(table, samples)
    report = write_demo_report(folder, [Stage(stage, folder / stage) for stage in STAGES], table, samples)
    say(f"report: {report}    plots: {folder / 'plots'}    time: {time.perf_counter() - began:.0f} s")
    say(f"try: onecard generate --model {folder / 'dpo' / 'policy'} --prompt {prompts[-1]!r} --num_generations 3")
    return report
