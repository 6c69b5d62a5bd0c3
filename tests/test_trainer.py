"""The trainer on tiny real pipelines: what it trains, what it counts, what it saves, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)
from peft import LoraConfig
from PIL import Image
from tiny import tiny_flux, tiny_sd3

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.algorithm.credit import CREDITS
from trl_tpgrpo.algorithm.sde import SDE_TYPES
from trl_tpgrpo.callbacks.storage import CHECKSUMS
from trl_tpgrpo.rewards import RewardError


PROMPTS = [
    "a red circle",
    "two blue squares",
    "a green triangle",
    "a yellow circle",
    "three red squares",
    "a blue circle",
]
SIZE = {"height": 16, "width": 16, "max_sequence_length": 8}


def brightness(images: list[Image.Image], **columns: object) -> list[float]:
    return [float(np.asarray(image, dtype=np.float32).mean() / 255) for image in images]


def prompts(number: int = 6) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS[:number], "topic": list(range(number))})


def config(output_dir: Path, **changes: object) -> TPGRPOConfig:
    settings = {
        "use_cpu": True,
        **SIZE,
        "guidance_scale": 2.0,
        "num_inference_steps": 4,
        "num_inference_steps_eval": 3,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        **changes,
    }
    return TPGRPOConfig(str(output_dir), **settings)


def lora(**changes: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **changes})


def build(
    output_dir: Path,
    pipeline: DiffusionPipeline | None = None,
    reward_funcs: object = brightness,
    peft_config: LoraConfig | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: object = None,
    full: bool = False,
    **changes: object,
) -> TPGRPOTrainer:
    return TPGRPOTrainer(
        model=pipeline or tiny_sd3(),
        reward_funcs=reward_funcs,
        args=config(output_dir, **changes),
        train_dataset=prompts() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        peft_config=None if full else peft_config or lora(),
    )


def trained(trainer: TPGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def logged(trainer: TPGRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------ it trains


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_only_the_adapter_is_trained(family, tmp_path: Path) -> None:
    pipeline = family()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    others = {name: pipeline.components[name] for name in ("vae", "text_encoder", "text_encoder_2")}
    frozen = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in others.items()}
    trainer = build(tmp_path, pipeline)
    start = trained(trainer)
    trainer.train()
    after = trained(trainer)
    assert all("lora_" in name for name in after)
    assert all(not torch.equal(start[name], after[name]) for name in after if "lora_B" in name and "add_q" not in name)
    base = {key.replace(".base_layer", ""): value for key, value in pipeline.transformer.state_dict().items()}
    assert_same(before, {key: base[key] for key in before})
    for name, part in others.items():
        assert_same(frozen[name], part.state_dict())
        assert all(parameter.grad is None for parameter in part.parameters())


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_all_weights_are_trained_without_a_peft_config(family, tmp_path: Path) -> None:
    trainer = build(tmp_path, family(), full=True, learning_rate=1e-3)
    start = trained(trainer)
    trainer.train()
    assert start.keys() == dict(trainer.policy.pipeline.transformer.named_parameters()).keys()
    changed = [name for name, value in trained(trainer).items() if not torch.equal(start[name], value)]
    assert len(changed) > 0.8 * len(start)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_every_credit_and_sde_trains(credit: str, sde_type: str, tmp_path: Path) -> None:
    extra = {"credit_lambda": 0.5} if credit == "lambda" else {}
    trainer = build(tmp_path, credit=credit, sde_type=sde_type, noise_level=0.5, max_steps=1, **extra)
    start = trained(trainer)
    trainer.train()
    assert any(not torch.equal(start[name], value) for name, value in trained(trainer).items())
    assert np.isfinite(logged(trainer, "loss")).all()


def test_groups_of_one_train_with_the_completion_baseline(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, num_generations=1, advantage_baseline="completion", scale_rewards="batch", credit="lambda",
        credit_lambda=0.8, per_device_train_batch_size=6,
    )  # fmt: skip
    trainer.train()
    assert max(logged(trainer, "grad_norm")) > 0


def test_reward_rises(tmp_path: Path) -> None:
    """Brightness is easy: a few updates must move it, or the sign of something is wrong."""
    trainer = build(
        tmp_path, max_steps=12, num_generations=6, per_device_train_batch_size=36, guidance_scale=1.0, beta=0.0,
        sde_type="flow_sde", epsilon=1e-2, learning_rate=3e-2,
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.005


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratio_is_exactly_one_before_the_first_update(family, checkpointing: bool, tmp_path: Path) -> None:
    trainer = build(
        tmp_path, family(), max_steps=2, activation_checkpointing=checkpointing,
        steps_per_generation=2, gradient_accumulation_steps=1, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    first, second = logged(trainer, "ratio/max_deviation")
    assert first == 0.0
    assert second > 0.0  # the second update of the rollout is off policy, so the first could have failed


def test_model_calls_and_images_are_counted(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_inference_steps=10, max_steps=1, per_device_rollout_batch_size=40)
    trainer.train()
    expected = {"nfe": 55 * 4, "num_calls": 10, "num_decoded_images": 10 * 4, "num_scored_images": 10 * 4}
    assert {name: logged(trainer, name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert logged(trainer, "nfe_train") == [9 * 4 * 2]  # with the reference's, as beta > 0


def test_outcome_credit_computes_no_completion(tmp_path: Path) -> None:
    trainer = build(tmp_path, credit="outcome", num_inference_steps=10, max_steps=1)
    trainer.train()
    assert logged(trainer, "nfe") == [10 * 4]
    assert logged(trainer, "num_scored_images") == [4]


@pytest.mark.parametrize("full", [False, True])
def test_kl_starts_at_zero_and_grows(full: bool, tmp_path: Path) -> None:
    trainer = build(tmp_path, beta=0.1, full=full, learning_rate=1e-3, max_steps=3, per_device_rollout_batch_size=4)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0.0 and kl[-1] > 0.0


def test_kl_holds_the_policy_back(tmp_path: Path) -> None:
    def distance(beta: float) -> float:
        trainer = build(tmp_path, beta=beta, full=True, learning_rate=1e-3, max_steps=6)
        start = trained(trainer)
        trainer.train()
        return sum(float((start[name] - value).square().sum()) for name, value in trained(trainer).items())

    assert distance(100.0) < distance(1e-6)


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = build(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_generations=4,
            max_steps=1, beta=0.1, optim="sgd", learning_rate=1.0, guidance_scale=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        weights.append(trained(trainer))
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)


def test_rollout_batch_size_changes_nothing_but_rounding(tmp_path: Path) -> None:
    tables = []
    for size in (16, 4, 1):
        trainer = build(tmp_path, per_device_rollout_batch_size=size)
        trainer.model.train()
        tables.append(trainer._prepare_inputs([{"prompt": PROMPTS[0], "topic": 0}] * 4).table.rewards)
    torch.testing.assert_close(tables[1], tables[0], rtol=0, atol=2 / 255)
    torch.testing.assert_close(tables[2], tables[0], rtol=0, atol=2 / 255)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for checkpointing in (False, True):
        trainer = build(tmp_path, activation_checkpointing=checkpointing)
        trainer.train()
        assert trainer.policy.pipeline.transformer.is_gradient_checkpointing == checkpointing
        weights.append(trained(trainer))
    assert_same(*weights)


def test_random_window_moves_between_rollouts_and_is_reproducible(tmp_path: Path) -> None:
    trainer = build(tmp_path, sde_window_size=1, sde_window_range=[0, 3])
    starts = [trainer.rollouts.windows.draw(generation).start for generation in range(12)]
    assert set(starts) == {0, 1, 2}
    assert starts == [trainer.rollouts.windows.draw(generation).start for generation in range(12)]
    trainer.train()


def test_each_update_of_a_rollout_gets_a_share_of_each_group(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        num_generations=4,
        per_device_train_batch_size=2,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
    )
    trainer.model.train()
    rows = [{"prompt": PROMPTS[0], "topic": 0}] * 4 + [{"prompt": PROMPTS[1], "topic": 1}] * 4
    trainer._prepare_inputs(rows)
    places = [batch.rows.tolist() for batch in trainer._buffered_inputs]
    assert places == [[0, 2], [4, 6], [1, 3], [5, 7]]


# ------------------------------------------------------------------------------------------------------- rewards


def test_reward_functions_get_columns_state_and_a_place_for_metrics(tmp_path: Path) -> None:
    seen = {}

    def curious(images, prompts, topic, trainer_state, log_metric, log_extra) -> list[float]:
        seen.update(number=len(images), topics=topic, prompts=prompts, step=trainer_state.global_step)
        log_metric("largest_topic", max(topic))
        return brightness(images)

    trainer = build(tmp_path, reward_funcs=curious, max_steps=1)
    trainer.train()
    assert seen["number"] == len(seen["prompts"]) == len(seen["topics"]) == 4 * 4
    assert all(PROMPTS[topic] == prompt for topic, prompt in zip(seen["topics"], seen["prompts"], strict=True))
    assert logged(trainer, "largest_topic") == [float(max(seen["topics"]))]


def test_several_rewards_are_weighted_and_logged(tmp_path: Path) -> None:
    def darkness(images: list[Image.Image], **columns: object) -> list[float]:
        return [1 - value for value in brightness(images)]

    trainer = build(tmp_path, reward_funcs=[brightness, darkness], reward_weights=[2.0, 0.5], max_steps=1)
    trainer.train()
    (bright,), (dark,), (total,) = (
        logged(trainer, name) for name in ("rewards/brightness/mean", "rewards/darkness/mean", "reward")
    )
    assert bright + dark == pytest.approx(1, abs=1e-5)
    assert total == pytest.approx(2 * bright + 0.5 * dark, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_reward_may_apply_to_some_prompts_only(aggregation: str, tmp_path: Path) -> None:
    def of_even_topics(images: list[Image.Image], topic: list[int], **columns: object) -> list[float | None]:
        return [value if number % 2 == 0 else None for value, number in zip(brightness(images), topic, strict=True)]

    trainer = build(
        tmp_path, reward_funcs=[brightness, of_even_topics], multi_objective_aggregation=aggregation,
        per_device_train_batch_size=12,
    )  # fmt: skip
    trainer.train()
    assert np.isfinite(logged(trainer, "loss")).all() and max(logged(trainer, "grad_norm")) > 0


@pytest.mark.parametrize("while_training", [True, False])
def test_a_failing_reward_stops_the_run_with_its_name(while_training: bool, tmp_path: Path) -> None:
    def broken(images: list[Image.Image], prompts: list[str], **columns: object) -> list[float]:
        raise OSError("no disk")

    trainer = build(tmp_path, reward_funcs=broken, eval_dataset=prompts())
    with pytest.raises(RewardError, match="'broken' raised OSError: no disk for row 0, prompt"):
        trainer.train() if while_training else trainer.evaluate()


@pytest.mark.parametrize("term", ["surrogate", "KL divergence"])
def test_a_loss_that_is_not_finite_is_explained(term: str, tmp_path: Path) -> None:
    """With the SDE step, the term and the largest ratio; the second of three steps is broken here."""
    trainer = build(tmp_path, bf16=False)
    velocity, calls = trainer.policy.velocity, []

    def broken(model: torch.nn.Module, *inputs: object) -> torch.Tensor:
        predicted = velocity(model, *inputs)
        is_reference = not torch.is_grad_enabled()
        if not trainer.rollouts.is_sampling and is_reference == (term == "KL divergence"):
            calls.append(None)
            return predicted * torch.nan if len(calls) == 2 else predicted
        return predicted

    generate, trainer.rollouts.is_sampling = trainer.rollouts.generate, False

    def sampling(*inputs: object) -> object:
        trainer.rollouts.is_sampling = True
        result = generate(*inputs)
        trainer.rollouts.is_sampling = False
        return result

    trainer.rollouts.generate, trainer.policy.velocity = sampling, broken
    message = rf"at update 0 is nan: the {term} of SDE step 1, where the largest probability ratio is (nan|1)\."
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


def test_diverged_weights_are_caught(tmp_path: Path) -> None:
    trainer = build(tmp_path, learning_rate=1e30, max_steps=3)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_reports_rewards_and_repeats_itself(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset=prompts(4), num_generations_eval=3, per_device_eval_batch_size=6)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert 0 < first["eval_reward"] < 1
    assert first["eval_reward"] == second["eval_reward"] == pytest.approx(first["eval_rewards/brightness/mean"])
    assert first["eval_num_scored_images"] == 4 * 3
    assert first["eval_nfe"] == 4 * 3 * 3


def test_every_image_of_an_evaluation_counts_once(tmp_path: Path) -> None:
    """Also where the last batch is smaller, or the number of prompts is no multiple of a batch."""
    seen: list[float] = []

    def recorded(images: list[Image.Image], **columns: object) -> list[float]:
        seen.extend(brightness(images))
        return seen[-len(images) :]

    for size in (3, 6, 9):
        trainer = build(
            tmp_path, reward_funcs=recorded, eval_dataset=prompts(4), num_generations_eval=3,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        seen.clear()
        metrics = trainer.evaluate()
        assert len(seen) == 12
        assert metrics["eval_reward"] == pytest.approx(np.mean(seen), rel=1e-6)
        assert metrics["eval_reward_std"] == pytest.approx(np.std(seen), rel=1e-4)


def test_rewards_for_evaluation_are_logged_and_change_nothing(tmp_path: Path) -> None:
    seen = []

    def held_out(images: list[Image.Image], **columns: object) -> list[float]:
        seen.append(len(images))
        return [10.0] * len(images)

    runs = []
    for functions in (None, held_out):
        arguments = config(
            tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, num_generations_eval=1
        )
        run = TPGRPOTrainer(
            tiny_sd3(), brightness, arguments, prompts(), prompts(4), peft_config=lora(),
            eval_reward_funcs=functions,
        )  # fmt: skip
        run.train()
        runs.append(run)
    assert seen == [4, 4]
    assert logged(runs[1], "eval_rewards/held_out/mean") == [10.0, 10.0]
    assert (
        logged(runs[0], "eval_reward")
        == logged(runs[1], "eval_reward")
        == logged(runs[1], "eval_rewards/brightness/mean")
    )
    assert_same(*map(trained, runs))
    assert not [name for entry in runs[1].state.log_history for name in entry if name.startswith("rewards/held_out")]


@pytest.mark.parametrize(
    ("given", "message"), [((brightness, prompts(4)), "different names"), ((len, None), "eval_dataset too")]
)
def test_wrong_rewards_for_evaluation_are_refused(given: tuple, message: str, tmp_path: Path) -> None:
    function, dataset = given
    with pytest.raises(ValueError, match=message):
        TPGRPOTrainer(
            tiny_sd3(),
            brightness,
            config(tmp_path),
            prompts(),
            dataset,
            peft_config=lora(),
            eval_reward_funcs=function,
        )


def test_datasets_of_a_dict_keep_their_names(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset={"few": prompts(2), "many": prompts(6)})
    metrics = trainer.evaluate()
    assert metrics["eval_few_reward"] != metrics["eval_many_reward"]
    assert "eval_reward" not in metrics


def test_evaluation_never_changes_training(tmp_path: Path) -> None:
    weights = []
    for strategy in ("no", "steps"):
        trainer = build(tmp_path, max_steps=3, eval_strategy=strategy, eval_steps=1, eval_dataset=prompts(4))
        trainer.train()
        weights.append(trained(trainer))
    assert_same(*weights)


def test_evaluation_before_training_does_not_change_it(tmp_path: Path) -> None:
    weights = []
    for evaluate_first in (False, True):
        trainer = build(tmp_path, eval_dataset=prompts(4))
        if evaluate_first:
            trainer.evaluate()
        trainer.train()
        weights.append(trained(trainer))
    assert_same(*weights)


# ------------------------------------------------------------------------------------------- saving and resuming


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_saved_adapter_gives_the_trained_model_to_any_pipeline(family, tmp_path: Path) -> None:
    trainer = build(tmp_path, family())
    trainer.train()
    trainer.save_model()
    options = {**SIZE, "num_inference_steps": 3, "guidance_scale": 2.0}

    def images(pipeline: DiffusionPipeline) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return pipeline(PROMPTS[:2], generator=generators, output_type="np", **options).images

    plain = family()
    untrained = images(plain)
    plain.load_lora_weights(tmp_path)
    assert np.array_equal(images(plain), images(trainer.policy.pipeline))
    assert not np.array_equal(images(plain), untrained)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_saved_transformer_loads_by_from_pretrained(tmp_path: Path) -> None:
    trainer = build(tmp_path, full=True, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    transformer = trainer.policy.pipeline.transformer
    loaded = type(transformer).from_pretrained(tmp_path, subfolder="transformer")
    assert_same(dict(transformer.state_dict()), dict(loaded.state_dict()))


def test_a_transformer_of_which_a_part_is_frozen_is_saved_whole(tmp_path: Path) -> None:
    trainer = build(tmp_path, full=True, learning_rate=1e-3, max_steps=1)
    trainer.policy.pipeline.transformer.transformer_blocks[0].requires_grad_(False)
    trainer.train()
    trainer.save_model()
    transformer = trainer.policy.pipeline.transformer
    loaded = type(transformer).from_pretrained(tmp_path, subfolder="transformer")
    assert_same(dict(transformer.state_dict()), dict(loaded.state_dict()))


CASES = {
    "between rollouts": {"save_steps": 2},
    "inside a rollout": {
        "steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "save_steps": 3,
    },
    "between the passes over a rollout": {"num_iterations": 2, "save_steps": 3},
    "in the second epoch": {"per_device_train_batch_size": 6, "save_steps": 3},
    "all weights": {"save_steps": 2, "full": True, "learning_rate": 1e-3},
    "after an epoch with a short update": {
        "per_device_train_batch_size": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 4, "save_steps": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_uninterrupted_one(case: str, tmp_path: Path) -> None:
    settings = {
        "max_steps": 5,
        "save_strategy": "steps",
        "sde_window_size": 1,
        "sde_window_range": [0, 3],
        **CASES[case],
    }
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    resumed = build(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{settings['save_steps']}"))
    assert_same(trained(whole), trained(resumed))
    assert logged(whole, "reward")[-1] == logged(resumed, "reward")[-1]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("pytorch_lora_weights.safetensors", "has no pytorch_lora_weights.safetensors"),
        ("optimizer.pt", "has no optimizer"),
        ("rollout_0.pt", "rollout_0.pt is missing"),
    ],
)
def test_resume_that_finds_too_little_is_an_error(lost: str, message: str, tmp_path: Path) -> None:
    settings = {
        "steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "max_steps": 3,
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    build(tmp_path, **settings).train()
    (tmp_path / "checkpoint-1" / lost).unlink()
    with pytest.raises(ValueError, match=f"{lost} is damaged: it is missing"):
        build(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / CHECKSUMS).unlink()  # which earlier versions did not write
    with pytest.raises(FileNotFoundError, match=message):
        build(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, eval_dataset=prompts(4), save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_reward"] == max(logged(trainer, "eval_reward"))


def test_model_card_has_the_hubs_metadata(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card(dataset_name="someone/prompts")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers"
    assert {"trl", "tp-grpo", "text-to-image", "lora"} <= set(card.data.tags)
    assert "load_lora_weights" in card.text and "2602.06422" in card.text


# ----------------------------------------------------------------------------------------------- the surroundings


@pytest.mark.parametrize("ci", [True, False])
def test_trainer_works_with_and_without_the_variable_ci(ci: bool, tmp_path: Path, monkeypatch) -> None:
    """TRL's telemetry fails on diffusers models, but not where CI is set."""
    monkeypatch.setenv("CI", "true") if ci else monkeypatch.delenv("CI", raising=False)
    build(tmp_path, max_steps=1).train()


