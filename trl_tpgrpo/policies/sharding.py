"""DDP, FSDP2 and DeepSpeed ZeRO-1 and ZeRO-2: what cannot work is refused, and the models are made ready.

FSDP2 shards weights, also the reference's; ZeRO only optimizer states and gradients. All processes call these at once.
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
    """Raise a `ValueError` for launch options under which models are loaded in part, or processes work apart."""
    if (number := int(os.environ.get("WORLD_SIZE", 1))) != args.world_size:
        what = f"{number} processes were launched, and this one works alone (world size {args.world_size})"
        raise ValueError(f"{what}: without GPUs set use_cpu=True.")
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(name, "false").lower() == "true" for name in names):
        reason = "else only the first process has text encoders and reward models; see examples/accelerate/fsdp2.yaml"
        raise ValueError(f"fsdp_cpu_ram_efficient_loading must be false in accelerate's config, got true: {reason}.")
    if deepspeed_integration.is_deepspeed_zero3_enabled():
        remedy = "to shard the weights take FSDP2, as in examples/accelerate/fsdp2.yaml"
        raise ValueError(f"zero_stage must be 1 or 2 in the DeepSpeed config, got 3: {remedy}.")


def check_accelerator(accelerator: Accelerator, model: nn.Module, reference: nn.Module | None, args: Any) -> None:
    """Raise a `ValueError` for settings that do not go together with the way in which processes share the work."""
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    is_sharded = is_fsdp or accelerator.distributed_type == DistributedType.DEEPSPEED
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    moves_reference = reference is not None and args.offload_reference
    is_auto = args.rollout_batch_size is None
    for setting, is_wrong, reason in (
        ("accelerator_config: split_batches", accelerator.split_batches, "a batch belongs to one process"),
        ("accelerator_config: dispatch_batches", accelerator.dispatch_batches, "strings of rows cannot be sent"),
        (
            "accelerator_config: even_batches=False",
            not accelerator.even_batches,
            "evaluations must be of equal length",
        ),
        ("fsdp_version=1", is_fsdp and not accelerator.is_fsdp2, "must be 2, as in examples/accelerate/fsdp2.yaml"),
        ("quantization", is_sharded and is_quantized, "it fits each device, use examples/accelerate/multi_gpu.yaml"),
        ("compile_backend", is_sharded and args.compile_backend is not None, "it is untried with shards, use DDP"),
        ("offload_reference", is_fsdp and moves_reference, "FSDP shards the reference, which cannot be moved then"),
        ("per_device_rollout_batch_size='auto'", is_fsdp and is_auto, "processes wait for each other: set a number"),
    ):
        if is_wrong:
            raise ValueError(f"{setting} is not supported under {accelerator.distributed_type.value}: {reason}.")
    check_sharded_optimizer(str(getattr(args.optim, "value", args.optim)), is_fsdp)


def check_sharded_optimizer(optim: str, is_fsdp_enabled: bool) -> None:
    """Raise a `ValueError` for an optimizer of bitsandbytes under FSDP: it takes no sharded tensors (issue 1633)."""
    is_of_bitsandbytes = any(part in optim for part in ("bnb", "8bit", "paged", "lion", "ademamix"))
    if is_fsdp_enabled and "torch" not in optim and is_of_bitsandbytes:
        raise ValueError(f"optim={optim!r} is of bitsandbytes and fails under FSDP: use 'adamw_torch_8bit' (torchao).")


def prepare_for_sharding(
    accelerator: Accelerator, model: nn.Module, reference: nn.Module | None, dtype: torch.dtype
) -> nn.Module | None:
    """Make `model` ready for FSDP or DeepSpeed to take, and return the reference as it is used beside it.

    FSDP2 shards the reference too. DeepSpeed does not: each process has a whole one, in `dtype`.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        # Precision is left to autocast, as without FSDP. FSDP2's own policy would cast every input to bfloat16, also
        # timesteps; from 512 on bfloat16 has every fourth number.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        for module in (model, reference):
            if module is not None:
                module.forward = accelerator.autocast()(module.forward)
        return reference and fsdp2_prepare_model(accelerator, reference)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and reference is not None:
        for parameter in reference.parameters():  # and not the buffers, as DeepSpeed does with what is trained
            parameter.data = parameter.data.to(dtype)
    return reference


def prepare_to_evaluate(trainer: Trainer) -> None:
    """Shard the weights before any training; as transformers prepares them for inference, training would fail then.

    DeepSpeed, whose engine is made for one training, raises a `ValueError`.
    """
    if trainer.is_fsdp_enabled and not isinstance(trainer.model, FSDPModule):
        trainer.create_optimizer()  # FSDP2 takes both or none
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None:
        remedy = "set eval_on_start=True, or evaluate without it"
        raise ValueError(f"evaluate() before train() is not possible under DeepSpeed: {remedy}.")


def prepare_to_train(trainer: Trainer) -> None:
    """Undo that an evaluate() before train() has prepared the model for inference; DDP would never wrap it then."""
    if getattr(trainer.model, "_is_accelerate_prepared", False) and not trainer.is_in_train:
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.model.__dict__.pop("_is_accelerate_prepared", None)
        trainer.model_wrapped = trainer.model


def check_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise a `RuntimeError` after a backward if something that is to be trained has no gradient.

    FSDP2 has gradients once they are exchanged, DeepSpeed none that others see.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.sync_gradients):
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        what = f"{len(without)} of {len(trained)} tensors that are to be trained have no gradient"
        raise RuntimeError(f"{what}: {', '.join(without[:8])}{' ...' * (len(without) > 8)}.")


@contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, is_last: bool) -> Iterator[None]:
    """Let gradients be exchanged only in the last backward of the last micro-batch of an update.

    DeepSpeed steps after every backward that sees `sync_gradients`, so for it the flag itself is held back.
    """
    sync, uses_zero = accelerator.sync_gradients, accelerator.distributed_type == DistributedType.DEEPSPEED
    if uses_zero:
        accelerator.gradient_state._set_sync_gradients(sync and is_last)
    try:
        with nullcontext() if uses_zero or (sync and is_last) else accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(sync)
