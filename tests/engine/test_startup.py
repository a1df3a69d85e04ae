"""The startup check: which layout and which way of sampling a model gets, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.data.batches import TokenSequence, pack, to_device
from onecard.models.attention import attend, has_onecard_attention, use_onecard_attention
from onecard.models.load import without_dropout
from onecard.models.roles import Roles
from onecard.rollout import Sampling, sample_responses
from onecard.training import startup
from onecard.training.startup import check_decoding, check_model, mixes_sequences, probe_sequences
from onecard.utils.errors import OnecardError
from tests.models.families import FAMILIES, Family, config_of, random_model

LONGEST = 90  # beyond every window, top-k and original context of the families
EXACT = 1e-4


def roles_of(name: str | Family, dtype: torch.dtype = torch.float32, layout: str = "packed") -> Roles:
    family = FAMILIES[name] if isinstance(name, str) else name
    model = random_model(family).to(dtype)
    use_onecard_attention(model)
    return Roles(model, ("policy",), {"policy": None}, layout).eval()


@torch.no_grad()
def plain(name: str, sequences: list[TokenSequence]) -> torch.Tensor:
    """transformers' own log-probs, one text at a time."""
    model = random_model(FAMILIES[name])
    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence.tokens)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        own = logits.gather(1, ids[1:, None]).squeeze(1)
        found.append(own[torch.tensor(sequence.response_mask[1:])])
    return torch.cat(found)


def laid(roles: Roles, sequences: list[TokenSequence]) -> torch.Tensor:
    batch = to_device(pack(sequences), roles.device)
    with torch.no_grad():
        return roles.logprobs(batch, batch.targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "layout", "mixed"),
    [
        ("llama", "packed", False),
        ("gemma2", "packed", False),
        ("llama", "restarted", False),
        ("granitemoehybrid", "restarted", True),
        ("falcon_h1", "restarted", True),
        ("qwen3_next", "restarted", True),
        ("lfm2_moe", "restarted", True),
        ("falcon_h1", "padded", False),
        ("mamba2", "padded", False),
    ],
)
def test_gradients_tell_whether_texts_mix(name, layout, mixed, dtype):
    """Exactly 0 or not, in every dtype: 16-bit rounding hides a state that crosses from one text to the next."""
    roles = roles_of(name, dtype)
    assert mixes_sequences(roles, layout, probe_sequences(roles, 20)[::2]) == mixed


@pytest.mark.parametrize(
    ("name", "layout", "decoding"),
    [
        ("llama", "packed", "slots"),
        ("mistral", "packed", "padded"),
        ("afmoe", "packed", "padded"),
        ("jetmoe", "packed", "slots"),
        ("deepseek_v3", "packed", "slots"),
        ("granitemoehybrid", "padded", "padded"),
        ("falcon_h1", "padded", "padded"),
        ("mamba", "padded", "padded"),
        ("nemotron", "restarted", "padded"),  # its layers do not hand segments on
        ("opt, projected", "packed", "slots"),
        ("gpt_neo", "padded", "padded"),  # its masks end with its context
        ("bloom", "padded", "padded"),
        ("openai-gpt", "padded", "uncached"),
        ("rwkv", "padded", "uncached"),
        ("minimax", "padded", "uncached"),  # a cache of its own kind
        ("deepseek_v32", "single", "uncached"),  # ties in its top-k fall otherwise in other shapes
    ],
)
def test_each_model_is_laid_and_sampled_in_a_way_that_is_right(name, layout, decoding):
    roles = roles_of(name)
    check_model(roles, LONGEST, row=3 * LONGEST)
    check_decoding(roles, LONGEST)
    assert (roles.layout, roles.decoding) == (layout, decoding)
    texts = probe_sequences(roles, LONGEST)
    assert (laid(roles, texts) - plain(name, texts)).abs().max() < EXACT


@pytest.mark.parametrize("name", ["granitemoehybrid", "falcon_h1", "lfm2_moe", "llama", "qwen3_moe"])
def test_in_bfloat16_the_layout_is_the_same(name):
    assert _layout(name, torch.bfloat16) == _layout(name, torch.float32)


def _layout(name: str, dtype: torch.dtype) -> str:
    roles = roles_of(name, dtype)
    check_model(roles, LONGEST, row=LONGEST)
    return roles.layout


def test_a_model_that_sees_ahead_is_refused():
    """A Gemma that was made for embeddings attends to both sides."""
    with pytest.raises(OnecardError, match="Gemma3ForCausalLM is not causal"):
        check_model(roles_of(Family("gemma3_text", {"use_bidirectional_attention": True})), 30)


# --- rotations that depend on the longest text of a pass


