"""The benchmarks of steps and rollouts: both sides do the same work, counts are right, and each command runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="times TRL's own trainer")

from benchmarks import cli, measure, profile_ppo, records, rollout, sharing
from benchmarks.measure import Timing
from benchmarks.records import OURS, WHOLE, Case
from benchmarks.render import MOST_OFF, TRL, UNSHARED, off
from benchmarks.train_step import cases, phases, run, synthetic
from benchmarks.train_step.__main__ import command as train_step
from benchmarks.train_step.cases import LORA_RANK, TINY, Flops, StepCase, dpo_flops
from benchmarks.train_step.dpo import COMPARED_METRICS, OnecardDPO
from benchmarks.train_step.synthetic import random_model, write_folder

CPU = torch.device("cpu")
TIMING = Timing(repeats=2, budget=0.0)
DPO = StepCase("tiny", "dpo", TINY, prompt=20, response=12, batch_size=4, micro_batch_size=2, mixed_lengths=True)
PPO = replace(DPO, kind="ppo", batch_size=8, micro_batch_size=2)
SMALL = synthetic.Model("small", hidden=128, layers=3, heads=4, kv_heads=2, intermediate=352, vocab=4096)
PLANNED = StepCase("small", "dpo", SMALL, prompt=48, response=32, batch_size=4, micro_batch_size=2)
CAPPED = [case for case in cases.gpu_cases() if case.memory_cap_gib]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(TINY, tmp_path)


def measured(case: StepCase) -> Case:
    return run.measure_case(case, CPU, torch.float32, TIMING, lambda _: None)


# --- what is counted


def test_flops_are_what_pytorch_counts(folder):
    """Of eager attention PyTorch counts all n * n pairs, and it starts from embeddings that need no gradient."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    tokens, layers, d = 17, TINY.layers, TINY.hidden
    model = random_model(str(folder), dtype=torch.float32, device_map={"": CPU}, attn_implementation="eager").train()
    tuned = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    with FlopCounterMode(display=False) as forward:
        out = tuned(input_ids=torch.arange(2, 2 + tokens).unsqueeze(0), use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    found = Flops.of(TINY, tokens, tokens)
    full = 2 * 2 * d * layers * tokens * tokens
    rotation = forward.get_total_flops() - (found.forward - found.attention + full)
    assert 0 <= rotation <= 2 * tokens * d  # positions times frequencies, computed as a product
    kv = d // TINY.heads * TINY.kv_heads
    first = 2 * tokens * (d * d + 2 * d * kv) + 3 * 2 * tokens * LORA_RANK * d  # layer 0's inputs need no gradient
    assert backward.get_total_flops() == found.backward - 2 * found.attention + 2 * full - first
    assert dpo_flops(TINY, [(2, 1)], precomputed=False) > dpo_flops(TINY, [(2, 1)], precomputed=True)


# --- DPO


def test_all_candidates_take_the_same_steps(folder):
    """Two updates in a row, of micro-batches of mixed lengths: gradients, clipping and AdamW are the same."""
    case = replace(DPO, gradient_checkpointing=True)
    builds = run.candidates(CPU)
    task = run.task_of(case, folder, CPU, torch.float32)
    sides = {each: builds[each][1](task) for each in (OURS, UNSHARED, TRL, run.TRL_ANSWERS)}
    for _ in range(2):
        for side in sides.values():
            measure.ready(side)
            side()
        for each, side in sides.items():
            for key in COMPARED_METRICS:
                assert side.row[key] == pytest.approx(sides[OURS].row[key], rel=2e-4, abs=2e-5), (each, key)
    mine, theirs = (
        [parameter for parameter in sides[each].model.parameters() if parameter.requires_grad] for each in (OURS, TRL)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)


def test_a_wrong_first_step_is_not_timed(monkeypatch):
    right = OnecardDPO.step
    monkeypatch.setattr(OnecardDPO, "step", lambda self, indices: {**right(self, indices), "grad_norm": 1e3})
    for interleaved in (True, False):
        result = measured(replace(DPO, interleaved=interleaved))
        assert result.rows == ()
        assert "grad_norm of the first step is 1000" in result.refused


# --- the memory plan


@pytest.mark.grid  # `benchmarks.train_step` plans each case too, before it runs it
@pytest.mark.parametrize("case", CAPPED, ids=lambda case: f"{case.kind} {case.name}")
def test_every_case_with_a_cap_is_planned_to_fit_under_it(case):
    pytest.importorskip("bitsandbytes")
    assert run.why_too_large(case, torch.bfloat16) is None


def test_the_promised_caps_are_among_the_cases():
    promised = {(case.kind, case.model.name, case.memory_cap_gib, case.load_in_4bit) for case in CAPPED}
    for kind in ("dpo", "ppo"):
        assert {(kind, "Llama-3.1-8B", 10.5, True), (kind, "Qwen2.5-1.5B", 5.0, True)} <= promised
    assert "expected at most the cap of 0.001 GiB" in measured(replace(PLANNED, memory_cap_gib=0.001)).refused


@pytest.mark.grid  # test_fit_measured.py compares the same plans with the profiler
@pytest.mark.parametrize("case", [PLANNED, replace(PLANNED, kind="ppo", batch_size=8)], ids=["dpo", "ppo"])
def test_the_plan_stands_beside_each_phase_and_is_right(case):
    found = measured(case).found
    wanted = {"dpo": {phases.TRAIN, phases.OPTIMIZER}, "ppo": set(phases.PHASES)}[case.kind]
    assert {each["phase"] for each in found["memory"]} == wanted | {WHOLE}
    for each in found["memory"]:
        assert abs(off(each["planned"], each["measured"])) <= MOST_OFF, each
        if each["phase"] not in (phases.OPTIMIZER, WHOLE):
            assert abs(off(each["planned_above"], each["measured_above"])) <= MOST_OFF, each
    assert len(found["learned"]) >= 2


# --- rollouts


@pytest.mark.grid
def test_both_samplers_count_the_same_work(tmp_path):
    """Every token of random weights ends with the same probability: both draw lengths of the same distribution."""
    assert rollout.ended_length([5, 6, 2, 0, 0, 2], {2, 9}) == 3
    case = replace(rollout.ON_CPU, prompts=96, batch_size=48, max_new_tokens=64)
    task = rollout.random_task(case, tmp_path, torch.float32)
    share = 1 / case.mean
    expected, spread = 96 * (1 - (1 - share) ** 64) / share, 96**0.5 / share
    torch.manual_seed(0)
    for count in (rollout.ours(task), rollout.peer(task)):
        assert abs(count - expected) < 4 * spread
    assert rollout.error_of_ours(task) < 1e-4


def test_wrong_log_probabilities_are_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "error_of_ours", lambda task: 0.1)
    words = ["--smoke", "--case", "0.5B, bf16, 64 rows", "--out", str(tmp_path)]
    assert cli.main(rollout.command, words) == 1
    assert "off by 0.1 nat" in capsys.readouterr().err


