"""Model families: what differs between SD3 and FLUX, and nothing else."""

from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig

from .base import LORA_FILE, TRANSFORMER_FOLDER, Conditioning, FlowPolicy, Guidance, Schedule, to_images
from .flux import FluxPolicy
from .sd3 import SD3Policy


__all__ = [
    "Conditioning",
    "FlowPolicy",
    "FluxPolicy",
    "Guidance",
    "LORA_FILE",
    "POLICIES",
    "SD3Policy",
    "Schedule",
    "TRANSFORMER_FOLDER",
    "build_policy",
    "load_pipeline",
    "to_images",
]

POLICIES = (SD3Policy, FluxPolicy)


def load_pipeline(
    model: str | Path,
    dtype: str | torch.dtype = torch.float32,
    quantization: str | None = None,
    **model_init_kwargs: Any,
) -> DiffusionPipeline:
    """Load a pipeline from a Hub id or a folder; parts that it was saved without are not asked for.

    Args:
        model: Hub id or folder.
        dtype: Of all parts, a torch dtype or its name such as `"bfloat16"`.
        quantization: Of the transformer: `"nf4"` (bitsandbytes), `"int8"` or `"fp8"` (torchao, weights only).
        **model_init_kwargs: For `DiffusionPipeline.from_pretrained`.

    Raises:
        ImportError: If the package that quantises is not installed.
        ValueError: If `dtype` is no name of a torch dtype, or given as `torch_dtype`, or a quantization is given twice.
        OSError: If there is no such model.
    """
    if "torch_dtype" in model_init_kwargs:
        raise ValueError("model_init_kwargs: write dtype instead of torch_dtype.")
    if isinstance(dtype, str):
        named = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be the name of a torch dtype such as 'bfloat16', got {dtype!r}.")
        dtype = named
    of_hub = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
    hub_kwargs = {key: model_init_kwargs[key] for key in of_hub if key in model_init_kwargs}
    parts = DiffusionPipeline.load_config(str(model), **hub_kwargs)
    absent = {name: None for name, part in parts.items() if isinstance(part, list) and part == [None, None]}
    if quantization is not None:
        if "quantization_config" in model_init_kwargs:
            raise ValueError("quantization and a quantization_config in model_init_kwargs exclude each other.")
        of_transformer = {"transformer": _quantization_config(quantization, dtype)}
        model_init_kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping=of_transformer)
    return DiffusionPipeline.from_pretrained(str(model), dtype=dtype, **{**absent, **model_init_kwargs})


def _quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    if name == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError(
            f"quantization={name!r} needs torchao: pip install 'trl-tpgrpo[torchao]' ({error})."
        ) from error
    return TorchAoConfig(Int8WeightOnlyConfig() if name == "int8" else Float8WeightOnlyConfig())


def build_policy(pipeline: DiffusionPipeline, guidance: Guidance) -> FlowPolicy:
    """Wrap a pipeline in the policy of its family.

    Raises:
        ValueError: If its class is not supported.
    """
    for policy in POLICIES:
        if isinstance(pipeline, policy.pipeline_class):
            return policy(pipeline, guidance)
    supported = ", ".join(policy.pipeline_class.__name__ for policy in POLICIES)
    raise ValueError(f"{type(pipeline).__name__} is not supported. Supported pipeline classes: {supported}.")
