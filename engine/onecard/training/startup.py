"""Startup checks: compare the model in the run's layout, dtype and mode with the plain model.

The plain model runs one text per forward pass, in evaluation mode, with transformers' attention.

| what is compared | if they differ |
|---|---|
| log-probs from hidden states, with those from the model's logits | the model is refused |
| log-probs in a layout, with the plain model's | the next layout is tried; the last one is the plain model |
| the gradient of one text with respect to another text's embeddings, with 0 | the next layout is tried |
| the gradient of a text's start with respect to the embeddings of its end, with 0 | the model is refused: not causal |
| log-probs of two passes in training mode, with those in evaluation mode | the model is trained in evaluation mode |
| the gradient of each adapter, with none | the adapter is refused: it would never learn |
| log-probs of sampled tokens, with the plain model's | the next decoding mode is tried; the last one has no KV cache |

One text is as long as the run's longest: sliding windows, top-k attention and long-context RoPE affect long texts only.
In 16 bit the tolerance is derived from the plain model's rounding error, which is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from onecard.data.batches import TokenBatch, TokenSequence, pack, to_device
from onecard.models.attention import (
    has_causal_attention,
    has_onecard_attention,
    has_sparse_attention,
    takes_segments,
    transformers_attention,
)
from onecard.models.head import check_head
from onecard.models.layout import LAYOUTS
from onecard.models.load import reason
from onecard.models.micro_batching import unless_out_of_memory
from onecard.models.roles import Roles
from onecard.models.trunk import context_of, errors_of, evaluating, trunk_of
from onecard.models.vocabulary import known_tokens
from onecard.rollout import Sampling, decoding_modes, sample_responses
from onecard.training.plain_model import (
    MIN_LENGTH,
    SHARED_LENGTH,
    SHORT_LENGTH,
    PlainLogprobs,
    is_16_bit,
    logprobs,
    made_up_tokens,
    plain_logprobs,
    probe_sequences,
    scored_sequence,
    trimmed_mean_difference,
)
from onecard.utils.errors import OnecardError, is_out_of_memory
from onecard.utils.progress import say
from onecard.utils.rng import seeded_rng

NEW_TOKENS = 8  # sampled after each prompt
DECODING_DESCRIPTIONS = {
    "slots": "in rows that take one prompt after another",
    "padded": "in padded batches",
    "single": "one prompt at a time",
    "uncached": "one prompt at a time and without a cache, which is slow for long texts",
}
NOISE_LIMIT, NOISE_LIMIT_16_BIT = 1e-5, 1e-3  # nat: largest mean difference of two passes over one text


def input_gradients(roles: Roles, batch: TokenBatch, layout: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each set of tokens, the gradient of their hidden states with respect to the embeddings of all tokens [n, D].

    Between texts in separate rows, or separated by the attention mask, it is exactly 0 in every dtype. It is nonzero
    where a state carries over from one text to the next (Mamba, linear attention, convolutions).
    """
    trunk = trunk_of(roles.causal_model())
    inputs_in_layout = LAYOUTS[layout](batch)
    leaves: list[Tensor] = []

    def leaf(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # some models scale embeddings in place

    hook = trunk.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            passes = [trunk(**inputs).last_hidden_state.flatten(0, 1) for inputs in inputs_in_layout.passes]
            states = torch.cat(passes)[inputs_in_layout.rows].float()
            sums = [states[list(each)].square().sum() for each in rows]
            gradients = [torch.autograd.grad(each, leaves[0], retain_graph=True)[0] for each in sums]
    finally:
        hook.remove()
    return [each.flatten(0, 1)[inputs_in_layout.rows] for each in gradients]


def mixes_sequences(roles: Roles, layout: str, texts: Sequence[TokenSequence]) -> bool:
    """Whether one of two texts in a batch changes the hidden states of the other."""
    batch = to_device(pack(texts), roles.device)
    first, second = range(batch.lengths[0]), range(batch.lengths[0], batch.num_tokens)
    by_first, by_second = input_gradients(roles, batch, layout, [first, second])
    return bool(by_first[list(second)].any()) or bool(by_second[list(first)].any())


def check_causal(roles: Roles, example: TokenSequence) -> None:
    """Refuse a model in which a hidden state depends on later tokens."""
    model = roles.causal_model()
    batch, half = to_device(pack([example]), roles.device), len(example) // 2
    with evaluating(model), transformers_attention(model):
        [gradient] = input_gradients(roles, batch, "single", [range(half)])
    if gradient[half:].any():
        raise OnecardError(
            f"model: {type(model).__name__} is not causal: a token's hidden state depends on the tokens that follow; "
            "expected a causal language model (in some families, is_decoder must be set in its config)."
        )


def layout_candidates(roles: Roles) -> Iterator[tuple[bool, str]]:
    """Yield `(with onecard's attention, layout)`, the fastest first, the plain model last."""
    model, requested = roles.causal_model(), roles.layout
    own_attention = has_onecard_attention(model)
    if has_sparse_attention(trunk_of(model).config):
        yield False, "single"
        return
    if requested == "packed" and own_attention and takes_segments(model):
        yield True, "packed"
    if requested != "padded" and has_causal_attention(trunk_of(model).config):
        yield False, "restarted"
    if requested == "padded" and own_attention:
        yield True, "padded"
    yield False, "padded"
    yield False, "single"


@dataclass(frozen=True)
class ProbeSet:
    """Texts of one batch, and their log-probs under the plain model."""

    texts: list[TokenSequence]
    expected: PlainLogprobs


def layout_fault(roles: Roles, layout: str, probe_sets: Sequence[ProbeSet], row: int) -> str:
    """The reason why a layout cannot be used, for a message; empty if its log-probs are the plain model's.

    `row`: tokens of the run's longest packed row. In the layout "restarted" the batch is filled up to that length.
    """
    name, first = f"{layout} batches", probe_sets[0].texts
    try:
        if mixes_sequences(roles, layout, [first[0], first[2]]):
            return f"in {name}, texts influence each other"
        missing = max(0, row - sum(map(len, first))) if layout == "restarted" else 0
        filler = [first[0]] * math.ceil(missing / len(first[0]))
        passes: list[tuple[ProbeSet, Mapping[int, tuple[int, int]]]] = [(probe_set, {}) for probe_set in probe_sets]
        if layout == "packed":
            passes.append((probe_sets[0], {2: (0, len(first[2]) - sum(first[2].response_mask))}))
        with evaluating(roles.causal_model()):
            for probe_set, continued in passes:
                batch = to_device(pack([*probe_set.texts, *filler], continued), roles.device)
                fault = probe_set.expected.fault(logprobs(roles, batch, layout)[: len(probe_set.texts)])
                if fault:
                    return f"log-probs of {name} are {fault}"
    except Exception as error:  # as in `errors_of`
        if is_out_of_memory(error):
            raise
        return f"{name} cannot be run ({reason(error)})"
    return ""


def choose_layout(roles: Roles, longest: int, row: int) -> None:
    """Choose the fastest layout whose log-probs equal the plain model's. Prints a line if a faster one was rejected.

    `row`: tokens of the longest packed row of the run; 0: no limit.
    """
    texts = probe_sequences(roles, longest, row)
    check_causal(roles, texts[0])
    batches = [texts]
    if len(texts[1]) < longest:  # a row has no room for the longest text beside the others
        batches.append([scored_sequence(made_up_tokens(known_tokens(roles.causal_model()), longest, 1))])
    probe_sets = [ProbeSet(each, plain_logprobs(roles, each)) for each in batches]
    faults: list[str] = []
    for own_attention, layout in layout_candidates(roles):
        if not own_attention:
            roles.use_transformers_attention()
        fault = "" if layout == "single" else layout_fault(roles, layout, probe_sets, row)
        if not fault:
            roles.layout = layout
            break
        faults.append(fault)
    if faults:
        say(f"model: {type(roles.causal_model()).__name__}: {faults[-1]}, so the layout is {roles.layout}.")


def check_training_mode(roles: Roles, longest: int, row: int) -> None:
    """Train in evaluation mode if training mode adds noise (router jitter, skipped layers).

    With noise, old and new log-probs of the same weights would differ.
    """
    batch = to_device(pack(probe_sequences(roles, longest, row)), roles.device)
    with evaluating(roles.causal_model()):
        in_evaluation = PlainLogprobs(logprobs(roles, batch, roles.layout), 0.0 if is_16_bit(roles) else None)
    noise_limit = NOISE_LIMIT_16_BIT if is_16_bit(roles) else NOISE_LIMIT

    def training_mode_fault() -> str:
        before = roles.training
        roles.train()
        with seeded_rng(roles.device, "startup check"):
            first, second = (logprobs(roles, batch, roles.layout) for _ in range(2))
        roles.train(before)
        noise = max(trimmed_mean_difference(one, other) for one, other in zip(first, second, strict=True))
        if noise > noise_limit:
            return f"off by {noise:.3g} nat from one pass to the next"
        return in_evaluation.fault(first)

    if fault := training_mode_fault():
        roles.trained_in_evaluation_mode = True
        name = type(roles.causal_model()).__name__
        if training_mode_fault():
            raise OnecardError(
                f"model: log-probs of {name} in training mode are {fault}, from noise in its layers that its config "
                "does not name. Leave --gradient_checkpointing out, so that the model is trained in evaluation mode."
            )
        say(f"model: {name}: log-probs in training mode are {fault}, so it is trained in evaluation mode.")


def check_learning(roles: Roles, longest: int) -> None:
    """Refuse adapters that get no gradient, and so would never learn; except on experts, which a router may skip."""
    check_factors(roles)
    batch = to_device(pack(probe_sequences(roles, min(SHORT_LENGTH, longest))[:1]), roles.device)
    try:
        for role in roles.trained:
            with roles.active(role), torch.enable_grad():
                if role in roles.heads:
                    outputs = roles.scalars(batch, batch.targets.rows)
                else:
                    outputs = roles.logprobs(batch, batch.targets)
                outputs.sum().backward()
        trained = roles.trained_parameters() if roles.has_adapters else {}
        without_gradient = {name.partition(".lora_")[0] for name, each in trained.items() if each.grad is None}
    finally:
        roles.zero_grad(set_to_none=True)
    names = sorted(name.rpartition("base_model.model.")[2] for name in without_gradient if "expert" not in name)
    if names:
        listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        raise OnecardError(
            f"lora_target_modules: {len(names)} adapters would never learn: the forward pass does not call their "
            f"layers, or only reads the weights: {listed}; leave them out."
        )


def check_factors(roles: Roles) -> None:
    """Refuse a trained adapter `scale * B A` whose gradients are 0: lora_alpha is 0, or both A and B are."""
    for path, module in roles.model.named_modules():
        factors = [getattr(module, name, {}) for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")]
        for role in roles.trained:
            own = [getattr(each[role], "weight", each[role]) for each in factors if role in each]
            if own and (module.scaling[role] == 0 or not any(bool(each.any()) for each in own)):
                cause = "lora_alpha is 0" if module.scaling[role] == 0 else "both of its factors are 0"
                raise OnecardError(f"model: the adapter on {path} would never learn: {cause}.")


def with_shorter_texts(check: Callable[[int], None], longest: int) -> None:
    """Run a check on texts of `longest` tokens; if memory runs out, on texts half as long."""
    while unless_out_of_memory(partial(check, longest)) is None:
        longest //= 2
        if longest < MIN_LENGTH:
            say("out of memory: the startup check is skipped.")  # the run itself prints advice when it fails
            return
        say(f"out of memory: the startup check continues with texts of at most {longest} tokens.")


@torch.no_grad()
def check_model(roles: Roles, longest: int, row: int = 0, *, trains: bool = True) -> None:
    """Raise for a model whose results would be wrong, and choose the fastest layout whose results are right.

    `longest`: tokens of the run's longest text; `row`: of its longest packed row (0: no limit); `trains`: the run
    trains the model, so training mode and gradients are checked.
    """
    model = roles.causal_model()
    context = context_of(trunk_of(model).config) or longest
    longest = max(2, min(longest, context))

    def check(tokens: int) -> None:
        row_tokens = min(row, context + 1) * tokens // longest  # shortened as much as the texts
        choose_layout(roles, tokens, row_tokens)
        if trains:
            check_training_mode(roles, tokens, row_tokens)
            check_learning(roles, tokens)

    with errors_of(model):
        check_head(model, trunk_of(model), roles.head())
        with_shorter_texts(check, longest)


def sampled_logprobs(
    roles: Roles, prompts: Sequence[tuple[int, ...]], new: int
) -> tuple[list[Tensor], list[TokenSequence]]:
    """Sample `new` tokens after each prompt, two prompts at a time. Returns their log-probs and the whole texts."""
    responses = sample_responses(roles, prompts, Sampling(new), stop_tokens=(), batch_size=2, seed=0).responses
    texts = [scored_sequence(p + response.tokens, len(p)) for p, response in zip(prompts, responses, strict=True)]
    return [response.logprobs for response in responses], texts


def choose_decoding(roles: Roles, longest: int) -> None:
    """Choose the fastest decoding mode whose log-probs equal the plain model's.

    Prints a line if a faster mode was rejected.
    """
    new = min(NEW_TOKENS, longest // 2)
    lengths = (longest - new, min(SHORT_LENGTH, longest - new), min(SHARED_LENGTH, longest - new))
    prompts = [
        made_up_tokens(known_tokens(roles.causal_model()), length, index) for index, length in enumerate(lengths)
    ]
    with errors_of(roles.causal_model()):
        plain_logprobs(roles, [scored_sequence(prompts[-1] + prompts[-1])])
    faults: list[str] = []
    for decoding in decoding_modes(roles.causal_model()):
        roles.decoding = decoding
        if decoding == "uncached":
            break
        try:
            sampled, texts = sampled_logprobs(roles, prompts, new)
            fault = plain_logprobs(roles, texts).fault([each.to(roles.device) for each in sampled])
        except Exception as error:  # as in `errors_of`
            if is_out_of_memory(error):
                raise
            fault = f"not available ({reason(error)})"
        if not fault:
            break
        faults.append(f"log-probs of tokens sampled {DECODING_DESCRIPTIONS[decoding]} are {fault}")
    if faults:
        name = type(roles.causal_model()).__name__
        say(f"model: {name}: {faults[-1]}, so they are sampled {DECODING_DESCRIPTIONS[roles.decoding]}.")


@torch.no_grad()
def check_decoding(roles: Roles, longest: int) -> None:
    """Choose the decoding mode, with one text of `longest` tokens and two short ones.

    `longest`: tokens of the run's longest prompt with its response.
    """
    context = context_of(trunk_of(roles.causal_model()).config) or longest
    with_shorter_texts(partial(choose_decoding, roles), max(2, min(longest, context)))
