"""Decoding loop with continuous batching: a finished response frees its row for the next prompt."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.data import Prompt
from onecard.data.batches import Episode, TokenSequence, longest_first
from onecard.models.attention import has_sparse_attention
from onecard.models.cache import cache_bytes
from onecard.models.micro_batching import MicroBatchSize, RetryMessages, TokenBudget, run_with_retry
from onecard.models.roles import Roles
from onecard.models.trunk import evaluating, rotation_limit, trunk_of
from onecard.rollout.decode_batch import DecodeBatch, PaddedBatch, UncachedBatch, cache_argument
from onecard.rollout.stop_tokens import StopStrings, find_stop_tokens, text_before_end
from onecard.rollout.token_sampling import NOT_FINITE, Sampling, logits_warpers, sample_token, uniforms_of
from onecard.utils.errors import OnecardError
from onecard.utils.progress import Bar, progress
from onecard.utils.rng import rng_restored_on_error

# When no prompt waits, free rows are removed from the decode batch once they are this share of its rows. A removal
# copies the cache of the other rows once, and makes every later step cheaper by this share: it pays off after a few
# steps. On two small models, shares from 1/16 to 1/4 take the same time; removing each row at once, or from 1/2 on, is
# slower.
COMPACTION_SHARE = 1 / 8


@dataclass(frozen=True)
class Response:
    """The response to one prompt: k tokens, and their log-probabilities `logprobs` fp32 [k] (CPU).

    The log-probs are those of the distribution that the tokens were sampled from: `log_softmax(logits /
    temperature)` in fp32, after top-k and top-p if they are set; at temperature 0 the logits are not divided.
    `finished`: the last token ended the response and is part of `tokens`; if false, the response was cut at
    `max_new_tokens`. `stop`: the stop string that the last token completed, or empty.
    """

    tokens: tuple[int, ...]
    logprobs: Tensor
    finished: bool
    stop: str = ""

    @property
    def body(self) -> tuple[int, ...]:
        """The tokens without the one that ended the response."""
        return self.tokens[:-1] if self.finished else self.tokens


@dataclass(frozen=True)
class Rollout:
    """Responses in the order of their prompts, and the wall time in seconds."""

    responses: tuple[Response, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second. End tokens count, prompt tokens do not."""
        return sum(len(response.tokens) for response in self.responses) / self.seconds


SAMPLING_MESSAGES = RetryMessages(
    smaller="the KV cache of a batch of prompts takes at most {size} from here on; all prompts are sampled again.",
    single="the KV cache of one prompt and its answer ({size}) does not fit. Set a smaller response_length or "
    "max_new_tokens, or add --load_in_4bit; `onecard fit` says beforehand what fits.",
    format_size=lambda size: f"{size / 2**20:,.1f} MiB",
)


def sampling_budget(batch_size: int, cache_bytes: int = 0) -> TokenBudget:
    """At most `batch_size` prompts sampled together, with a KV cache of at most `cache_bytes` bytes (0: no limit).

    The sizes of this budget are bytes, not tokens.
    """
    return TokenBudget(
        MicroBatchSize(batch_size, cache_bytes, sort_by_length=True, max_items=batch_size), SAMPLING_MESSAGES
    )


def decoding_modes(model: Any) -> list[str]:
    """The decoding modes that a model's structure allows, the fastest first; see `make_decode_batch`."""
    from onecard.rollout.cache_slots import supports_slots  # imports transformers

    slots = ["slots"] if supports_slots(model) else []
    cached = cache_argument(model) is not None and not has_sparse_attention(trunk_of(model).config)
    return slots + (["padded", "single"] if cached else []) + ["uncached"]


