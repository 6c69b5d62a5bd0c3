"""What values settings take: any wrong one is refused by name, and no honest one is."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from trl_tpgrpo import TPGRPOConfig
from trl_tpgrpo.commands.options import read_recipes
from trl_tpgrpo.config.values import all_limits


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import fuzz  # noqa: E402


HOSTILE = [None, -1, 10**400, math.nan, "x", "{", b"x", [None], {1: 2}, np.array([])]
RECIPES = sorted((Path(__file__).parents[1] / "examples/recipes").glob("*.yaml"))


def test_a_wrong_value_of_any_field_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ends = {(name, str(value)[:20]): end for name in fuzz.FIELDS for value, end in fuzz.in_python(name, HOSTILE)}
    assert not {attempt: end for attempt, end in ends.items() if end not in fuzz.ENDS}
    assert all(end == "refused by name" for (_, value), end in ends.items() if value in ("b'x'", "[None]", "{1: 2}"))
    assert len(ends) > 1500 and 0.05 < sum(end == "accepted" for end in ends.values()) / len(ends) < 0.15


def test_a_wrong_option_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["", "nan", "-1", "{", "1 2"]
    ends = {(name, value): end for name in fuzz.FIELDS[::6] for value, end in fuzz.on_the_command_line(name, words)}
    assert not {attempt: end for attempt, end in ends.items() if end not in fuzz.ENDS}
    assert sum(end == "refused by name" for end in ends.values()) > 0.5 * len(ends)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("height", "512", "height must be an integer (at least 1), got '512'."),
        ("learning_rate", "1e-4", "learning_rate must be a finite number (at least 0), got '1e-4'."),
        ("learning_rate", math.inf, "learning_rate must be a finite number (at least 0), got inf."),
        (
            "reward_weights",
            [1, None],
            "reward_weights must be a list, each a finite number or None, got [1, None].",
        ),
        ("sde_type", None, "sde_type must be one of ('flow_sde', 'cps', 'dance_sde'), got None."),
        ("adam_beta1", 1.0, "adam_beta1 must be at least 0 and below 1, got 1.0."),
        ("eval_strategy", "step", "eval_strategy must be one of ('no', 'steps', 'epoch'), got 'step'."),
        ("bf16", "yes", "bf16 must be True or False or None, got 'yes'."),
        ("accelerator_config", {"split": 1}, "unexpected keyword argument 'split'"),
        ("fsdp_config", "no/such.json", "fsdp_config must be a dict in JSON, or a file of it: [Errno 2] No such file"),
        (
            "lr_scheduler_kwargs",
            "cosine",
            "lr_scheduler_kwargs must be a dict, or one in JSON: it does not start with",
        ),
        ("hub_token", 5, "hub_token must be a string or None, got something of the type int."),
        ("model_init_kwargs", [("token", "hf_x")], "dict or a string or None, got something of the type list."),
        ("derived", {"heigth": 1}, "derived names no settings: ['heigth']"),
    ],
)
def test_a_message_says_what_would_be_right(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        TPGRPOConfig("unused", use_cpu=True, **{name: value})
    assert message in str(raised.value)


def half(rewards: torch.Tensor, rule: object) -> torch.Tensor:
    return rewards[:, 1:] / 2


HONEST = {
    "accelerator_config": [AcceleratorConfig(), {"even_batches": False}, '{"non_blocking": true}', Path("own.json")],
    "bf16": [True, False, None, np.bool_(False)],
    "credit": ["outcome", half, "test_config_values.half"],
    "debug": ["", "underflow_overflow", [DebugOption.UNDERFLOW_OVERFLOW], [], None],
    "deepspeed": [None, {}],
    "disable_tqdm": [True, None],
    "epsilon": [1, 1e-5, math.inf],
    "eval_strategy": ["epoch", IntervalStrategy.STEPS, "no"],
    "fsdp": [None, "", False, []],
    "gradient_checkpointing_kwargs": [{"use_reentrant": False}, '{"use_reentrant": false}'],
    "hub_strategy": ["checkpoint", HubStrategy.END],
    "include_num_input_tokens_seen": [False, "no"],
    "learning_rate": [0, 1, np.float32(1e-4), np.float64(1e-4)],
    "log_level": ["info"],
    "logging_steps": [5, 5.0, 0.1],
    "lr_scheduler_kwargs": [{"num_cycles": 2}, '{"num_cycles": 2}'],
    "lr_scheduler_type": ["cosine", SchedulerType.COSINE],
    "max_grad_norm": [None, 0, 1.5, math.inf],
    "max_steps": [-1, 0, np.int64(3)],
    "model_init_kwargs": [{"variant": "fp16", "torch_dtype": torch.bfloat16}, '{"variant": "fp16"}', None],
    "noise_level": [0.5, 1, (0.5,), [0.7] * 9, (0.7,) * 9, np.float32(0.5), [np.float64(0.7)] * 9],
    "num_train_epochs": [2, 0.5],
    "optim": ["adamw_8bit", OptimizerNames.SGD],
    "optim_target_modules": ["all-linear", ["attn"]],
    "output_dir": ["x", Path("x"), None],
    "report_to": ["none", "tensorboard", ["tensorboard", "wandb"], ("wandb",), [], "all"],
    "resume_from_checkpoint": [True, "true", Path("x"), "out/checkpoint-3"],
    "reward_weights": [[1, 2.5], (1,), [np.float32(1)], [-1.0]],
    "save_steps": [0.2, 7, 7.0],
    "save_total_limit": [None, 0, 3],
    "scale_rewards": [True, False, "batch", "true", np.bool_(True)],
    "sde_window_range": [[0, 3], (0, 3), None],
    "seed": [0, np.int64(7), 2**32 - 1],
    "trackio_static_space_id": [None, False, "me/space"],
    "warmup_steps": [0, 3, 0.1],
}  # fmt: skip
"""As users of transformers, TRL and this package write them."""


@pytest.mark.parametrize("name", HONEST)
def test_honest_values_are_taken_and_survive_copies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text(json.dumps({"even_batches": False}))
    ends = [(value, end) for value, end in fuzz.in_python(name, HONEST[name]) if end != "accepted"]
    assert not ends


def test_every_choice_is_taken() -> None:
    limits = {name: limit for name, limit in all_limits(TPGRPOConfig).items() if isinstance(limit, tuple)}
    assert len(limits) > 20
    for name in limits.keys() - {"ddp_backend"}:  # which transformers starts
        assert all(end in fuzz.ENDS for _, end in fuzz.in_python(name, limits[name]))  # some need another setting


def test_values_are_pythons_own() -> None:
    config = TPGRPOConfig(
        Path("x"), use_cpu=np.bool_(True), seed=np.int64(7), beta=np.float32(0.5), sde_window_range=(0, 3)
    )
    kept = [config.output_dir, config.use_cpu, config.seed, config.beta, config.sde_window_range]
    assert kept == [str(Path("x").absolute()), True, 7, 0.5, [0, 3]]
    assert [type(value) for value in kept] == [str, bool, int, float, list]
    json.dumps(config.to_dict())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_taken(recipe: Path, tmp_path: Path) -> None:
    own = read_recipes([recipe])
    settings = {name: value for name, value in own.items() if name in fuzz.FIELDS}
    written = tmp_path / "settings.yaml"
    written.write_text(json.dumps({**settings, "use_cpu": True, "output_dir": "x"}))
    fuzz.use(fuzz.parsed(fuzz.make_parser(), ["--config", str(written)]))
