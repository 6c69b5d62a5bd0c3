"""What goes wrong in reinforcement learning of images, noticed before the update that makes it worse, with cause and remedy.

The limits were set between healthy runs of the testbed and runs with planted collapses; docs/guard_rails.md has the figures.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

ACTIONS = ("warn", "skip", "stop")
FEWEST_PROMPTS = 8
"""Of a rollout whose mean reward, and share of groups without spread, say something about the policy."""
FEWEST_TRANSITIONS = 32
"""Of an update in which the ratios' sides say something."""
FEWEST_NORMS = 3
"""Updates before one can stand out."""
FIRST_ROLLOUTS = 5
"""Whose images' variety later ones are held against."""
MEMORY = 0.9
"""Decay of the average of earlier rollouts' rewards."""
MOST_SKIPPED = 10
"""Updates in a row that are skipped before the run ends: it gets nowhere."""
REPEAT_AFTER = 100
"""Updates after which a warning that still holds is given again."""


class GuardRailError(RuntimeError):
    """A run was stopped by its guard rails."""


@dataclass(frozen=True)
class Problem:
    """Something that a healthy run does not show.

    Attributes:
        name: Of the check, for metrics.
        message: What was seen, its likely cause, and what to do.
    """

    name: str
    message: str


class GuardRails(TrainerCallback):
    """
    Looks at each update before it is made, and at each evaluation, and warns, skips the update or stops the run.

    The trainer adds one by itself, with `action=args.guard_rails`; pass another in `callbacks` to change the limits. Each problem is logged as
    `guard_rails/{name}` too.

    Args:
        action: `"warn"`; `"skip"`, warn and leave the update out; or `"stop"`, raise a [`GuardRailError`] before it.
        max_on_policy_deviation: In clip ranges, how far the ratio may be from 1 in the first update on a rollout.
        max_one_sided: Which share of the ratios of a later update may lie on one side of 1.
        max_frac_reward_zero_std: Which share of the groups may have no spread in their final rewards.
        max_grad_norm_factor: How many times the median of earlier gradient norms a gradient's may be.
        max_reference_drift: `|v - v_ref|^2 / |v_ref|^2`, how far the predicted velocity may be from the reference's. (The KL divergence
            says the same in units of the SDE's noise, so that what is healthy depends on sampler and window.)
        min_image_variety: Which share of the variety of the first rollouts' images must be left.
        max_reward_drop: In standard deviations of a reward, how far a rollout's mean may be below that of earlier ones.
        max_evaluation_errors: In standard errors, how far a held-out reward may fall while the trained one rises.

    Raises:
        ValueError: If `action` is none of these.
    """

    def __init__(
        self,
        action: str = "warn",
        max_on_policy_deviation: float = 0.1,
        max_one_sided: float = 0.9,
        max_frac_reward_zero_std: float = 0.8,
        max_grad_norm_factor: float = 10.0,
        max_reference_drift: float = 0.25,
        min_image_variety: float = 0.25,
        max_reward_drop: float = 1.0,
        max_evaluation_errors: float = 3.0,
    ):
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {ACTIONS}, got {action!r}.")
        self.action = action
        self.max_on_policy_deviation, self.max_one_sided = max_on_policy_deviation, max_one_sided
        self.max_frac_reward_zero_std, self.max_grad_norm_factor = max_frac_reward_zero_std, max_grad_norm_factor
        self.max_reference_drift, self.min_image_variety = max_reference_drift, min_image_variety
        self.max_reward_drop, self.max_evaluation_errors = max_reward_drop, max_evaluation_errors
        self.metrics_of_update: Callable[[], dict[str, float]] = dict
        self.record: Callable[[str, float], None] = lambda name, value: None
        self.held_out: list[str] = []
        self.forget()

    def watch(
        self,
        metrics_of_update: Callable[[], dict[str, float]],
        record: Callable[[str, float], None],
        held_out: list[str],
    ) -> None:
        """Connect to a trainer.

        Args:
            metrics_of_update: What the update under way has recorded, the same on all processes: its metrics, `grad_norm`, and
                `is_on_policy`, 1 if it is the first on its rollout.
            record: Adds a metric to the log.
            held_out: Names of reward functions that are not trained on.
        """
        self.metrics_of_update, self.record, self.held_out = metrics_of_update, record, held_out

    def forget(self) -> None:
        """Start anew, as for another run."""
        self.grad_norms: deque[float] = deque(maxlen=50)
        self.varieties: list[float] = []
        self.rewards: tuple[float, float] | None = None  # mean and standard deviation, averaged over earlier rollouts
        self.first_evaluations: dict[str, dict[str, float]] = {}
        self.num_skipped = 0
        self.warned: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, for a checkpoint."""
        names = ("grad_norms", "varieties", "rewards", "first_evaluations", "num_skipped", "warned")
        return {name: getattr(self, name) for name in names} | {"grad_norms": list(self.grad_norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, deque(value, maxlen=50) if name == "grad_norms" else value)

    # The events

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = self.metrics_of_update()
        problems = [*self.problems_of_update(metrics, args), *self.problems_of_rollout(metrics, args)]
        self._report(problems, state)
        if not problems or self.action != "skip":
            self.num_skipped = 0
            return
        self.num_skipped += 1
        if self.num_skipped > MOST_SKIPPED:
            raise GuardRailError(
                f"{MOST_SKIPPED} updates in a row were skipped; the last problem: {problems[0].message}"
            )
        assert model is not None
        for parameter in model.parameters():
            parameter.grad = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._report(list(self.problems_of_evaluation(metrics or {})), state)

    def _report(self, problems: list[Problem], state: TrainerState) -> None:
        for problem in problems:
            self.record(f"guard_rails/{problem.name}", 1.0)
            if self.action == "stop":
                raise GuardRailError(f"After update {state.global_step}: {problem.message}")
            due = problem.name not in self.warned or state.global_step - self.warned[problem.name] >= REPEAT_AFTER
            if due and state.is_world_process_zero:
                skipped = " This update is skipped." if self.action == "skip" else ""
                logger.warning(
                    "Guard rail %r after update %d: %s%s", problem.name, state.global_step, problem.message, skipped
                )
            if due:
                self.warned[problem.name] = state.global_step

    # The checks

    def problems_of_update(self, metrics: dict[str, float], args: Any) -> Iterator[Problem]:
        """Ratio, distance from the reference, and gradient of the update under way.

        Args:
            metrics: See `watch`.
            args: The trainer's settings.
        """
        clip_range = min(args.epsilon, args.epsilon_high)
        deviation, above = metrics.get("ratio/max_deviation", 0.0), metrics.get("ratio/frac_above_one", 0.5)
        if metrics.get("is_on_policy") and deviation > self.max_on_policy_deviation * clip_range:
            yield Problem(
                "on_policy_ratio",
                f"the probability ratio is off 1 by {deviation:.1e} in the first update on a rollout, for a clip range of "
                f"{clip_range:.1e}: sampling and training do not compute the same. Set recompute_old_log_probs=True, or "
                "leave per_device_rollout_batch_size out, and use no dropout.",
            )
        enough = args.train_batch_size * args.world_size * args.gradient_accumulation_steps >= FEWEST_TRANSITIONS
        if enough and not metrics.get("is_on_policy") and max(above, 1 - above) > self.max_one_sided:
            yield Problem(
                "one_sided_ratio",
                f"{max(above, 1 - above):.0%} of the probability ratios lie on one side of 1: the policy has moved so far within one "
                "rollout that the clip acts on one sign of the advantages alone. Lower learning_rate, or make fewer "
                "updates a rollout (gradient_accumulation_steps=steps_per_generation).",
            )
        drift = metrics.get("reference_drift", 0.0)
        if drift > self.max_reference_drift:
            yield Problem(
                "reference_drift",
                f"the predicted velocity differs from the reference's by {drift:.2g} of its square (healthy runs stay far below "
                f"{self.max_reference_drift}): the images are probably falling apart. Lower learning_rate, raise beta, or go back "
                "to an earlier checkpoint.",
            )
        yield from self._grad_norm(metrics)

    def _grad_norm(self, metrics: dict[str, float]) -> Iterator[Problem]:
        norm = metrics.get("grad_norm")
        if norm is None or not math.isfinite(
            norm
        ):  # float16 overflows now and then, and its scaler leaves the update out
            return
        usual = median(self.grad_norms) if len(self.grad_norms) >= FEWEST_NORMS else math.inf
        self.grad_norms.append(norm)
        if norm > self.max_grad_norm_factor * usual:
            yield Problem(
                "grad_norm",
                f"the gradient's norm is {norm:.2g}, and has been {usual:.2g} in the median before: set max_grad_norm to about "
                f"{2 * usual:.1g}, or lower learning_rate.",
            )

    def problems_of_rollout(self, metrics: dict[str, float], args: Any) -> Iterator[Problem]:
        """Rewards and images of the rollout that the update under way has sampled, if it has.

        Args:
            metrics: See `watch`.
            args: The trainer's settings.
        """
        if "reward" not in metrics:
            return
        if args.prompts_per_generation >= FEWEST_PROMPTS:
            without = metrics["frac_reward_zero_std"]
            if without > self.max_frac_reward_zero_std:
                yield Problem(
                    "zero_spread",
                    f"{without:.0%} of the groups have the same reward for all their images: they teach little or nothing. Either "
                    "the prompts are solved (take harder ones), or the images all fail (lower learning_rate, take easier "
                    "prompts), or the reward is too coarse (take a graded one).",
                )
            yield from self._reward_drop(metrics["reward"], metrics["reward_std"])
        yield from self._variety(metrics.get("image_variety", math.nan))

    def _reward_drop(self, reward: float, spread: float) -> Iterator[Problem]:
        if self.rewards is None:
            self.rewards = reward, spread
            return
        usual, usual_spread = self.rewards
        self.rewards = MEMORY * usual + (1 - MEMORY) * reward, MEMORY * usual_spread + (1 - MEMORY) * spread
        if reward < usual - self.max_reward_drop * usual_spread:
            yield Problem(
                "reward_drop",
                f"the reward has fallen to {reward:.3g}, from {usual:.3g} on average before (standard deviation of an image's "
                f"{usual_spread:.2g}): the policy has probably collapsed. Lower learning_rate, and go back to an earlier "
                "checkpoint.",
            )

    def _variety(self, variety: float) -> Iterator[Problem]:
        if math.isnan(variety):
            return
        if len(self.varieties) < FIRST_ROLLOUTS:
            self.varieties.append(variety)
        first = max(self.varieties)
        if variety < self.min_image_variety * first:
            yield Problem(
                "image_variety",
                f"the images of a prompt differ by {variety:.2g} in a pixel's value, and differed by {first:.2g} at first: they "
                "become all alike. Raise beta or noise_level, lower learning_rate, or look whether the reward favours one "
                "kind of image.",
            )

    def problems_of_evaluation(self, metrics: dict[str, float]) -> Iterator[Problem]:
        """Held-out rewards that have fallen since the first evaluation of a dataset, while the trained one has risen.

        Args:
            metrics: Of the evaluation.
        """
        for prefix in (name.removesuffix("_reward") for name in metrics if name.endswith("_reward")):
            if math.isnan(metrics[f"{prefix}_reward"]):  # reward functions have failed on all of it
                continue
            first = self.first_evaluations.setdefault(prefix, dict(metrics))
            images = metrics.get(f"{prefix}_num_scored_images", 0.0)
            rise = metrics[f"{prefix}_reward"] - first[f"{prefix}_reward"]
            if not images or rise <= self._tolerance(metrics, f"{prefix}_reward_std", images):
                continue
            for name in self.held_out:
                mean = f"{prefix}_rewards/{name}/mean"
                fall = first[mean] - metrics[mean]
                if fall > self._tolerance(metrics, f"{prefix}_rewards/{name}/std", images):
                    yield Problem(
                        "reward_hacking",
                        f"since the first evaluation the reward that is trained on has risen by {rise:.3g}, and {name}, which is "
                        f"not, has fallen by {fall:.3g}: the former is probably being hacked. Add {name} to reward_funcs, raise "
                        "beta, or stop earlier.",
                    )

    def _tolerance(self, metrics: dict[str, float], spread: str, images: float) -> float:
        return self.max_evaluation_errors * metrics[spread] / math.sqrt(images)


def watch_over(
    trainer: Trainer,
    metrics_of_update: Callable[[], dict[str, float]],
    record: Callable[[str, float], None],
    held_out: list[str],
) -> GuardRails | None:
    """Connect the guard rails among a trainer's callbacks, or those that `args.guard_rails` asks for; see `watch`.

    Raises:
        ValueError: If they are to hold back updates of DeepSpeed.
    """
    given = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GuardRails)]
    if not given and trainer.args.guard_rails != "off":
        given = [GuardRails(trainer.args.guard_rails)]
        trainer.add_callback(given[0])
    if not given:
        return None
    if given[0].action == "skip" and trainer.is_deepspeed_enabled:
        raise ValueError("guard_rails='skip' cannot hold back an update of DeepSpeed: use 'warn' or 'stop'.")
    given[0].watch(metrics_of_update, record, held_out)
    return given[0]
