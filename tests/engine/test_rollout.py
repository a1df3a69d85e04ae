"""The sampling loop, on pretrained models: random weights would hide wrong masks and positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard import rollout
from onecard.batches import TokenSequence, pack, response_targets
from onecard.config import ModelConfig
from onecard.errors import OnecardError
from onecard.models.build import load_player, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles
from onecard.rollout import Response, Sampling, draw, end_tokens, sample_responses, warpers

TEXTS = [
    "Lily",
    "Once upon a time, there was a little girl named Sue. She",
    "The big dog ran to the park and",
    "One day, Tom and his mom went to the store to buy some red apples. Tom was",
    "Ben saw",
    "It was",
]


@dataclasses.dataclass(frozen=True)
class Player:
    """A model with its tokenizer and the prompts of `TEXTS`."""

    roles: Roles
    tokenizer: Any
    prompts: tuple[tuple[int, ...], ...]
    ends: frozenset[int]

    @property
    def model(self) -> Any:
        return self.roles.causal_model()

    def sample(self, sampling: Sampling, prompts: Sequence[Sequence[int]] | None = None, **changes: Any) -> Any:
        settings = {"ends": self.ends, "pad": self.tokenizer.pad_token_id, "batch_size": 8, **changes}
        return sample_responses(self.roles, self.prompts if prompts is None else prompts, sampling, **settings)


def load(folder: Path, **settings: Any) -> Player:
    config = ModelConfig(model=str(folder), **settings)
    tokenizer, roles = load_tokenizer(config), load_player(config, role="policy")
    prompts = tuple(tuple(tokenizer.encode(text)) for text in TEXTS)
    return Player(roles, tokenizer, prompts, end_tokens(roles, tokenizer))


@pytest.fixture(scope="module")
def stories656(tinystories: Path) -> Player:
    return load(tinystories)


@pytest.fixture(scope="module")
def stories260(stories260k: Path) -> Player:
    return load(stories260k)


@pytest.fixture
def player(stories656: Player) -> Player:
    return stories656


@contextmanager
def spied(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of every pass."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


@torch.no_grad()
def own_logprobs(player: Player, prompt: Sequence[int], response: Response, temperature: float) -> Tensor:
    """What the role itself says of a response, in one pass over the finished sequence."""
    mask = (False,) * len(prompt) + (True,) * len(response.tokens)
    batch = pack([TokenSequence((*prompt, *response.tokens), mask)])
    return player.roles.logprobs(batch, response_targets(batch), temperature=temperature)


@torch.no_grad()
def next_logits(player: Player, prompt: Sequence[int]) -> Tensor:
    return player.model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0, -1].float()


def greedy_by_transformers(player: Player, prompt: Sequence[int], length: int) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)])
    out = player.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
        eos_token_id=sorted(player.ends), pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, ids.shape[1] :].tolist())


def common_ends(player: Player) -> frozenset[int]:
    """EOS and every token with a full stop, so that responses end early and at several places."""
    return player.ends | {token for piece, token in player.tokenizer.get_vocab().items() if "." in piece}


# --- log-probs as drawn


@pytest.mark.parametrize("model", ["stories656", "stories260"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3, 18])
def test_logprobs_as_drawn_are_those_of_the_finished_sequences(request, model, temperature, batch_size):
    """Rows leave while others go on, and a wrong mask, position or cache row would show in what is drawn after that."""
    player = request.getfixturevalue(model)
    torch.manual_seed(1)
    prompts = player.prompts * 3
    ends = common_ends(player)
    with spied(player.model) as shapes:
        found = player.sample(Sampling(40, temperature), prompts, ends=ends, batch_size=batch_size).responses
    assert len({len(response.tokens) for response in found}) > 5
    if batch_size == 18:
        sizes = [rows for rows, _ in shapes]
        assert len(set(sizes)) > 4  # rows left several times
    for prompt, response in zip(prompts, found, strict=True):
        assert response.logprobs.dtype == torch.float32
        assert response.logprobs.shape == (len(response.tokens),)
        own = own_logprobs(player, prompt, response, temperature)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)


def test_logprobs_at_temperature_0_are_of_undivided_logits(player):
    for prompt, response in zip(player.prompts, player.sample(Sampling(20, 0.0)).responses, strict=True):
        own = own_logprobs(player, prompt, response, 1.0)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)


def test_logprobs_after_top_k_and_top_p_are_of_what_was_left(player):
    """Of three tokens: the softmax over the three likeliest. Of top_p: the smallest set with that much probability."""
    prompt, temperature = player.prompts[0], 0.8
    probabilities, tokens = (next_logits(player, prompt) / temperature).softmax(-1).sort(descending=True)
    place = {token: index for index, token in enumerate(tokens.tolist())}
    enough = int((probabilities.cumsum(0) < 0.6).sum()) + 1
    assert enough > 2
    for sampling, left in ((Sampling(1, temperature, top_k=3), 3), (Sampling(1, temperature, top_p=0.6), enough)):
        torch.manual_seed(0)
        found = player.sample(sampling, [prompt] * 400, batch_size=400).responses
        drawn = {place[response.tokens[0]] for response in found}
        assert drawn <= set(range(left))
        assert {0, 1, 2} <= drawn
        for response in found:
            expected = (probabilities[place[response.tokens[0]]] / probabilities[:left].sum()).log()
            torch.testing.assert_close(response.logprobs[0], expected, atol=1e-4, rtol=0)


# --- what is drawn


def test_the_drawn_distribution_is_the_models_own(player):
    """Chi-square of 20,000 draws of one token against the model's softmax, at a temperature."""
    torch.manual_seed(5)
    count, prompt, temperature = 20_000, player.prompts[0], 1.3
    expected = (next_logits(player, prompt) / temperature).softmax(-1) * count
    found = player.sample(Sampling(1, temperature), [prompt] * count, batch_size=5_000).responses
    drawn = torch.bincount(torch.tensor([response.tokens[0] for response in found]), minlength=len(expected))
    often = expected >= 10
    rest = torch.stack([drawn[~often].sum(), expected[~often].sum()])
    chi = ((drawn[often] - expected[often]) ** 2 / expected[often]).sum() + (rest[0] - rest[1]) ** 2 / rest[1]
    freedom = int(often.sum())
    assert freedom > 50
    assert chi < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_rows_of_one_batch_are_drawn_independently(player):
    torch.manual_seed(0)
    found = player.sample(Sampling(12), [player.prompts[1]] * 32, batch_size=32).responses
    assert len({response.tokens for response in found}) > 25


