"""One iteration of PPO: the losses against plain logits, the order of the minibatches, when learning stops early."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from onecard.algorithms.ppo.job import PPO, AdaptiveState, Collected, minibatches, ppo_objective
from onecard.config import PPOConfig, RewardConfig
from onecard.data import Prompt, stream_indices
from onecard.data.batches import Episode, Experience, TokenSequence, pack
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.micro_batching import MicroBatchSize
from onecard.rewards.functions import RewardFunction
from onecard.rewards.scorer import Scorer, load_scorer, make_answers, response_text
from onecard.rollout import Rollout
from onecard.training.metrics import sum_metrics
from onecard.training.trainer import micro_batches
from onecard.utils.progress import progress
from tests.engine.ppo_material import experiences, random_episode
from tests.engine.roles_material import moved_roles

SETTINGS = {"temperature": 0.7, "vf_coef": 0.3, "cliprange_high": 0.28, "entropy_coef": 0.02, "cliprange_value": 0.1}


def test_the_losses_are_those_of_plain_logits(tiny_model):
    """Value and gradient against the formulas on transformers' own logits, one sequence at a time."""
    config = PPOConfig(model=str(tiny_model), **SETTINGS)
    roles = moved_roles(config, 0.05)
    batch = experiences(roles, config, 4)
    tokens = sum(x.num_response_tokens for x in batch)
    total = 0.0
    for x in batch:
        ids, k = torch.tensor([x.episode.sequence.tokens]), x.num_response_tokens
        logp = (roles.causal_model()(input_ids=ids).logits[0, -k - 1 : -1].double() / 0.7).log_softmax(-1)
        chosen = logp.gather(-1, ids[0, -k:, None]).squeeze(-1)
        ratio = (chosen - x.old_logprobs).exp()
        surrogate = torch.min(ratio * x.advantages, ratio.clamp(0.8, 1.28) * x.advantages)
        entropy = -(logp.exp() * logp).sum(-1)
        total = total - (surrogate + 0.02 * entropy).sum() / tokens
        with roles.active("value"):
            states = (
                roles.causal_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -k - 1 : -1]
            )
            values = roles.heads["value"](states).squeeze(-1)
        near = x.old_values + (values - x.old_values).clamp(-0.1, 0.1)
        total = total + 0.3 * 0.5 * torch.max((values - x.returns) ** 2, (near - x.returns) ** 2).sum() / tokens
    parameters = roles.trained_parameters()
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    objective, losses = ppo_objective(roles, config), []
    [record] = micro_batches(objective, batch, MicroBatchSize(8), roles.device)
    for loss in objective.losses(record, objective.count(batch)):
        loss.loss.backward()
        losses.append(loss)
    row = sum_metrics(losses)
    assert row["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert row["loss/policy"] + 0.3 * row["loss/value"] == pytest.approx(row["loss"], rel=1e-6)
    assert 0 < row["policy/clipfrac"] < 1
    assert 0 < row["val/clipfrac"] < 1
    for name, parameter in parameters.items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected[name].float(), rtol=1e-4, atol=1e-6, msg=name)


def test_any_cut_into_micro_batches_gives_the_same_step(tiny_model):
    """1x8, 2x4, 8x1, packed and padded: loss, metrics and gradient of a minibatch are equal to rounding."""
    results = []
    for layout, size in [("packed", 8), ("packed", 4), ("packed", 1), ("padded", 8), ("padded", 3)]:
        config = PPOConfig(model=str(tiny_model), **SETTINGS)
        roles = moved_roles(config, 0.05)
        batch = experiences(roles, config, 8)
        roles.layout = layout
        objective, losses = ppo_objective(roles, config), []
        for record in micro_batches(objective, batch, MicroBatchSize(size), roles.device):
            for loss in objective.losses(record, objective.count(batch)):
                loss.loss.backward()
                losses.append(loss)
        results.append(
            (sum_metrics(losses), torch.cat([p.grad.flatten() for p in roles.trained_parameters().values()]))
        )
    for row, gradient in results[1:]:
        assert row == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
        assert (gradient - results[0][1]).abs().max() < 3e-6 * results[0][1].abs().max()


