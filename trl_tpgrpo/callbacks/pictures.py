"""Images, trajectory figures and histograms for TensorBoard, W&B and trackio alike, and grids of evaluations on disk."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ..config import TPGRPOConfig
from .grids import Row, first_row, grid, size_in_grid, wrapped
from .samples import EvaluationSample, RolloutSample, SampleCallback


logger = logging.getLogger(__name__)

COLUMNS = 4
"""Images beside each other in a grid of a rollout."""

EVALUATIONS = 10
"""At most so many rows in the picture of evaluations over time: the first, the latest, and some between."""


@dataclass
class Pictures:
    """What is sent to trackers.

    Attributes:
        images: By name, one image.
        captioned: By name, images with captions, and the grid that has both for a tracker without captions.
        histograms: By name, the values.
    """

    images: dict[str, Image.Image] = field(default_factory=dict)
    captioned: dict[str, tuple[list[tuple[Image.Image, str]], Image.Image]] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)


class PictureCallback(SampleCallback):
    """Sends pictures of rollouts and evaluations to the trackers among the trainer's callbacks.

    Args:
        handler: Of the trainer's callbacks, which may be added and removed at any time.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        self._handler = handler
        self._last_shown = -1
        self._steps: dict[str, set[int]] = {}
        self._warned = False

    def wants_rollout(self, args: TPGRPOConfig, state: TrainerState) -> bool:
        """The first rollout, and then the first after every `log_images_steps` updates, if anything reports."""
        if args.log_images_steps is None or not self._trackers():
            return False
        return state.global_step // args.log_images_steps > self._last_shown

    def on_train_begin(self, args: TPGRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_shown = -1

    def on_rollout_end(
        self, args: TPGRPOConfig, state: TrainerState, control: TrainerControl, sample: RolloutSample, **kwargs: Any
    ) -> None:
        assert args.log_images_steps is not None
        self._last_shown = state.global_step // args.log_images_steps
        pictures = of_rollout(sample)
        if sample.rewards.shape[1] > 1 and self._can_draw():
            pictures.images["rollout/trajectory"] = trajectory_image(sample)
        self._send(pictures, state)

    def on_evaluation_end(
        self, args: TPGRPOConfig, state: TrainerState, control: TrainerControl, sample: EvaluationSample, **kwargs: Any
    ) -> None:
        if args.log_images_steps is None:
            return
        folder = Path(args.output_dir) / "images" / sample.prefix
        folder.mkdir(parents=True, exist_ok=True)
        shown = grid([of_prompt(sample, number) for number in range(len(sample.prompts))])
        shown.save(_file(folder, state.global_step))
        logged = {entry["step"] for entry in state.log_history if f"{sample.prefix}_runtime" in entry}
        steps = self._steps.setdefault(sample.prefix, set())
        steps |= {state.global_step, *logged}  # the log history has those before a resume
        course = over_time(sample, folder, sorted(steps), shown.size)
        course.save(folder / "over_time.png")
        name = sample.prefix.replace("_", "/", 1)  # as transformers names the metrics of evaluations
        separator = "_" if "/" in name else "/"
        self._send(Pictures({f"{name}{separator}images": shown, f"{name}{separator}over_time": course}), state)

    def _trackers(self) -> list[TrainerCallback]:
        return [one for one in self._handler.callbacks if isinstance(one, tuple(SENDERS))]

    def _send(self, pictures: Pictures, state: TrainerState) -> None:
        for tracker in self._trackers():
            send = next(send for kind, send in SENDERS.items() if isinstance(tracker, kind))
            send(tracker, pictures, state.global_step)

    def _can_draw(self) -> bool:
        """Whether Matplotlib is there; says so once if it is not."""
        found = importlib.util.find_spec("matplotlib") is not None
        if not found and not self._warned:
            self._warned = True
            logger.warning("Trajectory figures need Matplotlib: pip install 'trl-tpgrpo[testbed]'. Images go without.")
        return found


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.png"


def of_rollout(sample: RolloutSample) -> Pictures:
    """Images with prompt and reward, and how rewards, step rewards and advantages of the whole rollout spread."""
    own = [images[-1] for images in sample.images]
    captions = [f"{reward:.3f}" for reward in sample.rewards[:, -1].tolist()]
    rows = []
    for prompt in dict.fromkeys(sample.prompts):
        chosen = [place for place, its_prompt in enumerate(sample.prompts) if its_prompt == prompt]
        row = Row(prompt, [own[place] for place in chosen], [captions[place] for place in chosen])
        rows += wrapped(row, COLUMNS)
    captioned = [
        (image, f"{prompt}: {caption}") for image, prompt, caption in zip(own, sample.prompts, captions, strict=True)
    ]
    values = {"rewards": sample.table.rewards[:, -1], "advantages": sample.table.advantages}
    if sample.rewards.shape[1] > 1:
        values["step_rewards"] = sample.table.step_rewards
    return Pictures(
        captioned={"rollout/samples": (captioned, grid(rows))},
        histograms={f"rollout/{name}": tensor[tensor.isfinite()].numpy() for name, tensor in values.items()},
    )


def trajectory_image(sample: RolloutSample) -> Image.Image:
    """The sample's trajectory whose turning points gain or lose most, or, where none turns, whose rewards spread most."""
    from .figures import as_image, trajectory_figure  # needs Matplotlib

    rewards, turning = sample.rewards, sample.turning_points
    gained = ((rewards[:, -1:] - rewards[:, :-1]).abs() * turning).sum(1)
    scores = gained if turning.any() else rewards.std(1, correction=0)
    chosen = int(scores.nan_to_num(-1.0).argmax())  # not one that a reward function has failed on
    return as_image(
        trajectory_figure(
            sample.prompts[chosen],
            sample.images[chosen],
            rewards[chosen].numpy(),
            turning[chosen].numpy(),
            sample.states,
        )
    )


def of_prompt(sample: EvaluationSample, number: int) -> Row:
    """A row of an evaluation's grid: the images of one prompt with their rewards."""
    captions = [f"{reward:.3f}" for reward in sample.rewards[number]]
    return Row(sample.prompts[number], sample.images[number], captions)


def over_time(sample: EvaluationSample, folder: Path, steps: list[int], size: tuple[int, int]) -> Image.Image:
    """The first prompt's images, a row for each of several evaluations, cut out of the grids in `folder`.

    Args:
        sample: The latest evaluation.
        folder: Of the grids.
        steps: Of the evaluations; those whose grid is not there, or not of this size, are left out.
        size: Of a grid.
    """
    number, of_image = len(sample.images[0]), size_in_grid(sample.images[0][0])
    found: dict[int, list[Image.Image]] = {}
    for step in steps:
        if _file(folder, step).exists():
            with Image.open(_file(folder, step)) as picture:
                if picture.size == size:
                    found[step] = first_row(picture, of_image, number)
    places = np.linspace(0, len(found) - 1, min(len(found), EVALUATIONS)).round().astype(int)
    chosen = [list(found)[place] for place in places]
    titles = [f"update {step}" for step in chosen]
    titles[0] = f"{sample.prompts[0]}, {titles[0]}"
    return grid([Row(title, found[step], [""] * number) for title, step in zip(titles, chosen, strict=True)])


def to_tensorboard(tracker: TensorBoardCallback, pictures: Pictures, step: int) -> None:
    """Through the callback's own writer; captions are in the grids."""
    grids = {name: whole for name, (_, whole) in pictures.captioned.items()}
    for name, image in (pictures.images | grids).items():
        tracker.tb_writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    for name, values in pictures.histograms.items():
        tracker.tb_writer.add_histogram(name, values, step)
    tracker.tb_writer.flush()


def to_wandb(tracker: WandbCallback, pictures: Pictures, step: int) -> None:
    """To the run that the callback has begun."""
    import wandb

    captioned = {
        name: [wandb.Image(image, caption=caption) for image, caption in images]
        for name, (images, _) in pictures.captioned.items()
    }
    wandb.log(_media(wandb, pictures) | captioned | {"train/global_step": step})


def to_trackio(tracker: TrackioCallback, pictures: Pictures, step: int) -> None:
    """To the run that the callback has begun; trackio has no lists of images, so each has a name of its own."""
    import trackio

    captioned = {
        f"{name}_{number:02d}": trackio.Image(image, caption=caption)
        for name, (images, _) in pictures.captioned.items()
        for number, (image, caption) in enumerate(images)
    }
    trackio.log(_media(trackio, pictures) | captioned | {"train/global_step": step})


def _media(module: ModuleType, pictures: Pictures) -> dict[str, Any]:
    """W&B's classes, whose names trackio has too."""
    images = {name: module.Image(image) for name, image in pictures.images.items()}
    return images | {name: module.Histogram(values) for name, values in pictures.histograms.items()}


SENDERS: dict[type[TrainerCallback], Callable[[Any, Pictures, int], None]] = {
    TensorBoardCallback: to_tensorboard,
    WandbCallback: to_wandb,
    TrackioCallback: to_trackio,
}
