"""The trainer: rows of a dataset become prompts, trajectories, images, rewards, credit, and an update of the weights.

It reads in that order, under the names of TRL's GRPOTrainer. Mathematics and model families are elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.training_args import OptimizerNames
from trl.trainer.utils import RepeatSampler

from .algorithm.losses import clipped_surrogate, relative_difference
from .algorithm.rollout import Window
from .algorithm.sde import Transition, kl_divergence, log_prob, transition
from .batches import Trajectories, Transitions
from .callbacks.averaging import AveragedWeights
from .callbacks.checkpoints import StopOnSignal, is_complete, last_complete
from .callbacks.guard_rails import GuardRails
from .callbacks.pictures import PictureCallback
from .callbacks.printing import CompletionPrinter
from .callbacks.progress import LogLines, ProgressDisplay
from .callbacks.samples import Samples
from .checks import all_prompts, check_datasets, check_optimizer, check_sharded_optimizer
from .config import TPGRPOConfig
from .data import EpochSampler, SetEpoch
from .generation import ImageGenerator, on_device
from .metrics import Metrics, rollout_metrics
from .policies.embeddings import PromptEmbeddings
from .policies.loading import load_policy, prepare_transformer
from .policies.sharding import (
    check_before_loading,
    check_data_loading,
    check_sharding,
    prepare_for_sharding,
    prepare_to_evaluate,
)
from .rewards.contract import RewardError, RewardFunc, check_applicability, declared, reward_names
from .rewards.scorer import Scorer, runs_beside
from .sampling import CARD, EVALUATION, NOISE, SamplingTrainer


class TPGRPOTrainer(SamplingTrainer):
    """
    Trainer for TurningPoint-GRPO (arXiv 2602.06422): reinforcement learning of flow-matching text-to-image models in which
    each denoising step is credited with the reward that it adds.

    ```python
    from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer

    trainer = TPGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=my_reward,
        args=TPGRPOConfig(output_dir="sd35-tpgrpo"),
        train_dataset=dataset,
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a pipeline, loaded with `args.model_init_kwargs`, or the pipeline itself. Its transformer is
            trained, in place.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Called as `reward_func(images=..., prompts=..., **other dataset columns, trainer_state=..., log_metric=...)`
            with N PIL images, N prompts and N values of each column; returns N numbers, `None` where it does not apply to a
            prompt.
        args ([`TPGRPOConfig`], *optional*):
            The settings. `None`: the paper's.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Rows with a string in the column `"prompt"`; other columns are passed to the reward functions. Needed to train.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            The same for evaluation.
        eval_reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Called in evaluation only, and logged there: rewards that are not trained on show when those that are get hacked.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Added to the default ones.
        optimizers (`tuple`, *optional*):
            Optimizer and learning-rate schedule to use instead of those of `args`. With `peft_config` the trained weights do
            not exist before the trainer does: pass the optimizer by `args.optim` then.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Train a LoRA adapter. Without `target_modules` those of the paper for the model's family are taken. `None`: train
            all weights of the transformer.

    Raises:
        ValueError, TypeError: For arguments that cannot work, with the name of the one and what would be right.
    """

    _tag_names = ["trl", "tp-grpo"]

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: TPGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ):
        args = args or TPGRPOConfig("tp-grpo")
        self.reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        of_evaluation = eval_reward_funcs if isinstance(eval_reward_funcs, list) else [eval_reward_funcs]
        self.eval_reward_funcs = [function for function in of_evaluation if function is not None]
        names = reward_names([*self.reward_funcs, *self.eval_reward_funcs])
        self.reward_func_names, self.eval_reward_func_names = names[: len(self.reward_funcs)], names
        if args.reward_weights is not None and len(args.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(args.reward_weights)} entries for {len(self.reward_funcs)} reward functions."
            )
        check_datasets(train_dataset, eval_dataset, self.reward_funcs, self.eval_reward_funcs, args)
        check_before_loading()
        set_seed(args.seed)  # before the adapter's random weights
        self.policy = load_policy(model, args, use_lora=peft_config is not None)
        transformer, self.reference = prepare_transformer(self.policy, peft_config, args)
        embeddings = PromptEmbeddings(self.policy, args.prompt_embeds_dir)
        functions = [*self.reward_funcs, *self.eval_reward_funcs]
        self.scorer = Scorer(args.reward_failures)
        self._scores_tensors = any(declared(function).image_type == "pt" for function in functions)
        self._reward_models = [function for function in functions if hasattr(function, "to")]
        self._offloaded_rewards = [function for function in self._reward_models if not runs_beside(function)]
        self._place_frozen_models(embeddings, transformer, args, (train_dataset, eval_dataset))
        self._set_epoch = SetEpoch()
        self._step = 0
        self._grad_norm: float | None = None
        self._buffered_inputs: list[Trajectories] | None = None
        self._measured_window: Window | None = None
        self._metrics = {"train": Metrics(), "eval": Metrics()}
        self._eval_prefix, self._num_evaluated = "eval", 0
        args.ddp_find_unused_parameters = args.ddp_find_unused_parameters or False
        super().__init__(
            model=transformer,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: launch one process per GPU with `accelerate launch`.")
        check_optimizer(self.optimizer)
        check_sharded_optimizer(OptimizerNames(args.optim).value, self.is_fsdp_enabled)
        check_data_loading(self.accelerator)
        check_sharding(self.accelerator, self.model, self.reference, args)
        self.reference = prepare_for_sharding(self.accelerator, self.model, self.reference, self.policy.dtype)
        if self.reference is not None and not args.offload_reference:
            self.reference.to(args.device)
        self.images = ImageGenerator(self.policy, args, embeddings, self.accelerator)
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * len(self.reward_funcs))
        self.averaged = AveragedWeights(self.model, args.ema_decay, args.ema_update_every)
        for standard, ours in ((ProgressCallback, ProgressDisplay), (PrinterCallback, LogLines)):
            if self.pop_callback(standard) is not None:  # there is another one in notebooks
                self.add_callback(ours)
        self.samples = Samples(self.callback_handler, args, self.reward_func_names, self.accelerator.is_main_process)
        self.add_callback(CompletionPrinter)
        self.add_callback(PictureCallback(self.callback_handler))
        self.add_callback(self._set_epoch)
        self.add_callback(self.averaged)
        self.stop_on_signal = StopOnSignal(self.accelerator)
        self.add_callback(self.stop_on_signal)
        self.guard_rails = self._add_guard_rails()

    def _place_frozen_models(
        self, embeddings: PromptEmbeddings, transformer: torch.nn.Module, args: TPGRPOConfig, datasets: tuple
    ) -> None:
        """Encode prompts if that comes first, while the transformer is not on the device; then move what stays there."""
        self.policy.to(args.device)
        if args.precompute_prompt_embeds:
            loaded_onto = next(transformer.parameters()).device  # for a quantised one the GPU
            transformer.to("cpu")
            prompts = all_prompts(*datasets)
            display = ProgressDisplay(shows_bar=None if args.process_index == 0 and not args.disable_tqdm else False)
            with display.phase("encode prompts", len(dict.fromkeys(prompts)), alone=True) as advance:
                embeddings.precompute(prompts, advance)
            transformer.to(loaded_onto)
        for model in self._reward_models:
            if not (args.offload_between_phases and model in self._offloaded_rewards):
                model.to(args.device)
        if args.offload_between_phases:
            self.policy.pipeline.vae.to("cpu")

    def _add_guard_rails(self) -> GuardRails | None:
        """Those among the user's callbacks, or one as `args.guard_rails` says."""
        given = [callback for callback in self.callback_handler.callbacks if isinstance(callback, GuardRails)]
        if not given and self.args.guard_rails != "off":
            given = [GuardRails(self.args.guard_rails)]
            self.add_callback(given[0])
        if not given:
            return None
        if given[0].action == "skip" and self.is_deepspeed_enabled:
            raise ValueError("guard_rails='skip' cannot hold back an update of DeepSpeed: use 'warn' or 'stop'.")
        held_out = self.eval_reward_func_names[len(self.reward_funcs) :]
        given[0].watch(self._metrics_of_update, self._metrics["train"].record, held_out)
        return given[0]

    def _send_telemetry(self) -> None:
        """TRL's reads `model.config.model_type`, which diffusers models do not have, and would report nothing of use."""

    # ----------------------------------------------------------------------------------------------------- the data

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing: TPGRPOTrainer needs one to train.")
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        self._set_epoch.sampler = EpochSampler(
            data_source=dataset if dataset is not None else self.train_dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.prompts_per_generation,
            repeat_count=self.args.num_iterations * self.args.steps_per_generation,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed,
        )
        return self._set_epoch.sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> RepeatSampler:
        return RepeatSampler(eval_dataset, mini_repeat_count=self.args.num_generations_eval, shuffle=False)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]

    # -------------------------------------------------------------------------------------------------- the rollout

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> Trajectories:
        """Roll out when the buffer is used up; hand out its next micro-batch."""
        if self._step % self._generate_every == 0 or self._buffered_inputs is None:
            self._buffered_inputs = None  # makes room
            trajectories = self._generate_and_score(generation_batch)
            updates = max(1, self.args.steps_per_generation // self.args.gradient_accumulation_steps)
            # Each update gets every so-manieth trajectory: a share of each group, the same for any number of processes.
            order = torch.arange(len(trajectories)).view(-1, updates).T.flatten()
            chunks = [trajectories[chunk] for chunk in order.chunk(self.args.steps_per_generation)]
            self._buffered_inputs = self._prepared_for_training(chunks)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _prepared_for_training(self, chunks: list[Trajectories]) -> list[Trajectories]:
        """Micro-batches with what is computed once, before the first update on their rollout."""
        if self.args.offload_reference:
            assert self.reference is not None
            with on_device([self.reference], self.args.device, offload=True):
                for chunk in chunks:
                    self._keep_reference(chunk)
        if self.args.recompute_old_log_probs:
            of_first_update = self.args.gradient_accumulation_steps if self.args.num_iterations == 1 else 0
            chunks = [
                replace(chunk, log_probs=None if number < of_first_update else self._training_log_probs(chunk))
                for number, chunk in enumerate(chunks)
            ]
        return chunks

    def _keep_reference(self, trajectories: Trajectories) -> None:
        """Compute the reference's velocities at all SDE steps."""
        for position in range(len(trajectories.window)):
            velocity = self._reference_velocity(trajectories.transitions(position))
            trajectories.reference[position] = velocity.cpu() if self.args.offload_trajectories else velocity

    def _training_log_probs(self, trajectories: Trajectories) -> Tensor:
        """Log-probabilities (B, K) as the training path computes them, gradients and all."""
        log_probs = []
        for position in range(len(trajectories.window)):
            with torch.enable_grad(), self.compute_loss_context_manager():
                inputs = trajectories.transitions(position)
                step = self._transition(self._policy_model, inputs)
                log_probs.append(log_prob(step, inputs.next_latents, inputs.window.log_prob_type).detach())
        self._metrics["train"].record("num_train_evaluations", len(trajectories) * len(log_probs), "sum")
        return torch.stack(log_probs, 1)

    def _generate_and_score(self, rows: list[dict[str, Any]]) -> Trajectories:
        """Sample trajectories with their completions, score every image, and lay the rewards out for the loss."""
        generation = self._step // self._generate_every
        if self.args.sde_window_share is not None and self._measured_window is None:
            self._measured_window = self._measure_window(rows)
        window, rule = self._measured_window or self._draw_window(generation), self.args.completion_rule
        generators = self._generators(NOISE, generation, len(rows))
        self.samples.rollout_begins(self.state)
        states, log_probs, table = self._sample_in_sweeps(rows, generators, window, rule)
        self.samples.rollout_ends([row["prompt"] for row in rows], table, self.state, self.control)
        for name, value in rollout_metrics(table, self.reward_func_names).items():
            self._metrics["train"].record(name, value)
        if self.args.completion_check_every and generation % self.args.completion_check_every == 0:
            self._check_completions(rows, window, generation, table)
        first = self.accelerator.process_index * len(rows)
        conditioning, prompts = self._encode(rows)
        return Trajectories(
            states=states,
            log_probs=log_probs,
            window=window,
            schedule=self.policy.schedule(self.args.num_inference_steps),
            conditioning=conditioning,
            prompts=prompts,
            rows=torch.arange(first, first + len(rows)),
            table=table,
        )

    # ------------------------------------------------------------------------------------------------- the training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as [`~transformers.Trainer.train`] does; after SIGTERM until the end of the update, with a checkpoint.

        Raises:
            FileNotFoundError: If `resume_from_checkpoint` is `True` and there is no complete checkpoint, or it is the path of
                one that is incomplete.
            ValueError: If the checkpoint belongs to a run with other batches or another number of processes.
        """
        self._step, self._buffered_inputs, self.averaged.average = 0, None, None
        if self.guard_rails is not None:
            self.guard_rails.forget()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete(self.args.output_dir))
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise FileNotFoundError(f"{resume_from_checkpoint} is no checkpoint, or was not written to its end.")
        if getattr(self.model, "_is_accelerate_prepared", False) and not self.is_in_train:
            # An evaluate() before train() has prepared the model for inference; left so, DDP would never wrap it.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            self.model_wrapped = self.model
        with self.stop_on_signal.listening():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward for each SDE step of a micro-batch, so that memory does not grow with their number."""
        model.train()
        getattr(self.optimizer, "train", lambda: None)()  # schedule-free optimizers have modes too
        trajectories = self._prepare_inputs(inputs)
        chosen = self._contributing(trajectories)
        with self._phase("train", len(chosen)) as advance:
            losses, last = [], max(chosen)
            for position, of_step in chosen.items():
                transitions = trajectories.transitions(position, of_step)
                losses.append(self._backward_of_one_step(model, transitions, is_last=position == last))
                advance()
            total = torch.stack(losses).sum()
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f"The loss at update {self.state.global_step} is {total.item()}: the last update has probably been too "
                    "large (learning_rate, max_grad_norm), or float16 has overflowed."
                )
        self._step += 1
        return total

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float | None:
        """The norm before clipping, which float16 alone may make infinite."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._grad_norm = None if norm is None else float(norm)
        if self._grad_norm is not None and not self.args.fp16 and not np.isfinite(self._grad_norm):
            raise FloatingPointError(
                f"The gradient's norm at update {self.state.global_step} is {self._grad_norm}, of a finite loss: nothing has been "
                "updated. Lower learning_rate, or train in another precision."
            )
        return self._grad_norm

    def _metrics_of_update(self) -> dict[str, float]:
        """What the update under way has recorded, on all processes: what the guard rails look at."""
        first = self._step - self.args.gradient_accumulation_steps
        metrics = self._metrics["train"].latest(self.accelerator)
        if self._grad_norm is not None:
            metrics["grad_norm"] = self._grad_norm
        return {**metrics, "is_on_policy": float(first % self._generate_every == 0)}

    def _contributing(self, trajectories: Trajectories) -> dict[int, Tensor]:
        """By SDE step, the trajectories that add to the loss: without a KL term, those whose advantage is not 0.

        A step that has none is left out, unless it is the last, so that there is a gradient to exchange and an update, or
        there are other processes, with which this one must keep in step.
        """
        num_steps, together = len(trajectories.window), self.accelerator.num_processes > 1
        if self.args.beta > 0:
            return dict.fromkeys(range(num_steps), torch.arange(len(trajectories)))
        chosen = {step: trajectories.advantages(step).nonzero().flatten() for step in range(num_steps)}
        needed = range(num_steps) if together else [num_steps - 1]
        chosen |= {step: torch.tensor([0]) for step in needed if not len(chosen[step])}
        return {step: of_step for step, of_step in chosen.items() if len(of_step)}

    def _backward_of_one_step(self, model: torch.nn.Module, transitions: Transitions, is_last: bool) -> Tensor:
        with self._gradient_sync(model, is_last):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, transitions)
            loss = loss / (len(transitions.window) * self.current_gradient_accumulation_steps)
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    @contextmanager
    def _gradient_sync(self, model: torch.nn.Module, last: bool) -> Iterator[None]:
        """Let gradients be exchanged only in the last backward of the last micro-batch of an update.

        DeepSpeed steps after every backward that sees `sync_gradients`, so for it the flag itself is held back.
        """
        sync = self.accelerator.sync_gradients
        if self.is_deepspeed_enabled:
            self.accelerator.gradient_state._set_sync_gradients(sync and last)
        try:
            with nullcontext() if self.is_deepspeed_enabled or (sync and last) else self.accelerator.no_sync(model):
                yield
        finally:
            self.accelerator.gradient_state._set_sync_gradients(sync)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Transitions,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The clipped surrogate of one SDE step of a micro-batch, with the KL divergence from the reference.

        Credit and advantages come from the reward table of the whole generation batch, which computes them at the first
        look and keeps them.
        """
        if return_outputs:
            raise ValueError("TPGRPOTrainer.compute_loss has no outputs to return; call it with return_outputs=False.")
        velocity = self.policy.velocity(model, inputs.latents, inputs.timestep, inputs.conditioning)
        step = self._transition_of(velocity, inputs)
        log_probs = log_prob(step, inputs.next_latents, inputs.window.log_prob_type)
        old_log_probs = log_probs.detach() if inputs.old_log_probs is None else inputs.old_log_probs
        surrogate = clipped_surrogate(
            log_probs, old_log_probs, inputs.advantages, self.args.epsilon, self.args.epsilon_high
        )
        loss, metrics = surrogate.loss.sum() / inputs.num_trajectories, self._metrics["train"]
        if self.args.beta > 0:
            reference = self._reference_velocity(inputs)
            kl = kl_divergence(step, self._transition_of(reference, inputs)).mean()
            loss = loss + self.args.beta * kl
            metrics.record("kl", kl)
            metrics.record("reference_drift", relative_difference(velocity.detach(), reference))
        metrics.record("ratio/mean", surrogate.ratio.mean())
        metrics.record("ratio/max_deviation", (surrogate.ratio - 1).abs().max(), "max")
        metrics.record("ratio/frac_above_one", (0.5 * (surrogate.ratio - 1).sign() + 0.5).mean())
        metrics.record("clip_ratio", surrogate.clipped.float().mean())
        metrics.record("num_train_evaluations", len(log_probs), "sum")
        return loss

    def _transition(self, model: torch.nn.Module, inputs: Transitions) -> Transition:
        return self._transition_of(
            self.policy.velocity(model, inputs.latents, inputs.timestep, inputs.conditioning), inputs
        )

    def _transition_of(self, velocity: Tensor, inputs: Transitions) -> Transition:
        window = inputs.window
        return transition(
            window.sde_type, inputs.latents, velocity, inputs.sigma, inputs.sigma_next, window.noise_level
        )

    def _reference_velocity(self, inputs: Transitions) -> Tensor:
        """That of the model before training; kept if the rollout is trained on again."""
        velocity = inputs.reference.get(inputs.position)
        if velocity is None:
            velocity = self._evaluate_reference(inputs)
            if self.args.num_iterations > 1:
                inputs.reference[inputs.position] = velocity
        return velocity.to(inputs.latents.device)

    @torch.no_grad()
    def _evaluate_reference(self, inputs: Transitions) -> Tensor:
        self._metrics["train"].record("num_train_evaluations", len(inputs.latents), "sum")
        if self.reference is not None:
            with self.accelerator.autocast():
                return self.policy.velocity(self.reference, inputs.latents, inputs.timestep, inputs.conditioning)
        adapter = self.accelerator.unwrap_model(self.model)
        with adapter.disable_adapter():
            return self.policy.velocity(adapter, inputs.latents, inputs.timestep, inputs.conditioning)

    # ----------------------------------------------------------------------------------------------- the evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean reward of images sampled by the ODE in `num_inference_steps_eval` steps, with the same noise each time."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # a name of one in self.eval_dataset
            check_datasets(None, eval_dataset, self.reward_funcs, self.eval_reward_funcs, self.args)
        self._eval_prefix, self._num_evaluated = metric_key_prefix, 0
        prepare_to_evaluate(self)
        self.samples.evaluation_begins()
        with self.averaged.in_use(), self.progress.evaluation(self.state):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.samples.evaluation_ends(metric_key_prefix, self.state, self.control)
        return metrics

    @torch.no_grad()
    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: list[dict[str, Any]],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Sample and score a batch of an evaluation; there is no loss."""
        first = self._num_evaluated + self.accelerator.process_index * len(inputs)
        self._num_evaluated += self.accelerator.num_processes * len(inputs)
        generators = self._generators(EVALUATION, 0, len(inputs), first)
        functions = [*self.reward_funcs, *self.eval_reward_funcs]
        sampled = self._scored(self._sample(inputs, generators, None, None, functions))
        rewards, trained, error = sampled.rewards, len(self.reward_funcs), sampled.error
        prompts = [row["prompt"] for row in inputs]
        try:
            check_applicability(rewards[:, :trained], self.reward_func_names, prompts, 1, sampled.failed)
        except RewardError as inapplicable:  # on this process alone
            error = error or inapplicable
        self._stop_together(error)
        weighted = self._weighted(rewards[:, :trained, -1])
        self.samples.keep_evaluated(prompts, sampled.images, weighted)
        final = self.accelerator.gather_for_metrics(rewards[:, :, -1].to(self.args.device)).cpu()  # (N, F)
        metrics = self._metrics["eval"]
        for name, values in zip(self.eval_reward_func_names, final.unbind(1), strict=True):
            metrics.record(f"rewards/{name}/mean", values)
            metrics.record(f"rewards/{name}/std", values, "std")
        reward = self._weighted(final[:, :trained])
        metrics.record("reward", reward)
        metrics.record("reward_std", reward, "std")
        return None, None, None

    # -------------------------------------------------------------------------------------------------- the metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics recorded since the last log, with the evaluation's prefix if they are of one."""
        prefix = f"{self._eval_prefix}_" if self._mode == "eval" else ""
        recorded = self._metrics[self._mode].flush(self.accelerator)
        logs.update({f"{prefix}{name}": value for name, value in recorded.items()})
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------------- for the Hub's card

    def _sample_for_card(self, prompts: list[str]) -> list[Image.Image]:
        generators = self._generators(CARD, 0, len(prompts), first=0)
        with self.averaged.in_use():
            return self.images.sample(self._policy_model, prompts, generators)
