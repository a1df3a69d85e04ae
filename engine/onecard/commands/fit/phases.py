"""Runs each phase of a training command on `meta`, through the functions that the command itself calls."""

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
from onecard.algorithms.ppo.job import ppo_objective
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
from onecard.models.build import SCORER_SETTINGS
from onecard.models.cache import cache_bytes
from onecard.models.micro_batching import MicroBatchSize, forward_budget
from onecard.models.role_setup import RoleSetup, ppo_setup, supervised_setup
from onecard.models.roles import Roles
from onecard.models.trunk import evaluating
from onecard.rollout import Sampling, decoding_modes, make_decode_batch
from onecard.training.optim import clip_grad_norm, make_optimizer
from onecard.training.trainer import Objective, accumulate

GRADIENTS, STATES, CACHE = "gradients", "optimizer states", "kv cache"
PAGED_FROM = 100_000  # bitsandbytes' paged optimizers page the states of parameters with at least this many elements


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of its response."""

    prompt: int
    response: int

    @property
    def total(self) -> int:
        return self.prompt + self.response

    def sequence(self, token: int) -> TokenSequence:
        """Prompt and response. `token`: id of all response tokens; two responses of different ids share the prompt."""
        tokens = (0,) * self.prompt + (token,) * self.response
        return TokenSequence(tokens, (False,) * self.prompt + (True,) * self.response)


def pair(lengths: Lengths) -> PreferencePair:
    """A pair of two responses to one prompt."""
    return PreferencePair(lengths.sequence(1), lengths.sequence(2))


def labelled(lengths: Lengths, *, mismatched: bool) -> LabelledSequence:
    """A desirable response, with a mismatched response for kto's KL if `mismatched`."""
    return LabelledSequence(lengths.sequence(1), True, lengths.sequence(2) if mismatched else TokenSequence((), ()))


def experience(lengths: Lengths, *, values: bool) -> Experience:
    """An episode of PPO with all its per-token numbers 0, with values if `values`."""
    numbers = torch.zeros(lengths.response)
    episode = Episode(lengths.sequence(1), numbers, True)
    return Experience(episode, numbers, numbers if values else None, numbers, numbers)


@dataclass(frozen=True)
class Work:
    """An optimizer step: the objective, one example of the planned lengths, and the number of examples in the step."""

    objective: Objective[Any, Any]
    example: Any
    examples: int


def recipe_of(config: TrainConfig) -> Recipe[Any, Any]:
    """The recipe of sft, reward or dpo. The folder of a reference adapter does not have to exist."""
    if isinstance(config, SFTConfig):
        return sft_recipe(config)
    if isinstance(config, RewardConfig):
        return reward_recipe(config)
    assert isinstance(config, DPOConfig)
    return dpo_recipe(replace(config, ref_adapter=""))


def example_of(config: TrainConfig, lengths: Lengths) -> Any:
    """A training example of sft, reward or dpo: a sequence, a pair, or a labelled response."""
    if isinstance(config, SFTConfig):
        return lengths.sequence(1)
    if isinstance(config, RewardConfig):
        return pair(lengths)
    assert isinstance(config, DPOConfig)
    kto = config.loss_type == ["kto"]  # the only loss that uses mismatched responses
    example = labelled(lengths, mismatched=kto) if pick_variant(config).labelled else pair(lengths)
    return replace(example, ref_logps=(0.0, 0.0)) if config.precompute_ref_log_probs else example


def setup_of(config: TrainConfig, *, from_adapter: bool) -> RoleSetup:
    """The run's roles. A scoring model that a setting names is planned as an adapter on the base."""
    if isinstance(config, PPOConfig):
        scorers = [role for role, setting in SCORER_SETTINGS.items() if getattr(config, setting)]
        return ppo_setup(config, scorers, from_adapter=from_adapter)
    recipe = recipe_of(config)
    return supervised_setup(
        config, trained=recipe.trained, reference=recipe.reference, scalar=recipe.scalar, from_adapter=from_adapter
    )


def is_uncut(config: TrainConfig) -> bool:
    """Whether a step cannot be split into micro-batches, because the loss sorts the whole batch."""
    return not isinstance(config, PPOConfig) and bool(recipe_of(config).unsplittable)


def work_of(config: TrainConfig, roles: Roles, lengths: Lengths) -> Work:
    """The optimizer step of these settings, with all sequences of the planned lengths."""
    if isinstance(config, PPOConfig):
        example = experience(lengths, values="value" in roles.adapters)
        return Work(ppo_objective(roles, config), example, config.minibatch_size)
    count = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return Work(recipe_of(config).objective(roles), example_of(config, lengths), count)


def rows_of(config: TrainConfig, lengths: Lengths) -> tuple[int, int]:
    """`(tokens of one example in the model's input, largest number of examples in one forward pass)`."""
    if isinstance(config, PPOConfig):
        return lengths.total, max(config.minibatch_size, config.episodes_per_step)
    recipe = recipe_of(config)
    example = example_of(config, lengths)
    shared = recipe.shared_collation if config.padding_free else None
    size = shared.size if shared else len
    return size(example), config.per_device_train_batch_size * config.gradient_accumulation_steps


