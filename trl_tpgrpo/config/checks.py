"""Checks for settings that contradict each other or have no effect; each message has the name and a valid value."""

import inspect
from collections.abc import Iterator
from typing import Any

from ..algorithm.completion import CompletionRule
from .fields import is_within, without_secrets


def secret_errors(args: Any) -> Iterator[str]:
    """Find secrets that diffusers would print."""
    for name, value in (args.model_init_kwargs or {}).items():
        if name not in ("token", "proxies") and without_secrets({name: value}) != {name: value}:
            reason = "diffusers does not use this secret and would print it. For the Hub, set 'token'"
            yield f"model_init_kwargs has {name!r}: {reason}, or HF_TOKEN in the environment."


def sampling_errors(args: Any) -> Iterator[str]:
    """Find errors in the settings of sampling, the SDE, completions and evaluation."""
    last, size, limits = args.num_inference_steps - 1, args.sde_window_size, args.sde_window_range
    if args.sde_type == "cps" and not is_within(args.noise_level, "at most 1"):
        yield f"noise_level must be at least 0.0001 and at most 1 under cps, got {args.noise_level}."
    if not args.noise_calibration_iterations and args.noise_calibration_step != 0.01:
        yield f"noise_calibration_step ({args.noise_calibration_step}) needs noise_calibration_iterations above 0."
    for step in CompletionRule.parse(args.completion).at or ():
        if not 1 <= step <= last:
            yield f"completion={args.completion!r}: step {step} is not between 1 and {last}."
    if limits is not None and not (len(limits) == 2 and 0 <= limits[0] < limits[1] <= last):
        yield (
            f"sde_window_range must be [start, stop] with 0 <= start < stop <= {last} (the last of the "
            f"num_inference_steps={args.num_inference_steps} steps is never an SDE step), got {limits}."
        )
    start, stop = args.sde_window_limits
    if isinstance(args.noise_level, list) and len(args.noise_level) != stop - start:
        what = f"{stop - start} numbers, one per step of sde_window_range [{start}, {stop})"
        yield f"noise_level must be one number or {what}, got {len(args.noise_level)}: {args.noise_level}."
    if size is not None and args.sde_window_share is not None:
        yield f"sde_window_share ({args.sde_window_share}) measures the size: leave out sde_window_size ({size})."
    if size is not None and not 1 <= size <= stop - start:
        yield f"sde_window_size must be between 1 and {stop - start}, the steps of [{start}, {stop}), got {size}."
    evaluated, group = (args.per_device_eval_batch_size or 0) * args.world_size, args.num_generations_eval
    if args.eval_strategy != "no" and evaluated % group:
        yield f"Global eval batch size ({evaluated}) must be a multiple of num_generations_eval ({group})."


def credit_errors(args: Any) -> Iterator[str]:
    """Find errors in the settings of credit and advantages."""
    function, needs_completions = args.credit_rule.function, args.credit_rule.needs_completions
    if function is not None:
        try:
            inspect.signature(function).bind("rewards", "rule")
        except (TypeError, ValueError) as error:  # of a built-in function too, which has no signature
            yield f"credit: {args.credit} must be a function of (rewards, rule), not a class: {error}."
    elif (args.credit == "lambda") == (args.credit_lambda is None):
        yield f"credit_lambda ({args.credit_lambda}) is for credit='lambda', which needs it; credit={args.credit!r}."
    completed = ("completion", "completion_check_every", "advantage_baseline", "noise_calibration_iterations")
    for name in () if needs_completions else completed:
        if (value := getattr(args, name)) != getattr(type(args), name):
            yield f"credit={args.credit!r} uses no completions: leave out {name}, got {value!r}."
    if args.reward_weights and not any(args.reward_weights):
        yield f"reward_weights must not all be 0, got {args.reward_weights}: nothing would be trained."
    needs_group = args.advantage_baseline != "completion" or args.scale_rewards == "group"
    if args.num_generations == 1 and (needs_group or CompletionRule.parse(args.completion).first):
        what = "num_generations=1 needs advantage_baseline='completion' and scale_rewards='batch' or 'none'"
        yield f"{what}, and a completion of the first latent (no '_from_1')."
    if args.transition_share is not None and args.beta > 0:
        what = f"transition_share={args.transition_share} needs beta=0, got {args.beta}"
        yield f"{what}: the KL divergence is a mean over all transitions."
    if args.offload_reference and args.beta == 0:
        yield "offload_reference=True: with beta=0 there is no reference model; leave it out."


def loss_errors(args: Any) -> Iterator[str]:
    """Find errors in the settings of the loss."""
    clips, level, sizes = args.loss_type == "clip", args.importance_sampling_level, args.chunk_sizes
    for name in ["kl_mask_threshold"] if clips else ["epsilon", "epsilon_high", "ratio_norm"]:
        if value := getattr(args, name):
            what = f"{name}={value} has no effect with loss_type={args.loss_type!r}"
            yield f"{what}: leave it out, or set it to null if a recipe sets it."
    if args.step_weights is not None and len(args.step_weights) != args.num_sde_steps:
        yield f"step_weights must be {args.num_sde_steps} numbers, one for each SDE step, got {args.step_weights}."
    if args.step_weights is not None and args.sde_window_share is not None:
        yield f"step_weights {args.step_weights}: sde_window_share measures the number of steps."
    if level != "step" and (args.ratio_norm or not clips):
        other = "ratio_norm" if clips else f"loss_type={args.loss_type!r}"
        yield f"importance_sampling_level={level!r} and {other} cannot be combined: each defines its own ratio."
    if args.ratio_norm and (args.sde_type == "cps" or args.log_prob_type != "gaussian"):
        yield (
            "ratio_norm needs sde_type='flow_sde' or 'dance_sde' with log_prob_type='gaussian', for which it is "
            f"published; got {args.sde_type!r} with {args.log_prob_type!r}."
        )
    if sizes is not None and level != "chunk":
        yield f"chunk_sizes {sizes} need importance_sampling_level='chunk', got {level!r}."
    if sizes is not None and args.sde_window_share is not None:
        yield f"chunk_sizes {sizes}: sde_window_share measures the number of steps. Leave out one of them."
    if sizes is not None and (min(sizes, default=0) < 1 or sum(sizes) != args.num_sde_steps):
        yield f"chunk_sizes must be at least 1 each and {args.num_sde_steps} SDE steps together, got {sizes}."
