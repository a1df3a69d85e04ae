"""Reward models: an adapter and a scalar head, read at each answer's last token.

    rows -> tokens -> batch of pairs, scores or rankings -> scores -> (loss, metrics)

| file | what |
|---|---|
| `command.py` | `onecard reward`: the run, its held-out metrics, `normalize_scores` |
| `kinds.py` | the table of dataset kinds: columns, tokens, batches and loss of each |
| `losses.py` | scores -> loss, metrics |
| `agreement.py` | agreement of the model's scores with the dataset's: correlations, order |

Not implemented: rewards of each token or step (process rewards), several objectives in one model, and ties.
"""

from onecard.algorithms.reward.command import run
from onecard.algorithms.reward.kinds import reward_loss
from onecard.algorithms.reward.losses import bradley_terry_loss, ranking_loss, regression_loss

__all__ = ["bradley_terry_loss", "ranking_loss", "regression_loss", "reward_loss", "run"]
