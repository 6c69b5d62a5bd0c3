"""Trajectories and the ODE completions of their latents, in one sweep over the sigmas.

With T = 4 steps and an SDE window of K = 3, where x_j is a trajectory after j SDE steps and c_j the completion of x_j:

    sigma_0     sigma_1     sigma_2     sigma_3     0
    x_0 ==SDE== x_1 ==SDE== x_2 ==SDE== x_3 --ODE-- image of R_3
     `--------- c_0 ------- c_0 ------- c_0 ------- image of R_0
                 `--------- c_1 ------- c_1 ------- image of R_1
                             `--------- c_2 ------- image of R_2
    1           2           3           4           function evaluations per trajectory, one model call per column

All latents at the same sigma are batched into one forward pass, so T model calls are enough. Trajectory and completion
share the first velocity. Each distinct pair of latent and sigma is evaluated once, the minimum for exact completions:
NFE = 55 per trajectory for T = 10, K = 9. Trajectories with the same initial noise are one up to their first SDE step.

Shapes: `B` trajectories, `K` SDE steps in the window, `C` completed states (K unless the rule says fewer), `M` images,
`...` the dimensions of a latent. States are kept in float32, in which every dtype of a model fits without loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .completion import Branch, CompletionRule
from .sde import log_prob, sample, transition


Velocity = Callable[[Tensor, int, Tensor], Tensor]
"""`velocity(latents, step, rows)`: prediction at `latents` (N, ...) before `step`, with the prompts of `rows` (N,),
which are on the CPU."""

Generators = list[torch.Generator]
EXACT = CompletionRule()


@dataclass(frozen=True)
class Window:
    """The SDE steps `[start, stop)` of a schedule and how they add noise; the other steps are ODE steps."""

    start: int
    stop: int
    sde_type: str
    noise_level: float | tuple[float, ...]  # one for all steps, or one per step
    log_prob_type: str

    def noise_of(self, step: int) -> float:
        """Return the noise level of a step of the schedule that is in the window."""
        return self.noise_level[step - self.start] if isinstance(self.noise_level, tuple) else self.noise_level

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.stop


@dataclass(frozen=True)
class Rollout:
    """The result of a sweep.

    Two trajectories with the same initial noise and C = 2 have M = 5 images: one completion of x_0 for both, one of
    x_1 for each, and two of their own. So `image_of` is `[[0, 1, 3], [0, 2, 4]]` and `rows` is `[0, 0, 1, 0, 1]`.
    """

    states: Tensor  # float32, (B, K + 1, ...): the trajectory before each SDE step and after the last
    log_probs: Tensor  # float32, (B, K), of the SDE steps
    means: Tensor | None  # float32, (B, K, ...), of the states after the SDE steps, if they are kept
    final_latents: Tensor  # float32, (M, ...): ends of completions, in the order of the states, then of trajectories
    image_of: Tensor  # on the CPU, (B, C + 1): indices of the images of a trajectory's completions and of its own
    rows: Tensor  # on the CPU, (M,): index of the trajectory of an image (the first, if several share it)
    nfe: int  # function evaluations: a model call on B latents counts B
    num_calls: int  # model calls

    @property
    def columns(self) -> Tensor:
        """The column of `image_of` that an image is in: (M,), on the CPU."""
        columns = torch.empty_like(self.rows)
        columns[self.image_of] = torch.arange(self.image_of.shape[1]).expand_as(self.image_of)
        return columns

    def group_sizes(self, num_generations: int) -> list[int]:
        """Return the numbers of neighbouring images that have the same state and the same group of trajectories."""
        keys = torch.stack([self.columns, self.rows // num_generations], 1)
        return torch.unique_consecutive(keys, dim=0, return_counts=True)[1].tolist()

    def noisy_latents(self, sigmas: Tensor, start: int, states: range) -> tuple[Tensor, Tensor]:
        """Return the latent from which each image was completed, (M, ...), and its sigma, (M,); 0 for own images.

        `sigmas` are the schedule's, whose window begins at step `start`; `states` are those in it that have an image.
        """
        latents, num_completions = self.final_latents.clone(), len(self.rows) - len(self.image_of)
        steps, rows = (
            torch.tensor(states, dtype=torch.long)[self.columns[:num_completions]],
            self.rows[:num_completions],
        )
        latents[:num_completions] = self.states[rows, steps].to(latents.device)
        ends = sigmas.new_zeros(len(self.image_of))
        return latents, torch.cat([sigmas[start + steps], ends]).to(latents.device)


@torch.no_grad()
def roll_out(
    velocity: Velocity,
    initial_noise: Tensor,
    sigmas: Tensor,
    window: Window | None = None,
    generators: Generators | None = None,
    completion: CompletionRule | None = EXACT,
    batch_size: int | None = None,
    on_step: Callable[[], object] | None = None,
    offload_states: bool = False,
    keep_means: bool = False,
) -> Rollout:
    """Sample trajectories and the ODE completions of latents in the window.

    Args:
        velocity: Model, see `Velocity`.
        initial_noise: (N, ...), each shared by B / N neighbouring trajectories and the completion of their first
            state.
        sigmas: float32 on the CPU, (T + 1,), falling to 0.
        window: SDE steps; `None`: ODE steps only, as in the pipeline; B is then N.
        generators: B generators of the SDE steps' noise; needed with a window.
        completion: Rule for completing latents in the window; `None`: no completions.
        batch_size: Largest number of samples in a model call; `None`: no limit.
        on_step: Function called after each step, for a progress bar.
        offload_states: Whether `states` and `means` are on the CPU, in pinned memory if there is a GPU.
        keep_means: Whether to keep the means of the SDE transitions.

    Raises:
        ValueError: If the window is outside the schedule, has a step without noise, or B is not a multiple of N.
        FloatingPointError: If a prediction is not finite.
    """
    if window is not None:
        _check(window, len(sigmas) - 1, generators, len(initial_noise))
    sweep = _Sweep(initial_noise, sigmas, window, generators or [], offload_states, keep_means)
    for step in range(len(sigmas) - 1):
        predicted = sweep.evaluate(velocity, step, batch_size)
        if window is not None and step in window:
            sweep.take_sde_step(step, predicted, window, completion)
        else:
            sweep.trajectories.advance(predicted, sigmas)
        if on_step is not None:
            on_step()
    return sweep.result()


def _check(window: Window, num_steps: int, generators: Generators | None, num_noises: int) -> None:
    if not 0 <= window.start < window.stop < num_steps:
        bounds = f"[{window.start}, {window.stop})"
        raise ValueError(f"Window {bounds} must hold one or more of the first {num_steps - 1} steps of {num_steps}.")
    if isinstance(window.noise_level, tuple) and len(window.noise_level) != len(window):
        raise ValueError(f"noise_level has {len(window.noise_level)} numbers for the {len(window)} steps of a window.")
    if not all(window.noise_of(step) > 0 for step in range(window.start, window.stop)):
        raise ValueError(f"An SDE step needs noise: noise_level must be above 0, got {window.noise_level}.")
    if not generators or len(generators) % num_noises:
        raise ValueError(
            f"SDE steps need generators, one for each of {num_noises} trajectories or a multiple of them if several "
            f"share an initial noise; got {len(generators or [])}."
        )


class _Sweep:
    """A pending rollout: the trajectories and the completions that have branched off."""

    def __init__(
        self, noise: Tensor, sigmas: Tensor, window: Window | None, generators: Generators, offload: bool, means: bool
    ):
        self.sigmas, self.generators = sigmas, generators
        number, num_states = (len(noise), 0) if window is None else (len(generators), len(window) + 1)
        rows = torch.arange(0, number, number // len(noise))
        self.trajectories = Branch(noise.float(), rows, list(range(len(sigmas))))
        self.completions: list[Branch] = []
        self.log_probs: list[Tensor] = []
        self.finite: list[Tensor] = []
        self.nfe = self.num_calls = 0
        shape = (num_states, number, *noise.shape[1:])  # a state is contiguous, so that it is one copy
        device, pin_memory = ("cpu", torch.cuda.is_available()) if offload else (noise.device, False)
        self.states = torch.empty(shape, device=device, pin_memory=pin_memory)
        self.means = torch.empty_like(self.states[1:], pin_memory=pin_memory) if means else None

    def evaluate(self, velocity: Velocity, step: int, batch_size: int | None) -> Tensor:
        """Evaluate all latents at `step`, advance the completions, and return the trajectories' velocity."""
        branches = [self.trajectories, *(branch for branch in self.completions if branch.stops[0] == step)]
        latents, rows = torch.cat([one.latents for one in branches]), torch.cat([one.rows for one in branches])
        num_chunks = -(-len(latents) // (batch_size or len(latents)))
        chunks = zip(latents.chunk(num_chunks), rows.chunk(num_chunks), strict=True)
        predictions = [velocity(chunk, step, chunk_rows) for chunk, chunk_rows in chunks]
        self.nfe += len(latents)
        self.num_calls += len(predictions)
        predicted = torch.cat(predictions)
        self.finite.append(torch.isfinite(predicted).all())
        by_branch = predicted.split([len(branch.rows) for branch in branches])
        for completion, completion_velocity in zip(branches[1:], by_branch[1:], strict=True):
            completion.advance(completion_velocity, self.sigmas)
        return by_branch[0]

    def take_sde_step(self, step: int, velocity: Tensor, window: Window, rule: CompletionRule | None) -> None:
        """Start the completion of the state and advance the trajectories with noise."""
        trajectories, position = self.trajectories, step - window.start
        if rule is not None and position in rule.states(len(window)):
            stops = rule.stops(step, len(self.sigmas) - 1)
            completion = Branch(trajectories.latents, trajectories.rows, stops, rule.extrapolate)
            if len(stops) > 1:
                completion.advance(velocity, self.sigmas)
            self.completions.append(completion)
        if position == 0:  # trajectories with the same initial noise separate here
            shared = len(self.generators) // len(velocity)
            velocity = velocity.repeat_interleave(shared, 0)
            trajectories.latents = trajectories.latents.repeat_interleave(shared, 0)
            trajectories.rows = torch.arange(len(self.generators))
            self.states[0].copy_(trajectories.latents, non_blocking=True)
        latents, (sigma, sigma_next) = trajectories.latents, self.sigmas[step : step + 2]
        drawn = transition(window.sde_type, latents, velocity, sigma, sigma_next, window.noise_of(step))
        noise = randn_tensor(latents.shape, self.generators, latents.device, torch.float32)
        trajectories.latents, trajectories.stops = sample(drawn, noise), trajectories.stops[1:]
        self.log_probs.append(log_prob(drawn, trajectories.latents, window.log_prob_type))
        self.states[position + 1].copy_(trajectories.latents, non_blocking=True)
        if self.means is not None:
            self.means[position].copy_(drawn.mean, non_blocking=True)

    def result(self) -> Rollout:
        """Return the rollout when all branches are finished; raise if a prediction was not finite."""
        finite = torch.stack(self.finite)  # the only wait for the device, also for copies
        if not finite.all():
            raise FloatingPointError(
                f"The model's prediction at sampling step {int((~finite).nonzero()[0])} is not finite. Usual causes: "
                "weights that have diverged (learning_rate too high) or float16 overflow."
            )
        branches, last = [*self.completions, self.trajectories], self.trajectories.latents
        rows = torch.cat([branch.rows for branch in branches])
        images = torch.arange(len(rows)).split([len(branch.rows) for branch in branches])
        image_of = torch.stack([image.repeat_interleave(len(last) // len(image)) for image in images], 1)
        log_probs = torch.stack(self.log_probs, 1) if self.log_probs else last.new_empty(len(last), 0)
        ends = torch.cat([branch.latents for branch in branches])
        states, means = self.states.transpose(0, 1), None if self.means is None else self.means.transpose(0, 1)
        return Rollout(states, log_probs, means, ends, image_of, rows, self.nfe, self.num_calls)


def fastest_batch_size(seconds: Callable[[int], float], largest: int) -> int:
    """Return the largest batch size whose time per sample is at most 5% above the minimum.

    `seconds` measures batch sizes 1, 2, 3, 4, 6, 8, 12 and so on up to `largest`, until three in a row bring no
    improvement. Each size is then measured again, because other work on the machine may have disturbed the first.
    """
    sizes = sorted(n for power in range(largest.bit_length()) for n in (2**power, 3 * 2**power) if n <= largest)
    times: dict[int, float] = {}
    for size in sizes:
        times[size] = seconds(size) / size
        tried = list(times.values())
        if len(tried) > 3 and min(tried[-3:]) >= min(tried[:-3]):
            break
    times = {size: min(time, seconds(size) / size) for size, time in times.items()}
    return max(size for size, time in times.items() if time <= 1.05 * min(times.values()))
