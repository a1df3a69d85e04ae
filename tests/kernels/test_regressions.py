"""One named test for each bug that other libraries have had, over every function and backend that it concerns.

Here those of numbers; of use, of size and of the linear functions alone in the files beside this one.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard_kernels import linear_ppo_loss, logits_ppo_loss, ppo_loss, token_kl
from tests.closeness import LOGPROB_TOLERANCES, assert_within
from tests.kernels.regression_material import EPS, SHAPE, Case, D, H, V
from tests.kernels.regression_running import (
    EVERY,
    WITH_TARGETS,
    WITH_VOCABULARY,
    assert_gradients,
    cases,
    compare,
    double,
    evaluate,
    over,
    poison_masked,
)

pytest.importorskip("triton", reason="triton is not installed")

NAMED = {
    "non-uniform grad_output over tokens": "test_a_gradient_that_differs_between_tokens",
    "p -> 0.999": "test_a_token_of_probability_near_one",
    "all-negative logits with V not a multiple of the block": "test_all_logits_negative_in_a_vocabulary_of_odd_size",
    "a target equal to V-1": "test_a_target_in_the_last_column",
    "V = 50257, 128256, 151936 columns": "test_vocabularies_of_real_models",
    "N*V > 2^31 (int64 offsets)": "test_offsets_beyond_two_to_the_31",
    "T > 65,535 rows in a grid dimension": "test_more_rows_than_a_grid_dimension_holds",
    "non-contiguous and transposed inputs": "test_inputs_of_any_strides",
    "zero valid tokens": "test_no_valid_token",
    "a fully masked row": "test_a_fully_masked_row",
    "forbidden tokens and their entropy": "test_forbidden_tokens_and_their_entropy",
    "retain_graph and a second backward": "test_a_second_backward_is_equal",
    "inplace_backward=True raises on the second": "test_a_second_backward_in_place_raises",
    "double use of the output": "test_an_output_used_twice",
    "a trained head": "test_a_trained_head",
    "a LoRA-wrapped head": "test_a_head_wrapped_in_lora",
    "tied embeddings": "test_tied_embeddings_get_the_sum_of_both_gradients",
    "autocast on": "test_autocast_rounds_operands_alone",
    "mixed dtypes": "test_mixed_dtypes",
    "Python-float scalars under torch.compile": "test_python_floats_under_compile",
    "deterministic twice-run equality": "test_two_runs_are_equal",
    "chunk-size invariance": "test_the_chunk_size_does_not_matter",
    "per-token (not per-sequence) advantages": "test_advantages_are_per_token",
    "log-ratios of +-200 finite in loss and gradient": "test_far_log_ratios_are_finite",
    "operators that overwrite one another": "test_operators_have_names_of_their_own",
}


def test_every_entry_of_the_list_has_its_test() -> None:
    files = Path(__file__).parent.glob("test_regressions*.py")
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert written >= set(NAMED.values())


@over([case for case in EVERY if case.leaves])
def test_a_gradient_that_differs_between_tokens(case: Case) -> None:
    """Each token's gradient is its own factor times what it is without one: no mean, no first element, no sum."""
    data = case.make()
    if case.name == "dpo_loss":
        factors = torch.tensor([0.0, 1e-3, 7.0, 2.0, 1.0, 900.0])
    else:
        factors = torch.tensor([[1.0, -2.0, 9.0], [5.0, 0.0, -1e3]])
    with case.tiles():
        if case.function.per_token:
            _, grads = compare(case, data, factors)
            _, plain = evaluate(case.call, data, case.leaves)
        else:
            factors = factors.abs()
            _, grads = compare(case, {**data, "weights": factors}, tolerance=1e-4 * float(factors.max()))
            _, plain = evaluate(case.call, {**data, "weights": torch.ones_like(factors)}, case.leaves)
    for name, grad in grads.items():
        expected = plain[name] * factors.view(*factors.shape, *(1,) * (grad.dim() - factors.dim()))
        # relative to each token's own: the largest factor's error would hide a wrong small one
        bound = 64 * EPS * expected.flatten(factors.dim() - 1 if grad.dim() == factors.dim() else factors.dim()).abs()
        scale = bound.amax(-1) if grad.dim() > factors.dim() else 64 * EPS * expected.abs()
        difference = (grad - expected).abs()
        assert bool((difference <= scale.view(*scale.shape, *(1,) * (grad.dim() - scale.dim()))).all()), name


