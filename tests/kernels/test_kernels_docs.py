"""docs/kernels.md: every block of code in it runs, and gives the loss and the gradients of the code that it replaces.

What the page says of tables, limits and memory is compared with the library too.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_like_eager, error
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import onecard_kernels as k
from onecard_kernels import launch
from onecard_kernels.dpo.losses import LOSSES
from onecard_kernels.logprob import linear as raw
from onecard_kernels.logprob import plans, products
from onecard_kernels.logprob.ops import scale_directions
from onecard_kernels.logprob.passes import Rows
from onecard_kernels.logprob.tiles import Linear
from onecard_kernels.records import Head

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
PICTURE = ROOT / "docs" / "kernels-memory.png"
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
B, T, D, V, KEEP = 4, 9, 32, 61, 5
PEERS = ("trl",)

Names = dict[str, Any]
Leaves = dict[str, Tensor]


def parts(code: str) -> tuple[str, list[str]]:
    """The code one has, and the ways to replace it."""
    pieces = re.split(r"^# (?:before|after|or, .*)$", code, flags=re.MULTILINE)
    assert not pieces[0].strip(), "code above the first heading"
    return pieces[1], pieces[2:]


def as_fp64(code: str) -> str:
    return code.replace(".float()", ".double()").replace("torch.float32", "torch.float64")


def run(code: str, names: Names, leaves: Leaves, after: str = "") -> tuple[Tensor, list[Tensor]]:
    """The loss that the code leaves in `loss`, and the gradients of the leaves."""
    exec(compile(code + after, "docs/kernels.md", "exec"), names)
    loss = names["loss"]
    return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values())))


# What the examples take for granted


def tokens(dtype: torch.dtype) -> tuple[Names, Leaves]:
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    mask = (torch.rand(B, T) < 0.7).to(dtype)
    names = {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.randint(V, (B, T)),
        "mask": mask,
        "old_logprobs": -4.0 * torch.rand(B, T, dtype=dtype),
        "advantages": torch.randn(B, T, dtype=dtype),
    }
    return names, {"hidden": hidden, "weight": weight}


def model_of(kind: str, dtype: torch.dtype, lora: bool = False) -> tuple[Any, Leaves]:
    """A random model of two layers whose logits are spread like a trained one's, and the weights that learn."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        **MODELS[kind],
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, x in model.named_parameters():
                if "lora_B" in name:
                    x.normal_(std=0.2)
        model.to(dtype)
    return model, {name: x for name, x in model.named_parameters() if x.requires_grad}


# Arguments that make each model's logits its own: caps and scales small enough to matter.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
}


def batch(dtype: torch.dtype, model: Any) -> Names:
    input_ids = torch.randint(3, V, (B, T))
    lengths = torch.tensor([[9], [5], [7], [6]])
    attention_mask = (torch.arange(T) < lengths).long()
    completion_mask = attention_mask * (torch.arange(T) >= 3)
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    return {
        "torch": torch,
        "F": F,
        "model": model,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "mask": completion_mask[:, 1:].to(dtype),
        "labels": labels,
        "num_items_in_batch": 37,
        "ref_logps": -20.0 * torch.rand(B, dtype=dtype),
        "logits_to_keep": KEEP,
        "temperature": 0.7,
        "coefficients": torch.randn(B, T - 1, dtype=dtype),
    }


def of_model(dtype: torch.dtype, kind: str = "Llama", lora: bool = False) -> tuple[Names, Leaves]:
    model, leaves = model_of(kind, dtype, lora)
    return batch(dtype, model), leaves


def kept(dtype: torch.dtype) -> tuple[Names, Leaves]:
    names, leaves = of_model(dtype)
    return {**names, "coefficients": names["coefficients"][:, -KEEP:]}, leaves


CALL = """
loss = (get_per_token_logps(model, input_ids, attention_mask, logits_to_keep, temperature) * coefficients).sum()
"""
# The inputs of each example that has a "before", and what is to be run after either side.
PAIRS: dict[str, tuple[Callable[[torch.dtype], tuple[Names, Leaves]], str]] = {
    "sft": (of_model, ""),
    "ppo": (lambda dtype: ({**tokens(dtype)[0], "torch": torch}, {}), ""),
    "per_token_logps": (kept, CALL),
    "dpo": (of_model, ""),
    "completions": (of_model, ""),
    "lora": (lambda dtype: of_model(dtype, lora=True), ""),
}


