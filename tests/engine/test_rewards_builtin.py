"""The rewards that `reward_funcs` knows by name, against numbers worked out by hand."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import torch

from onecard.config import PPOConfig
from onecard.data import Prompt
from onecard.data.batches import Episode, TokenSequence
from onecard.models.build import load_ppo_roles
from onecard.models.load import load_tokenizer
from onecard.rewards.answers import Answers, RewardInput
from onecard.rewards.builtin import load_builtin
from onecard.rewards.scorer import load_scorer
from onecard.utils.errors import OnecardError


def case(*texts: str, prompts: tuple[Prompt, ...] = (), tokens: tuple[int, ...] = (), **columns: Any) -> RewardInput:
    """Answers as texts alone, or as so many tokens."""
    texts = texts or ("",) * len(tokens)
    prompts = prompts or (Prompt("p", (1,)),) * len(texts)
    ids = tuple((5,) * count for count in tokens or (1,) * len(texts))
    named = {name: tuple(values) for name, values in columns.items()}
    answers = Answers(tuple(prompt.text for prompt in prompts), tuple(texts), ids, named)
    return RewardInput(None, None, prompts, (), answers, 2)


def scores(entry: str, judged: RewardInput) -> list[float]:
    return load_builtin(entry, "reward_funcs")(judged)


def complaint(entry: str, judged: RewardInput | None = None) -> str:
    with pytest.raises(OnecardError) as caught:
        scores(entry, judged or case("a"))
    return str(caught.value)


def test_fluency_is_the_reference_s_mean_log_likelihood(tiny_model):
    """Of the reference, not of the policy; per response token; at temperature 1; in the answers' order."""
    config = PPOConfig(
        model=str(tiny_model), reward_funcs=["fluency"], temperature=0.5, per_device_eval_batch_size=2, lora_alpha=64
    )
    roles, scorer = load_ppo_roles(config), load_scorer(config)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(0.1)
    lengths = [(3, 2), (1, 6), (5, 3)]
    episodes, expected = [], []
    for index, (prompt, response) in enumerate(lengths):
        generator = torch.Generator().manual_seed(index)
        tokens = tuple(torch.randint(3, 300, (prompt + response,), generator=generator).tolist())
        sequence = TokenSequence(tokens, (False,) * prompt + (True,) * response)
        episodes.append(Episode(sequence, torch.zeros(response), True))
        with roles.active("reference"), torch.no_grad():
            logits = roles.causal_model()(input_ids=torch.tensor([tokens])).logits[0, prompt - 1 : -1]
        chosen = logits.double().log_softmax(-1).gather(-1, torch.tensor(tokens[prompt:])[:, None])
        expected.append(chosen.mean().item())
    got = scorer.scores(roles, load_tokenizer(config), [Prompt("p", (1,))] * 3, episodes)
    assert got.parts["fluency"].tolist() == pytest.approx(expected, rel=1e-5)
    assert got.terminal.tolist() == got.parts["fluency"].tolist()
    assert roles.current == "policy"


def test_relevance_is_the_share_of_the_prompt_s_content_words():
    prompts = (
        Prompt("What is the CAPITAL of France? Paris, France!", (1,)),  # capital, france, paris
        Prompt("Tell a story of dragons", (1,)),  # tell, story, dragons
        Prompt("Who are you?", (1,)),  # stop words alone
    )
    texts = ("The capital is paris.", "A dragon tells", "I am you")
    assert scores("relevance", case(*texts, prompts=prompts)) == pytest.approx([2 / 3, 0.0, 0.0])


def test_relevance_to_a_chat_is_to_what_the_user_says():
    messages = (
        {"role": "system", "content": "assistant rules"},
        {"role": "user", "content": "blue cats"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "red dogs"},
    )
    chat = Prompt("<|user|> blue cats and much else", (1,), messages=messages)
    assert scores("relevance", case("Red user cats; assistant rules, yes", prompts=(chat,))) == [0.5]


def test_diversity_is_what_no_other_answer_has():
    """Worked by hand: words, then pairs of words; their mean.

    the cat sat      the is shared: 2/3; the pairs are all its own: 2/2
    The dog dog dog  dog alone is its own: 1/4; (the dog), (dog dog) of 3 pairs: 2/3
    red              its own: 1/1; no pairs: 0
    (nothing)        0; 0
    """
    got = scores("diversity", case("the cat sat", "The dog dog dog!", "red", "..."))
    assert got == pytest.approx([(2 / 3 + 1) / 2, (1 / 4 + 2 / 3) / 2, 0.5, 0.0])
    assert scores("diversity", case("same words", "same words")) == [0.0, 0.0]
    assert scores("diversity", case("all are new")) == [1.0]


