"""Proximal policy optimization (Schulman et al., 2017, https://arxiv.org/abs/1707.06347) from human feedback
(Ouyang et al., 2022, https://arxiv.org/abs/2203.02155), with all roles on one base.

    prompts -> sampling: Episode -> scores, constraint: what answers are worth and cost
    -> experience: old and reference log-probs, values, rewards per token -> estimators: advantages: Experience
    -> for each epoch and minibatch: losses: linear_ppo_loss, backward, value_loss, backward -> one optimizer step

| file | what |
|---|---|
| `command.py` | `onecard ppo`: loading, startup checks, the run |
| `settings.py` | how many of what; settings that contradict each other |
| `job.py` | one iteration, top to bottom |
| `sampling.py` | prompts -> episodes |
| `scores.py` | what judges said of answers, and its scale |
| `constraint.py` | costs -> which answers are learned from, or what they pay |
| `experience.py` | episodes and scores -> rewards, advantages, returns; the KL controller |
| `estimators.py` | rewards -> advantages: GAE, A2C, REINFORCE, RLOO, GRPO |
| `losses.py` | experiences -> losses |
| `evaluation.py` | held-out prompts -> scores and samples |
| `startup.py` | what has to agree before the first step |

Left out: training all weights (the roles are adapters on one base), going on from an earlier run's critic, and more
than one card.
"""
