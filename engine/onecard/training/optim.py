"""Optimizers and learning rate schedules, by TRL's names; float32 master weights for weights in 16 bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onecard.config import TrainConfig
from onecard.models.load import FULL_PRECISION


def adamw_8bit(parameters: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit states: 2 bytes a parameter instead of 8. Small tensors keep 32-bit states."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def paged_adamw_8bit(parameters: Iterable[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """The same, with states that move to host memory when the GPU is full. On CPU there is nothing to page."""
    import bitsandbytes

    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return bitsandbytes.optim.PagedAdamW8bit(parameters, **settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_8bit": adamw_8bit,
    "paged_adamw_8bit": paged_adamw_8bit,
}


MASTER_GRADIENT_BYTES = 32 << 20  # float32 gradients that a step has in memory at a time


def master_of(weight: nn.Parameter) -> nn.Parameter:
    """A float32 copy of a 16-bit weight. Takes the value before rounding if the weight has it, and frees that."""
    full = vars(weight).pop(FULL_PRECISION, weight.detach())
    return nn.Parameter(full.to(weight.device, torch.float32, copy=True))


class MasterOptimizer(torch.optim.Optimizer):
    """An optimizer on float32 masters of 16-bit weights. The weights are the masters, rounded.

        master <- update(master, float(gradient));  weight <- round(master)

    An update of less than half the distance between two 16-bit numbers (2^-9 of the weight, in bfloat16) does not
    change the weight, but it changes the master. A master starts as the weight before it was rounded, if that is known.
    A float32 parameter is its own master. `state_dict` has the masters, so a resumed run starts from them.
    """

    def __init__(
        self, make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], parameters: Iterable[nn.Parameter]
    ) -> None:
        # No super().__init__: the groups and states are those of the inner optimizer.
        self.parameters = list(parameters)
        self.masters = [each if each.dtype == torch.float32 else master_of(each) for each in self.parameters]
        self.inner = make(self.masters)
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def masters_by_index(self) -> Iterator[tuple[int, nn.Parameter, nn.Parameter]]:
        """`(index, weight, master)` of each weight that is not its own master."""
        for index, (weight, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            if weight is not master:
                yield index, weight, master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update. 16-bit gradients are cast to float32 and freed, a few MiB at a time. `closure` is not called."""
        batch: list[tuple[nn.Parameter, nn.Parameter]] = []
        batch_bytes = 0
        for _, weight, master in self.masters_by_index():
            if weight.grad is None:
                continue
            master.grad, weight.grad = weight.grad.float(), None
            batch.append((weight, master))
            batch_bytes += master.numel() * master.element_size()
            if batch_bytes >= MASTER_GRADIENT_BYTES:
                self.update(batch)
                batch, batch_bytes = [], 0
        self.update(batch)

    def update(self, batch: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Step the inner optimizer for the masters with a gradient, free the gradients, and round into the weights."""
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        for weight, master in batch:
            weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the weights' gradients; the masters have none between steps."""
        for weight in self.parameters:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and the masters by index."""
        masters = {index: master.detach() for index, _, master in self.masters_by_index()}
        return {"inner": self.inner.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        for index, weight, master in self.masters_by_index():
            master.copy_(state_dict["masters"][index])
            weight.copy_(master)


def make_optimizer(config: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` names; with float32 masters if any of the parameters is in 16 bit."""
    make = partial(
        OPTIMIZERS[config.optim],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    trained = list(parameters)
    return MasterOptimizer(make, trained) if any(each.dtype.itemsize < 4 for each in trained) else make(trained)


def clip_grad_norm(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Clip gradients to norm `limit`, as `clip_grad_norm_`. Returns the norm, in float32 for 16-bit gradients too."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    tensors_or_norms = [
        each if each.dtype in (torch.float32, torch.float64) else torch.linalg.vector_norm(each, dtype=torch.float32)
        for each in gradients
    ]
    norm = torch.nn.utils.get_total_norm(tensors_or_norms)
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def make_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int, *, first: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule `lr_scheduler_type` over `total_steps` steps, starting at step `first`."""
    from transformers import get_scheduler

    share = config.warmup_steps
    warmup = int(share * total_steps) if share < 1 else int(share)
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps + first
    )
    if first == 0:
        return scheduler
    shape = scheduler.lr_lambdas[0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step + first))
