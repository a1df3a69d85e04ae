"""Log-probs of one text by a role, by a folder's model and by transformers; and adapters with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.config import DPOConfig, ModelConfig, RewardConfig
from onecard.data.batches import TokenSequence, pack
from onecard.models.build import load_frozen_role, load_roles
from onecard.models.load import load_tokenizer
from onecard.models.roles import Roles

TOKENS = tuple((7919 * place + 13) % 290 for place in range(40))


@torch.no_grad()
def by_transformers(model: Any) -> Tensor:
    ids = torch.tensor([TOKENS])
    logits = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
    return logits[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1)


@torch.no_grad()
def by_role(roles: Roles, role: str = "policy") -> Tensor:
    batch = pack([TokenSequence(TOKENS, (True,) * len(TOKENS))])
    with roles.active(role):
        return roles.logprobs(batch, batch.targets)


def by_folder(folder: Path) -> Tensor:
    """Of a model, an adapter or a run."""
    return by_role(load_frozen_role(ModelConfig(model=str(folder)), role="anyone"), "anyone")


def random_adapter(base: Path, folder: Path, role: str = "policy", **settings: Any) -> Path:
    """An adapter whose every weight is random, as a run exports it."""
    kind = RewardConfig if role == "reward" else DPOConfig
    config = kind(model=str(base), **settings)
    roles = load_roles(config, trained=role, scalar=role == "reward")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    roles.export(role, folder, load_tokenizer(config))
    return folder
