"""The profile's arithmetic, its rules, and the command that prints it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="its cases are timed against TRL's own trainer")

from benchmarks.train_step import ppo, watch
from benchmarks.train_step.cases import TINY, Case
from benchmarks.train_step.material import write_folder
from benchmarks.where_time_goes import __main__ as program
from benchmarks.where_time_goes import costs, digest, iteration, record
from benchmarks.where_time_goes.costs import OTHER, Phase, kind
from benchmarks.where_time_goes.digest import Digest, Event, Operator

CPU = torch.device("cpu")
PPO = Case("tiny", "ppo", TINY, prompt=12, response=6, items=4, per_pass=2)
NS = 1_000_000_000


def event(name: str, start: float, stop: float, **more: object) -> Event:
    return Event(name, int(start * NS), int(stop * NS), more.pop("thread", 0), more.pop("on_gpu", False), **more)


def test_self_times_are_without_what_ran_inside_thread_by_thread():
    events = [
        event("outer", 0, 10),
        event("inner", 2, 5, flops=7),
        event("inner", 5, 6, flops=7),
        event("innermost", 3, 4),
        event("outer", 1, 3, thread=1),
        event("autograd::engine::evaluate_function: outer", 11, 12),
    ]
    found = digest.self_times(events)
    assert found["outer"] == Operator(6 + 2 + 1, 3, 0)
    assert found["inner"] == Operator(2 + 1, 2, 14)
    assert found["innermost"] == Operator(1, 1, 0)


def test_time_in_which_anything_ran_is_counted_once():
    assert digest.united([event("a", 0, 2), event("b", 1, 3), event("c", 1, 2), event("d", 5, 6)]) == 4
    assert digest.united([]) == 0


def test_kernels_are_named_after_the_operator_that_launched_them():
    host = [
        event("aten::mm", 0, 1, key=5, flops=100),
        event("cudaLaunchKernel", 0, 1, key=5),
        event("cudaMemcpyAsync", 1, 2, key=6),
        event("cudaStreamSynchronize", 2, 3),
        event("cudaDeviceSynchronize", 3, 4),
    ]
    kernels = [
        event("void cutlass::gemm<float>(int)", 1, 2, on_gpu=True, link=5),
        event("void at::native::splitKreduce<float>()", 2, 2.5, on_gpu=True, link=5),
        event("lonely_kernel", 4, 5, on_gpu=True, link=0),
    ]
    found = digest.digest([*host, *kernels], on_gpu=True)
    assert found.operators == {
        "aten::mm: gemm": Operator(1, 1, 100),  # once, whatever it launches
        "aten::mm: splitKreduce": Operator(0.5, 1, 0),
        "lonely_kernel": Operator(1, 1, 0),
    }
    assert found.busy == 2.5
    assert (found.launches, found.synchronisations) == (2, 1)
    assert found.flops == 100


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 2>(int)", "CatArrayBatchedCopy"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor<float>, std::array<char*, 3>>()",
            "vectorized_elementwise_kernel MulFunctor",
        ),
        ("policy_kernel", "policy_kernel"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT"),
        ("k" * 100, "k" * 80),
    ],
)
def test_kernels_have_short_names(kernel, short):
    assert digest.short(kernel) == short


def test_what_more_work_has_beyond_less():
    more = Digest({"a": Operator(5, 6, 7), "b": Operator(1, 1, 0)}, 6.0, 9, 2, 8.0)
    less = Digest({"a": Operator(1, 2, 3), "b": Operator(2, 1, 0)}, 2.0, 4, 2, 3.0)
    assert more.beyond(less) == Digest({"a": Operator(4, 4, 4)}, 4.0, 5, 0, 5.0)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("aten::mm", "products"),
        ("aten::addmm_", "products"),
        ("aten::mm: nvjet_hsh_128x256", "products"),
        ("bitsandbytes::gemv_4bit: kgemm_4bit_inference_naive", "products"),
        ("bitsandbytes::dequantize_4bit: kDequantizeBlockwise", "dequantisation of the 4-bit base"),
        ("aten::cat: CatArrayBatchedCopy", "concatenation, as of the cache of keys and values"),
        ("aten::exponential_", "drawing tokens, and log-probabilities"),
        ("aten::multinomial", "drawing tokens, and log-probabilities"),
        ("aten::_to_copy", "copies and casts"),
        ("Memcpy DtoH (Device -> Pageable)", "copies and casts"),
        ("aten::index_select", "rows that leave, and other selections"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::transpose", "views and allocations: dispatch alone"),
        ("aten::mul", OTHER),
        ("aten::silu_backward", OTHER),
    ],
)
def test_operators_have_their_kind(name, wanted):
    assert kind(name) == wanted


def test_a_phase_s_seconds_are_shared_out_to_the_last():
    """A CPU's profile of 4 s, of which 3 in operators, of a phase that takes 1 s twice without it."""
    found = Digest({"aten::mm": Operator(2, 3, 10e9), "aten::cat": Operator(1, 1)}, 3.0, 0, 0, seconds=4.0)
    phase = Phase("train", 2.0, 12 * 10**9, 1.0, found)
    seconds = costs.by_kind(phase, "cpu")
    assert sum(seconds.values()) == pytest.approx(2.0)
    assert seconds[costs.WAITS["cpu"]] == pytest.approx(0.5)
    assert seconds["products"] == pytest.approx(1.0)
    listed = {cost.what: cost.seconds for cost in costs.costs_of(phase, "cpu", rate=40e9)}
    assert listed["concatenation, as of the cache of keys and values"] == pytest.approx(0.5)
    assert listed["products beyond the count: what is recomputed, or run on padding"] == pytest.approx(8 / 40)
    slow = "products slower than bare ones, or than the reading of weights"
    assert listed[slow] == pytest.approx(1.0 - 20 / 40)
    assert "products" not in listed
    reads = replace(phase, reading=0.3)  # twice, for the two times of the phase: more than the products' rate says
    listed = {cost.what: cost.seconds for cost in costs.costs_of(reads, "cpu", rate=40e9)}
    assert listed[slow] == pytest.approx(1.0 - 0.6)
    assert not any("beyond" in what for what in listed)  # its passes run over rows that are done, too


