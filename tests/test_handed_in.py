"""What a user hands in changed: each works as it should, or is refused by its name before anything is sampled."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from PIL import Image, ImageDraw
from test_trainer import brightness, build, config, logged, lora, prompts, trained
from tiny import tiny_flux, tiny_sd3
from transformers import TrainingArguments
from trl import GRPOConfig

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.policies.sharding import check_gradients
from trl_tpgrpo.rewards import RewardError
from trl_tpgrpo.rewards.contract import declared, reward_name


# The transformer


def wrapped(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer = torch.nn.DataParallel(pipeline.transformer)


def compiled(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")


CHANGES: dict[str, tuple[Callable[[DiffusionPipeline], object], str]] = {
    "wrapped": (wrapped, "is wrapped in DataParallel"),
    "compiled": (compiled, "is compiled \\(use compile_backend"),
    "compiled in place": (lambda pipeline: pipeline.transformer.compile(backend="eager"), "is compiled \\(use"),
    "compiled blocks": (
        lambda pipeline: pipeline.transformer.transformer_blocks[0].compile(backend="eager"), "compile_backend",
    ),
    "fused": (lambda pipeline: pipeline.transformer.fuse_qkv_projections(), "had its projections fused"),
    "offloaded": (lambda pipeline: cpu_offload(pipeline.transformer, torch.device("cpu")), "hooks of accelerate"),
    "cast": (
        lambda pipeline: pipeline.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32),
        "hooks of diffusers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_transformer_is_refused(change: str, family, full: bool, tmp_path: Path) -> None:
    pipeline, (apply, message) = family(), CHANGES[change]
    apply(pipeline)
    with pytest.raises(ValueError, match=f"transformer .*{message}.*as it was loaded"):
        build(tmp_path, pipeline, full=full)


def test_a_cache_is_refused_until_it_is_switched_off(tmp_path: Path) -> None:
    pipeline = tiny_flux()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="hooks of diffusers"):
        build(tmp_path, pipeline)
    pipeline.transformer.disable_cache()
    build(tmp_path, pipeline, max_steps=1).train()


def test_a_compiled_vae_and_text_encoder_work(tmp_path: Path) -> None:
    rewards = []
    for change in (lambda part: part, lambda part: torch.compile(part, backend="eager")):
        pipeline = tiny_sd3()
        pipeline.vae, pipeline.text_encoder = change(pipeline.vae), change(pipeline.text_encoder)
        trainer = build(tmp_path, pipeline, max_steps=1)
        trainer.train()
        rewards.append(logged(trainer, "reward"))
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-5)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_reentrant_checkpointing_is_refused_before_sampling(name: str, tmp_path: Path) -> None:
    seen: list[Image.Image] = []
    options = {"activation_checkpointing": True, f"{name}_kwargs": {"use_reentrant": True}}
    trainer = build(tmp_path, reward_funcs=lambda images, **_: seen.extend(images), **options)
    with pytest.raises(ValueError, match="use_reentrant must be False, got True"):
        trainer.train()
    assert not seen


# Gradients


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1e-3])
def test_all_that_is_trained_gets_a_gradient(family, full: bool, beta: float, tmp_path: Path) -> None:
    """The adapter's first matrices too, whose gradient is 0 at the start, and where no transition adds to the loss."""
    for number, reward in enumerate((brightness, lambda images, **_: [0.0] * len(images))):
        build(tmp_path / str(number), family(), reward, full=full, beta=beta, max_steps=1).train()


def test_what_gets_no_gradient_is_named(tmp_path: Path) -> None:
    trainer = build(tmp_path, full=True)
    trainer.model.extra = torch.nn.Linear(2, 2)  # which the model never calls
    with pytest.raises(
        RuntimeError, match=r"^2 of \d+ trainable tensors have no gradient: extra.weight, extra.bias\.$"
    ):
        trainer.train()


