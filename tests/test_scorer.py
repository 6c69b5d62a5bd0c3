"""Running reward functions: beside the model or not, in batches, with timeouts, and what becomes of failures."""

import asyncio
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from trl_tpgrpo.rewards import RewardError, RewardUnavailable
from trl_tpgrpo.rewards.scorer import ImageBatch, Scorer, Scores


NUMBER = 5
PIXELS = torch.arange(NUMBER * 3 * 2 * 2, dtype=torch.uint8).view(NUMBER, 3, 2, 2)
IMAGES = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in PIXELS]
PROMPTS = [f"prompt {row}" for row in range(NUMBER)]
BATCH = ImageBatch(IMAGES, PIXELS, PROMPTS, {"bonus": [10 * row for row in range(NUMBER)]})


def first_value(images: list[Image.Image], bonus: list[int], **columns: object) -> list[float]:
    return [float(np.asarray(image)[0, 0, 0]) + extra for image, extra in zip(images, bonus, strict=True)]


EXPECTED = [12.0 * row + 10 * row for row in range(NUMBER)]


def scores(function, failures: str = "stop", **attributes: object) -> Scores:
    for name, value in attributes.items():
        setattr(function, name, value)
    return Scorer(failures).start([function], BATCH, {}).result()


class Recorder:
    """Counts the images of its calls."""

    __name__ = "recorder"

    def __init__(self, **attributes: object):
        self.calls: list[int] = []
        vars(self).update(attributes)

    def __call__(self, images, **columns: object) -> list[float]:
        self.calls.append(len(images))
        if isinstance(images, torch.Tensor):
            images = [(255 * image).byte().permute(1, 2, 0).numpy() for image in images]
        return first_value(images, columns["bonus"])


async def awaited(images: list[Image.Image], bonus: list[int], **columns: object) -> list[float]:
    await asyncio.sleep(0.01)
    return first_value(images, bonus)


@pytest.mark.parametrize(
    ("attributes", "calls"),
    [
        ({}, [5]),
        ({"batch_size": 2}, [2, 2, 1]),
        ({"image_type": "pt", "batch_size": 4}, [4, 1]),
        ({"runs_in": "thread", "batch_size": 3}, [3, 2]),
        ({"timeout": 10.0}, [5]),
    ],
)
def test_functions_are_called_as_they_declare(attributes: dict, calls: list[int]) -> None:
    recorder = Recorder(**attributes)
    assert Scorer().start([recorder], BATCH, {}).result().rewards.tolist() == [EXPECTED]
    assert recorder.calls == calls


def test_async_functions_and_partials_are_awaited() -> None:
    functions = [awaited, partial(awaited, other=1)]
    assert Scorer().start(functions, BATCH, {}).result().rewards.tolist() == [EXPECTED, EXPECTED]


def test_calls_beside_the_model_are_under_way_while_others_are_made() -> None:
    """Each of these waits for the other: one after the other they would never end."""
    begun, answered = threading.Event(), threading.Event()

    def beside(images, **columns: object) -> list[float]:
        begun.set()
        assert answered.wait(10)
        return [1.0] * len(images)

    def in_main(images, **columns: object) -> list[float]:
        assert threading.current_thread() is threading.main_thread()
        assert begun.wait(10)
        answered.set()
        return [2.0] * len(images)

    beside.runs_in = "thread"
    scoring = Scorer().start([in_main, beside], BATCH, {})
    assert scoring.result().rewards[:, 0].tolist() == [2.0, 1.0]


def test_several_batches_may_be_under_way_at_once() -> None:
    release = threading.Event()

    def slow(images, **columns: object) -> list[float]:
        assert release.wait(10)
        return [float(len(images))] * len(images)

    slow.runs_in = "thread"
    scorer = Scorer()
    scorings = [
        scorer.start([slow], ImageBatch(IMAGES[:number], None, PROMPTS[:number], {}), {}) for number in (1, 2, 3)
    ]
    release.set()
    assert [scoring.result().rewards[0, 0].item() for scoring in scorings] == [1.0, 2.0, 3.0]


def test_extra_columns_come_back_in_the_order_of_the_images() -> None:
    def telling(images, prompts: list[str], log_extra, **columns: object) -> list[float]:
        log_extra("seen", [prompt.upper() for prompt in prompts])
        return [0.0] * len(images)

    assert scores(telling, batch_size=2).extra == {"seen": [prompt.upper() for prompt in PROMPTS]}


# Failures


