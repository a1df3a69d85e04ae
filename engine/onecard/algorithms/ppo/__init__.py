"""Proximal policy optimization (Schulman et al., 2017, https://arxiv.org/abs/1707.06347) from human feedback
(Ouyang et al., 2022, https://arxiv.org/abs/2203.02155), with all roles on one base.

    prompts -> sample responses (Episode) -> scores and costs
    -> old and reference log-probs, values, rewards per token -> advantages (Experience)
    -> for each epoch and minibatch: linear_ppo_loss, backward, value_loss, backward, optimizer step

| file | what |
|---|---|
| `command.py` | `onecard ppo`: loading, startup checks, the run |
| `job.py` | one iteration from top to bottom, and its losses |
| `sampling.py` | prompts -> episodes |
| `scores.py` | scores and costs of responses; the scale of `normalize_reward` |
| `constraint.py` | costs -> which responses are in the loss, or what is subtracted from their scores |
| `experience.py` | episodes and scores -> rewards, advantages, returns; the KL controller |
| `estimators.py` | rewards -> advantages: GAE, A2C, REINFORCE, RLOO, GRPO |
| `evaluation.py` | held-out prompts -> scores and samples |
| `startup.py` | checks of the rewards and settings before the first step |

Not implemented: training all weights (the roles are adapters on one base), continuing with an earlier run's critic, and
more than one GPU.
"""
