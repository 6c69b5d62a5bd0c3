"""Models that change an image, on the command line: sample, train, evaluate, plan, and data that is wrong."""

import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from test_editing import pictures
from test_trainer import assert_same, build, config, lora
from tiny import PROMPTS, tiny_flux
from tiny_flux2 import tiny_kontext
from tiny_qwen import tiny_qwen_image_edit

from trl_tpgrpo import cli
from trl_tpgrpo.commands import sample, train
from trl_tpgrpo.commands.plan import PlannedModel, estimate
from trl_tpgrpo.policies.base import FlowPolicy, Guidance
from trl_tpgrpo.policies.loading import build_policy


STEPS = 3
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kontext")
    tiny_kontext().save_pretrained(folder)
    return folder


def files(folder: Path, images: list[Image.Image]) -> list[str]:
    paths = [folder / f"input_{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return list(map(str, paths))


def rows(number: int = 6, prompts: tuple[str, ...] = PROMPTS) -> Dataset:
    """Of which two have the same prompt with different images."""
    texts = [prompts[row % len(prompts)] for row in range(number)]
    return Dataset.from_dict({"prompt": texts, "image": pictures(number=number)})


# ---------------------------------------------------------------------------------------------------------- sample


def sampled(model: Path, folder: Path, *options: str) -> list[np.ndarray]:
    given = ["--model_name_or_path", str(model), "--num_inference_steps", str(STEPS), "--device", "cpu"]
    assert cli.main(["sample", *given, "--max_sequence_length", "8", "--output_dir", str(folder), *options]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def expected(policy: FlowPolicy, prompt: str, image: Image.Image) -> np.ndarray:
    """The picture of the policy: `sample`'s noise, encoded and denoised as in an evaluation."""
    latents = policy.initial_noise([torch.Generator().manual_seed(0)])
    conditioning, schedule = policy.encode([prompt], [image.convert("RGB")]), policy.schedule(STEPS)
    with torch.no_grad():
        for number in range(STEPS):
            step = schedule[number]
            velocity = policy.velocity(policy.pipeline.transformer, latents, step, conditioning)
            latents = latents + (step.sigmas[1] - step.sigmas[0]) * velocity
    return policy.decode(latents)[0].permute(1, 2, 0).numpy()


def test_pictures_are_those_of_the_trained_policy(model: Path, tmp_path: Path) -> None:
    """Of images of other sizes than the output's, one of them with an alpha channel."""
    images = [pictures(40, 56)[0].convert("RGBA"), pictures(24, 24)[1]]
    options = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--height", "16", "--width", "24"]
    for path in files(tmp_path, images):
        options += ["--image", path]
    made = sampled(model, tmp_path / "out", *options)
    policy = build_policy(tiny_kontext(), Guidance(**SIZE, max_sequence_length=8))
    for picture, prompt, image in zip(made, PROMPTS, images, strict=False):
        assert np.array_equal(picture, expected(policy, prompt, image))


def test_one_image_serves_all_prompts(model: Path, tmp_path: Path) -> None:
    one, other = files(tmp_path, pictures()[:2])
    size = ["--height", "16", "--width", "24", "--prompt", PROMPTS[0], "--prompt", PROMPTS[0], "--image", one]
    same = sampled(model, tmp_path / "same", *size)
    differ = sampled(model, tmp_path / "differ", *size, "--image", other)
    assert np.array_equal(same[0], same[1]) and np.array_equal(same[0], differ[0])
    assert not np.array_equal(differ[0], differ[1])


def test_a_photo_is_turned_as_its_metadata_says(model: Path, tmp_path: Path) -> None:
    """As `datasets` does when it reads one."""
    image, exif = pictures(16, 24)[0], Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    read = sample.read_images([tmp_path / "photo.png"], 1)[0]
    assert read.size == (16, 24)
    stored = Dataset.from_dict({"image": [str(tmp_path / "photo.png")]}).cast_column("image", datasets.Image())
    assert np.array_equal(np.asarray(read), np.asarray(stored[0]["image"]))


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (16, 32), (432, 256), (256, 768)])
def test_the_size_of_an_input_is_left_alone_by_the_pipeline(size: tuple[int, int]) -> None:
    """Whose rounding of the sides would change some sizes that it has come to itself."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    pipeline = tiny_qwen_image_edit()
    rows, columns = build_policy(pipeline, Guidance(*size)).input_size
    assert calculate_dimensions(1024 * 1024, columns / rows)[:2] == (columns, rows)
    assert abs(math.log(columns / rows) - math.log(size[1] / size[0])) < 0.1
    inputs = sample.input_options(pipeline, pictures()[:1], *size)
    assert [list(one) for one in inputs] == [["image"]] and inputs[0]["image"].size == (columns, rows)


def test_an_adapter_and_whole_weights_are_taken_with_an_image(model: Path, tmp_path: Path) -> None:
    size = ["--height", "16", "--width", "24", "--prompt", PROMPTS[0], "--image", *files(tmp_path, pictures()[:1])]
    plain = sampled(model, tmp_path / "plain", *size)
    for full in (False, True):
        trainer = build(tmp_path / f"run-{full}", tiny_kontext(), train_dataset=rows(), full=full, guidance_scale=3.5)
        trainer.train()
        trainer.save_model()
        trained = sampled(model, tmp_path / f"{full}", *size, "--adapter", trainer.args.output_dir)
        assert not np.array_equal(plain, trained)


def test_without_a_size_it_is_left_to_the_pipeline() -> None:
    image = pictures()[0]
    assert sample.input_options(tiny_kontext(), [image], None, None) == [{"image": image}]


PROMPT = "--prompt 'a red circle'"
MISTAKES = {
    f"{PROMPT}": "is a FluxKontextPipeline, which needs an input image: set --image",
    f"{PROMPT} --image none.png": "--image: there is no file none.png: did you mean one.png?",
    f"{PROMPT} --image text.png": "--image: text.png cannot be read as an image: cannot identify image file",
    f"{PROMPT} --image half.png": "--image: half.png cannot be read as an image",
    f"{PROMPT} --image one.png --image one.png": "--image has 2 files for 1 prompts: use one, or one for each",
    f"{PROMPT} --image one.png --height 16": "--height and --width belong together in editing",
    f"{PROMPT} --image one.png --height 16 --width 20": "width must be a multiple of 8 for this pipeline, got 20",
}


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_is_one_line(
    call: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures()[0].save("one.png")
    Path("text.png").write_text("no image")
    Path("half.png").write_bytes(Path("one.png").read_bytes()[:200])
    options = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", call)]
    assert cli.main(["sample", "--model_name_or_path", str(model), "--device", "cpu", *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trl-tpgrpo sample: error: ") and MISTAKES[call] in last


def test_a_model_of_texts_takes_no_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--prompt", "a red circle", "--image", *files(tmp_path, pictures()[:1]), "--device", "cpu"]
    assert cli.main(["sample", "--model_name_or_path", "testbed", *options]) == 2
    assert "is a StableDiffusion3Pipeline, which uses no input image: leave out --image" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- train and evaluate


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """A run on a folder of `save_to_disk`."""
    same = rows(2, PROMPTS[:1])
    DatasetDict({"train": rows(), "test": same}).save_to_disk(tmp_path / "data")
    settings = {
        "model_name_or_path": str(model), "dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"),
        "reward_funcs": ["jpeg_compressibility"], "use_peft": True, "lora_r": 4, "lora_alpha": 8, "use_cpu": True,
        **SIZE, "max_sequence_length": 8, "num_inference_steps": 4, "num_inference_steps_eval": 3,
        "num_generations": 2, "num_generations_eval": 2, "per_device_train_batch_size": 4, "max_steps": 3,
        "gradient_accumulation_steps": 1, "learning_rate": 0.01, "activation_checkpointing": False,
        "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "log_completions": True, "log_images_steps": 1,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_a_run_on_a_folder_of_images(recipe: Path, tmp_path: Path) -> None:
    """Resumed in the middle, with prompts on disk, and with all of them encoded before: the same weights."""
    train.main(["--config", str(recipe)])
    out, whole = tmp_path / "out", weights(tmp_path / "out")
    train.main(["--config", str(recipe), "--resume_from_checkpoint", str(out / "checkpoint-1")])
    assert_same(weights(out), whole)
    others = {
        "disk": ["--prompt_embeds_dir", str(tmp_path / "prompts")],
        "before": ["--precompute_prompt_embeds", "--offload_between_phases"],
    }
    for name, options in others.items():
        train.main(["--config", str(recipe), *options, "--output_dir", str(tmp_path / name)])
        assert_same(weights(tmp_path / name), whole)
    assert len(list((tmp_path / "prompts").glob("*/*.safetensors"))) == 7  # one is of the evaluation alone
    assert len(list((out / "completions/step_000003").iterdir())) == 2


def test_evaluations_show_rows_of_one_prompt_apart(tmp_path: Path) -> None:
    trainer = build(tmp_path / "seen", tiny_kontext(), eval_dataset=rows(2, PROMPTS[:1]), num_generations_eval=2,
                    train_dataset=rows(), guidance_scale=3.5)  # fmt: skip
    seen: list[Any] = []
    trainer.samples._evaluation_callbacks()[0].on_evaluation_end = lambda *args, sample, **kwargs: seen.append(sample)
    trainer.evaluate()
    assert seen[0].prompts == [PROMPTS[0]] * 2 and [len(images) for images in seen[0].images] == [2, 2]


def test_evaluate_compares_and_notices_other_images(recipe: Path, tmp_path: Path) -> None:
    train.main(["--config", str(recipe), "--max_steps", "1"])
    options = ["--config", str(recipe), "--output_dir", str(tmp_path / "evaluated")]
    assert cli.main(["evaluate", *options, "--adapter", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
    assert len(found["images"]) == 4 and set(found["images"][0]) == {"prompt", "rewards", "files"}
    other = {"prompt": [PROMPTS[0]] * 2, "image": pictures(number=6)[4:]}
    DatasetDict({"train": rows(), "test": Dataset.from_dict(other)}).save_to_disk(tmp_path / "others")
    assert cli.main(["evaluate", *options, "--dataset_name", str(tmp_path / "others")]) == 2


@pytest.mark.parametrize("as_files", [False, True])
def test_a_run_is_not_resumed_with_other_images(as_files: bool, tmp_path: Path) -> None:
    paths = files(tmp_path, pictures(number=6))

    def dataset() -> Dataset:
        texts = [*PROMPTS, *PROMPTS]
        if not as_files:
            return Dataset.from_dict({"prompt": texts, "image": list(map(Image.open, paths))})
        return Dataset.from_dict({"prompt": texts, "image": paths}).cast_column("image", datasets.Image())

    options = {"save_strategy": "steps", "save_steps": 1, "guidance_scale": 3.5}
    build(tmp_path / "out", tiny_kontext(), train_dataset=dataset(), **options).train()
    again = build(tmp_path / "out", tiny_kontext(), train_dataset=dataset(), **{**options, "max_steps": 3})
    again.train(resume_from_checkpoint=True)
    Image.open(paths[3]).transpose(Image.Transpose.ROTATE_90).save(paths[3])
    changed = build(tmp_path / "out", tiny_kontext(), train_dataset=dataset(), **{**options, "max_steps": 4})
    with pytest.raises(ValueError, match="train_dataset .6 prompts, .* before, 6 prompts, .* now"):
        changed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("full", [False, True])
def test_the_card_shows_how_an_image_is_passed(full: bool, tmp_path: Path) -> None:
    trainer = build(tmp_path, tiny_kontext(), train_dataset=rows(6, PROMPTS[:1]), full=full, guidance_scale=3.5)
    trainer.card.images = trainer.rollouts.sample(trainer._shown_rows)
    trainer.create_model_card()
    assert len(list((tmp_path / "images").iterdir())) == 4  # of one prompt and different images
    text = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in text and "text-to-image" not in text
    snippet = re.search(r"```python\n(.+?)```", text, re.DOTALL)[1]
    compile(snippet, "snippet", "exec")
    begin = snippet.index("given = load_image(")
    assert "from diffusers.utils import load_image\nfrom PIL import Image\n" in snippet[:begin]
    image = pictures(40, 24)[1]
    image.save(tmp_path / "image.png")
    calls: list[dict] = []

    class Pipeline:
        def __call__(self, **options: Any) -> Any:
            calls.append(options)
            generator = torch.Generator().manual_seed(0)
            return trainer.policy.pipeline(**options, generator=generator)

    from diffusers.utils import load_image

    names = {"load_image": load_image, "Image": Image, "pipeline": Pipeline()}
    exec(snippet[begin:].replace("image.png", str(tmp_path / "image.png")), names)
    assert np.array_equal(np.asarray(names["image"]), expected(trainer.policy, calls[0]["prompt"], image))


# ---------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("family", [tiny_kontext, tiny_flux])
def test_plans_count_the_tokens_of_images(family: Any, tmp_path: Path) -> None:
    family().save_pretrained(tmp_path / "model")
    args = config(tmp_path, offload_between_phases=True, guidance_scale=3.5)
    model = PlannedModel(tmp_path / "model", args, lora(), torch.float32)
    images = 4 * (2 if family is tiny_kontext else 1)
    assert model.hidden == (images + 8) * model.policy.width and model.num_text_tokens == 8
    encoding = estimate(args, model)["encode"]
    assert encoding["VAE"] == (model.vae if family is tiny_kontext else 0)


# ---------------------------------------------------------------------------------------------------------- wrong use


def wrong(**changes: list) -> Dataset:
    return Dataset.from_dict({"prompt": list(PROMPTS), "image": pictures(), **changes})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (wrong().remove_columns("image"), r"train_dataset needs a column 'image' .*, got \['prompt'\]"),
        (wrong(image=["a.png", "b.png", "c.png"]), "must hold images, got str. For paths, use dataset.cast_column"),
        (wrong(image=[*pictures()[:2], None]), "train_dataset: the image of row 2 is missing"),
        (wrong(image=[None, *pictures()[:2]]).select([1, 2, 0]), "train_dataset: the image of row 2 is missing"),
    ],
)
def test_wrong_columns_are_named(dataset: Dataset, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tiny_kontext(), train_dataset=dataset, guidance_scale=3.5)


def test_a_dataset_for_evaluation_is_checked_too(tmp_path: Path) -> None:
    plain = wrong().remove_columns("image")
    for given in (plain, {"one": rows(), "two": plain}):
        with pytest.raises(ValueError, match="(eval_dataset|two) needs a column 'image'"):
            build(tmp_path, tiny_kontext(), train_dataset=rows(), eval_dataset=given, guidance_scale=3.5)
    trainer = build(tmp_path, tiny_kontext(), train_dataset=rows(), guidance_scale=3.5)
    with pytest.raises(ValueError, match="eval_dataset needs a column 'image'"):
        trainer.evaluate(plain)
