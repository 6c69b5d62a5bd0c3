"""What `uv run` reads of the example scripts, and what the Dockerfile copies and installs."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = [ROOT / "examples/tpgrpo.py", *sorted((ROOT / "examples/datasets").glob("*.py"))]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COPIED = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]


def metadata(text: str) -> dict[str, Any]:
    """The inline metadata of a script: https://packaging.python.org/en/latest/specifications/inline-script-metadata."""
    (block,) = re.findall(r"^# /// script\n((?:#(?: .*)?\n)+)# ///$", text, re.MULTILINE)
    return tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_name_what_they_import_in_versions_that_fit_the_package(path: Path) -> None:
    found = metadata(path.read_text())
    assert found["requires-python"] == PROJECT["requires-python"]
    needed = {one.name: one for one in map(Requirement, found["dependencies"])}
    bounds = {one.name: one for one in map(Requirement, PROJECT["dependencies"])}
    imported = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    assert imported & {*bounds, "trl_tpgrpo"} == {name.replace("-", "_") for name in needed}
    own = needed.pop("trl-tpgrpo", Requirement("trl-tpgrpo"))
    assert own.extras <= PROJECT["optional-dependencies"].keys() and not own.specifier
    assert needed == {name: bounds[name] for name in needed}


def test_uv_finds_the_package_in_the_clone() -> None:
    sources = metadata(SCRIPTS[0].read_text())["tool"]["uv"]["sources"]
    assert {name: (SCRIPTS[0].parent / source["path"]).resolve() for name, source in sources.items()} == {
        PROJECT["name"]: ROOT
    }


def test_what_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    assert DOCKERFILE.count("\n") < 30
    copied = {name for names in COPIED for name in names}
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == copied
    named = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt"}
    assert named <= copied  # without them it cannot be built


def test_the_docker_image_has_the_pytorch_and_the_extras_of_the_package() -> None:
    base, extras = (re.search(rf"^ARG {name}=(.+)$", DOCKERFILE, re.MULTILINE)[1] for name in ("BASE", "EXTRAS"))
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert base.startswith(f"pytorch/pytorch:{pinned}-cuda")
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert f'ENTRYPOINT ["{next(iter(PROJECT["scripts"]))}"]' in DOCKERFILE
