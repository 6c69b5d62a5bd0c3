"""The command line as a person calls it: help, a recipe, overrides, pictures, and the messages of wrong calls."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from PIL import Image
from processes import run_python

import trl_tpgrpo
from trl_tpgrpo import cli
from trl_tpgrpo.algorithm.completion import CompletionRule
from trl_tpgrpo.commands import demo, fidelity, sample, train
from trl_tpgrpo.commands.options import read_options, read_recipes
from trl_tpgrpo.commands.prompts import read_prompts, split_of
from trl_tpgrpo.commands.train import make_parser
from trl_tpgrpo.rewards import jpeg_compressibility
from trl_tpgrpo.testbed.checker import shapes_reward


ROOT = Path(__file__).parents[1]
SMALL = ["--num_generations", "2", "--per_device_train_batch_size", "4", "--max_steps", "1", "--disable_tqdm", "true"]


def recipe(tmp_path: Path, **changes: object) -> str:
    settings = yaml.safe_load((ROOT / "examples/recipes/testbed.yaml").read_text())
    settings.update(output_dir=str(tmp_path / "out"), use_cpu=True, num_inference_steps=4)
    settings.update(eval_strategy="no", eval_on_start=False, **changes)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_the_program_lists_its_commands(capsys) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)


def test_version(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"trl-tpgrpo {trl_tpgrpo.__version__}\n"


def test_it_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "trl_tpgrpo", "--help"], capture_output=True, text=True, check=True)
    assert "trl-tpgrpo" in run.stdout


def test_help_of_train_is_in_groups(capsys) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    own = ["model", "data", "sampling", "SDE", "completions", "reward and credit", "training", "memory and speed",
           "logging"]  # fmt: skip
    named = ["transformers.TrainingArguments", "accelerate launch"]
    titles = ["Script", "Model", *(f"TP-GRPO: {title}" for title in own), *named]
    positions = [text.index(f"\n{title}:") for title in titles]
    assert positions == sorted(positions)
    groups = dict(zip(titles, (text[start:stop] for start, stop in pairwise([*positions, len(text)])), strict=True))
    assert "--prompt_column str" in groups["Script"] and "--model_name_or_path str" in groups["Model"]
    assert "--guidance_scale float" in groups["TP-GRPO: sampling"]
    assert "Images per prompt; must divide" in groups["TP-GRPO: data"] and "(default: 24)" in groups["TP-GRPO: data"]
    assert "--learning_rate" in groups["transformers.TrainingArguments"]
    assert "--num_processes" in groups["accelerate launch"]
    for name in ("load_in_4bit", "attn_implementation", "torch_compile", "lora_task_type"):
        assert f"--{name} " not in text


@pytest.mark.parametrize("command", ["train", "fidelity", "plan"])
def test_help_needs_no_pytorch_and_begins_with_the_command_s_own(command: str) -> None:
    program = "import sys; from trl_tpgrpo.cli import main; main(); sys.exit('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program, command, "--help"], capture_output=True, text=True, check=True
    )
    first = {"train": "--reward_funcs", "fidelity": "--completions", "plan": "--gpu"}[command]
    assert run.stdout.split("\n\n")[3].split()[1] == first


def test_options_that_are_read_from_sources_are_those_of_the_parsers() -> None:
    """The sources of transformers, TRL and accelerate are read as they are laid out now."""
    trained = {action.dest for action in make_parser()._actions} - {"config"}
    strings = [string for action in launch_command_parser()._actions for string in action.option_strings]
    launched = {string[2:].replace("-", "_") for string in strings if string.startswith("--")}
    assert set(read_options("train")) == trained | launched | {"accelerate_config"}


def test_recipe_trains_and_options_override_it(tmp_path: Path) -> None:
    train.main(["--config", recipe(tmp_path), *SMALL, "--lora_r", "2", "--lora_target_modules", "to_q"])
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(".to_q.lora_" in name for name in weights)
    assert {min(value.shape) for value in weights.values()} == {2}


def test_the_adapter_begins_as_the_recipe_says(tmp_path: Path) -> None:
    options = ["--config", recipe(tmp_path), *SMALL, "--lora_r", "32"]
    spread = {}
    for chosen in ("gaussian", None):
        parsed = make_parser().parse_args_and_config([*options, *(["--init_lora_weights", chosen] if chosen else [])])
        model = train.build_trainer(*parsed[:4]).model
        values = [weight.detach().flatten() for name, weight in model.named_parameters() if "lora_A" in name]
        spread[chosen] = torch.cat(values).std().item() * 32
    assert spread["gaussian"] == pytest.approx(1, rel=0.02)  # a normal distribution of deviation 1 / r
    assert abs(spread[None] - 1) > 0.2


def test_the_recipe_of_the_examples_is_valid() -> None:
    parser = train.make_parser()
    parser.parse_args_and_config(["--config", str(ROOT / "examples/recipes/testbed.yaml"), "--use_cpu", "true"])


def test_launch_options_go_to_accelerate(tmp_path: Path, monkeypatch) -> None:
    launched = []
    monkeypatch.setattr(train, "launch_command", launched.append)
    with pytest.raises(ValueError, match="num_processes=2 needs GPUs.*torchrun --nproc_per_node 2 -m trl_tpgrpo"):
        train.main(["--config", recipe(tmp_path, num_processes=2), *SMALL])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    train.main(["--config", recipe(tmp_path, num_processes=2), *SMALL])
    train.main(["--config", recipe(tmp_path), "--num_processes", "2", *SMALL])
    from_recipe, arguments = launched
    assert from_recipe.num_processes == arguments.num_processes == 2 and arguments.module
    assert arguments.training_script == "trl_tpgrpo"
    assert arguments.training_script_args == ["train", "--config", recipe(tmp_path), *SMALL]


def test_a_misspelt_key_of_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown options: --lerning_rate. See"):
        train.main(["--config", recipe(tmp_path, lerning_rate=1.0)])


def test_rewards_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch) -> None:
    assert train.load_reward("shapes_reward") is shapes_reward
    assert train.load_reward("trl_tpgrpo.rewards.jpeg_compressibility") is jpeg_compressibility
    (tmp_path / "my_rewards.py").write_text("def mine(images, **columns):\n    return [1.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    assert train.load_reward("my_rewards.mine")([0, 0]) == [1.0, 1.0]


def test_missing_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"prompt": ["a red circle"] * 8}).to_json(tmp_path / "data" / "train.jsonl")
    arguments = ["--config", recipe(tmp_path), *SMALL, "--dataset_name", str(tmp_path / "data")]
    with pytest.raises(ValueError, match=r"no split 'tests', only \['train'\]"):
        train.main([*arguments, "--dataset_train_split", "tests"])
    train.main(arguments)


def test_sample_writes_the_same_pictures_again(tmp_path: Path) -> None:
    options = ["--model_name_or_path", "testbed", "--prompt", "a red circle", "--prompt", "two blue squares"]
    options += ["--num_inference_steps", "4", "--guidance_scale", "1", "--device", "cpu"]
    sample.main([*options, "--num_images_per_prompt", "2", "--output_dir", str(tmp_path / "two")])
    sample.main([*options, "--num_images_per_prompt", "1", "--output_dir", str(tmp_path / "one")])
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == [
        "000-a-red-circle-0.png", "000-a-red-circle-1.png", "001-two-blue-squares-0.png", "001-two-blue-squares-1.png",
    ]  # fmt: skip
    one, two = (Image.open(tmp_path / folder / names[0]) for folder in ("one", "two"))
    assert one.size == (32, 32) and list(one.getdata()) == list(two.getdata())


@pytest.mark.parametrize("extra", [["--use_peft", "true"], ["--use_peft", "false", "--learning_rate", "1e-4"]])
def test_sample_takes_what_train_has_saved(extra: list[str], tmp_path: Path) -> None:
    train.main(["--config", recipe(tmp_path), *SMALL, *extra])
    options = ["--model_name_or_path", "testbed", "--prompt", "a red circle", "--num_inference_steps", "4"]
    options += ["--guidance_scale", "1", "--device", "cpu"]
    sample.main([*options, "--output_dir", str(tmp_path / "plain")])
    sample.main([*options, "--adapter", str(tmp_path / "out"), "--output_dir", str(tmp_path / "trained")])
    plain, trained = (Image.open(tmp_path / folder / "000-a-red-circle-0.png") for folder in ("plain", "trained"))
    assert list(plain.getdata()) != list(trained.getdata())


def test_sample_quantizes_under_a_lora_alone(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    options = ["--model_name_or_path", "testbed", "--prompt", "x", "--adapter", str(tmp_path)]
    with pytest.raises(ValueError, match="--quantization needs a LoRA: .* has all weights of a transformer"):
        sample.main([*options, "--quantization", "nf4"])


def test_sample_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt: use --prompt or --prompts_file"):
        sample.main(["--model_name_or_path", "testbed"])


def test_fidelity_measures_prints_and_saves(tmp_path: Path, capsys) -> None:
    options = ["--num_prompts", "2", "--completions", "one_step", "at_1_2_3", "exact_every_2"]
    small = [*SMALL, "--num_generations", "4", "--num_inference_steps", "5", "--sde_window_size", "4"]
    fidelity.main(["--config", recipe(tmp_path), *small, *options])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["one_step", "at_1_2_3", "exact_every_2", "exact"]
    assert rows[0].startswith("| `one_step` | 5.0 | 5.0 |") and "| 15.0 | 5.0 | 1.000 | 1.000 | 1.000 |" in rows[3]
    saved = {row["completion"]: row for row in json.loads((tmp_path / "out/fidelity.json").read_text())}
    assert saved["one_step"]["nfe"] == 5
    assert len(saved["at_1_2_3"]["correlation_by_step"]) == 4
    assert saved["one_step"]["correlation"] < saved["at_1_2_3"]["correlation"] <= 1
    assert min(Image.open(tmp_path / "out/fidelity.png").size) > 200


def test_the_rules_that_fidelity_chooses_itself_are_valid_for_any_number_of_steps() -> None:
    for steps in (2, 4, 6, 10, 28, 40):
        rules = [CompletionRule.parse(name) for name in fidelity.selection(steps)]
        assert all(step < steps for rule in rules for step in rule.at or ())
        assert len(set(rules)) == len(rules)


def test_fidelity_refuses_wrong_rules_before_it_loads_anything() -> None:
    with pytest.raises(ValueError, match="completion must be 'exact'.*got 'heun_2'"):
        fidelity.main(["--output_dir", "x", "--use_cpu", "true", "--completions", "heun_2"])


def test_demo_trains_reports_and_draws(tmp_path: Path, capsys) -> None:
    demo.main(["--output_dir", str(tmp_path), "--max_steps", "2", "--num_eval_prompts", "16", "--num_threads", "1"])
    text = capsys.readouterr().out
    assert "largest difference of a pixel: 0 of 255" in text
    assert all(kind in text for kind in ("single", "count", "pair", "position", "all"))
    pictures = {"before_after.png", "reward.png", "trajectory.png"}
    assert pictures == {path.name for path in tmp_path.glob("*.png")}
    assert all(min(Image.open(tmp_path / name).size) > 200 for name in pictures)
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_the_example_script_runs(tmp_path: Path) -> None:
    script = (ROOT / "examples/tpgrpo.py").read_text()
    assert script.count("\n") <= 45
    script = script.replace("max_steps=10", "max_steps=1, use_cpu=True, num_inference_steps=4")
    ended = run_python("-c", script, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "outputs/tpgrpo/pytorch_lora_weights.safetensors").exists()


# Recipes

RECIPES = ROOT / "examples/recipes"


def test_later_recipes_override_earlier_ones_and_options_all(tmp_path: Path) -> None:
    for name, text in {"a.yaml": "seed: 1\nbeta: 0.5\nnoise_level: 0.9\n", "b.yaml": "seed: 2\nbeta: 0.25\n"}.items():
        (tmp_path / name).write_text(text)
    given = [
        "--output_dir",
        str(tmp_path),
        "--config",
        str(tmp_path / "a.yaml"),
        str(tmp_path / "b.yaml"),
        "--seed",
        "3",
    ]
    config = make_parser().parse_args_and_config(given)[3]
    assert (config.seed, config.beta, config.noise_level) == (3, 0.25, 0.9)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("guard_rails: off", {"guard_rails": "off"}),
        ("guard_rails: 'off'", {"guard_rails": "off"}),
        ("eval_strategy: no", {"eval_strategy": "no"}),
        ("save_strategy: No", {"save_strategy": "no"}),
        ("bf16: off", {"bf16": False}),
        ("shuffle_dataset: no", {"shuffle_dataset": False}),
        ("use_cpu: on", {"use_cpu": True}),
        ("run_name: no", {"run_name": "no"}),
        ("run_name: 7", {"run_name": "7"}),
        ("scale_rewards: false", {"scale_rewards": "none"}),
        ("reward_weights: 2", {"reward_weights": [2.0]}),
        ("sde_window_range: [1, 3]", {"sde_window_range": [1, 3]}),
        ("report_to: [tensorboard]", {"report_to": ["tensorboard"]}),
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),
        ("ema_decay: null", {"ema_decay": None}),
        ("model_init_kwargs: {low_cpu_mem_usage: no}", {"model_init_kwargs": {"low_cpu_mem_usage": False}}),
    ],
)
def test_words_of_yaml_are_taken_as_meant(line: str, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\n{line}\n")
    config = make_parser().parse_args_and_config(["--config", str(tmp_path / "a.yaml"), "--use_cpu"])[3]
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_single_name_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("reward_funcs: brightness\nlora_target_modules: to_q\nuse_cpu: yes\n")
    script, model = make_parser().parse_args_and_config(["--config", str(tmp_path / "a.yaml")])[:2]
    assert script.reward_funcs == ["brightness"] and model.lora_target_modules == ["to_q"]
    assert read_recipes([tmp_path / "a.yaml"])["use_cpu"] == "yes"


# Prompts and rewards of one's own

PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a circle, left of \u00e9"]
WRITTEN = {
    "prompts.txt": "\n\n".join(PROMPTS) + "\n\n",
    "prompts.csv": "prompt\n" + "".join(f'"{prompt}"\n' for prompt in PROMPTS),
    "prompts.jsonl": "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS),
    "prompts.json": json.dumps([{"prompt": prompt} for prompt in PROMPTS]),
    "folder/train.txt": "\n".join(PROMPTS),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with byte order mark"])
@pytest.mark.parametrize("name", WRITTEN)
def test_prompts_are_read_from_files(name: str, mark: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(mark + WRITTEN[name], "utf-8")
    path = tmp_path / name.partition("/")[0]
    dataset = read_prompts(str(path), None, ["train"], None)[0]
    assert dataset["prompt"] == PROMPTS and dataset.column_names == ["prompt"]


def test_the_column_of_prompts_is_renamed_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"prompt": ["old"], "caption": ["new"], "count": [2]}).to_parquet(path)
    dataset = read_prompts(str(path), None, ["train"], "caption")[0]
    assert dataset.to_dict() == {"prompt": ["new"], "count": [2]}
    assert read_prompts(str(path), None, ["train"], "prompt")[0]["caption"] == ["new"]


def test_prompts_of_a_file_are_held_out(tmp_path: Path) -> None:
    """The same in training and in evaluation, which has nothing else of the file."""
    path = tmp_path / "a.csv"
    Dataset.from_dict({"prompt": [f"{number} circles" for number in range(20)]}).to_csv(path)
    train, test = read_prompts(str(path), None, ["train", "test"], None, 0.1)
    assert len(train) == 18 and sorted([*train["prompt"], *test["prompt"]]) == sorted(
        f"{n} circles" for n in range(20)
    )
    split = split_of(str(path), "test", 0.1)
    assert read_prompts(str(path), None, [split], None, 0.1)[0]["prompt"] == test["prompt"]
    assert split_of(str(path), "test", None) == "train"
    (tmp_path / "folder").mkdir()
    for name in ("train", "test"):
        train.to_csv(tmp_path / f"folder/{name}.csv")
    with pytest.raises(ValueError, match=r"--test_split_size is for a dataset with one split, .* \['train', 'test'\]"):
        read_prompts(str(tmp_path / "folder"), None, ["train"], None, 0.1)


@pytest.mark.parametrize("name", ["my_rewards.mine", "my_rewards.py:mine", "./my_rewards.mine", "my_rewards:mine"])
def test_the_forms_of_a_path_are_the_same(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def mine(images, **columns):\n    return [2.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    assert train.load_reward(name)([0]) == [2.0]


def test_a_run_takes_files_and_a_module_from_the_current_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def mine(images, **columns):\n    return [2.0] * len(images)\n")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]), "utf-8-sig")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    given = [
        "--config",
        recipe(tmp_path),
        *SMALL,
        "--dataset_name",
        "prompts.txt",
        "--reward_funcs",
        "my_rewards.py:mine",
    ]
    assert cli.main(["train", *given]) == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
