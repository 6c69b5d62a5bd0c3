"""Images, trajectory figures and histograms for TensorBoard, W&B and trackio, and grids of evaluations on disk."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from .grids import grid
from .samples import EvaluationSample, RolloutSample, SampleCallback


logger = logging.getLogger(__name__)


@dataclass
class Pictures:
    """What is sent to trackers, by name.

    Attributes:
        images: One image each.
        captioned: Images with captions, and the grid that has both for a tracker without captions.
        histograms: Values.
    """

    images: dict[str, Image.Image] = field(default_factory=dict)
    captioned: dict[str, tuple[list[tuple[Image.Image, str]], Image.Image]] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)


class PictureCallback(SampleCallback):
    """Sends pictures of rollouts and evaluations to the trackers among the trainer's callbacks.

    Args:
        handler: Owner of the trainer's callbacks, which may be added and removed at any time.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        self._handler = handler
        self._last_shown = -1
        self._warned = False

    def wants_rollout(self, args: Any, state: TrainerState) -> bool:
        """Return whether it is the first rollout, or the first after every `log_images_steps` updates."""
        if args.log_images_steps is None or not self._trackers():
            return False
        return state.global_step // args.log_images_steps > self._last_shown

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_shown = -1

    def on_rollout_end(
        self, args: Any, state: TrainerState, control: TrainerControl, sample: RolloutSample, **kwargs: Any
    ) -> None:
        self._last_shown = state.global_step // args.log_images_steps
        pictures = rollout_pictures(sample)
        if sample.rewards.shape[1] > 1 and self._can_draw():
            pictures.images["rollout/trajectory"] = trajectory_image(sample)
        self._send(pictures, state)

    def on_evaluation_end(
        self, args: Any, state: TrainerState, control: TrainerControl, sample: EvaluationSample, **kwargs: Any
    ) -> None:
        if args.log_images_steps is None:
            return
        folder = Path(args.output_dir) / "images" / sample.prefix
        folder.mkdir(parents=True, exist_ok=True)
        images = (list(zip(*pair, strict=True)) for pair in zip(sample.images, sample.rewards, strict=True))
        shown = grid(dict(zip(sample.prompts, images, strict=True)))
        shown.save(folder / f"step_{state.global_step:06d}.png")
        name = sample.prefix.replace("_", "/", 1)  # as transformers names the metrics of evaluations
        self._send(Pictures({f"{name}{'_' if '/' in name else '/'}images": shown}), state)

    def _trackers(self) -> list[TrainerCallback]:
        return [one for one in self._handler.callbacks if isinstance(one, tuple(SENDERS))]

    def _send(self, pictures: Pictures, state: TrainerState) -> None:
        for tracker in self._trackers():
            send = next(send for kind, send in SENDERS.items() if isinstance(tracker, kind))
            send(tracker, pictures, state.global_step)

    def _can_draw(self) -> bool:
        """Return whether Matplotlib is there; say so once if it is not."""
        found = importlib.util.find_spec("matplotlib") is not None
        if not found and not self._warned:
            self._warned = True
            logger.warning("Trajectory figures need Matplotlib: pip install 'trl-tpgrpo[testbed]'. Images go without.")
        return found


def rollout_pictures(sample: RolloutSample) -> Pictures:
    """Return the sample's images with prompts and rewards, and what the histograms of the whole rollout show."""
    own, rewards = [images[-1] for images in sample.images], sample.rewards[:, -1].tolist()
    by_prompt: dict[str, list[tuple[Image.Image, float]]] = {}
    for prompt, image, reward in zip(sample.prompts, own, rewards, strict=True):
        by_prompt.setdefault(prompt, []).append((image, reward))
    captions = [f"{prompt}: {reward:.3f}" for prompt, reward in zip(sample.prompts, rewards, strict=True)]
    spread = {"rewards": sample.table.rewards[:, -1], "advantages": sample.table.advantages}
    if sample.rewards.shape[1] > 1:
        spread["step_rewards"] = sample.table.step_rewards
    return Pictures(
        captioned={"rollout/samples": (list(zip(own, captions, strict=True)), grid(by_prompt))},
        histograms={f"rollout/{name}": tensor[tensor.isfinite()].numpy() for name, tensor in spread.items()},
    )


def trajectory_image(sample: RolloutSample) -> Image.Image:
    """Draw the trajectory whose turning points gain or lose most, or, where none turns, whose rewards spread most."""
    from .figures import as_image, trajectory_figure  # needs Matplotlib

    rewards, turning = sample.rewards, sample.turning_points
    gained = ((rewards[:, -1:] - rewards[:, :-1]).abs() * turning).sum(1)
    scores = gained if turning.any() else rewards.std(1, correction=0)
    chosen = int(scores.nan_to_num(-1.0).argmax())  # not one that a reward function has failed on
    values, turns = rewards[chosen].numpy(), turning[chosen].numpy()
    return as_image(trajectory_figure(sample.prompts[chosen], sample.images[chosen], values, turns, sample.states))


def to_tensorboard(tracker: TensorBoardCallback, pictures: Pictures, step: int) -> None:
    """Send pictures through the callback's own writer; captions are in the grids."""
    grids = {name: whole for name, (_, whole) in pictures.captioned.items()}
    for name, image in (pictures.images | grids).items():
        tracker.tb_writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    for name, values in pictures.histograms.items():
        tracker.tb_writer.add_histogram(name, values, step)
    tracker.tb_writer.flush()


def to_wandb(tracker: WandbCallback, pictures: Pictures, step: int) -> None:
    """Send pictures to the run that the callback has begun."""
    import wandb

    captioned = {
        name: [wandb.Image(image, caption=caption) for image, caption in images]
        for name, (images, _) in pictures.captioned.items()
    }
    wandb.log(_media(wandb, pictures) | captioned | {"train/global_step": step})


def to_trackio(tracker: TrackioCallback, pictures: Pictures, step: int) -> None:
    """Send pictures to the run that the callback has begun; trackio has no lists of images, each has a name."""
    import trackio

    captioned = {
        f"{name}_{number:02d}": trackio.Image(image, caption=caption)
        for name, (images, _) in pictures.captioned.items()
        for number, (image, caption) in enumerate(images)
    }
    trackio.log(_media(trackio, pictures) | captioned | {"train/global_step": step})


def _media(module: Any, pictures: Pictures) -> dict[str, Any]:
    """Return pictures as objects of W&B's classes, whose names trackio has too."""
    images = {name: module.Image(image) for name, image in pictures.images.items()}
    return images | {name: module.Histogram(values) for name, values in pictures.histograms.items()}


SENDERS: dict[type[TrainerCallback], Callable[[Any, Pictures, int], None]] = {
    TensorBoardCallback: to_tensorboard,
    WandbCallback: to_wandb,
    TrackioCallback: to_trackio,
}
