"""The cost of a training iteration with step-level credit, relative to Flow-GRPO with the same window and batch.

Rollouts of 8 prompts x 8 images with one update each, T = 10, K = 9, on the testbed or a tiny FLUX, all ways in turns
in one process with one thread, on the same prompts. A ratio is that of CPU seconds within a turn, and the median over
turns. Settings: "lean" (no KL term, no activation checkpointing) and "paper" (the config's defaults: both). Results go
to benchmarks/results/iteration.json.

    python benchmarks/iteration.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from models import NUM_TOKENS, load_policy
from peft import LoraConfig
from transformers import TrainerCallback

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.testbed import PIPELINE_KWARGS, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


ROOT = Path(__file__).parents[1]
PHASES = ("rollout", "decode", "score", "train")
SETTINGS = {
    "lean, all weights": {"beta": 0.0, "activation_checkpointing": False},
    "lean, LoRA": {"beta": 0.0, "activation_checkpointing": False, "lora": True},
    "paper, LoRA": {"lora": True},
}
FLOW = {"credit": "outcome"}
WAYS = {
    "Flow-GRPO": FLOW,
    "exact": {},
    "exact, shared initial noise": {"share_initial_noise": True},
    "at_1_2_3_4_5_7": {"completion": "at_1_2_3_4_5_7"},
    "at_1_2_3_4_6": {"completion": "at_1_2_3_4_6"},
    "measured window, exact": {"sde_window_share": 0.9},
    "measured window, at_1_2_3_4_5_7": {"sde_window_share": 0.9, "completion": "at_1_2_3_4_5_7"},
    "Flow-GRPO, K = 3": {**FLOW, "sde_window_size": 3},
    "exact, K = 3": {"sde_window_size": 3},
}


class StepClock(TrainerCallback):
    """CPU seconds of each update with its rollout."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self._start = time.process_time()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.process_time() - self._start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd3", help="sd3, flux, or a folder with a pipeline (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=3, help="iterations a turn; the first warms up (default: %(default)s)"
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--name", default="iteration", help="of the result file (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for setting in args.settings:
        turns = [
            {way: measure(args.model, args.steps, {**SETTINGS[setting], **changes}) for way, changes in WAYS.items()}
            for _ in range(args.turns)
        ]
        of_setting = [{"setting": setting, "way": way, **summary(way, turns)} for way in WAYS]
        print(report(of_setting), flush=True)  # noqa: T201
        rows += of_setting
    results = {"model": args.model, "threads": 1, "torch": torch.__version__, "rows": rows}
    (ROOT / "benchmarks/results" / f"{args.name}.json").write_text(json.dumps(results, indent=1))


def summary(way: str, turns: list[dict[str, dict]]) -> dict:
    """The median ratio to Flow-GRPO with the same window (K = 9 for a measured one), and the means of all else."""
    flow = "Flow-GRPO, K = 3" if way.endswith("K = 3") else "Flow-GRPO"
    means = {key: float(np.mean([turn[way][key] for turn in turns])) for key in turns[0][way]}
    ratios = [turn[way]["cpu"] / turn[flow]["cpu"] for turn in turns]
    return {**means, "ratio": float(np.median(ratios)), "ratios": ratios}


def measure(model: str, steps: int, changes: dict) -> dict:
    """CPU seconds of an iteration, the first left out, and where they went."""
    changes = dict(changes)
    peft_config = LoraConfig(r=32, lora_alpha=64) if changes.pop("lora", False) else None
    flux = {"height": 32, "width": 32, "max_sequence_length": NUM_TOKENS, "guidance_scale": 3.5}
    sizes = {**PIPELINE_KWARGS, "guidance_scale": 1.0} if model == "sd3" else flux
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "num_inference_steps": 10,
            "num_generations": 8,
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "per_device_rollout_batch_size": 64,
            "learning_rate": 1e-6,  # rewards stay as they are
            "max_steps": steps,
        }
        args = TPGRPOConfig(
            folder,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{**sizes, **settings, **changes},
        )
        trainer = TPGRPOTrainer(
            model=load_policy(model).pipeline,
            reward_funcs=shapes_reward,
            args=args,
            train_dataset=prompt_dataset("train"),
            peft_config=peft_config,
        )
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.callback_handler.callbacks = [
            clock,
            *(c for c in trainer.callback_handler.callbacks if not is_printer(c)),
        ]
        trainer.train()
    logs = trainer.state.log_history[1:steps]
    mean = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
    return {
        "cpu": float(np.mean(clock.seconds[1:])),
        **{phase: mean[f"seconds/{phase}"] for phase in PHASES},
        "evaluations": mean["nfe"] / 64,
        "train_evaluations": mean["nfe_train"] / 64,
        "images": mean["num_decoded_images"] / 64,
        "zero_advantages": mean["advantages/frac_zero"],
    }


def is_printer(callback: TrainerCallback) -> bool:
    return type(callback).__name__ == "PrinterCallback"


def report(rows: list[dict]) -> str:
    """A table in Markdown: ratios to Flow-GRPO with the same window, and the share of each phase."""
    lines = [
        f"**{rows[0]['setting']}**",
        "",
        "| way | / Flow-GRPO | rollout | decode | score | train | NFE | trained on | images | zero advantages |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        total = sum(row[phase] for phase in PHASES)
        shares = " | ".join(f"{row[phase] / total:.0%}" for phase in PHASES)
        lines.append(
            f"| {row['way']} | {row['ratio']:.2f} | {shares} | {row['evaluations']:.1f} | "
            f"{row['train_evaluations']:.1f} | {row['images']:.1f} | {row['zero_advantages']:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
