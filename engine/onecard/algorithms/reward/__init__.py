"""Reward models: an adapter and a scalar head, read at each answer's last token.

    rows -> tokens -> record of pairs, scores or rankings -> scores -> (loss, metrics)

| file | what |
|---|---|
| `command.py` | `onecard reward`: settings, the run, held-out rows, the scores' mean and standard deviation |
| `kinds.py` | the table of kinds of rows: their columns, tokens, records and losses |
| `losses.py` | scores and records -> loss, metrics |
| `agreement.py` | how well scores agree with given ones: correlations, order |

Left out: rewards of each token or step (process rewards), several objectives in one model, and ties.
"""

from onecard.algorithms.reward.command import run
from onecard.algorithms.reward.kinds import reward_loss
from onecard.algorithms.reward.losses import bradley_terry_loss, ranking_loss, regression_loss

__all__ = ["bradley_terry_loss", "ranking_loss", "regression_loss", "reward_loss", "run"]
