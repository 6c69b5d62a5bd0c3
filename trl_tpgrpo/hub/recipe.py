"""The settings of a run as a file for `trl-tpgrpo train --config`: what is not the default, and nothing private."""

import os
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml


PERSONAL = {"push_to_hub", "report_to", "run_name", "project", "disable_tqdm", "resume_from_checkpoint",
            "ddp_find_unused_parameters", "local_rank", "debug"}  # fmt: skip
"""Settings not of the method but of who ran it, like all `hub_*` and `trackio_*`."""

LOCAL = object()
"""Stands for a value that means something on one machine only."""

HEADER = """# The settings of this run that differ from the defaults.
# trl-tpgrpo train --config recipe.yaml --output_dir FOLDER
"""


def to_yaml(settings: dict[str, Any]) -> str:
    """Return the recipe, which names what was left out because only the machine of the run has it."""
    portable = _portable_items(settings)
    local = sorted(name for name, value in portable.items() if value is LOCAL)
    note = f"# To be given, as the run had folders or functions of its own: {', '.join(local)}\n" if local else ""
    shared = {name: value for name, value in portable.items() if value is not LOCAL}
    return HEADER + note + yaml.safe_dump(shared, sort_keys=False, allow_unicode=True, width=120)


def is_local(name: str) -> bool:
    """Return whether a name of a model or dataset means something on this machine only."""
    return os.path.isabs(name) or name.startswith((".", "~")) or ("/" in name and Path(name).exists())


def import_paths(functions: list[Callable]) -> Any:
    """Return where functions are imported from, if all are at the top of a module that has a name, else `LOCAL`."""
    paths = [f"{getattr(one, '__module__', None)}.{getattr(one, '__qualname__', '<')}" for one in functions]
    return LOCAL if any("<" in path or path.startswith(("__main__.", "None.")) for path in paths) else paths


def _portable_items(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _portable(name, value)
        for name, value in settings.items()
        if not (name in PERSONAL or name.startswith(("hub_", "trackio_")) or name.endswith(("_dir", "token")))
    }


def _portable(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return LOCAL if is_local(value) or name in ("deepspeed", "fsdp_config") else value
    if isinstance(value, Path):
        return LOCAL
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: item for key, item in _portable_items(value).items() if item is not LOCAL and item is not None}
    if isinstance(value, list | tuple | set):
        items = [_portable(name, item) for item in value]
        return LOCAL if LOCAL in items else items
    return value
