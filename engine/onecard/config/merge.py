"""Settings of `onecard merge`."""

from __future__ import annotations

from dataclasses import dataclass

from onecard.config.base import ModelConfig, option, raise_first


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ModelConfig):
    """Merge an adapter into its base and write one plain Hugging Face model."""

    output_dir: str = option("", "Folder of the merged model; it must not exist, or be empty.")

    def validate(self) -> None:
        super().validate()
        raise_first({
            "load_in_4bit: an adapter cannot be merged into 4-bit weights; leave it out, and give --dtype.": (
                self.load_in_4bit
            )
        })  # fmt: skip
