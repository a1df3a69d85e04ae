"""A run's phases, each by the functions that the run itself calls, on `meta`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onecard.algorithms.common import Recipe
from onecard.algorithms.dpo.command import make_recipe as dpo_recipe
from onecard.algorithms.dpo.variants import pick_variant
from onecard.algorithms.ppo.experience import state_values
from onecard.algorithms.ppo.losses import ppo_objective
from onecard.algorithms.ppo.sampling import rollout_budget
from onecard.algorithms.reward.command import make_recipe as reward_recipe
from onecard.algorithms.sft import make_recipe as sft_recipe
from onecard.commands.fit.rollouts import sample_longest
from onecard.commands.fit.tracker import PAGED, WORK, Phase, Tracker
from onecard.commands.fit.weights import META
from onecard.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig
from onecard.data.batches import (
    Episode,
    Experience,
    LabelledSequence,
    PreferencePair,
    TokenBatch,
    TokenSequence,
    pack,
    to_device,
)
from onecard.models.cache import cache_bytes
from onecard.models.micro_batching import MicroBatchSize, forward_budget
from onecard.models.roles import Roles
from onecard.models.trunk import evaluating
from onecard.rollout import Sampling, decoding_modes, make_decode_batch
from onecard.training.optim import clip_grad_norm, make_optimizer
from onecard.training.trainer import Objective, accumulate

GRADIENTS, STATES, CACHE = "gradients", "optimizer states", "kv cache"
PAGED_FROM = 100_000  # entries of a parameter, from which bitsandbytes' paged optimizers page its states


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, and of the answer to it."""

    prompt: int
    response: int

    @property
    def total(self) -> int:
        return self.prompt + self.response

    def sequence(self, place: int) -> TokenSequence:
        """Prompt and answer; the answers to one prompt differ from their first token on."""
        tokens = (0,) * self.prompt + (place,) * self.response
        return TokenSequence(tokens, (False,) * self.prompt + (True,) * self.response)


def pair(lengths: Lengths) -> PreferencePair:
    return PreferencePair(lengths.sequence(1), lengths.sequence(2))


def labelled(lengths: Lengths, *, mismatched: bool) -> LabelledSequence:
    return LabelledSequence(lengths.sequence(1), True, lengths.sequence(2) if mismatched else TokenSequence((), ()))


def experience(lengths: Lengths, *, values: bool) -> Experience:
    numbers = torch.zeros(lengths.response)
    episode = Episode(lengths.sequence(1), numbers, True, 0)
    return Experience(episode, numbers, numbers if values else None, numbers, numbers)


@dataclass(frozen=True)
class Work:
    """What an algorithm trains on: its objective, an example of the planned lengths, and how many a step has."""

    objective: Objective[Any, Any]
    example: Any
    examples: int


def recipe_of(config: TrainConfig) -> Recipe[Any, Any]:
    """That of a command which learns from fixed examples. A reference adapter need not be there yet."""
    if isinstance(config, SFTConfig):
        return sft_recipe(config)
    if isinstance(config, RewardConfig):
        return reward_recipe(config)
    assert isinstance(config, DPOConfig)
    return dpo_recipe(replace(config, ref_adapter=""))


def example_of(config: TrainConfig, lengths: Lengths) -> Any:
    """An example of fixed ones: a text, a pair, or a labelled answer."""
    if isinstance(config, SFTConfig):
        return lengths.sequence(1)
    if isinstance(config, RewardConfig):
        return pair(lengths)
    assert isinstance(config, DPOConfig)
    kto = config.loss_type == ["kto"]  # the one loss that looks at mismatched answers
    example = labelled(lengths, mismatched=kto) if pick_variant(config).labelled else pair(lengths)
    return replace(example, ref_logps=(0.0, 0.0)) if config.precompute_ref_log_probs else example


def has_reference(config: TrainConfig) -> bool:
    """Whether a frozen reference is held beside the trained roles."""
    return isinstance(config, PPOConfig) or recipe_of(config).reference


def is_uncut(config: TrainConfig) -> bool:
    """Whether a step is one micro-batch or none: a loss that sorts the whole batch."""
    return not isinstance(config, PPOConfig) and bool(recipe_of(config).uncut)


def work_of(config: TrainConfig, roles: Roles, lengths: Lengths) -> Work:
    """What an optimizer step of these settings is made of, all sequences as long as planned."""
    if isinstance(config, PPOConfig):
        learned = experience(lengths, values="value" in roles.adapters)
        return Work(ppo_objective(roles, config), learned, config.minibatch_size)
    count = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return Work(recipe_of(config).objective(roles), example_of(config, lengths), count)


def rows_of(config: TrainConfig, lengths: Lengths) -> tuple[int, int]:
    """Rows of the model that one example takes, and how many examples at most make up a pass."""
    if isinstance(config, PPOConfig):
        return lengths.total, max(config.minibatch_size, config.episodes_per_step)
    recipe = recipe_of(config)
    example = example_of(config, lengths)
    size = recipe.sharing.size if recipe.sharing and config.padding_free else len
    return size(example), config.per_device_train_batch_size * config.gradient_accumulation_steps


