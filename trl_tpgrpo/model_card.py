"""The card that goes to the Hub with a trained adapter or transformer."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from PIL import Image
from transformers import TrainerState

from .config import TPGRPOConfig
from .recipe import is_local, settings_of_run, to_yaml


SHOWN = ("credit", "completion", "sde_type", "noise_level", "num_inference_steps", "guidance_scale", "num_generations",
         "generation_batch_size", "learning_rate", "beta", "epsilon", "height", "width", "seed")  # fmt: skip
"""Settings on a card."""

CARD_FILE, RECIPE_FILE = "README.md", "recipe.yaml"
SAMPLE_FILES = "images/sample_*.png"
NUM_SAMPLES = 4
"""Images on a card."""

FIRST_ROWS = 64
"""How far into a dataset distinct prompts are looked for."""

USAGE_OF_LORA = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base_model}", torch_dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights("{repo}")
"""

USAGE_OF_TRANSFORMER = """import torch
from diffusers import {transformer_class}, DiffusionPipeline

transformer = {transformer_class}.from_pretrained("{repo}", subfolder="transformer", torch_dtype=torch.bfloat16)
pipeline = DiffusionPipeline.from_pretrained(
    "{base_model}", transformer=transformer, torch_dtype=torch.bfloat16
).to("cuda")
"""

CARD = """# {name}

{gallery}{what}, fine-tuned by reinforcement learning with
[TurningPoint-GRPO](https://huggingface.co/papers/2602.06422) and `trl-tpgrpo`.

## Quick start

```python
{usage}image = pipeline(
    {prompt!r},
    {options},
).images[0]
```

## Rewards

{rewards}

## Training

{settings}

All settings that differ from the defaults are in [`recipe.yaml`](recipe.yaml), which
`trl-tpgrpo train --config recipe.yaml` takes.

## Citations

```bibtex
@article{{tong2026alleviating,
    title   = {{Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO}},
    author  = {{Yunze Tong and Mushui Liu and Canyu Zhao and Wanggui He and Shiyi Zhang and Hongwei Zhang and Peng Zhang
               and Jinlong Liu and Ju Huang and Jiamang Wang and Hao Jiang and Pipei Huang}},
    year    = 2026,
    journal = {{arXiv preprint arXiv:2602.06422}},
}}
```

```bibtex
@misc{{vonwerra2020trl,
    title        = {{TRL: Transformer Reinforcement Learning}},
    author       = {{Leandro von Werra and Younes Belkada and Lewis Tunstall and Edward Beeching and Tristan Thrush and
                    Nathan Lambert and Shengyi Huang and Kashif Rasul and Quentin Gallou\u00e9dec}},
    year         = 2020,
    howpublished = {{\\url{{https://github.com/huggingface/trl}}}},
}}
```
"""


@dataclass(frozen=True)
class RunSummary:
    """What a card tells of a run.

    Attributes:
        name: Of the model.
        repo: Its id on the Hub.
        base_model: A Hub id, or `None` for a model that nobody else could load.
        transformer_class: Of diffusers.
        is_lora: Whether an adapter was trained, or all weights.
        settings: Shown in a list.
        sampling: Arguments of the pipeline for images as in evaluation.
        log_history: Of the trainer.
        dataset_name: A Hub id, or `None` if there is none.
        tags: Besides those of the task.
        prompt: For the usage snippet.
        samples: By prompt, an image of the trained model.
        recipe: YAML.
    """

    name: str
    repo: str
    base_model: str | None
    transformer_class: str
    is_lora: bool
    settings: dict[str, object]
    sampling: dict[str, object]
    log_history: list[dict[str, Any]]
    dataset_name: str | None
    tags: list[str]
    prompt: str
    samples: dict[str, Image.Image] = field(default_factory=dict)
    recipe: str = ""

    def write(self, output_dir: Path) -> None:
        """Write `README.md`, its images, and `recipe.yaml`, over those of a card before."""
        output_dir.mkdir(parents=True, exist_ok=True)
        for stale in output_dir.glob(SAMPLE_FILES):
            stale.unlink()
        for path, (_, image) in zip(self._places(), self.samples.items(), strict=True):
            (output_dir / path).parent.mkdir(exist_ok=True)
            image.save(output_dir / path)
        self.card().save(output_dir / CARD_FILE)
        (output_dir / RECIPE_FILE).write_text(self.recipe, encoding="utf-8")

    def card(self) -> ModelCard:
        """The card, with metadata in the Hub's conventions for diffusers."""
        metadata = ModelCardData(
            base_model=self.base_model,
            base_model_relation=None if self.base_model is None else "adapter" if self.is_lora else "finetune",
            library_name="diffusers",
            pipeline_tag="text-to-image",
            datasets=self.dataset_name,
            model_name=self.name,
            tags=sorted({*self.tags, "text-to-image", "diffusers", *(["lora"] if self.is_lora else [])}),
            widget=[
                {"text": prompt, "output": {"url": path}}
                for path, prompt in zip(self._places(), self.samples, strict=True)
            ]
            or None,
        )
        origin = f" of [{self.base_model}](https://huggingface.co/{self.base_model})" if self.base_model else ""
        usage = (USAGE_OF_LORA if self.is_lora else USAGE_OF_TRANSFORMER).format(
            base_model=self.base_model or "the base model", repo=self.repo, transformer_class=self.transformer_class
        )
        body = CARD.format(
            name=self.name,
            gallery="<Gallery />\n\n" if self.samples else "",
            what=("A LoRA adapter" if self.is_lora else "A transformer") + origin,
            usage=usage,
            prompt=self.prompt,
            options=",\n    ".join(f"{name}={value!r}" for name, value in self.sampling.items()),
            rewards=reward_table(self.log_history),
            settings="\n".join(f"- `{name}`: {value}" for name, value in self.settings.items()),
        )
        return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")

    def _places(self) -> list[str]:
        return [SAMPLE_FILES.replace("*", str(number)) for number in range(len(self.samples))]


