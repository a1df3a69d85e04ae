"""`onecard demo`: corpus -> tiny model -> SFT -> reward adapter -> DPO, and PPO -> table, samples, report.

Every stage runs the code of its command with the settings below, which its run folder records. Finished stages are not
run again, so a second demo is fast and an interrupted one continues.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from onecard.algorithms import dpo, reward, sft
from onecard.algorithms.ppo import command as ppo
from onecard.commands.demo.corpus import CorpusPaths, flaws, write_corpus
from onecard.commands.demo.tiny import make_tiny_model
from onecard.config import DemoConfig, DPOConfig, ModelConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig
from onecard.data import prompt_examples, prompt_rows
from onecard.models.build import load_frozen_role
from onecard.models.load import load_tokenizer
from onecard.reporting import Sample, Side, Stage, TableRow, read_metrics, write_demo_report
from onecard.rewards.adapter import score
from onecard.rollout import Sampling, generate
from onecard.training import lock, run_folder
from onecard.utils.errors import OnecardError
from onecard.utils.files import recover, write_text
from onecard.utils.progress import console, say

MAX_LENGTH, RESPONSE_LENGTH = 128, 40
LAYOUT = {"padding_free": False}  # on a CPU, padding is faster than packed attention
SHOWN_SAMPLES = 4
ANSWERS_EACH = 4  # responses sampled for each held-out prompt, which reduces the noise of the means
MARKER, MARKER_TEXT = "demo.txt", "This folder belongs to `onecard demo`, which replaces what it wrote here.\n"
STAGES = ("sft", "reward", "dpo", "ppo")
POLICIES = ("sft", "dpo", "ppo")


@dataclass(frozen=True)
class Answers:
    """One model's responses to the held-out prompts, and their rewards."""

    texts: list[str]
    rewards: list[float]

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)


def settings(
    folder: Path, model: Path, corpus: CorpusPaths, seed: int
) -> dict[str, tuple[TrainConfig, Callable[[Any], Path]]]:
    """Stage -> its settings and its command. SFT trains all weights; the other stages train adapters on its result."""
    common: dict[str, Any] = {"max_length": MAX_LENGTH, "seed": seed, "resume": True, "warmup_steps": 0.1, **LAYOUT}
    pairs: dict[str, Any] = {
        "dataset": str(corpus.pairs), "eval_dataset": str(corpus.pairs_eval), "model": str(folder / "sft" / "policy"),
        "lora_r": 32, "lora_alpha": 64, "per_device_train_batch_size": 16,
    }  # fmt: skip
    return {
        "sft": (
            SFTConfig(
                model=str(model), dataset=str(corpus.sft), eval_dataset=str(corpus.sft_eval), use_peft=False,
                output_dir=str(folder / "sft"), learning_rate=3e-3, num_train_epochs=4, per_device_train_batch_size=32,
                eval_steps=94, **common,
            ),
            sft.run,
        ),
        # Without centering, all scores drift together by more than the margins of pairs, and some runs do not recover.
        "reward": (
            RewardConfig(
                output_dir=str(folder / "reward"), learning_rate=1e-3, num_train_epochs=3, eval_steps=250,
                center_rewards_coefficient=0.01, **pairs, **common,
            ),
            reward.run,
        ),
        # beta 2 keeps the policy close to the SFT model, whose answers are nearly deterministic; a smaller beta breaks
        # them.
        "dpo": (
            DPOConfig(
                output_dir=str(folder / "dpo"), learning_rate=3e-4, num_train_epochs=0.4, eval_steps=50, beta=2.0,
                **pairs, **common,
            ),
            dpo.run,
        ),
        # PPO also starts from the SFT model. Its reward model was trained on DPO's pairs; it learns from its samples.
        "ppo": (
            PPOConfig(
                output_dir=str(folder / "ppo"), model=str(folder / "sft" / "policy"), dataset=str(corpus.pairs),
                eval_dataset=str(corpus.prompts), reward_model_path=str(folder / "reward" / "reward"),
                response_length=RESPONSE_LENGTH, lora_r=32, lora_alpha=64, learning_rate=1e-3, max_steps=10,
                eval_steps=5, per_device_train_batch_size=32, num_mini_batches=4, num_ppo_epochs=2, kl_coef=0.05,
                missing_eos_penalty=1.0, cliprange_value=0.0, **common,
            ),
            ppo.run,
        ),
    }  # fmt: skip


