"""`onecard evaluate`: its numbers, each by another way; its files; and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from onecard.commands.evaluate import evaluate
from onecard.commands.statistics import distinct
from onecard.config import DPOConfig, EvaluateConfig, ModelConfig, RewardConfig
from onecard.data import Row, sft_examples
from onecard.models.build import load_frozen_role, load_roles
from onecard.models.load import load_tokenizer
from tests.e2e.ppo_material import error_line, tree

PROMPTS = ["Once upon a time", "Lily", "The big dog ran to the park and", "Ben saw", "It was", "Tom and Sue"]
JOY = """
def joy(completions, **columns):
    return [float(text.count("a")) for text in completions]

def ids(completion_ids, weight):
    return [len(each) for each, factor in zip(completion_ids, weight) if factor >= 0]
"""


def adapter(base: Path, folder: Path, seed: int, role: str = "policy", layers: str = "all-linear") -> Path:
    """A run folder with an adapter of random weights."""
    reward = role == "reward"
    kind = RewardConfig if reward else DPOConfig
    config = kind(model=str(base), lora_target_modules=[layers], lora_r=4)
    roles = load_roles(config, trained=role, scalar=reward)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in roles.trained_parameters().items():
            parameter.copy_(torch.randn_like(parameter) * (0.05 if "lora" in name else 0.2))
    roles.export(role, folder / role, load_tokenizer(config))
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory, tinystories) -> Path:
    """Rows, reward functions, two policies and a reward model on TinyStories-656K."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = [
        {"prompt": prompt, "completion": f" and the cat sat on mat {place}.", "weight": place}
        for place, prompt in enumerate(PROMPTS * 2)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "joy.py").write_text(JOY)
    adapter(tinystories, folder / "first", 1)
    adapter(tinystories, folder / "second", 2)
    adapter(tinystories, folder / "rm", 3, "reward")
    return folder


def settings(material: Path, **changes) -> EvaluateConfig:
    values = {
        "model": str(material / "first"),
        "dataset": str(material / "rows.jsonl"),
        "response_length": 16,
        "reward_model_path": str(material / "rm"),
        "reward_funcs": [f"{material / 'joy.py'}:joy", f"{material / 'joy.py'}:ids"],
        "reward_weights": [1.0, 0.5, 0.1],
        **changes,
    }
    return EvaluateConfig(**{name: value for name, value in values.items() if value is not None})


def transformers_logprobs(folder: Path | str, ids: list[int], start: int) -> torch.Tensor:
    """Of the tokens from `start` on, by transformers and PEFT alone."""
    model = load_frozen_role(ModelConfig(model=str(folder)), role="policy").causal_model()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0].double().log_softmax(-1)
    return logits[:-1].gather(-1, tokens[0, 1:, None]).squeeze(-1)[start - 1 :]


def test_every_measure_by_another_way(material, tinystories):
    """From the answers in samples, tokenized anew and passed one by one through transformers."""
    found = evaluate(settings(material, temperature=0.7))
    tokenizer = load_tokenizer(ModelConfig(model=str(tinystories)))
    own = found.metrics["policy"]
    rows = found.samples
    assert found.prompts == 12
    assert found.win_rate is None
    joy = [row["completion"].count("a") for row in rows]
    assert [row["rewards/joy"] for row in rows] == joy
    assert own["rewards/joy"].mean == pytest.approx(sum(joy) / 12)
    deviation = math.sqrt(sum((value - sum(joy) / 12) ** 2 for value in joy) / 11)
    assert own["rewards/joy"].stderr == pytest.approx(deviation / math.sqrt(12))
    for row in rows:
        total = row["rewards/reward_model"] + 0.5 * row["rewards/joy"] + 0.1 * row["rewards/ids"]
        assert row["score"] == pytest.approx(total, abs=1e-5)
    assert own["objective/scores"].mean == pytest.approx(sum(row["score"] for row in rows) / 12, abs=1e-5)
    lengths = [row["rewards/ids"] for row in rows]
    assert own["completions/mean_length"].mean == pytest.approx(sum(lengths) / 12)
    assert own["completions/clipped_ratio"].mean == sum(not row["finished"] for row in rows) / 12
    assert all(length == 16 for length, row in zip(lengths, rows, strict=True) if not row["finished"])
    words = [tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in rows]
    assert own["distinct-1"].mean == pytest.approx(distinct(words, 1), abs=0.05)  # but for tokens that merge anew

    sums, count = 0.0, 0
    for row in json_rows(material / "rows.jsonl"):
        [answer] = sft_examples(
            [Row("row", 1, row)], tokenizer, max_length=64, completion_only_loss=True, assistant_only_loss=True,
            skip_bad_rows=False,
        ).examples  # fmt: skip
        assert answer.tokens[-1] == tokenizer.eos_token_id
        logprobs = transformers_logprobs(material / "first", list(answer.tokens), answer.response_mask.index(True))
        sums, count = sums - float(logprobs.sum()), count + len(logprobs)
    assert own["perplexity"].mean == pytest.approx(math.exp(sums / count), rel=1e-4)


