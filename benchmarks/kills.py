"""Kill a run at moments drawn at random, resume it, and compare the weights bit by bit with a run that was not killed.

Runs of 6 updates on the testbed that save each time, keep two checkpoints, train twice on each rollout and average:
for a LoRA and for all weights. Each is forked from this process, sent SIGKILL after a share of the time that a whole
run takes, of which the first quarter is loading, and resumed in another; without a whole checkpoint it begins anew.
The status is 1 if any weight differs.

    python benchmarks/kills.py --moments 30
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.callbacks.checkpoints import INCOMPLETE, is_complete, numbered
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


SETTINGS: dict = {
    "use_cpu": True, "num_generations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 2,
    "gradient_accumulation_steps": 2, "num_iterations": 2, "num_inference_steps": 3, "learning_rate": 1e-4,
    "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "ema_update_every": 2,
    "report_to": [], "disable_tqdm": True, "activation_checkpointing": False, **PIPELINE_KWARGS,
}  # fmt: skip


def train(folder: Path, lora: bool) -> None:
    """Begin or go on with a run, and write a hash of its weights when it has ended."""
    sys.stdout = sys.stderr = open(folder.with_suffix(".log"), "a")
    torch.set_num_threads(1)
    adapter = LoraConfig(r=8, lora_alpha=16) if lora else None
    args = TPGRPOConfig(str(folder), **SETTINGS)
    dataset = prompt_dataset("train", 32)
    trainer = TPGRPOTrainer(TESTBED, shapes_reward, args, dataset, peft_config=adapter)
    trainer.train(resume_from_checkpoint=any(is_complete(path) for _, path in numbered(folder)) or None)
    digest = hashlib.sha256()
    for value in (one for one in trainer.model.parameters() if one.requires_grad):
        digest.update(value.detach().numpy().tobytes())
    (folder / "digest.txt").write_text(digest.hexdigest())


def run(folder: Path, lora: bool, seconds: float = 600) -> bool:
    """Run in a process of its own and kill it after some seconds; say whether it had ended by then."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, lora))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        sys.exit(f"A run has failed: {folder.with_suffix('.log').read_text()[-3000:]}")
    return process.exitcode == 0


def show(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30, help="kills of each kind of weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws, differing = random.Random(options.seed), 0
    show("| weights | killed after | whole checkpoints | half written | the same |\n|---|---|---|---|---|")
    for name in ("LoRA", "all"):
        with tempfile.TemporaryDirectory() as directory:
            whole, begun = Path(directory) / "whole", time.monotonic()
            run(whole, name == "LoRA")
            duration, number = time.monotonic() - begun, 0
            while number < options.moments:
                share, killed = draws.uniform(0.25, 1.0), Path(directory) / f"killed-{number}"
                if run(killed, name == "LoRA", share * duration):
                    (killed / "digest.txt").unlink()  # it was faster than the whole one: killed after its end
                found = [path for _, path in numbered(killed)]
                halves = sum((path / INCOMPLETE).exists() for path in found)
                run(killed, name == "LoRA")
                same = (killed / "digest.txt").read_text() == (whole / "digest.txt").read_text()
                differing, number = differing + (not same), number + 1
                told = (name, f"{share:.0%}", len(found) - halves, halves, "yes" if same else "NO")
                show(f"| {' | '.join(map(str, told))} |")
    show(f"{2 * options.moments} kills, of which {differing} gave other weights.")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
