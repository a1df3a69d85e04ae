"""The records that the policy losses take behind their signatures, out of the keywords of these signatures."""

from __future__ import annotations

from typing import Any

from onecard_kernels.ppo.options import PolicyOptions, PolicyTokens


def records(**given: Any) -> dict[str, Any]:
    """Keywords of what is behind: the two records, and what belongs to neither as it came."""
    tokens = PolicyTokens(**{name: given.pop(name) for name in PolicyTokens._fields})
    options = PolicyOptions(**{name: given.pop(name) for name in PolicyOptions._fields})
    return {"tokens": tokens, "options": options, **given}
