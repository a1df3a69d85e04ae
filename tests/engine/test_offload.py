"""Activations on the host: the same gradients bit for bit, each storage once, no weight, nothing left afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from onecard.config import DPOConfig, SFTConfig
from onecard.models.build import load_roles
from onecard.models.offload import OffloadedStorage, Offloader, PlainCopier
from tests.engine.roles_material import gradients, policy_part, ppo_roles, some_batch, value_part

pytestmark = pytest.mark.usefixtures("quick")

BASES = {"fp32": {}, "bf16": {"dtype": "bfloat16", "adapter_dtype": "bfloat16"}, "nf4": {"load_in_4bit": True}}
CPU = torch.device("cpu")


class Recorder(PlainCopier):
    """Copies, and keeps account: the storages that left, and in what order which came back."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.left: list[tuple[int, int]] = []  # where the storage was, its bytes
        self.back: list[int] = []
        self.places: dict[int, int] = {}

    def push(self, flat: Tensor) -> Tensor:
        host = super().push(flat)
        self.places[host.data_ptr()] = len(self.left)
        self.left.append((flat.data_ptr(), flat.numel()))
        return host

    def pull(self, host: Tensor, nbytes: int):
        self.back.append(self.places[host.data_ptr()])
        return super().pull(host, nbytes)


def offloaded(roles, least_bytes: int = 1) -> Recorder:
    roles.offload_activations(least_bytes)
    roles.offloader.copier = recorder = Recorder()
    return recorder


def both_parts(roles, batch) -> Tensor:
    """The policy's and the critic's loss, both forwards before any backward."""
    return policy_part(roles, batch) + value_part(roles, batch)


def held_now() -> int:
    """Of all that is alive or waits for the garbage collector: memory must not."""
    return sum(type(each) is OffloadedStorage for each in gc.get_objects())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("base", BASES)
def test_gradients_of_two_roles_are_the_same_bits(tiny_model, request, base, checkpointing):
    roles, batch = ppo_roles(tiny_model, gradient_checkpointing=checkpointing, **BASES[base]), some_batch(20)
    both_parts(roles, batch).backward()
    expected = gradients(roles)
    recorder = offloaded(roles)
    gc.disable()
    request.addfinalizer(gc.enable)
    loss = both_parts(roles, batch)
    with roles.active("reference"):  # whatever is active when the backward comes
        loss.backward()
    del loss
    got = gradients(roles)
    assert got.keys() == expected.keys() == roles.trained_parameters().keys()
    assert recorder.left
    assert len(recorder.back) > 0
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(got[name], gradient), name
    assert held_now() == 0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("base", BASES)
def test_no_weight_is_copied_and_no_storage_twice(tiny_model, base, checkpointing):
    """Base, quantized base, adapters and buffers stay; of each storage that leaves there is one copy, back at most one.

    With checkpointed layers it is two layers' inputs and what is outside of the layers.
    """
    roles, batch = ppo_roles(tiny_model, gradient_checkpointing=checkpointing, **BASES[base]), some_batch(20)
    recorder = offloaded(roles)
    weights = {t.untyped_storage().data_ptr() for t in [*roles.parameters(), *roles.buffers()]}
    kept: list[Tensor] = []  # as long as they are, no place is another storage's
    push = recorder.push
    recorder.push = lambda flat: (kept.append(flat), push(flat))[1]
    loss = roles.logprobs(batch, batch.targets).sum()
    places = [place for place, _ in recorder.left]
    assert places
    assert not weights & set(places)
    assert len(set(places)) == len(places)
    loss.backward()
    assert len(set(recorder.back)) == len(recorder.back)
    hidden = sum(batch.lengths) * 64 * roles.causal_model().dtype.itemsize
    layers = sum(nbytes == hidden for _, nbytes in recorder.left)
    if checkpointing:
        assert 2 <= layers <= 4  # the layers' inputs, the last norm's input, what it computes in float32
        assert len(places) <= 8
    else:
        assert len(places) > 16


def test_without_gradients_nothing_leaves(tiny_model):
    roles, batch = ppo_roles(tiny_model), some_batch(20)
    recorder = offloaded(roles)
    with torch.no_grad(), roles.active("reference"):
        roles.logprobs(batch, batch.targets)
    assert not recorder.left


def test_small_storages_integers_and_views_of_weights_stay():
    """A product with a weight saves a view of it; a row lookup saves ids; a mask is bool."""
    model = nn.Linear(64, 64)
    model.requires_grad_(False)
    model.register_buffer("table", torch.randn(64, 64))
    offloader = Offloader(model, CPU, least_bytes=1024)
    offloader.copier = recorder = Recorder()
    states = torch.randn(32, 64, requires_grad=True)
    small = torch.randn(32, 4, requires_grad=True)
    ids = torch.arange(600) % 32
    with offloader.hooks():
        out = (model(states) @ model.table.t()).sum() + small.square().sum()
        out = out + states.index_select(0, ids).masked_fill(torch.ones(600, 64, dtype=torch.bool), 0.0).sum()
        assert recorder.left == []
        out = out + states.square().sum()
        assert [nbytes for _, nbytes in recorder.left] == [32 * 64 * 4]
    out.backward()
    torch.testing.assert_close(states.grad, (model.weight.t() @ model.table.sum(0)).expand(32, 64) * 0
                               + (torch.ones(32, 64) @ model.table @ model.weight) + 2 * states)  # fmt: skip


