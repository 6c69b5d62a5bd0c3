"""Each family against its own pipeline, on tiny real ones: images, schedules, ratios, weights on disk."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import convert_to_fp32
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    UNet2DModel,
)
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from tiny import IMAGE_SIZE, NEGATIVE_PROMPT, PROMPTS, tiny_flux, tiny_sd3
from tiny_flux2 import tiny_chroma, tiny_flux2, tiny_flux2_klein, tiny_krea2
from tiny_qwen import tiny_qwen_image, tiny_z_image
from torch import Tensor

from trl_tpgrpo import TPGRPOConfig
from trl_tpgrpo.algorithm.rollout import Velocity, Window, roll_out
from trl_tpgrpo.algorithm.sde import log_prob, transition
from trl_tpgrpo.policies.base import FlowPolicy, Guidance, to_images
from trl_tpgrpo.policies.chroma import ChromaPolicy
from trl_tpgrpo.policies.conditioning import Conditioning, Schedule
from trl_tpgrpo.policies.flux import FluxPolicy
from trl_tpgrpo.policies.flux2 import Flux2KleinPolicy, Flux2Policy
from trl_tpgrpo.policies.krea2 import Krea2Policy
from trl_tpgrpo.policies.loading import build_policy, load_pipeline, load_policy, prepare_transformer
from trl_tpgrpo.policies.qwen_image import QwenImagePolicy
from trl_tpgrpo.policies.sd3 import SD3Policy
from trl_tpgrpo.policies.weights import LORA_FILE, load_weights, save_weights
from trl_tpgrpo.policies.z_image import ZImagePolicy


NUM_STEPS = 4
BATCH = len(PROMPTS)


@dataclass(frozen=True)
class Case:
    """A pipeline and how it samples.

    Attributes:
        family: One of `FAMILIES`.
        build: Of its function.
        guidance: Of `Guidance`, beyond the size.
    """

    family: str
    build: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)

    def pipeline(self) -> DiffusionPipeline:
        return built(self.family, **self.build)

    def policy(self, pipeline: DiffusionPipeline | None = None) -> FlowPolicy:
        options = {"guidance_scale": 1.0, "max_sequence_length": 8, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
        return build_policy(pipeline or self.pipeline(), Guidance(**{**options, **self.guidance}))


@lru_cache
def built(family: str, **changes: Any) -> DiffusionPipeline:
    """Shared by the tests that leave it as it is."""
    return fresh(family, **changes)


FAMILIES = {
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "qwen_image": tiny_qwen_image,
    "z_image": tiny_z_image,
    "flux2-klein": tiny_flux2_klein,
    "flux2": tiny_flux2,
    "krea2": tiny_krea2,
    "chroma": tiny_chroma,
}


def fresh(family: str, **changes: Any) -> DiffusionPipeline:
    return FAMILIES[family](**changes)


BF16 = {"dtype": torch.bfloat16}
NO_T5 = {"t5": False}
CFG = {"guidance_scale": 4.5}
NEGATIVE = {"negative_prompt": NEGATIVE_PROMPT}
DISTILLED = {"guidance_scale": 3.5}
UNCUT = {"max_sequence_length": None}  # texts of their own lengths
TRUE_CFG = NEGATIVE | {"true_cfg_scale": 2.5}
UNGUIDED = {"guidance_scale": 0.0}
KLEIN = {"max_sequence_length": 24}  # which the templates need
DEV = {"guidance_scale": 2.5, "max_sequence_length": 48}
KREA2 = {"guidance_scale": 0.0, "max_sequence_length": 16}
CASES = {
    "sd3": Case("sd3"),
    "sd3-cfg": Case("sd3", guidance=CFG),
    "sd3-cfg-negative": Case("sd3", guidance=CFG | NEGATIVE),
    "sd3-unshifted": Case("sd3", {"shift": 1.0}, CFG),
    "sd3-dynamic-shift": Case("sd3", {"dynamic_shift": True}, CFG),
    "sd3-no-t5": Case("sd3", NO_T5, {"max_sequence_length": 0}),
    "sd3-no-t5-cfg": Case("sd3", NO_T5, CFG | {"max_sequence_length": 0}),
    "sd3-default-length": Case("sd3", guidance={"max_sequence_length": None}),
    "sd3-oblong": Case("sd3", {"dynamic_shift": True}, CFG | {"height": 16}),
    "sd3-cfg-bf16": Case("sd3", BF16, CFG),
    "flux": Case("flux", guidance=DISTILLED),
    "flux-schnell": Case("flux", {"guidance_embeds": False}),
    "flux-true-cfg": Case("flux", guidance=DISTILLED | NEGATIVE | {"true_cfg_scale": 2.5}),
    "flux-schnell-true-cfg": Case("flux", {"guidance_embeds": False}, NEGATIVE | {"true_cfg_scale": 2.5}),
    "flux-default-length": Case("flux", guidance=DISTILLED | {"max_sequence_length": None}),
    "flux-oblong": Case("flux", guidance=DISTILLED | {"width": 16}),
    "flux-bf16": Case("flux", BF16, DISTILLED),
    "flux-true-cfg-bf16": Case("flux", BF16, DISTILLED | NEGATIVE | {"true_cfg_scale": 2.5}),
    "qwen_image": Case("qwen_image", guidance=UNCUT),
    "qwen_image-cut": Case("qwen_image"),
    "qwen_image-cfg": Case("qwen_image", guidance=UNCUT | TRUE_CFG),
    "qwen_image-cfg-cut": Case("qwen_image", guidance=TRUE_CFG),
    "qwen_image-cfg-default-scale": Case("qwen_image", guidance=UNCUT | NEGATIVE),
    "qwen_image-cfg-empty": Case("qwen_image", guidance=UNCUT | {"negative_prompt": ""}),
    "qwen_image-oblong": Case("qwen_image", guidance=UNCUT | TRUE_CFG | {"width": 16}),
    "qwen_image-bf16": Case("qwen_image", BF16, UNCUT),
    "qwen_image-cfg-bf16": Case("qwen_image", BF16, UNCUT | TRUE_CFG),
    "z_image": Case("z_image", guidance=UNCUT | UNGUIDED),
    "z_image-cut": Case("z_image", guidance=UNGUIDED),
    "z_image-cfg": Case("z_image", guidance=UNCUT | CFG),
    "z_image-cfg-negative": Case("z_image", guidance=UNCUT | CFG | NEGATIVE),
    "z_image-oblong": Case("z_image", guidance=UNCUT | CFG | {"height": 16}),
    "z_image-bf16": Case("z_image", BF16, UNCUT | UNGUIDED),
    "z_image-cfg-bf16": Case("z_image", BF16, UNCUT | CFG),
    "flux2-klein": Case("flux2-klein", guidance=KLEIN),
    "flux2-klein-cfg": Case("flux2-klein", guidance=KLEIN | CFG),
    "flux2-klein-distilled": Case("flux2-klein", {"distilled": True}, KLEIN),
    "flux2-klein-default-length": Case("flux2-klein", guidance=CFG | {"max_sequence_length": None}),
    "flux2-klein-oblong": Case("flux2-klein", guidance=KLEIN | CFG | {"height": 16}),
    "flux2-klein-cfg-bf16": Case("flux2-klein", BF16, KLEIN | CFG),
    "flux2": Case("flux2", guidance=DEV),
    "flux2-oblong": Case("flux2", guidance=DEV | {"width": 16}),
    "flux2-bf16": Case("flux2", BF16, DEV),
    "krea2": Case("krea2", guidance=KREA2),
    "krea2-cfg": Case("krea2", guidance=KREA2 | CFG),
    "krea2-cfg-negative": Case("krea2", guidance=KREA2 | CFG | NEGATIVE),
    "krea2-distilled": Case("krea2", {"distilled": True}, KREA2),
    "krea2-oblong": Case("krea2", guidance=KREA2 | CFG | {"width": 16}),
    "krea2-cfg-bf16": Case("krea2", BF16, KREA2 | CFG),
    "chroma": Case("chroma"),
    "chroma-cfg": Case("chroma", guidance=CFG),
    "chroma-cfg-negative": Case("chroma", guidance=CFG | NEGATIVE),
    "chroma-default-length": Case("chroma", guidance=CFG | {"max_sequence_length": None}),
    "chroma-oblong": Case("chroma", guidance=CFG | {"height": 16}),
    "chroma-cfg-bf16": Case("chroma", BF16, CFG),
}
OFF_AND_ON = {
    "sd3": ({}, CFG),
    "flux": (DISTILLED, DISTILLED | TRUE_CFG),
    "qwen_image": (UNCUT, UNCUT | TRUE_CFG),
    "z_image": (UNCUT | UNGUIDED, UNCUT | CFG),
    "flux2-klein": (KLEIN, KLEIN | CFG),
    "flux2": (DEV, DEV | {"guidance_scale": 4.0}),  # an input of the model
    "krea2": (KREA2, KREA2 | CFG),
    "chroma": ({}, CFG),
}
CASES |= {
    f"{family}-{'on' if is_guided else 'off'}-{size.get('height', 32)}x{size.get('width', 32)}-{dtype}": Case(
        family, {} if dtype == "fp32" else BF16, off_and_on[is_guided] | size
    )
    for family, off_and_on in OFF_AND_ON.items()
    for is_guided in (False, True)
    for size in ({}, {"height": 16}, {"width": 16})
    for dtype in ("fp32", "bf16")
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ONE_OF_EACH = [
    "sd3-cfg", "flux", "qwen_image-cfg", "z_image-cfg", "flux2-klein-cfg", "flux2", "krea2-cfg", "chroma-cfg",
]  # fmt: skip
GUIDED = [
    "sd3-cfg-negative", "flux-true-cfg", "qwen_image-cfg", "z_image-cfg-negative", "flux2-klein-cfg",
    "krea2-cfg-negative", "chroma-cfg-negative",
]  # fmt: skip
one_of_each_family = pytest.mark.parametrize("case", [CASES[name] for name in ONE_OF_EACH], ids=ONE_OF_EACH)
guided_of_each_family = pytest.mark.parametrize("name", GUIDED)


def seeded(number: int = BATCH) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def call_pipeline(pipeline: DiffusionPipeline, policy: FlowPolicy, **options: Any) -> Any:
    """What `pipeline.__call__` makes of PROMPTS under the policy's guidance."""
    guidance = policy.guidance
    options |= {"height": guidance.height, "width": guidance.width, **policy.scales}
    if guidance.negative_prompt is not None:
        options["negative_prompt"] = [guidance.negative_prompt] * BATCH
    if guidance.max_sequence_length is not None:
        options["max_sequence_length"] = guidance.max_sequence_length
    return pipeline(
        prompt=list(PROMPTS), **{"num_inference_steps": NUM_STEPS, "generator": seeded(), **options}
    ).images


