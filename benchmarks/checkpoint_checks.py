"""What checks cost an honest user: of a checkpoint's files, as a share of its time, and of a config, of an update's.

One run on the testbed for each kind of weights, in one process with one thread, which saves after each update. Then a
file of the size of real weights, as the ratio does not depend on the rest. The times are wall-clock seconds, medians.

    python benchmarks/checkpoint_checks.py
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kills import SETTINGS, show
from peft import LoraConfig
from safetensors.torch import save_file

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.callbacks import checkpoints
from trl_tpgrpo.testbed import TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


Times = dict[str, list[float]]


def timed(times: Times, name: str, function: Callable) -> Callable:
    """Return the function, whose seconds are added to `times`."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[name].append(time.perf_counter() - begun)

    return measured


def measure(folder: Path, lora: bool, num_updates: int) -> Times:
    """Train, and return the seconds of each checkpoint, of its checksums, of the config and of each update."""
    times: Times = defaultdict(list)
    settings = {**SETTINGS, "max_steps": num_updates, "num_iterations": 1, "gradient_accumulation_steps": 2}
    for _ in range(num_updates):
        args = timed(times, "config", TPGRPOConfig)(str(folder), **settings)
    adapter = LoraConfig(r=32, lora_alpha=64) if lora else None
    trainer = TPGRPOTrainer(TESTBED, shapes_reward, args, prompt_dataset("train", 32), peft_config=adapter)
    trainer._save_checkpoint = timed(times, "checkpoint", trainer._save_checkpoint)
    trainer.training_step = timed(times, "half an update", trainer.training_step)
    write, check = checkpoints.write_checksums, checkpoints.check_files
    checkpoints.write_checksums = timed(times, "checksums", write)
    try:
        trainer.train()
    finally:
        checkpoints.write_checksums = write
    for _, path in checkpoints.numbered(folder):
        timed(times, "check on resuming", check)(path)
    return times


def large(folder: Path, size: int) -> tuple[float, float]:
    """Return the seconds in which a file of so many bytes is written, and has its checksum computed."""
    times: Times = defaultdict(list)
    weights = {"weights": torch.randn(size // 4)}
    for _ in range(3):
        timed(times, "write", save_file)(weights, folder / "weights.safetensors")
        timed(times, "checksum", checkpoints.write_checksums)(folder, "")
    return median(times["write"]), median(times["checksum"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the large file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    show("| weights | checkpoint, ms | its checksums | checked on resuming, ms | update, ms | config |")
    show("|---|---|---|---|---|---|")
    for name in ("LoRA", "all"):
        with tempfile.TemporaryDirectory() as directory:
            times = measure(Path(directory), name == "LoRA", options.updates)
        found = {key: 1000 * median(values) for key, values in times.items()}
        update, without = 2 * found["half an update"], found["checkpoint"] - found["checksums"]
        shares = found["checksums"] / without, found["config"] / update
        row = f"{found['checkpoint']:.0f} | {shares[0]:.1%} | {found['check on resuming']:.1f} | {update:.0f}"
        show(f"| {name} | {row} | {shares[1]:.1%} |")
    with tempfile.TemporaryDirectory() as directory:
        write, checksum = large(Path(directory), options.megabytes * 2**20)
    show(f"\nA file of {options.megabytes} MiB: written in {write:.2f} s, checksum in {checksum:.2f} s.")


if __name__ == "__main__":
    main()
