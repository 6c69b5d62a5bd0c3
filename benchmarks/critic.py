"""A linear critic of latents: the final reward from features that the rollout computes anyway.

`credit` is a custom rule for `TPGRPOConfig(credit="critic.credit")`, after `attach`: a step is credited with the
lambda-return of the critic's values instead of rewards of ODE completions, which takes no function evaluations.
"""

import torch
from torch import Tensor

from trl_tpgrpo.algorithm.credit import CreditRule, lambda_return


FOLDS = 8
LAMBDA = 0.5


def fit(features: Tensor, rewards: Tensor, group: int, penalty: float) -> Tensor:
    """Fit weights (K, F) of features at K steps to final rewards, both as differences to the mean of the group.

    Args:
        features: (N, K, F); trajectories of a prompt lie side by side.
        rewards: (N,).
        group: Trajectories of a prompt.
        penalty: Of the ridge regression, for features of unit variance and one trajectory.
    """
    inputs, targets = centred(features, group).transpose(0, 1), centred(rewards, group)
    squares = inputs.mT @ inputs  # (K, F, F)
    sizes = squares.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    return torch.linalg.solve(squares + torch.diag_embed(penalty * sizes), inputs.mT @ targets)


def predict(features: Tensor, weights: Tensor, group: int) -> Tensor:
    """Predict differences of the final rewards to the mean of the group: (N, K) from (N, K, F)."""
    return (centred(features, group) * weights).sum(-1)


def centred(values: Tensor, group: int) -> Tensor:
    """Differences of (N, ...) to the means of groups of adjacent rows, in float64."""
    grouped = values.double().unflatten(0, (-1, group))
    return (grouped - grouped.mean(1, keepdim=True)).flatten(0, 1)


def explained(values: Tensor, rewards: Tensor, group: int) -> list[float]:
    """Share of the variance of final rewards (N,) within groups that values (N, K) explain, by step."""
    targets = centred(rewards, group)[:, None]
    return (1 - (targets - values).square().sum(0) / targets.square().sum().clamp(min=1e-12)).tolist()


class Recorder:
    """The features of a rollout: the mean over tokens of the last block's output, at every step of every sweep."""

    def __init__(self, transformer: torch.nn.Module, num_steps: int):
        self.num_steps, self.calls, self.explained = num_steps, [], []  # calls: (sweep, F)
        transformer.norm_out.register_forward_pre_hook(self._record)

    def _record(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            self.calls.append(inputs[0].mean(1))

    def of_the_rollout(self) -> Tensor:
        """Features of all trajectories, (B, T, F), if nothing else was evaluated since `calls` was cleared."""
        steps = [torch.cat(self.calls[step :: self.num_steps]) for step in range(self.num_steps)]
        self.calls.clear()
        return torch.stack(steps, 1)


recorder: Recorder


def attach(transformer: torch.nn.Module, num_steps: int) -> None:
    """Record the features of a run on one process."""
    global recorder
    recorder = Recorder(transformer, num_steps)


def credit(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Credit of the K steps of a window that begins at the first step, (B, K); a group's critic has not seen it."""
    group, num_steps = rule.batch.num_generations, rule.batch.log_probs.shape[1]
    features, final = recorder.of_the_rollout()[:, :num_steps], rewards[:, -1]
    fold, values = torch.arange(len(features)) // group % FOLDS, features.new_zeros(features.shape[:2]).double()
    for number in range(min(FOLDS, len(features) // group)):
        others, own = fold != number, fold == number
        values[own] = predict(features[own], fit(features[others], final[others], group, penalty=1.0), group)
    recorder.explained.append(explained(values, final, group))
    return lambda_return(torch.cat([values, centred(final, group)[:, None]], 1), LAMBDA).float()


credit.needs_completions = False  # type: ignore[attr-defined]
