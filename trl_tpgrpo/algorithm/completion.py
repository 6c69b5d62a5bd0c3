"""How the ODE completes a state to an image: on all the sigmas that are left, or more cheaply on some of them.

A cheap completion stands on a subset of the sampler's own sigmas, so that it goes through the model together with the
trajectories. Its first evaluation is free, being that of the trajectory at the same state. What it approximates is the
exact completion, the image of the sampler's own Euler steps, not the ODE's true end.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from .sde import extrapolated_steps, ode_step


FORM = re.compile(r"(exact|one_step|(euler|ab2)_([1-9]\d*)|at((?:_\d+)+))(?:_every_([1-9]\d*))?")


@dataclass(frozen=True)
class CompletionRule:
    """Which states are completed, and where on the way the model is asked.

    Attributes:
        num_steps: Ask the model at most so often on each way, at even distances; `None`: no such limit.
        at: Ask the model only at these places of the schedule, after the state's own; `None`: no such limit.
        extrapolate: Over steps without an evaluation, extrapolate the velocity linearly from the last two (Adams-Bashforth)
            instead of keeping the last (Euler).
        every: Complete the states before every so-manieth SDE step; credit is then that of blocks of so many steps.
    """

    num_steps: int | None = None
    at: tuple[int, ...] | None = None
    extrapolate: bool = False
    every: int = 1

    @classmethod
    def parse(cls, name: str) -> "CompletionRule":
        """The rule of a name: `exact`, `at_1_2_4`, `ab2_N`, `euler_N`, `one_step`, each also with `_every_M` at its end.

        Raises:
            ValueError: If it is not of this form.
        """
        match = FORM.fullmatch(name)
        if match is None:
            raise ValueError(
                "completion must be 'exact', 'at_P_Q_...' (ask the model at steps P, Q, ... alone), 'ab2_N' or 'euler_N' (ask "
                f"it N times) or 'one_step', each also with '_every_M' (complete every M-th state), got {name!r}."
            )
        whole, kind, number, places, every = match.groups()
        num_steps = 1 if whole == "one_step" else int(number) if number else None
        at = tuple(sorted({int(place) for place in places.split("_")[1:]})) if places else None
        return cls(num_steps, at, extrapolate=kind == "ab2" or at is not None, every=int(every or 1))

    def positions(self, num_sde_steps: int) -> range:
        """The SDE steps, 0 to K - 1, before which states are completed."""
        return range(0, num_sde_steps, self.every)

    def places(self, start: int, num_inference_steps: int) -> list[int]:
        """Where in the schedule the completion of the state before step `start` asks the model, and last its end."""
        left = num_inference_steps - start
        if self.at is not None:
            return [start, *(place for place in self.at if start < place < num_inference_steps), num_inference_steps]
        num_steps = min(self.num_steps or left, left)
        return [start + round(left * step / num_steps) for step in range(num_steps + 1)]


class Completion:
    """The ways of N trajectories' states to their images, all at the same place of the schedule.

    Attributes:
        latents: float32, (N, ...).
        rows: (N,), the trajectories' numbers.
        places: Where the model is still to be asked, beginning with where they stand, and last the end.
    """

    def __init__(self, latents: Tensor, rows: Tensor, places: list[int], extrapolate: bool):
        self.latents, self.rows, self.places = latents, rows, places
        self._extrapolate = extrapolate
        self._before: tuple[Tensor, Tensor] | None = None

    def advance(self, velocity: Tensor, sigmas: Tensor) -> None:
        """Go on to the next place with the velocity (N, ...) at this one."""
        here, there = self.places[:2]
        if self._before is None or there == here + 1:
            latents = ode_step(self.latents, velocity, sigmas[here], sigmas[there])
        else:
            latents = extrapolated_steps(self.latents, velocity, *self._before, sigmas[here : there + 1])
        self.latents, self.places = latents.float(), self.places[1:]
        self._before = (velocity, sigmas[here]) if self._extrapolate else None
