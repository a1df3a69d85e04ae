"""A prompt laid once for all its answers: the same loss, metrics and gradient, from fewer rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.algorithms import dpo
from onecard.algorithms.common import Recipe
from onecard.algorithms.dpo import losses
from onecard.algorithms.dpo.losses import pair_ref_logps
from onecard.algorithms.reward import command as reward_command
from onecard.algorithms.reward.kinds import collate, collate_shared, example_size, reward_loss
from onecard.config import DPOConfig, RewardConfig
from onecard.data.batches import (
    MIN_SHARED_TOKENS,
    PreferencePair,
    Ranking,
    ScoredSequence,
    TokenSequence,
    pack_pairs,
    size_when_sharing,
)
from onecard.models.build import load_roles
from onecard.models.micro_batching import MicroBatchSize, forward_budget
from onecard.models.roles import Roles
from onecard.training.metrics import sum_metrics
from onecard.training.trainer import Objective, accumulate, micro_batches
from onecard.utils.errors import OnecardError
from onecard.utils.progress import progress
from tests.engine.attention_material import answer, distance, pair
from tests.engine.dpo_material import load, moved

pytestmark = pytest.mark.usefixtures("quick")

ROUNDING = 2e-6
LONG = list(range(30, 60))
PAIRS = [
    pair(LONG, [5, 6, 7], [8, 9, 2]),
    pair(LONG[:20], [9, 8, 7, 6], [8, 9]),
    pair(LONG[:3], [5, 6, 7], [8, 9]),  # not worth it
    pair(LONG[4:], [5], [5, 6, 7, 8, 9, 10]),
]
SHARED = 30 + 20 + 26


@pytest.fixture(scope="module")
def fresh(tiny_model):
    """A policy away from its reference."""
    return moved(load(tiny_model))


def learned(
    roles: Any, objective: Objective[Any, Any], examples: list[Any], cut: MicroBatchSize | None = None
) -> tuple:
    """(metrics, gradient) of one step's examples."""
    roles.zero_grad(set_to_none=True)
    found = accumulate(objective, examples, cut or MicroBatchSize(len(examples)), roles.device)
    slopes = [p.grad.flatten() for p in roles.trained_parameters().values() if p.grad is not None]
    roles.zero_grad(set_to_none=True)
    return sum_metrics(found), torch.cat(slopes)


def assert_same(one: tuple, two: tuple) -> None:
    assert one[0].keys() == two[0].keys()
    for name, value in one[0].items():
        assert value == pytest.approx(two[0][name], rel=1e-5, abs=1e-5), name
    assert distance(one[1], two[1]) < ROUNDING * 5


def recipe_of(**settings: Any) -> Recipe[Any, Any]:
    return dpo.make_recipe(DPOConfig(**settings))


LOSSES = {
    "sigmoid": {},
    "a sum": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "per token": {"loss_type": ["sigmoid_norm", "ipo"]},
    "divergence": {"f_divergence_type": "js_divergence"},
    "sorted": {"loss_type": ["aot", "apo_zero"]},
    "weighted": {"use_weighting": True},
    "simpo": {"loss_type": ["simpo"], "beta": 2.0},
    "orpo": {"loss_type": ["orpo"]},
    "cpo": {"loss_type": ["cpo"]},
}


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_of_pairs_is_the_same(fresh, kind):
    shared = recipe_of(**LOSSES[kind]).objective(fresh)
    apart = recipe_of(**LOSSES[kind], share_prompts=False).objective(fresh)
    assert shared.collate(PAIRS).sequences.num_tokens == apart.collate(PAIRS).sequences.num_tokens - SHARED
    found = learned(fresh, shared, PAIRS)
    assert found[1].norm() > 0
    assert_same(found, learned(fresh, apart, PAIRS))


def test_precomputed_references_belong_to_the_same_answers(fresh):
    table = pair_ref_logps(fresh, pack_pairs(PAIRS)).view(2, -1).T.tolist()
    known = [replace(item, ref_logps=tuple(row)) for item, row in zip(PAIRS, table, strict=True)]
    objective = recipe_of().objective(fresh)
    for examples in (known, known[::-1]):
        assert objective.collate(examples).ref_logps is not None
        assert_same(learned(fresh, objective, examples), learned(fresh, objective, PAIRS))


