"""Roles on one base, on a card: checkpointed layers, a base in 4 bit, and gradients of two roles in one backward."""

from __future__ import annotations

import pytest
import torch

from onecard.data.batches import TokenBatch, TokenSequence, pack, to_device
from onecard.models.roles import Roles
from tests.engine.attention_material import distance
from tests.engine.roles_material import gradients, policy_part, ppo_roles, value_part
from tests.gpu.card import DEVICE

BASES = {"bf16": {"dtype": "bfloat16"}, "nf4": {"load_in_4bit": True, "dtype": "bfloat16"}}
over_bases = pytest.mark.parametrize("base", BASES)
Gradients = dict[str, torch.Tensor]
ROUNDED = 1e-2  # of a role's gradient, where a card's attention adds up in any order; another adapter's is off by 1


def some_batch(roles: Roles) -> TokenBatch:
    """Five sequences of different lengths, none a multiple of a tile."""
    lengths = (37, 150, 5, 64, 201)
    sequences = [tuple((31 * i + 7 * j) % 290 + 5 for i in range(length)) for j, length in enumerate(lengths)]
    return to_device(
        pack([TokenSequence(each, (False,) * 4 + (True,) * (len(each) - 4)) for each in sequences]), DEVICE
    )


def role_of(name: str) -> str:
    return "policy" if ".policy." in name else "value"


def each_alone(roles: Roles, batch: TokenBatch) -> Gradients:
    """A backward of the policy, then one of the critic."""
    policy_part(roles, batch).backward()
    found = gradients(roles)
    assert {role_of(name) for name in found} == {"policy"}
    value_part(roles, batch).backward()
    return found | gradients(roles)


def assert_same(got: Gradients, expected: Gradients, *, steady: bool) -> None:
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        assert right.abs().max() > 0, name
        assert got[name].dtype == right.dtype
        if steady:
            assert torch.equal(got[name], right), name
    for role in {role_of(name) for name in expected}:
        both = [torch.cat([x.flatten() for n, x in of.items() if role_of(n) == role]) for of in (got, expected)]
        assert distance(*both) <= ROUNDED, role


def is_steady(roles: Roles, batch: TokenBatch, expected: Gradients) -> bool:
    """Whether this device's kernels give the same bits twice at all."""
    again = each_alone(roles, batch)
    return all(torch.equal(again[name], right) for name, right in expected.items())


@over_bases
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_one_backward_gives_each_role_its_own_gradients(llama, base: str, checkpointing: bool) -> None:
    roles = ppo_roles(llama, gradient_checkpointing=checkpointing, **BASES[base])
    assert roles.device.type == DEVICE.type
    batch = some_batch(roles)
    apart = each_alone(roles, batch)
    assert apart.keys() == roles.trained_parameters().keys()
    (policy_part(roles, batch) + value_part(roles, batch)).backward()
    assert_same(gradients(roles), apart, steady=is_steady(roles, batch, apart))


@over_bases
def test_checkpointing_changes_no_gradient_while_roles_switch(llama, base: str) -> None:
    """Layers are recomputed when another role is playing than the one whose forward it was."""
    plain = ppo_roles(llama, **BASES[base])
    batch = some_batch(plain)
    expected = each_alone(plain, batch)
    steady = is_steady(plain, batch, expected)
    del plain
    roles = ppo_roles(llama, gradient_checkpointing=True, **BASES[base])
    turns = (("policy", policy_part, "value"), ("policy", policy_part, "reference"), ("value", value_part, "policy"))
    for role, part, active in turns:
        loss = part(roles, batch)
        with roles.active(active):
            loss.backward()
        own = {name: right for name, right in expected.items() if role_of(name) == role}
        assert_same(gradients(roles), own, steady=steady)
