"""Matplotlib figures: a trajectory for trackers, and the figures of `trl-tpgrpo demo` and `trl-tpgrpo fidelity`."""

from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image


try:
    from matplotlib.figure import Figure  # not pyplot, whose choice of a backend is the user's
except ImportError as error:
    raise ImportError("Figures need Matplotlib: pip install 'trl-tpgrpo[testbed]'") from error


GREEN, RED, GREY, BLUE = "#2a9d5c", "#d1495b", "#8a8f98", "#2f6fb3"


def trajectory_figure(
    prompt: str, images: list[Image.Image], rewards: np.ndarray, turning: np.ndarray, states: list[int]
) -> Figure:
    """Draw one trajectory as the paper does: reward along the SDE steps, the images below, turning points marked.

    There are C + 1 images, each made by as many SDE steps as `states` says and then the ODE, with rewards (C + 1,);
    `turning` says whether a turning point leads from image j to image j + 1: bool, (C,).
    """
    number = len(images)
    figure = Figure(figsize=(1.15 * number + 1.2, 4.6))
    grid = figure.add_gridspec(2, number, height_ratios=[2.4, 1], hspace=0.35, wspace=0.08)
    axis = figure.add_subplot(grid[0, :], xlim=(-0.5, number - 0.5))
    axis.plot(range(number), rewards, "o-", color=GREY, zorder=2, label="reward of image j, which is shown below")
    marked = np.flatnonzero(turning)
    for step in marked.tolist():
        _mark_turning_point(axis, step, rewards)
    if len(marked):
        _draw_total_change(axis, int(marked[np.abs(rewards[-1] - rewards[marked]).argmax()]), rewards)
    axis.margins(y=0.35)
    axis.set_xticks(range(number), list(map(str, states)))
    axis.set(xlabel="SDE steps j before the ODE sampler finishes the image", ylabel="reward", title=prompt)
    _plain(axis)
    for column, (image, reward) in enumerate(zip(images, rewards, strict=True)):
        below = figure.add_subplot(grid[1, column])
        _show(below, image, GREY)
        below.set_xlabel(f"{reward:.2f}", fontsize=9)
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    figure.legend(lines.values(), lines, loc="upper center", bbox_to_anchor=(0.5, 0.06), frameon=False, fontsize=9)
    return figure


