"""Attention over packed and shared sequences on whole models, against transformers' own, one sequence at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.config import ModelConfig
from onecard.data.batches import PreferencePair, TokenBatch, pack, pack_pairs
from onecard.models import attention
from onecard.models.attention import (
    attend,
    has_onecard_attention,
    passes_windows_on,
    takes_segments,
    use_onecard_attention,
)
from onecard.models.load import load_base
from onecard.models.roles import Roles
from onecard.training.startup import check_model
from onecard.utils.errors import OnecardError
from tests.engine.attention_material import (
    CONFIGS,
    PAIRS,
    PROMPT,
    answer,
    distance,
    gradient,
    hidden,
    judged,
    logprobs,
    own_roles,
    pair,
    random_model,
)

ROUNDING = 2e-6  # of fp32, over a whole model: a token that sees too much or too little is off by more than 1e-2
PRETRAINED = ["tinystories", "stories260k"]
TAKES_OURS = [name for name in CONFIGS if name not in ("bloom", "qwen2_moe")]


def model_of(name: str, request: pytest.FixtureRequest) -> Any:
    """With transformers' eager attention and all weights trained."""
    if name not in PRETRAINED:
        return random_model(name)
    folder: Path = request.getfixturevalue(name)
    return load_base(ModelConfig(model=str(folder), attn_implementation="eager"), train_all=True).eval()


@pytest.mark.parametrize("name", [*PRETRAINED, *TAKES_OURS])
def test_every_layout_gives_the_gradients_of_single_sequences(name, request):
    model = model_of(name, request)
    truth = judged(model).detach()
    slopes = gradient(model, judged(model))
    roles = own_roles(model)
    assert roles.layout == "packed"
    layouts = ["packed", "padded", *(["restarted"] if name != "opt" else [])]  # OPT makes positions of its own
    for layout in layouts:
        for share in (False, True):
            found = logprobs(roles, layout, share_prompts=share)
            assert distance(found.detach(), truth) < ROUNDING, (layout, share)
            assert distance(gradient(model, found), slopes) < ROUNDING, (layout, share)


@pytest.mark.parametrize("name", ["bloom", "opt"])
def test_a_model_that_mixes_packed_sequences_up_is_padded(name, capsys):
    """BLOOM takes no attention by name; OPT with one that the user asked for makes its own positions."""
    model = random_model(name)
    truth = judged(model)
    roles = own_roles(model) if name == "bloom" else Roles(model, ("policy",), {"policy": None}, "packed")
    assert not has_onecard_attention(model)
    assert roles.layout == ("padded" if name == "bloom" else "restarted")
    assert distance(logprobs(roles, "restarted").detach(), truth.detach()) > 1e-2
    roles.layout = "restarted"
    check_model(roles, longest=60)
    assert roles.layout == "padded"
    assert "in restarted batches, texts influence each other, so the layout is padded" in capsys.readouterr().err
    for share in (False, True):
        found = logprobs(roles, roles.layout, share_prompts=share)
        assert distance(found.detach(), truth.detach()) < ROUNDING
        assert distance(gradient(model, found), gradient(model, judged(model))) < ROUNDING


def other(item: PreferencePair, **responses: list[int]) -> PreferencePair:
    prompt = [token for token, own in zip(item.chosen.tokens, item.chosen.response_mask, strict=True) if not own]
    return replace(item, **{side: answer(prompt, tokens) for side, tokens in responses.items()})


@pytest.mark.parametrize("name", TAKES_OURS)
def test_a_sequence_sees_its_own_rows_alone(name):
    """To the last bit: the rows of the other sequences do not go into the same sums."""
    roles = own_roles(random_model(name))
    before = pack([PAIRS[0].chosen, PAIRS[1].chosen, PAIRS[3].rejected])
    after = pack([PAIRS[0].chosen, answer(range(100, 117), [1, 2, 3]), PAIRS[3].rejected])
    was, now = (hidden(roles, batch).split(before.lengths) for batch in (before, after))
    assert torch.equal(was[0], now[0])
    assert torch.equal(was[2], now[2])
    assert (was[1] - now[1]).abs().min(-1).values.max() > 0


def rows_of(batch: TokenBatch, index: int) -> slice:
    start = sum(batch.lengths[:index])
    return slice(start, start + batch.lengths[index])


