"""Settings of `onecard dpo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onecard.config.base import PolicyTrainConfig, ReferenceConfig, TrainConfig, option, raise_first
from onecard.utils.errors import OnecardError, did_you_mean

# Loss that cannot be summed with others -> keyword of its kernel -> setting that gives the value
UNSUMMABLE: dict[str, dict[str, str]] = {
    "simpo": {"beta": "beta", "label_smoothing": "label_smoothing", "gamma": "simpo_gamma"},
    "orpo": {"beta": "beta"},
    "cpo": {"beta": "beta", "label_smoothing": "label_smoothing", "cpo_alpha": "cpo_alpha"},
    "kto": {name: name for name in ("beta", "desirable_weight", "undesirable_weight")},
    "apo_zero_unpaired": {name: name for name in ("beta", "desirable_weight", "undesirable_weight")},
}
LABELLED = ("kto", "apo_zero_unpaired")  # losses on labelled responses; all others are losses on pairs
REFERENCE_SETTINGS = ("ref_adapter", "precompute_ref_log_probs")
# The same for all losses that can be summed: keyword of `dpo_loss` -> setting
SUMMABLE = {
    name: name
    for name in (
        "beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
        "discopop_tau",
    )
}  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ReferenceConfig, PolicyTrainConfig):
    """DPO and its family from `prompt`, `chosen`, `rejected` rows; KTO from `prompt`, `completion`, `label` rows."""

    INPUTS: ClassVar[tuple[str, ...]] = (*TrainConfig.INPUTS, "ref_adapter")

    learning_rate: float = option(5e-5, "Peak learning rate.", least=0)
    beta: float = option(
        0.1,
        "A larger beta keeps the policy closer to the reference. In simpo and cpo it scales the log-probs, in orpo "
        "it is the weight of the odds ratio.",
        least=0,
    )
    loss_type: list[str] = option(
        ["sigmoid"], "sigmoid, ipo, hinge, discopop, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, "
        "aot_unpaired, apo_zero, apo_down, sigmoid_norm or sft; may be given several times: the losses are "
        "summed, weighted by loss_weights. Without a reference: simpo, orpo, cpo. From labelled answers: kto, "
        "apo_zero_unpaired. These five cannot be summed.",
    )  # fmt: skip
    loss_weights: list[float] = option([], "One weight for each loss_type; empty: 1 each.")
    label_smoothing: float = option(
        0.0, "Probability that a label is flipped, 0 to 0.5; used by sigmoid (cDPO), sigmoid_norm, aot, aot_unpaired, "
        "simpo, cpo, robust (below 0.5) and exo_pair (above 0).", least=0,
    )  # fmt: skip
    f_divergence_type: Divergence = option(
        "reverse_kl", "Divergence to the reference, for losses of the difference between the two answers."
    )
    f_alpha_divergence_coef: float = option(0.5, "alpha of f_divergence_type alpha_divergence.")
    discopop_tau: float = option(0.05, "Temperature of the blend of logistic and exponential loss in discopop.")
    use_weighting: bool = option(False, "Weight each pair by how likely its answers are under the policy (WPO).")
    simpo_gamma: float = option(0.5, "Target margin of simpo.")
    cpo_alpha: float = option(1.0, "Weight of the likelihood of the chosen answer in cpo.", least=0)
    desirable_weight: float = option(1.0, "Weight of the desirable answers in kto and apo_zero_unpaired.", least=0)
    undesirable_weight: float = option(1.0, "Weight of the undesirable answers in kto and apo_zero_unpaired.", least=0)
    share_prompts: bool = option(True, "Run a prompt once for its answers: equal up to rounding. Needs padding_free.")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probs once, before training, and keep them on disk for other runs."
    )

    def validate(self) -> None:
        super().validate()
        check_names(self.loss_type)
        first, defaults = self.loss_type[0], DPOConfig()
        for name in sorted(LOSS_SETTINGS - settings_of(first)):
            value = getattr(self, name)
            if value != getattr(defaults, name):
                raise OnecardError(f"{name}: {value!r} is not used by loss_type {first}; leave it out.")
        check_whole_batch(self)


def settings_of(loss_type: str) -> set[str]:
    """The settings of `LOSS_SETTINGS` that a loss uses."""
    used = {*UNSUMMABLE.get(loss_type, SUMMABLE).values()} - {"loss_type"}
    if loss_type not in UNSUMMABLE:
        used |= {"use_weighting"}
    return used | {*REFERENCE_SETTINGS} if loss_type in LABELLED or loss_type not in UNSUMMABLE else used


# The settings that losses use; `settings_of` has those of one loss
LOSS_SETTINGS = set.union(*map(settings_of, (*UNSUMMABLE, "sigmoid")))


def check_names(names: list[str]) -> None:
    """Raise for unknown losses, and for sums with a loss that cannot be summed."""
    from onecard_kernels.dpo.losses import LOSSES

    known = (*LOSSES, *UNSUMMABLE)
    if not names:
        raise OnecardError("loss_type: empty, expected a loss such as sigmoid.")
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f" Expected one of {', '.join(known)}."
            raise OnecardError(f"loss_type: no loss is called '{name}'.{hint}")
    unsummable = [name for name in names if name in UNSUMMABLE]
    if unsummable and len(names) > 1:
        raise OnecardError(f"loss_type: {unsummable[0]} cannot be summed with others, but {names} were given.")


def check_whole_batch(config: DPOConfig) -> None:
    """Raise if a loss sorts the whole batch, and the batch would be split or its pairs weighted."""
    from onecard_kernels.dpo import WHOLE_BATCH

    sorting = sorted(WHOLE_BATCH.intersection(config.loss_type))
    if not sorting:
        return
    raise_first({
        f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, expected 1 with loss_type {sorting[0]}, "
        "which sorts the whole batch; raise per_device_train_batch_size instead.": (
            config.gradient_accumulation_steps > 1
        ),
        f"micro_batch_tokens is {config.micro_batch_tokens}, expected 0 with loss_type {sorting[0]}, which sorts the "
        "whole batch.": config.micro_batch_tokens > 0,
        f"use_weighting: loss_type {sorting[0]} sorts the whole batch, so no term of it is one pair's; leave it out.": (
            config.use_weighting
        ),
    })  # fmt: skip
