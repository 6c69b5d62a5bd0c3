"""What goes wrong in reinforcement learning of images, noticed before the update that makes it worse.

The limits were set between healthy runs of the testbed and runs with planted collapses: see docs/guard_rails.md.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState

from ..algorithm.credit import EPSILON


logger = logging.getLogger(__name__)

ACTIONS = ("warn", "skip", "stop")
FEWEST_PROMPTS = 8  # in a rollout whose mean reward and groups without spread say something about the policy
FEWEST_STEPS = 8  # between float32 numbers, in a spread of rewards that says something
FEWEST_TRANSITIONS = 32  # in an update in which the share of ratios above 1 says something
FEWEST_NORMS, MOST_NORMS = 3, 50  # of earlier updates that a gradient is compared with
FIRST_ROLLOUTS = 5  # whose images' variety later ones are compared with
MEMORY = 0.9  # decay of the average of earlier rollouts' rewards
MOST_SKIPPED = 10  # updates in a row; then the run, which gets nowhere, ends
REPEAT_AFTER = 100  # updates until a warning that still holds is given again

MESSAGES = {
    "on_policy_ratio": "the probability ratio is off 1 by {deviation:.1e} in the first update on a rollout, for a "
    "clip range of {limit:.1e}: sampling and training do not compute the same. Set recompute_old_log_probs=True, "
    "or leave per_device_rollout_batch_size out, and use no dropout.",
    "on_policy_divergence": "a transition's KL divergence is {deviation:.1e} in the first update on a rollout, for a "
    "kl_mask_threshold of {limit:.1e}: sampling and training do not compute the same. Set "
    "recompute_old_log_probs=True, or leave per_device_rollout_batch_size out, and use no dropout.",
    "one_sided_ratio": "{share:.0%} of the probability ratios lie on one side of 1: the policy has moved so far "
    "within one rollout that the clip acts on one sign of the advantages alone. Lower learning_rate, or make fewer "
    "updates a rollout (gradient_accumulation_steps=steps_per_generation).",
    "reference_drift": "the predicted velocity differs from the reference's by {drift:.2g} of its square (healthy "
    "runs stay far below {limit}): the images are probably falling apart. Lower learning_rate, raise beta, or go back "
    "to an earlier checkpoint.",
    "grad_norm": "the gradient's norm is {norm:.2g}, and has been {usual:.2g} in the median before: set max_grad_norm "
    "to about {limit:.1g}, or lower learning_rate.",
    "zero_spread": "{share:.0%} of the groups have the same reward for all their images: they teach little or "
    "nothing. Either the prompts are solved (take harder ones), or the images all fail (lower learning_rate, take "
    "easier prompts), or the reward is too coarse (take a graded one).",
    "nothing_trained": "the advantages of {number} groups in a row are all 0: nothing is trained{besides}. {why}",
    "reward_offset": "the rewards of a prompt's images differ by {spread:.2g} (standard deviation), but float32 keeps "
    "numbers of about {reward:.3g} in steps of {step:.2g}. Subtract a constant from the rewards.",
    "reward_drop": "the reward has fallen to {reward:.3g}, from {usual:.3g} on average before (standard deviation of "
    "an image's {spread:.2g}): the policy has probably collapsed. Lower learning_rate, and go back to an earlier "
    "checkpoint.",
    "solved_or_hacked": "the rewards of a prompt's images differ by {spread:.2g} (standard deviation) and differed by "
    "{first:.2g} at first, while the mean has risen from {before:.3g} to {reward:.3g}: all images please the reward "
    "alike. Look at them: either the prompts are solved, or the reward is satisfied by something that was not meant. "
    "Go back to an earlier checkpoint, and add a reward that such images do not get.",
    "image_variety": "the images of a prompt differ by {variety:.2g} in a pixel's value, and differed by {first:.2g} "
    "at first: they become all alike. Raise beta or noise_level, lower learning_rate, or look whether the reward "
    "favours one kind of image.",
    "reward_hacking": "since the first evaluation the reward that is trained on has risen by {rise:.3g}, and {name}, "
    "which is not, has fallen by {fall:.3g}: the former is probably being hacked. Add {name} to reward_funcs, raise "
    "beta, or stop earlier.",
}
"""What was seen, its likely cause, and what to do, by check."""

WHY_NOTHING = {
    "offset": "The rewards are about {reward:.3g}, and float32 keeps such numbers in steps of {step:.2g}: if images "
    "differ by less, subtract a constant from the rewards.",
    "same": "All images of a prompt have the same reward: either the prompts are solved (take harder ones), or the "
    "images all fail (lower learning_rate, take easier prompts), or the reward is too coarse (take a graded one).",
    "credit": "The rewards of a prompt's images differ by {spread:.2g} (standard deviation), but the credit of each "
    "step is the same for all: look at credit={credit!r}, turning_point_deadzone, and whether noise_level is enough "
    "to change an image.",
}

REMEMBERED = (
    "grad_norms",
    "varieties",
    "rewards",
    "spreads",
    "first_evaluations",
    "num_skipped",
    "num_idle",
    "warned",
)  # in checkpoints


class GuardRailError(RuntimeError):
    """A run was stopped by its guard rails."""


class Problem:
    """Something that a healthy run does not show."""

    def __init__(self, check: str, **seen: Any):
        self.name, self.message = check, MESSAGES[check].format(**seen)


@dataclass(eq=False)  # transformers compares callbacks and looks them up
class GuardRails(TrainerCallback):
    """
    Looks at each update before it is made, and at each evaluation, and warns, skips the update or stops the run.

    The trainer adds one by itself, with `action=args.guard_rails`; pass another in `callbacks` to change the limits.
    Each problem is logged as `guard_rails/{name}` too.

    Args:
        action: `"warn"`; `"skip"`, warn and leave the update out; or `"stop"`, raise a [`GuardRailError`] before it.
        max_on_policy_deviation: Distance of the ratio from 1 in the first update on a rollout, in clip ranges; under
            `loss_type="dppo"` the divergence, in thresholds.
        max_one_sided: Share of the ratios of a later update on one side of 1.
        max_frac_reward_zero_std: Share of the groups without spread in their final rewards.
        max_grad_norm_factor: Norm of the gradient, in medians of earlier norms.
        max_reference_drift: Distance of the predicted velocity from the reference's, `|v - v_ref|^2 / |v_ref|^2`.
        min_image_variety: Share of the variety of the first rollouts' images that must be left.
        min_reward_spread: Share of the first rollouts' spread of rewards within groups that must be left, unless the
            mean reward has not risen.
        max_reward_drop: Fall of a rollout's mean reward below that of earlier ones, in a reward's standard deviations.
        max_evaluation_errors: Fall of a held-out reward while the trained one rises, in standard errors.
    """

    action: str = "warn"
    max_on_policy_deviation: float = 0.1
    max_one_sided: float = 0.9
    max_frac_reward_zero_std: float = 0.8
    max_grad_norm_factor: float = 10.0
    max_reference_drift: float = 0.25
    min_image_variety: float = 0.25
    min_reward_spread: float = 0.1
    max_reward_drop: float = 1.0
    max_evaluation_errors: float = 3.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action must be one of {ACTIONS}, got {self.action!r}.")
        self.metrics_of_update: Callable[[], dict[str, float]] = dict
        self.record: Callable[[str, float], None] = lambda name, value: None
        self.held_out: list[str] = []
        self.forget()

    def forget(self) -> None:
        """Forget earlier updates, as for another run."""
        self.grad_norms: list[float] = []
        self.varieties: list[float] = []
        self.rewards: tuple[float, float] | None = None  # mean and standard deviation, averaged over earlier rollouts
        self.spreads: list[tuple[float, float]] = []  # mean and spread within groups of the first rollouts' rewards
        self.first_evaluations: dict[str, dict[str, float]] = {}
        self.num_skipped = 0
        self.num_idle = 0  # groups in a row without any advantage
        self.warned: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered of earlier updates, for a checkpoint."""
        return {name: getattr(self, name) for name in REMEMBERED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    # The events

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, *, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        metrics = self.metrics_of_update()
        problems = [*self.problems_of_update(metrics, args), *self.problems_of_rollout(metrics, args)]
        self._report(problems, state)
        self.num_skipped = self.num_skipped + 1 if problems and self.action == "skip" else 0
        if not self.num_skipped:
            return
        if self.num_skipped > MOST_SKIPPED:
            seen = problems[0].message
            raise GuardRailError(f"{MOST_SKIPPED} updates in a row were skipped; the last problem: {seen}")
        model.zero_grad()  # the optimizer passes over parameters without gradient

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self._report(list(self.problems_of_evaluation(metrics)), state)

    def _report(self, problems: list[Problem], state: TrainerState) -> None:
        for problem in problems:
            self.record(f"guard_rails/{problem.name}", 1.0)
            if self.action == "stop":
                raise GuardRailError(f"After update {state.global_step}: {problem.message}")
            if state.global_step - self.warned.get(problem.name, -REPEAT_AFTER) < REPEAT_AFTER:
                continue
            self.warned[problem.name] = state.global_step
            if state.is_world_process_zero:
                message = problem.message + (" This update is skipped." if self.action == "skip" else "")
                logger.warning("Guard rail %r after update %d: %s", problem.name, state.global_step, message)

    # The checks

    def problems_of_update(self, metrics: dict[str, float], args: Any) -> Iterator[Problem]:
        """Check ratio, distance from the reference and gradient of an update; see `watch_over` for `metrics`."""
        clips, is_on_policy = args.loss_type == "clip", metrics.get("is_on_policy")
        limit = min(args.epsilon, args.epsilon_high) if clips else args.kl_mask_threshold
        deviation = metrics.get("ratio/max_deviation" if clips else "divergence/max", 0.0)
        above = metrics.get("ratio/frac_above_one", 0.5)
        share = max(above, 1 - above)
        enough = args.train_batch_size * args.world_size * args.gradient_accumulation_steps >= FEWEST_TRANSITIONS
        drift = metrics.get("reference_drift", 0.0)
        if is_on_policy and deviation > self.max_on_policy_deviation * limit:
            yield Problem("on_policy_ratio" if clips else "on_policy_divergence", deviation=deviation, limit=limit)
        if enough and not is_on_policy and share > self.max_one_sided:
            yield Problem("one_sided_ratio", share=share)
        if drift > self.max_reference_drift:
            yield Problem("reference_drift", drift=drift, limit=self.max_reference_drift)
        yield from self._grad_norm(metrics.get("grad_norm", math.nan))

    def _grad_norm(self, norm: float) -> Iterator[Problem]:
        if not math.isfinite(norm):  # float16 overflows now and then, and its scaler leaves the update out
            return
        usual = median(self.grad_norms) if len(self.grad_norms) >= FEWEST_NORMS else math.inf
        self.grad_norms = [*self.grad_norms, norm][-MOST_NORMS:]
        if norm > self.max_grad_norm_factor * usual:
            yield Problem("grad_norm", norm=norm, usual=usual, limit=2 * usual)

    def problems_of_rollout(self, metrics: dict[str, float], args: Any) -> Iterator[Problem]:
        """Check rewards and images of an update that is the first on a rollout; see `watch_over` for `metrics`."""
        if "reward" not in metrics:
            return
        yield from self._nothing_trained(metrics, args)
        if args.prompts_per_generation >= FEWEST_PROMPTS:
            if (share := metrics["frac_reward_zero_std"]) > self.max_frac_reward_zero_std and not self.num_idle:
                yield Problem("zero_spread", share=share)
            yield from self._reward_drop(metrics["reward"], metrics["reward_std"])
            yield from self._reward_spread(metrics["reward"], metrics["reward_group_std"])
        variety = metrics.get("image_variety", math.nan)
        self.varieties += [variety] if len(self.varieties) < FIRST_ROLLOUTS and not math.isnan(variety) else []
        if self.varieties and variety < self.min_image_variety * max(self.varieties):
            yield Problem("image_variety", variety=variety, first=max(self.varieties))

    def _nothing_trained(self, metrics: dict[str, float], args: Any) -> Iterator[Problem]:
        """Check for advantages of 0, and for rewards whose differences float32 swallows where they would count."""
        reward, spread = metrics["reward"], metrics["reward_group_std"]
        step, groups = float(np.spacing(np.float32(abs(reward)))), args.prompts_per_generation
        self.num_idle = self.num_idle + groups if metrics.get("advantages/frac_zero") == 1 else 0
        swallows = step > EPSILON and spread < FEWEST_STEPS * step
        seen = {"reward": reward, "spread": spread, "step": step, "credit": args.credit}
        if self.num_idle >= FEWEST_PROMPTS:
            why = "offset" if swallows else "credit" if metrics["frac_reward_zero_std"] < 1 else "same"
            besides = " but by the KL divergence" if args.beta else ""
            yield Problem(
                "nothing_trained", number=self.num_idle, besides=besides, why=WHY_NOTHING[why].format(**seen)
            )
        elif swallows and groups >= FEWEST_PROMPTS:
            yield Problem("reward_offset", **seen)

    def _reward_drop(self, reward: float, spread: float) -> Iterator[Problem]:
        usual, usual_spread = self.rewards or (reward, spread)
        self.rewards = MEMORY * usual + (1 - MEMORY) * reward, MEMORY * usual_spread + (1 - MEMORY) * spread
        if reward < usual - self.max_reward_drop * usual_spread:
            yield Problem("reward_drop", reward=reward, usual=usual, spread=usual_spread)

    def _reward_spread(self, reward: float, spread: float) -> Iterator[Problem]:
        before, first = (fmean(values) for values in zip(*(self.spreads or [(reward, spread)]), strict=True))
        self.spreads += [(reward, spread)] if len(self.spreads) < FIRST_ROLLOUTS else []
        if spread < self.min_reward_spread * first and reward > before:
            yield Problem("solved_or_hacked", spread=spread, first=first, before=before, reward=reward)

    def problems_of_evaluation(self, metrics: dict[str, float]) -> Iterator[Problem]:
        """Check for held-out rewards that fell since a dataset's first evaluation, while the trained one has risen."""
        for prefix in (name.removesuffix("_reward") for name in metrics if name.endswith("_reward")):
            reward, images = metrics[f"{prefix}_reward"], metrics.get(f"{prefix}_num_scored_images", 0.0)
            if math.isnan(reward) or not images:  # reward functions have failed on all of it
                continue
            first = self.first_evaluations.setdefault(prefix, dict(metrics))
            rise, errors = reward - first[f"{prefix}_reward"], self.max_evaluation_errors / math.sqrt(images)
            for name in self.held_out if rise > errors * metrics[f"{prefix}_reward_std"] else []:
                mean, spread = f"{prefix}_rewards/{name}/mean", f"{prefix}_rewards/{name}/std"
                fall = first[mean] - metrics[mean]
                if fall > errors * metrics[spread]:
                    yield Problem("reward_hacking", rise=rise, name=name, fall=fall)


def watch_over(
    trainer: Any, metrics_of_update: Callable[[], dict[str, float]], record: Callable[[str, float], None]
) -> GuardRails | None:
    """Connect the guard rails among a `TPGRPOTrainer`'s callbacks, or those that `args.guard_rails` asks for.

    `metrics_of_update` returns what the update under way has recorded, the same on all processes: metrics,
    `grad_norm`, and `is_on_policy`, 1 in the first update on a rollout. `record` adds a metric to the log.
    """
    guard = next((one for one in trainer.callback_handler.callbacks if isinstance(one, GuardRails)), None)
    if guard is None and trainer.args.guard_rails != "off":
        guard = GuardRails(trainer.args.guard_rails)
        trainer.add_callback(guard)
    if guard is None:
        return None
    if guard.action == "skip" and trainer.is_deepspeed_enabled:
        raise ValueError("guard_rails='skip' cannot hold back an update of DeepSpeed: use 'warn' or 'stop'.")
    guard.metrics_of_update, guard.record = metrics_of_update, record
    guard.held_out = trainer.eval_reward_func_names[len(trainer.reward_funcs) :]
    return guard
