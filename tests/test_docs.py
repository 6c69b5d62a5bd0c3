"""What the documentation says exists."""

import importlib
import re
from pathlib import Path

import pytest
from documents import PAGES, ROOT, anchors, links
from test_trainer import build, prompts

import trl_tpgrpo
from trl_tpgrpo import TPGRPOConfig, rewards
from trl_tpgrpo.config import TPGRPOConfig as Config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "## Two *words*, `a_b`: twice\n\n## Two words, a_b: twice\n\n```bash\n# no heading\n```\n"
    )
    assert anchors(tmp_path / "other.md") == {"two-words-a_b-twice", "two-words-a_b-twice-1"}
    page = tmp_path / "page.md"
    page.write_text("[a](https://x.org) [b](other.md#two-words-a_b-twice) ![c](no.png) `[d](e)`\n\n```\n[f](g)\n```\n")
    assert links(page) == ["other.md#two-words-a_b-twice", "no.png"]
    with pytest.raises(AssertionError, match="no.png"):
        test_links_lead_somewhere(page)
    page.write_text("[b](other.md#no-heading)\n")
    with pytest.raises(AssertionError, match="no-heading"):
        test_links_lead_somewhere(page)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """MkDocs asks the same when it builds; here it takes no build."""
    navigation = re.findall(r"^  - [\w ]+: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    shown = [path.name for path in PAGES if path.name != "README.md"]
    assert set(shown) <= set(navigation) and len(navigation) == len(set(navigation))


def test_public_names_are_on_the_page_of_the_api() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = {f"{module.__name__}.{name}" for module in (trl_tpgrpo, rewards) for name in module.__all__}
    assert public <= set(shown)
    for path in shown:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name) or importlib.import_module(path)


def test_tables_of_settings_and_of_the_api_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tables = importlib.import_module("tables")
    for page, text in tables.pages().items():
        assert page.read_text() == text, f"{page.name}: run `python docs/tables.py`"
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (`.+?`) \| .+ \|", tables.settings(), re.MULTILINE)
    own = [name for name in Config.__annotations__ if not name.startswith("_") and name != "derived"]
    assert [name for name, _ in rows] == own and tables.PAPER.keys() <= set(own)
    assert ("num_generations", "`24`") in rows and ("vae_slicing", "`False`") in rows
    settings = ROOT / "docs/settings.md"
    assert tables.filled(settings, tables.settings().replace("`24`", "`25`")) != settings.read_text()


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
    not_run = {"models", "worlds", "plain", "critic", "gradient_report"}  # what other scripts import
    listed = set(re.findall(r"^\| `python benchmarks/(\w+)\.py", text, re.MULTILINE))
    assert listed == {path.stem for path in ROOT.glob("benchmarks/*.py")} - not_run


def test_file_tree_of_contributing_is_that_of_the_package() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```\ntrl_tpgrpo/\n")[1].split("```")[0]
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
