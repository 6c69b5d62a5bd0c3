"""A linear critic of latents: the final reward from features that the rollout computes anyway.

`credit` is a custom rule for `TPGRPOConfig(credit="critic.credit")`, after `attach`: a step is credited with the
lambda-return of the critic's values instead of rewards of ODE completions, which takes no function evaluations.
"""

import torch
from torch import Tensor

from trl_tpgrpo.algorithm.credit import CreditRule, lambda_return


PENALTY = 0.1  # of the ridge regression, a trajectory, for features of unit variance
MEMORY = 0.9  # weight of a rollout at the next one
LAMBDA = 0.5


class LinearCritic:
    """Ridge regression of final rewards on features at K steps, both as differences to the mean of the group."""

    def __init__(self) -> None:
        self.squares, self.products = torch.zeros(()), torch.zeros(())  # (K, F, F) and (K, F)

    def learn(self, features: Tensor, rewards: Tensor, group: int) -> None:
        """Fit to the features (N, K, F) and rewards (N,) of more trajectories; what was before counts less."""
        inputs, targets = centred(features, group).transpose(0, 1), centred(rewards, group)
        self.squares = MEMORY * self.squares + inputs.mT @ inputs
        self.products = MEMORY * self.products + inputs.mT @ targets

    def values(self, features: Tensor, group: int) -> Tensor:
        """Predict differences to the mean final reward of the group: (N, K) from (N, K, F)."""
        if not self.squares.ndim:
            return torch.zeros(features.shape[:2], dtype=torch.float64)
        penalty = PENALTY * self.squares.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
        weights = torch.linalg.solve(self.squares + torch.diag_embed(penalty), self.products)
        return (centred(features, group) * weights).sum(-1)


def centred(values: Tensor, group: int) -> Tensor:
    """Differences of (N, ...) to the means of groups of adjacent rows, in float64."""
    grouped = values.double().unflatten(0, (-1, group))
    return (grouped - grouped.mean(1, keepdim=True)).flatten(0, 1)


class Recorder:
    """The features of a rollout: the mean over tokens of the last block's output, at every step of every sweep."""

    def __init__(self, transformer: torch.nn.Module, num_steps: int):
        self.num_steps, self.calls = num_steps, []  # (sweep, F)
        transformer.norm_out.register_forward_pre_hook(self._record)

    def _record(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            self.calls.append(inputs[0].mean(1))

    def of_the_rollout(self) -> Tensor:
        """Features of all trajectories, (B, T, F), if nothing else was evaluated since `calls` was cleared."""
        steps = [torch.cat(self.calls[step :: self.num_steps]) for step in range(self.num_steps)]
        self.calls.clear()
        return torch.stack(steps, 1)


critic: LinearCritic
recorder: Recorder


def attach(transformer: torch.nn.Module, num_steps: int) -> None:
    """Begin with a critic that knows nothing, for the transformer of a run on one process."""
    global critic, recorder
    critic, recorder = LinearCritic(), Recorder(transformer, num_steps)


def credit(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Credit of the K steps of the window, which begins at the first step: (B, K)."""
    group, num_steps = rule.batch.num_generations, rule.batch.log_probs.shape[1]
    features, final = recorder.of_the_rollout()[:, :num_steps], rewards[:, -1]
    knows_nothing = not critic.squares.ndim
    values = torch.cat([critic.values(features, group), centred(final, group)[:, None]], 1)
    critic.learn(features, final, group)
    return lambda_return(values, 1.0 if knows_nothing else LAMBDA).float()


credit.needs_completions = False  # type: ignore[attr-defined]
