"""Private idiom that pages, docstrings and messages must not have, each with the words to use instead."""

import ast
import re
from pathlib import Path

import pytest
from documents import PAGES, ROOT

import trl_tpgrpo


INSTEAD = {
    "as dear": "costs as much as",
    "at its word": "this is reward hacking",
    "by itself": "automatically, alone, on its own",
    "can be had": "is available",
    "credit by step": "step-level credit",
    "dear": "expensive",
    "dearer": "more expensive",
    "does the token do": "check access",
    "embedded model": "bundled toy model",
    "held against": "compared with",
    "num_evaluations": "nfe",  # the logged metric
    "of so many": "a number",
    "rhythm of": "API of",
    "so manieth": "every n-th",
    "so-manieth": "every n-th",
    "stand at": "be at, have",
    "stands at": "is at, has",
    "to be had": "is available",
    "to the bit": "bit-identical",
    "walks:": "tutorials:",
    "what to take": "recommended",
}
IDIOM = re.compile(rf"(?<!\w)(?:{'|'.join(INSTEAD)})(?!\w)", re.IGNORECASE)
ALLOWED = {"testbed.md": "num_evaluations"}  # an option of benchmarks/pretrain.py, which evaluates


def idioms(text: str, allowed: str | None = None) -> list[str]:
    """Name the idioms of a text, also across line ends, with what to write instead."""
    found = {match[0].lower() for match in IDIOM.finditer(" ".join(text.split()))} - {allowed}
    return [f"{words!r}: write {INSTEAD[words]!r}" for words in sorted(found)]


def strings(source: str) -> str:
    """Join the docstrings, messages and other strings of a Python file."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return "\n".join(node.value for node in nodes if isinstance(node.value, str))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_pages_are_in_standard_terms(page: Path) -> None:
    assert not idioms(page.read_text(), ALLOWED.get(page.name))


def test_docstrings_and_messages_are_in_standard_terms() -> None:
    package = Path(trl_tpgrpo.__file__).parent
    found = {str(path.relative_to(package)): idioms(strings(path.read_text())) for path in package.rglob("*.py")}
    assert not {name: words for name, words in found.items() if words}


def test_idioms_are_found() -> None:
    assert idioms("An image is as\n  DEAR as this, and `a.b` equals it to the bit.") == [
        "'as dear': write 'costs as much as'",
        "'to the bit': write 'bit-identical'",
    ]
    assert not idioms("dearth, standby, to the bitmap, my_num_evaluations")
    code = '"""What to take."""\nraise ValueError(f"{name} is not "\n    "to be had")  # as dear\n'
    assert [line.split("'")[1] for line in idioms(strings(code))] == ["to be had", "what to take"]
    assert idioms("--num_evaluations 40") and not idioms("--num_evaluations 40", "num_evaluations")
    assert (ROOT / "docs" / next(iter(ALLOWED))).exists()