@pytest.mark.parametrize("layout", ["packed", "padded", "restarted"])
def test_a_text_beyond_the_original_context_changes_no_other(layout):
    roles = roles_of("phi3, longrope", layout=layout)
    check_model(roles, LONGEST)
    texts = probe_sequences(roles, LONGEST)
    assert len(texts[0]) < 32 < len(texts[1])
    truth = plain("phi3, longrope", texts)
    assert (laid(roles, texts) - truth).abs().max() < EXACT
    assert (laid(roles, texts[:1]) - truth[: len(texts[0]) - 1]).abs().max() < EXACT


def test_sampling_across_the_original_context_is_right():
    """A cache would hold keys rotated by the other factors; each token is drawn from the whole text so far."""
    roles = roles_of("phi3, longrope")
    check_decoding(roles, 40)
    prompts = [startup.made_up_tokens(300, 26, 0), startup.made_up_tokens(300, 5, 1)]
    found = sample_responses(roles, prompts, Sampling(12), stop_tokens=(), batch_size=2, seed=0).responses
    model = random_model(FAMILIES["phi3, longrope"])
    for prompt, response in zip(prompts, found, strict=True):
        for place, (token, logprob) in enumerate(zip(response.tokens, response.logprobs, strict=True)):
            ids = torch.tensor([prompt + response.tokens[:place]])
            with torch.no_grad():
                truth = model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[token]
            torch.testing.assert_close(logprob, truth, atol=EXACT, rtol=0)


# --- noise in training mode


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("biogpt", {"layerdrop": 0.5}),
        ("gpt2", {"resid_pdrop": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
    ],
)
def test_noise_that_the_config_names_is_turned_off(name, settings, capsys):
    config = without_dropout(config_of(Family(name, settings)))
    assert [getattr(config, noise) for noise in settings] == [0.0]
    model = AutoModelForCausalLM.from_config(config)
    use_onecard_attention(model)
    roles = Roles(model, ("policy",), {"policy": None}, "packed").eval()
    check_model(roles, 30)
    assert not roles.trained_in_evaluation_mode
    texts = probe_sequences(roles, 30)
    still = laid(roles, texts)
    assert torch.equal(laid(roles.train(), texts), still)
    assert "training mode" not in capsys.readouterr().err


def test_nested_configs_lose_their_noise_too():
    from transformers import DbrxConfig

    config = DbrxConfig(ffn_config={"moe_jitter_eps": 0.1}, resid_pdrop=0.1)
    without_dropout(config)
    assert (config.ffn_config.moe_jitter_eps, config.resid_pdrop) == (0.0, 0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_draws_noise_is_trained_in_evaluation_mode(checkpointing, capsys):
    """A layer of its own that no config names, such as a router that samples its experts."""
    roles = roles_of("llama")

    class Noisy(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden * (1 + 0.2 * torch.rand_like(hidden)) if self.training else hidden

    first = roles.model.model.layers[0]
    first.mlp = torch.nn.Sequential(first.mlp, Noisy())
    if checkpointing:
        roles.checkpoint_activations()
    check_model(roles, 30)
    assert "so it is trained in evaluation mode" in capsys.readouterr().err
    texts = probe_sequences(roles, 30)
    assert (laid(roles.train(), texts) - plain("llama", texts)).abs().max() < EXACT
    layers = roles.model.model.layers
    assert [layer.training for layer in layers] == [checkpointing] * len(layers)


# --- attention


def test_a_layer_that_is_not_told_of_segments_is_refused():
    """The mask of a packed row would let every token see every other."""
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(OnecardError, match="Identity got a packed batch without `segments`"):
        attend(torch.nn.Identity(), query, query, query, torch.ones(1, 1, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize(("name", "own"), [("llama", True), ("deepseek_v32", False), ("falcon_h1", False)])
def test_layers_that_choose_keys_keep_their_own_attention(name, own):
    assert has_onecard_attention(roles_of(name).model) == own


# --- memory


def test_a_shorter_text_is_tried_where_a_long_one_is_too_much(monkeypatch):
    lengths = []
    choose = startup.choose_layout

    def limited(roles: Roles, longest: int, row: int) -> None:
        lengths.append(longest)
        if longest > 30:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        choose(roles, longest, row)

    monkeypatch.setattr(startup, "choose_layout", limited)
    check_model(roles_of("llama"), LONGEST)
    assert lengths == [90, 45, 22]


def test_a_model_that_cannot_be_run_at_all_is_one_line():
    roles = roles_of("llama")
    roles.model.model.layers[0].register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(OnecardError, match="LlamaForCausalLM cannot be run"):
        check_model(roles, 30)
