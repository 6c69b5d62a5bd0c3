"""The interface of a model family, and the code shared by families. Only `policies/` calls diffusers' pipelines.

Shapes: `N` samples, `S` text tokens, `...` a latent (SD3: channels, height, width; FLUX: packed tokens, channels).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from .conditioning import Conditioning, Schedule, Step


FEW_STEPS = ("turbo", "schnell", "lightning", "hyper-sd", "flash", "distill")
"""Parts of the names of models that were distilled to few steps."""

Texts = dict[str, Sequence[Tensor]]
"""N rows of each tensor, by the family's own names; first the texts (S, ...), of any lengths."""


@dataclass(frozen=True)
class Guidance:
    """Sampling options under diffusers' names; the same in training and evaluation, except for the size."""

    height: int  # pixels
    width: int  # pixels
    guidance_scale: float | None = None  # `None`: the family's default
    true_cfg_scale: float | None = None  # of classifier-free guidance, in addition to an embedded `guidance_scale`
    negative_prompt: str | None = None  # `None`: the empty prompt, or no guidance if the pipeline needs one
    max_sequence_length: int | None = None  # text tokens; `None`: the pipeline's default
    eval_height: int | None = None  # pixels; `None`: `height`
    eval_width: int | None = None  # pixels; `None`: `width`