def test_length_is_tokens_or_how_near_they_come():
    judged = case(tokens=(1, 4, 5, 9, 12))
    assert scores("length", judged) == [1.0, 4.0, 5.0, 9.0, 12.0]
    assert scores("length:5", judged) == pytest.approx([0.2, 0.8, 1.0, 0.2, 0.0])


def test_regex_is_found_anywhere_and_keeps_its_spaces_and_colons():
    judged = case("a: 12 ", "12", "b")
    assert scores("regex:[0-9]+", judged) == [1.0, 1.0, 0.0]
    assert scores("regex:^[0-9]+$", judged) == [0.0, 1.0, 0.0]
    assert scores("regex:a: .* $", judged) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("4", "4", 1),
        (" 4.\n", 4, 1),
        ("First 3, then it is 4", "4", 1),
        ("It is 4, not 3", "4", 0),
        ("so x = 4.0", "4", 1),
        ("$1,234.50", 1234.5, 1),
        ("between 3-4", "4", 1),
        ("x=-4", "4", 0),
        ("x=-4", "-4", 1),
        ("12,34", "34", 1),
        (".5", "0.5", 1),
        ("5", ".5", 0),
        ("Paris", "paris", 1),
        ("Let me think.\n\n  **Paris.**  \n", "Paris", 1),
        ("Paris is it", "Paris", 0),
        ("The answer is\n  New\tYork!", "new york", 1),
        ("yes", "It is\n#### yes", 1),
        ("I think\n#### Yes.\n", "yes", 1),
        ("the sum is 72.", "12 + 60 = 72\n#### 72", 1),
        ("none at all", "4", 0),
        ("", "4", 0),
        ("0.00001", 0.00001, 1),
        ("The sum is 12345678901234567890123", 12345678901234567890123, 1),
        ("12345678901234567890124", 12345678901234567890123, 0),
        ("1.5", Decimal("1.50"), 1),
        ("1.5", "1.50", 1),
        ("The code is 02134.", "02134", 1),
        ("2134", "02134", 0),
        ("02134", "2134", 1),
        ("12:30", "12:30", 1),
        ("30", "12:30", 0),
        ("It is\nTrue", "True", 1),
        ("n/a", "N/A", 1),
        ("4 cats", "4 cats", 1),
        ("I see 4", "4 cats", 0),
    ],
)
def test_an_exact_answer(answer, expected, score):
    assert scores("exact_answer", case(answer, solution=[expected])) == [score]


def test_an_exact_answer_takes_answer_before_solution():
    assert scores("exact_answer", case("4", "5", solution=["5", "5"], answer=["4", 4])) == [1.0, 0.0]
    assert scores("exact_answer", case("4", "5", solution=["4", "4"], answer=[None, "5"])) == [1.0, 1.0]
    assert scores("exact_answer", case("4", "5", solution=["4", None], answer=[None, "5"])) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("entry", "judged", "message"),
    [
        ("fluency:2", None, "reward_funcs: 'fluency:2': expected its name alone, without a colon."),
        ("relevance:", None, "reward_funcs: 'relevance:': expected its name alone, without a colon."),
        ("length:", None, "reward_funcs: 'length:': expected a number of tokens, as in length:50."),
        ("length:0", None, "reward_funcs: 'length:0': expected a number of tokens, as in length:50."),
        ("length:-3", None, "reward_funcs: 'length:-3': expected a number of tokens, as in length:50."),
        ("regex", None, "reward_funcs: 'regex': expected a pattern, as in regex:[0-9]+."),
        ("regex:(", None, "reward_funcs: 'regex:(': invalid regular expression: missing ), unterminated subpattern"),
        ("exact_answer", case("a", label=["b"]), "a column 'answer' or 'solution' in the dataset, got prompt, label."),
        ("exact_answer", case("a"), "expected a column 'answer' or 'solution' in the dataset, got prompt."),
        ("exact_answer", case("a", answer=[None]), "exact_answer: answer is null, expected text or a number; prompt"),
        (
            "exact_answer",
            case("a", solution=[None], answer=[None]),
            "exact_answer: answer is null, expected text or a ",
        ),
        ("exact_answer", case("a", answer=[True]), "exact_answer: answer is bool, expected text or a number; prompt"),
        ("exact_answer", case("a", answer=[1.2e22]), "exact_answer: answer is 1.2e+22, not an exact number, exp"),
        ("exact_answer", case("a", answer=[float("nan")]), "exact_answer: answer is nan, not an exact number, "),
        ("exact_answer", case("a", answer=[["b"]]), "exact_answer: answer is list, expected text or a number; prompt"),
    ],
)
def test_what_a_built_in_reward_cannot_do(entry, judged, message):
    assert message in complaint(entry, judged)
