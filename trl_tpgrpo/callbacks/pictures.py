"""Images, trajectory figures and histograms for TensorBoard, W&B and trackio, and grids of evaluations on disk.

Grids are drawn by diffusers and Pillow, because Matplotlib is optional.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from .samples import EvaluationSample, RolloutSample, SampleCallback


logger = logging.getLogger(__name__)

LIBRARIES = {WandbCallback: "wandb", TrackioCallback: "trackio"}
SMALLEST, LARGEST = 112, 256  # pixels of the longer side of images in a grid
GAP, CAPTION, TITLE, TITLE_WIDTH = 6, 18, 24, 360
INK, GREY, PAPER = "#22262b", "#6b7280", "#ffffff"


@dataclass
class Pictures:
    """Pictures for trackers, by name."""

    images: dict[str, Image.Image] = field(default_factory=dict)
    # Images with captions, and a grid of both for trackers without captions
    captioned: dict[str, tuple[list[tuple[Image.Image, str]], Image.Image]] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)


class PictureCallback(SampleCallback):
    """Sends pictures to the trackers among `handler.callbacks`, which may change at any time."""

    def __init__(self, handler: CallbackHandler) -> None:
        self._handler, self._last_shown, self._warned = handler, -1, False

    def wants_rollout(self, args: Any, state: TrainerState) -> bool:
        """Return whether this is the first rollout, or the first after `log_images_steps` more updates."""
        is_on = args.log_images_steps is not None and len(self._trackers()) > 0
        return is_on and state.global_step // args.log_images_steps > self._last_shown

    def wants_evaluation(self, args: Any) -> bool:
        return args.log_images_steps is not None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_shown = -1

    def on_rollout_end(self, args: Any, state: Any, control: Any, sample: RolloutSample, **kwargs: Any) -> None:
        self._last_shown = state.global_step // args.log_images_steps
        pictures = rollout_pictures(sample)
        if sample.rewards.shape[1] > 1:
            try:
                pictures.images["rollout/trajectory"] = trajectory_image(sample)
            except ImportError as error:  # Matplotlib is optional
                if not self._warned:
                    logger.warning("%s. Images are sent without trajectory figures.", error)
                self._warned = True
        self._send(pictures, state.global_step)

    def on_evaluation_end(self, args: Any, state: Any, control: Any, sample: EvaluationSample, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / "images" / sample.prefix
        folder.mkdir(parents=True, exist_ok=True)
        scored = (list(zip(*pair, strict=True)) for pair in zip(sample.images, sample.rewards, strict=True))
        shown = grid(list(zip(sample.prompts, map(list, scored), strict=True)))
        shown.save(folder / f"step_{state.global_step:06d}.png")
        name = sample.prefix.replace("_", "/", 1)  # as transformers names the metrics of evaluations
        self._send(Pictures({f"{name}{'_' if '/' in name else '/'}images": shown}), state.global_step)

    def _trackers(self) -> list[TrainerCallback]:
        return [one for one in self._handler.callbacks if isinstance(one, (TensorBoardCallback, *LIBRARIES))]

    def _send(self, pictures: Pictures, step: int) -> None:
        for tracker in self._trackers():
            if isinstance(tracker, TensorBoardCallback):
                to_tensorboard(tracker.tb_writer, pictures, step)
            else:
                to_library(next(name for kind, name in LIBRARIES.items() if isinstance(tracker, kind)), pictures, step)


def rollout_pictures(sample: RolloutSample) -> Pictures:
    """Return the sample's images with prompts and rewards, and histograms of the whole rollout."""
    own, rewards = [images[-1] for images in sample.images], sample.rewards[:, -1].tolist()
    scored, size = list(zip(own, rewards, strict=True)), sample.table.num_generations
    groups = [(sample.prompts[first], scored[first : first + size]) for first in range(0, len(scored), size)]
    captions = [f"{prompt}: {reward:.3f}" for prompt, reward in zip(sample.prompts, rewards, strict=True)]
    spread = {"rewards": sample.table.rewards[:, -1], "advantages": sample.table.advantages}
    if sample.rewards.shape[1] > 1:
        spread["step_rewards"] = sample.table.step_rewards
    return Pictures(
        captioned={"rollout/samples": (list(zip(own, captions, strict=True)), grid(groups))},
        histograms={f"rollout/{name}": tensor[tensor.isfinite()].numpy() for name, tensor in spread.items()},
    )


