"""Train with two states of the code and compare the weights bit by bit.

    python benchmarks/same_weights.py --before REVISION

Check out REVISION beside the working tree, train the bundled toy model with both in one run under each of `SETTINGS`,
and compare a digest of the trained weights, of the weights that are saved (their moving average) and of the logged
rewards. A checkpoint that REVISION wrote inside a rollout is resumed by both too. Exit with 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
COMMON = {
    "num_inference_steps": 6,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "generation_batch_size": 32,
    "max_steps": 6,
    "activation_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "log_images_steps": None,
    "save_strategy": "no",
    "guard_rails": "off",
}
SETTINGS = {
    "the paper's defaults, LoRA, average": {"ema_update_every": 2, "lora": True},
    "outcome, flow_sde, all weights, no KL": {
        "credit": "outcome", "sde_type": "flow_sde", "beta": 0.0, "epsilon": 1e-3, "learning_rate": 1e-4,
        "ema_decay": None,
    },
    "dance_sde, two iterations, all weights, KL": {
        "sde_type": "dance_sde", "num_iterations": 2, "epsilon": 1e-3, "learning_rate": 1e-4, "ema_update_every": 3,
    },
    "lambda, cheap completions, joint scale over the batch": {
        "credit": "lambda", "credit_lambda": 0.8, "completion": "at_1_2_3", "advantage_scope": "joint",
        "scale_rewards": "batch", "advantage_baseline": "completion", "lora": True,
    },
    "random window, guidance, shared noise": {
        "sde_window_size": 2, "sde_window_range": [0, 4], "guidance_scale": 2.0, "negative_prompt": "a green square",
        "share_initial_noise": True, "lora": True,
    },
}  # fmt: skip
CHECKPOINT = {"ema_update_every": 1, "lora": True, "save_strategy": "steps", "save_steps": 3, "num_iterations": 2}
"""Update 3 of two passes of two updates each: inside a rollout, with an average."""


def digest(tensors: dict) -> str:
    """Hash the names and bits of tensors."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(name.encode() + tensors[name].detach().contiguous().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def read_weights(path: Path) -> dict:
    """Read trained weights; of an adapter with its scale in them, wherever the file has it."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    scale = header.get("transformer.lora_alpha", 1) / header.get("transformer.r", 1)
    return {name: value * scale if ".lora_B." in name else value for name, value in tensors.items()}


def train(output_dir: Path, resume: Path | None = None, **settings: object) -> str:
    """Train the bundled toy model; the digests of its weights, of what it saves and of its rewards."""
    from peft import LoraConfig

    from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
    from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
    from trl_tpgrpo.testbed.checker import shapes_reward

    options = {"guidance_scale": 1.0, **PIPELINE_KWARGS, **COMMON, **settings}
    lora = LoraConfig(r=8, lora_alpha=16) if options.pop("lora", False) else None
    trainer = TPGRPOTrainer(
        model=TESTBED,
        reward_funcs=shapes_reward,
        args=TPGRPOConfig(str(output_dir), **options),
        train_dataset=prompt_dataset("train", 32),
        peft_config=lora,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.save_model()
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    saved = [read_weights(path) for path in output_dir.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    rewards_digest = hashlib.sha256(repr(rewards).encode()).hexdigest()[:8]
    return f"{digest(trained)} {digest(saved[0])} {rewards_digest}"


def train_all(folder: Path, checkpoint: Path) -> dict[str, str]:
    """Train under every setting, and resume the checkpoint, writing it first if it is not there."""
    import torch

    torch.set_num_threads(1)
    found = {name: train(folder / str(place), **settings) for place, (name, settings) in enumerate(SETTINGS.items())}
    if not checkpoint.exists():
        train(folder / "whole", **CHECKPOINT)
        shutil.copytree(folder / "whole/checkpoint-3", checkpoint)
    found["resumed inside a rollout of the state before"] = train(folder / "resumed", checkpoint, **CHECKPOINT)
    return found


def results_of(root: Path, folder: Path, checkpoint: Path) -> dict[str, str]:
    """The digests of the code in `root`, from a process of its own."""
    command = [sys.executable, __file__, "--train", str(folder), "--checkpoint", str(checkpoint)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    run = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    """Compare, and print a line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", help="a revision, such as v0.1.0")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        print(json.dumps(train_all(args.train, args.checkpoint)))  # noqa: T201
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        before, checkpoint = Path(scratch) / "before", Path(scratch) / "checkpoint-3"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), args.before], check=True)
        try:
            old, new = (results_of(root, Path(scratch) / root.name, checkpoint) for root in (before, ROOT))
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    for name in old:
        both = f"same       {old[name]}" if old[name] == new[name] else f"DIFFERENT  {old[name]}, now {new[name]}"
        print(f"{both}  {name}")  # noqa: T201
    return int(old != new)


if __name__ == "__main__":
    raise SystemExit(main())
