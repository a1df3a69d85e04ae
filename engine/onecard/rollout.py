"""Prompts -> responses, sampled from the model itself: each token with the log-probability it was drawn with.

    prompts  longest first -> batches, padded on the left -> one pass for each token -> rows that ended leave

The model's own `generation_config` (top-k, top-p, repetition penalty) is not used, but for the ids that end a response:
what is sampled is the policy, at the temperature that was asked for. Masks, never ids, say what is padding: a pad token
may be the EOS, the EOS may be the BOS, and all of them may stand inside a prompt.

Left out: rows that leave are not replaced from the next batch, columns that are padding for all rows that stay are
kept, and there is no beam search.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.batches import Episode, TokenSequence
from onecard.cut import Cut
from onecard.data import Prompt
from onecard.draws import drawn_again_after_errors, seed_of
from onecard.errors import OnecardError
from onecard.metrics import Bar, progress
from onecard.models.cache import cache_bytes
from onecard.models.roles import Roles
from onecard.passes import Budget, Wording, each_item

# Finished rows leave when they are this share of those held. To leave costs one copy of the cache of the rows that
# stay, as much as every step spends on growing it, and saves this share of all steps to come, so it pays in a few.
# Measured on two small models, 1/16 to 1/4 are alike; at every single end, or from a half on, it is slower.
LEAVING_SHARE = 1 / 8


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 takes the likeliest one; `top_k` 0 and `top_p` 1 leave all of them in."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Response:
    """What was drawn behind one prompt: k tokens, and `logprobs` fp32 [k] (CPU), of each in what it was drawn from.

    That is `log_softmax(logits / temperature)` in fp32, after top-k and top-p where they are asked for, and with
    undivided logits at temperature 0. `finished`: the last token is one that ends a response, and it is among `tokens`;
    else the response was cut at `max_new_tokens`.
    """

    tokens: tuple[int, ...]
    logprobs: Tensor
    finished: bool

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


def end_tokens(roles: Roles, tokenizer: Any, stop: Sequence[str] = ()) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's EOS, those of the model's generation config (chat models), and
    those of the `stop` texts.
    """
    own = getattr(getattr(roles.causal_model(), "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
    return frozenset(ends.union(*(stop_ids(text, tokenizer) for text in stop)))


def stop_ids(text: str, tokenizer: Any) -> set[int]:
    """The ids of a text that is one token: as a word of its own, and as the vocabulary writes it.

    With SentencePiece these are two (`▁.` and `.`), and the second is the one that follows a word.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = {tokenizer.get_vocab()[text]} if text in tokenizer.get_vocab() else set()
    # Unknown characters become the unknown token, or nothing at all: then one id is left that is not the text.
    if len(ids) == 1 and tokenizer.decode(ids).strip() == text.strip():
        found.add(ids[0])
    if not found and len(ids) == 1:
        raise OnecardError(f"stop_token: {text!r} is not in the tokenizer's vocabulary.")
    if not found:
        pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise OnecardError(f"stop_token: {text!r} is {len(ids)} tokens ({pieces}), expected text that is one token.")
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module as it was. In training mode, checkpointed layers silently keep no cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Held:
    """The rows of a batch that the model still runs on. `rows[i]` says which prompt of the batch place i belongs to.

    Two prompts `7 8 9` and `5`, after each has drawn one token:

        mask       1 1 1 1      tokens  4      positions  3
                   0 0 1 1              6                 1
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> None:
        from transformers import DynamicCache

        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        self.model = model
        self.rows = torch.arange(len(prompts), device=device)
        self.tokens = torch.tensor(
            [[pad] * more + list(prompt) for more, prompt in zip(padding, prompts, strict=True)], device=device
        )
        self.mask = torch.tensor([[0] * more + [1] * (width - more) for more in padding], device=device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=model.config)
        known = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known  # not so where attention itself knows distances (ALiBi)

    def logits(self) -> Tensor:
        """One pass over the newest tokens: fp32 [rows, V], of the token to come."""
        positions = {"position_ids": self.positions} if self.takes_positions else {}
        output = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **positions,
            **self.last_only,
        )
        return output.logits[:, -1].float()

    def extend(self, tokens: Tensor) -> None:
        """Each row goes on with one token."""
        self.tokens = tokens.unsqueeze(1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, places: Sequence[int]) -> None:
        """Only these rows stay."""
        index = torch.tensor(places, device=self.mask.device)
        self.rows, self.tokens = self.rows[index], self.tokens[index]
        self.mask, self.positions = self.mask[index], self.positions[index]
        self.cache.reorder_cache(index)  # unlike `batch_select_indices`, every kind of layer has it


SAMPLING = Wording(
    smaller="prompts that are sampled together hold a cache of at most {size} from here on; the batch is drawn again.",
    single="the cache of one prompt and its answer, {size}, is too much beside the rest. Lower the length of answers "
    "(response_length, or max_new_tokens), or add --load_in_4bit; `onecard fit` says beforehand what fits.",
    shown=lambda size: f"{size / 2**20:,.1f} MiB",
)


def sampling_budget(batch_size: int, cache_bytes: int = 0) -> Budget:
    """At most so many prompts sampled together, of like lengths, with a cache of at most so many bytes (0: of any)."""
    return Budget(Cut(batch_size, cache_bytes, like=True, most=batch_size), SAMPLING)


def warpers(sampling: Sampling) -> list[Any]:
    """transformers' top-k and top-p, in its order."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    top_k = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
    top_p = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return [*top_k, *top_p]


def draw(
    logits: Tensor, sampling: Sampling, filters: Sequence[Any], chances: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token for each row of logits [b, V], and its log-probability: int64 [b], fp32 [b].

    With `chances` [b], numbers from 0 to below 1, the token is the first up to which the probabilities add up to more
    than the row's number; else torch's global generator draws it.
    """
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    for only_top in filters:
        logits = only_top(None, logits)
    logprobs = logits.log_softmax(-1)
    if logprobs[:, 0].isnan().any():  # one bad logit makes its whole row nan, and a GPU would stop without a word
        raise OnecardError(
            "model: its logits are not finite, so nothing can be sampled: it has diverged, or its dtype overflows."
        )
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif chances is None:
        tokens = torch.multinomial(logprobs.exp(), 1)
    else:  # in float64, in which a float32 chance times the sum stays below the sum
        sums = logprobs.double().exp().cumsum(-1)
        tokens = torch.searchsorted(sums, chances.double().unsqueeze(1) * sums[:, -1:], right=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def chances_of(seed: int, prompt: int, length: int) -> Tensor:
    """The numbers that choose the tokens of one prompt's response, fp32 [length], whatever else is sampled with it."""
    generator = torch.Generator().manual_seed(seed_of(seed, prompt))
    return torch.rand(length, generator=generator)


def sample_batch(
    held: Held,
    sampling: Sampling,
    ends: Collection[int],
    *,
    chances: Tensor | None = None,
    hear: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, Response]]:
    """(which prompt, its response), as they end.

    `chances` [rows, max_new_tokens] choose the tokens, if given (see `draw`); `hear` is told each token as it is drawn.
    """
    filters = warpers(sampling)
    size = len(held.rows)
    rows = list(range(size))  # of `held`, on the host
    drawn: list[list[int]] = [[] for _ in range(size)]
    logprobs = torch.zeros(size, sampling.max_new_tokens, device=held.mask.device)
    finished = [False] * size

    def response(row: int) -> tuple[int, Response]:
        kept = logprobs[row, : len(drawn[row])].to("cpu", copy=True)
        return row, Response(tuple(drawn[row]), kept, finished[row])

    for step in range(sampling.max_new_tokens):
        chosen_by = None if chances is None else chances[held.rows, step]
        tokens, logprobs[held.rows, step] = draw(held.logits(), sampling, filters, chosen_by)
        held.extend(tokens)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not finished[row]:
                drawn[row].append(token)
                if hear is not None:
                    hear(token)
                finished[row] = token in ends
                if finished[row]:
                    yield response(row)
        staying = [place for place, row in enumerate(rows) if not finished[row]]
        if not staying:
            return
        if len(rows) - len(staying) >= LEAVING_SHARE * len(rows):
            held.keep(staying)
            rows = [rows[place] for place in staying]
    for row in range(size):
        if not finished[row]:
            yield response(row)


def sample_responses(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    ends: Collection[int],
    pad: int,
    batch_size: int | Budget,
    bar: Bar | None = None,
    seed: int | None = None,
    hear: Callable[[int], object] | None = None,
) -> Rollout:
    """One response of the current role to each prompt, in the prompts' order. `bar` moves with each response.

    Draws come from torch's global generator; with `seed`, each prompt has draws of its own, made of the seed and its
    place. `hear` is told each token as it is drawn. Whether prompt and response fit into the model's context is for
    callers to check. A batch that runs out of memory is drawn again from where it began, in smaller ones; what had
    ended in it is not kept, for the answers that end early are the short ones.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise OnecardError(f"prompt {index} has no tokens, so there is nothing to go on from.")
    model = roles.causal_model()
    began = time.perf_counter()
    counts: dict[int, int] = {}  # tokens of each response that the bar has been told of

    def read(chosen: list[int]) -> list[Response]:
        held = Held(model, [prompts[index] for index in chosen], pad, roles.device)
        chances = None
        if seed is not None:
            rows = [chances_of(seed, index, sampling.max_new_tokens) for index in chosen]
            chances = torch.stack(rows).to(roles.device)
        found: dict[int, Response] = {}
        with drawn_again_after_errors(roles.device):
            for row, response in sample_batch(held, sampling, ends, chances=chances, hear=hear):
                found[row] = response
                told = chosen[row] in counts
                counts[chosen[row]] = len(response.tokens)
                if bar is not None and not told:
                    bar.advance({"time/tokens_per_second": sum(counts.values()) / (time.perf_counter() - began)})
        return [found[row] for row in range(len(chosen))]

    budget = batch_size if isinstance(batch_size, Budget) else sampling_budget(batch_size)
    sizes = [cache_bytes(model, len(prompt) + sampling.max_new_tokens) for prompt in prompts]
    with evaluating(model):
        responses = each_item(sizes, budget, read, padded=True)
    return Rollout(tuple(responses), time.perf_counter() - began)


def make_episode(prompt: Prompt, place: int, response: Response) -> Episode:
    """Prompt and response as one sequence; the mask, not any token id, says which is which."""
    mask = (False,) * len(prompt.tokens) + (True,) * len(response.tokens)
    sequence = TokenSequence(prompt.tokens + response.tokens, mask)
    return Episode(sequence, response.logprobs, response.finished, place)


def generate(
    roles: Roles, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, *, batch_size: int
) -> list[str]:
    """One response text to each prompt, in the prompts' order."""
    with progress("generate", len(prompts)) as bar:
        rollout = sample_responses(
            roles,
            [prompt.tokens for prompt in prompts],
            sampling,
            ends=end_tokens(roles, tokenizer),
            pad=tokenizer.pad_token_id,
            batch_size=batch_size,
            bar=bar,
        )
    return [tokenizer.decode(response.body, skip_special_tokens=True) for response in rollout.responses]
