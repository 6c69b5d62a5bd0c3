"""The contract of a model family, and what is the same for all of them.

`policies/` is the only place of the package that calls a diffusers pipeline.

Shapes: `N` samples, `S` text tokens, `...` the dimensions of a latent (SD3: channels, height, width; FLUX: packed tokens,
channels).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How images are sampled, in diffusers' terms; the same in rollouts, training and evaluation.

    Attributes:
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        guidance_scale: SD3: scale of classifier-free guidance, off at 1 and below. FLUX: input of the distilled model.
        true_cfg_scale: FLUX only: scale of classifier-free guidance with a negative prompt, off at 1.
        negative_prompt: Prompt to guide away from. `None`: the empty prompt for SD3, no true guidance for FLUX.
        max_sequence_length: Tokens of the T5 encoder; `None` is the pipeline's own default.
    """

    height: int
    width: int
    guidance_scale: float
    true_cfg_scale: float = 1.0
    negative_prompt: str | None = None
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        tensors: Tensors (N, ...) by the family's own names, such as `prompt_embeds` (N, S, C).
        negative: Encoded negative prompts, one for each; `None` without classifier-free guidance.
    """

    tensors: dict[str, Tensor]
    negative: "Conditioning | None" = None

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        """Select the prompts of `rows` (M,)."""
        return self._map(lambda value: value[rows.to(value.device)])

    def to(self, target: torch.dtype | torch.device) -> "Conditioning":
        """Cast to a dtype, or move to a device."""
        return self._map(lambda value: value.to(target))

    def expand(self, number: int) -> "Conditioning":
        """Repeat the only prompt in `number` rows that share their memory."""
        return self._map(lambda value: value.expand(number, *value.shape[1:]))

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
    """The noise levels of a sampler with T steps, on the CPU.

    Attributes:
        sigmas: float32, (T + 1,), falling from at most 1 to 0.
        timesteps: float32, (T,): what the scheduler hands the pipeline, 0 to 1000.
    """

    sigmas: Tensor
    timesteps: Tensor


class FlowPolicy(ABC):
    """A pipeline, cut into the parts that reinforcement learning calls one by one.

    Each method does what the pipeline's `__call__` does between its lines, so that a rollout of ODE steps equals the
    pipeline's images to the bit. Weights are passed to `velocity`, not owned: the trainer hands in the wrapped model, the
    unwrapped one, or the reference. `dtype`, in which latents are kept, is the transformer's before an adapter in float32
    is put into it.

    Args:
        pipeline: Pipeline of the family.
        guidance: Size of the images and guidance.

    Raises:
        ValueError: If the pipeline cannot be trained, or cannot make such images.
    """

    pipeline_class: type[DiffusionPipeline]
    lora_target_modules: list[str]
    repeated_blocks: tuple[str, ...]
    """Class names of the blocks that the transformer repeats."""

    def __init__(self, pipeline: DiffusionPipeline, guidance: Guidance):
        self.pipeline = pipeline
        self.guidance = guidance
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.device: torch.device = pipeline.vae.device
        self._check_pipeline()
        self._check_guidance()

    def _check_pipeline(self) -> None:
        scheduler = self.pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"The pipeline's scheduler must be a FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}."
            )
        for option in ("stochastic_sampling", "invert_sigmas"):
            if scheduler.config.get(option, False):
                raise ValueError(
                    f"The scheduler's option {option} is not supported: its steps are not those of the ODE."
                )
        if getattr(self.pipeline, "hf_device_map", None) is not None:
            raise ValueError("A pipeline with a device_map cannot be trained: load it without one.")
        if any(isinstance(module, BaseTunerLayer) for module in self.pipeline.transformer.modules()):
            raise ValueError(
                "The pipeline's transformer carries an adapter already: call pipeline.fuse_lora() and "
                "pipeline.unload_lora_weights() first, or load the pipeline anew."
            )

    def _check_guidance(self) -> None:
        multiple = self.pipeline.vae_scale_factor * 2
        for name in ("height", "width"):
            size = getattr(self.guidance, name)
            if size % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} for this pipeline, got {size}.")

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts, one row each, in the transformer's dtype."""

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an encoded prompt's tensors, from configs alone; the first begins with the text tokens."""

    @abstractmethod
    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        """Draw one latent of pure noise from each generator, in the pipeline's dtype: (N, ...)."""

    @abstractmethod
    def schedule(self, num_inference_steps: int) -> Schedule:
        """Return the pipeline's own sigmas and timesteps."""

    @abstractmethod
    def velocity(
        self, model: torch.nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Predict the guided velocity of `latents` (N, ...) at a 0-dimensional `timestep`: (N, ...), in `self.dtype`."""

    @abstractmethod
    def vae_latents(self, latents: Tensor) -> Tensor:
        """Turn latents (N, ...) into what the VAE decodes: (N, C, H, W)."""

    @property
    @abstractmethod
    def uses_negative_prompt(self) -> bool:
        """Whether the model is evaluated twice, with the prompt and with the negative one."""

    def _resolution_shift(self, num_tokens: int, default_max_shift: float) -> float:
        """Compute the scheduler's `mu` for an image of so many tokens, as the pipelines do."""
        config = self.pipeline.scheduler.config
        return calculate_shift(
            num_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", default_max_shift),
        )

    @property
    def encoding_settings(self) -> dict[str, Any]:
        """What `encode` depends on besides encoders and prompts."""
        names = ("negative_prompt", "max_sequence_length")
        return {name: getattr(self.guidance, name) for name in names} | {"negative": self.uses_negative_prompt}

    def to(self, device: torch.device) -> None:
        """Work on `device` from now on: move the VAE there; the text encoders follow when they are needed."""
        self.device = device
        self.pipeline.vae.to(device)

    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """Return the text encoders that the pipeline has, by name."""
        return self._parts("text_encoder")

    def tokenizers(self) -> dict[str, Any]:
        """Return the tokenizers that the pipeline has, by name."""
        return self._parts("tokenizer")

    def _parts(self, prefix: str) -> dict[str, Any]:
        parts = self.pipeline.components.items()
        return {name: part for name, part in parts if name.startswith(prefix) and part is not None}

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory; the pipeline cannot encode prompts afterwards."""
        for name in self.text_encoders():
            setattr(self.pipeline, name, None)

    def frozen_modules(self) -> list[torch.nn.Module]:
        """Return the encoders and the VAE."""
        parts = {name: part for name, part in self.pipeline.components.items() if name != "transformer"}
        return [part for part in parts.values() if isinstance(part, torch.nn.Module)]

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        batch_size: int | None = None,
        on_batch: Callable[[int], object] | None = None,
        keep_on_device: bool = False,
    ) -> Tensor:
        """Decode final latents (N, ...) into the pixels of the pipeline's own images: uint8, (N, 3, H, W).

        Args:
            latents: Final latents of a rollout.
            batch_size: Latents that the VAE decodes at once; `None`: all.
            on_batch: Callback after each batch, with the number of images in it, for a progress bar.
            keep_on_device: Whether the pixels stay on the VAE's device instead of the CPU.
        """
        vae = self.pipeline.vae
        pixels: list[Tensor] = []
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
