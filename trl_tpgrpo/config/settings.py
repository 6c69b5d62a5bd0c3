"""Every setting of a run, in the order in which the data travels. The defaults are the paper's."""

import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any

from transformers.trainer_utils import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

from ..algorithm.chunks import LEVELS
from ..algorithm.completion import CompletionRule
from ..algorithm.credit import AGGREGATIONS, BASELINES, CREDITS, SCOPES, TRENDS, CreditRule
from ..algorithm.losses import LOSS_TYPES, LossRule
from ..algorithm.rollout import Window
from ..algorithm.sde import LOG_PROB_TYPES, SDE_TYPES
from ..rewards.serving.functions import import_path
from .checks import credit_errors, loss_errors, sampling_errors, secret_errors
from .fields import described, field_defaults, non_defaults, without_secrets
from .values import check_limits, check_types


UNSUPPORTED = {
    "auto_find_batch_size": "a smaller batch would tear prompt groups apart; lower per_device_train_batch_size",
    "save_on_each_node": "whole weights are collected on the first process alone; let the nodes share output_dir",
    "use_liger_kernel": "Liger's kernels are for language models",
    "enable_jit_checkpoint": "it saves in the middle of an update; SIGTERM is answered after the update without it",
    "torch_compile": "it would compile the model for training alone; set compile_backend='inductor'",
    "torch_compile_backend": "it would compile the model for training alone; set compile_backend='inductor'",
    "torch_compile_mode": "it would compile the model for training alone; set compile_backend='inductor'",
    "neftune_noise_alpha": "it adds noise to token embeddings, which a transformer of latents does not have",
}


