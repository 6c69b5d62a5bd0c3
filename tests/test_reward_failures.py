"""What failing reward functions do to a run: stop all processes, with evidence, or cost trajectories they fail on."""

import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import CPU, LAUNCH, run_python
from test_trainer import assert_same, brightness, build, logged, prompts, trained

from trl_tpgrpo import batches
from trl_tpgrpo.rewards import RewardError


FAILURES = {
    "raises": "raised OSError: no disk for row",
    "exits": "raised SystemExit: 3 for row",
    "returns NaN": "returned nan .* for row",
    "returns text": "returned 'good', which is not a number, for row",
    "returns too few": r"returned \d+ rewards for \d+ images",
    "returns nothing": "must return a list of numbers, got NoneType",
    "hangs": "has not returned within its timeout of 0.3 seconds",
}


class Failing:
    """Brightness, but for images of one topic, on which it fails in one of several ways."""

    __name__ = "failing"

    def __init__(self, how: str, topic: int = 1, runs_in: str = "main"):
        self.how, self.topic, self.runs_in = how, topic, runs_in
        self.timeout = 0.3 if how == "hangs" else None

    def __call__(self, images: list[Image.Image], topic: list[int], **columns: object) -> object:
        values: list[object] = list(brightness(images))
        if self.topic not in topic:
            return values
        if self.how == "raises":
            raise OSError("no disk")
        if self.how == "exits":
            sys.exit(3)
        if self.how == "hangs":
            threading.Event().wait(5)
        index = topic.index(self.topic)
        values[index] = {"returns NaN": float("nan"), "returns text": "good"}.get(self.how, values[index])
        return {"returns too few": values[1:], "returns nothing": None}.get(self.how, values)


@pytest.mark.parametrize("runs_in", ["main", "thread"])
@pytest.mark.parametrize("how", FAILURES)
def test_training_stops_with_name_row_prompt_and_image(how: str, runs_in: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, reward_funcs=Failing(how, runs_in=runs_in), per_device_train_batch_size=12)
    before = trained(trainer)
    with pytest.raises(RewardError, match=f"The reward function 'failing' {FAILURES[how]}") as error:
        trainer.train()
    assert_same(before, trained(trainer))
    (told,) = (tmp_path / "reward_failures").glob("*.json")
    assert json.loads(told.read_text())["reward_func"] == "failing"
    if " for row" in FAILURES[how]:
        assert error.value.prompt == "two blue squares" == json.loads(told.read_text())["prompt"]
        with Image.open(tmp_path / "reward_failures/step_000000_failing.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(error.value.image))
        assert "The image is in " in str(error.value)


@pytest.mark.parametrize("how", FAILURES)
def test_evaluation_stops_as_training_does(how: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, reward_funcs=Failing(how), eval_dataset=prompts(4))
    with pytest.raises(RewardError, match=FAILURES[how]):
        trainer.evaluate()


def test_skipped_failures_leave_out_their_trajectories(tmp_path: Path, caplog) -> None:
    """Of the topic's group nothing is left; the others train as ever."""
    trainer = build(
        tmp_path, reward_funcs=Failing("raises"), reward_failures="skip", per_device_train_batch_size=12, beta=0.0,
        shuffle_dataset=False, max_steps=1, eval_dataset=prompts(4), num_generations_eval=2,
    )  # fmt: skip
    trainer.train()
    images_of_a_trajectory = trainer.args.num_sde_steps + 1
    assert logged(trainer, "num_failed_images") == [2 * images_of_a_trajectory]
    assert "'failing' raised OSError: no disk for row" in caplog.text and "Its trajectory is left out." in caplog.text
    assert np.isfinite([logged(trainer, name)[0] for name in ("loss", "reward", "reward_std", "advantages/std")]).all()
    assert logged(trainer, "grad_norm")[0] > 0
    metrics = trainer.evaluate()
    assert metrics["eval_num_failed_images"] == 2
    assert 0 < metrics["eval_reward"] < 1


def test_pictures_are_drawn_of_what_is_left(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, reward_funcs=Failing("raises", topic=0), reward_failures="skip", per_device_train_batch_size=12,
        report_to="tensorboard", log_images_steps=1, log_completions=True, shuffle_dataset=False, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "num_failed_images")[0] > 0


def test_a_call_that_fails_costs_no_image_that_alone_does_not_fail(tmp_path: Path) -> None:
    calls = []

    def sometimes(images: list[Image.Image], **columns: object) -> list[float]:
        calls.append(len(images))
        values = brightness(images)
        return [float("nan") if len(images) > 1 and index == 0 else value for index, value in enumerate(values)]

    trainer = build(
        tmp_path, reward_funcs=sometimes, reward_failures="skip", num_generations=3, per_device_train_batch_size=6,
        credit="outcome", max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "num_failed_images") == [0.0]  # asked alone, none fails
    assert calls == [6, 1, 1, 1, 1, 1, 1]


def test_a_function_that_always_fails_stops_a_run_that_skips(tmp_path: Path) -> None:
    def broken(images: list[Image.Image], **columns: object) -> list[float]:
        raise OSError("no disk")

    with pytest.raises(RewardError, match="'broken' raised OSError: no disk for row 0"):
        build(tmp_path, reward_funcs=broken, reward_failures="skip").train()


SCRIPT = """
import json, os, sys
from pathlib import Path
from test_reward_failures import FAILURES, Failing
from test_trainer import build, prompts
from trl_tpgrpo.rewards import RewardError

out, rank, said = Path(sys.argv[1]), os.environ["RANK"], {}
for how in FAILURES:
    for phase in ("train", "evaluate"):
        trainer = build(
            out / how / phase, reward_funcs=Failing(how), per_device_train_batch_size=4, eval_dataset=prompts(4),
            shuffle_dataset=False,
        )
        try:
            trainer.train() if phase == "train" else trainer.evaluate()
        except RewardError as error:
            said[f"{how}, {phase}"] = str(error)
def telling(images, topic, log_metric, **columns):
    if 0 in topic:
        log_metric("topic_0", len(images))
    return [float(number) for number in topic]

trainer = build(out / "told", reward_funcs=telling, per_device_train_batch_size=4, shuffle_dataset=False, max_steps=1)
trainer.train()
said["topic_0"] = [entry["topic_0"] for entry in trainer.state.log_history if "topic_0" in entry]
(out / f"said-{rank}.json").write_text(json.dumps(said))
"""


def test_two_processes_stop_together_in_every_case(tmp_path: Path) -> None:
    """The topic that fails is sampled by one of them alone; the other neither hangs nor says nothing. Nor does it
    where one records a metric that the other does not."""
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = run_python(*LAUNCH, tmp_path / "script.py", tmp_path, env=CPU)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0]["topic_0"] == said[1]["topic_0"] != []  # which one of them alone has recorded
    for how, what in FAILURES.items():
        for phase in ("train", "evaluate"):
            messages = [rank[f"{how}, {phase}"] for rank in said]
            assert all(re.search(f"'failing' {what}", message) for message in messages), messages
            assert sum(bool(re.search(r"on process \d", message)) for message in messages) == 1, messages
            assert len(list((tmp_path / how / phase / "reward_failures").glob("*.json"))) == 1


