"""Model loading: from the user's model to the policy and the trained module."""

import copy
import json
import logging
import math
import pkgutil
import re
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, ModelMixin, PipelineQuantizationConfig, TorchAoConfig
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import single_file_utils
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.quantizers.quantization_config import QuantizationMethod
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ..testbed import TESTBED
from .base import FlowPolicy, Guidance
from .chroma import ChromaPolicy
from .flux import FluxPolicy
from .flux2 import Flux2KleinPolicy, Flux2Policy
from .kontext import KontextPolicy
from .krea2 import Krea2Policy
from .qwen_image import QwenImagePolicy
from .qwen_image_edit import QwenImageEditPolicy
from .sd3 import SD3Policy
from .weights import whole_file
from .z_image import ZImagePolicy


logger = logging.getLogger(__name__)

POLICIES = (
    SD3Policy, FluxPolicy, KontextPolicy, QwenImagePolicy, QwenImageEditPolicy, ZImagePolicy, Flux2KleinPolicy,
    Flux2Policy, ChromaPolicy, Krea2Policy,
)  # fmt: skip
SINGLE_FILES = ("sd3", "sd35_medium", "sd35_large", "flux-dev", "flux-schnell")  # diffusers' names of originals
DTYPE = "dtype" if Version(version("diffusers")) >= Version("0.40") else "torch_dtype"
"""Argument name in `DiffusionPipeline.from_pretrained`, which ignores other names."""


def load_pipeline(
    model: str | Path,
    dtype: str | torch.dtype = torch.float32,  # of all parts; also by name, such as "bfloat16"
    quantization: str | None = None,  # of the transformer: "nf4" (bitsandbytes), "int8" or "fp8" (torchao)
    **model_init_kwargs: Any,  # for `DiffusionPipeline.from_pretrained`
) -> DiffusionPipeline:
    """Load a pipeline from a Hub id or folder, or the testbed's; optional parts may be missing.

    A `.safetensors` file contains the transformer; the other parts come from the pipeline `config` (Hub id or folder),
    or from the original model on the Hub. Raises `OSError` if there is no such model, `ImportError` if the
    quantization package is not installed, and `ValueError` if a file contains no known transformer.
    """
    if "torch_dtype" in model_init_kwargs:
        raise ValueError("model_init_kwargs: write dtype instead of torch_dtype.")
    torch_dtype = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"dtype must be the name of a torch dtype such as 'bfloat16', got {dtype!r}.")
    if quantization is not None and "quantization_config" in model_init_kwargs:
        raise ValueError("quantization cannot be combined with quantization_config in model_init_kwargs.")
    model = TESTBED if str(model) == "testbed" else model
    if Path(model).is_file():
        if quantization is not None:  # which diffusers ignores for torchao
            remedy = f"save a pipeline with it as a folder, by load_pipeline({str(model)!r}).save_pretrained"
            raise ValueError(f"quantization={quantization!r} needs a folder or Hub id, not a file: {remedy}.")
        base = model_init_kwargs.pop("config", None)
        model, model_init_kwargs["transformer"] = _load_transformer(Path(model), torch_dtype, base)
    if quantization is not None:
        mapping = {"transformer": _quantization_config(quantization, torch_dtype)}
        model_init_kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    parts = DiffusionPipeline.load_config(str(model), **model_init_kwargs)
    if model_init_kwargs.get("trust_remote_code"):
        logger.warning("trust_remote_code: Python code of %s is run.", model)
    else:
        check_classes(parts, model)
    absent = {name: None for name, part in parts.items() if part == [None, None]}
    with whole_file(model):
        return DiffusionPipeline.from_pretrained(str(model), **{DTYPE: torch_dtype, **absent, **model_init_kwargs})


def check_classes(index: dict[str, Any], model: str | Path) -> None:
    """Raise a `ValueError` if a `model_index.json` names classes outside diffusers and transformers."""
    named = {name: part[0] for name, part in index.items() if isinstance(part, list) and len(part) == 2}
    for name, library in named.items():
        is_known = library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, str(library))
        if isinstance(library, str) and not is_known:
            what = f"The model_index.json of {model} names the module {library!r} for its {name}"
            remedy = "build the pipeline in Python and pass it, or set trust_remote_code in model_init_kwargs"
            raise ValueError(f"{what}: only diffusers and transformers are imported. If you trust it, {remedy}.")


