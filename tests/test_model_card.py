"""The card and the recipe of a run: what they tell, that the Hub takes the one and the command line the other."""

import copy
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
import yaml
from datasets import Dataset
from hub_server import WRITE, HubServer, metadata_problems
from huggingface_hub import ModelCard
from test_trainer import build, config, lora, prompts
from tiny import tiny_sd3
from trl import GRPOTrainer

from trl_tpgrpo import TPGRPOConfig
from trl_tpgrpo.commands import train
from trl_tpgrpo.hub import card
from trl_tpgrpo.hub.card import rewards_by_update, to_yaml
from trl_tpgrpo.policies.weights import load_weights


CARD_IMAGES = {f"images/sample_{number}.png" for number in range(4)}


def test_the_card_tells_the_run_and_is_valid(hub: HubServer, tmp_path: Path) -> None:
    trainer = build(
        tmp_path / "run", eval_dataset={"held": prompts(4)}, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        num_generations_eval=1,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/prompts", tags="mine", model_name="bright")
    written = ModelCard(hub.files("me/run")["README.md"].decode())
    written.validate()
    assert metadata_problems(str(written)) == []
    data = written.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["datasets"]) == (
        "diffusers", "text-to-image", "someone/prompts",
    )  # fmt: skip
    tags = {"trl", "tp-grpo", "text-to-image", "lora", "diffusers", "generated_from_trainer", "mine"}
    assert tags == set(data["tags"])
    assert "base_model" not in data and "base_model_relation" not in data  # it has been built in memory
    urls = [sample["output"]["url"] for sample in data["widget"]]
    assert [sample["text"] for sample in data["widget"]] == prompts(4)["prompt"] and set(urls) == CARD_IMAGES
    values = [entry["eval_held_reward"] for entry in trainer.state.log_history if "eval_held_reward" in entry]
    first, last = values[0], values[-1]
    assert f"| `eval_held_reward` | {first:.4g} (update 0) | {last:.4g} (update 2) |" in written.text
    assert written.text.startswith("\n# bright")
    assert "- `updates`: 2" in written.text and "- `seed`: 42" in written.text
    assert "on the [someone/prompts](https://huggingface.co/datasets/someone/prompts) dataset" in written.text


def test_the_card_has_trls_sections_versions_and_citations(tmp_path: Path) -> None:
    """Badges aside, what TRL's template says after its usage snippet, which is for language models."""
    trainer = build(tmp_path / "run")
    trainer.create_model_card()
    text = (tmp_path / "run/README.md").read_text()
    template = (Path(trl.__file__).parent / "templates/lm_model_card.md").read_text()
    headings = re.findall(r"^##+ .*", template, re.MULTILINE)
    assert [line for line in text.splitlines() if line in headings] == headings
    for name, package in re.findall(r"- (\w+): \{\{ (\w+)_version \}\}", template):
        assert f"\n- {name}: {version({'pytorch': 'torch'}.get(package, package))}\n" in text
    assert re.search(r"@software\{vonwerra2020trl.*?\n\}", template, re.DOTALL)[0] in text
    assert f"Cite {trainer._name} as:\n\n```bibtex\n{trainer._paper['citation']}\n```" in text
    assert trainer._paper.keys() == GRPOTrainer._paper.keys() and trainer._paper["id"] in text
    assert "<img" not in text and "Flow-GRPO]" not in text


def test_the_card_has_the_badges_and_tags_of_where_the_run_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addresses are set here, as no tracker's server is at hand; trackio's callback sets the tags of the model."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "run", SimpleNamespace(url="https://wandb.ai/me/shapes/runs/1"))
    monkeypatch.setattr(card, "get_comet_experiment_url", lambda: "https://www.comet.com/me/shapes/1")
    monkeypatch.setenv("JOB_ID", "1")
    trainer = build(tmp_path / "run", credit="outcome")
    trainer.model.model_tags = ["trackio", "trackio:https://huggingface.co/spaces/me/shapes"]
    trainer.create_model_card()
    written = ModelCard((tmp_path / "run/README.md").read_text())
    assert metadata_problems(str(written)) == [] and {"hf_jobs", *trainer.model.model_tags} <= set(written.data.tags)
    template = (Path(trl.__file__).parent / "templates/lm_model_card.md").read_text()
    badges = re.findall(r"(\[<img .*?/>\])\(\{\{ (\w+)_url \}\}\)", template)
    urls = {"wandb": wandb.run.url, "comet": "https://www.comet.com/me/shapes/1"}
    urls["trackio"] = "https://huggingface.co/spaces/me/shapes"
    assert len(badges) == 3 and all(f"\n{badge}({urls[name]})\n" in written.text for badge, name in badges)
    assert "the credit of [Flow-GRPO](https://huggingface.co/papers/2505.05470)" in written.text
    monkeypatch.setattr(card, "get_trackio_space_url", lambda: "https://me-shapes.hf.space?project=a")
    trainer.create_model_card()
    tags = ModelCard((tmp_path / "run/README.md").read_text()).data.tags
    assert [tag for tag in tags if "trackio" in tag] == ["trackio", "trackio:https://me-shapes.hf.space?project=a"]


