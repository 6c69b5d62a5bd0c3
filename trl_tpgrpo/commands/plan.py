"""`trl-tpgrpo plan`: what a run will cost, whether it fits into a GPU, and what to change if it does not.

Counts come from the rollout itself, run on latents of one number. Memory is arithmetic on the shapes that the config
files of a model give, and on measured constants for what models keep while they compute.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from peft import LoraConfig
from trl import get_peft_config

from ..algorithm.rollout import EXACT, roll_out
from ..config import TPGRPOConfig
from ..policies.base import Guidance
from ..policies.loading import build_policy, prepare_transformer, run_dtype
from ..rollouts import PROBED_GROUPS, sweeps
from .architectures import architecture_folder, load_architecture, load_part
from .train import load_prompts, make_parser, model_path, split_options


GIB = CONTEXT = 2**30  # the latter is assumed for CUDA itself and what its allocator cannot use
MARGIN = 0.95  # share of a GPU that is used: cards have a little less than their name says, and allocators gaps
# Bytes a token (image and text) and unit of the transformer's width in bfloat16, 1.3 times as much in float32: the
# larger of what SD3.5-medium and FLUX.1-dev take at 512 pixels. docs/models.md: how they were measured, how far off.
EVALUATION = 57
KEPT = {True: 53, False: 91}  # for the backward pass, by each layer: with an adapter, with all weights trained
CHECKPOINTED = 82  # in the layer that is computed anew; of each layer the input is kept besides, 2 bytes
DECODING = 768  # numbers a pixel
ENCODING = 200_000  # bytes a text token
# Bytes a weight of a linear layer, and a row of them; nf4 has scales of 64 weights each, in 8 bit and with scales too.
QUANTIZED = {"nf4": (1 / 2 + 1 / 64 + 4 / (64 * 256), 0), "int8": (1, 2), "fp8": (1, 4)}
# Bytes a trained weight: of the states that are kept, and of what the update needs for a moment.
OPTIMIZERS = {
    "adamw_torch": (8, 4), "adamw_torch_fused": (8, 0), "adamw_torch_8bit": (2, 4), "adamw_torch_4bit": (1, 4),
    "adamw_bnb_8bit": (2, 0), "adamw_8bit": (2, 0), "paged_adamw_8bit": (2, 0), "paged_adamw_32bit": (8, 0),
    "lion_8bit": (1, 0), "lion_32bit": (4, 0), "paged_lion_8bit": (1, 0), "paged_lion_32bit": (4, 0),
    "rmsprop": (4, 4), "rmsprop_bnb_8bit": (1, 0), "adagrad": (4, 4), "sgd": (0, 0), "adafactor": (0, 4),
}  # fmt: skip


@dataclass
class PlanArguments:
    """Arguments of `trl-tpgrpo plan`, besides those of `trl-tpgrpo train`, which say what is planned."""

    _argument_group_name = "Plan"
    gpu: str | None = field(default=None, metadata={"help": "Memory of each GPU, such as 24GB, to fit into."})


@dataclass
class PlannedConfig(TPGRPOConfig):
    """The settings of a run on `num_processes` GPUs elsewhere, in bfloat16 if they leave the precision open."""

    num_processes: int = 1
    world_size = property(lambda self: self.num_processes)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu  # type: ignore[has-type]
        self.use_cpu, self.tf32 = True, None  # or transformers would ask this machine for what the other one can
        super().__post_init__()


class Counts(NamedTuple):
    """What a rollout takes over all processes, and how many updates and rollouts there are (`None`: not known)."""

    rollout: dict[str, list[int]]  # a number for each window that it may have, all equally likely; empty: not known
    updates: float  # a rollout; below 1 if several rollouts make an update
    num_updates: int | None
    num_rollouts: int | None


def changed(args: TPGRPOConfig, *changes: dict[str, Any]) -> TPGRPOConfig:
    """Return a copy with other values, which are not checked."""
    args = copy.copy(args)
    for change in changes:
        args.__dict__.update(change)
    return args


def count(args: Any, dataset_size: int | None = None) -> Counts:
    """Count what a run with these settings takes, with so many prompts (`None`: not known)."""
    trajectories, accumulated = args.generation_batch_size, args.gradient_accumulation_steps
    steps = trajectories // (args.per_device_train_batch_size * args.world_size)
    batches = steps * (args.num_iterations + (args.beta > 0))
    if args.recompute_old_log_probs:  # the first update can do without, unless there are more iterations
        batches += max(0, steps - (accumulated if args.num_iterations == 1 else 0))
    updates, total = steps * args.num_iterations / accumulated, args.max_steps if args.max_steps > 0 else None
    num_rollouts = None if total is None else math.ceil(total / updates)
    if dataset_size is not None:  # an epoch ends with an update, whatever has been accumulated
        rollouts = dataset_size // args.prompts_per_generation
        epoch = max(1, math.ceil(rollouts * updates))
        total = total or math.ceil(args.num_train_epochs * epoch)
        num_rollouts = total // epoch * rollouts + min(rollouts, math.ceil(total % epoch / updates))
    evaluations, calls, images = count_sampling(args, trajectories // args.world_size, args.completion_rule)
    rollout = {
        "trajectories": [trajectories],
        "evaluations in sampling": evaluations,
        "model calls in sampling": calls if args.rollout_batch_size else [],
        "images decoded and scored": images,
        "transitions trained on": [trajectories * args.num_sde_steps],
        "evaluations in training": [trajectories * args.num_sde_steps * batches // steps],
    }
    return Counts(rollout, updates, total, num_rollouts)


def count_sampling(args: Any, num_rows: int, rule: Any) -> list[list[int]]:
    """Count evaluations, calls and images of sampling so many trajectories on each process, in each window."""
    sigmas, batch_size = torch.linspace(1, 0, args.num_inference_steps + 1), args.rollout_batch_size
    sizes = [len(range(num_rows)[part]) for part in sweeps(num_rows, args)]

    def swept(size: int, start: int) -> tuple[int, int, int]:
        window, generators = args.window(start, start + args.num_sde_steps), [torch.Generator()] * size
        noise = torch.zeros(size // args.num_generations if args.share_initial_noise else size, 1)
        rollout = roll_out(lambda x, *_: torch.zeros_like(x), noise, sigmas, window, generators, rule, batch_size)
        return rollout.num_evaluations, rollout.num_calls, len(rollout.final_latents)

    numbers = torch.tensor([[swept(size, start) for size in sizes] for start in args.window_starts])
    return (args.world_size * numbers.sum(1)).T.tolist()


class PlannedModel:
    """The model of a run on PyTorch's meta device, with shapes but no weights."""

    def __init__(self, folder: Path, args: Any, peft_config: LoraConfig | None, dtype: torch.dtype):
        scheduler, self.dtype, self.is_adapter = load_part(folder, "scheduler"), dtype, peft_config is not None
        guidance = Guidance(**{name: getattr(args, name) for name in Guidance.__dataclass_fields__})
        plain = {"beta": 0, "attention_backend": None, "compile_backend": None, "offload_reference": False}
        with torch.device("meta"):
            pipeline = load_architecture(folder, dtype, scheduler=scheduler)
            self.policy, transformer = build_policy(pipeline, guidance), pipeline.transformer
            self.weights = {kind: weights_size(transformer, kind) for kind in (None, *QUANTIZED)}
            self.largest = max(value.nbytes for value in transformer.parameters())
            model, _ = prepare_transformer(self.policy, peft_config, changed(args, plain))
        self.vae, self.tile = weights_size(pipeline.vae), pipeline.vae.config.sample_size**2
        self.encoders = sum(weights_size(encoder) for encoder in self.policy.text_encoders().values())
        self.trained = [value.numel() for value in model.parameters() if value.requires_grad]
        self.policy.device = torch.device("cpu")
        self.latent_shape = tuple(self.policy.initial_noise([torch.Generator()]).shape[1:])
        shapes, config = self.policy.text_shapes().values(), transformer.config
        self.num_text_tokens, self.prompt_size = next(iter(shapes))[0], dtype.itemsize * sum(map(math.prod, shapes))
        tokens = math.prod(self.latent_shape) // (config.in_channels * config.patch_size**2) + self.num_text_tokens
        self.hidden = tokens * config.num_attention_heads * config.attention_head_dim
        self.layers = sum(type(module).__name__ in self.policy.repeated_blocks for module in transformer.modules())

    def activations(self, args: Any, batch_size: int, trains: bool = False) -> float:
        """Estimate the bytes of a model call besides the weights, with a backward pass if it `trains`."""
        half = run_dtype(args).itemsize == 2
        inputs, casts = (2 * self.layers, 2 * sum(self.trained)) if half else (3 * self.layers, 0)  # autocast's copies
        kept = inputs + CHECKPOINTED if args.activation_checkpointing else self.layers * KEPT[self.is_adapter]
        each = (kept if trains else EVALUATION) * (1 if half else 1.3) * (1 + self.policy.uses_negative_prompt)
        return batch_size * self.hidden * each + casts + (self.largest if args.quantization else 0)


