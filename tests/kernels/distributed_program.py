"""What each of two processes does in `test_distributed`, and the tensors that it leaves."""

from __future__ import annotations

from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DeviceMesh, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import onecard_kernels as k
from tests.kernels.kernels_docs import EXAMPLES

N, D, V, RANKS = 6, 8, 31, 2


class Output(OrderedDict[str, Tensor]):
    """As transformers' outputs are: a mapping with attributes and places."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, input_ids: Tensor, **_: Any) -> Output:
        return Output(last_hidden_state=torch.tanh(self.layer(self.embed(input_ids))))


class Toy(nn.Module):
    """A causal language model as far as `read_head` looks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.lm_head = Trunk(), nn.Linear(D, V, bias=False)
        self.config, self.device = SimpleNamespace(is_encoder_decoder=False), torch.device("cpu")

    def get_decoder(self) -> nn.Module:
        return self.trunk

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.embed

    def forward(self, input_ids: Tensor, **_: Any) -> Output:
        return Output(logits=self.lm_head(self.trunk(input_ids).last_hidden_state))


def data() -> dict[str, Tensor]:
    """Both ranks' tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(RANKS, 2, N - 1, dtype=torch.bool)
    mask[0, 0, 2:] = False
    return {"input_ids": torch.randint(V, (RANKS, 2, N), generator=generator), "mask": mask}


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().double()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.grad.clone() for name, x in module.named_parameters() if x.grad is not None}


def of_docs(rank: int) -> dict[str, Tensor]:
    """The documented recipe."""
    batch = {name: x[rank] for name, x in data().items()}
    tokens = data()["mask"].sum() / RANKS
    names = {"model": toy(), "attention_mask": torch.ones(2, N), "tokens": tokens, **batch}
    exec(compile(EXAMPLES["ddp"], "docs/kernels.md", "exec"), names)
    return gradients(names["model"])


def around_the_wrapper(rank: int) -> dict[str, Tensor]:
    """What the page warns of."""
    batch = {name: x[rank] for name, x in data().items()}
    ddp = DistributedDataParallel(toy())
    hidden = ddp.module.get_decoder()(batch["input_ids"]).last_hidden_state[:, :-1]
    logprobs = k.linear_logprobs(hidden, ddp.module.lm_head.weight, batch["input_ids"][:, 1:], mask=batch["mask"])
    (-logprobs.logprobs.sum()).backward()
    return gradients(ddp.module)


def sharded(rank: int) -> dict[str, Any]:
    """The error for a DTensor head, and the head's gradient by the call that the error names."""
    weight = nn.Parameter(distribute_tensor(toy().lm_head.weight.detach(), DeviceMesh("cpu", [0, 1]), [Shard(0)]))
    hidden = torch.randn(RANKS, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))[rank]
    targets = data()["input_ids"][rank, 0]
    out: dict[str, Any] = {"hidden": hidden, "targets": targets}
    try:
        k.linear_logprobs(hidden, weight, targets)
    except TypeError as error:
        out["error"] = str(error)
    call = out["error"].split("pass ")[1].split(", with ")[0]
    for name, gathering in {"named": call, "alone": "weight.full_tensor()"}.items():
        weight.grad = None
        (
            -k.linear_logprobs(hidden, eval(gathering, {"weight": weight, "Partial": Partial}), targets).logprobs.mean()
        ).backward()
        out[name] = weight.grad.full_tensor()
    try:
        k.linear_logprobs(distribute_tensor(hidden, weight.device_mesh, [Shard(0)]), weight, targets)
    except TypeError as error:
        out["hidden_error"] = str(error)
    return out


def work(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    results = {"docs": of_docs(rank), "around": around_the_wrapper(rank), "sharded": sharded(rank)}
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    distributed.destroy_process_group()
