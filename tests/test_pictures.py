"""Pictures for trackers, read back from what the real trackers have written, and grids of evaluations on disk."""

import importlib.util
import logging
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import build, prompts

from trl_tpgrpo import TPGRPOTrainer
from trl_tpgrpo.algorithm.credit import CreditRule, RewardTable
from trl_tpgrpo.callbacks.grids import (
    GAP,
    MARGIN,
    TITLE,
    Row,
    first_row,
    fitting,
    grid,
    resized,
    size_in_grid,
    wrapped,
)
from trl_tpgrpo.callbacks.pictures import of_rollout, trajectory_image
from trl_tpgrpo.callbacks.samples import RolloutSample


TAGS = {"rollout/samples", "rollout/trajectory", "eval/images", "eval/over_time"}
HISTOGRAMS = {"rollout/rewards", "rollout/step_rewards", "rollout/advantages"}


def watched(output_dir: Path, report_to: str, **changes: object) -> TPGRPOTrainer:
    options = {"max_steps": 3, "log_images_steps": 2, "eval_strategy": "steps", "eval_steps": 1, **changes}
    return build(output_dir, report_to=report_to, eval_dataset=prompts(4), **options)


def events(output_dir: Path) -> EventAccumulator:
    (written,) = output_dir.glob("runs/*/events*")
    return EventAccumulator(str(written), size_guidance={"images": 0, "histograms": 0}).Reload()


def picture(size: int, colour: str) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


# ------------------------------------------------------------------------------------------------------ trackers


def test_tensorboard_has_the_pictures_and_histograms(tmp_path: Path) -> None:
    trainer = watched(tmp_path, "tensorboard", ema_decay=None)
    trainer.train()
    written = events(tmp_path)
    assert set(written.Tags()["images"]) == TAGS and set(written.Tags()["histograms"]) == HISTOGRAMS
    assert [event.step for event in written.Images("rollout/samples")] == [0, 2]
    assert [event.step for event in written.Images("eval/images")] == [1, 2, 3]
    shown = np.asarray(Image.open(BytesIO(written.Images("eval/images")[-1].encoded_image_string)))
    with Image.open(tmp_path / "images/eval/step_000003.png") as on_disk:
        assert (np.asarray(on_disk) == shown).all()
    rewards = written.Histograms("rollout/rewards")[0].histogram_value
    assert rewards.num == 4
    logged = next(entry["reward"] for entry in trainer.state.log_history if "reward" in entry)
    assert rewards.sum / rewards.num == pytest.approx(logged, rel=1e-5)
    assert written.Histograms("rollout/step_rewards")[0].histogram_value.num == 12


@pytest.mark.parametrize("credit", ["outcome", "incremental"])
def test_credits_without_completions_or_turning_points(credit: str, tmp_path: Path) -> None:
    watched(tmp_path, "tensorboard", credit=credit, max_steps=1).train()
    tags = events(tmp_path).Tags()
    assert ("rollout/trajectory" in tags["images"]) == (credit != "outcome")
    assert ("rollout/step_rewards" in tags["histograms"]) == (credit != "outcome")


def test_without_matplotlib_the_rest_is_there_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        watched(tmp_path, "tensorboard", log_images_steps=1).train()
    assert set(events(tmp_path).Tags()["images"]) == TAGS - {"rollout/trajectory"}
    assert caplog.text.count("pip install 'trl-tpgrpo[testbed]'") == 1


def test_nothing_where_nothing_reports_and_no_files_where_it_is_off(tmp_path: Path) -> None:
    trainer = watched(tmp_path / "silent", "none", max_steps=1)
    seen = []
    trainer.samples.rollout_ends = lambda *given: seen.append(list(trainer.samples._images))
    trainer.train()
    assert seen == [[]] and (tmp_path / "silent/images/eval/step_000001.png").exists()
    watched(tmp_path / "off", "tensorboard", log_images_steps=None, max_steps=1).train()
    assert not (tmp_path / "off/images").exists() and not events(tmp_path / "off").Tags()["images"]


def test_wandb_has_the_pictures_and_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    watched(tmp_path, "wandb", max_steps=1).train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert TAGS | HISTOGRAMS <= set(summary)
    assert len(summary["rollout/samples"]["captions"]) == 2 and ": 0." in summary["rollout/samples"]["captions"][0]
    assert {summary[name]["_type"] for name in HISTOGRAMS} == {"histogram"}
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 5


