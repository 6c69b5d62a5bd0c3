"""The contract of a model family, and what SD3 and FLUX do alike. Only `policies/` calls diffusers' pipelines.

Shapes: `N` samples, `S` text tokens, `...` a latent (SD3: channels, height, width; FLUX: packed tokens, channels).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class Guidance:
    """How images are sampled, in diffusers' terms; the same in rollouts, training and evaluation."""

    height: int  # pixels
    width: int  # pixels
    guidance_scale: float  # SD3: of classifier-free guidance, off at 1 and below; FLUX: input of the distilled model
    true_cfg_scale: float = 1.0  # FLUX only: of classifier-free guidance with a negative prompt, off at 1
    negative_prompt: str | None = None  # to guide away from; `None`: the empty one for SD3, no true guidance for FLUX
    max_sequence_length: int | None = None  # tokens of the T5 encoder; `None`: the pipeline's own default


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts."""

    tensors: dict[str, Tensor]  # (N, ...), by the family's own names, such as `prompt_embeds` (N, S, C)
    negative: "Conditioning | None" = None  # negative prompts, one for each; `None` without classifier-free guidance

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        """Select the prompts of `rows` (M,)."""
        return self._map(lambda value: value[rows.to(value.device)])

    def to(self, target: torch.dtype | torch.device) -> "Conditioning":
        """Cast to a dtype, or move to a device."""
        return self._map(lambda value: value.to(target))

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return next(iter(self.tensors.values())).device

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read also what version 0.1.0 has saved, whose tensors were attributes."""
        negative = state.pop("negative")
        vars(self).update(tensors=state.get("tensors", state), negative=negative)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        negative = None if self.negative is None else self.negative._map(function)
        return Conditioning({name: function(value) for name, value in self.tensors.items()}, negative)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a sampler with T steps, on the CPU in float32."""

    sigmas: Tensor  # (T + 1,), falling from at most 1 to 0
    timesteps: Tensor  # (T,): what the scheduler hands the pipeline, 0 to 1000


class FlowPolicy(ABC):
    """A pipeline, cut into the parts that reinforcement learning calls one by one.

    Each method does what the pipeline's `__call__` does between its lines, so that a rollout of ODE steps equals the
    pipeline's images to the bit. Weights are passed to `velocity`, not owned: the trainer hands in the wrapped model,
    the unwrapped one, or the reference. A pipeline that cannot be trained or make such images is a `ValueError`.
    """

    pipeline_class: type[DiffusionPipeline]
    lora_target_modules = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ]  # fmt: skip
    repeated_blocks: tuple[str, ...]  # class names of the blocks that the transformer repeats
    default_t5_length: int  # the pipeline's own `max_sequence_length`

    def __init__(self, pipeline: DiffusionPipeline, guidance: Guidance):
        self.pipeline = pipeline
        self.guidance = guidance
        self.dtype: torch.dtype = pipeline.transformer.dtype  # of latents; an adapter in float32 comes later
        self.device: torch.device = pipeline.vae.device
        length = guidance.max_sequence_length
        self.t5_length = self.default_t5_length if length is None else length
        self._check_pipeline()
        self._check_guidance()

    def _check_pipeline(self) -> None:
        scheduler = self.pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            kind = type(scheduler).__name__
            raise ValueError(f"The pipeline's scheduler must be a FlowMatchEulerDiscreteScheduler, got {kind}.")
        for option in ("stochastic_sampling", "invert_sigmas"):
            if scheduler.config.get(option, False):
                raise ValueError(f"The scheduler's option {option} is not supported: its steps are not the ODE's.")
        if getattr(self.pipeline, "hf_device_map", None) is not None:
            raise ValueError("A pipeline with a device_map cannot be trained: load it without one.")
        if any(isinstance(module, BaseTunerLayer) for module in self.pipeline.transformer.modules()):
            remedy = "call pipeline.fuse_lora() and pipeline.unload_lora_weights() first, or load the pipeline anew"
            raise ValueError(f"The pipeline's transformer carries an adapter already: {remedy}.")

    def _check_guidance(self) -> None:
        for name, size in {"height": self.guidance.height, "width": self.guidance.width}.items():
            if size % self._token_side:
                raise ValueError(f"{name} must be a multiple of {self._token_side} for this pipeline, got {size}.")

    @property
    @abstractmethod
    def uses_negative_prompt(self) -> bool:
        """Whether the model is evaluated twice, with the prompt and with the negative one."""

    @property
    def _token_side(self) -> int:
        """Pixels along the side of a token, into which two by two latents are packed."""
        return self.pipeline.vae_scale_factor * 2

    @property
    def _token_grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        return self.guidance.height // self._token_side, self.guidance.width // self._token_side

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode prompts or negative prompts, one row each: what `Conditioning.tensors` holds, by the same names."""

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts, one row each, and under classifier-free guidance the negative prompt, in `self.dtype`."""
        negative = None
        if self.uses_negative_prompt:
            negative = Conditioning(self.encode_texts([self.guidance.negative_prompt or ""] * len(prompts)))
        return Conditioning(self.encode_texts(prompts), negative).to(self.dtype)

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an encoded prompt's tensors, from configs alone; the first begins with the tokens."""
        config = self.pipeline.transformer.config
        shape = (self.t5_length, config.joint_attention_dim)
        return {"prompt_embeds": shape, "pooled_prompt_embeds": (config.pooled_projection_dim,)}

    def empty_conditioning(self) -> Conditioning:
        """Return the conditioning of one prompt, of zeros, from configs alone."""
        tensors = {name: torch.zeros(1, *shape, dtype=self.dtype) for name, shape in self.text_shapes().items()}
        return Conditioning(tensors, Conditioning(tensors) if self.uses_negative_prompt else None)

    @abstractmethod
    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        """Draw one latent of pure noise from each generator, in the pipeline's dtype: (N, ...)."""

    def schedule(self, num_inference_steps: int, sigmas: np.ndarray | None = None) -> Schedule:
        """Return the pipeline's sigmas and timesteps, shifted from `sigmas` (T,) or else from the scheduler's own."""
        scheduler, config, mu = self.pipeline.scheduler, self.pipeline.scheduler.config, None
        if config.use_dynamic_shifting:
            limits = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            mu = calculate_shift(math.prod(self._token_grid), *limits)
        scheduler.set_timesteps(num_inference_steps, "cpu", sigmas=sigmas, mu=mu)
        return Schedule(scheduler.sigmas.clone(), scheduler.timesteps.clone())

    @abstractmethod
    def velocity(self, model: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the guided velocity (N, ...), in `self.dtype`, of `latents` (N, ...) at a `timestep` ()."""

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Turn latents (N, ...) into what the VAE decodes: (N, C, H, W)."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor

    def to(self, device: torch.device) -> None:
        """Work on `device` from now on: move the VAE there; the text encoders follow when they are needed."""
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
            decoded = vae.decode(self.vae_latents(batch.to(self.dtype)).to(vae.dtype), return_dict=False)[0]
            shades = self.pipeline.image_processor.postprocess(decoded, output_type="pt").float()
            rounded = shades.mul_(255).round_().to(torch.uint8)  # in place: these are as large as the batch's images
            pixels.append(rounded if keep_on_device else rounded.cpu())
            if on_batch is not None:
                on_batch(len(batch))
        return torch.cat(pixels)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn uint8 pixels (N, 3, H, W) into N images."""
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


@contextmanager
def on_device(modules: Iterable[Any], device: torch.device, offload: bool = True) -> Iterator[None]:
    """Keep modules on `device` inside and on the CPU afterwards; without `offload` leave them where they are."""
    moved = list(modules) if offload else []
    try:
        for module in moved:
            module.to(device)
        yield
    finally:
        for module in moved:
            module.to(torch.device("cpu"))
