"""The loop: each pass gives every row its next token; a row that ends makes room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.data import Prompt
from onecard.data.batches import Episode, TokenSequence, like_lengths
from onecard.models.attention import chooses_keys
from onecard.models.cache import cache_bytes
from onecard.models.micro_batching import MicroBatchSize, RetryMessages, TokenBudget, run_with_retry
from onecard.models.roles import Roles
from onecard.models.trunk import evaluating, rotation_limit, trunk_of
from onecard.rollout.decode_batch import DecodeBatch, PaddedBatch, UncachedBatch, cache_argument
from onecard.rollout.stop_tokens import StopStrings, end_tokens, text_before_end
from onecard.rollout.token_sampling import NOT_FINITE, Sampling, logits_warpers, sample_token, uniforms_of
from onecard.utils.errors import OnecardError
from onecard.utils.progress import Bar, progress
from onecard.utils.rng import rng_restored_on_error

# Finished rows leave when they are this share of those held and nobody waits. To leave costs one copy of the cache of
# the rows that stay, and saves this share of all steps to come, so it pays in a few. Measured on two small models, 1/16
# to 1/4 are alike; at every single end, or from a half on, it is slower.
LEAVING_SHARE = 1 / 8


@dataclass(frozen=True)
class Response:
    """What was drawn behind one prompt: k tokens, and `logprobs` fp32 [k] (CPU), of each in what it was drawn from.

    That is `log_softmax(logits / temperature)` in fp32, after top-k and top-p where they are asked for, and with
    undivided logits at temperature 0. `finished`: the last token is one that ends a response, and it is among `tokens`;
    else the response was cut at `max_new_tokens`. `stop`: the stop string that the last token completed, if it did.
    """

    tokens: tuple[int, ...]
    logprobs: Tensor
    finished: bool
    stop: str = ""

    @property
    def body(self) -> tuple[int, ...]:
        """The tokens without the one that ended it."""
        return self.tokens[:-1] if self.finished else self.tokens


@dataclass(frozen=True)
class Rollout:
    """Responses in the order of their prompts, and the seconds they took."""

    responses: tuple[Response, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Response tokens, ending ones included; prompt tokens do not count."""
        return sum(len(response.tokens) for response in self.responses) / self.seconds


SAMPLING = RetryMessages(
    smaller="prompts that are sampled together hold a cache of at most {size} from here on; all are drawn again.",
    single="the cache of one prompt and its answer, {size}, is too much beside the rest. Lower the length of answers "
    "(response_length, or max_new_tokens), or add --load_in_4bit; `onecard fit` says beforehand what fits.",
    shown=lambda size: f"{size / 2**20:,.1f} MiB",
)


def sampling_budget(batch_size: int, cache_bytes: int = 0) -> TokenBudget:
    """At most so many prompts sampled together, with a cache of at most so many bytes (0: of any)."""
    return TokenBudget(MicroBatchSize(batch_size, cache_bytes, sort_by_length=True, max_items=batch_size), SAMPLING)


def decoding_modes(model: Any) -> list[str]:
    """How rows can be sampled together, as far as a model's structure says, the fastest first."""
    from onecard.rollout.cache_slots import takes_slots  # it comes with transformers

    slots = ["slots"] if takes_slots(model) else []
    cached = cache_argument(model) is not None and not chooses_keys(trunk_of(model).config)
    return slots + (["padded", "single"] if cached else []) + ["uncached"]


