"""Runs each phase of a training command on `meta`, with the functions that the command itself calls."""

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
from onecard.commands.fit.rollouts import run_largest_steps
from onecard.commands.fit.tracker import ACTIVATIONS, PAGED, Phase, Tracker
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
PAGED_MIN_ELEMENTS = 100_000  # bitsandbytes pages the optimizer states of parameters with at least this many elements


@dataclass(frozen=True)
class Lengths:
    """Planned lengths of each prompt and each response, in tokens."""

    prompt: int
    response: int

    @property
    def total(self) -> int:
        return self.prompt + self.response

    def sequence(self, token: int) -> TokenSequence:
        """Prompt + response. `token`: id of all response tokens. Sequences of different ids share only the prompt."""
        tokens = (0,) * self.prompt + (token,) * self.response
        return TokenSequence(tokens, (False,) * self.prompt + (True,) * self.response)


def pair(lengths: Lengths) -> PreferencePair:
    """A pair of two responses to one prompt."""
    return PreferencePair(lengths.sequence(1), lengths.sequence(2))


def labelled(lengths: Lengths, *, mismatched: bool) -> LabelledSequence:
    """A desirable response. `mismatched`: it has the mismatched response that kto's KL needs."""
    return LabelledSequence(lengths.sequence(1), True, lengths.sequence(2) if mismatched else TokenSequence((), ()))


