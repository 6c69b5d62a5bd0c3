"""Guard rails: planted collapses are caught within three updates, healthy runs raise no warning, actions act."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trainer import assert_same, brightness, build, config, logged, prompts, trained
from tiny import tiny_sd3

from trl_tpgrpo import GuardRails, TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.callbacks import guard_rails as module
from trl_tpgrpo.callbacks.guard_rails import MOST_SKIPPED, GuardRailError
from trl_tpgrpo.rewards import RewardFunc
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


def redness(images: list, **columns: object) -> list[float]:
    """The quick start's reward, which is hacked within some updates."""
    pixels = [np.asarray(image, float) for image in images]
    return [float(pixel[..., 0].sum() / (pixel.sum() + 1)) for pixel in pixels]


def on_testbed(
    output_dir: Path, adapter: bool, reward: RewardFunc = shapes_reward, **changes: object
) -> TPGRPOTrainer:
    """The demo's run, on half as many images."""
    settings = {
        "use_cpu": True, **PIPELINE_KWARGS, "guidance_scale": 1.0, "num_inference_steps": 8, "sde_window_size": 3,
        "num_generations": 4, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
        "sde_type": "flow_sde", "epsilon": 1e-3, "beta": 0.0, "learning_rate": 1e-4, "ema_decay": None,
        "activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "seed": 0, **changes,
    }  # fmt: skip
    return TPGRPOTrainer(
        model=TESTBED,
        reward_funcs=reward,
        args=TPGRPOConfig(str(output_dir), **settings),
        train_dataset=prompt_dataset("train"),
        peft_config=LoraConfig(r=32, lora_alpha=64) if adapter else None,
    )


