"""What a slow reward costs that is scored beside the model: an iteration, as a ratio to one with an instant reward.

On the testbed, with rollouts of several sweeps. The reward waits as a server's client does, altogether as long as a
rollout takes to be sampled and decoded; once beside the model (`runs_in = "thread"`) and once not (`"main"`).

    python benchmarks/reward_overlap.py
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


ROOT = Path(__file__).parents[1]


class Waiting:
    """The testbed's reward, after a wait for each image."""

    __name__ = "waiting"

    def __init__(self, runs_in: str, seconds: float):
        self.runs_in, self.seconds = runs_in, seconds

    def __call__(self, images: list[Image.Image], prompts: list[str], **columns: object) -> list[float]:
        time.sleep(self.seconds * len(images))
        return shapes_reward(images=images, prompts=prompts)


def iterations(reward: object, num_sweeps: int, number: int, folder: str) -> list[dict[str, float]]:
    """Return the logs of `number` iterations after the first, with their wall-clock seconds as `iteration`."""
    config = TPGRPOConfig(
        folder, use_cpu=True, **PIPELINE_KWARGS, guidance_scale=1.0, num_inference_steps=8, sde_window_size=3,
        num_generations=8, per_device_train_batch_size=64, steps_per_generation=num_sweeps,
        gradient_accumulation_steps=num_sweeps, sde_type="flow_sde", epsilon=1e-3, beta=0.0, learning_rate=1e-5,
        ema_decay=None, activation_checkpointing=False, max_steps=number + 1, save_strategy="no", disable_tqdm=True,
        guard_rails="off",
    )  # fmt: skip
    trainer = TPGRPOTrainer(TESTBED, reward, config, prompt_dataset("train"))
    ends: list[float] = []
    log = trainer.log

    def timed_log(logs: dict[str, float], *args: object) -> None:
        ends.append(time.perf_counter())
        log(logs, *args)

    trainer.log = timed_log
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "seconds/train" in entry]
    pairs = zip(logs[1:], ends[1:], ends[:-1], strict=False)
    return [{**entry, "iteration": end - start} for entry, end, start in pairs]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--num_sweeps", type=int, default=8, help="sweeps of a rollout, 64 images each (default: %(default)s)"
    )
    parser.add_argument("--number", type=int, default=3, help="iterations that are measured (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plain = iterations(shapes_reward, args.num_sweeps, args.number, folder)
        sampling = statistics.median(entry["seconds/rollout"] + entry["seconds/decode"] for entry in plain)
        a_reward = sampling / plain[0]["num_scored_images"]
        ways = {
            way: iterations(Waiting(way, a_reward), args.num_sweeps, args.number, folder) for way in ("thread", "main")
        }
    alone = statistics.median(entry["iteration"] for entry in plain)
    results: dict[str, object] = {
        "num_sweeps": args.num_sweeps,
        "seconds": {"sampling and decoding": sampling, "an iteration with an instant reward": alone},
        "torch": torch.__version__,
    }
    for way, logs in ways.items():
        taken = statistics.median(entry["iteration"] for entry in logs)
        results[way] = {"seconds": taken, "to an iteration with an instant reward": taken / alone}
    (ROOT / "benchmarks/results/reward_overlap.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
