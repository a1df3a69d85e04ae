"""What `onecard fit` plans for the benchmark's cases, beside what their steps hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="the cases are timed against TRL's own trainer")

from benchmarks import records
from benchmarks.train_step import __main__ as program
from benchmarks.train_step import cases, limits, memory_tables, planned, ppo, results, run, watch
from benchmarks.train_step.cases import Case
from benchmarks.train_step.material import Model
from benchmarks.train_step.results import Memory
from benchmarks.train_step.run import Timing
from onecard.commands.fit.plan import Plan
from onecard.commands.fit.tracker import Phase

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
SMALL = Model("small", hidden=128, layers=3, heads=4, key_heads=2, inner=352, vocab=4096)
DPO = Case("small", "dpo", SMALL, prompt=48, response=32, items=4, per_pass=2)
PPO = replace(DPO, kind="ppo", items=8)
TIMING = Timing(repeats=1, warmup=0, budget=0.0)
CAPPED = [case for case in cases.on_a_gpu() if case.cap_gib]


def measured(case: Case, dtype: torch.dtype = torch.float32) -> results.Result:
    return run.measure_case(case, CPU, dtype, TIMING, lambda _: None)


def named(result: results.Result) -> dict[str, Memory]:
    return {each.phase: each for each in result.memory}


@pytest.mark.long  # `on_a_gpu.sh` plans them again before it begins one
@pytest.mark.parametrize("case", CAPPED, ids=lambda case: f"{case.kind} {case.name}")
def test_every_case_with_a_cap_is_planned_to_fit_under_it(case):
    """Without a GPU, as it would be run on one: before anybody pays for finding out that it does not."""
    pytest.importorskip("bitsandbytes")
    assert planned.too_large(case, torch.bfloat16) is None
    plan = planned.plan_of(case, torch.bfloat16, GPU)
    assert plan.peak > case.model.hidden * case.model.vocab * 2  # it knows at least of the embeddings


def test_the_promised_caps_are_among_the_cases():
    promised = {(case.kind, case.model.name, case.cap_gib, case.load_in_4bit) for case in CAPPED}
    for kind in ("dpo", "ppo"):
        assert (kind, "Llama-3.1-8B", 10.5, True) in promised
        assert (kind, "Qwen2.5-1.5B", 5.0, True) in promised
    assert not any(case.mixed for case in CAPPED)  # the plan is of the longest, and that is what must fit


def test_a_case_whose_plan_is_above_its_cap_is_not_begun(monkeypatch):
    monkeypatch.setattr(run, "measure_ppo", None)
    result = measured(replace(PPO, cap_gib=0.001))
    assert "expected at most the cap of 0.001 GiB" in result.refused
    assert "GiB in its" in result.refused
    assert result.rows == ()


def test_the_plan_is_of_the_settings_that_are_run(tmp_path):
    from benchmarks.train_step.dpo import Ours
    from benchmarks.train_step.material import write_folder

    case = replace(DPO, gradient_checkpointing=True, micro_batch_tokens=200)
    own = planned.config_of(case, torch.float32)
    folder = write_folder(SMALL, tmp_path)
    side = run.candidates(case, CPU, torch.float32)[results.OURS][1](run.task_of(case, folder, CPU, torch.float32))
    assert isinstance(side, Ours)
    assert replace(own, model=str(folder)) == side.trainer.config
    assert (own.micro_batch_tokens, own.gradient_checkpointing, own.adapter_dtype) == (200, True, "float32")
    case = replace(PPO, micro_batch_tokens=200, gradient_checkpointing=True)
    config = ppo.Iterations(case, folder, CPU, torch.float32).config
    own = planned.config_of(case, torch.float32)
    assert replace(own, model=str(folder), reward_model_path=config.reward_model_path) == config
    assert (own.micro_batch_tokens, own.gradient_checkpointing, own.batch_size) == (200, True, PPO.items)


# As a GPU's cases are, but for bfloat16, whose 4-bit weights bitsandbytes packs anew on some CPUs
CARD = replace(PPO, load_in_4bit=True, gradient_checkpointing=True, optim="paged_adamw_8bit", micro_batch_tokens=160)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(DPO, torch.float32), (DPO, torch.bfloat16), (PPO, torch.float32), (CARD, torch.float32)],
    ids=["dpo", "dpo in 16 bit", "ppo", "ppo of a card"],
)
def test_the_plan_stands_beside_each_phase_and_is_right(case, dtype):
    if case.load_in_4bit:
        pytest.importorskip("bitsandbytes")
    result = measured(case, dtype)
    found = named(result)
    wanted = {"dpo": {watch.TRAIN, watch.OPTIMIZER}, "ppo": set(watch.PHASES)}[case.kind]
    assert set(found) == wanted | {watch.WHOLE}
    for name, each in found.items():
        assert abs(each.off) <= planned.MOST_OFF, (name, each)
    # a twentieth of the optimizer's few vectors is nothing, and one matrix made whole of 4 bits is more than one here
    for name in wanted - {watch.OPTIMIZER} if not case.load_in_4bit else ():
        each = found[name]
        assert abs(results.off(each.planned_above, each.measured_above)) <= planned.MOST_OFF, (name, each)
    assert found[watch.WHOLE].planned == max(each.planned for each in result.memory)
    assert planned.verdict(result.memory) == "Plan within 5%: met in each phase"
    assert len(result.learned) >= 2
    assert not result.shrunk


def test_where_lengths_are_drawn_there_is_no_plan_and_a_reason():
    result = measured(replace(PPO, mixed=True))
    assert result.memory == ()
    assert result.unplanned == planned.MIXED
    assert planned.MIXED in "".join(memory_tables.memory_parts(result))


def test_a_plan_is_compared_whole_and_above_what_stays():
    """By hand: 100 bytes stay between steps; gradients of 10 are there when the optimizer begins."""
    phases = (Phase("load", 0, 500), Phase("train", 100, 160), Phase("optimizer step", 110, 115))
    plan = Plan(90, 10, phases, 0, 0.0)
    above = {watch.TRAIN: 50, watch.OPTIMIZER: 12, watch.WHOLE: 50}
    assert planned.compared(plan, 104, watch.Peaks(104, above)) == (
        Memory(watch.TRAIN, 160, 60, 154, 50),
        Memory(watch.OPTIMIZER, 115, 15, 116, 12),
        Memory(watch.WHOLE, 160, 60, 154, 50),
    )
    assert [each.measured for each in planned.compared(plan, None, None)] == [None] * 3


def test_a_missed_plan_is_said_phase_by_phase():
    good, bad = Memory("a", 100, 40, 104, 44), Memory("b", 110, 50, 100, 40)
    assert planned.verdict([good, bad]) == "Plan within 5%: missed in b (+10.0%)"
    assert planned.verdict([Memory("a", 100, 40)]) == "Plan within 5%: nothing was measured"
    empty = run.empty(replace(DPO, cap_gib=5.0), torch.float32, 0)
    lines = memory_tables.memory_lines(replace(empty, memory=(good, bad, Memory("c", 1, 1))))
    assert [(line[0], line[3], line[4]) for line in lines] == [
        ("a", "-3.8%", "met"),
        ("b", "+10.0%", "missed"),
        ("c", memory_tables.NONE, memory_tables.NONE),
    ]


def test_steps_under_a_cap_are_counted_and_have_to_be_numbers():
    result = run.empty(replace(DPO, cap_gib=5.0), torch.float32, 0)
    assert "MISSED, expected 2" in memory_tables.steps_verdict(replace(result, learned=((0.7, 1.0),)))
    words = memory_tables.steps_verdict(replace(result, learned=((0.7, 1.0), (0.6, 2.0)), shrunk=True))
    assert words.startswith("Whole steps under a cap of 5 GiB: 2, loss 0.6 to 0.7, gradient norm 1 to 2, all finite")
    assert "MEMORY RAN OUT" in words
    refused = run.checked(replace(result, learned=((0.7, 1.0), (float("nan"), 1.0))))
    assert "nan" in refused.refused
    assert refused.rows == refused.learned == ()


def test_memory_that_ran_out_is_noticed(tmp_path):
    from benchmarks.train_step.material import write_folder

    made = ppo.Iterations(PPO, write_folder(SMALL, tmp_path), CPU, torch.float32)
    assert made.cuts() == made.first_cuts
    for budget in (made.trainer.budget, made.job.budget, made.job.sampler.budget):
        before = budget.size
        budget.size = replace(before, tokens=7)
        assert made.cuts() != made.first_cuts
        budget.size = before


def test_a_card_s_states_in_shared_memory_are_not_the_card_s():
    parameter = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.AdamW([parameter])
    state = torch.zeros(100)
    state.is_paged = True  # as bitsandbytes marks them
    optimizer.state[parameter]["state1"] = state
    model = torch.nn.ParameterList([parameter])
    both = [run.held_bytes(model, optimizer, paged=paged) for paged in (True, False)]
    assert both == [4 * 108, 4 * 8]


def test_on_a_gpu_peaks_are_above_what_was_held_when_the_step_began(monkeypatch):
    """An allocator of our own: 100 bytes are held, a phase takes 50 more, the next 30, the first one again 70."""
    peaks = iter([150, 130, 170, 155, 120])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    watches = []
    for names in (("a", "b", "a"), ("a", "b")):
        watches.append(watch.Watch(GPU))
        with watches[-1].whole():
            for name in names:
                with watches[-1].phase(name):
                    pass
    assert watches[0].above() == {"a": 70, "b": 30, watch.WHOLE: 70}
    assert watch.highest(watches) == watch.Peaks(100, {"a": 70, "b": 30, watch.WHOLE: 70})
    assert set(watches[0].seconds) == {"a", "b", watch.WHOLE}


def test_bare_products_leave_no_memory():
    bare = limits.BareProducts(DPO, CPU, torch.float32, 8, 1e6)
    bare.ready()
    assert bare.operands is not None
    bare()
    assert bare.operands is None
    assert bare.flops == bare.times * 2 * 8 * SMALL.hidden * SMALL.inner


def test_the_record_keeps_it_and_older_ones_are_read(tmp_path):
    assert program.main(["--smoke", "--only", "ppo", "--case", "1.5B, NF4, under 5 GiB", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    (result,) = results.load(path).results
    assert set(named(result)) == {*watch.PHASES, watch.WHOLE}
    page = path.with_suffix(".md").read_text()
    assert "Plan within 5%: " in page
    assert "Whole steps: " in page
    for old in (records.ROOT / "benchmarks" / "results").glob("*/train-step-*.json"):
        assert results.load(old).results
