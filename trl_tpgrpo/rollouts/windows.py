"""SDE windows and noise levels of rollouts: fixed, drawn for each rollout, or measured before the first."""

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
"""Purposes of a seed; random numbers of one purpose do not depend on those of another."""

PROBED_GROUPS = 16  # prompts per process for measuring noise and window


class Windows:
    """SDE windows of a run, the same on all processes.

    `rewards_of(rows, window, purpose, number, title)` samples rows with exact completions and returns the rewards of
    all processes' trajectories, (N, K + 1).
    """

    def __init__(self, args: TPGRPOConfig, metrics: Metrics, rewards_of: Callable[..., Tensor]):
        self.args, self._metrics, self._rewards_of = args, metrics, rewards_of
        self.calibrated_noise: list[float] | None = None  # of each step of `sde_window_limits`
        self.measured: Window | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the measured values, and the steps and SDE that they are for."""
        return {"calibrated_noise": self.calibrated_noise, "measured_window": self.measured, "measured_in": self._in}

    @property
    def _in(self) -> list[Any]:
        return [*self.args.sde_window_limits, self.args.sde_type]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the measured values, unless the settings fix them now or the steps or the SDE have changed."""
        if state.get("measured_in", self._in) != self._in:
            logger.warning("sde_window_range or sde_type has changed: noise and window are measured again.")
            return
        if self.args.noise_calibration_iterations:
            self.calibrated_noise = state.get("calibrated_noise")  # absent in older checkpoints
        if self.args.sde_window_share is not None and (window := state["measured_window"]) is not None:
            self.measured = self._window(window.start, window.stop)  # with the current noise

    def __call__(self, rows: Rows, generation: int) -> Window:
        """Return the window of a rollout of B rows; measure noise and window on them if needed."""
        if self.args.noise_calibration_iterations and self.calibrated_noise is None:
            self.calibrated_noise, self.measured = self._calibrate_noise(rows), None
        if self.args.sde_window_share is not None and self.measured is None:
            self.measured = self._measure(rows, self.args.sde_window_share)
        return self.measured or self.draw(generation)

    def draw(self, generation: int) -> Window:
        """Draw the rollout's SDE window, the same on all processes.

        Raises:
            ValueError: If the noise is not calibrated yet; training does so before its first rollout.
        """
        if self.args.noise_calibration_iterations and self.calibrated_noise is None:
            what = "noise_calibration_iterations works in training only, before the first rollout"
            raise ValueError(f"{what}: set it to 0 here, and noise_level to the levels that training has logged.")
        starts = self.args.window_starts
        seed = np.random.SeedSequence([self.args.seed, WINDOW, generation])
        start = starts[int(np.random.default_rng(seed).integers(len(starts)))]
        return self._window(start, start + self.args.num_sde_steps)

    def _calibrate_noise(self, rows: Rows) -> list[float]:
        """Find and log noise levels with balanced signs of step rewards, on the first prompts."""
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
        """Find the shortest window with the required share of the step rewards' variance, on the first prompts."""
        first, last = self.args.sde_window_limits
        rewards = self._rewards_of(self._probed(rows), self._window(first, last), PROBE, 0, "")
        start, stop = shortest_window(step_reward_variances(rewards, self.args.num_generations), share)
        return self._window(first + start, first + stop)

    def _probed(self, rows: Rows) -> Rows:
        group = self.args.num_generations
        # Groups that span processes are whole only if all rows are used
        return rows[: PROBED_GROUPS * group] if len(rows) % group == 0 else rows

    def _window(self, start: int, stop: int) -> Window:
        return self.args.window(start, stop, self.calibrated_noise)
