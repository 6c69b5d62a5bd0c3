"""Weights of which each process holds a part: under FSDP2 all of them, under ZeRO-3 likewise.

What is here is called by all processes at once, and does nothing special where the weights are whole. ZeRO-1 and ZeRO-2 share
out optimizer states and gradients only.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers.integrations.deepspeed as deepspeed_integration
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from ..config import TPGRPOConfig


@contextmanager
def without_zero3() -> Iterator[None]:
    """Inside, transformers and diffusers take no notice of ZeRO-3.

    While arguments with ZeRO-3 exist, transformers loads of every model a part on each process, which only DeepSpeed's engine
    could put together: text encoders and reward models are to be whole.
    """
    config = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = config


@contextmanager
def gathered(parameters: Sequence[Tensor], modified: bool = False) -> Iterator[None]:
    """Under ZeRO-3 the parameters are whole inside; with `modified` what the first process makes of them is kept."""
    if not deepspeed_integration.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # not there without ZeRO

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modified else None), without_zero3():
        yield


def whole_weights(weights: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole copies of a model's own weights on the CPU, one put together after the other; none on a process that keeps none."""
    whole = {}
    for name, value in weights.items():
        with gathered([value]):
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                whole[name] = full.detach().to("cpu", copy=True).contiguous()
    return whole


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Those of the whole weights."""
    with gathered(list(weights.values())):
        return {name: value.shape for name, value in weights.items()}


@torch.no_grad()
def write_weights(weights: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Write whole weights, which all processes have, into a model's own of the same names."""
    for name, value in weights.items():
        with gathered([value], modified=True):
            new = whole[name].to(value.device, value.dtype)
            if isinstance(value, DTensor):
                new = distribute_tensor(new, value.device_mesh, value.placements, src_data_rank=None)
            value.copy_(new)


def check_before_loading() -> None:
    """Refuse launch options under which models are loaded in part.

    Raises:
        ValueError: If FSDP is to leave all processes but the first without weights.
    """
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if uses_fsdp and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false in accelerate's config, got true: text encoders and reward models would "
            "have no weights on any process but the first. See examples/accelerate/fsdp2.yaml."
        )


def check_whole(modules: list[torch.nn.Module]) -> None:
    """Refuse models of which transformers has loaded a part only.

    Raises:
        ValueError: If one has empty weights.
    """
    for module in modules:
        if any(parameter.numel() == 0 for parameter in module.parameters()):
            raise ValueError(
                f"model: {type(module).__name__} was loaded while arguments with ZeRO-3 existed, so that this process has no whole "
                "one. Give the model by name, or load the pipeline before TPGRPOConfig is made, or inside "
                "trl_tpgrpo.policies.sharding.without_zero3()."
            )


def check_data_loading(accelerator: Accelerator) -> None:
    """Refuse ways of giving processes their rows under which groups or collective calls would not fit together.

    Raises:
        ValueError: If one is set.
    """
    wrong = {
        "split_batches": (accelerator.split_batches, "batches are those of a process"),
        "dispatch_batches": (
            accelerator.dispatch_batches,
            "rows hold strings, which processes cannot send each other",
        ),
        "even_batches=False": (not accelerator.even_batches, "processes would predict unequally often in evaluations"),
    }
    for name, (is_set, reason) in wrong.items():
        if is_set:
            raise ValueError(f"accelerator_config: {name} is not supported, {reason}. Leave it out.")


def check_sharding(
    accelerator: Accelerator, model: torch.nn.Module, reference: torch.nn.Module | None, args: TPGRPOConfig
) -> None:
    """Refuse what cannot be sharded, or need not be.

    Args:
        accelerator: Of the run.
        model: What is trained: a `PeftModel`, or a transformer with all its weights.
        reference: The frozen copy, if there is one.
        args: The settings.

    Raises:
        ValueError: With the setting and what to do.
    """
    fsdp, stage = fsdp_plugin(accelerator), zero_stage(accelerator)
    if fsdp is None and stage == 0:
        return
    kind = f"DeepSpeed ZeRO-{stage}" if stage else "FSDP"
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"fsdp_version must be 2, got {fsdp.fsdp_version}: see examples/accelerate/fsdp2.yaml.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"quantization: a quantised transformer is not sharded by {kind}; it fits whole on each device, and its adapter is "
            "small. Use examples/accelerate/multi_gpu.yaml."
        )
    if args.compile_backend is not None:
        raise ValueError(f"compile_backend has not been made to work under {kind}: leave it out, or use DDP.")
    if fsdp is not None and reference is not None and args.offload_reference:
        raise ValueError("offload_reference: FSDP shards the reference, which cannot be moved then. Leave it out.")
    if (fsdp is not None or stage == 3) and args.rollout_batch_size is None:
        raise ValueError(
            f"per_device_rollout_batch_size='auto' tries batches until memory runs out, and under {kind} the processes wait for "
            "each other: set a number."
        )
    if stage == 3 and args.ema_decay is not None and not isinstance(model, PeftModel):
        raise ValueError(
            "ema_decay: under DeepSpeed ZeRO-3 each process would hold the whole average of all weights. Set ema_decay to None, "
            "pass a peft_config, or use FSDP2, which shards the average too."
        )


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP, if it is used."""
    return getattr(accelerator.state, "fsdp_plugin", None)


def zero_stage(accelerator: Accelerator) -> int:
    """Of DeepSpeed; 0 without it."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


def uses_deepspeed() -> bool:
    """Whether there are arguments with DeepSpeed, which casts what it trains to the precision of the run."""
    return deepspeed_integration.deepspeed_config() is not None


def prepare_for_sharding(
    accelerator: Accelerator, model: torch.nn.Module, reference: torch.nn.Module | None, dtype: torch.dtype
) -> torch.nn.Module | None:
    """Make `model` ready for FSDP or DeepSpeed to take, and return the reference as it is to be used beside it.

    FSDP2 shards the reference too. DeepSpeed does not: each process has a whole one.

    Args:
        accelerator: Of the run.
        model: What is trained.
        reference: Its frozen copy, or `None`.
        dtype: In which DeepSpeed computes.
    """
    if fsdp_plugin(accelerator) is not None:
        for module in (model, reference):
            if module is not None:
                _compute_as_unsharded(accelerator, module)
        return reference and fsdp2_prepare_model(accelerator, reference)
    if reference is not None and zero_stage(accelerator):
        for parameter in reference.parameters():  # and not the buffers, as DeepSpeed does with what is trained
            parameter.data = parameter.data.to(dtype)
    return reference


def _compute_as_unsharded(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Let FSDP2 leave precision to autocast, as it is without FSDP.

    Its own policy would cast every input to bfloat16, also the timesteps, of which that has every fourth at most from 512 on.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    forward = model.forward

    @functools.wraps(forward)
    def forward_in_autocast(*args: object, **kwargs: object) -> object:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = forward_in_autocast


def prepare_to_evaluate(trainer: Trainer) -> None:
    """Before any training, shard the weights; transformers would prepare them for inference, after which neither could train.

    Raises:
        ValueError: Under DeepSpeed, whose engine is made for one training.
    """
    if trainer.is_fsdp_enabled and not isinstance(trainer.model, FSDPModule):
        trainer.create_optimizer()  # FSDP2 takes both or none
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None:
        raise ValueError(
            "evaluate() before train() is not possible under DeepSpeed: set eval_on_start=True, or evaluate without DeepSpeed."
        )
