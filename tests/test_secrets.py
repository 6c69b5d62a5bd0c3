"""Tokens and keys are in nothing that a run writes, sends to a tracker, prints or raises."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from test_trainer import brightness, build, config, lora, prompts
from tiny import tiny_sd3
from transformers import TrainerCallback

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.callbacks.resuming import SETTINGS
from trl_tpgrpo.callbacks.storage import CHECKSUMS
from trl_tpgrpo.config import without_secrets


SECRET = "hf_aVerySecretToken"
GIVEN = {
    "hub_token": SECRET,
    "model_init_kwargs": {
        "token": SECRET,
        "proxies": {"https": f"http://me:{SECRET}@proxy:3128"},
        "revision": "main",
    },
}


class Tracker(TrainerCallback):
    """What a tracker gets: the settings in each form that transformers' integrations take."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sent += [args.to_dict(), args.to_json_string(), args.to_sanitized_dict(), repr(args), f"{args}"]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.sent.append(logs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_sd3().save_pretrained(path)
    return str(path)


def run(folder: str, output_dir: Path, **changes: Any) -> TPGRPOTrainer:
    """A trainer that loads its model with a token, saves, and reports to TensorBoard."""
    settings = {**GIVEN, "save_strategy": "steps", "save_steps": 1, "report_to": ["tensorboard"], **changes}
    args = config(output_dir, **settings)
    return TPGRPOTrainer(folder, brightness, args, prompts(), prompts(2), peft_config=lora())


def test_a_token_is_in_nothing_that_a_run_writes(folder: str, tmp_path: Path, capfd, caplog, monkeypatch) -> None:
    caplog.set_level(logging.DEBUG)
    tracker = Tracker()
    trainer = run(folder, tmp_path / "run", log_completions=True, log_images_steps=1)
    trainer.add_callback(tracker)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"recipe.yaml", SETTINGS, "README.md"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files) and len(tracker.sent) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in f"{tracker.sent} {caplog.text} {''.join(capfd.readouterr())} {vars(trainer.card)}"
    with pytest.raises(ValueError, match="is from a run with other settings") as caught:
        other = run(folder, tmp_path / "other", model_init_kwargs={"token": SECRET, "revision": "other"}, beta=1.0)
        other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert "model_init_kwargs" in str(caught.value) and SECRET not in str(caught.value)


def test_a_checkpoint_with_a_token_of_an_earlier_version_is_resumed(folder: str, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", max_steps=1).train()
    path = tmp_path / "run/checkpoint-1" / SETTINGS
    saved = json.loads(path.read_text())
    saved["settings"]["model_init_kwargs"] = GIVEN["model_init_kwargs"]
    path.write_text(json.dumps(saved))
    assert SECRET in path.read_text()
    (path.parent / CHECKSUMS).unlink()
    resumed = run(folder, tmp_path / "run", max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_settings_with_hidden_values_make_a_config_without_them(tmp_path: Path) -> None:
    args = config(tmp_path, **GIVEN)
    assert args.hub_token == args.model_init_kwargs["token"] == SECRET  # where they are used
    again = TPGRPOConfig(**args.to_dict())
    assert again.hub_token is None and set(again.model_init_kwargs) == {"proxies", "revision"}
    assert TPGRPOConfig(**json.loads(args.to_json_string())).model_init_kwargs == again.model_init_kwargs


@pytest.mark.parametrize("wrong", [{"api_key": SECRET}, {"headers": {"Authorization": SECRET}}])
def test_a_secret_that_diffusers_would_print_is_refused(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model_init_kwargs has '{next(iter(wrong))}'") as caught:
        config(tmp_path, model_init_kwargs=wrong)
    assert SECRET not in str(caught.value)


def test_only_secrets_are_hidden() -> None:
    """No setting has a name by which it would be taken for one, but those of transformers that are tokens."""
    args = TPGRPOConfig("somewhere", use_cpu=True)
    hidden = {name for name in vars(args) if without_secrets({name: "value"})[name] != "value"}
    assert hidden == {"hub_token"}
    plain = {"tokenizer": "a", "max_tokens": "2", "keys": "k", "token": True, "url": "https://host/path@1"}
    assert without_secrets(plain) == plain
    assert without_secrets({"token": "", "a": [{"password": "x"}]}) == {"token": "", "a": [{"password": "<PASSWORD>"}]}


def test_a_config_shows_that_a_token_was_given(tmp_path: Path) -> None:
    shown = repr(build(tmp_path, hub_token=SECRET).args)
    assert "hub_token='<HUB_TOKEN>'" in shown and shown.startswith("TPGRPOConfig(output_dir=")
