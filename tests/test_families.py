"""What the trainer promises, of every family: the first ratio, saving, all weights, processes, and what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from processes import CPU, LAUNCH, run_python
from test_trainer import brightness, build, logged, lora, trained

from trl_tpgrpo import batches
from trl_tpgrpo.policies.loading import unreached_weights


MIXED = Dataset.from_dict(
    {"prompt": ["a circle", "a red square above a blue triangle above a green circle", "two red squares"] * 2}
)
every_family = pytest.mark.parametrize("name", FAMILIES)


def trainer_of(name: str, output_dir: Path, dtype: torch.dtype = torch.float32, **changes: object):
    family, settings = FAMILIES[name]
    return build(output_dir, family(dtype=dtype), **{**settings, **changes})


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_first_ratio_is_exactly_one_with_texts_of_mixed_length(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sweeps and micro-batches of two groups each, whose longest texts differ."""
    monkeypatch.setattr(batches, "SWEEP", 4)
    trainer = trainer_of(
        name, tmp_path, dtype, bf16=dtype == torch.bfloat16, train_dataset=MIXED, log_prob_type="gaussian",
        learning_rate=0.0, generation_batch_size=12, gradient_accumulation_steps=1, max_steps=3, optim="sgd",
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "ratio/max_deviation") == [0.0] * 3


ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # docs/troubleshooting.md says what was measured


def brightness_of_some(images: list, prompts: list[str], **columns: object) -> list[float]:
    """A reward that tells no two images of one prompt apart."""
    rewards = zip(prompts, brightness(images), strict=True)
    return [0.0 if prompt == "a circle" else reward for prompt, reward in rewards]