def trajectory_image(sample: RolloutSample) -> Image.Image:
    """Draw the trajectory with the largest turning points or, without any, with the largest spread of rewards."""
    from .figures import as_image, trajectory_figure  # raises ImportError without Matplotlib

    rewards, turning = sample.rewards, sample.turning_points
    gained = ((rewards[:, -1:] - rewards[:, :-1]).abs() * turning).sum(1)
    scores = gained if turning.any() else rewards.std(1, correction=0)
    chosen = int(scores.nan_to_num(-1.0).argmax())  # not a failed one
    values, turns = rewards[chosen].numpy(), turning[chosen].numpy()
    return as_image(trajectory_figure(sample.prompts[chosen], sample.images[chosen], values, turns, sample.states))


def to_tensorboard(writer: Any, pictures: Pictures, step: int) -> None:
    """Send pictures to TensorBoard's writer; captions are in the grids."""
    grids = {name: whole for name, (_, whole) in pictures.captioned.items()}
    for name, image in (pictures.images | grids).items():
        writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    for name, values in pictures.histograms.items():
        writer.add_histogram(name, values, step)
    writer.flush()


def to_library(library: str, pictures: Pictures, step: int) -> None:
    """Send pictures to the run of a callback, by the classes of W&B and trackio."""
    module = importlib.import_module(library)
    media = {name: module.Image(image) for name, image in pictures.images.items()}
    media |= {name: module.Histogram(values) for name, values in pictures.histograms.items()}
    for name, (images, _) in pictures.captioned.items():
        captioned = [module.Image(image, caption=caption) for image, caption in images]
        # trackio has no lists of images, so each image has a name.
        named = {f"{name}_{number:02d}": image for number, image in enumerate(captioned)}
        media |= {name: captioned} if library == "wandb" else named
    module.log(media | {"train/global_step": step})


def grid(shown: list[tuple[str, list[tuple[Image.Image, float]]]], names: Sequence[str] = ()) -> Image.Image:
    """Draw each prompt above its images, with rewards below them, in rows of 4 (more for narrow images).

    `names` of the images are shown before the rewards.
    """
    labels = [f"{name} " for name in names] + [""] * max(len(images) for _, images in shown)
    rows = [
        [_cell(image, f"{label}{reward:.3f}") for label, (image, reward) in zip(labels, images, strict=False)]
        for _, images in shown
    ]
    columns = max(min(4, max(map(len, rows))), -(-TITLE_WIDTH // rows[0][0].width))
    cells: list[Image.Image] = []
    titles: list[str] = []
    for (prompt, _), row in zip(shown, rows, strict=True):
        cells += row + [Image.new("RGB", row[0].size, PAPER)] * (-len(row) % columns)
        titles += [prompt] + [""] * ((len(row) - 1) // columns)
    picture = make_image_grid(cells, len(titles), columns)
    longest = picture.width // 8  # characters
    for index, title in enumerate(titles):
        text = title if len(title) <= longest else f"{title[: longest - 3]}..."
        corner = (GAP, index * cells[0].height + 2)
        ImageDraw.Draw(picture).text(corner, text, INK, ImageFont.load_default(15))
    return picture


def resized(image: Image.Image) -> Image.Image:
    """Return an image at a visible size: nearest neighbour for small images, averaging for large ones."""
    if max(image.size) > LARGEST:
        return ImageOps.contain(image, (LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return ImageOps.scale(image, -(-SMALLEST // max(image.size)), Image.Resampling.NEAREST)


def _cell(image: Image.Image, caption: str) -> Image.Image:
    cell = ImageOps.expand(resized(image.convert("RGB")), (GAP, TITLE, GAP, CAPTION), PAPER)
    top = (cell.width / 2, cell.height - CAPTION + 2)
    ImageDraw.Draw(cell).text(top, caption, GREY, ImageFont.load_default(12), anchor="ma")
    return cell
