"""DDP, FSDP2 and DeepSpeed ZeRO-1 and ZeRO-2: what cannot work is refused, and the models are made ready.

FSDP2 shards the weights of the model and of the reference. ZeRO shards optimizer states and gradients only. Everything here
is called by all processes at once.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers.integrations.deepspeed as deepspeed_integration
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer


def check_before_loading() -> None:
    """Refuse launch options under which models are loaded in part.

    Raises:
        ValueError: If FSDP is to leave all processes but the first without weights, or under ZeRO-3.
    """
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if uses_fsdp and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false in accelerate's config, got true: text encoders and reward "
            "models would have no weights on any process but the first. See examples/accelerate/fsdp2.yaml."
        )
    if deepspeed_integration.is_deepspeed_zero3_enabled():
        raise ValueError(
            "zero_stage must be 1 or 2 in the DeepSpeed config, got 3: to shard the weights take FSDP2, as in "
            "examples/accelerate/fsdp2.yaml."
        )


def check_accelerator(
    accelerator: Accelerator, model: torch.nn.Module, reference: torch.nn.Module | None, args: Any
) -> None:
    """Refuse what does not go together with the way in which processes share the work.

    Args:
        accelerator: Accelerator of the run.
        model: Model that is trained: a `PeftModel`, or a transformer with all its weights.
        reference: Frozen copy of the model, if there is one.
        args: Settings of the run, a `TPGRPOConfig`.

    Raises:
        ValueError: With the setting and what to do.
    """
    _check_data_loading(accelerator)
    fsdp = _plugin(accelerator, "fsdp")
    if fsdp is None and _plugin(accelerator, "deepspeed") is None:
        return
    kind = "FSDP" if fsdp is not None else "DeepSpeed"
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"fsdp_version must be 2, got {fsdp.fsdp_version}: see examples/accelerate/fsdp2.yaml.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"quantization: a quantised transformer is not sharded by {kind}; it fits whole on each device, and its "
            "adapter is small. Use examples/accelerate/multi_gpu.yaml."
        )
    if args.compile_backend is not None:
        raise ValueError(f"compile_backend has not been made to work under {kind}: leave it out, or use DDP.")
    if fsdp is not None and reference is not None and args.offload_reference:
        raise ValueError("offload_reference: FSDP shards the reference, which cannot be moved then. Leave it out.")
    if fsdp is not None and args.rollout_batch_size is None:
        raise ValueError(
            "per_device_rollout_batch_size='auto' tries batches until memory runs out, and under FSDP the processes "
            "wait for each other: set a number."
        )
    check_sharded_optimizer(str(getattr(args.optim, "value", args.optim)), fsdp is not None)


def check_sharded_optimizer(optim: str, is_fsdp_enabled: bool) -> None:
    """Refuse optimizers of bitsandbytes under FSDP, whose kernels do not know sharded tensors (bitsandbytes#1633).

    Raises:
        ValueError: If `optim` is one of them.
    """
    parts = ("bnb", "8bit", "paged", "lion", "ademamix")
    if is_fsdp_enabled and "torch" not in optim and any(part in optim for part in parts):
        raise ValueError(f"optim={optim!r} is of bitsandbytes and fails under FSDP: use 'adamw_torch_8bit' (torchao).")


def _check_data_loading(accelerator: Accelerator) -> None:
    wrong = {
        "split_batches": (accelerator.split_batches, "a batch belongs to one process"),
        "dispatch_batches": (
            accelerator.dispatch_batches,
            "rows hold strings, which processes cannot send each other",
        ),
        "even_batches=False": (not accelerator.even_batches, "processes would predict unequally often in evaluations"),
    }
    for name, (is_set, reason) in wrong.items():
        if is_set:
            raise ValueError(f"accelerator_config: {name} is not supported, {reason}. Leave it out.")


def _plugin(accelerator: Accelerator, kind: str) -> Any:
    return getattr(accelerator.state, f"{kind}_plugin", None)


def uses_deepspeed() -> bool:
    """Say whether there are arguments with DeepSpeed, which casts what it trains to the precision of the run."""
    return deepspeed_integration.deepspeed_config() is not None


def prepare_for_sharding(
    accelerator: Accelerator, model: torch.nn.Module, reference: torch.nn.Module | None, dtype: torch.dtype
) -> torch.nn.Module | None:
    """Make `model` ready for FSDP or DeepSpeed to take, and return the reference as it is used beside it.

    FSDP2 shards the reference too. DeepSpeed does not: each process has a whole one, in `dtype`.
    """
    if _plugin(accelerator, "fsdp") is not None:
        for module in (model, reference):
            if module is not None:
                _compute_as_unsharded(accelerator, module)
        return reference and fsdp2_prepare_model(accelerator, reference)
    if reference is not None and _plugin(accelerator, "deepspeed") is not None:
        for parameter in reference.parameters():  # and not the buffers, as DeepSpeed does with what is trained
            parameter.data = parameter.data.to(dtype)
    return reference


def _compute_as_unsharded(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Let FSDP2 leave precision to autocast, as without FSDP.

    FSDP2's own policy would cast every input to bfloat16, also the timesteps; from 512 on bfloat16 has every fourth number.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    forward = model.forward

    @functools.wraps(forward)
    def forward_in_autocast(*args: object, **kwargs: object) -> object:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = forward_in_autocast


def prepare_to_evaluate(trainer: Trainer) -> None:
    """Shard the weights before any training; transformers would prepare them for inference, and training would fail then.

    Raises:
        ValueError: Under DeepSpeed, whose engine is made for one training.
    """
    if trainer.is_fsdp_enabled and not isinstance(trainer.model, FSDPModule):
        trainer.create_optimizer()  # FSDP2 takes both or none
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None:
        raise ValueError(
            "evaluate() before train() is not possible under DeepSpeed: set eval_on_start=True, or evaluate without it."
        )


def prepare_to_train(trainer: Trainer) -> None:
    """Undo that an evaluate() before train() has prepared the model for inference; left so, DDP would never wrap it."""
    if getattr(trainer.model, "_is_accelerate_prepared", False) and not trainer.is_in_train:
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.model.__dict__.pop("_is_accelerate_prepared", None)
        trainer.model_wrapped = trainer.model


@contextmanager
def gradient_sync(accelerator: Accelerator, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
    """Let gradients be exchanged only in the last backward of the last micro-batch of an update.

    DeepSpeed steps after every backward that sees `sync_gradients`, so for it the flag itself is held back.
    """
    sync, uses_zero = accelerator.sync_gradients, _plugin(accelerator, "deepspeed") is not None
    if uses_zero:
        accelerator.gradient_state._set_sync_gradients(sync and is_last)
    try:
        with nullcontext() if uses_zero or (sync and is_last) else accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(sync)
