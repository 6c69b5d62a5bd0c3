"""From what the user names as the model to the policy and the module that is trained."""

import copy
import json
import types
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, ModelMixin, PipelineQuantizationConfig, TorchAoConfig
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.quantization_config import QuantizationMethod
from peft import LoraConfig, get_peft_model

from .base import FlowPolicy, Guidance
from .flux import FluxPolicy
from .sd3 import SD3Policy
from .sharding import uses_deepspeed


POLICIES = (SD3Policy, FluxPolicy)
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
MOST_COMPILATIONS = 64
"""Compilations of one kind of block: its variants, each with and without gradients, adapter and more than one sample."""


def load_pipeline(
    model: str | Path,
    dtype: str | torch.dtype = torch.float32,
    quantization: str | None = None,
    **model_init_kwargs: Any,
) -> DiffusionPipeline:
    """Load a pipeline from a Hub id or a folder; parts that it was saved without are not asked for.

    Args:
        model: Hub id or folder.
        dtype: dtype of all parts, a torch dtype or its name such as `"bfloat16"`.
        quantization: Quantisation of the transformer: `"nf4"` (bitsandbytes), `"int8"` or `"fp8"` (torchao, weights only).
        **model_init_kwargs: Arguments for `DiffusionPipeline.from_pretrained`.

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
    hub_kwargs = {key: model_init_kwargs[key] for key in HUB_OPTIONS if key in model_init_kwargs}
    parts = DiffusionPipeline.load_config(str(model), **hub_kwargs)
    absent = {name: None for name, part in parts.items() if isinstance(part, list) and part == [None, None]}
    if quantization is not None:
        if "quantization_config" in model_init_kwargs:
            raise ValueError("quantization and a quantization_config in model_init_kwargs exclude each other.")
        mapping = {"transformer": _quantization_config(quantization, dtype)}
        model_init_kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
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


def load_policy(model: str | Path | DiffusionPipeline, args: Any, use_lora: bool) -> FlowPolicy:
    """Build the policy of a pipeline, loading it if it is given by name, with all but the transformer frozen.

    Args:
        model: Hub id, folder, or pipeline.
        args: Settings of the run, a `TPGRPOConfig`.
        use_lora: Whether an adapter is trained, and not all weights.

    Raises:
        TypeError: If `model` is neither a name nor a pipeline.
        ValueError: If it is a pipeline and `model_init_kwargs` or `quantization` are given too, or it is quantised by
            LLM.int8.
    """
    if isinstance(model, DiffusionPipeline):
        for name in ("model_init_kwargs", "quantization"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} is for a model given by name; this one is loaded already.")
        pipeline = model
    elif isinstance(model, str | Path):
        dtype = run_dtype(args) if use_lora else torch.float32  # weights that are trained need the precision
        if args.quantization is not None and dtype == torch.float32:
            dtype = torch.bfloat16  # for what is not quantised; the quantisers know no other
        kwargs = {"dtype": dtype, "quantization": args.quantization, **(args.model_init_kwargs or {})}
        pipeline = load_pipeline(model, **kwargs)
    else:
        raise TypeError(f"model must be a Hub id, a folder or a diffusers pipeline, got {type(model).__name__}.")
    policy = build_policy(pipeline, Guidance(**{name: getattr(args, name) for name in Guidance.__dataclass_fields__}))
    if uses_deepspeed():
        policy.dtype = run_dtype(args)
    if getattr(pipeline.transformer, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES:
        if pipeline.transformer.config.quantization_config.load_in_8bit:
            raise ValueError(
                "LLM.int8 is refused: its layers compute otherwise in training than in evaluation, so that the policy "
                "that is trained is not the one that sampled. Use quantization='int8' (torchao, weights only) or 'nf4'."
            )
    for module in policy.frozen_modules():
        module.requires_grad_(False).eval()
    if args.vae_slicing:
        pipeline.vae.enable_slicing()
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    return policy


def run_dtype(args: Any) -> torch.dtype:
    """Return the dtype in which the run computes."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def prepare_transformer(
    policy: FlowPolicy, peft_config: LoraConfig | None, args: Any
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """Return the model to train and, where no adapter can be switched off and `beta` is above 0, its frozen copy.

    Args:
        policy: Policy whose transformer is trained.
        peft_config: Config of the adapter; `None`: all weights are trained.
        args: Settings of the run, a `TPGRPOConfig`.

    Raises:
        ValueError: If all weights are to be trained in half precision or quantised, the adapter cannot be trained, or an
            option has no effect on this model.
    """
    transformer = policy.pipeline.transformer
    transformer._internal_dict.__class__ = TrainerConfig
    transformer.activation_checkpointing_enable = types.MethodType(_activation_checkpointing_enable, transformer)
    if args.attention_backend is not None:
        _set_attention_backend(transformer, args.attention_backend)
    if peft_config is None:
        model, reference = _train_all_weights(transformer, needs_reference=args.beta > 0)
    else:
        if args.offload_reference:
            raise ValueError(
                "offload_reference is for full fine-tuning: with peft_config the reference is the model without its "
                "adapter."
            )
        peft_config = checked_peft_config(peft_config, policy.lora_target_modules)
        transformer.requires_grad_(False)
        model, reference = get_peft_model(transformer, peft_config), None
    if args.compile_backend is not None:
        for module in (transformer, reference):
            if module is not None:
                compile_blocks(module, policy.repeated_blocks, args.compile_backend)
    return model, reference


