"""`onecard evaluate`: computes metrics of a policy's responses, and compares them with a baseline's.

    prompts -> responses of the policy (and of the baseline, with the same random numbers per prompt)
    -> scores, KL, distinct n-grams -> a table, and `evaluation.json`, `evaluation.md`, `samples.jsonl`

Roles on the same base are adapters on it, and the base is loaded once. A baseline on another base is run first, then
freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onecard.algorithms.common import effective_max_length
from onecard.commands.evaluation_report import Evaluation, print_table, replaceable_files, write_files
from onecard.commands.outputs import output_folder
from onecard.commands.statistics import Estimate, distinct, estimate, win_rate
from onecard.config import EvaluateConfig
from onecard.data import Prompt, Row, load_rows, preference_examples, prompt_examples, sft_examples
from onecard.data.batches import Episode, ResponseTargets, TokenBatch, TokenSequence
from onecard.data.columns import TEMPLATE_COLUMNS, has
from onecard.data.templates import template_date, today
from onecard.models.build import check_is_policy, load_frozen_roles, read_scalar_head, reward_adapter, same_base
from onecard.models.load import find_source, find_source_of, load_tokenizer
from onecard.models.passes import per_token, sequence_passes
from onecard.models.roles import Roles
from onecard.models.vocabulary import check_tokens
from onecard.rewards.scorer import Scorer, load_scorer, response_text
from onecard.rollout import Sampling, find_stop_tokens, make_episode, sample_responses
from onecard.training.startup import check_decoding, check_model
from onecard.utils.errors import OnecardError
from onecard.utils.progress import Bar, progress, say

# Role -> the setting with the path of its adapter
SETTING_OF_ROLE = {"reference": "ref_adapter", "baseline": "baseline", "reward": "reward_model_path"}


@dataclass(frozen=True)
class EvaluationData:
    """The prompts, and the responses that the dataset's rows have, if any."""

    prompts: Sequence[Prompt]
    responses: Sequence[TokenSequence]
    tokenizer: Any


@dataclass(frozen=True)
class PolicyResult:
    """A policy's responses and its metrics, which are computed while its weights are loaded."""

    episodes: list[Episode]
    metrics: dict[str, Estimate]


def longest_prompt(config: EvaluateConfig, limit: int) -> int:
    """Longest prompt in tokens: `limit` minus the response, and minus the EOS that scoring appends to cut responses."""
    room = limit - config.response_length - 1
    if room < 1:
        raise OnecardError(f"response_length: {config.response_length} leaves no room for a prompt in {limit} tokens.")
    return room


def load_data(config: EvaluateConfig, tokenizer: Any) -> EvaluationData:
    """The prompts of the first `max_prompts` rows, and their responses in `completion` or `chosen`."""
    rows = load_rows(config.dataset, split=config.dataset_split)
    rows = rows[: config.max_prompts or len(rows)]
    limit = effective_max_length(config)
    prompts = prompt_examples(rows, tokenizer, max_length=longest_prompt(config, limit))
    responses, notes = dataset_responses(rows, tokenizer, limit)
    for note in (*prompts.notes, *notes):
        say(f"data: {note}")
    return EvaluationData(prompts.examples, responses, tokenizer)


def dataset_responses(
    rows: Sequence[Row], tokenizer: Any, max_length: int
) -> tuple[Sequence[TokenSequence], tuple[str, ...]]:
    """Prompt + `completion`, or else `chosen`, of each row that has one, tokenized as in training; and notes."""
    for name in ("completion", "chosen"):
        answered = [row for row in rows if has(row.values, name)]
        if not answered:
            continue
        if name == "chosen" and all(has(row.values, "rejected") for row in answered):
            pairs = preference_examples(answered, tokenizer, max_length=max_length, skip_bad_rows=False)
            return [pair.chosen for pair in pairs.examples], pairs.notes
        completion_rows = [
            replace(row, values={
                "prompt": row.values["prompt"], "completion": row.values[name],
                **{column: row.values.get(column) for column in TEMPLATE_COLUMNS},
            })
            for row in answered
        ]  # fmt: skip
        tokenized = sft_examples(
            completion_rows, tokenizer, max_length=max_length, completion_only_loss=True, assistant_only_loss=True,
            skip_bad_rows=False,
        )  # fmt: skip
        return tokenized.examples, tokenized.notes
    return [], ()


