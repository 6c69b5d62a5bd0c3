"""What the documentation says exists."""

import re
from pathlib import Path

import pytest
from test_trainer import build, prompts

from trl_tpgrpo import TPGRPOConfig
from trl_tpgrpo.config import TPGRPOConfig as Config


ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if not target.startswith("http") and not (page.parent / target).exists()]
    assert not missing


def test_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    named = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == {"demo", "test"}
    assert named <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_contributing_names_targets_files_and_benchmarks_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) == targets - {"demo"}
    named = re.findall(r"`((?:benchmarks|docs|examples|tests|trl_tpgrpo|\.ci)/[\w./]+)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]
    not_run = {"models", "plain"}  # what other scripts import
    listed = set(re.findall(r"^\| `python benchmarks/(\w+)\.py", text, re.MULTILINE))
    assert listed == {path.stem for path in ROOT.glob("benchmarks/*.py")} - not_run


def test_file_tree_of_the_readme_is_that_of_the_package() -> None:
    tree = (ROOT / "README.md").read_text().split("```\ntrl_tpgrpo/\n")[1].split("```")[0]
    listed = set(re.findall(r"^  ([\w.]+)/?[ ,]", tree, re.MULTILINE)) | {"commands"}
    present = {path.name for path in (ROOT / "trl_tpgrpo").iterdir() if not path.name.startswith("_")} - {"py.typed"}
    assert listed == present


def test_every_logged_metric_is_explained(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1, eval_dataset=prompts(4), beta=0.1)
    trainer.train()
    trainer.evaluate()
    text = (ROOT / "docs/logged_metrics.md").read_text()
    of_transformers = re.compile("train_|total_flos|step$|eval_(runtime|samples|steps|num_|seconds|model_prep)")
    for name in {name for entry in trainer.state.log_history for name in entry}:
        documented = re.sub(r"rewards/\w+/", "rewards/{name}/", re.sub(r"(step|state)_\d+$", r"\1_{j}", name))
        assert f"`{documented}`" in text or of_transformers.match(name), name


def test_every_setting_is_explained_in_the_config() -> None:
    for name in Config.__annotations__:
        if not name.startswith("_") and name not in ("gradient_checkpointing", "logging_nan_inf_filter"):
            assert f"        {name} (`" in TPGRPOConfig.__doc__ or f"`{name}`" in TPGRPOConfig.__doc__, name


def test_tests_that_the_pages_name_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    present = set(
        re.findall(r"^def (test_\w+)", "\n".join(path.read_text() for path in ROOT.glob("tests/*.py")), re.M)
    )
    assert set(re.findall(r"`(test_\w+)`", text)) <= present
    missing = [name for name in set(re.findall(r"tests/\w+\.py", text)) if not (ROOT / name).exists()]
    assert not missing
