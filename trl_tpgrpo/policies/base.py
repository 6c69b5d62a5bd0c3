"""What a model family must say about itself; the only place of the package that calls a diffusers pipeline.

Shapes: `N` samples, `S` text tokens, `...` the dimensions of a latent (SD3: channels, height, width; FLUX: packed tokens,
channels).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from .sharding import shapes, whole_weights, write_weights


LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_METADATA = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."
TRANSFORMER_FOLDER = "transformer"
MOST_COMPILATIONS = 64
"""Of one kind of block: variants of the block, each with and without gradients, adapter and more than one sample."""


@dataclass(frozen=True)
class Guidance:
    """How images are sampled, in diffusers' terms; the same in rollouts, training and evaluation.

    Attributes:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        guidance_scale: SD3: classifier-free guidance, off at 1 and below. FLUX: the scale given to the distilled model.
        true_cfg_scale: FLUX only: classifier-free guidance with a negative prompt, off at 1.
        negative_prompt: `None` is the empty prompt for SD3 and no true guidance for FLUX.
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
        prompt_embeds: (N, S, C).
        pooled_prompt_embeds: (N, C).
        negative: The negative prompts, one for each; `None` without classifier-free guidance.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    negative: "Conditioning | None" = None

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        """The prompts of `rows` (M,)."""
        return self._map(lambda value: value[rows.to(value.device)])

    def to(self, target: torch.dtype | torch.device) -> "Conditioning":
        """In another dtype or on another device."""
        return self._map(lambda value: value.to(target))

    def expand(self, number: int) -> "Conditioning":
        """The only prompt, as `number` rows that share their memory."""
        return self._map(lambda value: value.expand(number, *value.shape[1:]))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        negative = None if self.negative is None else self.negative._map(function)
        return Conditioning(function(self.prompt_embeds), function(self.pooled_prompt_embeds), negative)


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

    A subclass names its pipeline class and LoRA targets and says how prompts are encoded, noise is drawn, the schedule is
    made, a velocity is predicted and latents are decoded. Weights are passed to `velocity`, not owned: the trainer hands in
    the wrapped model, the unwrapped one, or the reference.

    `dtype`, in which latents are kept, is the transformer's as it comes, before an adapter in float32 is put into it.

    Each method does what the pipeline's `__call__` does between its lines, so that a rollout of ODE steps equals it to the
    bit.
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
    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        """One latent of pure noise for each generator, in the pipeline's dtype: (N, ...)."""

    @abstractmethod
    def schedule(self, num_inference_steps: int) -> Schedule:
        """The pipeline's own sigmas and timesteps."""

    @abstractmethod
    def velocity(
        self, model: torch.nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The guided velocity of `latents` (N, ...) at a 0-dimensional `timestep`: (N, ...), in the pipeline's dtype."""

    @abstractmethod
    def unpack(self, latents: Tensor) -> Tensor:
        """Latents as the VAE takes them, still scaled: (N, C, H, W)."""

    def _resolution_shift(self, num_tokens: int, default_max_shift: float) -> float:
        """The scheduler's `mu` for an image of so many tokens, as the pipelines compute it."""
        config = self.pipeline.scheduler.config
        return calculate_shift(
            num_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", default_max_shift),
        )

    @property
    @abstractmethod
    def uses_negative_prompt(self) -> bool:
        """Whether the model is asked twice, with the prompt and with the negative one."""

    @property
    def encoding_settings(self) -> dict[str, Any]:
        """What `encode` depends on besides encoders and prompts."""
        names = ("negative_prompt", "max_sequence_length")
        return {name: getattr(self.guidance, name) for name in names} | {"negative": self.uses_negative_prompt}

    def to(self, device: torch.device) -> None:
        """Work on `device` from now on: the VAE goes there; the text encoders do when they are needed."""
        self.device = device
        self.pipeline.vae.to(device)

    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """Those that the pipeline has."""
        return {name: part for name, part in self._parts("text_encoder").items() if part is not None}

    def tokenizers(self) -> dict[str, Any]:
        """Those that the pipeline has."""
        return {name: part for name, part in self._parts("tokenizer").items() if part is not None}

    def _parts(self, kind: str) -> dict[str, Any]:
        return {name: part for name, part in self.pipeline.components.items() if name.startswith(kind)}

    @contextmanager
    def text_encoders_on_device(self) -> Iterator[None]:
        """The text encoders are on the device inside, and on the CPU afterwards."""
        encoders = self.text_encoders().values()
        try:
            for encoder in encoders:
                encoder.to(self.device)
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def drop_text_encoders(self) -> None:
        """Free their memory; the pipeline cannot encode prompts afterwards."""
        for name in self.text_encoders():
            setattr(self.pipeline, name, None)

    def compile(self, model: ModelMixin, backend: str) -> None:
        """Compile the repeated blocks of `model`, for batches of any size and with and without gradients and adapter.

        A block that is compiled once too often is an error instead of running slowly.
        """
        torch._dynamo.config.recompile_limit = MOST_COMPILATIONS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for block in model.modules():
            if type(block).__name__ in self.repeated_blocks:
                block.compile(backend=backend, dynamic=True)

    def frozen_modules(self) -> list[torch.nn.Module]:
        """The encoders and the VAE."""
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
        """Turn final latents (N, ...) into the pixels of N images: uint8, (N, 3, H, W), those of the pipeline's own images.

        Args:
            latents: As a rollout leaves them.
            batch_size: How many at a time; `None`: all at once.
            on_batch: Called after each batch with the number of its images, for a progress bar.
            keep_on_device: Whether the pixels stay where the VAE is; otherwise they are on the CPU.
        """
        vae = self.pipeline.vae
        pixels: list[Tensor] = []
        for batch in latents.split(batch_size or max(len(latents), 1)):
            scaled = self.unpack(batch.to(self.dtype)) / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            shades = self.pipeline.image_processor.postprocess(decoded, output_type="pt").float()
            rounded = shades.mul_(255).round_().to(torch.uint8)  # in place: these are as large as the batch's images
            pixels.append(rounded if keep_on_device else rounded.cpu())
            if on_batch is not None:
                on_batch(len(batch))
        return torch.cat(pixels)

    def save_weights(
        self, model: ModelMixin | PeftModel, output_dir: str | Path, is_main_process: bool = True
    ) -> None:
        """Write what was trained in diffusers' format; called by all processes, which may each have a part of it.

        LoRA goes to `pytorch_lora_weights.safetensors`, with its alpha, for `pipeline.load_lora_weights(output_dir)`; all
        weights go to the folder `transformer`, for `from_pretrained(output_dir, subfolder="transformer")`.
        """
        weights = whole_weights(_own_weights(model), keep=is_main_process)
        if not is_main_process:
            return
        if isinstance(model, PeftModel):
            self.pipeline_class.save_lora_weights(
                output_dir,
                transformer_lora_layers={name.removeprefix(PEFT_PREFIX): value for name, value in weights.items()},
                transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
            )
            return
        with torch.device("meta"):
            whole = type(model).from_config(model.config)
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(Path(output_dir) / TRANSFORMER_FOLDER)

    def load_weights(self, model: ModelMixin | PeftModel, input_dir: str | Path) -> None:
        """Read back what `save_weights` wrote, into the model that is being trained; called by all processes.

        Raises:
            FileNotFoundError: If `input_dir` holds no such weights.
            ValueError: If they do not fit the model.
        """
        peft = isinstance(model, PeftModel)
        source = Path(input_dir) / (LORA_FILE if peft else TRANSFORMER_FOLDER)
        if not source.exists():
            raise FileNotFoundError(f"{input_dir} holds no {source.name}, the trained weights of this kind of run.")
        own = _own_weights(model)
        if not peft:
            write_weights(own, type(model).from_pretrained(source).state_dict())
            return
        with safe_open(source, framework="pt") as file:
            state = {PEFT_PREFIX + name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}
            saved = json.loads(file.metadata()[LORA_METADATA])
        if shapes(state) != shapes(own):
            raise ValueError(
                f"The adapter in {input_dir} does not have the layers and ranks of the one that is trained."
            )
        alpha, saved_alpha = model.peft_config["default"].lora_alpha, saved["transformer.lora_alpha"]
        if alpha != saved_alpha:
            raise ValueError(
                f"The adapter in {input_dir} has lora_alpha={saved_alpha}, the one that is trained {alpha}."
            )
        write_weights(own, state)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """N images of uint8 pixels (N, 3, H, W)."""
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def _own_weights(model: ModelMixin | PeftModel) -> dict[str, Tensor]:
    """The tensors of a model that are saved, by their names in its file: an adapter's, or all."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()))
    return model.state_dict(keep_vars=True)
