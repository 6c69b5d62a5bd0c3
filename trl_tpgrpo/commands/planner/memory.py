"""What lies on each device in each phase of a run, and settings under which less does. In bytes; a GiB is 2**30 of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...algorithm.rollout import roll_out
from ...config import TPGRPOConfig
from .counts import changed, rows_of, sampling_of, sharing_of, sweep_sizes, windows_of
from .fake import FakeModel, LiveBytes


GIB = 2**30
CONTEXT = GIB
"""Assumed for CUDA itself and what its allocator cannot use."""

OPTIMIZERS = {
    "adamw_torch": (8, 4), "adamw_torch_fused": (8, 0), "adamw_torch_8bit": (2, 4), "adamw_torch_4bit": (1, 4),
    "adamw_bnb_8bit": (2, 0), "adamw_8bit": (2, 0), "paged_adamw_8bit": (2, 0), "paged_adamw_32bit": (8, 0),
    "lion_8bit": (1, 0), "lion_32bit": (4, 0), "paged_lion_8bit": (1, 0), "paged_lion_32bit": (4, 0),
    "rmsprop": (4, 4), "rmsprop_bnb_8bit": (1, 0), "adagrad": (4, 4), "sgd": (0, 0), "adafactor": (0, 4),
}  # fmt: skip
"""Bytes a trained weight: of the states that are kept, and of what the update needs for a moment."""

UNKNOWN_OPTIMIZER = (8, 4)
SMALL_TENSOR = 4096
"""Weights of a tensor below which bitsandbytes keeps its states in float32."""


PHASES = ("encode", "rollout", "decode", "reference", "train", "update")


@dataclass(frozen=True)
class Memory:
    """What lies on each device.

    Attributes:
        items: Bytes by phase and, within it, by what they are for.
    """

    items: dict[str, dict[str, float]]

    def total(self, phase: str) -> float:
        """Bytes of a phase."""
        return sum(self.items[phase].values())

    @property
    def peak(self) -> float:
        """Bytes of the phase that takes the most."""
        return max(map(self.total, self.items))


def estimate(args: TPGRPOConfig, model: FakeModel) -> Memory:
    """The memory that a run with these settings takes on each device, reward models aside."""
    stays, kept = _staying(args, model), _kept_rollout(args, model)
    prompts = {"prompt embeddings": _prompts_size(args, model)}
    in_training = stays | {"gradients": 4 * sum(model.trained)} | prompts | kept
    unpacked = 0 if args.quantization is None else max(math.prod(shape) for shape in model.weights.linear)
    unpacked *= model.dtype.itemsize
    of_rollout = model.velocity(args.rollout_batch_size or args.per_device_train_batch_size) + unpacked
    of_training = model.training(args.per_device_train_batch_size, bool(args.activation_checkpointing)) + unpacked
    phases = {
        "encode": _encoding(model, stays, alone=args.precompute_prompt_embeds),
        "rollout": stays | prompts | _sweep(args, model) | {"activations": of_rollout},
        "decode": stays | {"VAE": _size(model.policy.pipeline.vae)} | prompts | _decoding(args, model),
        "train": in_training | {"activations": of_training},
        "update": in_training | {"optimizer's temporaries": optimizer_size(optim_of(args), model.trained)[1]},
    }
    if args.offload_reference:
        activations = {"activations": model.velocity(args.per_device_train_batch_size)}
        phases["reference"] = in_training | {"reference": _size(model.reference)} | activations
    return Memory({name: phases[name] for name in PHASES if name in phases})


def _staying(args: TPGRPOConfig, model: FakeModel) -> dict[str, float]:
    """What is on the device all the time, from the first update on."""
    trained = 4 * sum(model.trained)
    items = {"transformer": model.weights.size(model.dtype, args.quantization)}
    if model.is_adapter:
        items["adapter"] = trained
    items["optimizer's states"] = optimizer_size(optim_of(args), model.trained)[0]
    if args.ema_decay is not None:
        items["moving average"] = trained
    if args.world_size > 1:
        items["gradient buckets"] = trained
    if model.reference is not None and not args.offload_reference:
        items["reference"] = _size(model.reference)
    if not args.offload_between_phases:
        items["VAE"] = _size(model.policy.pipeline.vae)
    return items | {"CUDA context": CONTEXT}


def _kept_rollout(args: TPGRPOConfig, model: FakeModel) -> dict[str, float]:
    """The states that are trained on, in float32, and the reference's velocities where they are kept."""
    numbers, steps = rows_of(args) * math.prod(model.latent_shape), len(windows_of(args)[0])
    items: dict[str, float] = {} if args.offload_trajectories else {"states": 4 * numbers * (steps + 1)}
    offloaded = args.offload_reference and args.offload_trajectories
    if args.beta > 0 and (args.num_iterations > 1 or args.offload_reference) and not offloaded:
        items["reference's velocities"] = model.dtype.itemsize * numbers * steps
    return items


def _prompts_size(args: TPGRPOConfig, model: FakeModel) -> int:
    return model.prompts_size(math.ceil(rows_of(args) / args.num_generations))


