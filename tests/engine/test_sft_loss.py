"""The loss on completions alone is transformers' own with labels of -100, value and gradient."""

from __future__ import annotations

import pytest
import torch

from onecard.algorithms.sft import count_tokens, sft_loss
from onecard.config import SFTConfig
from onecard.data import sft_examples
from onecard.data.batches import pack
from onecard.models.build import load_roles
from onecard.models.load import load_tokenizer
from tests.engine.data_material import CHATML, rows, say

QUESTION, ANSWER = [say("user", "the cat sat")], [say("assistant", "a good answer")]
RECORDS = {
    "prompt and completion": [
        {"prompt": "the cat", "completion": " sat on the mat"},
        {"prompt": "a good", "completion": " answer"},
    ],
    "chat": [
        {"prompt": QUESTION, "completion": ANSWER},
        {"messages": [*QUESTION, *ANSWER, say("user", "on the mat"), say("assistant", "bad")]},
    ],
}


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("kind", RECORDS)
def test_loss_is_transformers_own(tiny_model, kind, all_tokens):
    config = SFTConfig(model=str(tiny_model), use_peft=False)
    tokenizer = load_tokenizer(config)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    examples = sft_examples(
        rows(*RECORDS[kind]),
        tokenizer,
        max_length=64,
        completion_only_loss=not all_tokens,
        assistant_only_loss=not all_tokens,
        skip_bad_rows=False,
    ).examples
    roles = load_roles(config, trained="policy")
    loss = sft_loss(roles, pack(examples), count_tokens(examples))
    loss.loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in roles.causal_model().named_parameters()}
    roles.zero_grad()

    longest = max(map(len, examples))
    ids = torch.tensor([[*example.tokens, *[0] * (longest - len(example))] for example in examples])
    masks = [[*example.response_mask, *[False] * (longest - len(example))] for example in examples]
    labels = ids.masked_fill(~torch.tensor(masks), -100)
    attention = torch.tensor([[1] * len(example) + [0] * (longest - len(example)) for example in examples])
    assert (labels == -100).any()
    own = roles.causal_model()(input_ids=ids, attention_mask=attention, labels=labels).loss
    own.backward()
    assert loss.loss.item() == pytest.approx(own.item(), rel=1e-5)
    for name, parameter in roles.causal_model().named_parameters():
        assert (ours[name] - parameter.grad).abs().max() <= 2e-5 * max(parameter.grad.abs().max(), 1e-3), name
