"""Pictures for trackers, read back from what the real trackers have written, and grids of evaluations on disk."""

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
from trl_tpgrpo.callbacks.figures import before_after_figure, trajectory_figure
from trl_tpgrpo.callbacks.pictures import CAPTION, GAP, TITLE, grid, resized, rollout_pictures, trajectory_image
from trl_tpgrpo.callbacks.samples import RolloutSample


TAGS = {"rollout/samples", "rollout/trajectory", "eval/images"}
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
    monkeypatch.delitem(sys.modules, "trl_tpgrpo.callbacks.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
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
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 4


def test_trajectories_that_a_reward_function_has_failed_on_are_not_in_histograms_or_figures() -> None:
    wandb = pytest.importorskip("wandb")

    rewards = torch.tensor([[[torch.nan] * 3], [[0.2, 0.5, 0.4]]])
    table = RewardTable(rewards, torch.ones(1), 2, 2, CreditRule())
    shown = RolloutSample(["a"] * 2, [[picture(8, "red")] * 3, [picture(8, "blue")] * 3], table, ["reward"])
    histograms = rollout_pictures(shown).histograms
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
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 4


def test_the_legend_explains_turning_points_and_the_arrow_is_their_credit() -> None:
    rewards, turning = np.array([0.4, 0.1, 0.6, 0.5, 0.9]), np.array([False, True, False, True])
    figure = trajectory_figure("a", [picture(8, "red")] * 5, rewards, turning, list(range(5)))
    (legend,) = figure.legends
    first, marked, arrow = (text.get_text() for text in legend.get_texts())
    assert "image j" in first and "this step reverses the trend" in marked and "to the final image" in arrow
    (drawn,) = [text for text in figure.axes[0].texts if text.arrow_patch is not None]
    assert (drawn.xyann[1], drawn.xy[1]) == (0.1, 0.9)  # of the turning point with the largest change
    said = [text.get_text() for text in figure.axes[0].texts]
    assert {"turning point\n+0.80", "turning point\n+0.40", "+0.80"} <= set(said)
    alone = trajectory_figure("a", [picture(8, "red")] * 5, rewards, turning & False, list(range(5)))
    assert len(alone.legends[0].get_texts()) == 1 and not alone.axes[0].texts


def test_before_and_after_say_how_many_images_are_right() -> None:
    right = np.array([[[True, False], [False, False]], [[True, True], [False, True]]])
    images = [[picture(8, "red")] * 2] * 2
    figure = before_after_figure(["a red square left of a green triangle", "b"], images, images, right)
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]
    assert titles == ["before: 1 of 4 right", "after: 3 of 4 right"]
    assert figure.axes[0].get_ylabel() == "a red square left of a\ngreen triangle"


# ----------------------------------------------------------------------------------------------------------- grids


def test_each_evaluation_leaves_a_grid(tmp_path: Path) -> None:
    watched(tmp_path, "none", eval_on_start=True).train()
    assert {path.name for path in (tmp_path / "images/eval").iterdir()} == {
        f"step_00000{step}.png" for step in range(4)
    }


def test_a_resumed_run_leaves_the_same_grids(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    watched(tmp_path, "none", **options).train()
    grids = sorted((tmp_path / "images/eval").glob("step_*.png"))
    before = grids[1].read_bytes()
    grids[1].unlink()
    watched(tmp_path, "none", **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [grid.name for grid in grids] == ["step_000002.png", "step_000004.png"] and grids[1].read_bytes() == before


@pytest.mark.parametrize(("size", "shown"), [(16, 112), (32, 128), (112, 112), (200, 200), (1024, 256)])
def test_images_are_of_a_size_that_can_be_seen(size: int, shown: int) -> None:
    assert resized(picture(size, "red")).size == (shown, shown)
    wide = resized(Image.new("RGB", (2 * size, size)))
    assert wide.width == 2 * wide.height


def test_a_grid_shows_the_images_under_their_prompts() -> None:
    colours = ["red", "green", "blue", "yellow", "cyan"]
    images = [picture(32, colour) for colour in colours]
    shown = grid([("a prompt", [(image, 0.5) for image in images]), ("another", [(images[0], 0.25)])])
    width, height = resized(images[0]).width + 2 * GAP, resized(images[0]).height + TITLE + CAPTION
    assert shown.size == (4 * width, 3 * height)  # the first in rows of 4 and 1
    for index, colour in {0: "red", 3: "yellow", 4: "cyan", 8: "red"}.items():
        corner = (index % 4 * width + GAP, index // 4 * height + TITLE)
        inside = shown.crop((*corner, corner[0] + 128, corner[1] + 128))
        assert (np.asarray(inside) == np.asarray(resized(picture(32, colour)))).all()
    assert (np.asarray(shown.crop((width, height + TITLE, 4 * width, 2 * height))) == 255).all()


def test_long_prompts_are_cut_off_and_short_rows_leave_them_room() -> None:
    image = picture(256, "red")
    short, long, longer = (grid([(text, [(image, 0.5)])]) for text in ("a prompt", "word " * 20, "word " * 40))
    assert short.width == long.width >= 360
    assert (np.asarray(long) == np.asarray(longer)).all() and (np.asarray(short) != np.asarray(long)).any()
