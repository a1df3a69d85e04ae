"""`ref_adapter`: the frozen reference is the adapter that it names, whatever the policy starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from onecard.algorithms.dpo.losses import sequence_logps
from onecard.config import DPOConfig, PPOConfig
from onecard.data.batches import pack_pairs
from onecard.models.build import load_frozen_role, load_ppo_roles, load_roles, reference_adapter
from onecard.utils.errors import OnecardError
from tests.engine.dpo_material import PAIRS, load, moved

pytestmark = pytest.mark.usefixtures("quick")

BATCH = pack_pairs(PAIRS).sequences


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Two adapters of the tiny model; `second` came with dropout and another rank."""
    folder = tmp_path_factory.mktemp("adapters")
    moved(load(tiny_model), seed=5).write("policy", folder / "first")
    moved(load(tiny_model, lora_r=4), seed=6).write("policy", folder / "second")
    path = folder / "second" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.5}))
    return {name: folder / name for name in ("first", "second")}


@torch.no_grad()
def logps(roles, role: str) -> torch.Tensor:
    with roles.active(role):
        return sequence_logps(roles, BATCH)


@torch.no_grad()
def alone(model: Path) -> torch.Tensor:
    """What a model or an adapter says when nothing else is loaded."""
    return sequence_logps(load_frozen_role(DPOConfig(model=str(model)), role="policy"), BATCH)


@pytest.mark.parametrize("start", ["base", "first", "second"])
def test_policy_and_reference_are_what_was_named(tiny_model, adapters, start):
    model = adapters.get(start, tiny_model)
    roles = load_roles(
        DPOConfig(model=str(model), ref_adapter=str(adapters["second"])), trained="policy", reference=True
    ).train()
    expected = {"policy": alone(model), "reference": alone(adapters["second"])}
    for role, values in expected.items():
        assert torch.equal(logps(roles, role), values), role
    assert torch.equal(expected["policy"], expected["reference"]) == (start == "second")
    assert all(".policy." in name for name in roles.trained_parameters())
    moved(roles, seed=7)
    assert torch.equal(logps(roles, "reference"), expected["reference"])
    assert not torch.equal(logps(roles, "policy"), expected["policy"])


def test_new_weights_do_not_depend_on_the_reference(tiny_model, adapters):
    weights = [
        load_roles(
            DPOConfig(model=str(tiny_model), ref_adapter=ref), trained="policy", reference=True
        ).trained_parameters()
        for ref in ("", str(adapters["first"]))
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_ppo_s_reference_too(tiny_model, adapters):
    roles = load_ppo_roles(PPOConfig(model=str(adapters["first"]), ref_adapter=str(adapters["second"])))
    assert torch.equal(logps(roles, "policy"), alone(adapters["first"]))
    assert torch.equal(logps(roles, "reference"), alone(adapters["second"]))
    assert not any(".reference." in name for name in roles.trained_parameters())


def test_a_run_s_folder_stands_for_its_policy(tiny_model, adapters, tmp_path):
    shutil.copytree(adapters["first"], tmp_path / "run" / "policy")
    config = DPOConfig(model=str(tiny_model), ref_adapter=str(tmp_path / "run"))
    assert reference_adapter(config) == tmp_path / "run" / "policy"
    assert reference_adapter(DPOConfig(model=str(tiny_model))) is None


def bad_folder(kind: str, tiny_model: Path, adapters: dict[str, Path], folder: Path) -> Path:
    """Something that `ref_adapter` may not be."""
    if kind == "a model":
        return tiny_model
    if kind == "another base":
        shutil.copytree(tiny_model, folder / "other-base")
        shutil.copytree(adapters["first"], folder / "adapter")
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder / "other-base")})
        )
        return folder / "adapter"
    if kind == "damaged":
        shutil.copytree(adapters["first"], folder / "adapter")
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"none")
        return folder / "adapter"
    return folder / "nowhere"


BAD = {
    "a model": ("is no adapter folder", "adapter_config.json"),
    "another base": ("other-base", "share one base"),
    "nothing": ("nowhere",),
    "damaged": ("adapter",),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_the_reference_is_one_line(onecard, tiny_model, adapters, pairs, tmp_path, kind):
    folder = tmp_path / "bad"
    folder.mkdir()
    adapter = bad_folder(kind, tiny_model, adapters, folder)
    result = onecard(
        "dpo", "--model", tiny_model, "--dataset", pairs, "--ref_adapter", adapter, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert result.code == 2, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("onecard: error: ref_adapter: ")
    assert all(word in line for word in BAD[kind]), line
    assert not (tmp_path / "run").exists()
    with pytest.raises(OnecardError, match=r"^ref_adapter: "):
        load_ppo_roles(PPOConfig(model=str(tiny_model), ref_adapter=str(adapter)))


def test_all_weights_have_no_room_for_it(tiny_model, adapters):
    config = DPOConfig(model=str(tiny_model), ref_adapter=str(adapters["first"]), use_peft=False)
    with pytest.raises(OnecardError, match="ref_adapter: with --no_use_peft the reference is a frozen copy"):
        reference_adapter(config)