def test_many_without_a_gradient_are_not_all_named(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    with pytest.raises(RuntimeError, match=r"no gradient: .*lora_A.* \.\.\.\.$") as raised:
        check_gradients(trainer.accelerator, trainer.model)
    assert str(raised.value).count("lora_") == 8


def test_a_reward_function_that_switches_gradients_off_changes_nothing(tmp_path: Path) -> None:
    def careless(images: list[Image.Image], **columns: object) -> list[float]:
        torch.set_grad_enabled(False)
        return brightness(images)

    weights = []
    for reward in (brightness, careless):
        trainer = build(tmp_path, reward_funcs=reward, num_iterations=2, recompute_old_log_probs=True)
        try:
            trainer.train()
        finally:
            torch.set_grad_enabled(True)
        weights.append(trained(trainer))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


# What reward functions share


def shrinks(images: list[Image.Image], topic: list, **columns: object) -> list[float]:
    for image in images:
        image.thumbnail((4, 4))
    for one in topic:
        one.append("changed")
    return [0.0] * len(images)


def draws(images: list[Image.Image], **columns: object) -> list[float]:
    for image in images:
        ImageDraw.Draw(image).rectangle((0, 0, 99, 99), fill="white")
    return [0.0] * len(images)


def breaks(images: list[Image.Image], **columns: object) -> list[float]:
    draws(images)
    raise OSError("gone")


@pytest.mark.parametrize("changing", [shrinks, draws])
def test_every_function_sees_images_and_columns_as_they_were(changing: Callable, tmp_path: Path) -> None:
    """In any order, and so do the metrics and the pictures in the log."""
    seen: list[tuple] = []

    def looks(images: list[Image.Image], topic: list, **columns: object) -> list[float]:
        seen.extend((image.tobytes(), tuple(one)) for image, one in zip(images, topic, strict=True))
        return brightness(images)

    rows = prompts().remove_columns("topic").add_column("topic", [["a"]] * 6)
    results = []
    for number, functions in enumerate(([looks], [looks, changing], [changing, looks])):
        seen.clear()
        folder = tmp_path / str(number)
        build(folder, reward_funcs=functions, train_dataset=rows, max_steps=1, log_completions=True).train()
        pictures = [path.read_bytes() for path in sorted(folder.rglob("completions/**/*.png"))]
        results.append((list(seen), pictures))
    assert results[0][0] and results[0][1]
    assert results[0] == results[1] == results[2]


def test_evidence_shows_the_image_as_it_was_decoded(tmp_path: Path) -> None:
    with pytest.raises(RewardError) as raised:
        build(tmp_path, reward_funcs=breaks).train()
    assert Image.open(raised.value.saved_to).getextrema() != ((255, 255),) * 3


def test_the_evidence_of_a_lambda_is_in_a_file_with_a_plain_name(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="'<lambda>'"):
        build(tmp_path, reward_funcs=lambda images, **_: [math.nan] * len(images)).train()
    assert {path.stem for path in (tmp_path / "reward_failures").iterdir()} == {"step_000000__lambda_"}


@pytest.mark.parametrize("value", [1e39, -1e39, math.inf, "many"])
def test_a_reward_that_is_no_number_in_float32_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="for row 0, prompt"):
        build(tmp_path, reward_funcs=lambda images, **_: [value] * len(images)).train()


@pytest.mark.parametrize(
    "name", ["reward", "rewards/logs/mean", "loss", "learning_rate", "grad_norm", "seconds/train"]
)
def test_a_logged_metric_does_not_mix_with_the_trainers(name: str, tmp_path: Path) -> None:
    def logs(images: list[Image.Image], log_metric: Callable, **columns: object) -> list[float]:
        log_metric(name, 1000.0)
        return brightness(images)

    with pytest.raises(ValueError, match=f"log_metric: '{name}' is a metric of the trainer"):
        build(tmp_path, reward_funcs=logs).train()


# Partials


def scaled(images: list[Image.Image], factor: float = 1.0, wait: float = 0.0, **columns: object) -> list[float]:
    time.sleep(wait)
    return [factor * (1 if isinstance(images, torch.Tensor) else -1)] * len(images)


