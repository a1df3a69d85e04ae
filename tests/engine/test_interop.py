"""What onecard writes loads in PEFT and TRL, and what they write loads in onecard, with the same log-probs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from onecard.config import ModelConfig
from onecard.data.batches import TokenSequence, pack
from onecard.models.build import load_frozen_role
from tests.engine.weights_material import TOKENS, by_folder, by_transformers, random_adapter

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


@pytest.mark.parametrize("role", ["policy", "reward"])
@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModel", "transformers"])
def test_peft_and_transformers_load_our_adapters(tmp_path, tinystories, role, way):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    folder = random_adapter(tinystories, tmp_path / role, role)
    if way == "PeftModel":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tinystories), folder)
    else:
        loader = AutoPeftModelForCausalLM if way == "AutoPeftModel" else AutoModelForCausalLM
        model = loader.from_pretrained(folder)
    ours = by_folder(folder)
    assert (ours - by_folder(tinystories)).abs().max() > 0.1
    torch.testing.assert_close(by_transformers(model), ours, atol=2e-5, rtol=0)


def test_a_reward_is_the_adapters_last_state_and_the_head_file(tmp_path, tinystories):
    """What a user without onecard does: PEFT for the states, two tensors for the score."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = random_adapter(tinystories, tmp_path / "reward", "reward")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tinystories), folder).eval()
    head = load_file(folder / "head.safetensors")
    with torch.no_grad():
        states = model.get_base_model().get_decoder()(input_ids=torch.tensor([TOKENS])).last_hidden_state
        theirs = states[0, -1] @ head["weight"][0] + head["bias"][0]
        roles = load_frozen_role(ModelConfig(model=str(folder)), role="reward", head=True)
        ours = roles.scores(pack([TokenSequence(TOKENS, (False,) * len(TOKENS))]))
    torch.testing.assert_close(theirs.unsqueeze(0), ours, atol=1e-5, rtol=0)


@needs_trl
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_trl_trains_on_from_our_adapter_and_onecard_from_trls(onecard, tmp_path, tiny_model, pairs, trainer, quick):
    """There and back: our policy, a step of TRL's, and a step of ours from the adapter that TRL saved."""
    import trl
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = random_adapter(tiny_model, tmp_path / "policy", "policy")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    before = by_transformers(model)
    rows = {"prompt": ["the cat"] * 4, "chosen": [" a good answer"] * 4, "rejected": [" mat"] * 4}
    if trainer == "sft":
        rows = {"prompt": rows["prompt"], "completion": rows["chosen"]}
    kinds = {"sft": (trl.SFTConfig, trl.SFTTrainer), "dpo": (trl.DPOConfig, trl.DPOTrainer)}
    settings, make = kinds[trainer]
    made = make(
        model=model,
        args=settings(
            output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    made.train()
    made.save_model(str(tmp_path / "trl"))
    after = by_transformers(made.model)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(by_folder(tmp_path / "trl"), after, atol=2e-5, rtol=0)

    result = onecard(
        "dpo", "--model", tmp_path / "trl", "--dataset", pairs, "--output_dir", tmp_path / "run", "--max_steps", 1,
        "--test_size", 0, "--learning_rate", 1e-2,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (by_folder(tmp_path / "run" / "policy") - after).abs().max() > 1e-3