class Rehearsal:
    """Runs the phases of one plan in order and records the peak of each."""

    def __init__(self, tracker: Tracker, roles: Roles, config: TrainConfig, lengths: Lengths) -> None:
        self.tracker, self.roles, self.config, self.lengths = tracker, roles, config, lengths
        self.parameters = list(roles.trained_parameters().values())
        self.phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak of the code inside as the phase `name`."""
        with self.tracker.phase(name) as phase:
            yield
        self.phases.append(phase)

    def run(self) -> list[Phase]:
        """Run all phases of the command, in their order."""
        if isinstance(self.config, DPOConfig) and self.config.precompute_ref_log_probs:
            self.precompute(self.config)
        optimizer = self.make_optimizer()
        self.step(optimizer)  # the first step allocates the optimizer states
        if isinstance(self.config, PPOConfig):
            self.rollout(self.config)
            self.passes(self.config)
        self.train()
        with self.phase("optimizer step"):
            self.step(optimizer)
        return self.phases

    def with_gradients(self) -> None:
        """Allocate a gradient for every trained parameter."""
        with self.tracker.making(GRADIENTS):
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the run, with the methods that need a device replaced."""
        with self.tracker.making(STATES):
            optimizer = make_optimizer(self.config, self.parameters)
        inner: Any = getattr(optimizer, "inner", optimizer)
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                group["foreach"] = self.tracker.target.type == "cuda"  # AdamW's default on that device
            return optimizer
        inner.update_step = lambda *args: None  # an in-place kernel on states and weights, without allocations
        inner.prefetch_state = lambda *args: None
        inner.get_state_buffer = partial(self.state_buffer, inner)
        return optimizer

    def state_buffer(self, optimizer: Any, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """An optimizer state of bitsandbytes. Large states of a paged optimizer are in unified memory."""
        paged = optimizer.is_paged and parameter.numel() >= PAGED_FROM and self.tracker.target.type == "cuda"
        with self.tracker.making(PAGED if paged else STATES):
            return torch.zeros_like(parameter, dtype=dtype)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients and run the optimizer's step."""
        if any(parameter.grad is None for parameter in self.parameters):
            self.with_gradients()
        with torch.no_grad():
            clip_grad_norm(self.parameters, self.config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for state in optimizer.state.values():
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            self.tracker.tag(STATES, [tensor for tensor in tensors if self.tracker.kind(tensor) == WORK])

    def rollout(self, config: PPOConfig) -> None:
        """The prefill, and the decoding steps at which the cache is largest: its last growth, and the last step."""
        model = self.roles.causal_model()
        sizes = [cache_bytes(model, self.lengths.total)] * config.episodes_per_step
        rows = len(next(replace(rollout_budget(config).size, padded=True).split(sizes)))
        sampling = Sampling(config.response_length, config.temperature)
        waiting, cache_memory = len(sizes) - rows, partial(self.tracker.making, CACHE)
        for decoding in decoding_modes(model):
            self.roles.decoding = decoding
            try:
                with self.phase("rollout"), torch.no_grad(), evaluating(model), self.roles.active("policy"):
                    batch = make_decode_batch(self.roles, rows, self.lengths.total - 1)
                    sample_longest(batch, self.lengths.prompt, self.lengths.total, waiting, sampling, cache_memory)
                break
            except (RuntimeError, TypeError, ValueError, AttributeError):  # the model's cache does not suit this mode
                if decoding == "uncached":
                    raise

    def passes(self, config: PPOConfig) -> None:
        """PPO's passes without gradients: reward model, policy, reference and critic."""
        roles = self.roles
        micro_batch_size = replace(forward_budget(config).size, padded=roles.layout == "padded")
        sequences = [self.lengths.sequence(1)] * config.episodes_per_step
        indices = next(micro_batch_size.split([len(sequence) for sequence in sequences]))

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
                read(to_device(pack([sequences[index] for index in indices]), META))

    def precompute(self, config: DPOConfig) -> None:
        """The reference's forward pass before training. A reference that is a full copy of the model is freed then."""
        roles, variant = self.roles, pick_variant(config)
        assert variant.compute_ref_logps is not None
        example = replace(example_of(config, self.lengths), ref_logps=None)
        micro_batch_size = replace(forward_budget(config).size, padded=roles.layout == "padded")
        indices = next(micro_batch_size.split([len(example)] * max(config.per_device_eval_batch_size, 1)))
        batch = recipe_of(config).collate([example] * len(indices))
        with self.phase("reference pass"), torch.no_grad():
            variant.compute_ref_logps(roles, to_device(batch, META))
        if "reference" in roles.copies:
            del roles.copies["reference"], roles.adapters["reference"], batch

    def train(self) -> None:
        """Forward and backward of the largest micro-batch of a step.

        Where a step has several micro-batches, the gradients of an earlier one are allocated already.
        """
        config, work = self.config, work_of(self.config, self.roles, self.lengths)
        micro_batch_size = MicroBatchSize(
            config.per_device_train_batch_size, config.micro_batch_tokens, padded=self.roles.layout == "padded"
        )
        examples = [work.example] * work.examples
        passes = list(micro_batch_size.split([work.objective.size(example) for example in examples]))
        if work.objective.unsplittable:
            passes = [list(range(len(examples)))]
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda trained: self.tracker.tag(GRADIENTS, [trained.grad]))
            for parameter in self.parameters
        ]
        with self.phase("train"):
            if len(passes) > 1:
                self.with_gradients()
            accumulate(work.objective, [examples[index] for index in passes[0]], MicroBatchSize(len(passes[0])), META)
        for hook in hooks:
            hook.remove()
