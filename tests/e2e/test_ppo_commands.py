"""`onecard ppo` end to end on a tiny model: what it writes, and how it goes on."""

from __future__ import annotations

import json

import pytest
import yaml

from onecard import reporting
from tests.e2e.ppo_material import (
    STOPS,
    WORDS,
    all_finite,
    error_line,
    metrics,
    no_report,
    same_policy,
    training_rows,
    without_clock,
    write_rows,
)


def test_a_run_leaves_all_that_it_promises(onecard, ppo, monkeypatch, tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    assert ppo().code == 0
    rows, evaluated = training_rows(run), [row for row in metrics(run) if "eval_objective/scores" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["episode"] for row in rows] == [8, 16]
    assert [row["step"] for row in evaluated] == [0, 2]
    assert evaluated[0]["eval_objective/kl"] == 0.0
    assert all_finite(run)
    assert all(row["rewards/score/mean"] == row["objective/scores"] for row in rows)
    assert all(row["policy/updates"] == 4 for row in rows)
    assert all(0 < row["completions/clipped_ratio"] < 1 for row in rows)  # some answers end, some are cut

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0] * 4 + [2] * 4
    assert samples[0]["prompt"] == samples[4]["prompt"]
    page = (run / "report.html").read_text()
    assert samples[0]["prompt"].strip() in page
    assert "before" in page
    assert "after" in page
    assert (run / "plots" / "kl.png").is_file()

    ids = AutoTokenizer.from_pretrained(run / "policy")("the cat", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, str(run / "policy"))(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3

    monkeypatch.setattr(reporting, "write_run_report", no_report)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["batch_size"], saved["stop_token"], saved["model"]) == (8, STOPS, str(tiny_model))
    again = onecard("ppo", "--config", run / "config.yaml", "--output_dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert without_clock(tmp_path / "again") == without_clock(run)
    assert same_policy(tmp_path / "again", run)


@pytest.mark.parametrize("start", ["base", "SFT adapter"])
def test_the_first_minibatch_has_ratio_1_and_no_kl(quick, ppo, tmp_path, material, start):
    """One epoch and one minibatch (of two micro-batches): nothing has moved yet when its metrics are taken."""
    model = {"--model": material / "sft" / "policy"} if start == "SFT adapter" else {}
    result = ppo({**model, "--num_ppo_epochs": 1, "--gradient_accumulation_steps": 2})
    assert result.code == 0, result.err
    first, second = training_rows(tmp_path / "run")
    assert first["policy/updates"] == 1
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-10)
    assert first["policy/clipfrac_avg"] == 0.0
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(second["objective/kl"]) > 1e-3  # and then it has


def test_a_reward_adapter_judges(quick, ppo, tmp_path, material):
    result = ppo({"--reward_funcs": None, "--reward_model_path": material / "rm" / "reward"})
    assert result.code == 0, result.err
    assert all_finite(tmp_path / "run")
    for row in training_rows(tmp_path / "run"):
        assert row["objective/scores"] == row["rewards/reward_model/mean"] != 0.0
    assert (tmp_path / "run" / "checkpoint-2" / "value" / "head.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoint-2" / "reward").exists()  # frozen: it is where it was


def test_scores_are_the_weighted_sum_less_the_penalty(quick, ppo, tmp_path, material):
    functions = [f"{material / 'good.py'}:score", f"{material / 'good.py'}:length"]
    result = ppo(
        {"--reward_model_path": material / "rm" / "reward", "--reward_funcs": functions,
         "--reward_weights": [0.5, 2, -3], "--missing_eos_penalty": 0.25}
    )  # fmt: skip
    assert result.code == 0, result.err
    for row in metrics(tmp_path / "run"):
        start = "" if "loss" in row else "eval_"
        parts = [row[f"{start}rewards/{name}/mean"] for name in ("reward_model", "score", "length")]
        expected = 0.5 * parts[0] + 2 * parts[1] - 3 * parts[2] - 0.25 * row[f"{start}completions/clipped_ratio"]
        assert row[f"{start}objective/scores"] == pytest.approx(expected, abs=1e-5)
        assert all(part != 0 for part in parts)


def test_4_bit_checkpointing_and_paged_8_bit_adam(quick, ppo, tmp_path):
    more = {"--load_in_4bit": True, "--gradient_checkpointing": True, "--optim": "paged_adamw_8bit", "--lora_r": 64}
    result = ppo(more)
    assert result.code == 0, result.err
    assert all_finite(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in training_rows(tmp_path / "run"))


def test_bad_rows_are_skipped_and_counted(quick, ppo, tmp_path):
    rows = [{"prompt": "the cat"}, {"prompt": "a cat " * 80}, *({"prompt": f"a {word}"} for word in WORDS)]
    bad = write_rows(tmp_path / "some.jsonl", [*rows, {"prompt": None}])
    refused = error_line(ppo({"--dataset": bad}))
    assert "some.jsonl:2: prompt:" in refused
    assert "expected at most 120, so that the response has room" in refused
    assert not (tmp_path / "run").exists()
    result = ppo({"--dataset": bad, "--skip_bad_rows": True})
    assert result.code == 0, result.err
    assert "2 of 9 rows are bad and were skipped" in result.err
    assert "some.jsonl:9: prompt is null" in result.err
    assert "3 examples to train on, 4 held out" in result.err


def test_a_column_that_only_some_rows_have_is_none_elsewhere(quick, ppo, tmp_path):
    """Even in an iteration whose rows all lack it."""
    rows = [{"prompt": f"the {WORDS[i % 6]} {i}", **({"solution": "3"} if i == 0 else {})} for i in range(24)]
    (tmp_path / "f.py").write_text("def f(completions, solution):\n    return [float(s or 1) for s in solution]\n")
    result = ppo({"--dataset": write_rows(tmp_path / "some.jsonl", rows), "--reward_funcs": f"{tmp_path / 'f.py'}:f"})
    assert result.code == 0, result.err


def test_a_function_that_fails_later_leaves_a_checkpoint(quick, ppo, tmp_path):
    """It asks a service, say, that is away for a while. The function itself stays as it is."""
    away, function = tmp_path / "away", tmp_path / "f.py"
    function.write_text(
        "import os\n"
        "calls = []\n"
        "def f(completions, **kwargs):\n"
        "    calls.append(1)\n"
        # two calls of the startup check, the first evaluation, then one an iteration: the fifth iteration's fails
        f"    if len(calls) >= 8 and os.path.exists({str(away)!r}):\n"
        "        raise ConnectionError('no answer')\n"
        "    return [len(set(text)) / 10 for text in completions]\n"
    )
    more = {"--reward_funcs": f"{function}:f", "--max_steps": 6, "--save_steps": 2}
    away.touch()
    assert "f.py:f raised ConnectionError: no answer" in error_line(ppo(more))
    assert [row["step"] for row in training_rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "run").glob("*check*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "run" / "policy").exists()
    away.unlink()
    assert ppo({**more, "--output_dir": tmp_path / "whole"}).code == 0
    resumed = ppo({**more, "--resume": True})
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.err
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "whole")
    assert same_policy(tmp_path / "run", tmp_path / "whole")