def failing_on(rows: tuple[int, ...], how: str = "raise"):
    """A function that fails wherever these rows are among what it is given."""

    def picky(images, prompts: list[str], bonus: list[int], **columns: object) -> list[object]:
        values: list[object] = list(first_value(images, bonus))
        for index, prompt in enumerate(prompts):
            if int(prompt.split()[1]) in rows:
                if how == "raise":
                    raise KeyError("no such word")
                values[index] = {"nan": float("nan"), "text": "good"}[how]
        return values

    return picky


@pytest.mark.parametrize("attributes", [{}, {"batch_size": 2}, {"runs_in": "thread"}, {"timeout": 5.0}])
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("raise", "raised KeyError: 'no such word'"),
        ("nan", "returned nan"),
        ("text", "returned 'good', which is not a number,"),
    ],
)
def test_a_failure_stops_with_name_row_prompt_and_image(how: str, what: str, attributes: dict) -> None:
    with pytest.raises(RewardError) as error:
        scores(failing_on((3,), how), **attributes)
    assert str(error.value).startswith(f"The reward function 'picky' {what}")
    assert "for row 3, prompt 'prompt 3'." in str(error.value)
    assert error.value.image is IMAGES[3]
    assert how != "raise" or isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("how", ["raise", "nan", "text"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_skipped_failures_are_marked_and_the_other_images_keep_their_rewards(how: str, batch_size: int | None) -> None:
    scored = scores(failing_on((1, 3), how), "skip", batch_size=batch_size)
    assert scored.failed.tolist() == [False, True, False, True, False]
    assert scored.rewards[0].isnan().tolist() == scored.failed.tolist()
    assert scored.rewards[0, ~scored.failed].tolist() == [EXPECTED[0], EXPECTED[2], EXPECTED[4]]
    assert "for row 1, prompt 'prompt 1'." in str(scored.errors[0])


def test_where_one_function_fails_no_other_counts_either() -> None:
    scored = Scorer("skip").start([failing_on((1,)), first_value], BATCH, {}).result()
    assert scored.rewards[:, 1].isnan().all() and not scored.rewards[:, [0, 2, 3, 4]].isnan().any()


def test_a_function_that_fails_everywhere_leaves_nothing() -> None:
    scored = scores(failing_on(tuple(range(NUMBER))), "skip")
    assert scored.failed.all() and scored.rewards.isnan().all() and scored.errors


def test_a_failure_of_the_batch_alone_says_so() -> None:
    def crowded(images, **columns: object) -> list[float]:
        if len(images) > 1:
            raise MemoryError("too many")
        return [7.0]

    with pytest.raises(RewardError, match=r"raised MemoryError: too many \(on a batch of 5 images, on no .*\)\."):
        scores(crowded)
    scored = scores(crowded, "skip")
    assert scored.rewards.tolist() == [[7.0] * NUMBER] and not scored.failed.any() and len(scored.errors) == 1


@pytest.mark.parametrize("kind", ["main", "thread", "async"])
def test_a_call_that_hangs_is_a_failure_and_the_next_calls_go_on(kind: str) -> None:
    forever = threading.Event()

    def hanging(images, prompts: list[str], bonus: list[int], **columns: object) -> list[float]:
        if "prompt 1" in prompts:
            forever.wait(60)
        return first_value(images, bonus)

    async def hanging_async(images, prompts: list[str], bonus: list[int], **columns: object) -> list[float]:
        if "prompt 1" in prompts:
            await asyncio.sleep(60)
        return first_value(images, bonus)

    function = hanging_async if kind == "async" else hanging
    attributes = {"timeout": 0.2, "batch_size": 2, **({} if kind == "async" else {"runs_in": kind})}
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"'hanging\w*' has not returned within its timeout of 0.2 seconds"):
        scores(function, **attributes)
    scored = scores(function, "skip", **attributes)
    assert scored.failed.tolist() == [True, True, False, False, False]
    assert scored.rewards[0, 2:].tolist() == EXPECTED[2:]
    assert time.perf_counter() - start < 10
    forever.set()


def test_where_no_image_is_the_cause_images_are_not_asked_for_one_by_one() -> None:
    calls = []

    def gone(images, **columns: object) -> list[float]:
        calls.append(len(images))
        raise RewardUnavailable("the server is gone")

    with pytest.raises(RewardError, match="'gone' raised RewardUnavailable: the server is gone"):
        scores(gone)
    assert scores(gone, "skip").failed.all()
    assert calls == [NUMBER, NUMBER]


def test_a_wrong_number_of_rewards_is_the_whole_calls_failure() -> None:
    def short(images, prompts: list[str], bonus: list[int], **columns: object) -> list[float]:
        return first_value(images, bonus)[: None if prompts[0] == "prompt 4" else -1]

    with pytest.raises(RewardError, match="'short' returned 1 rewards for 2 images"):
        scores(short, batch_size=2)
    assert scores(short, "skip", batch_size=2).failed.tolist() == [True] * 4 + [False]


def test_time_in_the_queue_is_no_hang() -> None:
    """Each call takes a third of the timeout, all twice as long as it, and the one that fails waits behind them."""

    def slow(images, prompts: list[str], bonus: list[int], **columns: object) -> list[float]:
        time.sleep(0.1)
        if "prompt 0" in prompts:
            raise KeyError("no such word")
        return first_value(images, bonus)

    slow.timeout, slow.batch_size, slow.runs_in = 0.3, 1, "thread"
    scorer = Scorer("skip")
    scorings = [scorer.start([slow], BATCH, {}) for _ in range(2)]
    for scored in (scoring.result() for scoring in scorings):
        assert scored.failed.tolist() == [True, False, False, False, False]
        assert "raised KeyError" in str(scored.errors[0])


def test_a_thread_makes_all_calls_of_a_function_until_one_hangs() -> None:
    """Also one that nobody waits for; each thread computes without gradients, and none keeps the interpreter alive."""
    seen, forever, done = [], threading.Event(), threading.Event()

    def noting(images, prompts: list[str], **columns: object) -> list[float]:
        seen.append((threading.current_thread(), torch.is_grad_enabled()))
        if prompts == ["prompt 2"]:
            forever.wait(60)
        if prompts == ["prompt 4"]:
            done.set()
        return [0.0]

    noting.runs_in, noting.batch_size, noting.timeout = "thread", 1, 0.2
    scoring = Scorer("skip").start([noting], BATCH, {})
    assert done.wait(10)
    threads = [thread for thread, _ in seen]
    assert threads[0] is threads[1] is threads[2] is not threads[3] and threads[3] is threads[4]
    assert all(thread.daemon for thread in threads) and not any(with_gradients for _, with_gradients in seen)
    forever.set()
    threads[0].join(10)
    assert not threads[0].is_alive()  # what it returns after all is nobody's
    assert scoring.result().failed.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("runs_in", ["main", "thread"])
def test_a_function_that_ends_its_thread_is_a_failure(runs_in: str) -> None:
    def leaving(images, **columns: object) -> list[float]:
        raise SystemExit(3)

    with pytest.raises(RewardError, match=r"raised SystemExit: 3 for row 0"):
        scores(leaving, runs_in=runs_in)


def test_extra_columns_of_another_length_are_an_error() -> None:
    def short(images, log_extra, **columns: object) -> list[float]:
        log_extra("seen", [1])
        return [0.0] * len(images)

    with pytest.raises(RewardError, match="'short' logged 1 values of 'seen' for 5 images"):
        scores(short)


def test_metrics_are_recorded_once_for_calls_that_succeed_and_on_the_main_thread() -> None:
    recorded = []

    def log_metric(name: str, value: float) -> None:
        assert threading.current_thread() is threading.main_thread()
        recorded.append((name, value))

    def telling(images, prompts: list[str], log_metric, **columns: object) -> list[float]:
        log_metric("number", len(images))
        if len(images) > 1 and "prompt 0" in prompts:
            raise KeyError("no such word")
        return [0.0] * len(images)

    telling.runs_in, telling.batch_size = "thread", 3
    Scorer("skip").start([telling], BATCH, {"log_metric": log_metric}).result()
    assert recorded == [("number", 1), ("number", 1), ("number", 1), ("number", 2)]


def test_a_timeout_of_the_functions_own_is_its_error_and_no_hang() -> None:
    def impatient(images, **columns: object) -> list[float]:
        raise TimeoutError("the server is slow")

    with pytest.raises(RewardError, match="raised TimeoutError: the server is slow for row 0"):
        scores(impatient, timeout=5.0)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"image_type": "jpeg"}, "has image_type='jpeg'; it must be one of"),
        ({"runs_in": "process"}, "has runs_in='process'; it must be one of"),
        ({"batch_size": 0}, "has batch_size=0; it must be above 0"),
        ({"timeout": -1.0}, "has timeout=-1.0; it must be above 0"),
    ],
)
def test_declarations_that_do_not_exist_are_refused(attributes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer().start([Recorder(**attributes)], BATCH, {})
