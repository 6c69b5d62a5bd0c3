"""`log_completions`: with each log a table of a few samples, and their images in a folder."""

import importlib.util
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerControl, TrainerState

from ..config import TPGRPOConfig
from .samples import RolloutSample, SampleCallback


HAS_RICH = importlib.util.find_spec("rich") is not None
WIDTH = 120


class CompletionPrinter(SampleCallback):
    """Prints the latest rollout's sample with each log."""

    def __init__(self) -> None:
        self._sample: RolloutSample | None = None

    def wants_rollout(self, args: TPGRPOConfig, state: TrainerState) -> bool:
        return args.log_completions

    def on_rollout_end(
        self, args: TPGRPOConfig, state: TrainerState, control: TrainerControl, sample: RolloutSample, **kwargs: Any
    ) -> None:
        self._sample = sample

    def on_log(
        self,
        args: TPGRPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._sample is not None:
            folder = Path(args.output_dir) / "completions" / f"step_{state.global_step:06d}"
            rows = table(self._sample, save(self._sample, folder))
            tqdm.write(rendered(rows, f"Samples of update {state.global_step}: {folder}"))
            self._sample = None


def save(sample: RolloutSample, folder: Path) -> list[Path]:
    """Write the trajectories' own images; the files, n."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.png" for number in range(len(sample.images))]
    for path, images in zip(paths, sample.images, strict=True):
        images[-1].save(path)
    return paths


def table(sample: RolloutSample, files: list[Path]) -> list[list[str]]:
    """A row of titles and n of cells: file, prompt, rewards, mean advantage over the steps, rewards along the trajectory.

    Rewards along the trajectory are those of the ODE's image of each state; `*` marks those that a turning point starts from.
    """
    functions = sample.rewards_per_func.tolist()
    titles = [*sample.reward_names, *sample.extra, "advantage", "rewards along the trajectory (* turns)"]
    rows = [["image", "prompt", *titles]]
    for number, prompt in enumerate(sample.prompts):
        own = ["-" if reward != reward else f"{reward:.3f}" for reward in functions[number]]
        advantage = f"{sample.advantages[number].mean():+.2f}"
        extra = [str(values[number]) for values in sample.extra.values()]
        rows.append([files[number].name, prompt, *own, *extra, advantage, drawn(sample, number)])
    return rows


def drawn(sample: RolloutSample, number: int) -> str:
    """A trajectory as text: `0.21 0.35 0.80* 0.78`."""
    turns = [*sample.turning_points[number].tolist(), False]
    rewards = sample.rewards[number].tolist()
    return " ".join(f"{reward:.2f}{'*' if turning else ''}" for reward, turning in zip(rewards, turns, strict=True))


def rendered(rows: list[list[str]], title: str) -> str:
    """The rows as a table below a title, by rich if it is there."""
    if HAS_RICH:
        return f"{title}\n{_by_rich(rows)}"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([title, *lines])


def _by_rich(rows: list[list[str]]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    titles, *body = rows
    pretty = Table()
    for name in titles:
        pretty.add_column(name, justify="left" if name in ("image", "prompt", titles[-1]) else "right")
    for row in body:
        pretty.add_row(*map(Text, row))  # a prompt may hold what looks like markup
    written = StringIO()
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    Console(file=written, width=max(80, width), force_terminal=sys.stdout.isatty()).print(pretty)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())