def weights_size(module: torch.nn.Module, quantization: str | None = None) -> float:
    """Return the bytes of a module's weights and buffers in its dtype, with linear layers quantised."""
    linear = [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)] if quantization else []
    (each, row), itemsize = QUANTIZED.get(str(quantization), (0, 0)), next(module.parameters()).dtype.itemsize
    size = itemsize * sum(value.numel() for value in [*module.parameters(), *module.buffers()])
    return size + sum(weight.numel() * (each - itemsize) + len(weight) * row for weight in linear)


def optimizer_size(name: str, sizes: list[int]) -> tuple[float, float]:
    """Return the bytes of an optimizer's states and of what its update needs besides, for tensors of such sizes."""
    states, update = OPTIMIZERS.get(name, (8, 4))
    small = 4 if "8bit" in name and "torch" not in name else 1  # bitsandbytes keeps those of small tensors in float32
    return sum(states * size * (small if size < 4096 else 1) for size in sizes), update * sum(sizes)


def estimate(args: Any, model: PlannedModel) -> dict[str, dict[str, float]]:
    """Estimate the bytes that a run takes on each device by phase and purpose, reward models aside."""
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
        "CUDA context": CONTEXT,
    }
    alone = {"VAE": model.vae, "CUDA context": CONTEXT} if args.precompute_prompt_embeds else stays
    prompts = {"prompt embeddings": model.prompt_size * math.ceil(rows / args.num_generations)}
    states = 0 if args.offload_trajectories else 4 * latent * rows * (args.num_sde_steps + 1)
    first = sweeps(rows, args)[0]
    images = count_sampling(args, len(range(rows)[first]), args.completion_rule)[2][0] // args.world_size
    sweep = images * latent * 3 * (4 + itemsize)  # latents, velocities and their copies in a step
    sampling = {"trajectories": max(sweep + states, 2 * states), "activations": model.activations(args, batch)}
    pixels = min(args.height * args.width, model.tile if args.vae_tiling else math.inf)
    pixels *= 1 if args.vae_slicing else min(batch, images)
    decoding = {"trajectories": states + 4 * latent * images, "activations": DECODING * itemsize * pixels}
    keeps = args.beta > 0 and (args.num_iterations > 1 or offloads and not args.offload_trajectories)
    velocities = itemsize * latent * rows * args.num_sde_steps if keeps else 0
    training = stays | {"gradients": trained} | prompts | {"states": states, "reference's velocities": velocities}
    phases: dict[str, dict[str, float]] = {
        "encode": alone | {"text encoders": model.encoders, "activations": ENCODING * model.num_text_tokens},
        "rollout": stays | prompts | sampling,
        "decode": stays | {"VAE": model.vae} | prompts | decoding,
        "reference": training | {"reference": model.weights[None], "activations": model.activations(args, size)},
        "train": training | {"activations": model.activations(args, size, trains=True)},
        "update": training | {"optimizer's temporaries": optimizer_size(args.optim, model.trained)[1]},
    }
    return {name: items for name, items in phases.items() if name != "reference" or offloads}


