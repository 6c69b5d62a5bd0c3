"""Runs for test_sharded.py, on one process or on all that `accelerate launch` starts.

Run as `python sharded_runs.py FOLDER`.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from test_trainer import build, prompts
from test_trainer_cost import coarse
from tiny import tiny_flux, tiny_sd3
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from trl_tpgrpo import TPGRPOTrainer


def rising(images: list[Image.Image], topic: list[int], **columns: object) -> list[float]:
    """`coarse`, and the number of the prompt, which tells them apart in evaluations and cancels in a group."""
    return [value + number for value, number in zip(coarse(images), topic, strict=True)]


WORLD = int(os.environ.get("WORLD_SIZE", 1))
SETTINGS = {
    "use_cpu": WORLD == 1,
    "bf16": False,
    # far above the gradients: steps are proportional to them, like rounding errors, but there is a state
    "adam_epsilon": 1.0,
    "learning_rate": 10.0,
    "max_grad_norm": 1e-3,  # below what comes, so that clipping counts too
    "reward_funcs": rising,
    "num_generations": 4,
    "per_device_train_batch_size": 12 // WORLD,  # groups of 4 straddle processes and micro-batches of 6
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "activation_checkpointing": True,
    "per_device_rollout_batch_size": 64,
    "sde_window_range": [0, 3],
    "sde_window_size": 2,
    "beta": 0.1,
    "ema_decay": None,
    "num_inference_steps_eval": 2,
    "num_generations_eval": 1,
    "per_device_eval_batch_size": 2,
}
LORA = SETTINGS | {"ema_decay": 0.9, "ema_update_every": 1, "save_strategy": "steps", "save_steps": 10}
FULL = SETTINGS | {"full": True, "learning_rate": 10.0, "gradient_accumulation_steps": 2, "max_steps": 3}
FLUX = SETTINGS | {
    "beta": 0.0, "learning_rate": 40.0, "eval_strategy": "steps", "eval_steps": 1,
    "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "max_steps": 3,
}  # fmt: skip


class Terminate(TrainerCallback):
    """Sends SIGTERM to the last process, in an update in the middle of a rollout."""

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 2 and args.process_index == WORLD - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def make(out: Path, family: Callable[[], DiffusionPipeline] = tiny_sd3, **settings: object) -> TPGRPOTrainer:
    return build(out, family(), **settings)


def weights(trainer: TPGRPOTrainer) -> dict[str, torch.Tensor]:
    """Copy whole weights, of adapters and buffers too; both processes have them, unlike what is saved."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name: whole(value).detach().clone() for name, value in named.items()}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def held_here(parameter: torch.Tensor) -> int:
    """How many numbers of a parameter this process has, when nothing is computed."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def lora(out: Path) -> dict[str, object]:
    """Uninterrupted, and stopped by SIGTERM and resumed."""
    trainer = make(out / "whole", **LORA)
    trainer.train()
    trainer.save_model(str(out / "lora"))
    uninterrupted = weights(trainer)
    stopped = make(out / "parts", **LORA)
    stopped.add_callback(Terminate())
    stopped.train()
    assert stopped.stop_on_signal.stopped and stopped.state.global_step == 3
    resumed = make(out / "parts", **LORA)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    resumed.save_model(str(out / "resumed"))
    held = sum(held_here(parameter) for parameter in trainer.model.parameters())
    return {"weights": uninterrupted, "resumed": weights(resumed), "history": trainer.state.log_history, "held": held}


def full(out: Path) -> dict[str, object]:
    """All weights, with a reference and gradients accumulated over two micro-batches."""
    trainer = make(out / "full-run", **FULL)
    before = weights(trainer)
    trainer.train()
    trainer.save_model(str(out / "full"))
    return {"before": before, "weights": weights(trainer), "history": trainer.state.log_history}


def flux(out: Path) -> dict[str, object]:
    """Transitions left out, evaluations whose last batch is not full, one of them before training.

    The best model is loaded at the end.
    """
    trainer = make(out / "flux-run", tiny_flux, eval_dataset=prompts(5), **FLUX)
    if trainer.is_deepspeed_enabled:
        with pytest.raises(ValueError, match="eval_on_start"):
            trainer.evaluate()
    else:
        trainer.evaluate()
    trainer.train()
    trainer.save_model(str(out / "flux"))
    return {"weights": weights(trainer), "history": trainer.state.log_history, "best": trainer.state.best_global_step}


def half(out: Path) -> dict[str, object]:
    """In bfloat16, whose rounding must not reach the timesteps; all weights, with a reference."""
    seen: set[float] = set()
    trainer = make(out / "half-run", **FULL | {"bf16": True, "max_steps": 1})

    def look(_: torch.nn.Module, __: tuple, inputs: dict[str, torch.Tensor]) -> None:
        seen.update(inputs["timestep"].tolist())

    trainer.policy.pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    dtypes = {str(value.dtype) for value in trainer.model.parameters()}
    return {"timesteps": sorted(seen), "dtypes": dtypes, "history": trainer.state.log_history}


def refused(out: Path) -> dict[str, str]:
    """What the trainer says of settings that do not go together with sharding; nothing if it takes them."""
    settings = {
        "compile_backend": LORA | {"compile_backend": "eager"},
        "rollout_batch_size": LORA | {"per_device_rollout_batch_size": "auto"},
        "offload_reference": FULL | {"offload_reference": True},
        "ema_decay": FULL | {"ema_decay": 0.9},
        "split_batches": LORA | {"accelerator_config": {"split_batches": True}},
        "even_batches": LORA | {"accelerator_config": {"even_batches": False}},
    }
    said = {}
    for name, wrong in settings.items():
        try:
            make(out / "refused-run", **wrong)
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    return said


RUNS = (lora, full, flux, half, refused)

if __name__ == "__main__":
    if WORLD > 1:
        import emulated_gpus

        emulated_gpus.install()
    folder = Path(sys.argv[1])
    for run in RUNS:
        result = run(folder)
        torch.save(result, folder / f"{run.__name__}-{os.environ.get('RANK', 0)}.pt")
