"""`trl-tpgrpo evaluate`: compare a model with and without the trained weights, on the same prompts and noise."""

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import skip_first_batches
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..algorithm.comparison import compare
from ..callbacks.pictures import grid
from ..callbacks.resuming import image_digest
from ..callbacks.storage import locked
from ..config import described, without_secrets
from ..policies.weights import load_weights
from . import sample, train
from .prompts import split_of
from .results import BASE, Results, as_json


NUM_SHOWN = 4  # largest gains, and losses, of each adapter in the picture
PACKAGES = ("trl-tpgrpo", "torch", "diffusers", "transformers", "peft", "accelerate")
SETTINGS = (
    "model_name_or_path", "model_init_kwargs", "policy_class", "use_peft", "quantization", "dataset_name",
    "dataset_config",
    "dataset_test_split", "test_split_size", "reward_funcs", "eval_reward_funcs", "reward_weights", "reward_failures",
    "sampler", "num_generations_eval", "seed", "height", "width", "num_inference_steps_eval", "guidance_scale",
    "true_cfg_scale", "negative_prompt", "max_sequence_length", "per_device_eval_batch_size",
    "per_device_rollout_batch_size", "bf16", "fp16", "tf32", "attention_backend", "compile_backend", "vae_tiling",
)  # fmt: skip
"""Settings that change images and rewards, besides prompts and weights."""
SDE_SETTINGS = ("num_inference_steps", "sde_type", "noise_level", "sde_window_size", "sde_window_range")


@described
@dataclass
class EvaluateArguments:
    """
    Arguments of `trl-tpgrpo evaluate`, in addition to those of `trl-tpgrpo train`.

    Parameters:
        adapter (`list[str]`, *optional*): Trained weights: folders or Hub ids of LoRAs, folders with a `transformer`,
            or output folders of runs.
        by (`str`, *optional*): Column of the dataset; results are also reported for each of its values.
        num_prompts (`int`, *optional*): Number of prompts, from the first. `None`: all.
        sampler (`str`, *optional*, defaults to `"ode"`): `"ode"` as in evaluation, or `"sde"` as in training.
    """

    _argument_group_name = "Evaluate"

    adapter: list[str] | None = None
    by: str | None = None
    num_prompts: Annotated[int | None, "at least 1, or None"] = None
    sampler: Annotated[str, ("ode", "sde")] = "ode"


def main(argv: list[str]) -> int:
    """Sample and score with each model, continue an interrupted call, and report."""
    parser = train.make_parser("trl-tpgrpo evaluate", own_types=(EvaluateArguments,))
    options = train.launch("evaluate", parser, argv)
    if isinstance(options, int):
        return options
    own, *training = parser.parse_args_and_config(options, fail_with_unknown_args=False)[:5]
    adapters = list(dict.fromkeys(map(sample.find_weights, own.adapter or [])))
    trainer = build_trainer(own, adapters, *training)
    settings, output_dir = settings_of(trainer, own, *training), Path(trainer.args.output_dir)
    with locked(trainer.accelerator, output_dir / "evaluation"):
        results = Results(output_dir, settings, adapters, len(trainer.eval_reward_func_names))
        window = trainer.rollouts.windows.draw(0) if own.sampler == "sde" else None
        for number, name in enumerate(results.rewards):
            if len(results.rewards[name]) < results.num_images:
                if name != BASE:
                    activate(trainer, name, f"adapter_{number}")
                evaluate(trainer, results, name, window)
        if trainer.accelerator.is_main_process:
            report(trainer, results, own.by)
    trainer.accelerator.end_training()
    return 0


