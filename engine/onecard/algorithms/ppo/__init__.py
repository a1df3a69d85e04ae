"""Proximal policy optimization (Schulman et al., 2017, https://arxiv.org/abs/1707.06347) from human feedback
(Ouyang et al., 2022, https://arxiv.org/abs/2203.02155), with all roles on one base.

    prompts -> sampling: Episode -> experience: old and reference log-probs, values, rewards, GAE: Experience
    -> for each epoch and minibatch: losses: linear_ppo_loss, backward, value_loss, backward -> one optimizer step

| file | what |
|---|---|
| `command.py` | `onecard ppo`: settings, loading, startup checks, the run |
| `job.py` | one iteration, top to bottom |
| `sampling.py` | prompts -> episodes |
| `experience.py` | episodes and scores -> rewards, advantages, returns; the KL controller |
| `losses.py` | experiences -> losses |
| `evaluation.py` | held-out prompts -> scores and samples |
| `startup.py` | what has to agree before the first step |

Left out: a critic on the policy's own trunk, dense rewards, bootstrapping of episodes that were cut at response_length
(their return ends there), and estimators other than GAE.
"""
