"""Guard rails: detect failures of a run before the update that makes them worse.

The limits lie between healthy testbed runs and runs with deliberate failures: see docs/guard_rails.md.
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
FEWEST_PROMPTS = 8  # in a rollout, for checks of its mean reward and of groups without spread
FEWEST_STEPS = 8  # between float32 numbers, for a meaningful spread of rewards
FEWEST_TRANSITIONS = 32  # in an update, for checks of the share of ratios above 1
FEWEST_NORMS, MOST_NORMS = 3, 50  # of earlier updates, for comparing gradients
FIRST_ROLLOUTS = 5  # first rollouts, for comparing image variety
MEMORY = 0.9  # decay of the average of earlier rollouts' rewards
MOST_SKIPPED = 10  # skipped updates in a row until the run is stopped
REPEAT_AFTER = 100  # updates until a warning is repeated

MESSAGES = {
    "on_policy_ratio": "the probability ratio differs from 1 by {deviation:.1e} in the first update on a rollout "
    "(clip range {limit:.1e}): sampling and training compute different values. Set recompute_old_log_probs=True, or "
    "leave out per_device_rollout_batch_size, and use no dropout.",
    "on_policy_divergence": "a transition's KL divergence is {deviation:.1e} in the first update on a rollout "
    "(kl_mask_threshold {limit:.1e}): sampling and training compute different values. Set "
    "recompute_old_log_probs=True, or leave out per_device_rollout_batch_size, and use no dropout.",
    "one_sided_ratio": "{share:.0%} of the probability ratios are on one side of 1: the policy moved so far within "
    "one rollout that clipping affects only one sign of the advantages. Lower learning_rate, or make fewer updates "
    "per rollout (gradient_accumulation_steps=steps_per_generation).",
    "reference_drift": "the predicted velocity differs from the reference's by {drift:.2g} of its square (healthy "
    "runs: far below {limit}): the images are probably degrading. Lower learning_rate, raise beta, or go back to an "
    "earlier checkpoint.",
    "grad_norm": "the gradient norm is {norm:.2g}, and the median of earlier norms is {usual:.2g}: set max_grad_norm "
    "to about {limit:.1g}, or lower learning_rate.",
    "zero_spread": "{share:.0%} of the groups have equal rewards for all their images and contribute little or "
    "nothing. Either the prompts are solved (use harder ones), or all images fail (lower learning_rate, use easier "
    "prompts), or the reward is too coarse (use a graded one).",
    "nothing_trained": "the advantages of {number} groups in a row are all 0: nothing is trained{besides}. {why}",
    "reward_offset": "the rewards of a prompt's images differ by {spread:.2g} (standard deviation), but the step "
    "between float32 numbers is {step:.2g} at about {reward:.3g}. Subtract a constant from the rewards.",
    "reward_drop": "the reward has fallen to {reward:.3g}, from {usual:.3g} on average before (standard deviation of "
    "an image's {spread:.2g}): the policy has probably collapsed. Lower learning_rate, and go back to an earlier "
    "checkpoint.",
    "solved_or_hacked": "the rewards of a prompt's images differ by {spread:.2g} (standard deviation; {first:.2g} at "
    "first), while the mean has risen from {before:.3g} to {reward:.3g}: all images get similar rewards. Look at "
    "them: either the prompts are solved, or this is reward hacking. In that case, go back to an earlier checkpoint "
    "and add a reward that is low for such images.",
    "image_variety": "the images of a prompt differ by {variety:.2g} in pixel values ({first:.2g} at first): they "
    "become similar. Raise beta or noise_level, lower learning_rate, or check whether the reward favours one kind of "
    "image.",
    "reward_hacking": "since the first evaluation, the training reward has risen by {rise:.3g} and {name}, which is "
    "not trained on, has fallen by {fall:.3g}: this is probably reward hacking. Add {name} to reward_funcs, raise "
    "beta, or stop earlier.",
}
"""For each check: the observation, its likely cause and a remedy."""

WHY_NOTHING = {
    "offset": "The rewards are about {reward:.3g}, where the step between float32 numbers is {step:.2g}: if images "
    "differ by less, subtract a constant from the rewards.",
    "same": "All images of a prompt have equal rewards: either the prompts are solved (use harder ones), or all "
    "images fail (lower learning_rate, use easier prompts), or the reward is too coarse (use a graded one).",
    "credit": "The rewards of a prompt's images differ by {spread:.2g} (standard deviation), but each step has equal "
    "credit: check credit={credit!r}, turning_point_deadzone, and whether noise_level is large enough to change an "
    "image.",
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
)  # saved in checkpoints


class GuardRailError(RuntimeError):
    """Raised by the guard rails to stop a run."""


class Problem:
    """A sign of a failing run."""

    def __init__(self, check: str, **seen: Any):
        self.name, self.message = check, MESSAGES[check].format(**seen)


@dataclass(eq=False)  # transformers compares callbacks
class GuardRails(TrainerCallback):
    """
    Checks each update before it is made, and each evaluation; warns, skips the update or stops the run.

    The trainer adds one with `action=args.guard_rails`. To change the limits, pass another one in `callbacks`. Each
    problem is also logged as `guard_rails/{name}`.

    Args:
        action: `"warn"`; `"skip"`: warn and skip the update; `"stop"`: raise a [`GuardRailError`] before the update.
        max_on_policy_deviation: Distance of the ratio from 1 in the first update on a rollout, in clip ranges; with
            `loss_type="dppo"`, the divergence in thresholds.
        max_one_sided: Share of the ratios of a later update on one side of 1.
        max_frac_reward_zero_std: Share of the groups without spread in their final rewards.
        max_grad_norm_factor: Norm of the gradient, in medians of earlier norms.
        max_reference_drift: Distance of the predicted velocity from the reference's, `|v - v_ref|^2 / |v_ref|^2`.
        min_image_variety: Smallest image variety, as a share of that of the first rollouts.
        min_reward_spread: Smallest within-group spread of rewards, as a share of that of the first rollouts; checked
            if the mean reward has risen.
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
        """Forget earlier updates, for a new run."""
        self.grad_norms: list[float] = []
        self.varieties: list[float] = []
        self.rewards: tuple[float, float] | None = None  # mean and standard deviation, averaged over earlier rollouts
        self.spreads: list[tuple[float, float]] = []  # mean and spread within groups of the first rollouts' rewards
        self.first_evaluations: dict[str, dict[str, float]] = {}
        self.num_skipped = 0
        self.num_idle = 0  # groups in a row without any advantage
        self.warned: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {name: getattr(self, name) for name in REMEMBERED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
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
            raise GuardRailError(f"{MOST_SKIPPED} updates in a row were skipped. The last problem: {seen}")
        model.zero_grad()  # the optimizer skips parameters without gradient

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
        if not math.isfinite(norm):  # float16 may overflow; its scaler then skips the update
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
        """Check for advantages of 0, and for reward differences lost in float32."""
        reward, spread = metrics["reward"], metrics["reward_group_std"]
        step, groups = float(np.spacing(np.float32(abs(reward)))), args.prompts_per_generation
        self.num_idle = self.num_idle + groups if metrics.get("advantages/frac_zero") == 1 else 0
        swallows = step > EPSILON and spread < FEWEST_STEPS * step
        seen = {"reward": reward, "spread": spread, "step": step, "credit": args.credit}
        if self.num_idle >= FEWEST_PROMPTS:
            why = "offset" if swallows else "credit" if metrics["frac_reward_zero_std"] < 1 else "same"
            besides = " except by the KL divergence" if args.beta else ""
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
        """Check for held-out rewards that fell since a dataset's first evaluation while the trained one rose."""
        for prefix in (name.removesuffix("_reward") for name in metrics if name.endswith("_reward")):
            reward, images = metrics[f"{prefix}_reward"], metrics.get(f"{prefix}_num_scored_images", 0.0)
            if math.isnan(reward) or not images:  # reward functions failed on all images
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
    """Connect the guard rails among a `TPGRPOTrainer`'s callbacks, or those set by `args.guard_rails`.

    `metrics_of_update` returns the metrics of the current update, the same on all processes, with `grad_norm` and
    `is_on_policy` (1 in the first update on a rollout). `record` adds a metric to the log.
    """
    guard = next((one for one in trainer.callback_handler.callbacks if isinstance(one, GuardRails)), None)
    if guard is None and trainer.args.guard_rails != "off":
        guard = GuardRails(trainer.args.guard_rails)
        trainer.add_callback(guard)
    if guard is None:
        return None
    if guard.action == "skip" and trainer.is_deepspeed_enabled:
        raise ValueError("guard_rails='skip' cannot skip an update under DeepSpeed: use 'warn' or 'stop'.")
    guard.metrics_of_update, guard.record = metrics_of_update, record
    guard.held_out = trainer.eval_reward_func_names[len(trainer.reward_funcs) :]
    return guard
