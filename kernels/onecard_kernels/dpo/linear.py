"""linear_dpo_loss: preference losses from hidden states; sequence_sums: sums of token values per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..logprob import linear_logprobs
from ..records import Loss, result_dtype
from .dpo import check_options, dpo_loss
from .inputs import check_lengths, check_weights


def sequence_sums(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum per sequence: sums[i] = sum of values[t] over tokens with sequence_ids[t] = i. The same bits on every run.

    Args:
        values: `[...]`, floating.
        sequence_ids: `[...]`, integers from 0 to num_sequences - 1, or -1 for tokens that are in no sum, whose
            values may be anything (NaN too).
        num_sequences: number of sums; that of a sequence without tokens is 0.

    Returns:
        `[num_sequences]`, fp32 (fp64 in, fp64 out).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    checks.floating("values", values)
    num_sequences = checks.python_number(num_sequences)
    _check_ids(sequence_ids, num_sequences, "values", values)
    dtype = result_dtype(values.dtype)
    flat = values.reshape(-1).to(dtype)
    ids = sequence_ids.reshape(-1).long()
    # Tokens of no sequence go to one extra sum. Selecting the others would synchronize with the device.
    ids = torch.where(ids < 0, num_sequences, ids)
    sums = flat.new_zeros(num_sequences + 1)
    # On CPU index_add adds in order. On CUDA it adds atomically in any order, and index_put sorts first.
    sums = sums.index_add(0, ids, flat) if flat.device.type == "cpu" else sums.index_put((ids,), flat, accumulate=True)
    return sums[:num_sequences]


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    ref_logps: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
    chunk_tokens: int | None = None,
) -> Loss:
    """Preference loss of B pairs from hidden states: `dpo_loss` of the sums of `linear_logprobs`.

    logp_i = sum of log p(targets[t] | hidden[t]) over sequence_ids[t] = i;  chosen i = 0..B-1, its rejected i + B

    "Direct Preference Optimization", https://arxiv.org/abs/2305.18290; the other losses in `dpo_loss`.

    Args:
        hidden: `[..., D]`, `[2B, T, D]` or packed `[tokens, D]`.
        weight: `[V, D]`. Autocast acts on both as in `linear_logprobs`.
        targets: `[...]`, integer ids; `targets[t]` is the token that `hidden[t]` predicts. It may be anything
            (such as -100) where sequence_ids is -1.
        sequence_ids: `[...]`, integers: 0..B-1 for chosen, B..2B-1 for rejected, -1 for tokens outside of responses.
        ref_logps: `[2B]`, the reference's sums, chosen first; B is half its length.
        bias, temperature, logit_scale, softcap, forbidden: the head, see `linear_logprobs`.
        chosen_lengths, rejected_lengths: `[B]`; by default the counts of sequence_ids, so that ipo, sigmoid_norm and
            sft are per token as TRL's are.
        beta ... normalizer: see `dpo_loss`.
        backend: "auto", "triton" or "torch".
        chunk_tokens: see `linear_logprobs`.

    Returns:
        Loss, fp32 (fp64 in, fp64 out), with `dpo_loss`'s metrics.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    differentiable = {"hidden": hidden, "weight": weight, "bias": bias}
    checks.reverse_mode_only("linear_dpo_loss", **differentiable, ref_logps=ref_logps, weights=weights)
    numbers = (beta, label_smoothing, f_alpha_divergence_coef, discopop_tau)
    beta, label_smoothing, f_alpha_divergence_coef, discopop_tau = map(checks.python_number, numbers)
    check_options(
        loss_type,
        loss_weights,
        beta,
        label_smoothing,
        f_divergence_type,
        f_alpha_divergence_coef,
        discopop_tau,
        weights,
        normalizer,
    )
    checks.floating("ref_logps", ref_logps)
    if ref_logps.dim() != 1 or ref_logps.shape[0] % 2:
        raise ValueError(f"ref_logps has shape {tuple(ref_logps.shape)}, expected [2B], chosen first, rejected after")
    checks.integer("targets", targets)
    checks.device("ref_logps", ref_logps, "targets", targets)
    checks.no_nan("ref_logps", ref_logps)
    pairs = ref_logps.shape[0] // 2
    check_lengths(chosen_lengths, rejected_lengths, "half of ref_logps", ref_logps[:pairs])
    check_weights(weights, normalizer, "half of ref_logps", ref_logps[:pairs])
    _check_ids(sequence_ids, 2 * pairs, "targets", targets)

    logprobs = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        forbidden=forbidden,
        mask=sequence_ids >= 0,
        backend=backend,
        chunk_tokens=chunk_tokens,
    ).logprobs
    chosen, rejected = sequence_sums(logprobs, sequence_ids, 2 * pairs).split(pairs)
    ref_chosen, ref_rejected = ref_logps.split(pairs)
    if chosen_lengths is None and rejected_lengths is None:
        counts = sequence_sums(torch.ones_like(logprobs), sequence_ids, 2 * pairs)
        chosen_lengths, rejected_lengths = counts.split(pairs)
    return dpo_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=weights,
        normalizer=normalizer,
    )


def _check_ids(sequence_ids: Tensor, num_sequences: int, like_name: str, like: Tensor) -> None:
    if isinstance(num_sequences, bool) or not isinstance(num_sequences, int) or num_sequences < 0:
        raise ValueError(f"num_sequences is {num_sequences!r}, expected an integer of 0 or more")
    checks.integer("sequence_ids", sequence_ids)
    checks.shape("sequence_ids", sequence_ids, like.shape, f"the shape of {like_name}")
    checks.device("sequence_ids", sequence_ids, like_name, like)
    if checks.values_are_checked(sequence_ids.device):
        odd = sequence_ids[(sequence_ids < -1) | (sequence_ids >= num_sequences)]
        if odd.numel():
            raise ValueError(f"sequence_ids holds {odd[0].item()}, expected -1 or an id from 0 to {num_sequences - 1}")