def _mark_turning_point(axis: Any, step: int, rewards: np.ndarray) -> None:
    gain = rewards[-1] - rewards[step]
    colour, below = (GREEN, -28) if gain > 0 else (RED, 12)
    kind, verb = "gain" if gain > 0 else "loss", "reverses" if step else "begins"
    name = f"turning point with a {kind}: this step {verb} the trend of the reward"
    axis.plot([step, step + 1], rewards[step : step + 2], "-", color=colour, linewidth=3, zorder=3, label=name)
    axis.plot(step, rewards[step], "o", color=colour, markersize=10, zorder=4)
    style = {"xytext": (0, below), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": colour}
    axis.annotate(f"turning point\n{gain:+.2f}", (step, rewards[step]), **style)


def _draw_total_change(axis: Any, step: int, rewards: np.ndarray) -> None:
    """Draw the change from a step to the final image: a line at the reward before the step, and from it an arrow."""
    end, name = len(rewards) - 1, "arrow: credit of a turning point, the total change from its step to the final image"
    axis.plot([step, end + 0.25], [rewards[step]] * 2, "--", color=BLUE, linewidth=1.2, zorder=1, label=name)
    arrow = {"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (end + 0.2, rewards[-1]), (end + 0.2, rewards[step]), arrowprops=arrow)
    middle = (end + 0.12, (rewards[-1] + rewards[step]) / 2)
    axis.annotate(f"{rewards[-1] - rewards[step]:+.2f}", middle, ha="right", va="center", fontsize=9, color=BLUE)


def as_image(figure: Figure) -> Image.Image:
    """Return the figure as an image in memory, for a tracker."""
    written = BytesIO()
    figure.savefig(written, dpi=100, bbox_inches="tight")
    return Image.open(written)


def before_after_figure(
    prompts: list[str], before: list[list[Image.Image]], after: list[list[Image.Image]], right: np.ndarray
) -> Figure:
    """Draw P x N images of P prompts before and after, framed green where they are `right`: bool, (2, P, N)."""
    number = len(before[0])
    widths = {"width_ratios": [1] * number + [0.35] + [1] * number, "wspace": 0.08, "hspace": 0.12}
    figure = Figure(figsize=(2.1 * number + 2.6, 1.05 * len(prompts) + 0.6))
    axes = figure.subplots(len(prompts), 2 * number + 1, squeeze=False, gridspec_kw=widths)
    for row, prompt in enumerate(prompts):
        axes[row, number].axis("off")
        columns, shown = np.delete(axes[row], number), [*before[row], *after[row]]
        for axis, image, is_right in zip(columns, shown, right[:, row].flatten(), strict=True):
            _show(axis, image, GREEN if is_right else RED)
        caption = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 13, "labelpad": 8}
        axes[row, 0].set_ylabel(fill(prompt, 22), **caption)
    for name, first, is_right in (("before", 0, right[0]), ("after", number + 1, right[1])):
        title = f"{name}: {is_right.sum()} of {is_right.size} right"
        axes[0, first].set_title(title, fontsize=15, loc="left")
    return figure


def reward_figure(log_history: list[dict[str, Any]], evaluations: dict[int, float]) -> Figure:
    """Draw the mean reward of each rollout of a trainer's log history, and the held-out reward by update."""
    steps, rewards = np.array([(entry["step"], entry["reward"]) for entry in log_history if "reward" in entry]).T
    figure, axis = _axis(xlabel="update", ylabel="reward")
    axis.plot(steps, rewards, color=GREY, linewidth=0.8, label="training prompts, each rollout")
    width = max(1, len(rewards) // 10)
    if len(rewards) > 2 * width:
        smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth, color=BLUE, linewidth=2, label=f"mean of the last {width}")
    axis.plot(list(evaluations), list(evaluations.values()), "o--", color=GREEN, label="held-out prompts")
    axis.legend(frameon=False, fontsize=9)
    return figure


def save_pareto(path: Path, names: list[str], nfe: list[float], correlations: list[float]) -> None:
    """Draw function evaluations per trajectory against the correlation of N completion rules; the best are joined."""
    title = "Completions: cost and fidelity"
    figure, axis = _axis(
        xlabel="function evaluations per trajectory", ylabel="correlation of step rewards", title=title
    )
    order = sorted(range(len(names)), key=lambda i: (nfe[i], -correlations[i]))
    best = [i for rank, i in enumerate(order) if all(correlations[i] > correlations[j] for j in order[:rank])]
    axis.plot([nfe[i] for i in best], [correlations[i] for i in best], color=BLUE, linewidth=1, zorder=1)
    axis.scatter(nfe, correlations, color=[BLUE if i in best else GREY for i in range(len(names))], zorder=2)
    for i, name in enumerate(names):
        above = any(nfe[i] == nfe[j] and correlations[i] > correlations[j] for j in range(len(names)))
        offset, side = ((-6, 4), "right") if i in best else ((6, 3 if above else -9), "left")
        point = (nfe[i], correlations[i])
        axis.annotate(name, point, xytext=offset, textcoords="offset points", ha=side, fontsize=7)
    axis.margins(x=0.12)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _axis(**labels: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.8))
    axis = figure.subplots(subplot_kw=labels)
    _plain(axis)
    return figure, axis


def _show(axis: Any, image: Image.Image, frame: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=frame, linewidth=2.5)


def _plain(axis: Any) -> None:
    axis.spines["top"].set_visible(False)
    axis.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axis.set_axisbelow(True)
