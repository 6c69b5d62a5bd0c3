"""The model card of a trained adapter or transformer on the Hub, and the recipe.

The recipe has the settings of a run for `trl-tpgrpo train --config`, without defaults and private values.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from PIL import Image
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from .. import __version__
from ..policies.base import FlowPolicy
from ..policies.embeddings import Prompt


CARD_FILE, RECIPE_FILE, SAMPLE_FILE = "README.md", "recipe.yaml", "images/sample_{}.png"
CARD_FILES = CARD_FILE, RECIPE_FILE, SAMPLE_FILE.format("*")
NUM_SAMPLES, FIRST_ROWS = 4, 64  # distinct prompts with an image on the card, and rows that are searched for them

PERSONAL = {"push_to_hub", "report_to", "run_name", "project", "disable_tqdm", "resume_from_checkpoint",
            "resume_with_changes", "ddp_find_unused_parameters", "local_rank", "debug"}  # fmt: skip
"""Settings of the user, not of the method, like all `hub_*` and `trackio_*`."""

ADAPTER_OPTIONS = {"r", "lora_alpha", "target_modules", "use_rslora", "use_dora"}
"""Settings of an adapter that are options of the command line."""

PAPER = {
    "title": "Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO",
    "id": "2602.06422",
    "citation": dedent("""\
        @article{tong2026alleviating,
            title   = {Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO},
            author  = {Yunze Tong and Mushui Liu and Canyu Zhao and Wanggui He and Shiyi Zhang and Hongwei Zhang and Peng Zhang
                       and Jinlong Liu and Ju Huang and Jiamang Wang and Hao Jiang and Pipei Huang},
            year    = 2026,
            journal = {arXiv preprint arXiv:2602.06422},
        }"""),  # noqa: E501
}
"""The trainer's `_paper`, with the keys that TRL's trainers have."""

LIBRARIES = {"TRL": "trl", "Transformers": "transformers", "Diffusers": "diffusers", "PEFT": "peft",
             "Pytorch": "torch", "Datasets": "datasets", "Tokenizers": "tokenizers"}  # fmt: skip
"""Packages on the card by the names that TRL's cards give them."""

LOCAL = object()  # replaces a value that is valid on one machine only
HEADER = """# The settings of this run that differ from the defaults.
# trl-tpgrpo train --config recipe.yaml --output_dir FOLDER
"""