@described
@dataclass
class TPGRPOConfig(_BaseConfig):
    r"""
    Configuration class for the [`TPGRPOTrainer`].

    `TPGRPOConfig(output_dir)` has the settings of TurningPoint-GRPO (arXiv 2602.06422) for SD3.5-medium. Settings that
    [`~trl.GRPOConfig`] has too keep its names and meanings. See also [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the model
        model_init_kwargs (`str` or `dict`, *optional*): Keyword arguments for `from_pretrained`; JSON if a string.
        policy_class (`str`, *optional*): Import path (`my_policies.Mine`) of a subclass of `FlowPolicy` for a pipeline
            that the package does not support; in Python, also the class. `None`: by the pipeline.

        > Parameters that control the data
        remove_unused_columns (`bool`, *optional*, defaults to `False`): Whether reward functions receive only
            `"prompt"` and no other column.
        num_generations (`int`, *optional*, defaults to `24`): Images per prompt; must divide `generation_batch_size`.
        num_generations_eval (`int`, *optional*, defaults to `1`): Images per prompt in evaluation.
        shuffle_dataset (`bool`, *optional*, defaults to `True`): Whether to shuffle the training prompts.
        per_device_train_batch_size (`int`, *optional*, defaults to `9`): Images per micro-batch, trained step by step.
        per_device_eval_batch_size (`int`, *optional*): Images per evaluation batch. `None`: up to `num_generations`.
        generation_batch_size (`int`, *optional*): Images per rollout over all processes; excludes
            `steps_per_generation`. `None`: as that or `gradient_accumulation_steps` sets it, else 48 prompts.
        steps_per_generation (`int`, *optional*): Micro-batches per rollout. `None`: follows from the rest.
        gradient_accumulation_steps (`int`, *optional*): Micro-batches per update. `None`: half a rollout, all if odd.

        > Parameters that control sampling
        height (`int`, *optional*, defaults to `512`): Height of the images in pixels.
        width (`int`, *optional*, defaults to `512`): Width of the images in pixels.
        eval_height (`int`, *optional*): Height of the images in evaluation, in pixels. `None`: `height`.
        eval_width (`int`, *optional*): Width of the images in evaluation, in pixels. `None`: `width`.
        num_inference_steps (`int`, *optional*, defaults to `10`): Number of denoising steps T in training.
        num_inference_steps_eval (`int`, *optional*, defaults to `40`): Number of ODE steps in evaluation.
        guidance_scale (`float`, *optional*): Guidance scale in sampling and training: classifier-free, or an input of
            the model. `None`: the default of the family, which is the paper's for SD3.5 (4.5) and FLUX.1 (3.5).
        true_cfg_scale (`float`, *optional*): Scale of classifier-free guidance with `negative_prompt`, for pipelines
            that have this argument. `None`: the pipeline's default.
        negative_prompt (`str`, *optional*): Negative prompt for guidance. `None`: the empty prompt, or no guidance
            where the pipeline needs one.
        max_sequence_length (`int`, *optional*): Maximum number of text tokens. `None`: the pipeline's default. For an
            SD3 pipeline without T5, `0` leaves out the zeros that diffusers appends.
        per_device_rollout_batch_size (`int` or `"auto"`, *optional*): Latents per forward pass and images per VAE call
            in a rollout. `None`: `per_device_train_batch_size`, for which the first ratio is exactly 1. `"auto"`: the
            fastest size, measured before the first rollout; its rounding differs, so a repeated run may not be
            bit-identical.
        share_initial_noise (`bool`, *optional*, defaults to `False`): Whether the images of a group start from the
            same noise. The steps before the first SDE step and the ODE completion of the first latent are then
            computed once per group.

        > Parameters that control the SDE
        sde_type (`str`, *optional*, defaults to `"cps"`): SDE of the sampler: `"cps"`, `"flow_sde"` (Flow-GRPO) or
            `"dance_sde"` (DanceGRPO), see [`~trl_tpgrpo.algorithm.sde.transition`].
        noise_level (`float` or `list[float]`, *optional*, defaults to `0.7`): Noise level of the SDE steps. At least
            1e-4, because less is lost in float32 rounding; at most 1 for `"cps"`. A list has one value per step of
            `sde_window_range` (`None`: per step but the last).
        noise_calibration_iterations (`int`, *optional*, defaults to `0`): Iterations of noise calibration before the
            first rollout, from `noise_level` on (DenseGRPO, arXiv 2601.20218). Each changes the noise of each step so
            that as many step rewards are positive as negative, measured on the groups of up to 16 prompts per process.
        noise_calibration_step (`float`, *optional*, defaults to `0.01`): Change of the noise level per iteration.
        sde_window_size (`int`, *optional*): Number K of SDE steps. All are trained on. `None`: all of
            `sde_window_range`.
        sde_window_range (`list[int]`, *optional*): Steps `[start, stop)` that can be in the window. If they are more
            than K, its start is drawn once per rollout, for all processes. `None`: all steps but the last, with the
            start at 0.
        sde_window_share (`float`, *optional*): Replaces `sde_window_size`: use the shortest window with this share of
            the within-group variance of step rewards, measured on the first prompts before the first rollout.
        log_prob_type (`str`, *optional*): Log-probability of a step, see [`~trl_tpgrpo.algorithm.sde.log_prob`].
            `None`: `"squared_error"` for `"cps"` (the published clip range belongs to it), else `"gaussian"`.

        > Parameters that control the completions
        completion (`str`, *optional*, defaults to `"exact"`): How the ODE sampler finishes a latent before it is
            scored. `"exact"`: all remaining steps. `"at_1_2_3_4_6"`: function evaluations at these steps only, with an
            extrapolated velocity at the others. `"ab2_N"`, `"euler_N"`: at most N steps of second or first order.
            `"one_step"`: one, with the known velocity. The suffix `_every_M` completes only every M-th latent and
            credits blocks of M steps; `_from_1` replaces the first completion by the mean final reward of the group.
            `trl-tpgrpo fidelity` compares them.
        completion_check_every (`int`, *optional*): Rollouts between two checks that log how well step rewards and
            turning points agree with exact completions, for the first prompt of each process. `None`: no checks.

        > Parameters that control the reward and credit
        reward_failures (`str`, *optional*, defaults to `"stop"`): If a reward function raises, hangs or returns no
            reward: `"stop"` the run and name the function, row, prompt and image, or `"skip"` (drop and count) the
            trajectory.
        reward_weights (`list[float]`, *optional*): Weight of each reward function. `None`: 1 each.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`): `"sum_then_normalize"`:
            advantages of the weighted sum of rewards. `"normalize_then_sum"` (GDPO, arXiv 2601.05242): weighted sum of
            each function's advantages, scaled by the batch unless `scale_rewards` is `"none"`.
        credit (`str`, *optional*, defaults to `"consistent"`): Credit of a step. `"consistent"` and `"turning_point"`:
            the gain up to the final reward at turning points (by the strict or the plain definition), else the step
            reward. `"incremental"`: the step reward. `"lambda"`: the lambda-return of the step rewards. `"outcome"`:
            the final reward (Flow-GRPO, no completions). Or the import path (`my_rules.mine`) of a function `(rewards,
            rule) -> credit`; in Python, also the function.
        credit_lambda (`float`, *optional*): Decay for `credit="lambda"`, in [0, 1].
        turning_point_trend (`str`, *optional*, defaults to `"remaining"`): Gain that a step reward is compared with:
            `"remaining"`, from this step to the end, or `"global"`, over all steps.
        turning_point_first_step (`bool`, *optional*, defaults to `True`): Whether the first step can be a turning
            point (Remark 5.2 of the paper).
        turning_point_deadzone (`float`, *optional*, defaults to `0.0`): Step rewards up to this size count as 0.
        turning_point_balance (`bool`, *optional*, defaults to `True`): Whether to keep as many positive as negative
            turning points, those with the largest gains.
        advantage_baseline (`str`, *optional*, defaults to `"group"`): `"group"`: subtract the mean credit of the
            group. `"completion"`: nothing, because gains are measured from the step's own completion
            (`num_generations` can be 1). `"fitted"`: the mean too, and measure gains from a share of that completion's
            reward, fitted by least squares.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"group"`): Divide credit by the standard deviation
            within the `"group"` (or `True`) or the `"batch"`, or do not scale it (`"none"` or `False`).
        advantage_scope (`str`, *optional*, defaults to `"step"`): Whether mean and spread are those of each `"step"`,
            or `"joint"` over all steps of the group.
        adv_clip_max (`float`, *optional*): Largest absolute advantage. `None`: no limit.
        transition_share (`float`, *optional*): Share of the transitions to train on. Transitions are drawn in
            proportion to their absolute advantage and weighted by the inverse, so the expected gradient does not
            change. Needs `beta=0`. `None`: all that have an advantage.

        > Parameters that control the training
        beta (`float`, *optional*, defaults to `4e-4`): Weight of the KL divergence from the reference model. With
            `0.0`, there is no reference model.
        num_iterations (`int`, *optional*, defaults to `1`): Number of times that each rollout is trained on.
        loss_type (`str`, *optional*, defaults to `"clip"`): Trust region of an update: `"clip"` clips the ratio;
            `"dppo"` (Flow-DPPO, arXiv 2606.11025) masks transitions that are too far and would move further.
        epsilon (`float`, *optional*): Clip range of the ratio. `None`: 1e-5 (for `log_prob_type="squared_error"`), or
            the published value for `ratio_norm` (2e-6) or Gaussian chunks (5e-5).
        epsilon_high (`float`, *optional*): Upper clip range. `None`: `epsilon`.
        ratio_norm (`bool`, *optional*, defaults to `False`): Whether to clip the ratio of GRPO-Guard (arXiv
            2510.22319), which is centred at 1 at every step, and to divide the loss of a step by its length in sigma.
            Needs `log_prob_type="gaussian"` and `sde_type="flow_sde"` or `"dance_sde"`.
        kl_mask_threshold (`float`, *optional*): KL divergence of a transition from the sampled one, averaged over
            dimensions, from which `"dppo"` masks it. `None`: 1e-6.
        step_weights (`list[float]`, *optional*): Weight of the surrogate loss of each SDE step. `None`: 1 each.
        importance_sampling_level (`str`, *optional*, defaults to `"step"`): Steps that share one ratio, the geometric
            mean of their ratios: each `"step"` alone, a `"chunk"` (GCPO, arXiv 2510.21583) or the `"trajectory"`.
        chunk_sizes (`list[int]`, *optional*): Sizes of the chunks, in the order of the steps. `None`: found in each
            rollout, from changes in the trend of the latents' relative change.
        ema_decay (`float`, *optional*, defaults to `0.9`): Decay of the moving average of the trained weights. The
            average is evaluated and saved. `None`: no average.
        ema_update_every (`int`, *optional*, defaults to `8`): Model updates between two updates of the average. Before
            the first, the trained weights themselves are evaluated and saved.
        guard_rails (`str`, *optional*, defaults to `"warn"`): Answer to signs of a failing run before an update:
            `"warn"`, `"skip"`, `"stop"` or `"off"`. To set other limits, pass [`~trl_tpgrpo.GuardRails`] in
            `callbacks`.
        resume_from_checkpoint (`str`, *optional*): Checkpoint from which the command line resumes. `true`: the latest
            complete one in `output_dir`. In Python, pass it to `train()`.
        resume_with_changes (`list[str]`, *optional*): Names of settings, or of `train_dataset`, `reward_funcs` and
            `model.transformer` (`.vae`, ...), that may differ from the checkpoint in a resumed run.
        recompute_old_log_probs (`bool`, *optional*, defaults to `False`): Whether to recompute the log-probabilities
            of a rollout as in training, before the first update. Where kernels differ with gradients (NF4, compiled
            blocks, `"auto"` batch sizes), the first ratio is 1 again, for one function evaluation per transition.

        > Parameters that control memory and speed
        quantization (`str`, *optional*): Format of the base transformer: `"nf4"` (bitsandbytes, 4 bit, as in QLoRA),
            `"int8"` or `"fp8"` (torchao, weights only). Needs `peft_config` and a model given by name.
        allow_distilled (`bool`, *optional*, defaults to `False`): Whether to allow training a model that was distilled
            to few steps (Turbo, schnell, FLUX.2 klein). Training undoes the distillation.
        attention_backend (`str`, *optional*): Attention backend, such as `"flash"`. `None`: the default of diffusers.
        compile_backend (`str`, *optional*): Backend of `torch.compile`, such as `"inductor"`, for the repeated blocks
            of the transformer, compiled once for rollouts, training and all batch sizes. `None`: no compilation.
        precompute_prompt_embeds (`bool`, *optional*, defaults to `False`): Whether to encode all prompts first,
            without the transformer on the device, and free the text encoders. Otherwise they stay in CPU memory
            between rollouts.
        prompt_embeds_dir (`str`, *optional*): Folder for encoded prompts, for this run and later ones. `None`: the
            latest 1,024 are kept in CPU memory.
        offload_between_phases (`bool`, *optional*, defaults to `False`): Whether the VAE, and reward functions with a
            method `to`, are on the CPU except while they decode and score.
        offload_trajectories (`bool`, *optional*, defaults to `False`): Whether to keep latents in pinned CPU memory.
        offload_reference (`bool`, *optional*, defaults to `False`): For full fine-tuning with `beta > 0`: whether the
            reference model is on the CPU, except while it predicts all velocities of a rollout before the first
            update.
        vae_slicing (`bool`, *optional*, defaults to `False`): Whether the VAE decodes one image at a time.
        vae_tiling (`bool`, *optional*, defaults to `False`): Whether the VAE decodes images larger than its tile
            (1,024 pixels for SD3.5 and FLUX.1) in overlapping, blended tiles: less memory, slightly different images.

        > Parameters that control the logging
        log_completions (`bool`, *optional*, defaults to `False`): Whether to print samples of the rollout with each
            log (prompts, rewards, mean advantage, rewards along the trajectory) and save their images in
            `output_dir/completions`. TRL's name; not the ODE completions.
        num_completions_to_print (`int`, *optional*): Samples to print. `None`: the group of the first prompt.
        log_images_steps (`int`, *optional*, defaults to `20`): Updates between two reports to TensorBoard, W&B or
            trackio (`report_to`): sample images, a trajectory with turning points, histograms of rewards, step rewards
            and advantages. The first images of each evaluation are sent and saved in `output_dir/images`. `None`:
            never.

        > Parameters whose defaults differ from [`~transformers.TrainingArguments`]
        bf16 (`bool`, *optional*): Whether to use bfloat16. `None`: if the device can and `fp16` is not set.
        learning_rate (`float`, *optional*, defaults to `3e-4`): Initial learning rate, instead of `5e-5`.
        weight_decay (`float`, *optional*, defaults to `1e-4`): Weight decay, instead of `0`.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`): Learning rate schedule, instead of `"linear"`.
        activation_checkpointing (`bool`, *optional*): Whether to recompute activations to save memory. `None`: `True`.
        gradient_checkpointing (`bool`, *optional*): Former name of `activation_checkpointing`.
        logging_steps (`float`, *optional*, defaults to `1`): Updates between two logs; below 1: share of all.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`): Whether to hide NaN and infinite losses.
        dataloader_pin_memory (`bool`, *optional*, defaults to `False`): Whether to pin batches, here rows of text.

        > Parameters that are not set by hand
        derived (`dict`, *optional*): Settings that were computed from others. A config made from this one, by
            `dataclasses.replace(config, ...)` or `TPGRPOConfig(**config.to_dict())`, computes them again.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # In the order of the docstring, whose groups `trl-tpgrpo train --help` shows; with the values that are allowed
    model_init_kwargs: dict[str, Any] | None = None
    policy_class: str | None = None
    remove_unused_columns: bool | None = False
    num_generations: Annotated[int, "at least 1"] = 24
    num_generations_eval: Annotated[int, "at least 1"] = 1
    shuffle_dataset: bool = True
    per_device_train_batch_size: Annotated[int, "at least 1"] = 9
    per_device_eval_batch_size: Annotated[int | None, "at least 1"] = None
    generation_batch_size: Annotated[int | None, "at least 1, or None"] = None
    steps_per_generation: Annotated[int | None, "at least 1, or None"] = None
    gradient_accumulation_steps: Annotated[int | None, "at least 1"] = None
    height: Annotated[int, "at least 1"] = 512
    width: Annotated[int, "at least 1"] = 512
    eval_height: Annotated[int | None, "at least 1, or None"] = None
    eval_width: Annotated[int | None, "at least 1, or None"] = None
    num_inference_steps: Annotated[int, "at least 2"] = 10
    num_inference_steps_eval: Annotated[int, "at least 1"] = 40
    guidance_scale: Annotated[float | None, "at least 0, or None"] = None
    true_cfg_scale: Annotated[float | None, "at least 0, or None"] = None
    negative_prompt: str | None = None
    max_sequence_length: Annotated[int | None, "at least 0, or None"] = None
    per_device_rollout_batch_size: Annotated[int | str | None, "at least 1, or 'auto'"] = None
    share_initial_noise: bool = False
    sde_type: Annotated[str, SDE_TYPES] = "cps"
    # For transformers' parser: it takes a union with `str` only, and no default of a list but from here
    noise_level: Annotated[float | list[float] | str, "at least 0.0001"] = field(
        default=0.7, metadata={"default": 0.7}
    )
    noise_calibration_iterations: Annotated[int, "at least 0"] = 0
    noise_calibration_step: Annotated[float, "above 0 and below 1"] = 0.01
    sde_window_size: int | None = None
    sde_window_range: list[int] | None = None
    sde_window_share: Annotated[float | None, "above 0 and at most 1, or None"] = None
    log_prob_type: Annotated[str | None, LOG_PROB_TYPES] = None
    completion: str = "exact"
    completion_check_every: Annotated[int | None, "at least 1, or None"] = None
    reward_failures: Annotated[str, ("stop", "skip")] = "stop"
    reward_weights: list[float] | None = None
    multi_objective_aggregation: Annotated[str, AGGREGATIONS] = "sum_then_normalize"
    credit: str = "consistent"
    credit_lambda: Annotated[float | None, "at least 0 and at most 1, or None"] = None
    turning_point_trend: Annotated[str, TRENDS] = "remaining"
    turning_point_first_step: bool = True
    turning_point_deadzone: Annotated[float, "at least 0"] = 0.0
    turning_point_balance: bool = True
    advantage_baseline: Annotated[str, BASELINES] = "group"
    scale_rewards: str = "group"
    advantage_scope: Annotated[str, SCOPES] = "step"
    adv_clip_max: Annotated[float | None, "above 0, or None"] = None
    transition_share: Annotated[float | None, "above 0 and below 1, or None"] = None
    beta: Annotated[float, "at least 0"] = 4e-4
    num_iterations: Annotated[int, "at least 1"] = 1
    loss_type: Annotated[str, LOSS_TYPES] = "clip"
    epsilon: Annotated[float | None, "above 0, or None"] = None
    epsilon_high: Annotated[float | None, "above 0, or None"] = None
    ratio_norm: bool = False
    kl_mask_threshold: Annotated[float | None, "above 0, or None"] = None
    step_weights: Annotated[list[float] | None, "above 0, or None"] = None
    importance_sampling_level: Annotated[str, LEVELS] = "step"
    chunk_sizes: list[int] | None = None
    ema_decay: Annotated[float | None, "at least 0 and below 1, or None"] = 0.9
    ema_update_every: Annotated[int, "at least 1"] = 8
    guard_rails: Annotated[str, ("off", "warn", "skip", "stop")] = "warn"
    resume_from_checkpoint: str | None = None
    resume_with_changes: list[str] | None = None
    recompute_old_log_probs: bool = False
    quantization: Annotated[str | None, (None, "nf4", "int8", "fp8")] = None
    allow_distilled: bool = False
    attention_backend: str | None = None
    compile_backend: str | None = None
    precompute_prompt_embeds: bool = False
    prompt_embeds_dir: str | None = None
    offload_between_phases: bool = False
    offload_trajectories: bool = False
    offload_reference: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    log_completions: bool = False
    num_completions_to_print: Annotated[int | None, "at least 1, or None"] = None
    log_images_steps: Annotated[int | None, "at least 1, or None"] = 20
    bf16: bool | None = None
    learning_rate: Annotated[float, "at least 0"] = 3e-4
    weight_decay: Annotated[float, "at least 0"] = 1e-4
    lr_scheduler_type: SchedulerType | str = "constant"
    activation_checkpointing: bool | None = None
    gradient_checkpointing: bool | None = None
    logging_steps: Annotated[float, "at least 0"] = 1
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = False
    derived: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self.credit = import_path("credit", self.credit, CREDITS)
        self.policy_class = self.policy_class and import_path("policy_class", self.policy_class)
        self._forget_derived()
        if isinstance(self.noise_level, list) and len(self.noise_level) == 1:  # as the command line gives a number
            self.noise_level = self.noise_level[0]
        given = non_defaults(self)
        self._set_derived_defaults()
        check_limits(self)
        for name, reason in UNSUPPORTED.items():
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by TP-GRPO: {reason}.")
        super().__post_init__()
        for name in ("output_dir", "prompt_embeds_dir"):  # the same, whatever folder a reward function changes to
            if getattr(self, name) is not None:
                setattr(self, name, os.path.abspath(getattr(self, name)))
        sizes = self._settle_batch_sizes("gradient_accumulation_steps" in given)
        for message in chain(
            sizes, secret_errors(self), sampling_errors(self), credit_errors(self), loss_errors(self)
        ):
            raise ValueError(message)
        derived = non_defaults(self).keys() - given
        self.derived = {name: value for name, value in self.to_dict().items() if name in derived}
        self._given, self._settled = given, {name: getattr(self, name) for name in field_defaults(self)}

    def _forget_derived(self) -> None:
        """Set what followed from other settings, where this config was made from, back to its default."""
        derived, values, initial = self.derived or {}, self.to_dict(), field_defaults(self)
        if unknown := derived.keys() - initial:
            raise ValueError(f"derived names no settings: {sorted(unknown)}. It is not set by hand: leave it out.")
        self.__dict__ |= {name: initial[name] for name in derived if values[name] == derived[name]}
        self.__dict__ |= {name: None for name, value in vars(self).items() if value == f"<{name.upper()}>"}  # tokens
        if isinstance(self.model_init_kwargs, dict):
            kept = {name: one for name, one in self.model_init_kwargs.items() if one != f"<{str(name).upper()}>"}
            self.model_init_kwargs = kept
        self.derived = None

    without_secrets = staticmethod(without_secrets)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, as trackers get them, with `<NAME>` for tokens, keys and passwords."""
        return without_secrets(super().to_dict())

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __repr__ = __str__

    def settle_changes(self) -> None:
        """Derive and check anew if a setting was changed since the config was made."""
        check_types(self)
        if self.derived != self._settled["derived"]:
            raise ValueError(f"derived is not set by hand, got {self.derived!r:.200}: leave it as it is.")
        if any(getattr(self, name) != value for name, value in self._settled.items()):
            self.__post_init__()

    @property
    def given(self) -> dict[str, Any]:
        """Settings that were given, or changed since, and are not the defaults: the others follow from them."""
        changed = {name: getattr(self, name) for name, value in self._settled.items() if getattr(self, name) != value}
        return self._given | changed

    def _set_derived_defaults(self) -> None:
        evaluated = max(1, self.num_generations_eval)  # less is refused later
        derived = {
            "activation_checkpointing": self.gradient_checkpointing is not False,
            "bf16": not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available(),
            "gradient_accumulation_steps": 1,  # until _settle_batch_sizes, for TrainingArguments
            "log_prob_type": "squared_error" if self.sde_type == "cps" else "gaussian",
            "per_device_eval_batch_size": evaluated * max(1, self.num_generations // evaluated),
            "per_device_rollout_batch_size": self.per_device_train_batch_size,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._set_trust_region()
        self.gradient_checkpointing = self.activation_checkpointing  # which transformers reads before 5.23
        # The command line gives strings where a field takes several types
        scale, size = str(self.scale_rewards), str(self.per_device_rollout_batch_size)
        self.scale_rewards = {"true": "group", "false": "none"}.get(scale.lower(), scale)
        self.per_device_rollout_batch_size = int(size) if size.isdecimal() and len(size) < 19 else size

    def _set_trust_region(self) -> None:
        """Take what is published for the loss where nothing is given."""
        if self.loss_type == "dppo":
            self.kl_mask_threshold = 1e-6 if self.kl_mask_threshold is None else self.kl_mask_threshold
            return
        if self.epsilon is None:
            is_gcpo = self.importance_sampling_level == "chunk" and self.log_prob_type == "gaussian"
            self.epsilon = 2e-6 if self.ratio_norm else 5e-5 if is_gcpo else 1e-5
        self.epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _settle_batch_sizes(self, accumulation_is_given: bool) -> Iterator[str]:
        """Set batch sizes by GRPO's rules, or the paper's 48 prompts and two updates; yield what is wrong."""
        size, steps, group = self.generation_batch_size, self.steps_per_generation, self.num_generations
        per_step = self.per_device_train_batch_size * self.world_size
        accumulated = self.gradient_accumulation_steps if accumulation_is_given else None
        if size is not None and steps is not None:
            yield f"generation_batch_size ({size}) excludes steps_per_generation ({steps}): set one of them."
        factor = "steps_per_generation" if steps else "gradient_accumulation_steps"
        product = f"{per_step} x {factor}" if steps or accumulated else "48 x num_generations"
        how = "" if size else f" = {product}"
        size = size or per_step * (steps or accumulated or 0) or 48 * group
        named = f"generation_batch_size ({size}{how})"
        if size % group:
            yield f"{named} must be a multiple of num_generations ({group}), for whole groups."
        if size % per_step:
            yield f"{named} must be a multiple of per_device_train_batch_size x processes ({per_step})."
        if self.share_initial_noise and (own := size // self.world_size) % group:
            yield f"share_initial_noise: {own} images a process are no whole groups of num_generations ({group})."
        steps = size // per_step
        accumulated = accumulated or (steps if steps % 2 else steps // 2)
        if steps % accumulated and accumulated % (passes := steps * self.num_iterations):
            yield (
                f"gradient_accumulation_steps ({accumulated}) must divide steps_per_generation ({steps}) or be a "
                f"multiple of {passes} (that x num_iterations), so that updates and rollouts end together."
            )
        self.generation_batch_size, self.steps_per_generation = size, steps
        self.gradient_accumulation_steps = accumulated

    @property
    def prompts_per_generation(self) -> int:
        """Prompts per rollout, over all processes."""
        assert self.generation_batch_size is not None  # since __post_init__
        return self.generation_batch_size // self.num_generations

    @property
    def rollout_batch_size(self) -> int | None:
        """Latents per model call in a rollout; `None`: to be measured."""
        size = self.per_device_rollout_batch_size
        return size if isinstance(size, int) else None

    @property
    def sde_window_limits(self) -> list[int]:
        """The steps [start, stop) in which the SDE window lies."""
        return self.sde_window_range or [0, self.num_inference_steps - 1]

    @property
    def num_sde_steps(self) -> int:
        """The size K of the SDE window."""
        return self.sde_window_size or len(range(*self.sde_window_limits))

    @property
    def window_starts(self) -> range:
        """The steps at which the window may start."""
        start, stop = self.sde_window_range or (0, self.num_sde_steps)
        return range(start, stop - self.num_sde_steps + 1)

    def window(self, start: int, stop: int, noise_level: list[float] | None = None) -> Window:
        """Return the SDE window [start, stop), with another noise of each step of `sde_window_limits` if given."""
        level, first = noise_level or self.noise_level, self.sde_window_limits[0]
        own = tuple(level[start - first : stop - first]) if isinstance(level, list) else float(level)
        return Window(start, stop, self.sde_type, own, str(self.log_prob_type))

    @property
    def completion_rule(self) -> CompletionRule | None:
        """The rule that completes states; `None` where credit needs no completions."""
        return CompletionRule.parse(self.completion) if self.credit_rule.needs_completions else None

    @property
    def loss_rule(self) -> LossRule:
        """The trust region of an update."""
        return LossRule(
            self.loss_type, self.epsilon, self.epsilon_high, self.kl_mask_threshold, self.ratio_norm, self.step_weights
        )

    @property
    def credit_rule(self) -> CreditRule:
        """The rule that makes advantages of rewards."""
        return CreditRule(
            credit=self.credit, lambda_=self.credit_lambda or 0.0, trend=self.turning_point_trend,
            first_step=self.turning_point_first_step, deadzone=self.turning_point_deadzone,
            balanced=self.turning_point_balance, baseline=self.advantage_baseline, scale=self.scale_rewards,
            scope=self.advantage_scope, aggregation=self.multi_objective_aggregation, share=self.transition_share,
            clip=self.adv_clip_max,
            function=None if self.credit in CREDITS else pkgutil.resolve_name(self.credit),
        )  # fmt: skip