def summarize(
    *,
    args: TPGRPOConfig,
    state: TrainerState,
    pipeline: DiffusionPipeline,
    adapter: LoraConfig | None,
    reward_funcs: dict[str, list[Callable]],
    recipe_settings: dict[str, Any] | None,
    repo_id: str | None,
    model_name: str | None,
    dataset_name: str | None,
    tags: list[str],
    prompts: list[str],
    samples: dict[str, Image.Image],
) -> RunSummary:
    """What is to be told of a run, without what only its machine knows.

    Args:
        args, state, pipeline: Of the trainer.
        adapter: What is trained; `None`: all weights.
        reward_funcs: By option of the command line, the functions.
        recipe_settings: For the recipe; `None`: those that follow from the other arguments.
        repo_id: On the Hub; `None`: there is no repository.
        model_name: `None`: that of the repository or folder.
        dataset_name: As on the command line.
        tags: Besides those of the task.
        prompts: That images are, or could be, sampled for.
        samples: By prompt.
    """
    name = (model_name or repo_id or Path(args.output_dir).name).split("/")[-1]
    base_model = _hub_id(pipeline)
    dataset = None if dataset_name is None or is_local(dataset_name) else dataset_name
    if recipe_settings is None:
        recipe_settings = settings_of_run(args.given, base_model, adapter, reward_funcs, dataset)
    sampling: dict[str, object] = {"num_inference_steps": args.num_inference_steps_eval}
    given = [name for name in ("true_cfg_scale", "negative_prompt", "max_sequence_length") if name in args.given]
    sampling |= {option: getattr(args, option) for option in ("guidance_scale", "height", "width", *given)}
    return RunSummary(
        name=name,
        repo=repo_id or name,
        base_model=base_model,
        transformer_class=type(pipeline.transformer).__name__,
        is_lora=adapter is not None,
        settings={"updates": state.global_step} | {option: getattr(args, option) for option in SHOWN},
        sampling=sampling,
        log_history=state.log_history,
        dataset_name=dataset if dataset and "/" in dataset else None,  # others, as "testbed", are not on the Hub
        tags=tags,
        prompt=next(iter(prompts), "a photo of a cat"),
        samples=samples,
        recipe=to_yaml(recipe_settings),
    )


def _hub_id(pipeline: DiffusionPipeline) -> str | None:
    """Where a pipeline came from, if that was the Hub."""
    name = pipeline.config.get("_name_or_path")
    return None if not name or is_local(name) or Path(name).exists() else name


def reward_table(log_history: list[dict[str, Any]]) -> str:
    """Rewards at the first and the last evaluation, or where there was none at the first and last logged update."""
    evaluated = _first_and_last(log_history, re.compile(r"eval_(.+_)?(reward|rewards/.+/mean)"))
    found = evaluated or _first_and_last(log_history, re.compile(r"reward|rewards/.+/mean"))
    if not found:
        return "None have been logged."
    what = (
        "In evaluation, of images by the ODE from fixed noise"
        if evaluated
        else "In training, of images by the SDE (there was no evaluation)"
    )
    rows = [
        f"| `{name}` | {before:.4g} (update {first}) | {after:.4g} (update {last}) |"
        for name, ((first, before), (last, after)) in found.items()
    ]
    return "\n".join([f"{what}:", "", "| reward | first | last |", "|---|---|---|", *rows])


def _first_and_last(log_history: list[dict[str, Any]], pattern: re.Pattern) -> dict[str, tuple]:
    """By metric, (update, value) of its first and of its last entry."""
    found: dict[str, tuple] = {}
    for entry in log_history:
        for name in (name for name in entry if pattern.fullmatch(name)):
            here = (entry["step"], entry[name])
            found[name] = (found.get(name, (here,))[0], here)
    return found


def sample_prompts(datasets: Iterable[Any]) -> list[str]:
    """The first prompts of the first dataset there is, of those that are a dict of datasets the first."""
    for dataset in datasets:
        chosen = next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset
        if isinstance(chosen, Dataset) and len(chosen):
            return list(dict.fromkeys(chosen[:FIRST_ROWS]["prompt"]))[:NUM_SAMPLES]
    return []
