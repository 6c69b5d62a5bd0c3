"""Numbers that would train nothing, or nonsense, without a word: they are refused where they come in."""

import math
from pathlib import Path

import pytest
import torch
from test_trainer import brightness, config, prompts
from tiny import tiny_sd3
from torch import nn

from trl_tpgrpo import TPGRPOTrainer
from trl_tpgrpo.algorithm.credit import CreditRule, RewardTable
from trl_tpgrpo.policies.loading import _check_finite
from trl_tpgrpo.rewards.contract import LARGEST_REWARD, RewardError, checked


@pytest.mark.parametrize(
    ("part", "value"), [("transformer", math.nan), ("vae", math.inf), ("text_encoder_2", -math.inf)]
)
def test_the_first_weight_that_is_no_number_is_named(part: str, value: float, tmp_path: Path) -> None:
    pipeline = tiny_sd3()
    names = [name for name, _ in getattr(pipeline, part).named_parameters()]
    with torch.no_grad():
        for name in (names[-1], names[1]):
            getattr(pipeline, part).get_parameter(name).view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"model: {part}.{names[1]} holds NaN or infinity: the file is damaged"):
        TPGRPOTrainer(pipeline, brightness, config(tmp_path), prompts())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_size_and_dtype_are_looked_at(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2).to(dtype)
    module.weight.data.fill_(torch.finfo(dtype).max)
    module.register_parameter("empty", nn.Parameter(torch.empty(0, dtype=dtype)))
    module.register_parameter("meta", nn.Parameter(torch.empty(2, dtype=dtype, device="meta")))
    module.register_parameter("packed", nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False))
    _check_finite("part", module)
    module.bias.data[1] = math.nan
    with pytest.raises(ValueError, match="part.bias holds NaN"):
        _check_finite("part", module)


def test_rewards_have_squares_in_float32() -> None:
    largest = checked(brightness, [LARGEST_REWARD, -LARGEST_REWARD], ["a", "b"], [])
    assert largest.square().isfinite().all()
    with pytest.raises(RewardError, match=r"1e\+20, above 1.8e\+19 in size \(its square overflows\) for row 1"):
        checked(brightness, [1, 1e20], ["a", "b"], [])


def test_a_weighted_sum_of_rewards_has_one_too() -> None:
    table = RewardTable(torch.full((2, 1, 1), 1e10), torch.tensor([1e15]), 2, 1, CreditRule("outcome"))
    with pytest.raises(ValueError, match=r"reward_weights \[.*\]: the weighted sum of rewards is 1.0e\+25 in size"):
        _ = table.rewards


def test_weights_of_rewards_are_not_all_0(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward_weights must not all be 0, got \[0, 0.0\]"):
        config(tmp_path, reward_weights=[0, 0.0])
    assert config(tmp_path, reward_weights=[0, 1]).reward_weights == [0, 1]
