"""The contract with reward functions, and what happens when one breaks it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from trl_tpgrpo.rewards import RewardError, jpeg_compressibility, jpeg_incompressibility
from trl_tpgrpo.rewards.contract import check_applicability, reward_names
from trl_tpgrpo.rewards.scorer import ImageBatch, Scorer


IMAGES = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
PROMPTS = ["first", "second", "third"]


NONE_FAILED = torch.zeros(2, dtype=torch.bool)


def score(function, columns: dict[str, list]) -> torch.Tensor:
    return Scorer().start([function], ImageBatch(IMAGES, None, PROMPTS, columns), {}).result().rewards[0]


def redness(images: list[Image.Image], prompts: list[str], bonus: list[float], **columns: object) -> list[float]:
    return [image.getpixel((0, 0))[0] + extra for image, extra in zip(images, bonus, strict=True)]


def returning(values: object):
    def function(images: list[Image.Image], **columns: object) -> object:
        return values

    return function


def test_rewards_and_columns_arrive() -> None:
    assert score(redness, {"bonus": [1, 2, 3]}).tolist() == [1, 102, 203]


def test_none_means_not_applicable() -> None:
    rewards = score(returning([1.0, None, 2.0]), {})
    assert rewards[1].isnan() and rewards[[0, 2]].tolist() == [1.0, 2.0]


def test_tensors_and_numpy_numbers_are_numbers() -> None:
    assert score(returning(torch.tensor([1.0, 2.0, 3.0])), {}).tolist() == [1, 2, 3]
    assert score(returning([np.float64(1), np.int64(2), True]), {}).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "'function' returned 2 rewards for 3 images"),
        ([1.0, math.nan, 2.0], r"'function' returned nan \(return None .*\) for row 1, prompt 'second'"),
        ([1.0, 2.0, math.inf], r"'function' returned inf \(return None .*\) for row 2, prompt 'third'"),
        ([1.0, "good", 2.0], "'function' returned 'good', which is not a number, for row 1, prompt 'second'"),
        (None, "'function' must return a list of numbers, got NoneType"),
        (3.0, "'function' must return a list of numbers, got float"),
    ],
)
def test_wrong_returns_stop_with_name_and_row(values: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(returning(values), {})


def test_exception_names_function_and_row() -> None:
    def picky(images: list[Image.Image], prompts: list[str], **columns: object) -> list[float]:
        if "second" in prompts:
            raise KeyError("no such word")
        return [0.0] * len(images)

    with pytest.raises(
        RewardError, match=r"'picky' raised KeyError: 'no such word' for row 1, prompt 'second'"
    ) as error:
        score(picky, {})
    assert isinstance(error.value.__cause__, KeyError)


def test_exception_on_the_batch_alone_says_so() -> None:
    def crowded(images: list[Image.Image], **columns: object) -> list[float]:
        if len(images) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="on a batch of 3 images, on no single image"):
        score(crowded, {})


def test_function_without_room_for_columns_is_reported() -> None:
    def strict(images: list[Image.Image]) -> list[float]:
        return [0.0] * len(images)

    with pytest.raises(RewardError, match="'strict' raised TypeError.*prompts"):
        score(strict, {})


def test_reward_names() -> None:
    assert reward_names([redness, jpeg_compressibility]) == ["redness", "jpeg_compressibility"]


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ([], ValueError, "reward_funcs is empty"),
        (["clip"], TypeError, "must be callables, got 'clip'"),
        ([redness, redness], ValueError, "need different names"),
    ],
)
def test_wrong_reward_functions_are_refused(functions: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        reward_names(functions)


def test_applicability_may_depend_on_the_prompt_only() -> None:
    nan = math.nan
    fine = torch.tensor([[[1.0, 2.0], [nan, nan]], [[nan, nan], [1.0, 2.0]]])
    check_applicability(fine, ["a", "b"], ["one", "two"], 1, NONE_FAILED)
    check_applicability(
        fine, ["a", "b"], ["same", "same"], 1, NONE_FAILED
    )  # two rows of a dataset may have the same prompt
    with pytest.raises(RewardError, match="'b' returned None for some images of the prompt 'one'"):
        check_applicability(torch.tensor([[[1.0, 2.0], [nan, 1.0]]]), ["a", "b"], ["one"], 1, NONE_FAILED)
    with pytest.raises(RewardError, match="'a' returned None for some images of the prompt 'same'"):
        check_applicability(fine, ["a", "b"], ["same", "same"], 2, NONE_FAILED)
    with pytest.raises(RewardError, match="'a' returned None for row 1, prompt 'two', so it has no reward"):
        check_applicability(torch.tensor([[[1.0, 2.0]], [[nan, nan]]]), ["a"], ["one", "two"], 1, NONE_FAILED)


def test_jpeg_rewards_tell_plain_from_busy_images() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = Image.new("RGB", (64, 64))
    small, large = jpeg_incompressibility([plain, noise])
    assert 0 < small < large / 5
    assert jpeg_compressibility([plain, noise]) == [-small, -large]
