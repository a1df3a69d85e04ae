"""Settings of `onecard generate`."""

from __future__ import annotations

from dataclasses import dataclass

from onecard.config.base import SamplingConfig, option, raise_first


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Sample responses to prompts."""

    prompt: list[str] = option([], "A prompt; may be given several times.")
    dataset: str = option("", "Rows with a `prompt` column, instead of --prompt.")
    dataset_split: str = option("test", "Split to use when dataset is a folder or a hub dataset.")
    output: str = option("", "JSON lines file for rows with `prompt` and `completion`. Empty: print them.")
    overwrite: bool = option(False, "Replace the output file if it exists.")
    num_generations: int = option(1, "Responses to each prompt.", least=1)
    batch_size: int = option(16, "Prompts generated together.", least=1)

    def validate(self) -> None:
        raise_first({"--prompt or --dataset: give one of them.": bool(self.prompt) == bool(self.dataset)})
        super().validate()