TWO_UPDATES = {"per_device_train_batch_size": 16, "steps_per_generation": 2}
COLLAPSES = {
    "all weights, nothing to see but rewards": {"adapter": False, "learning_rate": 1e-2},
    "all weights, two updates a rollout": {"adapter": False, "learning_rate": 1e-2, "beta": 1e-3, **TWO_UPDATES},
    "an adapter under the paper's SDE": {
        "adapter": True, "learning_rate": 1e-1, "beta": 4e-4, "sde_type": "cps", "epsilon": 1e-5, **TWO_UPDATES,
    },
}  # fmt: skip
HEALTHY = {
    "all weights": {"adapter": False, "beta": 1e-3},
    "an adapter under the paper's SDE": {
        "adapter": True, "learning_rate": 3e-4, "beta": 4e-4, "sde_type": "cps", "epsilon": 1e-5,
        "sde_window_size": 7, **TWO_UPDATES,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", COLLAPSES)
def test_a_planted_collapse_is_caught_within_three_updates(case: str, tmp_path: Path, caplog) -> None:
    trainer = on_testbed(tmp_path, max_steps=3, **COLLAPSES[case])
    with caplog.at_level(logging.WARNING, module.__name__):
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert any("reward has fallen" in warning or "one side of 1" in warning for warning in warnings)
    assert all("ower learning_rate" in warning for warning in warnings)
    raised = {name for entry in trainer.state.log_history for name in entry if name.startswith("guard_rails/")}
    assert raised and len(raised) == len(warnings)


def test_a_reward_that_all_images_satisfy_is_noticed(tmp_path: Path, caplog) -> None:
    """The quick start's, at a higher learning rate: pictures turn red whatever the prompt."""
    trainer = on_testbed(tmp_path, True, redness, learning_rate=1e-2, max_steps=12)
    with caplog.at_level(logging.WARNING, module.__name__):
        trainer.train()
    spreads, rewards = logged(trainer, "reward_group_std"), logged(trainer, "reward")
    assert spreads[-1] < 0.005 < spreads[0]
    assert rewards[-1] > rewards[0] + 0.1
    assert "all images get similar rewards. Look at them" in caplog.text
    assert logged(trainer, "guard_rails/solved_or_hacked")


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_raises_no_warning(case: str, tmp_path: Path, caplog) -> None:
    trainer = on_testbed(tmp_path, max_steps=6, **HEALTHY[case])
    with caplog.at_level(logging.WARNING, module.__name__):
        trainer.train()
    assert not [record for record in caplog.records if record.name == module.__name__]
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("guard_rails/")]
    assert not math.isnan(logged(trainer, "image_variety")[0])


# The actions


def run_into(action: str, output_dir: Path, **changes: object) -> tuple[TPGRPOTrainer, dict[str, torch.Tensor]]:
    """Build a trainer whose every update is a problem (no distance from the reference will do); give its weights."""
    trainer = TPGRPOTrainer(
        model=tiny_sd3(),
        reward_funcs=brightness,
        args=config(output_dir, **changes),
        train_dataset=prompts(),
        peft_config=LoraConfig(r=4, lora_alpha=8),
        callbacks=[GuardRails(action, max_reference_drift=-1.0)],
    )
    return trainer, trained(trainer)


def test_stop_raises_before_the_update(tmp_path: Path) -> None:
    trainer, before = run_into("stop", tmp_path)
    with pytest.raises(GuardRailError, match="After update 0: the predicted velocity differs .* Lower learning_rate"):
        trainer.train()
    assert_same(before, trained(trainer))


def test_skip_leaves_the_weights_to_the_bit_and_ends_a_run_that_gets_nowhere(tmp_path: Path) -> None:
    trainer, before = run_into("skip", tmp_path, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert_same(before, trained(trainer))
    trainer, _ = run_into("skip", tmp_path, max_steps=MOST_SKIPPED + 2)
    with pytest.raises(
        GuardRailError, match=f"{MOST_SKIPPED} updates in a row were skipped. The last problem: the predicted"
    ):
        trainer.train()
    assert trainer.state.global_step == MOST_SKIPPED


def test_warn_changes_nothing_and_says_it_once(tmp_path: Path, caplog) -> None:
    trainer, _ = run_into("warn", tmp_path, max_steps=3)
    with caplog.at_level(logging.WARNING, module.__name__):
        trainer.train()
    assert len([record for record in caplog.records if record.name == module.__name__]) == 1
    assert logged(trainer, "guard_rails/reference_drift") == [1.0, 1.0, 1.0]
    off = build(tmp_path, guard_rails="off", max_steps=3)
    assert off.guard_rails is None
    off.train()
    assert_same(trained(trainer), trained(off))


def test_what_is_remembered_survives_a_resume(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    resumed = build(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert len(whole.guard_rails.grad_norms) == 4
    assert resumed.guard_rails.state_dict() == whole.guard_rails.state_dict()


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    before = trained(trainer)
    next(value for value in trainer.model.parameters() if value.requires_grad).register_hook(
        lambda grad: grad * math.nan
    )
    with pytest.raises(
        FloatingPointError,
        match="gradient's norm at update 0 is nan, with a finite loss. The weights were not updated",
    ):
        trainer.train()
    assert_same(before, trained(trainer))


def test_unknown_actions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="action must be one of .* got 'shout'"):
        GuardRails("shout")
    with pytest.raises(ValueError, match="guard_rails must be one of .* got 'shout'"):
        config(tmp_path, guard_rails="shout")


# The checks one by one

HEALTHY_UPDATE = {
    "ratio/max_deviation": 2e-4,
    "ratio/frac_above_one": 0.55,
    "reference_drift": 0.01,
    "grad_norm": 0.02,
    "is_on_policy": 0.0,
}
HEALTHY_ROLLOUT = {
    "reward": 0.5,
    "reward_std": 0.3,
    "reward_group_std": 0.25,
    "frac_reward_zero_std": 0.2,
    "image_variety": 0.07,
}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"is_on_policy": 1.0}, ["on_policy_ratio"]),
        ({"is_on_policy": 1.0, "ratio/max_deviation": 1e-7, "ratio/frac_above_one": 0.99}, []),
        ({"ratio/frac_above_one": 0.05}, ["one_sided_ratio"]),
        ({"ratio/frac_above_one": 0.95}, ["one_sided_ratio"]),
        ({"reference_drift": 0.26}, ["reference_drift"]),
        ({"grad_norm": 0.21}, ["grad_norm"]),
    ],
)
def test_problems_of_an_update(changes: dict[str, float], names: list[str], tmp_path: Path) -> None:
    args, guard = TPGRPOConfig(str(tmp_path), use_cpu=True), GuardRails()
    for _ in range(3):
        assert not list(guard.problems_of_update(HEALTHY_UPDATE, args))
    assert [problem.name for problem in guard.problems_of_update({**HEALTHY_UPDATE, **changes}, args)] == names


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"reward": 0.21}, []),
        ({"reward": 0.19}, ["reward_drop"]),
        ({"frac_reward_zero_std": 0.85}, ["zero_spread"]),
        ({"reward_group_std": 0.02, "reward": 0.6}, ["solved_or_hacked"]),
        ({"reward_group_std": 0.02, "reward": 0.4}, []),
        ({"reward_group_std": 0.03, "reward": 0.6}, []),
        ({"image_variety": 0.017}, ["image_variety"]),
        ({"image_variety": math.nan}, []),
    ],
)
def test_problems_of_a_rollout(changes: dict[str, float], names: list[str], tmp_path: Path) -> None:
    args, guard = TPGRPOConfig(str(tmp_path), use_cpu=True), GuardRails()
    assert args.prompts_per_generation == 48
    for _ in range(3):
        assert not list(guard.problems_of_rollout(HEALTHY_ROLLOUT, args))
    assert not list(guard.problems_of_rollout({}, args))  # a second update on the same rollout
    assert [problem.name for problem in guard.problems_of_rollout({**HEALTHY_ROLLOUT, **changes}, args)] == names


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        (
            {"reward": 1e8, "reward_group_std": 0.0, "frac_reward_zero_std": 1.0},
            "nothing_trained",
            "numbers is 8: if",
        ),
        ({"reward_group_std": 0.0, "frac_reward_zero_std": 1.0}, "nothing_trained", "All images of a prompt have"),
        ({}, "nothing_trained", "differ by 0.25 (standard deviation), but each step has equal credit"),
        (
            {"reward": 1e8, "reward_group_std": 40.0, "advantages/frac_zero": 0.1},
            "reward_offset",
            "numbers is 8 at",
        ),
        ({"reward": 1e8, "reward_group_std": 90.0, "advantages/frac_zero": 0.1}, None, ""),
        ({"reward": 9e2, "reward_group_std": 1e-4, "advantages/frac_zero": 0.1}, None, ""),  # credit knows no less
    ],
)
def test_why_nothing_is_trained(changes: dict[str, float], name: str | None, reason: str, tmp_path: Path) -> None:
    args = TPGRPOConfig(str(tmp_path), use_cpu=True)
    problems = list(
        GuardRails().problems_of_rollout({**HEALTHY_ROLLOUT, "advantages/frac_zero": 1.0, **changes}, args)
    )
    assert [problem.name for problem in problems] == ([name] if name else [])
    assert not name or reason in problems[0].message


