"""Whole runs of PPO on a tiny model: what draws, rates, identities and settings do to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.algorithms.ppo.experience import compute_model_outputs
from onecard.config import PPOConfig
from onecard.data import Prompt
from onecard.data.batches import Episode, TokenSequence
from onecard.models.build import load_ppo_roles
from onecard.training.identity import prompts_digest, weights_digest
from onecard.utils.errors import OnecardError

pytestmark = pytest.mark.usefixtures("quick")


def prompts_file(folder: Path, text: str = "the cat") -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{text} {i}"}) + "\n" for i in range(12)))
    return path


def run_ppo(onecard, tmp_path, model, name: str, *more: object) -> list[dict[str, float]]:
    """A few tiny iterations; the rows of metrics.jsonl without the clock's."""
    result = onecard(
        "ppo", "--model", model, "--dataset", prompts_file(tmp_path), "--output_dir", tmp_path / name,
        "--response_length", 6, "--per_device_train_batch_size", 4, "--num_mini_batches", 1, "--num_ppo_epochs", 1,
        "--max_steps", 3, "--test_size", 3, "--overwrite", *more,
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def test_a_reward_that_draws_or_seeds_changes_no_sample(onecard, tmp_path, tiny_model):
    """Each iteration has draws of its own: what a function draws or seeds does not reach into them."""
    (tmp_path / "seeds.py").write_text(
        "import random, numpy, torch\n"
        "def plain(completions): return [0.0 for _ in completions]\n"
        "def seeds(completions):\n"
        "    torch.manual_seed(0); random.seed(0); numpy.random.seed(0)\n"
        "    return [0.0 for _ in completions]\n"
        "def draws(completions):\n"
        "    return [0.0 * (torch.rand(()) + random.random() + numpy.random.rand()).item() for _ in completions]\n"
    )
    entropies = {}
    # Another rank draws more for its new weights; at a rate of 0 the policy is the same.
    for name, rank in (("plain", 16), ("seeds", 16), ("draws", 4)):
        settings = ["--reward_funcs", f"{tmp_path}/seeds.py:{name}", "--learning_rate", 0, "--eval_steps", 1]
        rows = run_ppo(onecard, tmp_path, tiny_model, f"{name}{rank}", *settings, "--lora_r", rank)
        entropies[name, rank] = [row["objective/entropy"] for row in rows if "objective/entropy" in row]
    assert entropies["plain", 16] == entropies["seeds", 16] == entropies["draws", 4]
    assert len(set(entropies["plain", 16])) == 3


def test_no_iteration_is_spent_at_a_warm_up_s_rate_of_zero(onecard, tmp_path, tiny_model):
    """Two iterations of warm-up in four: thirds of the way up, then down, and none of the four at 0."""
    (tmp_path / "mine.py").write_text("def a(completions): return [float(len(t)) for t in completions]\n")
    rows = run_ppo(onecard, tmp_path, tiny_model, "warm", "--reward_funcs", f"{tmp_path}/mine.py:a",
                   "--max_steps", 4, "--warmup_steps", 2, "--learning_rate", 1e-3)  # fmt: skip
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates == pytest.approx([0.5e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_a_critic_that_broke_is_named_in_one_line(tiny_model):
    config = PPOConfig(model=str(tiny_model))
    roles = load_ppo_roles(config)
    roles.heads["value"].bias.data.fill_(float("inf"))
    with pytest.raises(OnecardError, match="the critic's values of sampled answers are not finite"):
        compute_model_outputs(
            roles, [Episode(TokenSequence((5, 6, 7), (False, True, True)), torch.zeros(2), True)], config
        )


def test_an_identity_changes_with_prompts_columns_and_weights(tiny_model, tmp_path):
    prompts = [Prompt("a", (1, 2), {"answer": "x"}), Prompt("b", (3,), {"answer": "y"})]
    first = prompts_digest(prompts)
    assert prompts_digest(list(prompts)) == first
    assert prompts_digest(prompts[::-1]) != first
    assert prompts_digest([prompts[0], replace(prompts[1], columns={"answer": "z"})]) != first
    assert prompts_digest([prompts[0], replace(prompts[1], tokens=(4,))]) != first
    assert prompts_digest([replace(prompts[0], columns={"image": object()})]) == prompts_digest(
        [replace(prompts[0], columns={"image": object()})]
    )
    shutil.copytree(tiny_model, tmp_path / "model")
    before = weights_digest(str(tmp_path / "model"))
    assert before == weights_digest(str(tiny_model))
    weights = load_file(str(tmp_path / "model" / "model.safetensors"))
    digests = {before}
    for changed in weights:  # each alone: a merged adapter may have touched a single kind of layer
        moved = {name: value + 1e-3 * (name == changed) for name, value in weights.items()}
        save_file(moved, str(tmp_path / "model" / "model.safetensors"))
        digests.add(weights_digest(str(tmp_path / "model")))
    assert len(digests) == 1 + len(weights)
    assert weights_digest("some/hub-name") == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adap_kl_horizon": 20}, "adap_kl_horizon: 20, expected at least the 32 responses"),
        ({"kl_coef": 0.0}, "kl_coef: 0, expected above 0 with adap_kl_ctrl"),
    ],
)
def test_an_adaptive_coefficient_that_could_not_adapt_is_refused(settings, message):
    """Below the batch, one error of -0.2 could turn the coefficient's sign within five batches; 0 times all is 0."""
    PPOConfig(adap_kl_ctrl=True).validate()
    with pytest.raises(OnecardError, match=message):
        PPOConfig(adap_kl_ctrl=True, **settings).validate()


def test_the_schedule_steps_once_an_iteration(onecard, tmp_path, tiny_model):
    """Linear to 0 over four iterations, whatever happens in them; evaluations, whose rewards draw too, leave the run's
    draws as they are.
    """
    (tmp_path / "draws.py").write_text(
        "import random, numpy, torch\n"
        "def a(completions):\n"
        "    return [float(torch.rand(())) + random.random() + float(numpy.random.rand()) for _ in completions]\n"
    )
    settings = ["--reward_funcs", f"{tmp_path}/draws.py:a", "--num_mini_batches", 2, "--num_ppo_epochs", 2,
                "--max_steps", 4, "--learning_rate", 1e-3, "--num_generations", 2]  # fmt: skip
    looks = run_ppo(onecard, tmp_path, tiny_model, "looks", *settings, "--eval_steps", 1)
    trained = [row for row in looks if "loss" in row]
    assert trained == [row for row in run_ppo(onecard, tmp_path, tiny_model, "not", *settings) if "loss" in row]
    assert len({row["objective/scores"] for row in trained}) == 4
    assert [row["learning_rate"] for row in trained] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [row["episode"] for row in trained] == [8, 16, 24, 32]
    assert all(row["policy/updates"] == 4 for row in trained)
    assert sum("eval_objective/scores" in row for row in looks) == 5
    assert trained[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
