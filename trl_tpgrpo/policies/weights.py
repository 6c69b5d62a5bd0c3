"""Trained weights on disk in diffusers' format, whole, also where each process holds a part of them (FSDP2)."""

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor


LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_PREFIX = "base_model.model."
TRANSFORMER_FOLDER = "transformer"
Model: TypeAlias = ModelMixin | PeftModel


def save_weights(
    model: Model, output_dir: str | Path, pipeline_class: type[DiffusionPipeline], is_main_process: bool = True
) -> None:
    """Write what was trained; called by all processes, of which the main one writes.

    A LoRA goes to `LORA_FILE`, with its alpha, for `pipeline.load_lora_weights(output_dir)`; all weights go to
    the folder `transformer`, for `from_pretrained(output_dir, subfolder="transformer")`.
    """
    weights = trained_weights(model)
    if not is_main_process:
        return
    if isinstance(model, PeftModel):
        layers = {name.removeprefix(PEFT_PREFIX): value for name, value in weights.items()}
        metadata = model.peft_config["default"].to_dict()
        pipeline_class.save_lora_weights(output_dir, layers, transformer_lora_adapter_metadata=metadata)
        return
    with torch.device("meta"):
        whole = type(model).from_config(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.save_pretrained(Path(output_dir) / TRANSFORMER_FOLDER)


def load_weights(model: Model, input_dir: str | Path) -> None:
    """Read what `save_weights` wrote into the model, in all processes; raise if it is absent or does not fit."""
    is_lora = isinstance(model, PeftModel)
    source = Path(input_dir) / (LORA_FILE if is_lora else TRANSFORMER_FOLDER)
    if not source.exists():
        raise FileNotFoundError(f"{input_dir} holds no {source.name}, the trained weights of this kind of run.")
    if not is_lora:
        _write(model.state_dict(keep_vars=True), type(model).from_pretrained(source).state_dict())
        return
    parameters = get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()))
    with safe_open(source, framework="pt") as file:
        saved = {PEFT_PREFIX + name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}
        saved_alpha = json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"]
    if {name: value.shape for name, value in saved.items()} != {name: one.shape for name, one in parameters.items()}:
        raise ValueError(f"The adapter in {input_dir} does not have the layers and ranks of the one that is trained.")
    alpha = model.peft_config["default"].lora_alpha
    if alpha != saved_alpha:
        raise ValueError(f"The adapter in {input_dir} has lora_alpha={saved_alpha}, the one that is trained {alpha}.")
    _write(parameters, saved)


def trained_weights(model: Model) -> dict[str, Tensor]:
    """Collect whole tensors on the main process's CPU: an adapter's, or all with buffers, by their names on disk."""
    is_lora = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_lora)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    if is_lora and weights:
        weights = get_peft_model_state_dict(model, state_dict=weights)
    return {name: value.contiguous() for name, value in weights.items()}


@torch.no_grad()
def _write(parameters: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Copy whole tensors, which all processes have, into parameters that may be sharded."""
    for name, value in parameters.items():
        new = whole[name].to(value.device, value.dtype)
        if isinstance(value, DTensor):
            new = distribute_tensor(new, value.device_mesh, value.placements, src_data_rank=None)
        value.copy_(new)
