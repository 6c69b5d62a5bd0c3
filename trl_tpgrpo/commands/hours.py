"""GPUs by name, and how long a run takes on them: FLOPs of the true architecture over a share of the card's peak."""

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
"""Share of the peak that sampling, decoding and training are taken to reach: 38 to 43% is what Llama 3 reports of
training on H100s (arXiv 2407.21783). This package with groups of 4 images reached 24 to 40% in
rollouts and 10 to 26% in training on an H200 (docs/models.md)."""
WITHOUT_UNIT = 300  # GiB; a larger number is a card's name, or megabytes


class Flops(NamedTuple):
    """FLOPs of a velocity at one latent, guidance included, of a decoded image, and of training on a transition."""

    evaluation: int
    image: int
    transition: int

    def of_rollout(self, counts: Any, num_iterations: int) -> dict[str, float]:
        """Return FLOPs by phase over all processes, of the `Counts` of a rollout."""
        trained = counts.mean("transitions trained on") * num_iterations
        without_gradients = counts.mean("NFE in training") - trained  # the reference's, old log-probabilities
        return {
            "sampling": counts.mean("NFE in sampling") * self.evaluation,
            "decoding": counts.mean("images decoded and scored") * self.image,
            "training": trained * self.transition + without_gradients * self.evaluation,
        }


@torch.no_grad()
def count_flops(policy: Any, is_adapter: bool, recomputes: bool) -> Flops:
    """Count what the architecture of a policy takes, whose weights are on PyTorch's meta device.

    A backward pass is one more forward pass for an adapter (counted: 1.07 to 1.12), two if all weights are trained,
    and one more where activations are computed again.
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
    """Estimate what a card does in an hour."""
    return CARDS[card][1] * 1e12 * UTILISATION * 3600


def count_evaluated(args: Any, num_updates: int | None, num_prompts: int | None) -> int | None:
    """Count the images of all evaluations between updates, with so many prompts each (`None`: not known)."""
    if args.eval_strategy == "no":
        return (num_prompts or 0) * args.num_generations_eval * args.eval_on_start
    if num_updates is None or num_prompts is None or args.eval_strategy == "epoch":
        return None
    every = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * num_updates)
    times = math.ceil(num_updates / every) + args.eval_on_start  # the last is after the last update
    return times * num_prompts * args.num_generations_eval


def row(name: str, rollout: str, run: str, mark: str = "") -> str:
    """Return a line of the table of what a rollout and the run take."""
    return f"{name:<28}{rollout:>24}{run:>20}  {mark}".rstrip()


def time_rows(
    args: Any, counts: Any, num_images: int | None, flops: Flops, cards: list[str], evaluated: Flops
) -> Iterator[str]:
    """Yield lines with the TFLOPs and the hours on each card; `num_images` are those of all evaluations.

    `evaluated` are the FLOPs at the size of evaluations.
    """
    phases, number = flops.of_rollout(counts, args.num_iterations), counts.num_rollouts or 0
    rollout = sum(phases.values())
    each = args.num_inference_steps_eval * evaluated.evaluation + evaluated.image
    run = rollout * number + (num_images or 0) * each
    units = {"TFLOPs": 1e12} | {f"hours on {card}": args.world_size * flops_an_hour(card) for card in cards}
    for name, unit in units.items():
        shown = [f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}" for cost in (rollout / unit, run / unit)]
        yield row(name, shown[0], shown[1] if number else "")
    pace = f"{UTILISATION:.0%} of a card's peak in bfloat16" if cards else f"name one of {', '.join(CARDS)} for them"
    shares = ", ".join(f"{name} {size / rollout:.0%}" for name, size in phases.items())
    yield f"Hours are estimated, not measured: {pace}. FLOPs of a rollout: {shares}."


def find_gpu(given: str) -> tuple[float, list[str]]:
    """Return the bytes of a GPU, named as in `CARDS` or by its memory (`24GB`), and the cards that have so much.

    A `ValueError` says that it is neither, or a number too large for GiB.
    """
    name = given.upper().replace("RTX", "").strip()
    if name in CARDS:
        return CARDS[name][0] * GIB, [name]
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GIB)?", name)
    if match is None or not float(match[1]) or (match[2] is None and float(match[1]) > WITHOUT_UNIT):
        raise ValueError(f"--gpu must be one of {', '.join(CARDS)} or a memory such as 24GB, got {given!r}.")
    return float(match[1]) * GIB, [card for card, (size, _) in CARDS.items() if size == float(match[1])]
