"""From rows of a dataset to trajectories, their images, the rewards of these, and the reward table.

Shapes: `B` rows of this process, `N` of all processes, `M` images, `F` reward functions, `K` SDE steps, `C` completed
states.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers import TrainerState

from .algorithm.calibration import calibrate
from .algorithm.completion import CompletionRule
from .algorithm.credit import RewardTable, shortest_window, step_reward_variances
from .algorithm.fidelity import compare
from .algorithm.rollout import EXACT, Generators, Rollout, Window, fastest_batch_size, roll_out
from .batches import LARGEST_BATCH, Sampled, Trajectories, sweeps
from .config import TPGRPOConfig
from .metrics import Metrics, image_variety
from .policies.base import FlowPolicy, on_device, to_images
from .policies.conditioning import Conditioning
from .policies.embeddings import Prompt, PromptEmbeddings
from .rewards.contract import RewardError, RewardFunc, check_applicability, declared, innermost, reward_names
from .rewards.scorer import ImageBatch, Scorer, Scoring, runs_beside, save_evidence


logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

NOISE, WINDOW, EVALUATION, PROBE, CARD, CALIBRATION = range(6)
"""Purposes of a seed; the random numbers of one never depend on how many another took."""

MAX_PENDING = 2  # sweeps that may wait for their rewards while the next is sampled; their images are kept until then
PROBED_GROUPS = 16  # prompts of a process that noise and window are measured on


@dataclass(frozen=True)
class Encoded:
    """The prompts of B rows, padded alike for all that is made of them."""

    conditioning: Conditioning  # of the distinct prompts
    prompts: Tensor  # (B,), on the CPU, the rows' indices among these

    def __getitem__(self, part: slice) -> "Encoded":
        """Select rows, with the same prompts."""
        return Encoded(self.conditioning, self.prompts[part])


@dataclass(frozen=True)
class Pending:
    """Trajectories whose M images are being scored."""

    rollout: Rollout
    prompts: list[int]  # B, indices of the rows' prompts
    images: list[Image.Image]
    scoring: Scoring


class Rollouts:
    """Samples and scores rows of a dataset, with the model and the trainer's state that two getters give.

    `batch_sizes` has the samples that the `"model"` and the `"vae"` are given at once, measured at the first use if
    absent.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        args: TPGRPOConfig,
        accelerator: Accelerator,
        embeddings: PromptEmbeddings,
        reward_funcs: list[RewardFunc],
        eval_reward_funcs: list[RewardFunc],
        samples: Any,
        progress: Any,
        metrics: dict[str, Metrics],
        model: Callable[[], torch.nn.Module],
        state: Callable[[], TrainerState],
    ):
        self.policy, self.args, self.accelerator, self.embeddings = policy, args, accelerator, embeddings
        self.reward_funcs, self.eval_reward_funcs = reward_funcs, eval_reward_funcs
        self.samples, self.progress, self.metrics = samples, progress, metrics
        self._model, self._state = model, state
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * len(reward_funcs))
        self.scorer = Scorer(args.reward_failures)
        functions = [*reward_funcs, *eval_reward_funcs]
        self._names = reward_names(functions)
        self._trained_names = self._names[: len(reward_funcs)]
        self._scores_tensors = any(declared(function).image_type == "pt" for function in functions)
        movable = [one for one in functions if hasattr(innermost(one), "to")]
        self._offloaded = [innermost(one) for one in movable if not runs_beside(one)]
        for reward_model in map(innermost, movable):
            if not (args.offload_between_phases and reward_model in self._offloaded):
                reward_model.to(args.device)
        if args.offload_between_phases:
            policy.pipeline.vae.to("cpu")
        fixed = args.rollout_batch_size
        self.batch_sizes = {} if fixed is None else {"model": fixed, "vae": fixed}
        self.calibrated_noise: list[float] | None = None  # of each step of `sde_window_limits`
        self.measured_window: Window | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured."""
        names = ("calibrated_noise", "measured_window", "batch_sizes")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was measured, unless the settings fix it now."""
        if self.args.noise_calibration_iterations:
            self.calibrated_noise = state.get("calibrated_noise")  # absent where written before
        if self.args.sde_window_share is not None and (window := state["measured_window"]) is not None:
            self.measured_window = self._window(window.start, window.stop)  # with the noise of now
        if self.args.rollout_batch_size is None:  # a fixed one may be another than before, say for lack of memory
            self.batch_sizes = state["batch_sizes"]

    def generate(self, rows: Rows, generation: int) -> Trajectories:
        """Sample a trajectory with its completions for each of B rows of a rollout, and score every image."""
        share = self.args.sde_window_share
        if self.args.noise_calibration_iterations and self.calibrated_noise is None:
            self.calibrated_noise, self.measured_window = self._calibrate_noise(rows), None
        if share is not None and self.measured_window is None:
            self.measured_window = self._measure_window(rows, share)
        window, rule = self.measured_window or self.draw_window(generation), self.args.completion_rule
        self.samples.rollout_begins(self._state())
        generators = self.generators(NOISE, generation, len(rows))
        encoded = self._encode(rows)
        states, log_probs, table = self._sample_in_sweeps(rows, encoded, generators, window, rule)
        if self.args.completion_check_every and generation % self.args.completion_check_every == 0:
            self._check_completions(rows, encoded, window, generation, table)
        first = self.accelerator.process_index * len(rows)
        return Trajectories(
            states=states,
            log_probs=log_probs,
            window=window,
            schedule=self.policy.schedule(self.args.num_inference_steps),
            conditioning=encoded.conditioning,
            prompts=encoded.prompts,
            rows=torch.arange(first, first + len(rows)),
            table=table,
        )

    def _sample_in_sweeps(
        self,
        rows: Rows,
        encoded: Encoded,
        generators: Generators,
        window: Window,
        rule: CompletionRule | None,
        title: str = "",
    ) -> tuple[Tensor, Tensor, RewardTable]:
        """Return states, log-probabilities and rewards of B rows; a sweep is scored while the next are sampled."""
        sampled: list[Sampled] = []
        pending: deque[Pending] = deque()
        for part in self.progress.sweeps(sweeps(len(rows), self.args), title):
            pending.append(self._sample(rows[part], encoded[part], generators[part], window, rule, self.reward_funcs))
            if len(pending) > MAX_PENDING:
                sampled.append(self._finish_sweep(pending.popleft()))
            if any(one.error for one in sampled) and self.accelerator.num_processes == 1:
                break  # several processes must keep in step until they stop together
        sampled += [self._finish_sweep(one) for one in pending]
        self._stop_together(next((one.error for one in sampled if one.error), None))
        states = torch.cat([one.rollout.states for one in sampled])
        log_probs = torch.cat([one.rollout.log_probs for one in sampled])
        rewards, failed = torch.cat([one.rewards for one in sampled]), torch.cat([one.failed for one in sampled])
        table = self._reward_table([row["prompt"] for row in rows], rewards, failed, window, rule)
        if table.left_out.all():
            self._stop_together(next(error for one in sampled for error in one.skipped))
        return states, log_probs, table

    def _finish_sweep(self, pending: Pending) -> Sampled:
        """Wait for a sweep's rewards, and keep no image of it but what callbacks want to see."""
        sampled = self._scored(pending, "train")
        final = sampled.rollout.image_of[:, -1].tolist()
        variety = image_variety([sampled.images[index] for index in final], pending.prompts)
        self.metrics["train"].record("image_variety", variety, "nanmean")
        self.samples.keep(sampled)
        return sampled.without_images()

    def _reward_table(
        self, prompts: list[str], rewards: Tensor, failed: Tensor, window: Window, rule: CompletionRule | None
    ) -> RewardTable:
        """Gather the rewards (B, F, C + 1) of all processes' trajectories, of which some have failed (B,)."""
        device, group = self.args.device, self.args.num_generations
        gathered, all_failed = (self.accelerator.gather(value.to(device)).cpu() for value in (rewards, failed))
        check_applicability(gathered, self._trained_names, gather_object(prompts), group, all_failed)
        every = 1 if rule is None else rule.every
        return RewardTable(gathered, self.reward_weights, group, len(window), self.args.credit_rule, every)

    def _probed(self, rows: Rows) -> Rows:
        group = self.args.num_generations
        # Groups that straddle processes are whole only if all rows are taken
        return rows[: PROBED_GROUPS * group] if len(rows) % group == 0 else rows

    def _calibrate_noise(self, rows: Rows) -> list[float]:
        """Find and log the noise of each step with as many positive as negative step rewards, on the first prompts."""
        args, rows = self.args, self._probed(rows)
        encoded, (start, stop) = self._encode(rows), args.sde_window_limits

        def measure(noise_levels: Tensor, iteration: int) -> Tensor:
            window = args.window(start, stop, noise_levels.tolist())
            title = f"calibration {iteration + 1}/{args.noise_calibration_iterations}, "
            generators = self.generators(CALIBRATION, iteration, len(rows))
            return self._sample_in_sweeps(rows, encoded, generators, window, EXACT, title)[2].rewards

        first = torch.tensor(args.noise_level, dtype=torch.float64).expand(stop - start)
        highest = 1.0 if args.sde_type == "cps" else float("inf")
        levels = calibrate(measure, first, args.noise_calibration_step, highest, args.noise_calibration_iterations)
        for step, level in enumerate(levels.tolist(), start=start):
            self.metrics["train"].record(f"noise_level/step_{step}", level)
        return levels.tolist()

    def _measure_window(self, rows: Rows, share: float) -> Window:
        """Find the shortest window with the wanted share of the step rewards' variance, on the first prompts."""
        rows, (first, last) = self._probed(rows), self.args.sde_window_limits
        whole, generators = self._window(first, last), self.generators(PROBE, 0, len(rows))
        *_, table = self._sample_in_sweeps(rows, self._encode(rows), generators, whole, EXACT)
        variances = step_reward_variances(table.rewards, self.args.num_generations)
        start, stop = shortest_window(variances, share)
        return self._window(first + start, first + stop)

    def _window(self, start: int, stop: int) -> Window:
        return self.args.window(start, stop, self.calibrated_noise)

    def _check_completions(
        self, rows: Rows, encoded: Encoded, window: Window, generation: int, table: RewardTable
    ) -> None:
        """Log how faithful the completions of the first prompts are to exact ones of the same trajectories."""
        first_row = self.accelerator.process_index * len(rows)
        rows = rows[: self.args.num_generations]
        generators = self.generators(NOISE, generation, len(rows), first_row)
        encoded = encoded[slice(len(rows))]
        pending = self._sample(rows, encoded, generators, window, EXACT, self.reward_funcs)
        sampled = self._scored(pending, "train")
        self._stop_together(sampled.error)
        first = self.accelerator.process_index * len(table.rewards) // self.accelerator.num_processes
        cheap = table.rewards[first : first + len(rows)]
        exact = (sampled.rewards * self.reward_weights[:, None]).nansum(1)
        both = ~(sampled.failed | cheap.isnan().any(1))
        fidelity = compare(exact[both], cheap[both], table.every, table.rule)
        for name, value in fidelity.overall().items():
            self.metrics["train"].record(f"completion_check/{name}", value, "nanmean")

    def evaluate(
        self, rows: Rows, first: int, num_rows: int, window: Window | None = None
    ) -> tuple[list[Image.Image], Tensor]:
        """Sample B rows, of which the first is row `first` of `num_rows`, and record their rewards.

        The ODE samples, or the SDE in `window`. Return this process's B images and the rewards (N, F) of all, without
        rows that only fill the last batches up.
        """
        generators = self.generators(EVALUATION, 0, len(rows), first)
        functions = [*self.reward_funcs, *self.eval_reward_funcs]
        sampled = self._scored(self._sample(rows, self._encode(rows), generators, window, None, functions), "eval")
        rewards, trained, error = sampled.rewards, len(self.reward_funcs), sampled.error
        prompts = [row["prompt"] for row in rows]
        try:
            check_applicability(rewards[:, :trained], self._trained_names, prompts, 1, sampled.failed)
        except RewardError as inapplicable:  # on this process alone
            error = error or inapplicable
        self._stop_together(error)
        keys = [Prompt.of(row, self.policy.takes_image) for row in rows]
        self.samples.keep_evaluated(prompts, keys, sampled.images, self.weighted(rewards[:, :trained, -1]))
        # Not by gather_for_metrics, which takes the dataset's length for the number of rows.
        num_left = num_rows - first + self.accelerator.process_index * len(rows)
        final = self.accelerator.gather(rewards[:, :, -1].to(self.args.device)).cpu()[:num_left]
        metrics = self.metrics["eval"]
        for name, values in zip(self._names, final.unbind(1), strict=True):
            metrics.record(f"rewards/{name}/mean", values, "nanmean")
            metrics.record(f"rewards/{name}/std", values, "std")
        reward = self.weighted(final[:, :trained])
        metrics.record("reward", reward, "nanmean")
        metrics.record("reward_std", reward, "std")
        return sampled.images, final

    def sample_and_score(
        self,
        rows: Rows,
        generators: Generators,
        window: Window | None = None,
        completion: CompletionRule | None = None,
        reward_funcs: list[RewardFunc] | None = None,
    ) -> Sampled:
        """Sample one trajectory for each of B rows, decode its images and score them.

        Args:
            rows: Rows of a dataset: a prompt and the columns that the reward functions read.
            generators: B generators, each the only source of its trajectory's randomness (see `roll_out`).
            window: SDE steps of `num_inference_steps`; `None` takes `num_inference_steps_eval` ODE steps.
            completion: Rule by which states in the window are completed; `None`: none is.
            reward_funcs: F functions to score with; `None`: those that are trained on.

        Raises:
            RewardError: If a reward function fails.
            FloatingPointError: If a prediction is not finite.
        """
        functions = reward_funcs or self.reward_funcs
        pending = self._sample(rows, self._encode(rows), generators, window, completion, functions)
        sampled = self._scored(pending, self._mode)
        if sampled.error is not None:
            raise self._with_evidence(sampled.error)
        return sampled

    @torch.no_grad()
    def sample(self, rows: Rows) -> list[Image.Image]:
        """Make an image of each of N rows' prompts, by the ODE in `num_inference_steps_eval` steps."""
        if not rows:
            return []
        generators = self.generators(CARD, 0, len(rows), first=0)
        return to_images(self.decode(self.roll_out(self._encode(rows), generators, None, None).final_latents))

    def training_log_probs(self, trajectories: Trajectories, autocast: Callable[[], Any]) -> Tensor:
        """Compute log-probabilities (B, K) as training does, gradients and all, in the context of `autocast`."""
        log_probs = []
        for position in range(len(trajectories.window)):
            with torch.enable_grad(), autocast():
                inputs = trajectories.transitions(position)
                velocity = self.policy.velocity(self._model(), inputs.latents, inputs.step, inputs.conditioning)
                log_probs.append(inputs.log_prob(inputs.transition(velocity)).detach())
        self.metrics["train"].record("num_train_evaluations", len(trajectories) * len(log_probs), "sum")
        return torch.stack(log_probs, 1)

    def _sample(
        self,
        rows: Rows,
        encoded: Encoded,
        generators: Generators,
        window: Window | None,
        completion: CompletionRule | None,
        reward_funcs: list[RewardFunc],
    ) -> Pending:
        """Sample and decode, and begin to score."""
        mode, metrics = self._mode, self.metrics[self._mode]
        with self.phase("rollout", self._num_steps(window), mode) as advance:
            rollout = self.roll_out(encoded, generators, window, completion, advance)
        with self.phase("decode", len(rollout.final_latents), mode) as advance:
            pixels = self.decode(rollout.final_latents, advance, keep_on_device=self._scores_tensors)
            images = to_images(pixels)
        counts = {"evaluations": rollout.num_evaluations, "calls": rollout.num_calls}
        for name, value in {**counts, "decoded_images": len(images), "scored_images": len(images)}.items():
            metrics.record(f"num_{name}", value, "sum")
        with self.phase("score", len(reward_funcs), mode) as advance:
            shown = [rows[row] for row in rollout.rows.tolist()]
            columns = {name: [row[name] for row in shown] for name in rows[0] if name != "prompt"}
            prompts_shown, tensors = [row["prompt"] for row in shown], pixels if self._scores_tensors else None
            batch = ImageBatch(images, tensors, prompts_shown, columns)
            log_metric = partial(metrics.record, reduction="logged")
            extra = {"trainer_state": self._state(), "log_metric": log_metric}
            with on_device(self._offloaded, self.args.device, self.args.offload_between_phases):
                scoring = self.scorer.start(reward_funcs, batch, extra, advance)
        return Pending(rollout, encoded.prompts.tolist(), images, scoring)

    def _scored(self, pending: Pending, mode: str) -> Sampled:
        """Wait for the rewards; an error that has to stop the run is in the result, so that no process stops alone."""
        rollout, images = pending.rollout, pending.images
        with self.phase("score", 1, mode):
            try:
                scores = pending.scoring.result()
            except RewardError as error:
                shape = (len(rollout.image_of), len(pending.scoring.reward_funcs), rollout.image_of.shape[1])
                nothing = torch.full(shape, torch.nan)
                return Sampled(rollout, images, nothing, torch.ones(shape[0], dtype=torch.bool), error=error)
        num_failed = int(scores.failed.sum())
        if self.args.reward_failures == "skip":
            self.metrics[mode].record("num_failed_images", num_failed, "sum")
        for skipped in scores.errors:
            logger.warning("%s Its trajectory is left out.", skipped)
        failed = scores.failed[rollout.image_of].any(1)
        rewards = scores.rewards[:, rollout.image_of].transpose(0, 1).masked_fill(failed[:, None, None], torch.nan)
        return Sampled(rollout, images, rewards, failed, scores.extra, None, num_failed, scores.errors)

    def roll_out(
        self,
        encoded: Encoded,
        generators: Generators,
        window: Window | None,
        completion: CompletionRule | None,
        on_step: Callable[[], object] | None = None,
    ) -> Rollout:
        """Sample one trajectory for each of B prompts, see [`~trl_tpgrpo.algorithm.rollout.roll_out`].

        Under `share_initial_noise` the first generator of a group draws its noise. Without a window,
        `num_inference_steps_eval` ODE steps are taken.
        """
        schedule = self.policy.schedule(self._num_steps(window))
        model, conditioning, prompts = self._model(), encoded.conditioning, encoded.prompts

        def velocity(latents: Tensor, step: int, rows: Tensor) -> Tensor:
            return self.policy.velocity(model, latents, schedule[step], conditioning[prompts[rows]])

        sharing = self.args.num_generations if self.args.share_initial_noise and window is not None else 1
        noise = self.policy.initial_noise(generators[::sharing])
        if "model" not in self.batch_sizes:
            rows = torch.zeros(LARGEST_BATCH, dtype=torch.long)
            self.batch_sizes["model"] = _measure_batch_size(
                lambda size: velocity(noise[:1].expand(size, *noise.shape[1:]), 0, rows[:size]), self.accelerator
            )
        return roll_out(
            velocity, noise, schedule.sigmas, window, generators, completion, self.batch_sizes["model"], on_step,
            offload_states=self.args.offload_trajectories,
        )  # fmt: skip

    def decode(
        self, latents: Tensor, on_batch: Callable[[int], object] | None = None, keep_on_device: bool = False
    ) -> Tensor:
        """Decode final latents (M, ...), see [`~trl_tpgrpo.policies.base.FlowPolicy.decode`]."""
        with on_device([self.policy.pipeline.vae], self.policy.device, self.args.offload_between_phases):
            if "vae" not in self.batch_sizes:
                self.batch_sizes["vae"] = _measure_batch_size(
                    lambda size: self.policy.decode(latents[:1].expand(size, *latents.shape[1:])), self.accelerator
                )
            return self.policy.decode(latents, self.batch_sizes["vae"], on_batch, keep_on_device)

    def _encode(self, rows: Rows) -> Encoded:
        """Encode the distinct prompts of B rows."""
        prompts = [Prompt.of(row, self.policy.takes_image) for row in rows]
        distinct = list(dict.fromkeys(prompts))
        indices = torch.tensor([distinct.index(prompt) for prompt in prompts])
        with self.phase("encode", len(distinct), self._mode) as advance:
            return Encoded(self.embeddings(distinct, advance), indices)

    @contextmanager
    def phase(self, name: str, total: int, mode: str = "train") -> Iterator[Callable[..., None]]:
        """Time a phase of `total` units and show it; give the function to call when some are done."""
        with self.metrics[mode].seconds(name), self.progress.phase(name, total) as advance:
            yield advance

    def _num_steps(self, window: Window | None) -> int:
        return self.args.num_inference_steps_eval if window is None else self.args.num_inference_steps

    @property
    def _mode(self) -> str:
        # Of the model itself: transformers leaves the mode of DeepSpeed's engine as it is.
        return "train" if self.accelerator.unwrap_model(self._model()).training else "eval"

    def weighted(self, rewards: Tensor) -> Tensor:
        """Sum rewards (N, F) of the functions that are trained on, where they apply: (N,); NaN where none does."""
        return (rewards * self.reward_weights).nansum(1).where(~rewards.isnan().all(1), torch.nan)

    def draw_window(self, generation: int) -> Window:
        """Draw the rollout's SDE window, the same on all processes.

        Raises:
            ValueError: If its noise is yet to be calibrated, which a training does before its first rollout.
        """
        if self.args.noise_calibration_iterations and self.calibrated_noise is None:
            what = "noise_calibration_iterations is for training, whose first rollout it precedes"
            raise ValueError(f"{what}: set it to 0 here, and noise_level to the levels that a training has logged.")
        starts = self.args.window_starts
        seed = np.random.SeedSequence([self.args.seed, WINDOW, generation])
        start = starts[int(np.random.default_rng(seed).integers(len(starts)))]
        return self._window(start, start + self.args.num_sde_steps)

    def generators(self, purpose: int, number: int, num_rows: int, first: int | None = None) -> Generators:
        """Make generators that depend on the seed, their purpose and a row's index among those of all processes.

        `purpose` is `NOISE`, `EVALUATION`, `PROBE` or `CARD`, `number` the index of the rollout, `first` that of this
        process's first row; `None`: as in a rollout, where all processes have as many rows.
        """
        if first is None:
            first = self.accelerator.process_index * num_rows
        indices = range(first, first + num_rows)
        seeds = [np.random.SeedSequence([self.args.seed, purpose, number, index]) for index in indices]
        return [torch.Generator("cpu").manual_seed(int(seed.generate_state(1, np.uint64)[0])) for seed in seeds]

    def _stop_together(self, error: RewardError | None) -> None:
        """Stop all processes if a reward function has failed on one, which the others would wait for."""
        failures = gather_object([None if error is None else (error.name, error.outcome)])
        if error is not None:
            raise self._with_evidence(error)
        for process, failure in enumerate(failures):
            if failure is not None:
                raise RewardError(failure[0], f"{failure[1]} on process {process}")

    def _with_evidence(self, error: RewardError) -> RewardError:
        folder = Path(self.args.output_dir) / "reward_failures"
        save_evidence(error, folder, self._state().global_step, self.accelerator.process_index)
        return error


@torch.no_grad()
def _measure_batch_size(run: Callable[[int], object], accelerator: Accelerator) -> int:
    """Find the batch size at which `run` takes the least time a sample, the same on all processes."""

    def once(batch_size: int) -> float:
        start = time.perf_counter()
        run(batch_size)
        if accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def seconds(batch_size: int) -> float:
        try:
            fastest = min(once(batch_size) for _ in range(6))  # the first of them warms up
        except torch.OutOfMemoryError:
            fastest = float("inf")
        return accelerator.reduce(torch.tensor(fastest, device=accelerator.device), "mean").item()

    return fastest_batch_size(seconds, LARGEST_BATCH)
