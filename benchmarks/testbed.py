"""What the testbed's pretrained pipeline can do, and what the checker says of true pictures, for docs/testbed.md.

python benchmarks/testbed.py
"""

import argparse
import time

import numpy as np
import torch
from PIL import Image
from pretrain import decode_latents, draw_captioned_pictures, encode_pictures

from trl_tpgrpo.policies.loading import load_pipeline
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import score_images
from trl_tpgrpo.testbed.world import KINDS, parse_caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=1600, help="for each figure (default: %(default)s)")
    number = parser.parse_args().num_images
    pipeline = load_pipeline(TESTBED)
    pipeline.set_progress_bar_config(disable=True)

    captions, pictures = draw_captioned_pictures(number, np.random.default_rng(123))
    drawn = [Image.fromarray(((one + 1) * 127.5).byte().permute(1, 2, 0).numpy()) for one in pictures]
    show("true pictures", drawn, captions)
    show("their reconstructions", decode_latents(pipeline, encode_pictures(pipeline.vae, pictures)), captions)
    for split in ("train", "tuning", "heldout"):
        prompts = prompt_dataset(split, number // 4)["prompt"][:] * 4
        for guidance_scale in (1.0, 2.0):
            name = f"{split} prompts, 8 steps, guidance {guidance_scale:g}"
            show(name, sample(pipeline, prompts, guidance_scale), prompts)


def sample(pipeline: object, prompts: list[str], guidance_scale: float) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 64):
        chunk = prompts[start : start + 64]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(chunk))]
        options = {"num_inference_steps": 8, "guidance_scale": guidance_scale, **PIPELINE_KWARGS}
        images += pipeline(chunk, generator=generators, **options).images
    return images


def show(name: str, images: list[Image.Image], prompts: list[str]) -> None:
    start = time.process_time()
    scores = score_images(images, prompts)
    milliseconds = (time.process_time() - start) / len(images) * 1000
    strict = np.array([score.strict for score in scores])
    kinds = np.array([parse_caption(prompt).kind for prompt in prompts])
    by_kind = "  ".join(f"{kind} {strict[kinds == kind].mean():.3f}" for kind in KINDS)
    graded = np.mean([score.graded for score in scores])
    print(  # noqa: T201
        f"{name:<42} strict {strict.mean():.3f}  graded {graded:.3f}  ({by_kind})  {milliseconds:.2f} ms an image",
        flush=True,
    )


if __name__ == "__main__":
    main()
