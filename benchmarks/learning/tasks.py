"""What the learning table is made of: each task is a command, a metric of its run, and the bars it is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.learning.data import JOY, LABELLED, MODELS, POLITENESS, SST2_HELDOUT, SST2_TRAIN, STORIES

Rows = Sequence[Mapping[str, float]]  # a run's metrics.jsonl
Value = Callable[[Rows, Rows], float]  # of a run, and of the same seed's run that it is compared with

LLAMA = f"{MODELS}/TinyStories-656K"
SCORE, KL, VIOLATIONS = "eval_objective/scores", "eval_objective/kl", "eval_constraint/violation_rate"


@dataclass(frozen=True)
class Bar:
    """A number of a run that has to be at least, or at most, `limit`, for every seed."""

    name: str
    value: Value
    limit: float
    at_most: bool = False

    def met(self, found: Sequence[float]) -> bool:
        """Whether every seed's number is on the right side; none at all is not."""
        worst = self.worst(found)
        return worst is not None and (worst <= self.limit if self.at_most else worst >= self.limit)

    def worst(self, found: Sequence[float]) -> float | None:
        if not found or any(value != value for value in found):  # nan has no side
            return None
        return max(found) if self.at_most else min(found)


@dataclass(frozen=True)
class Task:
    """`arguments` are those of `onecard`, without the seed and the run folder, which each run has its own of."""

    name: str
    title: str
    model: str
    data: str
    arguments: tuple[str, ...]
    metric: str  # in the rows of evaluations; the first is before, the last after
    unit: str  # what the metric is, in words
    bars: tuple[Bar, ...]
    against: str = ""  # another task, for bars that compare
    note: str = ""
    most_seeds: int | None = None  # where a run takes longer than the others


def ends(rows: Rows, metric: str) -> tuple[float, float]:
    """A metric before training and after it; KeyError where there are not two evaluations with it."""
    found = [row[metric] for row in rows if metric in row]
    if len(found) < 2:
        raise KeyError(f"{metric} stands in {len(found)} rows, expected it before and after training")
    return found[0], found[-1]


def after(metric: str) -> Value:
    return lambda rows, other: ends(rows, metric)[1]


def more(metric: str, other_metric: str) -> Value:
    """By how much one metric is above another, after training."""
    return lambda rows, other: ends(rows, metric)[1] - ends(rows, other_metric)[1]


def drop(metric: str) -> Value:
    return lambda rows, other: ends(rows, metric)[0] - ends(rows, metric)[1]


def deviations(rows: Rows, other: Rows) -> float:
    """How far the mean score rose, in standard deviations of the starting policy's scores."""
    first, last = ends(rows, SCORE)
    return (last - first) / ends(rows, "eval_objective/scores_std")[0]


def ratio(metric: str) -> Value:
    """The metric after training over what it is after the run that is compared with."""
    return lambda rows, other: ends(rows, metric)[1] / ends(other, metric)[1]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ON_A_CPU = words(
    "--no_padding_free --save_steps 0"
)  # these texts are short: packed, each would be an attention call of its own

SFT = Task(
    "sft",
    "SFT of all weights",
    "TinyStories-656K",
    "tinystories",
    words(f"sft --model {LLAMA} --dataset {STORIES} --test_size 0.2 --no_use_peft --learning_rate 3e-4")
    + words("--num_train_epochs 3 --eval_steps 10")
    + ON_A_CPU,
    "eval_loss",
    "held-out loss, nats per token",
    (Bar("drop of the loss", drop("eval_loss"), 0.15),),
)

PAIRS = Task(
    "reward-pairs",
    "reward adapter from pairs",
    "TinyStories-656K",
    "politeness",
    words(f"reward --model {LLAMA} --dataset {POLITENESS} --test_size 200 --learning_rate 2e-3")
    + words("--num_train_epochs 3 --per_device_train_batch_size 32 --eval_steps 28")
    + ON_A_CPU,
    "eval_accuracy",
    "held-out pairs in the right order",
    (Bar("pairs in the right order", after("eval_accuracy"), 0.8),),
)

SENTIMENT = Task(
    "reward-scores",
    "reward adapter from scores",
    "TinyStories-656K",
    "SST-2",
    words(f"reward --model {LLAMA} --dataset {SST2_TRAIN} --eval_dataset {SST2_HELDOUT} --score_activation sigmoid")
    + words("--learning_rate 2e-3 --num_train_epochs 2 --per_device_train_batch_size 32 --eval_steps 108")
    + words("--per_device_eval_batch_size 64")
    + ON_A_CPU,
    "eval_accuracy",
    "share of (positive, negative) held-out sentences in the right order",
    (
        Bar("in the right order", after("eval_accuracy"), 0.7),
        Bar("correlation with the labels", after("eval_pearson"), 0.35),
        Bar("accuracy over the majority class's", more("eval_label_accuracy", "eval_majority_class"), 0.1),
    ),
    note="A score that is the same for all sentences, the majority's label say, orders none of them; chance is 0.5. "
    "One seed, for a run takes two minutes.",
    most_seeds=1,
)

