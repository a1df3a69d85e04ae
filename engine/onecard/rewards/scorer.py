"""The scorer: all rewards of a run as one function of prompts and episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onecard.config import EvaluateConfig, ModelConfig, PPOConfig
from onecard.data import Prompt
from onecard.data.batches import Episode
from onecard.models.classifier import is_classifier, load_classifier
from onecard.models.micro_batching import TokenBudget
from onecard.models.roles import Roles
from onecard.rewards.adapter import AdapterReward
from onecard.rewards.answers import Answers, ModelReward, RewardInput
from onecard.rewards.builtin import ANSWER_COLUMNS, builtin_name, exact_answer, expected_answer, load_builtin
from onecard.rewards.classifier import ClassifierReward
from onecard.rewards.expressions import Term, parse_terms
from onecard.rewards.functions import RewardFunction, load_function, part_names
from onecard.rewards.mixture import Scores, apply_missing_eos_penalty, combine, reward_weights
from onecard.rewards.validation import call_function
from onecard.rollout import text_before_end
from onecard.utils.errors import OnecardError


@dataclass(frozen=True)
class Scorer:
    """The rewards of a run and their weights: reward functions, and rewards that take a `RewardInput`, as models do."""

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]
    missing_eos_penalty: float
    batch_size: int | TokenBudget
    input_rewards: Mapping[str, ModelReward] = field(default_factory=dict)
    timeout: float = 0.0  # seconds after which a warning names a function that still runs; 0: never

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Raise OnecardError at startup for the first row with an expected answer that `exact_answer` cannot use."""
        known = {name for prompt in prompts for name in prompt.columns}
        if exact_answer in self.input_rewards.values() and known.intersection(ANSWER_COLUMNS):
            for prompt in prompts:
                expected_answer(prompt.columns, prompt.text)

    def scores(self, roles: Roles, tokenizer: Any, prompts: Sequence[Prompt], episodes: Sequence[Episode]) -> Scores:
        """The scores of the episodes; `episodes[i]` answers `prompts[i]`. `missing_eos_penalty` is subtracted."""
        answers = make_answers(tokenizer, prompts, episodes)
        inputs = RewardInput(roles, tokenizer, prompts, episodes, answers, self.batch_size)
        parts = {
            name: self.input_rewards[name](inputs)
            if name in self.input_rewards
            else call_function(self.functions[name], answers, self.timeout)
            for name in self.weights
        }
        scores = combine(parts, self.weights)
        finished = [episode.finished for episode in episodes]
        return replace(scores, terminal=apply_missing_eos_penalty(scores.terminal, finished, self.missing_eos_penalty))


@dataclass(frozen=True)
class RewardSpec:
    """Settings of a scorer. `role`: `reward` or `constraint`, the prefix of the names of its settings."""

    role: str
    model_path: str
    label: str
    functions: Sequence[str]
    weights: Sequence[float] = ()
    missing_eos_penalty: float = 0.0
    timeout: float = 0.0

    @property
    def path_setting(self) -> str:
        return f"{self.role}_model_path"

    @property
    def functions_setting(self) -> str:
        return f"{self.role}_funcs"

    @property
    def model_part(self) -> str:
        """The name under which the reward model appears among the rewards: in weights, metrics and reward_funcs."""
        return f"{self.role}_model"


def load_scorer(config: PPOConfig | EvaluateConfig, budget: TokenBudget | None = None) -> Scorer:
    """The scorer of the reward settings. Functions are imported now, so that a wrong name raises at once.

    `budget`: the token budget of the models' passes; None: `per_device_eval_batch_size` sequences each. Raises
    OnecardError if the settings name no reward.
    """
    spec = RewardSpec(
        "reward",
        config.reward_model_path,
        config.reward_label,
        config.reward_funcs,
        config.reward_weights,
        config.missing_eos_penalty,
        config.reward_timeout,
    )
    scorer = make_scorer(spec, config, budget or config.per_device_eval_batch_size)
    if scorer is None:
        raise OnecardError(
            "--reward_model_path or --reward_funcs is missing: give a reward model, or a function as module:function."
        )
    return scorer


