"""Two rewards of very different spread, summed before and after they are normalised (GDPO), on the testbed.

The demo's settings, with `shapes_reward` (0 to 1) and `colourfulness` (tens), which pull in different directions: the
dark background is not colourful. Both are evaluated on held-out prompts before and after.

    python benchmarks/two_rewards.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.algorithm.credit import AGGREGATIONS
from trl_tpgrpo.rewards import colourfulness
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


ROOT = Path(__file__).parents[1]


def run(aggregation: str, weights: list[float], max_steps: int, seed: int) -> dict[str, object]:
    """Held-out rewards before and after training."""
    with tempfile.TemporaryDirectory() as folder:
        config = TPGRPOConfig(
            folder, use_cpu=True, **PIPELINE_KWARGS, guidance_scale=1.0, num_inference_steps=8,
            num_inference_steps_eval=8, sde_window_size=3, num_generations=8, per_device_train_batch_size=64,
            gradient_accumulation_steps=1, sde_type="flow_sde", epsilon=1e-3, beta=0.0, learning_rate=1e-4,
            lr_scheduler_type="linear", ema_decay=None, multi_objective_aggregation=aggregation,
            reward_weights=weights, num_generations_eval=4, per_device_eval_batch_size=64,
            activation_checkpointing=False, max_steps=max_steps, save_strategy="no", disable_tqdm=True, seed=seed,
            log_images_steps=None,
        )  # fmt: skip
        trainer = TPGRPOTrainer(
            TESTBED, [shapes_reward, colourfulness], config, prompt_dataset("train"), prompt_dataset("heldout", 104)
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    names = [f"eval_rewards/{name}/{what}" for name in trainer.reward_func_names for what in ("mean", "std")]
    return {"aggregation": aggregation, "reward_weights": weights, "seed": seed, "max_steps": max_steps} | {
        name: [before[name], after[name]] for name in names
    }


def main() -> None:
    """Train with each aggregation, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_steps", type=int, default=60, help="updates (default: %(default)s)")
    parser.add_argument("--reward_weights", type=float, nargs=2, default=[1.0, 1.0], help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: %(default)s)")
    parser.add_argument("--aggregations", nargs="+", default=list(AGGREGATIONS), help="(default: all)")
    parser.add_argument("--name", default="two_rewards", help="of the result file (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [
        run(aggregation, args.reward_weights, args.max_steps, seed)
        for seed in args.seeds
        for aggregation in args.aggregations
    ]
    (ROOT / f"benchmarks/results/{args.name}.json").write_text(json.dumps(runs, indent=1))
    print(json.dumps(runs, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
