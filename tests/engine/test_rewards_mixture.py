"""`reward_funcs` and `constraint_funcs` as they are written, and the judges that come of them."""

from __future__ import annotations

import math

import pytest
import torch

from onecard.config import EvaluateConfig, PPOConfig
from onecard.data import Prompt
from onecard.data.batches import Episode, TokenSequence
from onecard.rewards.expressions import Term, parse_terms
from onecard.rewards.scorer import load_constraint, load_scorer
from onecard.utils.errors import OnecardError

FUNCTIONS = """
def one(completions): return [1.0] * len(completions)
def dense(completion_ids): return [[float(i) for i in ids] for ids in completion_ids]
"""


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return f"{tmp_path}/mine.py"


class WordTokenizer:
    eos_token_id = 2

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return " ".join(f"w{i}" for i in ids)


def episode(*response: int, finished: bool = True) -> Episode:
    sequence = TokenSequence((1, *response), (False, *(True,) * len(response)))
    return Episode(sequence, torch.zeros(len(response)), finished)


def complaint(load, **settings) -> str:
    with pytest.raises(OnecardError) as caught:
        load(PPOConfig(**settings))
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "terms"),
    [
        ([], []),
        (["fluency", "a:b"], [("fluency", None), ("a:b", None)]),
        (["0.5*fluency + 0.3*relevance + 2*judge.py:polite"],
         [("fluency", 0.5), ("relevance", 0.3), ("judge.py:polite", 2.0)]),
        ([" 1e-2 *  length:20 + -3*a:b", "+.5*c:d"], [("length:20", 0.01), ("a:b", -3.0), ("c:d", 0.5)]),
        (["regex:a + 2*b", "fluency"], [("regex:a + 2*b", None), ("fluency", None)]),
        (["fluency + 2.*regex: a + b "], [("fluency", None), ("regex: a + b ", 2.0)]),
        (["a+b.py:c"], [("a+b.py:c", None)]),
        (["x*fluency", "2 fluency"], [("x*fluency", None), ("2 fluency", None)]),
        ([" fluency  +  2*length "], [("fluency", None), ("length", 2.0)]),
        (["fluency + "], [("fluency", None), ("", None)]),
    ],
)  # fmt: skip
def test_a_mixture_is_split_into_its_terms(entries, terms):
    assert parse_terms(entries, "reward_funcs") == [Term(*term) for term in terms]


def test_one_line_is_what_several_entries_with_weights_are(mine):
    line = f"0.5*length + -2*length:4 + 3*{mine}:one"
    one = load_scorer(PPOConfig(reward_funcs=[line]))
    several = load_scorer(
        PPOConfig(reward_funcs=["length", "length:4", f"{mine}:one"], reward_weights=[0.5, -2.0, 3.0])
    )
    names = {"length": 0.5, "length:4": -2.0, "one": 3.0}
    assert dict(one.weights) == dict(several.weights) == names
    judged = [[Prompt("p", (1,))] * 2, [episode(5, 6, 7, 2), episode(5, 6)]]
    for scorer in (one, several):
        scores = scorer.scores(None, WordTokenizer(), *judged)
        assert {name: part.tolist() for name, part in scores.parts.items()} == {
            "length": [4.0, 2.0], "length:4": [1.0, 0.5], "one": [1.0, 1.0],
        }  # fmt: skip
        assert scores.terminal.tolist() == [0.5 * 4 - 2 + 3, 0.5 * 2 - 1 + 3]


def test_the_reward_model_s_weight_may_stand_in_the_line(tiny_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny_model}"}}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    line = ["0.5*length + 3*reward_model", "relevance"]
    scorer = load_scorer(PPOConfig(reward_model_path=str(tmp_path), reward_funcs=line))
    assert list(scorer.weights.items()) == [("reward_model", 3.0), ("length", 0.5), ("relevance", 1.0)]
    plain = load_scorer(PPOConfig(reward_model_path=str(tmp_path), reward_funcs=["2*length"]))
    assert dict(plain.weights) == {"reward_model": 1.0, "length": 2.0}


def test_evaluation_takes_the_same_settings():
    scorer = load_scorer(EvaluateConfig(reward_funcs=["2*length"], missing_eos_penalty=3.0))
    scores = scorer.scores(None, WordTokenizer(), [Prompt("p", (1,))] * 2, [episode(5), episode(5, finished=False)])
    assert scores.terminal.tolist() == [2.0, -1.0]


