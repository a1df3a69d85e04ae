"""However a step's examples are cut into micro-batches, its gradient is the same, on a pretrained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onecard.algorithms.common import Collation, Recipe
from onecard.algorithms.dpo.command import make_recipe
from onecard.algorithms.ppo.experience import compute_model_outputs, make_experiences, shape_rewards
from onecard.algorithms.ppo.job import ppo_objective
from onecard.algorithms.reward.kinds import collate, collate_shared, example_size, reward_loss, tokenize
from onecard.algorithms.sft import count_tokens, sft_loss
from onecard.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from onecard.data.batches import Episode, PreferencePair, TokenSequence, pack
from onecard.models.build import load_ppo_roles, load_roles
from onecard.models.layout import LAYOUTS
from onecard.models.load import load_tokenizer
from onecard.models.micro_batching import MicroBatchSize
from onecard.models.roles import Roles
from onecard.training.trainer import Objective, accumulate

COUNT = 8


@pytest.fixture(scope="module")
def texts(tinystories, stories) -> list[tuple[int, ...]]:
    """Stories as tokens."""
    tokenizer = load_tokenizer(SFTConfig(model=str(tinystories)))
    lines = stories.read_text().splitlines()[:COUNT]
    return [tuple(tokenizer.encode(json.loads(line)["text"])) for line in lines]


def sequence(prompt: tuple[int, ...], answer: tuple[int, ...]) -> TokenSequence:
    return TokenSequence(prompt + answer, (False,) * len(prompt) + (True,) * len(answer))


def pairs_of(texts: list[tuple[int, ...]]) -> list[PreferencePair]:
    """Prompts of 3 to 52 tokens, a few too short to be shared, with answers of many lengths; the others' are worse."""
    return [
        PreferencePair(
            sequence(text[: 3 + 7 * i], text[3 + 7 * i :][: 4 + (5 * i) % 17]),
            sequence(text[: 3 + 7 * i], texts[i - 1][: 2 + (3 * i) % 11]),
        )
        for i, text in enumerate(texts)
    ]