def test_every_block_has_a_test() -> None:
    assert len(EXAMPLES) == PAGE.count("```python"), "a block without <!-- example: NAME --> above it"
    assert set(EXAMPLES) == {*PAIRS, "recipes", "token_local_sft", "override"}


def built(make: Callable[[torch.dtype], tuple[Names, Leaves]], dtype: torch.dtype) -> tuple[Names, Leaves]:
    """The same numbers in either dtype: all are drawn in fp32."""
    torch.manual_seed(1)
    names, leaves = make(torch.float32)
    if not leaves:
        leaves = {name: names[name] for name in ("hidden", "weight")}
    if dtype == torch.float32:
        return names, leaves
    wide = {n: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in names.items()}
    if "model" in wide:
        model = wide["model"].double()
        return wide, {name: x for name, x in model.named_parameters() if x.requires_grad}
    return wide, {name: wide[name].requires_grad_() for name in leaves}


def compare(code: str, make: Callable[[torch.dtype], tuple[Names, Leaves]], after: str) -> None:
    """Equal in fp64; in fp32 no further from that than the code that was replaced."""
    before, ways = parts(code)
    assert ways
    names, leaves = built(make, torch.float64)
    truth, true_grads = run(as_fp64(before), names, leaves, after)
    for way in ways:
        loss, grads = run(as_fp64(way), names, leaves, after)
        for got, expected in zip([loss, *grads], [truth, *true_grads], strict=True):
            assert error(got, expected) <= 1e-11 * max(1.0, float(expected.abs().max()))
    assert any(float(g.abs().max()) > 1e-3 for g in true_grads), "no gradient to compare"
    names, leaves = built(make, torch.float32)
    eager, eager_grads = run(before, names, leaves, after)
    for way in ways:
        loss, grads = run(way, names, leaves, after)
        assert_like_eager(loss, eager, truth, "loss")
        for name, *three in zip(leaves, grads, eager_grads, true_grads, strict=True):
            assert_like_eager(*three, f"gradient of {name}")


@pytest.mark.parametrize("name", PAIRS)
def test_before_and_after_are_the_same(name: str) -> None:
    for peer in PEERS:
        if peer in EXAMPLES[name]:
            pytest.importorskip(peer)
    compare(EXAMPLES[name], *PAIRS[name])


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "Llama"])
def test_transformed_logits_are_arguments(kind: str) -> None:
    compare(EXAMPLES["lora"], lambda dtype: of_model(dtype, kind, lora=True), "")


def test_recipes_are_the_papers_formulas() -> None:
    torch.manual_seed(2)
    group, longest = 2, 12
    logprobs = (-3 * torch.rand(B, T, dtype=torch.float64)).requires_grad_()
    old, ref = (logprobs.detach() + 0.3 * torch.randn(B, T) for _ in range(2))
    lengths = torch.tensor([9, 4, 7, 1])
    mask = (torch.arange(T) < lengths[:, None]).double()
    scores, advantages = torch.randn(B, dtype=torch.float64), torch.randn(B, T, dtype=torch.float64)
    names: Names = {"B": B, "G": group, "max_length": longest, "scores": scores, "advantages": advantages}
    names |= {"logprobs": logprobs, "old_logprobs": old, "ref_logprobs": ref, "mask": mask}
    exec(compile(EXAMPLES["recipes"], "docs/kernels.md", "exec"), names)

    pairs = scores.view(-1, group)
    centred = (pairs - pairs.mean(1, keepdim=True)).view(B, 1)
    grouped = centred / (pairs.std(1, keepdim=True).repeat_interleave(group, 0) + 1e-4)
    ratio, d = (logprobs - old).exp(), logprobs - ref

    def clipped(a: Tensor, r: Tensor, low: float, high: float) -> Tensor:
        return torch.max(-a * r, -a * r.clamp(1 - low, 1 + high))

    answer = (((logprobs - old) * mask).sum(1) / lengths).exp()[:, None]
    truth = {
        "ppo": (clipped(advantages, ratio, 0.2, 0.2) * mask).sum() / mask.sum(),
        "grpo": (((clipped(grouped, ratio, 0.2, 0.2) + 0.04 * ((-d).exp() - 1 + d)) * mask).sum(1) / lengths).mean(),
        "dr_grpo": (clipped(centred, ratio, 0.2, 0.2) * mask).sum() / (B * longest),
        "dapo": (clipped(grouped, ratio, 0.2, 0.28) * mask).sum() / mask.sum(),
        "gspo": clipped(grouped, answer, 3e-4, 4e-4).mean(),
    }
    for name, expected in truth.items():
        got = names[name].loss
        grads = [torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (got, expected)]
        assert error(got, expected.detach()) < 1e-12, name
        assert error(*grads) < 1e-12, name


