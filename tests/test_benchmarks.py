"""The benchmark for GPUs, at one layer and small images, where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"


@pytest.mark.parametrize(("model", "base"), [("sd3.5-medium", "int8"), ("flux.1-dev", "bf16")])
def test_benchmark_for_gpus_runs_at_reduced_depth(model: str, base: str, tmp_path: Path) -> None:
    """With the real transformers' width."""
    command = [sys.executable, str(SCRIPT), "--model", model, "--reduced", "--bases", base, "--results", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    (row,) = json.loads((tmp_path / f"gpu_{model}.json").read_text())["rows"]
    assert "failed" not in row, run.stderr[-3000:]
    assert row["num_evaluations"] == 4 * (3 + 2 + 1)  # 3 steps, of which 2 are SDE steps with exact completions
    assert row["num_train_evaluations"] == 4 * 2 * 2  # with the reference
    assert row["loss_is_finite"]
    assert all(0 < row[f"{phase}_utilisation"] < 2 for phase in ("rollout", "train"))  # the product is no upper bound
    assert row["peak_gib"].keys() == {"load", "encode", "rollout", "decode", "score", "train"}
