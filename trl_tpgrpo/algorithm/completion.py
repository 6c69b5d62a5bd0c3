"""ODE completions: finish a latent with the deterministic sampler, over all remaining sigmas or over some of them.

A cheap completion uses some of the sampler's sigmas, so it is batched with the trajectories. It approximates the exact
completion (the image of the sampler's own Euler steps), not the exact solution of the ODE.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from .sde import extrapolated_steps, ode_step


FORM = re.compile(r"(exact|one_step|(euler|ab2)_([1-9]\d*)|at((?:_\d+)+))(?:_every_([1-9]\d*)|_from_(1))?")


@dataclass(frozen=True)
class CompletionRule:
    """Selects the latents to complete, and the steps at which a completion calls the model.

    For example, `parse("at_1_2_5_every_2")` is `CompletionRule(at=(1, 2, 5), extrapolate=True, every=2)`. It completes
    the states x_0, x_2, x_4 and so on, and with T = 10 steps the completion of x_2 has `stops(2, 10) == [2, 5, 10]`.
    At steps without a model call, the velocity is the last one (Euler) or, with `extrapolate`, a linear extrapolation
    of the last two (Adams-Bashforth). With `every` above 1, credit is assigned to blocks of `every` steps.

    With `first` = 1 (`parse("exact_from_1")`), x_0 is not completed and the mean reward of its group replaces R_0.
    """

    num_steps: int | None = None  # largest number of model calls; None: no limit; 0: none of its own
    at: tuple[int, ...] | None = None  # the only steps with a model call, besides the latent's own; None: all
    extrapolate: bool = False
    every: int = 1  # stride n: the states before every n-th SDE step are completed
    first: int = 0  # the first state of the window that is completed: x_0 or x_1

    @classmethod
    def parse(cls, name: str) -> "CompletionRule":
        """Return the rule of a name such as `exact`, `at_1_2_4`, `ab2_4`, `euler_4`, `one_step` or `exact_every_2`."""
        match = FORM.fullmatch(name)
        if match is None:
            raise ValueError(
                "completion must be 'exact', 'at_P_Q_...' (evaluate only at steps P, Q, ...), 'ab2_N' or 'euler_N' "
                "(at most N) or 'one_step', also with the suffix '_every_M' (complete every M-th latent) or '_from_1' "
                f"(not the first), got {name!r}."
            )
        whole, kind, number, steps, every, first = match.groups()
        num_steps = 1 if whole == "one_step" else int(number) if number else None
        at = tuple(sorted({int(step) for step in steps.split("_")[1:]})) if steps else None
        return cls(
            num_steps, at, extrapolate=kind == "ab2" or at is not None, every=int(every or 1), first=int(first or 0)
        )

    def states(self, num_sde_steps: int) -> range:
        """Return the indices in the window of the latents to complete."""
        return range(self.first, num_sde_steps, self.every)

    def stops(self, start: int, num_inference_steps: int) -> list[int]:
        """Return the steps at which a completion from step `start` calls the model, followed by the end."""
        left = num_inference_steps - start
        if self.at is not None:
            return [start, *(step for step in self.at if start < step < num_inference_steps), num_inference_steps]
        num_steps = left if self.num_steps is None else min(self.num_steps, left)
        return [start + round(left * step / max(num_steps, 1)) for step in range(num_steps + 1)]


@dataclass
class Branch:
    """A batch of latents that is integrated: the trajectories, or the completions that start at one step."""

    latents: Tensor  # float32, (N, ...)
    rows: Tensor  # (N,), on the CPU, indices of the trajectories
    stops: list[int]  # remaining steps with a model call, starting with the current one, then the end
    extrapolate: bool = False
    previous: tuple[Tensor, Tensor] | None = None  # velocity and sigma of the last model call, if extrapolated

    def advance(self, velocity: Tensor, sigmas: Tensor) -> None:
        """Integrate the ODE to the next stop with the velocity (N, ...) at this one."""
        here, there = self.stops[:2]
        if self.previous is None or there == here + 1:
            latents = ode_step(self.latents, velocity, sigmas[here], sigmas[there])
        else:
            latents = extrapolated_steps(self.latents, velocity, *self.previous, sigmas[here : there + 1])
        self.latents, self.stops = latents.float(), self.stops[1:]
        self.previous = (velocity, sigmas[here]) if self.extrapolate else None