def _load_transformer(file: Path, dtype: torch.dtype, base: str | None) -> tuple[str, ModelMixin]:
    """Return the pipeline for the other parts, and the transformer from a file."""
    if file.suffix != ".safetensors":
        remedy = "use the original weights as .safetensors, or a folder with quantization='nf4'"
        raise ValueError(f"{file}: a single file must be .safetensors: {remedy}.")
    if base is None:
        checkpoint = single_file_utils.load_single_file_checkpoint(str(file))
        kind = single_file_utils.infer_diffusers_model_type(checkpoint)
        if kind not in SINGLE_FILES:
            remedy = "set 'config' in model_init_kwargs to its pipeline, a folder or Hub id"
            raise ValueError(f"{file} contains no known transformer ({SINGLE_FILES}): {remedy}.")
        base = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    kind = DiffusionPipeline.load_config(base)["transformer"][1]
    load = getattr(diffusers, kind).from_single_file
    return base, load(str(file), config=base, subfolder="transformer", **{DTYPE: dtype})


def _quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    if name == "nf4":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(load_in_4bit=True, **options)
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        hint = "pip install 'trl-tpgrpo[torchao]'"
        raise ImportError(f"quantization={name!r} needs torchao: {hint} ({error}).") from error
    return TorchAoConfig(Int8WeightOnlyConfig() if name == "int8" else Float8WeightOnlyConfig())


def build_policy(pipeline: DiffusionPipeline, guidance: Guidance, own: str | type | None = None) -> FlowPolicy:
    """Wrap a pipeline in the policy of its family, or in the user's `own`; raise a `ValueError` if there is none."""
    policy = policy_class(pipeline, own)
    if policy is None:
        supported = ", ".join(policy.pipeline_class.__name__ for policy in POLICIES)
        hint = 'For another pipeline, write a policy_class: CONTRIBUTING.md, "Adding a model family"'
        what = f"{type(pipeline).__name__} is not supported. Supported pipeline classes: {supported}"
        raise ValueError(f"{what}. {hint}.")
    _check_as_loaded(pipeline.transformer)
    return policy(pipeline, guidance)


def policy_class(pipeline: DiffusionPipeline, own: str | type | None = None) -> type[FlowPolicy] | None:
    """Return the family of a pipeline, or `None`; or the user's `own` class, if it fits the pipeline."""
    found = own_policy_class(own)
    if found is None:
        return next((policy for policy in POLICIES if isinstance(pipeline, policy.pipeline_class)), None)
    if not isinstance(pipeline, found.pipeline_class):
        what = f"{found.__name__} is for {found.pipeline_class.__name__}"
        raise ValueError(f"policy_class: {what}, and the pipeline is a {type(pipeline).__name__}.")
    return found


def own_policy_class(own: str | type | None) -> type[FlowPolicy] | None:
    """Return the user's policy class; a string is the dotted path found by `TPGRPOConfig`."""
    found = pkgutil.resolve_name(own) if isinstance(own, str) else own
    if found is None:
        return None
    if not (isinstance(found, type) and issubclass(found, FlowPolicy)):
        raise ValueError(f"policy_class must be a subclass of trl_tpgrpo.policies.base.FlowPolicy, got {found!r}.")
    if not isinstance(getattr(found, "pipeline_class", None), type):
        raise ValueError(f"policy_class: {found.__name__} must set pipeline_class to the class of its pipelines.")
    if not isinstance(getattr(found, "default_guidance", None), dict):
        form = "a dict of options of the pipeline, such as {'guidance_scale': 4.5}"
        raise ValueError(f"policy_class: {found.__name__}.default_guidance must be {form}.")
    return found


