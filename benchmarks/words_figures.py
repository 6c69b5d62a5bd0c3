"""What the recogniser reads of the words world: renders, reconstructions, and what a pretrained pipeline draws.

    python benchmarks/words_figures.py

The go or no-go of the second testbed: strict at least 0.97 for renders, 0.93 for reconstructions, 0.25 to 0.5 for the
pipeline.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pretrain import decode_latents, encode_pictures
from words.judge import recogniser, strict_reward, words_reward
from words.world import HEIGHT, WEIGHTS, WIDTH, all_prompts, draw, split_prompts

from trl_tpgrpo.policies.loading import load_pipeline


COLUMNS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=WEIGHTS, help="(default: the one in benchmarks/words)")
    parser.add_argument("--num_images", type=int, default=1024, help="for each figure (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="(default: none, as it was distilled)")
    parser.add_argument("--sheets", type=Path, help="folder for pictures of what was judged")
    args = parser.parse_args()
    recogniser()
    rng, prompts = np.random.default_rng(123), all_prompts()
    prompts = [prompts[index] for index in rng.integers(len(prompts), size=args.num_images)]
    pictures = np.stack([draw(prompt, rng) for prompt in prompts])
    show("renders", [Image.fromarray(one) for one in pictures], prompts, args.sheets)
    pipeline = load_pipeline(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    latents = encode_pictures(pipeline.vae, torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
    show("reconstructions", decode_latents(pipeline, latents), prompts, args.sheets)
    for split, prompts in split_prompts().items():
        chosen = (prompts * -(-args.num_images // len(prompts)))[: args.num_images]
        images = sample(pipeline, chosen, args.guidance_scale)
        show(f"{split} prompts, 8 steps", images, chosen, args.sheets)


def sample(pipeline: object, prompts: list[str], guidance_scale: float) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 64):
        chunk = prompts[start : start + 64]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(chunk))]
        options = {"num_inference_steps": 8, "guidance_scale": guidance_scale, "height": HEIGHT, "width": WIDTH}
        images += pipeline(chunk, generator=generators, max_sequence_length=0, **options).images
    return images


def show(name: str, images: list[Image.Image], prompts: list[str], sheets: Path | None) -> None:
    start = time.process_time()
    reward = np.mean(words_reward(images, prompts))
    milliseconds = (time.process_time() - start) / len(images) * 1000
    strict = np.mean(strict_reward(images, prompts))
    error = (strict * (1 - strict) / len(images)) ** 0.5
    print(  # noqa: T201
        f"{name:<36} strict {strict:.3f} \u00b1 {error:.3f}  reward {reward:.3f}  {milliseconds:.1f} ms an image",
        flush=True,
    )
    if sheets is not None:
        sheets.mkdir(parents=True, exist_ok=True)
        sheet(images[: COLUMNS * COLUMNS]).save(sheets / f"{name.replace(',', '').replace(' ', '_')}.png")


def sheet(images: list[Image.Image]) -> Image.Image:
    """Lay images out in rows of 16."""
    whole = Image.new("RGB", (COLUMNS * WIDTH, -(-len(images) // COLUMNS) * HEIGHT))
    for number, image in enumerate(images):
        whole.paste(image, (number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT))
    return whole


if __name__ == "__main__":
    main()
