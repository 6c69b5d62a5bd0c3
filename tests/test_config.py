"""The config: the paper's defaults, what describes them, GRPO's batch rules, and what is refused."""

import ast
import inspect
import re

import pytest
from transformers import HfArgumentParser
from transformers.trainer_utils import SchedulerType

from trl_tpgrpo import TPGRPOConfig
from trl_tpgrpo.algorithm.completion import CompletionRule
from trl_tpgrpo.algorithm.credit import CreditRule
from trl_tpgrpo.algorithm.rollout import Window
from trl_tpgrpo.policies.sd3 import SD3Policy


def config(**changes: object) -> TPGRPOConfig:
    return TPGRPOConfig("unused", use_cpu=True, **changes)


def test_defaults_are_the_published_method() -> None:
    defaults = TPGRPOConfig("unused")
    expected = {
        "height": 512,
        "width": 512,
        "num_inference_steps": 10,
        "num_inference_steps_eval": 40,
        "num_generations": 24,
        "generation_batch_size": 48 * 24,
        "num_iterations": 1,
        "sde_type": "cps",
        "noise_level": 0.7,
        "num_sde_steps": 9,
        "log_prob_type": "squared_error",
        "learning_rate": 3e-4,
        "weight_decay": 1e-4,
        "lr_scheduler_type": SchedulerType.CONSTANT,
        "epsilon": 1e-5,
        "epsilon_high": 1e-5,
        "beta": 4e-4,
    }
    assert {name: getattr(defaults, name) for name in expected} == expected
    assert defaults.guidance_scale is None and SD3Policy.default_guidance == {"guidance_scale": 4.5}
    assert defaults.optim.value.startswith("adamw")
    assert defaults.steps_per_generation == 2 * defaults.gradient_accumulation_steps  # two updates per rollout
    assert list(defaults.window_starts) == [0]
    assert defaults.window(0, 9) == Window(0, 9, "cps", 0.7, "squared_error")
    assert defaults.credit_rule == CreditRule(
        credit="consistent",
        lambda_=0.0,
        trend="remaining",
        first_step=True,
        deadzone=0.0,
        balanced=True,
        baseline="group",
        scale="group",
        scope="step",
        aggregation="sum_then_normalize",
    )


def test_each_field_is_described_in_order_and_with_its_default() -> None:
    parameters = re.findall(r"^ {4}(\w+) \((.+?)\): \w*", inspect.cleandoc(TPGRPOConfig.__doc__), re.MULTILINE)
    own_fields = [name for name in inspect.get_annotations(TPGRPOConfig) if not name.startswith("_")]
    assert [name for name, _ in parameters] == own_fields
    for name, kind in parameters:
        default = re.search(r"defaults to `(.+)`$", kind)
        assert getattr(TPGRPOConfig, name) == (ast.literal_eval(default[1]) if default else None), name


def test_help_shows_descriptions_and_choices() -> None:
    actions = {action.dest: action for action in HfArgumentParser(TPGRPOConfig)._actions}
    assert actions["height"].help == "Height of the images in pixels."
    assert "see trl_tpgrpo.algorithm.sde.transition." in actions["sde_type"].help
    assert actions["sde_type"].choices == ("flow_sde", "cps", "dance_sde")
    assert all(actions[name].help for name in inspect.get_annotations(TPGRPOConfig) if name in actions)


