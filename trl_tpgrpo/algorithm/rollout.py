"""Trajectories and the ODE completions of their states, as one sweep over the sigmas.

At step k every trajectory and every completion that is under way stands at the same sigma, so all of them go through the
model together: `T` calls in all. A completion starts with the velocity that its trajectory has just computed at the same
state, so its first evaluation is free. That is the least that an exact scheme can take: each distinct pair of state and
sigma is evaluated once (T = 10 with a window of 9 takes 55 evaluations a trajectory in 10 calls). Trajectories that start
from the same noise are one until their first SDE step.

Shapes: `B` trajectories, `K` SDE steps in the window, `C` completed states (all K unless the rule says fewer), `M` images,
`...` the dimensions of a latent. States are kept in float32, in which every dtype of a model fits without loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .completion import Completion, CompletionRule
from .sde import log_prob, ode_step, sample, transition


Velocity = Callable[[Tensor, int, Tensor], Tensor]
"""`velocity(latents, step, rows)`: the model's prediction at `latents` (N, ...) before `step`; row n belongs to trajectory
`rows[n]`, whose prompt it takes."""

EXACT = CompletionRule()


@dataclass(frozen=True)
class Window:
    """The SDE steps `[start, stop)` of a schedule and how they add noise; the other steps are ODE steps."""

    start: int
    stop: int
    sde_type: str
    noise_level: float
    log_prob_type: str

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.stop


@dataclass(frozen=True)
class Rollout:
    """What a sweep leaves.

    Attributes:
        states: float32, (B, K + 1, ...): the trajectory before each SDE step and after the last.
        log_probs: float32, (B, K): of the SDE steps.
        final_latents: float32, (M, ...): where the completions and the trajectories end, each once.
        image_of: On the CPU, (B, C + 1): which of the M a trajectory's completions end in, from its first state on, and in
            the last column it itself; without completions (B, 1).
        rows: On the CPU, (M,): the trajectory that each belongs to, the first if several share it.
        num_evaluations: How often the model was evaluated, counted in samples.
        num_calls: How often the model was called, counted in batches.
    """

    states: Tensor
    log_probs: Tensor
    final_latents: Tensor
    image_of: Tensor
    rows: Tensor
    num_evaluations: int
    num_calls: int


@torch.no_grad()
def roll_out(
    velocity: Velocity,
    initial_noise: Tensor,
    sigmas: Tensor,
    window: Window | None = None,
    generators: list[torch.Generator] | None = None,
    completion: CompletionRule | None = EXACT,
    batch_size: int | None = None,
    on_step: Callable[[], object] | None = None,
    offload_states: bool = False,
) -> Rollout:
    """Sample trajectories and, from states in the window, the images that the ODE makes of them.

    Args:
        velocity: The model, see `Velocity`.
        initial_noise: (N, ...): of the trajectories, each of B / N neighbours. The completion of the first state starts
            from it.
        sigmas: float32 on the CPU, (T + 1,), falling to 0.
        window: The SDE steps; `None` takes ODE steps alone, as the model's pipeline does, and B is N.
        generators: B generators of the SDE steps' noise; needed with a window.
        completion: How states in the window are completed; `None`: not at all.
        batch_size: How many samples the model is given at once; `None`: all.
        on_step: Called after each step, for a progress bar.
        offload_states: Whether `states` are on the CPU, in pinned memory if there is a GPU.

    Raises:
        ValueError: If the window does not lie in the schedule, or takes steps without noise, or B is no multiple of N.
        FloatingPointError: If a prediction is not finite.
    """
    if window is not None:
        _check(window, len(sigmas) - 1, generators, len(initial_noise))
    sweep = _Sweep(velocity, initial_noise, sigmas, window, generators or [], completion, batch_size, offload_states)
    for step in range(len(sigmas) - 1):
        predicted = sweep.evaluate(step)
        if window is not None and step in window:
            sweep.take_sde_step(step, predicted)
        else:
            sweep.take_ode_step(step, predicted)
        if on_step is not None:
            on_step()
    return sweep.result()


def _check(window: Window, num_steps: int, generators: list[torch.Generator] | None, num_noises: int) -> None:
    if not 0 <= window.start < window.stop < num_steps:
        raise ValueError(
            f"The window [{window.start}, {window.stop}) must hold at least one of the first {num_steps - 1} steps of "
            f"{num_steps} and nothing else; the last step is never in it."
        )
    if window.noise_level <= 0:
        raise ValueError(f"An SDE step needs noise: noise_level must be above 0, got {window.noise_level}.")
    if not generators or len(generators) % num_noises:
        given = "none" if generators is None else len(generators)
        raise ValueError(
            f"SDE steps need generators, one for each of {num_noises} trajectories or a multiple of them if several share "
            f"an initial noise; got {given}."
        )


class _Sweep:
    """A rollout under way: the trajectories, and the completions that have been started."""

    def __init__(
        self,
        velocity: Velocity,
        initial_noise: Tensor,
        sigmas: Tensor,
        window: Window | None,
        generators: list[torch.Generator],
        completion: CompletionRule | None,
        batch_size: int | None,
        offload_states: bool,
    ):
        self.velocity, self.sigmas, self.window, self.generators = velocity, sigmas, window, generators
        self.completion, self.batch_size = completion, batch_size
        self.trajectory = initial_noise.float()  # (N, ...) until the first SDE step, then (B, ...)
        self.shared = len(generators) // len(initial_noise) if window is not None else 1
        self.rows = self.shared * torch.arange(len(initial_noise), device=initial_noise.device)
        self.completions: list[Completion] = []
        num_states = 0 if window is None else len(window) + 1
        shape = (num_states, self.shared * len(initial_noise), *initial_noise.shape[1:])  # a state is one copy
        device = torch.device("cpu") if offload_states else self.trajectory.device
        self.states = torch.empty(shape, device=device, pin_memory=offload_states and torch.cuda.is_available())
        self.log_probs: list[Tensor] = []
        self.finite: list[Tensor] = []
        self.num_evaluations = self.num_calls = 0

    def evaluate(self, step: int) -> Tensor:
        """Ask the model once for all that stands at `step`, advance the completions, return the trajectories' velocity."""
        due = [completion for completion in self.completions if completion.places[0] == step]
        latents = torch.cat([self.trajectory, *(completion.latents for completion in due)])
        rows = torch.cat([self.rows, *(completion.rows for completion in due)])
        predicted, num_calls = _predict(self.velocity, latents, step, rows, self.batch_size)
        self.num_evaluations += len(latents)
        self.num_calls += num_calls
        self.finite.append(torch.isfinite(predicted).all())
        own, *others = predicted.split([len(self.rows), *(len(completion.rows) for completion in due)])
        for completion, its_velocity in zip(due, others, strict=True):
            completion.advance(its_velocity, self.sigmas)
        return own

    def take_ode_step(self, step: int, predicted: Tensor) -> None:
        """Advance the trajectories without noise."""
        if self.window is not None and step == self.window.stop:
            self.states[-1].copy_(self.trajectory, non_blocking=True)
        self.trajectory = ode_step(self.trajectory, predicted, self.sigmas[step], self.sigmas[step + 1]).float()

    def take_sde_step(self, step: int, predicted: Tensor) -> None:
        """Start the state's completion and advance the trajectories with noise."""
        window = self.window
        assert window is not None
        if self.completion is not None and (step - window.start) in self.completion.positions(len(window)):
            self._start_completion(step, predicted, self.completion)
        if step == window.start:  # here those that share their initial noise part
            self.trajectory, predicted = (
                value.repeat_interleave(self.shared, 0) for value in (self.trajectory, predicted)
            )
            self.rows = torch.arange(len(self.generators), device=self.rows.device)
        self.states[step - window.start].copy_(self.trajectory, non_blocking=True)
        sigma, sigma_next = self.sigmas[step], self.sigmas[step + 1]
        drawn = transition(window.sde_type, self.trajectory, predicted, sigma, sigma_next, window.noise_level)
        noise = randn_tensor(self.trajectory.shape, self.generators, self.trajectory.device, torch.float32)
        self.trajectory = sample(drawn, noise)
        self.log_probs.append(log_prob(drawn, self.trajectory, window.log_prob_type))

    def _start_completion(self, step: int, predicted: Tensor, rule: CompletionRule) -> None:
        places = rule.places(step, len(self.sigmas) - 1)
        completion = Completion(self.trajectory, self.rows, places, rule.extrapolate)
        completion.advance(predicted, self.sigmas)
        self.completions.append(completion)

    def result(self) -> Rollout:
        """All of it, once it is at its end."""
        _raise_if_not_finite(self.finite)  # waits for the copies too
        ends = [completion.latents for completion in self.completions] + [self.trajectory]
        rows = [completion.rows.cpu() for completion in self.completions] + [self.rows.cpu()]
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
        number = len(self.rows)
        columns = [
            offset + torch.arange(len(its_rows)).repeat_interleave(number // len(its_rows))
            for offset, its_rows in zip(offsets, rows, strict=True)
        ]
        return Rollout(
            states=self.states.transpose(0, 1),
            log_probs=torch.stack(self.log_probs, 1) if self.log_probs else self.trajectory.new_empty(number, 0),
            final_latents=torch.cat(ends),
            image_of=torch.stack(columns, 1),
            rows=torch.cat(rows),
            num_evaluations=self.num_evaluations,
            num_calls=self.num_calls,
        )


def _predict(
    velocity: Velocity, latents: Tensor, step: int, rows: Tensor, batch_size: int | None
) -> tuple[Tensor, int]:
    """The velocity at `latents` in even batches of at most `batch_size`, and the number of batches."""
    number = -(-len(latents) // (batch_size or len(latents)))
    batches = zip(latents.chunk(number), rows.chunk(number), strict=True)
    predicted = [velocity(batch, step, batch_rows) for batch, batch_rows in batches]
    return torch.cat(predicted), len(predicted)


def _raise_if_not_finite(finite: list[Tensor]) -> None:
    """Looked at once, after the sweep, so that no step waits for the device."""
    flags = torch.stack(finite)
    if not flags.all():
        step = int((~flags).nonzero()[0])
        raise FloatingPointError(
            f"The model's prediction at sampling step {step} is not finite. Usual causes: weights that have diverged "
            "(learning_rate too high) or float16 overflow."
        )


def fastest_batch_size(seconds: Callable[[int], float], largest: int) -> int:
    """The largest batch, of those up to `largest`, at which a sample takes at most 5% longer than at the best.

    Args:
        seconds: How long a batch of a size takes. It is asked for 1, 2, 3, 4, 6, 8, 12 and so on, until three sizes in a row
            are no better than the best before them, and then for all of these a second time, as other work on the machine
            may have disturbed the first.
        largest: The largest size to try.
    """
    sizes = sorted({factor * 2**power for power in range(largest.bit_length()) for factor in (1, 3)})
    times: dict[int, float] = {}
    in_vain = 0
    for size in (size for size in sizes if size <= largest):
        of_a_sample = seconds(size) / size
        in_vain = in_vain + 1 if times and of_a_sample >= min(times.values()) else 0
        times[size] = of_a_sample
        if in_vain == 3:
            break
    times = {size: min(time, seconds(size) / size) for size, time in times.items()}
    return max(size for size, time in times.items() if time <= 1.05 * min(times.values()))
