"""`log_completions`: a table of samples with each log, and their images in a folder.

The setting's name is TRL's, for the output of a language model. Here it refers to the trajectories' own images.
Elsewhere in this package, a completion is an ODE completion of a latent.
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerControl, TrainerState

from .samples import RolloutSample, SampleCallback
from .terminal import show


class SamplePrinter(SampleCallback):
    """Prints the latest rollout's sample with each log."""

    def __init__(self) -> None:
        self._sample: RolloutSample | None = None

    def wants_rollout(self, args: Any, state: TrainerState) -> bool:
        return args.log_completions

    def wants_evaluation(self, args: Any) -> bool:
        return False

    def on_rollout_end(self, args: Any, state: Any, control: Any, sample: RolloutSample, **kwargs: Any) -> None:
        self._sample = sample

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._sample is None:
            return
        folder = Path(args.output_dir) / "completions" / f"step_{state.global_step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, images in enumerate(self._sample.images):
            images[-1].save(folder / f"{index:02d}.png")
        show(f"Samples of update {state.global_step}: {folder}\n{rendered(table(self._sample))}")
        self._sample = None


def table(sample: RolloutSample) -> Table:
    """Return for each sample: image file, prompt, rewards, mean advantage over steps, trajectory."""
    titles = ["image", "prompt", *sample.reward_names, *sample.extra, "advantage"]
    shown = Table(*titles, "rewards along the trajectory (* turns)")
    for index, prompt in enumerate(sample.prompts):
        rewards = ["-" if reward != reward else f"{reward:.3f}" for reward in sample.rewards_per_func[index].tolist()]
        extra = [str(values[index]) for values in sample.extra.values()]
        advantage = f"{sample.advantages[index].mean():+.2f}"
        row = [f"{index:02d}.png", prompt, *rewards, *extra, advantage, trajectory(sample, index)]
        shown.add_row(*map(Text, row))  # a prompt may contain markup
    return shown


def trajectory(sample: RolloutSample, index: int) -> str:
    """Return the rewards along a trajectory, with a `*` where a turning point starts: `0.21 0.35 0.80* 0.78`."""
    turns = [*sample.turning_points[index].tolist(), False]
    rewards = sample.rewards[index].tolist()
    return " ".join(f"{reward:.2f}{'*' if turning else ''}" for reward, turning in zip(rewards, turns, strict=True))


def rendered(shown: Table) -> str:
    """Return a table as text, at least 80 characters wide."""
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    written = io.StringIO()  # rich's capture would flush the terminal's stream, and end the run if its reader has gone
    Console(file=written, width=width, force_terminal=sys.stdout.isatty()).print(shown)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())
