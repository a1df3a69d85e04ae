"""read_head: the head that is read gives the model's own logits, of every family, and anything else is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onecard_kernels as k
from tests.closeness import error

V, D = 61, 32
SIZES = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
LATENT = dict(qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=8, q_lora_rank=8, head_dim=4)
# Settings, and the scale and softcap that each family makes of them.
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "HyperCLOVAX": ({"logits_scaling": 0.37}, 0.37, None),
    "Granite": ({"logits_scaling": 3.0}, 1 / 3, None),
    "FalconH1": ({"lm_head_multiplier": 0.13, **MAMBA}, 0.13, None),
    "MiniCPM3": ({"dim_model_base": 5, **LATENT}, 5 / D, None),
    "Cohere": ({"logit_scale": 0.25}, 0.25, None),
    "RecurrentGemma": ({"logits_soft_cap": 3.0, "lru_width": 32, "num_hidden_layers": 3}, 1.0, 3.0),
    "Gemma2": ({"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "NanoChat": ({"final_logit_softcapping": 5.0}, 1.0, 5.0),
    "FalconMamba": ({"state_size": 8}, 1.0, None),
    "Phi": ({}, 1.0, None),
    "GPT2": ({}, 1.0, None),
    "OPT": ({"word_embed_proj_dim": 16, "ffn_dim": 48}, 1.0, None),
    "Llama": ({"tie_word_embeddings": True}, 1.0, None),
}


def build(family: str, **settings: Any) -> Any:
    """A tiny random model whose logits are spread like a trained one's."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family][0], **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20.0)
        if head.bias is not None:
            head.bias.normal_()
    return model


