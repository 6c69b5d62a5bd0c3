"""The study's scripts, from sampling to the report, at the smallest sizes."""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

from trl_tpgrpo.testbed import prompt_dataset


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *options: str) -> str:
    ended = run_python(BENCHMARKS / script, *options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_the_study_tunes_runs_goes_on_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study

    small = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    monkeypatch.setattr(study, "COMMON", {**study.COMMON, **small})
    monkeypatch.setattr(study, "IMAGES", {"tuning": 8, "mark": 8, "heldout": 8})
    monkeypatch.setattr(study, "MARKS", 300)
    few = replace(study.WORLDS["shapes"], prompts=lambda split: prompt_dataset(split, 4))
    monkeypatch.setitem(study.WORLDS, "shapes", few)
    study.score_base(tmp_path, few)
    study.train(study.Run(study.REFERENCE, 1e-4, 1000, "rate", 100), tmp_path)
    one_step = "one of the first three steps, shared noise, level 0.7"
    study.train(study.Run(one_step, 1e-4, 1000, "noise", 100), tmp_path)
    longer = next(iter(study.LONGER))
    study.train(study.Run(longer, 1e-4, 0, "longer", 800), tmp_path)
    critic = next(iter(study.CRITICS))
    study.train(study.Run(critic, 1e-4, 0, "critic", 800), tmp_path)
    (kept_critic,) = (tmp_path / "critic").glob("*.json")
    assert [len(point["explained"]) for point in json.loads(kept_critic.read_text())["curve"]] == [3] * 3
    methods = [study.REFERENCE, "TP-GRPO as published", "fitted credit, transitions drawn"]
    for method, seed in product(methods, (0, 1)):
        study.train(study.Run(method, 1e-4, seed, "heldout", 800), tmp_path)
    kept = {path.name: json.loads(path.read_text()) for path in (tmp_path / "heldout").glob("*.json")}
    assert len(kept) == 6
    one = kept["Flow-GRPO_first_three_steps_0.0001_0.json"]
    evaluations = [point["evaluations"] for point in one["curve"]]
    assert evaluations == [
        272 * (update + 1) for update in range(3)
    ]  # 16 trajectories of 8 steps, 3 of them trained on
    assert [mark["updates"] for mark in one["marks"]] == [2]
    assert [end["num_images"] for end in one["end"].values()] == [8, 32, 8, 32]  # of 4 captions
    drawn = kept["fitted_credit_transitions_drawn_0.0001_0.json"]["curve"]
    assert drawn[0]["images"] == 16 * 7  # the own image and those of x_1 to x_6
    text = study.report(tmp_path, tmp_path / "figure.png")
    assert f"| {study.REFERENCE} | 0.0001 | 1 |" in text
    assert text.count("| fitted credit, transitions drawn | ") == 3
    assert f"| {one_step} | 1 |" in text
    assert all(f"| {method} | 0.0001 | 0 |" in text for method in (longer, critic))
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_the_study_of_words_scores_what_the_recogniser_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study

    world = study.WORLDS["words"]
    monkeypatch.setitem(study.WORLDS, "words", replace(world, prompts=lambda split: world.prompts(split).take(4)))
    small = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    monkeypatch.setattr(study, "COMMON", {**study.COMMON, **small})
    monkeypatch.setattr(study, "IMAGES", {"tuning": 8, "mark": 8, "heldout": 8})
    run = study.Run(study.REFERENCE, 1e-4, 0, "heldout", 100, "words")
    study.train(run, tmp_path)
    end = json.loads((tmp_path / run.path).read_text())["end"]
    assert {name: set(scores) for name, scores in end.items()} == dict.fromkeys(
        end, {"reward", "strict", "num_images"}
    )
    assert 0 < end["new"]["reward"] < 1


def test_p_values_are_corrected_for_their_number() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    from study import compare, holm

    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    reference = np.random.default_rng(0).normal(0.2, 0.005, 12)
    same, other = compare(reference + 0.001, reference), compare(reference + 0.05, reference)
    assert same["p"] > 0.5 and same["p_equivalent"] < 0.001
    assert other["p"] < 0.001 and other["p_equivalent"] > 0.999
    assert other["difference"] == pytest.approx(0.05)


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
