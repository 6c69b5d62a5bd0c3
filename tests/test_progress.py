"""What a run writes: to a terminal a live bar and one line a rollout, to a file the lines alone."""

import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from datasets import Dataset
from test_trainer import build, prompts
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from trl_tpgrpo.callbacks.progress import ProgressDisplay, duration, log_line, merged


WIDTH = 120

LOGS = {
    "loss": 0.0, "grad_norm": 0.0213, "learning_rate": 3e-4, "epoch": 0.1, "reward": 0.512, "reward_std": 0.31,
    "turning_points/rate": 0.218, "turning_points/step_0": 0.1, "clip_ratio": 0.031, "kl": 1.2e-5,
    "ratio/mean": 1.0, "ratio/max_deviation": 2.5e-5, "rewards/shapes/mean": 0.512, "rewards/shapes/std": 0.31,
    "seconds/encode": 0.1, "seconds/rollout": 123.4, "seconds/decode": 12.3, "seconds/score": 1.25,
    "seconds/train": 1234.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def state(step: int = 1, max_steps: int = 3000) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=True)


def test_a_line_shows_the_numbers_that_matter_with_their_names() -> None:
    assert log_line(LOGS, state()) == (
        "update 1/3000  reward 0.512 +- 0.310  turns 21.8%  clip 3.1%  kl 1.2e-05  grad 0.021  "
        "rollout 123.4 s  train 1234.0 s"
    )


def test_a_wide_terminal_shows_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    line = log_line(LOGS | {"rewards/other/mean": 0.25}, state(), "1:00 left")
    assert line == (
        "update 1/3000  1:00 left  reward 0.512 +- 0.310  shapes 0.512  other 0.250  turns 21.8%  clip 3.1%  "
        "kl 1.2e-05  grad 0.021  rollout 123.4 s  train 1234.0 s  score 1.2 s  decode 12.3 s  encode 0.1 s  "
        "|ratio-1| 2.5e-05  lr 0.0003"
    )


@pytest.mark.parametrize("number", [1, 2, 9])
def test_lines_fit_however_many_reward_functions_there_are(number: int) -> None:
    functions = {f"rewards/a_function_with_a_long_name_{index}/mean": 0.5 for index in range(number)}
    for kind in ("", "eval_"):
        logs = {f"{kind}{name}": value for name, value in (LOGS | functions).items()} | (
            {f"{kind}runtime": 1.0} if kind else {}
        )
        assert len(log_line(logs, state(), "1:00 left")) <= WIDTH


def test_an_update_without_a_rollout_shows_only_what_was_logged() -> None:
    logs = {name: value for name, value in LOGS.items() if "reward" not in name and "turning" not in name}
    assert log_line(logs, state(2)).startswith("update 2/3000  clip 3.1%  kl")
    assert log_line({"reward": 0.5, "mine": 1.0}, state(2)) == "update 2/3000"


def test_evaluations_and_the_end_have_lines_of_their_own() -> None:
    logs = {
        "eval_a_reward": 0.5, "eval_a_reward_std": 0.25, "eval_a_rewards/one/mean": 0.25,
        "eval_a_rewards/two/mean": 0.75, "eval_a_runtime": 61.0, "eval_a_num_scored_images": 64.0,
    }  # fmt: skip
    expected = "evaluation of a after update 7 (64 images in 1:01)  reward 0.500 +- 0.250  one 0.250  two 0.750"
    assert log_line(logs, state(7)) == expected
    assert log_line({"eval_runtime": 30.0}, state(7)) == "evaluation after update 7 (0 images in 30.0 s)"
    ended = state(10, 10)
    assert log_line({"train_runtime": 30.0}, ended) == "finished after update 10, in 30.0 s"
    assert log_line({"train_runtime": 30.0}, state(10)) == "stopped after update 10, in 30.0 s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.7, "59.7 s"), (59.96, "1:00"), (221, "3:41"), (7509, "2:05:09")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_file_gets_lines_and_no_control_characters(
    disable_tqdm: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = build(tmp_path, disable_tqdm=disable_tqdm, eval_dataset=prompts(4), eval_strategy="steps", eval_steps=2)
    capsys.readouterr()
    trainer.train()
    written = capsys.readouterr()
    lines = written.out.splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", written.out) and "\r" not in written.err
    assert [line.split()[0] for line in lines] == ["rollout:", "run:", "update", "update", "evaluation", "finished"]
    assert re.match(r"update 1/2  \S+ s left  reward 0\.", lines[2]) and "left" not in lines[3]
    assert all(len(line) <= WIDTH for line in lines)


