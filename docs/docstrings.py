"""Docstrings in the form that Hugging Face's libraries have them, turned into Markdown for the API page.

Their items are "name (`type`, *optional*, defaults to `value`): text", the text also on the next line, their links
"[`~trl.GRPOConfig`]", and their notes "> [!NOTE]", none of which mkdocstrings knows. Google's form, which the other
docstrings have, is left to mkdocstrings.
"""

import re
from typing import Any

import griffe


ITEM = re.compile(r"^ {4}(\w+) \((.+?)\):(?= |$)", re.MULTILINE)
SECTION = re.compile(r"^(Parameters|Args):\n(?=\s+(?:>|\w+ \((?:`|\[|\*)))", re.MULTILINE)
GROUP = re.compile(r"^ {4}> (?:Parameters that control )?(.+)\n+", re.MULTILINE)
LINK = re.compile(r"\[`~?([\w.]+)`\]")
SHORTENED = re.compile(r"~(?:\w+\.)+(?=\w)")


class HuggingFaceDocstrings(griffe.Extension):
    """Extension that rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with lists of its parameters in that form; a section behind them (`Raises:`) is kept."""
    text = SHORTENED.sub("", LINK.sub(lambda link: f"`{_name(link[1])}`", text))
    found = SECTION.search(text)
    if found is None:
        return text
    end = re.compile(r"^\S", re.MULTILINE).search(text, found.end())
    stop = end.start() if end else len(text)
    return text[: found.start()] + _listed(text[found.end() : stop]) + _notes(text[stop:])


def _name(path: str) -> str:
    """Return the last part of a dotted path, with the class in front of a method."""
    *folders, name = path.split(".")
    return f"{folders[-1]}.{name}" if folders and folders[-1][0].isupper() else name


def _listed(items: str) -> str:
    items = GROUP.sub(lambda group: f"**{group[1][0].upper()}{group[1][1:]}**\n\n", items)
    items = ITEM.sub(lambda item: f"- `{item[1]}` ({item[2]}):", items)
    return (
        re.sub(r"^ {4}(?=\*\*|-)", "", re.sub(r"^ {8}", "    ", items, flags=re.MULTILINE), flags=re.MULTILINE) + "\n"
    )


def _notes(text: str) -> str:
    """Return quoted notes without the marker that only GitHub knows, and with the empty line that a list needs."""
    return re.sub(r"^> \[!NOTE\]\n> (.+)\n> -", r"> \1\n>\n> -", text, flags=re.MULTILINE)
