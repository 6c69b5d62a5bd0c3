"""From what the user names as the model to the policy and the module that is trained."""

import copy
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model

from .checks import checked_peft_config
from .compat import adapt_for_trainer
from .config import TPGRPOConfig
from .policies import FlowPolicy, Guidance, build_policy, load_pipeline


def load_policy(model: str | Path | DiffusionPipeline, args: TPGRPOConfig, use_lora: bool) -> FlowPolicy:
    """The policy of a pipeline, loaded if it is given by name, with all but the transformer frozen.

    Raises:
        TypeError: If `model` is neither a name nor a pipeline.
        ValueError: If it is a pipeline and `model_init_kwargs` are given too.
    """
    if isinstance(model, DiffusionPipeline):
        if args.model_init_kwargs is not None:
            raise ValueError("model_init_kwargs is for a model given by name; this one is loaded already.")
        pipeline = model
    elif isinstance(model, str | Path):
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        dtype = half if use_lora else torch.float32  # weights that are trained need the precision
        pipeline = load_pipeline(model, **{"dtype": dtype, **(args.model_init_kwargs or {})})
    else:
        raise TypeError(f"model must be a Hub id, a folder or a diffusers pipeline, got {type(model).__name__}.")
    names = ("height", "width", "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length")
    policy = build_policy(pipeline, Guidance(**{name: getattr(args, name) for name in names}))
    for module in policy.frozen_modules():
        module.requires_grad_(False).eval()
    return policy


def prepare_transformer(
    policy: FlowPolicy, peft_config: LoraConfig | None, beta: float
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The model to train, and for the KL divergence a frozen copy, unless there is an adapter that can be switched off.

    Raises:
        ValueError: If all weights are to be trained in half precision, or the adapter cannot be trained.
    """
    transformer = policy.pipeline.transformer
    adapt_for_trainer(transformer)
    if peft_config is None:
        if transformer.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"Without peft_config all weights are trained, in their own dtype, and {transformer.dtype} has not the "
                "precision for that: load the model in float32 (bf16=True still computes in bfloat16)."
            )
        transformer.requires_grad_(True)
        reference = copy.deepcopy(transformer).requires_grad_(False).eval() if beta > 0 else None
        return transformer, reference
    peft_config = checked_peft_config(peft_config, policy.lora_target_modules)
    transformer.requires_grad_(False)
    return get_peft_model(transformer, peft_config), None
