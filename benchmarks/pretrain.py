"""Build the testbed's tiny pipeline from nothing: draw pictures, train the VAE, then encoders and transformer.

    python benchmarks/pretrain.py --output_dir trl_tpgrpo/testbed/weights
    python benchmarks/pretrain.py --world words --output_dir outputs/words --distillation_steps 1600

Every class is diffusers' or transformers' own, so the result is an ordinary `StableDiffusion3Pipeline` folder. What
deviates from a textbook run, each to get there in CPU-minutes: small batches and zero-initialised residual branches
for the VAE, zero-initialised modulation and Muon for the transformer.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from words import judge as words_judge
from words import world as words

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
VAE_BATCH_SIZE = 16
VAE_LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-6
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998
WARM_UP = 100
COOL_DOWN = 0.22
SAVE_EVERY = 240  # seconds


@dataclass(frozen=True)
class World:
    """Pictures of one size with their prompts, and the judge that says which pictures show what they should."""

    height: int
    width: int
    prompt_length: int
    """Longest prompt, in tokens, with the two around it."""
    words: list[str]
    """What the tokenizer knows as one token each."""
    draw: Callable[[int, np.random.Generator], tuple[list[str], torch.Tensor]]
    """Returns N prompts and pictures in [-1, 1], (N, 3, height, width)."""
    strict_reward: Callable[[list[Image.Image], list[str]], list[float]]


def pretrain(
    world: World,
    output_dir: Path,
    vae_steps: int,
    transformer_steps: int,
    num_pictures: int,
    seed: int,
    num_evaluations: int = 10,
    distillation_steps: int = 0,
    guidance_scale: float = 6.0,
    state_dir: Path | None = None,
) -> None:
    """Train everything and save the pipeline in float16 at `output_dir`, at every evaluation and at the end.

    Args:
        world: What to draw.
        output_dir: Folder of the pipeline.
        vae_steps: Updates of the VAE.
        transformer_steps: Updates of transformer and text encoders, at most.
        num_pictures: Number of pictures to train on.
        seed: Seed of everything random.
        num_evaluations: How often the averaged weights are evaluated, 512 images each, and saved.
        distillation_steps: Further updates, in which the transformer learns to do without guidance what it does with
            it (Meng et al., arXiv 2210.03142, for one guidance scale). FLUX.1-dev was made so.
        guidance_scale: That guidance scale.
        state_dir: Folder of what is needed to go on after an interruption: the same call continues from there.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    captions, pictures = world.draw(num_pictures, rng)
    pipeline = build_pipeline(world)
    train_vae(pipeline.vae, pictures, vae_steps, State(state_dir, "vae"))
    latents = encode_pictures(pipeline.vae, pictures)
    reconstructions = decode_latents(pipeline, latents[:2048])
    strict = np.mean(world.strict_reward(reconstructions, captions[:2048]))
    tqdm.write(f"Strict score of the VAE's reconstructions: {strict:.3f}")
    del pictures, reconstructions

    def train(name: str, steps: int, loss: Loss) -> None:
        state = State(state_dir, name)
        for steps_done in train_transformer(pipeline, latents, captions, steps, num_evaluations, state, loss):
            save_in_float16(pipeline, output_dir)
            strict = np.mean(world.strict_reward(sample(pipeline, world, captions[:512]), captions[:512]))
            tqdm.write(f"Saved after {steps_done} steps; strict score without guidance: {strict:.3f}")

    train("transformer", transformer_steps, partial(flow_matching_loss, pipeline))
    if distillation_steps:
        loss = partial(distillation_loss, pipeline, copy.deepcopy(pipeline), guidance_scale)
        train("student", distillation_steps, loss)


Loss = Callable[[torch.Tensor, list[str]], torch.Tensor]
"""Of clean latents (N, 8, H / 4, W / 4) and their prompts."""


class State:
    """File with all one part of training needs to go on, written every four minutes (without a folder: none)."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self.path = None if folder is None else folder / f"{name}.pt"
        self.written = time.monotonic()

    def load(self, parts: dict[str, Any]) -> int:
        """Load the state into what has a `state_dict`, and PyTorch's random numbers; return the steps done."""
        if self.path is None or not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        return state["step"]

    def save(self, step: int, parts: dict[str, Any], last: bool) -> None:
        """Save the state if it is time to, or if this is the last step."""
        if self.path is None or not (last or time.monotonic() - self.written > SAVE_EVERY):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"step": step, "random": torch.get_rng_state(), **state}, unfinished)
        unfinished.replace(self.path)
        self.written = time.monotonic()


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


WORLDS = {
    "shapes": World(
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        prompt_length=12,
        words=sorted({word for caption in all_captions() for word in str(caption).split()}),
        draw=draw_captioned_pictures,
        strict_reward=strict_reward,
    ),
    "words": World(
        height=words.HEIGHT,
        width=words.WIDTH,
        prompt_length=words.LENGTH + 2,
        words=sorted(words.CHARACTERS.lower()),
        draw=words.draw_prompted_pictures,
        strict_reward=words_judge.strict_reward,
    ),
}