@pytest.mark.parametrize(
    ("changes", "batch", "steps", "accumulation"),
    [
        ({}, 1152, 128, 64),
        ({"num_generations": 4}, 192, 192 // 9, None),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}, 24, 3, 3),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 6}, 48, 6, 3),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 3}, 24, 3, 3),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 48}, 48, 6, 3),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 48, "gradient_accumulation_steps": 2}, 48, 6, 2),
        ({"per_device_train_batch_size": 12, "steps_per_generation": 2, "gradient_accumulation_steps": 4}, 24, 2, 4),
    ],
)
def test_batch_sizes(changes: dict, batch: int, steps: int, accumulation: int | None) -> None:
    if accumulation is None:  # 192 images are no multiple of 9
        with pytest.raises(ValueError, match="generation_batch_size"):
            config(**changes)
        return
    made = config(**changes)
    assert (made.generation_batch_size, made.steps_per_generation, made.gradient_accumulation_steps) == (
        batch,
        steps,
        accumulation,
    )


def test_window_of_given_size_starts_at_the_first_step() -> None:
    assert list(config(sde_window_size=3).window_starts) == [0]


def test_window_in_a_longer_range_may_start_anywhere_in_it() -> None:
    made = config(sde_window_size=2, sde_window_range=[1, 5])
    assert list(made.window_starts) == [1, 2, 3]
    assert (made.window(3, 5).start, made.window(3, 5).stop) == (3, 5)


def test_range_without_size_is_the_window() -> None:
    made = config(sde_window_range=[2, 5])
    assert (made.num_sde_steps, list(made.window_starts)) == (3, [2])


@pytest.mark.parametrize(("given", "meant"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_grpos_booleans(given: object, meant: str) -> None:
    assert config(scale_rewards=given).scale_rewards == meant


@pytest.mark.parametrize("sde_type", ["flow_sde", "dance_sde"])
def test_other_sdes_use_the_density(sde_type: str) -> None:
    assert config(sde_type=sde_type).log_prob_type == "gaussian"


WRONG = [
    ({"sde_type": "ddim"}, "sde_type must be one of"),
    ({"log_prob_type": "laplace"}, "log_prob_type must be one of"),
    ({"credit": "turning"}, "credit must be one of"),
    ({"turning_point_trend": "local"}, "turning_point_trend must be one of"),
    ({"advantage_baseline": "mean"}, "advantage_baseline must be one of"),
    ({"scale_rewards": "std"}, "scale_rewards must be one of"),
    ({"advantage_scope": "all"}, "advantage_scope must be one of"),
    ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation must be one of"),
    ({"noise_level": 0.0}, "noise_level must be at least 0.0001"),
    ({"noise_level": 1.2}, "at most 1 under cps"),
    ({"noise_level": 1e-9}, "noise_level must be at least 0.0001, got 1e-09"),  # which float32 would round away
    ({"noise_level": [0.7] * 8 + [1e-5]}, "noise_level must be at least 0.0001"),
    ({"num_inference_steps": 1}, "num_inference_steps must be at least 2"),
    ({"num_inference_steps_eval": 0}, "num_inference_steps_eval must be at least 1"),
    ({"height": 0}, "height must be at least 1"),
    ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
    ({"height": None}, r"height must be an integer \(at least 1\), got None"),
    ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, or None, got 1.0"),
    ({"beta": float("nan")}, r"beta must be a finite number \(at least 0\), got nan"),
    ({"guard_rails": "raise"}, "guard_rails must be one of"),
    ({"quantization": "int4"}, "quantization must be one of"),
    ({"max_sequence_length": -1}, "max_sequence_length must be at least 0"),
    ({"per_device_rollout_batch_size": 0}, "per_device_rollout_batch_size must be at least 1"),
    (
        {"per_device_rollout_batch_size": "many"},
        "per_device_rollout_batch_size must be at least 1, or 'auto', got many",
    ),
    ({"completion": "heun_4"}, "completion must be 'exact', 'at_P_Q_...'"),
    ({"completion": "at_3_10"}, "step 10 is not between 1 and 9"),
    ({"completion": "at_0_3"}, "step 0 is not between 1 and 9"),
    ({"completion_check_every": 0}, "completion_check_every must be at least 1"),
    ({"completion": "euler_4", "credit": "outcome"}, "credit='outcome' uses no completions: leave out completion"),
    ({"completion_check_every": 2, "credit": "outcome"}, "credit='outcome' uses no completions"),
    ({"sde_window_share": 0.0}, "sde_window_share must be above 0 and at most 1, or None, got 0.0"),
    ({"sde_window_share": 1.1}, "sde_window_share must be above 0 and at most 1"),
    ({"sde_window_share": 0.9, "sde_window_size": 3}, r"leave out sde_window_size \(3\)"),
    ({"sde_window_range": [0, 10]}, "the last of the num_inference_steps=10 steps is never"),
    ({"sde_window_range": [3, 3]}, "0 <= start < stop"),
    ({"sde_window_range": [1]}, r"sde_window_range must be \[start, stop\]"),
    ({"sde_window_size": 10}, "sde_window_size must be between 1 and 9"),
    ({"sde_window_size": 0}, "sde_window_size must be between 1 and 9"),
    ({"credit": "lambda"}, r"credit_lambda \(None\) is for credit='lambda', which needs it"),
    ({"credit": "lambda", "credit_lambda": 1.5}, "credit_lambda must be at least 0 and at most 1, or None, got 1.5"),
    ({"credit_lambda": 0.5}, r"credit_lambda \(0.5\) is for credit='lambda', which needs it; credit='consistent'"),
    ({"turning_point_deadzone": -0.1}, "turning_point_deadzone must be at least 0"),
    ({"credit": "outcome", "advantage_baseline": "completion"}, "leave out advantage_baseline"),
    ({"num_generations": 1, "gradient_accumulation_steps": 1}, "needs advantage_baseline='completion'"),
    (
        {"num_generations": 1, "gradient_accumulation_steps": 1, "advantage_baseline": "completion"},
        "and scale_rewards='batch' or 'none'",
    ),
    (
        {"num_generations": 0, "num_generations_eval": 1, "gradient_accumulation_steps": 1},
        "num_generations must be at least 1",
    ),
    ({"generation_batch_size": 48, "steps_per_generation": 2}, "set one of them"),
    (
        {
            "per_device_train_batch_size": 24,
            "steps_per_generation": 2,
            "gradient_accumulation_steps": 4,
            "num_iterations": 3,
        },
        "so that updates and rollouts end together",
    ),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
    ({"steps_per_generation": 0}, "steps_per_generation must be at least 1"),
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1"),
    ({"generation_batch_size": -24}, "generation_batch_size must be at least 1"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1"),
    ({"generation_batch_size": 48}, r"must be a multiple of per_device_train_batch_size x processes \(9\)"),
    ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}, "must be a multiple of num_generations"),
    (
        {"per_device_train_batch_size": 24, "steps_per_generation": 4, "gradient_accumulation_steps": 3},
        "so that updates and rollouts end together",
    ),
    (
        {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3, "num_generations_eval": 2},
        "must be a multiple of num_generations_eval",
    ),
    (
        {
            "num_generations": 1,
            "gradient_accumulation_steps": 1,
            "advantage_baseline": "completion",
            "scale_rewards": "batch",
            "completion": "exact_from_1",
        },
        "a completion of the first latent",
    ),
    ({"advantage_baseline": "fitted", "credit": "outcome"}, "leave out advantage_baseline, got 'fitted'"),
    ({"transition_share": 1.0, "beta": 0.0}, "transition_share must be above 0 and below 1, or None, got 1.0"),
    ({"transition_share": 0.5}, "transition_share=0.5 needs beta=0, got 0.0004"),
    ({"step_weights": [1.0, 2.0]}, r"step_weights must be 9 numbers, one for each SDE step, got \[1.0, 2.0\]"),
    ({"step_weights": [1.0, 0.0], "sde_window_size": 2}, "step_weights must be above 0, or None, got"),
    ({"step_weights": [1.0] * 9, "sde_window_share": 0.9}, "sde_window_share measures the number of steps"),
    ({"beta": -1.0}, "beta must be at least 0"),
    ({"num_iterations": 0}, "num_iterations must be at least 1"),
    ({"epsilon": 0.0}, "epsilon must be above 0"),
    ({"epsilon_high": -1e-4}, "epsilon_high must be above 0"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),
    ({"use_liger_kernel": True}, "use_liger_kernel is not supported"),
    ({"neftune_noise_alpha": 0.1}, "neftune_noise_alpha is not supported"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_wrong_settings_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_batch_size_of_the_command_line_is_a_number() -> None:
    assert config(per_device_rollout_batch_size="64").rollout_batch_size == 64
    assert config(per_device_rollout_batch_size="auto").rollout_batch_size is None


def test_a_shared_noise_needs_whole_groups_on_each_process(monkeypatch) -> None:
    monkeypatch.setattr(TPGRPOConfig, "world_size", 2)
    sizes = {"num_generations": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match=r"share_initial_noise: 4 images .* no whole groups of num_generations \(8\)"):
        config(share_initial_noise=True, **sizes)
    assert config(share_initial_noise=False, **sizes).generation_batch_size == 8


def test_completions_of_the_paper_are_exact_and_those_of_flow_grpo_none() -> None:
    assert config().completion_rule == CompletionRule()
    assert config(credit="outcome").completion_rule is None
    assert config(completion="ab2_4_every_2").completion_rule == CompletionRule(4, None, True, 2)


def test_groups_of_one_are_legal_with_the_completion_baseline() -> None:
    made = config(
        num_generations=1, advantage_baseline="completion", scale_rewards="batch", gradient_accumulation_steps=1
    )
    assert made.num_generations == 1
