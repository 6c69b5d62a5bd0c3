"""The trainer: rows of a dataset -> prompts, trajectories, images, rewards, credit, update of the weights.

Methods are in this order and follow the API of TRL's GRPOTrainer; all that override TRL's or transformers' are here.
Mathematics is in `algorithm/`, model families in `policies/`, sampling and scoring in `rollouts/`.
"""

from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import RepeatSampler

from .algorithm.losses import first_wrong_term, relative_difference
from .algorithm.sde import kl_divergence
from .batches import Sampled, Trajectories, Transitions
from .callbacks import checkpoints, guard_rails, resuming, storage
from .callbacks.averaging import AveragedWeights
from .callbacks.costs import FirstLines
from .callbacks.pictures import PictureCallback
from .callbacks.progress import LogLines, ProgressDisplay
from .callbacks.sample_table import SamplePrinter
from .callbacks.samples import Samples
from .config import TPGRPOConfig
from .data import EpochSampler, SetEpoch, check_datasets, needed_rows, prompt_columns
from .hub import PAPER, HubRepository, RunCard, sample_rows
from .metrics import Metrics, record_surrogate, rollout_metrics
from .policies import loading, sharding, weights
from .policies.embeddings import PromptEmbeddings
from .policies.reference import Reference
from .rewards.contract import RewardFunc, check_available, reward_names
from .rollouts import Rollouts