def test_scoring_goes_on_while_the_next_sweep_is_sampled(tmp_path: Path, monkeypatch) -> None:
    """Rewards of the first sweep wait until the second is sampled: one after the other this would never end."""
    monkeypatch.setattr(batches, "SWEEP", 4)
    sampled, seen = threading.Event(), []

    def patient(images: list[Image.Image], **columns: object) -> list[float]:
        seen.append(len(images))
        assert len(seen) > 1 or sampled.wait(20)
        return brightness(images)

    patient.runs_in = "thread"
    trainer = build(tmp_path, reward_funcs=patient, steps_per_generation=3, per_device_train_batch_size=4, max_steps=1)
    roll_out = trainer.rollouts.roll_out

    def counted(*args: object, **kwargs: object):
        rollout = roll_out(*args, **kwargs)
        counted.number += 1
        if counted.number == 2:
            sampled.set()
        return rollout

    counted.number = 0
    monkeypatch.setattr(trainer.rollouts, "roll_out", counted)
    trainer.train()
    assert counted.number == 3 and len(seen) == 3
    plain = build(tmp_path, steps_per_generation=3, per_device_train_batch_size=4, max_steps=1)
    plain.train()
    assert_same(trained(plain), trained(trainer))


def test_tensors_are_the_images(tmp_path: Path) -> None:
    """A function that takes tensors gives the weights of one that takes PIL images."""

    def from_pixels(images: torch.Tensor, **columns: object) -> list[float]:
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 16, 16)
        levels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
        return brightness([Image.fromarray(image) for image in levels])

    from_pixels.image_type = "pt"
    runs = [build(tmp_path, reward_funcs=function) for function in (brightness, from_pixels)]
    for run in runs:
        run.train()
    assert_same(*map(trained, runs))


def test_extra_columns_stand_beside_the_samples(tmp_path: Path, capsys) -> None:
    def telling(images: list[Image.Image], prompts: list[str], log_extra, **columns: object) -> list[float]:
        log_extra("words", [len(prompt.split()) for prompt in prompts])
        return brightness(images)

    build(tmp_path, reward_funcs=telling, log_completions=True, max_steps=1).train()
    assert "words" in capsys.readouterr().out
