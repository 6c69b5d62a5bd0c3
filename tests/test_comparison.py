"""The table "Comparison" of README.md is that of docs/comparison.yaml, where each cell names what it was read in.

`python tests/test_comparison.py` prints the table.
"""

import datetime
import re
from typing import Any

import pytest
import yaml
from documents import ROOT


DATA = yaml.safe_load((ROOT / "docs/comparison.yaml").read_text())
PROJECTS = [project["key"] for project in DATA["projects"]]
CELLS = [
    pytest.param(row["feature"], project, row["cells"][project], id=f"{row['feature']}, {project}")
    for row in DATA["rows"]
    for project in PROJECTS
]


def table() -> list[list[str]]:
    """Return the cells of the table that the data makes, row by row, the header first."""
    header = [
        f"[{project['name']}]({project['url']})" if "url" in project else project["name"]
        for project in DATA["projects"]
    ]
    rows = [[row["feature"], *(row["cells"][project]["text"] for project in PROJECTS)] for row in DATA["rows"]]
    return [["", *header], *rows]


def markdown() -> str:
    """Return the table as README.md has it."""
    lines = [re.sub("  +", " ", f"| {' | '.join(row)} |") for row in table()]
    return "\n".join([lines[0], "|" + "---|" * len(table()[0]), *lines[1:]])


def in_readme() -> list[list[str]]:
    """Return the cells of the first table below the heading "Comparison" of README.md."""
    section = (ROOT / "README.md").read_text().split("\n## Comparison\n")[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)[0].splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert set(rows[1]) == {"---"}
    return [rows[0], *rows[2:]]


def is_here(source: str) -> bool:
    """Tell whether a path of this repository, or a test in it, exists."""
    path, _, test = source.partition("::")
    return (ROOT / path).exists() and (not test or f"\ndef {test}(" in (ROOT / path).read_text())


def test_the_table_of_the_readme_is_that_of_the_data() -> None:
    shown, expected = in_readme(), table()
    assert [len(row) for row in shown] == [len(row) for row in expected]
    for shown_row, expected_row in zip(shown, expected, strict=True):
        for project, shown_cell, expected_cell in zip(["", *PROJECTS], shown_row, expected_row, strict=True):
            assert shown_cell == expected_cell, (expected_row[0], project)


def test_the_table_has_all_cells_and_a_size_that_can_be_read() -> None:
    assert 12 <= len(DATA["rows"]) <= 16
    assert PROJECTS[0] == "here" and len(set(PROJECTS)) == len(PROJECTS)
    for row in DATA["rows"]:
        assert list(row["cells"]) == PROJECTS, row["feature"]
        assert "|" not in "".join(cell["text"] for cell in row["cells"].values())


@pytest.mark.parametrize(("feature", "project", "cell"), CELLS)
def test_every_cell_has_its_sources(feature: str, project: str, cell: dict[str, Any]) -> None:
    assert cell["sources"]
    for source in cell["sources"]:
        assert is_here(source) if project == "here" else source in DATA["sources"], source
    assert bool(cell["text"]) != bool(cell.get("looked_for")), "a blank cell says what was looked for"
    assert set(cell) <= {"text", "sources", "looked_for", "note"}


def test_every_source_has_a_place_a_version_and_a_date() -> None:
    others = [source for project in DATA["not_in_the_table"] for source in project["sources"]]
    used = {source for cell in CELLS for source in cell.values[2]["sources"] if cell.values[1] != "here"} | set(others)
    assert used == set(DATA["sources"])
    for name, source in DATA["sources"].items():
        assert set(source) == {"where", "version", "read"}, name
        assert re.match(r"https://|[\w.-]+/[\w.-]+(?: \(a fork\))?: \S", source["where"]), name
        assert isinstance(source["version"], str) and source["version"], name
        assert isinstance(source["read"], datetime.date) or re.fullmatch(r"\d{4}-\d{2}", source["read"]), name


def test_a_test_that_does_not_exist_is_found() -> None:
    assert is_here("tests/test_comparison.py::test_a_test_that_does_not_exist_is_found")
    assert not is_here("tests/test_comparison.py::test_that_does_not_exist")
    assert not is_here("tests/test_that_does_not_exist.py")


if __name__ == "__main__":
    print(markdown())  # noqa: T201