class TPGRPOTrainer(_BaseTrainer):
    """
    Trainer for TurningPoint-GRPO (arXiv 2602.06422): reinforcement learning of flow-matching image models with
    step-level credit.

    ```python
    from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer

    args, adapter = TPGRPOConfig("sd35-tpgrpo"), LoraConfig(r=32, lora_alpha=64)
    model = "stabilityai/stable-diffusion-3.5-medium"
    trainer = TPGRPOTrainer(model, my_reward, args, train_dataset=dataset, peft_config=adapter)
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder (loaded with `args.model_init_kwargs`), or pipeline. Its transformer is trained in place.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Called as `reward_func(images=..., prompts=..., **other columns, trainer_state=..., log_metric=...)` with N
            PIL images, N prompts and N values of each column. Returns N numbers, or `None` where it does not apply.
        args ([`TPGRPOConfig`], *optional*):
            Settings. `None`: the defaults, which are the paper's.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Rows with a string in `"prompt"` (editing: also an image in `"image"`). Rewards receive the other columns.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Dataset or datasets for evaluation, with the same columns.
        eval_reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Functions for evaluation only. Rewards that are not trained on show reward hacking.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Additional callbacks.
        optimizers (`tuple`, *optional*):
            Optimizer and learning rate schedule, instead of those of `args`; not with `peft_config` (weights are new).
        peft_config ([`~peft.LoraConfig`], *optional*):
            Config of the LoRA adapter to train; without `target_modules` the paper's for the model's family. `None`:
            train all weights of the transformer.
    """

    _tag_names = ["trl", "tp-grpo"]
    _name = "TP-GRPO"
    _paper = PAPER
    args: Any  # a TPGRPOConfig, whose optional settings are set by now

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
        args = TPGRPOConfig("tp-grpo") if args is None else args
        if not isinstance(args, TPGRPOConfig):
            raise TypeError(f"args must be a TPGRPOConfig, got {type(args).__name__}.")
        args.settle_changes()
        self.reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        eval_only = eval_reward_funcs if isinstance(eval_reward_funcs, list) else [eval_reward_funcs]
        self.eval_reward_funcs = [function for function in eval_only if function is not None]
        number, names = len(self.reward_funcs), reward_names([*self.reward_funcs, *self.eval_reward_funcs])
        self.reward_func_names, self.eval_reward_func_names = names[:number], names
        if args.reward_weights is not None and len(args.reward_weights) != number:
            raise ValueError(f"reward_weights has {len(args.reward_weights)} entries for {number} reward functions.")
        check_datasets(train_dataset, eval_dataset, self.reward_funcs, self.eval_reward_funcs, args)
        sharding.check_before_loading(args)
        set_seed(args.seed)  # before the adapter's random weights
        self.policy = loading.load_policy(model, args, use_lora=peft_config is not None)
        transformer, frozen_copy = loading.prepare_transformer(self.policy, peft_config, args)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        columns = prompt_columns(datasets, self.policy.takes_image)
        self._run_parts = resuming.describe_parts(transformer, self.policy, self.reward_func_names, train_dataset)
        self._shown_rows = sample_rows([eval_dataset, train_dataset], columns)
        embeddings = PromptEmbeddings(self.policy, args.prompt_embeds_dir)
        self.policy.to(args.device)
        if args.precompute_prompt_embeds:
            shows_bar = None if args.process_index == 0 and not args.disable_tqdm else False
            rows, evaluated = needed_rows(train_dataset, eval_dataset, args, columns)
            embeddings.precompute(rows + self._shown_rows, evaluated, transformer, ProgressDisplay(shows_bar))
        self._step = self._num_evaluated = 0
        self._buffered_inputs: list[Trajectories] | None = None
        self._saved: Path | None = None  # the last checkpoint of this call of `train`
        self._is_new_rollout, self._eval_prefix = False, "eval"
        self._loss_terms: list[tuple[int, dict[str, Tensor], Tensor]] = []
        self._grad_norm: float | None = None
        self._metrics = {"train": Metrics(), "eval": Metrics()}
        self.hub = HubRepository(args, is_lora=peft_config is not None)
        adapter = transformer.peft_config["default"] if isinstance(transformer, PeftModel) else None
        rewards = {"reward_funcs": self.reward_funcs, "eval_reward_funcs": self.eval_reward_funcs}
        shown = [row["prompt"] for row in self._shown_rows]
        self.card = RunCard(args=args, policy=self.policy, adapter=adapter, reward_funcs=rewards, prompts=shown)
        self.recipe_settings: dict[str, Any] | None = None  # the command line sets its options for the recipe
        args.ddp_find_unused_parameters = args.ddp_find_unused_parameters or False
        super().__init__(transformer, args, list, callbacks=callbacks, optimizers=optimizers, **datasets)
        self._check_and_shard(frozen_copy)
        self._add_parts(embeddings)

    def _check_and_shard(self, frozen_copy: torch.nn.Module | None) -> None:
        """Check settings against the accelerator, and place or shard the reference."""
        args = self.args
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: launch one process per GPU with `accelerate launch`.")
        loading.check_optimizer(self.optimizer)
        sharding.check_accelerator(self.accelerator, self.model, frozen_copy, args)
        frozen_copy = sharding.prepare_for_sharding(self.accelerator, self.model, frozen_copy, self.policy.dtype)
        if frozen_copy is not None and not args.offload_reference:
            frozen_copy.to(args.device)
        keep, record = args.num_iterations > 1, self._metrics["train"].record
        self.reference = Reference(self.policy, self.accelerator, self.model, frozen_copy, keep, record)

    def _add_parts(self, embeddings: PromptEmbeddings) -> None:
        """Create the trainer's parts and callbacks, in the order in which callbacks are called."""
        args = self.args
        self.progress = ProgressDisplay(shows_bar=False)
        if self.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:  # in notebooks a table of the loss
            self.progress = ProgressDisplay()
            self.add_callback(self.progress)
        if self.pop_callback(PrinterCallback) is not None:
            self.add_callback(LogLines)
        self.samples = Samples(self.callback_handler, args, self.reward_func_names, self.accelerator.is_main_process)
        rewards, shown = (self.reward_funcs, self.eval_reward_funcs), (self.samples, self.progress, self._metrics)
        getters = (lambda: self._policy_model), (lambda: self.state)
        self.rollouts = Rollouts(self.policy, args, self.accelerator, embeddings, *rewards, *shown, *getters)
        self.averaged = AveragedWeights(self.model, args.ema_decay, args.ema_update_every)
        self.stop_on_signal = checkpoints.StopOnSignal(self.accelerator, self.progress)
        self._set_epoch = SetEpoch()
        first, pictures = FirstLines(self.reward_funcs), PictureCallback(self.callback_handler)
        for callback in (first, SamplePrinter(), pictures, self._set_epoch, self.averaged, self.stop_on_signal):
            self.add_callback(callback)
        self.guard_rails = guard_rails.watch_over(self, self._metrics_of_update, self._metrics["train"].record)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL's version reads `model.config.model_type`, which diffusers models lack."""

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
            repeat_count=self._generate_every,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed,
        )
        return self._set_epoch.sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> RepeatSampler:
        return RepeatSampler(eval_dataset, mini_repeat_count=self.args.num_generations_eval, shuffle=False)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    @property
    def _policy_model(self) -> torch.nn.Module:
        """The model outside of updates: with its wrapper if weights are sharded, else without (DDP)."""
        return self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> Trajectories:
        """Run a rollout if the buffer is empty; return its next micro-batch."""
        if self._step % self._generate_every == 0 or self._buffered_inputs is None:
            self._buffered_inputs = None  # frees memory
            trajectories = self.rollouts.generate(generation_batch, self._step // self._generate_every)
            self._is_new_rollout = True
            updates = max(1, self.args.steps_per_generation // self.args.gradient_accumulation_steps)
            # Each update gets an equal share of every group, for any number of processes.
            order = torch.arange(len(trajectories)).view(-1, updates).T.flatten()
            chunks = [trajectories[chunk] for chunk in order.chunk(self.args.steps_per_generation)]
            self._buffered_inputs = self._prepared_for_training(chunks)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _prepared_for_training(self, chunks: list[Trajectories]) -> list[Trajectories]:
        """Add the values that are computed once, before the first update on a rollout."""
        if self.args.offload_reference:
            self.reference.precompute(chunks, self.args.offload_trajectories)
        if self.args.recompute_old_log_probs:
            autocast = self.compute_loss_context_manager
            first_update = self.args.gradient_accumulation_steps if self.args.num_iterations == 1 else 0
            chunks = [
                replace(chunk, log_probs=None, means=None)
                if number < first_update
                else self.rollouts.recomputed(chunk, autocast)
                for number, chunk in enumerate(chunks)
            ]
        return chunks

    def sample_and_score(self, *args: Any, **kwargs: Any) -> Sampled:
        """Sample and score rows of a dataset, see [`~trl_tpgrpo.rollouts.Rollouts.sample_and_score`]."""
        return self.rollouts.sample_and_score(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~transformers.Trainer.train`] does; on SIGTERM or Ctrl-C, stop after an update with a checkpoint.

        Raises:
            FileNotFoundError: If there is no complete checkpoint to resume from.
            ValueError: If the checkpoint is damaged or from a different run (settings except those of
                `args.resume_with_changes`, adapter, number of processes), if a new run starts in a folder with
                checkpoints, or if another run writes to the folder.
            OSError: If the disk is full; the message lists the complete checkpoints.
        """
        self._step, self._buffered_inputs, self._saved, self.averaged.average = 0, None, None, None
        self._metrics["train"].clear()  # an aborted call may have left metrics
        if self.guard_rails is not None:
            self.guard_rails.forget()
        folder = self.args.output_dir
        with storage.locked(self.accelerator, folder), checkpoints.room(folder, folder):
            checkpoint = checkpoints.to_resume(self, resume_from_checkpoint)
            if checkpoint is not None and checkpoints.is_finished(checkpoint, self.args):
                return checkpoints.restore_finished(self, checkpoint)
            check_available([*self.reward_funcs, *self.eval_reward_funcs])
            sharding.prepare_to_train(self)
            with self.stop_on_signal.listening():
                return super().train(checkpoint and str(checkpoint), *args, **kwargs)

    def describe_run(self) -> dict[str, Any]:
        """Return the description of the run that is saved in a checkpoint and compared when resuming."""
        return resuming.describe_settings(self.args, self.policy.guidance) | self._run_parts

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run a forward and backward pass for each SDE step of a micro-batch, with the memory of one step."""
        model.train()
        getattr(self.optimizer, "train", lambda: None)()  # schedule-free optimizers have modes too
        trajectories = self._prepare_inputs(inputs)
        is_first_update = self._step % self._generate_every < self.args.gradient_accumulation_steps
        if trajectories.chunks is not None and not is_first_update:  # with ratios of 1
            now = self.rollouts.recomputed(trajectories, self.compute_loss_context_manager)
            trajectories = trajectories.with_chunk_ratios(now)
        together = self.accelerator.num_processes > 1
        chosen = trajectories.contributing(skip_zeros=self.args.beta == 0, keep_steps=together)
        losses, self._loss_terms = [], []
        with self.rollouts.phase("train", len(chosen)) as advance:
            for position, rows in chosen.items():
                transitions = trajectories.transitions(position, rows)
                losses.append(self._backward_of_one_step(model, transitions, is_last=position == max(chosen)))
                advance()
            total = torch.stack(losses).sum()
        sharding.check_gradients(self.accelerator, self.model)
        if self._is_new_rollout:
            self._report_rollout(inputs, trajectories)
        if not torch.isfinite(total):
            what = f"The loss at update {self.state.global_step} is {total.item()}"
            raise FloatingPointError(
                f"{what}: {first_wrong_term(self._loss_terms)}. The last update was probably too large "
                "(learning_rate, max_grad_norm), or float16 overflowed."
            )
        self._step += 1
        return total

    @torch.enable_grad()  # a reward function may have switched gradients off
    def _backward_of_one_step(self, model: torch.nn.Module, transitions: Transitions, is_last: bool) -> Tensor:
        with sharding.gradient_sync(self.accelerator, model, is_last):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, transitions)
            loss = loss / (len(transitions.window) * self.current_gradient_accumulation_steps)
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Transitions,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the surrogate of one SDE step of a micro-batch, with the KL divergence from the reference.

        Credit and advantages come from the reward table of the whole generation batch, which computes them once, here
        or (with `beta=0`) when steps are selected.
        """
        if return_outputs:
            raise ValueError("TPGRPOTrainer.compute_loss has no outputs to return; call it with return_outputs=False.")
        advantages = inputs.table.trained_advantages[inputs.rows, inputs.position].to(inputs.latents.device)  # (B,)
        velocity = self.policy.velocity(model, inputs.latents, inputs.step, inputs.conditioning)
        step = inputs.transition(velocity)
        surrogate = inputs.surrogate(step, advantages, self.args.loss_rule)
        loss, metrics = surrogate.loss.sum() / inputs.num_trajectories, self._metrics["train"]
        terms = {"surrogate": loss.detach()}
        if self.args.beta > 0:
            reference = self.reference.velocity(inputs)
            kl = kl_divergence(step, inputs.transition(reference)).mean()
            loss = loss + self.args.beta * kl
            terms["KL divergence"] = kl.detach()
            metrics.record("kl", kl)
            metrics.record("reference_drift", relative_difference(velocity.detach(), reference))
        self._loss_terms.append((inputs.position, terms, surrogate.ratio.max()))
        record_surrogate(metrics, surrogate)
        return loss

    def _report_rollout(self, rows: list[dict[str, Any]], trajectories: Trajectories) -> None:
        """Log a rollout and pass its sample to callbacks, after its credit has been computed."""
        self._is_new_rollout, table = False, trajectories.table
        for name, value in rollout_metrics(table, self.reward_func_names).items():
            self._metrics["train"].record(name, value, "nanmean" if "reward" in name else "mean")
        self.samples.rollout_ends([row["prompt"] for row in rows], table, self.state, self.control)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float | None:
        """Return the norm before clipping, which may be infinite in float16 only."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._grad_norm = None if norm is None else float(norm)
        if self._grad_norm is not None and not self.args.fp16 and not np.isfinite(self._grad_norm):
            raise FloatingPointError(
                f"The gradient's norm at update {self.state.global_step} is {self._grad_norm}, with a finite loss. "
                "The weights were not updated. Lower learning_rate, or train in another precision."
            )
        return self._grad_norm

    def _metrics_of_update(self) -> dict[str, float]:
        """Return the metrics of the update in progress, over all processes, for the guard rails."""
        first = self._step - self.args.gradient_accumulation_steps
        metrics = self._metrics["train"].latest()
        if self._grad_norm is not None:
            metrics["grad_norm"] = self._grad_norm
        return {**metrics, "is_on_policy": float(first % self._generate_every == 0)}

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return rewards of ODE samples of `eval_height` x `eval_width`, from the same noise each time."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # a name in self.eval_dataset
            check_datasets(None, eval_dataset, self.reward_funcs, self.eval_reward_funcs, self.args)
            prompt_columns({"eval_dataset": eval_dataset}, self.policy.takes_image)
        self._eval_prefix, self._num_evaluated = metric_key_prefix, 0
        self._metrics["eval"].clear()
        sharding.prepare_to_evaluate(self)
        self.samples.evaluation_begins()
        is_shown = self.progress in self.callback_handler.callbacks  # the user may have removed the display
        with self.averaged.in_use(), self.progress.evaluation(self.state) if is_shown else nullcontext():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.samples.evaluation_ends(metric_key_prefix, self.state, self.control)
        return metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Evaluate on another dataset; rewards are in `metrics` of the result, which has no predictions."""
        return PredictionOutput(None, None, self.evaluate(test_dataset, ignore_keys, metric_key_prefix))

    @torch.no_grad()
    def prediction_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any
    ) -> tuple[None, None, None]:
        """Sample and score a batch in evaluation; there is no loss."""
        first = self._num_evaluated + self.accelerator.process_index * len(inputs)
        self._num_evaluated += self.accelerator.num_processes * len(inputs)
        num_prompts = len(self.callback_handler.eval_dataloader.dataset)
        self.rollouts.evaluate(inputs, first, num_prompts * self.args.num_generations_eval)
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add the metrics recorded since the last log (with a prefix in evaluation)."""
        mode = "train" if self.model.training else "eval"
        prefix = f"{self._eval_prefix}_" if mode == "eval" else ""
        taken = {name.removeprefix(prefix) for name in logs}
        logs.update({f"{prefix}{name}": value for name, value in self._metrics[mode].flush(taken).items()})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights, or their average, in diffusers' format: an adapter, or `transformer`."""
        output_dir = output_dir or self.args.output_dir
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with checkpoints.room(output_dir, self.args.output_dir), self.averaged.in_use():
            self._save_weights(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_weights(self, folder: str | Path) -> None:
        model, pipeline_class = self.accelerator.unwrap_model(self.model), self.policy.pipeline_class
        weights.save_weights(model, folder, pipeline_class, self.args.should_save)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoints.being_written(self, folder):
            if not self.args.save_only_model:
                checkpoints.save_progress(self, folder)
                if self.averaged.num_moves:
                    self._save_weights(folder / checkpoints.LAST)
            super()._save_checkpoint(model, trial)
        checkpoints.rotate(self)
        self.create_model_card()
        if self.is_world_process_zero() and self.args.push_to_hub and self.args.hub_strategy != "end":
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.hub.push_checkpoint(folder, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        trained = self.accelerator.unwrap_model(model or self.model)
        last = Path(resume_from_checkpoint) / checkpoints.LAST
        weights.load_weights(trained, resume_from_checkpoint)
        if last.exists():  # the loaded weights are the average
            if self.args.ema_decay is not None:
                self.averaged.start()
            weights.load_weights(trained, last)

    def _load_best_model(self) -> None:
        weights.load_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)
        self.averaged.average = None  # otherwise it would be evaluated and saved

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:  # its engine has loaded the weights, without their average
            self._load_from_checkpoint(checkpoint)
        checkpoints.load_progress(self, Path(checkpoint))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository of the run, unless it exists."""
        if self.is_world_process_zero():
            self.hub_model_id = self.hub.create(token, private)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md`, with the images of the last push if any, and `recipe.yaml`."""
        if self.is_world_process_zero():
            self.card.write(self, model_name, dataset_name, [tags] if isinstance(tags, str) else tags or [])

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save the trained weights with a card, sample images and recipe, and push them. Call it on all processes.

        Arguments and result are those of [`~transformers.Trainer.push_to_hub`]; `kwargs` go to `create_model_card`. If
        it fails, the main process raises a HubError with the command that pushes the saved files later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        with self.averaged.in_use():
            self.card.images = self.rollouts.sample(self._shown_rows)
        if not self.is_world_process_zero():
            return None
        try:
            if self.hub.repo_id is None:
                self.hub_model_id = self.hub.create(token, private, is_trained=True)
        finally:  # the card is on disk, even if the Hub fails
            self.create_model_card(**kwargs)
        return self.hub.push(commit_message, blocking, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing while a checkpoint is written: `_save_checkpoint` pushes it when it is complete."""

    def _finish_current_push(self) -> None:
        """Wait for pushes at the end of training, then delete checkpoints that were kept for them."""
        self.hub.finish()
        checkpoints.rotate(self)