def peak(memory: dict[str, dict[str, float]]) -> float:
    """Return the bytes of the phase that takes the most."""
    return max(sum(items.values()) for items in memory.values())


def advise(args: Any, model: PlannedModel, limit: float) -> dict[str, Any] | None:
    """Return settings under which the same rollouts and updates fit into `limit` bytes; `None` if there are none."""
    taken = savings(args, model.is_adapter)
    for change in [{}, *reversed(taken)]:  # with all of them, and without each, the most expensive first
        others = [other for other in taken if other is not change]
        if peak(estimate(changed(args, *others), model)) <= limit:
            taken = others
        elif not change:
            return None
    return {name: value for change in taken for name, value in change.items()}


def savings(args: Any, is_adapter: bool) -> list[dict[str, Any]]:
    """List changes of the settings that may save memory, those that cost the least time and precision first."""
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


def main(argv: list[str]) -> int:
    """Print what a run takes; nothing is trained, and no weights are loaded."""
    parser = make_parser("trl-tpgrpo plan", own_types=(PlanArguments,))
    launch_options, own_options = split_options(parser, argv)
    launch = launch_command_parser().parse_args([*launch_options, "script"])
    configured = launch.config_file and load_config_from_file(launch.config_file).num_processes
    parser.dataclass_types[-1] = PlannedConfig
    parser.set_defaults(num_processes=launch.num_processes or configured or 1)
    own, script, chosen, data, args = parser.parse_args_and_config(own_options, fail_with_unknown_args=False)[:5]
    limit, name, dataset = own.gpu and gpu_size(own.gpu), chosen.model_name_or_path, script.dataset_name
    if name is None:
        raise ValueError("--model_name_or_path is missing: a Hub id, a folder, or 'testbed'.")
    is_here = dataset is not None and not data.datasets and (dataset == "testbed" or Path(dataset).exists())
    counts = count(args, len(load_prompts(script, data, evaluate=False)[0]) if is_here else None)
    peft_config, given = get_peft_config(chosen), (args.model_init_kwargs or {}).get("dtype", chosen.dtype)
    dtype = getattr(torch, str(given).removeprefix("torch.")) if given else None
    folder = architecture_folder(model_path(name), chosen.model_revision)
    model = PlannedModel(folder, args, peft_config, dtype or (run_dtype(args) if peft_config else torch.float32))
    memory, sharded = estimate(args, model), launch.use_fsdp or launch.use_deepspeed or args.fsdp or args.deepspeed
    kind = args.quantization or str(model.dtype).removeprefix("torch.")
    what = f"in {kind}, trained: {'an adapter of' if peft_config else 'all'} {sum(model.trained) / 1e6:,.1f} M"
    lines = [
        f"{name}: transformer of {model.weights[None] / model.dtype.itemsize / 1e6:,.1f} M numbers {what} weights",
        f"{args.height} x {args.width} pixels, {args.num_inference_steps} steps, {model.num_text_tokens} text tokens, "
        f"{args.world_size} process{'es' if args.world_size > 1 else ''}",
        *("", *_tables(args, counts, memory), ""),
        *([] if limit is None else [*_verdict(args, model, memory, limit), ""]),
        *(f"- {note}" for note, applies in _notes(args, model, counts, sharded).items() if applies),
    ]
    print(*lines, sep="\n")  # noqa: T201
    return 0


