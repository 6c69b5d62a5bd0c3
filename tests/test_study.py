"""The study's scripts, from sampling to the report, at the smallest sizes."""

import json
from pathlib import Path

from processes import run_python


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *options: str) -> str:
    ended = run_python(BENCHMARKS / script, *options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_ablation_runs_goes_on_and_reports(tmp_path: Path) -> None:
    results, figure = tmp_path / "results", tmp_path / "figure.png"
    options = ["--studies", "window_3", "--learning_rates", "1e-4", "--num_prompts", "4", "--num_processes", "1"]
    options += ["--methods", "outcome", "consistent"]
    budgets = ["--cpu_seconds", "0.1", "--evaluations", "1200", "--updates", "1"]
    where = ["--results", str(results), "--figure", str(figure)]
    run("ablation.py", *options, *budgets, *where, "--seeds", "0", "1")
    kept = sorted((results / "window_3").glob("*.json"))
    assert len(kept) == 2 + 2 * 2
    one = json.loads((results / "window_3/heldout_outcome_0.0001_0.json").read_text())
    spent = {budget: scores["spent"] for budget, scores in one["scores"].items()}
    assert spent["updates"]["updates"] == 1
    assert spent["evaluations"]["evaluations"] >= 1200 and spent["evaluations"]["updates"] == 2
    assert len(one["scores"]["cpu_seconds"]["strict"]) == 4
    changed = [path.stat().st_mtime_ns for path in kept]
    kept[-1].unlink()
    run("ablation.py", *options, *budgets, *where, "--seeds", "0", "1")
    assert [path.stat().st_mtime_ns for path in kept[:-1]] == changed[:-1]
    assert kept[-1].exists()
    text = run("ablation.py", "--report", *where)
    assert text.count("| consistent | 0.0001 | 2 | ") == 6  # budgets, last and averaged weights
    assert figure.stat().st_size > 5_000


def test_gradient_snr_of_every_rule(tmp_path: Path) -> None:
    options = ["--settings", "cps, step 1, shared noise", "--num_batches", "3", "--results", str(tmp_path)]
    options += ["--figure", str(tmp_path / "figure.png")]
    text = run("gradient_snr.py", *options)
    rows = json.loads((tmp_path / "cps_step_1_shared_noise.json").read_text())["rows"]
    by_rule = {row["rule"]: row for row in rows if row["reward_noise"] == 0}
    assert "| outcome, group, group, step | 0.0 |" in text
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    policy_gradient = by_rule["lambda 1.0 | completion | none | step"]
    # what a group with one noise starts from is a constant of the group
    outcome, gain = (by_rule[f"{name} | group | none | step"]["snr"] for name in ("outcome", "incremental"))
    assert abs(outcome / gain - 1) < 1e-3
    # with one SDE step the step's own gain is all that follows
    for name in ("snr", "progress"):
        assert by_rule["incremental | completion | none | step"][name] == policy_gradient[name]
