"""What a run will take, from its settings and the config files of its model alone: no weights, no GPU.

Counts come from the rollout itself, run on latents of one number. Activations come from the model in its true size, run on
fake tensors, which know their shapes and hold nothing. The rest is arithmetic on the numbers of weights.

Memory is in bytes here; a GiB is 2**30 of them.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .architectures import load_architecture, load_part
from .completion import CompletionRule
from .config import TPGRPOConfig
from .generation import sweeps
from .models import load_policy, prepare_transformer
from .policies import Conditioning
from .rollout import EXACT, Rollout, Window, roll_out
from .trainer import PROBED_GROUPS


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


@dataclass
class PlannedConfig(TPGRPOConfig):
    """The settings of a run that takes place on `num_processes` GPUs elsewhere, in bfloat16 if they leave it open."""

    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu  # type: ignore[has-type]
        self.use_cpu, self.tf32 = True, None  # or transformers would ask this machine for what the other one can
        super().__post_init__()

    @property
    def world_size(self) -> int:
        return self.num_processes


def changed(args: TPGRPOConfig, **changes: Any) -> TPGRPOConfig:
    """A copy with other values, which are not checked."""
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


# ---------------------------------------------------------------------------------------------------------- the counts


@dataclass(frozen=True)
class Spread:
    """A count that depends on where the window starts.

    Attributes:
        mean: Over the starts, which are equally likely.
        least: Over the starts.
        most: Over the starts.
    """

    mean: float
    least: int
    most: int


@dataclass(frozen=True)
class Sampling:
    """What sampling takes, over all processes; each as the trainer counts it.

    Attributes:
        evaluations: Of the model, in samples (`num_evaluations`). Classifier-free guidance counts as one.
        calls: Of the model, in batches (`num_calls`); `None` where the batch size is to be measured.
        images: Decoded, and scored by each reward function (`num_decoded_images`, `num_scored_images`).
    """

    evaluations: Spread
    calls: Spread | None
    images: Spread


@dataclass(frozen=True)
class Counts:
    """What a run takes, over all processes.

    Attributes:
        trajectories: Of a rollout.
        sampling: Of a rollout; the most that it can be where `sde_window_share` measures the window.
        transitions: SDE steps of a rollout, each trained on `num_iterations` times.
        train_evaluations: Evaluations of the model and the reference in training on a rollout (`num_train_evaluations`);
            the most that it can be with `beta=0`, where transitions without advantage are left out.
        measuring: Added once, before the first rollout, by `sde_window_share`.
        checking: Added to every `completion_check_every`-th rollout.
        updates: Of a rollout; below 1 if several rollouts make an update.
        num_updates: Of the run; `None` where the size of the dataset is not known.
        num_rollouts: Of the run; `None` where the size of the dataset is not known.
    """

    trajectories: int
    sampling: Sampling
    transitions: int
    train_evaluations: int
    measuring: Sampling | None
    checking: Sampling | None
    updates: float
    num_updates: int | None
    num_rollouts: int | None


def count(args: TPGRPOConfig, dataset_size: int | None = None) -> Counts:
    """What a run with these settings takes.

    Args:
        args: The settings.
        dataset_size: Prompts for training; `None`: not known.
    """
    rows, sizes = rows_of(args), sweep_sizes(args)
    group = args.num_generations
    of_probe = min(rows, PROBED_GROUPS * group) if rows % group == 0 else rows
    whole = args.window(*args.sde_window_limits)
    num_updates, num_rollouts = _lengths(args, dataset_size)
    return Counts(
        trajectories=rows * args.world_size,
        sampling=sampling_of(args, sizes, windows_of(args), args.completion_rule),
        transitions=rows * args.world_size * len(windows_of(args)[0]),
        train_evaluations=_train_evaluations(args) * args.world_size,
        measuring=None if args.sde_window_share is None else sampling_of(args, [of_probe], [whole], EXACT),
        checking=sampling_of(args, [min(rows, group)], windows_of(args), EXACT)
        if args.completion_check_every
        else None,
        updates=_updates(args),
        num_updates=num_updates,
        num_rollouts=num_rollouts,
    )


def rows_of(args: TPGRPOConfig) -> int:
    """The trajectories of a rollout on one process."""
    assert args.steps_per_generation
    return args.per_device_train_batch_size * args.steps_per_generation


def windows_of(args: TPGRPOConfig) -> list[Window]:
    """The windows that a rollout may have; if it is measured, the whole of which it is a part."""
    if args.sde_window_share is not None:
        return [args.window(*args.sde_window_limits)]
    return [args.window(start, start + args.num_sde_steps) for start in args.window_starts]


def sweep_sizes(args: TPGRPOConfig) -> list[int]:
    """The trajectories that a process samples together, one number after the other."""
    rows = range(rows_of(args))
    return [len(rows[part]) for part in sweeps(len(rows), args)]


def sampling_of(args: TPGRPOConfig, sizes: list[int], windows: list[Window], rule: CompletionRule | None) -> Sampling:
    """What sweeps of `sizes` trajectories on each process take, with each of `windows` as likely as the others."""
    rollouts = [{size: _counted(args, size, window, rule) for size in set(sizes)} for window in windows]

    def spread(number: Callable[[Rollout], int]) -> Spread:
        values = [args.world_size * sum(number(by_size[size]) for size in sizes) for by_size in rollouts]
        return Spread(sum(values) / len(values), min(values), max(values))

    return Sampling(
        evaluations=spread(lambda rollout: rollout.num_evaluations),
        calls=None if args.rollout_batch_size is None else spread(lambda rollout: rollout.num_calls),
        images=spread(lambda rollout: len(rollout.final_latents)),
    )


def _counted(args: TPGRPOConfig, rows: int, window: Window, rule: CompletionRule | None) -> Rollout:
    """A sweep of latents of one number."""
    return roll_out(
        lambda latents, step, which: torch.zeros_like(latents),
        torch.zeros(rows // _sharing(args), 1),
        torch.linspace(1, 0, args.num_inference_steps + 1),
        window,
        [torch.Generator()] * rows,
        rule,
        args.rollout_batch_size,
    )


def _sharing(args: TPGRPOConfig) -> int:
    """How many trajectories start from the same noise."""
    return args.num_generations if args.share_initial_noise else 1


def _train_evaluations(args: TPGRPOConfig) -> int:
    """Those of one process for a rollout: of the policy, of the reference once, and for log-probabilities once more."""
    assert args.steps_per_generation and args.gradient_accumulation_steps
    of_chunk = args.per_device_train_batch_size * len(windows_of(args)[0])
    chunks = args.steps_per_generation * args.num_iterations
    if args.beta > 0:
        chunks += args.steps_per_generation
    if args.recompute_old_log_probs:
        of_first_update = args.gradient_accumulation_steps if args.num_iterations == 1 else 0
        chunks += max(0, args.steps_per_generation - of_first_update)
    return of_chunk * chunks


def _updates(args: TPGRPOConfig) -> float:
    """Of a rollout."""
    assert args.steps_per_generation and args.gradient_accumulation_steps
    return args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps


def _lengths(args: TPGRPOConfig, dataset_size: int | None) -> tuple[int | None, int | None]:
    """Updates and rollouts of the run; an epoch ends with an update, whatever has been accumulated."""
    of_rollout = _updates(args)
    if dataset_size is None:
        known = args.max_steps > 0
        return (args.max_steps, math.ceil(args.max_steps / of_rollout)) if known else (None, None)
    rollouts = dataset_size // args.prompts_per_generation
    updates = max(1, math.ceil(rollouts * of_rollout))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    epochs, left = divmod(total, updates)
    return total, epochs * rollouts + min(rollouts, math.ceil(left / of_rollout))


# ------------------------------------------------------------------------------------------------- what tensors take


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still alive, fake ones too, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._add((args, kwargs), counted=False)  # else a view of a weight would look new
        result = func(*args, **(kwargs or {}))
        self._add(result, counted=True)
        return result

    def _add(self, values: Any, counted: bool) -> None:
        storages = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
        for storage in storages:
            if storage._cdata not in self._known:
                size = storage.nbytes() if counted else 0
                self._known.add(storage._cdata)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._remove, storage._cdata, size)

    def _remove(self, address: int, size: int) -> None:
        self.live -= size
        self._known.discard(address)


@contextmanager
def _norms_in_float32() -> Iterator[None]:
    """Under autocast CUDA computes norms in float32; here the CPU does so too, inside."""
    own = {name: getattr(nn.functional, name) for name in ("layer_norm", "rms_norm")}

    def in_float32(norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return norm(*args, **kwargs)

    try:
        for name, norm in own.items():
            setattr(nn.functional, name, partial(in_float32, norm))
        yield
    finally:
        for name, norm in own.items():
            setattr(nn.functional, name, norm)


@dataclass(frozen=True)
class Weights:
    """Of a transformer.

    Attributes:
        linear: Rows and columns of its linear layers' weights.
        others: The number of all else, buffers included.
    """

    linear: list[tuple[int, int]]
    others: int

    @classmethod
    def of(cls, transformer: nn.Module) -> "Weights":
        """Those of a transformer without an adapter."""
        linear = [module.weight for module in transformer.modules() if isinstance(module, nn.Linear)]
        every = [*transformer.parameters(), *transformer.buffers()]
        of_linear = sum(weight.numel() for weight in linear)
        return cls(
            [(weight.shape[0], weight.shape[1]) for weight in linear],
            sum(value.numel() for value in every) - of_linear,
        )

    @property
    def number(self) -> int:
        """Of all of them."""
        return self.others + sum(rows * columns for rows, columns in self.linear)

    def size(self, dtype: torch.dtype, quantization: str | None = None) -> float:
        """In bytes."""
        return dtype.itemsize * self.others + sum(_linear_size(*shape, dtype, quantization) for shape in self.linear)


def _linear_size(rows: int, columns: int, dtype: torch.dtype, quantization: str | None) -> float:
    """Bytes of a linear layer's weight with the scales of its blocks (nf4, doubly quantised) or rows."""
    number = rows * columns
    if quantization == "nf4":
        return number * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    if quantization == "int8":
        return number + rows * dtype.itemsize
    if quantization == "fp8":
        return number + rows * 4
    return number * dtype.itemsize


