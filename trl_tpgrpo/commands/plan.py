"""`trl-tpgrpo plan`: estimate the cost of a run, whether it fits on a GPU, and settings with which it fits.

Counts come from running the rollout on latents of one number; FLOPs from the model on the meta device. Memory is
computed from the shapes in the model's config files, and from measured constants for activations.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from peft import LoraConfig
from trl import get_peft_config

from ..algorithm.rollout import EXACT
from ..batches import eval_batch_size, scored_rule, sweeps
from ..callbacks.costs import Counts, count, count_sampling
from ..config import TPGRPOConfig, described
from ..policies.base import Guidance
from ..policies.embeddings import KEPT_IN_MEMORY
from ..policies.loading import build_policy, prepare_transformer, run_dtype
from ..rewards.contract import check_settings
from ..rollouts import PROBED_GROUPS
from .architectures import architecture_folder, load_architecture, load_part
from .hours import CARDS, GIB, count_evaluated, count_flops, find_gpu, row, time_rows
from .rewards import BUILT_IN_REWARDS, find_reward
from .train import load_prompts, make_parser, model_path, split_options


CONTEXT = GIB  # assumed for CUDA and unusable memory of its allocator
MARGIN = 0.95  # usable share of a GPU: cards have a little less than their nominal memory, and allocators have gaps
# Bytes a token (image and text) and unit of the transformer's width in bfloat16, 1.3 times as much in float32: the
# larger of what SD3.5-medium and FLUX.1-dev take at 512 pixels. docs/models.md: how they were measured, how far off.
EVALUATION = 57
KEPT = {True: 53, False: 91}  # for the backward pass, per layer: with an adapter, with all weights trained
CHECKPOINTED = 82  # in the recomputed layer; the input of each layer is kept too, 2 bytes
ENCODING = 200_000  # bytes per text token
# Bytes per weight of a linear layer, and per row; nf4 has a scale for 64 weights, in 8 bit with scales of its own.
QUANTIZED = {"nf4": (1 / 2 + 1 / 64 + 4 / (64 * 256), 0), "int8": (1, 2), "fp8": (1, 4)}
# Bytes per trained weight: of optimizer states, and of temporary tensors in the update.
OPTIMIZERS = {
    "adamw_torch": (8, 4), "adamw_torch_fused": (8, 0), "adamw_torch_8bit": (2, 4), "adamw_torch_4bit": (1, 4),
    "adamw_bnb_8bit": (2, 0), "adamw_8bit": (2, 0), "paged_adamw_8bit": (2, 0), "paged_adamw_32bit": (8, 0),
    "lion_8bit": (1, 0), "lion_32bit": (4, 0), "paged_lion_8bit": (1, 0), "paged_lion_32bit": (4, 0),
    "rmsprop": (4, 4), "rmsprop_bnb_8bit": (1, 0), "adagrad": (4, 4), "sgd": (0, 0), "adafactor": (0, 4),
}  # fmt: skip
REWARD_MODELS = {
    "aesthetic_score": 305e6, "clip_score": 428e6, "geneval": 497e6, "hps_v2": 986e6, "image_reward": 445e6,
    "pick_score": 986e6,
}  # fmt: skip
"""Float32 weights of the built-in rewards with a model on the device."""
OCR_SECONDS = 0.31  # of one thread per image of 512 x 512 pixels: docs/rewards.md


@described
@dataclass
class PlanArguments:
    """
    Arguments of `trl-tpgrpo plan`, in addition to those of `trl-tpgrpo train`.

    Parameters:
        gpu (`str`, *optional*): Card, such as 4090 or H100, or its memory, such as 24GB. The plan says whether the run
            fits, and estimates hours for a card.
    """

    _argument_group_name = "Plan"

    gpu: str | None = None


@dataclass
class PlannedConfig(TPGRPOConfig):
    """The settings of a run on `num_processes` other GPUs, in bfloat16 if no precision is set."""

    num_processes: int = 1
    world_size = property(lambda self: self.num_processes)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu  # type: ignore[has-type]
        self.use_cpu, self.tf32 = True, None  # otherwise transformers would check the precision on this machine
        super().__post_init__()


def changed(args: TPGRPOConfig, *changes: dict[str, Any]) -> TPGRPOConfig:
    """Return a copy with other values, without checks."""
    args = copy.copy(args)
    for change in changes:
        args.__dict__.update(change)
    return args


class PlannedModel:
    """The model of a run on PyTorch's meta device (shapes only)."""

    def __init__(
        self,
        folder: Path,
        args: Any,
        peft_config: LoraConfig | None,
        dtype: torch.dtype,
        rewards: Sequence[str] = (),
        reward_funcs: Sequence[Callable] = (),
    ):
        scheduler, self.dtype, self.is_adapter = load_part(folder, "scheduler"), dtype, peft_config is not None
        guidance = Guidance(**{name: getattr(args, name) for name in Guidance.__dataclass_fields__})
        plain = {"beta": 0, "attention_backend": None, "compile_backend": None, "offload_reference": False}
        with torch.device("meta"):
            pipeline = load_architecture(folder, dtype, scheduler=scheduler)
            self.policy, transformer = build_policy(pipeline, guidance, args.policy_class), pipeline.transformer
            self.weights = {kind: weights_size(transformer, kind) for kind in (None, *QUANTIZED)}
            self.largest = max(value.nbytes for value in transformer.parameters())
            model, _ = prepare_transformer(self.policy, peft_config, changed(args, plain))
        self.reward_funcs, self.reward_names = reward_funcs, rewards
        self.rewards = 4 * sum(REWARD_MODELS.get(name, 0) for name in rewards)
        self.vae, self.tile = weights_size(pipeline.vae), self.policy.tile_side**2
        self.encoders = sum(weights_size(encoder) for encoder in self.policy.text_encoders().values())
        self.trained = [value.numel() for value in model.parameters() if value.requires_grad]
        self.policy.device = torch.device("cpu")
        self.latent_shape = self.policy.latent_shape
        shapes = self.policy.text_shapes().values()
        self.num_text_tokens, self.prompt_size = next(iter(shapes))[0], dtype.itemsize * sum(map(math.prod, shapes))
        self.hidden, pixels = self._hidden(), math.prod(self.policy.input_size)
        with self.policy.at_eval_size():
            self.eval_hidden, self.input_pixels = self._hidden(), max(pixels, math.prod(self.policy.input_size))
        self.layers = sum(type(module).__name__ in self.policy.repeated_blocks for module in transformer.modules())

    def _hidden(self) -> int:
        """Return the hidden numbers per sample between blocks: of image tokens, and of texts and input images."""
        given = sum(shape[0] for shape in self.policy.text_shapes().values() if len(shape) > 1)
        return (math.prod(self.policy.token_grid) + given) * self.policy.width

    def activations(self, args: Any, batch_size: int, trains: bool = False, hidden: int | None = None) -> float:
        """Estimate the bytes of a model call without weights, with a backward pass if it `trains`."""
        half = run_dtype(args).itemsize == 2
        inputs, casts = (2 * self.layers, 2 * sum(self.trained)) if half else (3 * self.layers, 0)  # autocast's copies
        kept = inputs + CHECKPOINTED if args.activation_checkpointing else self.layers * KEPT[self.is_adapter]
        each = (kept if trains else EVALUATION) * (1 if half else 1.3) * (1 + self.policy.uses_negative_prompt)
        return batch_size * (hidden or self.hidden) * each + casts + (self.largest if args.quantization else 0)

    def decoding(self, args: Any, height: int, width: int, batch_size: int) -> float:
        """Estimate the bytes of a VAE call without weights."""
        pixels = min(height * width, self.tile if args.vae_tiling else math.inf)
        return self.policy.decoding * self.dtype.itemsize * pixels * (1 if args.vae_slicing else batch_size)

    def evaluating(self, args: Any) -> float:
        """Estimate the bytes of an evaluation's calls at its image size, of the model or VAE, without weights."""
        batch, size = eval_batch_size(args) or 1, (args.eval_height or args.height, args.eval_width or args.width)
        return max(self.activations(args, batch, hidden=self.eval_hidden), self.decoding(args, *size, batch))


