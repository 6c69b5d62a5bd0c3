"""Architectures without weights: config files of a model of each family, and pipelines built from them."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from ...policies.loading import check_classes


FOLDERS = {
    "stabilityai/stable-diffusion-3.5-medium": Path(__file__).parent / "sd3.5-medium",
    "black-forest-labs/FLUX.1-dev": Path(__file__).parent / "flux.1-dev",
    "black-forest-labs/FLUX.1-Krea-dev": Path(__file__).parent / "flux.1-dev",
    "stabilityai/stable-diffusion-3.5-large": Path(__file__).parent / "sd3.5-large",
    "Qwen/Qwen-Image": Path(__file__).parent / "qwen-image",
    "Tongyi-MAI/Z-Image": Path(__file__).parent / "z-image",
    "black-forest-labs/FLUX.2-klein-base-4B": Path(__file__).parent / "flux.2-klein-base-4b",
    "black-forest-labs/FLUX.2-dev": Path(__file__).parent / "flux.2-dev",
    "krea/Krea-2-Raw": Path(__file__).parent / "krea-2-raw",
    "lodestones/Chroma1-HD": Path(__file__).parent / "chroma1-hd",
}
"""Folders by Hub id; most weights are gated, but the configs' sizes are public."""


def architecture_folder(name: str | Path, revision: str | None = None) -> Path:
    """Find the config files of a pipeline; those of a Hub id that is not in `FOLDERS` are fetched.

    Args:
        name: Hub id or folder.
        revision: Revision on the Hub.

    Raises:
        ValueError: If there is no such pipeline.
    """
    if str(name) in FOLDERS:
        return FOLDERS[str(name)]
    if not Path(name).is_dir():
        try:
            name = snapshot_download(str(name), revision=revision, allow_patterns=["*.json"])
        except (HTTPError, OSError, ValueError) as error:  # of the network or the Hub; of the name's form
            raise ValueError(f"{name!r} is not a folder, and its configs cannot be downloaded: {error}") from error
    if not (Path(name) / "model_index.json").exists():
        raise ValueError(f"{name} has no model_index.json: it is not a diffusers pipeline.")
    return Path(name)


def load_architecture(name: str | Path, dtype: torch.dtype = torch.float32, **parts: Any) -> DiffusionPipeline:
    """Build the pipeline of a name or folder with new weights, on the current device.

    Tokenizers and processors are left out, because their vocabularies are not in the config files.

    Args:
        name: Hub id or folder.
        dtype: dtype of the weights.
        **parts: Components (also tokenizers) and options that replace those of the files; `None` leaves out a
            component.
    """
    folder = architecture_folder(name)
    index = json.loads((folder / "model_index.json").read_text())
    check_classes(index, name)
    given = {key: value for key, value in index.items() if not key.startswith("_") and key not in parts}
    names = [key for key, value in given.items() if is_part(value)]
    options = {key: value for key, value in given.items() if key not in names}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # `to` would need twice the memory
    try:
        built = {key: load_part(folder, key) for key in names}
    finally:
        torch.set_default_dtype(before)
    pipeline_class = getattr(importlib.import_module("diffusers"), index["_class_name"])
    return pipeline_class(**built, **options, **parts)


def is_part(value: Any) -> bool:
    """Check whether an entry of `model_index.json` is a component (library and class), not an option."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str | None) for name in value)


def load_part(folder: Path, name: str) -> Any:
    """Build a component with new weights; `None` for absent ones, tokenizers and processors."""
    index = json.loads((folder / "model_index.json").read_text())
    check_classes(index, folder)
    library, class_name = index[name]
    if library is None or "Tokenizer" in class_name or "Processor" in class_name:
        return None
    part_class = getattr(importlib.import_module(library), class_name)
    if library == "diffusers":
        part = part_class.from_config(part_class.load_config(folder / name))
    else:
        part = part_class(part_class.config_class.from_pretrained(folder / name))
    return part.eval() if isinstance(part, torch.nn.Module) else part
