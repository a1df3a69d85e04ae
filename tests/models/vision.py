"""Tiny vision-language models, whose text decoder is what onecard trains."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tests.models.families import DELTA, SIZES, VISION, shake

TOWER = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 48, "num_position_embeddings": 16}
# kind: its text decoder's, its tower's, and what else they need
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", "siglip_vision_model", {}, {}, {"mm_tokens_per_image": 4}),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_vision", DELTA, {}, {"image_token_id": 299, "video_token_id": 298}),
    "llama4": (
        "llama4_text", "llama4_vision_model", {},
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}, {"image_token_index": 299},
    ),
}  # fmt: skip


def known(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a kind of config has settings for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    taken = inspect.signature(made.__init__).parameters
    return {name: value for name, value in sizes.items() if hasattr(made, name) or name in taken}


def vision_model(name: str) -> Any:
    """A float32 model in evaluation mode."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text, tower, text_more, tower_more, more = KINDS[name]
    settings = CONFIG_MAPPING[name](
        text_config={**known(text, SIZES), **text_more, "model_type": text},
        vision_config={**known(tower, TOWER), **tower_more, "model_type": tower},
        **more,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(settings).eval()
    shake(model)
    return model