def test_dense_and_terminal_rewards_in_one_mixture_and_a_penalty(mine):
    scorer = load_scorer(PPOConfig(reward_funcs=[f"0.5*{mine}:dense + length"], missing_eos_penalty=1.5))
    episodes = [episode(5, 6, 2), episode(7, finished=False)]
    scores = scorer.scores(None, WordTokenizer(), [Prompt("p", (1,))] * 2, episodes)
    assert scores.terminal.tolist() == [3.0, -0.5]
    assert [each.tolist() for each in scores.dense] == [[2.5, 3.0, 1.0], [3.5]]
    assert scores.sums.tolist() == [9.5, 3.0]
    assert scores.parts["dense"].tolist() == [13.0, 7.0]


def test_costs_have_settings_of_their_own_and_no_penalty(mine):
    config = PPOConfig(
        reward_funcs=["length"], reward_weights=[7.0], missing_eos_penalty=5.0,
        constraint_funcs=[f"2*{mine}:one", "length"],
    )  # fmt: skip
    constraint = load_constraint(config)
    costs = constraint.scores(None, WordTokenizer(), [Prompt("p", (1,))], [episode(5, 6, finished=False)])
    assert costs.terminal.tolist() == [4.0]
    assert load_constraint(PPOConfig(reward_funcs=["length"], constraint_threshold=1.0)) is None


def test_the_constraint_s_adapter_plays_a_role_of_its_own(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny_model}"}}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    spec = []
    monkeypatch.setattr("onecard.rewards.adapter.find_stop_tokens", lambda roles, tokenizer: {2})

    def score_sequences(roles, sequences, *, batch_size, role):
        spec.append((role, [sequence.tokens for sequence in sequences], batch_size))
        return [1.0] * len(sequences)

    monkeypatch.setattr("onecard.rewards.adapter.score_sequences", score_sequences)
    config = PPOConfig(
        reward_model_path=str(tmp_path), constraint_model_path=str(tmp_path), constraint_funcs=["4*constraint_model"],
        per_device_eval_batch_size=3,
    )  # fmt: skip
    for scorer, total in ((load_scorer(config), 1.0), (load_constraint(config), 4.0)):
        judged = scorer.scores(None, WordTokenizer(), [Prompt("p", (1,))], [episode(5, 6, finished=False)])
        assert judged.terminal.tolist() == [total]
    assert spec == [(role, [(1, 5, 6, 2)], 3) for role in ("reward", "constraint")]


@pytest.mark.parametrize(
    ("load", "settings", "message"),
    [
        (load_scorer, {}, "--reward_model_path or --reward_funcs is missing"),
        (load_scorer, {"reward_funcs": ["2*length", "fluency"], "reward_weights": [1.0, 1.0]},
         "reward_weights: given, but reward_funcs has a weight for 'length' too; expected weights in one."),
        (load_scorer, {"reward_funcs": ["length + reward_model"]},
         "reward_funcs: 'reward_model' needs --reward_model_path."),
        (load_scorer, {"reward_funcs": ["length + fluncy"]}, "reward_funcs: 'fluncy' is unknown"),
        (load_scorer, {"reward_funcs": ["length + fluncy"]}, "Did you mean 'fluency'?"),
        (load_scorer, {"reward_funcs": ["length - fluency"]}, "reward_funcs: 'length - fluency' is unknown"),
        (load_scorer, {"reward_funcs": ["2*length + 3*length"]}, "reward_funcs: 'length' is given twice"),
        (load_scorer, {"reward_funcs": ["1e999*length"]}, "reward_funcs: the weight of 'length' is inf; expected a"),
        (load_scorer, {"reward_funcs": ["length"], "reward_weights": [math.nan]}, "reward_weights: nan, expected"),
        (load_scorer, {"reward_funcs": ["length"], "reward_label": "good"},
         "reward_label: 'good' is a classifier's label, but reward_model_path is not set."),
        (load_constraint, {"constraint_funcs": ["lenght:3"]}, "constraint_funcs: 'lenght:3' is unknown"),
        (load_constraint, {"constraint_funcs": ["no_such_thing:f"]}, "constraint_funcs: there is no module 'no_such"),
        (load_constraint, {"constraint_funcs": ["regex:("]}, "constraint_funcs: 'regex:(': invalid regular expression"),
        (load_constraint, {"constraint_funcs": ["length", "length"]}, "constraint_funcs: 'length' is given twice"),
        (load_constraint, {"constraint_funcs": ["constraint_model"]},
         "constraint_funcs: 'constraint_model' needs --constraint_model_path."),
        (load_constraint, {"constraint_funcs": ["reward_model"]}, "constraint_funcs: 'reward_model' is unknown"),
        (load_constraint, {"constraint_model_path": "/no/where"}, "constraint_model_path: no folder /no/where"),
        (load_constraint, {"constraint_label": "bad"},
         "constraint_label: 'bad' is a classifier's label, but constraint_model_path is not set."),
    ],
)  # fmt: skip
def test_settings_that_make_no_judge(load, settings, message):
    assert message in complaint(load, **settings)
