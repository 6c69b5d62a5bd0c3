"""Checks of arguments and files, before PyTorch is imported."""

import logging
import os
import re
import socket
import sys
from collections import defaultdict
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from .options import REFUSED, near, read_options, read_recipes
from .rewards import BUILT_IN_REWARDS, dotted, find_reward


logger = logging.getLogger(__name__)

NO = ("no", "off", "false")


def check_training(command: str, argv: list[str]) -> None:
    """Raise a `ValueError` or `FileNotFoundError` for the first mistake in the arguments of a training command."""
    call = given(argv)
    recipe = read_recipes(call.get("config", []))
    known = [*read_options(command), "config", "env"]
    for name in [*recipe, *call]:
        if name not in known and name.removeprefix("no_") not in known:
            sign, what = ("--", "option") if name in call else ("", "key of a recipe")
            hint = near(sign + name, [sign + other for other in known])
            raise ValueError(f"Unknown {what} {sign}{name}{hint} See trl-tpgrpo {command} --help.")
    if "LOCAL_RANK" not in os.environ:
        tell_code(recipe, call.get("config", []))
    listed = {name: value if isinstance(value, list) else [value] for name, value in recipe.items()}
    values = {name: [str(value) for value in items if value is not None] for name, items in (listed | call).items()}
    first = defaultdict(str, {name: items[0] for name, items in values.items() if items})
    for name in REFUSED.keys() & values.keys():
        if first[name].lower() not in NO:
            raise ValueError(f"{name} {REFUSED[name]}.")
    if command == "train":
        _check_output_dir(Path(first["output_dir"] or "trainer_output"), first["resume_from_checkpoint"])
    if command != "plan":
        _check_what_is_needed(command, values, first)
    elif "dataset_name" in first:
        _check_prompts(command, first)


def tell_code(recipe: dict[str, Any], files: list[str]) -> None:
    """Log the custom code that a recipe runs, before it is imported."""
    found = []
    for name in ("reward_funcs", "eval_reward_funcs", "credit", "policy_class"):
        values = recipe.get(name) or []
        for value in map(str, values if isinstance(values, list) else [values]):
            if "." in (path := dotted(value)) and "://" not in value and not path.startswith("trl_tpgrpo."):
                found.append(f"{name} {path} ({_origin(path)})")
    if "trust_remote_code" in str(recipe.get("model_init_kwargs")):
        found.append("trust_remote_code (of the model's repository)")
    if found:
        logger.warning("Custom code in %s: %s. Read it first unless it is yours.", ", ".join(files), "; ".join(found))


def _origin(path: str) -> str:
    """Return the file or folder of a module without importing it."""
    name = path.split(".")[0]
    spec = PathFinder.find_spec(name, [os.getcwd(), *sys.path])
    return str(spec.origin or next(iter(spec.submodule_search_locations or []), name)) if spec else "not found"


def given(argv: list[str]) -> dict[str, list[str]]:
    """Return the options of a command line by Python name, with unparsed values."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for item in argv:
        if item.startswith("--"):
            name, sign, value = item[2:].partition("=")
            values = found[name.replace("-", "_")] = [value] if sign else []
        else:
            values.append(item)
    return found


def _check_output_dir(output_dir: Path, resumed: str) -> None:
    found = sorted(path.parent.name for path in output_dir.glob("checkpoint-*/trainer_state.json"))
    if found and resumed.lower() in ("", *NO) and "LOCAL_RANK" not in os.environ:
        what = f"--output_dir: {output_dir} has checkpoints of an earlier run ({', '.join(found[:3])})"
        raise ValueError(f"{what}: resume it by --resume_from_checkpoint true, or choose another folder.")
    is_there = bool(found) if resumed.lower() == "true" else Path(resumed).is_dir()
    if resumed.lower() not in ("", *NO) and not is_there:
        raise FileNotFoundError(f"--resume_from_checkpoint {resumed}: there is none (output_dir: {output_dir}).")


def _check_what_is_needed(command: str, values: dict[str, list[str]], first: defaultdict[str, str]) -> None:
    name = first["model_name_or_path"]
    if not name:
        raise ValueError("--model_name_or_path is missing: a Hub id, a folder, a file, or 'testbed'.")
    model, is_hub_id = Path(name), re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.gguf)", name)
    if model.is_dir() and not (model / "model_index.json").exists():
        raise ValueError(f"--model_name_or_path: {name} is not a diffusers pipeline: it has no model_index.json.")
    if not (is_hub_id or model.exists() or name == "testbed"):
        hint = near(model.name, ["testbed", *(other.name for other in model.parent.glob("*"))])
        raise FileNotFoundError(f"--model_name_or_path: {name} is not a folder, file or Hub id (owner/name){hint}")
    if not values.get("reward_funcs"):
        raise ValueError(f"--reward_funcs is missing: any of {list(BUILT_IN_REWARDS)}, import paths, or URLs.")
    if "datasets" not in values:
        _check_prompts(command, first)
    for name in [*values["reward_funcs"], *values.get("eval_reward_funcs", [])]:
        if name.startswith(("http://", "https://")):
            _check_server(name)
        elif name not in BUILT_IN_REWARDS:
            find_reward(name)


def _check_server(url: str) -> None:
    parts = urlsplit(url)
    try:
        if not getproxies():  # which may reach servers that this machine cannot
            address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection(address, timeout=3).close()
    except OSError as error:
        raise ConnectionError(f"The reward server {url} cannot be reached: {error}. Is it running?") from error


def _check_prompts(command: str, first: defaultdict[str, str]) -> None:
    from .prompts import is_local, read_prompts, split_of  # with datasets

    name = first["dataset_name"]
    evaluates = any(first[option].lower() not in ("", *NO) for option in ("eval_strategy", "eval_on_start"))
    if not name:
        raise ValueError("--dataset_name is missing: a Hub id, a folder, a file, or 'testbed' (or `datasets`).")
    if name != "testbed" and is_local(name):
        train, test = first["dataset_train_split"] or "train", first["dataset_test_split"] or "test"
        size = float(first["test_split_size"]) if first["test_split_size"] else None
        splits = [split_of(name, test, size)] if command == "evaluate" else [train, test] if evaluates else [train]
        read_prompts(name, first["dataset_config"] or None, splits, first["prompt_column"] or None, size)
