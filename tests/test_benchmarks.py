"""The benchmark for GPUs, at one layer and small images, where there is none."""

import json
from pathlib import Path

from processes import run_python


SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"


def test_benchmark_for_gpus_runs_at_reduced_depth(tmp_path: Path) -> None:
    """Both models, and what the table is made of."""
    ended = run_python(SCRIPT, "--quick", "--reduced", "--results", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu_quick.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["sd3.5-medium", "flux.1-dev"]
    for row in rows:
        assert "failed" not in row, ended.stderr[-3000:]
        assert row["nfe"] == 4 * (3 + 2 + 1)  # 3 steps, of which 2 are SDE steps with exact completions
        assert row["nfe_train"] == 4 * 2 * 2  # with the reference
        assert row["loss_is_finite"]
        assert 0 <= row["ratio_deviation_before_the_first_update"] < 1e-5
        # the product is no upper bound
        assert all(0 < row[f"{phase}_utilisation"] < 2 for phase in ("rollout", "train"))
        assert row["peak_gib"].keys() == {"load", "encode", "rollout", "decode", "score", "train"}
        assert row["planned_gib"].keys() == {"encode", "rollout", "decode", "train", "update"}
        assert f"| {row['model']} | bf16 | no |" in ended.stdout