def test_the_same_seed_draws_the_same(player):
    def sampled(seed: int) -> list[tuple[int, ...]]:
        torch.manual_seed(seed)
        return [response.tokens for response in player.sample(Sampling(24)).responses]

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)


def test_draws_come_from_the_global_generator_and_from_nothing_else(player):
    """A checkpoint keeps its state; sampling goes on from there as if nothing had been."""
    torch.manual_seed(9)
    player.sample(Sampling(5))
    state = torch.get_rng_state()
    first = [response.tokens for response in player.sample(Sampling(16)).responses]
    torch.set_rng_state(state)
    assert [response.tokens for response in player.sample(Sampling(16)).responses] == first


@pytest.mark.parametrize("model", ["stories656", "stories260"])
def test_greedy_is_transformers_greedy_whatever_stands_beside_it(request, model):
    player = request.getfixturevalue(model)
    together = player.sample(Sampling(40, 0.0)).responses
    for prompt, response in zip(player.prompts, together, strict=True):
        assert response.tokens == greedy_by_transformers(player, prompt, 40)
        assert player.sample(Sampling(40, 0.0), [prompt]).responses[0].tokens == response.tokens


def test_top_k_1_is_greedy_and_greedy_draws_nothing(player):
    state = torch.get_rng_state()
    filtered = player.sample(Sampling(24, 0.0, top_p=0.5, top_k=3)).responses
    for response, plain in zip(filtered, player.sample(Sampling(24, 0.0)).responses, strict=True):
        assert torch.equal(response.logprobs, plain.logprobs)  # of all tokens: nothing is left out at temperature 0
    greedy = [response.tokens for response in filtered]
    assert torch.equal(torch.get_rng_state(), state)
    only = player.sample(Sampling(24, 1.0, top_k=1)).responses
    assert [response.tokens for response in only] == greedy
    assert all(response.logprobs.abs().max() == 0 for response in only)  # nothing else was left


def test_the_models_own_generation_config_is_ignored(stories260k):
    player = load(stories260k)

    def sampled() -> list[tuple[int, ...]]:
        torch.manual_seed(0)
        return [response.tokens for response in player.sample(Sampling(24)).responses]

    plain = sampled()
    own = player.model.generation_config
    own.top_k, own.top_p, own.repetition_penalty, own.temperature, own.do_sample = 1, 0.1, 5.0, 0.1, True
    own.max_new_tokens, own.min_new_tokens, own.suppress_tokens, own.num_beams = 3, 2, [10, 11, 12], 4
    assert sampled() == plain
    assert player.model.generation_config is own


