"""Settings of `onecard demo`."""

from __future__ import annotations

from dataclasses import dataclass

from onecard.config.base import option


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a tiny model from random weights: SFT, reward model, DPO and PPO; downloads nothing."""

    output_dir: str = option("runs/demo", "Folder of the demo's runs and its report.html.")
    seed: int = option(4, "Seed of the corpus, the data order and every new weight.")
    fresh: bool = option(False, "Start over. Off: reuse the finished stages in output_dir.")