@pytest.mark.parametrize("name", TAKES_OURS)
def test_who_sees_what_of_a_shared_prompt(name):
    """The answers do not see each other; both see the prompt; the prompt sees neither."""
    roles = own_roles(random_model(name))

    def states(item: PreferencePair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = pack_pairs([item, PAIRS[3]], share_prompts=True).sequences
        assert batch.shared is not None
        assert batch.shared.spans[2] == (0, 20)
        found = hidden(roles, batch)
        chosen = found[rows_of(batch, 0)]
        return chosen[:20], chosen[20:], found[rows_of(batch, 2)]

    item = pair(PROMPT[:20], [5, 6, 7], [8, 9, 10])
    prompt, chosen, rejected = states(item)
    with_rejected = states(other(item, rejected=[30, 31, 32]))
    assert torch.equal(with_rejected[0], prompt)
    assert torch.equal(with_rejected[1], chosen)
    assert not torch.isclose(with_rejected[2], rejected).all(-1).any()
    with_chosen = states(other(item, chosen=[30, 31, 32]))
    assert torch.equal(with_chosen[0], prompt)
    assert torch.equal(with_chosen[2], rejected)
    with_prompt = states(pair((*PROMPT[:18], 90, 91), [5, 6, 7], [8, 9, 10]))
    assert torch.equal(with_prompt[0][:18], prompt[:18])
    assert not torch.isclose(with_prompt[1], chosen).all(-1).any()
    assert not torch.isclose(with_prompt[2], rejected).all(-1).any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_eager_is(name):
    """The truth is fp32 of the same rounded weights; eager's own distance from it is the measure."""
    rounded = random_model(name).bfloat16()
    exact = random_model(name)
    exact.load_state_dict(rounded.state_dict())
    truth, eager = judged(exact).detach(), judged(rounded).detach()
    slopes = gradient(exact, judged(exact))
    of_values, of_slopes = distance(eager, truth), distance(gradient(rounded, judged(rounded)), slopes)
    roles = own_roles(rounded)
    for share in (False, True):
        found = logprobs(roles, "packed", share_prompts=share)
        assert found.dtype == torch.float32
        assert distance(found.detach(), truth) < 1.5 * of_values
        assert distance(gradient(rounded, found), slopes) < 1.5 * of_slopes


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gemma3"])
def test_checkpointed_activations_give_the_same_gradients(name):
    """The layers run again in the backward pass, with the same segments."""
    model = random_model(name)
    roles = own_roles(model)
    plain = [gradient(model, logprobs(roles, "packed", share_prompts=share)) for share in (False, True)]
    roles.train()
    roles.checkpoint_activations()
    runs = []
    handle = model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    again = [gradient(model, logprobs(roles, "packed", share_prompts=share)) for share in (False, True)]
    handle.remove()
    assert len(runs) == 4
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


@pytest.mark.parametrize("argument", ["s_aux", "position_bias", "sinks", "indices", "block_indices"])
def test_what_it_does_not_know_is_an_error(argument):
    query = torch.randn(1, 2, 3, 8)
    for value in (None, torch.ones(2)):
        call = (torch.nn.Identity(), query, query, query, None)
        if value is None:
            known = {"is_causal": True, "position_ids": torch.zeros(1), "use_cache": False}
            assert attend(*call, **known, **{argument: value})[0].shape == (1, 3, 2, 8)
            continue
        with pytest.raises(
            OnecardError, match=f"Identity has attention with {argument}, .* --attn_implementation eager"
        ):
            attend(*call, **{argument: value})


def test_a_model_with_windows_in_its_masks_keeps_the_masks():
    """This family hands its attention a mask and no window: by segments it would look back without end."""
    model = random_model("qwen2_moe")
    truth, slopes = judged(model).detach(), gradient(model, judged(model))
    roles = own_roles(model)
    assert has_onecard_attention(model)
    assert roles.layout == "restarted"
    check_model(roles, longest=60)
    assert roles.layout == "restarted"
    for layout in ("restarted", "padded"):
        for share in (False, True):
            found = logprobs(roles, layout, share_prompts=share)
            assert distance(found.detach(), truth) < ROUNDING, (layout, share)
            assert distance(gradient(model, found), slopes) < ROUNDING, (layout, share)
    wide = own_roles(random_model("qwen2_moe", sliding_window=LONGEST))
    assert distance(judged(wide.model).detach(), truth) > 1e-2
    assert wide.layout == "packed"
    assert distance(logprobs(wide, "packed").detach(), logprobs(wide, "padded").detach()) < ROUNDING


@pytest.mark.parametrize("name", TAKES_OURS)
def test_layers_that_hand_their_window_on_are_packed(name):
    model = random_model(name)
    use_onecard_attention(model)
    assert takes_segments(model)
    assert passes_windows_on(model) == (name in ("qwen2", "qwen3", "gemma2", "gemma3", "mistral"))


def test_a_window_that_is_only_in_the_mask_is_never_forgotten():
    """Where a layer was taken for one that hands its window on."""
    with pytest.raises(OnecardError, match="Qwen2MoeAttention has attention with sliding_window"):
        logprobs(own_roles(random_model("qwen2_moe")), "packed")


LONGEST = 128  # max_position_embeddings: such a window is none


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_over_shared_keys_repeats_nothing(masked):
    """Against the formula in float64, and by the size of what is made: less than one copy of the keys."""
    from benchmarks.measure import peak_bytes

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 1, 16), torch.randn(3, 2, 500, 16), torch.randn(3, 2, 500, 16)
    mask = torch.rand(3, 1, 1, 500) > 0.4 if masked else None
    given = (torch.nn.Module(), query, key, value, mask)
    out, _ = attention.attend(*given)
    seen = torch.ones(3, 1, 1, 500, dtype=torch.bool) if mask is None else mask
    score = attention.AttentionOptions(16**-0.5)
    expected = attention.eager_attention(query.double(), key.double(), value.double(), score, seen).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    assert peak_bytes(lambda: attention.attend(*given) and None, torch.device("cpu")) < key.nbytes / 2