def test_the_hub_of_the_tests_refuses_wrong_metadata() -> None:
    wrong = (
        "base_model: /data/base",
        "base_model_relation: adapter",
        "datasets: testbed",
        "tags: [1]",
        "license:",
        "a: [",
    )
    assert all(len(metadata_problems(f"---\n{line}\n---\n# A card")) == 1 for line in wrong)
    assert metadata_problems("# A card without metadata")


def test_the_cards_images_are_those_of_the_trained_model(hub: HubServer, tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", max_steps=2, ema_update_every=1)
    trainer.train()
    trainer.push_to_hub()
    again = build(tmp_path / "again", max_steps=1)
    load_weights(again.model, tmp_path / "run")
    again.push_to_hub()
    one, other = (hub.files(f"me/{name}")["images/sample_0.png"] for name in ("run", "again"))
    assert one == other
    build(tmp_path / "untrained").push_to_hub()
    assert hub.files("me/untrained")["images/sample_0.png"] != one


def test_rewards_of_training_where_nothing_was_evaluated(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run")
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "run/README.md").read_text()
    assert "In training, for images of the SDE sampler (there was no evaluation)" in text
    assert re.search(r"\| `reward` \| [\d.]+ \(update 1\) \| [\d.]+ \(update 2\) \|", text)
    assert "mean_of_state" not in text and "<Gallery" not in text


def test_the_card_has_the_first_and_last_value_of_each_reward(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run")
    trainer.create_model_card()
    assert "## Rewards\n\nNo rewards have been logged.\n\n## Training" in (tmp_path / "run/README.md").read_text()
    trainer.state.log_history = [
        {"step": 1, "reward": 9.0},
        {"step": 0, "eval_reward": 0.25, "eval_runtime": 1.0},
        {"step": 5, "eval_reward": 0.5, "eval_rewards/brightness/mean": 0.125},
        {"step": 9, "eval_reward": 0.75},
    ]
    trainer.create_model_card()
    text = (tmp_path / "run/README.md").read_text()
    assert re.search(r"fixed noise:\n\n((?:\|.*\n)+)\n## Training", text)[1].splitlines() == [
        "| reward | first | last |",
        "|---|---|---|",
        "| `eval_reward` | 0.25 (update 0) | 0.75 (update 9) |",
        "| `eval_rewards/brightness/mean` | 0.125 (update 5) | 0.125 (update 5) |",
    ]
    assert rewards_by_update(trainer.state.log_history, "reward") == {"reward": [(1, 9.0)]}


def test_prompts_with_quotes_and_new_lines_make_a_valid_card(tmp_path: Path) -> None:
    awkward = Dataset.from_dict({"prompt": ['a "red"\ncircle: {x}', "a 'blue' square \u00e9"] * 3})
    trainer = build(tmp_path / "run", train_dataset=awkward)
    trainer.create_model_card()
    text = (tmp_path / "run/README.md").read_text()
    assert metadata_problems(text) == []
    compile(re.search(r"```python\n(.+?)```", text, re.DOTALL)[1], "snippet", "exec")


def parsed(recipe: Path, *options: str) -> tuple:
    return train.make_parser().parse_args_and_config(["--config", str(recipe), "--use_cpu", "true", *options])


def test_the_recipe_of_a_run_in_python_makes_the_same_settings(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", epsilon=1e-3, hub_token=WRITE, sde_window_range=[0, 2], optim="sgd", beta=0.0)
    trainer.args.learning_rate = 0.125  # set after the config was built
    trainer.create_model_card()
    text = (tmp_path / "run/recipe.yaml").read_text()
    assert WRITE not in text and str(tmp_path) not in text and "output_dir" not in yaml.safe_load(text)
    assert "To be given, as the run had folders or functions of its own: dataset_name, model_name_or_path" in text
    script, model, _, args, *_ = parsed(tmp_path / "run/recipe.yaml", "--output_dir", str(tmp_path / "again"))
    assert script.reward_funcs == ["test_trainer.brightness"]
    assert (model.use_peft, model.lora_r, model.lora_alpha) == (True, 4, 8)
    assert set(model.lora_target_modules) == set(trainer.model.peft_config["default"].target_modules)
    other = {"output_dir", "hub_token", "disable_tqdm", "ddp_find_unused_parameters", "logging_dir", "derived"}
    for name in set(TPGRPOConfig.__dataclass_fields__) - other:
        assert getattr(args, name) == getattr(trainer.args, name), name


def test_the_recipe_names_what_of_the_adapter_it_cannot_hold(tmp_path: Path) -> None:
    more = {
        "exclude_modules": ["attn.to_add_out", "attn.add_v_proj"], "rank_pattern": {"attn.to_q": 2},
        "alpha_pattern": {"attn.to_q": 3}, "layers_to_transform": [0], "layers_pattern": "transformer_blocks",
        "init_lora_weights": "gaussian",
    }  # fmt: skip
    build(tmp_path / "run", peft_config=lora(**more)).create_model_card()
    text = (tmp_path / "run/recipe.yaml").read_text()
    told = re.fullmatch(r"# The adapter had more, .* Python alone: LoraConfig\((.*)\)", text.splitlines()[0])[1]
    assert eval(f"dict({told})") == more | {"exclude_modules": ["attn.add_v_proj", "attn.to_add_out"]}
    assert parsed(tmp_path / "run/recipe.yaml", "--output_dir", str(tmp_path / "again"))[1].lora_r == 4
    build(tmp_path / "plain").create_model_card()
    assert "LoraConfig" not in (tmp_path / "plain/recipe.yaml").read_text()


def test_a_base_with_a_fused_adapter_is_not_named(tmp_path: Path) -> None:
    """Nobody else has it, as the refusal of a pipeline with an adapter advises to make it."""
    build(tmp_path / "first").save_model()
    pipeline = tiny_sd3()
    pipeline.register_to_config(_name_or_path="someone/base")
    trainer = build(tmp_path / "plain", copy.deepcopy(pipeline))
    assert trainer.card._base_model == "someone/base"
    pipeline.load_lora_weights(tmp_path / "first")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    trainer = build(tmp_path / "run", pipeline)
    trainer.create_model_card()
    assert "base_model" not in ModelCard((tmp_path / "run/README.md").read_text()).data.to_dict()
    assert "someone/base" not in (tmp_path / "run/README.md").read_text() + (tmp_path / "run/recipe.yaml").read_text()


def test_the_recipe_of_a_plain_config_is_empty(tmp_path: Path) -> None:
    assert config(tmp_path).given.keys() >= {"height", "learning_rate"}
    assert TPGRPOConfig(str(tmp_path)).given == {"output_dir": str(tmp_path)}
    assert yaml.safe_load(to_yaml(TPGRPOConfig(str(tmp_path)).given)) in (None, {})


def test_the_recipe_keeps_secrets_and_paths_of_nested_settings(tmp_path: Path) -> None:
    settings = {
        "model_init_kwargs": {"token": WRITE, "revision": "main", "cache_dir": "/data"}, "deepspeed": "zero2.json",
        "prompt_embeds_dir": "embeds", "trackio_space_id": "me/space", "model_name_or_path": str(tmp_path), "seed": 3,
    }  # fmt: skip
    text = to_yaml(settings)
    assert yaml.safe_load(text) == {"model_init_kwargs": {"revision": "main"}, "seed": 3}
    assert "deepspeed, model_name_or_path" in text


def test_a_reward_that_cannot_be_imported_is_said_to_be_missing(tmp_path: Path) -> None:
    def mine(images: list, **columns: object) -> list[float]:
        return [1.0] * len(images)

    build(tmp_path / "run", reward_funcs=mine, full=True).create_model_card()
    text = (tmp_path / "run/recipe.yaml").read_text()
    assert "functions of its own: dataset_name, model_name_or_path, reward_funcs" in text
    assert not {"use_peft", "reward_funcs"} & yaml.safe_load(text).keys()