def load_constraint(config: PPOConfig, budget: TokenBudget | None = None) -> Scorer | None:
    """The scorer of the constraint settings: an answer's cost is the sum of its parts. None if no part is set."""
    spec = RewardSpec(
        "constraint",
        config.constraint_model_path,
        config.constraint_label,
        config.constraint_funcs,
        timeout=config.reward_timeout,
    )
    return make_scorer(spec, config, budget or config.per_device_eval_batch_size)


def make_scorer(spec: RewardSpec, config: ModelConfig, batch_size: int | TokenBudget) -> Scorer | None:
    """The scorer of `spec`; None if it has no parts.

    Functions and classifiers are loaded here; an adapter is loaded with the run's other roles.
    """
    terms = parse_terms(spec.functions, spec.functions_setting)
    names = part_names([term.entry for term in terms], setting=spec.functions_setting, model=spec.model_part)
    term_of_part = {spec.model_part: Term(spec.model_part)} if spec.model_path else {}
    if spec.model_part in names and not spec.model_path:  # an entry of reward_funcs that weights the reward model
        raise OnecardError(f"{spec.functions_setting}: '{spec.model_part}' needs --{spec.path_setting}.")
    term_of_part |= dict(zip(names, terms, strict=True))
    weights = part_weights(spec, term_of_part)
    entries = {name: term.entry for name, term in term_of_part.items() if name != spec.model_part}
    functions = {
        name: load_with_setting(entry, spec.functions_setting)
        for name, entry in entries.items()
        if builtin_name(entry) is None
    }
    input_rewards = {
        name: load_builtin(entry, spec.functions_setting) for name, entry in entries.items() if name not in functions
    }
    model = load_model(spec, config)
    input_rewards |= {spec.model_part: model} if model else {}
    if not weights:
        return None
    return Scorer(functions, weights, spec.missing_eos_penalty, batch_size, input_rewards, spec.timeout)


def part_weights(spec: RewardSpec, term_of_part: Mapping[str, Term]) -> dict[str, float]:
    """Each part's weight: in the functions setting, in the weights setting, or 1. Raises OnecardError if in both."""
    weighted = next((term for term in term_of_part.values() if term.weight is not None), None)
    if spec.weights and weighted is not None:
        raise OnecardError(
            f"{spec.role}_weights: given, but {spec.functions_setting} has a weight for '{weighted.entry}' too; "
            "expected weights in one."
        )
    if spec.weights:
        return reward_weights(list(term_of_part), spec.weights)
    return {name: 1.0 if term.weight is None else term.weight for name, term in term_of_part.items()}


def load_with_setting(address: str, setting: str) -> RewardFunction:
    """`load_function`, with `setting` as the setting in error messages."""
    try:
        return load_function(address)
    except OnecardError as error:
        raise OnecardError(f"{setting}: {str(error).removeprefix('reward_funcs: ')}") from error


def load_model(spec: RewardSpec, config: ModelConfig) -> ModelReward | None:
    """The reward of the reward model: a classifier, or an adapter, which is loaded with the other roles; or None."""
    path, setting = spec.model_path, spec.path_setting
    if path and is_classifier(path, setting, trust_remote_code=config.trust_remote_code):
        return ClassifierReward(load_classifier(path, setting, spec.label, f"{spec.role}_label", config), setting)
    if spec.label:
        problem = f"{path} is not a classifier" if path else f"{setting} is not set"
        raise OnecardError(f"{spec.role}_label: '{spec.label}' is a classifier's label, but {problem}.")
    return AdapterReward(spec.role) if path else None


def response_text(tokenizer: Any, episode: Episode) -> str:
    """The answer's text after its prompt, without the token or stop string that ended it."""
    return text_before_end(
        tokenizer, episode.prompt_tokens, episode.response, finished=episode.finished, stop=episode.stop
    )


def make_answers(tokenizer: Any, prompts: Sequence[Prompt], episodes: Sequence[Episode]) -> Answers:
    """The inputs of reward functions. A column that only some rows have is None for the others."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return Answers(
        prompts=tuple(prompt.text for prompt in prompts),
        completions=tuple(response_text(tokenizer, episode) for episode in episodes),
        completion_ids=tuple(episode.response for episode in episodes),
        columns={name: tuple(prompt.columns.get(name) for prompt in prompts) for name in names},
    )
