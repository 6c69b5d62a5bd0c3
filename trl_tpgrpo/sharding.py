"""Weights of which each process holds a part: under FSDP2 all of them, under ZeRO-3 likewise.

What is here is called by all processes at once, and does nothing special where the weights are whole. ZeRO-1 and ZeRO-2 share
out optimizer states and gradients only.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers.integrations.deepspeed as deepspeed_integration
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


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


def check_sharding(accelerator: Accelerator, transformer: torch.nn.Module, is_adapter: bool, **options: bool) -> None:
    """Refuse what cannot be sharded, or need not be.

    Args:
        accelerator: Of the run.
        transformer: That of the pipeline.
        is_adapter: Whether an adapter is trained, and not all weights.
        options: Of the config, those that are set to something: `offload_reference`, `compile_backend`, `ema_decay`.

    Raises:
        ValueError: With the option and what to do.
    """
    fsdp, stage = getattr(accelerator.state, "fsdp_plugin", None), zero_stage(accelerator)
    if fsdp is None and stage == 0:
        return
    kind = f"DeepSpeed ZeRO-{stage}" if stage else "FSDP"
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"fsdp_version must be 2, got {fsdp.fsdp_version}: see examples/accelerate/fsdp2.yaml.")
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError(
            f"A quantised transformer is not sharded by {kind}: it fits whole on each device, and what its adapter adds is small. "
            "Use examples/accelerate/multi_gpu.yaml."
        )
    if fsdp is not None and options["offload_reference"]:
        raise ValueError("offload_reference: FSDP shards the reference, which cannot be moved then. Leave it out.")
    if options["compile_backend"]:
        raise ValueError(f"compile_backend has not been made to work under {kind}: leave it out, or use DDP.")
    if stage == 3 and options["ema_decay"] and not is_adapter:
        raise ValueError(
            "ema_decay: under DeepSpeed ZeRO-3 each process would hold the whole average of all weights. Set ema_decay to None, "
            "pass a peft_config, or use FSDP2, which shards the average too."
        )


def zero_stage(accelerator: Accelerator) -> int:
    """Of DeepSpeed; 0 without it."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


def compute_as_unsharded(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Let FSDP2 leave precision to autocast, as without FSDP.

    Its own policy would cast every input to bfloat16, also the timesteps, of which only every fourth or so has a number there.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    forward = model.forward

    def forward_in_autocast(*args: object, **kwargs: object) -> object:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = forward_in_autocast


def shard_reference(accelerator: Accelerator, reference: torch.nn.Module) -> torch.nn.Module:
    """Shard a frozen model under FSDP2 as the one that is trained."""
    compute_as_unsharded(accelerator, reference)
    return fsdp2_prepare_model(accelerator, reference)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has been applied."""
    return isinstance(model, FSDPModule)
