"""Prompts that come with an image: the policy against its pipeline, and the trainer on pairs of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from test_policies import NUM_STEPS, add_lora, pixels, seeded, velocity_of
from test_trainer import build, logged
from tiny import NEGATIVE_PROMPT, PROMPTS
from tiny_qwen import tiny_qwen_image_edit
from torch import Tensor

from trl_tpgrpo.algorithm.rollout import roll_out
from trl_tpgrpo.commands.sample import input_options
from trl_tpgrpo.policies.base import FlowPolicy, Guidance, to_images
from trl_tpgrpo.policies.conditioning import Conditioning
from trl_tpgrpo.policies.embeddings import Prompt, PromptEmbeddings
from trl_tpgrpo.policies.loading import build_policy
from trl_tpgrpo.policies.qwen_image_edit import QwenImageEditPolicy
from trl_tpgrpo.policies.weights import save_weights


AREA = 64 * 64  # pixels to which input images are resized here, in place of 1 megapixel
TRUE_CFG = {"true_cfg_scale": 2.5, "negative_prompt": NEGATIVE_PROMPT}


@pytest.fixture(autouse=True)
def small_input(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: real(AREA, ratio))


@dataclass(frozen=True)
class Case:
    """A dtype, an output size and a guidance."""

    dtype: torch.dtype = torch.float32
    height: int = 32
    width: int = 32
    is_guided: bool = True

    def policy(self) -> QwenImageEditPolicy:
        guidance = Guidance(self.height, self.width, **(TRUE_CFG if self.is_guided else {}))
        return build_policy(tiny_qwen_image_edit(self.dtype), guidance)


CASES = {
    "unguided": Case(is_guided=False),
    "guided": Case(),
    "wide": Case(width=64),
    "high": Case(width=16),
    "unguided-bf16": Case(torch.bfloat16, is_guided=False),
    "guided-bf16": Case(torch.bfloat16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def pictures(height: int = 32, width: int = 32, number: int = len(PROMPTS)) -> list[Image.Image]:
    """Images of noise, each its own."""
    noise = np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def call_pipeline(policy: FlowPolicy, image: Any, number: int = len(PROMPTS), **options: Any) -> Any:
    guidance = policy.guidance
    negative = None if guidance.negative_prompt is None else [guidance.negative_prompt] * number
    return policy.pipeline(
        image=image,
        prompt=list(PROMPTS[:number]),
        negative_prompt=negative,
        height=guidance.height,
        width=guidance.width,
        num_inference_steps=NUM_STEPS,
        generator=seeded(number),
        **policy.scales,
        **options,
    ).images


def ode_latents(policy: FlowPolicy, conditioning: Conditioning) -> Tensor:
    schedule, noise = policy.schedule(NUM_STEPS), policy.initial_noise(seeded(len(conditioning)))
    velocity = velocity_of(policy, policy.pipeline.transformer, schedule, conditioning)
    return roll_out(velocity, noise, schedule.sigmas).final_latents


@every_case
def test_a_batch_equals_the_pipelines_to_the_bit(case: Case) -> None:
    policy = case.policy()
    images = pictures(*policy.input_size)  # of a list the pipeline resizes none for the text encoder
    latents = ode_latents(policy, policy.encode(list(PROMPTS), images))
    assert torch.equal(latents, call_pipeline(policy, images, output_type="latent").float())
    assert np.array_equal(pixels(to_images(policy.decode(latents))), pixels(call_pipeline(policy, images)))


@every_case
def test_an_image_alone_is_resized_as_the_pipeline_does(case: Case) -> None:
    policy = case.policy()
    image = pictures(case.height // 2, case.width // 2)[0]
    latents = ode_latents(policy, policy.encode([PROMPTS[0]], [image]))
    assert torch.equal(latents, call_pipeline(policy, image, 1, output_type="latent").float())


@every_case
def test_an_image_of_another_shape_is_given_to_the_pipeline_in_its_size(case: Case) -> None:
    policy = case.policy()
    image, size = pictures(case.height + 8, case.width)[0], (case.height, case.width)
    given = input_options(policy.pipeline, [image], *size)[0]
    latents = ode_latents(policy, policy.encode([PROMPTS[0]], [image]))
    assert torch.equal(latents, call_pipeline(policy, number=1, output_type="latent", **given).float())


def test_texts_and_images_matter() -> None:
    policy = Case().policy()
    latents = policy.initial_noise([torch.Generator().manual_seed(0) for _ in range(3)])
    one, other, *_ = pictures()
    conditioning = policy.encode([PROMPTS[0], PROMPTS[0], PROMPTS[2]], [one, other, one])
    with torch.no_grad():
        predicted = policy.velocity(policy.pipeline.transformer, latents, policy.schedule(NUM_STEPS)[0], conditioning)
    assert not torch.allclose(predicted[0], predicted[1], atol=1e-4)
    assert not torch.allclose(predicted[0], predicted[2], atol=1e-4)


def test_pairs_encoded_alone_are_those_of_a_batch() -> None:
    policy, images = Case().policy(), pictures()
    rows = [{"prompt": prompt, "image": image} for prompt, image in zip(PROMPTS, images, strict=True)]
    alone = PromptEmbeddings(policy)([Prompt.of(row, takes_image=True) for row in rows])
    together = policy.encode(list(PROMPTS), images)
    for one, other in ((alone, together), (alone.negative, together.negative)):
        assert one.lengths == other.lengths
        assert all(torch.equal(one.tensors[name], value) for name, value in other.tensors.items())


def test_text_shapes_are_those_of_the_longest_text() -> None:
    policy = Case(width=64).policy()
    conditioning, shapes = policy.encode(list(PROMPTS), pictures()), policy.text_shapes()
    assert conditioning.tensors["image_latents"].shape[1:] == shapes["image_latents"]
    num_tokens, width = conditioning.tensors["prompt_embeds"].shape[1:]
    assert num_tokens < shapes["prompt_embeds"][0] < num_tokens + 512
    assert width == shapes["prompt_embeds"][1]


def test_a_length_of_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="max_sequence_length has no effect on this QwenImageEditPipeline"):
        build_policy(tiny_qwen_image_edit(), Guidance(32, 32, max_sequence_length=8))


def test_lora_loads_into_a_fresh_pipeline(tmp_path: Path) -> None:
    policy, plain, images = Case().policy(), Case().policy(), pictures()
    untrained = pixels(call_pipeline(policy, images))
    save_weights(add_lora(policy), tmp_path, policy.pipeline_class)
    plain.pipeline.load_lora_weights(tmp_path)
    trained = pixels(call_pipeline(policy, images))
    assert np.array_equal(pixels(call_pipeline(plain, images)), trained)
    assert not np.array_equal(trained, untrained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_trainer_learns_from_pairs_at_a_ratio_of_exactly_one(
    dtype: torch.dtype, precompute: bool, tmp_path: Path
) -> None:
    rows = {"prompt": [*PROMPTS, *PROMPTS], "image": pictures(number=2 * len(PROMPTS))}
    settings = {"guidance_scale": None, "max_sequence_length": None, "log_prob_type": "gaussian", **TRUE_CFG}
    trainer = build(
        tmp_path,
        tiny_qwen_image_edit(dtype),
        train_dataset=Dataset.from_dict(rows),
        precompute_prompt_embeds=precompute,
        **settings,
    )
    start = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert logged(trainer, "ratio/max_deviation") == [0.0, 0.0]
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in start.items())


def test_two_images_of_one_prompt_are_two_groups_of_a_batch(tmp_path: Path) -> None:
    inputs, seen = pictures(number=2), []

    def reward(images: list[Image.Image], image: list[Image.Image], **columns: object) -> list[float]:
        seen.extend(np.asarray(one).tobytes() for one in image)
        return [float(np.asarray(one).mean()) for one in images]

    rows = Dataset.from_dict({"prompt": [PROMPTS[0]] * 2, "image": inputs})
    settings = {"guidance_scale": None, "max_sequence_length": None, "log_prob_type": "gaussian"}
    trainer = build(
        tmp_path, tiny_qwen_image_edit(), reward_funcs=reward, train_dataset=rows, credit="outcome", max_steps=1,
        **settings,
    )  # fmt: skip
    trainer.train()
    assert sorted(seen) == sorted(np.asarray(one).tobytes() for one in [*inputs, *inputs])  # groups of two
    assert len(trainer.rollouts.embeddings._kept) == 2 and logged(trainer, "ratio/max_deviation") == [0.0]
