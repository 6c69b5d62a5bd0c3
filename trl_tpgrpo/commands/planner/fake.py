"""The model of a run in its true size, of tensors that know their shapes and hold nothing, and the bytes that it takes to run it."""

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

from ...config import TPGRPOConfig
from ...policies.base import Conditioning
from ...policies.loading import load_policy, prepare_transformer
from ..architectures import load_architecture, load_part
from .counts import changed


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