def _check_as_loaded(transformer: nn.Module) -> None:
    """Raise a `ValueError` for a transformer with changes that break training or saving."""
    modules, is_quantized = dict(transformer.named_modules()), getattr(transformer, "hf_quantizer", None) is not None
    marks = {mark for module in modules.values() for mark, value in vars(module).items() if value is not None}
    is_compiled = "_orig_mod" in modules or "_compiled_call_impl" in marks
    hooks = [vars(module).get("_diffusers_hook") for module in modules.values()]
    for is_wrong, what in (
        (is_compiled, "is compiled (use compile_backend='inductor' instead)"),
        (not isinstance(transformer, ModelMixin), f"is wrapped in {type(transformer).__name__}"),
        (any(name.endswith(("to_qkv", "to_added_qkv")) for name in modules), "had its projections fused"),
        ("_hf_hook" in marks and not is_quantized, "has hooks of accelerate (offloading, a device_map)"),
        (any(one is not None and one.hooks for one in hooks), "has hooks of diffusers (a cache, a cast, offloading)"),
    ):
        if is_wrong:
            raise ValueError(f"The pipeline's transformer {what}: pass the pipeline as it was loaded.")


def load_policy(model: str | Path | DiffusionPipeline, args: Any, use_lora: bool) -> FlowPolicy:
    """Build the policy of a Hub id, folder or pipeline for a `TPGRPOConfig`; freeze all but the transformer.

    NaN or infinite weights are a `ValueError`.
    """
    own_policy_class(args.policy_class)  # before the model is loaded
    if isinstance(model, str | Path):
        dtype = run_dtype(args) if use_lora else torch.float32  # trained weights need the precision
        if args.quantization is not None and dtype == torch.float32:
            dtype = torch.bfloat16  # dtype of the parts that are not quantised
        options = {"dtype": dtype, "quantization": args.quantization, **(args.model_init_kwargs or {})}
        model = load_pipeline(model, **options)
    elif not isinstance(model, DiffusionPipeline):
        raise TypeError(f"model must be a Hub id, a folder or a diffusers pipeline, got {type(model).__name__}.")
    elif given := [name for name in ("model_init_kwargs", "quantization") if getattr(args, name) is not None]:
        raise ValueError(f"{given[0]} needs a model given by name; this one is already loaded.")
    guidance = Guidance(**{name: getattr(args, name) for name in Guidance.__dataclass_fields__})
    policy = build_policy(model, guidance, args.policy_class)
    if policy.is_distilled:
        _check_distilled(policy, args.allow_distilled)
    if args.deepspeed_plugin is not None:
        policy.dtype = run_dtype(args)  # to which DeepSpeed casts trained weights
    for name, part in model.components.items():
        if isinstance(part, nn.Module):
            _check_finite(name, part)
        if isinstance(part, nn.Module) and name != "transformer":
            part.requires_grad_(False).eval()
    if args.vae_slicing:
        model.vae.enable_slicing()
    if args.vae_tiling:
        model.vae.enable_tiling()
    return policy


def _check_finite(part: str, module: nn.Module) -> None:
    """Raise a `ValueError` for the first weight with NaN or infinity (in a VAE: black images)."""
    for name, weight in module.named_parameters():
        is_plain = weight.is_floating_point() and weight.element_size() > 1 and type(weight.data) is Tensor
        if is_plain and weight.numel() and not weight.is_meta:  # others are quantised or sharded
            if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
                what = f"{part}.{name} holds NaN or infinity"
                raise ValueError(f"model: {what}: the file is damaged, or from a run that diverged. Load another one.")


def _check_distilled(policy: FlowPolicy, is_allowed: bool) -> None:
    what = f"{policy.pipeline.config.get('_name_or_path') or 'This model'} is distilled to few steps"
    if not is_allowed:
        remedy = "Train the model from which it was distilled, or set allow_distilled=True"
        raise ValueError(f"{what} (by its config or name). Training undoes that. {remedy}: docs/models.md.")
    logger.warning("%s: expect images to blur within some thousand updates. See docs/models.md.", what)


