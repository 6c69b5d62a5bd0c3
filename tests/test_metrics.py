"""Metrics: what is made of the values of an update, over time and processes, and what a NaN among them does."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import CPU, LAUNCH, run_python

from trl_tpgrpo.algorithm.credit import CreditRule, RewardTable
from trl_tpgrpo.metrics import Metrics, image_variety, rollout_metrics


NAN = math.nan


def flushed(values: list, reduction: str = "mean") -> float:
    metrics = Metrics()
    for value in values:
        metrics.record("name", value, reduction)
    return metrics.flush()["name"]


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", 2.0), ("nanmean", 2.0), ("sum", 8.0), ("max", 4.0), ("std", 1.5**0.5)]
)
def test_numbers_and_tensors_are_reduced_together(reduction: str, expected: float) -> None:
    assert flushed([1.0, torch.tensor([[4.0, 2.0]]), torch.tensor(1.0)], reduction) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_a_nan_is_not_averaged_away(reduction: str) -> None:
    """As of one KL divergence among many."""
    assert math.isnan(flushed([0.5, torch.tensor(NAN), 0.5], reduction))


def test_rewards_that_do_not_apply_are_skipped() -> None:
    assert flushed([torch.tensor([1.0, NAN]), NAN, 3.0], "nanmean") == 2.0
    assert flushed([torch.tensor([1.0, NAN]), NAN, 3.0], "std") == 1.0
    assert math.isnan(flushed([NAN], "nanmean"))


def test_latest_is_what_is_new_and_flush_has_all() -> None:
    metrics = Metrics()
    metrics.record("old", 1.0)
    assert metrics.latest() == {"old": 1.0}
    metrics.record("old", 3.0)
    metrics.record("new", NAN)
    latest = metrics.latest()
    assert latest["old"] == 3.0 and math.isnan(latest["new"]) and metrics.latest() == {}
    assert metrics.flush()["old"] == 2.0
    assert metrics.latest() == metrics.flush() == {}


def test_seconds_of_a_phase_are_summed() -> None:
    metrics = Metrics()
    for _ in range(2):
        with metrics.seconds("rollout"):
            pass
    (name, seconds), *_ = metrics.flush().items()
    assert name == "seconds/rollout" and 0 < seconds < 1


def test_what_is_nan_in_a_rollout_is_named_reward() -> None:
    """So that these, and no others, are recorded to be skipped: one function applies to the first prompt alone."""
    rewards = torch.rand(4, 2, 4, generator=torch.Generator().manual_seed(0))
    rewards[2:, 1] = NAN
    table = RewardTable(rewards, torch.ones(2), 2, 3, CreditRule())
    metrics = rollout_metrics(table, ["everywhere", "once"])
    assert not any(value.isnan() for value in metrics.values())
    assert metrics["rewards/once/mean"] == rewards[:2, 1, -1].mean()
    assert metrics["rewards/everywhere/mean_of_state_0"] == rewards[:, 0, 0].mean()
    rewards[:, 1] = NAN
    metrics = rollout_metrics(RewardTable(rewards, torch.ones(2), 2, 3, CreditRule()), ["everywhere", "nowhere"])
    missing = {name for name, value in metrics.items() if value.isnan()}
    states = {f"{kind}_of_state_{state}" for kind in ("mean", "std") for state in range(4)}
    assert missing == {f"rewards/nowhere/{name}" for name in {"mean", "std", *states}}


def test_variety_of_one_image_is_unknown() -> None:
    black, white = (Image.new("RGB", (8, 8), (shade,) * 3) for shade in (0, 255))
    variety = image_variety([black, white, black, white, white], ["two", "two", "one", "same", "same"])
    torch.testing.assert_close(variety, torch.tensor([0.5, NAN, 0.0]), equal_nan=True)


SCRIPT = """
import json, math, sys
from pathlib import Path
from accelerate import PartialState
from trl_tpgrpo.metrics import Metrics

state = PartialState(cpu=True)
rank, metrics = state.process_index, Metrics()
metrics.record("both", float(rank))
metrics.record("sum", 1.0, "sum")
metrics.record("seconds/phase", 1.0 + rank, "seconds")
metrics.record("skips", [math.nan, 3.0][rank], "nanmean")
metrics.record("kl", [math.nan, 3.0][rank])
if rank == 1:
    metrics.record("alone", 5.0)
    metrics.record("alone, max", -5.0, "max")
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps([metrics.latest(), metrics.flush(), metrics.flush()]))
state.destroy_process_group()
"""


def test_two_processes_skip_what_one_has_not_recorded_but_no_nan(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = run_python(*LAUNCH, tmp_path / "script.py", tmp_path, env=CPU)
    assert ended.returncode == 0, ended.stderr[-3000:]
    expected = {"both": 0.5, "sum": 2.0, "seconds/phase": 2.0, "skips": 3.0, "alone": 5.0, "alone, max": -5.0}
    for rank in (0, 1):
        latest, first, second = json.loads((tmp_path / f"{rank}.json").read_text())
        assert math.isnan(latest.pop("kl")) and math.isnan(first.pop("kl"))
        assert latest == first == expected and second == {}
