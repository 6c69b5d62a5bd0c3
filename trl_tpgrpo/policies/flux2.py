"""FLUX.2: klein, and dev."""

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn

from .base import FlowPolicy, Texts
from .conditioning import Conditioning, Step


class Flux2KleinPolicy(FlowPolicy):
    """FLUX.2 klein: sigmas shifted by the resolution and the number of steps, latents scaled by a batch norm.

    The negative prompt is empty; distilled models use no guidance.
    """

    pipeline_class = Flux2KleinPipeline
    default_length = 512
    takes_negative_prompt = False

    @property
    def lora_target_modules(self) -> list[str]:  # type: ignore[override]
        names = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]  # `to_out` alone holds modules in some blocks
        numbers = range(self.pipeline.transformer.config.num_single_layers)
        return [*names, *(f"single_transformer_blocks.{number}.attn.to_out" for number in numbers)]

    @property
    def default_guidance(self) -> dict[str, float]:  # type: ignore[override]
        return {} if self.pipeline.config.is_distilled else {"guidance_scale": 4.0}

    @property
    def guidance_option(self) -> str | None:  # type: ignore[override]
        return None if self.pipeline.config.is_distilled else "guidance_scale"

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        options = {"device": self.device, "max_sequence_length": self.text_length}
        return {"prompt_embeds": self.pipeline.encode_prompt(texts, **options)[0]}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, self.pipeline.transformer.config.joint_attention_dim)}

    def shift(self, num_inference_steps: int) -> float:
        rows, columns = self.token_grid
        return compute_empirical_mu(rows * columns, num_inference_steps)

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        number, device, embeds = len(latents), latents.device, texts.tensors["prompt_embeds"]
        return model(
            hidden_states=latents,
            timestep=step.timestep.to(device).expand(number).to(latents.dtype) / 1000,
            guidance=self._embedded_guidance(latents),
            encoder_hidden_states=embeds,
            txt_ids=self.pipeline._prepare_text_ids(embeds[:1]).to(device),
            img_ids=self.pipeline._prepare_latent_ids(latents.new_empty(1, 1, *self.token_grid)).to(device),
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]

    def _embedded_guidance(self, latents: Tensor) -> Tensor | None:
        return None

    def vae_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        patches = latents.transpose(1, 2).unflatten(2, self.token_grid)  # (N, C, rows, columns)
        mean, variance = (value[:, None, None] for value in (vae.bn.running_mean, vae.bn.running_var))
        deviation = torch.sqrt(variance + vae.config.batch_norm_eps)
        return self.pipeline._unpatchify_latents(patches * deviation.to(patches) + mean.to(patches))


class Flux2Policy(Flux2KleinPolicy):
    """FLUX.2 dev: guidance as an input of the model only."""

    pipeline_class = Flux2Pipeline
    guidance_option = None

    @property
    def default_guidance(self) -> dict[str, float]:  # type: ignore[override]
        return {"guidance_scale": 4.0} if self.pipeline.transformer.config.guidance_embeds else {}

    def _embedded_guidance(self, latents: Tensor) -> Tensor | None:
        scale = self.guidance.guidance_scale
        return None if scale is None else torch.full([1], scale, device=latents.device).expand(len(latents))
