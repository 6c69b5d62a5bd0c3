"""Valid values of settings, inherited ones too: types from annotations, and limits."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from enum import EnumType
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig

from ..algorithm.credit import SCALES
from .fields import field_limits, is_within


TYPES: dict[str, tuple] = {
    "accelerator_config": (AcceleratorConfig, dict, str, NoneType), "credit": (str, Callable),
    "debug": (str, list[DebugOption], NoneType), "fsdp": (bool, str, list[str], NoneType),
    "max_grad_norm": (float, NoneType), "model_init_kwargs": (dict, str, NoneType),
    "noise_level": (float, list[float]), "policy_class": (str, Callable, NoneType), "report_to": (str, list[str]),
    "resume_from_checkpoint": (str, bool, NoneType), "scale_rewards": (str, bool),
}  # fmt: skip
"""Types of fields that accept other types than their annotations."""

MAY_BE_INFINITE = ("epsilon", "epsilon_high", "kl_mask_threshold", "max_grad_norm")  # for no limit
MAY_BE_FILES = ("accelerator_config", "deepspeed", "fsdp_config")  # of JSON
LIMITS: dict[str, Any] = {
    "adam_beta1": "at least 0 and below 1", "adam_beta2": "at least 0 and below 1", "adam_epsilon": "at least 0",
    "data_seed": "at least 0 and below 4294967296", "dataloader_num_workers": "at least 0",
    "dataloader_prefetch_factor": "at least 1", "ddp_bucket_cap_mb": "at least 1",
    "ddp_timeout": "at least 1 and at most 1000000000", "debug": tuple(option.value for option in DebugOption),
    "eval_accumulation_steps": "at least 1", "eval_delay": "at least 0", "eval_steps": "at least 0",
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
    "label_smoothing_factor": "at least 0 and at most 1", "max_grad_norm": "at least 0", "max_steps": "at least -1",
    "num_train_epochs": "above 0", "report_to": ("all", "none", *INTEGRATION_TO_CALLBACK), "save_steps": "at least 0",
    "scale_rewards": SCALES, "seed": "at least 0 and below 4294967296", "torch_empty_cache_steps": "at least 1",
    "warmup_ratio": "at least 0 and at most 1", "warmup_steps": "at least 0",
}  # fmt: skip
"""Limits in addition to those in annotations: of inherited fields, and with other words of the command line."""

TITLES: dict[Any, str] = {
    bool: "True or False", int: "an integer", float: "a finite number", str: "a string", dict: "a dict",
    Callable: "a function", NoneType: "None",
}  # fmt: skip


def field_types(config: type) -> dict[str, tuple]:
    """Return the types that the fields of a settings dataclass accept."""
    hints = get_type_hints(config)
    own = {name: get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,) for name, kind in hints.items()}
    return {item.name: TYPES.get(item.name, own[item.name]) for item in fields(config)}


def all_limits(config: type) -> dict[str, Any]:
    """Return the limits of the fields of a settings dataclass: a tuple of choices, or bounds."""
    types = [(name, kind) for name, kinds in field_types(config).items() for kind in kinds]
    enums: dict[str, Any] = {name: kind for name, kind in types if isinstance(kind, EnumType)}
    values = {name: tuple(option.value for option in kind) for name, kind in enums.items()}
    choices = {item.name: tuple(item.metadata["choices"]) for item in fields(config) if "choices" in item.metadata}
    limits = values | choices | LIMITS | field_limits(config)
    return {name: limits[name] for name in field_types(config) if name in limits}


def check_types(config: Any) -> None:
    """Raise a `ValueError` for a value of a wrong type; convert numpy scalars, tuples and paths to Python types."""
    for name, types in field_types(type(config)).items():
        given = getattr(config, name)
        value, most = _plain(given), math.inf if name in MAY_BE_INFINITE else sys.float_info.max
        if not any(_is_of(value, kind, most) for kind in types):
            is_secret = name.endswith("_token") or name == "model_init_kwargs"
            shown = f"something of the type {type(given).__name__}" if is_secret else f"{given!r:.200}"
            raise ValueError(f"{name} must be {_allowed(config, name)}, got {shown}.")
        if name in config._VALID_DICT_FIELDS:
            _check_dict(name, value)
        setattr(config, name, value)


def check_limits(config: Any) -> None:
    """Raise a `ValueError` for a value outside its limits."""
    types = field_types(type(config))
    for name, limit in all_limits(type(config)).items():
        value = getattr(config, name)
        words = value.split() if name == "debug" and isinstance(value, str) else value
        if not is_within(words, limit) and not (value is None and NoneType in types[name]):
            allowed, wrong = (f"one of {limit}", repr(value)) if isinstance(limit, tuple) else (limit, value)
            raise ValueError(f"{name} must be {allowed}, got {wrong}.")


def _allowed(config: Any, name: str) -> str:
    types, limit = field_types(type(config))[name], all_limits(type(config)).get(name)
    titles = " or ".join(map(_title, types))
    return f"one of {limit}" if isinstance(limit, tuple) else f"{titles} ({limit})" if limit else titles


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_of(value: Any, kind: Any, most: float) -> bool:
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is float:
        return type(value) in (int, float) and abs(value) <= most
    if origin is int:
        return type(value) is int and abs(value) < 2**63
    if origin is Literal:
        return any(value is one for one in args)
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, args[0], most) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if isinstance(origin, EnumType):
        return isinstance(value, origin | str)  # checked further by its limits
    return isinstance(value, origin)


def _title(kind: Any) -> str:
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is list:
        return f"a list, each {_title(args[0])}"
    if origin is Literal:
        return " or ".join(map(repr, args))
    return TITLES.get(origin, f"a {origin.__name__}")


def _check_dict(name: str, value: Any) -> None:
    """Raise a `ValueError` for a string that is not a dict in JSON or a file of one, and for unknown keys."""
    try:
        if isinstance(value, str):
            is_json = value.startswith("{")
            if not (is_json or name in MAY_BE_FILES):
                raise ValueError("it does not start with '{'")
            value = json.loads(value if is_json else Path(value).read_text("utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"it contains a {type(value).__name__}")
        if name == "accelerator_config" and isinstance(value, dict):
            AcceleratorConfig(**value)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        what = "a dict in JSON, or a file of it" if name in MAY_BE_FILES else "a dict, or one in JSON"
        raise ValueError(f"{name} must be {what}: {error}.") from error