def peaked(case: Case, away: float) -> dict[str, Any]:
    """Targets whose logit is `away` above the others; heads have orthogonal rows of length 4."""
    data = case.make(d=40)
    if "hidden" in data:
        rows = torch.linalg.qr(torch.randn(40, 40)).Q[:V] * 4
        data["weight"] = rows
        data["hidden"] = (rows[data["targets"]] * (away / 16)) + torch.randn(*SHAPE, 40) * 0.05
        logits = data["hidden"].double() @ rows.double().T
    else:
        data["logits"] = torch.randn(*SHAPE, V) * 0.2
        data["logits"].scatter_(-1, data["targets"].unsqueeze(-1), away)
        logits = data["logits"].double()
    if "old_logprobs" in data:
        logp = logits.log_softmax(-1).gather(-1, data["targets"].unsqueeze(-1)).squeeze(-1)
        data["old_logprobs"], data["advantages"] = logp.float(), torch.ones(SHAPE)
    return data


@pytest.mark.parametrize("away", [12.0, 17.0])
@over(WITH_TARGETS)
def test_a_token_of_probability_near_one(case: Case, away: float) -> None:
    """1 - p of 2e-4 and 1.5e-6, right relative to itself in the value and in the gradient at the true class."""
    data = peaked(case, away)
    with case.tiles():
        value, grads = compare(case, data)
    truth, true_grads = evaluate(case.function.equation, double(data), case.leaves)
    valid = data["mask"]
    if case.function.per_token:
        assert_within((value / truth)[valid], torch.ones(int(valid.sum())), 2e-5, "1 - p")
    for name, grad in grads.items():
        by_logits = [g @ data["weight"].to(g).T if name == "hidden" else g for g in (grad, true_grads[name])]
        mine, true = (x.gather(-1, data["targets"].unsqueeze(-1))[valid].double() for x in by_logits)
        assert_within(mine / true, torch.ones_like(true), 1e-4, "true class")


@pytest.mark.parametrize("v", [V, 131])
@over(WITH_VOCABULARY)
def test_all_logits_negative_in_a_vocabulary_of_odd_size(case: Case, v: int) -> None:
    """A padding column read as 0 would be the largest of all."""
    data = case.make(v=v)
    if "hidden" in data:
        data["hidden"], data["weight"] = torch.rand(*SHAPE, D) + 0.5, -torch.rand(v, D) * 10 - 5
        if "ref_hidden" in data:
            data["ref_hidden"] = data["hidden"] + 0.1 * torch.rand(*SHAPE, D)
    else:
        data["logits"] = -60.0 - 5 * torch.rand(*SHAPE, v)
    if "old_logprobs" in data:
        data["old_logprobs"] = torch.full(SHAPE, -4.0)
    with case.tiles():
        logits = data["logits"] if "logits" in data else data["hidden"] @ data["weight"].T
        assert float(logits.max()) < -10
        # logits as large as those of standard deviation 30, rounded accordingly; a loss has ratios of e^4 in it
        factor, slack = (1.0, 0.0) if case.function.per_token else (100.0, EPS * float(logits.abs().max()))
        compare(case, data, torch.randn(SHAPE), tolerance=factor * LOGPROB_TOLERANCES[torch.float32, 30], slack=slack)


@over(WITH_TARGETS)
def test_a_target_in_the_last_column(case: Case) -> None:
    data = case.make()
    data["targets"] = torch.full(SHAPE, V - 1)
    if "logits" in data:
        data["logits"][0, ..., V - 1] = 12.0
    else:
        data["weight"][V - 1] *= 3.0
    if "old_logprobs" in data:
        held = {n: data[n].double() for n in ("logits", "hidden", "weight") if n in data}
        logits = held["logits"] if "logits" in held else held["hidden"] @ held["weight"].T
        data["old_logprobs"] = (logits.log_softmax(-1)[..., -1] + 0.1 * torch.randn(SHAPE)).float()
    for columns in (20, 36):  # the last tile is a rest, or one column
        with case.tiles(columns=columns):
            compare(case, data, torch.randn(SHAPE))


@pytest.mark.parametrize("v", [50257, 128256, 151936])
@over(WITH_VOCABULARY)
def test_vocabularies_of_real_models(case: Case, v: int) -> None:
    if v == 128256 and case.backend == "triton" and case.implementation:
        pytest.skip("in the interpreter no other code than at 151936, and seconds of it")
    data = case.make((1, 2), D, v)
    if "targets" in data:
        data["targets"][0, 1] = v - 1
    if "old_logprobs" in data:
        data["old_logprobs"][0, 1] = -20.0
        data["advantages"][0, 1] = 1.0  # a large ratio, and clipped
    # An fp32 sum of v terms, each addition rounded at the size of a row of the head (times log p for the entropy).
    slack = v**0.5 * EPS * float(data["weight"].abs().max()) if "weight" in data else 0.0
    with case.tiles(columns=65536):
        compare(case, data, torch.tensor([[1.0, -0.5]]), slack=slack * (math.log(v) if case.name.endswith(H) else 1.0))


