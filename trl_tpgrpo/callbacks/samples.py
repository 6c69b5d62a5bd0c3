"""Samples of a run for those who want to see some: the interface of their callbacks, and what is kept for them until then."""

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..algorithm.credit import RewardTable
from ..batches import Sampled
from ..config import TPGRPOConfig


PROMPTS_OF_EVALUATION, IMAGES_OF_A_PROMPT = 8, 4
"""How much of an evaluation is kept: the first images of its first prompts."""


@dataclass(frozen=True)
class RolloutSample:
    """The first n trajectories of a rollout, whole groups where they fit, and the rewards of all N.

    Shapes: `K` SDE steps, `F` reward functions, `C + 1` images of a trajectory, of which the last is its own and the others
    are what the ODE makes of its states. C is 0 where there are no completions, and K where every state has one.

    Attributes:
        prompts: n.
        images: n x (C + 1).
        table: The rewards of all N trajectories of all processes; the first n rows are those of the sample.
        reward_names: F.
        extra: Columns that reward functions have logged beside their rewards, by name: n values, of the trajectories' own
            images.
    """

    prompts: list[str]
    images: list[list[Image.Image]]
    table: RewardTable
    reward_names: list[str]
    extra: dict[str, list] = field(default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """float32, (n, C + 1): the weighted reward of each image."""
        return self.table.rewards[: len(self.prompts)]

    @property
    def rewards_per_func(self) -> Tensor:
        """float32, (n, F): of the trajectories' own images; NaN where a function does not apply."""
        return self.table.rewards_per_func[: len(self.prompts), :, -1]

    @property
    def advantages(self) -> Tensor:
        """float32, (n, K)."""
        return self.table.advantages[: len(self.prompts)]

    @property
    def turning_points(self) -> Tensor:
        """bool, (n, C): whether the steps from an image's state to the next one's are a turning point."""
        if self.rewards.shape[1] == 1:
            return torch.zeros(len(self.prompts), 0, dtype=torch.bool)
        return self.table.turning_points[: len(self.prompts), :: self.table.every] > 0

    @property
    def states(self) -> list[int]:
        """C + 1: after how many SDE steps the ODE has made each image; K for the last, the trajectory's own."""
        completed = range(0, self.table.num_steps, self.table.every) if self.rewards.shape[1] > 1 else []
        return [*completed, self.table.num_steps]


@dataclass(frozen=True)
class EvaluationSample:
    """The first images of an evaluation: of the same prompts from the same noise each time.

    Attributes:
        prefix: `"eval"`, or `"eval_{name}"` for one of several datasets.
        prompts: P.
        images: P lists of images.
        rewards: P lists of their weighted rewards (of the functions that are trained on).
    """

    prefix: str
    prompts: list[str]
    images: list[list[Image.Image]]
    rewards: list[list[float]]


class SampleCallback(TrainerCallback):
    """Base class of callbacks that look at samples. Its methods are called on the main process, and change nothing."""

    def wants_rollout(self, args: TPGRPOConfig, state: TrainerState) -> bool:
        """Whether to keep a sample of the rollout that begins; images that nobody wants are dropped."""
        return True

    def on_rollout_end(
        self, args: TPGRPOConfig, state: TrainerState, control: TrainerControl, sample: RolloutSample, **kwargs: Any
    ) -> None:
        """A rollout has been scored; `state.global_step` updates have been made before it."""

    def on_evaluation_end(
        self, args: TPGRPOConfig, state: TrainerState, control: TrainerControl, sample: EvaluationSample, **kwargs: Any
    ) -> None:
        """An evaluation has been scored and logged."""


class Samples:
    """Keeps what the callbacks want to see until they get it.

    Args:
        handler: Of the trainer's callbacks, which may be added and removed at any time.
        args: The settings.
        reward_names: Of the functions that are trained on.
        is_main_process: Elsewhere nothing is kept.
    """

    def __init__(self, handler: CallbackHandler, args: TPGRPOConfig, reward_names: list[str], is_main_process: bool):
        self._handler, self._args, self._reward_names = handler, args, reward_names
        self._is_main_process = is_main_process
        self._waiting: list[SampleCallback] = []
        self._images: list[list[Image.Image]] = []
        self._extra: dict[str, list] = {}
        self._evaluated: dict[str, tuple[list[Image.Image], list[float]]] = {}

    def _callbacks(self) -> list[SampleCallback]:
        found = [one for one in self._handler.callbacks if isinstance(one, SampleCallback)]
        return found if self._is_main_process else []

    def rollout_begins(self, state: TrainerState) -> None:
        """Ask who wants to see it."""
        self._waiting = [one for one in self._callbacks() if one.wants_rollout(self._args, state)]
        self._images, self._extra = [], {}

    def keep(self, sampled: Sampled) -> None:
        """Keep the images of the rollout's first trajectories, if anyone waits for them."""
        wanted = (self._args.num_completions_to_print or self._args.num_generations) if self._waiting else 0
        for places in sampled.rollout.image_of[: max(0, wanted - len(self._images))].tolist():
            for name, values in sampled.extra.items():
                column = self._extra.setdefault(name, [None] * len(self._images))  # the sweeps before had none
                column.append(values[places[-1]])
            self._images.append([sampled.images[place] for place in places])

    def rollout_ends(
        self, prompts: list[str], table: RewardTable, state: TrainerState, control: TrainerControl
    ) -> None:
        """Hand the sample out.

        Args:
            prompts: Of the rows of this process, one a trajectory.
            table: The rewards of all processes.
            state: The trainer's.
            control: The trainer's.
        """
        waiting, images, extra = self._waiting, self._images, self._extra
        self._waiting, self._images, self._extra = [], [], {}
        if waiting:
            columns = {name: [*values, *[None] * (len(images) - len(values))] for name, values in extra.items()}
            sample = RolloutSample(prompts[: len(images)], images, table, self._reward_names, columns)
            for callback in waiting:
                callback.on_rollout_end(self._args, state, control, sample=sample)

    def evaluation_begins(self) -> None:
        """Forget the one before."""
        self._evaluated = {}

    def keep_evaluated(self, prompts: list[str], images: list[Image.Image], rewards: Tensor) -> None:
        """Keep the first images of the first prompts of an evaluation, with their weighted rewards (B,)."""
        of_a_prompt = min(IMAGES_OF_A_PROMPT, self._args.num_generations_eval or 1)
        for prompt, image, reward in zip(prompts, images, rewards.tolist(), strict=True) if self._callbacks() else []:
            if prompt not in self._evaluated and len(self._evaluated) == PROMPTS_OF_EVALUATION:
                return
            kept, its_rewards = self._evaluated.setdefault(prompt, ([], []))
            if len(kept) < of_a_prompt:
                kept.append(image)
                its_rewards.append(reward)

    def evaluation_ends(self, prefix: str, state: TrainerState, control: TrainerControl) -> None:
        """Hand the sample out; a dictionary of datasets ends after the last of them, with nothing of its own."""
        evaluated, self._evaluated = self._evaluated, {}
        if evaluated:
            images, rewards = (list(values) for values in zip(*evaluated.values(), strict=True))
            sample = EvaluationSample(prefix, list(evaluated), images, rewards)
            for callback in self._callbacks():
                callback.on_evaluation_end(self._args, state, control, sample=sample)