class FlowPolicy(ABC):
    """A pipeline, divided into the parts that reinforcement learning calls one by one.

    Each method is a part of the pipeline's `__call__`, so that a rollout of ODE steps is bit-identical to the
    pipeline's images. The model is an argument of `velocity`: the trainer passes the wrapped model, the unwrapped one,
    or the reference. An unsupported pipeline is a `ValueError`.

    A family sets class attributes and defines `encode_texts`, `text_shapes` and `predict`.
    """

    pipeline_class: type[DiffusionPipeline]
    lora_target_modules = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ]  # fmt: skip
    default_length: int  # the pipeline's own `max_sequence_length`
    default_guidance: dict[str, float]  # those of `guidance_scale` and `true_cfg_scale` that have an effect
    guidance_option: str | None = "guidance_scale"  # option of classifier-free guidance; `None`: not available
    least_guidance = 1.0  # classifier-free guidance is on above this scale
    takes_negative_prompt = True
    needs_negative_prompt = False  # whether classifier-free guidance needs a negative prompt
    takes_image = False  # whether prompts have an input image to edit
    decoding = 768  # numbers per pixel that the VAE keeps while it decodes
    guides_in_one_pass = False  # whether negative and positive prompts, in this order, share a model call
    noise_dtype: torch.dtype | None = None  # `None`: the transformer's
    velocity_dtype: torch.dtype | None = None
    largest_size: int | None = None  # pixels of height and width

    def __init__(self, pipeline: DiffusionPipeline, guidance: Guidance):
        self.pipeline = pipeline
        self.dtype: torch.dtype = pipeline.transformer.dtype  # of latents; an adapter in float32 comes later
        self.device: torch.device = pipeline.vae.device
        length = guidance.max_sequence_length
        self.text_length = self.default_length if length is None else length
        self._check_pipeline()
        self.guidance = self._settled(guidance)
        self._check_guidance()

    def _check_pipeline(self) -> None:
        scheduler = self.pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            kind = type(scheduler).__name__
            raise ValueError(f"The pipeline's scheduler must be a FlowMatchEulerDiscreteScheduler, got {kind}.")
        for option in ("stochastic_sampling", "invert_sigmas"):
            if scheduler.config.get(option, False):
                raise ValueError(f"The scheduler's option {option} is not supported: its steps are not Euler steps.")
        if getattr(self.pipeline, "hf_device_map", None) is not None:
            raise ValueError("A pipeline with a device_map cannot be trained: load it without device_map.")
        if any(isinstance(module, BaseTunerLayer) for module in self.pipeline.transformer.modules()):
            remedy = "call pipeline.fuse_lora() and pipeline.unload_lora_weights() first, or load the pipeline anew"
            raise ValueError(f"The pipeline's transformer already has an adapter: {remedy}.")

    def _settled(self, guidance: Guidance) -> Guidance:
        """Fill in the family's defaults; reject a scale without effect unless it is 1 (off)."""
        changes: dict[str, Any] = {"guidance_scale": None, "true_cfg_scale": 1.0}
        for name in changes:
            given, default = getattr(guidance, name), self.default_guidance.get(name)
            if default is not None:
                is_off = (
                    name == self.guidance_option and self.needs_negative_prompt and guidance.negative_prompt is None
                )
                changes[name] = (1.0 if is_off else default) if given is None else given
            elif given not in (None, 1.0):
                others = " and ".join(self.default_guidance) or "none"
                raise ValueError(f"{name} has no effect on this {self._name}: its guidance is {others}. Leave it out.")
        return replace(guidance, **changes)

    def _check_guidance(self) -> None:
        guidance, multiple, largest = self.guidance, self.size_multiple, self.largest_size
        for name in ("height", "width", "eval_height", "eval_width"):
            size = getattr(guidance, name) or multiple  # which is right, where there is none
            if size % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} for this pipeline, got {size}.")
            if largest is not None and size > largest:
                reason = "whose position embeddings end there"
                raise ValueError(f"{name} must be at most {largest} for this pipeline, {reason}, got {size}.")
        option, prompt = self.guidance_option, guidance.negative_prompt
        if option is None or not self.takes_negative_prompt:
            if prompt is not None:
                raise ValueError(f"negative_prompt has no effect on this {self._name}: leave it out.")
            return
        scale = getattr(guidance, option)
        if self.needs_negative_prompt and (scale > self.least_guidance) != (prompt is not None):
            got = f"{option}={scale}, negative_prompt={prompt!r}"
            raise ValueError(f"{option} above 1 and a negative_prompt have an effect only together; got {got}.")
        if prompt is not None and not self.uses_negative_prompt:
            got = f"{option} {scale} is not above {self.least_guidance:g}"
            raise ValueError(f"negative_prompt has no effect without guidance: {got}.")

    @contextmanager
    def at_eval_size(self) -> Iterator[None]:
        """Use `eval_height` x `eval_width` inside the context."""
        before = self.guidance
        height, width = before.eval_height or before.height, before.eval_width or before.width
        self.guidance = replace(before, height=height, width=width)
        try:
            yield
        finally:
            self.guidance = before

    @property
    def _name(self) -> str:
        return type(self.pipeline).__name__

    @property
    def uses_negative_prompt(self) -> bool:
        """Whether classifier-free guidance is on, so that the model gets prompt and negative prompt."""
        return self.guidance_option is not None and getattr(self.guidance, self.guidance_option) > self.least_guidance

    @property
    def scales(self) -> dict[str, float]:
        """Return the guidance scales that have an effect, by option name."""
        found = {name: getattr(self.guidance, name) for name in self.default_guidance}
        return {name: value for name, value in found.items() if name != "true_cfg_scale" or value != 1}

    @property
    def repeated_blocks(self) -> tuple[str, ...]:
        """Class names of the transformer's repeated blocks."""
        return tuple(self.pipeline.transformer._repeated_blocks)

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this: the side of a token (two by two latents) in pixels."""
        return self.pipeline.vae_scale_factor * 2

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        return self.guidance.height // self.size_multiple, self.guidance.width // self.size_multiple

    @property
    def tile_side(self) -> int:
        """Side in pixels of the tiles that the VAE decodes with tiling."""
        return self.pipeline.vae.config.sample_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width to which input images are resized, with `takes_image`."""
        return self.guidance.height, self.guidance.width

    @property
    def image_options(self) -> dict[str, Any]:
        """Pipeline options that keep the sizes of an input image of `input_size` and of the output."""
        return {}

    @property
    def width(self) -> int:
        """Hidden size of the transformer."""
        config = self.pipeline.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def num_channels(self) -> int:
        """Channels of a latent before packing."""
        return self.pipeline.transformer.config.in_channels // 4

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return tuple(self.initial_noise([torch.Generator()]).shape[1:])

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to few steps, by its config or name."""
        parts = self.pipeline, self.pipeline.transformer
        names = " ".join(Path(str(part.config.get("_name_or_path"))).name for part in parts).lower()
        return bool(self.pipeline.config.get("is_distilled")) or any(mark in names for mark in FEW_STEPS)

    @abstractmethod
    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        """Encode N prompts or negative prompts, each with its image if `takes_image`."""

    def encode_negatives(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        """Encode N negative prompts; override it if the pipeline encodes them differently."""
        return self.encode_texts(texts, images)

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensor shapes of the longest text, from configs only; the first starts with the tokens."""

    @abstractmethod
    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        """Call the model once; return the velocity (N, ...), towards noise, at `latents` (N, ...), in `self.dtype`."""

    @torch.no_grad()
    def encode(self, prompts: list[str], images: list[Image.Image] | None = None) -> Conditioning:
        """Encode N prompts and, with classifier-free guidance, the negative prompt, in `self.dtype`."""
        encoded, negative = Conditioning.of(self.encode_texts(list(prompts), images)), None
        if self.uses_negative_prompt:
            texts = [self.guidance.negative_prompt or ""] * len(prompts)
            negative = Conditioning.of(self.encode_negatives(texts, images))
        return replace(encoded, negative=negative).to(self.dtype)

    def empty_conditioning(self) -> Conditioning:
        """Return a conditioning of zeros for one prompt, from configs only."""
        tensors = {name: torch.zeros(1, *shape, dtype=self.dtype) for name, shape in self.text_shapes().items()}
        return Conditioning(tensors, Conditioning(tensors) if self.uses_negative_prompt else None)

    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        """Draw one latent of pure noise from each generator: (N, ...)."""
        size, dtype = self.guidance, self.noise_dtype or self.dtype
        drawn = self.pipeline.prepare_latents(
            len(generators), self.num_channels, size.height, size.width, dtype, self.device, generators
        )
        return drawn if isinstance(drawn, Tensor) else drawn[0]  # some pipelines return token positions too

    def schedule(self, num_inference_steps: int) -> Schedule:
        """Return the pipeline's sigmas and timesteps."""
        scheduler = self.pipeline.scheduler
        mu = self.shift(num_inference_steps) if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(num_inference_steps, "cpu", sigmas=self.sigmas(num_inference_steps), mu=mu)
        return Schedule(scheduler.sigmas.clone(), scheduler.timesteps.clone())

    def sigmas(self, num_inference_steps: int) -> np.ndarray | None:
        """Return the sigmas (T,) that the scheduler shifts; `None`: the scheduler's."""
        if self.pipeline.scheduler.config.get("use_flow_sigmas", False):
            return None
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)

    def shift(self, num_inference_steps: int) -> float:
        """Return `mu`, the scheduler's shift of the sigmas by resolution."""
        config = self.pipeline.scheduler.config
        limits = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return calculate_shift(math.prod(self.token_grid), *limits)

    def velocity(self, model: nn.Module, latents: Tensor, step: Step, conditioning: Conditioning) -> Tensor:
        """Predict the guided velocity (N, ...) of `latents` (N, ...) at a step, in the pipeline's dtype."""
        latents, negative, dtype = latents.to(self.dtype), conditioning.negative, self.velocity_dtype or self.dtype
        if negative is None:
            return self.predict(model, latents, step, conditioning).to(dtype)
        if self.guides_in_one_pass:
            both = self.predict(model, torch.cat([latents, latents]), step, negative.join(conditioning)).to(dtype)
            unconditional, conditional = both.chunk(2)
        else:
            conditional = self.predict(model, latents, step, conditioning).to(dtype)
            unconditional = self.predict(model, latents, step, negative).to(dtype)
        return self.guide(conditional, unconditional)

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Combine the velocities (N, ...) for prompt and negative prompt."""
        assert self.guidance_option is not None
        return unconditional + getattr(self.guidance, self.guidance_option) * (conditional - unconditional)

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Convert latents (N, ...) to the input of the VAE: (N, C, H, W)."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor

    def to(self, device: torch.device) -> None:
        """Move the VAE to `device`; text encoders follow when needed."""
        self.device = device
        self.pipeline.vae.to(device)

    def text_encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders that the pipeline has, by name."""
        parts = self.pipeline.components.items()
        return {name: part for name, part in parts if name.startswith("text_encoder") and part is not None}

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        batch_size: int | None = None,  # latents that the VAE decodes at once; `None`: all
        on_batch: Callable[[int], object] | None = None,  # called with the number of images in each batch
        keep_on_device: bool = False,
    ) -> Tensor:
        """Decode final latents (N, ...) into the pixels of the pipeline's own images: uint8, (N, 3, H, W)."""
        vae, pixels = self.pipeline.vae, []
        for batch in latents.split(batch_size or max(len(latents), 1)):
            latents_of_vae = self.vae_latents(batch.to(self.noise_dtype or self.dtype)).to(vae.dtype)
            decoded = vae.decode(latents_of_vae, return_dict=False)[0]
            decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded  # a video VAE, with one frame
            shades = self.pipeline.image_processor.postprocess(decoded, output_type="pt").float()
            rounded = shades.mul_(255).round_().to(torch.uint8)  # in place, to save memory
            pixels.append(rounded if keep_on_device else rounded.cpu())
            if on_batch is not None:
                on_batch(len(batch))
        return torch.cat(pixels)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn uint8 pixels (N, 3, H, W) into N images."""
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


@contextmanager
def on_device(modules: Iterable[Any], device: torch.device, offload: bool = True) -> Iterator[None]:
    """Keep modules on `device` inside the context and on the CPU afterwards; no-op without `offload`."""
    moved = list(modules) if offload else []
    try:
        for module in moved:
            module.to(device)
        yield
    finally:
        for module in moved:
            module.to(torch.device("cpu"))
