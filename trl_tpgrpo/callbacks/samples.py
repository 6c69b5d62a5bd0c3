"""Samples of a run for callbacks: the interface, and storage until the callbacks are called."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..algorithm.credit import RewardTable
from ..batches import Sampled


NUM_EVALUATION_PROMPTS, NUM_EVALUATION_IMAGES = 8, 4  # number of first prompts, and of first images of each


@dataclass(frozen=True)
class RolloutSample:
    """The first n trajectories of a rollout, whole groups where they fit, and the rewards of all N.

    Shapes: `K` SDE steps, `F` reward functions, `C + 1` images of a trajectory: the ODE completions of C latents, then
    its own. C is 0 without completions, and K if every latent is completed. If all reward functions score noisy
    states, the C images are these states, decoded without completion.
    """

    prompts: list[str]  # n
    images: list[list[Image.Image]]  # n x (C + 1)
    table: RewardTable  # of all N trajectories of all processes; the first n rows are those of the sample
    reward_names: list[str]  # F
    extra: dict[str, list] = field(default_factory=dict)  # logged columns, n values: of the trajectories' own images

    @property
    def rewards(self) -> Tensor:
        """The weighted reward of each image: float32, (n, C + 1)."""
        return self.table.rewards[: len(self.prompts)]

    @property
    def rewards_per_func(self) -> Tensor:
        """The rewards of the trajectories' own images: float32, (n, F); NaN where a function does not apply."""
        return self.table.rewards_per_func[: len(self.prompts), :, -1]

    @property
    def advantages(self) -> Tensor:
        """The advantage of each SDE step: float32, (n, K)."""
        return self.table.advantages[: len(self.prompts)]

    @property
    def turning_points(self) -> Tensor:
        """Whether the steps from one image's latent to the next are a turning point: bool, (n, C)."""
        return self.table.turning_points[: len(self.prompts), self.states[:-1]] > 0

    @property
    def states(self) -> list[int]:
        """Number of SDE steps before the ODE completion of each of the C + 1 images; K for the trajectory's own."""
        return self.table.states


@dataclass(frozen=True)
class EvaluationSample:
    """The first images of an evaluation, for the same P prompts and noise each time."""

    prefix: str  # "eval", or "eval_{name}" for one of several datasets
    prompts: list[str]  # P
    images: list[list[Image.Image]]  # P lists
    rewards: list[list[float]]  # P lists of the images' weighted training rewards


class SampleCallback(TrainerCallback):
    """Base class of callbacks that receive samples. Its methods are called on the main process only."""

    def wants_rollout(self, args: Any, state: TrainerState) -> bool:
        """Return whether to keep a sample of the next rollout; unused images are dropped."""
        return True

    def wants_evaluation(self, args: Any) -> bool:
        """Return whether to keep a sample of evaluations."""
        return True

    def on_rollout_end(
        self, args: Any, state: TrainerState, control: TrainerControl, sample: RolloutSample, **kwargs: Any
    ) -> None:
        """Receive a scored rollout, after `state.global_step` updates."""

    def on_evaluation_end(
        self, args: Any, state: TrainerState, control: TrainerControl, sample: EvaluationSample, **kwargs: Any
    ) -> None:
        """Receive an evaluation that was scored and logged."""


class Samples:
    """Keeps images on the main process until the callbacks receive them."""

    def __init__(self, handler: CallbackHandler, args: Any, reward_names: list[str], is_main_process: bool):
        self._handler, self._args, self._reward_names, self._is_main = handler, args, reward_names, is_main_process
        self._waiting: list[SampleCallback] = []
        self._images: list[list[Image.Image]] = []
        self._extra: list[dict[str, Any]] = []
        self._evaluated: dict[Hashable, tuple[str, list[tuple[Image.Image, float]]]] = {}

    def _callbacks(self) -> list[SampleCallback]:
        return [one for one in self._handler.callbacks if self._is_main and isinstance(one, SampleCallback)]

    def rollout_begins(self, state: TrainerState) -> None:
        """Ask which callbacks want a sample of the rollout."""
        self._waiting = [one for one in self._callbacks() if one.wants_rollout(self._args, state)]
        self._images, self._extra = [], []

    def keep(self, sampled: Sampled, images_of: Callable[[list[int]], list[Image.Image]]) -> None:
        """Keep the images of the rollout's first trajectories, if a callback wants them.

        `images_of` returns the images of some indices, which it may have to decode.
        """
        wanted = (self._args.num_completions_to_print or self._args.num_generations) if self._waiting else 0
        chosen = sampled.rollout.image_of[: max(0, wanted - len(self._images))]
        images, size = images_of(chosen.flatten().tolist()), chosen.shape[1]
        self._images += [images[start : start + size] for start in range(0, len(images), size)]
        extra = sampled.extra.items()
        self._extra += [{name: values[index] for name, values in extra} for index in chosen[:, -1].tolist()]

    def rollout_ends(
        self, prompts: list[str], table: RewardTable, state: TrainerState, control: TrainerControl
    ) -> None:
        """Pass the sample to callbacks, with `prompts` of this process and the `table` of all rewards."""
        columns = {name: [one.get(name) for one in self._extra] for logged in self._extra for name in logged}
        sample = RolloutSample(prompts[: len(self._images)], self._images, table, self._reward_names, columns)
        for callback in self._waiting:
            callback.on_rollout_end(self._args, state, control, sample=sample)
        self._waiting, self._images, self._extra = [], [], []

    def _evaluation_callbacks(self) -> list[SampleCallback]:
        return [one for one in self._callbacks() if one.wants_evaluation(self._args)]

    def evaluation_begins(self) -> None:
        """Forget the previous evaluation."""
        self._evaluated = {}

    def keep_evaluated(
        self,
        prompts: list[str],
        keys: Sequence[Hashable],
        images_of: Callable[[list[int]], list[Image.Image]],
        rewards: Tensor,
    ) -> None:
        """Keep the first images of the first prompts of an evaluation, with their weighted rewards (B,).

        `keys` distinguish prompts with different input images; `images_of` is as in `keep`.
        """
        scored = enumerate(zip(keys, prompts, rewards.tolist(), strict=True))
        for index, (key, prompt, reward) in scored if self._evaluation_callbacks() else ():
            if key not in self._evaluated and len(self._evaluated) == NUM_EVALUATION_PROMPTS:
                return
            kept = self._evaluated.setdefault(key, (prompt, []))[1]
            if len(kept) < min(NUM_EVALUATION_IMAGES, self._args.num_generations_eval):
                kept.append((images_of([index])[0], reward))

    def evaluation_ends(self, prefix: str, state: TrainerState, control: TrainerControl) -> None:
        """Pass the sample to callbacks (nothing at the end of a dictionary of datasets)."""
        evaluated, self._evaluated = self._evaluated, {}
        if evaluated:
            prompts = [prompt for prompt, _ in evaluated.values()]
            images = [[image for image, _ in kept] for _, kept in evaluated.values()]
            rewards = [[reward for _, reward in kept] for _, kept in evaluated.values()]
            sample = EvaluationSample(prefix, prompts, images, rewards)
            for callback in self._evaluation_callbacks():
                callback.on_evaluation_end(self._args, state, control, sample=sample)
