"""DDP, FSDP2, DeepSpeed ZeRO-1 and ZeRO-2: checks of settings, and preparation of models.

FSDP2 shards weights, including the reference's; ZeRO only optimizer states and gradients. All processes call these.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers.integrations.deepspeed as deepspeed_integration
from accelerate import Accelerator, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer


def check_before_loading(args: Any) -> None:
    """Raise a `ValueError` for launch options with partially loaded models or independent processes."""
    if (number := int(os.environ.get("WORLD_SIZE", 1))) != args.world_size:
        what = f"{number} processes were launched, but this one has a world size of {args.world_size}"
        raise ValueError(f"{what}: without GPUs set use_cpu=True.")
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(name, "false").lower() == "true" for name in names):
        reason = "else only the first process has text encoders and reward models; see examples/accelerate/fsdp2.yaml"
        raise ValueError(f"fsdp_cpu_ram_efficient_loading must be false in accelerate's config, got true: {reason}.")
    if deepspeed_integration.is_deepspeed_zero3_enabled():
        remedy = "to shard the weights, use FSDP2, as in examples/accelerate/fsdp2.yaml"
        raise ValueError(f"zero_stage must be 1 or 2 in the DeepSpeed config, got 3: {remedy}.")


def check_accelerator(accelerator: Accelerator, model: nn.Module, reference: nn.Module | None, args: Any) -> None:
    """Raise a `ValueError` for settings that the distributed setup does not support."""
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    is_sharded = is_fsdp or accelerator.distributed_type == DistributedType.DEEPSPEED
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    moves_reference = reference is not None and args.offload_reference
    is_auto = args.rollout_batch_size is None
    for setting, is_wrong, reason in (
        ("accelerator_config: split_batches", accelerator.split_batches, "a batch belongs to one process"),
        ("accelerator_config: dispatch_batches", accelerator.dispatch_batches, "rows with strings cannot be sent"),
        (
            "accelerator_config: even_batches=False",
            not accelerator.even_batches,
            "evaluation batches must have equal length",
        ),
        ("fsdp_version=1", is_fsdp and not accelerator.is_fsdp2, "must be 2, as in examples/accelerate/fsdp2.yaml"),
        ("quantization", is_sharded and is_quantized, "it fits a device, use examples/accelerate/multi_gpu.yaml"),
        ("compile_backend", is_sharded and args.compile_backend is not None, "not tested with shards, use DDP"),
        ("offload_reference", is_fsdp and moves_reference, "FSDP shards the reference, which can then not be moved"),
        ("per_device_rollout_batch_size='auto'", is_fsdp and is_auto, "processes wait for each other: set a number"),
    ):
        if is_wrong:
            raise ValueError(f"{setting} is not supported under {accelerator.distributed_type.value}: {reason}.")
    check_sharded_optimizer(str(getattr(args.optim, "value", args.optim)), is_fsdp)


def check_sharded_optimizer(optim: str, is_fsdp_enabled: bool) -> None:
    """Raise a `ValueError` for a bitsandbytes optimizer under FSDP, which it does not support (issue 1633)."""
    is_of_bitsandbytes = any(part in optim for part in ("bnb", "8bit", "paged", "lion", "ademamix"))
    if is_fsdp_enabled and "torch" not in optim and is_of_bitsandbytes:
        raise ValueError(f"optim={optim!r} fails under FSDP (bitsandbytes): use 'adamw_torch_8bit' (torchao).")


def prepare_for_sharding(
    accelerator: Accelerator, model: nn.Module, reference: nn.Module | None, dtype: torch.dtype
) -> nn.Module | None:
    """Prepare `model` for FSDP or DeepSpeed, and return the prepared reference.

    FSDP2 shards the reference too. With DeepSpeed, each process has a whole copy, in `dtype`.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        # Precision is left to autocast, as without FSDP. FSDP2's own policy would cast every input to bfloat16, also
        # timesteps, which bfloat16 rounds to multiples of 4 from 512 on.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        for module in (model, reference):
            if module is not None:
                module.forward = accelerator.autocast()(module.forward)
        return reference and fsdp2_prepare_model(accelerator, reference)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and reference is not None:
        for parameter in reference.parameters():  # but not the buffers, like DeepSpeed for trained weights
            parameter.data = parameter.data.to(dtype)
    return reference


def prepare_to_evaluate(trainer: Trainer) -> None:
    """Shard the weights before training; after transformers' preparation for inference, training would fail.

    With DeepSpeed, whose engine is made for one training run, this is a `ValueError`.
    """
    if trainer.is_fsdp_enabled and not isinstance(trainer.model, FSDPModule):
        trainer.create_optimizer()  # FSDP2 needs both or none
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None:
        remedy = "set eval_on_start=True, or evaluate without it"
        raise ValueError(f"evaluate() before train() is not possible under DeepSpeed: {remedy}.")


def prepare_to_train(trainer: Trainer) -> None:
    """Undo the preparation for inference by an evaluate() before train(), after which DDP would not wrap the model."""
    if getattr(trainer.model, "_is_accelerate_prepared", False) and not trainer.is_in_train:
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.model.__dict__.pop("_is_accelerate_prepared", None)
        trainer.model_wrapped = trainer.model


def check_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise a `RuntimeError` after a backward pass if a trainable tensor has no gradient.

    With FSDP2, gradients exist after they are exchanged; with DeepSpeed, they cannot be checked.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.sync_gradients):
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        what = f"{len(without)} of {len(trained)} trainable tensors have no gradient"
        raise RuntimeError(f"{what}: {', '.join(without[:8])}{' ...' * (len(without) > 8)}.")


@contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, is_last: bool) -> Iterator[None]:
    """Exchange gradients only in the last backward pass of the last micro-batch of an update.

    DeepSpeed steps after every backward pass with `sync_gradients`, so the flag is set only then.
    """
    sync, uses_zero = accelerator.sync_gradients, accelerator.distributed_type == DistributedType.DEEPSPEED
    if uses_zero:
        accelerator.gradient_state._set_sync_gradients(sync and is_last)
    try:
        with nullcontext() if uses_zero or (sync and is_last) else accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(sync)