def build_pipeline(world: World) -> StableDiffusion3Pipeline:
    """Build an untrained `StableDiffusion3Pipeline` of the testbed's size, in float32."""
    tokenizer = build_tokenizer(world)
    encoders = [build_text_encoder(tokenizer) for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=build_transformer(world),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_vae(world),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_tokenizer(world: World) -> CLIPTokenizer:
    """Build a CLIP tokenizer that knows the words of a world, 19 or 18, as one token each.

    Byte-pair merges are made word by word: what the merges so far leave of a word is joined from left to right. Merges
    that come later rank lower, so they do not touch the words before.
    """
    merges: list[tuple[str, str]] = []
    for word in world.words:
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply_merges(pieces, merges)
    letters = sorted({letter for word in world.words for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=world.prompt_length
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
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_vae(world: World) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        latent_channels=8,
        norm_num_groups=4,
        sample_size=max(world.height, world.width),
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            torch.nn.init.zeros_(parameter)
    return vae


def build_transformer(world: World) -> SD3Transformer2DModel:
    side = max(world.height, world.width)
    transformer = SD3Transformer2DModel(
        sample_size=side // 4,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=side // 8,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(parameter)
    return transformer


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, steps: int, state: State) -> None:
    """Train on reconstruction and a light KL term, then set the latents' shift and scale to unit variance."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LEARNING_RATE, total_steps=steps, pct_start=0.05)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    progress = tqdm(range(state.load(parts), steps), desc="Training the VAE", mininterval=30)
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
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        state.save(step + 1, parts, last=step + 1 == steps)
    vae.requires_grad_(False).eval()
    latents = encode_pictures(vae, pictures[:2048])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Return the means of the pictures' latents, unscaled: (N, 8, H / 4, W / 4)."""
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in pictures.split(256)])


@torch.no_grad()
def decode_latents(pipeline: StableDiffusion3Pipeline, latents: torch.Tensor) -> list[Image.Image]:
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)


def sample(pipeline: StableDiffusion3Pipeline, world: World, prompts: list[str]) -> list[Image.Image]:
    """Sample one image a prompt in 8 steps without guidance, with the modules in evaluation mode."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": world.height, "width": world.width}
    return pipeline(prompts, num_inference_steps=8, guidance_scale=1.0, max_sequence_length=0, **size).images


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    captions: list[str],
    steps: int,
    num_evaluations: int,
    state: State,
    compute_loss: Loss,
) -> Iterator[int]:
    """Train transformer and text encoders; yield at each evaluation and end, both with averaged weights loaded."""
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
    parts = {str(number): part for number, part in enumerate((*trained, *optimizers, *schedules, ema))}
    first = state.load(parts) + 1
    progress = tqdm(range(first, steps + 1), desc="Training the transformer", mininterval=30)
    running = 0.0
    for step in progress:
        chosen = torch.randint(len(latents), (BATCH_SIZE,))
        texts = [captions[index] if torch.rand(()) > CAPTION_DROPOUT else "" for index in chosen]
        loss = compute_loss((latents[chosen] - shift) * scale, texts)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        ema.step(parameters)
        running += 0.02 * (loss.item() - running) if step > first else loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if step % max(steps // num_evaluations, 1) == 0:
            ema.store(parameters)
            ema.copy_to(parameters)
            yield step
            ema.restore(parameters)
        state.save(step, parts, last=step == steps)
    ema.copy_to(parameters)


def flow_matching_loss(pipeline: StableDiffusion3Pipeline, clean: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Compute the mean squared error of the velocity at logit-normal noise levels."""
    mixed, sigma, noise = mix(clean)
    return mse_loss(predict_velocity(pipeline, mixed, sigma, texts), noise - clean)


def distillation_loss(
    pipeline: StableDiffusion3Pipeline,
    teacher: StableDiffusion3Pipeline,
    guidance_scale: float,
    clean: torch.Tensor,
    texts: list[str],
) -> torch.Tensor:
    """Compute the mean squared difference to the teacher's guided velocity, at the same noise levels."""
    mixed, sigma, _ = mix(clean)
    with torch.no_grad():
        both = predict_velocity(teacher, mixed.repeat(2, 1, 1, 1), sigma.repeat(2), [""] * len(texts) + texts)
    target = torch.lerp(*both.chunk(2), guidance_scale)
    return mse_loss(predict_velocity(pipeline, mixed, sigma, texts), target)


def mix(clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the latents at random noise levels, these levels, (N,), and the noise."""
    sigma, noise = torch.sigmoid(torch.randn(len(clean))), torch.randn_like(clean)
    return torch.lerp(clean, noise, sigma[:, None, None, None]), sigma, noise


def predict_velocity(
    pipeline: StableDiffusion3Pipeline, mixed: torch.Tensor, sigma: torch.Tensor, texts: list[str]
) -> torch.Tensor:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    return pipeline.transformer(
        hidden_states=mixed, timestep=sigma * 1000, encoder_hidden_states=embeds, pooled_projections=pooled
    ).sample


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
    parser.add_argument("--world", choices=list(WORLDS), default="shapes")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vae_steps", type=int, default=7_000)
    parser.add_argument("--transformer_steps", type=int, default=3_600)
    parser.add_argument("--num_pictures", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_evaluations", type=int, default=10)
    parser.add_argument("--distillation_steps", type=int, default=0, help="to draw without guidance (default: none)")
    parser.add_argument("--guidance_scale", type=float, default=6.0, help="to distil from (default: %(default)s)")
    parser.add_argument("--state_dir", type=Path, help="to go on from after an interruption, by the same command")
    args = parser.parse_args()
    pretrain(**{**vars(args), "world": WORLDS[args.world]})


if __name__ == "__main__":
    main()
