"""The demo's corpus: reproducible, as described, and not to be solved by a rule that reads one word or the length."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from onecard.commands.demo import corpus
from onecard.commands.demo.tiny import make_tiny_model

TOO_EASY = 0.75


@pytest.fixture(scope="module", params=[0, 42])
def paths(request, tmp_path_factory):
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus"), request.param)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def rule_accuracy(pairs, score):
    """How often the chosen answer has the higher score; a tie is a coin."""
    outcomes = [(score(pair["chosen"]), score(pair["rejected"])) for pair in pairs]
    return sum((good > bad) + 0.5 * (good == bad) for good, bad in outcomes) / len(outcomes)


def learned_rule(pairs, feature):
    """Score an answer by how often answers with the same feature were the chosen ones in `pairs`."""
    good, seen = Counter(), Counter()
    for pair in pairs:
        good[feature(pair["chosen"])] += 1
        seen.update([feature(pair["chosen"]), feature(pair["rejected"])])
    return lambda answer: (good[feature(answer)] + 1) / (seen[feature(answer)] + 2)


# --- reproducible ---


def test_same_seed_gives_the_same_bytes_whatever_python_hashes(tmp_path):
    code = "import sys; from onecard.commands.demo.corpus import write_corpus; write_corpus(sys.argv[1], 7)"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / hash_seed)], env=environment, check=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_another_seed_gives_other_rows(tmp_path):
    one, two = (contents(corpus.write_corpus(tmp_path / str(seed), seed).sft.parent) for seed in (1, 2))
    assert one.keys() == two.keys()
    assert all(one[name] != two[name] for name in one)


# --- as described ---


def test_columns_and_counts(paths):
    assert {frozenset(row) for row in rows(paths.sft) + rows(paths.sft_eval)} == {frozenset({"prompt", "completion"})}
    pairs = rows(paths.pairs) + rows(paths.pairs_eval)
    assert {frozenset(row) for row in pairs} == {frozenset({"prompt", "chosen", "rejected"})}
    assert {frozenset(row) for row in rows(paths.prompts)} == {frozenset({"prompt"})}
    assert len(rows(paths.sft)) == corpus.SFT_ROWS
    assert len(rows(paths.pairs)) == corpus.PAIR_ROWS
    assert len(rows(paths.sft_eval)) == len(rows(paths.pairs_eval)) == corpus.EVAL_ROWS
    assert len(rows(paths.prompts)) >= 16


def test_held_out_rows_combine_what_no_training_row_does(paths):
    def combinations(*files):
        requests = [corpus.REQUESTS[row["prompt"]] for file in files for row in rows(file)]
        return {(request.family.name, request.topic, request.detail) for request in requests}

    held_out = combinations(paths.sft_eval, paths.pairs_eval, paths.prompts)
    train = combinations(paths.sft, paths.pairs)
    assert not held_out & train
    assert {topic for _, topic, _ in held_out} <= {topic for _, topic, _ in train}  # each word alone is known
    assert {detail for *_, detail in held_out} <= {detail for *_, detail in train}


def test_no_answer_in_training_names_a_held_out_combination(paths):
    """Or a reward model could reject held-out combinations by sight: they would stand in wrong answers only."""
    held_out = [corpus.REQUESTS[row["prompt"]] for row in rows(paths.prompts)]
    stories = {f"{request.detail} {request.topic}" for request in held_out if request.family.name in ("shop", "story")}
    answers = [row["completion"] for row in rows(paths.sft)]
    answers += [answer for row in rows(paths.pairs) for answer in (row["chosen"], row["rejected"])]
    assert stories
    assert not [answer for answer in answers for words in stories if words in answer]


def test_answers_are_short_and_the_vocabulary_small(paths):
    answers = [answer for row in rows(paths.pairs) for answer in (row["chosen"], row["rejected"])]
    lengths = sorted(len(answer.split()) for answer in answers)
    assert lengths[0] >= 7
    assert lengths[-1] <= 36
    assert lengths[len(lengths) // 20] >= 10
    assert lengths[-len(lengths) // 20] <= 30
    prompts = [row["prompt"] for row in rows(paths.pairs)]
    assert len({word.lower() for text in answers + prompts for word in words(text)}) < 500


def test_chosen_answers_have_no_flaw_and_rejected_ones_do(paths):
    pairs = rows(paths.pairs) + rows(paths.pairs_eval)
    assert not any(corpus.flaws(row["prompt"], row["chosen"]) for row in pairs)
    kinds = [corpus.flaws(row["prompt"], row["rejected"]) for row in pairs]
    assert all(kinds)
    assert sum(len(kind) == 1 for kind in kinds) > 0.95 * len(kinds)
    shares = Counter(flaw for kind in kinds for flaw in kind)
    assert set(shares) == set(corpus.FLAWS)
    assert all(share > 0.08 * len(pairs) for share in shares.values())


@pytest.mark.parametrize("flaw", corpus.FLAWS)
def test_each_flaw_is_recognised(flaw):
    rng = random.Random(0)
    for request in corpus.REQUESTS.values():
        assert flaw in corpus.flaws(request.prompt, corpus.FLAWS[flaw](request, rng, rng))


def test_sft_rows_mix_good_answers_with_every_flaw(paths):
    found = Counter(flaw for row in rows(paths.sft) for flaw in corpus.flaws(row["prompt"], row["completion"]) or ("",))
    assert 0.3 < found[""] / corpus.SFT_ROWS < 0.6
    assert all(found[flaw] > 0.04 * corpus.SFT_ROWS for flaw in corpus.FLAWS)


# --- no short cut ---


@pytest.mark.parametrize("measure", [len, lambda answer: len(answer.split())])
def test_length_does_not_tell_the_answers_apart(paths, measure):
    """Neither the longer nor the shorter one, nor the one whose length was the likeliest to be chosen in training."""
    train, held_out = rows(paths.pairs), rows(paths.pairs_eval)
    longer = rule_accuracy(held_out, measure)
    assert max(longer, 1 - longer) < TOO_EASY
    assert rule_accuracy(held_out, learned_rule(train, measure)) < TOO_EASY


def test_no_single_token_tells_the_answers_apart(paths):
    """The best rule that counts one token, found on the training pairs, on held-out pairs."""
    train, held_out = rows(paths.pairs), rows(paths.pairs_eval)
    balance = Counter()
    for pair in train:
        good, bad = Counter(words(pair["chosen"])), Counter(words(pair["rejected"]))
        balance.update({token: (good[token] > bad[token]) - (good[token] < bad[token]) for token in good | bad})
    for token, lead in sorted(balance.items(), key=lambda item: -abs(item[1]))[:20]:
        accuracy = rule_accuracy(held_out, lambda answer, token=token: words(answer).count(token))
        assert (accuracy if lead > 0 else 1 - accuracy) < TOO_EASY, token


@pytest.mark.parametrize("place", [0, -1])
def test_first_and_last_tokens_do_not_tell_answers_apart(paths, place):
    rule = learned_rule(rows(paths.pairs), lambda answer: words(answer)[place])
    assert rule_accuracy(rows(paths.pairs_eval), rule) < TOO_EASY


# --- the tiny model ---


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    paths = corpus.write_corpus(tmp_path_factory.mktemp("texts"), 0)
    return [text for row in rows(paths.sft) for text in row.values()]


def test_tiny_model_is_an_ordinary_folder(texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = torch.random.get_rng_state()
    folder = make_tiny_model(tmp_path / "model", texts, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 512 <= len(tokenizer) <= 1024
    assert model.num_parameters() < 2_000_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert len(set(special)) == 4
    assert None not in special
    ids = tokenizer("Where is the red kite? Gladly! Déjà vu, 日本.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Where is the red kite? Gladly! Déjà vu, 日本."


def test_prompt_and_completion_tokenize_alike_when_joined(texts, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "model", texts, 0))
    for prompt, completion in list(zip(texts[::2], texts[1::2], strict=True))[:100]:
        apart = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]
        assert tokenizer(prompt + completion)["input_ids"] == apart


def test_tiny_model_has_the_same_bytes_twice(texts, tmp_path):
    once = contents(make_tiny_model(tmp_path / "model", texts, 3))
    assert contents(make_tiny_model(tmp_path / "model", texts, 3)) == once
    assert contents(make_tiny_model(tmp_path / "other", texts, 4))["model.safetensors"] != once["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_paths_are_those_written(paths):
    assert all(path.is_file() for path in astuple(paths))
    assert sorted(path.name for path in paths.sft.parent.iterdir()) == sorted(path.name for path in astuple(paths))
