"""`trl-tpgrpo sample`: sample images from a model, with or without a trained adapter."""

import argparse
import re
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from ..rewards.serving.functions import find_function
from ..testbed import PIPELINE_KWARGS
from .options import near


SAMPLING_OPTIONS = {
    "num_inference_steps": (int, "denoising steps"),
    "guidance_scale": (float, "guidance"),
    "true_cfg_scale": (float, "classifier-free guidance, with --negative_prompt, in pipelines with this argument"),
    "negative_prompt": (str, "negative prompt"),
    "height": (int, "height in pixels"),
    "width": (int, "width in pixels"),
    "max_sequence_length": (int, "maximum number of text tokens"),
}
"""Type and help of options that are passed to the pipeline if given."""


def main(argv: list[str]) -> int:
    """Write one PNG file for each image."""
    args = make_parser().parse_args(argv)
    prompts = args.prompt + (args.prompts_file.read_text("utf-8-sig").splitlines() if args.prompts_file else [])
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("There is no prompt: use --prompt or --prompts_file.")
    images = read_images(args.image, len(prompts))
    own: Any = args.policy_class and find_function(args.policy_class, "policy_class")
    adapter = args.adapter and find_weights(args.adapter)
    if adapter and args.quantization and is_whole(adapter):
        raise ValueError(f"--quantization needs a LoRA: {adapter} has all weights of a transformer.")
    pipeline = build_pipeline(args.model_name_or_path, None, args.dtype, args.device, args.quantization)
    inputs = input_options(pipeline, images, args.height, args.width, own)
    if adapter:
        load_adapter(pipeline, adapter)
    options = {**PIPELINE_KWARGS} if args.model_name_or_path == "testbed" else {}
    options |= {name: value for name, value in vars(args).items() if name in SAMPLING_OPTIONS and value is not None}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(tqdm(prompts, desc="Prompts")):
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
        given = options | (inputs[number] if inputs else {})
        for index, image in enumerate(sample(pipeline, prompt, args.num_images_per_prompt, args.seed, given)):
            image.save(args.output_dir / f"{number:03d}-{name}-{index}.png")
    tqdm.write(f"{len(prompts) * args.num_images_per_prompt} images in {args.output_dir}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; options that are not given keep the pipeline's defaults."""
    description = "Sample images from a model, with or without a trained adapter."
    parser = argparse.ArgumentParser(prog="trl-tpgrpo sample", description=description)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Hub id or folder of a pipeline, or 'testbed'")
    add("--policy_class", help="import path of a custom FlowPolicy (default: the pipeline's family)")
    add("--adapter", help="Hub id or folder of a LoRA, or folder of a trained transformer or run")
    add("--prompt", action="append", default=[], help="a prompt; can be repeated")
    add("--prompts_file", type=Path, help="text file with one prompt per line")
    add("--image", type=Path, action="append", default=[], help="an image to edit: one, or one for each prompt")
    add("--output_dir", type=Path, default=Path("samples"), help="folder of the PNG files (default: %(default)s)")
    add("--num_images_per_prompt", type=int, default=1, help="images per prompt (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of each prompt's first image (default: %(default)s)")
    for name, (kind, text) in SAMPLING_OPTIONS.items():
        add(f"--{name}", type=kind, help=f"{text} (default: the pipeline's)")
    quantization = "format of the transformer, as in training (default: not quantized)"
    add("--quantization", choices=["nf4", "int8", "fp8"], help=quantization)
    add("--dtype", help="data type of the model (default: bfloat16 on a GPU, float32 on the CPU)")
    add("--device", help="device of the model (default: cuda if available, else cpu)")
    return parser


def build_pipeline(
    model: str, adapter: str | None, dtype: str | None, device: str | None, quantization: str | None = None
) -> Any:
    """Load a pipeline and, with an `adapter`, the trained weights."""
    import torch  # imported here, so that option errors are fast

    from ..policies.loading import load_pipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    pipeline = load_pipeline(model, dtype, quantization).to(device)
    if adapter is not None:
        load_adapter(pipeline, adapter)
    pipeline.set_progress_bar_config(leave=False)
    return pipeline


def load_adapter(pipeline: Any, adapter: str) -> None:
    """Load a LoRA into a pipeline, or replace its transformer by the one in the folder `transformer`."""
    from ..policies.loading import DTYPE

    if not is_whole(adapter):
        pipeline.load_lora_weights(adapter)
        return
    former = pipeline.transformer
    transformer = type(former).from_pretrained(adapter, subfolder="transformer", **{DTYPE: former.dtype})
    pipeline.register_modules(transformer=transformer.to(former.device))


def read_images(files: list[Path], num_prompts: int) -> list[Image.Image]:
    """Read an image for each prompt (rotated by its metadata), from one file for all or one for each."""
    if len(files) not in (0, 1, num_prompts):
        raise ValueError(f"--image has {len(files)} files for {num_prompts} prompts: use one, or one for each prompt.")
    images = list(map(_read_image, files))
    return images * num_prompts if len(images) == 1 else images


def _read_image(file: Path) -> Image.Image:
    if not file.is_file():
        others = [other.name for other in file.parent.glob("*")]
        raise FileNotFoundError(f"--image: there is no file {file}{near(file.name, others)}")
    try:
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except OSError as error:
        raise ValueError(f"--image: {file} cannot be read as an image: {error}") from error


def input_options(
    pipeline: Any, images: list[Image.Image], height: int | None, width: int | None, own: Any = None
) -> list[dict[str, Any]]:
    """Return pipeline inputs for each prompt, with images resized as in training at that size.

    Without a size, the pipeline resizes them. The list is empty if the model uses no images. Raises a ValueError if
    images are missing or not supported.
    """
    from ..policies.base import Guidance
    from ..policies.loading import build_policy, policy_class

    family = policy_class(pipeline, own)
    takes_image = family is not None and family.takes_image
    if takes_image != bool(images):
        wrong = "needs an input image: set --image" if takes_image else "uses no input image: leave out --image"
        raise ValueError(f"The model is a {type(pipeline).__name__}, which {wrong}.")
    if (height is None) != (width is None) and images:
        raise ValueError("--height and --width belong together in editing: set both, or none.")
    if height is None or width is None or not images:
        return [{"image": image} for image in images]
    policy = build_policy(pipeline, Guidance(height, width), own)
    rows, columns = policy.input_size
    resized = [image.resize((columns, rows), Image.Resampling.LANCZOS) for image in images]
    return [{"image": image, **policy.image_options} for image in resized]


def is_whole(adapter: str) -> bool:
    """Check whether a folder has the full weights of a transformer, not a LoRA."""
    return (Path(adapter) / "transformer").is_dir()


def find_weights(adapter: str) -> str:
    """Return the Hub id or folder of the weights; for an interrupted run, its newest complete checkpoint.

    A folder without weights, or an incomplete one, raises a FileNotFoundError.
    """
    from ..callbacks import checkpoints  # imports torch

    folder = Path(adapter)
    if (folder / checkpoints.INCOMPLETE).exists():
        raise FileNotFoundError(f"--adapter: the checkpoint {adapter} is incomplete: use an earlier one.")
    if not folder.exists() and (adapter.count("/") != 1 or folder.parent.is_dir()):  # as no Hub id is
        others = [other.name for other in folder.parent.glob("*")]
        raise FileNotFoundError(f"--adapter: there is no folder {adapter}{near(folder.name, others)}")
    if not folder.is_dir() or is_whole(adapter) or any(folder.glob("*.safetensors")):
        return adapter
    try:
        found = checkpoints.last_complete(folder)
    except FileNotFoundError as error:
        sought = "neither a LoRA (.safetensors), a folder transformer, nor a complete checkpoint"
        raise FileNotFoundError(f"--adapter: {adapter} has {sought}.") from error
    tqdm.write(f"{adapter} has no weights; using its newest checkpoint: {found}")
    return str(found)


def sample(pipeline: Any, prompt: str, number: int, seed: int, options: dict) -> list[Image.Image]:
    """Sample `number` images of a prompt; image i depends only on `seed + i`, not on the number."""
    from torch import Generator

    generators = [Generator("cpu").manual_seed(seed + index) for index in range(number)]
    return [pipeline(prompt=prompt, generator=generator, **options).images[0] for generator in generators]
