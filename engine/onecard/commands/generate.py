"""`onecard generate`: samples responses to prompts from the command line or a file."""

from __future__ import annotations

import json
import sys

import torch

from onecard.commands.outputs import output_file
from onecard.config import GenerateConfig, SamplingConfig
from onecard.data import load_rows, prompt_examples, prompt_rows
from onecard.data.templates import template_date, today
from onecard.models.build import load_frozen_role
from onecard.models.load import context_length, load_tokenizer
from onecard.models.vocabulary import check_tokens
from onecard.rollout import Sampling, generate
from onecard.training.startup import check_decoding
from onecard.utils.errors import OnecardError, escape_controls
from onecard.utils.files import write_text
from onecard.utils.progress import say


def longest_prompt(config: SamplingConfig) -> int | None:
    """Longest prompt in tokens: the context minus `max_new_tokens`; None if the model does not limit its context."""
    limit = context_length(config)
    if limit is not None and config.max_new_tokens >= limit:
        raise OnecardError(
            f"max_new_tokens: {config.max_new_tokens} leaves no room for a prompt in the model's context of {limit}."
        )
    return None if limit is None else limit - config.max_new_tokens


def run(config: GenerateConfig) -> None:
    """`onecard generate`: print the responses, or write them as JSONL rows to `output`."""
    config.validate()
    output = output_file(config) if config.output else None
    tokenizer = load_tokenizer(config)
    rows = load_rows(config.dataset, split=config.dataset_split) if config.dataset else prompt_rows(config.prompt)
    with template_date(today()):
        tokenized = prompt_examples(rows, tokenizer, max_length=longest_prompt(config))
    for note in tokenized.notes:
        say(f"data: {note}")
    prompts = [prompt for prompt in tokenized.examples for _ in range(config.num_generations)]
    roles = load_frozen_role(config, role="policy")
    check_tokens(roles.causal_model(), tokenizer, [prompt.tokens for prompt in prompts])
    check_decoding(roles, max(len(prompt.tokens) for prompt in prompts) + config.max_new_tokens)
    torch.manual_seed(config.seed)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    texts = generate(roles, tokenizer, prompts, sampling, batch_size=config.batch_size)
    if output is not None:
        lines = [
            json.dumps({"prompt": prompt.text, "completion": text}, ensure_ascii=False)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        write_text(output, "\n".join(lines) + "\n")
        say(f"{len(lines)} responses: {output}")
        return
    for prompt, text in zip(prompts, texts, strict=True):
        line = f"{prompt.text} ->{text}" if len(prompts) > 1 else text
        print(escape_controls(line) if sys.stdout.isatty() else line)
