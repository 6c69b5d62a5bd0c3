"""Z-Image."""

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image
from torch import Tensor, nn

from .base import FlowPolicy, Texts
from .conditioning import Conditioning, Step


class ZImagePolicy(FlowPolicy):
    """Z-Image: latents as images in float32, lists of samples and texts, time from noise to image.

    Classifier-free guidance is on above a scale of 0 (1 for SD3). Turbo needs none: its scale is 0.
    """

    pipeline_class = ZImagePipeline
    lora_target_modules = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
    default_length = 512
    default_guidance = {"guidance_scale": 5.0}
    least_guidance = 0.0
    guides_in_one_pass = True
    noise_dtype = torch.float32
    velocity_dtype = torch.float32

    @property
    def width(self) -> int:
        return self.pipeline.transformer.config.dim

    @property
    def num_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        embeds, _ = self.pipeline.encode_prompt(
            list(texts),  # a copy, because the pipeline writes into it
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, self.pipeline.transformer.config.cap_feat_dim)}

    def sigmas(self, num_inference_steps: int) -> np.ndarray:
        # numpy's differ in the last bit; plans change the default device
        return torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, device="cpu").numpy()

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        time = (1000 - step.timestep.to(latents.device).expand(len(latents))) / 1000
        samples = list(latents.unsqueeze(2))  # N of (C, 1, H, W), as the model also returns them
        towards_image = model(samples, time, texts.texts(), return_dict=False)[0]
        return -torch.stack([sample.float() for sample in towards_image]).squeeze(2)

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return conditional + self.scales["guidance_scale"] * (conditional - unconditional)

    def vae_latents(self, latents: Tensor) -> Tensor:
        return super().vae_latents(latents.to(self.pipeline.vae.dtype))
