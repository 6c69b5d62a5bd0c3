"""Evaluation at another size than training: its images are the pipeline's, and training knows nothing of it."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from test_editing import small_input  # noqa: F401  # a fixture
from test_editing_embeddings import FAMILIES as EDITING
from test_editing_embeddings import counted, pictures
from test_evaluate import options, saved
from test_plan import planned_model
from test_trainer import PROMPTS, assert_same, brightness, build, config, logged, lora, prompts, trained
from tiny import tiny_flux, tiny_sd3
from tiny_flux2 import tiny_kontext

from trl_tpgrpo import TPGRPOTrainer
from trl_tpgrpo.batches import eval_batch_size
from trl_tpgrpo.commands import evaluate
from trl_tpgrpo.commands.hours import count_flops
from trl_tpgrpo.commands.plan import estimate
from trl_tpgrpo.policies.embeddings import Prompt, PromptEmbeddings
from trl_tpgrpo.rollouts.windows import EVALUATION


HEIGHT, WIDTH = 32, 16  # of evaluations; training has 16 x 16
FAMILIES = {"sd3": tiny_sd3, "sd3 with dynamic shift": partial(tiny_sd3, dynamic_shift=True), "flux": tiny_flux}


class Seen:
    """A reward that remembers images, by whether they were trained on."""

    __name__ = "seen"

    def __init__(self) -> None:
        self.images: dict[str, list[np.ndarray]] = {"train": [], "eval": []}
        self.mode = "eval"

    def __call__(self, images: list[Image.Image], **columns: object) -> list[float]:
        self.images[self.mode] += map(np.asarray, images)
        return brightness(images)


def evaluated(trainer: TPGRPOTrainer, seen: Seen) -> list[np.ndarray]:
    seen.images["eval"].clear()
    trainer.evaluate()
    return list(seen.images["eval"])


def of_pipeline(trainer: TPGRPOTrainer, **options: Any) -> list[np.ndarray]:
    """What the pipeline makes of all prompts of the evaluation, from its noise and in one batch."""
    number = len(trainer.eval_dataset)
    images = trainer.policy.pipeline(
        prompt=list(trainer.eval_dataset["prompt"]), height=HEIGHT, width=WIDTH, max_sequence_length=8,
        num_inference_steps=3, generator=trainer.rollouts.generators(EVALUATION, 0, number, first=0),
        **trainer.policy.scales, **options,
    ).images  # fmt: skip
    return list(map(np.asarray, images))


def assert_equal(images: list[np.ndarray], others: list[np.ndarray]) -> None:
    assert len(images) == len(others) > 0
    assert all(np.array_equal(*pair) for pair in zip(images, others, strict=True))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_images_are_the_pipelines_at_that_size_and_training_stays_as_it_is(family, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 6}
    runs = []
    for size in ({}, {"eval_height": HEIGHT}):  # the width is that of training
        seen = Seen()
        trainer = build(tmp_path, family(), seen, eval_dataset=prompts(), **settings, **size)
        trainer.train()
        runs.append((trained(trainer), logged(trainer, "reward"), logged(trainer, "eval_reward")))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and runs[0][2] != runs[1][2]
    calls = trainer.rollouts.batch_sizes
    assert calls == {"model": 4, "vae": 4, "model at 32 x 16": 2, "vae at 32 x 16": 2}  # as many pixels as before
    trainer.rollouts.batch_sizes = dict.fromkeys(calls, 6)  # those of one call of the pipeline
    images = evaluated(trainer, seen)
    assert {image.shape for image in images} == {(HEIGHT, WIDTH, 3)}
    assert_equal(images, of_pipeline(trainer))
    assert trainer.policy.guidance.height == 16
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "from fixed noise, 32 pixels high and\n16 wide:\n" in text and "    height=16,\n" in text


def edited(tmp_path: Path, seen: Seen, pipeline: DiffusionPipeline | None = None, **settings: Any) -> TPGRPOTrainer:
    """A Kontext whose training and evaluation have the same prompts and images."""
    rows = Dataset.from_dict({"prompt": PROMPTS[:3] * 2, "image": pictures(number=3) * 2})
    options = {"guidance_scale": 3.5, "max_steps": 1, "per_device_eval_batch_size": 3, **settings}
    pipeline = pipeline or tiny_kontext()
    return build(tmp_path, pipeline, seen, train_dataset=rows, eval_dataset=rows.select(range(3)), **options)


@pytest.mark.parametrize("folder", [None, "embeds"], ids=["in memory", "on disk"])
@pytest.mark.parametrize("precompute", [False, True])
def test_an_image_that_is_edited_is_encoded_at_each_size(folder: str | None, precompute: bool, tmp_path: Path) -> None:
    settings = {"prompt_embeds_dir": folder and str(tmp_path / folder), "eval_height": HEIGHT}
    seen, runs = Seen(), []
    for size in ({"eval_height": None}, {"eval_on_start": True}, {}):  # evaluated never, before, and after training
        trainer = edited(tmp_path, seen, precompute_prompt_embeds=precompute, **{**settings, **size})
        trainer.train()
        runs.append(trained(trainer))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    trainer.rollouts.batch_sizes |= {"model at 32 x 16": 3, "vae at 32 x 16": 3}
    images = evaluated(trainer, seen)
    whole = tiny_kontext()  # the trainer's has no text encoders left, if they were dropped
    given = [image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS) for image in pictures(number=3)]
    whole.transformer = trainer.policy.pipeline.transformer
    trainer.policy.pipeline = whole
    assert_equal(images, of_pipeline(trainer, image=given, max_area=HEIGHT * WIDTH, _auto_resize=False))


@pytest.mark.parametrize("name", EDITING)
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_encoded_image_never_hits_at_another_size(name: str, on_disk: bool, tmp_path: Path) -> None:
    policy = EDITING[name](32)
    policy.guidance = type(policy.guidance)(**{**vars(policy.guidance), "eval_height": 16})
    kept, encoded = PromptEmbeddings(policy, tmp_path if on_disk else None), counted(policy)
    row = [Prompt.of({"prompt": PROMPTS[0], "image": pictures()[0]}, takes_image=True)]

    def shape(embeddings: PromptEmbeddings) -> torch.Size:
        return embeddings(row).tensors["image_latents"].shape

    for _ in range(2):  # the second time each is found
        trained_on = shape(kept)
        with policy.at_eval_size():
            assert shape(kept)[1] == policy.text_shapes()["image_latents"][0] != trained_on[1]
        assert shape(kept) == trained_on
    assert encoded == [PROMPTS[0]] * 2
    if on_disk:  # a later run at the size of that evaluation
        later = EDITING[name](16)
        encoded = counted(later)
        assert shape(PromptEmbeddings(later, tmp_path)) != trained_on and len(encoded) == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"eval_height": 20}, "eval_height must be a multiple of 8 for this pipeline, got 20"),
        ({"eval_width": 12}, "eval_width must be a multiple of 8 for this pipeline, got 12"),
        ({"eval_width": 40}, "eval_width must be at most 32 for this pipeline, .* got 40"),
        ({"eval_height": 0}, "eval_height must be at least 1, or None, got 0"),
    ],
)
def test_wrong_sizes_are_refused_by_their_names(size: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **size)


def test_batches_of_larger_images_are_smaller(tmp_path: Path) -> None:
    sizes = {(None, None): 9, (32, None): 4, (32, 32): 2, (160, 160): 1, (8, 8): 9}
    for (height, width), size in sizes.items():
        args = config(tmp_path, per_device_rollout_batch_size=9, eval_height=height, eval_width=width)
        assert eval_batch_size(args) == size
    measured = build(tmp_path, per_device_rollout_batch_size="auto", eval_dataset=prompts(2), eval_width=32)
    measured.evaluate()
    assert measured.rollouts.batch_sizes.keys() == {"model at 16 x 32", "vae at 16 x 32"}


def test_the_command_evaluates_at_that_size(tmp_path: Path) -> None:
    reward = {"reward_funcs": ["brightness"], "eval_reward_funcs": []}
    arguments = options(tmp_path, **reward, eval_height=16, num_generations_eval=1)
    assert evaluate.main([*arguments, "--num_prompts", "2"]) == 0
    settings = saved(tmp_path / "out")["settings"]
    assert (settings["height"], settings["width"]) == (16, 32)
    files = sorted((tmp_path / "out/evaluation/base").iterdir())
    assert [Image.open(file).size for file in files] == [(32, 16)] * 2
    with pytest.raises(ValueError, match="was started with height=16, but it is now 32"):
        evaluate.main([*options(tmp_path, **reward, num_generations_eval=1), "--num_prompts", "2"])


def test_plans_count_what_an_evaluation_takes(tmp_path: Path) -> None:
    tiny_flux().save_pretrained(tmp_path / "model")
    args = config(tmp_path, eval_height=64, eval_width=64, per_device_rollout_batch_size=1, guidance_scale=3.5)
    model = planned_model(tmp_path / "model", args, lora())
    assert model.eval_hidden - model.hidden == (64 - 4) * model.policy.width  # tokens of 8 x 8 pixels
    phases = estimate(args, model)
    assert phases["evaluate"]["activations"] > 10 * phases["decode"]["activations"]
    assert "evaluate" not in estimate(config(tmp_path, eval_height=16), model)
    with model.policy.at_eval_size():
        evaluation = count_flops(model.policy, True, False)
    assert evaluation.image == 16 * count_flops(model.policy, True, False).image
