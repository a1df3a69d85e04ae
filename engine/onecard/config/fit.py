"""Settings of `onecard fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onecard.config.base import option

Algorithm = Literal["sft", "reward", "dpo", "ppo"]
Target = Literal["cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Plan whether a training run fits on a GPU, and which settings make it fit; needs no weights and no GPU.

    It also takes every setting of the command that it plans, and that command's config.yaml as --config.
    """

    algorithm: Algorithm = option("ppo", "Training command to plan.")
    card: str = option(
        "", "Memory of the card, such as 12GB, or a card's name, such as 'RTX 3060'. Empty: print only the plan."
    )
    device: Target = option("cuda", "Device that the run is planned for. cpu: to compare the plan with a run on a CPU.")
    prompt_length: int = option(0, "Tokens of a prompt; 0: max_length minus the response.", least=0)
    response_length: int = option(
        0, "Tokens of a response; 0: half of max_length. With ppo: the response_length of that command.", least=0
    )
    json: bool = option(False, "Print the answer as JSON.")
