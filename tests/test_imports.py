"""Who may import whom: maths knows nothing, models and rewards do not know each other, the trainer knows all."""

import ast
from pathlib import Path

import pytest

import trl_tpgrpo


ROOT = Path(trl_tpgrpo.__file__).parent
MAY_IMPORT = {
    "sde": set(),
    "credit": set(),
    "losses": set(),
    "compat": set(),
    "metrics": {"credit"},
    "sampler": set(),
    "recipe": set(),
    "model_card": {"config", "recipe"},
    "hub": {"config", "model_card", "policies"},
    "display": {"config", "credit", "trajectories"},
    "publishing": {"config", "hub", "model_card", "policies", "rewards"},
    "completion": {"sde"},
    "rollout": {"completion", "sde"},
    "fidelity": {"credit"},
    "sharding": {"config"},
    "policies": {"sharding"},
    "rewards": set(),
    "testbed": set(),
    "trajectories": {"credit", "policies", "rewards", "rollout"},
    "config": {"completion", "credit", "guard_rails", "rewards", "rollout", "sde"},
    "guard_rails": set(),
    "checks": {"config", "rewards"},
    "models": {"checks", "compat", "config", "policies", "sharding"},
    "embeddings": {"policies"},
    "generation": {"completion", "config", "embeddings", "policies", "rollout"},
    "averaging": {"sharding"},
    "checkpoints": set(),
    "architectures": set(),
    "serving": set(),
}
MAY_TOUCH_TRL = {"config", "sampler", "publishing", "trainer", "commands"}


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
    if part in MAY_IMPORT:
        assert own <= MAY_IMPORT[part]
    assert "trl_tpgrpo" not in foreign, "import by relative path, so that this test sees it"
    if part not in MAY_TOUCH_TRL:
        assert "trl" not in foreign


def test_model_names_stay_in_policies() -> None:
    """The story and the maths do not know SD3 from FLUX."""
    for name in ("trainer", "trajectories", "rollout", "sde", "credit", "losses", "checks"):
        names = {
            node.id for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())) if isinstance(node, ast.Name)
        }
        assert not {found for found in names if "sd3" in found.lower() or "flux" in found.lower()}


def test_every_rule_is_about_something_that_exists() -> None:
    parts = {part_of(path) for path in FILES}
    assert set(MAY_IMPORT) | MAY_TOUCH_TRL <= parts
