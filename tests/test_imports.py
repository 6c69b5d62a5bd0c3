"""Who may import whom: maths knows nothing, models and rewards do not know each other, the trainer knows all."""

import ast
from pathlib import Path

import pytest

import trl_tpgrpo


ROOT = Path(trl_tpgrpo.__file__).parent
MAY_IMPORT = {
    "algorithm": set(),
    "policies": {"testbed"},
    "rewards": {"__version__"},  # which the server shows
    "testbed": set(),
    "config": {"algorithm", "rewards"},  # of rewards how import paths are found
    "metrics": {"algorithm"},
    "data": {"rewards"},
    "batches": {"algorithm", "policies", "rewards"},
    "callbacks": {"algorithm", "batches"},
    "rollouts": {"algorithm", "batches", "config", "metrics", "policies", "rewards"},
    "hub": {"__version__", "policies"},  # the version is on the card
    "trainer": {
        "algorithm",
        "batches",
        "callbacks",
        "config",
        "data",
        "hub",
        "metrics",
        "policies",
        "rewards",
        "rollouts",
    },
    "commands": {
        "algorithm",
        "batches",
        "callbacks",
        "config",
        "hub",
        "policies",
        "rewards",
        "rollouts",
        "testbed",
        "trainer",
    },
    "cli": {"__version__", "commands"},
    "__init__": {"callbacks", "config", "trainer"},
    "__main__": {"cli"},
}
"""Data goes one way: scorer -> rollouts -> batches -> trainer -> algorithm."""

MAY_TOUCH_TRL = {"config", "data", "hub", "trainer", "commands"}


def part_of(path: Path) -> str:
    """The top-level part of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> tuple[set[str], set[str]]:
    """The other parts of the package, and the other packages, that a file imports anywhere in it."""
    depth = len(path.relative_to(ROOT).parts)
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return own - {part_of(path)}, foreign


FILES = sorted(path for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_parts_import_only_what_they_may(path: Path) -> None:
    own, foreign = imported(path)
    part = part_of(path)
    assert own <= MAY_IMPORT[part]
    assert "trl_tpgrpo" not in foreign, "import by relative path, so that this test sees it"
    if part not in MAY_TOUCH_TRL:
        assert "trl" not in foreign


def test_families_are_known_in_policies_alone() -> None:
    """The story and the maths do not know SD3 from FLUX; the testbed is an SD3 pipeline."""
    for path in FILES:
        if part_of(path) not in ("policies", "testbed"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert not {name for name in names if "sd3" in name.lower() or "flux" in name.lower()}, path


def test_every_rule_is_about_something_that_exists() -> None:
    parts = {part_of(path) for path in FILES}
    assert set(MAY_IMPORT) == parts