def test_views_share_a_copy_and_a_changed_storage_gets_another():
    """Transposed, cut and reinterpreted views come back with their own shape, strides and offset."""
    offloader = Offloader(nn.Identity(), CPU, least_bytes=1)
    offloader.copier = recorder = Recorder()
    plain = torch.randn(6, 8, requires_grad=True)
    whole = plain * 1
    views = [whole, whole.t(), whole[2:5, ::2], whole.reshape(3, 16)[1:]]
    expected = torch.autograd.grad(sum((view**2).sum() for view in views), plain, retain_graph=True)[0]
    with offloader.hooks():
        loss = sum((view**2).sum() for view in views)
    assert len(recorder.left) == 1
    assert torch.equal(torch.autograd.grad(loss, plain)[0], expected)
    assert recorder.back == [0]

    with offloader.hooks():
        state = plain * 1  # a storage of its own, changed between two uses: each use gets what it saw
        first = (state.detach() * plain).sum()
        with torch.no_grad():
            state.add_(1.0)
        second = (state.detach() * plain).sum()
    got = torch.autograd.grad(first + second, plain)[0]
    torch.testing.assert_close(got, (2 * plain + 1).detach())


def test_a_place_that_is_used_again_is_another_storage():
    """Storages that die inside the forward give their memory to the next ones; none is taken for an older one."""
    offloader = Offloader(nn.Identity(), CPU, least_bytes=1)
    offloader.copier = recorder = Recorder()
    x = torch.randn(1 << 12, requires_grad=True)
    with offloader.hooks():
        loss = torch.zeros(())
        for power in range(1, 30):
            loss = loss + (torch.full((1 << 12,), float(power)) * x).sum()  # saves the factor, which then is garbage
    assert len({place for place, _ in recorder.left}) < len(recorder.left)
    loss.backward()
    assert torch.equal(x.grad, torch.full_like(x, float(sum(range(1, 30)))))


def test_storages_set_out_before_they_are_asked_for():
    """In the reverse order of the forward, two ahead of the one that is needed."""
    offloader = Offloader(nn.Identity(), CPU, least_bytes=1)
    offloader.copier = recorder = Recorder()
    begun: list[list[int]] = []
    x = torch.randn(64, requires_grad=True)
    with offloader.hooks():
        state = x
        for _ in range(6):
            state = state.exp() * 0.1  # exp saves its result
            state.register_hook(lambda gradient: begun.append(list(recorder.back)))
    count = len(recorder.left)
    state.sum().backward()
    assert sorted(recorder.back) == list(range(count))
    assert recorder.back == sorted(recorder.back, reverse=True)
    assert [len(back) for back in begun] == [0, *[min(count, done + 3) for done in range(count - 1)]]


def test_a_graph_that_is_thrown_away_holds_nothing(tiny_model, request):
    gc.disable()
    request.addfinalizer(gc.enable)
    roles, batch = ppo_roles(tiny_model), some_batch(20)
    offloaded(roles)
    loss = roles.logprobs(batch, batch.targets).sum()
    assert held_now() > 0
    del loss
    assert held_now() == 0


def test_an_error_in_the_forward_leaves_the_hooks_behind():
    offloader = Offloader(nn.Identity(), CPU, least_bytes=1)
    offloader.copier = recorder = Recorder()
    with pytest.raises(ValueError, match="broken"), offloader.hooks():
        raise ValueError("broken")
    (torch.randn(9, requires_grad=True) ** 2).sum().backward()
    assert not recorder.left


def test_on_meta_what_has_left_takes_no_device_memory():
    """A dry run: bytes of the storages alive after a forward, with and without."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(4)]).to("meta")
    x = torch.empty(1024, 256, device="meta")
    sizes = {}
    for used in (False, True):
        offloader = Offloader(model, torch.device("meta"))
        if used:
            with offloader.hooks():
                loss = model(x).sum()
        else:
            loss = model(x).sum()
        gc.collect()
        storages = {}
        for each in gc.get_objects():
            if type(each) is Tensor and each.is_meta and each is not x:
                storages[each.untyped_storage()._cdata] = each.untyped_storage().nbytes()
        sizes[used] = sum(storages.values())
        held = held_now()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()
        assert held == (5 if used else 0)  # the input and four results
    assert sizes[True] < 1 << 20


def test_on_the_cpu_it_is_left_out_and_said(onecard, tiny_model, pairs, tmp_path):
    """The same settings train there, with the same weights in the end."""
    ends = []
    for more in ([], ["--activation_offloading"]):
        run = tmp_path / f"run{len(more)}"
        result = onecard("dpo", "--model", tiny_model, "--dataset", pairs, "--max_steps", 2, "--output_dir", run, *more)
        assert result.code == 0, result.err
        assert ("activation_offloading: not used on the CPU" in result.err) == bool(more)
        ends.append((run / "policy" / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1]
    config = SFTConfig(model=str(tiny_model), activation_offloading=True)
    assert load_roles(config, trained="policy").offloader is None
    assert load_roles(DPOConfig(model=str(tiny_model)), trained="policy").offloader is None