def test_on_a_gpu_kernels_are_held_against_the_seconds_without_a_profiler():
    found = Digest({"aten::mm: gemm": Operator(0.25, 3)}, 0.25, 0, 0, seconds=4.0)
    phase = Phase("train", 2.0, 0, 1.0, found)
    assert costs.by_kind(phase, "cuda") == {"products": 0.5, costs.WAITS["cuda"]: 1.5}
    (first, *_) = costs.largest([phase, replace(phase, name="old", seconds=1.0)], "cuda", 1e9, 1)
    assert (first.phase, first.what) == ("train", costs.WAITS["cuda"])


def test_the_first_time_of_a_phase_is_kept_apart():
    ticks = iter([0.0, 1.0, 5.0, 8.0])
    watching = iteration.FirstTimes(CPU, lambda: next(ticks))
    for _ in range(2):
        with watching.phase("train"):
            pass
    assert watching.first == {"train": 1.0}
    assert watching.seconds == {"train": 4.0}


@pytest.fixture
def made(tmp_path):
    return ppo.Iterations(PPO, write_folder(TINY, tmp_path), CPU, torch.float32)


def test_an_iteration_again_is_on_the_same_prompts_and_random_numbers(made):
    made.run(watch.Watch(CPU))
    made.run(watch.Watch(CPU))
    first, step = [each.sequence.tokens for each in made.episodes], made.trainer.step
    prompts = [tokens[: PPO.prompt - 1] for tokens in first]
    made.run(watch.Watch(CPU), again=True)
    again = [each.sequence.tokens for each in made.episodes]
    assert made.trainer.step == step
    assert [tokens[: PPO.prompt - 1] for tokens in again] == prompts
    assert again == first  # one update of drawn weights changes no draw


def test_the_profiler_sees_each_wanted_phase_once_and_changes_nothing(made):
    made.run(watch.Watch(CPU))
    profiler = iteration.Profiler(CPU, wanted=(watch.TRAIN, watch.REWARD))
    row = made.run(profiler)
    assert row["policy/updates"] == 2
    assert set(profiler.found) == {watch.TRAIN, watch.REWARD}
    for found in profiler.found.values():
        assert 0 < found.busy <= found.seconds
        assert found.operators["aten::mm"].flops > 0
    backward = sum(each.count for name, each in profiler.found[watch.TRAIN].operators.items() if "Backward" in name)
    assert backward > 0


def test_a_window_is_tokens_in_the_middle_of_answers(made):
    made.run(watch.Watch(CPU))
    seconds, found = iteration.window(made, PPO.prompt + 3, CPU)
    assert seconds > 0
    calls = found.operators["aten::_scaled_dot_product_flash_attention_for_cpu"].count
    batches = -(-PPO.items // made.config.local_rollout_forward_batch_size)
    assert calls == iteration.WINDOW * TINY.layers * batches


def test_the_command_writes_json_and_markdown_from_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(iteration, "LONGEST", 4)  # as long answers are: in a window
    words = ["--smoke", "--case", "1.5B, bf16", "--out", str(tmp_path)]
    assert program.main(words) == 0
    assert "the GPU" not in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    report = record.load(path)
    assert report.quick
    assert [phase.name for phase in report.phases] == list(watch.PHASES)
    assert sum(phase.seconds for phase in report.phases) <= report.seconds
    for phase in report.phases:
        assert 0 <= phase.busy <= 1
        assert 0 < len(phase.operators) <= record.TOP
    taken = [cost.seconds for cost in report.costs]
    assert taken == sorted(taken, reverse=True)
    page = path.with_suffix(".md").read_text()
    assert "QUICK RUN" in page
    assert "Largest avoidable costs" in page
    path.with_suffix(".md").unlink()
    assert program.main(["--render", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == page


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--case", "9B"], "--case '9B'"), (["--device", "cuda"], "cuda"), (["--render", "nowhere"], "nowhere")],
)
def test_bad_words_are_one_line(arguments, named, capsys):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one")
    assert program.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_a_dpo_case_has_no_iteration(capsys):
    assert program.main(["--smoke", "--case", "8B, NF4, mixed lengths"]) == 2
    assert "no case" in capsys.readouterr().err
