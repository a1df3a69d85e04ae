"""Losses of pairs, scores and rankings: by hand, against each other, against TRL, and however a step is cut."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from onecard.algorithms import reward
from onecard.algorithms.reward.agreement import agreement, concordance, pearson, ranks
from onecard.algorithms.reward.kinds import collate
from onecard.config import RewardConfig
from onecard.data.batches import PreferencePair, Ranking, ScoredSequence, TokenSequence, pack_pairs
from onecard.models.build import load_roles
from onecard.training.metrics import sum_metrics


def text(length: int, seed: int) -> TokenSequence:
    tokens = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenSequence(tuple(tokens), tuple(place >= 2 for place in range(length)))


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_ranking_by_hand():
    """Answers that score 2, 0, 1: pairs 2-0, 2-1, 0-1, of which the last is wrong; then a ranking of two, 1 and 3."""
    scores = torch.tensor([2.0, 0.0, 1.0, 1.0, 3.0])
    loss = reward.ranking_loss(scores, (3, 2), center_rewards_coefficient=0.1, normalizer=2)
    first = (softplus(-2) + softplus(-1) + softplus(1)) / 3 + 0.1 * (4 + 9 + 1) / 3
    second = softplus(2) + 0.1 * 16
    assert loss.loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert {name: value.item() for name, value in loss.metrics.items()} == pytest.approx(
        {"accuracy": (2 / 3 + 0) / 2, "margin": ((2 + 1 - 1) / 3 - 2) / 2, "mean_reward": (1 + 2) / 2}
    )


def test_a_ranking_of_two_is_a_pair():
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0))
    keywords = {"center_rewards_coefficient": 0.2, "normalizer": 4}
    pairs = reward.bradley_terry_loss(scores[0::2], scores[1::2], torch.zeros(4), **keywords)
    rankings = reward.ranking_loss(scores, (2, 2, 2, 2), **keywords)
    assert rankings.loss.item() == pytest.approx(pairs.loss.item(), rel=1e-6)
    assert sum_metrics([rankings]) == pytest.approx(sum_metrics([pairs]), rel=1e-6)


@pytest.mark.parametrize("counts", [(4,), (2, 5, 3), (6, 2)])
def test_rankings_against_instructgpt_in_float64(counts):
    """Equation 1 as it is written, one pair after another; the gradient too."""
    scores = torch.randn(sum(counts), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, truth = scores.float().requires_grad_(), scores.clone().requires_grad_()
    loss = reward.ranking_loss(ours, counts, center_rewards_coefficient=0.0, normalizer=len(counts)).loss
    total: Tensor | float = 0.0
    start = 0
    for count in counts:
        pairs = combinations(truth[start : start + count], 2)
        terms = [-torch.log(torch.sigmoid(better - worse)) for better, worse in pairs]
        total = total + sum(terms) / math.comb(count, 2)
        start += count
    expected = total / len(counts)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.grad.double().allclose(truth.grad, rtol=1e-5, atol=1e-7)


def test_regression_by_hand():
    loss = reward.regression_loss(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0]), normalizer=4)
    assert loss.loss.item() == (1 + 2.25) / 4
    assert sum_metrics([loss]) == {"loss": 0.8125, "mse": 0.8125, "mean_reward": 0.375}


# --- one normaliser for a step ---

EXAMPLES = {
    "pairs": [PreferencePair(text(4 + i, i), text(9 - i, 50 + i), margin=0.3 * i) for i in range(6)],
    "scores": [ScoredSequence(text(3 + 2 * i, i), 0.2 * i) for i in range(6)],
    "rankings": [Ranking(tuple(text(3 + i + k, 10 * i + k) for k in range(2 + i % 3))) for i in range(6)],
}


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_any_cut_gives_the_same_loss_metrics_and_gradient(tiny_model, kind, activation):
    config = RewardConfig(model=str(tiny_model), center_rewards_coefficient=0.1, score_activation=activation)
    examples, results = EXAMPLES[kind], []
    for sizes in ([6], [2, 2, 2], [1] * 6, [5, 1]):
        roles = load_roles(config, trained="reward", scalar=True)
        start, losses = 0, []
        for size in sizes:
            loss = reward.reward_loss(roles, collate(examples[start : start + size]), config, len(examples))
            loss.loss.backward()
            losses.append(loss)
            start += size
        gradient = torch.cat([parameter.grad.flatten() for parameter in roles.trained_parameters().values()])
        results.append((sum_metrics(losses), gradient))
    first, first_gradient = results[0]
    assert first["min_reward"] < first["mean_reward"] < first["max_reward"]
    assert first_gradient.abs().max() > 0
    for metrics, gradient in results[1:]:
        assert metrics == pytest.approx(first, rel=1e-5, abs=1e-6)
        assert (gradient - first_gradient).abs().max() / first_gradient.abs().max() < 3e-6


def test_the_sigmoid_is_in_scores_and_not_in_values(tiny_model):
    config = RewardConfig(model=str(tiny_model), score_activation="sigmoid")
    roles = load_roles(config, trained="reward", scalar=True)
    batch = collate(EXAMPLES["scores"]).sequences
    rows = batch.cu_seqlens[1:].long() - 1
    assert roles.scores(batch).equal(torch.sigmoid(roles.scalars(batch, rows)))


# --- TRL ---


@pytest.mark.parametrize("center", [None, 0.2])
def test_pairs_against_trls_reward_trainer(tiny_model, center):
    """Loss, metrics, and the gradient of every weight of a whole model."""
    from transformers import AutoModelForSequenceClassification
    from trl import RewardTrainer

    pairs = EXAMPLES["pairs"]
    config = RewardConfig(model=str(tiny_model), use_peft=False, center_rewards_coefficient=center or 0.0)
    roles = load_roles(config, trained="reward", scalar=True)
    loss = reward.reward_loss(roles, pack_pairs(pairs), config, len(pairs))
    loss.loss.backward()

    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    theirs.score.weight.data.copy_(roles.heads["reward"].weight)
    texts = [pair.chosen.tokens for pair in pairs] + [pair.rejected.tokens for pair in pairs]
    longest = max(map(len, texts))
    inputs = {
        "input_ids": torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in texts]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in texts]),
        "margin": torch.tensor([pair.margin for pair in pairs]),
    }
    trainer = SimpleNamespace(
        model=theirs.train(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda values: values, gather_for_metrics=lambda values: values),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    expected = RewardTrainer.compute_loss(trainer, theirs, inputs)
    expected.backward()
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = sum_metrics([loss])
    for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin"):
        [value] = trainer._metrics["train"][name]
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    gradients = {name: parameter.grad for name, parameter in theirs.model.named_parameters()}
    own = roles.causal_model().get_decoder().named_parameters()
    compared = [(parameter.grad, gradients[name]) for name, parameter in own]
    compared.append((roles.heads["reward"].weight.grad, theirs.score.weight.grad))
    assert len(compared) == len(gradients) + 1
    for one, other in compared:
        assert (one - other).abs().max() <= 1e-5 * max(other.abs().max(), 1e-3)


# --- agreement with given scores ---


def test_agreement_by_hand():
    """Five rows; y = x but for the last two, which change places, and a tie in the given scores."""
    scores, given = torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0]), torch.tensor([1.0, 2.0, 2.0, 3.0, 7.0])
    found = agreement(scores, given)
    # around the means 3 and 3 the products add up to 9, the squares to 10 and 22
    assert found["pearson"] == pytest.approx(9 / math.sqrt(10 * 22))
    # ranks 1 2 3 5 4 and 1 2.5 2.5 4 5: products as they stand here, squares 10 and 9.5
    assert found["spearman"] == pytest.approx((4 + 0.5 + 0 + 2 + 2) / math.sqrt(10 * 9.5))
    # nine pairs of rows differ in their given score; of these only the last two rows are in the wrong order
    assert found["accuracy"] == pytest.approx(8 / 9)


def test_two_given_scores_are_labels():
    assert "label_accuracy" not in agreement(torch.arange(3.0), torch.arange(3.0))
    found = agreement(torch.tensor([0.9, 0.6, 0.4, 0.7, 0.6]), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
    assert found["label_accuracy"] == pytest.approx(3 / 5)  # the third is too low, the fourth too high
    assert found["majority_class"] == pytest.approx(4 / 5)
    found = agreement(torch.tensor([4.0, 1.0, 2.9]), torch.tensor([5.0, 1.0, 1.0]))  # the middle is 3
    assert found["label_accuracy"] == 1.0


def test_equal_scores_have_no_order_and_constants_no_agreement():
    assert concordance(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])) == 0.5
    assert agreement(torch.ones(3), torch.arange(3.0)) == {}
    assert agreement(torch.arange(3.0), torch.ones(3)) == {}
    assert agreement(torch.ones(1), torch.ones(1)) == {}


def test_ranks_are_those_of_all_orders():
    values = torch.tensor([0.3, 0.1, 0.3, 0.3, -2.0])
    assert ranks(values).tolist() == [4.0, 2.0, 4.0, 4.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 9, (40,), generator=generator).float()
    slow = [(x < value).sum().item() + ((x == value).sum().item() + 1) / 2 for value in x]
    assert ranks(x).tolist() == slow


def test_correlation_does_not_change_with_shift_and_scale():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    assert pearson(x, 1e3 + 0.01 * x) == pytest.approx(1.0, abs=1e-4)
    assert pearson(x, -x) == pytest.approx(-1.0)
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]).double())[0, 1]), rel=1e-9)
