"""Bad input is refused before any work, with the argument's name, what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import onecard_kernels
from onecard_kernels import (
    checks,
    dispatch,
    dpo_loss,
    gae,
    group_advantages,
    linear_dpo_loss,
    linear_kl,
    linear_logprobs,
    linear_ppo_loss,
    logits_ppo_loss,
    masked_whiten,
    ppo_loss,
    selective_log_softmax,
    sequence_sums,
    token_kl,
    value_loss,
)

N, D, V = 4, 8, 31
NAN = float("nan")


def filled(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.float32)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of another device, wherever the tests run."""
    return torch.zeros(shape, dtype=dtype, device="meta")


TOKENS = {"old_logprobs": filled(-2, N), "advantages": filled(1, N), "mask": filled(1, N)}

GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    linear_logprobs: {"hidden": filled(1, N, D), "weight": filled(1, V, D), "targets": torch.arange(N)},
    selective_log_softmax: {"logits": filled(1, N, V), "targets": torch.arange(N)},
    linear_kl: {"hidden": filled(1, N, D), "ref_hidden": filled(2, N, D), "weight": filled(1, V, D)},
    token_kl: {"logprobs": filled(-1, N), "ref_logprobs": filled(-1, N)},
    dpo_loss: {
        "chosen_logps": filled(-1, N),
        "rejected_logps": filled(-2, N),
        "ref_chosen_logps": filled(-1, N),
        "ref_rejected_logps": filled(-1, N),
    },
    linear_dpo_loss: {
        "hidden": filled(1, N, D),
        "weight": filled(1, V, D),
        "targets": torch.arange(N),
        "sequence_ids": torch.tensor([0, 0, 1, -1]),
        "ref_logps": filled(-1, 2),
    },
    sequence_sums: {"values": filled(1, N), "sequence_ids": torch.tensor([0, 0, 1, -1]), "num_sequences": 2},
    ppo_loss: {"logprobs": filled(-1, N), **TOKENS},
    logits_ppo_loss: {"logits": filled(1, N, V), "targets": torch.arange(N), **TOKENS},
    linear_ppo_loss: {"hidden": filled(1, N, D), "weight": filled(1, V, D), "targets": torch.arange(N), **TOKENS},
    value_loss: {
        "values": filled(1, N),
        "old_values": filled(2, N),
        "returns": filled(3, N),
        "mask": filled(1, N),
    },
    gae: {"rewards": filled(1, 2, N), "values": filled(1, 2, N), "mask": filled(1, 2, N)},
    group_advantages: {"scores": filled(1, N), "group_size": 2},
    masked_whiten: {"x": filled(1, N), "mask": filled(1, N)},
}

