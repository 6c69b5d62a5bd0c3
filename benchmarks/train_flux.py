"""Train the benchmarks' tiny FLUX.1 on the shapes world, as `pretrain.py` trains the testbed's SD3.

The VAE is the testbed's; transformer and text encoders are trained from nothing. About 25 minutes of one CPU core.

    python benchmarks/train_flux.py --output_dir tiny-flux
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.training_utils import EMAModel
from models import NUM_TOKENS, load_policy, tiny_flux
from pretrain import (
    BATCH_SIZE,
    CAPTION_DROPOUT,
    COOL_DOWN,
    EMA_DECAY,
    WARM_UP,
    build_optimizers,
    draw_captioned_pictures,
    encode_pictures,
)
from torch.nn.functional import mse_loss
from tqdm import tqdm

from trl_tpgrpo.testbed import prompt_dataset
from trl_tpgrpo.testbed.checker import strict_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3_600, help="(default: %(default)s)")
    parser.add_argument("--num_pictures", type=int, default=40_000, help="(default: %(default)s)")
    args = parser.parse_args()
    pipeline = tiny_flux()
    captions, pictures = draw_captioned_pictures(args.num_pictures, np.random.default_rng(0))
    train(pipeline, encode_pictures(pipeline.vae, pictures), captions, args.steps)
    pipeline.save_pretrained(args.output_dir)
    print(f"Strict score of held-out prompts in 10 steps: {strict(args.output_dir):.3f}")  # noqa: T201


def train(pipeline: FluxPipeline, latents: torch.Tensor, captions: list[str], steps: int) -> None:
    """Flow matching with Muon and AdamW; leaves the averaged weights in the pipeline."""
    trained = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    parameters = [parameter.requires_grad_(True) for module in trained for parameter in module.parameters()]
    optimizers = build_optimizers(trained)
    ema = EMAModel(parameters, decay=EMA_DECAY)
    scaled = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    packed = pipeline._pack_latents(scaled, len(scaled), *scaled.shape[1:])
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    for step in tqdm(range(steps), desc="Training the transformer", mininterval=10):
        factor = min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))
        chosen = torch.randint(len(packed), (BATCH_SIZE,))
        texts = [captions[index] if torch.rand(()) > CAPTION_DROPOUT else "" for index in chosen]
        loss = flow_matching_loss(pipeline, packed[chosen], texts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, its_rates in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, its_rates, strict=True):
                group["lr"] = factor * rate
            optimizer.step()
            optimizer.zero_grad()
        ema.step(parameters)
    ema.copy_to(parameters)


def flow_matching_loss(pipeline: FluxPipeline, clean: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Mean squared error of the velocity of packed latents at logit-normal noise levels."""
    embeds, pooled, text_ids = pipeline.encode_prompt(texts, None, max_sequence_length=NUM_TOKENS)
    sigma = torch.sigmoid(torch.randn(len(clean)))
    noise = torch.randn_like(clean)
    side = round(clean.shape[1] ** 0.5)
    velocity = pipeline.transformer(
        hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
        timestep=sigma,
        guidance=torch.full((len(clean),), 3.5),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(len(clean), side, side, clean.device, clean.dtype),
        return_dict=False,
    )[0]
    return mse_loss(velocity, noise - clean)


@torch.no_grad()
def strict(folder: Path) -> float:
    """Mean strict score of one image for each held-out prompt."""
    pipeline = load_policy(str(folder)).pipeline
    prompts = list(prompt_dataset("heldout")["prompt"])
    options = {"guidance_scale": 3.5, "max_sequence_length": NUM_TOKENS, "num_inference_steps": 10}
    images = pipeline(prompts, height=32, width=32, generator=torch.Generator().manual_seed(0), **options).images
    return float(np.mean(strict_reward(images=images, prompts=prompts)))


if __name__ == "__main__":
    main()
