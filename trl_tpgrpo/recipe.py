"""The settings of a run as a recipe for `trl-tpgrpo train --config`: what differs from the defaults, and nothing private."""

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig


PERSONAL = {
    "push_to_hub",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "resume_from_checkpoint",
    "ddp_find_unused_parameters",
    "local_rank",
}
"""Not of the method but of who ran it, like all `hub_*` and `trackio_*`."""

LOCAL = object()
"""In place of a value that means something on one machine only."""

HEADER = """# The settings of this run that differ from the defaults.
# trl-tpgrpo train --config recipe.yaml --output_dir FOLDER
"""


def to_yaml(settings: dict[str, Any]) -> str:
    """The recipe, which names what was left out because only the machine of the run has it."""
    kept = {name: _portable(value, name) for name, value in settings.items() if not _is_personal(name)}
    local = sorted(name for name, value in kept.items() if value is LOCAL)
    header = HEADER + (
        f"# To be given, as the run had folders or functions of its own: {', '.join(local)}\n" if local else ""
    )
    shared = {name: value for name, value in kept.items() if value is not LOCAL}
    return header + yaml.safe_dump(shared, sort_keys=False, allow_unicode=True, width=120)


def settings_of_run(
    given: dict[str, Any],
    base_model: str | None,
    adapter: LoraConfig | None,
    reward_funcs: dict[str, list[Callable]],
    dataset_name: str | None,
) -> dict[str, Any]:
    """The options of the command line that would train as a run does that was set up in Python.

    Args:
        given: The settings of its config.
        base_model: A Hub id; `None`: only this machine has it.
        adapter: What is trained; `None`: all weights.
        reward_funcs: By option, the functions.
        dataset_name: A Hub id; `None`: unknown.
    """
    settings: dict[str, Any] = {
        "model_name_or_path": base_model or LOCAL,
        "dataset_name": dataset_name or LOCAL,
        **{option: _import_paths(functions) for option, functions in reward_funcs.items() if functions},
    }
    if adapter is not None:
        settings |= {"use_peft": True, "lora_r": adapter.r, "lora_alpha": adapter.lora_alpha}
        targets = adapter.target_modules
        settings["lora_target_modules"] = targets if isinstance(targets, str) else sorted(targets or [])
        settings |= {name: True for name in ("use_rslora", "use_dora") if getattr(adapter, name)}
    return settings | given


def is_local(name: str) -> bool:
    """Whether a name of a model or dataset means something on this machine only."""
    return os.path.isabs(name) or name.startswith((".", "~")) or ("/" in name and Path(name).exists())


def _is_personal(name: str) -> bool:
    return name in PERSONAL or name.startswith(("hub_", "trackio_")) or name.endswith(("_dir", "token"))


def _portable(value: Any, name: str) -> Any:
    """`value` as YAML can write it, without tokens and paths."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path) or (
        isinstance(value, str) and (is_local(value) or name in ("deepspeed", "fsdp_config"))
    ):
        return LOCAL
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        items = {key: _portable(item, str(key)) for key, item in value.items() if not _is_personal(str(key))}
        return {key: item for key, item in items.items() if item is not LOCAL and item is not None}
    if isinstance(value, list | tuple | set):
        items_of_list = [_portable(item, name) for item in value]
        return LOCAL if LOCAL in items_of_list else items_of_list
    return value


def _import_paths(functions: list[Callable]) -> Any:
    """Where reward functions are imported from, if all are at the top of a module that has a name."""
    paths = [
        f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', '<')}" for function in functions
    ]
    return LOCAL if any("<" in path or path.startswith(("__main__.", "None.")) for path in paths) else paths