def run_dtype(args: Any) -> torch.dtype:
    """Return the dtype in which the run computes."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def prepare_transformer(
    policy: FlowPolicy, peft_config: LoraConfig | None, args: Any
) -> tuple[nn.Module, nn.Module | None]:
    """Return the model to train and, if `beta` is above 0 without an adapter, its frozen copy.

    Without a `peft_config`, all weights are trained. `args` is the run's `TPGRPOConfig`.
    """
    transformer, reference = policy.pipeline.transformer, None
    _check_weights(transformer, are_trained=peft_config is None)
    transformer._internal_dict.__class__ = TrainerConfig
    transformer.activation_checkpointing_enable = types.MethodType(_activation_checkpointing_enable, transformer)
    transformer.gradient_checkpointing_enable = types.MethodType(_gradient_checkpointing_enable, transformer)
    torch.backends.cuda.enable_cudnn_sdp(False)  # wrong gradients: docs/troubleshooting.md, "Memory and few GPUs"
    if args.attention_backend is not None:
        _set_attention_backend(transformer, args.attention_backend)
    left_out = unreached_weights(policy)
    if peft_config is None:
        model = transformer.requires_grad_(True)
        for name in left_out:
            transformer.get_parameter(name).requires_grad_(False)
        if left_out:
            _tell_left_out(left_out)
        if args.beta > 0:
            reference = copy.deepcopy(transformer).requires_grad_(False).eval()
    elif args.offload_reference:
        reason = "with peft_config, the reference is the model without its adapter"
        raise ValueError(f"offload_reference is for full fine-tuning: {reason}.")
    else:
        if not hasattr(policy.pipeline, "save_lora_weights"):
            reason = "cannot save adapters in diffusers' format"
            raise ValueError(f"{type(policy.pipeline).__name__} {reason}: leave peft_config out to train all weights.")
        peft_config = checked_peft_config(peft_config, policy.lora_target_modules)
        _exclude(peft_config, {name.rpartition(".")[0] for name in left_out})
        model = get_peft_model(transformer.requires_grad_(False), peft_config)
    if args.compile_backend is not None:
        _compile_blocks([transformer, reference], policy.repeated_blocks, args.compile_backend)
    return model, reference


def unreached_weights(policy: FlowPolicy) -> list[str]:
    """Return the names of weights without gradient, by a backward pass of the architecture on the meta device.

    Some blocks have outputs that are not used: DDP would wait for their gradients. A transformer that reads values of
    its inputs cannot be searched like this: nothing is returned, and the first backward pass names weights without
    gradient.
    """
    transformer, meta = policy.pipeline.transformer, torch.device("meta")
    config = {name: value for name, value in transformer.config.items() if name != "quantization_config"}
    with meta:
        like = type(transformer).from_config(config)
    latents, texts = torch.empty(1, *policy.latent_shape, device=meta), policy.empty_conditioning().to(meta)
    try:
        with torch.enable_grad():
            predicted = policy.predict(like, latents, policy.schedule(2)[0], texts.to(torch.float32))
        predicted.float().sum().backward()
    except (NotImplementedError, RuntimeError) as error:  # because values of meta tensors are read
        logger.info("The search for weights without gradient failed: %s", error)
        return []
    own = dict(transformer.named_parameters())
    return [name for name, value in like.named_parameters() if value.grad is None and name in own]


def _exclude(peft_config: LoraConfig, modules: set[str]) -> None:
    """Exclude modules, by full name, from an adapter, in addition to those that it excludes already."""
    targeted = sorted(name for name in modules if check_target_module_exists(peft_config, name))
    if not targeted:
        return
    _tell_left_out(targeted)
    given = peft_config.exclude_modules or []
    if isinstance(given, str):  # a regular expression
        peft_config.exclude_modules = "|".join([f"({given})", *map(re.escape, targeted)])
    else:
        peft_config.exclude_modules = [*given, *targeted]


def _tell_left_out(names: list[str]) -> None:
    logger.warning("Not trained, because they get no gradient: %s.", ", ".join(names))


def _check_weights(transformer: ModelMixin, are_trained: bool) -> None:
    method = getattr(transformer, "quantization_method", None)
    if method == QuantizationMethod.BITS_AND_BYTES and transformer.config.quantization_config.load_in_8bit:
        reason = "its layers compute differently in training than in rollouts, so it is another policy"
        raise ValueError(f"LLM.int8 is not supported: {reason}. Use quantization='int8' (torchao) or 'nf4'.")
    if are_trained and getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError("Quantised weights cannot be trained: pass a peft_config to train an adapter.")
    if are_trained and transformer.dtype in (torch.float16, torch.bfloat16):
        reason = f"in their dtype, and the precision of {transformer.dtype} is too low"
        remedy = "load the model in float32 (bf16=True still computes in bfloat16)"
        raise ValueError(f"Without peft_config, all weights are trained {reason}: {remedy}.")


def checked_peft_config(peft_config: LoraConfig, default_targets: list[str]) -> LoraConfig:
    """Return a checked copy of `peft_config`, with `default_targets` if it names no modules."""
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}.")
    base_weights = "other methods change the base weights, which are the reference and are not saved"
    limits: dict[str, tuple[tuple, str, str]] = {
        "task_type": ((None,), "None", "it is for language models"),
        "lora_dropout": ((0,), "0", "with dropout, the trained policy is not the sampled one"),
        "init_lora_weights": ((True, False, "gaussian"), "True, False or 'gaussian'", base_weights),
        "bias": (("none",), "'none'", "diffusers' adapters contain LoRA weights only"),
        "modules_to_save": ((None,), "None", "diffusers' adapters contain LoRA weights only"),
    }
    for name, (allowed, right, reason) in limits.items():
        value = getattr(peft_config, name)
        if value not in allowed:
            raise ValueError(f"peft_config.{name} must be {right}, got {value!r}: {reason}.")
    for alpha in (peft_config.lora_alpha, *peft_config.alpha_pattern.values()):
        if not 0 < alpha < math.inf:
            raise ValueError(f"peft_config.lora_alpha and alpha_pattern must be above 0, got {alpha}.")
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = default_targets
    return peft_config


def check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """Raise a `ValueError` if the user's optimizer would train nothing."""
    groups = [] if optimizer is None else optimizer.param_groups
    if groups and not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        reason = "the adapter's weights are created later, from peft_config"
        raise ValueError(f"optimizers: no parameter of the optimizer is trained ({reason}): use args.optim.")


