"""Step credit with each trust region on the testbed: 30 updates, two on each rollout, the second off policy.

All weights are trained with the paper's credit on four steps, in rollouts of 512 images; a row is one seed. Rewards
are means of the trajectories of the first and the last three rollouts; the other columns are means over the second
updates. Results go to benchmarks/results/losses.json, as they come.

    python benchmarks/losses.py [LOSS ...]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.commands.demo import SETTINGS
from trl_tpgrpo.testbed import TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


RESULTS = Path(__file__).parent / "results/losses.json"
SHARED = {
    **SETTINGS, "sde_window_size": 4, "completion": "at_1_2_3_5", "learning_rate": 2e-4, "max_steps": 30,
    "generation_batch_size": 512, "gradient_accumulation_steps": 4, "guard_rails": "stop", "report_to": "none",
}  # fmt: skip
LOSSES: dict[str, dict[str, Any]] = {
    "clip, 1e-3": {},
    "dppo, 1e-6": {"loss_type": "dppo", "epsilon": None},
    "dppo, 1.3e-4": {"loss_type": "dppo", "epsilon": None, "kl_mask_threshold": 1.3e-4},
    "ratio_norm, 2e-6": {"ratio_norm": True, "epsilon": None},
    "ratio_norm, 2.3e-5": {"ratio_norm": True, "epsilon": 2.3e-5},
    "chunks [1, 3]": {"importance_sampling_level": "chunk", "chunk_sizes": [1, 3]},
    "chunks by change": {"importance_sampling_level": "chunk"},
    "trajectory": {"importance_sampling_level": "trajectory"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"of {list(LOSSES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for loss in args.losses or LOSSES:
        rows[f"{loss}, seed {args.seed}"] = row = measure(LOSSES[loss], args.seed)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(loss, row, flush=True)  # noqa: T201


def measure(changes: dict[str, Any], seed: int) -> dict[str, float]:
    """Train with a loss; a guard rail that fires ends the benchmark."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = TPGRPOConfig(folder, seed=seed, **SHARED | changes)
        trainer = TPGRPOTrainer(TESTBED, shapes_reward, config, train_dataset=prompt_dataset("train", 2048))
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    second = history[1::2]
    means = {
        name: float(np.mean([entry[name] for entry in second]))
        for name in ("ratio/max_deviation", "ratio/frac_above_one", "clip_ratio", "mask_ratio", "divergence/mean")
        if name in second[0]
    }
    ends = {"reward of first rollouts": np.mean(rewards[:3]), "of last rollouts": np.mean(rewards[-3:])}
    return {
        **{name: float(value) for name, value in ends.items()},
        **means,
        "CPU seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    main()