def changes_size(args: Any) -> bool:
    """Check whether evaluations have another image size."""
    return (args.eval_height or args.height, args.eval_width or args.width) != (args.height, args.width)


def weights_size(module: torch.nn.Module, quantization: str | None = None) -> float:
    """Return the bytes of a module's weights and buffers in its dtype, with linear layers quantised."""
    linear = [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)] if quantization else []
    (each, row), itemsize = QUANTIZED.get(str(quantization), (0, 0)), next(module.parameters()).dtype.itemsize
    size = itemsize * sum(value.numel() for value in [*module.parameters(), *module.buffers()])
    return size + sum(weight.numel() * (each - itemsize) + len(weight) * row for weight in linear)


def optimizer_size(name: str, sizes: list[int]) -> tuple[float, float]:
    """Return the bytes of an optimizer's states and of temporary tensors in its update, for tensors of these sizes."""
    states, update = OPTIMIZERS.get(name, (8, 4))
    small = 4 if "8bit" in name and "torch" not in name else 1  # bitsandbytes keeps states of small tensors in float32
    return sum(states * size * (small if size < 4096 else 1) for size in sizes), update * sum(sizes)


def estimate(args: Any, model: PlannedModel) -> dict[str, dict[str, float]]:
    """Estimate the bytes of a run on each device, by phase and purpose."""
    rows, offloads = args.generation_batch_size // args.world_size, args.offload_reference
    size, batch = args.per_device_train_batch_size, args.rollout_batch_size or args.per_device_train_batch_size
    latent, itemsize, trained = math.prod(model.latent_shape), model.dtype.itemsize, 4 * sum(model.trained)
    stays = {
        "transformer": model.weights[args.quantization],
        "adapter": trained if model.is_adapter else 0,
        "optimizer's states": optimizer_size(args.optim, model.trained)[0],
        "moving average": trained if args.ema_decay is not None else 0,
        "gradient buckets": trained if args.world_size > 1 else 0,
        "reference": model.weights[None] if args.beta > 0 and not (model.is_adapter or offloads) else 0,
        "VAE": 0 if args.offload_between_phases else model.vae,
        "reward models": 0 if args.offload_between_phases else model.rewards,
        "CUDA context": CONTEXT,
    }
    alone = {"VAE": model.vae, "CUDA context": CONTEXT} if args.precompute_prompt_embeds else stays
    encoding = {"text encoders": model.encoders, "activations": ENCODING * model.num_text_tokens}
    if model.policy.takes_image:  # encoded by the VAE, which needs no more than decoding
        largest = max(encoding["activations"], model.policy.decoding * itemsize * model.input_pixels)
        encoding |= {"VAE": model.vae, "activations": largest}
    prompts = {"prompt embeddings": model.prompt_size * math.ceil(rows / args.num_generations)}
    states = 0 if args.offload_trajectories else 4 * latent * rows * num_states(args)
    first = sweeps(rows, args)[0]
    rule = scored_rule(args.completion_rule, model.reward_funcs)
    images = count_sampling(args, len(range(rows)[first]), rule)[2][0] // args.world_size
    sweep = images * latent * 3 * (4 + itemsize)  # latents, velocities and their copies in a step
    sampling = {"trajectories": max(sweep + states, 2 * states), "activations": model.activations(args, batch)}
    of_vae = model.decoding(args, args.height, args.width, min(batch, images))
    decoding = {"trajectories": states + 4 * latent * images, "activations": of_vae}
    keeps = args.beta > 0 and (args.num_iterations > 1 or offloads and not args.offload_trajectories)
    velocities = itemsize * latent * rows * args.num_sde_steps if keeps else 0
    training = stays | {"gradients": trained} | prompts | {"states": states, "reference's velocities": velocities}
    phases: dict[str, dict[str, float]] = {
        "encode": alone | encoding,
        "rollout": stays | prompts | sampling,
        "decode": stays | {"VAE": model.vae} | prompts | decoding,
        "score": stays | {"reward models": model.rewards} | prompts | {"trajectories": decoding["trajectories"]},
        "reference": training | {"reference": model.weights[None], "activations": model.activations(args, size)},
        "train": training | {"activations": model.activations(args, size, trains=True)},
        "update": training | {"optimizer's temporaries": optimizer_size(args.optim, model.trained)[1]},
        "evaluate": stays | {"VAE": model.vae} | prompts | {"states": states, "activations": model.evaluating(args)},
    }
    left_out = {"reference": not offloads, "score": not model.rewards, "evaluate": not changes_size(args)}
    return {name: items for name, items in phases.items() if not left_out.get(name)}


