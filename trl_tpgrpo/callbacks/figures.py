"""Pictures of a run: before and after, the reward's course, a trajectory with its turning points, where rewards spread."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


try:
    from matplotlib.figure import Figure  # not pyplot, whose choice of a backend is the user's
except ImportError as error:
    raise ImportError("Figures need Matplotlib: pip install 'trl-tpgrpo[testbed]'") from error


GREEN, RED, GREY, BLUE = "#2a9d5c", "#d1495b", "#8a8f98", "#2f6fb3"


def save_before_after(
    path: Path,
    prompts: list[str],
    before: list[list[Image.Image]],
    after: list[list[Image.Image]],
    right: list[list[tuple[bool, bool]]],
) -> None:
    """A row for each prompt: its images before and after from the same noise, framed green where they are right.

    Args:
        path: PNG file to write.
        prompts: P prompts.
        before: P x N images.
        after: P x N images.
        right: P x N pairs, whether the image before and the one after show the prompt.
    """
    number = len(before[0])
    figure = Figure(figsize=(1.0 * (2 * number + 1) + 3.2, 1.05 * len(prompts) + 0.6))
    axes = figure.subplots(
        len(prompts), 2 * number + 1, squeeze=False,
        gridspec_kw={"width_ratios": [1] * number + [0.35] + [1] * number, "wspace": 0.08, "hspace": 0.12},
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        axes[row, number].axis("off")
        for side, images in enumerate((before[row], after[row])):
            for column, image in enumerate(images):
                axis = axes[row, column + side * (number + 1)]
                _show(axis, image, GREEN if right[row][column][side] else RED)
        axes[row, 0].set_ylabel(prompt, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    axes[0, (number - 1) // 2].set_title("before", fontsize=11)
    axes[0, number + 1 + (number - 1) // 2].set_title("after", fontsize=11)
    _save(figure, path)


def save_reward_curve(path: Path, log_history: list[dict[str, Any]], evaluations: dict[int, float]) -> None:
    """Mean reward of each rollout, and of the held-out prompts before and after.

    Args:
        path: PNG file to write.
        log_history: The trainer's `state.log_history`.
        evaluations: Held-out reward by update.
    """
    points = [(entry["step"], entry["reward"]) for entry in log_history if "reward" in entry]
    steps, rewards = np.array(points).T
    figure = Figure(figsize=(6.4, 3.6))
    axis = figure.subplots()
    axis.plot(steps, rewards, color=GREY, linewidth=0.8, label="training prompts, each rollout")
    width = max(1, len(rewards) // 10)
    if len(rewards) > 2 * width:
        smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth, color=BLUE, linewidth=2, label=f"mean of the last {width}")
    axis.plot(list(evaluations), list(evaluations.values()), "o--", color=GREEN, label="held-out prompts")
    axis.set(xlabel="update", ylabel="reward")
    axis.legend(frameon=False, fontsize=9)
    _plain(axis)
    _save(figure, path)


def save_trajectory(
    path: Path, prompt: str, images: list[Image.Image], rewards: np.ndarray, turning: np.ndarray
) -> None:
    """Write `trajectory_figure` to a PNG file."""
    _save(trajectory_figure(prompt, images, rewards, turning), path)


def trajectory_figure(
    prompt: str,
    images: list[Image.Image],
    rewards: np.ndarray,
    turning: np.ndarray,
    states: list[int] | None = None,
) -> Figure:
    """One trajectory as the paper draws it: reward along the SDE steps, the completed images below, turning points marked.

    Args:
        prompt: The prompt.
        images: C + 1 images: after so many SDE steps and then the ODE.
        rewards: (C + 1,), their rewards.
        turning: (C,) bool, whether step j (from image j to image j + 1) is a turning point.
        states: C + 1, how many SDE steps; `None`: 0, 1, 2 and so on.
    """
    number = len(images)
    figure = Figure(figsize=(1.15 * number + 1.2, 4.4))
    grid = figure.add_gridspec(2, number, height_ratios=[2.4, 1], hspace=0.35, wspace=0.08)
    axis = figure.add_subplot(grid[0, :])
    axis.plot(range(number), rewards, "o-", color=GREY, zorder=2)
    for step in np.flatnonzero(turning):
        colour = GREEN if rewards[-1] > rewards[step] else RED
        axis.plot([step, step + 1], rewards[step : step + 2], "-", color=colour, linewidth=3, zorder=3)
        axis.plot(step, rewards[step], "o", color=colour, markersize=10, zorder=4)
        axis.annotate(
            f"turning point\n{rewards[-1] - rewards[step]:+.2f}", (step, rewards[step]), textcoords="offset points",
            xytext=(0, -28 if rewards[-1] > rewards[step] else 12), ha="center", fontsize=8, color=colour,
        )  # fmt: skip
    axis.set_xlim(-0.5, number - 0.5)
    axis.margins(y=0.35)
    axis.set_xticks(range(number), [str(state) for state in states or range(number)])
    axis.set(xlabel="SDE steps before the ODE completes the image", ylabel="reward", title=prompt)
    _plain(axis)
    for column, image in enumerate(images):
        below = figure.add_subplot(grid[1, column])
        _show(below, image, GREY)
        below.set_xlabel(f"{rewards[column]:.2f}", fontsize=9)
    return figure


def as_image(figure: Figure) -> Image.Image:
    """The figure in memory, for a tracker."""
    written = BytesIO()
    figure.savefig(written, dpi=100, bbox_inches="tight")
    return Image.open(written)


def save_step_reward_spread(path: Path, log_history: list[dict[str, Any]]) -> None:
    """Where along the trajectory rewards differ within a group: standard deviation of the step rewards, and turning points.

    Args:
        path: PNG file to write.
        log_history: The trainer's `state.log_history`.
    """
    spread = _mean_by_step(log_history, "step_reward_std/step_")
    rate = _mean_by_step(log_history, "turning_points/step_")
    figure = Figure(figsize=(6.4, 3.6))
    axis = figure.subplots()
    axis.bar(range(len(spread)), spread, color=BLUE, width=0.6)
    axis.set_xticks(range(len(spread)))
    axis.set(xlabel="SDE step", ylabel="std of step rewards within a group")
    right = axis.twinx()
    right.plot(range(len(rate)), rate, "o-", color=RED)
    right.set_ylabel("share of turning points", color=RED)
    right.set_ylim(bottom=0)
    _plain(axis)
    _save(figure, path)


def _mean_by_step(log_history: list[dict[str, Any]], prefix: str) -> list[float]:
    logged = [entry for entry in log_history if f"{prefix}0" in entry]
    steps = sum(name.startswith(prefix) for name in logged[0])
    return [float(np.mean([entry[f"{prefix}{step}"] for entry in logged])) for step in range(steps)]


def save_pareto(path: Path, names: list[str], evaluations: list[float], correlations: list[float], title: str) -> None:
    """Model evaluations a trajectory against the correlation of step rewards with exact ones; the best are joined.

    Args:
        path: PNG file to write.
        names: Of N completion rules.
        evaluations: N.
        correlations: N.
        title: What they were measured on.
    """
    figure = Figure(figsize=(7, 4.2))
    axis = figure.subplots()
    order = sorted(range(len(names)), key=lambda i: (evaluations[i], -correlations[i]))
    best = [i for place, i in enumerate(order) if all(correlations[i] > correlations[j] for j in order[:place])]
    axis.plot([evaluations[i] for i in best], [correlations[i] for i in best], color=BLUE, linewidth=1, zorder=1)
    axis.scatter(evaluations, correlations, color=[BLUE if i in best else GREY for i in range(len(names))], zorder=2)
    for i, name in enumerate(names):
        above = any(evaluations[i] == evaluations[j] and correlations[i] > correlations[j] for j in range(len(names)))
        place, side = ((-6, 4), "right") if i in best else ((6, 3 if above else -9), "left")
        point = (evaluations[i], correlations[i])
        axis.annotate(name, point, xytext=place, textcoords="offset points", ha=side, fontsize=7)
    axis.margins(x=0.12)
    axis.set(xlabel="model evaluations a trajectory", ylabel="correlation of step rewards", title=title)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _show(axis: Any, image: Image.Image, frame: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(2.5)


def _plain(axis: Any) -> None:
    axis.spines[["top"]].set_visible(False)
    axis.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axis.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")
