"""`trl-tpgrpo demo`: train the bundled toy model on the shapes world and show the results."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from ..algorithm.credit import aggregated_rewards, turning_points
from ..algorithm.rollout import EXACT
from ..callbacks.figures import Figure, before_after_figure, reward_figure, trajectory_figure
from ..config import TPGRPOConfig
from ..testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from ..testbed.checker import Score, score_images, shapes_reward
from ..testbed.world import KINDS
from ..trainer import TPGRPOTrainer
from .sample import build_pipeline


Images = list[Image.Image]
NUM_INFERENCE_STEPS, IMAGES_PER_PROMPT = 8, 4
PICTURED = {"single": 1, "count": 1, "pair": 2, "position": 2}  # captions by kind
SETTINGS: dict[str, Any] = {
    **PIPELINE_KWARGS,
    "use_cpu": True, "guidance_scale": 1.0, "num_inference_steps": NUM_INFERENCE_STEPS, "num_generations": 8,
    "per_device_train_batch_size": 64, "per_device_rollout_batch_size": 64, "gradient_accumulation_steps": 1,
    "sde_type": "flow_sde", "epsilon": 1e-3, "beta": 0.0, "ema_decay": None, "activation_checkpointing": False,
    "save_strategy": "no",
}  # fmt: skip
"""Settings for a model of this size, also used by benchmarks/study.py."""
LARGER_BATCHES: dict[str, Any] = {
    "gradient_accumulation_steps": 4, "sde_type": "cps", "noise_level": 0.5, "sde_window_size": 3,
    "completion": "at_1_2_3_5", "advantage_baseline": "completion", "scale_rewards": "batch",
    "advantage_scope": "joint",
}  # fmt: skip
"""256 trajectories per update, three SDE steps with less noise, cheap completions, and one scale for all steps."""


def main(argv: list[str]) -> int:
    """Evaluate, train, evaluate again, draw figures, and verify the saved weights."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.num_threads)
    started = time.perf_counter()
    heldout = distinct(prompt_dataset("heldout"))
    heldout = heldout.take(min(args.num_eval_prompts or len(heldout), len(heldout)))
    args.output_dir.mkdir(parents=True, exist_ok=True)

    before = sample_heldout(build_pipeline("testbed", None, "float32", "cpu"), heldout, "Held-out images before")
    trainer = build_trainer(args.output_dir, args.max_steps, args.seed)
    trainer.train()
    trainer.save_model()
    after = sample_heldout(trainer.policy.pipeline, heldout, "Held-out images after")

    scores = [score_images(images, repeated(heldout)) for images in (before, after)]
    draw_figures(trainer, heldout, [before, after], scores)
    print(report(heldout, scores))  # noqa: T201
    difference = compare_with_plain_pipeline(args.output_dir, heldout, after)
    print(  # noqa: T201
        f"The transformer in {args.output_dir}, loaded into a plain diffusers pipeline, makes the same images "
        f"(largest difference of a pixel: {difference} of 255). {time.perf_counter() - started:.0f} seconds in all.\n"
        f"Look at {args.output_dir / 'before_after.png'}, then reward.png and trajectory.png beside it. Next: "
        "trl-tpgrpo train --config examples/recipes/testbed.yaml, or docs/quick_start.md for a model of your own."
    )
    return 0


def distinct(dataset: Dataset) -> Dataset:
    """Return one row of each prompt of a dataset."""
    return dataset.select(sorted({prompt: row for row, prompt in enumerate(dataset["prompt"])}.values()))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    description = "Train the bundled toy model on the CPU and show the results."
    parser = argparse.ArgumentParser(prog="trl-tpgrpo demo", description=description)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--output_dir", type=Path, default=Path("demo"), help=f"folder for the weights and the pictures {shown}")
    add("--max_steps", type=int, default=46, help="updates (default: %(default)s, a few minutes on one core)")
    add("--num_eval_prompts", type=int, help="held-out captions, 4 images each (default: all 90)")
    add("--seed", type=int, default=0, help=f"seed of the training {shown}")
    threads = "PyTorch threads; more are faster, but change rounding"
    add("--num_threads", type=int, default=1, help=f"{threads} {shown}")
    return parser


def build_trainer(output_dir: Path, max_steps: int, seed: int) -> TPGRPOTrainer:
    """Return the demo's trainer: the paper's credit, with settings for this model from docs/reproduction.md.

    All weights are trained, because a model of this size learns less with an adapter.
    """
    # The learning rate decays to 0, with the effect of an average of the weights.
    run: dict[str, Any] = {"learning_rate": 4e-4, "lr_scheduler_type": "linear", "max_steps": max_steps, "seed": seed}
    shown: dict[str, Any] = {"disable_tqdm": False, "logging_steps": max(1, max_steps // 10)}
    config = TPGRPOConfig(str(output_dir), **{**SETTINGS, **LARGER_BATCHES}, **run, **shown)
    return TPGRPOTrainer(TESTBED, shapes_reward, config, prompt_dataset("train"))


def repeated(dataset: Dataset) -> list[str]:
    """Return the dataset's prompts, repeated for each image."""
    return [prompt for prompt in dataset["prompt"] for _ in range(IMAGES_PER_PROMPT)]


def sample_heldout(pipeline: DiffusionPipeline, dataset: Dataset, description: str) -> Images:
    """Sample the dataset's prompts by the pipeline's `__call__`, from noise that depends only on their index."""
    pipeline.set_progress_bar_config(disable=True)
    prompts, images = repeated(dataset), []
    for start in tqdm(range(0, len(prompts), 32), desc=description, disable=None):
        chunk = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(chunk))]
        options = {**PIPELINE_KWARGS, "guidance_scale": 1.0, "num_inference_steps": NUM_INFERENCE_STEPS}
        images += pipeline(chunk, generator=generators, **options).images
    return images