def _sweep(args: TPGRPOConfig, model: FakeModel) -> dict[str, float]:
    """Trajectories and completions at the fullest moment of a sweep, as one of few and short latents shows it, and all states.

    After the last sweep the states are put together and parted into micro-batches, and are there twice for a moment.
    """
    rows, numbers = args.num_generations, 512
    windows = windows_of(args)
    with LiveBytes() as bytes_of:
        roll_out(
            lambda latents, step, which: torch.zeros_like(latents, dtype=model.dtype),
            torch.zeros(rows // sharing_of(args), numbers),
            torch.linspace(1, 0, args.num_inference_steps + 1),
            windows[0],
            [torch.Generator()] * rows,
            args.completion_rule,
        )
    of_a_state = 0 if args.offload_trajectories else 4
    of_states = of_a_state * (len(windows[0]) + 1)
    of_one = bytes_of.peak / (rows * numbers) - 4 * (len(windows[0]) + 1)
    in_sweeps = of_one * sweep_sizes(args, rows_of(args))[0] + of_states * rows_of(args)
    return {"trajectories": max(in_sweeps, 2 * of_states * rows_of(args)) * math.prod(model.latent_shape)}


def _decoding(args: TPGRPOConfig, model: FakeModel) -> dict[str, float]:
    """The rollout's states and a sweep's latents that are decoded, and what the VAE needs for a batch."""
    rows, numbers = rows_of(args), math.prod(model.latent_shape)
    of_one = 0 if args.offload_trajectories else 4 * (len(windows_of(args)[0]) + 1)
    of_sweep = sampling_of(args, sweep_sizes(args, rows_of(args))[:1], windows_of(args)[:1], args.completion_rule)
    images = of_sweep.images.most // args.world_size
    batch_size = args.rollout_batch_size or args.per_device_train_batch_size
    return {
        "trajectories": numbers * (of_one * rows + 4 * images),
        "activations": model.decoding(min(batch_size, images), args.vae_slicing, args.vae_tiling),
    }


def _encoding(model: FakeModel, others: dict[str, float], alone: bool) -> dict[str, float]:
    """The text encoders and what is there with them: with `alone` the VAE, before the transformer comes."""
    encoders = {"text encoders": sum(map(_size, model.policy.text_encoders().values()))}
    if alone:
        others = {"VAE": _size(model.policy.pipeline.vae), "CUDA context": CONTEXT}
    return others | encoders | {"activations": model.encoding()}


def _size(module: nn.Module | None) -> float:
    """Bytes of a module's weights and buffers."""
    values = [] if module is None else [*module.parameters(), *module.buffers()]
    return sum(value.nbytes for value in values)


def optim_of(args: TPGRPOConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))


def optimizer_size(name: str, sizes: list[int]) -> tuple[float, float]:
    """Bytes of an optimizer's states, and of what its update needs besides, for tensors with so many weights."""
    states, update = OPTIMIZERS.get(name, UNKNOWN_OPTIMIZER)
    small = 4 if "8bit" in name and "torch" not in name else 1  # bitsandbytes' float32 for a byte
    of_states = sum(states * size * (small if size < SMALL_TENSOR else 1) for size in sizes)
    return of_states, update * sum(sizes)


# ---------------------------------------------------------------------------------------------------------- the advice


def advise(args: TPGRPOConfig, model: FakeModel, limit: float) -> tuple[dict[str, Any], Memory] | None:
    """Settings under which a run fits into `limit` bytes, and its memory then; `None` if there are none.

    None of them changes the prompts and images of a rollout, or the trajectories of an update.
    """
    taken: list[dict[str, Any]] = []
    for change in savings(args, model.is_adapter):
        if _with(args, model, taken).peak <= limit:
            break
        taken.append(change)
    if _with(args, model, taken).peak > limit:
        return None
    for change in reversed(list(taken)):  # what was tried in vain, the dearest first
        others = [other for other in taken if other is not change]
        if _with(args, model, others).peak <= limit:
            taken = others
    return _merged(taken), _with(args, model, taken)


def _with(args: TPGRPOConfig, model: FakeModel, changes: list[dict[str, Any]]) -> Memory:
    return estimate(changed(args, **_merged(changes)), model)


def _merged(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def savings(args: TPGRPOConfig, is_adapter: bool) -> Iterator[dict[str, Any]]:
    """Changes of the settings that may save memory, those that cost the least time and precision first."""
    if not args.precompute_prompt_embeds:
        yield {"precompute_prompt_embeds": True}
    for name in ("vae_slicing", "offload_between_phases", "offload_trajectories"):
        if not getattr(args, name):
            yield {name: True}
    if OPTIMIZERS.get(optim_of(args), UNKNOWN_OPTIMIZER)[0] > 2:
        yield {"optim": "adamw_bnb_8bit"}
    if not args.activation_checkpointing:
        yield {"activation_checkpointing": True}
    if not is_adapter and args.beta > 0 and not args.offload_reference:
        yield {"offload_reference": True}
    for size in _halves(args.rollout_batch_size or args.per_device_train_batch_size):
        yield {"per_device_rollout_batch_size": size}
    yield from _smaller_micro_batches(args)
    if is_adapter and args.quantization is None:
        yield {"quantization": "int8"}
        yield {"quantization": "nf4"}


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _smaller_micro_batches(args: TPGRPOConfig) -> Iterator[dict[str, Any]]:
    """Fewer images at once, and as many more micro-batches."""
    size = args.per_device_train_batch_size
    assert args.steps_per_generation and args.gradient_accumulation_steps
    for smaller in (number for number in range(size - 1, 0, -1) if size % number == 0):
        more = size // smaller
        yield {
            "per_device_train_batch_size": smaller,
            "gradient_accumulation_steps": args.gradient_accumulation_steps * more,
            "generation_batch_size": args.generation_batch_size,
            "steps_per_generation": args.steps_per_generation * more,
        }