def make_decode_batch(roles: Roles, rows: int, columns: int) -> DecodeBatch:
    """A decode batch for the current role: `rows` rows of at most `columns` cached tokens each.

    | mode | decoding |
    |---|---|
    | `slots` | continuous batching: the row of a finished response takes the next prompt |
    | `padded` | left-padded batches |
    | `single` | padded batches of one row |
    | `uncached` | no cache: for models without one, and for rows so long that rotary frequencies change (LongRoPE) |
    """
    from onecard.rollout.cache_slots import CacheSlots

    model, device = roles.causal_model(), roles.device
    limit = rotation_limit(trunk_of(model).config)
    decoding = "uncached" if limit is not None and columns >= limit else roles.decoding or decoding_modes(model)[0]
    makers: dict[str, Callable[[], DecodeBatch]] = {
        "slots": lambda: CacheSlots(model, rows, columns, device),
        "padded": lambda: PaddedBatch(model, rows, device),
        "single": lambda: PaddedBatch(model, 1, device),
        "uncached": lambda: UncachedBatch(model, rows, device),
    }
    return makers[decoding]()


class SampledTokens:
    """The tokens sampled for each prompt (lists), and `logprobs` fp32 [prompts, max_new_tokens] on the device."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_tokens: Collection[int],
        stop_strings: StopStrings | None,
        device: torch.device,
    ) -> None:
        self.prompts = prompts
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.matched_stops = [""] * len(prompts)
        self.logprobs = torch.zeros(len(prompts), sampling.max_new_tokens, device=device)
        self.max_new_tokens = sampling.max_new_tokens
        self.stop_tokens, self.stop_strings = stop_tokens, stop_strings

    def add(self, index: int, token: int) -> bool:
        """Append a token to the response to prompt `index`. Returns whether the response has ended."""
        tokens = self.tokens[index]
        tokens.append(token)
        if self.stop_strings is not None:
            self.matched_stops[index] = self.stop_strings.match(self.prompts[index], tokens)
        return token in self.stop_tokens or bool(self.matched_stops[index]) or len(tokens) == self.max_new_tokens

    def response(self, index: int) -> Response:
        tokens, stop = tuple(self.tokens[index]), self.matched_stops[index]
        logprobs = self.logprobs[index, : len(tokens)].to("cpu", copy=True)
        return Response(tokens, logprobs, tokens[-1] in self.stop_tokens or bool(stop), stop)


def sample_rows(
    batch: DecodeBatch,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_tokens: Collection[int],
    *,
    stop_strings: StopStrings | None = None,
    uniforms: Tensor | None = None,
    on_token: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, Response]]:
    """Yield (index of the prompt, its response) as responses end. Prompts are prefilled in their order.

    `uniforms` fp32 [prompts, max_new_tokens], if given, choose the tokens (see `sample_token`). `on_token` is called
    with each token. Raises OnecardError if the model's logits are not finite.
    """
    warpers = logits_warpers(sampling)
    sampled = SampledTokens(prompts, sampling, stop_tokens, stop_strings, batch.device)
    waiting = deque(range(len(prompts)))

    def sample_next(logits: Tensor, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Response]]:
        """Sample one token for each of these rows (None: all). Yield the responses that end with it."""
        index = slice(None) if rows is None else torch.tensor(rows, device=batch.device)
        prompt_indices = batch.prompt_indices[index]
        positions = batch.generated[index].clamp(max=sampling.max_new_tokens - 1)
        row_uniforms = None if uniforms is None else uniforms[prompt_indices, positions]
        # Free rows are sampled too. Their log-probs overwrite those of a finished response, which has been copied.
        tokens, sampled.logprobs[prompt_indices, positions] = sample_token(logits, sampling, warpers, row_uniforms)
        batch.append(tokens.clamp(min=0), rows)
        for row, token in zip(range(len(batch.row_prompts)) if rows is None else rows, tokens.tolist(), strict=True):
            prompt_index = batch.row_prompts[row]
            if prompt_index is None:
                continue
            if token == NOT_FINITE:
                raise OnecardError(
                    "model: its logits are not finite, so no token can be sampled: training has diverged, or the "
                    "model's dtype overflows."
                )
            if on_token is not None:
                on_token(token)
            if sampled.add(prompt_index, token):
                batch.row_prompts[row] = None
                yield prompt_index, sampled.response(prompt_index)

    while True:
        while waiting and (rows := batch.free_rows(len(waiting))):
            indices = [waiting.popleft() for _ in rows]
            yield from sample_next(batch.prefill([prompts[index] for index in indices], indices, rows), rows)
        active = [row for row, index in enumerate(batch.row_prompts) if index is not None]
        if not active:
            return
        free = len(batch.row_prompts) - len(active)
        threshold = max(COMPACTION_SHARE, batch.min_free_share) * len(batch.row_prompts)
        if free >= max(1, threshold) and not (waiting and batch.continuous):
            batch.select_rows(active)
        yield from sample_next(batch.logits())


def sample_responses(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_tokens: Collection[int],
    stop_strings: StopStrings | None = None,
    batch_size: int | TokenBudget,
    bar: Bar | None = None,
    seed: int | None = None,
    on_token: Callable[[int], object] | None = None,
) -> Rollout:
    """Sample one response of the current role to each prompt, in the order of the prompts.

    A token of `stop_tokens` or a text of `stop_strings` ends a response. `bar` advances with each response, and
    `on_token` is called with each token. Random numbers come from torch's global generator or, with `seed`, from a
    generator for each prompt, which depends only on the seed and the prompt's index.

    Raises OnecardError for an empty prompt. Callers check that prompt and response fit into the model's context. If
    memory runs out, all prompts are sampled again from the first one, fewer at a time. Responses that had ended are
    discarded too: most of them are short, so keeping them would bias the sample.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise OnecardError(f"prompt {index} has no tokens; expected one or more.")
    model = roles.causal_model()
    started = time.perf_counter()
    lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
    # Longest first: rows of a batch have similar lengths, and a later prompt fits into the row of an earlier one.
    order = longest_first(lengths)
    response_lengths: dict[int, int] = {}  # of the responses for which the progress bar has advanced

    def sample(rows: int) -> dict[int, Response]:
        uniforms = None
        if seed is not None:
            uniforms = torch.stack([uniforms_of(seed, index, sampling.max_new_tokens) for index in order])
            uniforms = uniforms.to(roles.device)
        batch = make_decode_batch(roles, rows, max(lengths) - 1)  # the last token is never fed to the model
        responses: dict[int, Response] = {}
        ordered = [prompts[index] for index in order]
        with rng_restored_on_error(roles.device):
            sampled = sample_rows(
                batch, ordered, sampling, stop_tokens, stop_strings=stop_strings, uniforms=uniforms, on_token=on_token
            )
            for position, response in sampled:
                index = order[position]
                responses[index] = response
                is_new = index not in response_lengths  # else an attempt that ran out of memory had sampled it too
                response_lengths[index] = len(response.tokens)
                if bar is not None and is_new:
                    tokens, seconds = sum(response_lengths.values()), time.perf_counter() - started
                    bar.advance({"time/tokens_per_second": tokens / seconds})
        return responses

    budget = batch_size if isinstance(batch_size, TokenBudget) else sampling_budget(batch_size)
    sizes = [max(1, cache_bytes(model, length)) for length in lengths]  # cache_bytes: 0 without a KV cache
    with evaluating(model):
        responses = run_with_retry(sizes, budget, sample) if prompts else {}
    return Rollout(tuple(responses[index] for index in range(len(prompts))), time.perf_counter() - started)


def make_episode(prompt: Prompt, response: Response) -> Episode:
    """An episode of a prompt and its response, as one sequence. Its `response_mask` marks the response tokens."""
    mask = (False,) * len(prompt.tokens) + (True,) * len(response.tokens)
    sequence = TokenSequence(prompt.tokens + response.tokens, mask)
    return Episode(sequence, response.logprobs, response.finished, response.stop)


def generate(
    roles: Roles, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, *, batch_size: int
) -> list[str]:
    """One response text for each prompt, in the order of the prompts.

    A response's text is what its tokens add to the decoded prompt: prompt and response are decoded together.
    """
    with progress("generate", len(prompts)) as bar:
        rollout = sample_responses(
            roles,
            [prompt.tokens for prompt in prompts],
            sampling,
            stop_tokens=find_stop_tokens(roles, tokenizer),
            batch_size=batch_size,
            bar=bar,
        )
    return [
        text_before_end(tokenizer, prompt.tokens, response.tokens, finished=response.finished)
        for prompt, response in zip(prompts, rollout.responses, strict=True)
    ]