# function, what is wrong, error, words of its message: the argument first, then what came, then what was expected
BAD: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], tuple[str, ...]]] = [
    (linear_logprobs, {"hidden": torch.ones(N, D).long()}, TypeError, ("hidden", "int64", "floating")),
    (linear_logprobs, {"hidden": [1.0]}, TypeError, ("hidden", "list", "tensor")),
    (linear_logprobs, {"hidden": filled(1, N, D + 1)}, ValueError, ("weight", "(31, 8)", "[V, 9]")),
    (linear_logprobs, {"weight": filled(1, D)}, ValueError, ("weight", "(8,)", "[V, D]")),
    (linear_logprobs, {"weight": meta(V, D)}, ValueError, ("weight", "meta", "cpu", "hidden")),
    (linear_logprobs, {"targets": torch.arange(N - 1)}, ValueError, ("targets", "(3,)", "(4,)")),
    (linear_logprobs, {"targets": torch.arange(N).view(N, 1)}, ValueError, ("targets", "(4, 1)", "(4,)")),
    (linear_logprobs, {"targets": filled(1, N)}, TypeError, ("targets", "float32", "integer")),
    (linear_logprobs, {"targets": torch.tensor([0, 1, 2, V])}, ValueError, ("targets", "31", "0 to 30")),
    (linear_logprobs, {"targets": torch.tensor([0, 1, 2, -100])}, ValueError, ("targets", "-100", "mask")),
    (linear_logprobs, {"targets": meta(N, dtype=torch.long)}, ValueError, ("targets", "meta", "cpu")),
    (linear_logprobs, {"mask": filled(1, N, 1)}, ValueError, ("mask", "(4, 1)", "(4,)")),
    (linear_logprobs, {"mask": torch.tensor([0, 1, 2, 1])}, ValueError, ("mask", "2", "0 and 1")),
    (linear_logprobs, {"mask": torch.ones(N, dtype=torch.complex64)}, TypeError, ("mask", "complex64", "bool")),
    (linear_logprobs, {"bias": filled(1, V, 1)}, ValueError, ("bias", "(31, 1)", "(31,)")),
    (linear_logprobs, {"bias": filled(float("-inf"), V)}, ValueError, ("bias", "inf", "finite", "forbidden")),
    (linear_logprobs, {"bias": torch.ones(V).int()}, TypeError, ("bias", "int32", "floating")),
    (linear_logprobs, {"forbidden": filled(0, V)}, TypeError, ("forbidden", "float32", "torch.bool")),
    (linear_logprobs, {"forbidden": filled(0, D).bool()}, ValueError, ("forbidden", "(8,)", "(31,)")),
    (linear_logprobs, {"forbidden": filled(1, V).bool()}, ValueError, ("forbidden", "31", "at least one")),
    (linear_logprobs, {"temperature": 0.0}, ValueError, ("temperature", "0.0", "above 0")),
    (linear_logprobs, {"temperature": -1.0}, ValueError, ("temperature", "-1.0", "above 0")),
    (linear_logprobs, {"temperature": NAN}, ValueError, ("temperature", "nan", "above 0")),
    (linear_logprobs, {"softcap": 0.0}, ValueError, ("softcap", "0.0", "above 0")),
    (linear_logprobs, {"logit_scale": float("inf")}, ValueError, ("logit_scale", "inf", "finite")),
    (linear_logprobs, {"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
    *(
        (function, wrong, kind, words)
        for function in (linear_kl, linear_ppo_loss, linear_dpo_loss)
        for wrong, kind, words in (
            ({"hidden": torch.ones(N, D).long()}, TypeError, ("hidden", "int64", "floating")),
            ({"hidden": [1.0]}, TypeError, ("hidden", "list", "tensor")),
            ({"weight": filled(1, D)}, ValueError, ("weight", "(8,)", "[V, D]")),
            ({"weight": torch.ones(V, D).int()}, TypeError, ("weight", "int32", "floating")),
            ({"weight": filled(1, V, D + 1)}, ValueError, ("weight", "(31, 9)", "[V, 8]")),
            ({"weight": meta(V, D)}, ValueError, ("weight", "meta", "cpu", "hidden")),
            ({"bias": filled(1, V, 1)}, ValueError, ("bias", "(31, 1)", "(31,)")),
            ({"bias": meta(V)}, ValueError, ("bias", "meta", "cpu")),
            ({"forbidden": filled(0, V)}, TypeError, ("forbidden", "float32", "torch.bool")),
            ({"forbidden": filled(1, V).bool()}, ValueError, ("forbidden", "31", "at least one")),
            ({"forbidden": meta(V, dtype=torch.bool)}, ValueError, ("forbidden", "meta", "cpu")),
            ({"temperature": 0.0}, ValueError, ("temperature", "0.0", "above 0")),
            ({"temperature": "hot"}, ValueError, ("temperature", "'hot'", "above 0")),
            ({"temperature": True}, ValueError, ("temperature", "True", "above 0")),
            ({"logit_scale": NAN}, ValueError, ("logit_scale", "nan", "finite")),
            ({"softcap": 0.0}, ValueError, ("softcap", "0.0", "above 0")),
            ({"softcap": "5"}, ValueError, ("softcap", "'5'", "above 0")),
            ({"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
            ({"backend": None}, ValueError, ("backend", "None", "'auto', 'triton', 'torch'")),
        )
    ),
    (linear_kl, {"ref_hidden": filled(1, N + 1, D)}, ValueError, ("ref_hidden", "(5, 8)", "(4, 8)")),
    (linear_kl, {"ref_hidden": torch.ones(N, D).int()}, TypeError, ("ref_hidden", "int32", "floating")),
    (linear_kl, {"ref_hidden": None}, ValueError, ("ref_hidden", "None", "tensor")),
    (linear_kl, {"ref_hidden": meta(N, D)}, ValueError, ("ref_hidden", "meta", "cpu")),
    (linear_kl, {"ref_hidden": filled(1, N, D + 1)}, ValueError, ("weight", "(31, 8)", "[V, 9]", "ref_hidden")),
    (linear_kl, {"ref_bias": filled(NAN, V)}, ValueError, ("ref_bias", "inf or NaN", "finite")),
    (linear_kl, {"ref_weight": meta(V, D)}, ValueError, ("ref_weight", "meta", "cpu")),
    (linear_kl, {"ref_weight": filled(1, V + 1, D)}, ValueError, ("ref_weight", "(32, 8)", "31 rows")),
    (linear_kl, {"ref_weight": torch.ones(V, D).int()}, TypeError, ("ref_weight", "int32", "floating")),
    (linear_kl, {"ref_bias": torch.ones(V).int()}, TypeError, ("ref_bias", "int32", "floating")),
    (linear_kl, {"ref_bias": filled(1, D)}, ValueError, ("ref_bias", "(8,)", "(31,)")),
    (linear_kl, {"ref_bias": meta(V)}, ValueError, ("ref_bias", "meta", "cpu")),
    (linear_kl, {"mask": filled(1, N, 1)}, ValueError, ("mask", "(4, 1)", "(4,)", "hidden")),
    (linear_kl, {"mask": filled(2, N)}, ValueError, ("mask", "2.0", "0 and 1")),
    (linear_kl, {"mask": meta(N)}, ValueError, ("mask", "meta", "cpu")),
    (linear_kl, {"hidden": filled(1)}, ValueError, ("hidden", "()", "[..., D]")),
    *(
        (function, wrong, kind, words)
        for function in (selective_log_softmax, logits_ppo_loss)
        for wrong, kind, words in (
            ({"logits": [1.0]}, TypeError, ("logits", "list", "tensor")),
            ({"logits": torch.ones(N, V).long()}, TypeError, ("logits", "int64", "floating")),
            ({"targets": torch.arange(N) + V}, ValueError, ("targets", "31", "0 to 30")),
            ({"targets": torch.tensor([0, 1, 2, -1])}, ValueError, ("targets", "-1", "0 to 30")),
            ({"temperature": -0.5}, ValueError, ("temperature", "-0.5", "above 0")),
            ({"temperature": "1"}, ValueError, ("temperature", "'1'", "above 0")),
            ({"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
        )
    ),
    (selective_log_softmax, {"targets": meta(N, dtype=torch.long)}, ValueError, ("targets", "meta", "cpu")),
    (selective_log_softmax, {"mask": meta(N)}, ValueError, ("mask", "meta", "cpu")),
    (logits_ppo_loss, {"logits": meta(N, V)}, ValueError, ("targets", "cpu", "meta")),
    (linear_ppo_loss, {"hidden": meta(N, D)}, ValueError, ("weight", "cpu", "meta")),
    (linear_ppo_loss, {"targets": torch.arange(N - 1)}, ValueError, ("", "(4,)", "(3,)")),
    (linear_dpo_loss, {"targets": torch.arange(N) + V}, ValueError, ("targets", "31", "0 to 30")),
    (linear_dpo_loss, {"targets": filled(1, N)}, TypeError, ("targets", "float32", "integer")),
    (linear_logprobs, {"hidden": filled(1)}, ValueError, ("hidden", "()", "[..., D]")),
    (linear_logprobs, {"mask": meta(N)}, ValueError, ("mask", "meta", "cpu")),
    (linear_logprobs, {"temperature": "1"}, ValueError, ("temperature", "'1'", "above 0")),
    (linear_logprobs, {"softcap": True}, ValueError, ("softcap", "True", "above 0")),
    (token_kl, {"ref_logprobs": meta(N)}, ValueError, ("ref_logprobs", "meta", "cpu")),
    (token_kl, {"logprobs": None}, ValueError, ("logprobs", "None", "tensor")),
    (value_loss, {"clip": "0.2"}, ValueError, ("clip", "'0.2'", "above 0")),
    (value_loss, {"mask": meta(N)}, ValueError, ("mask", "meta", "cpu")),
    (gae, {"values": meta(2, N)}, ValueError, ("values", "meta", "cpu")),
    (gae, {"mask": meta(2, N)}, ValueError, ("mask", "meta", "cpu")),
    (gae, {"gamma": NAN}, ValueError, ("gamma", "nan", "0 to 1")),
    (gae, {"lam": "0.9"}, ValueError, ("lam", "'0.9'", "0 to 1")),
    (masked_whiten, {"mask": meta(N)}, ValueError, ("mask", "meta", "cpu")),
    (masked_whiten, {"eps": "1"}, ValueError, ("eps", "'1'", "above 0")),
    (sequence_sums, {"sequence_ids": meta(N, dtype=torch.long)}, ValueError, ("sequence_ids", "meta", "cpu")),
    (selective_log_softmax, {"logits": torch.ones(N, V).int()}, TypeError, ("logits", "int32", "floating")),
    (selective_log_softmax, {"logits": filled(1, N, 0)}, ValueError, ("logits", "(4, 0)", "[..., V]")),
    (selective_log_softmax, {"targets": torch.arange(N + 1)}, ValueError, ("targets", "(5,)", "(4,)")),
    (selective_log_softmax, {"targets": torch.arange(N) + V}, ValueError, ("targets", "31", "0 to 30")),
    (selective_log_softmax, {"mask": filled(1, 1)}, ValueError, ("mask", "(1,)", "(4,)")),
    (selective_log_softmax, {"temperature": 0}, ValueError, ("temperature", "0", "above 0")),
    (
        selective_log_softmax,
        {"logits": torch.ones(1, V).expand(N, V), "inplace_backward": True},
        ValueError,
        ("logits", "expanded", "memory of its own"),
    ),
    (token_kl, {"estimator": "k4"}, ValueError, ("estimator", "'k4'", "'k1', 'k2', 'k3'")),
    (token_kl, {"ref_logprobs": filled(-1, N, 1)}, ValueError, ("ref_logprobs", "(4, 1)", "(4,)")),
    (token_kl, {"ref_logprobs": filled(NAN, N)}, ValueError, ("ref_logprobs", "4 NaN", "none")),
    (token_kl, {"logprobs": torch.ones(N).int()}, TypeError, ("logprobs", "int32", "floating")),
    (dpo_loss, {"chosen_logps": filled(-1, N, 1)}, ValueError, ("chosen_logps", "(4, 1)", "[B]")),
    (dpo_loss, {"ref_rejected_logps": filled(-1, 1)}, ValueError, ("ref_rejected_logps", "(1,)", "(4,)")),
    (dpo_loss, {"rejected_logps": filled(NAN, N)}, ValueError, ("rejected_logps", "4 NaN", "none")),
    (dpo_loss, {"rejected_logps": meta(N)}, ValueError, ("rejected_logps", "meta", "cpu")),
    (dpo_loss, {"beta": 0.0}, ValueError, ("beta", "0.0", "above 0")),
    (dpo_loss, {"loss_type": "sigmod"}, ValueError, ("loss_type", "'sigmod'", "'sigmoid', 'ipo', 'hinge', 'discopop'")),
    (dpo_loss, {"loss_type": []}, ValueError, ("loss_type", "empty", "'sigmoid'")),
    (dpo_loss, {"loss_type": ["ipo", "hinge"], "loss_weights": [1.0]}, ValueError, ("loss_weights", "(1.0,)", "2")),
    (dpo_loss, {"loss_weights": [NAN]}, ValueError, ("loss_weights", "nan", "finite")),
    (dpo_loss, {"label_smoothing": 0.6}, ValueError, ("label_smoothing", "0.6", "0 to 0.5")),
    (dpo_loss, {"f_divergence_type": "kl"}, ValueError, ("f_divergence_type", "'kl'", "'reverse_kl', 'forward_kl'")),
    (dpo_loss, {"f_alpha_divergence_coef": NAN}, ValueError, ("f_alpha_divergence_coef", "nan", "finite")),
    (dpo_loss, {"discopop_tau": 0.0}, ValueError, ("discopop_tau", "0.0", "above 0")),
    (dpo_loss, {"chosen_lengths": torch.ones(N)}, ValueError, ("rejected_lengths", "None", "both")),
    (
        dpo_loss,
        {"chosen_lengths": torch.ones(N), "rejected_lengths": torch.ones(1)},
        ValueError,
        ("rejected_lengths", "(1,)", "(4,)"),
    ),
    (dpo_loss, {"weights": filled(1, 1)}, ValueError, ("weights", "(1,)", "(4,)")),
    (dpo_loss, {"weights": filled(NAN, N)}, ValueError, ("weights", "NaN", "none")),
    (dpo_loss, {"normalizer": 0}, ValueError, ("normalizer", "0", "above 0")),
    (dpo_loss, {"normalizer": filled(1, N)}, ValueError, ("normalizer", "(4,)", "()")),
    (linear_dpo_loss, {"ref_logps": filled(-1, 3)}, ValueError, ("ref_logps", "(3,)", "[2B]")),
    (linear_dpo_loss, {"ref_logps": filled(NAN, 2)}, ValueError, ("ref_logps", "2 NaN", "none")),
    (linear_dpo_loss, {"sequence_ids": torch.tensor([0, 0, 1, 2])}, ValueError, ("sequence_ids", "2", "0 to 1")),
    (linear_dpo_loss, {"sequence_ids": torch.tensor([0, 0, 1, -2])}, ValueError, ("sequence_ids", "-2", "-1")),
    (linear_dpo_loss, {"sequence_ids": torch.zeros(1).long()}, ValueError, ("sequence_ids", "(1,)", "(4,)")),
    (linear_dpo_loss, {"sequence_ids": torch.zeros(N)}, TypeError, ("sequence_ids", "float32", "integer")),
    (linear_dpo_loss, {"softcap": -1.0}, ValueError, ("softcap", "-1.0", "above 0")),
    (linear_dpo_loss, {"loss_type": "dpo"}, ValueError, ("loss_type", "'dpo'", "'sigmoid'")),
    (sequence_sums, {"num_sequences": 2.0}, ValueError, ("num_sequences", "2.0", "integer")),
    (sequence_sums, {"values": torch.ones(N).int()}, TypeError, ("values", "int32", "floating")),
    (dpo_loss, {"normalizer": torch.tensor(0.0)}, ValueError, ("normalizer", "0.0", "above 0")),
    (ppo_loss, {"logprobs": torch.ones(N).int()}, TypeError, ("logprobs", "int32", "floating")),
    (ppo_loss, {"logprobs": filled(NAN, N)}, ValueError, ("logprobs", "4 NaN", "none wherever mask is 1")),
    (ppo_loss, {"entropy": filled(1, 1)}, ValueError, ("entropy", "(1,)", "(4,)")),
    (ppo_loss, {"entropy": filled(NAN, N)}, ValueError, ("entropy", "4 NaN", "none")),
    (ppo_loss, {"entropy_coef": 0.1}, ValueError, ("entropy", "None", "tensor", "entropy_coef is 0.1")),
    (ppo_loss, {"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
    *(
        (function, wrong, kind, words)
        for function in (ppo_loss, logits_ppo_loss, linear_ppo_loss)
        for wrong, kind, words in (
            ({"old_logprobs": filled(-1, 1)}, ValueError, ("old_logprobs", "(1,)", "(4,)")),
            ({"old_logprobs": meta(N)}, ValueError, ("old_logprobs", "meta", "cpu")),
            ({"old_logprobs": filled(NAN, N)}, ValueError, ("old_logprobs", "4 NaN", "none")),
            ({"advantages": filled(1, N, 1)}, ValueError, ("advantages", "(4, 1)", "(4,)")),
            ({"advantages": torch.ones(N).long()}, TypeError, ("advantages", "int64", "floating")),
            ({"advantages": filled(NAN, N)}, ValueError, ("advantages", "4 NaN", "none wherever mask is 1")),
            ({"mask": filled(1, N, 1)}, ValueError, ("mask", "(4, 1)", "(4,)")),
            ({"mask": filled(0.5, N)}, ValueError, ("mask", "0.5", "0 and 1")),
            ({"mask": None}, ValueError, ("mask", "None", "tensor")),
            ({"ref_logprobs": filled(-1, 1)}, ValueError, ("ref_logprobs", "(1,)", "(4,)")),
            ({"ref_logprobs": filled(NAN, N)}, ValueError, ("ref_logprobs", "4 NaN", "none")),
            ({"kl_coef": 0.1}, ValueError, ("ref_logprobs", "None", "tensor", "kl_coef is 0.1")),
            ({"weights": filled(1, 1)}, ValueError, ("weights", "(1,)", "(4,)")),
            ({"weights": filled(NAN, N)}, ValueError, ("weights", "4 NaN", "none")),
            ({"clip_low": 1.5}, ValueError, ("clip_low", "1.5", "0 to 1")),
            ({"clip_low": -0.1}, ValueError, ("clip_low", "-0.1", "0 to 1")),
            ({"clip_high": -0.1}, ValueError, ("clip_high", "-0.1", "0 or more")),
            ({"clip_high": NAN}, ValueError, ("clip_high", "nan", "0 or more")),
            ({"clip_high": float("inf")}, ValueError, ("clip_high", "inf", "finite")),
            ({"dual_clip": 1.0}, ValueError, ("dual_clip", "1.0", "above 1")),
            ({"dual_clip": float("inf")}, ValueError, ("dual_clip", "inf", "above 1")),
            ({"entropy_coef": NAN}, ValueError, ("entropy_coef", "nan", "finite")),
            ({"kl_coef": "0.1"}, ValueError, ("kl_coef", "'0.1'", "finite")),
            ({"kl_estimator": "k4"}, ValueError, ("kl_estimator", "'k4'", "'k1', 'k2', 'k3'")),
            ({"normalizer": 0}, ValueError, ("normalizer", "0", "above 0")),
            ({"normalizer": torch.tensor(0)}, ValueError, ("normalizer", "0", "above 0")),
            ({"normalizer": filled(1, N)}, ValueError, ("normalizer", "(4,)", "()")),
        )
    ),
    (logits_ppo_loss, {"logits": filled(1, N, 0)}, ValueError, ("logits", "(4, 0)", "[..., V]")),
    (logits_ppo_loss, {"targets": filled(1, N)}, TypeError, ("targets", "float32", "integer")),
    (logits_ppo_loss, {"temperature": 0.0}, ValueError, ("temperature", "0.0", "above 0")),
    (logits_ppo_loss, {"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
    (linear_ppo_loss, {"targets": torch.arange(N) + V}, ValueError, ("targets", "31", "0 to 30")),
    (linear_ppo_loss, {"weight": filled(1, D)}, ValueError, ("weight", "(8,)", "[V, D]")),
    (linear_ppo_loss, {"softcap": -1.0}, ValueError, ("softcap", "-1.0", "above 0")),
    (linear_ppo_loss, {"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
    (value_loss, {"values": torch.ones(N).int()}, TypeError, ("values", "int32", "floating")),
    (value_loss, {"values": filled(NAN, N)}, ValueError, ("values", "4 NaN", "none wherever mask is 1")),
    (value_loss, {"old_values": filled(1, 1)}, ValueError, ("old_values", "(1,)", "(4,)")),
    (value_loss, {"old_values": None, "clip": 0.3}, ValueError, ("old_values", "None", "because clip is 0.3")),
    (value_loss, {"returns": filled(NAN, N)}, ValueError, ("returns", "4 NaN", "none")),
    (value_loss, {"returns": meta(N)}, ValueError, ("returns", "meta", "cpu")),
    (value_loss, {"mask": filled(1, 1)}, ValueError, ("mask", "(1,)", "(4,)")),
    (value_loss, {"mask": None}, ValueError, ("mask", "None", "tensor")),
    (value_loss, {"weights": filled(1, N, 1)}, ValueError, ("weights", "(4, 1)", "(4,)")),
    (value_loss, {"clip": 0.0}, ValueError, ("clip", "0.0", "above 0")),
    (value_loss, {"normalizer": -1.0}, ValueError, ("normalizer", "-1.0", "above 0")),
    (value_loss, {"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
    (gae, {"rewards": torch.ones(2, N).int()}, TypeError, ("rewards", "int32", "floating")),
    (gae, {"rewards": filled(1, N)}, ValueError, ("rewards", "(4,)", "[B, T]")),
    (gae, {"rewards": filled(NAN, 2, N)}, ValueError, ("rewards", "8 NaN", "none wherever mask is 1")),
    (gae, {"values": filled(1, 2, N + 1)}, ValueError, ("values", "(2, 5)", "(2, 4)")),
    (gae, {"values": filled(NAN, 2, N)}, ValueError, ("values", "8 NaN", "none")),
    (gae, {"mask": filled(1, N)}, ValueError, ("mask", "(4,)", "(2, 4)")),
    (gae, {"mask": None}, ValueError, ("mask", "None", "tensor")),
    (gae, {"last_values": filled(1, N)}, ValueError, ("last_values", "(4,)", "(2,)")),
    (gae, {"last_values": filled(NAN, 2)}, ValueError, ("last_values", "2 NaN", "none")),
    (
        gae,
        {"last_values": torch.tensor([NAN, 1.0]), "mask": torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])},
        ValueError,
        ("last_values", "1 NaN", "none"),
    ),
    (gae, {"last_values": torch.ones(2).int()}, TypeError, ("last_values", "int32", "floating")),
    (gae, {"last_values": meta(2)}, ValueError, ("last_values", "meta", "cpu")),
    (gae, {"gamma": 1.1}, ValueError, ("gamma", "1.1", "0 to 1")),
    (gae, {"lam": -0.1}, ValueError, ("lam", "-0.1", "0 to 1")),
    (gae, {"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'auto', 'triton', 'torch'")),
    (group_advantages, {"scores": torch.ones(N).int()}, TypeError, ("scores", "int32", "floating")),
    (group_advantages, {"scores": filled(1, 2, 2)}, ValueError, ("scores", "(2, 2)", "[B]")),
    (group_advantages, {"scores": filled(NAN, N)}, ValueError, ("scores", "4 NaN", "none")),
    (group_advantages, {"group_size": 3}, ValueError, ("scores", "(4,)", "a multiple of 3")),
    (group_advantages, {"group_size": 1}, ValueError, ("group_size", "1", "2 or more", "'grpo'")),
    (group_advantages, {"group_size": 1, "kind": "rloo"}, ValueError, ("group_size", "1", "2 or more", "'rloo'")),
    (group_advantages, {"group_size": 0, "kind": "grpo_no_std"}, ValueError, ("group_size", "0", "1 or more")),
    (group_advantages, {"group_size": 2.0}, ValueError, ("group_size", "2.0", "integer")),
    (group_advantages, {"group_size": True, "kind": "grpo_no_std"}, ValueError, ("group_size", "True", "integer")),
    (group_advantages, {"kind": "gpro"}, ValueError, ("kind", "'gpro'", "'grpo', 'grpo_no_std', 'rloo'")),
    (group_advantages, {"eps": 0.0}, ValueError, ("eps", "0.0", "above 0")),
    (masked_whiten, {"x": torch.ones(N).int()}, TypeError, ("x", "int32", "floating")),
    (masked_whiten, {"x": filled(NAN, N)}, ValueError, ("x", "4 NaN", "none")),
    (masked_whiten, {"mask": filled(1, 1)}, ValueError, ("mask", "(1,)", "(4,)")),
    (masked_whiten, {"mask": None}, ValueError, ("mask", "None", "tensor")),
    (masked_whiten, {"eps": 0.0}, ValueError, ("eps", "0.0", "above 0")),
]


@pytest.mark.parametrize(("function", "wrong", "kind", "words"), BAD)
def test_bad_input(
    function: Callable[..., Any], wrong: dict[str, Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        function(**{**GOOD[function], **wrong})
    message = str(caught.value)
    assert message.startswith(words[0]), message
    assert re.search(".*".join(map(re.escape, words)), message), message


def test_every_public_function_has_cases() -> None:
    """Here, or among the preference losses' own. (Functions of models refuse in `test_language_head`.)"""
    from tests.kernels import test_preference_bad_input as preferences

    public = {getattr(onecard_kernels, name) for name in onecard_kernels.__all__}
    of_models = {getattr(onecard_kernels, name) for name in ("check_head", "find_logit_transform", "read_head")}
    functions = {value for value in public - of_models if not isinstance(value, type)}
    refused = {case[0] for case in [*BAD, *preferences.BAD]}
    assert functions - refused == set()
    assert functions - {*GOOD, *preferences.GOOD} == set()


@pytest.mark.parametrize("function", GOOD)
def test_the_same_without_the_fault_is_accepted(function: Callable[..., Any]) -> None:
    function(**GOOD[function])


@pytest.mark.parametrize(
    "function",
    [
        linear_logprobs,
        selective_log_softmax,
        linear_dpo_loss,
        linear_kl,
        ppo_loss,
        logits_ppo_loss,
        linear_ppo_loss,
        value_loss,
        gae,
    ],
)
def test_a_backend_that_is_not_there_says_what_is(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for available in dispatch.TABLE:
        monkeypatch.setitem(dispatch.TABLE, available, {"torch": dispatch.TABLE[available]["torch"]})
    with pytest.raises(ValueError, match=r"backend is 'triton', but .* has only: torch"):
        function(**GOOD[function], backend="triton")


def test_values_are_looked_at_on_cpu_and_elsewhere_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.delenv("ONECARD_CHECK", raising=False)
    assert checks.values_are_checked(torch.device("cpu"))
    assert not checks.values_are_checked(cuda)
    monkeypatch.setenv("ONECARD_CHECK", "1")
    assert checks.values_are_checked(cuda)