def build_trainer(
    own: EvaluateArguments, adapters: list[str], script_args: Any, model_args: Any, dataset_args: Any, args: Any
) -> Any:  # a TPGRPOTrainer
    """Return the trainer for the evaluation, with the prompts; raise ValueError for unsupported options."""
    whole = [adapter for adapter in adapters if sample.is_whole(adapter)]
    if whole and (model_args.use_peft or len(whole) < len(adapters)):
        remedy = "leave out --use_peft, and evaluate LoRAs in another call: their base has another precision"
        raise ValueError(f"--adapter {whole[0]} has the full weights of a transformer: {remedy}.")
    if own.num_prompts is not None and own.num_prompts < 1:
        raise ValueError(f"--num_prompts must be at least 1, got {own.num_prompts}.")
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            raise ValueError(f"{name} is not supported: models are evaluated in the precision of training.")
    model_args.use_peft = not whole  # an untrained adapter changes nothing
    args.push_to_hub = args.share_initial_noise = False  # both are for training
    args.allow_distilled = True
    split = split_of(script_args.dataset_name, script_args.dataset_test_split, dataset_args.test_split_size)
    if split != script_args.dataset_test_split:
        tqdm.write(f"{script_args.dataset_name} has no split for evaluation: all its prompts are used.")
    script_args.dataset_train_split = script_args.dataset_test_split = split
    dataset: Any = train.load_prompts(script_args, dataset_args, evaluate=True)[1]
    if own.by is not None and own.by not in dataset.column_names:
        raise ValueError(f"--by must be a column of the dataset, one of {dataset.column_names}, got {own.by!r}.")
    dataset = dataset.take(min(own.num_prompts or len(dataset), len(dataset)))
    trainer = train.build_trainer(script_args, model_args, dataset_args, args, prompts=(None, dataset))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("evaluate needs whole weights in each process: launch it without FSDP or DeepSpeed.")
    trainer.model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True).eval()
    return trainer


def settings_of(
    trainer: Any, own: EvaluateArguments, script_args: Any, model_args: Any, dataset_args: Any, args: Any
) -> dict[str, Any]:
    """Return the settings that change images and rewards, by name, as JSON values."""
    known = {**vars(script_args), **vars(model_args), **vars(dataset_args), **vars(args), **vars(own)}
    found = {name: known[name] for name in (*SETTINGS, *(SDE_SETTINGS if own.sampler == "sde" else ()))}
    found |= {"height": args.eval_height or args.height, "width": args.eval_width or args.width}
    prompts = trainer.eval_dataset
    images = [name for name, feature in prompts.features.items() if isinstance(feature, ImageFeature)]
    rows = json.dumps(prompts.remove_columns(images).with_format("arrow")[:].to_pylist(), default=str)
    rows += "".join(image_digest(prompts, name) for name in images)
    found |= {"num_prompts": len(trainer.eval_dataset), "num_processes": args.world_size}
    return as_json({**without_secrets(found), "prompts": hashlib.sha256(rows.encode()).hexdigest()})