def test_the_display_is_in_place_of_that_of_transformers(tmp_path: Path) -> None:
    trainer = build(tmp_path, disable_tqdm=False)
    shown = [one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback | PrinterCallback)]
    assert shown == [trainer.progress] and type(shown[0]) is ProgressDisplay
    trainer.remove_callback(ProgressCallback)
    assert trainer.progress not in trainer.callback_handler.callbacks


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> str:
    """What `run` writes to standard error where that is a pseudo-terminal of 120 columns."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the end of a pseudo-terminal
            while chunk := os.read(master, 65536):
                written.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run()
    reader.join()
    os.close(master)
    return b"".join(written).decode()


def test_a_terminal_has_a_bar_with_the_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_tpgrpo.batches.SWEEP", 2)

    def run() -> None:
        trainer = build(
            tmp_path,
            disable_tqdm=False,
            per_device_train_batch_size=2,
            per_device_rollout_batch_size=2,
            steps_per_generation=2,
            gradient_accumulation_steps=2,
            eval_dataset=prompts(4),
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.train()
        assert trainer.progress._bar.disable
        trainer.evaluate()

    written = on_a_terminal(monkeypatch, run)
    for shown in (
        r"update 0/2 .* encode 0/2", r"sweep 1/2, rollout 0/4", r"sweep 2/2, rollout 0/4", r"decode 0/8", r"score 0/1",
        r"micro-batch 2/2, train 0/3", r"update 1/2 .* reward 0\.\d+ \|\s*[\d.]+s/update, 00:\d\d left",
        r"update 2/2 .* evaluation, rollout 0/3", r"evaluation 1/2, rollout",
        r"\revaluation 1/2, score 0/1 \[00:\d\d\]",
    ):  # fmt: skip
        assert re.search(shown, written), shown


def test_prompts_that_are_encoded_first_have_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Dataset.from_dict({"prompt": ["a red circle", "two blue squares"]})
    written = on_a_terminal(
        monkeypatch,
        lambda: build(tmp_path, disable_tqdm=False, train_dataset=many, precompute_prompt_embeds=True),
    )
    assert "encode prompts:   0%" in written and "0/2" in written


def test_the_updates_on_a_rollout_share_a_line_and_constants_are_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    trainer = build(
        tmp_path, disable_tqdm=True, max_steps=5, num_iterations=2, eval_dataset=prompts(4), eval_strategy="steps",
        eval_steps=3,
    )  # fmt: skip
    capsys.readouterr()
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rollout: 4 trajectories, ") and lines[1].startswith("run: 5 updates, 3 rollouts, ")
    assert [re.match(r"(updates? [\d-]+/5|\w+)", line)[1] for line in lines] == [
        "rollout", "run", "updates 1-2/5", "evaluation", "updates 3-4/5", "update 5/5", "evaluation", "finished",
    ]  # fmt: skip
    assert all("reward 0." in lines[place] for place in (2, 4, 5))
    assert "lr 0." in lines[2] and not any(" lr " in line for line in lines[3:])


def test_seconds_of_updates_are_added_and_other_numbers_averaged() -> None:
    first = {"loss": 1.0, "reward": 0.5, "clip_ratio": 0.1, "seconds/train": 2.0, "ratio/max_deviation": 0.5}
    second = {"loss": 2.0, "clip_ratio": 0.3, "seconds/train": 3.0, "ratio/max_deviation": 0.25}
    expected = {"loss": 1.5, "reward": 0.5, "clip_ratio": 0.2, "seconds/train": 5.0, "ratio/max_deviation": 0.5}
    assert merged([first, second]) == pytest.approx(expected)


def test_a_run_that_is_stopped_within_a_rollout_shows_its_last_update(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = True

    trainer = build(tmp_path, disable_tqdm=True, max_steps=4, num_iterations=2)
    trainer.add_callback(Stop())
    capsys.readouterr()
    trainer.train()
    assert capsys.readouterr().out.splitlines()[2].startswith("update 1/4")


def test_a_notebook_has_these_lines_instead_of_a_table_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils.notebook import NotebookProgressCallback

    for module in ("transformers.trainer", "trl_tpgrpo.trainer"):
        monkeypatch.setattr(f"{module}.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    trainer = build(tmp_path, disable_tqdm=False)
    callbacks = trainer.callback_handler.callbacks
    assert trainer.progress in callbacks
    assert not any(isinstance(callback, NotebookProgressCallback) for callback in callbacks)
