"""Rows of a dataset -> trajectories, images, rewards and the reward table.

Shapes: `B` rows of this process, `N` of all processes, `M` images, `F` reward functions, `K` SDE steps, `C` completed
states.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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

from ..algorithm.chunks import chunks_by_change, relative_change
from ..algorithm.completion import CompletionRule
from ..algorithm.credit import CreditBatch, RewardTable
from ..algorithm.fidelity import compare
from ..algorithm.rollout import EXACT, Generators, Rollout, Window, fastest_batch_size, roll_out
from ..batches import (
    LARGEST_BATCH,
    Encoded,
    Pending,
    Sampled,
    Trajectories,
    Transitions,
    eval_batch_size,
    scored_rule,
    sweeps,
)  # fmt: skip
from ..config import TPGRPOConfig
from ..metrics import Metrics, image_variety
from ..policies.base import FlowPolicy, on_device, to_images
from ..policies.conditioning import Schedule
from ..policies.embeddings import Prompt, PromptEmbeddings
from ..rewards.contract import RewardError, RewardFunc, check_applicability, declared, innermost, reward_names
from ..rewards.scorer import ImageBatch, Scorer, runs_beside, save_evidence
from .windows import CARD, DRAW, EVALUATION, NOISE, Rows, Windows


logger = logging.getLogger(__name__)

MAX_PENDING = 2  # sweeps whose rewards may be pending while the next is sampled; their images stay in memory


class Rollouts:
    """Samples and scores rows of a dataset; two getters return the model and the trainer's state.

    `batch_sizes` has the batch sizes of the `"model"` and the `"vae"`, measured at the first use if absent. An
    evaluation at another image size has its own, under names with that size.
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
        self.windows = Windows(args, metrics["train"], self._probe)

    def state_dict(self) -> dict[str, Any]:
        """Return the measured values."""
        return {**self.windows.state_dict(), "batch_sizes": self.batch_sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the measured values that the current settings do not fix."""
        self.windows.load_state_dict(state)
        if self.args.rollout_batch_size is None:  # a fixed size may differ from the former one
            self.batch_sizes = state["batch_sizes"]

    def generate(self, rows: Rows, generation: int) -> Trajectories:
        """Sample a trajectory with its completions for each of B rows of a rollout, and score every image."""
        window = self.windows(rows, generation)
        rule = scored_rule(self.args.completion_rule, self.reward_funcs)
        self.samples.rollout_begins(self._state())
        generators = self.generators(NOISE, generation, len(rows))
        encoded = self._encode(rows)
        states, log_probs, means, table = self._sample_in_sweeps(rows, encoded, generators, window, rule)
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
            table=replace(table, seed=self.generators(DRAW, generation, 1, first=0)[0].initial_seed()),
            means=means,
            chunks=self._chunks(states),
        )

    def _chunks(self, states: Tensor) -> tuple[int, ...] | None:
        """Return the sizes of chunks of the steps between states (B, K + 1, ...), the same on all processes."""
        num_steps, level, sizes = states.shape[1] - 1, self.args.importance_sampling_level, self.args.chunk_sizes
        if level != "chunk":
            return (num_steps,) if level == "trajectory" else None
        if sizes is not None:
            return tuple(sizes) if max(sizes) > 1 else None
        chunks = chunks_by_change(self.accelerator.reduce(relative_change(states).to(self.args.device), "mean"))
        self.metrics["train"].record("num_chunks", len(chunks))
        return chunks if max(chunks) > 1 else None

    def _sample_in_sweeps(
        self,
        rows: Rows,
        encoded: Encoded,
        generators: Generators,
        window: Window,
        rule: CompletionRule | None,
        title: str = "",
    ) -> tuple[Tensor, Tensor, Tensor | None, RewardTable]:
        """Return states, log-probabilities, means and rewards of B rows; a sweep is scored as the next are sampled."""
        sampled: list[Sampled] = []
        pending: deque[Pending] = deque()
        for part in self.progress.sweeps(sweeps(len(rows), self.args), title):
            pending.append(self._sample(rows[part], encoded[part], generators[part], window, rule, self.reward_funcs))
            if len(pending) > MAX_PENDING:
                sampled.append(self._finish_sweep(pending.popleft()))
            if any(one.error for one in sampled) and self.accelerator.num_processes == 1:
                break  # several processes must stay in step until they stop together
        sampled += [self._finish_sweep(one) for one in pending]
        self._stop_together(next((one.error for one in sampled if one.error), None))
        states = torch.cat([one.rollout.states for one in sampled])
        log_probs = torch.cat([one.rollout.log_probs for one in sampled])
        kept = [one.rollout.means for one in sampled if one.rollout.means is not None]
        rewards, failed = torch.cat([one.rewards for one in sampled]), torch.cat([one.failed for one in sampled])
        table = self._reward_table([row["prompt"] for row in rows], rewards, failed, window, rule, log_probs)
        if table.left_out.all():
            self._stop_together(next(error for one in sampled for error in one.skipped))
        return states, log_probs, torch.cat(kept) if kept else None, table

    def _finish_sweep(self, pending: Pending) -> Sampled:
        """Wait for a sweep's rewards, and keep only the images that callbacks want."""
        sampled = self._scored(pending, "train")
        if sampled.images:
            final = sampled.rollout.image_of[:, -1].tolist()
            variety = image_variety([sampled.images[index] for index in final], pending.prompts)
            self.metrics["train"].record("image_variety", variety, "nanmean")
        self.samples.keep(sampled, partial(self.shown_images, sampled))
        return sampled.without_images()

    def _reward_table(
        self, prompts: list[str], rewards: Tensor, failed: Tensor, window: Window, rule: CompletionRule | None,
        log_probs: Tensor,
    ) -> RewardTable:  # fmt: skip
        """Gather the rewards (B, F, C + 1) of all processes' trajectories, of which some have failed (B,).

        For a custom credit rule, its other inputs are gathered too.
        """
        device, group = self.args.device, self.args.num_generations
        gathered, all_failed = (self.accelerator.gather(value.to(device)).cpu() for value in (rewards, failed))
        prompts = gather_object(prompts)
        check_applicability(gathered, self._trained_names, prompts, group, all_failed)
        rule, credit = rule or EXACT, self.args.credit_rule
        if credit.function is not None:
            sigmas = self.policy.schedule(self.args.num_inference_steps).sigmas[window.start : window.stop + 1]
            log_probs = self.accelerator.gather(log_probs.to(device)).cpu()
            credit = replace(credit, batch=CreditBatch(group, prompts, sigmas.clone(), log_probs, rule.every))
        return RewardTable(gathered, self.reward_weights, group, len(window), credit, rule.every, rule.first)

    def _probe(self, rows: Rows, window: Window, purpose: int, number: int, title: str) -> Tensor:
        """Return the rewards (N, K + 1) of all processes' rows, sampled for a measurement with exact completions."""
        generators, rule = self.generators(purpose, number, len(rows)), scored_rule(EXACT, self.reward_funcs)
        return self._sample_in_sweeps(rows, self._encode(rows), generators, window, rule, title)[-1].rewards

    def _check_completions(
        self, rows: Rows, encoded: Encoded, window: Window, generation: int, table: RewardTable
    ) -> None:
        """Log how well completions of the first prompts agree with exact ones of the same trajectories."""
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
        fidelity = compare(exact[both], cheap[both], self.args.completion_rule or EXACT, table.rule)
        for name, value in fidelity.overall().items():
            self.metrics["train"].record(f"completion_check/{name}", value, "nanmean")

    def evaluate(self, rows: Rows, first: int, num_rows: int, window: Window | None = None) -> tuple[Sampled, Tensor]:
        """Sample B rows, of which the first is row `first` of `num_rows`, and record their rewards.

        Images of `eval_height` x `eval_width` are sampled by the ODE, or by the SDE in `window`. Return this process's
        B trajectories and the rewards (N, F) of all processes, without padding rows of the last batches.
        """
        generators, group = self.generators(EVALUATION, 0, len(rows), first), self.args.num_generations_eval
        functions = [*self.reward_funcs, *self.eval_reward_funcs]
        with self.policy.at_eval_size():
            pending = self._sample(rows, self._encode(rows), generators, window, None, functions, group)
        sampled = self._scored(pending, "eval")
        rewards, trained, error = sampled.rewards, len(self.reward_funcs), sampled.error
        prompts = [row["prompt"] for row in rows]
        try:
            check_applicability(rewards[:, :trained], self._trained_names, prompts, 1, sampled.failed)
        except RewardError as inapplicable:  # on this process alone
            error = error or inapplicable
        self._stop_together(error)
        keys = [Prompt.of(row, self.policy.takes_image) for row in rows]
        weighted = self.weighted(rewards[:, :trained, -1])
        with self.policy.at_eval_size():
            self.samples.keep_evaluated(prompts, keys, partial(self.shown_images, sampled), weighted)
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
        return sampled, final

    def sample_and_score(
        self,
        rows: Rows,
        generators: Generators,
        window: Window | None = None,
        completion: CompletionRule | None = None,
        reward_funcs: list[RewardFunc] | None = None,
    ) -> Sampled:
        """Sample one trajectory for each of B rows, decode its images if a function takes them, and score them.

        Args:
            rows: Rows of a dataset: a prompt and the columns that the reward functions read. Functions that score
                groups need each prompt `num_generations` times in a row.
            generators: B generators, each the only source of its trajectory's randomness (see `roll_out`).
            window: SDE steps of `num_inference_steps`; `None`: `num_inference_steps_eval` ODE steps.
            completion: Rule for completing latents in the window or, if all functions score noisy states, for
                choosing the latents to score; `None`: none.
            reward_funcs: F functions to score with; `None`: the training rewards.

        Raises:
            RewardError: If a reward function fails.
            ValueError: If a function scores groups and the rows are not whole groups.
            FloatingPointError: If a prediction is not finite.
        """
        functions = reward_funcs or self.reward_funcs
        completion = scored_rule(completion, functions)
        pending = self._sample(rows, self._encode(rows), generators, window, completion, functions)
        sampled = self._scored(pending, self._mode)
        if sampled.error is not None:
            raise self._with_evidence(sampled.error)
        return sampled

    @torch.no_grad()
    def shown_images(self, sampled: Sampled, chosen: Sequence[int]) -> list[Image.Image]:
        """Return some of the M images, which are decoded now if no reward function took images."""
        if sampled.images or not chosen:
            return [sampled.images[index] for index in chosen]
        mode, size = self._mode, eval_batch_size(self.args) or self.args.per_device_train_batch_size
        with self.phase("decode", len(chosen), mode) as advance:
            pixels = self.decode(sampled.rollout.final_latents[list(chosen)], advance, batch_size=size)
        self.metrics[mode].record("num_decoded_images", len(chosen), "sum")
        return to_images(pixels)

    @torch.no_grad()
    def sample(self, rows: Rows) -> list[Image.Image]:
        """Sample one image for each of N rows by the ODE in `num_inference_steps_eval` steps."""
        if not rows:
            return []
        generators = self.generators(CARD, 0, len(rows), first=0)
        return to_images(self.decode(self.roll_out(self._encode(rows), generators, None, None).final_latents))

    def recomputed(self, trajectories: Trajectories, autocast: Callable[[], Any]) -> Trajectories:
        """Compute log-probabilities, and means where they are kept, as training does, in the context of `autocast`."""
        steps = [self._recomputed(trajectories.transitions(k), autocast) for k in range(len(trajectories.window))]
        self.metrics["train"].record("nfe_train", len(trajectories) * len(steps), "sum")
        log_probs = torch.stack([log_prob for log_prob, _ in steps], 1)
        means = None if trajectories.means is None else torch.stack([mean for _, mean in steps if mean is not None], 1)
        return replace(trajectories, log_probs=log_probs, means=means)

    @torch.enable_grad()  # the kernels are those of training
    def _recomputed(self, inputs: Transitions, autocast: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
        with autocast():
            velocity = self.policy.velocity(self._model(), inputs.latents, inputs.step, inputs.conditioning)
            step = inputs.transition(velocity)
            kept_on = "cpu" if self.args.offload_trajectories else velocity.device
            mean = None if inputs.old_means is None else step.mean.detach().to(kept_on)
            return inputs.log_prob(step).detach(), mean

    def _sample(
        self,
        rows: Rows,
        encoded: Encoded,
        generators: Generators,
        window: Window | None,
        completion: CompletionRule | None,
        reward_funcs: list[RewardFunc],
        group: int | None = None,
    ) -> Pending:
        """Sample and decode, and begin to score groups of `group` (default: `num_generations`) rows."""
        mode, metrics, group = self._mode, self.metrics[self._mode], group or self.args.num_generations
        declarations = list(map(declared, reward_funcs))
        scores_states = any(one.scores_states for one in declarations)
        if len(rows) % group and any(one.scores_groups for one in declarations):
            raise ValueError(f"A reward function scores groups: {len(rows)} rows are no multiple of {group} images.")
        with self.phase("rollout", self._num_steps(window), mode) as advance:
            rollout = self.roll_out(encoded, generators, window, completion, advance)
        pixels, images = None, []
        if any(one.kind == "images" for one in declarations):
            with self.phase("decode", len(rollout.final_latents), mode) as advance:
                pixels = self.decode(rollout.final_latents, advance, keep_on_device=self._scores_tensors)
                images = to_images(pixels)
        counts = {"nfe": rollout.nfe, "num_calls": rollout.num_calls, "num_decoded_images": len(images)}
        for name, value in {**counts, "num_scored_images": len(rollout.rows)}.items():
            metrics.record(name, value, "sum")
        with self.phase("score", len(reward_funcs), mode) as advance:
            shown, sigmas = [rows[row] for row in rollout.rows.tolist()], self._schedule(window).sigmas
            scored = (completion or EXACT).states(len(window)) if window else range(0)
            batch = ImageBatch(
                images=images,
                pixels=pixels if self._scores_tensors else None,
                prompts=[row["prompt"] for row in shown],
                columns={name: [row[name] for row in shown] for name in rows[0] if name != "prompt"},
                latents=rollout.final_latents,
                states=rollout.noisy_latents(sigmas, window.start if window else 0, scored) if scores_states else None,
                group_sizes=rollout.group_sizes(group),
            )
            log_metric = partial(metrics.record, reduction="logged")
            extra = {"trainer_state": self._state(), "log_metric": log_metric}
            with on_device(self._offloaded, self.args.device, self.args.offload_between_phases):
                scoring = self.scorer.start(reward_funcs, batch, extra, advance)
        return Pending(rollout, encoded.prompts.tolist(), images, scoring)

    def _scored(self, pending: Pending, mode: str) -> Sampled:
        """Wait for the rewards; the result holds an error that must stop the run, so that no process stops alone."""
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
        schedule = self._schedule(window)
        model, conditioning, prompts = self._model(), encoded.conditioning, encoded.prompts

        def velocity(latents: Tensor, step: int, rows: Tensor) -> Tensor:
            return self.policy.velocity(model, latents, schedule[step], conditioning[prompts[rows]])

        sharing = self.args.num_generations if self.args.share_initial_noise and window is not None else 1
        noise = self.policy.initial_noise(generators[::sharing])
        first = torch.zeros(LARGEST_BATCH, dtype=torch.long)
        batch_size = self._batch_size(
            "model", lambda size: velocity(noise[:1].expand(size, *noise.shape[1:]), 0, first[:size])
        )
        return roll_out(
            velocity, noise, schedule.sigmas, window, generators, completion, batch_size, on_step,
            offload_states=self.args.offload_trajectories, keep_means=self.args.loss_rule.needs_means,
        )  # fmt: skip

    def decode(
        self,
        latents: Tensor,
        on_batch: Callable[[int], object] | None = None,
        keep_on_device: bool = False,
        batch_size: int | None = None,
    ) -> Tensor:
        """Decode final latents (M, ...), see [`~trl_tpgrpo.policies.base.FlowPolicy.decode`].

        Without a `batch_size`, which may have to be measured, call it on all processes.
        """
        with on_device([self.policy.pipeline.vae], self.policy.device, self.args.offload_between_phases):
            batch_size = batch_size or self._batch_size(
                "vae", lambda size: self.policy.decode(latents[:1].expand(size, *latents.shape[1:]))
            )
            return self.policy.decode(latents, batch_size, on_batch, keep_on_device)

    def _batch_size(self, part: str, run: Callable[[int], object]) -> int:
        """Return the batch size of a part for the current image size; `run` measures it if needed."""
        size, args = self.policy.guidance, self.args
        is_other = (size.height, size.width) != (args.height, args.width)
        name = f"{part} at {size.height} x {size.width}" if is_other else part
        if name not in self.batch_sizes:
            self.batch_sizes[name] = eval_batch_size(args) or _measure_batch_size(run, self.accelerator)
        return self.batch_sizes[name]

    def _encode(self, rows: Rows) -> Encoded:
        """Encode the distinct prompts of B rows."""
        prompts = [Prompt.of(row, self.policy.takes_image) for row in rows]
        distinct = list(dict.fromkeys(prompts))
        indices = torch.tensor([distinct.index(prompt) for prompt in prompts])
        with self.phase("encode", len(distinct), self._mode) as advance:
            return Encoded(self.embeddings(distinct, advance), indices)

    @contextmanager
    def phase(self, name: str, total: int, mode: str = "train") -> Iterator[Callable[..., None]]:
        """Time a phase of `total` units and show it; yield the function to call when some are done."""
        with self.metrics[mode].seconds(name), self.progress.phase(name, total) as advance:
            yield advance

    def _num_steps(self, window: Window | None) -> int:
        return self.args.num_inference_steps_eval if window is None else self.args.num_inference_steps

    def _schedule(self, window: Window | None) -> Schedule:
        return self.policy.schedule(self._num_steps(window))

    @property
    def _mode(self) -> str:
        # Of the model itself: transformers leaves the mode of DeepSpeed's engine as it is.
        return "train" if self.accelerator.unwrap_model(self._model()).training else "eval"

    def weighted(self, rewards: Tensor) -> Tensor:
        """Return the weighted sum (N,) of the training rewards (N, F) that apply; NaN if none does."""
        return (rewards * self.reward_weights).nansum(1).where(~rewards.isnan().all(1), torch.nan)

    def generators(self, purpose: int, number: int, num_rows: int, first: int | None = None) -> Generators:
        """Make generators that depend on the seed, the purpose and the row's index over all processes.

        `purpose` is `NOISE`, `EVALUATION`, `PROBE` or `CARD`, `number` the index of the rollout, and `first` the index
        of this process's first row; `None`: as in a rollout, where all processes have equal numbers of rows.
        """
        if first is None:
            first = self.accelerator.process_index * num_rows
        indices = range(first, first + num_rows)
        seeds = [np.random.SeedSequence([self.args.seed, purpose, number, index]) for index in indices]
        return [torch.Generator("cpu").manual_seed(int(seed.generate_state(1, np.uint64)[0])) for seed in seeds]

    def _stop_together(self, error: RewardError | None) -> None:
        """Stop all processes if a reward function has failed on one, because the others would wait for it."""
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
    """Find the batch size at which `run` needs the least time per sample, the same on all processes."""

    def once(batch_size: int) -> float:
        start = time.perf_counter()
        run(batch_size)
        if accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def seconds(batch_size: int) -> float:
        try:
            fastest = min(once(batch_size) for _ in range(6))  # the first is a warm-up
        except torch.OutOfMemoryError:
            fastest = float("inf")
        return accelerator.reduce(torch.tensor(fastest, device=accelerator.device), "mean").item()

    return fastest_batch_size(seconds, LARGEST_BATCH)