def activate(trainer: Any, source: str, name: str) -> None:
    """Load trained weights into the model: full weights, or a LoRA under a new name."""
    pipeline = trainer.policy.pipeline
    if sample.is_whole(source):
        return load_weights(trainer.model, source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # about another adapter
        pipeline.load_lora_weights(source, adapter_name=name)
    pipeline.transformer.set_adapter(name)
    for part, module in pipeline.components.items():
        if part != "transformer" and name in getattr(module, "peft_config", {}):
            raise ValueError(f"--adapter {source} also changes {part}. Only the transformer is supported.")
    return None


@torch.no_grad()
def evaluate(trainer: Any, results: Results, name: str, window: Any) -> None:
    """Sample and score missing images of a model, batch by batch as in `trainer.evaluate()`."""
    process, batches = trainer.accelerator, trainer.get_eval_dataloader()
    whole = trainer.args.eval_batch_size * process.num_processes
    done, total = math.ceil(len(results.rewards[name]) / whole), len(batches)
    batches = skip_first_batches(batches, done)
    bar = tqdm(batches, desc=name, initial=done, total=total, unit="batch", disable=not process.is_main_process)
    for number, rows in enumerate(bar, start=done):
        first = number * whole + process.process_index * len(rows)
        sampled, rewards = trainer.rollouts.evaluate(rows, first, results.num_images, window)
        with trainer.policy.at_eval_size():
            images = trainer.rollouts.shown_images(sampled, range(min(len(rows), max(0, results.num_images - first))))
        for index, image in enumerate(images, start=first):
            image.save(results.file(name, index))
        process.wait_for_everyone()
        if process.is_main_process:
            results.append(name, rewards)


def report(trainer: Any, results: Results, by: str | None) -> None:
    """Print the table; write `evaluation.json` and, if models differ, `differences.png`."""
    prompts, names, output_dir = trainer.eval_dataset, trainer.eval_reward_func_names, results.folder.parent
    rewards, number = results.rewards, len(trainer.reward_funcs)
    if number > 1:  # the weighted sum is another reward
        names = ["reward", *names]
        sums = {name: trainer.rollouts.weighted(values[:, :number]) for name, values in rewards.items()}
        rewards = {name: torch.cat([sums[name][:, None], values], 1) for name, values in rewards.items()}
    summary = list(summarise(names, rewards, prompts, by))
    print(table(summary, by))  # noqa: T201
    images = [
        {
            **without_images(prompts[index * len(prompts) // results.num_images]),
            "rewards": {model: dict(zip(names, row[index].tolist(), strict=True)) for model, row in rewards.items()},
            "files": {name: str(results.file(name, index).relative_to(output_dir)) for name in rewards},
        }
        for index in range(results.num_images)
    ]
    versions = {name: version(name) for name in PACKAGES}
    found = {"settings": results.settings, "versions": versions, "weights": results.digests, "summary": summary}
    (output_dir / "evaluation.json").write_text(json.dumps(as_json({**found, "images": images}), indent=1))
    print(f"Settings and the rewards of each image: {output_dir}/evaluation.json")  # noqa: T201
    if shown := differences(results, {name: values[:, 0] for name, values in rewards.items()}, images):
        grid(list(shown.items()), names=["base", "trained"]).save(output_dir / "differences.png")
        print(f"The largest gains and losses: {output_dir}/differences.png")  # noqa: T201


def without_images(row: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a dataset's row."""
    return {name: value for name, value in row.items() if not isinstance(value, Image.Image)}


def summarise(
    names: list[str], rewards: dict[str, Tensor], prompts: Dataset, by: str | None
) -> Iterator[dict[str, Any]]:
    """Yield statistics of the rewards (N, F) of each model, for all prompts and by the values of a column."""
    values = list(map(str, prompts[by])) if by else []
    groups = {"all": torch.ones(len(prompts), dtype=torch.bool)}
    groups |= {value: torch.tensor([one == value for one in values]) for value in sorted(set(values))}
    for (group, chosen), (column, reward) in ((one, other) for one in groups.items() for other in enumerate(names)):
        scores = {name: every[:, column].view(len(prompts), -1)[chosen] for name, every in rewards.items()}
        for name, score in scores.items():
            found = compare(score, None if name == BASE else scores[BASE])
            yield {"by": group, "reward": reward, "model": name, **asdict(found)}


def table(summary: list[dict[str, Any]], by: str | None) -> str:
    """Return the summary as a table in Markdown."""
    head = ["reward", "model", "prompts", "mean", "difference", "95% interval"]
    rows = [head, ["---"] * len(head)]
    for one in summary:
        difference = ["", ""]
        if one["interval"]:
            difference = [f"{one['difference']:+.4f}", "{:+.4f} to {:+.4f}".format(*one["interval"])]
        mean = f"{one['mean']:.4f} +- {one['standard_error']:.4f}"
        rows.append([one["reward"], one["model"], str(one["num_prompts"]), mean, *difference])
    if by is not None:
        rows = [[first, *row] for first, row in zip([by, "---", *(one["by"] for one in summary)], rows, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(
    results: Results, rewards: dict[str, Tensor], images: list[dict[str, Any]]
) -> dict[str, list[tuple[Image.Image, float]]]:
    """Return, by title, images of the base and another model with the largest gains and losses in rewards (N,)."""
    shown: dict[str, list[tuple[Image.Image, float]]] = {}
    for name in list(rewards)[1:]:
        gains = (rewards[name] - rewards[BASE]).tolist()
        order = sorted((index for index, gain in enumerate(gains) if abs(gain) > 0), key=gains.__getitem__)
        most = [index for index in order[: -NUM_SHOWN - 1 : -1] if gains[index] > 0]
        least = [index for index in order[:NUM_SHOWN] if gains[index] < 0]
        for index in [*most, *reversed(least)]:
            model = f" {Path(name).name}" if len(rewards) > 2 else ""
            title = f"{gains[index]:+.3f}{model} {results.file(name, index).stem} {images[index]['prompt']}"
            files = [(results.file(one, index), rewards[one][index].item()) for one in (BASE, name)]
            shown[title] = [(Image.open(path), reward) for path, reward in files]
    return shown