def is_done(config: TrainConfig, stage: str) -> bool:
    """Whether the stage is finished. A finished stage with other settings raises `OnecardError`."""
    folder = Path(config.output_dir)
    exported = folder / ("reward" if stage == "reward" else "policy")
    if not (exported.is_dir() and (folder / run_folder.CONFIG).is_file()):
        return False
    run_folder.check_same_settings(config, folder)
    return True


def check_seed(folder: Path, seed: int) -> None:
    """Raise if a finished stage had another seed: a demo of stages with different seeds is not reproducible."""
    for stage in STAGES:
        written = folder / stage / run_folder.CONFIG
        before = run_folder.read_settings(folder / stage).get("seed", seed) if written.is_file() else seed
        if before != seed:
            raise OnecardError(
                f"--seed: {seed} here and {before} in {written}; --fresh starts over, or give another folder."
            )


def answer(model: Path, reward_model: Path, prompts: list[str], seed: int) -> Answers:
    """One sampled response for each prompt, with its score by the reward adapter."""
    tokenizer = load_tokenizer(ModelConfig(model=str(model)))
    policy = load_frozen_role(ModelConfig(model=str(model)), role="policy")
    torch.manual_seed(seed)
    tokenized = prompt_examples(prompt_rows(prompts), tokenizer).examples
    texts = generate(policy, tokenizer, tokenized, Sampling(max_new_tokens=RESPONSE_LENGTH), batch_size=64)
    scorer = load_frozen_role(ModelConfig(model=str(reward_model)), role="reward", head=True)
    rewards = score(scorer, tokenizer, prompts, texts, max_length=MAX_LENGTH, batch_size=64)
    return Answers(texts, rewards)


def last_metric(folder: Path, name: str) -> float:
    """The last logged value of a metric in a run."""
    return [row[name] for row in read_metrics(folder / run_folder.METRICS) if name in row][-1]


def flawless(prompts: list[str], answers: Answers) -> float:
    """Share of answers without a flaw, by the corpus's rules."""
    return sum(not flaws(prompt, text) for prompt, text in zip(prompts, answers.texts, strict=True)) / len(prompts)


def headline(folder: Path, prompts: list[str], answers: dict[str, Answers]) -> list[TableRow]:
    """The rows of the results table, in the order of the stages."""
    first, last = (
        read_metrics(folder / "sft" / run_folder.METRICS)[0]["eval_loss"],
        last_metric(folder / "sft", "eval_loss"),
    )
    accuracy, margin = (last_metric(folder / "dpo", f"eval_rewards/{name}") for name in ("accuracies", "margins"))
    judged = last_metric(folder / "reward", "eval_accuracy")
    kl = last_metric(folder / "ppo", "eval_objective/kl")

    def change(stage: str) -> str:
        return f"{answers['sft'].mean_reward:.2f} -> {answers[stage].mean_reward:.2f}"

    def shares(stage: str) -> str:
        return f"{flawless(prompts, answers['sft']):.0%} -> {flawless(prompts, answers[stage]):.0%}"

    rows = [
        TableRow("SFT", "held-out loss", f"{first:.2f} -> {last:.2f}", "nats per token of answers it has not seen"),
        TableRow("Reward", "held-out accuracy", f"{judged:.3f}", "pairs whose better answer scores higher"),
        TableRow("DPO", "held-out accuracy", f"{accuracy:.3f}", "pairs whose better answer gains more"),
        TableRow("DPO", "held-out margin", f"{margin:.2f}", "and by how many nats, times beta"),
        TableRow("PPO", "KL to SFT", f"{kl:.2f}", "nats per answer that it has moved"),
    ]
    for stage in ("dpo", "ppo"):
        rows += [
            TableRow(stage.upper(), "mean reward", change(stage), "sampled answers, by the reward adapter"),
            TableRow(
                stage.upper(), "without a flaw", shares(stage), "sampled answers, by rules that no model has seen"
            ),
        ]
    return sorted(rows, key=lambda row: ("SFT", "Reward", "DPO", "PPO").index(row.stage))