def _compile_blocks(models: list[ModelMixin | None], names: tuple[str, ...], backend: str) -> None:
    """Compile the blocks of models, for any batch size, with and without gradients and adapter."""
    torch._dynamo.config.recompile_limit = 64  # variants: with and without gradients and adapter, one sample
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of running slowly
    for model in filter(None, models):
        model._repeated_blocks = names  # where diffusers does not know them: SD3
        model.compile_repeated_blocks(backend=backend, dynamic=True)


def _set_attention_backend(transformer: ModelMixin, name: str) -> None:
    if name == "_native_cudnn":
        reason = "cuDNN's gradients are wrong for some strides, as in FLUX's single blocks"
        raise ValueError(f"attention_backend={name!r} is not supported: {reason}. Use '_native_flash' (as fast).")
    try:
        transformer.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"attention_backend={name!r} cannot be used here: {error}") from error
    attentions = [module for module in transformer.modules() if isinstance(module, Attention | AttentionModuleMixin)]
    processors = {type(attention.processor).__name__: attention.processor for attention in attentions}
    if not processors:
        reason = "has no attention processors"
        kind = type(transformer).__name__
        raise ValueError(f"attention_backend={name!r} has no effect: {kind} {reason}. Leave it out.")
    ignoring = [kind for kind, processor in processors.items() if not hasattr(processor, "_attention_backend")]
    if ignoring:
        reason = f"diffusers' {', '.join(ignoring)} always uses PyTorch's choice. Leave it out"
        raise ValueError(f"attention_backend={name!r} has no effect on {type(transformer).__name__}: {reason}.")


class TrainerConfig(FrozenDict):
    """A diffusers config with the two methods of `model.config` that transformers' logging callbacks call."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, default=str) + "\n"


def _activation_checkpointing_enable(
    transformer: ModelMixin,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Switch on diffusers' checkpointing, under the name that transformers' Trainer calls."""
    if every_n_layers != 1 or offload:
        got = f"every_n_layers={every_n_layers}, offload={offload}"
        raise ValueError(f"activation_checkpointing_kwargs: not available for diffusers' models, got {got}.")
    kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    if kwargs["use_reentrant"]:
        reason = "an adapter in a block whose inputs need no gradient would get none"
        raise ValueError(f"activation_checkpointing_kwargs: use_reentrant must be False, got True: {reason}.")
    transformer.enable_gradient_checkpointing(
        lambda block, *inputs: torch.utils.checkpoint.checkpoint(block.__call__, *inputs, **kwargs)
    )


def _gradient_checkpointing_enable(
    transformer: ModelMixin, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> None:
    """Switch it on under the name that transformers calls before 5.23."""
    _activation_checkpointing_enable(transformer, gradient_checkpointing_kwargs)