def velocity_of(
    policy: FlowPolicy, model: torch.nn.Module, schedule: Schedule, conditioning: Conditioning
) -> Velocity:
    return lambda latents, step, rows: policy.velocity(model, latents, schedule[step], conditioning[rows])


def ode_latents(policy: FlowPolicy) -> Tensor:
    """The ODE rollout of PROMPTS, from the policy's parts."""
    schedule = policy.schedule(NUM_STEPS)
    velocity = velocity_of(policy, policy.pipeline.transformer, schedule, policy.encode(list(PROMPTS)))
    return roll_out(velocity, policy.initial_noise(seeded()), schedule.sigmas).final_latents


def as_returned(policy: FlowPolicy, latents: Tensor) -> Tensor:
    """Final latents as the pipeline returns them: those of FLUX.2 klein are ready for the VAE."""
    latents = latents.to(policy.velocity_dtype or policy.dtype)
    return policy.vae_latents(latents) if policy.pipeline_class is Flux2KleinPipeline else latents


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def add_lora(policy: FlowPolicy, seed: int = 1) -> PeftModel:
    """An adapter of rank 4 and scale 4 that does something: its second matrix is not zero."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=policy.lora_target_modules)
    model = get_peft_model(policy.pipeline.transformer, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# A rollout without noise is the pipeline


@every_case
def test_rollout_without_noise_equals_the_pipelines_latents_to_the_bit(case: Case) -> None:
    expected = call_pipeline(case.pipeline(), case.policy(), output_type="latent")
    computed = ode_latents(case.policy())
    assert torch.equal(as_returned(case.policy(), computed), expected)
    assert torch.equal(computed.to(expected.dtype).float(), computed)


@every_case
def test_decoded_images_equal_the_pipelines_to_the_bit(case: Case) -> None:
    expected = pixels(call_pipeline(case.pipeline(), case.policy()))
    computed = pixels(to_images(case.policy().decode(ode_latents(case.policy()))))
    assert computed.shape == (BATCH, case.policy().guidance.height, case.policy().guidance.width, 3)
    assert np.array_equal(computed, expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sd3", "sd3-cfg"),
        ("sd3-cfg", "sd3-cfg-negative"),
        ("sd3-cfg", "sd3-unshifted"),
        ("sd3-cfg", "sd3-dynamic-shift"),
        ("sd3-cfg", "sd3-no-t5-cfg"),
        ("sd3", "sd3-default-length"),
        ("flux", "flux-true-cfg"),
        ("flux", "flux-default-length"),
        ("qwen_image", "qwen_image-cut"),
        ("qwen_image", "qwen_image-cfg"),
        ("qwen_image-cfg", "qwen_image-cfg-default-scale"),
        ("qwen_image", "qwen_image-cfg-empty"),
        ("z_image", "z_image-cut"),
        ("z_image", "z_image-cfg"),
        ("z_image-cfg", "z_image-cfg-negative"),
        ("flux2-klein", "flux2-klein-cfg"),
        ("flux2-klein-cfg", "flux2-klein-default-length"),
        ("krea2", "krea2-cfg"),
        ("krea2", "krea2-distilled"),
        ("krea2-cfg", "krea2-cfg-negative"),
        ("chroma", "chroma-cfg"),
        ("chroma-cfg", "chroma-cfg-negative"),
        ("chroma-cfg", "chroma-default-length"),
    ],
)
def test_the_cases_differ(first: str, second: str) -> None:
    assert not torch.equal(ode_latents(CASES[first].policy()), ode_latents(CASES[second].policy()))


@one_of_each_family
def test_prompts_and_guidance_scales_matter(case: Case) -> None:
    policy = case.policy()
    stronger = Case(case.family, case.build, case.guidance | dict.fromkeys(policy.scales, 9.0)).policy()
    assert not torch.equal(ode_latents(policy), ode_latents(stronger))
    latents = policy.initial_noise([torch.Generator().manual_seed(0) for _ in PROMPTS])
    step, conditioning = policy.schedule(NUM_STEPS)[0], policy.encode(list(PROMPTS))
    with torch.no_grad():
        predicted = policy.velocity(policy.pipeline.transformer, latents, step, conditioning)
    assert not torch.allclose(predicted[0], predicted[1], atol=1e-4)
    assert not torch.allclose(predicted[0], predicted[2], atol=1e-4)


# The parts


def test_shapes_of_sd3() -> None:
    policy = CASES["sd3-oblong"].policy()
    latents = policy.initial_noise(seeded())
    assert latents.shape == (BATCH, 4, 4, 8)
    assert policy.vae_latents(latents).shape == (BATCH, 4, 4, 8)
    conditioning = policy.encode(list(PROMPTS))
    for encoded in (conditioning, conditioning.negative):
        assert encoded.tensors["prompt_embeds"].shape == (BATCH, 12 + 8, 32)
        assert encoded.tensors["pooled_prompt_embeds"].shape == (BATCH, 32)


def test_shapes_of_flux() -> None:
    policy = CASES["flux-oblong"].policy()
    latents = policy.initial_noise(seeded())
    assert latents.shape == (BATCH, 4 * 2, 16)
    assert policy.vae_latents(latents).shape == (BATCH, 4, 8, 4)
    conditioning = policy.encode(list(PROMPTS))
    assert conditioning.tensors["prompt_embeds"].shape == (BATCH, 8, 32)
    assert conditioning.tensors["pooled_prompt_embeds"].shape == (BATCH, 32)


@pytest.mark.parametrize(
    ("name", "guided"),
    [
        ("sd3", False),
        ("sd3-cfg", True),
        ("flux", False),
        ("flux-true-cfg", True),
        ("qwen_image", False),
        ("qwen_image-cfg", True),
        ("z_image", False),
        ("z_image-cfg", True),
    ],
)
def test_negative_prompts_are_encoded_only_under_classifier_free_guidance(name: str, guided: bool) -> None:
    assert (CASES[name].policy().encode(list(PROMPTS)).negative is not None) is guided


@one_of_each_family
def test_conditioning_is_indexed_by_row_and_carries_no_gradient(case: Case) -> None:
    conditioning = case.policy().encode(list(PROMPTS))
    chosen = conditioning[torch.tensor([2, 0, 2])]
    for name, value in conditioning.tensors.items():
        assert torch.equal(chosen.tensors[name], value[[2, 0, 2]])
    assert [len(text) for text in chosen.texts()] == [len(conditioning.texts()[row]) for row in (2, 0, 2)]
    assert not conditioning.tensors["prompt_embeds"].requires_grad
    assert conditioning.to(torch.bfloat16).tensors["prompt_embeds"].dtype == torch.bfloat16


@guided_of_each_family
def test_negative_prompts_follow_the_rows(name: str) -> None:
    conditioning = CASES[name].policy().encode(list(PROMPTS))
    negative = conditioning[torch.tensor([1, 1])].to(torch.bfloat16).negative
    for name, value in conditioning.negative.tensors.items():
        assert negative.tensors[name].shape == (2, *value.shape[1:])
        assert negative.tensors[name].dtype == (torch.bfloat16 if value.is_floating_point() else value.dtype)
    assert not torch.equal(conditioning.negative.texts()[0], conditioning.texts()[0])


@one_of_each_family
def test_noise_of_a_sample_depends_on_its_generator_alone(case: Case) -> None:
    policy = case.policy()
    together = policy.initial_noise(seeded())
    alone = policy.initial_noise([torch.Generator().manual_seed(2)])
    assert torch.equal(alone[0], together[2])


@pytest.mark.parametrize(
    "name",
    [
        "sd3", "sd3-unshifted", "sd3-dynamic-shift", "sd3-oblong", "flux", "flux-oblong", "qwen_image",
        "qwen_image-oblong", "z_image", "flux2-klein-oblong", "flux2", "krea2-oblong", "krea2-distilled", "chroma",
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_steps", [10, 7])
def test_schedule_is_what_the_pipeline_leaves_in_its_scheduler(name: str, num_steps: int) -> None:
    case = CASES[name]
    pipeline = fresh(case.family, **case.build)
    call_pipeline(pipeline, case.policy(pipeline), num_inference_steps=num_steps, output_type="latent")
    computed = case.policy(fresh(case.family, **case.build)).schedule(num_steps)
    assert torch.equal(computed.sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(computed.timesteps, pipeline.scheduler.timesteps)
    assert computed.sigmas.dtype == torch.float32
    assert computed.sigmas.shape == (num_steps + 1,)
    assert computed.sigmas[-1] == 0
    assert (computed.sigmas.diff() < 0).all()


@pytest.mark.parametrize("name", ["sd3-dynamic-shift", "flux", "qwen_image", "krea2", "chroma"])
@pytest.mark.parametrize(
    "changed", [{"base_shift": 0.9}, {"max_shift": 1.9}, {"base_image_seq_len": 8}, {"max_image_seq_len": 512}]
)
def test_schedule_follows_the_shift_of_the_scheduler(name: str, changed: dict[str, float]) -> None:
    case = CASES[name]
    usual = case.policy().schedule(NUM_STEPS)
    pipeline = fresh(case.family, **case.build)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changed)
    policy = case.policy(pipeline)
    call_pipeline(pipeline, policy, output_type="latent")
    expected = pipeline.scheduler.sigmas.clone()
    assert torch.equal(policy.schedule(NUM_STEPS).sigmas, expected)
    assert not torch.equal(usual.sigmas, expected)


@one_of_each_family
def test_a_schedule_is_a_copy_and_asking_for_another_changes_nothing(case: Case) -> None:
    policy = case.policy()
    first = policy.schedule(10)
    kept = copy.deepcopy(first)
    policy.schedule(3)
    again = policy.schedule(10)
    for schedule in (first, again):
        assert torch.equal(schedule.sigmas, kept.sigmas)
        assert torch.equal(schedule.timesteps, kept.timesteps)


@one_of_each_family
def test_decoding_in_smaller_batches_gives_the_same_images(case: Case) -> None:
    policy = case.policy()
    latents = ode_latents(policy)
    whole, parts = policy.decode(latents).int(), policy.decode(latents, batch_size=2).int()
    assert (whole - parts).abs().max() <= 1


def test_all_but_the_transformer_is_frozen(tmp_path: Path) -> None:
    args = TPGRPOConfig(str(tmp_path), max_steps=1, height=IMAGE_SIZE, width=IMAGE_SIZE)
    pipeline = load_policy(fresh("sd3"), args, use_lora=True).pipeline
    frozen = [pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    assert not any(parameter.requires_grad for module in frozen for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in pipeline.transformer.parameters())


# The ratio before the first update


SCORES = [
    ("flow_sde", "gaussian"),
    ("cps", "squared_error"),
    ("cps", "gaussian"),
    ("dance_sde", "gaussian"),
]


@dataclass(frozen=True)
class Precision:
    """Of the base model, and whether the model runs under autocast, as in a mixed-precision training run."""

    dtype: torch.dtype
    autocast: bool = False

    def context(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16),
    "bf16-autocast": Precision(torch.bfloat16, autocast=True),
}


@lru_cache
def with_lora(name: str, dtype: torch.dtype) -> tuple[FlowPolicy, PeftModel]:
    """A policy of the case in `dtype`, and its transformer with an adapter in float32."""
    case = CASES[name]
    policy = case.policy(fresh(case.family, **case.build, dtype=dtype))
    return policy, add_lora(policy)


@pytest.mark.parametrize(("sde_type", "log_prob_type"), SCORES)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "sd3", "flux-true-cfg", "qwen_image", "z_image"])
def test_ratio_is_exactly_one_before_the_first_update(
    name: str, precision: Precision, sde_type: str, log_prob_type: str
) -> None:
    policy, model = with_lora(name, precision.dtype)
    schedule, window = policy.schedule(NUM_STEPS), Window(0, NUM_STEPS - 1, sde_type, 0.7, log_prob_type)
    conditioning = policy.encode(list(PROMPTS))
    velocity = velocity_of(policy, model, schedule, conditioning)
    with precision.context():
        result = roll_out(
            velocity, policy.initial_noise(seeded()), schedule.sigmas, window, seeded(), batch_size=BATCH
        )
    for step in range(len(window)):
        latents, after = result.states[:, step], result.states[:, step + 1]
        with precision.context():
            predicted = policy.velocity(model, latents, schedule[step], conditioning)
        sigma, sigma_next = schedule.sigmas[step], schedule.sigmas[step + 1]
        new = log_prob(transition(sde_type, latents, predicted, sigma, sigma_next, 0.7), after, log_prob_type)
        assert new.requires_grad
        assert new.dtype == torch.float32
        assert torch.equal(torch.exp(new - result.log_probs[:, step]), torch.ones(BATCH))


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_ratio_moves_with_the_adapter_and_gradient_reaches_all_of_it(name: str, precision: Precision) -> None:
    case = CASES[name]
    policy = case.policy(fresh(case.family, **case.build, dtype=precision.dtype))
    model = add_lora(policy)
    step, conditioning = policy.schedule(NUM_STEPS)[0], policy.encode(list(PROMPTS))
    latents = policy.initial_noise(seeded()).float()
    with precision.context():
        before = policy.velocity(model, latents, step, conditioning)
    before.float().square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    with torch.no_grad(), precision.context(), model.disable_adapter():
        reference = policy.velocity(model, latents, step, conditioning)
    assert not torch.equal(before, reference)


@one_of_each_family
def test_velocity_stays_in_the_pipelines_dtype_under_a_float32_adapter(case: Case) -> None:
    policy = case.policy(fresh(case.family, **case.build, dtype=torch.bfloat16))
    model = add_lora(policy)
    latents = policy.initial_noise(seeded())
    step, conditioning = policy.schedule(NUM_STEPS)[0], policy.encode(list(PROMPTS))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert policy.velocity(model, latents, step, conditioning).dtype == (policy.velocity_dtype or torch.bfloat16)
    assert latents.dtype == (policy.noise_dtype or torch.bfloat16)
    assert conditioning.tensors["prompt_embeds"].dtype == policy.dtype == torch.bfloat16


@one_of_each_family
def test_recomputed_activations_change_no_gradient(case: Case) -> None:
    policy = case.policy(fresh(case.family, **case.build))
    model, _ = prepare_transformer(policy, LoraConfig(r=4, init_lora_weights=False), TPGRPOConfig(use_cpu=True))
    step, conditioning = policy.schedule(NUM_STEPS)[0], policy.encode(list(PROMPTS))
    gradients = []
    for is_recomputed in (False, True):
        model.zero_grad()
        if is_recomputed:
            model.activation_checkpointing_enable()
        policy.velocity(model.train(), policy.initial_noise(seeded()), step, conditioning).square().sum().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


class OutputsInFloat32(torch.nn.Module):
    """What a model is once accelerate has prepared it for mixed precision."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return convert_to_fp32(self.model(*args, **inputs))


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "flux-true-cfg"])
def test_rollout_through_a_prepared_model_equals_the_pipeline_under_autocast_to_the_bit(name: str) -> None:
    policy, model = with_lora(name, torch.bfloat16)
    schedule, noise = policy.schedule(NUM_STEPS), policy.initial_noise(seeded())
    with torch.autocast("cpu", torch.bfloat16):
        velocity = velocity_of(policy, OutputsInFloat32(model), schedule, policy.encode(list(PROMPTS)))
        computed = roll_out(velocity, noise, schedule.sigmas).final_latents
        expected = call_pipeline(policy.pipeline, policy, output_type="latent")
    assert torch.equal(as_returned(policy, computed).float(), expected.float())