class Rehearsal:
    """Runs the phases of one plan, one after the other, and keeps the peak of each."""

    def __init__(self, tracker: Tracker, roles: Roles, config: TrainConfig, lengths: Lengths) -> None:
        self.tracker, self.roles, self.config, self.lengths = tracker, roles, config, lengths
        self.parameters = list(roles.trained_parameters().values())
        self.phases: list[Phase] = []
        self.paged = 0  # bytes of optimizer states that may leave the card

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.tracker.phase(name) as found:
            yield
        self.phases.append(found)

    def run(self) -> list[Phase]:
        """All phases of the command, in their order."""
        if isinstance(self.config, DPOConfig) and self.config.precompute_ref_log_probs:
            self.precompute(self.config)
        optimizer = self.make_optimizer()
        self.step(optimizer)  # the states are made in the first one, and stay
        if isinstance(self.config, PPOConfig):
            self.rollout(self.config)
            self.passes(self.config)
        self.train()
        with self.phase("optimizer step"):
            self.step(optimizer)
        return self.phases

    def with_gradients(self) -> None:
        """Every trained parameter has a gradient."""
        with self.tracker.making(GRADIENTS):
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The run's, with what of it cannot run without a device put right."""
        with self.tracker.making(STATES):
            optimizer = make_optimizer(self.config, self.parameters)
        inner: Any = getattr(optimizer, "inner", optimizer)
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                group["foreach"] = self.tracker.target.type == "cuda"  # as it chooses by itself there
            return optimizer
        inner.update_step = lambda *given: None  # a kernel that changes states and weights in place
        inner.prefetch_state = lambda *given: None
        inner.get_state_buffer = partial(self.state_buffer, inner)
        return optimizer

    def state_buffer(self, optimizer: Any, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """bitsandbytes' states of a parameter; large ones of a paged one lie in memory that host and card share."""
        paged = optimizer.is_paged and parameter.numel() >= PAGED_FROM and self.tracker.target.type == "cuda"
        with self.tracker.making(PAGED if paged else STATES):
            return torch.zeros_like(parameter, dtype=dtype)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, and step."""
        if any(parameter.grad is None for parameter in self.parameters):
            self.with_gradients()
        with torch.no_grad():
            clip_grad_norm(self.parameters, self.config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for state in optimizer.state.values():
            kept = [each for each in state.values() if isinstance(each, Tensor)]
            self.tracker.name(STATES, [each for each in kept if self.tracker.kind(each) == WORK])

    def rollout(self, config: PPOConfig) -> None:
        """One pass over the prompts, and the passes at which the cache is largest: it grows, and the last one."""
        model = self.roles.causal_model()
        sizes = [cache_bytes(model, self.lengths.total)] * config.episodes_per_step
        rows = len(next(replace(rollout_budget(config).size, padded=True).split(sizes)))
        sampling = Sampling(config.response_length, config.temperature)
        waiting, making = len(sizes) - rows, partial(self.tracker.making, CACHE)
        for decoding in decoding_modes(model):
            self.roles.decoding = decoding
            try:
                with self.phase("rollout"), torch.no_grad(), evaluating(model), self.roles.active("policy"):
                    held = make_decode_batch(self.roles, rows, self.lengths.total - 1)
                    sample_longest(held, self.lengths.prompt, self.lengths.total, waiting, sampling, making)
                break
            except (RuntimeError, TypeError, ValueError, AttributeError):  # a cache of another kind than this one's
                if decoding == "uncached":
                    raise

    def passes(self, config: PPOConfig) -> None:
        """Those without gradients, in PPO: the judges', the policy's and the reference's, the critic's."""
        roles = self.roles
        cut = replace(forward_budget(config).size, padded=roles.layout == "padded")
        sequences = [self.lengths.sequence(1)] * config.episodes_per_step
        chosen = next(cut.split([len(sequence) for sequence in sequences]))

        def logprobs(batch: TokenBatch) -> Tensor:
            return roles.logprobs(batch, batch.targets, config.temperature)

        reads: dict[str, Callable[[TokenBatch], Tensor]] = {
            "reward": roles.scores,
            "policy": logprobs,
            "reference": logprobs,
            "value": partial(state_values, roles),
        }
        for role, read in reads.items():
            if role not in roles.adapters:
                continue
            with self.phase(f"{role} pass"), torch.no_grad(), roles.active(role):
                read(to_device(pack([sequences[place] for place in chosen]), META))

    def precompute(self, config: DPOConfig) -> None:
        """The reference's pass before training; a reference that is a whole model is let go of after it."""
        roles, variant = self.roles, pick_variant(config)
        assert variant.reference is not None
        example = replace(example_of(config, self.lengths), ref_logps=None)
        cut = replace(forward_budget(config).size, padded=roles.layout == "padded")
        chosen = next(cut.split([len(example)] * max(config.per_device_eval_batch_size, 1)))
        record = recipe_of(config).collate([example] * len(chosen))
        with self.phase("reference pass"), torch.no_grad():
            variant.reference(roles, to_device(record, META))
        if "reference" in roles.copies:
            del roles.copies["reference"], roles.adapters["reference"], record

    def train(self) -> None:
        """The largest micro-batch of a step, with gradients from another one where a step has several."""
        config, work = self.config, work_of(self.config, self.roles, self.lengths)
        cut = MicroBatchSize(
            config.per_device_train_batch_size, config.micro_batch_tokens, padded=self.roles.layout == "padded"
        )
        examples = [work.example] * work.examples
        passes = list(cut.split([work.objective.size(example) for example in examples]))
        if work.objective.uncut:
            passes = [list(range(len(examples)))]
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda each: self.tracker.name(GRADIENTS, [each.grad]))
            for parameter in self.parameters
        ]
        with self.phase("train"):
            if len(passes) > 1:
                self.with_gradients()
            accumulate(work.objective, [examples[place] for place in passes[0]], MicroBatchSize(len(passes[0])), META)
        for hook in hooks:
            hook.remove()