# --- the commands, at tiny sizes


@pytest.mark.parametrize(
    ("command", "words", "rows", "heads"),
    [
        (train_step, ["--smoke", "--case", "1.5B, bf16"], [OURS, UNSHARED, TRL], "tokens/s | of limit | peak, MiB"),
        (rollout.command, ["--smoke", "--case", "0.5B, bf16, 64 rows"], [OURS, rollout.PEER], "ms a step"),
        (profile_ppo.command, ["--smoke", "--case", "1.5B, bf16"], [*phases.PHASES, WHOLE], "busy"),
        (sharing.command, ["--quick", "--shape", "4/6", "--tokens", "60"], [OURS, UNSHARED], "tokens/s"),
    ],
)
def test_a_command_runs_dry_and_its_table_has_the_columns(command, words, rows, heads, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_ppo, "LONGEST", 4)  # as long answers are: in a window
    assert cli.main(command, [*words, "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    report = records.load(path)
    assert report.complete
    assert report.quick
    assert [row.name for row in report.cases[0].rows][: len(rows)] == rows
    assert all(row.seconds or row.reason for case in report.cases for row in case.rows)
    page = path.with_suffix(".md").read_text()
    assert heads in page
    assert "QUICK RUN" in page


def test_minutes_run_out_and_unknown_cases_are_one_line(tmp_path, capsys):
    assert cli.main(train_step, ["--smoke", "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert "not begun" in capsys.readouterr().out
    for command in (train_step, rollout.command, profile_ppo.command):
        assert cli.main(command, ["--case", "9B"]) == 2
        error = capsys.readouterr().err
        assert "--case '9B'" in error
        assert error.count("\n") == 1
