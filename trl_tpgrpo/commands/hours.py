"""GPUs by name, and hours of a run: FLOPs of the true architecture over a share of the card's peak."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode


GIB = 2**30
CARDS = {
    "3090": (24, 71), "4090": (24, 165), "5090": (32, 209), "A100-40GB": (40, 312), "L40S": (48, 362),
    "A100-80GB": (80, 312), "H100": (80, 989), "H200": (141, 989), "B200": (180, 2250),
}  # fmt: skip
"""GiB, and TFLOPS of dense products in bfloat16 summed in float32: NVIDIA's data sheets and white papers (SXM)."""
UTILISATION = 0.4
"""Assumed share of the peak in sampling, decoding and training. Llama 3 reports 38 to 43% for training on H100s (arXiv
2407.21783). This package with groups of 4 images reached 24 to 40% in
rollouts and 10 to 26% in training on an H200 (docs/models.md)."""
WITHOUT_UNIT = 300  # GiB; larger numbers are names of cards, or megabytes


class Flops(NamedTuple):
    """FLOPs of a velocity for one latent (with guidance), of a decoded image, and of training on a transition."""

    evaluation: int
    image: int
    transition: int

    def of_rollout(self, counts: Any, num_iterations: int) -> dict[str, float]:
        """Return the FLOPs of a rollout's `Counts` by phase, over all processes."""
        trained = counts.mean("transitions trained on") * num_iterations
        without_gradients = counts.mean("NFE in training") - trained  # the reference's, old log-probabilities
        return {
            "sampling": counts.mean("NFE in sampling") * self.evaluation,
            "decoding": counts.mean("images decoded and scored") * self.image,
            "training": trained * self.transition + without_gradients * self.evaluation,
        }


@torch.no_grad()
def count_flops(policy: Any, is_adapter: bool, recomputes: bool) -> Flops:
    """Count the FLOPs of a policy's architecture, with weights on PyTorch's meta device.

    A backward pass counts as one forward pass for an adapter (counted: 1.07 to 1.12), as two if all weights are
    trained, and as one more if activations are recomputed.
    """
    meta, pipeline = torch.device("meta"), policy.pipeline
    latents, conditioning = policy.initial_noise([torch.Generator()]).to(meta), policy.empty_conditioning().to(meta)
    with FlopCounterMode(display=False) as evaluation:
        policy.velocity(pipeline.transformer, latents, policy.schedule(2)[0], conditioning)
    with FlopCounterMode(display=False) as image:
        pipeline.vae.decode(policy.vae_latents(latents))
    passes = (2 if is_adapter else 3) + recomputes
    return Flops(evaluation.get_total_flops(), image.get_total_flops(), passes * evaluation.get_total_flops())


def flops_an_hour(card: str) -> float:
    """Estimate the FLOPs of a card per hour."""
    return CARDS[card][1] * 1e12 * UTILISATION * 3600


def count_evaluated(args: Any, num_updates: int | None, num_prompts: int | None) -> int | None:
    """Count the images of all evaluations between updates (`None`: unknown)."""
    if args.eval_strategy == "no":
        return (num_prompts or 0) * args.num_generations_eval * args.eval_on_start
    if num_updates is None or num_prompts is None or args.eval_strategy == "epoch":
        return None
    every = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * num_updates)
    times = math.ceil(num_updates / every) + args.eval_on_start  # the last is after the last update
    return times * num_prompts * args.num_generations_eval


def row(name: str, rollout: str, run: str, mark: str = "") -> str:
    """Return a line of the table of costs of a rollout and the run."""
    return f"{name:<28}{rollout:>24}{run:>20}  {mark}".rstrip()


def time_rows(
    args: Any, counts: Any, num_images: int | None, flops: Flops, cards: list[str], evaluated: Flops
) -> Iterator[str]:
    """Yield lines with TFLOPs, and hours on each card; `num_images` is the number of images in evaluations.

    `evaluated` has the FLOPs at the image size of evaluations.
    """
    phases, number = flops.of_rollout(counts, args.num_iterations), counts.num_rollouts or 0
    rollout = sum(phases.values())
    each = args.num_inference_steps_eval * evaluated.evaluation + evaluated.image
    run = rollout * number + (num_images or 0) * each
    units = {"TFLOPs": 1e12} | {f"hours on {card}": args.world_size * flops_an_hour(card) for card in cards}
    for name, unit in units.items():
        shown = [f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}" for cost in (rollout / unit, run / unit)]
        yield row(name, shown[0], shown[1] if number else "")
    pace = f"{UTILISATION:.0%} of a card's peak in bfloat16" if cards else f"for hours, use one of {', '.join(CARDS)}"
    shares = ", ".join(f"{name} {size / rollout:.0%}" for name, size in phases.items())
    yield f"Hours are estimated, not measured: {pace}. FLOPs of a rollout: {shares}."


def find_gpu(given: str) -> tuple[float, list[str]]:
    """Return the bytes of a GPU, given as in `CARDS` or by its memory (`24GB`), and the cards with this memory.

    Raises a `ValueError` if it is neither, or too large for GiB.
    """
    name = given.upper().replace("RTX", "").strip()
    if name in CARDS:
        return CARDS[name][0] * GIB, [name]
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GIB)?", name)
    if match is None or not float(match[1]) or (match[2] is None and float(match[1]) > WITHOUT_UNIT):
        raise ValueError(f"--gpu must be one of {', '.join(CARDS)} or a memory such as 24GB, got {given!r}.")
    return float(match[1]) * GIB, [card for card, (size, _) in CARDS.items() if size == float(match[1])]