def test_trajectories_that_a_reward_function_has_failed_on_are_not_in_histograms_or_figures() -> None:
    wandb = pytest.importorskip("wandb")

    rewards = torch.tensor([[[torch.nan] * 3], [[0.2, 0.5, 0.4]]])
    table = RewardTable(rewards, torch.ones(1), 2, 2, CreditRule())
    shown = RolloutSample(["a"] * 2, [[picture(8, "red")] * 3, [picture(8, "blue")] * 3], table, ["reward"])
    histograms = of_rollout(shown).histograms
    assert histograms["rollout/rewards"].tolist() == pytest.approx([0.4])
    for values in histograms.values():
        wandb.Histogram(values)  # refuses NaN
    blue = np.asarray(trajectory_image(shown).convert("RGB")).reshape(-1, 3)
    assert not (blue == (255, 0, 0)).all(1).any() and (blue == (0, 0, 255)).all(1).any()


def test_trackio_has_the_pictures_and_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    watched(tmp_path, "trackio", max_steps=1, project="pictures", run_name="one").train()
    logs: dict[str, object] = {}
    for entry in SQLiteStorage.get_logs("pictures", "one"):
        logs |= entry
    assert TAGS - {"rollout/samples"} | HISTOGRAMS | {"rollout/samples_00", "rollout/samples_01"} <= set(logs)
    assert logs["rollout/samples_00"]["_type"] == "trackio.image"
    assert ": 0." in logs["rollout/samples_00"]["caption"]
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 5


# ------------------------------------------------------------------------------------------- evaluations over time


def test_each_evaluation_leaves_a_grid_and_the_course_so_far(tmp_path: Path) -> None:
    trainer = watched(tmp_path, "none", eval_on_start=True)
    trainer.train()
    folder = tmp_path / "images/eval"
    names = [*(f"step_00000{step}.png" for step in range(4)), "over_time.png"]
    assert {path.name for path in folder.iterdir()} == set(names)
    with Image.open(folder / "over_time.png") as course, Image.open(folder / "step_000003.png") as latest:
        width, height = size_in_grid(picture(16, "red"))
        of_latest = first_row(latest, (width, height), 2)
        for image, left in zip(of_latest, (MARGIN, MARGIN + width + GAP), strict=True):
            top = MARGIN + 3 * (TITLE + height + GAP) + TITLE  # the fourth of four rows
            in_course = course.crop((left, top, left + width, top + height))
            assert (np.asarray(image) == np.asarray(in_course)).all()
        assert course.height == MARGIN + 4 * (TITLE + height + GAP) - GAP + MARGIN


def test_the_course_goes_on_after_a_resume_and_leaves_out_the_grids_of_another_run(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    watched(tmp_path, "none", **options).train()
    grids = sorted((tmp_path / "images/eval").glob("step_*.png"))
    whole = Image.open(tmp_path / "images/eval/over_time.png").copy()
    grids[0].with_name("step_000001.png").write_bytes(grids[0].read_bytes())  # no evaluation of this run
    resumed = watched(tmp_path, "none", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = Image.open(tmp_path / "images/eval/over_time.png")
    assert (np.asarray(again) == np.asarray(whole)).all()


# ----------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(("size", "shown"), [(16, 112), (32, 128), (112, 112), (200, 200), (1024, 256)])
def test_images_are_of_a_size_that_can_be_seen(size: int, shown: int) -> None:
    assert size_in_grid(picture(size, "red")) == (shown, shown)
    assert (
        size_in_grid(Image.new("RGB", (2 * size, size)))[0] == 2 * size_in_grid(Image.new("RGB", (2 * size, size)))[1]
    )


def test_rows_come_out_of_a_grid_as_they_went_in() -> None:
    colours = ["red", "green", "blue"]
    images = [picture(32, colour) for colour in colours]
    shown = grid([Row("a prompt", images, ["1", "2", "3"]), Row("another", images[:1], ["4"])])
    for image, again in zip(images, first_row(shown, (128, 128), 3), strict=True):
        assert (np.asarray(resized(image, (128, 128))) == np.asarray(again)).all()


def test_long_rows_are_wrapped_and_long_titles_cut_off() -> None:
    row = Row("a prompt", [picture(32, "red")] * 5, list("abcde"))
    assert [(part.title, part.captions) for part in wrapped(row, 2)] == [
        ("a prompt", ["a", "b"]),
        ("", ["c", "d"]),
        ("", ["e"]),
    ]
    assert fitting("a prompt", 300) == "a prompt"
    assert fitting("a prompt " * 50, 300).endswith("...") and len(fitting("a prompt " * 50, 300)) > 20
