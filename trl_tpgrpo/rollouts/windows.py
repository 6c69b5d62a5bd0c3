"""The SDE windows of rollouts: drawn for each, or measured before the first, as is the noise of their steps."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithm.calibration import calibrate
from ..algorithm.credit import shortest_window, step_reward_variances
from ..algorithm.rollout import Window
from ..config import TPGRPOConfig
from ..metrics import Metrics


logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

NOISE, WINDOW, EVALUATION, PROBE, CARD, CALIBRATION, DRAW = range(7)
"""Purposes of a seed; the random numbers of one never depend on how many another took."""

PROBED_GROUPS = 16  # prompts of a process that noise and window are measured on


class Windows:
    """Windows of one run, the same on all processes.

    `rewards_of(rows, window, purpose, number, title)` samples rows with exact completions and returns the rewards of
    all processes' trajectories, (N, K + 1).
    """

    def __init__(self, args: TPGRPOConfig, metrics: Metrics, rewards_of: Callable[..., Tensor]):
        self.args, self._metrics, self._rewards_of = args, metrics, rewards_of
        self.calibrated_noise: list[float] | None = None  # of each step of `sde_window_limits`
        self.measured: Window | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured, and for which steps and SDE."""
        return {"calibrated_noise": self.calibrated_noise, "measured_window": self.measured, "measured_in": self._in}

    @property
    def _in(self) -> list[Any]:
        return [*self.args.sde_window_limits, self.args.sde_type]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was measured, unless the settings fix it now, or had it measured for other steps or SDEs."""
        if state.get("measured_in", self._in) != self._in:
            logger.warning("sde_window_range or sde_type has changed: what was measured in them is measured anew.")
            return
        if self.args.noise_calibration_iterations:
            self.calibrated_noise = state.get("calibrated_noise")  # absent where written before
        if self.args.sde_window_share is not None and (window := state["measured_window"]) is not None:
            self.measured = self._window(window.start, window.stop)  # with the noise of now

    def __call__(self, rows: Rows, generation: int) -> Window:
        """Return the window of a rollout of B rows, on which noise and window are measured if they have to be."""
        if self.args.noise_calibration_iterations and self.calibrated_noise is None:
            self.calibrated_noise, self.measured = self._calibrate_noise(rows), None
        if self.args.sde_window_share is not None and self.measured is None:
            self.measured = self._measure(rows, self.args.sde_window_share)
        return self.measured or self.draw(generation)

    def draw(self, generation: int) -> Window:
        """Draw the rollout's SDE window, the same on all processes.

        Raises:
            ValueError: If its noise is yet to be calibrated, which a training does before its first rollout.
        """
        if self.args.noise_calibration_iterations and self.calibrated_noise is None:
            what = "noise_calibration_iterations is for training, whose first rollout it precedes"
            raise ValueError(f"{what}: set it to 0 here, and noise_level to the levels that a training has logged.")
        starts = self.args.window_starts
        seed = np.random.SeedSequence([self.args.seed, WINDOW, generation])
        start = starts[int(np.random.default_rng(seed).integers(len(starts)))]
        return self._window(start, start + self.args.num_sde_steps)

    def _calibrate_noise(self, rows: Rows) -> list[float]:
        """Find and log the noise of each step with as many positive as negative step rewards, on the first prompts."""
        args, rows = self.args, self._probed(rows)
        start, stop = args.sde_window_limits

        def measure(noise_levels: Tensor, iteration: int) -> Tensor:
            window = args.window(start, stop, noise_levels.tolist())
            title = f"calibration {iteration + 1}/{args.noise_calibration_iterations}, "
            return self._rewards_of(rows, window, CALIBRATION, iteration, title)

        first = torch.tensor(args.noise_level, dtype=torch.float64).expand(stop - start)
        highest = 1.0 if args.sde_type == "cps" else float("inf")
        levels = calibrate(measure, first, args.noise_calibration_step, highest, args.noise_calibration_iterations)
        for step, level in enumerate(levels.tolist(), start=start):
            self._metrics.record(f"noise_level/step_{step}", level)
        return levels.tolist()

    def _measure(self, rows: Rows, share: float) -> Window:
        """Find the shortest window with the wanted share of the step rewards' variance, on the first prompts."""
        first, last = self.args.sde_window_limits
        rewards = self._rewards_of(self._probed(rows), self._window(first, last), PROBE, 0, "")
        start, stop = shortest_window(step_reward_variances(rewards, self.args.num_generations), share)
        return self._window(first + start, first + stop)

    def _probed(self, rows: Rows) -> Rows:
        group = self.args.num_generations
        # Groups that straddle processes are whole only if all rows are taken
        return rows[: PROBED_GROUPS * group] if len(rows) % group == 0 else rows

    def _window(self, start: int, stop: int) -> Window:
        return self.args.window(start, stop, self.calibrated_noise)
