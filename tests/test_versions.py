"""The versions that files name: one set of floors, one of newest, and nothing in between."""

import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
READ_NOT_RUN = {"torch"}


def pins(name: str) -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {normal(package): version for package, version in lines}


def bounds(requirements: list[str]) -> dict[str, str]:
    return {normal(name): version for name, version in (text.split(">=") for text in requirements)}


def normal(package: str) -> str:
    return re.sub("[-_.]+", "-", package).lower()


def test_lower_bounds_are_the_floors_that_are_tested() -> None:
    floors, lowest = pins("constraints/floors.txt"), bounds(PROJECT["dependencies"] + EXTRAS["testbed"])
    assert floors.keys() == lowest.keys()
    assert {name for name in floors if floors[name] != lowest[name]} == READ_NOT_RUN


def test_constraints_are_the_package_s_own_dependencies_as_they_are_locked() -> None:
    own, locked = pins("constraints.txt"), pins("requirements.lock")
    assert own.keys() == bounds(PROJECT["dependencies"] + EXTRAS["testbed"] + EXTRAS["remote"]).keys()
    assert own == {name: locked[name] for name in own}