def _train_all_weights(transformer: ModelMixin, needs_reference: bool) -> tuple[ModelMixin, ModelMixin | None]:
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


def checked_peft_config(peft_config: LoraConfig, default_targets: list[str]) -> LoraConfig:
    """Return a copy of `peft_config` that trains `default_targets` if it names no modules.

    Raises:
        TypeError: If it is no LoRA.
        ValueError: If it is for another kind of model, has dropout, or trains what diffusers' adapters do not hold.
    """
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}.")
    holds_lora_only = "diffusers' adapters hold LoRA weights only"
    limits: dict[str, tuple[tuple, str, str]] = {
        "task_type": ((None,), "None", "it is for language models"),
        "lora_dropout": ((0,), "0", "with dropout the policy that is trained is not the one that sampled"),
        "init_lora_weights": (
            (True, False, "gaussian"),
            "True, False or 'gaussian'",
            "the others change the base weights, which are the reference and are not saved",
        ),
        "bias": (("none",), "'none'", holds_lora_only),
        "modules_to_save": ((None,), "None", holds_lora_only),
    }
    for name, (allowed, right, reason) in limits.items():
        value = getattr(peft_config, name)
        if value not in allowed:
            raise ValueError(f"peft_config.{name} must be {right}, got {value!r}: {reason}.")
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = default_targets
    return peft_config


def check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a user's optimizer that would train nothing.

    Raises:
        ValueError: If none of its parameters is trained.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    if groups and not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        raise ValueError(
            "optimizers: none of the optimizer's parameters is trained. The weights of an adapter exist only since "
            "peft_config was applied: choose the optimizer by args.optim."
        )


def compile_blocks(model: ModelMixin, names: tuple[str, ...], backend: str) -> None:
    """Compile the blocks of `model`, for batches of any size and with and without gradients and adapter.

    A block that is compiled once too often is an error instead of running slowly.
    """
    torch._dynamo.config.recompile_limit = MOST_COMPILATIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in model.modules():
        if type(block).__name__ in names:
            block.compile(backend=backend, dynamic=True)


def _set_attention_backend(transformer: ModelMixin, name: str) -> None:
    try:
        transformer.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"attention_backend={name!r} cannot be used here: {error}") from error
    processors = {type(processor).__name__: processor for processor in transformer.attn_processors.values()}
    ignoring = [kind for kind, processor in processors.items() if not hasattr(processor, "_attention_backend")]
    if ignoring:
        raise ValueError(
            f"attention_backend={name!r} has no effect on {type(transformer).__name__}: diffusers' "
            f"{', '.join(ignoring)} always uses PyTorch's own choice. Leave it out."
        )


class TrainerConfig(FrozenDict):
    """A diffusers config with the two methods that transformers' logging callbacks call on `model.config`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entries."""
        return dict(self)

    def to_json_string(self) -> str:
        """Return the entries as JSON."""
        return json.dumps(dict(self), indent=2, default=str) + "\n"


def _activation_checkpointing_enable(
    transformer: ModelMixin,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Switch on diffusers' checkpointing, under the name by which transformers' Trainer calls it."""
    if every_n_layers != 1 or offload:
        raise ValueError(
            "activation_checkpointing_kwargs: every_n_layers and offload are not available for diffusers models, got "
            f"every_n_layers={every_n_layers}, offload={offload}."
        )
    kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    transformer.enable_gradient_checkpointing(
        lambda block, *inputs: torch.utils.checkpoint.checkpoint(block.__call__, *inputs, **kwargs)
    )
