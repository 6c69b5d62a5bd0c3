"""Build the testbed's tiny pipeline from nothing: draw pictures, train the VAE, then encoders and transformer.

    python benchmarks/pretrain.py --output_dir trl_tpgrpo/testbed/weights

Every class is diffusers' or transformers' own, so the result is an ordinary `StableDiffusion3Pipeline` folder. What
deviates from a textbook run, each to get there in CPU-minutes: small batches and zero-initialised residual branches
for the VAE, zero-initialised modulation and Muon for the transformer.
"""

import argparse
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn.functional import mse_loss
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from trl_tpgrpo.testbed.checker import strict_reward
from trl_tpgrpo.testbed.world import (
    BACKGROUND,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    Caption,
    all_captions,
    inside,
    offset,
    split_captions,
)


SUPERSAMPLING = 4
MARGIN = 2.0
WIDTH = 128
PROMPT_LENGTH = 12
VAE_BATCH_SIZE = 16
VAE_LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-6
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998
WARM_UP = 100
COOL_DOWN = 0.22


def pretrain(output_dir: Path, vae_steps: int, transformer_steps: int, num_pictures: int, seed: int) -> None:
    """Train everything and save the pipeline in float16 at `output_dir` (also halfway, so that little can be lost)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    captions, pictures = draw_captioned_pictures(num_pictures, rng)
    pipeline = build_pipeline()
    train_vae(pipeline.vae, pictures, vae_steps)
    latents = encode_pictures(pipeline.vae, pictures)
    reconstructions = decode_latents(pipeline, latents[:2048])
    tqdm.write(f"Strict score of the VAE's reconstructions: {mean_strict(reconstructions, captions[:2048]):.3f}")
    for steps_done in train_transformer(pipeline, latents, captions, transformer_steps):
        save_in_float16(pipeline, output_dir)
        strict = mean_strict(sample(pipeline, captions[:512]), captions[:512])
        tqdm.write(f"Saved after {steps_done} steps; strict score without guidance: {strict:.3f}")


def draw(caption: Caption, rng: np.random.Generator) -> np.ndarray:
    """Draw one random picture of `caption`: uint8, (32, 32, 3)."""
    grid = (np.arange(IMAGE_SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    picture = np.broadcast_to(BACKGROUND, (grid.size, grid.size, 3)).copy()
    for thing, (x, y), half_size in zip(caption.things, *arrange(caption, rng), strict=True):
        across = (grid[None, :] - x) / half_size
        down = (grid[:, None] - y) / half_size
        picture[inside(thing.shape, across, down)] = COLOURS[thing.colour]
    blocks = picture.reshape(IMAGE_SIZE, SUPERSAMPLING, IMAGE_SIZE, SUPERSAMPLING, 3)
    return (blocks.mean((1, 3)) * 255).round().astype(np.uint8)


def arrange(caption: Caption, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw centres (n, 2) and half sizes (n,) that fit the picture, keep apart and obey the caption's relation."""
    number = len(caption.things)
    smallest, largest = (4.0, 4.8) if number == 3 else (4.2, 6.0)
    while True:
        half_sizes = rng.uniform(smallest, largest, number)
        centres = rng.uniform(half_sizes[:, None] + 1, IMAGE_SIZE - 1 - half_sizes[:, None], (number, 2))
        along, across = offset(caption.relation, *centres) if caption.relation else (9, 0)
        pairs = itertools.combinations(range(number), 2)
        gaps = (np.abs(centres[i] - centres[j]).max() - half_sizes[i] - half_sizes[j] for i, j in pairs)
        if along >= 9 and along >= 1.5 * across and all(gap >= MARGIN for gap in gaps):
            return centres, half_sizes


