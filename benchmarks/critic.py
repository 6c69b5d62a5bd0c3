"""A linear critic of latents, offline: the final reward from features that the rollout computes anyway."""

import torch
from torch import Tensor


FOLDS = 8
PENALTY = 300.0  # of the ridge regression, for features of unit variance and some 3,000 trajectories


def cross_fitted_values(features: Tensor, rewards: Tensor, group: int) -> Tensor:
    """Predict final rewards at each step from the features, by weights fitted to other batches.

    Args:
        features: Of M batches of B trajectories at K steps, (M, B, K, F).
        rewards: Final rewards, (M, B).
        group: Trajectories of one prompt, which lie side by side.

    Returns:
        Predicted differences to the mean of the group, (M, B, K).
    """
    inputs, targets = centred(features, group), centred(rewards, group)
    inputs = inputs / inputs.std((0, 1), keepdim=True).clamp(min=1e-9)
    fold = torch.arange(len(inputs)) % FOLDS
    values = torch.empty(inputs.shape[:-1], dtype=inputs.dtype)
    for number in range(min(FOLDS, len(inputs))):
        others, own = fold != number, fold == number
        for step in range(inputs.shape[2]):
            known = inputs[others, :, step].flatten(0, 1)
            penalty = PENALTY * torch.eye(known.shape[1], dtype=known.dtype)
            weights = torch.linalg.solve(known.T @ known + penalty, known.T @ targets[others].flatten())
            values[own, :, step] = inputs[own, :, step] @ weights
    return values


def explained(values: Tensor, rewards: Tensor, group: int) -> list[float]:
    """Share of the final rewards' variance within groups that values (M, B, K) explain, by step."""
    targets = centred(rewards, group)[..., None]
    return (1 - (targets - values).square().sum((0, 1)) / targets.square().sum()).tolist()


def centred(values: Tensor, group: int) -> Tensor:
    """Differences of (M, B, ...) to the means of groups, in float64."""
    grouped = values.double().unflatten(1, (-1, group))
    return (grouped - grouped.mean(2, keepdim=True)).flatten(1, 2)