# --- how responses end


def test_the_ending_token_is_kept_and_told_apart_from_the_body(player):
    torch.manual_seed(2)
    ends = common_ends(player)
    found = player.sample(Sampling(12), player.prompts * 4, ends=ends).responses
    assert {response.finished for response in found} == {True, False}
    for response in found:
        assert not ends & set(response.body)
        if response.finished:
            assert response.tokens == (*response.body, response.tokens[-1])
            assert response.tokens[-1] in ends
        else:
            assert response.tokens == response.body
            assert len(response.tokens) == 12


def test_an_end_on_the_last_token_is_an_end(player):
    longer = player.sample(Sampling(6, 0.0), [player.prompts[1]], ends=()).responses[0]
    assert not longer.finished
    assert len(set(longer.tokens)) == 6
    cut = player.sample(Sampling(6, 0.0), [player.prompts[1]], ends={longer.tokens[-1]}).responses[0]
    assert cut.finished
    assert cut.tokens == longer.tokens
    first = player.sample(Sampling(6, 0.0), [player.prompts[1]], ends={longer.tokens[0]}).responses[0]
    assert first.tokens == longer.tokens[:1]
    assert first.finished
    assert first.body == ()


def test_any_of_several_ids_ends(player):
    plain = player.sample(Sampling(30, 0.0), ends=()).responses
    ends = {plain[0].tokens[7], plain[1].tokens[3]}
    for long, short in zip(plain, player.sample(Sampling(30, 0.0), ends=ends).responses, strict=True):
        length = next((place for place, token in enumerate(long.tokens, 1) if token in ends), 30)
        assert short.tokens == long.tokens[:length]
        assert short.finished == (long.tokens[length - 1] in ends)


def test_padding_may_have_any_id(player):
    """Also that of an end, of a word, or of what stands inside the prompts: masks decide."""
    eos, word = player.tokenizer.eos_token_id, player.prompts[1][3]
    plain = player.sample(Sampling(30, 0.0)).responses
    for pad in (eos, word, player.tokenizer.bos_token_id):
        found = player.sample(Sampling(30, 0.0), pad=pad).responses
        assert [response.tokens for response in found] == [response.tokens for response in plain]
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_ends_inside_a_prompt_are_only_text(stories260):
    """Here BOS is EOS, and each prompt opens with it; one has it, and the pad, in its middle as well."""
    eos, pad = stories260.tokenizer.eos_token_id, stories260.tokenizer.pad_token_id
    assert stories260.prompts[0][0] == eos
    assert stories260.ends == {eos}
    middle = (*stories260.prompts[3][:9], eos, pad, *stories260.prompts[3][1:6])
    prompts = [stories260.prompts[0], middle, stories260.prompts[1]]
    for used in (pad, eos):
        found = stories260.sample(Sampling(30, 0.0), prompts, pad=used).responses
        for prompt, response in zip(prompts, found, strict=True):
            assert response.tokens == greedy_by_transformers(stories260, prompt, 30)
            torch.testing.assert_close(
                response.logprobs, own_logprobs(stories260, prompt, response, 1.0), atol=1e-4, rtol=0
            )


def test_responses_come_in_the_order_of_their_prompts(player):
    alone = [player.sample(Sampling(10, 0.0), [prompt]).responses[0].tokens for prompt in player.prompts]
    assert len(set(alone)) == len(alone)
    for batch_size in (1, 2, 4, 6, 100):
        found = player.sample(Sampling(10, 0.0), batch_size=batch_size)
        assert [response.tokens for response in found.responses] == alone
    backwards = player.sample(Sampling(10, 0.0), player.prompts[::-1], batch_size=4)
    assert [response.tokens for response in backwards.responses] == alone[::-1]


def test_the_longest_prompts_come_first(player):
    """So a run whose longest batch does not fit into memory says so at once; and little is padded."""
    with spied(player.model) as shapes:
        player.sample(Sampling(2), batch_size=2)
    lengths = sorted(map(len, player.prompts), reverse=True)
    assert [columns for _, columns in shapes if columns > 1] == lengths[::2]


# --- work