def gpu_size(given: str) -> float:
    """Return the bytes of a GPU that is sold as `24GB`; raise a `ValueError` if it is not written so."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB)?", given.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"--gpu must be the memory of a GPU, such as 24GB, got {given!r}.")
    return float(match[1]) * GIB


def _tables(args: PlannedConfig, counts: Counts, memory: dict[str, dict[str, float]]) -> Iterator[str]:
    number = counts.num_rollouts
    yield f"{'':<28}{'a rollout':>24}{'the run' if number else '':>20}".rstrip()
    for name, values in counts.rollout.items():
        mean = sum(values) / max(len(values), 1)
        shown = "not known" if not values else f"{mean:,.0f}"
        spread = f" ({min(values):,}-{max(values):,})" if len(set(values)) > 1 else ""
        run = f"{mean * number:,.0f}" if number and values else ""
        bounded = args.sde_window_share and name != "trajectories" or args.beta == 0 and "train" in name
        yield f"{name:<28}{shown + spread:>24}{run:>20}  {'at most' if bounded else ''}".rstrip()
    yield f"{'updates':<28}{counts.updates:>24,g}{f'{counts.num_updates:,}' if number else '':>20}".rstrip()
    if number:
        yield f"{'rollouts':<28}{'':>24}{number:>20,}"
    yield f"\n{'GiB on each device':<24}" + "".join(f"{phase:>10}" for phase in memory)
    for name in dict.fromkeys(name for items in memory.values() for name in items):
        sizes = [items.get(name, 0) / GIB for items in memory.values()]
        if any(sizes):
            yield f"{name:<24}" + "".join(f"{size:>10.2f}" if size else f"{'-':>10}" for size in sizes)
    yield f"{'total':<24}" + "".join(f"{sum(items.values()) / GIB:>10.2f}" for items in memory.values())


def _verdict(args: PlannedConfig, model: PlannedModel, memory: dict[str, dict[str, float]], limit: float) -> list[str]:
    phase = max(memory, key=lambda name: sum(memory[name].values()))
    changes = {} if peak(memory) <= MARGIN * limit else advise(args, model, MARGIN * limit)
    fits = f"{'fits' if changes == {} else 'does not fit'} into {limit / GIB:g} GiB of which {MARGIN:.0%} are used"
    answer = f"The most is {peak(memory) / GIB:.1f} GiB ({phase}): it {fits}"
    if not changes:
        hint = "" if model.is_adapter else " An adapter would take much less: use_peft: true."
        return [f"{answer}, and no change of settings is enough.{hint}" if changes is None else f"{answer}."]
    less, shown = estimate(changed(args, changes), model), yaml.safe_dump(changes, sort_keys=False).splitlines()
    return [f"{answer}. With these settings it takes {peak(less) / GIB:.1f} GiB:", *(f"  {line}" for line in shown)]


def _notes(args: PlannedConfig, model: PlannedModel, counts: Counts, sharded: bool) -> dict[str, bool]:
    rows, group = args.generation_batch_size // args.world_size, args.num_generations
    probed = min(rows, PROBED_GROUPS * group) if rows % group == 0 else rows
    probe, check = (count_sampling(args, number, EXACT) for number in (probed, min(rows, group)))
    adds, checks = ([f"{sum(values) / len(values):,.0f}" for values in counted[::2]] for counted in (probe, check))
    every, checked = args.completion_check_every, args.completion_check_every is not None
    guided, unknown = model.policy.uses_negative_prompt, counts.num_updates is None
    return {
        "Classifier-free guidance: each evaluation is two rows of the model's batch, or two passes.": guided,
        "beta=0: transitions whose advantage is 0 are not run, so that training may take less.": args.beta == 0,
        "sde_window_share: numbers are those of the whole range, of which the window is a part. Measuring it adds "
        f"{adds[0]} evaluations and {adds[1]} images, once.": args.sde_window_share is not None,
        f"completion_check_every: {checks[0]} evaluations, {checks[1]} images more every {every}. rollout.": checked,
        "per_device_rollout_batch_size=auto is measured on the device: calls are not known, and memory is that of "
        f"batches of {args.per_device_train_batch_size}.": args.rollout_batch_size is None,
        "The length of the run is not known: set max_steps, or name a dataset that is on this machine.": unknown,
        "Evaluations of the model between updates (eval_strategy) are not counted.": args.eval_strategy != "no",
        f"optim={args.optim.value}: unknown, taken for 8 bytes of states a weight.": args.optim not in OPTIMIZERS,
        "FSDP and DeepSpeed are not modelled: memory is that of a run without them.": sharded,
        "Activations are estimates by constants that were measured without compilation; workspaces of kernels and "
        "reward models are not in the sum. CUDA's own GiB is an assumption.": True,
    }
