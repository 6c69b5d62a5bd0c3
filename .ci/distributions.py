"""Whether the wheel and the sdist in a folder hold the package, whole, and nothing else.

Run as `python .ci/distributions.py dist`.
"""

import sys
import tarfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
BESIDE_IN_SDIST = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
BESIDE_IN_WHEEL = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


def main(folder: Path) -> None:
    """Exit with what is missing and what is superfluous."""
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trl_tpgrpo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    metadata = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    faults = differences(wheel, files_of_wheel(wheel), package | {f"{metadata}/{name}" for name in BESIDE_IN_WHEEL})
    faults += differences(sdist, files_of_sdist(sdist), package | BESIDE_IN_SDIST)
    if faults:
        sys.exit("\n".join(faults))


def files_of_wheel(wheel: Path) -> set[str]:
    """Names of its files."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_of_sdist(sdist: Path) -> set[str]:
    """Names of its files below the folder that all are in, but for what setuptools notes for itself."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return {name for name in names if not name.startswith("trl_tpgrpo.egg-info/")}


def differences(archive: Path, present: set[str], wanted: set[str]) -> list[str]:
    """A line for each file that is missing or superfluous."""
    missing = [f"{archive.name} lacks {name}" for name in sorted(wanted - present)]
    return missing + [f"{archive.name} should not hold {name}" for name in sorted(present - wanted)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