def report(dataset: Dataset, scores: list[list[Score]]) -> str:
    """Return a table of held-out scores before and after by kind of prompt, with standard errors, and a verdict."""
    kinds = np.repeat(dataset["kind"], IMAGES_PER_PROMPT)
    strict, graded = (
        np.array([[getattr(one, name) for one in side] for side in scores]) for name in ("strict", "graded")
    )
    lines = ["", f"{'Held-out captions, strict score':<34}images  before   after   change"]
    for kind in (*KINDS, "all"):
        chosen = (kinds == kind) | (kind == "all")
        lines.append(f"  {kind:<32}{_row(strict[:, chosen])}")
    lines.append(f"  {'all, graded score':<32}{_row(graded)}")
    change, error = _change(strict)
    verdict = "better" if change > 2 * error else "worse" if change < -2 * error else "no significant difference"
    return "\n".join([*lines, "", f"Verdict: {verdict} ({change:+.3f}, standard error {error:.3f})."]) + "\n"


def _row(scores: np.ndarray) -> str:
    before, after = scores.mean(1)
    change, error = _change(scores)
    return f"{scores.shape[1]:6d}  {before:6.3f}  {after:6.3f}  {change:+.3f} \u00b1 {error:.3f}"


def _change(scores: np.ndarray) -> tuple[float, float]:
    """Return the mean change and its standard error, of scores (2, N) of the same noise before and after."""
    changes = scores[1] - scores[0]
    return float(changes.mean()), float(changes.std(ddof=1) / len(changes) ** 0.5)


def draw_figures(trainer: TPGRPOTrainer, dataset: Dataset, images: list[Images], scores: list[list[Score]]) -> None:
    """Draw the three figures, from images and scores before and after training."""
    rows = [row for kind, number in PICTURED.items() for row in _of_kind(dataset, kind)[:number]]
    before, after = ([side[row * IMAGES_PER_PROMPT :][:IMAGES_PER_PROMPT] for row in rows] for side in images)
    strict = np.array([[score.strict for score in side] for side in scores], bool)
    right = strict.reshape(2, -1, IMAGES_PER_PROMPT)[:, rows]
    rewards = [float(np.mean([(score.graded + score.strict) / 2 for score in side])) for side in scores]
    figures = {
        "before_after": before_after_figure([dataset[row]["prompt"] for row in rows], before, after, right),
        "reward": reward_figure(trainer.state.log_history, {0: rewards[0], trainer.state.global_step: rewards[1]}),
        "trajectory": draw_trajectory(trainer, list(dataset)),
    }
    for name, figure in figures.items():
        figure.savefig(Path(trainer.args.output_dir) / f"{name}.png", dpi=150, bbox_inches="tight")


def _of_kind(dataset: Dataset, kind: str) -> list[int]:
    return [row for row, other in enumerate(dataset["kind"]) if other == kind]


def draw_trajectory(trainer: TPGRPOTrainer, rows: list[dict[str, Any]]) -> Figure:
    """Sample a trajectory of each row (the last step by the ODE); draw the one with the largest turning points."""
    generators = [torch.Generator().manual_seed(index) for index in range(len(rows))]
    window = trainer.args.window(0, trainer.args.num_inference_steps - 1)
    sampled = trainer.sample_and_score(rows, generators, window, EXACT)
    rewards = sampled.rewards[:, 0]  # the one reward function
    turning = turning_points(rewards, trainer.args.credit_rule)
    gained = aggregated_rewards(rewards) * turning
    gained[:, 0] *= 0.01  # a step that reverses a trend is shown rather than one that begins it
    chosen = int(gained.sum(1).argmax())
    images = [sampled.images[index] for index in sampled.rollout.image_of[chosen]]
    values, turns, states = rewards[chosen].numpy(), turning[chosen].numpy(), list(range(len(images)))
    return trajectory_figure(rows[chosen]["prompt"], images, values, turns, states)


def compare_with_plain_pipeline(weights: Path, dataset: Dataset, images: Images) -> int:
    """Load the saved weights with diffusers; return the largest difference of a pixel."""
    pipeline = build_pipeline("testbed", str(weights), "float32", "cpu")
    again = sample_heldout(pipeline, dataset.take(min(8, len(dataset))), "The saved model's images")
    trained, loaded = (np.stack([np.asarray(image, int) for image in side]) for side in (images[: len(again)], again))
    return int(np.abs(trained - loaded).max())