def test_tensorboard_gets_the_metrics(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    build(tmp_path, max_steps=1, report_to="tensorboard").train()
    assert list((tmp_path / "runs").rglob("events.*"))


def test_eight_bit_optimizer_trains(tmp_path: Path) -> None:
    trainer = build(tmp_path, peft_config=lora(r=256), optim="adamw_bnb_8bit", max_steps=2)
    start = trained(trainer)
    trainer.train()
    states = trainer.optimizer.state.values()
    assert any(value.dtype == torch.uint8 for state in states for value in state.values() if torch.is_tensor(value))
    assert any(not torch.equal(start[name], value) for name, value in trained(trainer).items())


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    tiny_sd3().save_pretrained(tmp_path / "model")
    trainer = TPGRPOTrainer(
        str(tmp_path / "model"), brightness, config(tmp_path, max_steps=1), prompts(), peft_config=lora()
    )
    trainer.train()


def test_a_variant_of_a_folder_is_loaded_in_the_dtype_that_is_named(tmp_path: Path) -> None:
    tiny_sd3(dtype=torch.bfloat16).save_pretrained(tmp_path / "model", variant="bf16")
    named = {"variant": "bf16", "dtype": "float16"}
    trainer = TPGRPOTrainer(
        str(tmp_path / "model"), brightness, config(tmp_path, model_init_kwargs=named), prompts(), peft_config=lora()
    )
    assert trainer.policy.dtype == trainer.policy.pipeline.vae.dtype == torch.float16


def test_adapter_of_a_half_precision_model_is_in_float32(tmp_path: Path) -> None:
    trainer = build(tmp_path, tiny_sd3(dtype=torch.bfloat16), max_steps=1)
    trainer.train()
    assert {value.dtype for value in trained(trainer).values()} == {torch.float32}


def test_bf16_autocast_keeps_the_ratio_at_one(tmp_path: Path) -> None:
    trainer = build(tmp_path, bf16=True, per_device_rollout_batch_size=4, max_steps=1)
    trainer.train()
    assert logged(trainer, "ratio/max_deviation") == [0.0]


def test_training_twice_starts_again(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, max_steps=1, steps_per_generation=2, gradient_accumulation_steps=1, per_device_train_batch_size=2
    )
    trainer.train()
    trainer.train()
    assert trainer._step == 1


# ------------------------------------------------------------------------------------------------ what is refused


def renamed(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


WRONG_DATASETS = {
    "no prompt column": (renamed(text=PROMPTS), ValueError, r"train_dataset needs a column 'prompt', got \['text'\]"),
    "prompts of the wrong type": (
        renamed(prompt=[["a"], ["b"]]),
        ValueError,
        "the prompt of row 0 must be a string, got list",
    ),
    "empty": (renamed(prompt=[]), ValueError, "train_dataset is empty"),
    "too few prompts": (renamed(prompt=PROMPTS[:1]), ValueError, "has 1 prompts, but one rollout needs 2"),
    "reserved column": (renamed(prompt=PROMPTS, images=PROMPTS), ValueError, "has a column 'images'"),
    "streamed": (
        prompts().to_iterable_dataset(),
        TypeError,
        "train_dataset must be a datasets.Dataset, got IterableDataset",
    ),
    "several splits": (DatasetDict(train=prompts()), TypeError, "must be a datasets.Dataset, got DatasetDict"),
}


@pytest.mark.parametrize("case", WRONG_DATASETS)
def test_wrong_datasets_are_refused(case: str, tmp_path: Path) -> None:
    dataset, error, message = WRONG_DATASETS[case]
    with pytest.raises(error, match=message):
        build(tmp_path, train_dataset=dataset)


def test_training_without_a_dataset_is_refused(tmp_path: Path) -> None:
    trainer = TPGRPOTrainer(tiny_sd3(), brightness, config(tmp_path), peft_config=lora())
    with pytest.raises(ValueError, match="train_dataset is missing"):
        trainer.train()


def test_wrong_eval_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_strategy='steps' needs an eval_dataset"):
        build(tmp_path, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="easy needs a column 'prompt'"):
        build(tmp_path, eval_dataset={"easy": renamed(text=PROMPTS)})


@pytest.mark.parametrize(
    ("peft_config", "error", "message"),
    [
        (lora(lora_dropout=0.1), ValueError, "lora_dropout must be 0, got 0.1"),
        (
            lora(task_type="CAUSAL_LM"),
            ValueError,
            "task_type must be None, got .CAUSAL_LM.: it is for language models",
        ),
        ("lora", TypeError, "peft_config must be a peft.LoraConfig, got str"),
        (lora(target_modules=["nothing_like_it"]), ValueError, "nothing_like_it"),
        (
            lora(init_lora_weights="pissa"),
            ValueError,
            "init_lora_weights must be True, False or 'gaussian', got 'pissa'",
        ),
        (lora(bias="lora_only"), ValueError, "bias must be 'none'"),
        (lora(modules_to_save=["proj_out"]), ValueError, "modules_to_save must be None"),
    ],
)
def test_wrong_adapters_are_refused(peft_config: object, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path, peft_config=peft_config)


def unconditional() -> DiffusionPipeline:
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    return DDPMPipeline(unet, DDPMScheduler())


def test_wrong_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DDPMPipeline is not supported.*StableDiffusion3Pipeline, FluxPipeline"):
        build(tmp_path, unconditional())
    with pytest.raises(TypeError, match="must be a Hub id, a folder or a diffusers pipeline, got"):
        build(tmp_path, tiny_sd3().transformer)
    with pytest.raises(ValueError, match="height must be a multiple of 8 for this pipeline, got 20"):
        build(tmp_path, height=20)
    with pytest.raises(ValueError, match="in their dtype, and the precision of torch.bfloat16 is too low"):
        build(tmp_path, tiny_sd3(dtype=torch.bfloat16), full=True)
    with pytest.raises(ValueError, match="model_init_kwargs needs a model given by name"):
        build(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(OSError, match="nowhere"):
        TPGRPOTrainer(str(tmp_path / "nowhere"), brightness, config(tmp_path), prompts())


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [([], ValueError, "reward_funcs is empty"), ("clip", TypeError, "must be callables, got 'clip'")],
)
def test_wrong_rewards_are_refused(functions: object, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path, reward_funcs=functions)


def test_a_reward_that_cannot_take_the_columns_is_refused_before_sampling(tmp_path: Path) -> None:
    def narrow(images: list[Image.Image], prompts: list[str]) -> list[float]:
        raise AssertionError("never called")

    with pytest.raises(TypeError, match="'narrow' cannot be called with .*'topic'.*add \\*\\*columns"):
        build(tmp_path, reward_funcs=narrow)


def test_a_pipeline_with_an_adapter_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1)
    trainer.save_model()
    with pytest.raises(ValueError, match="already has an adapter"):
        build(tmp_path, trainer.policy.pipeline)
    pipeline = tiny_sd3()
    pipeline.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="already has an adapter"):
        build(tmp_path, pipeline)