@over(WITH_VOCABULARY)
def test_forbidden_tokens_and_their_entropy(case: Case) -> None:
    """The result is that of the vocabulary without them."""
    if case.name == "linear_kl":
        head: dict[str, Any] = {}
    else:
        head = {"bias": torch.randn(V), "softcap": 6.0} if "linear" in case.name else {}
    forbidden = torch.zeros(V, dtype=torch.bool)
    forbidden[[0, 5, 18, 19, 20, V - 1]] = True  # 20 columns are a tile: some at its border, and at both ends
    renamed = torch.cumsum(~forbidden, 0) - 1
    data = case.make()
    if "targets" in data:
        allowed = (~forbidden).nonzero().squeeze(1)
        data["targets"] = allowed[torch.randint(len(allowed), SHAPE)]
    fewer = dict(data)
    if "targets" in data:
        fewer["targets"] = renamed[data["targets"]]
    if "logits" in data:
        fewer["logits"] = data["logits"][..., ~forbidden]
        data["logits"] = data["logits"].masked_fill(forbidden, float("-inf"))
        options: dict[str, Any] = {}
    else:
        fewer["weight"] = data["weight"][~forbidden]
        options = {**head, "forbidden": forbidden}
    if "old_logprobs" in data:
        data["old_logprobs"] = fewer["old_logprobs"] = torch.full(SHAPE, -3.0)
    cut = {**head, "bias": head["bias"][~forbidden]} if head else {}
    upstream = torch.randn(SHAPE) if case.function.per_token else None
    truth, true_grads = evaluate(case.function.equation, double({**fewer, **cut}), case.leaves, upstream)
    _, eager_grads = evaluate(case.function.equation, {**fewer, **cut}, case.leaves, upstream)
    with case.tiles():
        value, grads = evaluate(case.call, {**poison_masked(data), **options}, case.leaves, upstream)
    assert_within(value, truth, case.tolerance * 10)  # ratios of up to e^3
    if "logits" in grads:
        assert torch.equal(grads["logits"][..., forbidden], torch.zeros(*SHAPE, int(forbidden.sum())))
        grads["logits"] = grads["logits"][..., ~forbidden]
    assert_gradients(grads, eager_grads, true_grads, fewer)


@over(cases("linear_ppo", "logits_ppo", "ppo_loss"))
def test_advantages_are_per_token(case: Case) -> None:
    """The tokens of one sequence are pushed up and down: a mean over the sequence would push none of them."""
    data = case.make(mask=torch.ones(SHAPE))
    data["advantages"] = torch.tensor([1.0, -1.0, 2.0]).expand(SHAPE)
    data["weights"] = torch.ones(SHAPE)
    if "logprobs" in data:
        data["old_logprobs"] = data["logprobs"].clone()
    with case.tiles():
        compare(case, data)
        forward = evaluate(case.call, data, case.leaves)[1][case.leaves[0]]
        turned = {**data, "advantages": data["advantages"].flip(1)}
        backward = evaluate(case.call, turned, case.leaves)[1][case.leaves[0]]
    if case.name == "ppo_loss":
        assert torch.equal(forward.sign(), -torch.tensor([1.0, -1.0, 1.0]).expand(SHAPE))
    assert not torch.allclose(forward, backward)


@pytest.mark.parametrize(("sign", "dual_clip"), [(1.0, None), (-1.0, None), (-1.0, 3.0)])
@over(cases("linear_ppo", "logits_ppo", "ppo_loss"))
def test_far_log_ratios_are_finite(case: Case, sign: float, dual_clip: float | None) -> None:
    """exp(100) is inf, and inf * 0 of the clip is NaN in the gradient. Beyond +-20 nothing is pushed at all."""
    data = case.make((2, 4))
    near = data["old_logprobs"].clone()
    data["old_logprobs"][0] = near[0] - torch.tensor([200.0, -200.0, float("inf"), float("-inf")])
    data["advantages"][0] = sign
    functions: dict[str, Any] = {"linear": linear_ppo_loss, "logits": logits_ppo_loss, "ppo_lo": ppo_loss}
    function = functions[case.name[:6]]
    (leaf,) = case.leaves

    def run(**changed: Any) -> torch.Tensor:
        held = data[leaf].clone().requires_grad_()
        options = {"ref_logprobs": near, "dual_clip": dual_clip, "backend": case.backend, **changed}
        with case.tiles(rows=8, columns=V):
            out = function(**{**data, **options, leaf: held})
        grad = torch.autograd.grad(out.loss, held)[0]
        assert out.loss.isfinite()
        assert all(x.isfinite() for x in out.metrics.values())
        assert grad.isfinite().all()
        return grad

    grad = run()
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))
    assert bool(grad[1:].any())
    run(kl_coef=0.1, old_logprobs=near, ref_logprobs=data["old_logprobs"])
    assert token_kl(near[0], data["old_logprobs"][0]).isfinite().all()
