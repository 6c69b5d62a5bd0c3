"""What transformers' Trainer asks of a model and a diffusers model does not have."""

import json
import types
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict


class TrainerConfig(FrozenDict):
    """A diffusers config with the two methods that transformers' logging callbacks call on `model.config`."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, default=str) + "\n"


def adapt_for_trainer(transformer: ModelMixin) -> None:
    """Give a diffusers model the config methods and the activation checkpointing hook that the Trainer calls."""
    transformer._internal_dict.__class__ = TrainerConfig
    transformer.activation_checkpointing_enable = types.MethodType(_activation_checkpointing_enable, transformer)


def _activation_checkpointing_enable(
    transformer: ModelMixin,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    if every_n_layers != 1 or offload:
        raise ValueError(
            "activation_checkpointing_kwargs: every_n_layers and offload are not available for diffusers models, got "
            f"every_n_layers={every_n_layers}, offload={offload}."
        )
    kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    transformer.enable_gradient_checkpointing(
        lambda block, *inputs: torch.utils.checkpoint.checkpoint(block.__call__, *inputs, **kwargs)
    )