JOYFUL = words(f"ppo --model {LLAMA} --dataset {JOY} --test_size 128 --response_length 48 --eval_steps 4")
JOYFUL += words("--per_device_train_batch_size 16 --reward_funcs docs/examples/joy.py:joy")

ESTIMATORS: dict[str, tuple[str, str]] = {
    "gae": ("PPO (GAE, a critic)", "--learning_rate 1.5e-3 --max_steps 12"),
    "rloo": ("RLOO", "--num_generations 4 --learning_rate 1.5e-3 --max_steps 12"),
    "grpo": ("GRPO", "--num_generations 4 --learning_rate 1.5e-3 --max_steps 12"),
    "reinforce": ("REINFORCE", "--learning_rate 3e-3 --max_steps 24 --kl_coef 0.2"),
    "a2c": ("A2C", "--learning_rate 3e-3 --max_steps 24 --kl_coef 0.2"),
}


def towards_joy(estimator: str) -> Task:
    title, settings = ESTIMATORS[estimator]
    return Task(
        f"ppo-{estimator}",
        f"{title} towards words of joy",
        "TinyStories-656K",
        "beginnings of tinystories",
        JOYFUL + words(f"--advantage_estimator {estimator} {settings}") + ON_A_CPU,
        SCORE,
        "words of joy in an answer",
        (Bar("standard deviations gained", deviations, 1.5), Bar("nats of KL per answer", after(KL), 25, at_most=True)),
    )


def fewer(share: float) -> tuple[Bar, ...]:
    """Bars of a constrained run, which has to learn what it is paid for too."""
    return (
        Bar("violations, as a share of those without constraint", ratio(VIOLATIONS), share, at_most=True),
        Bar("standard deviations gained", deviations, 0.5),
    )


# Words of joy are paid, one of them is forbidden: without a constraint it is among those that become frequent.
CONSTRAINTS: dict[str, tuple[str, str, tuple[Bar, ...]]] = {
    "counted": (
        "PPO, a constraint only counted",
        "--constraint_mode lagrangian --constraint_lambda 0 --constraint_lambda_lr 0",
        (Bar("standard deviations gained", deviations, 1.5),),
    ),
    "skip": ("constrained PPO, skip", "--constraint_mode skip", fewer(0.75)),
    "lagrangian": (
        "constrained PPO, lagrangian",
        "--constraint_mode lagrangian --constraint_lambda 2 --constraint_lambda_lr 0.5",
        fewer(0.5),
    ),
}


def constrained(kind: str) -> Task:
    title, settings, bars = CONSTRAINTS[kind]
    return Task(
        f"constraint-{kind}",
        f"{title}: no 'happy'",
        "TinyStories-656K",
        "beginnings of tinystories",
        JOYFUL
        + words("--learning_rate 1.5e-3 --max_steps 12 --constraint_funcs regex:(?i)happ --constraint_threshold 0")
        + words(settings)
        + ON_A_CPU,
        VIOLATIONS,
        "answers with 'happ' in them",
        bars,
        against="" if kind == "counted" else "constraint-counted",
    )


PREFERENCES: dict[str, tuple[str, str, str]] = {
    "sigmoid": ("DPO", POLITENESS, "--learning_rate 1e-3"),
    "ipo": ("IPO", POLITENESS, "--loss_type ipo --beta 1 --learning_rate 1e-3"),
    "simpo": ("SimPO", POLITENESS, "--loss_type simpo --beta 2 --simpo_gamma 1 --learning_rate 2e-3"),
    "kto": ("KTO", LABELLED, "--loss_type kto --learning_rate 1e-3"),
}


def preferred(loss: str) -> Task:
    """KTO has no pairs to count, so it is judged by the difference of the two kinds' mean rewards."""
    title, data, settings = PREFERENCES[loss]
    pairs = loss != "kto"
    metric = "eval_rewards/accuracies" if pairs else "eval_rewards/margins"
    note = "Before the first step the policy is the reference: no answer is ahead, and 0 is what is logged."
    return Task(
        f"dpo-{loss}",
        title,
        "TinyStories-656K",
        "politeness" if pairs else "politeness, every second answer",
        words(f"dpo --model {LLAMA} --dataset {data} --test_size 200 --num_train_epochs 2 --eval_steps 28")
        + words(f"--per_device_train_batch_size 16 --per_device_eval_batch_size 32 {settings}")
        + ON_A_CPU,
        metric,
        "held-out pairs in the right order" if pairs else "mean reward of good less bad held-out answers",
        (Bar("pairs in the right order", after(metric), 0.75) if pairs else Bar("margin", after(metric), 0.5),),
        note="" if loss == "simpo" else note,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SFT,
        PAIRS,
        SENTIMENT,
        *map(towards_joy, ESTIMATORS),
        *map(constrained, CONSTRAINTS),
        *map(preferred, PREFERENCES),
    )
}
