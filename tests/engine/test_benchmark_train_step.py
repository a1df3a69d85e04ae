"""The training-step benchmark: both sides do the same work, its counts are right, and what is wrong is not timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="times TRL's own trainer")

from benchmarks import measure
from benchmarks.train_step import __main__ as program
from benchmarks.train_step import cases, limits, material, peer, ppo, render, results, run, watch
from benchmarks.train_step.cases import RANK, TINY, Case, Flops, dpo_flops
from benchmarks.train_step.dpo import SAME, Ours, held_bytes, no_bar, shake
from benchmarks.train_step.material import END, draw_model, draw_pairs, drawn_weights, text, whole_words, write_folder
from benchmarks.train_step.results import OURS, Row
from benchmarks.train_step.run import GEMMS, TRL, TRL_ANSWERS, TRL_LIGER, UNSHARED, Timing

CPU = torch.device("cpu")
TIMING = Timing(repeats=2, warmup=0, budget=0.0)
DPO = Case("tiny", "dpo", TINY, prompt=20, response=12, items=4, per_pass=2, mixed=True)
PPO = replace(DPO, kind="ppo", items=8, per_pass=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(TINY, tmp_path)


def drawn(folder: Path, **settings: object) -> object:
    return draw_model(str(folder), **{"dtype": torch.float32, "device_map": {"": CPU}, **settings})


def measured(case: Case, **settings: object) -> results.Result:
    return run.measure_case(case, CPU, torch.float32, TIMING, lambda _: None)


def test_drawn_weights_are_the_same_each_time_and_positions_are_computed(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    first, second = drawn(folder), drawn(folder)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    usual = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert dict(first.named_parameters()).keys() == dict(usual.named_parameters()).keys()
    computed = dict(usual.named_buffers())
    assert computed
    for name, buffer in first.named_buffers():
        torch.testing.assert_close(buffer, computed[name])
    assert first.lm_head.weight.std().item() == pytest.approx(material.STD, rel=0.05)
    assert first.model.norm.weight.eq(1).all()


def test_heads_that_are_tied_stay_tied(tmp_path):
    model = drawn(write_folder(replace(TINY, kind="qwen2", tied=True), tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias.eq(0).all()


def test_quantized_weights_are_the_drawn_ones_in_nf4(folder):
    pytest.importorskip("bitsandbytes")
    plain, small = drawn(folder), drawn(folder, quantization_config=peer.nf4(torch.float32))
    weight = small.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.uint8
    assert type(small.lm_head) is torch.nn.Linear
    assert torch.equal(small.lm_head.weight, plain.lm_head.weight)
    from bitsandbytes.functional import dequantize_4bit

    wanted = plain.model.layers[1].mlp.down_proj.weight
    found = dequantize_4bit(weight.data, weight.quant_state)
    error = (found - wanted).abs().mean() / wanted.abs().mean()
    assert 0.01 < error < 0.15  # NF4's steps are about a tenth of a standard deviation


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_pairs_have_their_lengths_and_their_text_is_their_tokens(tmp_path, kind):
    tokenizer = whole_words(write_folder(replace(TINY, kind=kind), tmp_path))
    level, mixed = (draw_pairs(50, 20, 12, TINY.vocab, mixed=each) for each in (False, True))
    assert {(len(p.prompt), len(p.chosen), len(p.rejected)) for p in level} == {(20, 12, 12)}
    assert {len(p.prompt) for p in mixed} == set(range(10, 21))
    assert {len(p.chosen) for p in mixed} == set(range(6, 13))
    for pair in mixed[:5]:
        assert pair.chosen[-1] == pair.rejected[-1] == END
        assert END not in pair.prompt + pair.chosen[:-1] + pair.rejected[:-1]
        assert tuple(tokenizer(text(pair.prompt + pair.chosen))["input_ids"]) == pair.prompt + pair.chosen
        assert pair.tokens == 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def test_flops_are_what_pytorch_counts(folder):
    """Of eager attention PyTorch counts all n * n pairs, and it starts from embeddings that need no gradient."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    tokens, layers, d = 17, TINY.layers, TINY.hidden
    model = drawn(folder, attn_implementation="eager").train()
    tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    with FlopCounterMode(display=False) as forward:
        out = tuned(input_ids=torch.arange(2, 2 + tokens).unsqueeze(0), use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    found = Flops.of(TINY, tokens, tokens)
    full = 2 * 2 * d * layers * tokens * tokens
    rotation = forward.get_total_flops() - (found.forward - found.attention + full)
    assert 0 <= rotation <= 2 * tokens * d  # positions times frequencies, computed as a product
    kv = d // TINY.heads * TINY.key_heads
    first = 2 * tokens * (d * d + 2 * d * kv) + 3 * 2 * tokens * RANK * d  # of layer 0's inputs nobody asks it
    assert backward.get_total_flops() == found.backward - 2 * found.attention + 2 * full - first


def test_flops_of_a_step_by_hand():
    model = material.Model("", hidden=4, layers=1, heads=2, key_heads=1, inner=3, vocab=10)
    found = Flops.of(model, 2, 1)
    assert found.trunk == 2 * 2 * (16 + 8 + 8 + 16 + 12 + 12 + 12)
    assert found.adapters == 2 * 2 * RANK * (8 + 6 + 6 + 8 + 7 + 7 + 7)
    assert found.attention == 4 * 4 * 3  # 3 pairs of tokens
    assert found.head == 2 * 4 * 10
    one = found.trunk + found.attention + found.head
    step = dpo_flops(model, [(2, 1)], precomputed=True)
    assert step == one + found.adapters + found.trunk + found.head + 2 * (found.adapters + found.attention)
    assert dpo_flops(model, [(2, 1)], precomputed=False) == step + one


def test_all_candidates_take_the_same_steps(folder):
    """Two updates in a row, of micro-batches of mixed lengths: gradients, clipping and AdamW are the same."""
    case = replace(DPO, gradient_checkpointing=True)
    builds = run.candidates(case, CPU, torch.float32)
    task = run.task_of(case, folder, CPU, torch.float32)
    sides = {each: builds[each][1](task) for each in (OURS, UNSHARED, TRL, TRL_ANSWERS)}
    for _ in range(2):
        for side in sides.values():
            side.ready()
            side()
        ours = sides[OURS].row
        assert abs(ours["rewards/margins"]) > 1e-5
        for each, side in sides.items():
            for key in SAME:
                assert side.row[key] == pytest.approx(ours[key], rel=2e-4, abs=2e-5), (each, key)
    mine, theirs = (
        [parameter for parameter in sides[each].model().parameters() if parameter.requires_grad] for each in (OURS, TRL)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)


def test_a_case_has_a_row_for_each_candidate():
    result = measured(DPO)
    assert result.refused is None
    assert [row.name for row in result.rows] == [OURS, UNSHARED, TRL, TRL_ANSWERS, TRL_LIGER, GEMMS]
    ours, theirs = (results.named(result, name) for name in (OURS, TRL))
    assert ours.tokens == theirs.tokens
    assert ours.held_bytes == theirs.held_bytes
    assert ours.peak_bytes > 0
    for row in result.rows:
        assert (row.reason is None) == bool(row.seconds)
    with_reference = replace(DPO, precompute_ref_log_probs=True, in_turns=False)
    precomputed = results.named(measured(with_reference), OURS)
    assert precomputed.first["loss"] == pytest.approx(ours.first["loss"], rel=1e-4)
    assert sum(precomputed.flops) < sum(ours.flops)


def test_checkpointing_saves_memory_on_both_sides(folder):
    model = replace(TINY, layers=6)
    write_folder(model, folder)
    plain, checkpointed = (replace(DPO, model=model, gradient_checkpointing=on) for on in (False, True))
    for name in (OURS, TRL_ANSWERS):
        peaks = []
        for case in (plain, checkpointed):
            side = run.candidates(case, CPU, torch.float32)[name][1](run.task_of(case, folder, CPU, torch.float32))
            side.ready()
            side()
            peaks.append(measure.peak_bytes(side, CPU))
        assert peaks[1] < 0.85 * peaks[0], (name, peaks)  # of TRL's, most is its head's at this size


def test_what_is_wrong_is_not_timed(monkeypatch):
    def off(self, places):
        return {**right(self, places), "grad_norm": 1e3}

    right = Ours.step
    monkeypatch.setattr(Ours, "step", off)
    for in_turns in (True, False):
        result = measured(replace(DPO, in_turns=in_turns))
        assert result.rows == ()
        assert "grad_norm of the first step is 1000" in result.refused
        assert TRL in result.refused


def test_ligers_layers_stay_in_their_model(folder):
    pytest.importorskip("liger_kernel")
    from peft import LoraConfig, get_peft_model
    from transformers.models.llama import modeling_llama

    before = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, modeling_llama.apply_rotary_pos_emb
    model = get_peft_model(drawn(folder), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    peer.use_liger(model)
    assert "Liger" in repr(model) or "liger" in model.get_base_model().model.norm.forward.__module__
    assert before == (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, modeling_llama.apply_rotary_pos_emb)


def test_held_bytes_are_weights_once_and_states():
    model = torch.nn.Linear(8, 4, bias=False)
    model.tied = model.weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    assert held_bytes(model, optimizer) == 3 * 4 * 32 + 4  # weight, two moments, a step counter
    model.register_buffer("more", torch.zeros(5))
    assert held_bytes(model, optimizer) == 3 * 4 * 32 + 4 + 20


def test_adapters_get_the_same_values_whatever_they_are_called(folder):
    from peft import LoraConfig, get_peft_model

    values = []
    for name in ("policy", "default"):
        settings = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(drawn(folder), settings, adapter_name=name)
        shake(model)
        values.append([parameter for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))
    assert all(value.std() > 0 for value in values[0])


def test_peaks_within_a_phase_by_hand():
    changes = [(1, 100), (3, 50), (4, -50), (6, -100), (8, 30)]
    spans = [("first", 2, 5), ("second", 5, 7), ("first", 7, 9), ("none", 9, 10)]
    assert watch.peaks_within(changes, spans) == {"first": 150, "second": 100, "none": 30}
    assert watch.peaks_within([], [("quiet", 0, 1)]) == {"quiet": 0}


@pytest.fixture
def iterations(tmp_path):
    def make(name: str) -> ppo.Iterations:
        return ppo.Iterations(PPO, write_folder(TINY, tmp_path / name), CPU, torch.float32)

    for name in ("watched", "alone"):
        (tmp_path / name).mkdir()
    return make


def test_watching_an_iteration_changes_nothing(iterations):
    watched, alone = iterations("watched"), iterations("alone")
    watching = watch.Watch(CPU)
    row = watched.run(watching)
    _, indices = next(alone.order)
    plain = alone.job.step(alone.trainer, indices, no_bar())
    timed = {name for name in row if name.startswith(("time/", "memory/"))}
    assert {name: row[name] for name in row.keys() - timed} == {name: plain[name] for name in plain.keys() - timed}
    assert set(watching.seconds) == {*watch.PHASES, watch.WHOLE}
    parts = sum(watching.seconds[name] for name in watch.PHASES)
    assert 0.5 * watching.seconds[watch.WHOLE] < parts <= watching.seconds[watch.WHOLE]
    assert watched.job.sampler.sample.__self__ is watched.job.sampler  # all is as it was


def test_phases_are_counted(iterations):
    made = iterations("watched")
    made.run(watch.Watch(CPU))
    counts, lengths = made.counts(), [len(episode) for episode in made.episodes]
    assert len(lengths) == PPO.items
    assert len(set(lengths)) > 1
    answers = sum(len(episode.sampling_logprobs) for episode in made.episodes)
    assert counts[watch.ROLLOUT][0] == answers
    assert counts[watch.OLD][0] == counts[watch.TRAIN][0] == counts[watch.WHOLE][0] == sum(lengths)
    assert counts[watch.OLD][1] > counts[watch.REFERENCE][1] > 0
    assert counts[watch.WHOLE][1] == sum(counts[name][1] for name in watch.PHASES)
    peaks = watch.phase_peaks(made.run, CPU).above
    assert set(peaks) == {*watch.PHASES, watch.WHOLE}
    assert peaks[watch.WHOLE] == max(peaks.values())
    assert peaks[watch.TRAIN] > peaks[watch.REFERENCE] > 0


def test_speed_is_compared_round_by_round():
    first = Row(OURS, "ours", seconds=(1.0, 2.0, 10.0), tokens=(10, 10, 10), flops=(8, 8, 8))
    second = Row(TRL, "peer", seconds=(2.0, 4.0, 30.0))
    limit = Row(GEMMS, "limit", seconds=(1.0, 1.0, 1.0), flops=(16, 16, 16))
    assert results.speed_over(first, second).median == 2.0
    assert results.speed_over(first, replace(second, seconds=(5.0,))).median == 5.0
    assert results.speed_over(first, replace(second, seconds=())) is None
    assert results.rate(first).median == 5.0
    assert results.utilisation(first, limit) == 0.25


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def test_the_command_runs_a_gpus_cases_at_tiny_sizes(tmp_path, capsys):
    name = "1.5B, bf16"
    assert program.main(words("--smoke", "--case", name, "--out", tmp_path, "--repeats", 2)) == 0
    (path,) = tmp_path.glob("*.json")
    report = results.load(path)
    assert report.complete
    assert report.quick
    assert [(result.kind, result.name) for result in report.results] == [("dpo", name), ("ppo", name)]
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    page = path.with_suffix(".md").read_text()
    assert "QUICK RUN" in page
    assert "old log-probs" in page
    readme = tmp_path / "README.md"
    block = "a\n<!-- benchmark:train-step-dpo -->\n<!-- /benchmark -->\nb\n<!-- benchmark:other -->\n1\n"
    readme.write_text(block + "<!-- /benchmark -->\n")
    assert render.main(words(path, "--readme", readme)) == 0
    once = readme.read_text()
    assert name in once
    assert once.endswith("<!-- benchmark:other -->\n1\n<!-- /benchmark -->\n")
    assert render.main(words(path, "--readme", readme)) == 0
    assert readme.read_text() == once


def test_no_case_is_begun_when_time_is_up(tmp_path, capsys):
    assert program.main(words("--smoke", "--minutes", 0, "--out", tmp_path)) == 0
    assert "not begun" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--case", "9B"), "--case '9B'"),
        (("--quick", "--case", "wide"), "no case is all of them"),
        (("--busy", "--device", "cuda"), "--"),
    ],
)
def test_bad_words_are_one_line(arguments, named, capsys):
    assert program.main(words(*arguments)) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_another_file_is_no_report(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"schema": 2}))
    with pytest.raises(ValueError, match="no report of"):
        results.load(path)


def test_cards_are_narrowed_only_where_there_are_some():
    caps = {case.cap_gib for case in cases.on_a_gpu()}
    assert caps == {0.0, 5.0, 10.5, 15.0, 23.0}
    for cap in caps - {0.0}:
        assert {case.kind for case in cases.on_a_gpu() if case.cap_gib == cap} == {"dpo", "ppo"}
    assert {cases.tiny(case).cap_gib for case in cases.on_a_gpu()} == {0.0}
    with limits.capped(1e-9, CPU):
        torch.ones(10)


def test_drawing_is_over_with_its_block(folder):
    from transformers import AutoModelForCausalLM

    with drawn_weights():
        assert AutoModelForCausalLM.from_pretrained is draw_model
    with pytest.raises(OSError, match=str(folder)):
        AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