def moved(roles: Roles) -> Roles:
    """Away from the start, where half of all gradients are zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return roles.train()


# roles, the objective for the layout that they have when it is asked for, examples
Made = tuple[Roles, Callable[[], Objective[Any, Any]], list[Any]]


def sft(model: str, texts: list[tuple[int, ...]], **settings: Any) -> Made:
    roles = moved(load_roles(SFTConfig(model=model, **settings), trained="policy"))
    examples = [pair.chosen for pair in pairs_of(texts)]
    return roles, lambda: Objective(pack, count_tokens, lambda b, n: (sft_loss(roles, b, n),)), examples


def dpo(model: str, texts: list[tuple[int, ...]], **settings: Any) -> Made:
    config = DPOConfig(model=model, loss_type=["sigmoid", "ipo"], **settings)
    roles = moved(load_roles(config, trained="policy", reference=True))
    return roles, lambda: make_recipe(config).objective(roles), pairs_of(texts)


def reward(model: str, texts: list[tuple[int, ...]], **settings: Any) -> Made:
    config = RewardConfig(model=model, center_rewards_coefficient=0.1, **settings)
    roles = moved(load_roles(config, trained="reward", scalar=True))
    recipe = Recipe(
        "reward", "reward", tokenize, collate, len, lambda roles, batch, n: reward_loss(roles, batch, config, n),
        prompt_sharing_collation=Collation(collate_shared, example_size),
    )  # fmt: skip
    return roles, lambda: recipe.objective(roles), pairs_of(texts)


def ppo(model: str, texts: list[tuple[int, ...]], **settings: Any) -> Made:
    """Old numbers a little off, so that some are clipped."""
    config = PPOConfig(model=model, temperature=0.7, entropy_coef=0.01, **settings)
    roles = moved(load_ppo_roles(config))
    found = [pair.chosen for pair in pairs_of(texts)]
    episodes = [Episode(one, torch.zeros(sum(one.response_mask)), True) for one in found]
    passes = compute_model_outputs(roles, episodes, config)
    made = make_experiences(episodes, passes, shape_rewards(passes, torch.linspace(-1, 2, len(episodes)), 0.1, config))
    generator = torch.Generator().manual_seed(3)

    def off(old: Tensor) -> Tensor:
        return old + 0.3 * torch.randn(old.shape, generator=generator)

    made = [replace(x, old_logprobs=off(x.old_logprobs), old_values=off(x.old_values)) for x in made]
    return roles, lambda: ppo_objective(roles, config), made


ALGORITHMS: dict[str, Callable[..., Made]] = {
    "sft": sft,
    "dpo, prompts shared": dpo,
    "dpo, prompts not shared": lambda model, texts, **more: dpo(model, texts, share_prompts=False, **more),
    "reward": reward,
    "ppo, critic an adapter": ppo,
    "ppo, critic shared": lambda model, texts, **more: ppo(model, texts, critic="shared", **more),
}
# sequences, tokens, layout; the first is what the others are compared with
CUTS = [
    (8, 0, "packed"), (4, 0, "packed"), (1, 0, "packed"), (3, 0, "packed"), (8, 0, "padded"), (1, 0, "restarted"),
    (8, 1, "packed"), (8, 90, "packed"), (8, 150, "packed"), (8, 10_000, "packed"), (8, 170, "padded"),
]  # fmt: skip


def gradients(made: Made) -> list[Tensor]:
    """Of one step under each of the cuts, which really are different ones."""
    roles, objective_of, examples = made
    found, cuts = [], set()
    for sequences, tokens, layout in CUTS:
        roles.layout = layout
        objective, cut = objective_of(), MicroBatchSize(sequences, tokens, padded=layout == "padded")
        roles.zero_grad(set_to_none=True)
        accumulate(objective, examples, cut, roles.device)
        cuts.add((layout, tuple(map(tuple, cut.split([objective.size(example) for example in examples])))))
        found.append(torch.cat([p.grad.flatten().double() for p in roles.trained_parameters().values()]))
    assert len(cuts) >= len(CUTS) - 2
    return found


def apart(found: list[Tensor], truth: Tensor) -> list[float]:
    return [float((one - truth).norm() / truth.norm()) for one in found]


PACKED = [place for place, (_, _, layout) in enumerate(CUTS) if layout == "packed"]


IN_BFLOAT16 = [
    pytest.param(name, "bfloat16", marks=() if name == "ppo, critic shared" else pytest.mark.grid)
    for name in ALGORITHMS
]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in ALGORITHMS), *IN_BFLOAT16])
def test_every_cut_of_a_step_gives_the_same_gradient(tinystories, texts, name, dtype):
    """Packed, to 1e-6. Other layouts do other sums: none is further from the same step in float64 than all in one.

    In float64 (heads and their losses stay float32) all of them agree.
    """
    made = ALGORITHMS[name](str(tinystories), texts, dtype=dtype)
    found = gradients(made)
    assert found[0].norm() > 1e-3
    packed = apart([found[place] for place in PACKED], found[0])
    assert max(packed) < 1e-6, packed
    made[0].double().heads.float()
    truths = gradients(made)
    assert max(apart(truths, truths[0])) < 3e-7
    errors = apart(found, truths[0])
    print(f"{name} in {dtype}: cuts differ by {max(apart(found, found[0])):.1e}, and from the truth by {errors}")
    assert max(errors) < 1.5 * errors[0], dict(zip(CUTS, errors, strict=True))


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_accumulating_and_budgets_train_the_same_weights(onecard, quick, tmp_path, tinystories, politeness, command):
    """Three steps of 8: 8 x 1, 2 x 4, and two budgets, packed and padded."""
    dataset = politeness
    if command == "sft":
        rows = [json.loads(line) for line in politeness.read_text().splitlines()]
        dataset = tmp_path / "rows.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in rows))
    cuts = [(8, 1, 0), (2, 4, 0), (8, 1, 250), (4, 2, 250, "--no_padding_free")]
    weights = []
    for place, (size, times, tokens, *more) in enumerate(cuts):
        result = onecard(
            command, "--model", tinystories, "--dataset", dataset, "--output_dir", tmp_path / str(place),
            "--max_steps", 3, "--per_device_train_batch_size", size, "--gradient_accumulation_steps", times,
            "--micro_batch_tokens", tokens, "--learning_rate", 1e-3, "--test_size", 8, "--eval_samples", 0, *more,
        )  # fmt: skip
        assert result.code == 0, result.err
        parts = load_file(tmp_path / str(place) / "policy" / "adapter_model.safetensors")
        weights.append(torch.cat([parts[name].flatten() for name in sorted(parts)]))
    for other in weights[1:]:
        assert float((other - weights[0]).norm() / weights[0].norm()) < 2e-4
    # Adam divides by the gradient's size, so what is rounded in a gradient near 0 is a whole step: most are not near
    assert all(float(((other - weights[0]).abs() < 1e-6).float().mean()) > 0.99 for other in weights[1:])


@pytest.mark.parametrize("name", ["sft", "dpo, prompts shared", "ppo, critic shared"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_budget_counts_the_rows_that_the_model_runs(tinystories, texts, name, layout):
    """What a pass takes of the budget are the tokens that the layout gives to the model: shared prompts once, and
    padding too.
    """
    roles, objective_of, examples = ALGORITHMS[name](str(tinystories), texts)
    roles.layout = layout
    objective, cut = objective_of(), MicroBatchSize(8, 200, padded=layout == "padded")
    sizes = [objective.size(example) for example in examples]
    passes = list(cut.split(sizes))
    assert len(passes) > 1
    for places in passes:
        record = objective.collate([examples[place] for place in places])
        batch = getattr(record, "sequences", record)
        given = sum(inputs["input_ids"].numel() for inputs in LAYOUTS[layout](batch).passes)
        assert given == cut.tokens_of([sizes[place] for place in places])
        assert given <= 200 or len(places) == 1
