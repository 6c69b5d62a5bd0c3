"""TRL's trainer with checkpoints that are whole or not taken for one, and runs that go on from them to the bit."""

from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .algorithm.rollout import Window
from .batches import Trajectories
from .callbacks.averaging import AveragedWeights
from .callbacks.checkpoints import being_written
from .callbacks.guard_rails import GuardRails
from .generation import ImageGenerator
from .hub import without_tokens
from .publishing import PublishingTrainer


LAST = "last"
"""The folder of a checkpoint with the weights that training goes on from, where those beside it are averaged."""


class ResumingTrainer(PublishingTrainer):
    """What [`TPGRPOTrainer`] writes to disk and reads back."""

    averaged: AveragedWeights
    guard_rails: GuardRails | None
    images: ImageGenerator
    _step: int
    _buffered_inputs: list[Trajectories] | None
    _measured_window: Window | None

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, their average if there is one, in diffusers' format: the adapter, or `transformer`."""
        output_dir = output_dir or self.args.output_dir
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with self.averaged.in_use():
            self._save_weights(output_dir)
        if self.args.should_save:
            torch.save(without_tokens(self.args), Path(output_dir) / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_weights(self, folder: str | Path) -> None:
        self.policy.save_weights(self.accelerator.unwrap_model(self.model), folder, self.args.should_save)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = (
            self.args.save_total_limit,
            None,
        )  # none is deleted before this one is whole
        try:
            with being_written(folder, self.accelerator):
                if not self.args.save_only_model:
                    self._save_progress(folder)
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and not self.hub.is_busy:  # else one that is being pushed might be deleted
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.push_checkpoint(folder)

    def _save_progress(self, folder: Path) -> None:
        """What training goes on from, besides what transformers saves and the weights that are evaluated."""
        progress = {
            "step": self._step,
            "layout": self._layout,
            "buffered_inputs": self._buffered_inputs if self._step % self._generate_every else None,
            "num_moves_of_average": self.averaged.num_moves,
            "measured_window": self._measured_window,
            "batch_sizes": self.images.batch_sizes,
            "guard_rails": self.guard_rails and self.guard_rails.state_dict(),
        }
        torch.save(progress, self._rollout_file(folder))
        if self.averaged.num_moves:
            self._save_weights(folder / LAST)

    @property
    def _layout(self) -> dict[str, int]:
        """What a resumed run must have in common with the one before."""
        names = ("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps", "num_iterations",
                 "num_generations", "num_inference_steps", "seed")  # fmt: skip
        return {"processes": self.accelerator.num_processes} | {name: getattr(self.args, name) for name in names}

    def _rollout_file(self, checkpoint: str | Path) -> Path:
        """Where a process keeps its micro-step and, inside a rollout, the rollout."""
        return Path(checkpoint) / f"rollout_{self.accelerator.process_index}.pt"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        trained, last = self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / LAST
        self.policy.load_weights(trained, resume_from_checkpoint)
        if last.exists():  # what has just been loaded is the average
            if self.args.ema_decay is not None:
                self.averaged.start()
            self.policy.load_weights(trained, last)

    def _load_best_model(self) -> None:
        self.policy.load_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)
        self.averaged.average = None  # or it would be evaluated and saved instead

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:  # its engine has loaded the weights, but knows nothing of their average
            self._load_from_checkpoint(checkpoint)
        for part in ("optimizer", "scheduler"):
            if not any(Path(checkpoint).glob(f"*{part}*")) and not self.is_deepspeed_enabled:
                raise FileNotFoundError(
                    f"{checkpoint} holds no {part} (saved with save_only_model?): it cannot be resumed."
                )
        if not self._rollout_file(checkpoint).exists():
            raise FileNotFoundError(
                f"{self._rollout_file(checkpoint)} is missing: the rollout in use when the checkpoint was saved. (A run is "
                "resumed on the number of processes that it was saved on.)"
            )
        saved = torch.load(self._rollout_file(checkpoint), map_location="cpu", weights_only=False)
        for name, value in self._layout.items():
            if saved["layout"][name] != value:
                raise ValueError(
                    f"{checkpoint} was saved with {saved['layout'][name]} for {name}, and this run has {value}: a run is "
                    "resumed with the batches, processes and seed that it was begun with."
                )
        self._step, in_use = saved["step"], saved["buffered_inputs"]
        if self.averaged.average is not None:
            self.averaged.average.optimization_step = saved["num_moves_of_average"]
        if self.guard_rails is not None and saved["guard_rails"] is not None:
            self.guard_rails.load_state_dict(saved["guard_rails"])
        if self.args.sde_window_share is not None:
            self._measured_window = saved["measured_window"]
        if self.args.rollout_batch_size is None:  # a fixed one may be another than before, say for lack of memory
            self.images.batch_sizes = saved["batch_sizes"]
        self._buffered_inputs = in_use and [
            trajectories.to(self.args.device, self.args.offload_trajectories) for trajectories in in_use
        ]
