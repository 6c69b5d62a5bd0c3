"""What a shared probability ratio costs: memory and time of an update by chunk against one by step.

Two ways to the gradient of a clipped product of ratios: a pass before that finds the ratios, after which each step has
a backward of its own (the trainer's), or all steps of a chunk in one graph. Memory is what autograd keeps for the
backward at most, counted; time is CPU seconds, the median over turns in one process. The model is the testbed's.

    python benchmarks/chunk_ratios.py
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.algorithm.losses import clipped_surrogate
from trl_tpgrpo.batches import Trajectories
from trl_tpgrpo.commands.demo import SETTINGS
from trl_tpgrpo.testbed import TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


NUM_STEPS = 7
PARTITIONS = {"chunks [1, 2, 4]": [1, 2, 4], "trajectory": [NUM_STEPS]}


class Kept:
    """A tensor that autograd keeps; the bytes of storages that are kept are counted, once each."""

    holders: Counter[int] = Counter()  # of each storage, by its address
    now = most = 0

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # or an output would keep its own graph
        self.address, self.size = (of := tensor.untyped_storage()).data_ptr(), of.nbytes()
        Kept.holders[self.address] += 1
        Kept.now += self.size if Kept.holders[self.address] == 1 else 0
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.holders[self.address] -= 1
        Kept.now -= 0 if Kept.holders[self.address] else self.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder)
        trajectories = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ways: dict[str, Callable[[], None]] = {"step": lambda: by_step(trainer, trajectories)}
    for name, sizes in PARTITIONS.items():
        ways[f"{name}, ratios first"] = lambda sizes=tuple(sizes): ratios_first(trainer, trajectories, sizes)
        ways[f"{name}, one graph"] = lambda sizes=tuple(sizes): one_graph(trainer, trajectories, sizes)
    figures = {name: ([], 0) for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            seconds, size = measure(way)
            figures[name] = ([*figures[name][0], seconds], size)
    base_seconds, base_size = np.median(figures["step"][0]), figures["step"][1]
    for name, (seconds, size) in figures.items():
        print(f"{name:<32} time {np.median(seconds) / base_seconds:.2f}  memory {size / base_size:.2f}")  # noqa: T201


def build(folder: str) -> TPGRPOTrainer:
    """Return a trainer of all weights with one rollout of 64 trajectories of seven SDE steps."""
    changes = {"credit": "outcome", "log_prob_type": "gaussian", "report_to": "none"}
    args = TPGRPOConfig(folder, **SETTINGS | changes)
    trainer = TPGRPOTrainer(TESTBED, shapes_reward, args, train_dataset=prompt_dataset("train", 64))
    trainer.model.train()
    return trainer


def measure(way: Callable[[], None]) -> tuple[float, int]:
    """Return the CPU seconds of a way, and the bytes that autograd keeps for it at most."""
    start = time.process_time()
    way()
    seconds = time.process_time() - start
    Kept.most = Kept.now
    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        way()
    return seconds, Kept.most


def by_step(trainer: TPGRPOTrainer, trajectories: Trajectories) -> None:
    """Take the gradient as `training_step` does, step by step."""
    trainer.model.zero_grad()
    for position in range(NUM_STEPS):
        (trainer.compute_loss(trainer.model, trajectories.transitions(position)) / NUM_STEPS).backward()


def ratios_first(trainer: TPGRPOTrainer, trajectories: Trajectories, sizes: tuple[int, ...]) -> None:
    """Take the gradient as the trainer does with chunks."""
    trajectories = Trajectories(**vars(trajectories) | {"chunks": sizes})
    now = trainer.rollouts.recomputed(trajectories, trainer.compute_loss_context_manager)
    by_step(trainer, trajectories.with_chunk_ratios(now))


def one_graph(trainer: TPGRPOTrainer, trajectories: Trajectories, sizes: tuple[int, ...]) -> None:
    """Take the gradient of each chunk's clipped product of ratios."""
    trainer.model.zero_grad()
    advantages = trajectories.table.advantages[trajectories.rows][:, 0]
    position = 0
    for size in sizes:
        log_ratios = [log_ratio(trainer, trajectories, step) for step in range(position, position + size)]
        mean = torch.stack(log_ratios, 1).mean(1)
        (clipped_surrogate(mean, advantages, 1e-3, 1e-3).loss.mean() / len(sizes)).backward()
        position += size


def log_ratio(trainer: TPGRPOTrainer, trajectories: Trajectories, position: int) -> Tensor:
    """Compute the log-ratio of a step, with its graph."""
    inputs = trajectories.transitions(position)
    velocity = trainer.policy.velocity(trainer.model, inputs.latents, inputs.step, inputs.conditioning)
    return inputs.log_prob(inputs.transition(velocity)) - inputs.old_log_probs


if __name__ == "__main__":
    main()