def num_states(args: Any) -> int:
    """Count the stored latents per trajectory: before and after SDE steps, and means if needed."""
    return (2 if args.loss_rule.needs_means else 1) * args.num_sde_steps + 1


def elsewhere(args: Any, model: PlannedModel, num_prompts: int | None) -> dict[str, float]:
    """Estimate the bytes per process off the device, and on disk for all, with `num_prompts` encoded prompts."""
    rows, states = args.generation_batch_size // args.world_size, 4 * math.prod(model.latent_shape)
    on_disk, number = args.prompt_embeds_dir is not None, num_prompts or 0
    kept = {
        "prompt embeddings on disk": number * model.prompt_size if on_disk else 0,
        "prompt embeddings": 0 if on_disk else min(number, KEPT_IN_MEMORY) * model.prompt_size,
        "text encoders": 0 if args.precompute_prompt_embeds else model.encoders,
        "states": states * rows * num_states(args) if args.offload_trajectories else 0,
        "VAE and reward models": model.vae + model.rewards if args.offload_between_phases else 0,
        "reference": model.weights[None] if args.offload_reference else 0,
    }
    return {name: size for name, size in kept.items() if size}


def peak(memory: dict[str, dict[str, float]]) -> float:
    """Return the bytes of the largest phase."""
    return max(sum(items.values()) for items in memory.values())