def no_credit(rewards: torch.Tensor, rule: object) -> torch.Tensor:
    return torch.zeros_like(rewards[:, 1:])


def test_a_run_that_trains_nothing_says_so(tmp_path: Path, caplog) -> None:
    """Four rollouts of two groups, whose differences an offset swallows, or a rule gives no credit."""

    def far_away(images, **columns) -> list[float]:
        return [1e8 + value for value in brightness(images)]

    for folder, reward, changes, reason in (
        ("offset", far_away, {"beta": 0.0}, "nothing is trained. The rewards are about 1e"),
        ("credit", brightness, {"credit": no_credit}, "trained except by the KL divergence. The rewards of a"),
    ):
        caplog.clear()
        trainer = TPGRPOTrainer(tiny_sd3(), reward, config(tmp_path / folder, max_steps=4, **changes), prompts())
        with caplog.at_level(logging.WARNING, module.__name__):
            trainer.train()
        assert reason in caplog.text
        assert logged(trainer, "guard_rails/nothing_trained") == [1.0]
        assert trainer.guard_rails.state_dict()["num_idle"] == 8


def test_rewards_of_few_prompts_say_nothing_about_the_policy(tmp_path: Path) -> None:
    args, guard = config(tmp_path), GuardRails()
    assert args.prompts_per_generation < module.FEWEST_PROMPTS
    assert not list(guard.problems_of_rollout(HEALTHY_ROLLOUT, args))
    assert not list(guard.problems_of_rollout({**HEALTHY_ROLLOUT, "reward": 0.0, "frac_reward_zero_std": 1.0}, args))


def evaluation(trained_on: float, held_out: float) -> dict[str, float]:
    """Of 100 images with a spread of 0.5, whose standard error is 0.05."""
    return {
        "eval_reward": trained_on, "eval_reward_std": 0.5, "eval_rewards/held_out/mean": held_out,
        "eval_rewards/held_out/std": 0.5, "eval_num_scored_images": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rise", "fall", "hacked"),
    [(0.2, 0.2, True), (0.2, 0.1, False), (0.1, 0.2, False), (-0.2, 0.2, False), (0.2, -0.2, False)],
)
def test_hacking_is_a_trained_reward_that_rises_while_a_held_out_one_falls(
    rise: float, fall: float, hacked: bool
) -> None:
    guard = GuardRails()
    guard.held_out = ["held_out"]
    assert not list(guard.problems_of_evaluation(evaluation(0.5, 0.5)))
    problems = list(guard.problems_of_evaluation(evaluation(0.5 + rise, 0.5 - fall)))
    assert [problem.name for problem in problems] == (["reward_hacking"] if hacked else [])


def test_hacking_is_seen_in_a_run(tmp_path: Path, caplog) -> None:
    """The trained reward counts evaluations up, the held-out one down; of two datasets with metrics of their own."""
    calls = []

    def rising(images, **columns) -> list[float]:
        return [len(calls) + value for value in brightness(images)]

    def falling(images, **columns) -> list[float]:
        calls.append(len(images))
        return [-len(calls) + value for value in brightness(images)]

    trainer = TPGRPOTrainer(
        model=tiny_sd3(),
        reward_funcs=rising,
        eval_reward_funcs=falling,
        args=config(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2, num_generations_eval=2),
        train_dataset=prompts(),
        eval_dataset={
            "some": prompts(4),
            "others": Dataset.from_dict({"prompt": ["a red circle"] * 2, "topic": [0, 1]}),
        },
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    with caplog.at_level(logging.WARNING, module.__name__):
        trainer.train()
    assert set(trainer.guard_rails.first_evaluations) == {"eval_some", "eval_others"}
    assert any("falling, which is not trained on, has fallen by" in record.getMessage() for record in caplog.records)