def own_and_ours(model: Any, head: k.LanguageHead) -> tuple[Tensor, Tensor]:
    """Log-probs of every token at every position: from the model's logits, and from its trunk's hidden states."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.randint(3, V, (1, 7))
    own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    every = torch.arange(V).expand(1, 7, V)
    rows = hidden.unsqueeze(2).expand(1, 7, V, hidden.shape[-1])
    return own, k.linear_logprobs(rows, head.weight, every, **head.keywords()).logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_family_gives_its_own_logits(family: str) -> None:
    model = build(family).train()
    _, scale, softcap = FAMILIES[family]
    for dtype, limit in ((torch.float32, 2e-4), (torch.bfloat16, 0.3)):
        head = k.read_head(model.to(dtype))
        assert head.logit_scale == pytest.approx(scale, rel=1e-12)
        assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-12))
        assert (head.bias is not None) == (family == "Phi")
        assert all(module.training for module in model.modules()), "the model is left as it was"
        model.eval()
        own, ours = own_and_ours(model, head)
        assert own.std() > 0.1, "logits are too flat to compare"
        assert error(ours.detach(), own.detach()) < limit
        model.train()


def test_reading_again_with_the_transform_runs_nothing() -> None:
    model = build("Gemma2")
    transform = k.find_logit_transform(model)
    assert transform == k.LogitTransform(1.0, 3.0, None)
    model.forward = None  # another pass would fail
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    head = k.read_head(model, transform)
    assert head.weight is model.lm_head.weight
    assert head.keywords() == {"bias": None, "logit_scale": 1.0, "softcap": 3.0}


@pytest.mark.parametrize("change", [{"logit_scale": 0.9}, {"softcap": 3.3}, {"softcap": None}, {"bias": torch.ones(V)}])
def test_another_head_is_refused(change: dict[str, Any]) -> None:
    model = build("Gemma2")
    head = k.read_head(model)
    with pytest.raises(
        ValueError, match=r"Gemma2ForCausalLM computes its logits in a way .* a logit of its head is off by"
    ):
        k.check_head(model, replace(head, **change))


class Toy(nn.Module):
    """A causal language model of one layer whose logits are `after(head(before(h)))`."""

    def __init__(self, *, before: Any = None, after: Any = None, bias: bool = False, rows: int = V) -> None:
        super().__init__()
        self.embed, self.trunk, self.head = nn.Embedding(V, D), Trunk(), nn.Linear(D, rows, bias=bias)
        nn.init.normal_(self.head.weight)
        self.before, self.after = before, after
        self.config, self.device = SimpleNamespace(is_encoder_decoder=False), torch.device("cpu")
        self.scale = nn.Parameter(torch.tensor(2.0))

    def get_decoder(self) -> nn.Module:
        return self.trunk

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        (h,) = self.trunk(self.embed(input_ids))
        h = h if self.before is None else self.before(self, h)
        logits = self.head(h)
        return SimpleNamespace(logits=logits if self.after is None else self.after(self, logits))


class Trunk(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * 1.5,)


# What there is besides a scale and a softcap, and a word of the message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another squash": ({"after": lambda _, z: z / (1.0 + z.abs() / 30.0)}, "for token"),
    "a softcap that is no tanh": ({"after": lambda _, z: z.clamp(-30.0, 30.0)}, "for token"),
    "log-probs": ({"after": lambda _, z: z.log_softmax(-1)}, "for token"),
    "an offset": ({"after": lambda _, z: z + 0.5}, "for token"),
    "one token's own scale": (
        {"after": lambda _, z: torch.cat([z[..., :5], 2 * z[..., 5:6], z[..., 6:]], -1)},
        "token 5",
    ),
    "a forbidden token": ({"after": lambda _, z: z.index_fill(-1, torch.tensor([7]), -1e4)}, "token 7"),
    "a trained scale": ({"after": lambda m, z: z * m.scale}, "no gradient"),
    "rounded after scaling": ({"after": lambda _, z: (z * 0.3).bfloat16()}, "rounded"),
    "a norm before the head": ({"before": lambda _, h: h / h.norm(dim=-1, keepdim=True)}, "more than scale"),
    "a layer before the head": ({"before": lambda m, h: m.embed.weight.T[:, :D] @ h.mT}, "more than scale"),
    "scaled before a bias": ({"before": lambda _, h: h / 3.0, "bias": True}, "a head with a bias"),
    "a head that is not called": ({"after": lambda m, z: z}, "before its output embeddings, a Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_scale_and_no_softcap_is_refused(case: str) -> None:
    settings, words = REFUSED[case]
    model = Toy(**settings)
    if "not called" in case:
        unused = nn.Linear(D, V)
        model.get_output_embeddings = lambda: unused
    with pytest.raises(
        ValueError, match=f"Toy computes its logits in a way that the linear functions cannot .*{words}"
    ):
        k.read_head(model)
    assert not model.trunk._forward_hooks, "hooks are left on the model"


def test_scale_softcap_and_padding_are_found_together() -> None:
    """(h / 8) @ W.T, times -0.7, capped at 11, and the last three rows of the head cut off."""
    model = Toy(before=lambda _, h: h / 8.0, after=lambda _, z: (11.0 * torch.tanh(-0.7 * z / 11.0))[..., :-3])
    head = k.read_head(model)
    assert (head.logit_scale, head.softcap) == (pytest.approx(-0.7 / 8.0, rel=1e-12), pytest.approx(11.0, rel=1e-12))
    assert head.weight.shape == (V - 3, D)
    head.weight.sum().backward()
    assert model.head.weight.grad.sum() == (V - 3) * D


def test_models_without_one_head_are_named() -> None:
    with pytest.raises(ValueError, match="Linear has no language model head, expected a causal language model"):
        k.read_head(nn.Linear(2, 2))
    model = Toy()
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="Toy is an encoder with a decoder"):
        k.read_head(model)
    model = Toy()
    with pytest.raises(ValueError, match="trunk is the whole Toy"):
        k.read_head(model, trunk=model)
    with pytest.raises(ValueError, match="Toy is on the meta device"):
        k.read_head(Toy().to("meta"))
    model.head.weight = nn.Parameter(torch.zeros(V * D // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Toy's head is a Linear in torch.uint8, expected an unquantized weight"):
        k.read_head(model, k.LogitTransform())


def adapted(model: Any, *, std: float = 0.2, **settings: Any) -> Any:
    """The model in PEFT, with adapters that are no longer zero."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["lm_head"], **settings})
    )
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.normal_(std=std)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_head_is_in_its_weight_with_gradients(tied: bool) -> None:
    """fp64: log-probs and the gradients of A and B are those of PEFT's own forward."""
    model = adapted(build("Llama", tie_word_embeddings=tied), ensure_weight_tying=tied).double().eval()
    head = k.read_head(model)
    own, ours = (x.double() for x in own_and_ours(model, head))
    assert error(ours.detach(), own.detach()) < 1e-5  # own_and_ours takes fp32 logits
    ids, coefficients = torch.randint(V, (1, 6)), torch.randn(1, 6, dtype=torch.float64)
    causal, lora = model.get_base_model(), [x for n, x in model.named_parameters() if "lm_head.lora_" in n]
    assert len(lora) == 2
    logprobs = model(input_ids=ids).logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    truth = torch.autograd.grad((logprobs * coefficients).sum(), lora)
    hidden = causal.get_decoder()(input_ids=ids).last_hidden_state
    ours = k.linear_logprobs(hidden, head.weight, ids, **head.keywords()).logprobs
    for got, expected in zip(torch.autograd.grad((ours * coefficients).sum(), lora), truth, strict=True):
        assert expected.abs().max() > 1e-3
        assert error(got, expected) < 1e-10


