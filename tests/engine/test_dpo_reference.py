"""The reference computed beforehand: the same numbers, kept on disk, read by the run that may and by no other."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.algorithms import dpo
from onecard.algorithms.dpo import reference
from onecard.algorithms.dpo.losses import labelled_ref_logps, pair_ref_logps
from onecard.config import DPOConfig
from onecard.data.batches import TokenSequence, pack_labelled, pack_pairs
from onecard.training.identity import examples_digest
from tests.engine.dpo_material import LABELLED, LEVEL, PAIRS, load, moved


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ref_logps"


@pytest.fixture(scope="module")
def roles(tiny_model):
    return moved(load(tiny_model))


@pytest.fixture(scope="module")
def config(tiny_model) -> DPOConfig:
    return DPOConfig(model=str(tiny_model), per_device_eval_batch_size=3)


def known(config, roles, examples=PAIRS):
    return list(reference.with_ref_logps(config, roles, examples, pack_pairs, pair_ref_logps))


def test_values_are_the_reference_s_own_answer_by_answer(config, roles):
    """One sequence at a time, in fp64 from transformers' logits: tens of nats, summed in fp32."""
    for pair in known(config, roles, [*PAIRS, *LEVEL]):
        for one, value in zip((pair.chosen, pair.rejected), pair.ref_logps, strict=True):
            ids = torch.tensor([one.tokens])
            with roles.active("reference"), torch.no_grad():
                logits = roles.causal_model()(input_ids=ids).logits[0, 1:-1].double()
            own = logits.log_softmax(-1).gather(-1, ids[0, 2:, None]).sum().item()
            assert value == pytest.approx(own, abs=2e-5)


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_the_loss_is_that_of_a_reference_asked_in_the_step(config, roles, kind):
    """Both ways share the function; only the batch differs, and with it the last bits of log-probs of about 40 nats."""
    pairs = kind == "pairs"
    settings = replace(config, loss_type=["sigmoid" if pairs else "kto"], precompute_ref_log_probs=True)
    recipe = dpo.make_recipe(settings)
    examples = PAIRS if pairs else LABELLED
    training, heldout = recipe.prepare(roles, examples, examples[:1])
    assert [replace(one, ref_logps=None) for one in training] == list(examples)
    assert [one.ref_logps is None for one in heldout] == [False]
    asked = recipe.loss(roles, recipe.collate(examples), len(examples))
    read = recipe.loss(roles, recipe.collate(training), len(examples))
    assert read.loss.item() == pytest.approx(asked.loss.item(), abs=1e-5)
    assert {name: value.item() for name, value in read.metrics.items()} == pytest.approx(
        {name: value.item() for name, value in asked.metrics.items()}, abs=1e-4
    )
    away = recipe.collate([replace(one, ref_logps=(one.ref_logps[0] - 5.0, one.ref_logps[1])) for one in training])
    assert abs(recipe.loss(roles, away, len(examples)).loss.item() - asked.loss.item()) > 0.01


def test_in_the_same_batch_both_ways_are_bit_equal(roles, config):
    table = reference.compute_table(roles, PAIRS, pack_pairs, pair_ref_logps, size=len(PAIRS))
    order = sorted(range(len(PAIRS)), key=lambda place: -len(PAIRS[place]))
    asked = pair_ref_logps(roles, pack_pairs([PAIRS[place] for place in order])).view(2, -1).T
    assert torch.equal(table[order], asked)
    one = reference.compute_table(roles, LABELLED, pack_labelled, labelled_ref_logps, size=1)
    assert torch.equal(one[3], labelled_ref_logps(roles, pack_labelled(LABELLED[3:4])))


def test_mismatched_answers_that_nobody_asks_for_cost_nothing(roles):
    examples = [replace(one, mismatched=TokenSequence((), ())) for one in LABELLED]
    table = reference.compute_table(roles, examples, pack_labelled, labelled_ref_logps, size=2)
    whole = reference.compute_table(roles, LABELLED, pack_labelled, labelled_ref_logps, size=2)
    torch.testing.assert_close(table[:, 0], whole[:, 0], atol=2e-5, rtol=0)
    assert not table[:, 1].any()
    assert whole[:, 1].all()


def no_pass(*_: object, **__: object) -> torch.Tensor:
    raise AssertionError("the reference was asked")


def test_a_second_run_reads_what_the_first_wrote(config, roles, cache, monkeypatch, capsys):
    first = known(config, roles)
    (path,) = cache.iterdir()
    assert path.suffix == ".safetensors"
    assert load_file(str(path))["ref_logps"].shape == (4, 2)
    monkeypatch.setattr(reference, "compute_table", no_pass)
    assert known(config, roles) == first
    assert f"log-probs of 4 examples are read from {path}" in capsys.readouterr().err
    assert known(config, roles, []) == []


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1  # within the last of the numbers, or in their digest
    path.write_bytes(bytes(data))


def of_another_size(path: Path) -> None:
    save_file({"ref_logps": torch.zeros(3, 2)}, str(path))


def with_another_name(path: Path) -> None:
    save_file({"logps": torch.zeros(4, 2)}, str(path))


def no_numbers(path: Path) -> None:
    save_file({"ref_logps": torch.full((4, 2), float("nan"))}, str(path))


