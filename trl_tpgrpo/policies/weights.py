"""Trained weights on disk in diffusers' format, whole even if each process holds a part of them (FSDP2)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor


LORA_FILE = "pytorch_lora_weights.safetensors"
UNSCALED_FILE = "unscaled_lora.safetensors"  # unscaled, if dividing by the scale would round
PEFT_PREFIX = "base_model.model."
TRANSFORMER_FOLDER = "transformer"
Model: TypeAlias = ModelMixin | PeftModel


def save_weights(
    model: Model, output_dir: str | Path, pipeline_class: type[DiffusionPipeline], is_main_process: bool = True
) -> None:
    """Save the trained weights; call it on all processes, the main one writes.

    A LoRA is saved as `LORA_FILE`, for `pipeline.load_lora_weights(output_dir)`. Its scale is in the weights and alpha
    is the rank in every layer, so that loaders that ignore alpha make the same model. A full model is saved in the
    folder `transformer`, for `from_pretrained(output_dir, subfolder="transformer")`.
    """
    weights = trained_weights(model)
    if not is_main_process:
        return
    if isinstance(model, PeftModel):
        scales = {name: _scale(model, name) for name in weights}
        scaled = {name: value * scales[name] for name, value in weights.items()}
        layers = {name.removeprefix(PEFT_PREFIX): value for name, value in scaled.items()}
        config = model.peft_config["default"]
        scale_of_1 = {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern, "use_rslora": False}
        metadata = config.to_dict() | scale_of_1
        pipeline_class.save_lora_weights(output_dir, layers, transformer_lora_adapter_metadata=metadata)
        if any(not torch.equal(scaled[name] / scales[name], value) for name, value in weights.items()):
            save_file(weights, Path(output_dir) / UNSCALED_FILE)
        return
    with torch.device("meta"):
        whole = type(model).from_config(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.save_pretrained(Path(output_dir) / TRANSFORMER_FOLDER)


@contextmanager
def whole_file(path: str | Path) -> Iterator[None]:
    """Raise a `ValueError` that names a safetensors file, or its folder, if it is not complete."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: it is empty or incomplete ({error}).") from error


def load_weights(model: Model, input_dir: str | Path) -> None:
    """Load the weights of `save_weights` into the model on all processes; raise if they are absent or do not fit."""
    is_lora = isinstance(model, PeftModel)
    source = Path(input_dir) / (LORA_FILE if is_lora else TRANSFORMER_FOLDER)
    if not source.exists():
        raise FileNotFoundError(f"{input_dir} has no {source.name} with the trained weights of this kind of run.")
    if not is_lora:
        _write(model.state_dict(keep_vars=True), type(model).from_pretrained(source).state_dict())
        return
    parameters = get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()))
    with whole_file(source), safe_open(source, framework="pt") as file:
        saved = {PEFT_PREFIX + name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    if {name: value.shape for name, value in saved.items()} != {name: one.shape for name, one in parameters.items()}:
        raise ValueError(f"The adapter in {input_dir} does not have the layers and ranks of the trained one.")
    config = {name.removeprefix("transformer."): value for name, value in header.items()}
    alphas, ranks = (config["lora_alpha"], config["alpha_pattern"]), (config["r"], config["rank_pattern"])
    if alphas == ranks and not config["use_rslora"]:
        _undo_scale(model, saved, Path(input_dir) / UNSCALED_FILE)
    else:  # of version 0.1.0, with the scale in the header only
        _check_same_scale(model, config, input_dir)
    _write(parameters, saved)


def _scale(model: PeftModel, name: str) -> float:
    """Return the factor for an adapter's tensor, by its name in PEFT, with which its layer's scale is 1."""
    layer, is_second, _ = name.partition(".lora_B.")
    return model.get_submodule(layer).scaling["default"] if is_second else 1.0


def _undo_scale(model: PeftModel, saved: dict[str, Tensor], unscaled_file: Path) -> None:
    """Convert an adapter's tensors to the trained ones, bit-identical if a matching file has them."""
    unscaled = load_file(unscaled_file) if unscaled_file.exists() else {}
    for name, value in saved.items():
        scale = _scale(model, name)
        exact = unscaled.get(name, value / scale)
        saved[name] = exact if torch.equal(exact * scale, value) else value / scale


def _check_same_scale(model: PeftModel, header: dict[str, Any], input_dir: str | Path) -> None:
    for name in ("lora_alpha", "alpha_pattern", "use_rslora"):
        here = getattr(model.peft_config["default"], name)
        if header[name] != here:
            raise ValueError(f"The adapter in {input_dir} has {name}={header[name]}, the trained one has {here}.")


def trained_weights(model: Model) -> dict[str, Tensor]:
    """Collect whole tensors on the main process's CPU (an adapter's, or all with buffers), by their names on disk."""
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
