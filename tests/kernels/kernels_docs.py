"""The code examples of docs/kernels.md by name, and the variables that most of them use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
B, T, D, V = 4, 9, 32, 61
Namespace = dict[str, Any]
Leaves = dict[str, Tensor]


def tokens(dtype: torch.dtype) -> tuple[Namespace, Leaves]:
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    mask = (torch.rand(B, T) < 0.7).to(dtype)
    names = {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.randint(V, (B, T)),
        "mask": mask,
        "old_logprobs": -4.0 * torch.rand(B, T, dtype=dtype),
        "advantages": torch.randn(B, T, dtype=dtype),
    }
    return names, {"hidden": hidden, "weight": weight}