@dataclass(kw_only=True)
class RunCard:
    """Data of a run for the card, without values that are valid on its machine only."""

    args: Any  # settings of the run
    policy: FlowPolicy  # with the trained transformer
    adapter: LoraConfig | None  # trained adapter; None: all weights
    reward_funcs: dict[str, list[Callable]]  # by option of the command line
    prompts: list[str]  # prompts for sample images
    images: list[Image.Image] = field(default_factory=list)  # of the trained model; empty before the first push

    def write(self, trainer: Any, model_name: str | None, dataset_name: str | None, tags: list[str]) -> None:
        """Write `README.md`, its images, and `recipe.yaml` to `output_dir`, replacing earlier ones.

        `None` for `model_name` is the name of the repository or folder. Without the trainer's `recipe_settings`, which
        are the command line's, the recipe follows from the attributes.
        """
        folder = Path(self.args.output_dir)
        dataset = None if dataset_name is None or is_local(dataset_name) else dataset_name
        tags = [*trainer._tag_names, *getattr(trainer.model, "model_tags", ()), *tags]  # the model's are from trackio
        repo_id, options = trainer.hub_model_id, trainer.recipe_settings
        name = (model_name or repo_id or folder.name).split("/")[-1]
        for stale in folder.glob(SAMPLE_FILE.format("*")):
            stale.unlink()
        for number, image in enumerate(self.images):
            file = folder / SAMPLE_FILE.format(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
        self._card(trainer, name, repo_id or name, dataset, tags).save(folder / CARD_FILE)
        options = self._options(dataset) | self.args.given if options is None else options
        settings = self.args.to_dict()  # enums as their values
        recipe = to_yaml({option: settings.get(option, value) for option, value in options.items()})
        (folder / RECIPE_FILE).write_text(self._adapter_note + recipe, encoding="utf-8")

    def _card(self, trainer: Any, name: str, repo: str, dataset: str | None, tags: list[str]) -> ModelCard:
        """Return the card, with metadata in the Hub's conventions for diffusers and the rest in those of TRL."""
        state = trainer.state
        is_lora, base_model = self.adapter is not None, self._base_model
        shown = enumerate(self.prompts[: len(self.images)])
        urls = run_urls(tags)
        task = "image-to-image" if self.policy.takes_image else "text-to-image"
        metadata = ModelCardData(
            base_model=base_model,
            base_model_relation=None if base_model is None else "adapter" if is_lora else "finetune",
            library_name="diffusers",
            pipeline_tag=task,
            datasets=dataset if dataset and "/" in dataset else None,  # others, as "testbed", are not on the Hub
            model_name=name,
            tags=sorted({*hub_tags(tags, urls["trackio_url"]), task, *(["lora"] if is_lora else [])}),
            widget=[{"text": prompt, "output": {"url": SAMPLE_FILE.format(i)}} for i, prompt in shown] or None,
        )
        evaluated = rewards_by_update(state.log_history, r"eval_(.+_)?(reward|rewards/.+/mean)")
        calibrated = rewards_by_update(state.log_history, r"noise_level/step_\d+")
        return ModelCard.from_template(
            metadata,
            template_path=str(Path(__file__).with_name("card.md")),
            args=self.args,
            is_lora=is_lora,
            repo=repo,
            dataset=metadata.datasets,
            trainer_name=trainer._name,
            paper=trainer._paper,
            versions={"trl-tpgrpo": __version__} | {name: version(package) for name, package in LIBRARIES.items()},
            **urls,
            scales=self.policy.scales,
            takes_image=self.policy.takes_image,
            input_size=self.policy.input_size,
            image_options=self.policy.image_options,
            transformer=type(self.policy.pipeline.transformer).__name__,
            prompt=next(iter(self.prompts), "a photo of a cat"),
            updates=state.global_step,
            evaluated=bool(evaluated),
            calibrated={name: found[-1][1] for name, found in calibrated.items()},
            own_credit="." in self.args.credit,
            rewards=evaluated or rewards_by_update(state.log_history, r"reward|rewards/.+/mean"),
        )

    def _options(self, dataset: str | None) -> dict[str, Any]:
        """Return the command line options (besides the config's) for a run that was set up in Python."""
        options = {"model_name_or_path": self._base_model or LOCAL, "dataset_name": dataset or LOCAL}
        options |= {option: import_paths(functions) for option, functions in self.reward_funcs.items() if functions}
        if self.adapter is not None:
            targets = self.adapter.target_modules
            options |= {"use_peft": True, "lora_r": self.adapter.r, "lora_alpha": self.adapter.lora_alpha}
            options["lora_target_modules"] = targets if isinstance(targets, str) else sorted(targets or [])
            options |= {name: True for name in ("use_rslora", "use_dora") if getattr(self.adapter, name)}
        return options

    @property
    def _adapter_note(self) -> str:
        """Comment with adapter settings for which the command line has no options."""
        defaults, adapter = LoraConfig().to_dict(), {} if self.adapter is None else self.adapter.to_dict()
        others = {name: adapter[name] for name in adapter.keys() - ADAPTER_OPTIONS if adapter[name] != defaults[name]}
        told = ", ".join(f"{name}={_ordered(value)!r}" for name, value in sorted(others.items()))
        return f"# The adapter had more, which can be given in Python alone: LoraConfig({told})\n" if told else ""

    @property
    def _base_model(self) -> str | None:
        """Hub id of the pipeline; `None` for a model that others cannot load, such as one with a fused adapter."""
        name = self.policy.pipeline.config.get("_name_or_path")
        is_private = not name or is_local(name) or Path(name).exists() or self.policy.pipeline.num_fused_loras
        return None if is_private else name


def run_urls(tags: list[str]) -> dict[str, str | None]:
    """Return the address of the run at each tracker; that of a trackio run that has ended is in a tag of the model."""
    wandb_run = getattr(sys.modules.get("wandb"), "run", None)
    spaces = [tag.removeprefix("trackio:") for tag in tags if tag.startswith("trackio:")]
    return {
        "wandb_url": None if wandb_run is None else wandb_run.url,
        "trackio_url": get_trackio_space_url() or next(iter(spaces), None),
        "comet_url": get_comet_experiment_url(),
    }


def hub_tags(tags: list[str], trackio_url: str | None) -> set[str]:
    """Return tags with those that TRL adds, which say where the run was and where trackio shows it."""
    where = [*(["hf_jobs"] if "JOB_ID" in os.environ else []), "diffusers", "generated_from_trainer"]
    shown = [] if trackio_url is None else ["trackio", f"trackio:{trackio_url}"]
    return {*(tag for tag in tags if not tag.startswith("trackio:")), *where, *shown}


def rewards_by_update(log_history: list[dict[str, Any]], pattern: str) -> dict[str, list[tuple[int, float]]]:
    """Return (update, value) of every log entry, in order, by metrics whose whole names match `pattern`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name in filter(re.compile(pattern).fullmatch, entry):
            found.setdefault(name, []).append((entry["step"], entry[name]))
    return found


def sample_rows(datasets: Iterable[Any], columns: list[str]) -> list[dict[str, Any]]:
    """Return rows with distinct prompts of the first available dataset (of a dict: its first)."""
    for dataset in datasets:
        chosen = next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset
        if isinstance(chosen, Dataset) and len(chosen):
            rows: dict[Prompt, dict] = {}
            for row in chosen.select(range(min(FIRST_ROWS, len(chosen)))).select_columns(columns):
                rows.setdefault(Prompt.of(row, takes_image="image" in columns), row)
            return list(rows.values())[:NUM_SAMPLES]
    return []


def to_yaml(settings: dict[str, Any]) -> str:
    """Return the recipe, with a comment on values left out because only the run's machine has them."""
    portable = _portable_items(settings)
    local = sorted(name for name, value in portable.items() if value is LOCAL)
    note = f"# To be given, as the run had folders or functions of its own: {', '.join(local)}\n" if local else ""
    shared = {name: value for name, value in portable.items() if value is not LOCAL}
    return HEADER + note + yaml.safe_dump(shared, sort_keys=False, allow_unicode=True, width=120)


def is_local(name: str) -> bool:
    """Check whether a name of a model or dataset is valid on this machine only."""
    return os.path.isabs(name) or name.startswith((".", "~")) or ("/" in name and Path(name).exists())


def import_paths(functions: list[Callable]) -> Any:
    """Return the import paths of functions, if all are at the top level of a named module, else `LOCAL`."""
    paths = [f"{getattr(one, '__module__', None)}.{getattr(one, '__qualname__', '<')}" for one in functions]
    return LOCAL if any("<" in path or path.startswith(("__main__.", "None.")) for path in paths) else paths


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _portable_items(settings: dict[str, Any]) -> dict[str, Any]:
    personal = {name for name in settings if name.startswith(("hub_", "trackio_")) or name.endswith(("_dir", "token"))}
    return {name: _portable(name, value) for name, value in settings.items() if name not in PERSONAL | personal}


def _portable(name: str, value: Any) -> Any:
    if isinstance(value, str):
        is_secret = value == f"<{name.upper()}>"
        return LOCAL if is_secret or is_local(value) or name in ("deepspeed", "fsdp_config") else value
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