def test_token_local_sft() -> None:
    names, leaves = tokens(torch.float32)
    loss, grads = run(EXAMPLES["token_local_sft"], {**names, "torch": torch}, leaves)
    logprobs = "(hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]"
    plain = f"loss = -({logprobs} * mask).sum() / mask.sum()"
    wide = {n: x.detach().double() if x.is_floating_point() else x for n, x in names.items()}
    truth = run(plain, wide, {n: wide[n].requires_grad_() for n in leaves})
    eager = run(plain, dict(names), leaves)
    for got, same, true in zip([loss, *grads], [eager[0], *eager[1]], [truth[0], *truth[1]], strict=True):
        assert_like_eager(got, same, true)


def test_override_changes_the_cut_and_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = tokens(torch.float64)
    plain = k.linear_logprobs(names["hidden"], names["weight"], names["targets"]).logprobs
    used: list[plans.Plan] = []
    choose = plans.choose

    def watched(*args: Any, **options: Any) -> plans.Plan:
        used.append(choose(*args, **options))
        return used[-1]

    monkeypatch.setattr("onecard_kernels.logprob.ops.choose", watched)
    exec(compile(EXAMPLES["override"], "docs/kernels.md", "exec"), names)
    assert used == [plans.Plan("low_memory", 1024, 2048)]
    assert error(names["logprobs"], plain) < 1e-12


# What the page says


def test_the_table_of_plans_is_the_code_s() -> None:
    for device, c in plans.TABLE.items():
        line = (
            f"| {device} | {c.default} | {c.row_bytes >> 20} MiB of logits, {c.least_rows} to {c.most_rows} rows "
            f"| {c.tile_rows} x {c.tile_columns} |"
        )
        assert line in PAGE


def test_every_public_function_and_loss_is_named() -> None:
    named = set(re.findall(r"`(\w+)", PAGE))
    records = {"Advantages", "LogProbs", "Loss"}
    assert set(k.__all__) - records <= named | set(re.findall(r"`, `(\w+)`", PAGE))
    assert set(LOSSES) <= named


def test_blocks_of_numbers_are_the_renderer_s() -> None:
    from benchmarks.render import updated
    from benchmarks.suite import BENCHMARKS

    names = re.findall(r"<!-- benchmark:(\w+) -->", PAGE)
    assert len(set(names)) == len(names) > 0
    assert set(names) <= set(BENCHMARKS)
    filled = updated(PAGE, {name: f"numbers of {name}" for name in names})
    assert all(f"numbers of {name}\n<!-- /benchmark -->" in filled for name in names)
    assert "```python" in updated(filled, {names[-1]: ""})


