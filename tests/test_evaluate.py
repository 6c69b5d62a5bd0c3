"""`trl-tpgrpo evaluate`: figures are the trainer's, an interrupted call goes on, and wrong ones say what is wrong."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats

from trl_tpgrpo.algorithm.comparison import compare, student_quantile
from trl_tpgrpo.callbacks.checkpoints import INCOMPLETE
from trl_tpgrpo.commands import evaluate, sample, train
from trl_tpgrpo.commands.results import Results
from trl_tpgrpo.policies.weights import LORA_FILE
from trl_tpgrpo.rewards import RewardError
from trl_tpgrpo.testbed import prompt_dataset


ROOT = Path(__file__).parents[1]
REWARDS = """
import os
from trl_tpgrpo.testbed.checker import graded_reward

def counted(images, prompts, **columns):
    left = int(os.environ.get("IMAGES_LEFT", 1000)) - len(images)
    if left < 0:
        raise RuntimeError("interrupted")
    os.environ["IMAGES_LEFT"] = str(left)
    return graded_reward(images, prompts)
"""


def options(tmp_path: Path, name: str = "recipe", **changes: Any) -> list[str]:
    """A recipe of the testbed at 4 steps, 8 held-out prompts of which come from a folder."""
    data = tmp_path / "data"
    for split, file in {"train": "train", "heldout": "test"}.items():
        if not (data / f"{file}.jsonl").exists():
            prompt_dataset(split, 8).to_json(data / f"{file}.jsonl")
    settings = yaml.safe_load((ROOT / "examples/recipes/testbed.yaml").read_text())
    settings |= {
        "use_cpu": True, "output_dir": str(tmp_path / "out"), "dataset_name": str(data), "disable_tqdm": True,
        "num_inference_steps": 4, "num_inference_steps_eval": 4, "num_generations": 2, "num_generations_eval": 2,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 6, "reward_funcs": ["graded_reward"],
        "eval_reward_funcs": ["strict_reward"], "learning_rate": 1e-2, "max_steps": 2,
        "eval_on_start": False,
        **changes,
    }  # fmt: skip
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


def trained(arguments: list[str]) -> list[dict[str, float]]:
    """Train as the recipe says, save, and return what the trainer's own evaluations gave before and after."""
    trainer = train.build_trainer(*train.make_parser().parse_args_and_config(arguments)[:4])
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return [before, trainer.evaluate()]


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a LoRA that has been trained."""
    folder = tmp_path_factory.mktemp("trained")
    trained(options(folder, save_strategy="no"))
    return str(folder / "out")


# ---------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"use_peft": False, "learning_rate": 1e-4}],
    ids=["LoRA", "LoRA in bfloat16", "all weights"],
)
def test_figures_are_those_of_the_trainers_evaluation(settings: dict[str, Any], tmp_path: Path) -> None:
    """To the bit, before and after, with batches of 6 images, of which there are 16."""
    arguments = options(tmp_path, save_strategy="no", **settings)
    logged = trained(arguments)
    assert logged[0]["eval_reward"] != logged[1]["eval_reward"]
    evaluate.main([*arguments, "--adapter", str(tmp_path / "out")])
    summary = saved(tmp_path / "out")["summary"]
    for reward in ("graded_reward", "strict_reward"):
        means = [one["mean"] for one in summary if one["reward"] == reward]
        assert means == [metrics[f"eval_rewards/{reward}/mean"] for metrics in logged]


def test_report_has_means_errors_and_paired_differences_by_kind(adapter: str, tmp_path: Path, capsys: Any) -> None:
    """Recomputed from the rewards of the images by other libraries; images are those that were scored."""
    rewards = {"reward_funcs": ["graded_reward", "strict_reward"], "reward_weights": [1.0, 0.5]}
    arguments = options(tmp_path, **rewards, eval_reward_funcs=["brightness"])
    copied = shutil.copytree(adapter, tmp_path / "copied")
    evaluate.main([*arguments, "--by", "kind", "--adapter", adapter, str(copied), adapter])
    found, text = saved(tmp_path / "out"), capsys.readouterr().out
    names, models = ["reward", "graded_reward", "strict_reward", "brightness"], ["base", adapter, str(copied)]
    heldout = prompt_dataset("heldout", 8)
    assert [image["prompt"] for image in found["images"]] == np.repeat(heldout["prompt"], 2).tolist()
    kinds = np.repeat(heldout["kind"], 2)
    groups = ["all", *sorted(set(kinds))]
    rows = [(one["by"], one["reward"], one["model"]) for one in found["summary"]]
    assert rows == [(group, name, model) for group in groups for name in names for model in models]
    for one in found["summary"]:
        chosen = (kinds == one["by"]) | (one["by"] == "all")
        values, base = (
            np.array([image["rewards"][model][one["reward"]] for image in found["images"]])[chosen].reshape(-1, 2)
            for model in (one["model"], "base")
        )
        assert one["num_images"] == values.size and one["num_prompts"] == len(values)
        assert one["mean"] == pytest.approx(values.mean())
        assert one["standard_error"] == pytest.approx(stats.sem(values.mean(1)), rel=1e-5)
        assert f"| {one['by']} | {one['reward']} | {one['model']} | {len(values)} | {one['mean']:.4f} +- " in text
        if one["model"] == "base":
            assert one["interval"] is None
        elif len(values) > 4:
            low, high = stats.ttest_rel(values.mean(1), base.mean(1)).confidence_interval(0.95)
            assert one["difference"] == pytest.approx((values - base).mean(), abs=1e-7)
            assert one["interval"] == pytest.approx([low, high], abs=1e-3 * (high - low) + 1e-9)
    for image in found["images"]:
        scores, (first, second, third) = image["rewards"], (image["files"][model] for model in models)
        assert scores[adapter] == scores[str(copied)]
        assert scores["base"]["reward"] == scores["base"]["graded_reward"] + 0.5 * scores["base"]["strict_reward"]
        files = [tmp_path / "out" / file for file in (first, second, third)]
        light = np.asarray(Image.open(files[0]), np.float32).mean() / 255
        assert scores["base"]["brightness"] == pytest.approx(light, abs=0.2)
        assert files[1].read_bytes() == files[2].read_bytes() != files[0].read_bytes()
    assert min(Image.open(tmp_path / "out/differences.png").size) > 200
    assert found["versions"]["torch"] == torch.__version__ and found["settings"]["num_inference_steps_eval"] == 4


def test_pictures_are_of_the_largest_gains_and_losses(tmp_path: Path) -> None:
    results = Results(tmp_path, {"num_prompts": 12, "num_generations_eval": 1}, ["run"], 1)
    for number, name in enumerate(results.rewards):
        for index in range(12):
            Image.new("RGB", (8, 8), (10 * index, 0, 100 * number)).save(results.file(name, index))
    gains = torch.tensor([0.0, 0.1, math.nan, 0.3, 0.2, -0.1, 0.5, -0.4, 0.0, 0.4, 0.0, -0.2])
    rewards = {"base": torch.ones(12), "run": 1 + gains}
    shown = evaluate.differences(results, rewards, [{"prompt": f"prompt {index}"} for index in range(12)])
    indices = [6, 9, 3, 4, 5, 11, 7]  # four gains from the largest, and the losses, of which there are three
    assert list(shown) == [f"{gains[index]:+.3f} {index:05d} prompt {index}" for index in indices]
    for index, ((before, reward), (after, other)) in zip(indices, shown.values(), strict=True):
        assert (before.getpixel((0, 0)), after.getpixel((0, 0))) == ((10 * index, 0, 0), (10 * index, 0, 100))
        assert (reward, other) == (1, pytest.approx(1 + gains[index].item()))


def test_comparison_pairs_prompts_and_leaves_out_what_does_not_apply() -> None:
    nan = math.nan
    base = torch.tensor([[0.0, 1.0], [1.0, 1.0], [nan, nan], [0.0, nan]])
    other = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, nan]])
    alone, compared = compare(base), compare(other, base)
    assert (alone.num_prompts, alone.num_images, alone.difference, alone.interval) == (3, 5, None, None)
    assert alone.mean == pytest.approx(0.6) and alone.standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert (compared.num_prompts, compared.num_images) == (4, 7)
    assert compared.difference == pytest.approx(0.5)  # of prompts 0, 1 and 3: 0.5, 0 and 1
    margin = student_quantile(0.975, 2) * 0.5 / math.sqrt(3)
    assert compared.interval == pytest.approx((0.5 - margin, 0.5 + margin))
    single = compare(other[:1], base[:1])
    assert single.difference == 0.5 and all(map(math.isnan, [single.standard_error, *single.interval]))


def test_quantile_is_students() -> None:
    assert math.isnan(student_quantile(0.975, 0))
    for freedom in (4, 5, 10, 100, 1000):
        assert student_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


def test_other_sizes_steps_and_samplers_give_other_images(adapter: str, tmp_path: Path) -> None:
    rewards = {}
    for name, changes in {
        "ode": [],
        "again": [],
        "steps": ["--num_inference_steps_eval", "2"],
        "size": ["--height", "16", "--width", "24"],
        "sde": ["--sampler", "sde", "--share_initial_noise", "true"],
        "noise": ["--sampler", "sde", "--noise_level", "0.1"],
    }.items():
        arguments = options(tmp_path, name, reward_funcs=["brightness"], eval_reward_funcs=None)
        folder = tmp_path / name
        evaluate.main([*arguments, *changes, "--num_prompts", "4", "--output_dir", str(folder)])
        images = saved(folder)["images"]
        assert Image.open(folder / images[0]["files"]["base"]).size == ((24, 16) if name == "size" else (32, 32))
        rewards[name] = [image["rewards"]["base"]["brightness"] for image in images]
    assert {len(values) for values in rewards.values()} == {8}
    assert rewards["ode"] == rewards.pop("again")
    assert len(set(map(tuple, rewards.values()))) == len(rewards)
    assert len(set(rewards["sde"])) == 8  # each image has its own noise


# ---------------------------------------------------------------------------------------------------- going on


def test_interrupted_and_resumed_equals_uninterrupted(adapter: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "counting.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [*options(tmp_path, reward_funcs=["counting.counted"]), "--adapter", adapter]
    monkeypatch.setenv("IMAGES_LEFT", "1000")
    evaluate.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert os.environ["IMAGES_LEFT"] == str(1000 - 2 * 16)
    monkeypatch.setenv("IMAGES_LEFT", "24")  # the base's 6 + 6 + 4, the adapter's first 6, and 2 of the next 6
    with pytest.raises(RewardError, match="interrupted"):
        evaluate.main(arguments)
    lines = tmp_path / "out/evaluation/results.jsonl"
    assert len(lines.read_text().splitlines()) == 1 + 3 + 1
    lines.write_text(lines.read_text()[:-10])  # as if it had been interrupted while it wrote the last line
    monkeypatch.setenv("IMAGES_LEFT", "16")  # all of the adapter's
    evaluate.main(arguments)
    assert os.environ["IMAGES_LEFT"] == "0"
    whole, resumed = saved(tmp_path / "whole"), saved(tmp_path / "out")
    assert whole == resumed
    evaluate.main(arguments)  # nothing is left to do
    assert saved(tmp_path / "out") == whole and os.environ["IMAGES_LEFT"] == "0"


def test_other_settings_and_other_weights_are_refused_by_name(adapter: str, tmp_path: Path) -> None:
    copied = shutil.copytree(adapter, tmp_path / "copied")
    arguments = [*options(tmp_path), "--num_prompts", "4", "--adapter", str(copied)]
    evaluate.main(arguments)
    evaluate.main([*arguments, "--learning_rate", "1", "--max_steps", "9"])  # nothing to an evaluation
    for changes, message in (
        (["--num_inference_steps_eval", "3"], "started with num_inference_steps_eval=4, but it is now 3"),
        (["--num_prompts", "8"], "started with num_prompts=4, but it is now 8"),
        (["--sampler", "sde"], "started with sampler='ode', but it is now 'sde'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main([*arguments, *changes])
    prompt_dataset("tuning", 8).to_json(tmp_path / "data/test.jsonl")
    with pytest.raises(ValueError, match="started with prompts='"):
        evaluate.main(arguments)
    prompt_dataset("heldout", 8).to_json(tmp_path / "data/test.jsonl")
    other = tmp_path / "other"
    trained(options(other.parent, "other", output_dir=str(other), learning_rate=2e-2, save_strategy="no"))
    shutil.copy(other / LORA_FILE, copied)
    with pytest.raises(ValueError, match=f"started with {copied}='.*choose another --output_dir, or delete"):
        evaluate.main(arguments)


def test_two_processes_equal_one(adapter: str, tmp_path: Path) -> None:
    """Rewards to the rounding of batches of another size: 16 images in batches of 6 are 6, 6, 4 or 2 x 6, 2 x 6."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    arguments = [*options(tmp_path), "--adapter", adapter, "--output_dir"]
    run = subprocess.run(
        [*launch, "trl_tpgrpo", "evaluate", *arguments, str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("| reward | model | prompts |") == 1
    evaluate.main([*arguments, str(tmp_path / "one")])
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert two["settings"] == one["settings"] | {"num_processes": 2}
    assert len(one["images"]) == len(two["images"]) == 16
    for first, second in zip(one["images"], two["images"], strict=True):
        assert first["prompt"] == second["prompt"] and first["files"] == second["files"]
        for model, file in first["files"].items():
            assert second["rewards"][model] == pytest.approx(first["rewards"][model], abs=0.05)
            pixels = [np.asarray(Image.open(tmp_path / name / file), int) for name in ("one", "two")]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1
    for mine, theirs in zip(one["summary"], two["summary"], strict=True):
        assert theirs["mean"] == pytest.approx(mine["mean"], abs=0.01)


def test_launch_options_go_to_accelerate(tmp_path: Path, monkeypatch: Any) -> None:
    launched: list[Any] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(train, "launch_command", launched.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    arguments = [*options(tmp_path), "--adapter", "a", "b"]
    evaluate.main([*arguments, "--num_processes", "2"])
    assert launched[0].num_processes == 2 and launched[0].training_script == "trl_tpgrpo"
    assert launched[0].training_script_args == ["evaluate", *arguments]


# ---------------------------------------------------------------------------------------------------- weights


def test_weights_of_an_interrupted_run_are_those_of_its_newest_whole_checkpoint(tmp_path: Path, capsys: Any) -> None:
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "eval_strategy": "no"}
    arguments = options(tmp_path, **steps, eval_reward_funcs=None)
    trainer = train.build_trainer(*train.make_parser().parse_args_and_config(arguments)[:4])
    trainer.train()
    run = tmp_path / "out"
    (run / "checkpoint-3" / INCOMPLETE).touch()
    assert sample.find_weights(str(run)) == str(run / "checkpoint-2")
    assert f"{run} has no weights; using its newest checkpoint" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="checkpoint-3 is incomplete"):
        sample.find_weights(str(run / "checkpoint-3"))
    assert sample.find_weights(str(run / "checkpoint-1")) == str(run / "checkpoint-1")
    assert sample.find_weights("someone/an-adapter") == "someone/an-adapter"
    picture = ["--prompt", "a red circle", "--guidance_scale", "1", "--num_inference_steps", "4", "--device", "cpu"]
    images = []
    for name in ("out", "out/checkpoint-2"):
        folder = tmp_path / name.replace("/", "-")
        called = ["--model_name_or_path", "testbed", "--adapter", str(tmp_path / name), "--output_dir", str(folder)]
        sample.main([*called, *picture])
        images.append((folder / "000-a-red-circle-0.png").read_bytes())
    assert images[0] == images[1]
    trainer.save_model()
    assert sample.find_weights(str(run)) == str(run)
    with pytest.raises(FileNotFoundError, match="has neither a LoRA"):
        sample.find_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--by", "colour"], r"--by must be a column of the dataset, one of \['prompt', 'kind'\], got 'colour'"),
        (["--dataset_test_split", "tests"], "no split 'tests'.*--dataset_test_split"),
        (["--num_prompts", "0"], "--num_prompts must be at least 1, got 0"),
        (["--bf16_full_eval", "true"], "bf16_full_eval is not supported"),
        (["--adapter", "{whole}"], "has the full weights of a transformer: leave out --use_peft"),
        (["--adapter", "{whole}", "{lora}", "--use_peft", "false"], "evaluate LoRAs in another call"),
        (
            ["--lerning_rate", "1"],
            "Unknown options: --lerning_rate. See trl-tpgrpo evaluate --help",
        ),
    ],
)
def test_wrong_calls_name_the_option(changes: list[str], message: str, tmp_path: Path) -> None:
    folders = {"whole": tmp_path / "whole", "lora": tmp_path / "lora"}
    (folders["whole"] / "transformer").mkdir(parents=True)
    folders["lora"].mkdir()
    (folders["lora"] / LORA_FILE).touch()
    with pytest.raises(ValueError, match=message):
        evaluate.main([*options(tmp_path), *(one.format(**folders) for one in changes)])