def draw_captioned_pictures(number: int, rng: np.random.Generator) -> tuple[list[str], torch.Tensor]:
    """Draw pictures of captions, equally many of each kind and none that is kept for held-out compositions.

    Returns:
        The captions' texts and the pictures in [-1, 1], (number, 3, 32, 32).
    """
    unseen = {caption for caption in split_captions()["heldout"] if caption.kind in ("pair", "position")}
    known = [caption for caption in all_captions() if caption not in unseen]
    by_kind: dict[str, list[Caption]] = {kind: [one for one in known if one.kind == kind] for kind in KINDS}
    chosen = [by_kind[KINDS[i % len(KINDS)]][rng.integers(len(by_kind[KINDS[i % len(KINDS)]]))] for i in range(number)]
    pictures = np.stack([draw(caption, rng) for caption in tqdm(chosen, desc="Drawing pictures")])
    return [str(caption) for caption in chosen], torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_pipeline() -> StableDiffusion3Pipeline:
    """Build an untrained `StableDiffusion3Pipeline` of the testbed's size, in float32."""
    tokenizer = build_tokenizer()
    encoders = [build_text_encoder(tokenizer) for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_vae(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer that knows the 19 words of the shapes world as one token each.

    Byte-pair merges are made word by word: what the merges so far leave of a word is joined from left to right. Merges
    that come later rank lower, so they do not touch the words before.
    """
    words = sorted({word for caption in all_captions() for word in str(caption).split()})
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply_merges(pieces, merges)
    letters = sorted({letter for word in words for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=PROMPT_LENGTH
    )


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Join the pair of the lowest rank until none is left, as byte-pair encoding does."""
    while True:
        ranked = [merges.index(pair) for pair in zip(pieces, pieces[1:], strict=False) if pair in merges]
        if not ranked:
            return pieces
        first, second = merges[min(ranked)]
        at = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == (first, second))
        pieces = [*pieces[:at], first + second, *pieces[at + 2 :]]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH * 2,
        projection_dim=WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        latent_channels=8,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            torch.nn.init.zeros_(parameter)
    return vae


def build_transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 8,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(parameter)
    return transformer


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, steps: int) -> None:
    """Train on reconstruction and a light KL term, then set the latents' shift and scale to unit variance."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LEARNING_RATE, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="Training the VAE")
    for step in progress:
        batch = pictures[torch.randint(len(pictures), (VAE_BATCH_SIZE,))]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = (reconstruction - batch).abs().mean() + mse_loss(reconstruction, batch)
        loss = error + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.requires_grad_(False).eval()
    latents = encode_pictures(vae, pictures[:2048])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Return the means of the pictures' latents, unscaled: (N, 8, 8, 8)."""
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in pictures.split(256)])


@torch.no_grad()
def decode_latents(pipeline: StableDiffusion3Pipeline, latents: torch.Tensor) -> list[Image.Image]:
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)


def sample(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> list[Image.Image]:
    """Sample one image a prompt in 10 steps without guidance, with the modules in evaluation mode."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts, num_inference_steps=10, guidance_scale=1.0, height=IMAGE_SIZE, width=IMAGE_SIZE, max_sequence_length=0
    ).images


def mean_strict(images: list[Image.Image], prompts: list[str]) -> float:
    return float(np.mean(strict_reward(images, prompts)))


def train_transformer(
    pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, captions: list[str], steps: int
) -> Iterator[int]:
    """Train transformer and text encoders by flow matching; yield ten times, with the averaged weights loaded."""
    trained = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    parameters = [parameter for module in trained for parameter in module.parameters()]
    optimizers = build_optimizers(trained)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))
        )
        for one in optimizers
    ]
    ema = EMAModel(parameters, decay=EMA_DECAY)
    scale, shift = pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor
    progress = tqdm(range(1, steps + 1), desc="Training the transformer")
    running = 0.0
    for step in progress:
        chosen = torch.randint(len(latents), (BATCH_SIZE,))
        texts = [captions[index] if torch.rand(()) > CAPTION_DROPOUT else "" for index in chosen]
        loss = flow_matching_loss(pipeline, (latents[chosen] - shift) * scale, texts)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        ema.step(parameters)
        running += 0.02 * (loss.item() - running) if step > 1 else loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if step % max(steps // 10, 1) == 0:
            ema.store(parameters)
            ema.copy_to(parameters)
            yield step
            ema.restore(parameters)


def flow_matching_loss(pipeline: StableDiffusion3Pipeline, clean: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Compute the mean squared error of the velocity at logit-normal noise levels."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    sigma = torch.sigmoid(torch.randn(len(clean)))
    noise = torch.randn_like(clean)
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = pipeline.transformer(
        hidden_states=mixed, timestep=sigma * 1000, encoder_hidden_states=embeds, pooled_projections=pooled
    ).sample
    return mse_loss(velocity, noise - clean)


def build_optimizers(modules: list[torch.nn.Module]) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices of the blocks, AdamW for everything else."""
    named = [(name, parameter) for module in modules for name, parameter in module.named_parameters()]
    in_blocks = [
        p for name, p in named if p.ndim == 2 and ("transformer_blocks." in name or "encoder.layers." in name)
    ]
    chosen = {id(parameter) for parameter in in_blocks}
    others = [parameter for _, parameter in named if id(parameter) not in chosen]
    return [
        torch.optim.Muon(in_blocks, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def save_in_float16(pipeline: StableDiffusion3Pipeline, output_dir: Path) -> None:
    smaller = StableDiffusion3Pipeline(**{
        name: copy.deepcopy(part).to(torch.float16) if isinstance(part, torch.nn.Module) else part
        for name, part in pipeline.components.items()
    })  # fmt: skip
    smaller.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vae_steps", type=int, default=7_000)
    parser.add_argument("--transformer_steps", type=int, default=3_600)
    parser.add_argument("--num_pictures", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    pretrain(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