def test_no_number_of_speed_or_memory_is_typed() -> None:
    typed = re.sub(r"<!-- benchmark:\w+ -->.*?<!-- /benchmark -->", "", PAGE, flags=re.DOTALL)
    assert not re.findall(r"\d(?:\.\d+)? ?(?:x faster|x slower|TFLOP|GB|MB|ms\b|%)", typed)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def test_limits() -> None:
    names, _ = tokens(torch.float32)
    hidden, weight, targets = names["hidden"], names["weight"].detach(), names["targets"]
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1] = mask[2, 4] = False

    # masked rows may hold anything
    spoiled = hidden.detach().masked_fill(~mask[..., None], float("nan")).requires_grad_()
    clean = k.linear_logprobs(hidden, weight, targets, mask=mask).logprobs
    dirty = k.linear_logprobs(spoiled, weight, targets, mask=mask).logprobs
    assert torch.equal(clean, dirty)
    assert torch.equal(*(torch.autograd.grad(x.sum(), h)[0] for x, h in ((clean, hidden), (dirty, spoiled))))
    nothing = k.linear_ppo_loss(hidden, weight, targets, targets * 0.0, targets * 0.0, mask & False).loss
    assert nothing == 0
    assert not torch.autograd.grad(nothing, hidden)[0].any()

    # forbidden targets
    forbidden = torch.zeros(V, dtype=torch.bool)
    forbidden[targets[0, 0]] = True
    logprobs = k.linear_logprobs(hidden, weight, targets, forbidden=forbidden).logprobs
    assert logprobs[0, 0] == float("-inf")
    (grad,) = torch.autograd.grad(logprobs[0, 0], hidden)
    assert not grad.any()

    # gradients of gradients
    for loss in (
        k.linear_logprobs(hidden, weight, targets).logprobs.square().sum(),
        k.linear_ppo_loss(hidden, weight, targets, targets * -1.0, targets * 1.0, mask).loss.square(),
        k.selective_log_softmax(hidden, targets % D).logprobs.square().sum(),
        k.linear_kl(hidden, hidden.detach() + 1, weight).square().sum(),
    ):
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="create_graph=True cannot go through it"):
            first.sum().backward()
    with pytest.raises(ValueError, match="weight requires a gradient"):
        k.linear_kl(hidden, hidden.detach(), names["weight"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_it_is_right(reentrant: bool) -> None:
    names, _ = tokens(torch.float32)
    hidden, rest = names["hidden"], (names["weight"].detach(), names["targets"])

    def loss(h: Tensor) -> Tensor:
        return k.linear_logprobs(h, *rest).logprobs.square().sum()

    inside, outside = checkpoint(loss, hidden, use_reentrant=reentrant), loss(hidden)
    inside.backward()
    (expected,) = torch.autograd.grad(outside, hidden)
    assert torch.equal(hidden.grad, expected)


class Products(TorchDispatchMode):
    """Operations of all matrix products, inside of operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = OPDEFS.get(func._schema.name)
        if operator is not None:
            with self:
                return operator._init_fn(*args, **(kwargs or {}))
        if "mm" in func._schema.name:
            a, b = args[-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("what", "trained", "expected"),
    [
        ("logprobs", False, 2),
        ("logprobs", True, 4),
        ("entropy", False, 3),
        ("entropy", True, 4),
        ("ppo", False, 2),
        ("ppo", True, 3),
        ("clipped ppo", False, 1),
        ("kl", False, 3),
        ("no gradient", True, 1),
        ("kl, no gradient", False, 2),
    ],
)
def test_the_table_of_products(what: str, trained: bool, expected: int) -> None:
    n, d, v = 40, 24, 301
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=trained)
    targets, ones = torch.randint(v, (n,)), torch.ones(n)

    def ppo(advantages: Tensor) -> Tensor:
        old = k.linear_logprobs(hidden.detach(), weight.detach(), targets).logprobs if what == "ppo" else ones * -90
        return k.linear_ppo_loss(
            hidden, weight, targets, old, advantages, ones, entropy_coef=0.1 * (what == "ppo")
        ).loss

    def kl() -> Tensor:
        return k.linear_kl(hidden, hidden.detach() + 1, weight).sum()

    steps: dict[str, Callable[[], Any]] = {
        "logprobs": lambda: k.linear_logprobs(hidden, weight, targets).logprobs.sum().backward(),
        "entropy": lambda: (
            sum(k.linear_logprobs(hidden, weight, targets, entropy_requires_grad=True)[:2]).sum().backward()
        ),
        "ppo": lambda: ppo(ones).backward(),
        "clipped ppo": lambda: ppo(ones).backward(),
        "kl": lambda: kl().backward(),
        "no gradient": lambda: k.linear_logprobs(
            hidden, weight, targets, return_entropy=True, return_log_sum_sq_probs=True
        ),
        "kl, no gradient": kl,
    }
    with torch.set_grad_enabled("no gradient" not in what), Products() as found:
        steps[what]()
    extra = what == "ppo"  # for the old log-probabilities
    assert found.operations / (2 * n * d * v) == expected + extra


# The figure


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_memory", ROOT / "docs" / "examples" / "kernels_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were, beyond those that are given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0
        for x in given:
            self.known.add(id(x.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor):
                self.see(x.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def peak_from_here(self) -> int:
        peak, self.peak = self.peak, self.now
        return peak


class Nowhere(list):
    """Launches that are neither run nor kept: keeping them would keep their tensors."""

    def append(self, launched: Any) -> None:
        pass


def inputs(shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Real sizes, no memory."""
    meta = torch.device("meta")
    hidden = torch.empty(shape.tokens, shape.hidden, dtype=torch.bfloat16, device=meta)
    weight = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=meta)
    return hidden, weight, torch.empty(shape.tokens, dtype=torch.int64, device=meta)


def totals(phases: Any) -> list[int]:
    return [sum(held.values()) for held in phases]


def assert_counts(counted: int, held: int, shape: Any, what: str) -> None:
    """To the vectors of a few numbers per token, which the figure leaves out."""
    small = 32 * 8 * shape.tokens
    said = f"{what}: the figure has {counted / 1e6:.1f} MB, the code {held / 1e6:.1f} MB"
    assert counted <= held <= counted + small, said


@pytest.mark.parametrize("implementation", plans.IMPLEMENTATIONS)
def test_figure_counts_what_the_code_allocates(
    implementation: str, memory: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself at the figure's size, on tensors without data, with the dtypes that CUDA has."""
    pytest.importorskip("triton")
    shape = memory.Shape()
    phases = memory.tiled(shape) if implementation == plans.TILED else memory.ours(implementation)(shape)
    forward, between, backward = totals(phases)
    monkeypatch.setattr(products, "operand_dtype", lambda hidden, weight, accumulated, device: hidden)
    monkeypatch.setattr(launch, "_recorders", [Nowhere()])
    torch.utils.deterministic.fill_uninitialized_memory = False  # it makes tensors of its own
    hidden, weight, targets = inputs(shape)
    with plans.override(implementation=implementation):
        plan = plans.choose(shape.vocabulary, torch.float32, torch.device("cuda"))
    linear = Linear(weight, Head(), hidden.dtype, plan, "triton")
    directions = raw.Directions(implementation != plans.TILED, False)
    with Held(hidden, weight, targets) as held:
        rows = Rows(targets.shape, None)
        out = raw.forward(hidden, targets, rows, linear, entropy=False, sum_sq=False, directions=directions)
        assert_counts(forward, held.peak_from_here(), shape, "forward")
        assert_counts(between, held.now, shape, "between")
        if out.direction is None:
            return
        row = torch.empty_like(out.logprobs)
        # The operator's body: called as an operator it would be a step without an inside.
        grad = scale_directions._init_fn(None, row.isfinite(), out.direction, row, row, None)
        assert_counts(backward, held.peak_from_here(), shape, "backward")
        assert grad.shape == hidden.shape


def test_figure_counts_what_eager_allocates(memory: ModuleType) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    shape = memory.Shape()
    forward, between, backward = totals(memory.eager(shape))
    hidden, weight, targets = inputs(shape)
    hidden.requires_grad_()

    def logprobs() -> Tensor:
        logits = hidden @ weight.t()
        return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)

    with Held(hidden, weight, targets) as held:
        out = logprobs()
        assert_counts(forward, held.peak_from_here(), shape, "forward")
        assert_counts(between, held.now, shape, "between")
        out.sum().backward()
        assert_counts(backward, held.peak, shape, "backward")


def test_figure_counts_what_trl_allocates(memory: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its kernels and products, which allocate nothing, left out."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="counts TRL's own code")
    utils = pytest.importorskip("trl.trainer.utils")
    torch.utils.deterministic.fill_uninitialized_memory = False
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked, name, lambda *args, **options: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # it does not know "meta"
    shape = memory.Shape()
    forward, between, backward = totals(memory.recompute(shape))
    hidden, weight, targets = inputs(shape)
    hidden.requires_grad_()
    with Held(hidden, weight, targets) as held:
        width = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        out = chunked.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, width, None, 1.0, ("log_probs",)
        )[0]
        assert_counts(forward, held.peak_from_here(), shape, "forward")
        assert_counts(between, held.now, shape, "between")
        out.sum().backward()
        assert_counts(backward, held.peak, shape, "backward")


def test_picture_is_of_today(memory: ModuleType) -> None:
    image = pytest.importorskip("PIL.Image")
    drawn = json.loads(image.open(PICTURE).text["Description"])
    now = json.loads(json.dumps(memory.count(memory.Shape())))
    assert drawn == now, "run: python docs/examples/kernels_memory.py docs/kernels-memory.png"