def test_what_is_set_on_a_partial_counts(tmp_path: Path) -> None:
    one, two = functools.partial(scaled, factor=2.0), functools.partial(scaled, wait=2.0)
    one.__name__, one.image_type = "one", "pt"
    two.timeout = 0.2
    trainer = build(tmp_path, reward_funcs=[one, scaled], max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/one/mean") == [2.0]
    assert logged(trainer, "rewards/scaled/mean") == [-1.0]
    with pytest.raises(RewardError, match=r"has not returned within its timeout of 0\.2 seconds"):
        build(tmp_path, reward_funcs=two).train()


def test_a_partial_comes_before_the_function_in_it() -> None:
    def inner(images: list, **columns: object) -> list[float]:
        return [0.0] * len(images)

    inner.batch_size, inner.timeout = 2, 3.0
    middle = functools.partial(inner, a=1)
    middle.batch_size = 4
    outer = functools.partial(middle, b=2)  # Python makes one partial of two, unless the inner one has attributes
    assert (declared(outer).batch_size, declared(outer).timeout, reward_name(outer)) == (4, 3.0, "inner")
    outer.batch_size, outer.__name__ = 8, "outer"
    assert (declared(outer).batch_size, declared(outer).timeout, reward_name(outer)) == (8, 3.0, "outer")


def test_the_model_in_a_partial_is_moved_to_the_device(tmp_path: Path) -> None:
    class Model:
        def __init__(self) -> None:
            self.devices: list[torch.device] = []

        def to(self, device: torch.device) -> None:
            self.devices.append(device)

        def __call__(self, images: list[Image.Image], **columns: object) -> list[float]:
            return brightness(images)

    for offload, moves in {False: 1, True: 2}.items():
        model = Model()
        trainer = build(
            tmp_path, reward_funcs=functools.partial(model, a=1), offload_between_phases=offload, max_steps=1
        )
        trainer.train()
        assert len(model.devices) == moves


# Settings and data


@pytest.mark.parametrize("kind", [GRPOConfig, TrainingArguments])
def test_the_config_of_another_trainer_is_named(kind: type, tmp_path: Path) -> None:
    args = kind(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match=f"args must be a TPGRPOConfig, got {kind.__name__}"):
        TPGRPOTrainer(tiny_sd3(), brightness, args, prompts(), peft_config=lora())


def copies(args: TPGRPOConfig, **changes: object) -> list[TPGRPOConfig]:
    from_json = json.loads(args.to_json_string())
    return [
        dataclasses.replace(args, **changes),
        TPGRPOConfig(**args.to_dict() | changes),
        TPGRPOConfig(**from_json | changes),
    ]


def test_a_config_made_from_a_config_is_the_same(tmp_path: Path) -> None:
    args = TPGRPOConfig(str(tmp_path), use_cpu=True, num_generations=3, learning_rate=1e-3, epsilon_high=2e-5)
    for copy in copies(args):
        assert copy == args
        assert copy.given == args.given


def test_what_follows_from_a_changed_setting_follows_anew(tmp_path: Path) -> None:
    args = TPGRPOConfig(str(tmp_path), use_cpu=True, epsilon_high=2e-5)
    changes = {"num_generations": 12, "sde_type": "flow_sde", "epsilon": 1e-3, "learning_rate": 1e-4}
    fresh = TPGRPOConfig(str(tmp_path), use_cpu=True, epsilon_high=2e-5, **changes)
    assert (fresh.per_device_eval_batch_size, fresh.log_prob_type, fresh.epsilon_high) == (12, "gaussian", 2e-5)
    for copy in copies(args, **changes):
        assert copy == fresh
    for copy in copies(args, steps_per_generation=8):  # of two that exclude each other, the one that was given
        assert (copy.steps_per_generation, copy.generation_batch_size) == (8, 72 * copy.world_size)


def test_a_setting_that_is_changed_before_the_trainer_is_made_is_checked(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.num_generations = 3
    with pytest.raises(
        ValueError, match=r"generation_batch_size \(4 = .*\) must be a multiple of num_generations \(3\)"
    ):
        TPGRPOTrainer(tiny_sd3(), brightness, args, prompts(), peft_config=lora())
    args = config(tmp_path)
    args.num_generations = args.per_device_train_batch_size = 6
    trainer = TPGRPOTrainer(tiny_sd3(), brightness, args, prompts(), peft_config=lora())
    assert trainer.args is args
    assert (args.per_device_eval_batch_size, args.generation_batch_size, args.rollout_batch_size) == (6, 6, 6)


def test_a_token_that_was_made_unreadable_is_none(tmp_path: Path) -> None:
    args = TPGRPOConfig(str(tmp_path), use_cpu=True, hub_token="secret")
    assert TPGRPOConfig(**args.to_dict()).hub_token is None
    assert dataclasses.replace(args).hub_token == "secret"


@pytest.mark.parametrize(
    "settings",
    [
        {"reward_weights": [math.nan]},
        {"reward_weights": [math.inf]},
        {"learning_rate": math.nan},
        {"weight_decay": math.nan},
    ],
)
def test_a_setting_that_is_no_number_is_refused(settings: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        config(tmp_path, **settings)


@pytest.mark.parametrize("changes", [{"lora_alpha": 0}, {"lora_alpha": -4}, {"alpha_pattern": {"attn.to_q": 0}}])
def test_an_alpha_that_trains_nothing_is_refused(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_alpha and alpha_pattern must be above 0"):
        build(tmp_path, peft_config=lora(**changes))


def test_columns_that_a_format_hides_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_dataset needs a column 'prompt', got \['topic'\]"):
        build(tmp_path, train_dataset=prompts().with_format(columns=["topic"]))
    build(tmp_path, train_dataset=prompts().with_format(columns=["topic"], output_all_columns=True))

    def narrow(
        images: list, prompts: list, trainer_state: object, log_metric: object, log_extra: object
    ) -> list[float]:
        return brightness(images)

    build(tmp_path, reward_funcs=narrow, train_dataset=prompts().with_format(columns=["prompt"]), max_steps=1).train()


def test_predict_returns_the_rewards(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    held_out = Dataset.from_dict({"prompt": ["a red circle", "a blue circle"]})
    metrics = trainer.predict(held_out).metrics
    assert metrics["test_reward"] == trainer.evaluate(held_out)["eval_reward"]
