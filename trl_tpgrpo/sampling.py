"""The trainer's rollouts: trajectories, their images, the rewards of these, and what they are compared in."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from .algorithm.completion import CompletionRule
from .algorithm.credit import RewardTable, shortest_window, step_reward_variances
from .algorithm.fidelity import compare
from .algorithm.rollout import EXACT, Window
from .batches import Sampled, Unscored
from .callbacks.progress import ProgressDisplay
from .callbacks.samples import Samples
from .generation import on_device, sweeps
from .metrics import Metrics, image_variety
from .policies.base import Conditioning, to_images
from .resuming import ResumingTrainer
from .rewards.contract import RewardError, RewardFunc, check_applicability
from .rewards.scorer import ImageBatch, Scorer, save_evidence


logger = logging.getLogger(__name__)

NOISE, WINDOW, EVALUATION, PROBE, CARD = range(5)
"""What a seed is for; the random numbers of one never depend on how many another took."""

UNSCORED_SWEEPS = 2
"""So many may wait for their rewards while the next is sampled; their images are kept until then."""

PROBED_GROUPS = 16
"""How many prompts of a process the window is measured on."""


class SamplingTrainer(ResumingTrainer):
    """What [`TPGRPOTrainer`] samples and scores."""

    reward_func_names: list[str]
    reward_weights: Tensor
    samples: Samples
    scorer: Scorer
    _metrics: dict[str, Metrics]
    _offloaded_rewards: list[Any]
    _scores_tensors: bool

    @property
    def _policy_model(self) -> torch.nn.Module:
        """What predicts outside of an update: sharded weights need their wrapper, DDP's would only exchange buffers."""
        return self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _sample_in_sweeps(
        self,
        rows: list[dict[str, Any]],
        generators: list[torch.Generator],
        window: Window,
        rule: CompletionRule | None,
    ) -> tuple[Tensor, Tensor, RewardTable]:
        """States, log-probabilities and rewards of B rows; a sweep is scored while the next are sampled."""
        sampled: list[Sampled] = []
        under_way: deque[Unscored] = deque()
        for part in self.progress.sweeps(sweeps(len(rows), self.args)):
            under_way.append(self._sample(rows[part], generators[part], window, rule, self.reward_funcs))
            if len(under_way) > UNSCORED_SWEEPS:
                sampled.append(self._keep_of_sweep(under_way.popleft()))
            if any(one.error for one in sampled) and self.accelerator.num_processes == 1:
                break  # several processes must keep in step until they stop together
        sampled += [self._keep_of_sweep(one) for one in under_way]
        self._stop_together(next((one.error for one in sampled if one.error), None))
        states = torch.cat([one.rollout.states for one in sampled])
        log_probs = torch.cat([one.rollout.log_probs for one in sampled])
        rewards, failed = torch.cat([one.rewards for one in sampled]), torch.cat([one.failed for one in sampled])
        table = self._reward_table([row["prompt"] for row in rows], rewards, failed, window, rule)
        if table.left_out.all():
            self._stop_together(next(error for one in sampled for error in one.skipped))
        return states, log_probs, table

    def _keep_of_sweep(self, unscored: Unscored) -> Sampled:
        """What is kept of a sweep when it has been scored: no images, but what they looked like."""
        sampled, prompts = self._scored(unscored), unscored.scoring.batch.prompts
        own = sampled.rollout.image_of[:, -1].tolist()
        variety = image_variety([sampled.images[place] for place in own], [prompts[place] for place in own])
        self._metrics["train"].record("image_variety", variety)
        self.samples.keep(sampled)
        return sampled.without_images()

    def _reward_table(
        self, prompts: list[str], rewards: Tensor, failed: Tensor, window: Window, rule: CompletionRule | None
    ) -> RewardTable:
        """The rewards (B, F, C + 1) of this process's trajectories, of which some have failed (B,), and of all others'."""
        device, group = self.args.device, self.args.num_generations
        gathered, all_failed = (self.accelerator.gather(value.to(device)).cpu() for value in (rewards, failed))
        check_applicability(gathered, self.reward_func_names, gather_object(prompts), group, all_failed)
        every = 1 if rule is None else rule.every
        return RewardTable(gathered, self.reward_weights, group, len(window), self.args.credit_rule, every)

    def _measure_window(self, rows: list[dict[str, Any]]) -> Window:
        """The shortest window with the wanted share of the variance of step rewards, as the first prompts show it."""
        group = self.args.num_generations
        if len(rows) % group == 0:  # else groups straddle processes, and are whole only if all rows are taken
            rows = rows[: PROBED_GROUPS * group]
        whole = self.args.window(*self.args.sde_window_limits)
        *_, table = self._sample_in_sweeps(rows, self._generators(PROBE, 0, len(rows)), whole, EXACT)
        variances = step_reward_variances(table.rewards, group)
        start, stop = shortest_window(variances, self.args.sde_window_share)
        return self.args.window(whole.start + start, whole.start + stop)

    def _check_completions(
        self, rows: list[dict[str, Any]], window: Window, generation: int, table: RewardTable
    ) -> None:
        """Log how faithful the completions of the first prompts are to exact ones of the same trajectories."""
        place = self.accelerator.process_index * len(rows)
        rows = rows[: self.args.num_generations]
        generators = self._generators(NOISE, generation, len(rows), place)
        sampled = self._scored(self._sample(rows, generators, window, EXACT, self.reward_funcs))
        self._stop_together(sampled.error)
        first = self.accelerator.process_index * len(table.rewards) // self.accelerator.num_processes
        cheap = table.rewards[first : first + len(rows)]
        exact = (sampled.rewards * self.reward_weights[:, None]).nansum(1)
        both = ~(sampled.failed | cheap.isnan().any(1))
        fidelity = compare(exact[both], cheap[both], table.every, table.rule)
        for name, value in fidelity.overall().items():
            self._metrics["train"].record(f"completion_check/{name}", value)

    def sample_and_score(
        self,
        rows: list[dict[str, Any]],
        generators: list[torch.Generator],
        window: Window | None = None,
        completion: CompletionRule | None = None,
        reward_funcs: list[RewardFunc] | None = None,
    ) -> Sampled:
        """One trajectory for each of B rows, its images and their rewards.

        Args:
            rows: Rows of a dataset: a prompt and the columns that the reward functions read.
            generators: B, each the only source of its trajectory's randomness (but that under `share_initial_noise` the
                first of a group gives the group its first noise).
            window: The SDE steps of `num_inference_steps`; `None` takes `num_inference_steps_eval` ODE steps.
            completion: How states in the window are completed; `None`: not at all.
            reward_funcs: The F functions to score with; `None`: those that are trained on.

        Raises:
            RewardError: If a reward function fails.
            FloatingPointError: If a prediction is not finite.
        """
        sampled = self._scored(self._sample(rows, generators, window, completion, reward_funcs or self.reward_funcs))
        if sampled.error is not None:
            raise self._with_evidence(sampled.error)
        return sampled

    def _sample(
        self,
        rows: list[dict[str, Any]],
        generators: list[torch.Generator],
        window: Window | None,
        completion: CompletionRule | None,
        reward_funcs: list[RewardFunc],
    ) -> Unscored:
        """Sample and decode, and begin to score; see `sample_and_score`."""
        metrics = self._metrics[self._mode]
        with self._phase("encode", len({row["prompt"] for row in rows})) as advance:
            conditioning, prompts = self._encode(rows, advance)
        with self._phase("rollout", self.images.num_steps(window)) as advance:
            rollout = self.images.roll_out(
                self._policy_model, conditioning, prompts, generators, window, completion, advance
            )
        with self._phase("decode", len(rollout.final_latents)) as advance:
            pixels = self.images.decode(rollout.final_latents, advance, keep_on_device=self._scores_tensors)
            images = to_images(pixels)
        counts = {"evaluations": rollout.num_evaluations, "calls": rollout.num_calls}
        for name, value in {**counts, "decoded_images": len(images), "scored_images": len(images)}.items():
            metrics.record(f"num_{name}", value, "sum")
        with self._phase("score", len(reward_funcs)) as advance:
            batch = self._image_batch([rows[row] for row in rollout.rows.tolist()], images, pixels)
            extra = {"trainer_state": self.state, "log_metric": metrics.record}
            with on_device(self._offloaded_rewards, self.args.device, self.args.offload_between_phases):
                scoring = self.scorer.start(reward_funcs, batch, extra, advance)
        return Unscored(rollout, images, scoring)

    def _image_batch(self, rows: list[dict[str, Any]], images: list[Image.Image], pixels: Tensor) -> ImageBatch:
        """M images, each of the row at its place."""
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        prompts = [row["prompt"] for row in rows]
        return ImageBatch(images, pixels if self._scores_tensors else None, prompts, columns)

    def _scored(self, unscored: Unscored) -> Sampled:
        """Wait for what is being scored beside the model."""
        with self._phase("score", 1):
            sampled = unscored.scored()
        if self.args.reward_failures == "skip":
            self._metrics[self._mode].record("num_failed_images", sampled.num_failed_images, "sum")
        for error in sampled.skipped:
            logger.warning("%s Its trajectory is left out.", error)
        return sampled

    def _stop_together(self, error: RewardError | None) -> None:
        """Stop all processes if a reward function has failed on one, which the others would wait for."""
        failures = gather_object([None if error is None else (error.name, error.outcome)])
        if error is not None:
            raise self._with_evidence(error)
        for process, failure in enumerate(failures):
            if failure is not None:
                raise RewardError(failure[0], f"{failure[1]} on process {process}")

    def _with_evidence(self, error: RewardError) -> RewardError:
        """The error, with its image saved."""
        folder = Path(self.args.output_dir) / "reward_failures"
        save_evidence(error, folder, self.state.global_step, self.accelerator.process_index)
        return error

    @contextmanager
    def _phase(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Time a phase of `total` units and show it; it gives what is called when some are done."""
        with self._metrics[self._mode].seconds(name), self.progress.phase(name, total) as advance:
            yield advance

    @property
    def progress(self) -> ProgressDisplay:
        """The display; one that shows nothing where there is none among the callbacks."""
        displays = (one for one in self.callback_handler.callbacks if isinstance(one, ProgressDisplay))
        return next(displays, None) or ProgressDisplay(shows_bar=False)

    def _encode(
        self, rows: list[dict[str, Any]], on_prompt: Callable[[int], object] | None = None
    ) -> tuple[Conditioning, Tensor]:
        """The distinct prompts of B rows, and (B,), on the CPU, the rows' places among them."""
        distinct = list(dict.fromkeys(row["prompt"] for row in rows))
        prompts = torch.tensor([distinct.index(row["prompt"]) for row in rows])
        return self.images.embeddings(distinct, on_prompt), prompts

    def _draw_window(self, generation: int) -> Window:
        """The rollout's SDE window, the same on all processes."""
        starts = self.args.window_starts
        seed = np.random.SeedSequence([self.args.seed, WINDOW, generation])
        start = starts[int(np.random.default_rng(seed).integers(len(starts)))]
        return self.args.window(start, start + self.args.num_sde_steps)

    def _generators(self, purpose: int, number: int, num_rows: int, first: int | None = None) -> list[torch.Generator]:
        """Random numbers that depend on the seed, on what they are for and on a row's place among those of all processes.

        Args:
            purpose: `NOISE`, `EVALUATION`, `PROBE` or `CARD`.
            number: Of the rollout.
            num_rows: Of this process.
            first: Place of its first row; `None`: that of a rollout, where all processes have as many rows.
        """
        if first is None:
            first = self.accelerator.process_index * num_rows
        places = range(first, first + num_rows)
        seeds = [np.random.SeedSequence([self.args.seed, purpose, number, place]) for place in places]
        return [torch.Generator("cpu").manual_seed(int(seed.generate_state(1, np.uint64)[0])) for seed in seeds]

    def _weighted(self, rewards: Tensor) -> Tensor:
        """The sum (N,) of rewards (N, F) that apply; NaN where none is left."""
        return (rewards * self.reward_weights).nansum(1).where(~rewards.isnan().all(1), torch.nan)