def perplexity(roles: Roles, role: str, responses: Sequence[TokenSequence], batch_size: int, bar: Bar) -> float:
    """exp of the mean negative log-likelihood of the responses' tokens, including their end tokens."""
    with roles.active(role), bar.part(f"{role}: perplexity", len(responses)) as part:

        def logprobs_of(batch: TokenBatch) -> list[torch.Tensor]:
            by_sequence = roles.logprobs(batch, batch.targets).double().cpu().split(list(batch.num_targets))
            part.advance(by=len(by_sequence))
            return [values.clone() for values in by_sequence]

        logprobs = torch.cat(sequence_passes(roles, responses, batch_size, logprobs_of))
    return float((-logprobs.mean()).exp())


def sample_and_measure(
    roles: Roles, role: str, data: EvaluationData, config: EvaluateConfig, bar: Bar, *, kl: bool
) -> PolicyResult:
    """Sample one response for each prompt, and compute the metrics that need no reward.

    The random numbers of prompt i depend on the seed and i only. `kl`: whether to compute the KL to the reference.
    """
    prompts, tokenizer = data.prompts, data.tokenizer
    with roles.active(role), bar.part(f"{role}: responses", len(prompts)) as part:
        rollout = sample_responses(
            roles,
            [prompt.tokens for prompt in prompts],
            Sampling(config.response_length, config.temperature),
            stop_tokens=find_stop_tokens(roles, tokenizer),
            batch_size=config.local_rollout_forward_batch_size,
            bar=part,
            seed=config.seed,
        )
    episodes = [make_episode(prompt, response) for prompt, response in zip(prompts, rollout.responses, strict=True)]
    bar.advance()
    metrics = {"objective/kl": estimate(kl_of(roles, role, episodes, config))} if kl else {}
    without_end = [response.body for response in rollout.responses]
    metrics |= {
        "completions/mean_length": estimate([float(len(response.tokens)) for response in rollout.responses]),
        "completions/clipped_ratio": estimate([float(not response.finished) for response in rollout.responses]),
        "distinct-1": Estimate(distinct(without_end, 1)),
        "distinct-2": Estimate(distinct(without_end, 2)),
    }
    if data.responses:
        value = perplexity(roles, role, data.responses, config.per_device_eval_batch_size, bar)
        metrics["perplexity"] = Estimate(value)
    bar.advance()
    return PolicyResult(episodes, metrics)


def kl_of(roles: Roles, role: str, episodes: Sequence[Episode], config: EvaluateConfig) -> list[float]:
    """For each response the sum of logp - ref_logp over its tokens, in nats, at the sampling temperature, or 1 if 0."""

    def logprobs_of(batch: TokenBatch, targets: ResponseTargets) -> torch.Tensor:
        return roles.logprobs(batch, targets, config.temperature or 1.0)

    logprobs, ref_logprobs = (
        per_token(roles, name, episodes, logprobs_of, config.per_device_eval_batch_size) for name in (role, "reference")
    )
    return [float((p.double() - q.double()).sum()) for p, q in zip(logprobs, ref_logprobs, strict=True)]


