"""What is loaded names no code that is run, and what a user names is told before it is: configs, recipes, options."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from diffusers import AutoencoderKL
from tiny import tiny_sd3

from trl_tpgrpo.commands import checks
from trl_tpgrpo.commands.architectures import load_architecture, load_part
from trl_tpgrpo.policies.loading import load_pipeline


EVIL = "from pathlib import Path\nPath(__file__).with_suffix('.executed').touch()\nclass Evil: pass\nmine = print\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny_sd3().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a trace, where Python finds it, beside a pipeline and in it."""
    for place in (tmp_path / "planted.py", saved / "planted.py", saved / "vae/planted.py"):
        place.write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_index(saved: Path, **changes: object) -> Path:
    """Change the pipeline's index."""
    index = json.loads((saved / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]} | changes
    (saved / "model_index.json").write_text(json.dumps(index))
    return saved


@pytest.mark.parametrize("changes", [{"vae": ["planted", "Evil"]}, {"_class_name": ["planted", "Evil"]}])
def test_a_pipelines_config_imports_no_module(changes: dict, saved: Path, folder: Path) -> None:
    with_index(saved, **changes)
    for load in (load_pipeline, load_architecture, lambda model: load_part(model, "scheduler")):
        with pytest.raises(ValueError, match=f"names the module 'planted' for its {next(iter(changes))}"):
            load(saved)
    assert not [*folder.rglob("*.executed"), *saved.rglob("*.executed")]


def test_what_a_user_trusts_is_run_and_said(saved: Path, folder: Path, caplog) -> None:
    with_index(saved, vae=["planted", "Evil"])
    with pytest.raises(AttributeError, match="Evil"):  # which has no from_pretrained
        load_pipeline(saved, trust_remote_code=True)
    assert f"trust_remote_code: Python code of {saved} is run" in caplog.text


def test_settings_of_a_pipeline_are_no_classes(saved: Path, folder: Path) -> None:
    with_index(saved, sizes=[16, 16], names=["a", "b", "c"])
    assert isinstance(load_pipeline(saved).vae, AutoencoderKL)


def test_a_recipe_that_names_code_says_whose_before_it_runs(folder: Path, caplog, monkeypatch) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    recipe = {
        "reward_funcs": ["planted.mine", "brightness", "http://localhost:1/x.y"], "credit": "./planted.py:mine",
        "policy_class": "absent.Mine", "model_init_kwargs": {"trust_remote_code": True},
    }  # fmt: skip
    (folder / "fetched.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        checks.check_training("train", ["--config", "fetched.yaml"])
    where = folder / "planted.py"
    told = f"Custom code in fetched.yaml: reward_funcs planted.mine ({where}); credit planted.mine ({where}); "
    assert told + "policy_class absent.Mine (not found); trust_remote_code (of the model's repository)." in caplog.text
    assert not list(folder.rglob("*.executed"))
    caplog.clear()
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):  # what one names oneself needs no warning
        checks.check_training("train", ["--reward_funcs", "planted.mine"])
    assert not caplog.records


def test_trust_in_code_is_no_option_that_is_ignored() -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        checks.check_training("train", ["--trust_remote_code", "true"])
