"""Prompts -> responses, sampled from the model itself.

The model's own `generation_config` (top-k, top-p, repetition penalty) is not used: what is sampled is the policy, at
the temperature that was asked for. Prompts are sorted by length, so that little is padded, and given back in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onecard import checkpoint
from onecard.config import GenerateConfig
from onecard.data import Prompt, load_rows, prompt_examples, prompt_rows
from onecard.errors import OnecardError
from onecard.metrics import progress, say
from onecard.models.build import load_player
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `temperature` 0 takes the likeliest token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def generation_config(self, eos: int | list[int], pad: int) -> Any:
        """transformers' record of it."""
        from transformers import GenerationConfig

        draws: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            draws = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(max_new_tokens=self.max_new_tokens, eos_token_id=eos, pad_token_id=pad, **draws)


def end_tokens(roles: Roles, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS, and those of the model's generation config (chat models)."""
    own = getattr(roles.causal_model().generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])})


@contextmanager
def bare_generation_config(model: Any) -> Iterator[None]:
    """Without this, transformers fills what a request leaves open from the model's own generation config."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def sample(roles: Roles, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """One response to each prompt, as token ids without the one that ended it."""
    ends = end_tokens(roles, tokenizer)
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=roles.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=roles.device)
    model, settings = roles.causal_model(), sampling.generation_config(ends, pad)
    with bare_generation_config(model):
        out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings)
    responses = []
    for row in out[:, width:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        responses.append(row[:stop])
    return responses


def generate(
    roles: Roles, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, *, batch_size: int
) -> list[str]:
    """One response text to each prompt, in the prompts' order."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    texts = [""] * len(prompts)
    with progress("generate", len(prompts)) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            responses = sample(roles, tokenizer, [prompts[index].tokens for index in chosen], sampling)
            for index, response in zip(chosen, responses, strict=True):
                texts[index] = tokenizer.decode(response, skip_special_tokens=True)
            bar.advance(by=len(chosen))
    return texts


def run(config: GenerateConfig) -> None:
    """`onecard generate`: responses to standard output, or JSONL rows to `output`."""
    if bool(config.prompt) == bool(config.dataset):
        raise OnecardError("--prompt or --dataset: give one of them.")
    tokenizer = load_tokenizer(config)
    rows = load_rows(config.dataset, split=config.dataset_split) if config.dataset else prompt_rows(config.prompt)
    tokenized = prompt_examples(rows, tokenizer)
    for note in tokenized.notes:
        say(f"data: {note}")
    prompts = [prompt for prompt in tokenized.examples for _ in range(config.num_generations)]
    output = Path(config.output) if config.output else None
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise OnecardError(f"output: {output} cannot be written: it is a folder, or its own folder is not there.")
    roles = load_player(config, role="policy")
    torch.manual_seed(config.seed)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    texts = generate(roles, tokenizer, prompts, sampling, batch_size=config.batch_size)
    lines = [
        json.dumps({"prompt": prompt.text, "completion": text}, ensure_ascii=False)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    if output is not None:
        checkpoint.write_text(output, "\n".join(lines) + "\n")
        say(f"{len(lines)} responses: {output}")
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt.text} ->{text}" if config.num_generations > 1 or len(prompts) > 1 else text)