# LoRA and weights on disk


@one_of_each_family
def test_every_lora_target_exists_and_is_a_matrix(case: Case) -> None:
    modules = dict(case.pipeline().transformer.named_modules())
    for target in case.policy().lora_target_modules:
        matches = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        assert matches, target
        assert all(isinstance(module, torch.nn.Linear) for module in matches)


@one_of_each_family
def test_lora_loads_into_a_fresh_pipeline_with_its_scale(case: Case, tmp_path: Path) -> None:
    pipeline, plain = fresh(case.family, **case.build), fresh(case.family, **case.build)
    policy = case.policy(pipeline)
    untrained = pixels(call_pipeline(pipeline, policy))
    save_weights(add_lora(policy), tmp_path, policy.pipeline_class)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    plain.load_lora_weights(tmp_path)
    trained = pixels(call_pipeline(pipeline, policy))
    assert np.array_equal(pixels(call_pipeline(plain, policy)), trained)
    assert not np.array_equal(trained, untrained)


@one_of_each_family
def test_load_weights_restores_an_adapter_to_the_bit(case: Case, tmp_path: Path) -> None:
    policy, other = (case.policy(fresh(case.family, **case.build)) for _ in range(2))
    saved, restored = add_lora(policy, seed=1), add_lora(other, seed=2)
    save_weights(saved, tmp_path, policy.pipeline_class)
    assert differing(saved, restored)
    load_weights(restored, tmp_path)
    assert differing(saved, restored) == []