def test_the_reference_s_pass_shares_prompts_too(fresh, monkeypatch):
    seen = []
    ask = losses.reference_logps
    monkeypatch.setattr(losses, "reference_logps", lambda roles, batch: seen.append(batch) or ask(roles, batch))
    learned(fresh, recipe_of().objective(fresh), PAIRS)
    (batch,) = seen
    assert batch.shared is not None


@pytest.mark.parametrize("layout", ["restarted", "padded"])
def test_only_a_model_that_takes_shared_records_gets_them(fresh, monkeypatch, layout):
    monkeypatch.setattr(fresh, "layout", layout)
    objective = recipe_of().objective(fresh)
    assert objective.collate(PAIRS).sequences.shared is None
    assert all(objective.size(item) >= len(item) for item in PAIRS)


def test_labelled_answers_have_nothing_to_share(fresh):
    assert recipe_of(loss_type=["kto"]).prompt_sharing_collation is None
    assert recipe_of(loss_type=["apo_zero_unpaired"]).prompt_sharing_collation is None


def test_padding_free_off_shares_nothing(tiny_model):
    roles = load(tiny_model, padding_free=False)
    assert recipe_of(padding_free=False).objective(roles).collate(PAIRS).sequences.shared is None


# --- how many rows an example takes


def test_rows_that_a_pair_takes():
    assert [size_when_sharing(item) for item in PAIRS] == [30 + 6, 20 + 6, 6 + 5, 26 + 7]
    for item in PAIRS:
        assert size_when_sharing(item) == pack_pairs([item], share_prompts=True).sequences.num_tokens
    short, enough = (pair(LONG[:length], [1], [2]) for length in (MIN_SHARED_TOKENS - 1, MIN_SHARED_TOKENS))
    assert size_when_sharing(short) == len(short)
    assert size_when_sharing(enough) == len(enough) - MIN_SHARED_TOKENS


def test_a_budget_counts_the_rows_that_are_run(fresh):
    """Pairs of 36, 26, 11 and 33 rows; laid apart they are 66, 46, 11 and 59."""
    objective = recipe_of().objective(fresh)
    cut = MicroBatchSize(1, tokens=70)
    passes = [record.sequences for record in micro_batches(objective, PAIRS, cut, fresh.device)]
    assert [each.num_tokens for each in passes] == [36 + 33, 26 + 11]
    apart = recipe_of(share_prompts=False).objective(fresh)
    records = micro_batches(apart, PAIRS, cut, fresh.device)
    assert [record.sequences.num_tokens for record in records] == [66, 59, 46 + 11]
    assert_same(learned(fresh, objective, PAIRS, cut), learned(fresh, objective, PAIRS))


def test_a_loss_that_sorts_the_batch_is_not_cut():
    with pytest.raises(
        OnecardError, match="micro_batch_tokens is 64, expected 0 with loss_type aot, which sorts the wh"
    ):
        DPOConfig(loss_type=["sigmoid", "aot"], micro_batch_tokens=64).validate()
    DPOConfig(loss_type=["sigmoid"], micro_batch_tokens=64).validate()


# --- reward models

RANKINGS = [
    Ranking(tuple(answer(LONG, tokens) for tokens in ([5, 6, 7], [8], [5, 9, 2, 4]))),
    Ranking(tuple(answer(LONG[:18], tokens) for tokens in ([9], [8, 7]))),
    Ranking(tuple(answer(LONG[:4], tokens) for tokens in ([9, 3], [8, 7], [1], [2]))),
]
SCORED = [ScoredSequence(answer(LONG[:place], [5, 6]), float(place)) for place in (20, 25)]


def reward_objective(roles: Any, config: RewardConfig, *, share: bool) -> Objective[Any, Any]:
    return Objective(
        collate_shared if share else collate, len, lambda batch, n: (reward_loss(roles, batch, config, n),)
    )


