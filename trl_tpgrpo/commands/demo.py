"""`trl-tpgrpo demo`: train the embedded tiny model on the shapes world and show what it learned."""

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
from ..callbacks.figures import save_before_after, save_reward_curve, save_step_reward_spread, save_trajectory
from ..config import TPGRPOConfig
from ..policies.loading import load_pipeline
from ..testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from ..testbed.checker import Score, score_images, shapes_reward
from ..testbed.world import KINDS
from ..trainer import TPGRPOTrainer
from .sample import build_pipeline


NUM_INFERENCE_STEPS = 8
IMAGES_PER_PROMPT = 4
PICTURED_PROMPTS = 6
SETTINGS: dict[str, Any] = {
    **PIPELINE_KWARGS,
    "use_cpu": True,
    "per_device_rollout_batch_size": 64,
    "guidance_scale": 1.0,
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "sde_type": "flow_sde",
    "epsilon": 1e-3,
    "beta": 0.0,
    "ema_decay": None,
    "activation_checkpointing": False,
    "save_strategy": "no",
}
"""For a model this small; the study of benchmarks/ablation.py trains with them too."""


def main(argv: list[str]) -> int:
    """Measure, train, measure again, draw, and prove that the saved weights are the trained model."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.num_threads)
    started = time.perf_counter()
    heldout = prompt_dataset("heldout", args.num_eval_prompts)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    before = sample_heldout(load_pipeline(TESTBED), heldout, "Held-out images before")
    trainer = build_trainer(args.output_dir, args.max_steps, args.seed)
    trainer.train()
    trainer.save_model()
    after = sample_heldout(trainer.policy.pipeline, heldout, "Held-out images after")

    scores = [score_images(images, repeated(heldout)) for images in (before, after)]
    draw_figures(args.output_dir, trainer, heldout, before, after, scores)
    print(report(heldout, *scores))  # noqa: T201
    difference = compare_with_plain_pipeline(args.output_dir, heldout, after)
    print(  # noqa: T201
        f"The transformer in {args.output_dir}, loaded into a plain diffusers pipeline, makes the same images "
        f"(largest difference of a pixel: {difference} of 255).\n"
        f"Pictures: {', '.join(path.name for path in sorted(args.output_dir.glob('*.png')))}\n"
        f"{time.perf_counter() - started:.0f} seconds in all."
    )
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="trl-tpgrpo demo", description="Train the embedded tiny model and show what it learned, on the CPU."
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("demo"), help="of the weights and the pictures (default: %(default)s)")
    add("--max_steps", type=int, default=150, help="updates (default: %(default)s, some minutes of one core)")
    add("--num_eval_prompts", type=int, default=160, help="held-out prompts, 4 images each (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    add(
        "--num_threads",
        type=int,
        default=1,
        help="of PyTorch; more is faster, but rounds differently (default: %(default)s)",
    )
    return parser


def build_trainer(output_dir: Path, max_steps: int, seed: int) -> TPGRPOTrainer:
    """The trainer of the demo: the paper's credit on a short window, where rewards spread, for a model this small.

    Settings were chosen on the tuning prompts. All weights are trained: so small a model learns less from an adapter.
    """
    config = TPGRPOConfig(
        output_dir=str(output_dir),
        **SETTINGS,
        sde_window_size=3,
        learning_rate=1e-4,
        lr_scheduler_type="linear",  # to 0, which does what an average of the weights would
        max_steps=max_steps,
        disable_tqdm=False,
        logging_strategy="steps",
        seed=seed,
    )
    return TPGRPOTrainer(
        model=TESTBED,
        reward_funcs=shapes_reward,
        args=config,
        train_dataset=prompt_dataset("train"),
    )


def repeated(dataset: Dataset) -> list[str]:
    """Its prompts, each as often as there are images of it."""
    return [prompt for prompt in dataset["prompt"] for _ in range(IMAGES_PER_PROMPT)]


def sample_heldout(pipeline: DiffusionPipeline, dataset: Dataset, description: str) -> list[Image.Image]:
    """Images of the dataset's prompts by the pipeline's own `__call__`, from noise that depends on their place only."""
    pipeline.set_progress_bar_config(disable=True)
    prompts, images = repeated(dataset), []
    for start in tqdm(range(0, len(prompts), 32), desc=description, disable=None):
        chunk = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(chunk))]
        options = {**PIPELINE_KWARGS, "guidance_scale": 1.0, "num_inference_steps": NUM_INFERENCE_STEPS}
        images += pipeline(chunk, generator=generators, **options).images
    return images


def report(dataset: Dataset, before: list[Score], after: list[Score]) -> str:
    """Held-out reward before and after, graded and strict, by kind of prompt."""
    kinds = np.repeat(dataset["kind"], IMAGES_PER_PROMPT)
    lines = ["", f"Held-out reward, {len(kinds)} images     graded            strict"]
    lines.append(f"{'':<28}before   after    before   after")
    for kind in (*KINDS, "all"):
        chosen = np.ones(len(kinds), bool) if kind == "all" else kinds == kind
        columns = [
            np.mean([getattr(score, name) for score, use in zip(scores, chosen, strict=True) if use])
            for name in ("graded", "strict")
            for scores in (before, after)
        ]
        lines.append(f"  {kind:<26}{columns[0]:.3f}    {columns[1]:.3f}    {columns[2]:.3f}    {columns[3]:.3f}")
    return "\n".join(lines) + "\n"


def draw_figures(
    output_dir: Path,
    trainer: TPGRPOTrainer,
    dataset: Dataset,
    before: list[Image.Image],
    after: list[Image.Image],
    scores: list[list[Score]],
) -> None:
    """The four pictures."""
    groups = [
        slice(row * IMAGES_PER_PROMPT, (row + 1) * IMAGES_PER_PROMPT)
        for row in range(min(PICTURED_PROMPTS, len(dataset)))
    ]
    save_before_after(
        output_dir / "before_after.png",
        dataset["prompt"][:PICTURED_PROMPTS],
        [before[group] for group in groups],
        [after[group] for group in groups],
        [
            [(bool(old.strict), bool(new.strict)) for old, new in zip(scores[0][group], scores[1][group], strict=True)]
            for group in groups
        ],
    )
    rewards = [float(np.mean([(score.graded + score.strict) / 2 for score in side])) for side in scores]
    history = trainer.state.log_history
    save_reward_curve(output_dir / "reward.png", history, {0: rewards[0], trainer.state.global_step: rewards[1]})
    save_step_reward_spread(output_dir / "step_reward_spread.png", history)
    draw_trajectory(output_dir / "trajectory.png", trainer, list(dataset.select(range(min(16, len(dataset))))))


def draw_trajectory(path: Path, trainer: TPGRPOTrainer, rows: list[dict]) -> None:
    """Of a few trajectories of SDE steps, all but the last, the one whose turning points gain most."""
    generators = [torch.Generator().manual_seed(index) for index in range(len(rows))]
    args = trainer.args
    sampled = trainer.sample_and_score(rows, generators, args.window(0, args.num_inference_steps - 1), EXACT)
    rewards = sampled.rewards[:, 0]  # the one reward function
    turning = turning_points(rewards)
    chosen = int((aggregated_rewards(rewards) * turning).sum(1).argmax())
    save_trajectory(
        path,
        rows[chosen]["prompt"],
        [sampled.images[place] for place in sampled.rollout.image_of[chosen]],
        rewards[chosen].numpy(),
        turning[chosen].numpy(),
    )


def compare_with_plain_pipeline(weights: Path, dataset: Dataset, images: list[Image.Image]) -> int:
    """Load the saved weights as any user of diffusers would; the largest difference from the trained model's images."""
    pipeline = build_pipeline("testbed", str(weights), "float32", "cpu")
    first = dataset.select(range(min(8, len(dataset))))
    again = sample_heldout(pipeline, first, "The saved model's images")
    pairs = zip(images[: len(again)], again, strict=True)
    return max(int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) for one, other in pairs)