def differing(first: torch.nn.Module, second: torch.nn.Module) -> list[str]:
    others = dict(second.named_parameters())
    return [name for name, parameter in first.named_parameters() if not torch.equal(parameter, others[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@one_of_each_family
def test_full_weights_make_a_round_trip(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    pipelines = [fresh(case.family, **case.build, dtype=dtype, seed=seed) for seed in (0, 1)]
    policy, other = (case.policy(pipeline) for pipeline in pipelines)
    save_weights(pipelines[0].transformer, tmp_path, policy.pipeline_class)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    assert differing(*(pipeline.transformer for pipeline in pipelines))
    load_weights(pipelines[1].transformer, tmp_path)
    assert differing(*(pipeline.transformer for pipeline in pipelines)) == []
    assert pipelines[1].transformer.dtype == dtype
    loaded = type(pipelines[0].transformer).from_pretrained(tmp_path, subfolder="transformer", torch_dtype=dtype)
    assert differing(pipelines[0].transformer, loaded) == []


def test_weights_of_the_other_kind_are_not_found(tmp_path: Path) -> None:
    policy = CASES["sd3"].policy(tiny_sd3())
    with pytest.raises(FileNotFoundError, match="transformer"):
        load_weights(policy.pipeline.transformer, tmp_path)
    model = add_lora(policy)
    with pytest.raises(FileNotFoundError, match=LORA_FILE):
        load_weights(model, tmp_path)


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    policy, other = CASES["sd3"].policy(tiny_sd3()), CASES["sd3"].policy(tiny_sd3())
    save_weights(add_lora(policy), tmp_path, policy.pipeline_class)
    fewer = get_peft_model(other.pipeline.transformer, LoraConfig(r=4, target_modules=["attn.to_q"]))
    with pytest.raises(ValueError, match="does not have the layers"):
        load_weights(fewer, tmp_path)


def test_an_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    policy, other = CASES["sd3"].policy(tiny_sd3()), CASES["sd3"].policy(tiny_sd3())
    save_weights(add_lora(policy), tmp_path, policy.pipeline_class)
    config = LoraConfig(r=8, target_modules=other.lora_target_modules)
    with pytest.raises(ValueError):
        load_weights(get_peft_model(other.pipeline.transformer, config), tmp_path)


# Building


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny_sd3, SD3Policy),
        (tiny_flux, FluxPolicy),
        (tiny_qwen_image, QwenImagePolicy),
        (tiny_z_image, ZImagePolicy),
        (tiny_flux2_klein, Flux2KleinPolicy),
        (tiny_flux2, Flux2Policy),
        (tiny_krea2, Krea2Policy),
        (tiny_chroma, ChromaPolicy),
    ],
)
def test_a_pipeline_gets_the_policy_of_its_family(
    build: Callable[[], DiffusionPipeline], expected: type[FlowPolicy]
) -> None:
    assert type(build_policy(build(), Guidance(32, 32))) is expected


def test_an_unsupported_pipeline_is_refused_with_those_that_are_supported() -> None:
    unet = UNet2DModel(
        8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(ValueError, match="DDPMPipeline.*StableDiffusion3Pipeline, FluxPipeline"):
        build_policy(DDPMPipeline(unet, DDPMScheduler()), Guidance(32, 32))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "size"), [("height", {"height": 28, "width": 32}), ("width", {"height": 32, "width": 20})]
)
def test_a_size_that_the_pipeline_cannot_make_is_named(family: str, name: str, size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a multiple of 8.*{size[name]}"):
        build_policy(built(family), Guidance(**size, guidance_scale=1.0))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flux2-klein-distilled", CFG, "guidance_scale has no effect on this Flux2KleinPipeline"),
        ("flux2-klein", CFG | NEGATIVE, "negative_prompt has no effect on this Flux2KleinPipeline"),
        ("flux2", NEGATIVE, "negative_prompt has no effect on this Flux2Pipeline"),
        ("krea2", NEGATIVE, "guidance_scale 0.0 is not above 0"),
        ("chroma", {"true_cfg_scale": 2.0}, "true_cfg_scale has no effect on this ChromaPipeline"),
    ],
)
def test_guidance_without_an_effect_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match=message):
        Case(case.family, case.build, case.guidance | changes).policy()


