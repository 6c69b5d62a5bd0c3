"""A linear critic of latents: the final reward from features that the rollout computes anyway."""

import torch
from torch import Tensor


PENALTY = 0.1  # of the ridge regression, a trajectory, for features of unit variance


def fit(features: Tensor, rewards: Tensor, group: int) -> Tensor:
    """Fit weights that predict differences of final rewards to the mean of their group, by ridge regression.

    Args:
        features: Of M batches of B trajectories at K steps, (M, B, K, F).
        rewards: Final rewards, (M, B).
        group: Trajectories of one prompt, which lie side by side.

    Returns:
        Weights of each step, (K, F).
    """
    inputs, targets = centred(features, group).flatten(0, 1), centred(rewards, group).flatten()
    deviations = inputs.std(0).clamp(min=1e-9)  # (K, F)
    inputs = (inputs / deviations).transpose(0, 1)  # (K, N, F)
    penalty = PENALTY * len(targets) * torch.eye(inputs.shape[2], dtype=inputs.dtype)
    return torch.linalg.solve(inputs.mT @ inputs + penalty, inputs.mT @ targets) / deviations


def predict(features: Tensor, weights: Tensor, group: int) -> Tensor:
    """Predict differences of final rewards to the mean of their group, (M, B, K)."""
    return (centred(features, group) * weights).sum(-1)


def centred(values: Tensor, group: int) -> Tensor:
    """Differences of (M, B, ...) to the means of groups, in float64."""
    grouped = values.double().unflatten(1, (-1, group))
    return (grouped - grouped.mean(2, keepdim=True)).flatten(1, 2)
