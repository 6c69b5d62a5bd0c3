"""From what the user names as the model to the policy and the module that is trained."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, ModelMixin, PipelineQuantizationConfig, TorchAoConfig
from diffusers.quantizers.quantization_config import QuantizationMethod
from peft import LoraConfig, get_peft_model

from ..checks import checked_peft_config
from ..config import TPGRPOConfig
from .base import FlowPolicy, Guidance
from .compat import adapt_for_trainer
from .flux import FluxPolicy
from .sd3 import SD3Policy
from .sharding import check_whole, uses_deepspeed, without_zero3


POLICIES = (SD3Policy, FluxPolicy)
LLM_INT8 = (
    "LLM.int8 is refused: its layers compute otherwise in training than in evaluation, so that the policy that is trained is "
    "not the one that sampled. Use "
    "quantization='int8' (torchao, weights only) or 'nf4'."
)


def load_policy(model: str | Path | DiffusionPipeline, args: TPGRPOConfig, use_lora: bool) -> FlowPolicy:
    """The policy of a pipeline, loaded if it is given by name, with all but the transformer frozen.

    Raises:
        TypeError: If `model` is neither a name nor a pipeline.
        ValueError: If it is a pipeline and `model_init_kwargs` or `quantization` are given too, or it is quantised by LLM.int8.
    """
    of_run = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if isinstance(model, DiffusionPipeline):
        if args.model_init_kwargs is not None:
            raise ValueError("model_init_kwargs is for a model given by name; this one is loaded already.")
        if args.quantization is not None:
            raise ValueError("quantization is for a model given by name; this one is loaded already.")
        pipeline = model
    elif isinstance(model, str | Path):
        dtype = of_run if use_lora else torch.float32  # weights that are trained need the precision
        if args.quantization is not None and dtype == torch.float32:
            dtype = torch.bfloat16  # what is not quantised; the quantisers know no other
        kwargs = {"dtype": dtype, "quantization": args.quantization, **(args.model_init_kwargs or {})}
        with without_zero3():
            pipeline = load_pipeline(model, **kwargs)
    else:
        raise TypeError(f"model must be a Hub id, a folder or a diffusers pipeline, got {type(model).__name__}.")
    names = ("height", "width", "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length")
    policy = build_policy(pipeline, Guidance(**{name: getattr(args, name) for name in names}))
    if uses_deepspeed():
        policy.dtype = of_run
    if getattr(pipeline.transformer, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES:
        if pipeline.transformer.config.quantization_config.load_in_8bit:
            raise ValueError(LLM_INT8)
    check_whole(policy.frozen_modules())
    for module in policy.frozen_modules():
        module.requires_grad_(False).eval()
    if args.vae_slicing:
        pipeline.vae.enable_slicing()
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    return policy


def prepare_transformer(
    policy: FlowPolicy, peft_config: LoraConfig | None, args: TPGRPOConfig
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The model to train, and for the KL divergence a frozen copy, unless there is an adapter that can be switched off.

    Raises:
        ValueError: If all weights are to be trained in half precision or quantised, the adapter cannot be trained, or an
            option has no effect on this model.
    """
    transformer = policy.pipeline.transformer
    adapt_for_trainer(transformer)
    if args.attention_backend is not None:
        _set_attention_backend(transformer, args.attention_backend)
    if peft_config is None:
        model, reference = _all_weights(transformer, args.beta > 0)
    else:
        if args.offload_reference:
            raise ValueError(
                "offload_reference is for full fine-tuning: with peft_config the reference is the model without its adapter."
            )
        peft_config = checked_peft_config(peft_config, policy.lora_target_modules)
        transformer.requires_grad_(False)
        model, reference = get_peft_model(transformer, peft_config), None
    if args.compile_backend is not None:
        policy.compile(transformer, args.compile_backend)
        if reference is not None:
            policy.compile(reference, args.compile_backend)
    return model, reference


def _all_weights(transformer: ModelMixin, needs_reference: bool) -> tuple[ModelMixin, ModelMixin | None]:
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError("A quantised transformer cannot be trained itself: pass a peft_config to train an adapter.")
    if transformer.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"Without peft_config all weights are trained, in their own dtype, and {transformer.dtype} has not the "
            "precision for that: load the model in float32 (bf16=True still computes in bfloat16)."
        )
    transformer.requires_grad_(True)
    reference = copy.deepcopy(transformer).requires_grad_(False).eval() if needs_reference else None
    return transformer, reference


def _set_attention_backend(transformer: ModelMixin, name: str) -> None:
    try:
        transformer.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"attention_backend={name!r} cannot be used here: {error}") from error
    processors = {type(processor).__name__: processor for processor in transformer.attn_processors.values()}
    deaf = [kind for kind, processor in processors.items() if not hasattr(processor, "_attention_backend")]
    if deaf:
        raise ValueError(
            f"attention_backend={name!r} has no effect on {type(transformer).__name__}: diffusers' {', '.join(deaf)} always uses "
            "PyTorch's own choice. Leave it out."
        )


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
