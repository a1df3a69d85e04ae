"""The rollout benchmark's counting and its record: a ratio of tokens per second is only as good as these."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import decoding, measure
from benchmarks.rollout import __main__ as program
from benchmarks.rollout import cases, record, render, samplers
from benchmarks.rollout.cases import drawn_task, lengths
from benchmarks.rollout.record import OURS, PEER, RECORDED, Result, Row, Step
from benchmarks.rollout.samplers import ended_length, ours, peer, ratio_of

CPU = torch.device("cpu")
SMALL = cases.small()
TINY = cases.tiny(SMALL)


def test_tokens_count_up_to_and_with_the_end():
    assert ended_length([5, 6, 2, 0, 0, 2], {2, 9}) == 3
    assert ended_length([2, 2], {2}) == 1
    assert ended_length([5, 6, 7], {2}) == 3
    assert ended_length([5, 6, 2], {2}) == 3


@pytest.mark.parametrize("case", [SMALL, *cases.on_a_gpu()], ids=lambda case: case.name)
def test_prompts_are_of_all_lengths_in_no_order(case):
    span = case.most - case.least + 1
    found = lengths(replace(case, prompts=span))
    assert sorted(found) == list(range(case.least, case.most + 1))
    assert found != sorted(found)


def test_the_table_has_the_promised_model_first_and_more_prompts_than_rows():
    found = cases.on_a_gpu()
    assert (found[0].model.name, found[0].load_in_4bit) == ("Llama-3.1-8B", True)
    assert {case.model for case in found} == set(cases.SHAPES.values())
    assert len({case.name for case in found}) == len(found)
    assert all(case.prompts > case.batch_size for case in found)


def test_both_samplers_do_the_same_work(tmp_path):
    """Of random weights every token ends with the same probability, so both draw lengths of the same distribution."""
    task = drawn_task(replace(SMALL, prompts=96, batch_size=48, max_new_tokens=64), tmp_path, torch.float32)
    share = 1 / SMALL.mean
    expected = 96 * (1 - (1 - share) ** 64) / share
    spread = 96**0.5 / share
    torch.manual_seed(0)
    for count in (ours(task), peer(task)):
        assert abs(count - expected) < 4 * spread
        assert count < 96 * 64 * 0.8


def test_where_nothing_ends_an_answer_both_go_on_to_the_last_token(tmp_path):
    task = replace(drawn_task(TINY, tmp_path, torch.float32), ends=frozenset())
    assert ours(task) == peer(task) == TINY.prompts * TINY.max_new_tokens


def test_an_adapter_is_active_as_in_ppo(tmp_path):
    task = drawn_task(TINY, tmp_path, torch.float32)
    ids = torch.tensor([task.prompts[0]])
    causal = task.roles.causal_model()
    with torch.no_grad():
        found = causal(input_ids=ids).logits
        task.roles.adapters["reference"] = None
        with task.roles.active("reference"):
            base = causal(input_ids=ids).logits
    assert not torch.allclose(found, base, rtol=1e-3)


def test_a_step_reads_all_weights_but_other_rows_of_the_embeddings(tmp_path):
    task = drawn_task(TINY, tmp_path, torch.float32)
    causal = task.roles.causal_model()
    whole = sum(parameter.numel() for parameter in causal.parameters())
    embeddings = causal.get_input_embeddings().weight.numel()
    assert decoding.weight_bytes(causal) == 4 * (whole - embeddings)
    cache = 2 * 4 * TINY.model.layers * TINY.model.hidden // TINY.model.heads * TINY.model.key_heads
    assert decoding.step_bytes(causal, 3, 10) == 4 * (whole - embeddings) + 3 * 10 * cache
    task.roles.model.add_adapter("idle", task.roles.model.peft_config["policy"])
    assert decoding.weight_bytes(causal) == 4 * (whole - embeddings)  # what nobody plays is not read


def test_a_tied_head_is_read_once(tmp_path):
    case = replace(TINY, model=replace(TINY.model, kind="qwen2", tied=True))
    causal = drawn_task(case, tmp_path, torch.float32).roles.causal_model()
    assert decoding.weight_bytes(causal) == 4 * sum(parameter.numel() for parameter in causal.parameters())


def test_quantized_weights_are_read_with_their_statistics(tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "plain").mkdir()
    plain = drawn_task(TINY, tmp_path / "plain", torch.float32).roles.causal_model()
    small = drawn_task(replace(TINY, load_in_4bit=True), tmp_path, torch.float32).roles.causal_model()
    linear = TINY.model.layers * sum(i * o for i, o in cases_linears())
    saved = 4 * linear - linear // 2
    statistics = linear // 64 + 4 * sum(-(-i * o // 64 // 256) for i, o in cases_linears()) * TINY.model.layers
    assert decoding.weight_bytes(small) == decoding.weight_bytes(plain) - saved + statistics


def cases_linears() -> list[tuple[int, int]]:
    from benchmarks.train_step.cases import linears

    return linears(TINY.model)


def test_the_ratio_is_taken_round_by_round():
    def row(name: str, role: str, seconds: tuple[float, ...], tokens: tuple[int, ...]) -> Row:
        return Row(name, role, seconds, tokens, measure.spread([1.0]))

    first = row(OURS, "ours", (1.0, 2.0, 10.0), (100, 200, 400))  # 100, 100, 40 tokens/s
    second = row(PEER, "peer", (2.0, 1.0, 20.0), (100, 50, 400))  # 50, 50, 20
    assert ratio_of(first, second).median == pytest.approx(2.0)
    assert ratio_of(first, second).q3 == pytest.approx(2.0)


def test_a_step_s_seconds_are_those_of_more_tokens_beyond_one(tmp_path, monkeypatch):
    """A clock that only generated tokens move: 10 s a pass over prompts, and 2 s a token of ours, 3 s of the peer's."""
    now = 0.0
    seen = []

    def sampler(cost: float):
        def run(task: cases.Task) -> int:
            nonlocal now
            now += 10 + cost * task.sampling.max_new_tokens
            seen.append((len(task.prompts), {len(prompt) for prompt in task.prompts}, task.ends))
            return 0

        return run

    monkeypatch.setitem(samplers.SAMPLERS, "cpu", {OURS: ("ours", sampler(2.0)), PEER: ("peer", sampler(3.0))})
    task = drawn_task(TINY, tmp_path, torch.float32)
    step = samplers.time_a_step(task, CPU, 1e9, lambda: now)
    assert step.seconds == {OURS: 2.0, PEER: 3.0}
    longest = max(map(len, task.prompts))
    tokens = TINY.max_new_tokens // 2
    begin = longest + TINY.max_new_tokens // 2 - tokens // 2
    assert all(each == (TINY.batch_size, {begin, begin - 1}, frozenset()) for each in seen)
    assert step.length == begin + tokens // 2
    assert step.floor == decoding.step_bytes(task.roles.causal_model(), TINY.batch_size, step.length) / 1e9


