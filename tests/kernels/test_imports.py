"""onecard_kernels stands alone: torch and the standard library, nothing of the engine or of the libraries around it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import onecard_kernels
from onecard_kernels import launch

PROGRAM = """
import sys

BLOCKED = {"transformers", "peft", "triton", "datasets", "accelerate", "bitsandbytes", "trl", "onecard"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())

import torch
import onecard_kernels as k
import onecard_kernels.modules

hidden = torch.randn(4, 8, requires_grad=True)
weight = torch.randn(31, 8)
k.linear_dpo_loss(hidden, weight, torch.arange(4), torch.tensor([0, 0, 1, -1]), torch.zeros(2)).loss.backward()
logps = k.selective_log_softmax(hidden @ weight.T, torch.arange(4), return_entropy=True).logprobs
k.token_kl(logps, logps.detach()).sum().backward()
tokens = k.group_advantages(torch.randn(4), group_size=2), torch.ones(4)
k.linear_ppo_loss(hidden, weight, torch.arange(4), logps.detach(), *tokens).loss.backward()
k.value_loss(hidden[:, 0], *k.gae(*hidden.detach().T[:2].view(2, 1, 4), torch.ones(1, 4)).returns.expand(2, 4),
             torch.ones(4)).loss.backward()
assert hidden.grad.isfinite().all()
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
print("ran")
"""


COUNTED = """
import sys, time

began = time.perf_counter()
import torch
of_torch, before = time.perf_counter() - began, set(sys.modules)
began = time.perf_counter()
import onecard_kernels, onecard_kernels.modules
print((time.perf_counter() - began) / of_torch, *{name.split(".")[0] for name in set(sys.modules) - before})
"""


def run(program: str) -> str:
    """What a new interpreter prints that has the library and nothing else on its path."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(Path(onecard_kernels.__file__).parents[1]), "PATH": "", "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_and_runs_with_everything_else_blocked() -> None:
    assert run(PROGRAM) == "ran"


def test_the_import_adds_no_module_to_those_of_torch() -> None:
    """torch.compile's machinery above all, which takes longer to import than torch. Without it: about 3 % of torch."""
    share, *added = run(COUNTED).split()
    assert added == ["onecard_kernels"]
    assert float(share) < 0.5


def test_constants_of_graphs_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...
    def theirs() -> None: ...

    launch.constant_in_graphs(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_public_names() -> None:
    assert sorted(onecard_kernels.__all__) == onecard_kernels.__all__
    assert all(hasattr(onecard_kernels, name) for name in onecard_kernels.__all__)
