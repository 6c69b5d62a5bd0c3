"""FLUX.1 Kontext, whose prompts come with an image: the policy against its pipeline, and the trainer on pairs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FluxKontextPipeline
from PIL import Image
from test_policies import NUM_STEPS, add_lora, pixels, seeded, velocity_of
from test_trainer import build, logged
from tiny import NEGATIVE_PROMPT, PROMPTS
from tiny_flux2 import tiny_kontext
from torch import Tensor

from trl_tpgrpo.algorithm.rollout import roll_out
from trl_tpgrpo.policies.base import FlowPolicy, Guidance, to_images
from trl_tpgrpo.policies.kontext import KontextPolicy
from trl_tpgrpo.policies.loading import build_policy
from trl_tpgrpo.policies.weights import save_weights


TRUE_CFG = {"true_cfg_scale": 2.5, "negative_prompt": NEGATIVE_PROMPT}


@dataclass(frozen=True)
class Case:
    """A dtype, an output size and a guidance."""

    dtype: torch.dtype = torch.float32
    height: int = 32
    width: int = 32
    guidance: dict[str, Any] = field(default_factory=dict)

    def policy(self) -> KontextPolicy:
        guidance = Guidance(self.height, self.width, max_sequence_length=8, **self.guidance)
        return build_policy(tiny_kontext(self.dtype), guidance)


CASES = {
    "default": Case(),
    "weak": Case(guidance={"guidance_scale": 1.0}),
    "true-cfg": Case(guidance=TRUE_CFG),
    "wide": Case(height=16, guidance=TRUE_CFG),
    "high": Case(width=24, guidance=TRUE_CFG),
    "bf16": Case(torch.bfloat16),
    "true-cfg-bf16": Case(torch.bfloat16, guidance=TRUE_CFG),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def pictures(height: int = 32, width: int = 32, number: int = len(PROMPTS)) -> list[Image.Image]:
    """Images of noise, each its own."""
    noise = np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def call_pipeline(policy: FlowPolicy, images: list[Image.Image], **options: Any) -> Any:
    """What the pipeline makes of PROMPTS and images in the size of the output, which it is told to leave alone."""
    height, width, negative = policy.guidance.height, policy.guidance.width, policy.guidance.negative_prompt
    return policy.pipeline(
        image=[image.resize((width, height), Image.Resampling.LANCZOS) for image in images],
        prompt=list(PROMPTS),
        negative_prompt=negative and [negative] * len(PROMPTS),
        height=height,
        width=width,
        max_area=height * width,
        _auto_resize=False,
        max_sequence_length=policy.text_length,
        num_inference_steps=NUM_STEPS,
        generator=seeded(),
        **policy.scales,
        **options,
    ).images


def ode_latents(policy: FlowPolicy, images: list[Image.Image]) -> Tensor:
    schedule, noise = policy.schedule(NUM_STEPS), policy.initial_noise(seeded())
    velocity = velocity_of(policy, policy.pipeline.transformer, schedule, policy.encode(list(PROMPTS), images))
    return roll_out(velocity, noise, schedule.sigmas).final_latents


@pytest.mark.parametrize("scale", [1, 2], ids=["of the output's size", "larger"])
@every_case
def test_latents_and_images_equal_the_pipelines_to_the_bit(case: Case, scale: int) -> None:
    policy, images = case.policy(), pictures(scale * case.height, scale * case.width)
    latents = ode_latents(policy, images)
    assert torch.equal(latents, call_pipeline(policy, images, output_type="latent").float())
    assert np.array_equal(pixels(to_images(policy.decode(latents))), pixels(call_pipeline(policy, images)))


def test_texts_and_images_matter() -> None:
    policy, (one, other, _) = Case().policy(), pictures()
    latents = policy.initial_noise([torch.Generator().manual_seed(0) for _ in range(3)])
    conditioning = policy.encode([PROMPTS[0], PROMPTS[0], PROMPTS[2]], [one, other, one])
    with torch.no_grad():
        predicted = policy.velocity(policy.pipeline.transformer, latents, policy.schedule(NUM_STEPS)[0], conditioning)
    assert not torch.allclose(predicted[0], predicted[1], atol=1e-4)
    assert not torch.allclose(predicted[0], predicted[2], atol=1e-4)


def test_shapes_are_known_without_encoding() -> None:
    policy = CASES["wide"].policy()
    conditioning = policy.encode(list(PROMPTS), pictures())
    for encoded in (conditioning, conditioning.negative):
        assert {name: value.shape[1:] for name, value in encoded.tensors.items()} == policy.text_shapes()


def test_an_adapter_loads_into_a_fresh_pipeline(tmp_path: Path) -> None:
    policy, plain, images = Case().policy(), Case().policy(), pictures()
    untrained = pixels(call_pipeline(policy, images))
    save_weights(add_lora(policy), tmp_path, FluxKontextPipeline)
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
    settings = {"guidance_scale": 3.5, "log_prob_type": "gaussian", "precompute_prompt_embeds": precompute, **TRUE_CFG}
    trainer = build(tmp_path, tiny_kontext(dtype), train_dataset=Dataset.from_dict(rows), **settings)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert logged(trainer, "ratio/max_deviation") == [0.0, 0.0]
    after = dict(trainer.model.named_parameters())
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


def test_two_images_of_one_prompt_are_two_groups_of_a_batch(tmp_path: Path) -> None:
    inputs, seen = pictures(number=2), []

    def reward(images: list[Image.Image], image: list[Image.Image], **columns: object) -> list[float]:
        seen.extend(np.asarray(one).tobytes() for one in image)
        return [float(np.asarray(one).mean()) for one in images]

    rows = Dataset.from_dict({"prompt": [PROMPTS[0]] * 2, "image": inputs})
    settings = {"guidance_scale": 3.5, "log_prob_type": "gaussian", "credit": "outcome", "max_steps": 1}
    trainer = build(tmp_path, tiny_kontext(), reward_funcs=reward, train_dataset=rows, **settings)
    trainer.train()
    assert sorted(seen) == sorted(np.asarray(one).tobytes() for one in [*inputs, *inputs])  # groups of two
    assert len(trainer.rollouts.embeddings._kept) == 2 and logged(trainer, "ratio/max_deviation") == [0.0]