@pytest.mark.parametrize(("examples", "saved"), [(PAIRS, SHARED), (RANKINGS, 2 * 30 + 18), (SCORED, 0)])
def test_reward_models_learn_the_same(tiny_model, examples, saved):
    config = RewardConfig(model=str(tiny_model))
    roles = moved(load_roles(config, trained="reward", scalar=True))
    apart, shared = collate(examples).sequences, collate_shared(examples).sequences
    assert shared.num_tokens == apart.num_tokens - saved
    assert shared.num_tokens == sum(map(example_size, examples))
    assert (shared.shared is None) == (saved == 0)
    found = learned(roles, reward_objective(roles, config, share=True), examples)
    assert found[1].norm() > 0
    assert_same(found, learned(roles, reward_objective(roles, config, share=False), examples))


def test_every_answer_of_a_ranking_goes_on_from_its_first(tiny_model):
    record = collate_shared(RANKINGS)
    assert record.counts == (3, 2, 4)
    assert record.sequences.shared.spans == ((0, 0), (0, 30), (0, 30), (0, 0), (38, 56), *((0, 0),) * 4)
    assert collate(RANKINGS).counts == record.counts


# --- whole runs


def pairs_file(path: Path) -> Path:
    words = ["cat", "dog", "hen", "cow", "fox"]
    lines = [
        {
            "prompt": f"Tell me all about the {words[i % 5]} number {i}, and say why it is good.",
            "chosen": f" The {words[i % 5]} is a good answer.",
            "rejected": f" bad {words[(i + 1) % 5]} mat",
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


VARYING = ("time/tokens_per_second", "memory/peak_gib")


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_a_run_learns_the_same(onecard, tiny_model, tmp_path, monkeypatch, command):
    """Counted too: how many tokens the examples have does not depend on how they are laid."""
    laid: dict[str, list[int]] = {}
    runs = {}
    for name in ("share_prompts", "no_share_prompts"):
        counts = laid.setdefault(name, [])
        with monkeypatch.context() as patch:
            spy_on_rows(patch, counts)
            result = onecard(
                command, "--model", tiny_model, "--dataset", pairs_file(tmp_path / "pairs.jsonl"), "--max_steps", 3,
                "--learning_rate", 1e-2, "--output_dir", tmp_path / name, f"--{name}",
                *(["--eval_samples", 0] if command == "dpo" else ["--normalize_scores"]),
            )  # fmt: skip
        assert result.code == 0, result.err
        runs[name] = metrics_of(tmp_path / name)
    assert sum(laid["share_prompts"]) < 0.9 * sum(laid["no_share_prompts"])
    for one, two in zip(*runs.values(), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - set(VARYING):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), name


def spy_on_rows(patch: pytest.MonkeyPatch, counts: list[int]) -> None:
    hidden = Roles.hidden

    def spied(self: Roles, batch: Any, rows: torch.Tensor) -> torch.Tensor:
        counts.append(batch.num_tokens)
        return hidden(self, batch, rows)

    patch.setattr(Roles, "hidden", spied)


def test_the_evaluation_of_a_reward_model_lays_answers_apart(tiny_model, monkeypatch):
    """It scores a few sequences at a time, and pairs lie chosen first."""
    config = RewardConfig(model=str(tiny_model), per_device_eval_batch_size=1)
    roles = load_roles(config, trained="reward", scalar=True)
    seen = []
    scores = type(roles).scores
    monkeypatch.setattr(type(roles), "scores", lambda self, batch: seen.append(batch) or scores(self, batch))
    with progress("evaluate", 1) as bar:
        reward_command.heldout_metrics(roles, PAIRS, config, forward_budget(config), bar)
    assert len(seen) == 2 * len(PAIRS)
    assert all(batch.shared is None for batch in seen)


def test_a_prompt_is_shared_only_as_far_as_it_is_one():
    """Prompts that differ at the end (cut to fit beside a long answer), and answers that begin alike."""
    one = TokenSequence((*LONG, 1, 2), (False,) * 30 + (True,) * 2)
    cut = TokenSequence((*LONG[5:], 1, 2), (False,) * 25 + (True,) * 2)
    assert size_when_sharing(PreferencePair(one, cut)) == len(one) + len(cut)
    changed = TokenSequence((*LONG[:20], 99, 98, 1, 2), (False,) * 22 + (True,) * 2)
    assert size_when_sharing(PreferencePair(one, changed)) == len(one) + 4
    assert size_when_sharing(PreferencePair(one, one)) == len(one) + 2
