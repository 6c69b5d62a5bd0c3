"""A custom credit rule: the step reward, discounted by the number of the step. docs/trainer.md explains rules.

trl-tpgrpo train --config examples/recipes/testbed.yaml --credit examples/discounted_credit.py:discounted
"""

import torch


GAMMA = 0.9


def discounted(rewards, rule):
    """Return `r_j * GAMMA ** j`: (N, K) from the rewards R_j along N trajectories, (N, K + 1)."""
    gains = rewards.diff(dim=1)
    return gains * GAMMA ** torch.arange(gains.shape[1])