def json_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_kl_is_to_the_reference_at_sampling_s_temperature(material, tinystories):
    """By hand from the sampled tokens; 0 where the policy is the reference."""
    from onecard.commands import evaluate as module

    seen = []
    original = module.make_episode

    def kept(prompt, response):
        seen.append((prompt.tokens, response.tokens))
        return original(prompt, response)

    plain = {"reward_model_path": None, "reward_funcs": None, "reward_weights": None, "max_prompts": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_episode", kept)
        found = evaluate(settings(material, temperature=0.5, **plain)).metrics["policy"]
    expected = []
    folders = (material / "first", tinystories)
    models = [load_frozen_role(ModelConfig(model=str(folder)), role="policy").causal_model() for folder in folders]
    for prompt, response in seen:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            policy, base = (
                (model(input_ids=ids, use_cache=False).logits[0].double() / 0.5).log_softmax(-1) for model in models
            )
        picked = [p[:-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum() for p in (policy, base)]
        expected.append(float(picked[0] - picked[1]))
    assert found["objective/kl"].mean == pytest.approx(sum(expected) / 4, abs=1e-3)
    assert abs(found["objective/kl"].mean) > 1
    same = evaluate(settings(material, ref_adapter=str(material / "first"), **plain)).metrics["policy"]
    assert same["objective/kl"].mean == 0.0
    assert not any(name.startswith(("rewards/", "objective/scores")) for name in same)
    assert {"completions/mean_length", "distinct-1", "perplexity"} <= set(same)


def test_a_policy_ties_with_itself_in_any_batches(material):
    """Each prompt has draws of its own, so both sides, and batches of any size, draw the same answers."""
    found = evaluate(settings(material, baseline=str(material / "first" / "policy")))
    assert (found.win_rate.wins, found.win_rate.ties, found.win_rate.losses) == (0, 12, 0)
    assert found.win_rate.mean == 0.5
    assert found.metrics["policy"] == found.metrics["baseline"]
    assert all(row["completion"] == row["baseline_completion"] for row in found.samples)
    assert len({row["completion"] for row in found.samples}) == 12  # twice the same prompts, with other draws
    small = evaluate(settings(material, local_rollout_forward_batch_size=5, per_device_eval_batch_size=3))
    assert [row["completion"] for row in small.samples] == [row["completion"] for row in found.samples]
    assert small.metrics["policy"]["perplexity"].mean == pytest.approx(found.metrics["policy"]["perplexity"].mean)
    other = evaluate(settings(material, seed=7, max_prompts=3))
    assert [row["completion"] for row in other.samples] != [row["completion"] for row in found.samples[:3]]


def test_the_win_rate_counts_scores_of_the_same_prompt(material):
    found = evaluate(settings(material, baseline=str(material / "second")))
    wins = [row["score"] > row["baseline_score"] for row in found.samples]
    assert 0 < sum(wins) < 12
    assert found.win_rate.wins == sum(wins)
    assert found.win_rate.ties == sum(row["score"] == row["baseline_score"] for row in found.samples)
    swapped = evaluate(settings(material, model=str(material / "second"), baseline=str(material / "first")))
    assert swapped.metrics["policy"] == found.metrics["baseline"]
    assert swapped.metrics["baseline"] == found.metrics["policy"]
    assert swapped.win_rate.mean == pytest.approx(1 - found.win_rate.mean)


def test_one_base_is_held_for_all_who_share_it(material, tinystories, monkeypatch):
    from onecard.models import build

    loaded = []
    original = build.load_base
    monkeypatch.setattr(build, "load_base", lambda config: loaded.append(config.model) or original(config))
    evaluate(settings(material, baseline=str(tinystories), ref_adapter=str(material / "second"), max_prompts=2))
    assert len(loaded) == 1


def test_a_baseline_on_another_base_answers_with_its_own_weights(onecard, material, tinystories, tmp_path):
    """The merged adapter as the policy: the same answers and wins as from the adapter itself."""
    assert onecard("merge", "--model", material / "second", "--output_dir", tmp_path / "merged").code == 0
    together = evaluate(settings(material, baseline=str(material / "second"), max_prompts=5))
    apart = evaluate(settings(material, baseline=str(tmp_path / "merged"), max_prompts=5))
    assert [row["baseline_completion"] for row in apart.samples] == [
        row["baseline_completion"] for row in together.samples
    ]
    assert apart.win_rate == together.win_rate
    assert "objective/kl" not in apart.metrics["baseline"]


def test_the_files_hold_what_the_terminal_shows(onecard, material, tmp_path):
    """An earlier evaluation in the same folder is replaced."""
    words = ["--model", material / "first", "--baseline", material / "second", "--dataset", material / "rows.jsonl"]
    words += ["--reward_funcs", f"{material / 'joy.py'}:joy", "--response_length", 8, "--output_dir", tmp_path / "out"]
    assert onecard("evaluate", *words, "--seed", 1).code == 0
    result = onecard("evaluate", *words)
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert numbers["settings"]["seed"] == 42
    assert numbers["prompts"] == len(json_rows(tmp_path / "out" / "samples.jsonl")) == 12
    table = (tmp_path / "out" / "evaluation.md").read_text()
    for side in ("policy", "baseline"):
        for name, value in numbers[side].items():
            shown = f"{value['mean']:.4g}"
            for text in (result.out, table):
                assert any(name in line and shown in line for line in text.splitlines()), (name, shown)
    low, high = numbers["win_rate"]["low"], numbers["win_rate"]["high"]
    assert f"95 % interval {low:.3f} to {high:.3f}" in result.out
    assert f"95 % interval {low:.3f} to {high:.3f}" in table
    assert set(path.name for path in tmp_path.iterdir()) == {"out"}


def test_chosen_answers_have_a_perplexity_too(material, tmp_path):
    def perplexity(rows: list[dict]) -> float:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain = {"reward_model_path": None, "reward_funcs": None, "reward_weights": None}
        config = settings(material, dataset=str(tmp_path / "rows.jsonl"), response_length=2, **plain)
        return evaluate(config).metrics["policy"].get("perplexity")

    completed = perplexity([{"prompt": prompt, "completion": " a cat."} for prompt in PROMPTS])
    assert perplexity([{"prompt": p, "chosen": " a cat.", "rejected": " no."} for p in PROMPTS]) == completed
    assert perplexity([{"prompt": p, "chosen": " a cat."} for p in PROMPTS]) == completed
    null = {"completion": None, "rejected": None}
    assert perplexity([{"prompt": p, "chosen": " a cat.", **null} for p in PROMPTS]) == completed
    assert perplexity([{"prompt": prompt} for prompt in PROMPTS]) is None


def test_what_cannot_be_evaluated_is_one_line_and_leaves_nothing(onecard, material, tmp_path, tiny_model):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: m\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thoughts.txt").write_text("mine")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    (tmp_path / "raising.py").write_text("def raising(completions):\n    raise ValueError('no')\n")
    other = adapter(tiny_model, tmp_path / "other", 1)
    bad = {
        "has a training run in it": {"--output_dir": tmp_path / "run"},
        "has 'thoughts.txt'": {"--output_dir": tmp_path / "mine"},
        "torn.jsonl:2": {"--dataset": tmp_path / "torn.jsonl"},
        "--dataset is missing": {"--dataset": ""},
        "baseline: no folder": {"--baseline": "./nowhere"},
        "expected a model or adapter with the same tokenizer": {"--baseline": tiny_model},
        "is not an adapter on the policy's base": {"--ref_adapter": other},
        "ref_adapter: no folder": {"--ref_adapter": "./nowhere"},
        "reward_model_path": {"--reward_model_path": other},
        "raising.py:raising raised ValueError": {"--reward_funcs": f"{tmp_path / 'raising.py'}:raising"},
        "leaves no room for a prompt": {"--response_length": 600},
        "--model is missing": {"--model": ""},
        "model: {rm} is a reward model; expected a language model": {"--model": material / "rm"},
        "baseline: {rm} is a reward model": {"--baseline": material / "rm"},
        "ref_adapter: {rm} is a reward model": {"--ref_adapter": material / "rm"},
    }
    before = tree(tmp_path)
    for message, changes in bad.items():
        flags = {"--model": material / "first", "--dataset": material / "rows.jsonl", "--output_dir": tmp_path / "new"}
        flags |= {"--max_prompts": 3, "--response_length": 4, **changes}
        result = onecard("evaluate", *[word for pair in flags.items() for word in pair])
        assert message.replace("{rm}", str(material / "rm" / "reward")) in error_line(result), (message, result.err)
        assert tree(tmp_path) == before