def in_half_precision(path: Path) -> None:
    save_file({"ref_logps": torch.zeros(4, 2, dtype=torch.float16)}, str(path))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "harm", [damaged, a_flipped_bit, of_another_size, with_another_name, no_numbers, in_half_precision, empty, a_folder]
)
def test_a_file_that_cannot_be_used_is_said_and_computed_again(config, roles, cache, capsys, harm):
    first = known(config, roles)
    (path,) = cache.iterdir()
    harm(path)
    assert known(config, roles) == first
    said = capsys.readouterr().err
    assert f"{path} " in said
    assert "computed again" in said
    assert "read from" not in said
    if harm is not a_folder:  # which is not ours to remove
        assert load_file(str(path))["ref_logps"].tolist() == [list(one.ref_logps) for one in first]


@pytest.mark.parametrize("trouble", ["full disk", "a cache that is a file"])
def test_what_cannot_be_kept_stops_nothing_and_leaves_nothing(config, roles, cache, capsys, monkeypatch, trouble):
    def half(tensors: dict[str, torch.Tensor], path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    if trouble == "full disk":
        monkeypatch.setattr(reference, "save_file", half)
    else:
        cache.parent.write_text("")
    assert all(pair.ref_logps for pair in known(config, roles))
    assert "cannot be written" in capsys.readouterr().err
    assert not cache.is_dir() or list(cache.iterdir()) == []


def test_a_run_killed_while_it_writes_leaves_no_table(config, roles, cache, monkeypatch, capsys):
    def killed(tensors: dict[str, torch.Tensor], path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            known(config, roles)
    assert not list(cache.glob("*.safetensors"))
    assert all(pair.ref_logps for pair in known(config, roles))
    assert "damaged" not in capsys.readouterr().err
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_the_key_changes_with_all_that_the_values_depend_on(config, roles, tiny_model, tmp_path):
    copy, retrained, adapter = tmp_path / "copy", tmp_path / "retrained", tmp_path / "adapter"
    for folder in (copy, retrained):
        shutil.copytree(tiny_model, folder)
    weights = load_file(str(retrained / "model.safetensors"))
    save_file({name: value * 1.01 for name, value in weights.items()}, str(retrained / "model.safetensors"))
    roles.write("policy", adapter)

    def key(examples=PAIRS, **changes) -> str:
        return reference.cache_key(replace(config, **changes), roles, examples)

    others = {
        "nothing": key(),
        "weights": key(model=str(retrained)),
        "adapter": key(model=str(adapter)),
        "examples": key(PAIRS[:3]),
        "order": key(PAIRS[::-1]),
        "kind": key(LABELLED),
        "dtype": key(dtype="bfloat16"),
        "4 bit": key(load_in_4bit=True),
        "adapters' type": key(adapter_dtype="bfloat16"),
        "head chunks": key(head_chunk_tokens=64),
        "batch": key(per_device_eval_batch_size=4),
        "attention": key(attn_implementation="eager"),
        "hub": key(model="some/name"),
        "another hub": key(model="some/other-name"),
    }
    assert len(set(others.values())) == len(others)
    assert key(ref_adapter=str(adapter)) == others["adapter"]  # the reference alone counts
    assert key(ref_adapter=str(adapter), model=str(retrained)) == others["adapter"]
    assert key(model=str(copy)) == key(learning_rate=1.0, seed=3, beta=0.7) == others["nothing"]
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))
    assert key(model=str(adapter)) != others["adapter"]  # the same weights, twice as strong


def test_a_version_of_its_own_has_files_of_its_own(config, roles, monkeypatch):
    before = reference.cache_key(config, roles, PAIRS)
    monkeypatch.setattr(reference, "__version__", "0.0.0.other")
    assert reference.cache_key(config, roles, PAIRS) != before


def test_the_digest_tells_labels_and_mismatched_answers_apart():
    """A run that goes on with other labels would be another run."""
    one = LABELLED[0]
    others = [one, replace(one, desirable=False), replace(one, mismatched=one.sequence), PAIRS[0]]
    others += [replace(PAIRS[0], margin=1.0), one.sequence]
    assert len({examples_digest([other]) for other in others}) == len(others)
    assert examples_digest([replace(one, ref_logps=(1.0, 2.0))]) == examples_digest([one])


def test_a_reference_that_is_a_whole_model_is_let_go(tiny_model):
    settings = DPOConfig(model=str(tiny_model), use_peft=False, precompute_ref_log_probs=True)
    roles = load(tiny_model, use_peft=False)
    size = sum(parameter.numel() for parameter in roles.parameters())
    recipe = dpo.make_recipe(settings)
    training, heldout = recipe.prepare(moved(roles), PAIRS, [])
    assert sum(parameter.numel() for parameter in roles.parameters()) == size / 2
    assert heldout == []
    base = known(replace(settings, use_peft=True), load(tiny_model))
    for one, other in zip(training, base, strict=True):
        assert one.ref_logps == pytest.approx(other.ref_logps, abs=2e-5)
    assert recipe.loss(roles, pack_pairs(training), 4).loss.requires_grad


def test_the_cache_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ONECARD_CACHE", "~/elsewhere")
    assert reference.cache_folder() == Path(os.path.expanduser("~/elsewhere"))
    for unset in ("", None):
        monkeypatch.setenv("ONECARD_CACHE", "") if unset == "" else monkeypatch.delenv("ONECARD_CACHE")
        assert reference.cache_folder() == Path.home() / ".cache" / "onecard"
