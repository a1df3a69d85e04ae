"""A PPO run that was stopped goes on as if it had not been: the same weights and metrics, bit for bit.

Run as a script (by the last test), this file is the parent of 20 runs that are killed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onecard import reporting
from onecard.algorithms.ppo.job import PPO
from onecard.algorithms.ppo.sampling import Sampler
from onecard.commands import cli
from onecard.models.roles import Roles
from onecard.rollout import sampler
from onecard.training import checkpoint, run_folder
from onecard.training.trainer import Trainer
from onecard.utils import files
from tests.e2e.ppo_material import STOPS, WORDS, no_report, run_command, write_rows
from tests.grid import grid

pytestmark = pytest.mark.usefixtures("quick")

STEPS = 6
REWARD = """
def score(completions, **kwargs):
    return [len(set(text)) / 10 for text in completions]

def cost(completion_ids):
    return [len(ids) / 5 for ids in completion_ids]
"""
STOP_TOKENS = [word for letter in STOPS for word in ("--stop_token", letter)]  # answers end at every length


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with 17 prompts (the stream wraps around in the middle of an iteration), a function and a reward."""
    folder = tmp_path_factory.mktemp("material")
    prompts = [f"the {WORDS[i % 6]} {'sat on ' * (i % 4)}{i}" for i in range(17)]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    answers = {"chosen": " good answer", "rejected": " bad mat"}
    write_rows(folder / "pairs.jsonl", [{"prompt": prompt, **answers} for prompt in prompts])
    (folder / "good.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "write_run_report", no_report)
        small = ["--max_steps", 4, "--learning_rate", 1e-2, "--test_size", 4, "--output_dir", folder / "rm"]
        run_command("reward", "--model", tiny_model, "--dataset", folder / "pairs.jsonl", *small)
    return folder


def arguments(model: Path, material: Path, folder: Path, *more: object) -> list[str]:
    """Iterations of 4 responses, each with 4 updates; 13 prompts to train on and 4 held out."""
    settings: list[object] = ["--model", model, "--dataset", material / "prompts.jsonl", "--output_dir", folder]
    settings += ["--reward_funcs", f"{material / 'good.py'}:score", "--test_size", 4, "--per_device_train_batch_size"]
    settings += [2, "--num_mini_batches", 2, "--num_ppo_epochs", 2, "--response_length", 10, "--max_steps", STEPS]
    settings += ["--save_steps", 2, "--eval_steps", 3, "--logging_steps", 3, "--learning_rate", 1e-2]
    settings += ["--lr_scheduler_type", "cosine", "--warmup_steps", 2, *STOP_TOKENS, *more]
    return ["ppo", *map(str, settings)]


def stop_in_update(patch: pytest.MonkeyPatch, step: int, update: int) -> None:
    """Interrupt iteration `step` before its update `update` (both counted from 0), gradients being there."""
    whole = Trainer.optimizer_step
    seen: Counter[int] = Counter()

    def interrupted(self):
        seen[self.step] += 1
        if (self.step, seen[self.step]) == (step, update + 1):
            raise KeyboardInterrupt
        whole(self)

    patch.setattr(Trainer, "optimizer_step", interrupted)


def stop_in_sampling(patch: pytest.MonkeyPatch, step: int, draws: int) -> None:
    """Interrupt the sampling of iteration `step` after so many draws."""
    whole_step, whole_draw = PPO.step, sampler.sample_token
    left: list[int] = []

    def stepping(self, trainer, indices, bar):
        left[:] = [draws] if trainer.step == step else []
        return whole_step(self, trainer, indices, bar)

    def drawing(*words):
        if left and left[0] == 0:
            raise KeyboardInterrupt
        left[:] = [count - 1 for count in left]
        return whole_draw(*words)

    patch.setattr(PPO, "step", stepping)
    patch.setattr(sampler, "sample_token", drawing)


def same(first: Any, second: Any) -> bool:
    """Whether two nested records hold the same numbers, bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights below a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{k}": v for file in files for k, v in load_file(str(file)).items()}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a file without what the clock and the machine put into them."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in found]


POLICY = {"policy/adapter_model.safetensors"}
HEAD = {"value/head.safetensors"}
BOTH = {"value/adapter_model.safetensors", *POLICY, *HEAD}


def assert_same_run(first: Path, second: Path, last: int, saved: set[str] = BOTH) -> None:
    """Policy, the trained roles of the last checkpoint (in the files `saved`), optimizer, metrics and samples."""
    for part in ("policy", f"checkpoint-{last}"):
        assert same(tensors(first / part), tensors(second / part)), part
    assert saved == {name.split(":")[0] for name in tensors(first / f"checkpoint-{last}")}
    states = [
        torch.load(run / f"checkpoint-{last}" / checkpoint.TRAINING, weights_only=True) for run in (first, second)
    ]
    for state in states:
        del state["random"]["python"]  # of the whole test process
    assert same(*states)
    assert rows(first, "metrics.jsonl") == rows(second, "metrics.jsonl")
    assert rows(first, "samples.jsonl") == rows(second, "samples.jsonl")
    assert (first / "policy" / "adapter_config.json").read_bytes() == (
        second / "policy" / "adapter_config.json"
    ).read_bytes()
    assert not list(first.glob(".*"))  # nothing half-written is left


ADAPTIVE = ("--adap_kl_ctrl", "--adap_kl_target", 0.05, "--adap_kl_horizon", 20)
LAGRANGIAN = ("--constraint_funcs", "{material}/good.py:cost", "--constraint_mode", "lagrangian")
VARIANTS: dict[str, tuple[set[str], tuple[object, ...]]] = {
    "LoRA": (BOTH, ()),
    "lagrangian, adaptive KL, 8-bit AdamW": (BOTH, (*LAGRANGIAN, *ADAPTIVE, "--optim", "adamw_8bit", "--lora_r", 64)),
    "4-bit base, checkpointing, paged 8-bit AdamW": (
        BOTH, ("--load_in_4bit", "--gradient_checkpointing", "--optim", "paged_adamw_8bit", "--lora_r", 64),
    ),
    "reward adapter, normalised": (
        BOTH, ("--reward_model_path", "{material}/rm/reward", "--normalize_reward", "--value_init", "zero"),
    ),
    "shared critic, returns that go on": (POLICY | HEAD, ("--critic", "shared", "--bootstrap_truncated")),
    "rloo, early stop": (
        POLICY, ("--advantage_estimator", "rloo", "--num_generations", 2, "--target_kl", 0.02),
    ),
}  # fmt: skip


# test_kills.py has plain LoRA
@pytest.mark.parametrize("variant", grid(VARIANTS, VARIANTS.keys() - {"LoRA"}))
def test_interrupted_twice_and_resumed_equals_uninterrupted(
    onecard, monkeypatch, tmp_path, tiny_model, material, variant
):
    """Once between an iteration's updates, then in the middle of an answer."""
    saved, words = VARIANTS[variant]
    more = [str(word).replace("{material}", str(material)) for word in words]
    whole = onecard(*arguments(tiny_model, material, tmp_path / "whole", *more))
    assert whole.code == 0, whole.err
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        update = 0 if "--target_kl" in more else 2
        stop_in_update(patch, 3, update)
        assert onecard(*arguments(tiny_model, material, run, *more)).code == 130
    assert [folder.name for folder in checkpoint.checkpoint_folders(run)] == ["checkpoint-2"]
    with monkeypatch.context() as patch:
        stop_in_sampling(patch, 5, 3)
        stopped = onecard(*arguments(tiny_model, material, run, *more, "--resume"))
        assert stopped.code == 130, stopped.err
        assert "checkpoint-2" in stopped.err
    assert [folder.name for folder in checkpoint.checkpoint_folders(run)] == ["checkpoint-4", "checkpoint-2"]
    resumed = onecard(*arguments(tiny_model, material, run, *more, "--resume"))
    assert resumed.code == 0, resumed.err
    assert "checkpoint-4" in resumed.err
    assert_same_run(run, tmp_path / "whole", STEPS, saved)
    logged = rows(run, "metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 3, 3, 6, 6]
    if "--adap_kl_ctrl" in more:
        assert len({row["objective/kl_coef"] for row in logged if "loss" in row} | {0.05}) == 3  # it did adapt
    if "lagrangian" in more:
        assert len({row["constraint/lambda"] for row in logged if "loss" in row} | {1.0}) == 3
    if "--normalize_reward" in more:
        assert logged[0]["eval_rewards/score/mean"] != pytest.approx(logged[0]["eval_objective/scores"], rel=0.1)
    if "--target_kl" in more:
        assert any(row["policy/updates"] < 4 for row in logged if "loss" in row)  # it did stop early


def test_resuming_a_finished_run_changes_nothing(onecard, monkeypatch, tmp_path, tiny_model, material):
    words = arguments(tiny_model, material, tmp_path / "run", "--max_steps", 2)
    assert onecard(*words).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert onecard(*words, "--resume").code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# ------------------------------------------------------------------------------------------------------- 20 real kills

KILLS, LEAST, KILLED_STEPS = 20, 5, 24
PHASES = ("rollout", "training", "saving")


@pytest.mark.grid  # `make test` has the kills of test_kills.py
def test_killed_20_times_equals_uninterrupted(tmp_path, tiny_model, material):
    """Real SIGKILLs at random moments, at least 5 each while it samples, learns, and writes a checkpoint."""
    more = ["--max_steps", KILLED_STEPS, "--save_steps", 1, "--eval_steps", 8, "--num_generations", 2]
    more += ["--adap_kl_ctrl", "--adap_kl_target", 0.05, "--adap_kl_horizon", 20]
    runs = {name: arguments(tiny_model, material, tmp_path / name, *more) for name in ("whole", "killed")}
    (tmp_path / "plan.json").write_text(json.dumps({**runs, "folder": str(tmp_path), "seed": 7}))
    began = time.monotonic()
    parent = subprocess.run(
        [sys.executable, "-m", "tests.e2e.test_ppo_resume", str(tmp_path / "plan.json")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert parent.returncode == 0, parent.stdout + parent.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    counts = Counter(kill["phase"] for kill in found)
    print(f"{time.monotonic() - began:.0f} s:", dict(counts), "at checkpoints", [kill["checkpoint"] for kill in found])
    assert len(found) >= KILLS
    assert all(kill["signal"] == signal.SIGKILL for kill in found)
    assert all(counts[phase] >= LEAST for phase in PHASES), counts
    # A checkpoint cut in the middle: a temporary folder with some of its files, and no manifest, which comes last.
    assert any(kill["left"] and checkpoint.MANIFEST not in kill["left"] for kill in found)
    assert len({kill["checkpoint"] for kill in found}) >= 5  # the kills are spread over the run
    assert_same_run(tmp_path / "killed", tmp_path / "whole", KILLED_STEPS)
    assert [row["step"] for row in rows(tmp_path / "killed", "samples.jsonl")] == [0] * 4 + [8] * 4 + [16] * 4 + [
        24
    ] * 4


def told(tell: Callable[[str], None], owner: Any, name: str, phase: str, after: str | None) -> None:
    """Have a function say which phase it begins, and `after` when it is done."""
    whole = getattr(owner, name)

    def telling(*words: Any, **keywords: Any) -> Any:
        tell(phase)
        found = whole(*words, **keywords)
        if after is not None:
            tell(after)
        return found

    setattr(owner, name, telling)


def slowed(owner: Any, name: str, seconds: float) -> None:
    """Have a function wait before each call."""
    whole = getattr(owner, name)

    def slow(*words: Any, **keywords: Any) -> Any:
        time.sleep(seconds)
        return whole(*words, **keywords)

    setattr(owner, name, slow)


def child(words: list[str], pipe: int, log: Path) -> None:
    """One run in a process of its own, which says on the pipe what it is at. Never returns."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        inside = [False]

        def tell(phase: str) -> None:
            # Answers to the startup check and to held-out prompts are sampled too; they are not a rollout.
            if phase != "rollout" or inside[0]:
                os.write(pipe, f"{phase}\n".encode())

        whole = PPO.step

        def stepping(*words: Any) -> Any:
            inside[0] = True
            row = whole(*words)
            inside[0] = False
            tell("between")
            return row

        PPO.step = stepping
        told(tell, Sampler, "sample", "rollout", "between")
        # "training" goes on through the gradients of the next update, to the last update.
        told(tell, Trainer, "optimizer_step", "training", None)
        told(tell, checkpoint, "write_checkpoint", "saving", "between")
        # A disk that is as slow as real ones, so that a kill may fall between two files.
        slowed(Roles, "write", 0.01)
        slowed(checkpoint, "digest", 0.004)
        slowed(files, "fsync", 0.002)
        reporting.write_run_report = no_report
        cli.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def start(words: list[str], log: Path) -> tuple[int, int]:
    """A child's process id, and the end of the pipe that it is heard at."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        child(words, writing, log)
    os.close(writing)
    return process, reading


def heard(pipe: int, phase: str, times: int) -> list[str]:
    """What a child said until it began `phase` for the nth time, or ended."""
    said: list[str] = []
    while said.count(phase) < times:
        words = os.read(pipe, 1 << 16).decode().split()
        if not words:
            raise RuntimeError(f"the run ended before it could be killed; it said {said[-5:]}")
        said += words
    return said


def kill_runs(plan: dict[str, Any]) -> None:
    """The whole run; then the other, killed and gone on with, and at last left alone."""
    for name in ("bitsandbytes", "peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)  # what the children would import one after another

    folder, log = Path(plan["folder"]), Path(plan["folder"]) / "log.txt"
    random_moments = random.Random(plan["seed"])
    process, pipe = start(plan["whole"], log)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, log.read_text()
    os.close(pipe)
    counts: Counter[str] = Counter()
    kills = []
    while len(kills) < KILLS or min(counts[phase] for phase in PHASES) < LEAST:
        info = run_folder.read_info(folder / "killed")
        found, _ = checkpoint.newest_checkpoint(folder / "killed", info.id) if info else (None, ())
        step = found.step if found else 0
        fewest = min(counts[phase] for phase in PHASES)
        wanted = random_moments.choice([phase for phase in PHASES if counts[phase] == fewest])
        # In this iteration, or one or two further on: the kills are spread over the run, and do not reach its end.
        behind = step < min(len(kills), KILLS) * (KILLED_STEPS - 8) / KILLS
        times = random_moments.choice([2, 3]) if behind else 1
        times = random_moments.randint(1, 4) + 4 * (times - 1) if wanted == "training" else times
        longest = {"rollout": 0.015, "training": 0.008, "saving": 0.12}[wanted]
        process, pipe = start([*plan["killed"], "--resume"], log)
        said = heard(pipe, wanted, times)
        time.sleep(random_moments.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        while words := os.read(pipe, 1 << 16).decode().split():  # what it said before the kill came
            said += words
        os.close(pipe)
        temporary = list((folder / "killed").glob(".checkpoint-*.tmp"))
        inside = sorted(path.name for place in temporary for path in place.rglob("*") if path.is_file())
        kills.append(
            {"phase": said[-1], "wanted": wanted, "signal": os.WTERMSIG(status), "left": inside,
             "checkpoint": step}
        )  # fmt: skip
        counts[said[-1]] += 1
    process, pipe = start([*plan["killed"], "--resume"], log)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, log.read_text()
    (folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    kill_runs(json.loads(Path(sys.argv[1]).read_text()))