def test_an_optimizer_that_would_train_nothing_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_sd3()
    optimizer = torch.optim.SGD(pipeline.transformer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter of the optimizer is trained"):
        TPGRPOTrainer(
            pipeline, brightness, config(tmp_path), prompts(), peft_config=lora(), optimizers=(optimizer, None)
        )


def test_other_schedulers_are_refused(tmp_path: Path) -> None:
    pipeline = tiny_sd3()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="must be a FlowMatchEulerDiscreteScheduler, got FlowMatchHeun"):
        build(tmp_path, pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="option stochastic_sampling is not supported"):
        build(tmp_path, pipeline)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (tiny_sd3, {"true_cfg_scale": 4.0}, "true_cfg_scale has no effect on this"),
        (
            tiny_sd3,
            {"negative_prompt": "blur", "guidance_scale": 1.0},
            "negative_prompt has no effect without guidance",
        ),
        (tiny_sd3, {"height": 512}, "height must be at most [0-9]+ for this pipeline, .* got 512"),
        (tiny_flux, {"true_cfg_scale": 4.0}, "have an effect only together"),
        (tiny_flux, {"negative_prompt": "blur"}, "have an effect only together"),
    ],
)
def test_guidance_and_sizes_that_cannot_work_are_refused(family, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, family(), **changes)


def test_wrong_reward_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1 reward functions"):
        build(tmp_path, reward_weights=[1.0, 2.0])
