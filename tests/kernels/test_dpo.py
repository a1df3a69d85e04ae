"""dpo_loss: each loss against hand-worked constants, against its identities, and where log-ratios are far out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onecard_kernels import Loss, dpo_loss
from onecard_kernels.dpo.losses import ANY_DIVERGENCE, DIVERGENCES, LOSSES, WHOLE_BATCH

# What a loss needs before it can be called at all, or says nothing without.
NEEDS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.1}}
DEFINED = [(name, kind) for name in LOSSES for kind in DIVERGENCES if kind == "reverse_kl" or name in ANY_DIVERGENCE]
PER_PAIR = [name for name in LOSSES if name not in WHOLE_BATCH]
INF = float("inf")

HALF = math.log1p(math.exp(-0.5))  # -logsigmoid(1/2)
ONE = math.log1p(math.exp(-1))  # -logsigmoid(1); -logsigmoid(-1) is 1 more
Q = 1 / (1 + math.exp(-1))  # sigmoid(1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one_pair(chosen: float, rejected: float) -> tuple[torch.Tensor, ...]:
    """Log-ratios as given, with references that are not zero."""
    return tuple(torch.tensor([x], dtype=torch.float64) for x in (chosen - 3.0, rejected - 4.0, -3.0, -4.0))


def test_the_tables_are_trl_s_names_and_documented() -> None:
    names = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
        "sigmoid_norm"
    )
    assert set(LOSSES) == set(names.split())
    assert set(["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]) == ANY_DIVERGENCE
    assert {"aot", "aot_unpaired"} == WHOLE_BATCH
    lines = [line.strip() for line in inspect.getdoc(dpo_loss).splitlines()]
    for name in LOSSES:
        assert any(line.startswith(f"{name} ") for line in lines), name


# beta = 0.5, log-ratios 1 and -1: l = 1, c = 1/2, j = -1/2. Lengths as (chosen, rejected).
CONSTANTS: list[tuple[dict[str, Any], float]] = [
    ({"loss_type": "sigmoid"}, ONE),
    ({"loss_type": "sigmoid", "label_smoothing": 0.2}, ONE + 0.2),
    ({"loss_type": "sigmoid", "lengths": (2, 4)}, ONE),  # lengths are for ipo, sigmoid_norm and sft
    ({"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}, math.log1p(math.exp(-0.5 * (math.e - 1 / math.e)))),
    ({"loss_type": "hinge"}, 0.0),
    ({"loss_type": "hinge", "beta": 0.25}, 0.5),
    # js: logsigmoid(1) - logsigmoid(-1) = 1
    ({"loss_type": "hinge", "f_divergence_type": "js_divergence"}, 0.5),
    ({"loss_type": "ipo"}, 1.0),  # (2 - 1)^2
    ({"loss_type": "ipo", "lengths": (2, 4)}, (0.5 + 0.25 - 1.0) ** 2),
    ({"loss_type": "ipo", "lengths": (0, 0)}, 1.0),  # an empty response counts as one token
    # alpha 1/2: -2 (e^-1/2 - e^1/2) = 4 sinh(1/2)
    ({"loss_type": "ipo", "f_divergence_type": "alpha_divergence"}, (4 * math.sinh(0.5) - 1) ** 2),
    ({"loss_type": "discopop", "discopop_tau": 1.0}, (1 - Q) * ONE + Q * math.exp(-1)),
    ({"loss_type": "discopop", "discopop_tau": 1e-3}, math.exp(-1)),  # the mixture is all exponential
    ({"loss_type": "robust"}, ONE),
    ({"loss_type": "robust", "label_smoothing": 0.2}, ONE - 0.2 / 0.6),
    (
        {"loss_type": "exo_pair", "label_smoothing": 0.2},
        Q * (-ONE - math.log(0.8)) + (1 - Q) * (-ONE - 1 - math.log(0.2)),
    ),
    ({"loss_type": "nca_pair"}, HALF + 0.5 * (HALF + 0.5) + 0.5 * HALF),
    ({"loss_type": "bco_pair"}, HALF + HALF),
    ({"loss_type": "sppo_hard"}, 0.0),
    ({"loss_type": "sppo_hard", "ratios": (2.0, 1.0)}, 1.0 + 4.0),
    ({"loss_type": "aot"}, ONE),
    ({"loss_type": "aot", "label_smoothing": 0.2}, ONE + 0.2),
    ({"loss_type": "aot_unpaired"}, ONE),
    ({"loss_type": "aot_unpaired", "label_smoothing": 0.2}, ONE + 0.2),
    ({"loss_type": "apo_zero"}, 2 * sigmoid(-0.5)),
    ({"loss_type": "apo_zero", "ratios": (2.0, 1.0)}, sigmoid(-1.0) + sigmoid(0.5)),
    ({"loss_type": "apo_down"}, sigmoid(0.5) + sigmoid(-1.0)),
    ({"loss_type": "apo_down", "ratios": (2.0, 1.0)}, sigmoid(1.0) + sigmoid(-0.5)),
    ({"loss_type": "sigmoid_norm"}, ONE),
    ({"loss_type": "sigmoid_norm", "lengths": (2, 4)}, math.log1p(math.exp(-0.375))),
    ({"loss_type": "sigmoid_norm", "lengths": (2, 4), "label_smoothing": 0.2}, math.log1p(math.exp(-0.375)) + 0.075),
    ({"loss_type": "sft"}, 2.0),  # logp = 1 - 3
    ({"loss_type": "sft", "lengths": (4, 1)}, 0.5),
    ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, 2.0),
    ({"loss_type": ["hinge", "ipo"], "loss_weights": [2.0, 3.0], "beta": 0.25}, 2 * 0.5 + 3 * 0.0),
    ({"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}, 0.8 * ONE + 0.4 * HALF + 2.0),
]


@pytest.mark.parametrize(("options", "expected"), CONSTANTS)
def test_constants(options: dict[str, Any], expected: float) -> None:
    options = {"beta": 0.5, **options}
    lengths = options.pop("lengths", None)
    chosen, rejected = options.pop("ratios", (1.0, -1.0))
    if lengths:
        options["chosen_lengths"], options["rejected_lengths"] = (torch.tensor([n]) for n in lengths)
    got = dpo_loss(*one_pair(chosen, rejected), **options)
    assert got.loss.dtype == torch.float64
    assert got.loss.item() == pytest.approx(expected, abs=1e-12)
    metrics = {name.removeprefix("rewards/"): value.item() for name, value in got.metrics.items()}
    assert metrics == pytest.approx(
        {
            "chosen": options["beta"] * chosen,
            "rejected": options["beta"] * rejected,
            "margins": options["beta"] * (chosen - rejected),
            "accuracies": 1.0,
        }
    )
    assert not any(value.requires_grad or value.dim() for value in got.metrics.values())


def test_aot_compares_sorted_differences() -> None:
    """Policy differences 3 and 1 against 0 and 2: sorted, each is 1 ahead; in order one is 3 ahead, one behind."""
    policy, reference, zero = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0]), torch.zeros(2)
    for arguments in ((policy, zero, reference, zero), (policy + 5, zero + 5, zero, -reference)):
        assert dpo_loss(*arguments, beta=1.0, loss_type="aot").loss.item() == pytest.approx(ONE)
    # Unpaired: chosen ratios 3 and 1 against rejected ratios 0 and 2.
    got = dpo_loss(policy + 5, reference - 5, zero + 5, zero - 5, beta=1.0, loss_type="aot_unpaired")
    assert got.loss.item() == pytest.approx(ONE)


def leaves_of(count: int) -> list[torch.Tensor]:
    return [torch.randn(count, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True))


def same(a: Loss, b: Loss, leaves: list[torch.Tensor]) -> bool:
    pairs = zip(gradients(a.loss, leaves), gradients(b.loss, leaves), strict=True)
    return torch.allclose(a.loss, b.loss) and all(torch.allclose(x, y) for x, y in pairs)


def test_aot_does_not_see_which_pair_is_which() -> None:
    """aot pairs neither policy with reference, nor aot_unpaired chosen with rejected; the other losses do."""
    a, b, ra, rb = leaves_of(6)
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    for name in LOSSES:
        needs = {"loss_type": name, "beta": 2.0, **NEEDS.get(name, {})}  # 2: some pairs beyond hinge's corner
        plain = dpo_loss(a, b, ra, rb, **needs)
        together = dpo_loss(a[order], b[order], ra[order], rb[order], **needs)
        assert same(plain, together, [a, b, ra, rb]), name
        reference = dpo_loss(a, b, ra[order], rb[order], **needs)
        rejected = dpo_loss(a, b[order], ra, rb[order], **needs)
        assert torch.allclose(plain.loss, reference.loss) == (name in ("aot", "sft")), name
        by_one = ("aot_unpaired", "sft", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")  # sums of single responses
        assert torch.allclose(plain.loss, rejected.loss) == (name in by_one), name


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_is_the_expected_loss_of_flipped_pairs(loss_type: str) -> None:
    a, b, ra, rb = leaves_of(6)
    n, m = torch.arange(1, 7), torch.arange(3, 9)
    straight = dpo_loss(a, b, ra, rb, loss_type=loss_type, chosen_lengths=n, rejected_lengths=m).loss
    flipped = dpo_loss(b, a, rb, ra, loss_type=loss_type, chosen_lengths=m, rejected_lengths=n).loss
    kw: dict[str, Any] = {"loss_type": loss_type, "chosen_lengths": n, "rejected_lengths": m}
    for share in (0.3, 0.5):
        smooth = dpo_loss(a, b, ra, rb, label_smoothing=share, **kw).loss
        assert torch.allclose(smooth, (1 - share) * straight + share * flipped)


def test_robust_undoes_flipped_labels() -> None:
    """Its expectation, when a share e of the pairs comes flipped, is the loss of the straight pairs."""
    a, b, ra, rb = leaves_of(6)
    kw: dict[str, Any] = {"loss_type": "robust", "label_smoothing": 0.3}
    expectation = 0.7 * dpo_loss(a, b, ra, rb, **kw).loss + 0.3 * dpo_loss(b, a, rb, ra, **kw).loss
    assert torch.allclose(expectation, dpo_loss(a, b, ra, rb).loss)


def test_exo_is_least_at_the_smoothed_label() -> None:
    """A KL of (q, 1 - q) to (1 - e, e): 0 at l = log((1 - e) / e), with zero slope, and above 0 elsewhere."""
    ratio = torch.tensor([math.log(0.9 / 0.1), 0.0, 5.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    each = [
        dpo_loss(
            *(x[i : i + 1] for x in (ratio, zero, zero, zero)), beta=1.0, loss_type="exo_pair", label_smoothing=0.1
        )
        for i in range(3)
    ]
    slopes = torch.autograd.grad(sum(x.loss for x in each), ratio)[0]
    assert each[0].loss.item() == pytest.approx(0.0, abs=1e-15)
    assert slopes[0].item() == pytest.approx(0.0, abs=1e-15)
    assert each[1].loss.item() == pytest.approx(-math.log(2) - 0.5 * math.log(0.09))
    assert slopes[1] < -0.1
    assert slopes[2] > 0


def test_several_losses_are_the_weighted_sum_of_single_ones() -> None:
    leaves = leaves_of(5)
    factors = torch.randn(len(LOSSES)).tolist()
    kw: dict[str, Any] = {
        "label_smoothing": 0.1,
        "chosen_lengths": torch.arange(1, 6),
        "rejected_lengths": torch.ones(5),
    }
    together = dpo_loss(*leaves, loss_type=list(LOSSES), loss_weights=factors, **kw)
    singles = [dpo_loss(*leaves, loss_type=name, **kw) for name in LOSSES]
    total = sum(f * single.loss for f, single in zip(factors, singles, strict=True))
    assert same(together, Loss(total, {}), leaves)
    unweighted = dpo_loss(*leaves, loss_type=list(LOSSES), **kw)
    assert torch.allclose(unweighted.loss, sum(single.loss for single in singles))


@pytest.mark.parametrize("loss_type", PER_PAIR)
def test_micro_batches_add_up(loss_type: str) -> None:
    """With one `normalizer`, in loss, gradient and every metric; without it each would average by itself."""
    leaves = leaves_of(7)
    weights, lengths = torch.rand(7, dtype=torch.float64), torch.arange(1, 8)

    def part(piece: slice, **kw: Any) -> Loss:
        kw |= {"chosen_lengths": lengths[piece], "rejected_lengths": lengths.flip(0)[piece]}
        kw |= {"weights": weights[piece], "loss_type": loss_type, **NEEDS.get(loss_type, {})}
        return dpo_loss(*(x[piece] for x in leaves), **kw)

    whole = part(slice(None))
    parts = [part(slice(a, b), normalizer=n) for a, b, n in ((0, 3, 7), (3, 4, torch.tensor(7.0)), (4, 7, 7.0))]
    assert same(whole, Loss(sum(p.loss for p in parts), {}), leaves)
    for name, value in whole.metrics.items():
        assert torch.allclose(value, sum(p.metrics[name] for p in parts))


@pytest.mark.parametrize(("loss_type", "f_divergence_type"), DEFINED)
def test_log_ratios_of_200_stay_finite(loss_type: str, f_divergence_type: str) -> None:
    far = torch.tensor([200.0, -200.0, -200.0, 200.0, 0.0])
    options: dict[str, Any] = {"loss_type": loss_type, "f_divergence_type": f_divergence_type}
    for beta in (0.01, 0.1, 1.0):
        for tau in (0.05, 2.0):
            for alpha in (0.5, 2.0):
                logps = [x.clone().requires_grad_() for x in (far, far.roll(1), far.roll(2), torch.zeros(5))]
                kw = {**options, "beta": beta, "f_alpha_divergence_coef": alpha, "discopop_tau": tau}
                out = dpo_loss(*logps, **kw, **NEEDS.get(loss_type, {}))
                assert out.loss.isfinite(), kw
                assert all(g.isfinite().all() for g in gradients(out.loss, logps)), kw
                assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize(("loss_type", "f_divergence_type"), DEFINED)
def test_infinities_on_both_sides_count_as_no_difference(loss_type: str, f_divergence_type: str) -> None:
    options = {"loss_type": loss_type, "f_divergence_type": f_divergence_type, **NEEDS.get(loss_type, {})}
    cases = [([-INF, -INF, -INF, -INF], [0.0, 0.0, 0.0, 0.0]), ([-3.0, -INF, -1.0, -INF], [-3.0, 0.0, -1.0, 0.0])]
    for logps, plain in cases[loss_type == "sft" :]:  # the likelihood of a response that cannot be is infinitely bad
        infinite = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in logps]
        finite = [torch.tensor([x], dtype=torch.float64) for x in plain]
        got, expected = dpo_loss(*infinite, **options), dpo_loss(*finite, **options)
        if loss_type == "aot" and logps[0] != -INF:  # its differences of responses are infinite, and cancel
            assert got.loss.item() == pytest.approx(math.log(2))
        else:
            assert torch.equal(got.loss, expected.loss)
        assert got.metrics == expected.metrics
        for value, gradient in zip(infinite, gradients(got.loss, infinite), strict=True):
            assert gradient.isfinite()
            assert gradient == 0 or value.isfinite()


@pytest.mark.parametrize(("loss_type", "f_divergence_type"), DEFINED)
def test_gradcheck(loss_type: str, f_divergence_type: str) -> None:
    lengths = {"chosen_lengths": torch.tensor([1, 4, 2, 7]), "rejected_lengths": torch.tensor([3, 1, 5, 2])}

    def loss(*x: torch.Tensor) -> torch.Tensor:
        options = {"loss_type": loss_type, "f_divergence_type": f_divergence_type, "label_smoothing": 0.1}
        return dpo_loss(*x, **options, **lengths).loss

    *policy, ref_chosen, ref_rejected = leaves_of(4)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, ref_chosen, ref_rejected), tuple(policy))
    of_reference = torch.autograd.grad(
        loss(*policy, ref_chosen, ref_rejected), (ref_chosen, ref_rejected), allow_unused=True
    )
    assert of_reference == (None, None)


@pytest.mark.parametrize("loss_type", ["sigmoid", ["exo_pair", "ipo", "sft"], "aot"])
def test_one_graph_under_compile(loss_type: str | list[str]) -> None:
    leaves = [torch.randn(4, requires_grad=True) for _ in range(4)]
    lengths = {"chosen_lengths": torch.tensor([1, 4, 2, 7]), "rejected_lengths": torch.tensor([3, 1, 5, 2])}

    def loss(*x: torch.Tensor) -> Loss:
        return dpo_loss(*x, loss_type=loss_type, label_smoothing=0.1, **lengths)

    eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert compiled.loss.dtype == torch.float32
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(list(gradients(compiled.loss, leaves)), list(gradients(eager.loss, leaves)))


def test_low_precision_and_no_pairs() -> None:
    low = [torch.randn(3).bfloat16() for _ in range(4)]
    wide = {"weights": torch.ones(3, dtype=torch.float64)}
    wide |= {f"{side}_lengths": torch.ones(3, dtype=torch.float64) for side in ("chosen", "rejected")}
    for name in PER_PAIR:
        for normalizer in (None, 3, torch.tensor(3.0, dtype=torch.float64)):
            got = dpo_loss(*low, normalizer=normalizer, loss_type=name, **wide, **NEEDS.get(name, {}))
            assert {x.dtype for x in (got.loss, *got.metrics.values())} == {torch.float32}
            assert torch.equal(
                got.loss, dpo_loss(*(x.float() for x in low), loss_type=name, **NEEDS.get(name, {})).loss
            )
    mixed = [torch.randn(3, dtype=torch.float64), *(x.float() for x in low[1:])]
    for name in LOSSES:
        got = dpo_loss(*mixed, loss_type=name, **NEEDS.get(name, {}))
        assert {x.dtype for x in (got.loss, *got.metrics.values())} == {torch.float64}
        none = [torch.zeros(0, requires_grad=True) for _ in range(4)]
        out = dpo_loss(*none, loss_type=name, **NEEDS.get(name, {}))
        out.loss.backward()
        assert out.loss.item() == 0.0