@every_family
@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16"])
def test_fewer_rows_in_training_than_in_the_rollout_move_the_first_ratio_by_rounding_alone(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Transitions without advantage are left out, and a group shares what precedes its first SDE step."""
    trainer = trainer_of(
        name, tmp_path, dtype, bf16=dtype == torch.bfloat16, train_dataset=MIXED, reward_funcs=brightness_of_some,
        beta=0.0, share_initial_noise=True, log_prob_type="gaussian", learning_rate=0.0, generation_batch_size=12,
        gradient_accumulation_steps=1, max_steps=3, optim="sgd",
    )  # fmt: skip
    trainer.train()
    assert sum(logged(trainer, "nfe_train")) < 12 * trainer.args.num_sde_steps
    assert max(logged(trainer, "ratio/max_deviation")) <= ROUNDING[dtype]


@every_family
def test_what_is_trained_loads_into_a_fresh_pipeline_and_makes_the_same_images(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, beta=0.0, ema_decay=None)
    trainer.train()
    trainer.save_model()
    fresh = FAMILIES[name][0]()
    options = {**trainer.policy.scales, "height": 16, "width": 16, "num_inference_steps": 3}
    options |= {"max_sequence_length": trainer.policy.text_length}
    if trainer.args.negative_prompt is not None:
        options["negative_prompt"] = trainer.args.negative_prompt

    def image(pipeline: object) -> np.ndarray:
        made = pipeline(prompt="a red circle", generator=torch.Generator().manual_seed(0), **options).images[0]
        return np.asarray(made)

    before, expected = image(fresh), image(trainer.policy.pipeline)
    fresh.load_lora_weights(tmp_path)
    assert not np.array_equal(before, expected)
    assert np.array_equal(image(fresh), expected)


@every_family
def test_all_weights_that_are_said_to_be_trained_get_a_gradient(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, full=True, learning_rate=1e-4, max_steps=1)
    trainer.train()  # which raises if one has none
    parameters = trainer.policy.pipeline.transformer.named_parameters()
    frozen = {key for key, value in parameters if not value.requires_grad}
    assert frozen == set(unreached_weights(trainer.policy))
    assert all("transformer_blocks.1." in key for key in frozen) and len(frozen) == (6 if name == "qwen_image" else 0)


def test_a_layer_that_no_gradient_reaches_is_left_out_of_the_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of("qwen_image", tmp_path, peft_config=lora(target_modules=["to_q", "to_add_out"]))
    trainer.train()
    adapted = {name.rpartition(".lora_")[0].rpartition("transformer_blocks.")[2] for name in trained(trainer)}
    assert adapted == {"0.attn.to_q", "1.attn.to_q", "0.attn.to_add_out"}
    assert "Not trained, because they get no gradient: transformer_blocks.1.attn.to_add_out." in caplog.text


@pytest.mark.parametrize("given", ["first.*", ["to_k"]])
def test_what_the_user_excludes_stays_excluded(given: object, tmp_path: Path) -> None:
    config = lora(target_modules=["to_q", "to_k", "to_add_out"], exclude_modules=given)
    names = " ".join(trained(trainer_of("qwen_image", tmp_path, peft_config=config)))
    assert "1.attn.to_add_out" not in names and ("to_k" in names) == (given == "first.*")


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from test_families import MIXED, trainer_of
from test_trainer import trained

out, world = Path(sys.argv[2]), int(os.environ.get("WORLD_SIZE", 1))
trainer = trainer_of(
    sys.argv[1], out / "run", train_dataset=MIXED, beta=0.0, optim="sgd", learning_rate=1.0, num_generations=2,
    generation_batch_size=12, per_device_train_batch_size=12 // world, gradient_accumulation_steps=1, max_steps=2,
)
trainer.train()
torch.save(trained(trainer), out / f"{world}-{os.environ.get('RANK', 0)}.pt")
"""


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_two_processes_give_the_weights_of_one(name: str, tmp_path: Path) -> None:
    """Up to rounding: gradients are summed in another order, and texts are padded to the longest of a process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for launch in ([], LAUNCH):
        ended = run_python(*launch, script, name, tmp_path, env=CPU)
        assert ended.returncode == 0, ended.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{file}.pt") for file in ("1-0", "2-0", "2-1"))
    assert any(value.abs().max() > 1e-4 for key, value in one.items() if "lora_B" in key)
    for key, value in one.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-5)


# What is refused


REFUSED = {
    "embedded guidance where there is none": (
        "qwen_image", {"guidance_scale": 4.0}, "guidance_scale has no effect on this QwenImagePipeline"),
    "true guidance by another name": (
        "z_image", {"true_cfg_scale": 4.0}, "its guidance is guidance_scale"),
    "guidance without a negative prompt": (
        "qwen_image", {"negative_prompt": None, "true_cfg_scale": 4.0}, "have an effect only together"),
    "a negative prompt without guidance": (
        "qwen_image", {"true_cfg_scale": 1.0}, "have an effect only together"),
    "a negative prompt at a scale of 0": (
        "z_image", {"guidance_scale": 0.0, "negative_prompt": "blur"}, "guidance_scale 0.0 is not above 0"),
    "a negative prompt of klein": (
        "flux2-klein", {"negative_prompt": "blur"}, "negative_prompt has no effect on this Flux2KleinPipeline"),
    "a negative prompt of a distilled guidance": (
        "flux2", {"negative_prompt": "blur"}, "negative_prompt has no effect on this Flux2Pipeline"),
    "a negative prompt of Chroma without guidance": (
        "chroma", {"guidance_scale": 1.0, "negative_prompt": "blur"}, "no effect without guidance"),
    "a height that Krea 2 would round": ("krea2", {"height": 20}, "height must be a multiple of"),
    "a width that Qwen-Image would round": ("qwen_image", {"width": 20}, "width must be a multiple of"),
    "cuDNN's attention": ("chroma", {"attention_backend": "_native_cudnn"}, "cuDNN's gradients are wrong"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_have_no_effect_are_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(name, tmp_path, **changes)


@pytest.mark.parametrize("name", ["flux2-klein", "krea2"])
def test_a_distilled_model_is_trained_only_if_that_is_asked_for(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, settings = FAMILIES[name]
    settings = settings | {"guidance_scale": None if name == "flux2-klein" else 0.0}
    with pytest.raises(ValueError, match="is distilled to few steps.*allow_distilled=True"):
        build(tmp_path, family(distilled=True), **settings)
    build(tmp_path, family(distilled=True), **settings, allow_distilled=True, max_steps=1).train()
    assert "expect images to blur" in caplog.text


def test_a_distilled_model_is_known_by_its_name(tmp_path: Path) -> None:
    family, settings = FAMILIES["z_image"]
    pipeline = family()
    pipeline.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    with pytest.raises(ValueError, match="Tongyi-MAI/Z-Image-Turbo is distilled to few steps"):
        build(tmp_path, pipeline, **settings)
    pipeline.register_to_config(_name_or_path="/turbo/flash/z-image")  # of folders above it
    build(tmp_path, pipeline, **settings)


def test_a_pipeline_that_cannot_save_adapters_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, settings = FAMILIES["chroma"]
    pipeline = family()
    for kind in type(pipeline).__mro__:
        if "save_lora_weights" in vars(kind):
            monkeypatch.delattr(kind, "save_lora_weights")
    with pytest.raises(ValueError, match="ChromaPipeline cannot save adapters"):
        build(tmp_path, pipeline, **settings)