def experience(lengths: Lengths, *, values: bool) -> Experience:
    """The experience of one PPO episode, all zeros. `values`: it has the critic's values."""
    numbers = torch.zeros(lengths.response)
    episode = Episode(lengths.sequence(1), numbers, True)
    return Experience(episode, numbers, numbers if values else None, numbers, numbers)


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step: the objective, an example of the planned lengths, and the number of examples in the step."""

    objective: Objective[Any, Any]
    example: Any
    num_examples: int


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
    """The roles of the run. Each reward or constraint model is planned as an adapter on the base."""
    if isinstance(config, PPOConfig):
        scorers = [role for role, setting in SCORER_SETTINGS.items() if getattr(config, setting)]
        return ppo_setup(config, scorers, from_adapter=from_adapter)
    recipe = recipe_of(config)
    return supervised_setup(
        config, trained=recipe.trained, reference=recipe.reference, scalar=recipe.scalar, from_adapter=from_adapter
    )


def is_unsplittable(config: TrainConfig) -> bool:
    """Whether a step cannot be split into micro-batches, because the loss sorts the whole batch."""
    return not isinstance(config, PPOConfig) and bool(recipe_of(config).unsplittable_loss)


def training_step(config: TrainConfig, roles: Roles, lengths: Lengths) -> TrainingStep:
    """The optimizer step of a run with these settings, in which all sequences have the planned lengths."""
    if isinstance(config, PPOConfig):
        example = experience(lengths, values="value" in roles.adapters)
        return TrainingStep(ppo_objective(roles, config), example, config.minibatch_size)
    count = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return TrainingStep(recipe_of(config).objective(roles), example_of(config, lengths), count)


def largest_pass(config: TrainConfig, lengths: Lengths) -> tuple[int, int]:
    """`(tokens that one example takes in a packed batch, largest number of examples in one forward pass)`.

    With a large `micro_batch_tokens`, one pass has all examples of a step.
    """
    if isinstance(config, PPOConfig):
        return lengths.total, max(config.minibatch_size, config.episodes_per_step)
    recipe = recipe_of(config)
    example = example_of(config, lengths)
    shared = recipe.prompt_sharing_collation if config.padding_free else None
    size = shared.size if shared else len
    return size(example), config.per_device_train_batch_size * config.gradient_accumulation_steps


class PhaseRunner:
    """Runs the phases of a training command in order and records the peak of each."""

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
            self.scoring_passes(self.config)
        self.train()
        with self.phase("optimizer step"):
            self.step(optimizer)
        return self.phases

    def allocate_gradients(self) -> None:
        """Allocate a gradient for every trained parameter."""
        with self.tracker.allocating(GRADIENTS):
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the run. Methods that need a real device are replaced."""
        with self.tracker.allocating(STATES):
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
        paged = optimizer.is_paged and parameter.numel() >= PAGED_MIN_ELEMENTS and self.tracker.target.type == "cuda"
        with self.tracker.allocating(PAGED if paged else STATES):
            return torch.zeros_like(parameter, dtype=dtype)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients and run the optimizer's step."""
        if any(parameter.grad is None for parameter in self.parameters):
            self.allocate_gradients()
        with torch.no_grad():
            clip_grad_norm(self.parameters, self.config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The states that the step allocated were counted as activations. Paged ones have their own tag already.
        for state in optimizer.state.values():
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            self.tracker.tag(STATES, [tensor for tensor in tensors if self.tracker.kind(tensor) == ACTIVATIONS])

    def rollout(self, config: PPOConfig) -> None:
        """Run the prefill, the decoding step at which the cache grows for the last time, and the last decoding step."""
        model = self.roles.causal_model()
        sizes = [cache_bytes(model, self.lengths.total)] * config.episodes_per_step
        rows = len(next(rollout_budget(config).size.split(sizes)))  # prompts of the first decode batch, the largest
        sampling = Sampling(config.response_length, config.temperature)
        waiting, cache_memory = len(sizes) - rows, partial(self.tracker.allocating, CACHE)
        for decoding in decoding_modes(model):
            self.roles.decoding = decoding
            try:
                with self.phase("rollout"), torch.no_grad(), evaluating(model), self.roles.active("policy"):
                    batch = make_decode_batch(self.roles, rows, self.lengths.total - 1)
                    run_largest_steps(batch, self.lengths.prompt, self.lengths.total, waiting, sampling, cache_memory)
                break
            except (RuntimeError, TypeError, ValueError, AttributeError):  # the model does not support this mode
                if decoding == "uncached":
                    raise

    def scoring_passes(self, config: PPOConfig) -> None:
        """Run PPO's passes without gradients over the responses: reward model, policy, reference and critic."""
        roles = self.roles
        micro_batch_size = replace(forward_budget(config).size, padded=roles.layout == "padded")
        sequences = [self.lengths.sequence(1)] * config.episodes_per_step
        indices = next(micro_batch_size.split([len(sequence) for sequence in sequences]))

        def logprobs(batch: TokenBatch) -> Tensor:
            return roles.logprobs(batch, batch.targets, config.temperature)

        forwards: dict[str, Callable[[TokenBatch], Tensor]] = {
            "reward": roles.scores,
            "policy": logprobs,
            "reference": logprobs,
            "value": partial(state_values, roles),
        }
        for role, forward in forwards.items():
            if role not in roles.adapters:
                continue
            with self.phase(f"{role} pass"), torch.no_grad(), roles.active(role):
                forward(to_device(pack([sequences[index] for index in indices]), META))

    def precompute(self, config: DPOConfig) -> None:
        """Run the reference's pass before training, then free the reference if it is a full copy of the model."""
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
        """Run forward and backward of the largest micro-batch of a step.

        If a step has several micro-batches, the gradients of an earlier one are allocated before.
        """
        config, step = self.config, training_step(self.config, self.roles, self.lengths)
        micro_batch_size = MicroBatchSize(
            config.per_device_train_batch_size, config.micro_batch_tokens, padded=self.roles.layout == "padded"
        )
        examples = [step.example] * step.num_examples
        micro_batches = list(micro_batch_size.split([step.objective.size(example) for example in examples]))
        if step.objective.unsplittable_loss:
            micro_batches = [list(range(len(examples)))]
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda trained: self.tracker.tag(GRADIENTS, [trained.grad]))
            for parameter in self.parameters
        ]
        with self.phase("train"):
            if len(micro_batches) > 1:
                self.allocate_gradients()
            largest = [examples[index] for index in micro_batches[0]]
            accumulate(step.objective, largest, MicroBatchSize(len(largest)), META)
        for hook in hooks:
            hook.remove()
