"""Direct preference optimization (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290), and related losses.

    rows -> tokens, masks -> PreferenceBatch -> reference log-probs (adapters off, no grad) -> policy hidden states
    -> linear_dpo_loss -> (loss, metrics)

| file | what |
|---|---|
| `command.py` | `onecard dpo`: settings, the run |
| `variants.py` | the table of losses: what each is computed from, and the settings it takes |
| `losses.py` | batches and roles -> loss, metrics |
| `reference.py` | the reference's log-probs, computed before training and cached on disk |

Not implemented: a reference that follows the policy (TR-DPO), LD-DPO, AlphaPO, and CPO's hinge and ipo.
"""

from onecard.algorithms.dpo.command import make_recipe, run
from onecard.algorithms.dpo.losses import preference_loss
from onecard.algorithms.dpo.variants import loss_keywords

__all__ = ["loss_keywords", "make_recipe", "preference_loss", "run"]