def test_lora_on_a_16_bit_head_is_not_rounded_away() -> None:
    """A product below half a unit of W's last place: W + B @ A in bf16 would be W."""
    model = build("Llama").bfloat16()
    with torch.no_grad():
        model.lm_head.weight.fill_(1.0)
    model = adapted(model, std=0.02, lora_alpha=2).eval()
    layer = model.get_base_model().lm_head
    base, product = layer.base_layer.weight, layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.equal(base + product.bfloat16(), base)
    weight = k.read_head(model).weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, 1.0 + product)
    layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    assert k.read_head(model).weight.dtype == torch.float32
    assert not torch.equal(weight, base.float())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast would round W"):
        k.read_head(model, k.LogitTransform())


def test_adapters_that_are_off_merged_or_several() -> None:
    model = adapted(build("Llama")).eval()
    layer, none = model.get_base_model().lm_head, k.LogitTransform()
    base = layer.base_layer.weight.clone()
    first = k.read_head(model).weight - base
    assert first.abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(k.read_head(model).weight, base)
    model.add_adapter("second", model.peft_config["default"])
    nn.init.normal_(layer.lora_B["second"].weight)
    model.base_model.set_adapter(["default", "second"])
    second = layer.scaling["second"] * layer.lora_B["second"].weight @ layer.lora_A["second"].weight
    assert error((k.read_head(model).weight - base).detach(), (first + second).detach()) < 1e-5
    model.merge_adapter()
    assert k.read_head(model).weight is layer.base_layer.weight
    with model.disable_adapter(), pytest.raises(ValueError, match="merged and disabled"):
        k.read_head(model, none)


def test_modules_to_save_and_biases_of_lora() -> None:
    model = adapted(build("Llama", tie_word_embeddings=False), target_modules=["q_proj"], modules_to_save=["lm_head"])
    saved = model.get_base_model().lm_head.modules_to_save["default"]
    nn.init.normal_(saved.weight)
    assert k.read_head(model.eval()).weight is saved.weight
    with model.disable_adapter():
        assert k.read_head(model).weight is model.get_base_model().lm_head.original_module.weight
    model = adapted(build("Phi"), lora_bias=True).eval()
    layer = model.get_base_model().lm_head
    assert error(k.read_head(model).bias, layer.base_layer.bias + 3.0 * layer.lora_B["default"].bias) < 1e-6


def test_other_adapters_on_the_head_are_refused_by_name() -> None:
    """At the start most change nothing, so that no comparison of logits would see them."""
    peft = pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["lm_head"]}
    kinds = {
        "DoraLinearVariant": peft.LoraConfig(**lora, use_dora=True),
        "dropout 0.1 on the head in training mode": peft.LoraConfig(**lora, lora_dropout=0.1),
        "a Linear of peft": peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        "a SVDLinear of peft": peft.AdaLoraConfig(r=2, target_modules=["lm_head"], total_step=10),
        "a TrainableTokensWrapper of peft": peft.LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices=[1]
        ),
        "virtual tokens": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    for words, config in kinds.items():
        model = peft.get_peft_model(build("Llama"), config).train()
        with pytest.raises(ValueError, match=words):
            k.read_head(model, k.LogitTransform())
    model = peft.get_peft_model(build("Llama"), kinds["dropout 0.1 on the head in training mode"]).eval()
    assert k.read_head(model).weight.shape == (V, D)  # in evaluation there is no dropout