def optimizer_size(name: str, sizes: list[int]) -> tuple[float, float]:
    """Bytes of an optimizer's states, and of what its update needs besides, for tensors with so many weights."""
    states, update = OPTIMIZERS.get(name, UNKNOWN_OPTIMIZER)
    small = 4 if "8bit" in name and "torch" not in name else 1  # bitsandbytes' float32 for a byte
    of_states = sum(states * size * (small if size < SMALL_TENSOR else 1) for size in sizes)
    return of_states, update * sum(sizes)


class FakeModel:
    """The model of a run in its true size, of fake tensors on the CPU; measures are kept.

    Args:
        folder: With the config files.
        args: The settings; of them the model's and the sampler's may not change afterwards.
        peft_config: Of the adapter; `None`: all weights are trained.
        dtype: Of the model.

    Attributes:
        weights: Of the transformer.
        is_adapter: Whether an adapter is trained.
        trained: How many weights each trained tensor has.
        latent_shape: Of one latent.
    """

    def __init__(self, folder: Path, args: TPGRPOConfig, peft_config: LoraConfig | None, dtype: torch.dtype):
        self.dtype, self.args, self.is_adapter = dtype, args, peft_config is not None
        off: dict[str, Any] = dict.fromkeys(
            ("model_init_kwargs", "quantization", "attention_backend", "compile_backend")
        )
        plain = changed(args, **off, vae_slicing=False, vae_tiling=False, offload_reference=False)
        with torch.device("meta"):
            pipeline = load_architecture(folder, dtype, scheduler=None)
        pipeline.scheduler = load_part(folder, "scheduler")
        self.policy = load_policy(pipeline, plain, use_lora=peft_config is not None)
        self.weights = Weights.of(pipeline.transformer)
        with torch.device("meta"):
            self.model, self.reference = prepare_transformer(self.policy, peft_config, plain)
        self.trained = [value.numel() for value in self.model.parameters() if value.requires_grad]
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        parts = [self.model, self.reference, pipeline.vae, *self.policy.text_encoders().values()]
        with self._mode:
            for part in parts:
                _fake(part)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        self.policy.device = torch.device("cpu")
        self.latent_shape = tuple(self.policy.initial_noise([torch.Generator()]).shape[1:])
        self._kept: dict[tuple, int] = {}

    @property
    def num_text_tokens(self) -> int:
        """Of an encoded prompt."""
        clip: Any = self.policy.text_encoders().get("text_encoder")
        of_clip: int = clip.config.max_position_embeddings if clip is not None else 77
        given = self.policy.guidance.max_sequence_length
        if "text_encoder_3" in self.policy.pipeline.components:  # SD3 puts the tokens of CLIP and T5 in a row
            return of_clip + (256 if given is None else given)
        return 512 if given is None else given

    def prompts_size(self, number: int) -> int:
        """Bytes of so many encoded prompts, the negative one aside."""
        config = self.policy.pipeline.transformer.config
        of_one = self.num_text_tokens * config.joint_attention_dim + config.pooled_projection_dim
        return number * of_one * self.dtype.itemsize

    def velocity(self, batch_size: int) -> float:
        """Bytes that a prediction without gradients needs besides the weights."""
        return self._by_batch(
            batch_size,
            self.args.rollout_batch_size or self.args.per_device_train_batch_size,
            lambda size: self._peak(("velocity", size), lambda: self._predict(self.model, size)),
        )

    def training(self, batch_size: int, checkpointing: bool) -> float:
        """Bytes that a forward and a backward of a transition need besides weights and gradients."""
        return self._by_batch(
            batch_size,
            self.args.per_device_train_batch_size,
            lambda size: self._peak(("training", size, checkpointing), lambda: self._train(size, checkpointing)),
        )

    def _by_batch(self, size: int, asked: int, measure: Callable[[int], int]) -> float:
        """Measured at the size that was asked for and at 2, and by a line through these in between.

        A batch of 1 spares a few copies, and so is measured itself.
        """
        if size <= 2 or size >= asked:
            return measure(size)
        return measure(2) + (measure(asked) - measure(2)) * (size - 2) / (asked - 2)

    def decoding(self, batch_size: int, slicing: bool, tiling: bool) -> int:
        """Bytes that the VAE needs to decode a batch, besides its weights."""
        return self._peak(("decoding", batch_size, slicing, tiling), lambda: self._decode(batch_size, slicing, tiling))

    def encoding(self) -> int:
        """Bytes that the largest text encoder needs for a prompt, besides its weights."""
        return self._peak(("encoding",), self._encode)

    def _peak(self, key: tuple, run: Callable[[], object]) -> int:
        if key not in self._kept:
            with self._mode, _norms_in_float32(), LiveBytes() as bytes_of:
                run()
            self._kept[key] = bytes_of.peak
        return self._kept[key]

    def _autocast(self) -> AbstractContextManager:
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return nullcontext() if half is None else torch.autocast("cpu", half)

    @torch.no_grad()
    def _predict(self, model: nn.Module, batch_size: int) -> Tensor:
        with self._autocast():
            return self._velocity(model, batch_size)

    def _velocity(self, model: nn.Module, batch_size: int) -> Tensor:
        config, device = self.policy.pipeline.transformer.config, self.policy.device
        latents = torch.empty(batch_size, *self.latent_shape, device=device)
        embeds = torch.empty(1, self.num_text_tokens, config.joint_attention_dim, dtype=self.dtype, device=device)
        pooled = torch.empty(1, config.pooled_projection_dim, dtype=self.dtype, device=device)
        negative = Conditioning(embeds, pooled) if self.policy.uses_negative_prompt else None
        of_batch = Conditioning(embeds, pooled, negative)[torch.zeros(batch_size, dtype=torch.long)]
        return self.policy.velocity(model, latents, torch.tensor(500.0), of_batch)

    def _train(self, batch_size: int, checkpointing: bool) -> None:
        self.model.train()
        transformer = self.policy.pipeline.transformer
        if checkpointing:
            transformer.activation_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        else:
            transformer.disable_gradient_checkpointing()
        with self._autocast():
            predicted = self._velocity(self.model, batch_size).float()
            loss = predicted.square().mean()
            if self.args.beta > 0:
                loss = loss + (predicted - self._reference_velocity(batch_size)).square().mean()
        loss.backward()

    def _reference_velocity(self, batch_size: int) -> Tensor:
        if self.reference is not None:
            return self._predict(self.reference, batch_size)
        adapter: Any = self.model
        with adapter.disable_adapter():
            return self._predict(adapter, batch_size)

    @torch.no_grad()
    def _decode(self, batch_size: int, slicing: bool, tiling: bool) -> None:
        vae = self.policy.pipeline.vae
        (vae.enable_slicing if slicing else vae.disable_slicing)()
        (vae.enable_tiling if tiling else vae.disable_tiling)()
        latents = self.policy.unpack(torch.empty(batch_size, *self.latent_shape, dtype=self.dtype))
        pixels = vae.decode(latents, return_dict=False)[0]
        (pixels * 0.5 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def _encode(self) -> None:
        for encoder in self.policy.text_encoders().values():
            length = getattr(encoder.config, "max_position_embeddings", self.num_text_tokens)
            encoder(torch.zeros(1, length, dtype=torch.long))


def _fake(module: nn.Module | None) -> None:
    """Put fake tensors in the place of those without data."""
    for part in [] if module is None else module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")


# ---------------------------------------------------------------------------------------------------------- the memory


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
            torch.zeros(rows // _sharing(args), numbers),
            torch.linspace(1, 0, args.num_inference_steps + 1),
            windows[0],
            [torch.Generator()] * rows,
            args.completion_rule,
        )
    of_a_state = 0 if args.offload_trajectories else 4
    of_states = of_a_state * (len(windows[0]) + 1)
    of_one = bytes_of.peak / (rows * numbers) - 4 * (len(windows[0]) + 1)
    in_sweeps = of_one * sweep_sizes(args)[0] + of_states * rows_of(args)
    return {"trajectories": max(in_sweeps, 2 * of_states * rows_of(args)) * math.prod(model.latent_shape)}


def _decoding(args: TPGRPOConfig, model: FakeModel) -> dict[str, float]:
    """The rollout's states and a sweep's latents that are decoded, and what the VAE needs for a batch."""
    rows, numbers = rows_of(args), math.prod(model.latent_shape)
    of_one = 0 if args.offload_trajectories else 4 * (len(windows_of(args)[0]) + 1)
    of_sweep = sampling_of(args, sweep_sizes(args)[:1], windows_of(args)[:1], args.completion_rule)
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