def advise(args: Any, model: PlannedModel, limit: float) -> dict[str, Any] | None:
    """Return settings with which the same rollouts and updates fit in `limit` bytes; `None` if there are none."""
    taken = savings(args, model.is_adapter)
    for change in [{}, *reversed(taken)]:  # with all changes, and without each, starting with the most expensive
        others = [other for other in taken if other is not change]
        if peak(estimate(changed(args, *others), model)) <= limit:
            taken = others
        elif not change:
            return None
    return {name: value for change in taken for name, value in change.items()}


def savings(args: Any, is_adapter: bool) -> list[dict[str, Any]]:
    """List changes of settings that save memory, in order of their cost in time and precision."""
    size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch_size, rollout = args.rollout_batch_size or size, {"generation_batch_size": args.generation_batch_size}
    switches = ("precompute_prompt_embeds", "vae_slicing", "offload_between_phases", "offload_trajectories")
    changes: list[dict[str, Any]] = [{name: True} for name in switches if not getattr(args, name)]
    changes += [{"optim": "adamw_bnb_8bit"}] if OPTIMIZERS.get(args.optim, (8, 4))[0] > 2 else []
    changes += [] if args.activation_checkpointing else [{"activation_checkpointing": True}]
    changes += [{"offload_reference": True}] if args.beta > 0 and not (is_adapter or args.offload_reference) else []
    changes += [{"per_device_rollout_batch_size": batch_size >> n} for n in range(1, batch_size.bit_length())]
    changes += [
        {"per_device_train_batch_size": n, "gradient_accumulation_steps": accumulated * size // n, **rollout}
        for n in range(size - 1, 0, -1)
        if size % n == 0
    ]
    return changes + [{"quantization": kind} for kind in ("int8", "nf4") if is_adapter and args.quantization is None]


def read_options(argv: list[str]) -> tuple[Any, ...]:
    """Return the options of plan, script, model, data and run, and whether the run is sharded."""
    parser = make_parser("trl-tpgrpo plan", own_types=(PlanArguments,))
    launch_options, own_options = split_options(parser, argv)
    launch = launch_command_parser().parse_args([*launch_options, "script"])
    configured = launch.config_file and load_config_from_file(launch.config_file).num_processes
    parser.dataclass_types[-1] = PlannedConfig
    parser.set_defaults(num_processes=launch.num_processes or configured or 1)
    *options, args = parser.parse_args_and_config(own_options, fail_with_unknown_args=False)[:5]
    return *options, args, bool(launch.use_fsdp or launch.use_deepspeed or args.fsdp or args.deepspeed)


def main(argv: list[str]) -> int:
    """Print the cost of a run, without training and without loading weights."""
    own, script, chosen, data, args, is_sharded = read_options(argv)
    name, (limit, cards) = chosen.model_name_or_path, find_gpu(own.gpu) if own.gpu else (None, list(CARDS))
    if name is None:
        raise ValueError("--model_name_or_path is missing: a Hub id, a folder, or 'testbed'.")
    num_train, num_eval = _dataset_sizes(script, data, args)
    if num_train is not None and num_train < (needed := args.prompts_per_generation):
        raise ValueError(f"The dataset has {num_train} prompts, but one rollout needs {needed}.")
    trained, eval_only = ([*map(find_own, names or [])] for names in (script.reward_funcs, script.eval_reward_funcs))
    check_settings(trained, eval_only, args, evaluates=args.eval_strategy != "no" or args.eval_on_start)
    counts = count(args, num_train, trained)
    num_images = count_evaluated(args, counts.num_updates, num_eval)
    peft_config, given = get_peft_config(chosen), (args.model_init_kwargs or {}).get("dtype", chosen.dtype)
    dtype = getattr(torch, str(given).removeprefix("torch.")) if given else None
    folder = architecture_folder(model_path(name), chosen.model_revision)
    rewards = [*(script.reward_funcs or []), *(script.eval_reward_funcs or [])]
    dtype = dtype or (run_dtype(args) if peft_config else torch.float32)
    model = PlannedModel(folder, args, peft_config, dtype, rewards, trained)
    memory, notes = estimate(args, model), _notes(args, model, counts, num_images, is_sharded)
    flops = count_flops(model.policy, model.is_adapter, args.activation_checkpointing)
    with model.policy.at_eval_size():
        evaluated = count_flops(model.policy, True, False) if changes_size(args) else flops
        size = f", evaluated at {model.policy.guidance.height} x {model.policy.guidance.width}"
    kind = args.quantization or str(model.dtype).removeprefix("torch.")
    what = f"in {kind}, trained: {'an adapter of' if peft_config else 'all'} {sum(model.trained) / 1e6:,.1f} M"
    lines = [
        f"{name}: transformer of {model.weights[None] / model.dtype.itemsize / 1e6:,.1f} M numbers {what} weights",
        f"{args.height} x {args.width} pixels, {args.num_inference_steps} steps, {model.num_text_tokens} text tokens, "
        f"{args.world_size} process{'es' if args.world_size > 1 else ''}" + size * changes_size(args),
        *("", *_costs(args, counts, num_images), *time_rows(args, counts, num_images, flops, cards, evaluated), ""),
        *(*_memory(memory), *_elsewhere(args, model, counts, num_train, num_eval), ""),
        *([] if limit is None else [*_verdict(args, model, memory, limit), ""]),
        *(f"- {note}" for note, applies in notes.items() if applies),
    ]
    print(*lines, sep="\n")  # noqa: T201
    return 0


def of_images(images: list[Any], **columns: list) -> None:
    """Replace a reward function that is built in, remote, or not on this machine."""


def find_own(name: str) -> Any:
    """Find a custom reward function, for its attributes."""
    try:
        return of_images if name in BUILT_IN_REWARDS or "://" in name else find_reward(name)
    except ValueError:  # reported in a note
        return of_images


def _dataset_sizes(script: Any, data: Any, args: PlannedConfig) -> tuple[int | None, int | None]:
    """Count the prompts for training and evaluation, of a dataset on this machine."""
    name = script.dataset_name
    if name is None or data.datasets or not (name == "testbed" or Path(name).exists()):
        return None, None
    train, evaluation = load_prompts(script, data, evaluate=args.eval_strategy != "no" or args.eval_on_start)
    return len(train), None if evaluation is None else len(evaluation)


def _costs(args: PlannedConfig, counts: Counts, num_images: int | None) -> Iterator[str]:
    number = counts.num_rollouts
    yield row("", "a rollout", "the run" if number else "")
    for name, values in counts.rollout.items():
        shown = f"{counts.mean(name):,.0f}" if values else "unknown"
        spread = f" ({min(values):,}-{max(values):,})" if len(set(values)) > 1 else ""
        run = f"{counts.mean(name) * number:,.0f}" if number and values else ""
        bounded = args.sde_window_share and name != "trajectories" or args.beta == 0 and "train" in name
        yield row(name, shown + spread, run, "at most" if bounded else "")
    if num_images:
        yield row("NFE in evaluation", "", f"{num_images * args.num_inference_steps_eval:,}")
    yield row("updates", f"{counts.updates:,g}", f"{counts.num_updates:,}" if number else "")
    if number:
        yield row("rollouts", "", f"{number:,}")


def _memory(memory: dict[str, dict[str, float]]) -> Iterator[str]:
    yield f"{'GiB on each device':<24}" + "".join(f"{phase:>10}" for phase in memory)
    for name in dict.fromkeys(name for items in memory.values() for name in items):
        sizes = [items.get(name, 0) / GIB for items in memory.values()]
        if any(sizes):
            yield f"{name:<24}" + "".join(f"{size:>10.2f}" if size else f"{'-':>10}" for size in sizes)
    yield f"{'total':<24}" + "".join(f"{sum(items.values()) / GIB:>10.2f}" for items in memory.values())


def _elsewhere(
    args: Any, model: PlannedModel, counts: Counts, num_train: int | None, num_eval: int | None
) -> Iterator[str]:
    taken = [counts.num_rollouts and counts.num_rollouts * args.prompts_per_generation, num_train]
    number = min((size for size in taken if size), default=0) + (num_eval or 0)
    sizes = [f"{name} {size / GIB:.1f}" for name, size in elsewhere(args, model, number).items()]
    if sizes:
        yield f"GiB per process off the device, with {number:,} encoded prompts: {', '.join(sizes)}"


def _verdict(args: PlannedConfig, model: PlannedModel, memory: dict[str, dict[str, float]], limit: float) -> list[str]:
    phase = max(memory, key=lambda name: sum(memory[name].values()))
    changes = {} if peak(memory) <= MARGIN * limit else advise(args, model, MARGIN * limit)
    fits = f"{'fits' if changes == {} else 'does not fit'} in {limit / GIB:g} GiB ({MARGIN:.0%} usable)"
    answer = f"Peak memory is {peak(memory) / GIB:.1f} GiB ({phase}): it {fits}"
    if not changes:
        hint = "" if model.is_adapter else " An adapter needs much less: use_peft: true."
        return [f"{answer}, and no change of settings is sufficient.{hint}" if changes is None else f"{answer}."]
    less, shown = estimate(changed(args, changes), model), yaml.safe_dump(changes, sort_keys=False).splitlines()
    return [f"{answer}. With these settings, it needs {peak(less) / GIB:.1f} GiB:", *(f"  {line}" for line in shown)]


def _notes(
    args: PlannedConfig, model: PlannedModel, counts: Counts, num_images: int | None, sharded: bool
) -> dict[str, bool]:
    rows, group = args.generation_batch_size // args.world_size, args.num_generations
    probed = min(rows, PROBED_GROUPS * group) if rows % group == 0 else rows
    whole, number = changed(args, {"sde_window_size": None}), args.noise_calibration_iterations
    rule = scored_rule(EXACT, model.reward_funcs)
    probe, check = count_sampling(whole, probed, rule), count_sampling(args, min(rows, group), rule)
    adds, checks = ([f"{sum(values) / len(values):,.0f}" for values in counted[::2]] for counted in (probe, check))
    every, checked = args.completion_check_every, args.completion_check_every is not None
    guided, unknown = model.policy.uses_negative_prompt, counts.num_updates is None
    names = [name for name in model.reward_names if name not in BUILT_IN_REWARDS and "://" not in name]
    found = dict(zip(model.reward_names, model.reward_funcs, strict=False))
    own, absent = ", ".join(names), ", ".join(name for name in names if found.get(name) is of_images)
    reading = counts.mean("images decoded and scored") * OCR_SECONDS / args.world_size / 3600
    return {
        "Classifier-free guidance: each function evaluation is two rows of the model's batch, or two passes.": guided,
        "beta=0: transitions with an advantage of 0 are skipped, so training may need less.": args.beta == 0,
        "sde_window_share: numbers are for the whole range, which is larger than the window. Measuring it adds "
        f"{adds[0]} NFE and {adds[1]} images, once.": args.sde_window_share is not None,
        f"noise_calibration_iterations: each adds {adds[0]} NFE and {adds[1]} images, {number} times.": number > 0,
        f"completion_check_every: {checks[0]} NFE, {checks[1]} images more in one of {every} rollouts.": checked,
        "per_device_rollout_batch_size=auto is measured on the device: calls are unknown, and memory is for "
        f"batches of {args.per_device_train_batch_size}.": args.rollout_batch_size is None,
        "The length of the run is unknown: set max_steps, or use a dataset on this machine.": unknown,
        "Evaluations between updates are not counted: this needs eval_strategy=steps and a dataset on this "
        "machine.": num_images is None,
        f"optim={args.optim.value}: unknown, assumed 8 bytes of states per weight.": args.optim not in OPTIMIZERS,
        "FSDP and DeepSpeed are not modelled: memory is for a run without them.": sharded,
        f"Memory and time of {own} are unknown and not included.": bool(own),
        f"{absent} cannot be imported here: assumed to score images, not latents or noisy states.": bool(absent),
        f"ocr runs on the CPU, in parallel with the GPU: a rollout's images need {reading:.2g} hours of a thread on "
        "each process, by a measurement on one machine.": "ocr" in model.reward_names,
        "Hours do not include loading, encoding and scoring.": True,
        "Activations are estimated from constants measured without compilation. Workspaces of kernels and "
        "activations of reward models are not included. 1 GiB for CUDA is an assumption.": True,
    }
