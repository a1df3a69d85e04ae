"""Layouts, roles and heads on real models: random weights hide most of what can go wrong here."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from onecard.config import DPOConfig, RewardConfig
from onecard.data.batches import TokenSequence, pack
from onecard.models import head as heads
from onecard.models.build import load_roles, new_scalar_head
from onecard.models.layout import LAYOUTS
from onecard.models.load import load_base, load_tokenizer
from onecard.utils.errors import OnecardError

TEXTS = ("Once upon a time there was a dog.", "Lily likes to play in the park with her friends", "One day a big cat")


def texts_of(model) -> list[TokenSequence]:
    tokenizer = load_tokenizer(DPOConfig(model=str(model)))
    ids = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [TokenSequence(tokens, (False, *(True,) * (len(tokens) - 1))) for tokens in ids]


def logprobs(roles, sequences, layout: str) -> torch.Tensor:
    roles.layout = layout
    batch = pack(sequences)
    return roles.logprobs(batch, batch.targets)


@pytest.mark.parametrize("model", ["tinystories", "stories260k"])
@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_packed_padded_and_one_by_one_give_the_same_logprobs(model, attention, request):
    """On pretrained weights, where a sequence that sees its neighbour changes by whole nats."""
    folder = request.getfixturevalue(model)
    roles = load_roles(DPOConfig(model=str(folder), attn_implementation=attention), trained="policy")
    texts = texts_of(folder)
    assert roles.layout == ("packed" if attention == "auto" else "restarted")
    alone = torch.cat([logprobs(roles, [text], roles.layout) for text in texts])
    own = []
    for text in texts:  # the judge: transformers' own logits of one sequence at a time
        ids = torch.tensor([text.tokens])
        logits = load_base(DPOConfig(model=str(folder)))(input_ids=ids).logits[0].double().log_softmax(-1)
        own.append(logits[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1))
    torch.testing.assert_close(alone.double(), torch.cat(own), atol=2e-5, rtol=0)
    for layout in LAYOUTS.keys() - ({"packed"} if attention != "auto" else set()):
        torch.testing.assert_close(logprobs(roles, texts, layout), alone, atol=2e-5, rtol=0)


def test_packing_needs_the_cache_off(tinystories):
    """The trap that the packed layout avoids is real: with a cache the second sequence sees the first."""
    roles = load_roles(DPOConfig(model=str(tinystories), attn_implementation="sdpa"), trained="policy")
    trunk = roles.causal_model().get_decoder()
    layout = LAYOUTS["restarted"](pack(texts_of(tinystories)))
    right = trunk(**layout.passes[0]).last_hidden_state
    wrong = trunk(**{**layout.passes[0], "use_cache": True}).last_hidden_state
    assert (right - wrong).abs().max() > 0.1


def test_reference_is_the_base_with_adapters_off(tinystories):
    roles = load_roles(DPOConfig(model=str(tinystories)), trained="policy", reference=True)
    texts = texts_of(tinystories)
    before = logprobs(roles, texts, "packed").detach()
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with roles.active("reference"):
        reference = logprobs(roles, texts, "packed")
    assert torch.equal(reference, before)
    assert (logprobs(roles, texts, "packed") - before).abs().max() > 0.1


@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_playing_another_role_takes_no_gradient_away(tinystories, four_bit, checkpointing):
    """Policy forward, then the reference, then the backward: the policy's gradients are those without the detour."""
    config = DPOConfig(model=str(tinystories), load_in_4bit=four_bit, gradient_checkpointing=checkpointing)
    gradients = []
    for detour in (False, True):
        roles = load_roles(config, trained="policy", reference=True)
        roles.train()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in roles.trained_parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        loss = logprobs(roles, texts_of(tinystories), "packed").sum()
        if detour:
            with torch.no_grad(), roles.active("reference"):
                logprobs(roles, texts_of(tinystories), "packed")
        loss.backward()
        gradients.append([parameter.grad for parameter in roles.trained_parameters().values()])
    assert all(torch.equal(with_detour, without) for without, with_detour in zip(*gradients, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("started_from", ["base", "adapter"])
def test_a_backward_under_another_role_reaches_the_policy_alone(tinystories, tmp_path, started_from):
    """PEFT freezes whatever is not active; here the policy stays trainable, and the frozen reference stays frozen."""
    config = DPOConfig(model=str(tinystories))
    if started_from == "adapter":
        load_roles(config, trained="policy").write("policy", tmp_path / "policy")
        config = replace(config, model=str(tmp_path / "policy"))
    roles = load_roles(config, trained="policy", reference=True)
    trained = set(roles.trained_parameters())
    loss = logprobs(roles, texts_of(tinystories), "packed").sum()
    with roles.active("reference"):
        assert set(roles.trained_parameters()) == trained
        loss.backward()
    assert set(roles.trained_parameters()) == trained
    assert all(".policy." in name for name in trained)
    assert all(parameter.grad is not None for parameter in roles.trained_parameters().values())


def test_a_4bit_base_passes_gradients_after_an_evaluation(tinystories):
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs; the first layer's gradient then vanishes."""
    gradients = []
    for evaluated_before in (False, True):
        roles = load_roles(DPOConfig(model=str(tinystories), load_in_4bit=True), trained="policy")
        if evaluated_before:
            roles.eval()
            with torch.no_grad():
                logprobs(roles, texts_of(tinystories), "packed")
        roles.train()
        logprobs(roles, texts_of(tinystories), "packed").sum().backward()
        gradients.append({name: p.grad for name, p in roles.trained_parameters().items() if "lora_B" in name})
    first = next(iter(gradients[0]))
    assert "layers.0." in first
    assert gradients[0][first].abs().max() > 0
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def test_all_weights_trained_has_a_frozen_copy_as_reference(tinystories):
    roles = load_roles(DPOConfig(model=str(tinystories), use_peft=False), trained="policy", reference=True)
    assert all(not name.startswith("copies") for name in roles.trained_parameters())
    texts = texts_of(tinystories)
    with torch.no_grad():
        before = logprobs(roles, texts, "packed")
        next(iter(roles.trained_parameters().values())).mul_(1.1)
        with roles.active("reference"):
            assert torch.equal(logprobs(roles, texts, "packed"), before)
        assert not torch.equal(logprobs(roles, texts, "packed"), before)


def test_reward_head_starts_as_the_paper_says(tinystories):
    """N(0, 1/sqrt(D+1)), bias 0. Over 100,000 draws four standard errors of a standard deviation are 0.9 %."""
    torch.manual_seed(0)
    wide = SimpleNamespace(weight=torch.empty(1, 100_000))
    head = new_scalar_head(SimpleNamespace(head=lambda: wide, device=torch.device("cpu")))
    assert head.weight.std().item() == pytest.approx(1 / 100_001**0.5, rel=0.009)
    assert head.bias.item() == 0.0
    roles = load_roles(RewardConfig(model=str(tinystories)), trained="reward", scalar=True)
    assert roles.heads["reward"].weight.shape == (1, 128)


def test_scores_do_not_depend_on_the_layout(tinystories):
    roles = load_roles(RewardConfig(model=str(tinystories)), trained="reward", scalar=True)
    batch = pack(texts_of(tinystories))
    scores = {}
    for layout in LAYOUTS:
        roles.layout = layout
        scores[layout] = roles.scores(batch)
    torch.testing.assert_close(scores["packed"], scores["padded"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("setting", "value"), [("final_logit_softcapping", 3.0), ("logit_scale", 0.25), ("logits_scaling", 4.0)]
)
def test_the_head_is_read_from_the_model_not_its_config(tinystories, setting, value):
    """A Llama applies none of these: names in a config are no proof of what becomes of the logits."""
    model = load_base(DPOConfig(model=str(tinystories)))
    setattr(model.config, setting, value)
    head = heads.read_head(model)
    assert (head.softcap, head.logit_scale) == (None, 1.0)


def test_the_transform_is_found_once_and_weights_each_time(tinystories):
    model = load_base(DPOConfig(model=str(tinystories)))
    heads.read_head(model)
    model.forward = None  # another pass would fail
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    assert torch.equal(heads.read_head(model).weight, model.get_output_embeddings().weight)


def test_a_head_that_makes_its_logits_otherwise_is_refused(tinystories):
    """The check sees a wrong scale on a few tokens."""
    model = load_base(DPOConfig(model=str(tinystories)))
    heads.check_head(model, model.get_decoder(), heads.read_head(model))
    with pytest.raises(OnecardError, match="computes its logits in a way that the linear functions cannot reproduce"):
        heads.check_head(model, model.get_decoder(), replace(heads.read_head(model), logit_scale=0.9))


def test_an_adapter_on_the_head_is_trained_and_not_ignored(tinystories):
    config = DPOConfig(model=str(tinystories), lora_target_modules=["lm_head", "q_proj"])
    roles = load_roles(config, trained="policy", reference=True)
    model = roles.causal_model()
    with torch.no_grad():
        for name, parameter in roles.trained_parameters().items():
            if "lm_head.lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    heads.check_head(model, model.get_decoder(), roles.head())
    logprobs(roles, texts_of(tinystories), "packed").sum().backward()
    trained = {name: p.grad for name, p in roles.trained_parameters().items() if "lm_head" in name}
    assert len(trained) == 2
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained.values())
    with roles.active("reference"):
        assert torch.equal(roles.head().weight, model.get_output_embeddings().get_base_layer().weight)


def test_an_adapter_that_came_with_dropout_has_none_here(tinystories, tmp_path):
    """Two passes in training mode agree, and the reference that starts from it equals the policy."""
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(
        load_base(DPOConfig(model=str(tinystories))),
        LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False),
    )
    other.save_pretrained(str(tmp_path / "adapter"))
    roles = load_roles(DPOConfig(model=str(tmp_path / "adapter")), trained="policy", reference=True)
    roles.train()
    texts = texts_of(tinystories)
    first = logprobs(roles, texts, "packed")
    assert torch.equal(first, logprobs(roles, texts, "packed"))
    with roles.active("reference"):
        assert torch.equal(first, logprobs(roles, texts, "packed"))


@pytest.mark.parametrize("use_peft", [True, False])
def test_training_goes_on_with_the_head_of_a_reward_model(tinystories, tmp_path, use_peft):
    config = RewardConfig(model=str(tinystories), use_peft=use_peft)
    roles = load_roles(config, trained="reward", scalar=True)
    with torch.no_grad():
        roles.heads["reward"].weight.fill_(0.5)
    roles.export("reward", tmp_path / "reward", load_tokenizer(config))
    again = load_roles(replace(config, model=str(tmp_path / "reward"), seed=1), trained="reward", scalar=True)
    assert (again.heads["reward"].weight == 0.5).all()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"base_model_name_or_path": "{base}"}, "has no adapter_model.safetensors"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
        ([1], "does not name its base model"),
    ],
)
def test_an_adapter_folder_that_is_none(tinystories, tmp_path, content, expected):
    (tmp_path / "adapter_config.json").write_text(json.dumps(content).replace("{base}", str(tinystories)))
    with pytest.raises(OnecardError, match=expected):
        load_roles(DPOConfig(model=str(tmp_path)), trained="policy")


def test_all_weights_in_float16_are_refused():
    with pytest.raises(OnecardError, match="dtype: float16 is only for adapter training"):
        DPOConfig(use_peft=False, dtype="float16").validate()