def test_finished_rows_leave_and_a_batch_ends_with_its_last_row(player, monkeypatch):
    ends = common_ends(player)

    def passes() -> tuple[list[int], list[Response]]:
        torch.manual_seed(0)
        with spied(player.model) as shapes:
            found = player.sample(Sampling(80, 0.0), player.prompts * 2, ends=ends, batch_size=12).responses
        return [rows for rows, _ in shapes], list(found)

    rows, found = passes()
    longest = max(len(response.tokens) for response in found)
    assert longest < 80
    assert len(rows) == longest  # no pass after the last token
    needed = sum(len(response.tokens) for response in found)
    assert needed <= sum(rows) < 1.25 * needed
    monkeypatch.setattr(rollout, "LEAVING_SHARE", 2.0)  # nobody leaves
    all_rows, same = passes()
    assert all_rows == [12] * longest
    assert [response.tokens for response in same] == [response.tokens for response in found]
    assert sum(rows) < 0.7 * sum(all_rows)


def test_only_the_last_row_of_a_prompt_gets_logits(player):
    widths = []
    head = player.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    player.sample(Sampling(4))
    handle.remove()
    assert set(widths) == {1}


def test_no_prompts_are_no_responses(player):
    empty = player.sample(Sampling(4), [])
    assert empty.responses == ()
    assert empty.tokens_per_second == 0


def test_an_empty_prompt_is_named(player):
    with pytest.raises(OnecardError, match="prompt 1 has no tokens"):
        player.sample(Sampling(4), [(5, 6), ()])


def test_tokens_per_second_count_response_tokens(player):
    found = player.sample(Sampling(7), ends=())
    assert found.seconds > 0
    assert found.tokens_per_second == pytest.approx(7 * len(player.prompts) / found.seconds)


def test_the_bar_moves_with_each_response(player):
    class Counting:
        rows: list[dict[str, float]]

        def advance(self, row: dict[str, float]) -> None:
            self.rows.append(row)

    bar = Counting()
    bar.rows = []
    found = player.sample(Sampling(7), ends=(), batch_size=4, bar=bar)
    assert len(bar.rows) == len(player.prompts)
    last = bar.rows[-1]["time/tokens_per_second"]
    assert last == pytest.approx(found.tokens_per_second, rel=0.2)


# --- the model is left as it was


def trained(folder: Path, **settings: Any) -> Player:
    from onecard.config import SFTConfig

    config = SFTConfig(model=str(folder), dtype="float32", **settings)
    roles = load_roles(config, trained="policy", reference=True)
    tokenizer = load_tokenizer(config)
    prompts = tuple(tuple(tokenizer.encode(text)) for text in TEXTS)
    return Player(roles, tokenizer, prompts, end_tokens(roles, tokenizer))


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_policy_in_training_is_sampled_in_evaluation_mode_and_trains_on(tinystories, load_in_4bit):
    """With checkpointed layers in training mode there would be no cache; a 4-bit base must pass gradients after it."""
    player = trained(tinystories, gradient_checkpointing=True, load_in_4bit=load_in_4bit, lora_r=4)
    roles = player.roles.train()
    lora = [weight for name, weight in roles.trained_parameters().items() if "lora_B" in name]
    torch.manual_seed(0)
    for weight in lora:
        torch.nn.init.normal_(weight, std=0.05)
    odd = next(module for module in roles.modules() if isinstance(module, torch.nn.Embedding))
    odd.eval()
    before = [module.training for module in roles.modules()]
    with spied(player.model) as shapes:
        found = player.sample(Sampling(12), ends=common_ends(player)).responses
    assert [module.training for module in roles.modules()] == before
    assert not odd.training
    assert all(columns == 1 for _, columns in shapes[1:])  # the cache was there
    for prompt, response in zip(player.prompts, found, strict=True):
        assert not response.logprobs.requires_grad
        torch.testing.assert_close(
            response.logprobs, own_logprobs(player, prompt, response, 1.0), atol=1e-4, rtol=0
        )  # the adapter's, too
    mask = (False,) * len(player.prompts[0]) + (True,) * len(found[0].tokens)
    sequence = pack([TokenSequence((*player.prompts[0], *found[0].tokens), mask)])
    roles.logprobs(sequence, response_targets(sequence)).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in lora)


def test_the_current_role_is_sampled(tinystories):
    player = trained(tinystories, lora_r=4)
    torch.manual_seed(0)
    for name, weight in player.roles.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    policy = player.sample(Sampling(16, 0.0)).responses
    with player.roles.playing("reference"):
        reference = player.sample(Sampling(16, 0.0)).responses
    base = load(tinystories, dtype="float32").sample(Sampling(16, 0.0)).responses
    assert [response.tokens for response in reference] == [response.tokens for response in base]
    assert [response.tokens for response in policy] != [response.tokens for response in reference]


def test_training_mode_returns_after_an_error_too(player):
    player.roles.train()
    try:
        with pytest.raises(IndexError):
            player.sample(Sampling(4), [(999_999_999,)])
        assert player.model.training
    finally:
        player.roles.eval()


