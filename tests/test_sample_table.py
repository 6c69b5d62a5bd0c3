"""`log_completions`: the table of samples, and their images."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_samples import sample
from test_trainer import brightness, build

from trl_tpgrpo.callbacks.sample_table import rendered, table, trajectory


def blueness(images: list[Image.Image], **columns: object) -> list[float]:
    return [float(np.asarray(image)[..., 2].mean() / 255) for image in images]


def test_a_trajectory_as_text_marks_where_turning_points_start() -> None:
    shown = sample(torch.tensor([[0.5, 0.2, 0.4, 0.9], [0.21, 0.35, 0.80, 0.78]]))
    assert trajectory(shown, 0) == "0.50 0.20* 0.40 0.90"
    assert trajectory(shown, 1) == "0.21* 0.35 0.80 0.78"


def test_a_function_that_does_not_apply_has_a_dash() -> None:
    shown = sample(torch.full((2, 1), torch.nan), credit="outcome")
    assert str(list(table(shown).columns[2].cells)[0]) == "-"


def test_samples_are_printed_and_saved_with_each_log(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = build(tmp_path, reward_funcs=[brightness, blueness], log_completions=True, num_completions_to_print=3)
    capsys.readouterr()
    trainer.train()
    printed = capsys.readouterr().out
    for step in (1, 2):
        folder = tmp_path / "completions" / f"step_{step:06d}"
        assert f"Samples of update {step}: " in printed
        assert sorted(path.name for path in folder.iterdir()) == ["00.png", "01.png", "02.png"]
        with Image.open(folder / "01.png") as image:
            assert f"{brightness([image])[0]:.3f}" in printed
    assert "blueness" in printed and len(re.findall(r"\b02\.png", printed)) == 2
    assert "\u2502" in printed


def test_prompts_that_look_like_markup_are_printed_as_they_are() -> None:
    shown = replace(sample(torch.ones(2, 4)), prompts=["a [red] circle"] * 2)
    assert rendered(table(shown)).count("a [red] circle") == 2


def test_nothing_is_printed_or_saved_by_default(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    build(tmp_path, max_steps=1).train()
    assert "Samples" not in capsys.readouterr().out and not (tmp_path / "completions").exists()