def make_decode_batch(roles: Roles, rows: int, columns: int) -> DecodeBatch:
    """Rows for the current role, of at most `columns` tokens that a next one looks at.

    slots: a row that ends takes the next prompt; padded: batches; single: batches of one; uncached: rows run whole, for
    models without a cache, and where rotations change with the length of a text.
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
    """What has been drawn of each prompt: tokens on the host, log-probabilities [prompts, most] on the device."""

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
        self.stopped = [""] * len(prompts)
        self.logprobs = torch.zeros(len(prompts), sampling.max_new_tokens, device=device)
        self.most, self.stop_tokens, self.stop_strings = sampling.max_new_tokens, stop_tokens, stop_strings

    def add(self, place: int, token: int) -> bool:
        """One more token; whether it is the response's last."""
        self.tokens[place].append(token)
        if self.stop_strings is not None:
            self.stopped[place] = self.stop_strings.found(self.prompts[place], self.tokens[place])
        return token in self.stop_tokens or bool(self.stopped[place]) or len(self.tokens[place]) == self.most

    def response(self, place: int) -> Response:
        tokens, stop = tuple(self.tokens[place]), self.stopped[place]
        logprobs = self.logprobs[place, : len(tokens)].to("cpu", copy=True)
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
    """Yield (index of the prompt, its response) as responses end; prompts are admitted in their order.

    `uniforms` [prompts, max_new_tokens] choose the tokens, if given (see `sample_token`). `on_token` is called with
    each token.
    """
    filters = logits_warpers(sampling)
    drawn = SampledTokens(prompts, sampling, stop_tokens, stop_strings, batch.device)
    waiting = deque(range(len(prompts)))

    def sample_next(logits: Tensor, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Response]]:
        """One token for each of these rows (None: all)."""
        index = slice(None) if rows is None else torch.tensor(rows, device=batch.device)
        places, ages = batch.places[index], batch.ages[index].clamp(max=sampling.max_new_tokens - 1)
        chosen_by = None if uniforms is None else uniforms[places, ages]
        # rows that have ended go on too, until they leave: what they draw is written behind a response that was taken
        tokens, drawn.logprobs[places, ages] = sample_token(logits, sampling, filters, chosen_by)
        batch.extend(tokens.clamp(min=0), rows)
        for row, token in zip(range(len(batch.owners)) if rows is None else rows, tokens.tolist(), strict=True):
            place = batch.owners[row]
            if place is None:
                continue
            if token == NOT_FINITE:
                raise OnecardError(
                    "model: its logits are not finite, so nothing can be sampled: it has diverged, or its dtype "
                    "overflows."
                )
            if on_token is not None:
                on_token(token)
            if drawn.add(place, token):
                batch.owners[row] = None
                yield place, drawn.response(place)

    while True:
        while waiting and (rows := batch.room(len(waiting))):
            places = [waiting.popleft() for _ in rows]
            yield from sample_next(batch.admit([prompts[place] for place in places], places, rows), rows)
        staying = [row for row, place in enumerate(batch.owners) if place is not None]
        if not staying:
            return
        leaving = len(batch.owners) - len(staying)
        enough = max(LEAVING_SHARE, batch.least_leaving) * len(batch.owners)
        if leaving >= max(1, enough) and not (waiting and batch.refills):
            batch.keep(staying)
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
    """One response of the current role to each prompt, in the prompts' order. `bar` moves with each response. An id of
    `stop_tokens` ends a response, and so does a text of `stop_strings`.

    Draws come from torch's global generator; with `seed`, each prompt has draws of its own, made of the seed and its
    place. `on_token` is told each token as it is drawn. Whether prompt and response fit into the model's context is for
    callers to check. Where memory runs out, all prompts are drawn again from the first on, fewer at a time; what had
    ended is not kept, for the answers that end early are the short ones.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise OnecardError(f"prompt {index} has no tokens, so there is nothing to go on from.")
    model = roles.causal_model()
    began = time.perf_counter()
    lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
    # the longest first: a batch is of like lengths, and what comes in later has room where another has been
    order = [place for alone in like_lengths(lengths, 1) for place in alone]
    counts: dict[int, int] = {}  # tokens of each response that the bar has been told of

    def read(rows: int) -> dict[int, Response]:
        uniforms = None
        if seed is not None:
            uniforms = torch.stack([uniforms_of(seed, place, sampling.max_new_tokens) for place in order])
            uniforms = uniforms.to(roles.device)
        batch = make_decode_batch(roles, rows, max(lengths) - 1)  # the last token has no keys
        found: dict[int, Response] = {}
        ordered = [prompts[place] for place in order]
        with rng_restored_on_error(roles.device):
            sampled = sample_rows(
                batch, ordered, sampling, stop_tokens, stop_strings=stop_strings, uniforms=uniforms, on_token=on_token
            )
            for index, response in sampled:
                place = order[index]
                found[place] = response
                told = place in counts
                counts[place] = len(response.tokens)
                if bar is not None and not told:
                    bar.advance({"time/tokens_per_second": sum(counts.values()) / (time.perf_counter() - began)})
        return found

    budget = batch_size if isinstance(batch_size, TokenBudget) else sampling_budget(batch_size)
    sizes = [max(1, cache_bytes(model, length)) for length in lengths]  # a model may keep no keys
    with evaluating(model):
        found = run_with_retry(sizes, budget, read) if prompts else {}
    return Rollout(tuple(found[place] for place in range(len(prompts))), time.perf_counter() - began)


def make_episode(prompt: Prompt, place: int, response: Response) -> Episode:
    """Prompt and response as one sequence; the mask, not any token id, says which is which."""
    mask = (False,) * len(prompt.tokens) + (True,) * len(response.tokens)
    sequence = TokenSequence(prompt.tokens + response.tokens, mask)
    return Episode(sequence, response.logprobs, response.finished, place, response.stop)


def generate(
    roles: Roles, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, *, batch_size: int
) -> list[str]:
    """One response text to each prompt, in the prompts' order: prompt and response together read as the tokens do."""
    with progress("generate", len(prompts)) as bar:
        rollout = sample_responses(
            roles,
            [prompt.tokens for prompt in prompts],
            sampling,
            stop_tokens=end_tokens(roles, tokenizer),
            batch_size=batch_size,
            bar=bar,
        )
    return [
        text_before_end(tokenizer, prompt.tokens, response.tokens, finished=response.finished)
        for prompt, response in zip(prompts, rollout.responses, strict=True)
    ]