# --- draw


def test_logits_that_are_not_finite_are_one_line():
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        for sampling in (Sampling(1), Sampling(1, 0.0), Sampling(1, top_k=2), Sampling(1, top_p=0.5)):
            with pytest.raises(OnecardError, match="logits are not finite"):
                draw(logits, sampling, warpers(sampling))


def test_a_token_of_no_probability_is_never_drawn():
    torch.manual_seed(0)
    logits = torch.full((500, 40), -float("inf"))
    logits[:, 7], logits[:, 30] = 0.0, 1.0
    tokens, logprobs = draw(logits, Sampling(1, 2.0), [])
    assert set(tokens.tolist()) == {7, 30}
    expected = torch.tensor([0.0, 0.5]).log_softmax(0)
    torch.testing.assert_close(logprobs, expected[(tokens == 30).long()])


# --- other models


def sliding() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6))


def convolving() -> Any:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"]))


def linear() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    layers = ["linear_attention", "full_attention", "linear_attention"]
    shape = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(**SMALL, **shape, **experts, head_dim=16, linear_value_head_dim=8, layer_types=layers)
    )


def alibi() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3))


def absolute() -> Any:
    """Rotary positions hide a shift of a whole row; learned ones do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3))


SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("make", [sliding, convolving, linear, alibi, absolute])
def test_every_kind_of_model_is_sampled_rightly(make):
    """Windows that slide, convolutions, recurrent states; attention that takes no positions, and learned ones."""
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    roles = Roles(model, ("policy",), {"policy": None}, "packed").eval()
    prompts = [torch.randint(1, 60, (length,)).tolist() for length in (3, 9, 5, 12, 4, 7)]
    with spied(model) as shapes:
        found = sample_responses(roles, prompts, Sampling(24), ends=range(5), pad=0, batch_size=6).responses
    assert len({rows for rows, _ in shapes}) > 2
    for prompt, response in zip(prompts, found, strict=True):
        tokens = torch.tensor([[*prompt, *response.tokens]])
        own = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = own.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(response.logprobs, own, atol=1e-4, rtol=0)


# --- what ends a response


def test_end_tokens_are_the_tokenizers_the_generation_configs_and_the_stops(tinystories):
    player = load(tinystories)
    eos, vocabulary = player.tokenizer.eos_token_id, player.tokenizer.get_vocab()
    assert end_tokens(player.roles, player.tokenizer) == {eos}
    player.model.generation_config.eos_token_id = [5, 7]
    assert end_tokens(player.roles, player.tokenizer) == {eos, 5, 7}
    player.model.generation_config.eos_token_id = 9
    assert end_tokens(player.roles, player.tokenizer, [".", "\n"]) == {eos, 9, vocabulary["."], vocabulary["\n"]}
    player.model.generation_config.eos_token_id = None
    assert end_tokens(player.roles, player.tokenizer) == {eos}


def test_a_stop_text_ends_responses(stories260):
    ends = end_tokens(stories260.roles, stories260.tokenizer, ["."])
    found = stories260.sample(Sampling(30, 0.0), ends=ends).responses
    assert any(response.finished for response in found)
    for response in found:
        text = stories260.tokenizer.decode(response.tokens)
        assert text.count(".") == response.finished
        assert text.endswith(".") == response.finished


def test_a_stop_text_is_taken_as_a_word_and_as_a_piece(stories260):
    vocabulary = stories260.tokenizer.get_vocab()
    assert end_tokens(stories260.roles, stories260.tokenizer, ["Once"]) == {*stories260.ends, vocabulary["▁Once"]}
    both = end_tokens(stories260.roles, stories260.tokenizer, ["to"])
    assert both == {*stories260.ends, vocabulary["▁to"], *({vocabulary["to"]} if "to" in vocabulary else ())}


def test_a_stop_text_that_is_not_one_token_is_one_clear_line(player, stories260):
    with pytest.raises(OnecardError, match=r"stop_token: 'zzqq' is 4 tokens \(▁ zz q q\), expected text that is one t"):
        end_tokens(player.roles, player.tokenizer, ["zzqq"])
    with pytest.raises(OnecardError, match="stop_token: '' is 0 tokens"):
        end_tokens(stories260.roles, stories260.tokenizer, [""])
    with pytest.raises(OnecardError, match="stop_token: '€' is not in the tokenizer's vocabulary"):
        end_tokens(player.roles, player.tokenizer, ["€"])  # this tokenizer drops it, and a space is left