def test_no_round_is_begun_when_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS, "cpu", dict.fromkeys((OURS, PEER), ("ours", lambda task: 1)))
    ticks = iter(range(1000))
    task = drawn_task(TINY, tmp_path, torch.float32)
    rows = samplers.take_turns(task, CPU, 9, budget=3.5, warmup=0, clock=lambda: float(next(ticks)))
    assert [len(row.seconds) for row in rows] == [2, 2]  # 1 s each: 2 s after the first round, 4 s after the second


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def test_the_command_writes_one_record(tmp_path, capsys):
    sizes = ("--num-prompts", 6, "--batch-size", 3, "--max-new-tokens", 10, "--repeats", 2)
    assert program.main(words(*sizes, "--output", tmp_path)) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("rollout-")
    report = record.load(path)
    (result,) = report.results
    assert report.complete
    assert [row.role for row in result.rows] == ["ours", "peer"]
    for row in result.rows:
        assert len(row.seconds) == len(row.tokens) == 2
        rates = [count / seconds for count, seconds in zip(row.tokens, row.seconds, strict=True)]
        assert row.rate.median == pytest.approx(sum(rates) / 2)
        assert all(6 <= count <= 60 for count in row.tokens)
        assert row.peak_bytes > 0
        assert result.step.seconds[row.sampler] > 0
    assert result.error_logprobs < 1e-4
    assert result.ratio.count == 2
    out = capsys.readouterr().out
    assert "at least 2x plain generate" in out
    assert {each.suffix for each in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_on_a_gpu_recorded_passes_stand_beside(tmp_path, monkeypatch):
    """A pass stands in for its recording: the lines of a GPU's table, on a CPU."""
    recorded = []

    def stand_in(run, inputs):
        recorded.append(inputs)
        return run

    monkeypatch.setitem(samplers.SAMPLERS, "cpu", samplers.SAMPLERS["cuda"])
    monkeypatch.setattr(samplers, "cuda_graph", stand_in)
    sizes = ("--num-prompts", 6, "--batch-size", 3, "--max-new-tokens", 10, "--repeats", 1)
    assert program.main(words(*sizes, "--output", tmp_path)) == 0
    (path,) = tmp_path.glob("*.json")
    (result,) = record.load(path).results
    assert [row.sampler for row in result.rows] == [OURS, RECORDED, PEER]
    assert list(result.step.seconds) == [OURS, RECORDED, PEER]
    assert recorded
    first, peer = result.rows[0], result.rows[-1]
    assert result.ratio.median == pytest.approx(first.rate.median / peer.rate.median)
    assert RECORDED in path.with_suffix(".md").read_text()
    assert OURS in render.summary(record.load(path), path.name)


def test_the_table_runs_at_tiny_sizes_and_stops_when_time_is_up(tmp_path, capsys):
    name = "8B, NF4, 16 rows"
    pytest.importorskip("bitsandbytes")
    assert program.main(words("--smoke", "--case", name, "--data-only", "--out", tmp_path)) == 0
    (path,) = tmp_path.iterdir()
    report = record.load(path)
    assert report.quick
    assert [result.name for result in report.results] == [name]
    assert render.main(words(path)) == 0
    page = path.with_suffix(".md").read_text()
    assert "QUICK RUN" in page
    assert "load_in_4bit" in page
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmark:rollout -->\n<!-- /benchmark -->\nb\n")
    assert render.main(words(path, "--readme", readme)) == 0
    assert name in readme.read_text()
    assert program.main(words("--smoke", "--minutes", 0, "--out", tmp_path / "none")) == 0
    assert "5 cases were not begun" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_pretrained_model_gets_the_first_words_of_a_file(tinystories, stories):
    case = replace(SMALL, prompts=70, max_new_tokens=8, batch_size=4)
    task = cases.model_task(case, str(tinystories), str(stories))
    assert [len(prompt) for prompt in task.prompts] == lengths(case)
    assert len(set(task.prompts)) == 70
    assert samplers.error_of_ours(task) < 1e-4


def test_wrong_log_probabilities_are_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "error_of_ours", lambda task: 0.1)
    monkeypatch.setattr(program, "take_turns", None)
    assert program.main(["--num-prompts", "2", "--max-new-tokens", "4", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"][0]["rows"] == []
    assert "REFUSED" in path.with_suffix(".md").read_text()
    assert "off by 0.1 nat" in capsys.readouterr().err


def test_what_does_not_fit_stands_in_the_table(tmp_path, monkeypatch, capsys):
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(program.cases, "drawn_task", too_much)
    assert program.main(["--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    assert record.load(path).results[0].refused == "out of memory: CUDA out of memory. Tried to allocate"


def test_the_verdict_is_on_the_ratio():
    result = Result("a", "m", 1, "float32", False, 1, (1, 2), 1, 1, 1.0)
    assert record.verdict(result).endswith("not measured")
    for ratio, said in ((2.0, "2.00x, met"), (1.99, "1.99x, MISSED")):
        assert record.verdict(replace(result, ratio=measure.spread([ratio]))).endswith(said)
    rows = tuple(Row(name, "ours", (1.0,), (10,), measure.spread([10.0]), 1 << 20) for name in (OURS, PEER))
    step = Step(1, 8, {OURS: 0.02, PEER: 0.04}, 10**9, 1e11)
    cells = render.lines(replace(result, rows=rows, step=step))
    assert [line[3:5] for line in cells] == [["20.0", "50%"], ["40.0", "25%"]]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "x"), "give both"),
        (("--shape", "8B", "--table"), "--shape"),
        (("--load-in-4bit", "--table"), "--load-in-4bit"),
        (("--case", "9B"), "--case '9B'"),
        (("--model", "x", "--prompts", "y", "--table"), "--model"),
    ],
)
def test_bad_words_are_one_line(arguments, named, capsys):
    assert program.main(words(*arguments)) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
