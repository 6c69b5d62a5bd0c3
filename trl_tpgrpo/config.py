"""Every setting of a run, in the order in which the data travels. The defaults are the paper's."""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

from .algorithm.completion import CompletionRule
from .algorithm.credit import AGGREGATIONS, BASELINES, CREDITS, SCALES, SCOPES, TRENDS, CreditRule
from .algorithm.rollout import Window
from .algorithm.sde import LOG_PROB_TYPES, SDE_TYPES
from .callbacks.guard_rails import ACTIONS
from .rewards.scorer import FAILURES


QUANTIZATIONS = ("nf4", "int8", "fp8")
PROMPTS_PER_GENERATION = 48
UPDATES_PER_GENERATION = 2


def _public_fields(config: Any) -> list[Field]:
    return [item for item in fields(config) if not item.name.endswith("_token")]


def non_defaults(config: Any) -> dict[str, Any]:
    """The fields of a dataclass whose values are not the defaults, but for tokens."""
    found = {}
    for item in _public_fields(config):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if getattr(config, item.name) != default:
            found[item.name] = getattr(config, item.name)
    return found


@dataclass
class TPGRPOConfig(_BaseConfig):
    r"""
    Configuration class for the [`TPGRPOTrainer`].

    `TPGRPOConfig(output_dir)` is TurningPoint-GRPO (arXiv 2602.06422) as published for SD3.5-medium. Names and meanings are those of [`~trl.GRPOConfig`] wherever it has the setting. For the rest of
    the arguments see [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when the `model` of the trainer is
            a string, such as `{"dtype": "bfloat16", "revision": "main"}`.

        > Parameters that control the data

        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Whether to keep only the column `"prompt"`. Reward functions that read other columns need `False`.
        num_generations (`int`, *optional*, defaults to `24`):
            Images per prompt. The generation batch must be a multiple of it.
        num_generations_eval (`int`, *optional*):
            Images per prompt in evaluation. `None` uses `num_generations`.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the training prompts.
        generation_batch_size (`int`, *optional*):
            Images per rollout, over all processes. Mutually exclusive with `steps_per_generation`. If neither is set nor
            `gradient_accumulation_steps`: 48 prompts (the paper's); else
            `per_device_train_batch_size * num_processes * steps_per_generation`.
        steps_per_generation (`int`, *optional*):
            Micro-batches per rollout on each process. `None` uses `gradient_accumulation_steps`.
        gradient_accumulation_steps (`int`, *optional*):
            Micro-batches per update. `None` makes two updates per rollout (the paper's), or one if the micro-batches
            cannot be halved.

        > Parameters that control sampling

        height (`int`, *optional*, defaults to `512`):
            Height of the images in pixels.
        width (`int`, *optional*, defaults to `512`):
            Width of the images in pixels.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps T of a trajectory in training. The paper takes 6 for FLUX.1-dev.
        num_inference_steps_eval (`int`, *optional*, defaults to `40`):
            Denoising steps in evaluation, all of the ODE. The paper takes 28 for FLUX.1-dev.
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Guidance in sampling and training. SD3: classifier-free guidance, off at 1. FLUX: an input of the model; the
            paper takes 3.5.
        true_cfg_scale (`float`, *optional*, defaults to `1.0`):
            FLUX only: classifier-free guidance with `negative_prompt`, off at 1.
        negative_prompt (`str`, *optional*):
            What images are guided away from. `None` is the empty prompt for SD3 and no such guidance for FLUX.
        max_sequence_length (`int`, *optional*):
            Tokens of the T5 encoder. `None` uses the pipeline's default; `0` for an SD3 pipeline without T5 leaves out
            the zeros that diffusers puts in its place.
        per_device_rollout_batch_size (`int` or `"auto"`, *optional*):
            How many latents the model, and images the VAE, are given at once in a rollout. `None` uses
            `per_device_train_batch_size`: then the probability ratio before the first update is 1 to the last bit. `"auto"`
            measures before the first rollout at which size the model takes the least time a latent. Does not change the
            mathematics, but the rounding, so that under `"auto"` a run may not repeat to the bit.
        share_initial_noise (`bool`, *optional*, defaults to `False`):
            Whether the images of a prompt's group start from the same noise. What they have in common until their first SDE
            step is then computed once for the group, the completion of their first state too.

        > Parameters that control the SDE

        sde_type (`str`, *optional*, defaults to `"cps"`):
            `"cps"`, `"flow_sde"` (Flow-GRPO) or `"dance_sde"` (DanceGRPO), see [`~trl_tpgrpo.algorithm.sde.transition`].
        noise_level (`float`, *optional*, defaults to `0.7`):
            How much noise an SDE step adds; above 0, and at most 1 under `"cps"`.
        sde_window_size (`int`, *optional*):
            How many steps K are SDE steps, and trained on. `None`: all of `sde_window_range`, or all but the last.
        sde_window_range (`list[int]`, *optional*):
            `[start, stop)`: the steps among which the window lies. If it is longer than the window, the window's start is
            drawn at random, once a rollout for all processes. `None`: the window starts at step 0.
        sde_window_share (`float`, *optional*):
            Instead of `sde_window_size`: before the first rollout, measure the step rewards of the first prompts over all of
            `sde_window_range` (or all steps but the last), and take the shortest window that holds this share of their
            variance within groups. `None`: no measurement.
        log_prob_type (`str`, *optional*):
            `"gaussian"` or `"squared_error"`, see [`~trl_tpgrpo.algorithm.sde.log_prob`]. `None` is `"squared_error"` under `"cps"`,
            to which the published clip range belongs, and `"gaussian"` otherwise.

        > Parameters that control the completions

        completion (`str`, *optional*, defaults to `"exact"`):
            How the ODE completes a state to the image whose reward is the state's: `"exact"` takes all steps that are left;
            `"at_1_2_3_4_6"` asks the model before these steps alone and extrapolates its velocity over the others; `"ab2_N"`
            and `"euler_N"` take N steps, of second and of first order, or fewer where fewer are left; `"one_step"` takes the
            one whose velocity is known. With `_every_M` at its end (`"exact_every_2"`) only every M-th state is completed,
            and credit is that of blocks of M steps. `trl-tpgrpo fidelity` measures what each gives on your model and reward.
        completion_check_every (`int`, *optional*):
            Every so many rollouts, complete the trajectories of the first prompt of each process exactly too, and log how
            well step rewards and turning points agree. `None`: never.

        > Parameters that control the reward and the credit of each step

        reward_failures (`str`, *optional*, defaults to `"stop"`):
            What to do when a reward function raises, hangs, or returns something that is no reward: `"stop"` the run with its
            name, row, prompt and image, or `"skip"`: leave the trajectory out of its group, and count it.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function. `None`: 1 each.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"`: credit and advantages of the weighted sum. `"normalize_then_sum"`: weighted sum of each
            function's own advantages, scaled by the batch unless `scale_rewards` is `"none"` (GDPO, arXiv 2601.05242).
        credit (`str`, *optional*, defaults to `"consistent"`):
            What a step is credited with: `"consistent"` and `"turning_point"` (the whole following gain at turning points
            of the stricter or the plain definition, the step's own gain elsewhere), `"incremental"` (the step's own gain),
            `"lambda"` (the lambda-return of the gains) or `"outcome"` (the final reward: Flow-GRPO, no completions).
        credit_lambda (`float`, *optional*):
            Decay of `credit="lambda"`, in [0, 1].
        turning_point_trend (`str`, *optional*, defaults to `"remaining"`):
            What a step is held against: `"remaining"`, the gain from it to the end (the paper's text), or `"global"`, that
            of the whole trajectory (the paper's demo code).
        turning_point_first_step (`bool`, *optional*, defaults to `True`):
            Whether the first step may be a turning point (the paper's Remark 5.2).
        turning_point_deadzone (`float`, *optional*, defaults to `0.0`):
            Step rewards up to this size count as no change, for noisy rewards.
        turning_point_balance (`bool`, *optional*, defaults to `True`):
            Whether as many positive as negative turning points are kept, those with the largest gain.
        advantage_baseline (`str`, *optional*, defaults to `"group"`):
            `"group"` subtracts the group's mean credit; `"completion"` nothing, since each step's gain is measured against
            its own state's completion. With the latter `num_generations` may be 1.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"group"`):
            Divide credit by its spread within the `"group"` (or `True`), the `"batch"`, or not (`"none"` or `False`).
        advantage_scope (`str`, *optional*, defaults to `"step"`):
            Take mean and spread of each `"step"` on its own, or `"joint"` over all steps of the group.

        > Parameters that control the training

        beta (`float`, *optional*, defaults to `4e-4`):
            Weight of the KL divergence from the reference model; `0.0` needs no reference.
        num_iterations (`int`, *optional*, defaults to `1`):
            How often each rollout is trained on.
        epsilon (`float`, *optional*, defaults to `1e-5`):
            Clip range of the ratio. It belongs to `log_prob_type="squared_error"`; a Gaussian log-probability moves more.
        epsilon_high (`float`, *optional*):
            Upper clip range. `None` uses `epsilon`.
        ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the moving average of the trained weights, which is what is evaluated and saved, once it has begun.
            `None`: no average.
        ema_update_every (`int`, *optional*, defaults to `8`):
            The average moves after every so many updates, the first time after the first of them; until then the weights
            themselves are evaluated and saved.
        guard_rails (`str`, *optional*, defaults to `"warn"`):
            What to do about signs of a run that goes wrong, looked for before each update: `"warn"`, `"skip"` the update,
            `"stop"` with an error, or `"off"`. For other limits pass a [`~trl_tpgrpo.GuardRails`] in the trainer's
            `callbacks`.
        recompute_old_log_probs (`bool`, *optional*, defaults to `False`):
            Whether to compute the log-probabilities of a rollout once more as training computes them, before its first
            update. For models whose kernels differ with and without gradients (NF4 on a GPU, compiled blocks, `"auto"` batch
            sizes): the ratio is then 1 again at the first update, for one more evaluation a transition that a later update
            trains on.

        > Parameters that control memory and speed

        quantization (`str`, *optional*):
            Load the base transformer in `"nf4"` (bitsandbytes, 4 bit, as in QLoRA), `"int8"` or `"fp8"` (torchao,
            weights only). Needs `peft_config` and a model given by name. `None`: not quantised.
        attention_backend (`str`, *optional*):
            Name of one of diffusers' attention backends, such as `"flash"` or `"_native_cudnn"`. `None`: diffusers' own
            choice.
        compile_backend (`str`, *optional*):
            Compile the transformer's repeated blocks with this backend of `torch.compile`, such as `"inductor"`, for
            rollouts and training alike and once for all batch sizes. `None`: no compilation. (`torch_compile` would compile
            the model for training alone.)
        precompute_prompt_embeds (`bool`, *optional*, defaults to `False`):
            Whether to encode the prompts of all datasets before the transformer takes its place on the device, and then
            drop the text encoders. Otherwise prompts are encoded as rollouts need them, and the encoders are on the CPU in
            between.
        prompt_embeds_dir (`str`, *optional*):
            Folder in which encoded prompts are kept, for this run and later ones. `None`: the latest 1,024 are kept in
            the memory of the CPU.
        offload_between_phases (`bool`, *optional*, defaults to `False`):
            Whether the VAE, and reward functions that have a method `to`, are on the CPU except while they decode and
            score.
        offload_trajectories (`bool`, *optional*, defaults to `False`):
            Whether the states of trajectories are kept on the CPU, in pinned memory.
        offload_reference (`bool`, *optional*, defaults to `False`):
            Full fine-tuning with `beta > 0`: whether the reference model is on the CPU, except when it predicts the
            velocities of a whole rollout before the first update.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether the VAE decodes image by image.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Whether the VAE decodes images that are larger than one of its tiles (1,024 pixels for SD3.5 and FLUX.1) in
            overlapping tiles that are blended: less memory, slightly other images.

        > Parameters that control the logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print samples of the rollout with each log: prompts, rewards, the mean advantage and the rewards along
            the trajectory; and to save their images in `output_dir/completions`.
        num_completions_to_print (`int`, *optional*):
            How many samples of a rollout are printed and shown: the first ones. `None`: the first prompt's group.
        log_images_steps (`int`, *optional*, defaults to `20`):
            Every so many updates, send TensorBoard, W&B or trackio (see `report_to`) the samples' images, a trajectory with
            its turning points, and histograms of rewards, step rewards and advantages; after each evaluation its first
            images, which are also written to `output_dir/images`. `None`: never.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `3e-4` instead of `5e-5`.
    > - `weight_decay`: Defaults to `1e-4` instead of `0`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `per_device_train_batch_size`: Defaults to `9` instead of `8`.
    > - `per_device_eval_batch_size`: Defaults to `num_generations_eval` instead of `8`.
    > - `activation_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set and the device can, instead of `False`.
    > - `logging_steps`: Defaults to `1` instead of `500`: an update is a lot of work here.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # Parameters whose defaults differ from TrainingArguments
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Use bfloat16 mixed precision. None: if fp16 is not set and the device can."},
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate's schedule."})
    per_device_train_batch_size: int = field(
        default=9, metadata={"help": "Images per micro-batch and device; each is trained on at one step at a time."}
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Images per batch and device in evaluation. None: num_generations_eval."}
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Micro-batches per update. None: two updates per rollout."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Former name of activation_checkpointing."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass to save memory. None: True."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates, or this share of all."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide NaN losses from the log."})

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments for `DiffusionPipeline.from_pretrained`, as JSON."}
    )

    # Parameters that control the data
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep only the column 'prompt'; reward functions may need the others."}
    )
    num_generations: int = field(default=24, metadata={"help": "Images per prompt (the group's size)."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Images per prompt in evaluation. None: num_generations."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the training prompts."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Images per rollout over all processes. Excludes steps_per_generation."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches per rollout. None: gradient_accumulation_steps."}
    )

    # Parameters that control sampling
    height: int = field(default=512, metadata={"help": "Height of the images in pixels."})
    width: int = field(default=512, metadata={"help": "Width of the images in pixels."})
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps in training."})
    num_inference_steps_eval: int = field(default=40, metadata={"help": "Denoising steps in evaluation."})
    guidance_scale: float = field(default=4.5, metadata={"help": "Guidance in sampling and training."})
    true_cfg_scale: float = field(
        default=1.0, metadata={"help": "FLUX only: classifier-free guidance with negative_prompt, off at 1."}
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "What images are guided away from."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens of the T5 encoder. None: the pipeline's default."}
    )
    per_device_rollout_batch_size: int | str | None = field(
        default=None,
        metadata={"help": "Latents per model call in a rollout, or 'auto'. None: per_device_train_batch_size."},
    )

    share_initial_noise: bool = field(
        default=False, metadata={"help": "Start the images of a prompt's group from the same noise."}
    )

    # Parameters that control the SDE
    sde_type: str = field(default="cps", metadata={"help": "How noise is added.", "choices": list(SDE_TYPES)})
    noise_level: float = field(default=0.7, metadata={"help": "How much noise an SDE step adds."})
    sde_window_size: int | None = field(
        default=None, metadata={"help": "Number of SDE steps. None: all of sde_window_range, or all but the last."}
    )
    sde_window_range: list[int] | None = field(
        default=None, metadata={"help": "Steps [start, stop) in which the window lies, at random if it is shorter."}
    )
    sde_window_share: float | None = field(
        default=None,
        metadata={"help": "Measure which window holds this share of the step rewards' variance, and take it."},
    )
    log_prob_type: str | None = field(
        default=None,
        metadata={"help": "None: 'squared_error' under 'cps', else 'gaussian'.", "choices": list(LOG_PROB_TYPES)},
    )

    # Parameters that control the completions
    completion: str = field(
        default="exact",
        metadata={"help": "'exact', 'at_P_Q_...', 'ab2_N', 'euler_N' or 'one_step', also with '_every_M' at the end."},
    )
    completion_check_every: int | None = field(
        default=None, metadata={"help": "Compare with exact completions every so many rollouts. None: never."}
    )

    # Parameters that control the reward and the credit of each step
    reward_failures: str = field(
        default="stop",
        metadata={"help": "What a failing reward function does to a run.", "choices": list(FAILURES)},
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward function."})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "How rewards are combined.", "choices": list(AGGREGATIONS)}
    )
    credit: str = field(
        default="consistent", metadata={"help": "What a step is credited with.", "choices": list(CREDITS)}
    )
    credit_lambda: float | None = field(default=None, metadata={"help": "Decay of credit='lambda', in [0, 1]."})
    turning_point_trend: str = field(
        default="remaining", metadata={"help": "What a step is held against.", "choices": list(TRENDS)}
    )
    turning_point_first_step: bool = field(
        default=True, metadata={"help": "Whether the first step may be a turning point."}
    )
    turning_point_deadzone: float = field(
        default=0.0, metadata={"help": "Step rewards up to this size count as no change."}
    )
    turning_point_balance: bool = field(
        default=True, metadata={"help": "Keep as many positive as negative turning points."}
    )
    advantage_baseline: str = field(
        default="group", metadata={"help": "What is subtracted from credit.", "choices": list(BASELINES)}
    )
    scale_rewards: str = field(
        default="group", metadata={"help": "Spread that credit is divided by: 'group', 'batch' or 'none'."}
    )
    advantage_scope: str = field(
        default="step", metadata={"help": "Mean and spread of each step, or of all.", "choices": list(SCOPES)}
    )

    # Parameters that control the training
    beta: float = field(default=4e-4, metadata={"help": "Weight of the KL divergence from the reference."})
    num_iterations: int = field(default=1, metadata={"help": "How often each rollout is trained on."})
    epsilon: float = field(default=1e-5, metadata={"help": "Clip range of the ratio."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. None: epsilon."})
    ema_decay: float | None = field(
        default=0.9, metadata={"help": "Decay of the moving average of the weights that is evaluated and saved."}
    )
    ema_update_every: int = field(default=8, metadata={"help": "Updates between two moves of the average."})
    guard_rails: str = field(
        default="warn",
        metadata={"help": "What to do when a run goes wrong.", "choices": ["off", *ACTIONS]},
    )
    recompute_old_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the log-probabilities of a rollout as training does, before updates."},
    )

    # Parameters that control memory and speed
    quantization: str | None = field(
        default=None, metadata={"help": "Load the base transformer quantised.", "choices": list(QUANTIZATIONS)}
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "One of diffusers' attention backends. None: diffusers' choice."}
    )
    compile_backend: str | None = field(
        default=None, metadata={"help": "Compile the repeated blocks with this backend, such as 'inductor'."}
    )
    precompute_prompt_embeds: bool = field(
        default=False, metadata={"help": "Encode all prompts first and drop the text encoders."}
    )
    prompt_embeds_dir: str | None = field(
        default=None, metadata={"help": "Folder for encoded prompts. None: in memory, the latest 1,024."}
    )
    offload_between_phases: bool = field(
        default=False, metadata={"help": "Keep VAE and reward models on the CPU except while they work."}
    )
    offload_trajectories: bool = field(default=False, metadata={"help": "Keep the states of trajectories on the CPU."})
    offload_reference: bool = field(
        default=False, metadata={"help": "Full fine-tuning: keep the reference on the CPU between rollouts."}
    )
    vae_slicing: bool = field(default=False, metadata={"help": "Decode image by image."})
    vae_tiling: bool = field(default=False, metadata={"help": "Decode images in overlapping tiles."})

    # Parameters that control the logging
    log_completions: bool = field(
        default=False, metadata={"help": "Print samples of the rollout with each log, and save their images."}
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "How many samples are printed and shown. None: the first prompt's group."}
    )
    log_images_steps: int | None = field(
        default=20, metadata={"help": "Updates between images and histograms for the trackers. None: never."}
    )

    def __post_init__(self) -> None:
        given = non_defaults(self)
        self._set_derived_defaults()
        super().__post_init__()
        self._set_batch_sizes()
        self._check_choices()
        self._check_sampling()
        self._check_window()
        self._check_completion()
        self._check_credit()
        self._check_batch_sizes()
        self._check_trainer()
        self._check_memory()
        self._check_logging()
        self._given, self._settled = given, {item.name: getattr(self, item.name) for item in _public_fields(self)}

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were given, or changed since, and are not the defaults: all that the others follow from."""
        changed = {name: getattr(self, name) for name, value in self._settled.items() if getattr(self, name) != value}
        return self._given | changed

    def _set_derived_defaults(self) -> None:
        given = str(self.scale_rewards)
        self.scale_rewards = {"true": "group", "false": "none"}.get(given.lower(), given)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        if self.log_prob_type is None:
            self.log_prob_type = "squared_error" if self.sde_type == "cps" else "gaussian"
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        if self.num_generations_eval is None:
            self.num_generations_eval = self.num_generations
        if self.per_device_rollout_batch_size is None:
            self.per_device_rollout_batch_size = self.per_device_train_batch_size
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.num_generations_eval
        self._accumulation_is_ours = self.gradient_accumulation_steps is None
        if self._accumulation_is_ours:
            self.gradient_accumulation_steps = 1

    def _set_batch_sizes(self) -> None:
        """GRPO's rules, but that a config which says nothing of batches gets the paper's."""
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "generation_batch_size",
            "steps_per_generation",
        ):
            if getattr(self, name) is not None:
                self._require_at_least(name, 1)
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError(
                "generation_batch_size and steps_per_generation both set the size of a rollout "
                f"({self.generation_batch_size} and {self.steps_per_generation}): set one of them."
            )
        per_step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is None and self.steps_per_generation is None and self._accumulation_is_ours:
            self.generation_batch_size = PROMPTS_PER_GENERATION * self.num_generations
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation is None:
            if self.generation_batch_size % per_step:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) must be a multiple of the global batch size "
                    f"({self.per_device_train_batch_size} per device x {self.world_size} processes)."
                )
            self.steps_per_generation = self.generation_batch_size // per_step
        self.generation_batch_size = per_step * self.steps_per_generation
        if self._accumulation_is_ours:
            updates = UPDATES_PER_GENERATION if self.steps_per_generation % UPDATES_PER_GENERATION == 0 else 1
            self.gradient_accumulation_steps = self.steps_per_generation // updates

    def _check_choices(self) -> None:
        choices = {
            "sde_type": SDE_TYPES,
            "log_prob_type": LOG_PROB_TYPES,
            "multi_objective_aggregation": AGGREGATIONS,
            "credit": CREDITS,
            "turning_point_trend": TRENDS,
            "advantage_baseline": BASELINES,
            "scale_rewards": SCALES,
            "advantage_scope": SCOPES,
            "guard_rails": ("off", *ACTIONS),
            "reward_failures": FAILURES,
            "quantization": (None, *QUANTIZATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")

    def _check_sampling(self) -> None:
        self._require_at_least("height", 1)
        self._require_at_least("width", 1)
        self._require_at_least("num_inference_steps", 2)
        self._require_at_least("num_inference_steps_eval", 1)
        self._require_at_least("guidance_scale", 0)
        self._require_at_least("true_cfg_scale", 0)
        if self.max_sequence_length is not None:
            self._require_at_least("max_sequence_length", 0)
        self._check_rollout_batch_size()
        largest = 1.0 if self.sde_type == "cps" else math.inf
        if not 0 < self.noise_level <= largest:
            raise ValueError(
                f"noise_level must be above 0 (a step without noise has no probability to train)"
                f"{' and at most 1 under cps' if self.sde_type == 'cps' else ''}, got {self.noise_level}."
            )

    def _check_rollout_batch_size(self) -> None:
        given = str(self.per_device_rollout_batch_size)  # the command line gives a string
        if given != "auto" and not (given.isdecimal() and int(given) >= 1):
            raise ValueError(f"per_device_rollout_batch_size must be at least 1, or 'auto', got {given}.")
        self.per_device_rollout_batch_size = given if given == "auto" else int(given)

    def _check_window(self) -> None:
        last = self.num_inference_steps - 1
        if self.sde_window_range is not None:
            in_order = (
                len(self.sde_window_range) == 2 and 0 <= self.sde_window_range[0] < self.sde_window_range[1] <= last
            )
            if not in_order:
                raise ValueError(
                    f"sde_window_range must be [start, stop] with 0 <= start < stop <= {last} (the last of the "
                    f"num_inference_steps={self.num_inference_steps} steps is never an SDE step), got "
                    f"{self.sde_window_range}."
                )
        start, stop = self.sde_window_limits
        if self.sde_window_share is not None:
            if self.sde_window_size is not None:
                raise ValueError(
                    f"sde_window_share ({self.sde_window_share}) measures the window's size and place: leave out "
                    f"sde_window_size ({self.sde_window_size})."
                )
            if not 0 < self.sde_window_share <= 1:
                raise ValueError(f"sde_window_share must be above 0 and at most 1, got {self.sde_window_share}.")
        if self.sde_window_size is not None and not 1 <= self.sde_window_size <= stop - start:
            raise ValueError(
                f"sde_window_size must be between 1 and {stop - start}, the steps of [{start}, {stop}), got "
                f"{self.sde_window_size}."
            )

    def _check_completion(self) -> None:
        places = CompletionRule.parse(self.completion).at or ()
        for place in places:
            if not 1 <= place < self.num_inference_steps:
                raise ValueError(
                    f"completion={self.completion!r}: step {place} is none of 1 to {self.num_inference_steps - 1}, the steps "
                    f"of num_inference_steps={self.num_inference_steps} before which completions may ask the model."
                )
        if self.completion_check_every is not None:
            self._require_at_least("completion_check_every", 1)

    def _check_credit(self) -> None:
        self._require_at_least("turning_point_deadzone", 0)
        if self.credit == "lambda" and (self.credit_lambda is None or not 0 <= self.credit_lambda <= 1):
            raise ValueError(f"credit='lambda' needs credit_lambda in [0, 1], got {self.credit_lambda}.")
        if self.credit != "lambda" and self.credit_lambda is not None:
            raise ValueError(f"credit_lambda belongs to credit='lambda', but credit is {self.credit!r}: leave it out.")
        if self.credit == "outcome" and (self.completion != "exact" or self.completion_check_every is not None):
            raise ValueError(
                f"credit='outcome' computes no completions: leave out completion ({self.completion!r}) and "
                f"completion_check_every ({self.completion_check_every})."
            )
        if self.advantage_baseline == "completion" and self.credit == "outcome":
            raise ValueError(
                "advantage_baseline='completion' needs completions, and credit='outcome' computes none: use "
                "advantage_baseline='group' or another credit."
            )

    def _check_batch_sizes(self) -> None:
        for name in ("num_generations", "num_generations_eval", "num_iterations"):
            self._require_at_least(name, 1)
        if self.num_generations == 1 and self.advantage_baseline == "group":
            raise ValueError(
                "num_generations=1 leaves nothing of a group's advantage: use at least 2, or "
                "advantage_baseline='completion'."
            )
        if self.num_generations == 1 and self.scale_rewards == "group":
            raise ValueError(
                "num_generations=1 has no spread within a group: use scale_rewards='batch' or 'none', got 'group'."
            )
        assert self.generation_batch_size and self.steps_per_generation and self.gradient_accumulation_steps
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size ({self.generation_batch_size}) must be a multiple of num_generations "
                f"({self.num_generations}), so that every prompt's group is whole."
            )
        per_device = self.per_device_train_batch_size * self.steps_per_generation
        if self.share_initial_noise and per_device % self.num_generations:
            raise ValueError(
                f"share_initial_noise needs whole groups on each process: its {per_device} images a rollout must be a "
                f"multiple of num_generations ({self.num_generations})."
            )
        steps, accumulation = self.steps_per_generation, self.gradient_accumulation_steps
        whole_updates = steps % accumulation == 0
        whole_rollouts = accumulation % (steps * self.num_iterations) == 0
        if not (whole_updates or whole_rollouts):
            raise ValueError(
                f"steps_per_generation ({steps}) must be a multiple of gradient_accumulation_steps ({accumulation}), or that "
                f"a multiple of steps_per_generation x num_iterations ({steps} x {self.num_iterations}), so that updates and "
                "rollouts end together."
            )
        if (
            self.eval_strategy != "no"
            and (self.per_device_eval_batch_size * self.world_size) % self.num_generations_eval
        ):
            raise ValueError(
                f"The global eval batch size ({self.per_device_eval_batch_size} per device x {self.world_size} processes) "
                f"must be a multiple of num_generations_eval ({self.num_generations_eval})."
            )

    def _check_trainer(self) -> None:
        self._require_at_least("beta", 0)
        self._require_at_least("ema_update_every", 1)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must be at least 0 and below 1, or None for no average, got {self.ema_decay}."
            )
        for name in ("epsilon", "epsilon_high"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} must be above 0, got {getattr(self, name)}: at 0 every update is clipped away."
                )
        unsupported = {
            "auto_find_batch_size": "a smaller batch would tear prompt groups apart; lower per_device_train_batch_size",
            "use_liger_kernel": "Liger's kernels are for language models",
            "enable_jit_checkpoint": "it saves in the middle of an update; SIGTERM is answered after the update without it",
            "torch_compile": "it would compile the model for training alone; set compile_backend='inductor'",
            "neftune_noise_alpha": "it adds noise to token embeddings, which a transformer of latents does not have",
        }
        for name, reason in unsupported.items():
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by TP-GRPO: {reason}.")

    def _check_memory(self) -> None:
        if self.offload_reference and self.beta == 0:
            raise ValueError("offload_reference=True: with beta=0 there is no reference model; leave it out.")

    def _check_logging(self) -> None:
        for name in ("num_completions_to_print", "log_images_steps"):
            if getattr(self, name) is not None:
                self._require_at_least(name, 1)

    def _require_at_least(self, name: str, smallest: float) -> None:
        if not getattr(self, name) >= smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}.")

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
    def sde_window_limits(self) -> tuple[int, int]:
        """The steps [start, stop) in which the SDE window lies."""
        start, stop = self.sde_window_range or (0, self.num_inference_steps - 1)
        return start, stop

    @property
    def num_sde_steps(self) -> int:
        """The size K of the SDE window."""
        start, stop = self.sde_window_limits
        return self.sde_window_size or stop - start

    @property
    def window_starts(self) -> range:
        """The steps at which the window may start."""
        start, stop = self.sde_window_range or (0, self.num_sde_steps)
        return range(start, stop - self.num_sde_steps + 1)

    def window(self, start: int, stop: int) -> Window:
        """The SDE window [start, stop)."""
        return Window(start, stop, self.sde_type, self.noise_level, str(self.log_prob_type))

    @property
    def completion_rule(self) -> CompletionRule | None:
        """How states are completed; `None` where credit needs no completions."""
        return None if self.credit == "outcome" else CompletionRule.parse(self.completion)

    @property
    def credit_rule(self) -> CreditRule:
        """How rewards become advantages."""
        return CreditRule(
            credit=self.credit,
            lambda_=self.credit_lambda or 0.0,
            trend=self.turning_point_trend,
            first_step=self.turning_point_first_step,
            deadzone=self.turning_point_deadzone,
            balanced=self.turning_point_balance,
            baseline=self.advantage_baseline,
            scale=self.scale_rewards,
            scope=self.advantage_scope,
            aggregation=self.multi_objective_aggregation,
        )
