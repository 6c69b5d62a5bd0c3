"""What the site does to Markdown and docstrings.

That the whole of it builds without a warning is shown by `make docs`.
"""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer


DOCS = Path(__file__).parents[1] / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "link", "in_site"),
    [
        ("docs/trainer.md", "rewards.md", "rewards.md"),
        ("docs/trainer.md", "images/terminal.png", "images/terminal.png"),
        ("docs/trainer.md", "../examples/tpgrpo.py", "source/examples/tpgrpo.py.md"),
        ("docs/distributed.md", "../examples/accelerate", "source/examples/accelerate.md"),
        ("docs/index.md", "../CHANGELOG.md", "CHANGELOG.md"),
        ("docs/index.md", "../README.md", "overview.md"),
        ("CHANGELOG.md", "docs/distributed.md", "distributed.md"),
        ("CHANGELOG.md", "LICENSE", "source/LICENSE.md"),
        ("docs/trainer.md", "../examples/no_such.py", "../examples/no_such.py"),  # MkDocs reports it
        ("docs/trainer.md", "../../outside", "../../outside"),
    ],
)
def test_links_lead_to_pages_of_the_site(page: str, link: str, in_site: str) -> None:
    pytest.importorskip("mkdocs", reason="the packages of the extra docs are not installed")
    assert load("hooks").in_site(page, link) == in_site


def test_anchors_and_other_sites_are_left_alone() -> None:
    pytest.importorskip("mkdocs", reason="the packages of the extra docs are not installed")
    found = load("hooks").LINK.findall("[a](b.md) [c](d.md#e) [f](#g) [h](https://i.org/j) ![k](l.png)")
    assert found == ["b.md", "d.md", "l.png"]


def test_docstrings_of_hugging_face_become_lists() -> None:
    pytest.importorskip("griffe", reason="the packages of the extra docs are not installed")
    as_markdown = load("docstrings").as_markdown
    assert as_markdown(
        "What it is, see [`~trl.GRPOConfig`] and [`~a.B.c`].\n\n"
        "Parameters:\n    > Parameters that control the data\n\n"
        "    size (`int`, *optional*, defaults to `8`):\n        How much.\n        And more.\n\n"
        "Raises:\n    ValueError: If not."
    ) == (
        "What it is, see `GRPOConfig` and `B.c`.\n\n**The data**\n\n"
        "- `size` (`int`, *optional*, defaults to `8`):\n    How much.\n    And more.\n\n\n"
        "Raises:\n    ValueError: If not."
    )
    google = "What.\n\nArgs:\n    size: How much.\n"
    assert as_markdown(google) == google


@pytest.mark.parametrize("documented", [TPGRPOConfig, TPGRPOTrainer])
def test_each_parameter_is_an_item(documented: type) -> None:
    pytest.importorskip("griffe", reason="the packages of the extra docs are not installed")
    docstring = inspect.getdoc(documented) or ""
    parameters = re.findall(r"^ {4}(\w+) \(", docstring, re.MULTILINE)
    assert len(parameters) > 8
    assert re.findall(r"^- `(\w+)` \(", load("docstrings").as_markdown(docstring), re.MULTILINE) == parameters
