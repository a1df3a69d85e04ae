"""The scalar head of a reward model or a critic, and its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onecard.config import Activation
from onecard.utils.errors import OnecardError

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"none": lambda scores: scores, "sigmoid": torch.sigmoid}


class ScalarHead(nn.Linear):
    """`score = activation(weight . h + bias)` of a response. A critic uses the output before the activation.

    `folded`: mean and standard deviation that `fold` normalised the weights by; None if it was not called.
    """

    activation: Activation = "none"
    folded: tuple[float, float] | None = None

    def scores(self, scalars: Tensor) -> Tensor:
        """Scores from the outputs of the linear layer, any shape."""
        return ACTIVATIONS[self.activation](scalars)

    def fold(self, mean: float, std: float) -> None:
        """Change the weights such that each output s becomes (s - mean) / std."""
        with torch.no_grad():
            self.weight.copy_(self.weight.double() / std)
            self.bias.copy_((self.bias.double() - mean) / std)
        self.folded = (mean, std)

    def as_critic(self) -> ScalarHead:
        """Convert the head to a critic's, whose values are not limited to 0..1.

        A sigmoid is replaced by its tangent at 0, 1/2 + z/4.
        """
        if self.activation == "sigmoid":
            self.fold(-2.0, 4.0)
            self.activation, self.folded = "none", None
        return self

    def write(self, path: Path) -> None:
        """Write weights, activation and folded statistics as safetensors."""
        metadata: dict[str, str] = {"score_activation": self.activation}
        if self.folded is not None:
            metadata |= {"score_mean": repr(self.folded[0]), "score_std": repr(self.folded[1])}
        save_file(self.state_dict(), str(path), metadata=metadata)

    def read(self, path: Path) -> None:
        """Read weights and activation from a file of `write`. Without the metadata entry, the activation is "none"."""
        self.load_state_dict(load_file(str(path)))
        with safe_open(str(path), "pt") as file:
            stored = (file.metadata() or {}).get("score_activation", "none")
        activation = next((name for name in get_args(Activation) if name == stored), None)
        if activation is None:
            known = ", ".join(get_args(Activation))
            raise OnecardError(f"unknown score_activation '{stored}'; expected one of {known}.")
        self.activation = activation