def test_every_ppo_epoch_reshuffles_all_samples():
    config = PPOConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_ppo_epochs=3)
    samples = [SimpleNamespace(index=i) for i in range(12)]
    batches = [[x.index for x in batch] for batch in minibatches(samples, config, 5)]
    assert [len(batch) for batch in batches] == [4] * 9
    assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(12), 3)
    epochs = [list(chain(*batches[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert batches == [[x.index for x in batch] for batch in minibatches(samples, config, 5)]
    assert batches != [[x.index for x in batch] for batch in minibatches(samples, config, 6)]


def test_prompts_come_in_a_stream_of_shuffled_epochs():
    """Any cut of the stream is the same stream, and each epoch in it has every prompt once."""
    whole = stream_indices(7, 0, 21, seed=1)
    assert list(chain(*(stream_indices(7, start, 3, seed=1) for start in range(0, 21, 3)))) == whole
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    assert stream_indices(7, 0, 21, seed=2) != whole
    assert Counter(stream_indices(2, 0, 6, seed=0)) == {0: 3, 1: 3}


class FakeTrainer:
    """Gives the KLs that it was made with, and counts."""

    step = num_tokens = 0

    def __init__(self, kls: list[float]) -> None:
        self.kls, self.applied, self.discarded = iter(kls), 0, 0

    def compute_gradients(self, objective, examples):
        kl = next(self.kls)
        return {"loss": 1.0, "policy/approxkl": kl, "val/ratio": 1.0 + kl, "grad_norm": 2.0}

    def optimizer_step(self):
        self.applied += 1

    def zero_grad(self):
        self.discarded += 1


def learned(trainer: FakeTrainer, target_kl: float) -> dict[str, float]:
    """The row of an iteration with four minibatches, whose samples are given."""
    config = PPOConfig(target_kl=target_kl, num_ppo_epochs=4, num_mini_batches=1)
    metrics, experience = {"objective/kl": 0.0}, Experience(*[None] * len(fields(Experience)))
    collected = Collected([experience], metrics, [], Rollout((), 1.0))
    job = SimpleNamespace(
        config=config,
        objective=None,
        constraint=None,
        adaptive=AdaptiveState(0.1, 0.0),
        collect=lambda *given: collected,
    )
    with progress("ppo", 1) as bar:
        return PPO.step(job, trainer, [0], bar)


def test_learning_stops_at_the_minibatch_that_passes_target_kl():
    """KLs 0, 1, 4, ...: with a limit of 2 the third minibatch's gradient is thrown away and nothing follows it."""
    trainer = FakeTrainer([0.0, 1.0, 4.0, 0.0])
    row = learned(trainer, target_kl=2.0)
    assert (trainer.applied, trainer.discarded) == (2, 1)
    assert row["policy/updates"] == 2.0
    assert row["policy/approxkl_avg"] == pytest.approx(5 / 3)
    assert row["val/ratio"] == pytest.approx(1 + 5 / 3)
    assert row["val/ratio_var"] == pytest.approx((25 / 9 + 4 / 9 + 49 / 9) / 3)
    free = FakeTrainer([0.0, 1.0, 4.0, 0.0])
    assert learned(free, target_kl=0.0)["policy/updates"] == 4.0
    assert (free.applied, free.discarded) == (4, 0)


class WordTokenizer:
    """Ids to words, for texts that a test can read."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i < 3))


def test_an_answer_that_is_cut_pays_missing_eos_penalty():
    function = RewardFunction("length", lambda completion_ids, **_: [len(ids) for ids in completion_ids])
    scorer = Scorer({"length": function}, {"length": 0.5}, missing_eos_penalty=1.5, batch_size=8)
    episodes = [random_episode(0, 2, 4), random_episode(1, 2, 4, finished=False)]
    scores = scorer.scores(None, WordTokenizer(), [Prompt("p", (1, 2))] * 2, episodes)
    assert scores.terminal.tolist() == [2.0, 0.5]
    assert scores.parts["length"].tolist() == [4.0, 4.0]


def test_rewards_see_columns_and_text_without_its_end():
    """A stop token need not be a special one, so it is taken off by its place; ids are given as sampled."""
    ended = Episode(TokenSequence((9, 7, 8, 5), (False, True, True, True)), torch.zeros(3), True)
    cut = replace(ended, finished=False)
    assert response_text(WordTokenizer(), ended) == " w7 w8"  # behind the prompt's "w9"
    assert response_text(WordTokenizer(), cut) == " w7 w8 w5"
    prompts = [Prompt("a", (9,), {"answer": "x"}), Prompt("b", (9,), {"answer": "y", "level": 2})]
    answers = make_answers(WordTokenizer(), prompts, [ended, cut])
    assert answers.prompts == ("a", "b")
    assert answers.completion_ids == ((7, 8, 5), (7, 8, 5))
    assert dict(answers.columns) == {"answer": ("x", "y"), "level": (None, 2)}


def test_the_reward_model_comes_first_among_the_weights(tiny_model, tmp_path):
    (tmp_path / "mine.py").write_text("def one(completions): return [1.0] * len(completions)\n")
    functions = [f"{tmp_path}/mine.py:one"]
    config = PPOConfig(reward_model_path=str(tiny_model), reward_funcs=functions, reward_weights=[2.0, 0.25])
    assert dict(load_scorer(config).weights) == {"reward_model": 2.0, "one": 0.25}


def test_the_reward_model_reads_every_answer_at_an_eos(tinystories, tmp_path):
    """Its pairs end with EOS. A cut answer gets one for the reading, a finished one no second; nothing else changes."""
    config = RewardConfig(model=str(tinystories))
    trained, tokenizer = load_roles(config, trained="reward", scalar=True), load_tokenizer(config)
    trained.export("reward", tmp_path / "reward", tokenizer)
    settings = PPOConfig(model=str(tinystories), reward_model_path=str(tmp_path / "reward"), missing_eos_penalty=0.5)
    roles, scorer, eos = load_ppo_roles(settings), load_scorer(settings), tokenizer.eos_token_id

    def answer(tokens: tuple[int, ...], finished: bool) -> Episode:
        mask = (False, *(True,) * (len(tokens) - 1))
        return Episode(TokenSequence(tokens, mask), torch.zeros(len(tokens) - 1), finished)

    answers = [answer((1, 40, 50), False), answer((1, 40, 50, eos), True), answer((1, 40, 50), True)]
    scores = scorer.scores(roles, tokenizer, [Prompt("", (1,))] * 3, answers)
    with torch.no_grad():
        read = trained.scores(pack([TokenSequence((1, 40, 50, eos), (False, True, True, True))])).item()
    torch.testing.assert_close(scores.parts["reward_model"], torch.tensor([read] * 3))
    torch.testing.assert_close(scores.terminal, torch.tensor([read - 0.5, read, read]))
    assert answers[0].sequence.tokens == (1, 40, 50)