def with_scores(
    scorer: Scorer | None, roles: Roles, data: EvaluationData, result: PolicyResult
) -> tuple[PolicyResult, dict[str, list[float]]]:
    """`result` with mean rewards added, and for each response its score (the weighted sum) and each of its rewards."""
    if scorer is None:
        return result, {}
    scores = scorer.scores(roles, data.tokenizer, data.prompts, result.episodes)
    columns = {"objective/scores": scores.sums.tolist()}
    columns |= {f"rewards/{name}": part.tolist() for name, part in scores.parts.items()}
    return replace(result, metrics={n: estimate(v) for n, v in columns.items()} | result.metrics), columns


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate the policy and, if there is one, the baseline."""
    policy = find_source(config.model)
    baseline = find_source_of(config.baseline, "baseline") if config.baseline else None
    reference = find_source_of(config.ref_adapter, "ref_adapter") if config.ref_adapter else None
    if reference is not None and (reference.adapter is None or not same_base(reference, policy)):
        raise OnecardError(f"ref_adapter: {config.ref_adapter} is not an adapter on the policy's base, {policy.base}.")
    for setting, source in {"model": policy, "baseline": baseline, "ref_adapter": reference}.items():
        if source is not None:
            check_is_policy(source, setting)
    scorer = load_scorer(config) if config.reward_model_path or config.reward_funcs else None
    reward = reward_adapter(config)
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)
    if scorer is not None:
        scorer.check_columns(data.prompts)
    adapters = {"policy": policy.adapter, "reference": reference.adapter if reference else None}
    other_base = baseline is not None and not same_base(baseline, policy)
    if baseline is not None and not other_base:
        adapters["baseline"] = baseline.adapter
    if reward is not None:
        adapters["reward"] = reward
    with progress("evaluate", 2 * (1 + bool(baseline))) as bar:
        baseline_result = None
        if baseline is not None and other_base:
            check_same_vocabulary(config, tokenizer)
            baseline_roles = load_frozen_roles(
                replace(config, model=config.baseline), {"baseline": baseline.adapter}, {"baseline": "baseline"}
            )
            startup_checks(config, baseline_roles, data)
            baseline_result = sample_and_measure(baseline_roles, "baseline", data, config, bar, kl=False)
            del baseline_roles
        roles = load_frozen_roles(config, adapters, SETTING_OF_ROLE)
        if reward is not None:
            roles.heads["reward"] = read_scalar_head(roles, reward).requires_grad_(False)
        startup_checks(config, roles, data)
        policy_result = sample_and_measure(roles, "policy", data, config, bar, kl=True)
        if baseline is not None and not other_base:
            baseline_result = sample_and_measure(roles, "baseline", data, config, bar, kl=True)
        policy_result, scores = with_scores(scorer, roles, data, policy_result)
        metrics, samples = {"policy": policy_result.metrics}, samples_of(data, policy_result, scores, "")
        wins = None
        if baseline_result is not None:
            baseline_result, baseline_scores = with_scores(scorer, roles, data, baseline_result)
            metrics["baseline"] = baseline_result.metrics
            baseline_samples = samples_of(data, baseline_result, baseline_scores, "baseline_")
            samples = [row | baseline_row for row, baseline_row in zip(samples, baseline_samples, strict=True)]
            if scorer is not None:
                wins = win_rate(scores["objective/scores"], baseline_scores["objective/scores"])
    return Evaluation(config, len(data.prompts), metrics, wins, samples)


def startup_checks(config: EvaluateConfig, roles: Roles, data: EvaluationData) -> None:
    """Check the model at startup, on sequences as long as the longest of the evaluation."""
    texts = [*(prompt.tokens for prompt in data.prompts), *(response.tokens for response in data.responses)]
    check_tokens(roles.causal_model(), data.tokenizer, texts)
    longest = max(len(prompt.tokens) for prompt in data.prompts) + config.response_length
    longest_scored = max([longest + 1, *map(len, data.responses)])
    check_model(roles, longest_scored, row=config.per_device_eval_batch_size * longest_scored, trains=False)
    check_decoding(roles, longest)


def check_same_vocabulary(config: EvaluateConfig, tokenizer: Any) -> None:
    """Raise unless the baseline has the policy's vocabulary: responses are compared and scored as token ids."""
    if load_tokenizer(replace(config, model=config.baseline)).get_vocab() != tokenizer.get_vocab():
        raise OnecardError(
            f"baseline: {config.baseline} has another vocabulary than {config.model}, expected a model or adapter "
            "with the same tokenizer."
        )


def samples_of(
    data: EvaluationData, result: PolicyResult, scores: dict[str, list[float]], prefix: str
) -> list[dict[str, Any]]:
    """A row of `samples.jsonl` for each prompt. `prefix`: prepended to all column names except `prompt`."""
    rows = []
    for index, (prompt, episode) in enumerate(zip(data.prompts, result.episodes, strict=True)):
        row = {"completion": response_text(data.tokenizer, episode), "finished": episode.finished}
        row |= {name.replace("objective/scores", "score"): values[index] for name, values in scores.items()}
        rows.append({"prompt": prompt.text} | {f"{prefix}{name}": value for name, value in row.items()})
    return rows


def run(config: EvaluateConfig) -> Path | None:
    """`onecard evaluate`. Returns the output folder, or None without `output_dir`."""
    config.validate()
    folder = output_folder(config.output_dir, replaceable_files(Path(config.output_dir))) if config.output_dir else None
    with template_date(today()):
        evaluation = evaluate(config)
    if folder is not None:
        write_files(evaluation, folder)
    print_table(evaluation)
    if folder is not None:
        say(f"evaluation: {folder}")
    return folder