# Loading


LOADED = ["sd3", "sd3-no-t5-cfg", "flux", "qwen_image", "z_image"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of pipelines of all families, and one of SD3 without T5."""
    folders = {name: tmp_path_factory.mktemp(name) for name in LOADED}
    for name, folder in folders.items():
        CASES[name].pipeline().save_pretrained(folder)
    return folders


@pytest.mark.parametrize("name", LOADED)
def test_a_pipeline_comes_back_from_its_folder(name: str, saved: dict[str, Path]) -> None:
    case, loaded = CASES[name], load_pipeline(saved[name])
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(case.pipeline())
    expected = call_pipeline(case.pipeline(), case.policy(), output_type="latent")
    assert torch.equal(call_pipeline(loaded, case.policy(loaded), output_type="latent"), expected)


def test_a_part_that_was_not_saved_stays_absent(saved: dict[str, Path]) -> None:
    loaded = load_pipeline(str(saved["sd3-no-t5-cfg"]))
    assert loaded.text_encoder_3 is None
    assert loaded.tokenizer_3 is None


def test_parts_can_be_left_out(saved: dict[str, Path]) -> None:
    loaded = load_pipeline(saved["sd3"], text_encoder_3=None, tokenizer_3=None)
    assert loaded.text_encoder_3 is None
    assert loaded.text_encoder is not None


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", torch.bfloat16), ("torch.float16", torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_dtype_is_that_of_all_parts(dtype: str | torch.dtype, expected: torch.dtype, saved: dict[str, Path]) -> None:
    loaded = load_pipeline(saved["sd3"], dtype=dtype)
    assert loaded.transformer.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == expected
    assert CASES["sd3"].policy(loaded).dtype == expected


def test_dtype_is_float32_unless_told(saved: dict[str, Path]) -> None:
    assert load_pipeline(saved["flux"]).transformer.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat17", "nn", ""])
def test_a_dtype_that_is_none_is_named(dtype: str, saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=f"dtype.*'{dtype}'"):
        load_pipeline(saved["sd3"], dtype=dtype)


def test_a_folder_that_holds_no_pipeline_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_file_gives_the_transformer_and_a_pipeline_the_rest(
    name: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    weights = {key: value + 1 for key, value in load_pipeline(saved[name]).transformer.state_dict().items()}
    save_file(weights, tmp_path / "mine.safetensors")
    loaded = load_pipeline(tmp_path / "mine.safetensors", torch.bfloat16, config=str(saved[name]))
    assert type(loaded) is type(CASES[name].pipeline())
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    state = loaded.transformer.state_dict()
    assert all(torch.equal(state[key], value.bfloat16()) for key, value in weights.items())
    with pytest.raises(
        ValueError, match="quantization='int8' needs a folder or Hub id, not a file: .*save_pretrained"
    ):
        load_pipeline(tmp_path / "mine.safetensors", quantization="int8", config=str(saved[name]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux1-dev-Q4_0.gguf", r"Q4_0.gguf: a single file must be \.safetensors: .*quantization='nf4'"),
        ("sd3.5_medium.safetensors", r"sd3.5_medium.safetensors contains no known transformer.*'config'"),
    ],
)
def test_a_file_that_cannot_be_a_model_says_how(name: str, message: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path / name)


def test_the_rest_of_a_known_file_is_the_original_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, tmp_path / "mine.safetensors")
    with pytest.raises(OSError, match="black-forest-labs/FLUX.1-schnell"):
        load_pipeline(tmp_path / "mine.safetensors", cache_dir=tmp_path)