def show(rows: list[TableRow], samples: list[Sample]) -> None:
    """Print the results table and the samples."""
    table = Table(title="onecard demo")
    for column in ("stage", "metric", "value", "meaning"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        table.add_row(row.stage, row.metric, row.value, row.meaning)
    console.print(table)
    answers = Table(title="answers before and after (reward)", show_lines=True)
    answers.add_column("prompt", ratio=2)
    for side in samples[0].sides:
        answers.add_column(side.name, ratio=2)
    for sample in samples:
        answers.add_row(sample.prompt, *(f"{side.text.strip()} ({side.reward:.1f})" for side in sample.sides))
    console.print(answers, markup=False)


def run(config: DemoConfig) -> Path:
    """`onecard demo`. Returns the path of its report."""
    folder = Path(config.output_dir)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OnecardError(f"output_dir: {folder} is a file, expected a folder or a new name.")
    marker = folder / MARKER
    recover(marker)
    if not (marker.is_file() and marker.read_bytes() == MARKER_TEXT.encode()):
        if folder.exists() and any(path.name != lock.LOCK for path in folder.iterdir()):
            raise OnecardError(f"output_dir: {folder} holds other things than a demo; give an empty or a new folder.")
        lock.check_unlocked(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with lock.lock_folder(folder):
        write_text(marker, MARKER_TEXT)
        return run_stages(folder, config)


def run_stages(folder: Path, config: DemoConfig) -> Path:
    """Run all stages of the demo in its folder. With `fresh`, stages replace their earlier results."""
    began = time.perf_counter()
    if not config.fresh:
        check_seed(folder, config.seed)
    corpus = write_corpus(folder / "data", config.seed)
    rows = [json.loads(line) for file in (corpus.sft, corpus.pairs) for line in file.read_text().splitlines()]
    model = make_tiny_model(folder / "model", [text for row in rows for text in row.values()], config.seed)
    stages = settings(folder, model, corpus, config.seed)
    for stage, (stage_config, command) in stages.items():
        if config.fresh:
            stage_config = replace(stage_config, resume=False, overwrite=True)
        elif is_done(stage_config, stage):
            say(f"{stage}: done already in {stage_config.output_dir} (onecard demo --fresh starts over).")
            continue
        say(f"\n{stage}: {stage_config.dataset}")
        command(stage_config)
    prompts = ANSWERS_EACH * [json.loads(line)["prompt"] for line in corpus.prompts.read_text().splitlines()]
    scorer = folder / "reward" / "reward"
    answers = {stage: answer(folder / stage / "policy", scorer, prompts, config.seed) for stage in POLICIES}
    samples = [
        Sample(
            prompt,
            tuple(
                Side(stage.upper(), answers[stage].texts[index], answers[stage].rewards[index]) for stage in POLICIES
            ),
        )
        for index, prompt in enumerate(prompts[:SHOWN_SAMPLES])
    ]
    table = headline(folder, prompts, answers)
    report = write_demo_report(folder, [Stage(stage, folder / stage) for stage in STAGES], table, samples)
    show(table, samples)
    say(f"report: {report}    plots: {folder / 'plots'}    time: {time.perf_counter() - began:.0f} s")
    say(f"try: onecard generate --model {folder / 'ppo' / 'policy'} --prompt {prompts[-1]!r} --num_generations 3")
    return report
